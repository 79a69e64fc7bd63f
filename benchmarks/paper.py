"""How well does the cost model explain the paper's measurements?

    python benchmarks/paper.py                      # both files of benchmarks/data
    python benchmarks/paper.py my_runs.csv          # others with the same columns
    python benchmarks/paper.py --plot figure.png    # needs matplotlib

Every row is one setting of arXiv 2408.11049: what a plain step, the drafts of a round and a
verification took, and the speedup. Beside each stands what `cost_model.py` predicts with the one
set of constants that its preset has for that type of GPU, at the row's own tokens per round. Then
the errors, per quantity, and the rows where model and measurement disagree on whether speculation
pays. The figure has speedups over the batch size, measured points over predicted lines, and what a
plain step's time goes to.
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from acceptance import alpha_of
from config import MODELS, lookup_name
from cost_model import Parser, Prediction, Strategy, exit_status
from roofline import HARDWARE, Workload, forward_time

FILES = tuple(ROOT / "benchmarks" / "data" / name for name in (
    "magicdec_table3_8xA100.csv", "magicdec_table6_8xH100.csv"))  # fmt: skip
COLUMNS = ("target", "draft", "draft_method", "draft_budget", "gpu", "num_gpus", "prefix_len",
           "batch_size", "gamma", "draft_ms_per_round", "verify_ms", "tokens_per_round",
           "autoregressive_ms_per_token", "speedup")  # fmt: skip
METHODS = {"StreamingLLM": "streaming", "SnapKV": "snapkv"}
PLOTTED = MODELS["llama-3.1-8b"]  # drafting for itself, on HARDWARE["a100"]


@dataclass(frozen=True, slots=True)
class Measured:
    """A published row, and what the model says to it."""

    row: dict[str, str]
    prediction: Prediction
    t_target: float  # seconds, measured
    t_drafts: float  # of all drafts of a round
    t_verify: float
    speedup: float

    @property
    def pairs(self) -> dict[str, tuple[float, float]]:
        """Predicted and measured: three times in ms, and the speedup."""
        p = self.prediction
        t_target, t_draft, t_verify = (1e3 * t for t in p.seconds)
        return {
            "T_T": (t_target, 1e3 * self.t_target),
            "gamma T_D": (p.strategy.gamma * t_draft, 1e3 * self.t_drafts),
            "T_V": (t_verify, 1e3 * self.t_verify),
            "speedup": (p.speedup, self.speedup),
        }


def read_measured(path: Path) -> list[Measured]:
    """Rows of a CSV with COLUMNS; ValueError names line and column of what cannot be used."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path}, line 1: no column {missing[0]}; needed: {', '.join(COLUMNS)}"
            )
        rows = [read_row(row, f"{path}, line {reader.line_num}") for row in reader]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def positive(text: str) -> float:
    """A number above 0; else ValueError."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError("not a positive number")
    return value


def count(text: str) -> int:
    """A whole number above 0; else ValueError."""
    return int(positive(text) and text)


def read_row(row: dict[str, str], place: str) -> Measured:
    """One measurement held against the model; `place` is for the error message."""

    def get(column: str, convert: Callable):
        try:
            return convert(row[column])
        except (ValueError, TypeError, AttributeError, IndexError) as e:
            raise ValueError(f"{place}, column {column}: {row[column]!r}: {e}") from None

    def preset(text: str):
        return lookup_name(MODELS, text.split()[0].lower(), "model")

    target = get("target", preset)
    hw = get("gpu", lambda s: lookup_name(HARDWARE, s.lower(), "hardware"))
    model = get("draft", lambda s: None if s.startswith("self") else preset(s))
    policy = get("draft_method", lambda s: lookup_name(METHODS, s, "method"))
    w = Workload(get("batch_size", count), get("prefix_len", count), get("num_gpus", count))
    gamma = get("gamma", count)
    strategy = Strategy(policy, gamma, get("draft_budget", count), model, select_every=0)
    alpha = get("tokens_per_round", lambda s: alpha_of(positive(s), gamma))
    times = ("autoregressive_ms_per_token", "draft_ms_per_round", "verify_ms")
    seconds = [get(column, positive) / 1e3 for column in times]
    prediction = Prediction(target, hw, w, strategy, alpha)
    return Measured(row, prediction, *seconds, get("speedup", positive))


def errors(rows: list[Measured]) -> dict[str, list[float]]:
    """Relative errors of what is predicted, row by row: three times and the speedup."""
    found: dict[str, list[float]] = {}
    for r in rows:
        for name, (predicted, measured) in r.pairs.items():
            found.setdefault(name, []).append(abs(predicted / measured - 1))
    return found


def on_the_wrong_side(rows: list[Measured]) -> int:
    """How many predictions and measurements disagree on whether it pays, by more than 0.05."""
    speedups = [r.pairs["speedup"] for r in rows]
    return sum((ours - 1) * (theirs - 1) < 0 and abs(ours - 1) > 0.05 for ours, theirs in speedups)


def compare(rows: list[Measured]) -> str:
    """Predicted against measured, row by row, and the errors."""
    lines = [f"{'target':16}{'draft':>16}{'S':>8}{'B':>5}"
             f"{'T_T ms':>15}{'gamma T_D ms':>15}{'T_V ms':>15}{'speedup':>13}",
             "each time and speedup: predicted / measured"]  # fmt: skip
    for r in rows:
        *times, (ours, theirs) = r.pairs.values()
        lines.append(
            f"{r.row['target']:16}{r.row['draft'].split()[0]:>16}{r.row['prefix_len']:>8}"
            f"{r.row['batch_size']:>5}{''.join(f'{a:8.1f}/{b:6.1f}' for a, b in times)}"
            f"{ours:8.2f}/{theirs:.2f}"
        )
    lines += [
        f"{name:10} median error {statistics.median(e):.1%}, largest {max(e):.1%}"
        for name, e in errors(rows).items()
    ]
    wrong = on_the_wrong_side(rows)
    lines.append(f"on the wrong side of 1.0 by more than 0.05: {wrong} of {len(rows)} rows")
    return "\n".join(lines)


def plot(rows: list[Measured], path: Path) -> None:
    """Speedup over batch size, and what a step's time goes to. ValueError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    chosen = [r for r in rows if r.prediction.target == PLOTTED
              and r.prediction.hw == HARDWARE["a100"]]  # fmt: skip
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for S in dict.fromkeys(r.prediction.w.prefix_len for r in chosen):
        same = [r for r in chosen if r.prediction.w.prefix_len == S]
        batch_sizes = [r.prediction.w.batch_size for r in same]
        (line,) = left.plot(batch_sizes, [r.prediction.speedup for r in same])
        left.plot(batch_sizes, [r.speedup for r in same], "o", color=line.get_color(),
                  label=f"{S:,} tokens")  # fmt: skip
    left.set_xscale("log", base=2)
    ticks = sorted({r.prediction.w.batch_size for r in chosen})
    left.set_xticks(ticks, ticks)
    left.set(xlabel="batch size", ylabel="speedup: measured points, predicted lines")
    left.axhline(1, color="grey", linewidth=0.8)
    left.legend()
    batch_sizes, S = range(1, 129), 32000
    steps = [forward_time(PLOTTED, HARDWARE["a100"], Workload(B, S, 8)) for B in batch_sizes]
    parts = {
        "weights": [1e3 * t.weights for t in steps],
        "KV": [1e3 * t.kv for t in steps],
        "compute beyond reading": [1e3 * t.compute_beyond for t in steps],
        "activations, all-reduce, fixed": [
            1e3 * (t.activations + t.all_reduce + t.fixed) for t in steps
        ],
    }
    right.stackplot(batch_sizes, parts.values(), labels=parts)
    right.set(xlabel="batch size", ylabel=f"predicted ms of a plain step at {S:,} tokens")
    right.legend(loc="upper left")
    figure.savefig(path)


def report(argv: list[str] | None) -> None:
    """The tables, and the figure where one is asked for. ValueError or OSError if it cannot be."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("files", type=Path, nargs="*", default=FILES, metavar="CSV")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="of Llama-3.1-8B on A100s")
    args: argparse.Namespace = parser.parse_args(argv)
    tables = [read_measured(path) for path in args.files]
    for path, rows in zip(args.files, tables, strict=True):
        print(f"{path.name}\n{compare(rows)}\n")
    if args.plot:
        plot([row for rows in tables for row in rows], args.plot)
        print(f"wrote {args.plot}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for input that cannot be used."""
    return exit_status("paper.py", lambda: report(argv))


if __name__ == "__main__":
    sys.exit(main())
