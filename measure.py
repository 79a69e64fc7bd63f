"""A run, timed: the clock is here. What comes of it are plain numbers, for `report.py`.

    compile | prefill | plain decoding, if it is compared with | decoding | single steps

Both decodings start from the same prefill, with the same caches and compiled blocks: the baseline
is the same program with zero drafts. Compiling and prefill are in no decoding time, and a row's
first token belongs to the prefill. `T_T`, `T_D` and `T_V` are medians of single steps, repeated
from the state after the prefill. Nothing is printed inside a timed run.
"""

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F

from auto import Auto
from config import kv_bytes
from device import dtype_name, machine, peak_memory_bytes, timed
from kv_cache import KVCache
from report import Measurement, Run
from sampling import Sampling, Stats
from spec_decode import Engine

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be decoded: a prompt per row of the engine."""

    prompts: list[list[int]]  # token ids
    max_new_tokens: int  # of every row
    end_ids: tuple[int, ...] = ()  # tokens that end a row
    compare: bool = False  # decode plainly, too
    sampling: Sampling | None = None  # of all rows; None: the engine's own


class Progress:
    """Says how far something is whenever another quarter of it is done."""

    def __init__(self, say: Callable[..., None]) -> None:
        self.say, self.quarters = say, 0

    def __call__(self, done: int, total: int) -> None:
        if 4 * done // total > self.quarters:
            self.quarters = 4 * done // total
            self.say(f"{25 * self.quarters}%", end=" ")


def warm_up(engine: Engine, auto: Auto | None, refills: bool = False) -> None:
    """Compile every shape that will run; the automatic choice is calibrated."""
    engine.warm_up(refills)
    if auto:
        auto.calibrate(refills)


def decode(
    engine: Engine,
    gamma: int | None = None,  # draft tokens per round; None: the engine's own
    auto: Auto | None = None,  # decides, if given
    on_round: Callable[[], None] = lambda: None,
) -> Stats:
    """Rounds to the end of the prefilled batch, and what they did."""
    for _ in auto.rounds() if auto else engine.rounds(gamma):
        on_round()
    return engine.batch.stats()


@dataclass(frozen=True, slots=True)
class Runs:
    """Timed runs from one prefill. Says before and after each what it is doing."""

    engine: Engine
    job: Job
    say: Callable[..., None]  # prints its text, with an `end`

    def phase(self, what: str, work: Callable[[], T]) -> tuple[float, T]:
        """Seconds that the work took, and what it returned."""
        self.say(what, end=" ... ")
        seconds, result = timed(self.engine.device, work)
        self.say(f"{seconds:.1f} s")
        return seconds, result

    @property
    def warming(self) -> str:
        """What it does before anything is timed."""
        return "compiling" if self.engine.model.compiled else "warming up"

    def warm_up(self, auto: Auto | None) -> float:
        """Seconds of `warm_up`."""
        return self.phase(self.warming, lambda: warm_up(self.engine, auto))[0]

    def prefill(self) -> float:
        """Seconds of the prefill."""
        job, progress, n = self.job, Progress(self.say), len(self.job.prompts)
        work = partial(
            self.engine.prefill, job.prompts, [job.max_new_tokens] * n, job.end_ids,
            lambda b: progress(b + 1, n), sampling=job.sampling,
        )  # fmt: skip
        return self.phase(f"prefilling {sum(map(len, job.prompts)):,} tokens", work)[0]

    def decoding(self, what: str, work: Callable[[], Stats]) -> Run:
        """Decode from the prefill on."""
        self.engine.rewind()
        seconds, stats = self.phase(what, work)
        return Run(
            seconds, self.engine.batch.outputs(), stats.rounds, stats.row_rounds,
            stats.decoded_tokens, acceptance(stats),
        )  # fmt: skip


@torch.inference_mode()
def measure(
    engine: Engine,
    auto: Auto | None,  # what decides how to draft, if anything is left to decide
    job: Job,
    say: Callable[..., None],  # prints its text, with an `end`
    tracer: AbstractContextManager | None = None,  # a profiler of the decoding
) -> Measurement:
    """Warm up, prefill, decode, time the steps."""
    runs, lengths = Runs(engine, job, say), [*map(len, job.prompts)]
    compile_seconds, prefill_seconds = runs.warm_up(auto), runs.prefill()
    draft_prefill_seconds = None
    if engine.drafter and engine.drafter.own_model:
        draft_prefill_seconds, _ = runs.phase("prefilling the draft model", engine.catch_up)
    baseline = None
    if job.compare:
        baseline = runs.decoding("decoding plainly", lambda: decode(engine, 0))
    with tracer or nullcontext():
        main = runs.decoding("decoding", lambda: decode(engine, auto=auto))
    if auto:
        say(auto.explain())
        engine.switch(auto.mostly.candidate.drafter if auto.mostly.candidate else None)
    engine.rewind()
    times = step_times(engine, gamma=auto.mostly.gamma if auto else None)
    return Measurement(
        setting(engine, auto), lengths, compile_seconds, prefill_seconds, draft_prefill_seconds,
        {name: statistics.median(values) for name, values in times.items()},
        step_bytes(engine, lengths), peak_memory_bytes(engine.device),
        main, baseline, differences(engine, job.prompts, main, baseline),
    )  # fmt: skip


def acceptance(stats: Stats) -> dict:
    """Figures of acceptance, as the JSON has them; none if nothing was drafted."""
    names = ("mean_acceptance_length", "draft_acceptance_rate", "acceptance_rate_per_position",
             "accepted_histogram")  # fmt: skip
    return {name: getattr(stats, name) for name in names} if stats.drafts else {}


def setting(engine: Engine, auto: Auto | None) -> dict:
    """What ran, as the JSON has it."""
    drafter = engine.drafter
    plan = drafter.strategy.describe() if drafter else {"strategy": "none", "gamma": 0}
    if drafter and drafter.select_every:
        plan["select_every"] = drafter.select_every
    if auto:
        plan |= auto.decision() | {"gamma": auto.mostly.gamma}
    draft_model = drafter and drafter.own_model
    return {
        "environment": environment(engine),
        "model": asdict(engine.model.config),
        "sampling": asdict(engine.sampling),
        "plan": plan,
    } | ({"draft_model": asdict(draft_model.config)} if draft_model else {})


def environment(engine: Engine) -> dict:
    """Where this runs, as the JSON has it."""
    spec = engine.full.spec
    dtypes = {"dtype": dtype_name(spec.dtype), "kv_dtype": dtype_name(spec.stored_dtype)}
    exact = {"padded_to_drafts": spec.exact} if spec.exact else {}
    return machine(engine.device) | dtypes | {"compiled": engine.model.compiled} | exact


def step_times(
    engine: Engine, repeats: int = 9, gamma: int | None = None, **more: Callable[[], object]
) -> dict[str, list[float]]:
    """Milliseconds, by repeat, of a plain step, a draft step, a verification, and of more work.

    A plain step and a verification end with what is decided from their logits. Of a verification
    that part is timed alone, too (accept_ms). All take turns, so that they see the same machine.
    """
    gamma, nothing = engine.gamma if gamma is None else gamma, engine.draft(0)
    work: dict[str, Callable[[], object]] = {"target_step_ms": lambda: engine.decide(nothing)}
    if gamma:
        engine.refresh()
        draft = engine.draft(gamma)
        logits = engine.verify(draft)
        work["draft_step_ms"] = lambda: engine.draft(gamma)
        work["verify_ms"] = lambda: engine.decide(draft)
        work["accept_ms"] = lambda: engine.accept(draft, logits)
    work = more | {name: engine.capture(step) for name, step in work.items()}
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, step in work.items():
            n_steps = gamma if name == "draft_step_ms" else 1
            times[name].append(1e3 * timed(engine.device, step)[0] / n_steps)
    return times


def step_bytes(engine: Engine, lengths: list[int]) -> int:
    """Bytes that a plain step must read after prompts of these lengths: their K and V, the weights.

    A sliding window sees the newest tokens of a prompt only. Of several ranks each reads its part.
    """
    config, itemsize = engine.model.config, engine.full.spec.stored_dtype.itemsize
    read = sum(kv_bytes(config, n, itemsize) for n in lengths)
    return read + engine.model.weight_bytes(len(lengths))


def differences(
    engine: Engine, prompts: list[list[int]], main: Run, baseline: Run | None
) -> list[dict] | None:
    """Where rows part from the baseline, and how close the two likeliest logits were there.

    None without a baseline. The margin is missing when sampling, and where no memory is left to
    read the row again: a finished run is not lost for it.
    """
    if baseline is None:
        return None
    differing: list[dict] = []
    rows = zip(prompts, main.outputs, baseline.outputs, strict=True)
    for row, (prompt, ours, theirs) in enumerate(rows):
        if ours != theirs:
            same = [a == b for a, b in zip(ours, theirs, strict=False)]
            at = [*same, False].index(False)
            differing.append({"row": row, "new_token": at})
            with suppress(MemoryError, torch.OutOfMemoryError):
                if not engine.batch.sampling.temperature.any():
                    differing[-1]["top2_logit_margin"] = top2_margin(engine, prompt + theirs[:at])
    return differing


@torch.inference_mode()
def top2_margin(engine: Engine, ids: list[int]) -> float:
    """Difference of the two largest logits after the tokens `ids`, read into a cache of its own."""
    spec = replace(engine.full.spec, batch_size=1)
    cache = KVCache.empty(spec, engine.full.capacity)  # of one shape with a row: nothing compiles
    tokens = F.pad(torch.tensor([ids], device=spec.device), (0, cache.capacity - len(ids)))
    x = engine.model.prefill(tokens, len(ids), engine.prefill_chunk, cache)
    first, second = engine.model.logits(x).float().topk(2).values.tolist()
    return first - second
