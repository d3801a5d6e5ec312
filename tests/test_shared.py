"""What tests share is what they would have made: a digest tells apart whatever decides a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from shared import digest, once
from torch import nn


class Part(nn.Module):
    def __init__(self, plan: tuple[int, ...] = (0, 2), names: frozenset[int] = frozenset([0, 8])) -> None:
        super().__init__()
        self.linear, self.plan, self.names = nn.Linear(3, 2), plan, names
        self.scale = torch.ones(1)  # no part of the state
        with torch.no_grad():
            self.linear.weight.copy_(torch.arange(6.0).view(2, 3))
            self.linear.bias.zero_()


def changed(name: str) -> Part:
    part = Part((0,)) if name == "plan" else Part(names=frozenset([8, 0, 1])) if name == "set" else Part()
    if name == "weight":
        part.linear.weight.data[1, 2] += 1e-6
    elif name == "dtype":
        part.half()
    elif name == "gradient":
        part.requires_grad_(False)
    elif name == "mode":
        part.eval()
    elif name == "tensor":
        part.scale *= 2
    return part


def test_equal_modules_have_one_digest() -> None:
    """Whatever storage a weight lies in, and in whatever order a set was filled."""
    part = Part(names=frozenset([8, 0]))
    whole = torch.arange(10.0)
    part.linear.weight = nn.Parameter(whole[:6].view(2, 3))
    assert list(part.names) != list(Part().names) and digest(part) == digest(Part())


@pytest.mark.parametrize("name", ["plan", "set", "weight", "dtype", "gradient", "mode", "tensor"])
def test_a_module_that_differs_has_another_digest(name: str) -> None:
    assert digest(changed(name)) != digest(Part())


def test_inputs_and_options_count_too() -> None:
    part, x = Part(), torch.ones(2, 3)
    given: list[tuple[Any, ...]] = [(part, x, 1), (part, x, 2), (part, x.double(), 1), (part, x[:1], 1), (part, x)]
    assert len({digest(*each) for each in given}) == len(given)


def test_a_file_is_made_once_and_whole(tmp_path: Path) -> None:
    made: list[Path] = []

    def write(path: Path) -> None:
        made.append(path)
        path.write_text("half")
        if len(made) == 1:
            raise OSError("no space left")
        path.write_text("whole")

    with pytest.raises(OSError, match="no space"):
        once(tmp_path, "a.onnx", write)
    assert not (tmp_path / "a.onnx").exists()
    assert [once(tmp_path, "a.onnx", write).read_text() for _ in range(2)] == ["whole"] * 2 and len(made) == 2
