"""What a memory holds: how many rows, how long a text, and which draft is fastest then.

    python capacity.py --model llama-3.1-8b --hardware h200 --prefix_len 32768 100000 \\
        --kv_itemsize 1 --draft_weights same fp8

Weights, K and V, a draft's own caches and copies of weights, and the work of one chunk of a prompt
and of one round: `cost_model.memory_bytes` adds them up. With as many rows as then fit a draft is
judged by tokens per second, not by its speedup, because what it keeps costs rows. The first table
has that, for every length. The second one has the longest text for every number of rows, drafting
nothing. Memory is the data sheet's: what a driver and a compiler keep for themselves is not in it.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from config import ModelConfig, most
from cost_model import (
    ACCEPTANCE,
    PLAIN,
    Acceptance,
    Prediction,
    Strategy,
    exit_status,
    largest_batch,
    memory_bytes,
    named,
    omega,
    parse_args,
)
from roofline import Hardware, Workload

LONGEST = 2**24  # tokens beyond which nobody looks
LINE = "{:>9}{:>7}{:>11}  {:34}{:>5}{:>7}{:>11}{:>9}"
HEAD = LINE.format("S", "rows", "tokens/s", "fastest draft", "gamma", "rows", "tokens/s", "gain")


class Full(NamedTuple):
    """A memory full of rows, and how they decode."""

    prediction: Prediction
    n_rows: int

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together, as predicted."""
        p = self.prediction
        _, t_draft, t_verify = p.seconds
        gamma = p.strategy.gamma
        return self.n_rows * omega(gamma, p.alpha) / (gamma * t_draft + t_verify)


def fill(
    target: ModelConfig,
    hw: Hardware,
    w: Workload,  # of any number of rows
    strategies: Iterable[Strategy],
    acceptance: Iterable[Acceptance] = ACCEPTANCE,
) -> list[Full]:
    """As many rows as fit, drafting nothing; then with every strategy of known acceptance, the
    fastest first. Empty if not one row fits."""
    found = []
    for s in (PLAIN, *(s for s in strategies if s.gamma)):
        alpha = s.expected_acceptance(w.prefix_len, acceptance) if s.gamma else 0.0
        rows = largest_batch(target, hw, w, s) if alpha is not None else 0
        if rows and alpha is not None:
            one = Prediction(target, hw, replace(w, batch_size=rows), s, alpha)
            found.append(Full(one, rows))
    return found[:1] + sorted(found[1:], key=lambda full: -full.tokens_per_second)


def longest_text(target: ModelConfig, hw: Hardware, w: Workload) -> int:
    """Most tokens that each of the workload's rows can have; 0 if not even one fits."""

    def fits(n: int) -> bool:
        return memory_bytes(target, replace(w, prefix_len=n)) <= hw.memory

    return most(LONGEST, fits)


def line(S: int, full: list[Full]) -> str:
    """The first table's line for a length."""
    if not full:
        return f"{S:9}      0"
    plain, best = full[0], full[min(1, len(full) - 1)]
    p = best.prediction
    return LINE.format(
        S, plain.n_rows, f"{plain.tokens_per_second:,.0f}", str(p.strategy), p.strategy.gamma,
        best.n_rows, f"{best.tokens_per_second:,.0f}",
        f"{best.tokens_per_second / plain.tokens_per_second:.2f}",
    )  # fmt: skip


def report(args: argparse.Namespace) -> None:
    """Print both tables. OSError or ValueError for names and files that cannot be used."""
    hw, target, strategies, acceptance = named(args)
    gpus = f"{args.num_gpus} x {hw.name}, {hw.memory / 1e9:.0f} GB each"
    print(f"{args.checkpoint_path or args.model} on {gpus}, 16 bit, "
          f"K and V {8 * args.kv_itemsize} bit\n{HEAD}")  # fmt: skip
    for S in args.prefix_len:
        w = Workload(1, S, args.num_gpus, kv_itemsize=args.kv_itemsize)
        print(line(S, fill(target, hw, w, (s for s in strategies if s.budget < S), acceptance)))
    print(f"\nlongest text, of {target.max_seq_len:,} tokens that the model knows")
    for B in args.batch_size:
        w = Workload(B, 1, args.num_gpus, kv_itemsize=args.kv_itemsize)
        n = longest_text(target, hw, w)
        print(f"{B:5} rows: {n:,} tokens" + " or more" * (n == LONGEST))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status("capacity.py", lambda: report(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
