"""What speculation gains, from which length on, and which strategy to use: arithmetic, no torch.

    python cost_model.py --model llama-3.1-8b --hardware h100 --num_gpus 8 \\
        --batch_size 32 64 128 --prefix_len 8192 32768 100000

A plain step takes T_T seconds, a draft step T_D, a verification of gamma drafts T_V(gamma): each is
a forward, and `roofline.py` has its time. Each draft is accepted with probability alpha. Then a
round takes gamma * T_D + T_V(gamma), yields Omega(gamma, alpha) tokens, and

    speedup = T_T * Omega(gamma, alpha) / (gamma * T_D + T_V(gamma))        (arXiv 2408.11049)

T_T and T_V grow with B * S, T_D with B * budget only: that is why the gain grows with batch and
length, where other speculative decoding fades. Below a critical length it is a loss, and then the
answer of `plan` is "none".

**Where the numbers come from.** Times follow from a model's dimensions and a device's constants.
Alpha has to be measured (`acceptance.py`): the table's is the paper's, `--acceptance` takes your
own. Nothing is assumed about a budget smaller than the measured ones. `benchmarks/paper.py` holds
the times against the paper's. The formula is that of one row. A static batch waits for its slowest
row, so it gains less than this. `--svg` draws the gain over the batch size, a line per length.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from acceptance import ACCEPTANCE, MAX_COUNT, Acceptance, alpha_of, omega, read_acceptance
from config import (
    MODELS,
    PREFILL_CHUNK,
    SAMPLING_COMPILED,
    WEIGHT_BYTES,
    ModelConfig,
    layer_params,
    lookup_name,
    total_params,
    visible_tokens,
    work_bytes,
)
from families import load_config
from files import check_writable, write_file
from picture import Panel, Series, draw, short
from roofline import HARDWARE, Hardware, Workload, forward_time, kv_bytes_on_gpu, layer_windows

# Policies that select again: after how many rounds, and of how many tokens' keys it reads one mean.
SELECTS = {"snapkv": (4, 1), "chunks": (1, 16), "mixed": (4, 1)}
LOW_LOSS = 0.01  # of acceptance, by drafting with low-precision weights; the demo: at most 0.009


def round_cost(gamma: int, t_target: float, t_draft: float, t_verify: float) -> float:
    """Plain steps that a round takes. Its tokens over this are the speedup. Times in seconds."""
    return (gamma * t_draft + t_verify) / t_target


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to draft: who, reading how much, how far. Policies have the names of `--draft`."""

    policy: str  # none, streaming, snapkv, chunks, mixed, full, ngram
    gamma: int = 0
    budget: int = 0  # tokens of draft KV per row; unused by none, full and ngram
    model: ModelConfig | None = None  # None: self-speculation
    model_name: str = ""
    select_every: int | None = None  # rounds to the next selection; 0: never; None: as in SELECTS
    weights: str = "same"  # self-speculation: of the target's blocks, or a kind of WEIGHT_BYTES
    whole: bool = False  # its model is on each of several GPUs; else divided among them

    @property
    def has_cache(self) -> bool:
        """Whether drafting reads K and V, of the target or of a smaller model."""
        return self.policy not in ("none", "ngram")

    def __str__(self) -> str:
        if not self.has_cache:
            return self.policy
        who = self.model_name or ("draft model" if self.model else "self")
        weights = f" {self.weights}" if self.weights != "same" else ""
        who += ", whole" if self.whole else ""
        return f"{who}, {self.policy}" + (f" {self.budget}" if self.budget else "") + weights

    def on_its_gpus(self, w: Workload) -> Workload:
        """The workload, on as many GPUs as a draft step is divided among."""
        return replace(w, num_gpus=1) if self.whole else w

    def cached(self, w: Workload) -> Workload:
        """The same with the numbers of its own cache: with weights in bf16 they are no larger."""
        low = self.weights == "bf16" and w.cached_itemsize > WEIGHT_BYTES["bf16"]
        return replace(w, kv_itemsize=WEIGHT_BYTES["bf16"]) if low else w

    def draft_seconds(self, target: ModelConfig, hw: Hardware, w: Workload) -> float:
        """T_D: seconds per draft token, with its share of selecting or reading again."""
        if not self.has_cache:
            return 0.0
        m, w = self.model or target, self.on_its_gpus(w)
        context = w.prefix_len if self.policy == "full" else min(self.budget, w.prefix_len)
        itemsize = WEIGHT_BYTES.get(self.weights)
        seconds = forward_time(m, hw, self.cached(w), 1, context, itemsize).total
        if self.policy == "streaming" and self.model:  # read again before its own context ends
            rounds = max((m.max_seq_len - self.budget) // (self.gamma + 1), 1)
            again = forward_time(m, hw, w, self.budget, self.budget).total
            seconds += again / rounds / self.gamma
        own = SELECTS.get(self.policy, (0, 1))[0]
        if own and (every := own if self.select_every is None else self.select_every):
            seconds += self.selection_seconds(m, hw, w) / every / self.gamma
        return seconds

    def selection_seconds(self, m: ModelConfig, hw: Hardware, w: Workload) -> float:
        """Seconds to select by the newest query: it reads keys, and copies what it chooses.

        The scores are themselves written and read a few times in float32.
        """
        n = w.prefix_len / SELECTS[self.policy][1]  # keys, or their means
        kv = (n / 2 + 2 * min(self.budget, w.prefix_len)) * kv_bytes_on_gpu(m, w)
        score_bytes = 4 * 4 * m.n_layer * m.n_head * n / w.num_gpus
        return w.batch_size * (kv + score_bytes) / hw.bandwidth

    def memory_bytes(self, target: ModelConfig, w: Workload, capacity: int) -> float:
        """Bytes of the draft's caches and model on each GPU, for texts of `capacity` tokens."""
        if not self.has_cache:
            return 0.0
        m, w = self.model or target, self.on_its_gpus(w)
        n = visible_tokens(m, self.budget) / m.n_layer + self.gamma + 1
        full = visible_tokens(m, capacity, PREFILL_CHUNK) / m.n_layer
        if self.policy == "full":
            n = full
        elif self.model:  # and what it selects or reads again from
            n += {"streaming": self.budget}.get(self.policy, full)
        size = SELECTS.get(self.policy, (0, 1))[1]
        means = full / size / 2 if size > 1 else 0  # of keys, with numbers as the target's have
        caches = n * kv_bytes_on_gpu(m, self.cached(w)) + means * kv_bytes_on_gpu(m, w)
        own = held_bytes(m, w) if self.model else 0
        copied = m.n_layer * layer_params(m) * WEIGHT_BYTES.get(self.weights, 0) / w.num_gpus
        return w.batch_size * caches + own + copied

    def expected_acceptance(self, length: int, table: Iterable[Acceptance]) -> float | None:
        """Alpha of the measured entry nearest in length, of those with the budget nearest below.

        More budget is taken to be no worse; nothing is known of less than was measured: None.
        """
        own_model = self.model is not None
        alike = [a for a in table if (a.policy, a.own_model) == (self.policy, own_model)
                 and a.budget <= self.budget]  # fmt: skip

        def distance(a: Acceptance) -> tuple[float, float]:
            return -a.budget, abs(math.log(a.prefix_len / length))

        loss = LOW_LOSS if self.weights != "same" else 0.0
        return min(alike, key=distance).alpha - loss if alike else None


PLAIN = Strategy("none")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a strategy is expected to do for a batch, at an acceptance."""

    target: ModelConfig
    hw: Hardware
    w: Workload
    strategy: Strategy
    alpha: float

    @property
    def seconds(self) -> tuple[float, float, float]:
        """T_T, T_D and T_V(gamma)."""
        plain, verify = (forward_time(self.target, self.hw, self.w, T).total
                         for T in (1, self.strategy.gamma + 1))  # fmt: skip
        return plain, self.strategy.draft_seconds(self.target, self.hw, self.w), verify

    @property
    def round_cost(self) -> float:
        """Plain steps that a round takes."""
        return round_cost(self.strategy.gamma, *self.seconds)

    @property
    def speedup(self) -> float:
        """Over plain decoding."""
        return omega(self.strategy.gamma, self.alpha) / self.round_cost

    @property
    def break_even(self) -> float | None:
        """The acceptance from which on it beats plain decoding; None if none does."""
        cost, gamma = self.round_cost, self.strategy.gamma
        return None if cost > gamma + 1 else alpha_of(cost, gamma)

    def wins_from(self, max_length: int = 2**20) -> int | None:
        """The shortest context from which on, up to `max_length`, it beats plain decoding.

        None if it does not at `max_length`. A draft costs more with every token until its budget or
        its window is full, and can lose on the way what it won at short contexts. Then it costs no
        more, and can win again. Between two of these ends it starts to win once at most.
        """

        def wins(length: int) -> bool:
            return replace(self, w=replace(self.w, prefix_len=length)).speedup > 1

        if not wins(max_length):
            return None
        full = {self.strategy.budget, *layer_windows(self.strategy.model or self.target)}
        ends = sorted({1, max_length, *(int(n) for n in full if 0 < n < max_length)}, reverse=True)
        for high, low in itertools.pairwise(ends):
            if not wins(low):
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (low, middle) if wins(middle) else (middle, high)
                return high
        return 1


def held_bytes(m: ModelConfig, w: Workload) -> float:
    """Bytes of a model's weights on each GPU; the embedding table is whole on all of them."""
    table = m.vocab_size * m.dim
    return (table + (total_params(m) - table) / w.num_gpus) * w.itemsize


def memory_bytes(target: ModelConfig, w: Workload, strategy: Strategy = PLAIN) -> float:
    """Bytes of weights, caches and work on each GPU, the largest of them.

    Work is what sampling needs, greedy decoding needs less; each GPU has all of the logits. A layer
    with a window holds that and a prefill's chunk, as in `kv_cache.KVCache`.
    """
    capacity = w.prefix_len + strategy.gamma + 1
    held = visible_tokens(target, capacity, PREFILL_CHUNK) / target.n_layer
    caches = w.batch_size * held * kv_bytes_on_gpu(target, w)
    sizes = w.batch_size, strategy.gamma, PREFILL_CHUNK, w.itemsize, SAMPLING_COMPILED
    work = work_bytes(target, *sizes)
    return held_bytes(target, w) + caches + strategy.memory_bytes(target, w, capacity) + work


def largest_batch(target: ModelConfig, hw: Hardware, w: Workload, s: Strategy = PLAIN) -> int:
    """Most rows of that length that fit into memory; 0 if not even the weights do."""
    one, two = (memory_bytes(target, replace(w, batch_size=n), s) for n in (1, 2))
    return max(int((hw.memory - one) // (two - one)) + 1, 0)


def crossing_length(target: ModelConfig, hw: Hardware, w: Workload, gamma: int) -> float:
    """Roofline critical length: from here a verification of this batch is bound by memory.

    Reading, weights + S * kv, and computing, linear + S * attention, take equally long at
    S = (linear - weights) / (kv - attention), if every layer sees all of S. 0 where it always reads
    longer. Infinite where attention itself is bound by arithmetic, or the windows end before.

    The paper's figure prints 395 for Llama-2-7B and 1,958 for Llama-3-8B: this formula with batch
    256, gamma = 2 and the A100's peaks (efficiencies 1) has 404 and 1,951.
    """
    none, one = (forward_time(target, hw, w, gamma + 1, context=n) for n in (0, 1))
    per_token = one.kv - one.attention_compute
    if per_token <= 0:
        return math.inf
    needed = max(none.linear_compute - none.weights, 0) / per_token * target.n_layer
    for i, window in enumerate(sorted(layer_windows(target))):  # the shortest are full first
        length = needed / (target.n_layer - i)
        if length <= window:
            return length
        needed -= window
    return math.inf


def all_strategies(
    models: dict[str, ModelConfig],  # draft models by name
    budgets: Iterable[int],
    gammas: Iterable[int],
    weights: Iterable[str] = ("same",),  # of self-speculation
    num_gpus: int = 1,
) -> list[Strategy]:
    """Every strategy of this project; on several GPUs draft models divided, and whole on each."""
    every, places = [PLAIN], (False, True) if num_gpus > 1 else (False,)
    owned = [(name, m, whole) for name, m in models.items() for whole in places]
    for gamma in gammas:
        every.append(Strategy("ngram", gamma))
        every += [Strategy("mixed", gamma, K, weights=kind) for K in budgets for kind in weights]
        every += [Strategy("full", gamma, 0, m, name, whole=whole) for name, m, whole in owned]
        for budget, policy in itertools.product(budgets, ("streaming", "snapkv", "chunks")):
            every += [Strategy(policy, gamma, budget, weights=kind) for kind in weights]
            every += [Strategy(policy, gamma, budget, m, name, whole=w) for name, m, w in owned]
    return every


def plan(
    target: ModelConfig,
    hw: Hardware,
    w: Workload,
    strategies: Iterable[Strategy],
    acceptance: Iterable[Acceptance] = ACCEPTANCE,
) -> list[Prediction]:
    """The strategies that fit and whose acceptance is known, fastest first; plain is always one."""
    ranked = [Prediction(target, hw, w, PLAIN, 0.0)]
    for s in strategies:
        alpha = s.expected_acceptance(w.prefix_len, acceptance)
        if s.gamma and alpha is not None and memory_bytes(target, w, s) <= hw.memory:
            ranked.append(Prediction(target, hw, w, s, alpha))
    return sorted(ranked, key=lambda p: -p.speedup)


LINE = "{:>8}{:>6}{:>9}{:>9}{:>9}  {:34}{:>5}{:>7}{:>11}{:>9}{:>13}"
HEAD = LINE.format("S", "B", "T_T ms", "T_D ms", "T_V ms", "best draft", "gamma", "alpha",
                   "break-even", "speedup", "wins from S")  # fmt: skip


def best_line(ranked: list[Prediction]) -> str:
    """The table's line for a batch: the fastest strategy, and since when drafting wins."""
    p, even, wins = ranked[0], None, None
    drafting = [p for p in ranked if p.strategy != PLAIN]
    if drafting:
        best = drafting[0]
        even = best.break_even if best is p else None
        wins = best.wins_from(p.w.prefix_len) if best is p else best.wins_from()
    ms = (f"{1e3 * t:.2f}" for t in p.seconds)
    return LINE.format(
        p.w.prefix_len, p.w.batch_size, *ms, str(p.strategy), p.strategy.gamma, f"{p.alpha:.2f}",
        "" if even is None else f"{even:.2f}", f"{p.speedup:.2f}", wins or "never",
    )  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Raises ValueError, in one line, where argparse prints a usage text and exits."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a command line that it cannot read."""
        raise ValueError(f"{message} (see --help)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The flags; ValueError for one that cannot be used."""
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--model", default="llama-3.1-8b", help=", ".join(MODELS))
    p.add_argument("--checkpoint_path", type=Path, help="read the dimensions from its config.json")
    p.add_argument("--hardware", default="h100", help=", ".join(HARDWARE))
    p.add_argument("--num_gpus", type=int, default=1, help="tensor parallelism")
    p.add_argument("--batch_size", type=int, nargs="+", default=[1, 8, 32, 128])
    p.add_argument("--prefix_len", type=int, nargs="+", default=[4096, 32768])
    p.add_argument("--draft_budget", type=int, nargs="+", default=[256, 512, 1024, 2048])
    p.add_argument("--gamma", type=int, nargs="+", default=list(range(1, 13)))
    p.add_argument("--draft_weights", nargs="+", default=["same"], choices=["same", *WEIGHT_BYTES],
                   help="of self-speculation, one or several")  # fmt: skip
    p.add_argument("--draft_model", nargs="+", default=[], help="also consider these as drafts")
    p.add_argument("--kv_itemsize", type=int, default=2, choices=(1, 2), help="1: float8 K and V")
    p.add_argument("--acceptance", type=Path, nargs="+", metavar="JSON",
                   help="from these runs of generate.py --json, not from the paper")  # fmt: skip
    p.add_argument("--svg", type=Path, metavar="FILE", help="draw speedups, a line per prefix_len")
    args = p.parse_args(argv)
    for name in ("batch_size", "prefix_len", "draft_budget", "gamma", "num_gpus"):
        given, high = getattr(args, name), 100 if name == "gamma" else MAX_COUNT
        for value in given if isinstance(given, list) else [given]:
            if not 1 <= value <= high:
                raise ValueError(f"--{name} {value} must be in 1..{high}")
    return args


def speedup_picture(title: str, speedups: dict[int, dict[float, float]]) -> str:
    """The best draft's speedup by length and batch size as SVG, a line per length."""
    series = [Series(f"{short(S)} tokens", line) for S, line in sorted(speedups.items())]
    panel = Panel("by batch size", "batch size B", "speedup over plain decoding", series)
    note = "At 1, plain decoding is the fastest. A line ends where a larger batch does not fit."
    return draw(title, note, [panel], {"line": "predicted, with the best draft"})


def check_svg(path: Path) -> None:
    """ValueError if no picture can be written there."""
    try:
        check_writable(path)
    except OSError as e:
        raise ValueError(f"--svg: cannot write {path}: {e.strerror}") from None


def named(
    args: argparse.Namespace,
) -> tuple[Hardware, ModelConfig, list[Strategy], Iterable[Acceptance]]:
    """What the flags name. OSError or ValueError for names and files that cannot be used."""
    hw = lookup_name(HARDWARE, args.hardware, "hardware")
    acceptance = [read_acceptance(path) for path in args.acceptance or ()] or ACCEPTANCE
    path = args.checkpoint_path
    target = load_config(path) if path else lookup_name(MODELS, args.model, "model")
    models = {name: lookup_name(MODELS, name, "model") for name in args.draft_model}
    sizes = args.draft_budget, args.gamma, args.draft_weights, args.num_gpus
    strategies = all_strategies(models, *sizes)
    return hw, target, strategies, acceptance


def report(args: argparse.Namespace) -> None:
    """Print a line per length and batch, and draw. ValueError if none of them fits into memory."""
    hw, target, strategies, acceptance = named(args)
    if args.svg:
        check_svg(args.svg)
    speedups: dict[int, dict[float, float]] = {}  # by length and batch size
    title = f"{args.checkpoint_path or args.model} on {args.num_gpus} x {hw.name}, 16 bit"
    print(f"{title}\n{HEAD}")
    for S, B in itertools.product(args.prefix_len, args.batch_size):
        w = Workload(B, S, args.num_gpus, kv_itemsize=args.kv_itemsize)
        if (rows := largest_batch(target, hw, w)) < B:
            print(f"{S:8}{B:6}   does not fit into {args.num_gpus} x {hw.memory / 1e9:.0f} GB; "
                  f"the largest batch is {rows}")  # fmt: skip
            continue
        ranked = plan(target, hw, w, (s for s in strategies if s.budget < S), acceptance)
        print(best_line(ranked))
        speedups.setdefault(S, {})[B] = ranked[0].speedup
    B = max(args.batch_size)
    w = Workload(B, 1, args.num_gpus, kv_itemsize=args.kv_itemsize)
    crossing = crossing_length(target, hw, w, 4)
    print(f"verifying 4 drafts of {B} rows is memory-bound from {crossing:,.0f} tokens on")
    if not speedups:
        raise ValueError("nothing of this fits; take more GPUs, fewer rows or a shorter context")
    if args.svg:
        write_file(speedup_picture(title, speedups).encode(), args.svg)
        print(f"wrote {args.svg}")


def exit_status(command: str, work: Callable[[], object]) -> int:
    """0 after the work; 2, and a line on standard error, for input that it cannot use."""
    try:
        work()
        return 0
    except (ValueError, OSError) as e:
        print(f"{command}:", " ".join(str(e).split()), file=sys.stderr)
        return 2


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return exit_status("cost_model.py", lambda: report(parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
