"""Draw one round: what a draft reads, what the check reads, what is kept. Needs no torch.

    python scripts/draw_round.py                     # benchmarks/results/round.svg, of the README
    python scripts/draw_round.py --prefix_len 4096 --out short.svg

Every number is computed: bytes from the model's sizes, accepted drafts from the paper's acceptance
at that budget and length. Both cache strips and both bars are to scale.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from acceptance import ACCEPTANCE, omega
from config import MODELS, ModelConfig, kv_bytes, lookup_name
from cost_model import Parser, Strategy, exit_status
from files import write_file
from picture import look_of, svg, text
from roofline import Workload, weight_bytes

OUT = ROOT / "benchmarks" / "results" / "round.svg"
WIDTH, LEFT, TOKENS = 860, 12, 560  # pixels: of the page; where caches, and where tokens begin
CACHE, BAR, BOX, PITCH = 500, 700, 34, 46  # pixels: a cache, the longest bar, a token, to the next
DRAFT, CHECK = look_of(0, 4), look_of(3, 4)


@dataclass(frozen=True, slots=True)
class Round:
    """What a round of a batch reads and yields. ValueError for sizes that cannot be drawn."""

    name: str  # of a model in MODELS
    w: Workload
    gamma: int
    budget: int  # tokens of KV that a draft reads per row

    def __post_init__(self) -> None:
        if not 1 <= self.gamma <= 6:
            raise ValueError(f"gamma {self.gamma} must be in 1..6, what the page has room for")
        if not 1 <= self.budget < self.w.prefix_len:
            raise ValueError(f"draft_budget {self.budget} must be in 1..{self.w.prefix_len - 1}")

    @property
    def model(self) -> ModelConfig:
        return lookup_name(MODELS, self.name, "model")

    @property
    def weights(self) -> float:
        """GB of the matrices, that every forward reads."""
        return weight_bytes(self.model, self.w) / 1e9

    def kv(self, n_tokens: int) -> float:
        """GB of K and V of so many tokens in all rows."""
        return self.w.batch_size * kv_bytes(self.model, n_tokens, self.w.itemsize) / 1e9

    @property
    def draft(self) -> float:
        """GB that a draft step reads."""
        return self.weights + self.kv(self.budget)

    @property
    def plain(self) -> float:
        """GB that a plain step reads, and the check, too."""
        return self.weights + self.kv(self.w.prefix_len)

    @property
    def total(self) -> float:
        """GB that a round reads."""
        return self.gamma * self.draft + self.plain

    @property
    def alpha(self) -> float:
        """The measured acceptance of such a draft; ValueError if there is none."""
        strategy = Strategy("streaming", self.gamma, self.budget)
        alpha = strategy.expected_acceptance(self.w.prefix_len, ACCEPTANCE)
        if alpha is None:
            raise ValueError(f"no acceptance is known for a budget of {self.budget} tokens")
        return alpha

    @property
    def tokens(self) -> float:
        """Of a row, expected."""
        return omega(self.gamma, self.alpha)

    @property
    def kept(self) -> int:
        """Accepted drafts of a usual round that has a wrong one."""
        return min(round(self.tokens) - 1, self.gamma - 1)


def box(x: float, y: float, width: float, height: float, look: str) -> str:
    """A rectangle."""
    sides = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {sides} rx="{min(4, width / 2):.1f}" class="{look}"/>'


def tokens(y: float, head: str, words: Sequence[tuple[str, str]]) -> list[str]:
    """Tokens in their boxes under a heading, each with its colour."""
    shapes = [text(TOKENS, y - 10, head, "muted small")]
    for i, (word, colour) in enumerate(words):
        x = TOKENS + i * PITCH
        shapes += [box(x, y, BOX, BOX, f"line {colour}"),
                   text(x + BOX / 2, y + 22, word, f"{colour} strong", "middle")]  # fmt: skip
    return shapes


def cache(y: float, parts: Sequence[tuple[float, float]], colour: str) -> list[str]:
    """A row's KV cache; parts that are read are filled (first, last; of 1)."""
    return [box(LEFT, y, CACHE, BOX, "line rule")] + [
        box(LEFT + CACHE * first, y, max(CACHE * (last - first), 1.5), BOX, f"fill soft {colour}")
        for first, last in parts
    ]


def draft(r: Round, y: float) -> list[str]:
    """The first line: hardly any of the cache is read."""
    share, S = r.budget / r.w.prefix_len, r.w.prefix_len
    words = (f"the first few and the newest, {r.budget:,} of {S:,} tokens: {r.kv(r.budget):.1f} GB "
             f"of KV, {r.weights:.1f} of weights")  # fmt: skip
    return [
        text(LEFT, y - 10, f"1  Draft: {r.gamma} times the next token", "ink strong"),
        *cache(y, [(0, 0), (1 - share, 1)], DRAFT),
        text(LEFT, y + BOX + 18, f"{words}, each time", "muted small"),
        *tokens(y, "the draft guesses", [(f"d{i + 1}", DRAFT) for i in range(r.gamma)]),
    ]


def check(r: Round, y: float) -> list[str]:
    """The second line: all of the cache is read, once."""
    S = r.w.prefix_len
    words = f"all {S:,} tokens: {r.kv(S):.1f} GB of KV, {r.weights:.1f} of weights, as a plain step"
    says = [f"d{i + 1}" for i in range(r.kept)] + ["t"]
    marks = (text(TOKENS + i * PITCH + BOX / 2, y + BOX + 18, "✓" if i < r.kept else "✗", "ink",
                  "middle") for i in range(r.kept + 1))  # fmt: skip
    return [
        text(LEFT, y - 10, f"2  Check: all {r.gamma} in one pass", "ink strong"),
        *cache(y, [(0, 1)], CHECK),
        text(LEFT, y + BOX + 18, words, "muted small"),
        *tokens(y, "the model says", [(word, CHECK) for word in says]),
        *marks,
    ]


def keep(r: Round, y: float) -> list[str]:
    """The third line: the text that comes of it."""
    new = [(f"d{i + 1}", DRAFT) for i in range(r.kept)] + [("t", CHECK)]
    words = (f"Here {len(new)} tokens; {r.tokens:.1f} on average, where a draft is accepted with "
             f"probability {r.alpha:.2f}.")  # fmt: skip
    return [
        text(LEFT, y - 10, "3  Keep: what agrees, and the model's own token", "ink strong"),
        text(LEFT, y + 12, words, "muted small"),
        text(LEFT, y + 30, "The text is that of plain decoding. A wrong guess costs time only.",
             "muted small"),
        *tokens(y, "new text", new),
    ]  # fmt: skip


def bars(r: Round, y: float) -> list[str]:
    """What a round reads, and what plain decoding reads for as many tokens, to scale."""
    plain, full, small = r.tokens * r.plain, r.kv(r.w.prefix_len), r.kv(r.budget)
    scale = BAR / max(r.total, plain)
    parts = {
        "one round": [(r.weights, "muted"), (small, DRAFT)] * r.gamma
        + [(r.weights, "muted"), (full, CHECK)],
        f"{r.tokens:.1f} plain steps": [
            (share * n, colour)
            for share in shares(r.tokens)
            for n, colour in ((r.weights, "muted"), (full, CHECK))
        ],
    }
    shapes = [text(LEFT, y - 14, f"Read for {r.tokens:.1f} tokens of each row", "ink strong")]
    x = 400.0
    for words, colour in (("weights", "muted"), ("KV, by drafts", DRAFT), ("all of the KV", CHECK)):
        shapes += [box(x, y - 25, 12, 12, f"fill soft {colour}"),
                   text(x + 18, y - 14, words, "muted small")]  # fmt: skip
        x += 46 + 6 * len(words)
    for name, bar in parts.items():
        x = LEFT
        for n, colour in bar:
            shapes.append(box(x, y, max(n * scale - 1, 0.5), 22, f"fill soft {colour}"))
            x += n * scale
        n_bytes = sum(n for n, _ in bar)
        shapes.append(text(x + 8, y + 16, f"{n_bytes:,.0f} GB, {name}", "ink small"))
        y += 32
    words = (f"Plain decoding reads {plain / r.total:.1f} times as much. The KV grows with the "
             "length of the text; what a draft reads of it does not.")  # fmt: skip
    return [*shapes, text(LEFT, y + 16, words, "muted small")]


def shares(n: float) -> list[float]:
    """1, 1, .. and what is left: n steps."""
    return [1.0] * int(n) + [n % 1]


def draw_round(r: Round) -> str:
    """The picture. ValueError without a known acceptance."""
    note = (f"{r.name}, {r.w.batch_size} rows of {r.w.prefix_len:,} tokens, 16 bit. The model "
            f"drafts for itself, with {r.budget:,} tokens of KV per row.")  # fmt: skip
    title = "One round: cheap guesses, one full check"
    head = [text(LEFT, 26, title, "title ink"), text(LEFT, 48, note, "muted small")]
    shapes = [*head, *draft(r, 96), *check(r, 206), *keep(r, 316), *bars(r, 412)]
    return svg((WIDTH, 508), title, [4], shapes)


def report(argv: list[str] | None) -> None:
    """Write the picture. ValueError or OSError if it cannot be."""
    p = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--model", default="llama-3.1-8b", help=", ".join(MODELS))
    p.add_argument("--batch_size", type=int, default=32)
    p.add_argument("--prefix_len", type=int, default=32768)
    p.add_argument("--draft_budget", type=int, default=512)
    p.add_argument("--gamma", type=int, default=4)
    p.add_argument("--out", type=Path, default=OUT)
    a: argparse.Namespace = p.parse_args(argv)
    drawn = draw_round(
        Round(a.model, Workload(a.batch_size, a.prefix_len), a.gamma, a.draft_budget)
    )
    write_file(drawn.encode(), a.out)
    print(f"wrote {a.out}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for input that cannot be used."""
    return exit_status("draw_round.py", lambda: report(argv))


if __name__ == "__main__":
    sys.exit(main())
