"""Does the gain grow with batch and length? Measured points over the cost model's lines.

    python benchmarks/scaling.py                          # the whole grid
    python benchmarks/scaling.py --cells 16x4096 1x512    # these batch sizes and lengths only
    python benchmarks/scaling.py --draw FILE.json         # table and pictures again, from a result
    python benchmarks/scaling.py --smoke                  # tiny sizes: does it run?

**What runs.** 32 texts of held-out modules. Every batch size decodes all of them, B at a time: so
acceptance is the same for every B, and only the time of a step differs. At length S a prompt and
its new tokens are S tokens together; the prompts of a text end at the same place whatever S is.
From each prefill run in turn, --repeats times: plain decoding; streaming with a fixed budget and
gamma; auto, with its probing. Every output is compared with plain decoding's.

**Two speedups.** *Batch*: tokens/s of the whole batch, which waits for its slowest row. *Row*: the
time from a token to the next one while a row runs, which is what the formula is about.

**The prediction.** There is one calibration for the grid, not one per cell: it would be fitted to
the very steps that it predicts. `roofline.fit` gets the plain steps and verifications timed in the
grid's corners (least and most B and S). What the formula still misses there is a factor for each
of T_T, T_D and T_V, as auto has them. All other cells are predicted. Acceptance is not: each cell's
measured tokens per round go into its line. *Own steps* is the same formula with the steps timed in
the cell itself: where it is right and the prediction wrong, the times were predicted wrongly.
Auto's line is what auto itself predicted when it chose, calibrated by itself in each cell.

The result is written after every cell, each file whole: a Ctrl-C loses the cell that runs. Beside
the JSON there are a table (.md) and two pictures (.streaming.svg, .auto.svg).
"""

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from auto import Auto, Candidate
from benchmarks.saving import result_path, table
from checkpoint import DEMO_CHECKPOINT, DTYPES, load_model
from config import ModelConfig
from cost_model import Prediction, round_cost
from cost_model import Strategy as Planned
from device import timed
from drafters import with_weights
from families import load_config
from files import write_file, write_json
from kernels import compile_blocks
from measure import decode, environment, step_times, warm_up
from model import Transformer
from options import AUTO_POLICIES
from picture import Panel, Series, draw, short
from policies import Strategy
from prompts import DEMO_MODULES, module_source
from quantize import resolve
from roofline import GAMMAS, Hardware, Timing, Workload, fit, preset
from sampling import Sampling, Stats
from spec_decode import Engine
from tokenizer import Tokenizer, load_tokenizer

STEPS = ("target_step_ms", "draft_step_ms", "verify_ms")  # T_T, T_D, T_V
N_TIMINGS = 9  # of each step in a cell, at least


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured."""

    cells: tuple[tuple[int, int], ...]  # (B, S)
    texts: int  # that every cell decodes
    new_tokens: int
    strategy: Strategy  # the fixed one
    repeats: int


FULL = Sizes(tuple(product((1, 2, 4, 8, 16, 32), (512, 1024, 2048, 4096))), 32, 96,
             Strategy("streaming", 5, 128), 3)  # fmt: skip
SMOKE = Sizes(((1, 40), (2, 40)), 2, 8, Strategy("streaming", 2, 16), 1)


@dataclass(slots=True)
class Total:
    """One way to decode all texts of a cell, once: sums over its batches."""

    n_tokens: int = 0  # without the first ones, which the prefill decides
    seconds: float = 0.0
    row_seconds: float = 0.0  # of all rows, each while it ran
    rounds: int = 0
    row_rounds: int = 0

    def add(self, seconds: float, stats: Stats) -> None:
        """One batch."""
        self.n_tokens += stats.decoded_tokens
        self.seconds += seconds
        self.row_seconds += seconds / stats.rounds * stats.row_rounds
        self.rounds += stats.rounds
        self.row_rounds += stats.row_rounds


def texts(tokenizer: Tokenizer, n: int, end: int) -> list[list[int]]:
    """Token ids of n stretches of held-out modules: the first `end` of each, then the next."""
    found = []
    for i in range(n):
        turn, module = divmod(i, len(DEMO_MODULES))
        ids = tokenizer.encode(module_source(DEMO_MODULES[module]), bos=False)
        last = min((turn + 1) * end, len(ids))
        found.append(ids[max(last - end, 0) : last])
    return found


class Cell:
    """One batch size and length: all texts, batch by batch, in all ways, and the steps' times."""

    def __init__(self, model: Transformer, B: int, S: int, sizes: Sizes) -> None:
        torch._dynamo.reset()
        self.B, self.S, self.sizes = B, S, sizes
        self.engine = engine = Engine(model, B, S, Strategy(), Sampling())
        kind = sizes.strategy.weights
        drafts = [with_weights(Strategy(p, max(GAMMAS)), kind, False) for p in AUTO_POLICIES]
        self.auto = auto = Auto(engine, [Candidate(d) for d in drafts])
        warm_up(engine, auto)
        self.streaming = engine.add(sizes.strategy)
        engine.switch(self.streaming)
        engine.warm_up_rounds()
        gamma = sizes.strategy.gamma
        self.ways: dict[str, Callable[[], Stats]] = {
            "plain": lambda: decode(engine, 0),
            "streaming": lambda: decode(engine, gamma),
            "auto": lambda: decode(engine, auto=auto),
        }
        self.totals = {name: [Total() for _ in range(sizes.repeats)] for name in self.ways}
        self.steps: dict[str, list[float]] = {name: [] for name in STEPS}
        self.first: Counter[str] = Counter()  # what auto chose, and how often,
        self.mostly: Counter[str] = Counter()  # what most tokens came from
        self.predicted: list[float] = []
        self.n_identical = 0

    def decode(self, name: str) -> tuple[float, Stats]:
        """All rows from the prefill, in one of the ways."""
        self.engine.rewind()
        self.engine.switch(self.streaming if name == "streaming" else None)
        return timed(self.engine.device, self.ways[name])

    def batch(self, prompts: list[list[int]], first: bool) -> None:
        """One batch of texts; the first one also runs once untimed."""
        engine, expected = self.engine, None
        engine.prefill(prompts, [self.sizes.new_tokens] * self.B)
        for name in self.ways if first else ():
            self.decode(name)
        for repeat, name in product(range(self.sizes.repeats), self.ways):
            self.totals[name][repeat].add(*self.decode(name))
            outputs = engine.batch.outputs()
            expected = expected or outputs
            self.n_identical += sum(a == b for a, b in zip(outputs, expected, strict=True))
            if name == "auto":
                self.first[str(self.auto.first)] += 1
                self.mostly[str(self.auto.mostly)] += 1
                self.predicted.append(self.auto.first.speedup)
        engine.rewind()
        engine.switch(self.streaming)
        times = step_times(engine, -(-N_TIMINGS * self.B // self.sizes.texts))
        for name in STEPS:
            self.steps[name] += times[name]

    def measure(self, rows: list[list[int]], bos_id: int) -> dict:
        """All that is measured of it, as the JSON has it."""
        n = self.S - self.sizes.new_tokens
        prompts = [[bos_id, *ids[len(ids) - n + 1 :]] for ids in rows]
        for i in range(0, len(prompts), self.B):
            self.batch(prompts[i : i + self.B], first=i == 0)
        plain = self.totals["plain"]
        ways = {}
        for name, totals in self.totals.items():
            ways[name] = {
                "batch_speedup": ratio(plain, totals, "seconds"),
                "row_speedup": ratio(plain, totals, "row_seconds"),
                "tokens_per_round": totals[0].n_tokens / totals[0].row_rounds,
                "tokens_per_s": [t.n_tokens / t.seconds for t in totals],
                "repeats": [asdict(t) for t in totals],
            }
        n_outputs = len(rows) * self.sizes.repeats * len(self.ways)
        ways["auto"] |= {"chose": dict(self.first.most_common()),
                         "mostly": dict(self.mostly.most_common()),
                         "predicted_speedup": statistics.median(self.predicted)}  # fmt: skip
        return {
            "batch_size": self.B,
            "length": self.S,
            "prompt_tokens": n,
            "workload": asdict(self.auto.workload(n)),
            "auto_hardware": asdict(self.auto.hardware),
            "steps": {name: statistics.median(times) for name, times in self.steps.items()},
            "ways": ways,
            "outputs": n_outputs,
            "identical": self.n_identical,
        }


def ratio(plain: list[Total], ours: list[Total], kind: str) -> float:
    """How many times as fast, by medians over the repeats. All decode the same tokens."""
    a, b = (statistics.median(getattr(t, kind) for t in totals) for totals in (plain, ours))
    return a / b


def corners(cells: list[dict]) -> list[dict]:
    """The cells with the least or most rows, and the least or most tokens."""
    ends = [{f([c[key] for c in cells]) for f in (min, max)} for key in ("batch_size", "length")]
    return [c for c in cells if c["batch_size"] in ends[0] and c["length"] in ends[1]]


def timed_steps(c: dict) -> list[float]:
    """T_T, T_D and T_V of a cell, seconds."""
    return [c["steps"][name] / 1e3 for name in STEPS]


def predict(result: dict) -> None:
    """Calibrate by the corners; write what the cost model says into every cell."""
    config, plan, cells = ModelConfig(**result["model"]), result["strategy"], result["cells"]
    strategy = Planned(plan["policy"], plan["gamma"], plan["budget"], weights=plan["weights"])
    gamma, known = strategy.gamma, corners(cells)

    def seconds(c: dict, hw: Hardware) -> tuple[float, float, float]:
        return Prediction(config, hw, Workload(**c["workload"]), strategy, 0.0).seconds

    def speedup(c: dict, times: list[float]) -> float:
        return c["ways"]["streaming"]["tokens_per_round"] / round_cost(gamma, *times)

    timings = [
        Timing(Workload(**c["workload"]), T, c["prompt_tokens"], t)
        for c in known
        for T, t in zip((1, gamma + 1), timed_steps(c)[::2], strict=True)
    ]
    hw, error = fit(config, preset(result["environment"]["device"]), timings)
    missed = [[t / formula for t, formula in zip(timed_steps(c), seconds(c, hw), strict=True)]
              for c in known]  # fmt: skip
    factors = [statistics.geometric_mean(ratios) for ratios in zip(*missed, strict=True)]
    for c in cells:
        times = [t * f for t, f in zip(seconds(c, hw), factors, strict=True)]
        own = timed_steps(c)
        c["predicted"] = {name: 1e3 * t for name, t in zip(STEPS, times, strict=True)}
        c["predicted"] |= {"speedup": speedup(c, times), "speedup_by_own_steps": speedup(c, own)}
    result["calibration"] = {
        "cells": [[c["batch_size"], c["length"]] for c in known],
        "hardware": asdict(hw), "fit_error": error,
        "factors": dict(zip(STEPS, factors, strict=True)),
    }  # fmt: skip


HEAD = ("B", "S", "T_T ms", "T_D ms", "T_V / T_T", "tokens per round", "predicted", "own steps",
        "row", "batch", "auto chose", "predicted", "row", "batch")  # fmt: skip


def markdown(result: dict) -> str:
    """A line per cell: steps, then speedups of streaming and of auto."""
    lines = []
    for c in result["cells"]:
        steps, fixed, auto = c["steps"], c["ways"]["streaming"], c["ways"]["auto"]
        t_target, t_draft, t_verify = (steps[name] for name in STEPS)
        cells = (str(c["batch_size"]), str(c["length"]), f"{t_target:.1f}", f"{t_draft:.1f}")
        numbers = (
            t_verify / t_target, fixed["tokens_per_round"], c["predicted"]["speedup"],
            c["predicted"]["speedup_by_own_steps"], fixed["row_speedup"], fixed["batch_speedup"],
        )  # fmt: skip
        theirs = (auto["predicted_speedup"], auto["row_speedup"], auto["batch_speedup"])
        cells += (*(f"{x:.2f}" for x in numbers), next(iter(auto["chose"])))
        lines.append([*cells, *(f"{x:.2f}" for x in theirs)])
    return table(HEAD, lines)


def picture(result: dict, way: str) -> str:
    """Speedups over batch size and over length as SVG; `way` is streaming or auto."""
    cells, plan = result["cells"], result["strategy"]

    def panel(title: str, x_title: str, x: str, by: str, label: Callable[[int], str]) -> Panel:
        series = []
        for value in sorted({c[by] for c in cells}):
            mine = [c for c in cells if c[by] == value]
            lines = {c[x]: (c["predicted"]["speedup"] if way == "streaming"
                            else c["ways"][way]["predicted_speedup"]) for c in mine}  # fmt: skip
            measured = ({c[x]: c["ways"][way][kind] for c in mine}
                        for kind in ("row_speedup", "batch_speedup"))  # fmt: skip
            series.append(Series(label(value), lines, *measured))
        return Panel(title, x_title, "speedup over plain decoding", series)

    what, where = "The draft is auto's choice", result["environment"]
    if way == "streaming":
        what = f"A draft reads {plan['budget']} tokens of KV; {plan['gamma']} drafts a round"
    note = f"{what}. {where['device_name']}, {where['threads']} threads, {result['date']}"
    by_batch = panel("by batch size", "batch size B", "batch_size", "length",
                     lambda S: f"{short(S)} tokens")  # fmt: skip
    by_length = panel("by length", "tokens of prompt and answer S", "length", "batch_size",
                      lambda B: f"B = {B}")  # fmt: skip
    marks = {"line": "predicted", "points": "measured, while a row runs",
             "rings": "measured, whole batch"}  # fmt: skip
    return draw(f"Speedup of {way} on the demo", note, [by_batch, by_length], marks)


def show(result: dict, out: Path) -> None:
    """The table and the pictures beside a result."""
    write_file(markdown(result).encode(), out.with_suffix(".md"))
    for way in ("streaming", "auto"):
        write_file(picture(result, way).encode(), out.with_suffix(f".{way}.svg"))


def batch_x_length(word: str) -> tuple[int, int]:
    """16x4096 as numbers; ValueError for what is no such pair."""
    B, S = map(int, word.split("x"))
    return B, S


def parse_args() -> tuple[argparse.Namespace, Sizes]:
    """The flags, and what they ask for."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--cells", type=batch_x_length, nargs="+", metavar="BxS")
    p.add_argument("--speculate_k", "--gamma", type=int, default=FULL.strategy.gamma)
    p.add_argument("--draft_budget", type=int, default=FULL.strategy.budget)
    p.add_argument("--new_tokens", type=int, default=FULL.new_tokens)
    p.add_argument("--repeats", type=int, default=FULL.repeats)
    p.add_argument("--smoke", action="store_true")
    p.add_argument("--draw", type=Path, metavar="FILE.json", help="draw it again, measure nothing")
    p.add_argument("--out", type=Path)
    args = p.parse_args()
    if args.new_tokens < 2 or args.repeats < 1 or args.speculate_k < 1:
        p.error("--new_tokens must be at least 2, --repeats and --speculate_k at least 1")
    strategy = Strategy("streaming", args.speculate_k, args.draft_budget)
    cells = tuple(args.cells or FULL.cells)
    sizes = Sizes(cells, FULL.texts, args.new_tokens, strategy, args.repeats)
    sizes = SMOKE if args.smoke else sizes
    for B, S in sizes.cells:
        low, high = sizes.new_tokens + 2, load_config(DEMO_CHECKPOINT).max_seq_len
        if B < 1 or sizes.texts % B or not low <= S <= high:
            p.error(f"{B}x{S}: B must divide {sizes.texts}, S must be in {low}..{high}")
    return args, sizes


def main() -> int:
    """Measure cell by cell; returns the exit status."""
    args, sizes = parse_args()
    if args.draw:
        show(json.loads(args.draw.read_text(encoding="utf-8")), args.draw)
        return 0
    tokenizer = load_tokenizer(DEMO_CHECKPOINT)
    model = load_model(DEMO_CHECKPOINT, torch.device(args.device), DTYPES[args.dtype])
    if not args.smoke:
        compile_blocks(model)
    weight, context = model.norm.weight, model.config.max_seq_len
    kind = resolve("auto", model.config, weight.device, weight.dtype)
    sizes = replace(sizes, strategy=replace(sizes.strategy, weights=kind))
    rows = texts(tokenizer, sizes.texts, context - sizes.new_tokens)
    result = {
        "command": " ".join(["python", *sys.argv]), "date": time.strftime("%Y-%m-%d"),
        "environment": environment(Engine(model, 1, 1, Strategy(), Sampling())),
        "model": asdict(model.config), "strategy": asdict(sizes.strategy),
        "texts": sizes.texts, "new_tokens": sizes.new_tokens, "cells": [],
    }  # fmt: skip
    out, start = result_path(result, f"scaling_{args.device}", args.out), time.perf_counter()
    try:
        for i, (B, S) in enumerate(sizes.cells, start=1):
            print(f"{i} of {len(sizes.cells)}: B {B:2}, {S:5} tokens", end=" ... ", flush=True)
            with torch.inference_mode():
                c = Cell(model, B, S, sizes).measure(rows, tokenizer.bos_id)
            result["cells"].append(c)
            predict(result)
            write_json(result, out)
            show(result, out)
            fixed, auto = c["ways"]["streaming"], c["ways"]["auto"]
            print(
                f"streaming {fixed['row_speedup']:.2f} a row, {fixed['batch_speedup']:.2f} the "
                f"batch; auto {auto['row_speedup']:.2f}, {auto['batch_speedup']:.2f}; "
                f"{c['identical']} of {c['outputs']} outputs identical; "
                f"{(time.perf_counter() - start) / 60:.1f} min",
                flush=True,
            )
    except KeyboardInterrupt:
        print(f"\nstopped after {len(result['cells'])} cells")
        return 130
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
