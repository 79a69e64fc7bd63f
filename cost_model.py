"""What a step costs, what speculation gains, and which draft to use: arithmetic, no torch.

    python cost_model.py --model llama-3.1-8b --hardware h100 --num_gpus 8 \\
        --batch_size 32 64 128 --prefix_len 8192 32768 100000

**One forward** of T tokens for each of B rows with S tokens of context (`step`). A GPU reads memory
and computes at the same time, so a stage takes the longer of the two (roofline):

    linear      max( weight_bytes / bandwidth,        2 * params * B * T / flops )
    attention   max( B * S * kv_bytes / bandwidth,    4 * L * H * D * S * B * T / flops )
    activations written and read between the matrices, new K and V, logits: bytes / bandwidth
    all-reduce  2 per layer with tensor parallelism:  latency + bytes / link bandwidth
    fixed       per layer: launches, norms, everything that does not grow

Weights, heads and arithmetic are divided by the number of GPUs. Bandwidth and flops are peaks times
efficiencies. At long context the attention stage of T = 1 and of T = gamma + 1 read the same bytes:
T_V is near T_T, and speculation is possible.

**A round** yields Omega(gamma, alpha) tokens and takes gamma * T_D + T_V(gamma), so

    speedup = T_T * Omega(gamma, alpha) / (gamma * T_D + T_V(gamma))        (arXiv 2408.11049)

T_T and T_V grow with B * S, T_D with B * budget only: that is why the gain grows with batch and
length, where other speculative decoding fades. Below a critical length it is a loss, and then the
answer of `plan` is "none".

The presets' constants are one set per GPU type. Those of the A100 and the H100 are fitted to the
paper's measurements (`--measured`), and `HARDWARE` says what the others rest on. `fit` finds
such constants from timed steps of a real model on a real device, for `--draft auto` (`auto.py`).
"""

import argparse
import csv
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from config import (
    MODELS,
    PREFILL_CHUNK,
    ModelConfig,
    kv_bytes_per_token,
    load_config,
    lookup_name,
    total_params,
    work_bytes,
)
from roofline import HARDWARE, Hardware, Workload, forward_time


def omega(gamma: int, alpha: float) -> float:
    """Expected tokens of a round, the target's own included (arXiv 2211.17192, eq. 1).

    1 + alpha + ... + alpha^gamma, if each draft is accepted with probability alpha given that those
    before it were.
    """
    return sum(alpha**i for i in range(gamma + 1))


def alpha_of(tokens_per_round: float, gamma: int) -> float:
    """The acceptance at which a round yields that many tokens; ValueError outside 1..gamma + 1."""
    if not 1 <= tokens_per_round <= gamma + 1:
        raise ValueError(f"{tokens_per_round} tokens per round is not in 1..{gamma + 1}")
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if omega(gamma, middle) < tokens_per_round else (low, middle)
    return low


def break_even(t_target: float, t_round: float, gamma: int) -> float | None:
    """The acceptance from which a round beats plain decoding; None if none does."""
    needed = t_round / t_target
    return None if needed > gamma + 1 else alpha_of(max(needed, 1.0), gamma)


@dataclass(frozen=True, slots=True)
class Draft:
    """A candidate: who drafts, reading how much, how far. Names are those of `--draft`."""

    policy: str  # none, streaming, snapkv, full, ngram
    gamma: int = 0
    budget: int = 0  # tokens of draft KV per row; unused by none, full and ngram
    model: ModelConfig | None = None  # None: self-speculation
    model_name: str = ""
    select_every: int = 16  # snapkv: rounds from one selection to the next; 0: never again
    obs_window: int = 8

    def __str__(self) -> str:
        if self.policy in ("none", "ngram"):
            return self.policy
        who = self.model_name or ("draft model" if self.model else "self")
        return f"{who}, {self.policy}" + (f" {self.budget}" if self.budget else "")


PLAIN = Draft("none")


def draft_step(draft: Draft, target: ModelConfig, hw: Hardware, w: Workload) -> float:
    """T_D: seconds per draft token, the selection's share included."""
    if draft.policy in ("none", "ngram"):
        return 0.0
    m = draft.model or target
    context = w.prefix_len if draft.policy == "full" else min(draft.budget, w.prefix_len)
    seconds = forward_time(m, hw, w, 1, context).total
    if draft.policy == "streaming" and draft.model:  # read again before its own context ends
        rounds = max((m.max_seq_len - draft.budget) // (draft.gamma + 1), 1)
        seconds += forward_time(m, hw, w, draft.budget, draft.budget).total / rounds / draft.gamma
    if draft.policy == "snapkv" and draft.select_every:
        seconds += selection(draft, m, hw, w) / draft.select_every / draft.gamma
    return seconds


def selection(draft: Draft, m: ModelConfig, hw: Hardware, w: Workload) -> float:
    """Seconds of one SnapKV selection: a forward of the observed tokens, and their scores.

    The scores read K once more, and are themselves written and read a few times in float32.
    """
    look = forward_time(m, hw, w, draft.obs_window).total
    n_scores = m.n_layer * m.n_head * draft.obs_window * w.batch_size * w.prefix_len / w.num_gpus
    kv_gpus = min(w.num_gpus, m.n_kv_head)
    k_bytes = w.batch_size * w.prefix_len * kv_bytes_per_token(m, w.itemsize) / 2 / kv_gpus
    return look + (k_bytes + 4 * 4 * n_scores) / hw.bandwidth


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a candidate is expected to do."""

    draft: Draft
    alpha: float
    t_target: float  # T_T, seconds
    t_draft: float  # T_D
    t_verify: float  # T_V(gamma)

    @property
    def round_seconds(self) -> float:
        return self.draft.gamma * self.t_draft + self.t_verify

    @property
    def tokens_per_round(self) -> float:
        return omega(self.draft.gamma, self.alpha)

    @property
    def seconds_per_token(self) -> float:
        return self.round_seconds / self.tokens_per_round

    @property
    def speedup(self) -> float:
        return self.t_target / self.seconds_per_token

    @property
    def break_even(self) -> float | None:
        return break_even(self.t_target, self.round_seconds, self.draft.gamma)


def predict(
    target: ModelConfig, hw: Hardware, w: Workload, draft: Draft, alpha: float
) -> Prediction:
    t_target = forward_time(target, hw, w).total
    t_verify = forward_time(target, hw, w, draft.gamma + 1).total
    return Prediction(draft, alpha, t_target, draft_step(draft, target, hw, w), t_verify)


MOST = 10**9  # of anything that is counted in what a user gives


@dataclass(frozen=True, slots=True)
class Acceptance:
    """One measured acceptance: where the default table comes from."""

    policy: str
    own_model: bool  # a draft model of its own
    budget: int
    prefix_len: int
    alpha: float
    source: str

    def __post_init__(self) -> None:
        for field, least in (("budget", 0), ("prefix_len", 1)):
            value = getattr(self, field)
            if type(value) is not int or not least <= value <= MOST:
                raise ValueError(f"{field} {value!r} must be a whole number in {least}..{MOST}")


# Streaming: tokens per round of the paper's Table 3 (gamma = 2, PG-19) as alpha. SnapKV: the rate
# at which the project's GPU goals are set, from the same paper.
ACCEPTANCE = (
    Acceptance("streaming", False, 512, 8000, 0.833, "arXiv 2408.11049, table 3b, 8k"),
    Acceptance("streaming", False, 512, 32000, 0.823, "arXiv 2408.11049, table 3b, 32k"),
    Acceptance("streaming", False, 512, 100000, 0.804, "arXiv 2408.11049, table 3c, 100k"),
    Acceptance("streaming", True, 512, 8000, 0.696, "arXiv 2408.11049, table 3a, 8k"),
    Acceptance("streaming", True, 512, 32000, 0.692, "arXiv 2408.11049, table 3a, 32k"),
    Acceptance("snapkv", False, 2048, 32000, 0.895, "arXiv 2408.11049, SnapKV at 32k"),
)


def expected_acceptance(draft: Draft, w: Workload, table: Iterable[Acceptance]) -> float | None:
    """Alpha of the measured entry that is nearest in length, of those with a budget nearest below.

    More budget is taken to be no worse; nothing is known of less than was measured: None.
    """
    alike = [a for a in table
             if a.policy == draft.policy and a.own_model == (draft.model is not None)
             and (draft.policy in ("ngram", "full") or a.budget <= draft.budget)]  # fmt: skip

    def distance(a: Acceptance) -> tuple[float, float]:
        return -a.budget, abs(math.log(a.prefix_len / w.prefix_len))

    return min(alike, key=distance).alpha if alike else None


def read_acceptance(path: Path) -> Acceptance:
    """The acceptance of a run with one fixed draft, from what `generate.py --json` wrote."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        plan, stats = run["plan"], run["speculative"]
        for field in ("predicted_speedup", "synthetic_acceptance"):
            if field in plan:
                raise ValueError(f"its plan has {field}")
        policies = dict.fromkeys(("streaming", "snapkv", "full", "ngram"))  # those of candidates
        lookup_name(policies, plan["strategy"], "draft")
        return Acceptance(
            plan["strategy"],
            "draft_model" in run,
            plan.get("draft_budget", 0),
            max(row["prompt_length"] for row in run["outputs"]),
            alpha_of(stats["mean_acceptance_length"], plan["gamma"]),
            str(path),
        )
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as e:
        raise ValueError(
            f"{path}: not the JSON of generate.py with a fixed --draft and --speculate_k "
            f"({type(e).__name__}: {e})"
        ) from None


def memory_bytes(
    target: ModelConfig, w: Workload, draft: Draft = PLAIN, new_tokens: int = 0
) -> float:
    """Weights, caches and work on each GPU, the largest of them.

    Work is what sampling needs, greedy decoding needs less; each GPU has all of the logits. A
    sliding window saves no memory: the cache holds the whole text, as `kv_cache.KVCache` does.
    """
    kv_gpus = min(w.num_gpus, target.n_kv_head)
    S = w.prefix_len + new_tokens + draft.gamma + 1
    total = total_params(target) * w.itemsize / w.num_gpus
    total += w.batch_size * S * kv_bytes_per_token(target, w.itemsize) / kv_gpus
    if draft.policy not in ("none", "ngram"):
        m = draft.model or target
        n = S if draft.policy == "full" else draft.budget + draft.gamma + 1
        n += {"snapkv": S, "streaming": draft.budget}.get(draft.policy, 0) if draft.model else 0
        total += w.batch_size * n * kv_bytes_per_token(m, w.itemsize) / min(w.num_gpus, m.n_kv_head)
        total += total_params(m) * w.itemsize / w.num_gpus if draft.model else 0
    work = work_bytes(target, w.batch_size, draft.gamma, PREFILL_CHUNK, w.itemsize, sampled=True)
    return total + work


def largest_batch(
    target: ModelConfig, hw: Hardware, w: Workload, draft: Draft = PLAIN, new_tokens: int = 0
) -> int:
    """Most rows of that length that fit into memory; 0 if not even the weights do."""
    one = memory_bytes(target, replace(w, batch_size=1), draft, new_tokens)
    two = memory_bytes(target, replace(w, batch_size=2), draft, new_tokens)
    return max(int((hw.memory - one) // (two - one)) + 1, 0)


def crossing_length(target: ModelConfig, hw: Hardware, w: Workload, gamma: int) -> float:
    """Roofline critical length: from here a verification of this batch is bound by memory.

    Reading, weights + S * kv, and computing, linear + S * attention, take equally long at
    S = (linear - weights) / (kv - attention). 0 where it always reads longer. Infinite where
    attention itself is bound by arithmetic, or reads no further than a window shorter than S.

    The paper's figure prints 395 for Llama-2-7B and 1,958 for Llama-3-8B: this formula with batch
    256, gamma = 2 and the A100's peaks (efficiencies 1) has 404 and 1,951.
    """
    none, one = (forward_time(target, hw, w, gamma + 1, context=n) for n in (0, 1))
    per_token = one.kv - one.attention_compute
    if per_token <= 0:
        return math.inf
    length = max(none.linear_compute - none.weights, 0) / per_token
    return length if length <= (target.sliding_window or math.inf) else math.inf


def winning_length(
    target: ModelConfig, hw: Hardware, w: Workload, draft: Draft, alpha: float, most: int = 2**20
) -> int | None:
    """The shortest context from which on, up to `most`, a candidate beats plain decoding.

    None if it does not at `most`. A draft costs more with every token until its budget or its
    window is full, and can lose on the way what it won at short contexts. Then it costs no more,
    and can win again. So it can start to win once below such a length and once above it.
    """

    def wins(length: int) -> bool:
        return predict(target, hw, replace(w, prefix_len=length), draft, alpha).speedup > 1

    if not wins(most):
        return None
    full = (draft.budget, draft.model and draft.model.sliding_window)
    ends = sorted({1, most, *(n for n in full if n and n < most)}, reverse=True)
    for high, low in itertools.pairwise(ends):
        if not wins(low):
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if wins(middle) else (middle, high)
            return high
    return 1


def candidates(
    models: dict[str, ModelConfig], budgets: Iterable[int], gammas: Iterable[int]
) -> list[Draft]:
    """Every strategy of this project; models are draft models by name."""
    found = [PLAIN]
    for gamma in gammas:
        found.append(Draft("ngram", gamma))
        found += [Draft("full", gamma, 0, m, name) for name, m in models.items()]
        for budget, policy in itertools.product(budgets, ("streaming", "snapkv")):
            found.append(Draft(policy, gamma, budget))
            found += [Draft(policy, gamma, budget, m, name) for name, m in models.items()]
    return found


def plan(
    target: ModelConfig,
    hw: Hardware,
    w: Workload,
    drafts: Iterable[Draft],
    acceptance: Iterable[Acceptance] = ACCEPTANCE,
) -> list[Prediction]:
    """The candidates whose acceptance is known, fastest first. Plain decoding is always one."""
    ranked = [predict(target, hw, w, PLAIN, 0.0)]
    for draft in drafts:
        alpha = expected_acceptance(draft, w, acceptance)
        if draft.gamma and alpha is not None:
            ranked.append(predict(target, hw, w, draft, alpha))
    return sorted(ranked, key=lambda p: p.seconds_per_token)


@dataclass(frozen=True, slots=True)
class Measured:
    """A published row, and what the model says to it."""

    row: dict[str, str]
    prediction: Prediction
    t_target: float  # seconds, measured
    t_drafts: float  # of all drafts of a round
    t_verify: float
    speedup: float


COLUMNS = ("target", "draft", "draft_method", "draft_budget", "gpu", "num_gpus", "prefix_len",
           "batch_size", "gamma", "draft_ms_per_round", "verify_ms", "tokens_per_round",
           "autoregressive_ms_per_token", "speedup")  # fmt: skip


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


def read_row(row: dict[str, str], place: str) -> Measured:
    """One measurement held against the model; `place` is for the error message."""

    def get(column: str, convert: Callable):
        try:
            return convert(row[column])
        except (ValueError, TypeError, AttributeError, IndexError) as e:
            raise ValueError(f"{place}, column {column}: {row[column]!r}: {e}") from None

    def positive(text: str) -> float:
        value = float(text)
        if not 0 < value < math.inf:
            raise ValueError("not a positive number")
        return value

    def count(text: str) -> int:
        return int(positive(text) and text)

    target = get("target", lambda s: lookup_name(MODELS, s.split()[0].lower(), "model"))
    hw = get("gpu", lambda s: lookup_name(HARDWARE, s.lower(), "hardware"))
    own = get("draft", lambda s: not s.startswith("self"))
    model = (
        get("draft", lambda s: lookup_name(MODELS, s.split()[0].lower(), "model")) if own else None
    )
    methods = {"StreamingLLM": "streaming", "SnapKV": "snapkv"}
    policy = get("draft_method", lambda s: lookup_name(methods, s, "method"))
    w = Workload(get("batch_size", count), get("prefix_len", count), get("num_gpus", count))
    gamma, tokens = get("gamma", count), get("tokens_per_round", positive)
    draft = Draft(policy, gamma, get("draft_budget", count), model, select_every=0)
    alpha = get("tokens_per_round", lambda _: alpha_of(tokens, gamma))
    ms = [get(c, positive) / 1e3
          for c in ("autoregressive_ms_per_token", "draft_ms_per_round", "verify_ms")]  # fmt: skip
    return Measured(row, predict(target, hw, w, draft, alpha), *ms, get("speedup", positive))


def compare(rows: list[Measured]) -> str:
    """Predicted against measured, row by row, and the errors."""
    lines = [f"{'target':16}{'draft':>16}{'S':>8}{'B':>5}"
             f"{'T_T ms':>15}{'gamma T_D ms':>15}{'T_V ms':>15}{'speedup':>13}",
             "each time and speedup: predicted / measured"]  # fmt: skip
    errors: dict[str, list[float]] = {"T_T": [], "gamma T_D": [], "T_V": [], "speedup": []}
    wrong = 0
    for r in rows:
        p = r.prediction
        pairs = ((p.t_target, r.t_target), (p.draft.gamma * p.t_draft, r.t_drafts),
                 (p.t_verify, r.t_verify), (p.speedup, r.speedup))  # fmt: skip
        for error, (ours, theirs) in zip(errors.values(), pairs, strict=True):
            error.append(abs(ours / theirs - 1))
        times = "".join(f"{1e3 * ours:8.1f}/{1e3 * theirs:6.1f}" for ours, theirs in pairs[:3])
        lines.append(
            f"{r.row['target']:16}{r.row['draft'].split()[0]:>16}{r.row['prefix_len']:>8}"
            f"{r.row['batch_size']:>5}{times}{p.speedup:8.2f}/{r.speedup:.2f}"
        )
        wrong += (p.speedup - 1) * (r.speedup - 1) < 0 and abs(p.speedup - 1) > 0.05
    lines += [
        f"{name:10} median error {statistics.median(e):.1%}, largest {max(e):.1%}"
        for name, e in errors.items()
    ]
    lines.append(f"on the wrong side of 1.0 by more than 0.05: {wrong} of {len(rows)} rows")
    return "\n".join(lines)


HEAD = (f"{'S':>8}{'B':>6}{'T_T ms':>9}{'T_D ms':>9}{'T_V ms':>9}  "
        f"{'best draft':34}{'gamma':>5}{'alpha':>7}{'break-even':>11}{'speedup':>9}"
        f"{'wins from S':>13}")  # fmt: skip


def table(args, target: ModelConfig, hw: Hardware) -> tuple[str, int]:
    """One line per (S, B): the best candidate. Also how many of them fit into memory."""
    lines, fitting = [HEAD], 0
    models = {name: lookup_name(MODELS, name, "model") for name in args.draft_model}
    drafts = candidates(models, args.draft_budget, args.gamma)
    for S in args.prefix_len:
        for B in args.batch_size:
            w = Workload(B, S, args.num_gpus)
            most = largest_batch(target, hw, w)
            if most < B:
                lines.append(f"{S:8}{B:6}   does not fit into {args.num_gpus} x "
                             f"{hw.memory / 1e9:.0f} GB; the largest batch is {most}")  # fmt: skip
                continue
            fitting += 1
            fits = [d for d in drafts if memory_bytes(target, w, d) <= hw.memory]
            ranked = plan(target, hw, w, [d for d in fits if d.budget < S], args.acceptance)
            p, strategy = ranked[0], [p for p in ranked if p.draft != PLAIN]
            even = "" if p.break_even is None or p.draft == PLAIN else f"{p.break_even:.2f}"
            wins = None
            if strategy:
                best = strategy[0]
                most = S if best.speedup > 1 else 2**20  # where it wins: since when
                wins = winning_length(target, hw, w, best.draft, best.alpha, most)
            times = f"{1e3 * p.t_target:9.2f}{1e3 * p.t_draft:9.2f}{1e3 * p.t_verify:9.2f}"
            lines.append(f"{S:8}{B:6}{times}  {p.draft!s:34}{p.draft.gamma:5}"
                         f"{p.alpha:7.2f}{even:>11}{p.speedup:9.2f}"
                         f"{wins or 'never':>13}")  # fmt: skip
    B = max(args.batch_size)
    crossing = crossing_length(target, hw, Workload(B, 1, args.num_gpus), 4)
    lines.append(f"verifying 4 drafts of {B} rows is memory-bound from {crossing:,.0f} tokens on")
    return "\n".join(lines), fitting


def plot(args, target: ModelConfig, hw: Hardware, path: Path) -> None:
    """The paper's two figures: speedup over batch size, and what a step's time goes to."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    drafts = candidates({}, args.draft_budget, args.gamma)
    for S in args.prefix_len:
        points = [
            (B, plan(target, hw, Workload(B, S, args.num_gpus), drafts, args.acceptance)[0].speedup)
            for B in args.batch_size
        ]
        left.plot(*zip(*points, strict=True), marker="o", label=f"{S:,} tokens")
    left.set(xlabel="batch size", ylabel="predicted speedup, best strategy", xscale="log")
    left.axhline(1, color="grey", linewidth=0.8)
    left.legend()
    steps = [forward_time(target, hw, Workload(B, args.prefix_len[-1], args.num_gpus))
             for B in args.batch_size]  # fmt: skip
    parts = {
        "weights": [1e3 * t.weights for t in steps],
        "KV": [1e3 * t.kv for t in steps],
        "compute beyond reading": [1e3 * t.compute_beyond for t in steps],
        "activations, all-reduce, fixed": [
            1e3 * (t.activations + t.all_reduce + t.fixed) for t in steps
        ],
    }
    right.stackplot(args.batch_size, parts.values(), labels=parts)
    right.set(xlabel="batch size", ylabel=f"ms of a step at {args.prefix_len[-1]:,} tokens")
    right.legend(loc="upper left")
    figure.savefig(path)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line for the caller to print, instead of a usage text."""
        raise ValueError(f"{message} (see --help)")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--model", default="llama-3.1-8b", help=", ".join(MODELS))
    p.add_argument("--checkpoint_path", type=Path, help="read the dimensions from its config.json")
    p.add_argument("--hardware", default="h100", help=", ".join(HARDWARE))
    p.add_argument("--num_gpus", type=int, default=1, help="tensor parallelism")
    p.add_argument("--batch_size", type=int, nargs="+", default=[1, 8, 32, 128])
    p.add_argument("--prefix_len", type=int, nargs="+", default=[4096, 32768])
    p.add_argument("--draft_budget", type=int, nargs="+", default=[256, 512, 1024, 2048])
    p.add_argument("--gamma", type=int, nargs="+", default=list(range(1, 9)))
    p.add_argument("--draft_model", nargs="+", default=[], help="also consider these as drafts")
    p.add_argument(
        "--acceptance",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="take it from these runs of generate.py --json, not from the paper",
    )
    p.add_argument("--measured", type=Path, metavar="CSV", help="hold the model against these")
    p.add_argument("--plot", type=Path, metavar="FILE", help="write the paper's two figures")
    args = p.parse_args(argv)
    for name in ("batch_size", "prefix_len", "draft_budget", "gamma", "num_gpus"):
        given, most = getattr(args, name), 100 if name == "gamma" else MOST
        for value in given if isinstance(given, list) else [given]:
            if not 1 <= value <= most:
                raise ValueError(f"--{name} {value} must be in 1..{most}")
    return args


def read_dimensions(checkpoint_dir: Path) -> ModelConfig:
    """Of a Hugging Face directory, by the model's own reader (which imports torch)."""

    return load_config(checkpoint_dir)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for input that cannot be used."""
    try:
        args = parse_args(argv)
        if args.measured:
            print(compare(read_measured(args.measured)))
            return 0
        hw = lookup_name(HARDWARE, args.hardware, "hardware")
        args.acceptance = [read_acceptance(path) for path in args.acceptance or ()] or ACCEPTANCE
        target = (
            read_dimensions(args.checkpoint_path)
            if args.checkpoint_path
            else lookup_name(MODELS, args.model, "model")
        )
        text, fitting = table(args, target, hw)
        print(
            f"{args.checkpoint_path or args.model} on {args.num_gpus} x {hw.name}, 16 bit\n{text}"
        )
        if not fitting:
            raise ValueError(
                "nothing of this fits; take more GPUs, fewer rows or a shorter context"
            )
        if args.plot:
            plot(args, target, hw, args.plot)
            print(f"wrote {args.plot}")
        return 0
    except (ValueError, OSError) as e:
        print("cost_model.py:", " ".join(str(e).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
