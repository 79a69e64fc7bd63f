"""From logits to tokens, and which drafts stay: pure functions.

**A token is an argmax, with noise.** The token at place `pos` of a row is

    argmax over v of   log p(v) + noise(seed of the row, pos, v)

with the target's p after temperature, top-k and top-p. With independent Gumbel noise the argmax is
v with probability exactly p(v) (the Gumbel-max trick). The log of a sum that all tokens share
changes no argmax, so nothing is normalised. Greedy decoding is the same without noise.

**The noise is a pure function**, a hash of seed, place and token. No generator has a state to keep,
and nothing is drawn in an agreed order. So the text of a row depends on its prompt, its settings
and its seed alone: not on its neighbours, the drafter, gamma, or when it was started.

**Losslessness is equality.** Drafters choose their tokens by the same rule with the same noise
("drafter-invariant", Daliri et al., arXiv 2408.07978). A draft stays while it equals the target's
own token, sampled or greedy. The first one that differs is replaced by the target's. So all that is
written is the target's own choice given the text before it: token by token, the text of plain
decoding with the same seed. No two places share their noise, so the text is a sample of p.

**What it costs.** Leviathan et al. (arXiv 2211.17192) accept a draft x with probability
min(1, p(x) / q(x)). No rule accepts more often, but this one keeps the draft's probabilities q,
[B, gamma, V]. With shared noise draft and target agree a little less often. First drafts accepted
on the demo, by that rule -> by this one:

    temperature            0.6             0.8             1.0
    streaming, 128    0.631 -> 0.622  0.785 -> 0.766  0.768 -> 0.734
    snapkv, 128       0.805 -> 0.799  0.738 -> 0.725  0.716 -> 0.683

A draft that is certain, such as one of prompt lookup, loses nothing: both accept it with
probability p(x).

**Ragged acceptance without branches.** Rows accept different numbers of drafts. A `cumprod` over
"this draft stays" is 1 up to the first rejection, its sum is `n_accepted [B]`, and `gather` takes
what follows. Settings and seeds are tensors too: rows that ask for different things share one
compiled round, whose code depends on the `widest` of them only.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HALVINGS = 28  # of the interval in which top-p cuts: 2^(40 / 2^28) is 1 in float32
WORD = 0xFFFFFFFF  # 32-bit words in int64: times an odd number below 2^31, nothing overflows
SALTS = 0x2545F491, 0x9E3779B9  # of the two keys of a place; any two words that differ


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request's logits become a token, for the target and the draft alike."""

    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # then the smallest set with at least this much probability

    def __post_init__(self) -> None:
        tiny, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
        if not 0 <= self.temperature <= most:
            raise ValueError(
                f"temperature {self.temperature} must be a number >= 0, at most {most:.0e} "
                f"(0 is greedy)"
            )
        if 0 < self.temperature < tiny:
            raise ValueError(
                f"temperature {self.temperature} must be at least {tiny}, or 0: greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} must be at least 1")
        if self.top_p is not None and not tiny <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be in (0, 1], and at least {tiny}")
        if self.greedy and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p need a temperature above 0; 0 is greedy decoding")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without noise."""
        return self.temperature == 0

    @property
    def cuts(self) -> bool:
        """Whether top-p may leave a token out."""
        return self.top_p is not None and self.top_p < 1

    def covers(self, other: "Sampling") -> bool:
        """Whether what is compiled for this one can also do the other."""
        enough = other.top_k is None or self.top_k is not None and other.top_k <= self.top_k
        return other.greedy or not self.greedy and enough and (self.cuts or not other.cuts)


def widest(samplings: Iterable[Sampling]) -> Sampling:
    """One that covers all of these; greedy where none samples. Of one, itself."""
    several = list(samplings)
    return Sampling(
        max((s.temperature for s in several), default=0.0),
        max((s.top_k for s in several if s.top_k is not None), default=None),
        min((s.top_p for s in several if s.top_p is not None), default=None),
    )


class RowSampling(NamedTuple):
    """What each row of a batch asks for."""

    temperature: Tensor  # [B] float32; 0: greedy
    top_k: Tensor  # [B] int64; 0: off
    top_p: Tensor  # [B] float32; 1: off
    seed: Tensor  # [B] int64, at least 0

    @classmethod
    def greedy(cls, n_rows: int, device: torch.device) -> "RowSampling":
        """Of B greedy rows."""
        integers = torch.zeros(2, n_rows, dtype=torch.int64, device=device)
        floats = torch.zeros(2, n_rows, device=device)
        return cls(floats[0], integers[0], floats[1] + 1, integers[1])

    def set_row(self, b: int, sampling: Sampling, seed: int) -> None:
        """Let row b ask for this. In place."""
        values = sampling.temperature, sampling.top_k or 0, sampling.top_p or 1.0, seed
        for setting, value in zip(self, values, strict=True):
            setting[b] = value

    def row(self, b: int) -> "RowSampling":
        """Row b alone, a view."""
        return RowSampling(*(setting[b : b + 1] for setting in self))


def row_seed(seed: int, index: int, turn: int = 0) -> int:
    """A seed in [0, 2^63) for request `index` of a turn; those of all turns are unrelated."""
    return random.Random(f"request {index} of turn {turn} of seed {seed}").getrandbits(63)


def mix(words: Tensor, key: Tensor | int = 0) -> Tensor:  # [...] int64 in [0, 2^32), each
    """A permutation of all words for every key, which comes in half-way: a hash with two rounds."""
    words = ((words ^ (words >> 16)) * 0x21F0AAAD & WORD) ^ key
    words = (words ^ (words >> 15)) * 0x735A2D97 & WORD
    return words ^ (words >> 15)


def gumbel(words: Tensor) -> Tensor:  # [...] int64 in [0, 2^32) -> [...] float32
    """-log(-log(1 - v)) of v = (word + 1/2) / 2^32, largest for word 0: the upper tail is exact."""
    v = (words.float() + 0.5) * 2**-32
    return -torch.log(-torch.log1p(-v.clamp_max(1 - 2**-24)))


def place_keys(
    seed: Tensor,  # [B] int64, at least 0
    pos: Tensor,  # [B, T] int64, places in the text
) -> tuple[Tensor, Tensor]:  # [B, T] int64 in [0, 2^32), each
    """The two keys of each place, both made of both halves of the seed."""
    low, high = (seed & WORD)[:, None], (seed >> 32 & WORD)[:, None]
    first, second = (mix(mix(mix(low ^ salt) ^ high) ^ pos & WORD) for salt in SALTS)
    return first, second


def noise(
    keys: tuple[Tensor, Tensor],  # [B, T] int64 each, of the places
    n_vocab: int,  # V
) -> Tensor:  # [B, T, V] float32
    """Gumbel noise, a function of seed, place and token: whatever B, T and the other rows are.

    It is shared only where both keys agree.
    """
    first, second = keys
    tokens = mix(torch.arange(n_vocab, device=first.device))
    return gumbel(mix(tokens ^ first[..., None], second[..., None]))


def nucleus(
    probs: Tensor,  # [..., V] float32, which sum to 1
    top_p: Tensor,  # [..., 1] float32; 1: all that have a probability
) -> Tensor:  # [..., V] bool
    """Which tokens are in the smallest set of likeliest ones that sums to top_p, ties included.

    The probability at which to cut is found by halving an interval instead of by sorting: summing
    over a vocabulary is cheap, sorting one is not. What is below the first `low` sums to less than
    1 - top_p. Each halving takes the square root of high / low, until float32 sees no difference.
    """
    high = probs.amax(dim=-1, keepdim=True)  # above it: nothing
    low = ((1 - top_p) / probs.shape[-1] / 2).expand_as(high)  # above it: at least top_p
    for _ in range(HALVINGS):
        middle = (low * high).sqrt()
        too_high = (probs * (probs > middle)).sum(dim=-1, keepdim=True) < top_p
        low, high = torch.where(too_high, low, middle), torch.where(too_high, middle, high)
    return probs > low


def filtered(
    logits: Tensor,  # [B, T, V]
    rows: RowSampling,
    widest: Sampling,
) -> Tensor:  # [B, T, V] float32, -inf: left out
    """log p but for a constant: temperature, top-k and top-p, in this order.

    Ties at a cut are kept. Greedy rows are not scaled. Settings off in `widest` cost nothing.
    """
    temperature, top_k, top_p = (setting[:, None, None] for setting in rows[:3])
    logits = logits.float()
    logits = logits - logits.amax(dim=-1, keepdim=True)
    logits = logits / torch.where(temperature > 0, temperature, 1)
    if widest.top_k is not None:
        largest = logits.topk(min(widest.top_k, logits.shape[-1]), dim=-1).values
        index = (top_k - 1).clamp(0, largest.shape[-1] - 1).expand(-1, logits.shape[1], 1)
        out = (logits < largest.gather(2, index)) & (top_k > 0)
        logits = logits.masked_fill(out, -torch.inf)
    if widest.cuts:
        logits = logits.masked_fill(~nucleus(logits.softmax(dim=-1), top_p), -torch.inf)
    return logits


def pick(
    logits: Tensor,  # [B, T, V]
    pos: Tensor,  # [B, T] int64, the places whose tokens are decided
    rows: RowSampling,
    widest: Sampling,  # covers what the rows ask for; known when this is compiled
) -> Tensor:  # [B, T] int64
    """The token at each place: the likeliest one of a greedy row, else a sample, by its noise."""
    if widest.greedy:
        return logits.argmax(dim=-1)
    return choose(logits, place_keys(rows.seed, pos), rows, widest)


def choose(
    logits: Tensor,  # [B, T, V]
    keys: tuple[Tensor, Tensor],  # [B, T] int64 each, of the places
    rows: RowSampling,
    widest: Sampling,
) -> Tensor:  # [B, T] int64
    """The same where rows may sample."""
    sampled = (rows.temperature > 0)[:, None, None]
    score = filtered(logits, rows, widest) + noise(keys, logits.shape[-1]) * sampled
    return score.argmax(dim=-1)


def pick_by_place(
    one: Callable[..., Tensor],  # `choose`, compiled
    logits: Tensor,  # [B, T, V]
    pos: Tensor,  # [B, T] int64
    rows: RowSampling,
    widest: Sampling,
) -> Tensor:  # [B, T] int64
    """`pick` on a CPU, where to compile takes longer than to sample: of one place, for any T.

    Greedy rows alone need none of it. To look at a value costs nothing there.
    """
    if widest.greedy or not rows.temperature.any():
        return logits.argmax(dim=-1)
    keys = zip(*(key.split(1, dim=1) for key in place_keys(rows.seed, pos)), strict=True)
    places = zip(logits.split(1, dim=1), keys, strict=True)
    chosen = [
        one(place.contiguous(), (first.contiguous(), second.contiguous()), rows, widest)
        for place, (first, second) in places
    ]
    return torch.cat(chosen, dim=1)


def accept(
    draft_tokens: Tensor,  # [B, gamma] int64
    target_tokens: Tensor,  # [B, gamma + 1] int64, the target's own token at each place
) -> tuple[Tensor, Tensor]:  # n_accepted [B], next_token [B]
    """Keep the longest prefix of drafts that the target has chosen itself."""
    agree = draft_tokens == target_tokens[:, :-1]
    n_accepted = agree.long().cumprod(dim=1).sum(dim=1)
    return n_accepted, target_tokens.gather(1, n_accepted[:, None])[:, 0]


def judge(
    logits: Tensor,  # [B, gamma + 1, V], the target's
    draft: Tensor,  # [B, gamma]
    seq_len: Tensor,  # [B]
    rows: RowSampling,
    widest: Sampling,
    pick: Callable[..., Tensor] = pick,  # [B, T]
) -> tuple[Tensor, Tensor]:  # n_accepted [B], next_token [B]
    """How many drafts are what the target itself says at their places, and what it says then."""
    pos = seq_len[:, None] + torch.arange(logits.shape[1], device=logits.device)
    return accept(draft, pick(logits, pos, rows, widest))


@dataclass(frozen=True, slots=True)
class Stats:
    """What a decoding run did. Definitions are vLLM's. A finished row drafts nothing."""

    rounds: int  # passes of the target
    decoded_tokens: int  # all rows, without the first tokens, which the prefill decided
    accepted_histogram: list[int]  # index n -> how often a row accepted exactly n drafts
    drafted_histogram: list[int]  # index g -> how often a row was drafted for with gamma = g

    @property
    def row_rounds(self) -> int:
        """Rounds, summed over the rows that were not finished yet."""
        return sum(self.drafted_histogram)

    @property
    def drafts(self) -> int:
        """How often a row was drafted for."""
        return sum(self.drafted_histogram[1:])

    @property
    def drafted(self) -> int:
        """Draft tokens for which there was room."""
        return sum(g * count for g, count in enumerate(self.drafted_histogram))

    @property
    def accepted(self) -> int:
        """Draft tokens that became text."""
        return sum(n * count for n, count in enumerate(self.accepted_histogram))

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per row and round, the target's own token included: 1 + accepted / drafts."""
        return 1 + self.accepted / max(self.drafts, 1)

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted / drafted tokens, in 0..1."""
        return self.accepted / max(self.drafted, 1)

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """Share of the first, second, ... drafts that were accepted, each in 0..1."""
        accepted, drafted = self.accepted_histogram, self.drafted_histogram
        return [
            sum(accepted[i:]) / sum(drafted[i:]) for i in range(1, len(drafted)) if sum(drafted[i:])
        ]
