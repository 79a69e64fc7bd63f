"""Refilled rows against static batches: speed, waiting, and whether the formula holds now.

    python benchmarks/offline.py                        # about an hour on 2 cores
    python benchmarks/offline.py --draft streaming      # another draft
    python benchmarks/offline.py --smoke                # tiny sizes, seconds: does it run?

The requests are pieces of held-out modules of 100 to 4,000 tokens, each with a limit of 16 to 256
new ones, in an order that is random and fixed. No token ends a text. With `--limits skewed` short
answers are as common as long ones on a logarithmic scale: half of them end before 64. Four runs
take turns, through one engine and its compiled blocks:

    refilled   a row that is done gets the next prompt (`refill.py`), with the draft and plainly
    static     batches of as many rows in the order given; each waits for its slowest row

All four should give the same tokens; the requests for which they do are counted.

The formula, T_T * Omega / (gamma * T_D + T_V), is held against what drafting gained on refilled
rows. Its steps are timed between the runs, with all rows busy, at the lengths that the requests
have while they run. Omega is the mean acceptance length of the runs themselves.

Decoding is timed apart from reading prompts, and tokens/s are given without reading and with it.

Before that, questions about one document: the seconds of their prefill, with the document copied
from a row that has read it and without. Writes JSON, and a Markdown table beside it.

`--write FILE` measures nothing and writes the requests as a file of prompts, for `generate.py`: is
what several processes make of it (`--data_parallel`) what one makes of it?
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from batch import Request
from benchmarks.saving import save, table
from checkpoint import DEMO_CHECKPOINT, DTYPES, load_model
from cost_model import round_cost
from device import timed
from files import write_file
from kernels import compile_blocks
from measure import environment, step_times
from policies import POLICIES, Strategy
from prompts import DEMO_MODULES, module_source
from refill import Refill
from sampling import Sampling, Stats
from spec_decode import SHARED, Engine
from tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class Sizes:
    prompts: int
    rows: int  # of a batch
    max_len: int  # tokens of a prompt and its answer
    lengths: tuple[int, int]  # of a prompt: shortest, longest
    limits: tuple[int, int]  # new tokens: fewest, most
    questions: int
    document: int  # tokens
    answer: int  # new tokens of a question


FULL = Sizes(200, 16, 4096, (100, 4000), (16, 256), 32, 3500, 16)
SMOKE = Sizes(5, 2, 330, (10, 90), (2, 9), 3, 290, 3)


@dataclass(frozen=True, slots=True)
class Run:
    """What one pass through all requests took and did."""

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    stats: Stats  # of all rows
    busy_share: float  # of the rows, while there were requests that had none
    first_token_seconds: float  # from the beginning, mean of all requests
    longest_gap: float | None  # seconds in which running rows waited; None: they never do
    outputs: list[list[int]]

    @property
    def decode_speed(self) -> float:
        """Tokens/s of decoding alone."""
        return self.stats.decoded_tokens / self.decode_seconds

    @property
    def speed(self) -> float:
        """New tokens/s, with the reading of the prompts."""
        return sum(map(len, self.outputs)) / self.seconds

    def figures(self) -> dict:
        """As the JSON has them."""
        s = self.stats
        return {
            "decode_tokens_per_s": self.decode_speed,
            "tokens_per_s": self.speed,
            "seconds": self.seconds,
            "prefill_seconds": self.prefill_seconds,
            "decode_seconds": self.decode_seconds,
            "ms_per_round": 1e3 * self.decode_seconds / s.rounds,
            "rounds": s.rounds,
            "row_rounds": s.row_rounds,
            "busy_share": self.busy_share,
            "longest_gap_seconds": self.longest_gap,
            "first_token_seconds": self.first_token_seconds,
            "decoded_tokens": s.decoded_tokens,
            "mean_acceptance_length": s.mean_acceptance_length,
            "draft_acceptance_rate": s.draft_acceptance_rate,
            "tokens_per_row_round": s.decoded_tokens / s.row_rounds,
        }


def pieces(tokenizer: Tokenizer, rng: random.Random) -> Iterator[tuple[list[int], int]]:
    """Held-out modules as tokens, and a place in them: module after module, anywhere."""
    texts = [tokenizer.encode(module_source(name), bos=False) for name in DEMO_MODULES]
    while True:
        for text in rng.sample(texts, len(texts)):
            yield text, rng.randrange(len(text))


def uniform(rng: random.Random, low: int, high: int) -> int:
    return rng.randint(low, high)


def skewed(rng: random.Random, low: int, high: int) -> int:
    """Uniform on a logarithmic scale."""
    return round(math.exp(rng.uniform(math.log(low), math.log(high))))


LIMITS = {"uniform": uniform, "skewed": skewed}


def mixed_requests(
    tokenizer: Tokenizer, sizes: Sizes, limits: Callable[[random.Random, int, int], int]
) -> list[Request]:
    """Prompts and limits of all sizes, in random order."""
    rng, requests = random.Random(0), []
    places = pieces(tokenizer, rng)
    while len(requests) < sizes.prompts:
        limit = limits(rng, *sizes.limits)
        length = min(rng.randint(*sizes.lengths), sizes.max_len - limit)
        text, start = next(places)
        prompt = [tokenizer.bos_id, *text[start : start + length - 1]]
        if len(prompt) == length:
            requests.append(Request(prompt, limit))
    return requests


def questions(tokenizer: Tokenizer, sizes: Sizes) -> list[Request]:
    """Different endings of one document."""
    rng = random.Random(1)
    text = tokenizer.encode(module_source(DEMO_MODULES[0]), bos=False)
    document, ends = [tokenizer.bos_id, *text[: sizes.document - 1]], pieces(tokenizer, rng)
    found: list[Request] = []
    while len(found) < sizes.questions:
        other, start = next(ends)
        end = other[start : start + rng.randint(8, 32)]
        if end:
            found.append(Request(document + end, sizes.answer))
    return found


def total(stats: list[Stats]) -> Stats:
    """The counts of several runs, one after the other."""

    def summed(name: str) -> list[int]:
        rows = [getattr(s, name) for s in stats]
        size = max(map(len, rows))
        return [sum(row[i] for row in rows if i < len(row)) for i in range(size)]

    rounds, decoded = sum(s.rounds for s in stats), sum(s.decoded_tokens for s in stats)
    return Stats(rounds, decoded, summed("accepted_histogram"), summed("drafted_histogram"))


def refilled(engine: Engine, requests: list[Request], share: float = SHARED) -> Run:
    """Rows get the next request as soon as they are done."""
    refill = Refill(engine, requests, share=share)
    seconds, done = timed(engine.device, lambda: list(refill.results()))
    summary, results = refill.summary(), sorted(done, key=lambda r: r.index)
    first = statistics.mean(r.wait_seconds + r.first_token_seconds for r in results)
    outputs = [r.token_ids for r in results]
    return Run(
        seconds, summary["prefill_seconds"], summary["decode_seconds"], engine.batch.stats(),
        summary["busy_share"], first, summary["longest_gap_seconds"], outputs,
    )  # fmt: skip


def static(engine: Engine, requests: list[Request]) -> Run:
    """Batches of as many requests as there are rows, in order; the last one may have idle rows."""
    B, stats, outputs, firsts = engine.batch.n_rows, [], [], []
    seconds = {"prefill": 0.0, "decode": 0.0}
    began = time.perf_counter()
    for i in range(0, len(requests), B):
        batch = requests[i : i + B]
        idle = [Request([1], 1)] * (B - len(batch))
        prompts = [r.prompt for r in batch + idle]
        limits = [r.max_new_tokens for r in batch + idle]

        def note(b: int, n: int = len(batch)) -> None:
            firsts.extend([time.perf_counter() - began] * (b < n))

        def prefill(prompts=prompts, limits=limits, note=note) -> None:
            engine.prefill(prompts, limits, on_row=note)
            engine.catch_up()

        seconds["prefill"] += timed(engine.device, prefill)[0]
        seconds["decode"] += timed(engine.device, engine.run)[0]
        stats.append(engine.batch.stats())
        outputs += engine.batch.outputs()[: len(batch)]
    counts = total(stats)
    return Run(
        sum(seconds.values()), seconds["prefill"], seconds["decode"], counts,
        counts.row_rounds / (counts.rounds * B), statistics.mean(firsts), None, outputs,
    )  # fmt: skip


def usual_lengths(requests: list[Request], n_rows: int) -> list[int]:
    """Decided tokens of full rows as they are while these requests run: long answers run longer.

    The middles of n_rows equal parts of all row rounds, sorted by length, then mixed.
    """
    lengths = sorted(
        length
        for r in requests
        for length in range(len(r.prompt) + 1, len(r.prompt) + r.max_new_tokens)
    )
    middles = [lengths[(2 * i + 1) * len(lengths) // (2 * n_rows)] for i in range(n_rows)]
    return random.Random(2).sample(middles, n_rows)


def predicted(steps: dict[str, float], gamma: int, omega: float) -> float:
    """The formula's speedup, from milliseconds of steps."""
    t_target = steps["target_step_ms"]
    return omega / round_cost(gamma, t_target, steps["draft_step_ms"], steps["verify_ms"])


class Bench:
    """One engine for all runs, and one without a text for the steps."""

    def __init__(self, model, sizes: Sizes, strategy: Strategy) -> None:
        options = model, sizes.rows, sizes.max_len, strategy, Sampling()
        self.engine, self.still = Engine(*options), Engine(*options)
        self.drafter, self.sizes = self.engine.drafter, sizes
        for engine in (self.engine, self.still):
            engine.warm_up(refills=True)

    def steps(self, requests: list[Request], repeats: int) -> dict[str, list[float]]:
        """Milliseconds of a plain step, a draft step and a verification, with all rows busy."""
        with self.still.pretend(usual_lengths(requests, self.sizes.rows)):
            step_times(self.still, 1)
            return step_times(self.still, repeats)

    def runs(self, requests: list[Request]) -> dict[str, Run]:
        """Each of the four once."""
        done: dict[str, Run] = {}
        for work in (refilled, static):
            for drafter, how in ((self.drafter, "drafted"), (None, "plain")):
                self.engine.switch(drafter)
                run = done[f"{work.__name__}, {how}"] = work(self.engine, requests)
                print(f"{work.__name__:8}, {how:7}: {run.decode_speed:6.1f} tokens/s, busy "
                      f"{run.busy_share:.0%}, {run.seconds:.0f} s", flush=True)  # fmt: skip
        return done

    def sharing(self, requests: list[Request]) -> dict:
        """Prefill of questions about one document, with its K and V copied and without."""
        self.engine.switch(self.drafter)
        shared, alone = (refilled(self.engine, requests, share) for share in (SHARED, math.inf))
        return {
            "questions": len(requests),
            "document_tokens": self.sizes.document,
            "prefill_seconds_shared": shared.prefill_seconds,
            "prefill_seconds_alone": alone.prefill_seconds,
            "ratio": alone.prefill_seconds / shared.prefill_seconds,
            "identical": identical([shared, alone]),
        }


def identical(runs: list[Run]) -> int:
    """Requests whose tokens are the same in all runs."""
    first, *others = (run.outputs for run in runs)
    return sum(all(other[i] == ids for other in others) for i, ids in enumerate(first))


def ratio(repeats: list[dict[str, Run]], above: str, below: str) -> dict[str, float]:
    """Of tokens/s, one run over another of the same repeat: medians over the repeats."""
    pairs = [(r[above], r[below]) for r in repeats]
    return {
        "decoding": statistics.median(a.decode_speed / b.decode_speed for a, b in pairs),
        "with_prefill": statistics.median(a.speed / b.speed for a, b in pairs),
    }


def measure(bench: Bench, requests: list[Request], repeats: int) -> dict:
    """All runs in turn, with steps timed between them; their figures, ratios and the formula's."""
    done: list[dict[str, Run]] = []
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, values in bench.steps(requests, repeats=9).items():
            times.setdefault(name, []).extend(values)
        done.append(bench.runs(requests))
    steps = {name: statistics.median(values) for name, values in times.items()}
    omega = statistics.median(r["refilled, drafted"].stats.mean_acceptance_length for r in done)
    over_plain = ratio(done, "refilled, drafted", "refilled, plain")
    formula = predicted(steps, bench.drafter.strategy.gamma, omega)
    return {
        "runs": {name: [r[name].figures() for r in done] for name in done[0]},
        "identical": identical([run for r in done for run in r.values()]),
        "refilled_over_static": ratio(done, "refilled, drafted", "static, drafted"),
        "refilled_over_static_plain": ratio(done, "refilled, plain", "static, plain"),
        "drafted_over_plain": over_plain,
        "drafted_over_plain_static": ratio(done, "static, drafted", "static, plain"),
        "lengths_of_steps": usual_lengths(requests, bench.sizes.rows),
        "steps_ms": steps,
        "omega": omega,
        "predicted_speedup": formula,
        "prediction_error": formula / over_plain["decoding"] - 1,
    }


def markdown(result: dict) -> str:
    """A line per run, with medians over its repeats."""
    columns = {
        "decode tokens/s": ("decode_tokens_per_s", ".0f"),
        "tokens/s": ("tokens_per_s", ".0f"),
        "rounds": ("rounds", ".0f"),
        "row rounds": ("row_rounds", ".0f"),
        "busy rows": ("busy_share", ".0%"),
        "longest gap s": ("longest_gap_seconds", ".2f"),
        "acceptance length": ("mean_acceptance_length", ".2f"),
        "first token s": ("first_token_seconds", ".1f"),
    }
    rows = []
    for name, repeats in result["runs"].items():
        cells = [name]
        for key, form in columns.values():
            values = [r[key] for r in repeats]
            cells.append("" if None in values else format(statistics.median(values), form))
        rows.append(cells)
    return table(("run", *columns), rows)


def summary(result: dict) -> str:
    """The ratios, the formula beside the measurement, and what sharing saves."""
    steps, sharing, lines = result["steps_ms"], result["sharing"], []
    for name, words in (
        ("refilled_over_static", "refilled over static, drafted"),
        ("refilled_over_static_plain", "refilled over static, plain"),
        ("drafted_over_plain", "drafted over plain, refilled"),
        ("drafted_over_plain_static", "drafted over plain, static"),
    ):
        r = result[name]
        lines.append(f"{words}: {r['decoding']:.2f} ({r['with_prefill']:.2f} with the prefill)")
    lines.append(
        f"formula: {steps['target_step_ms']:.1f} * {result['omega']:.2f} / (gamma * "
        f"{steps['draft_step_ms']:.2f} + {steps['verify_ms']:.1f}) = "
        f"{result['predicted_speedup']:.2f}, {result['prediction_error']:+.0%} off"
    )
    lines.append(
        f"{sharing['questions']} questions on {sharing['document_tokens']} tokens: prefill "
        f"{sharing['prefill_seconds_shared']:.1f} s shared, {sharing['prefill_seconds_alone']:.1f} "
        f"s alone, {sharing['ratio']:.1f} times"
    )
    lines.append(f"{result['identical']} requests with the same tokens in all runs")
    return "\n".join(lines)


def write_prompts(requests: list[Request], tokenizer: Tokenizer, path: Path) -> None:
    """The requests, a line each. As texts they may have a token more or fewer."""
    lines = []
    for i, request in enumerate(requests):
        text, n = tokenizer.decode(request.prompt[1:]), request.max_new_tokens
        lines.append(json.dumps({"id": f"piece-{i:03}", "prompt": text, "max_new_tokens": n}))
    write_file("\n".join([*lines, ""]).encode(), path)


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--draft", choices=("ngram", *POLICIES), default="ngram")
    p.add_argument("--speculate_k", type=int, default=Strategy().gamma)
    p.add_argument("--draft_budget", type=int, default=Strategy().budget)
    p.add_argument("--prompts", type=int, default=FULL.prompts)
    p.add_argument("--limits", choices=LIMITS, default="uniform")
    p.add_argument("--batch_size", type=int, default=FULL.rows)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--smoke", action="store_true")
    p.add_argument("--out", type=Path)
    p.add_argument("--write", type=Path, metavar="FILE", help="the requests, for generate.py")
    return p.parse_args()


def main() -> None:
    args = parse_args()
    sizes = replace(FULL, prompts=args.prompts, rows=args.batch_size)
    if args.smoke:
        sizes, args.repeats = SMOKE, 1
    tokenizer = load_tokenizer(DEMO_CHECKPOINT)
    requests = mixed_requests(tokenizer, sizes, LIMITS[args.limits])
    if args.write:
        write_prompts(requests, tokenizer, args.write)
        return
    model = load_model(DEMO_CHECKPOINT, torch.device(args.device), DTYPES[args.dtype])
    if not args.smoke:
        compile_blocks(model)
    strategy = Strategy(args.draft, args.speculate_k, args.draft_budget)
    date = time.strftime("%Y-%m-%d")
    with torch.inference_mode():
        bench = Bench(model, sizes, strategy)
        result = {
            "command": " ".join(["python", *sys.argv]), "date": date,
            "environment": environment(bench.engine), "sizes": asdict(sizes),
            "limits": args.limits, "plan": strategy.describe(),
            "sharing": bench.sharing(questions(tokenizer, sizes)),
        }  # fmt: skip
        result |= measure(bench, requests, args.repeats)
    print(markdown(result) + summary(result))
    save(result, f"offline_{args.device}", args.out, markdown(result))


if __name__ == "__main__":
    main()
