"""How samples are measured: Frechet distances, Inception Score, precision and recall, of images from any source."""
