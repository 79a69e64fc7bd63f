"""Rounds as CUDA graphs, and how the host learns that it may stop.

Launching the hundreds of kernels of a round from Python takes longer than running them. A CUDA
graph launches them all at once. A round can be one graph because it reads and writes static tensors
only and never looks at a value: lengths, masks, ragged acceptance, ends, random numbers are
arithmetic on the device. Plain decoding is captured in the same way, so no speedup comes from that.
All graphs of an engine share one pool of memory, which lives as long as one of them.

Only the host's question "which rows are finished?" would make the device wait. `Watch` asks it of
two rounds ago.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from batch import Batch

LAG = 2  # rounds that the host may be ahead of the device
WARM_UP = 3  # times that work runs before it is captured: compiling, autotuning, workspaces


class Graphs:
    """Captures work on one batch, as CUDA graphs that share a memory pool."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.pool = torch.cuda.graph_pool_handle()
        self.newest: object = None  # one of the graphs that share the pool keeps it alive
        self.stream = torch.cuda.Stream()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """The work as one CUDA graph. A replay returns the tensors of the capture, written anew.

        The work must read and write static tensors only. Before it is captured it runs a few times
        from the same state, which is put back: nothing can be compiled during a capture.
        """
        before = self.batch.snapshot()
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                work()
                self.batch.restore(before)
        here.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with (
            torch.compiler.set_stance("fail_on_recompile"),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
        ):
            result = work()
        self.newest = graph

        def replay() -> object:
            graph.replay()
            return result

        return replay


class Watch:
    """Which rows are finished, as the host knows it: as of now, or on a GPU as of `lag` looks ago.

    There each look starts a copy to pinned memory, behind the work that the device has to do, and
    reads the copy of that time. The host waits for that one only, while later work is queued.
    A row that runs again meanwhile is not finished, whatever was seen of it before.
    """

    def __init__(self, finished: Tensor, lag: int) -> None:  # [B] bool, looks
        self.finished, self.lag = finished, lag
        self.rows = [False] * len(finished)  # by row, what is known
        self.valid = [0] * len(finished)  # by row, the first look that counts
        self.looks = 0
        if self.lag:
            shape = self.lag + 1, len(finished)
            self.copies = torch.zeros(shape, dtype=torch.bool, pin_memory=True)
            self.events = [torch.cuda.Event() for _ in range(self.lag + 1)]

    @property
    def running(self) -> list[int]:
        """1 for each row that runs, 0 for the others."""
        return [int(not finished) for finished in self.rows]

    def look(self) -> None:
        """Learn what the device has done."""
        last, self.looks = self.looks, self.looks + 1
        values = self.finished
        if self.lag:
            i, oldest = last % len(self.copies), self.looks % len(self.copies)
            self.copies[i].copy_(self.finished, non_blocking=True)
            self.events[i].record()
            if last < self.lag:
                return
            self.events[oldest].synchronize()
            values = self.copies[oldest]
        seen = enumerate(values.tolist())
        self.rows = [value and self.valid[b] <= last - self.lag for b, value in seen]

    def restart(self, b: int) -> None:
        """Row b runs, or where the device need not be waited for, it may have ended already."""
        self.rows[b], self.valid[b] = False, self.looks
        if not self.lag:
            self.look()
