from collections.abc import Sequence

cuda_built: bool

def cpu_levels() -> list[str]: ...
def cpu_level() -> str: ...
def set_cpu_level(name: str) -> None: ...
def set_poison(on: bool) -> None: ...
def normal_noise_cpu(seed: int, pairs: int, num_pairs: int, start: int, stop: int, channels: int, out: int) -> None: ...
def flow_cpu(
    cond: int,
    uncond: int,
    dtype: int,
    noise: int,
    codebook: int,
    rows: int,
    vocab: int,
    channels: int,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    rule: int,
    knots: Sequence[float],
    predict: Sequence[Sequence[float]],
    correct: Sequence[Sequence[float]],
    offset: float,
    shrink: float,
    certain: float,
    pair: float,
    prune: float,
    tokens: int,
    x: int,
    evaluations: int,
) -> None: ...
def filter_cpu(
    logits: int, rows: int, vocab: int, temperature: float, top_k: int, top_p: float, rule: int, out: int
) -> None: ...
def nearest_cpu(x: int, rows: int, codebook: int, vocab: int, channels: int, out: int) -> None: ...

# Only when cuda_built:
def normal_noise_cuda(
    seed: int, pairs: int, num_pairs: int, start: int, stop: int, channels: int, out: int, stream: int
) -> None: ...
