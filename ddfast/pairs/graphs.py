"""Batches as CUDA graphs: recorded once, then launched without Python or the driver looking at every kernel.

Where groups differ (VAR), a whole batch is one graph. Where every step is the same instructions, whose place is read
from the device (LlamaGen), there is a graph that begins a batch, and one of a step for each guidance weight and number
of rows: few, however many steps.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from .decoder import Decoder

Replay = Callable[[], object]


class Recorder(Protocol):
    """What turns calls into graphs."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run what is going to be recorded, for whatever happens at first use only."""

    def record(self, run: Callable[[], None]) -> Replay:
        """The work that ``run`` gives the device, as something to launch again and again. It is not done now."""


class CudaRecorder:
    """Records CUDA graphs. They share one pool of memory, since nothing in it outlives a graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run on a stream beside the current one: kernels are compiled and tuned, workspaces allocated."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        gc.collect()  # not while recording, when nothing may be freed
        torch.cuda.empty_cache()  # graphs take their memory from a pool of their own

    def record(self, run: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            run()
        return graph.replay


def record_program(decoder: Decoder, begin: Callable[[], None], recorder: Recorder) -> list[Replay]:
    """The graphs of a whole batch, in the order in which they are to run.

    Args:
        decoder: whose buffers the graphs read and write.
        begin: begins a full batch of the decoder; what it does is in the graphs, too.
    """
    keys: list[tuple[float, int]] = []  # guidance weight and rows of each group

    def walk(groups: int | None = None) -> None:
        begin()
        keys.clear()
        for _ in range(len(decoder.teacher.groups) if groups is None else groups):
            keys.append((decoder.state.weight, decoder.state.rows))
            decoder.step_where_the_device_is()

    def whole() -> None:
        begin()
        decoder.run()

    if not decoder.teacher.steps_alike:
        recorder.warm_up(whole)
        return [recorder.record(whole)]
    recorder.warm_up(walk)
    kinds = list(keys)
    steps: dict[tuple[float, int], Replay] = {}
    for group, kind in enumerate(kinds):
        if kind not in steps:
            walk(group)  # so that the teacher stands at a group of this kind while its step is recorded
            steps[kind] = recorder.record(decoder.step_where_the_device_is)
    return [recorder.record(begin), *(steps[kind] for kind in kinds)]
