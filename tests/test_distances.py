"""The distances of the student's loss: by hand, against the lpips package, and what they refuse."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddfast.errors import UserError
from ddfast.evaluation.features import declare_torchvision_operators
from ddfast.models.digits import DigitsTokenizer, DigitsTokenizerConfig
from ddfast.models.llamagen_vq import LlamaGenTokenizer, LlamaGenTokenizerConfig
from ddfast.models.var_vqvae import VARTokenizer, VARTokenizerConfig
from ddfast.models.zoo import load_tokenizer
from ddfast.training.distance import L2, ClassifierFeatures, PerceptualDistance, make_distance
from ddfast.training.lpips import load_lpips, vgg16_features

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # of torchvision's vgg16().features
TAPS = (2, 7, 14, 21, 28)  # those whose activations LPIPS compares
WIDTHS = (64, 128, 256, 512, 512)
DIGITS = DigitsTokenizerConfig(24, 4, 16, (1, 2, 4))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(module: nn.Module, std: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded(parameter.numel())) * std)
    return module.eval()


def tokenizer_of(family: str) -> Any:
    """A tiny tokenizer with random weights whose images leave [0, 1] in places."""
    if family == "digits":
        return randomised(DigitsTokenizer(DIGITS))
    if family == "llamagen":
        return randomised(LlamaGenTokenizer(LlamaGenTokenizerConfig(24, 4, 32, (1, 1), 1, 8, grid=4)))
    return randomised(VARTokenizer(VARTokenizerConfig(24, 4, 32, (1, 1), 1, (1, 2, 4))))


def embeddings_of(tokenizer: Any, batch: int, seed: int = 0) -> Tensor:
    """Random embeddings [B, L, C]."""
    count = tokenizer.config.grid**2 if isinstance(tokenizer, LlamaGenTokenizer) else 21
    return torch.randn(batch, count, 4, generator=seeded(seed))


def everything_unknown(x_BLC: Tensor) -> Tensor:
    return torch.ones(x_BLC.shape[:2], dtype=torch.bool)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VGG16 with random weights under torchvision's names, its classifier cut short."""
    tensors, channels = {"classifier.6.bias": torch.zeros(1000)}, 3
    for index, layer in enumerate(vgg16_features()):
        if isinstance(layer, nn.Conv2d):
            std = (2 / (9 * channels)) ** 0.5
            tensors[f"features.{index}.weight"] = torch.randn(layer.weight.shape, generator=seeded(index)) * std
            channels = layer.out_channels
            tensors[f"features.{index}.bias"] = torch.randn(channels, generator=seeded(index)) * 0.1
    path = tmp_path_factory.mktemp("vgg") / "vgg16-397923af.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture
def heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package called lpips that holds random heads and cannot be imported; the file of the heads."""
    path = tmp_path / "lpips" / "weights" / "v0.1" / "vgg.pth"
    path.parent.mkdir(parents=True)
    (tmp_path / "lpips" / "__init__.py").write_text("raise RuntimeError('imported')")
    named = {f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1, generator=seeded(k)) for k, w in enumerate(WIDTHS)}
    torch.save(named, path)
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return path


def lpips_by_the_formula(vgg_file: Path, heads_file: Path, x: Tensor, y: Tensor) -> Tensor:
    """LPIPS [B] of images in [0, 1], position by position."""
    weights, heads = torch.load(vgg_file, weights_only=True), torch.load(heads_file, weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    h_x, h_y = (((2 * t - 1).movedim(1, 3) - shift) / scale for t in (x, y))
    h_x, h_y = h_x.movedim(3, 1), h_y.movedim(3, 1)
    total = torch.zeros(len(x))
    for index in CONVOLUTIONS:
        weight, bias = weights[f"features.{index}.weight"], weights[f"features.{index}.bias"]
        h_x, h_y = (F.conv2d(h, weight, bias, padding=1).relu() for h in (h_x, h_y))
        if index in TAPS:
            head = heads[f"lin{TAPS.index(index)}.model.1.weight"].flatten()
            difference = F.normalize(h_x, dim=1) - F.normalize(h_y, dim=1)
            total = total + torch.einsum("bchw,c->bhw", difference.square(), head).mean((1, 2))
            h_x, h_y = F.max_pool2d(h_x, 2), F.max_pool2d(h_y, 2)
    return total


def test_l2_averages_unknown_positions_and_channels() -> None:
    target = torch.zeros(2, 3, 2)
    predicted = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 4.0]], [[9.0, 9.0], [9.0, 9.0], [1.0, 3.0]]])
    unknown = torch.tensor([[False, True, True], [False, False, True]])
    assert L2()(predicted, target, unknown).tolist() == [(1 + 4 + 9 + 16) / 4, (1 + 9) / 2]
    assert L2()(predicted.half(), target, unknown).dtype == torch.float32


@pytest.mark.parametrize("family", ["digits", "llamagen", "var"])
def test_continuous_decoding_is_decoding_without_the_clamp(family: str) -> None:
    tokenizer = tokenizer_of(family)
    x = embeddings_of(tokenizer, 2)
    free = tokenizer.decode_continuous(x)
    assert free.min() < 0 and free.max() > 1
    torch.testing.assert_close(free.clamp(0, 1), tokenizer.decode_embeddings(x))


@pytest.mark.parametrize("family", ["digits", "llamagen", "var"])
def test_gradient_of_continuous_decoding(family: str) -> None:
    tokenizer = tokenizer_of(family).double().requires_grad_(False)
    x = embeddings_of(tokenizer, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(tokenizer.decode_continuous, x, fast_mode=True)


def test_lpips_is_its_formula(vgg_file: Path, heads: Path) -> None:
    x, y = torch.rand(2, 3, 3, 36, 32, generator=seeded())
    got = load_lpips(vgg_file)(x, y)
    torch.testing.assert_close(got, lpips_by_the_formula(vgg_file, heads, x, y), rtol=1e-5, atol=0)
    assert got.min() > 0.01


@pytest.mark.skipif(importlib.util.find_spec("lpips") is None, reason="the lpips package is not installed")
@pytest.mark.filterwarnings("ignore")  # torchvision's, about its old arguments
def test_lpips_is_that_of_the_lpips_package(tmp_path: Path) -> None:
    declare_torchvision_operators()
    import lpips

    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    weights = {f"features.{key.partition('.')[2]}": t for key, t in theirs.net.state_dict().items()}
    torch.save(weights, tmp_path / "vgg16.pth")
    ours = load_lpips(tmp_path / "vgg16.pth")
    x, y = torch.rand(2, 3, 3, 64, 48, generator=seeded())
    x.requires_grad_()
    got, want = ours(x, y), theirs(x, y, normalize=True).flatten()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    gradient, their_gradient = (torch.autograd.grad(distance.sum(), x)[0] for distance in (got, want))
    assert (gradient - their_gradient).norm() < 1e-5 * their_gradient.norm()


def test_gradient_of_lpips_is_finite_where_all_features_are_zero(vgg_file: Path, heads: Path, tmp_path: Path) -> None:
    weights = torch.load(vgg_file, weights_only=True)
    weights["features.28.bias"] -= 1e4
    torch.save(weights, tmp_path / "dead.pth")
    x, y = torch.rand(2, 1, 3, 32, 32, generator=seeded())
    network = load_lpips(tmp_path / "dead.pth")
    assert not network.stages(x)[-1].any()
    network(x.requires_grad_(), y).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


class Pyramid(nn.Module):
    """Features of two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3, stride=2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(images).tanh()
        return h, self.second(h).mean((2, 3))


def export(path: Path, network: nn.Module, side: int = 16, dynamic: bool = True) -> Path:
    batch = {0: torch.export.Dim("batch")} if dynamic else None
    program = torch.export.export(network, (torch.rand(2, 3, side, side),), dynamic_shapes=(batch,))
    torch.export.save(program, path)
    return path


def distances(tmp_path: Path, vgg_file: Path) -> dict[str, Callable[[Any], Any]]:
    """Every distance, to be made for a tokenizer of 16 pixels."""
    network = export(tmp_path / "pyramid.pt2", randomised(Pyramid()))
    return {
        "l2": lambda tokenizer: make_distance("l2", tokenizer, device="cpu"),
        "lpips": lambda tokenizer: make_distance("lpips", tokenizer, lpips_weights=vgg_file, device="cpu"),
        "classifier": lambda tokenizer: make_distance(
            "features", tokenizer, features="digits-classifier", device="cpu"
        ),
        "program": lambda tokenizer: make_distance("features", tokenizer, features=network, device="cpu"),
    }


@pytest.mark.parametrize("kind", ["l2", "lpips", "classifier", "program"])
def test_each_distance_wants_the_target_and_moves_the_prediction_alone(
    kind: str, tmp_path: Path, vgg_file: Path, heads: Path
) -> None:
    tokenizer = tokenizer_of("digits")
    distance = distances(tmp_path, vgg_file)[kind](tokenizer)
    target = embeddings_of(tokenizer, 3, seed=1).requires_grad_()
    unknown = everything_unknown(target)
    predicted = embeddings_of(tokenizer, 3).requires_grad_()
    out = distance(predicted, target, unknown)
    assert out.shape == (3,) and out.dtype == torch.float32 and out.min() > 0
    assert not distance(target.detach().clone(), target, unknown).any()
    out[1].backward()
    assert predicted.grad is not None and target.grad is None
    assert predicted.grad[1].any() and not predicted.grad[[0, 2]].any()
    assert all(p.grad is None for p in tokenizer.parameters())
    step = predicted.detach() - 1e-3 * predicted.grad / predicted.grad.norm()
    assert distance(step, target, unknown)[1] < out[1]


@pytest.mark.parametrize("kind", ["l2", "lpips", "classifier", "program"])
def test_each_distance_takes_a_sample_by_itself(kind: str, tmp_path: Path, vgg_file: Path, heads: Path) -> None:
    tokenizer = tokenizer_of("digits")
    distance = distances(tmp_path, vgg_file)[kind](tokenizer)
    x, y = embeddings_of(tokenizer, 4), embeddings_of(tokenizer, 4, seed=1)
    unknown = everything_unknown(x)
    unknown[1, :5] = unknown[3, :1] = False
    whole = distance(x, y, unknown)
    parts = [distance(x[i : i + 1], y[i : i + 1], unknown[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["l2", "lpips", "classifier", "program"])
def test_autocast_changes_no_distance(kind: str, tmp_path: Path, vgg_file: Path, heads: Path) -> None:
    tokenizer = tokenizer_of("digits")
    distance = distances(tmp_path, vgg_file)[kind](tokenizer)
    x, y = embeddings_of(tokenizer, 2).bfloat16(), embeddings_of(tokenizer, 2, seed=1)
    plain = distance(x.float(), y, everything_unknown(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(x, y, everything_unknown(x)), plain)


def test_saturated_pixels_have_a_gradient() -> None:
    class Brightness(nn.Module):
        def forward(self, predicted: Tensor, target: Tensor) -> Tensor:
            return (predicted - target).abs().mean((1, 2, 3))

    tokenizer = load_tokenizer("digits-var").build(torch.float32, "cpu")
    assert isinstance(tokenizer, DigitsTokenizer)
    x = tokenizer.codebook[torch.randint(64, (4, 30), generator=seeded())] * 8
    images = tokenizer.decode_continuous(x)
    outside = (images < 0) | (images > 1)
    assert outside.float().mean() > 0.2

    x.requires_grad_()
    PerceptualDistance(tokenizer, Brightness())(x, x.detach() * 0, everything_unknown(x)).sum().backward()
    free = x.grad
    x.grad = None
    Brightness()(tokenizer.decode_embeddings(x), tokenizer.decode_continuous(x.detach() * 0)).sum().backward()
    assert free is not None and x.grad is not None and (free - x.grad).norm() > 0.2 * free.norm()


def test_features_count_each_tensor_alike(tmp_path: Path) -> None:
    tokenizer, network = tokenizer_of("digits"), randomised(Pyramid())
    distance = make_distance("features", tokenizer, features=export(tmp_path / "p.pt2", network), device="cpu")
    x, y = embeddings_of(tokenizer, 3), embeddings_of(tokenizer, 3, seed=1)
    (a, b), (c, d) = (network(tokenizer.decode_continuous(t)) for t in (x, y))
    want = ((a - c).square().mean((1, 2, 3)) + (b - d).square().mean(1)) / 2
    torch.testing.assert_close(distance(x, y, everything_unknown(x)), want)


def test_digits_classifier_reads_the_gray_channel() -> None:
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    network = ClassifierFeatures()
    assert network(images).shape == (2, 64)
    assert torch.equal(network(images), network.classifier.features(images[:, :1]))


def test_making_a_distance_draws_no_random_numbers(vgg_file: Path, heads: Path, tmp_path: Path) -> None:
    tokenizer, makers = tokenizer_of("digits"), distances(tmp_path, vgg_file)
    for kind, make in makers.items():
        before = torch.get_rng_state()
        make(tokenizer)
        assert torch.equal(torch.get_rng_state(), before), kind


def refused(match: str, name: str, **options: Any) -> None:
    tokenizer = options.pop("tokenizer", None) or tokenizer_of("digits")
    with pytest.raises(UserError, match=match):
        make_distance(name, tokenizer, device="cpu", **options)


def test_names_and_options_that_do_not_belong_together_are_refused() -> None:
    refused("no distance is called 'ssim'; use one of lpips, l2, features", "ssim")
    refused(
        "--lpips-weights v.pth is not for the distance l2; drop it, or use the distance lpips",
        "l2",
        lpips_weights="v.pth",
    )
    refused("--features f.pt2 is not for the distance lpips", "lpips", lpips_weights="v.pth", features="f.pt2")
    refused("a network: name digits-classifier or a .pt2 file with --features", "features")
    refused("--features vgg.pth is neither digits-classifier nor a .pt2 file", "features", features="vgg.pth")


def test_lpips_without_what_it_needs_says_what_to_bring(
    vgg_file: Path, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(r"bring vgg16-397923af\.pth from PyTorch's model hub .* --lpips-weights", "lpips")
    refused("none.pth does not exist", "lpips", lpips_weights=tmp_path / "none.pth")
    small = randomised(DigitsTokenizer(replace(DIGITS, patch_nums=(1, 2, 3))))
    refused("images of 16 pixels, not 12", "lpips", lpips_weights=vgg_file, tokenizer=small)
    heads.unlink()
    refused(r"vgg.pth does not exist", "lpips", lpips_weights=vgg_file)
    monkeypatch.setitem(sys.modules, "lpips", None)
    refused(r"pip install 'ddfast\[lpips\]'", "lpips", lpips_weights=vgg_file)


def test_a_folder_called_lpips_is_no_package(
    vgg_file: Path, heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lpips" / "__init__.py").unlink()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    refused(r"pip install 'ddfast\[lpips\]'", "lpips", lpips_weights=vgg_file)


def test_another_network_in_place_of_vgg16_is_refused_with_its_keys(
    vgg_file: Path, heads: Path, tmp_path: Path
) -> None:
    other = torch.load(vgg_file, weights_only=True)
    del other["features.0.bias"]
    other["features.1.running_mean"] = torch.zeros(64)
    other["features.2.weight"] = torch.zeros(64, 3, 3, 3)
    path = tmp_path / "other.pth"
    torch.save(other, path)
    with pytest.raises(UserError) as error:
        load_lpips(path)
    assert str(error.value).splitlines() == [
        f"{path} is not torchvision's VGG16 (vgg16-397923af.pth):",
        "  missing features.0.bias [64]",
        "  unexpected features.1.running_mean [64]",
        "  features.2.weight has shape [64, 3, 3, 3] instead of [64, 64, 3, 3]",
    ]
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, heads)
    refused("is not the heads of LPIPS 0.1", "lpips", lpips_weights=vgg_file)


class Faulty(nn.Module):
    """Features with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.conv, self.norm = fault, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        if self.fault == "detached":
            images = images.detach()
        h = self.norm(self.conv(images))
        if self.fault == "dropout":
            h = F.dropout(h, training=True)
        return {"h": h} if self.fault == "dict" else h.mean() if self.fault == "scalar" else h


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("training", "other features beside another image; export it in eval mode"),
        ("dropout", "other features beside another image; export it in eval mode"),
        ("detached", "gives the images no gradient"),
        ("dict", "to a tensor or a tuple of them"),
        ("scalar", r"features of shapes \[\[\]\] for 2 images; each must be \[B, ...\]"),
    ],
)
def test_a_network_whose_features_are_no_use_is_refused(fault: str, message: str, tmp_path: Path) -> None:
    network = Faulty(fault).train(fault == "training")
    refused(message, "features", features=export(tmp_path / "faulty.pt2", network))


def test_a_network_for_other_images_is_refused(tmp_path: Path) -> None:
    wide = export(tmp_path / "wide.pt2", Pyramid(), side=32)
    refused(r"does not map images \[B, 3, 16, 16\], for every B", "features", features=wide)
    fixed = export(tmp_path / "fixed.pt2", Pyramid(), dynamic=False)
    refused("a dynamic batch", "features", features=fixed)
    small = randomised(DigitsTokenizer(replace(DIGITS, patch_nums=(1, 2, 3))))
    refused(
        r"digits-classifier does not map images \[B, 3, 12, 12\]",
        "features",
        features="digits-classifier",
        tokenizer=small,
    )


def test_a_file_that_is_no_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "n.pt2"
    refused("n.pt2 does not exist", "features", features=path)
    whole = export(tmp_path / "whole.pt2", Pyramid()).read_bytes()
    torch.save({"a": torch.zeros(3)}, tmp_path / "state.pt2")
    flipped = bytearray(whole)
    flipped[whole.index(Pyramid.__name__.encode())] ^= 1
    for content in (b"PK", whole[:-300], (tmp_path / "state.pt2").read_bytes()):
        path.write_bytes(content)
        refused("n.pt2 cannot be read as a program of torch.export.save", "features", features=path)
    path.write_bytes(flipped)
    refused("n.pt2 is damaged: the checksum of .* differs", "features", features=path)
