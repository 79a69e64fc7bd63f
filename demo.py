"""Every way to draft, on the same texts: what `python generate.py` without more shows.

    compile | one prefill | decode: plainly, with each drafter, with --draft auto | sampled: again

All lines of the table decode from the same prefill, with the same caches and compiled blocks, and
plain decoding is the same program with zero drafts. After each run its steps are timed. So beside
every measured gain stands what the formula makes of them. The rows of the sampled part begin with
the first tokens of the greedy one, which the prefill decided.

The drafters are those that the policies' registry names, so a policy of your own has its line too.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch

import report
from auto import Auto
from checkpoint import Checkpoint
from device import peak_memory_bytes
from drafter import Drafter
from drafters import with_weights
from load import describe, how
from measure import Job, Runs, decode, differences, setting, step_bytes, step_times
from options import Options, write_result
from policies import POLICIES, Strategy
from quantize import resolve
from report import Line, Measurement
from sampling import Sampling, row_seed
from spec_decode import Engine
from tokenizer import continuation

LEFT_OUT = ("chunks",)  # of the policies: to compile another one takes long
SAMPLED = 1  # of the drafters, so many have a line in the sampled part
REPEATS = 3  # of each step that is timed


def demo(o: Options, checkpoint: Checkpoint, engine: Engine, auto: Auto | None, job: Job) -> int:
    """The table of all ways to draft, and the JSON; returns the exit status."""
    assert auto, "nothing says how to draft"
    say = partial(print, file=sys.stderr if o.json == "-" else sys.stdout, flush=True)
    lengths = [*map(len, job.prompts)]
    what = f"{len(lengths)} rows of {min(lengths)} to {max(lengths)} tokens, up to "
    what += f"{o.max_new_tokens} new ones each, {', then '.join(map(how, o.samplings))}"
    say(describe(o, engine, auto, what))
    measured, lines = measure_all(o, engine, auto, job, say)
    rows = zip(job.prompts, measured.main.outputs, strict=True)
    texts = [continuation(checkpoint.tokenizer, prompt, ids) for prompt, ids in rows]
    result = report.build(measured, texts, job.end_ids)
    result["runs"] = runs = report.compared(lines)
    try:
        say(f"\nrow 0 continues:\n{texts[0]}\n\n{report.compared_table(runs)}\n")
        say(report.lessons(runs))
    finally:  # also where nobody reads standard output any more
        write_result(o, result)
    return 0


@torch.inference_mode()
def measure_all(
    o: Options, engine: Engine, auto: Auto, job: Job, say: Callable[..., None]
) -> tuple[Measurement, list[Line]]:
    """All runs, and what a run of `--draft auto` measures: of the first plain one and of auto's."""
    runs = Runs(engine, job, say)
    compile_seconds = runs.warm_up(auto)
    show = Show(runs, auto, [*drafters(runs, auto)])
    prefill_seconds, lengths = runs.prefill(), [*map(len, job.prompts)]
    lines = show.lines(o.samplings[0], show.drafters)
    main, plain = lines[-1].run, lines[0].run
    measured = Measurement(
        setting(engine, auto) | {"sampling": asdict(o.samplings[0])}, lengths,
        compile_seconds, prefill_seconds, None, lines[-1].step_ms,
        step_bytes(engine, lengths), peak_memory_bytes(engine.device),
        main, plain, differences(engine, job.prompts, main, plain),
    )  # fmt: skip
    for sampling in o.samplings[1:]:
        engine.batch.resample(sampling, [row_seed(engine.seed, b) for b in range(len(lengths))])
        lines += show.lines(sampling, show.drafters[:SAMPLED])
    return measured, lines


def draft_length(auto: Auto) -> int:
    """Drafts per round of all lines but auto's: the usual number, or the next one below it."""
    return max(g for g in auto.gammas if g <= max(Strategy().gamma, min(auto.gammas)))


def drafters(runs: Runs, auto: Auto) -> Iterator[Drafter]:
    """One for each line, compiled; `auto` may have made it. Says who cannot draft here, and why."""
    engine, gamma = runs.engine, draft_length(auto)
    kind = resolve("auto", engine.model.config, engine.device, engine.full.spec.dtype)
    for policy in [*(name for name in POLICIES if name not in LEFT_OUT), "ngram"]:
        strategy = with_weights(Strategy(policy, max(auto.gammas)), kind, False)
        drafter = next((d for d in engine.drafters if d.strategy == strategy), None)
        try:
            drafter = drafter or engine.add(strategy)
        except ValueError as e:
            runs.say(f"{strategy}: {e}")
            continue
        engine.switch(drafter)
        work = partial(engine.warm_up_rounds, gamma=gamma)
        runs.phase(f"{runs.warming}, {strategy}", work)
        yield drafter


@dataclass(frozen=True, slots=True)
class Show:
    """The runs of one table."""

    runs: Runs
    auto: Auto
    drafters: list[Drafter]

    def lines(self, sampling: Sampling, drafters: list[Drafter]) -> list[Line]:
        """A plain run first, one with each of these, auto's last; the rows sample like this."""
        gamma, plain = draft_length(self.auto), Strategy().describe()
        named = [self.line(sampling, "plain", plain | {"gamma": 0}, None)]
        for drafter in drafters:
            plan = drafter.strategy.describe() | {"gamma": gamma}
            named.append(self.line(sampling, str(drafter.strategy), plan, drafter))
        return [*named, self.line_of_auto(sampling)]

    def line(self, sampling: Sampling, name: str, plan: dict, drafter: Drafter | None) -> Line:
        """One run with this drafter, None: a plain one."""
        engine = self.runs.engine
        engine.switch(drafter)
        run = self.runs.decoding(f"decoding, {name}", lambda: decode(engine, plan["gamma"]))
        return Line(name, plan, sampling.temperature, run, self.steps(plan["gamma"]))

    def line_of_auto(self, sampling: Sampling) -> Line:
        """One run with what it chooses; the steps are of what it used mostly."""
        engine, auto = self.runs.engine, self.auto
        run = self.runs.decoding("decoding, auto", lambda: decode(engine, auto=auto))
        candidate, gamma, _ = auto.mostly
        engine.switch(candidate.drafter if candidate else None)
        name = f"auto: {candidate}, {gamma}" if candidate else "auto: no draft"
        plan = {"strategy": "auto", "gamma": gamma}
        return Line(name, plan, sampling.temperature, run, self.steps(gamma))

    def steps(self, gamma: int) -> dict[str, float]:
        """Milliseconds of the steps of who drafts now, behind the prompts."""
        self.runs.engine.rewind()
        times = step_times(self.runs.engine, REPEATS, gamma)
        return {name: statistics.median(values) for name, values in times.items()}
