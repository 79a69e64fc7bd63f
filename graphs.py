"""Rounds as CUDA graphs, and how the host learns that it may stop.

Launching the hundreds of kernels of a round from Python takes longer than running them. A CUDA
graph launches them all at once. A round can be one graph because it reads and writes static tensors
only and never looks at a value: lengths, masks, ragged acceptance and ends are arithmetic on the
device. Plain decoding is captured in the same way, so no speedup comes from that.

Two things tie a graph to its surroundings. Random numbers: the generator is registered with the
graph, so that every replay draws new ones from where the last one stopped. Memory: all graphs of an
engine share one pool, which lives as long as one of them.

Only the host's question "are all rows finished?" would make the device wait. `LaggingFlag` asks it
of two rounds ago.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from batch import Batch

LAG = 2  # rounds that the host may be ahead of the device
WARM_UP = 3  # times that work runs before it is captured: compiling, autotuning, workspaces


class Graphs:
    """Captures work on one batch, as CUDA graphs that share a memory pool."""

    def __init__(self, batch: Batch, generator: torch.Generator) -> None:
        self.batch, self.generator = batch, generator
        self.pool = torch.cuda.graph_pool_handle()
        self.newest: object = None  # one of the graphs that share the pool keeps it alive
        self.stream = torch.cuda.Stream()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """The work as one CUDA graph. A replay returns the tensors of the capture, written anew.

        The work must read and write static tensors only. Before it is captured it runs a few times
        from the same state, which is put back: nothing can be compiled during a capture.
        """
        before, random_state = self.batch.snapshot(), self.generator.get_state()
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                work()
                self.batch.restore(before)
        here.wait_stream(self.stream)
        self.generator.set_state(random_state)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with (
            torch.compiler.set_stance("fail_on_recompile"),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
        ):
            result = work()
        self.newest = graph

        @torch.inference_mode()  # as in the capture: the generator's state is of that mode
        def replay() -> object:
            graph.replay()
            return result

        return replay


class LaggingFlag:
    """Asks "all finished?" without waiting, and answers as of LAG calls ago.

    Each call starts a copy to pinned memory, behind the work that the device has to do, and reads
    the copy of LAG calls ago. The host waits for that one only, while later work is queued.
    """

    def __init__(self, flags: Tensor) -> None:  # [B] bool
        self.flags = flags
        self.copies = torch.zeros(LAG + 1, dtype=torch.bool, pin_memory=True)
        self.events = [torch.cuda.Event() for _ in range(LAG + 1)]
        self.calls = 0

    def __call__(self) -> bool:
        i = self.calls % (LAG + 1)
        self.copies[i].copy_(self.flags.all(), non_blocking=True)
        self.events[i].record()
        self.calls += 1
        oldest = self.calls % (LAG + 1)
        if self.calls <= LAG:
            return False
        self.events[oldest].synchronize()
        return bool(self.copies[oldest])
