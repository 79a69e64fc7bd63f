"""Rounds replayed from a tape of their operations, on the CPU: what a CUDA graph does to Python.

A graph holds the kernels that ran while it was captured, with the addresses they read and wrote.
What Python decided meanwhile - a branch, an int, which tensor an attribute names - stays decided.
Here a capture records operations instead of kernels, undoes what they wrote, and a replay repeats
them on the same tensors. A value that the host asks for during a capture is an error, as it is on
a GPU. If state is kept where a replay does not look, the text is no longer the model's own.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from drafters import shared_policies
from graphs import LAG, Graphs, Watch
from policies import POLICIES, Strategy
from refill import generate
from sampling import Sampling
from scripts.cuda_offline.report import Report
from spec_decode import Engine
from tests.reference import plain_greedy, tiny_model

READS_A_VALUE = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "masked_select")
NEW_TOKENS = 40
MAX_REPLAYS = 10 * NEW_TOKENS  # of one graph: many more than there are rounds in a case
PROMPTS = [[n * i * i % 89 + 1 for i in range(1, n)] for n in (4, 31, 58, 17)]
OTHERS = (Strategy("ngram", 4), Strategy(), Strategy("streaming", 2, 20))  # to change over to


def tensors(tree: object) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def storage(t: Tensor) -> int:
    """Which memory the tensor lies in."""
    return t.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Callable, tuple, dict, list[Tensor]]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # memory written, and what it held
        self.made: set[int] = set()  # memory that the capture itself allocated
        self.n_replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in READS_A_VALUE:
            raise RuntimeError(f"{func} asks for a value during a capture")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError(f"{func} draws a number that a replay would not draw anew")
        written = self.written(func, args, kwargs)
        for t in written:
            self.keep(t)
        out = func(*args, **kwargs)
        new = [t for t in tensors(out) if storage(t) not in map(storage, tensors((args, kwargs)))]
        self.made |= set(map(storage, new))
        if new or written:  # not a view
            self.operations.append((func, args, kwargs, new))
        return out

    @staticmethod
    def written(func, args: tuple, kwargs: dict) -> list[Tensor]:
        """The arguments that an operation changes."""
        changed = []
        for i, a in enumerate(func._schema.arguments):
            if a.alias_info is not None and a.alias_info.is_write:
                changed += tensors(args[i] if i < len(args) else kwargs.get(a.name))
        return changed

    def keep(self, t: Tensor) -> None:
        """Remember what memory from outside holds before it is written for the first time."""
        if storage(t) not in self.made and storage(t) not in self.before:
            whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
            self.before[storage(t)] = (whole, whole.clone())

    def undo(self) -> None:
        """A capture runs nothing."""
        for whole, value in self.before.values():
            whole.copy_(value)

    @torch.inference_mode()
    def replay(self) -> None:
        """The operations again, on the memory of the capture."""
        self.n_replays += 1
        if self.n_replays > MAX_REPLAYS:
            raise RuntimeError("rounds are replayed and the text does not end")
        for func, args, kwargs, made in self.operations:
            out = func(*args, **kwargs)
            for old, new in zip(made, tensors(out) if made else [], strict=True):
                old.copy_(new)


@contextmanager
def capture(graph: Tape, **options) -> Iterator[None]:
    """Stands for torch.cuda.graph."""
    with graph:
        yield
    graph.undo()


class Stub:
    """A stream or an event: there is only one order here."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None


class Pageable(TorchFunctionMode):
    """Allocates pinned memory, which a CPU build does not have, as any other."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "pin_memory"}
        return func(*args, **kwargs)


@contextmanager
def tapes(made: list[Tape]) -> Iterator[None]:
    """Inside, CUDA graphs are tapes; `made` gets each."""

    def new_tape(*args, **kwargs) -> Tape:
        made.append(Tape())
        return made[-1]

    instead = {
        "CUDAGraph": new_tape, "graph": capture, "Event": Stub, "Stream": Stub,
        "stream": lambda stream: nullcontext(), "current_stream": Stub,
        "graph_pool_handle": lambda: None, "synchronize": lambda *args: None,
    }  # fmt: skip
    with ExitStack() as stack, Pageable():
        for name, value in instead.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        yield


def strategies() -> dict[str, tuple[Strategy, int | None]]:
    """Name -> how to draft, and the context of the draft model (None: there is none)."""
    found = {"none": (Strategy(), None), "ngram": (Strategy("ngram", 3), None)}
    for policy in POLICIES:
        strategy = Strategy(policy, 3, 24, 3, obs_window=7)
        found[policy] = (strategy, None)
        if policy in shared_policies():
            context = 40 if policy == "streaming" else 4096  # so short that it anchors anew
            found[f"{policy} by a draft model"] = (strategy, context)
    found["full by a draft model"] = (Strategy("full", 3), 4096)
    return found


def engine_for(strategy: Strategy, context: int | None, sampling: Sampling, graphs: bool) -> Engine:
    """An engine that captures its rounds although it is on the CPU, if `graphs`."""
    longest = max(map(len, PROMPTS)) + NEW_TOKENS
    draft = tiny_model(2, 1, seed=1, max_seq_len=context) if context else None
    engine = Engine(tiny_model(), len(PROMPTS), longest, strategy, sampling, 7, draft)
    if graphs:
        engine.graphs = Graphs(engine.batch)
        engine.watch = Watch(engine.batch.finished, LAG)
    return engine


def greedy(report: Report, name: str, expected: list[list[int]]) -> None:
    """The text from replays, again after a rewind, and with other drafts in the same engine."""
    strategy, context = strategies()[name]
    made: list[Tape] = []
    with report.case(f"greedy {name}") as said, tapes(made), torch.inference_mode():
        engine = engine_for(strategy, context, Sampling(), graphs=True)
        outputs, stats = generate(engine, PROMPTS, NEW_TOKENS)
        tape = max(made, key=lambda tape: tape.n_replays)  # of the rounds
        n_replays, n_rounds = tape.n_replays, stats.rounds
        said.append(f"{n_replays} replays of {len(tape.operations)} operations")
        if outputs != expected:
            report.fail(f"greedy {name}: replays give other text than the model")
        if not n_rounds <= n_replays <= n_rounds + LAG:
            report.fail(f"greedy {name}: {n_replays} replays for {n_rounds} rounds")
        engine.rewind()
        engine.run()
        if engine.batch.stats() != stats or engine.batch.outputs() != expected:
            report.fail(f"greedy {name}: the graphs that are there give other text")
        for other in OTHERS if context is None else ():
            engine.use(other)
            engine.rewind()
            engine.run()
            if engine.batch.outputs() != expected:
                report.fail(f"greedy {name}: other text after use({other.policy})")


def sampled(report: Report, name: str) -> None:
    """Replays choose as eager rounds do: noise depends on the place, which a replay must read."""
    strategy, context = strategies()[name]
    with report.case(f"sampled {name}"), tapes([]), torch.inference_mode():
        texts = []
        for graphs in (True, False):
            engine = engine_for(strategy, context, Sampling(1.0, 20, 0.95), graphs)
            texts.append(generate(engine, PROMPTS, NEW_TOKENS)[0])
        if texts[0] != texts[1]:
            report.fail(f"sampled {name}: replays give other text than eager rounds")


def check(match: str) -> list[str]:
    """The failures."""
    report = Report(match)
    with torch.inference_mode():
        expected = [plain_greedy(tiny_model(), prompt, NEW_TOKENS) for prompt in PROMPTS]
    for name in strategies():
        if report.wants(f"greedy {name}"):
            greedy(report, name, expected)
        if report.wants(f"sampled {name}"):
            sampled(report, name)
    return report.end()
