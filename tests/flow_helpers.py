"""Shared by the tests of the flow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ddfast.flow import CodebookFlow


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Work this small loses more to being handed over than it gains from a second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def golden_flow(golden: Any) -> tuple[CodebookFlow, Tensor]:
    """The float64 flow and the noise of a golden file."""
    flow = CodebookFlow(golden["in.p"].double().log(), golden["in.codebook"].double())
    return flow, golden["in.noise"].double()
