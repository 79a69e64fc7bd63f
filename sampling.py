"""From logits to tokens, and which drafts stay: pure functions.

**One function makes probabilities** (`logits_to_probs`), for the target and the draft alike. Random
numbers are arguments (uniforms), so that a test can enumerate every outcome.

**Losslessness.** Greedy: a draft stays while it equals the target's argmax. Sampling (Leviathan et
al., arXiv 2211.17192): with target p and draft q, a drafted token x stays with probability
min(1, p(x) / q(x)). At the first rejection the next token comes from normalize(max(p - q, 0)); if
all stay, from p. Then the output has the distribution p, whatever q is:

    q(x) min(1, p(x) / q(x))  +  P(rejected) max(p(x) - q(x), 0) / P(rejected)  =  p(x)

**Ragged acceptance without branches.** Rows accept different numbers of drafts. A `cumprod` over
"this draft stays" is 1 up to the first rejection, its sum is `n_accepted [B]`, and `gather` takes
what follows. Everything has a static shape and can be captured.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HALVINGS = 28  # of the interval in which top-p cuts: 2^(40 / 2^28) is 1 in float32


@dataclass(frozen=True, slots=True)
class Sampling:
    """How logits become probabilities, for the target and the draft alike."""

    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # then the smallest set with at least this much probability

    def __post_init__(self) -> None:
        tiny = torch.finfo(torch.float32).tiny  # less would divide, or cut, by zero
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be a number >= 0 (0 is greedy)")
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
        """Whether the likeliest token is taken, and no random number."""
        return self.temperature == 0


class Draft(NamedTuple):
    """What is proposed for a round."""

    tokens: Tensor  # [B, gamma] int64
    probs: Tensor | None  # [B, gamma, V] float32, what they were drawn from; None: all certain


def logits_to_probs(logits: Tensor, sampling: Sampling) -> Tensor:  # [..., V] -> [..., V] float32
    """Probabilities after temperature, top-k and top-p, in this order. Ties at a cut are kept."""
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        cut = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < cut, -torch.inf)
    probs = logits.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        probs = nucleus(probs, sampling.top_p)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def nucleus(probs: Tensor, top_p: float) -> Tensor:  # [..., V] float32 -> [..., V]
    """Zero all but the smallest set of likeliest tokens whose sum is at least top_p, ties included.

    The probability at which to cut is found by halving an interval instead of by sorting: summing
    over a vocabulary is cheap, sorting one is not. What is below the first `low` sums to less than
    1 - top_p. Each halving takes the square root of high / low, until float32 sees no difference.
    """
    high = probs.amax(dim=-1, keepdim=True)  # above it: nothing
    low = torch.full_like(high, (1 - top_p) / probs.shape[-1] / 2)  # above it: at least top_p
    for _ in range(HALVINGS):
        middle = (low * high).sqrt()
        too_high = (probs * (probs > middle)).sum(dim=-1, keepdim=True) < top_p
        low, high = torch.where(too_high, low, middle), torch.where(too_high, middle, high)
    return probs.masked_fill(probs <= low, 0)


def sample(
    weights: Tensor,  # [..., V] float, >= 0 with a positive sum; need not be normalised
    u: Tensor,  # [...] uniforms in [0, 1)
) -> Tensor:  # [...] int64
    """Draw one index by inverting the cumulative distribution; never one of weight 0.

    The total is the largest sum that ends at a positive weight: a parallel cumsum need not be
    monotone in float32. The drawn point is kept below it, also where u * total rounds up to it.
    """
    cdf = weights.cumsum(dim=-1).masked_fill(weights <= 0, 0)
    total = cdf.amax(dim=-1, keepdim=True)
    x = (u[..., None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    return (cdf > x).to(torch.uint8).argmax(dim=-1)


def pick(
    logits: Tensor,  # [B, V]
    sampling: Sampling,
    u: Tensor | None,  # [B] uniforms in [0, 1); None when greedy
) -> tuple[Tensor, Tensor | None]:  # tokens [B] int64, probs [B, V] float32 or None
    """The next token of every row, and what it was drawn from when sampling."""
    if sampling.greedy:
        return logits.argmax(dim=-1), None
    probs = logits_to_probs(logits, sampling)
    return sample(probs, u), probs


def accept_greedy(
    draft_tokens: Tensor,  # [B, gamma]
    target_tokens: Tensor,  # [B, gamma + 1], the target's argmax at each place
) -> tuple[Tensor, Tensor]:  # n_accepted [B], next_token [B]
    """Keep the longest prefix of drafts that the target would have chosen itself."""
    agree = draft_tokens == target_tokens[:, :-1]
    n_accepted = agree.long().cumprod(dim=1).sum(dim=1)
    return n_accepted, target_tokens.gather(1, n_accepted[:, None])[:, 0]


def accept_sampled(
    draft: Draft,
    target_probs: Tensor,  # [B, gamma + 1, V]
    u_accept: Tensor,  # [B, gamma] uniforms in [0, 1)
    u_next: Tensor,  # [B] uniforms in [0, 1)
) -> tuple[Tensor, Tensor]:  # n_accepted [B], next_token [B]
    """Speculative sampling (arXiv 2211.17192, algorithm 1): the output is the target's, exactly."""
    B = len(u_next)
    token = draft.tokens[..., None]
    p = target_probs[:, :-1].gather(2, token)[..., 0]
    q = torch.ones_like(p) if draft.probs is None else draft.probs.gather(2, token)[..., 0]
    n_accepted = (u_accept * q < p).long().cumprod(dim=1).sum(dim=1)  # u < p / q
    rows = torch.arange(B, device=token.device)
    target = target_probs[rows, n_accepted]
    if draft.probs is None:
        rejected = F.pad(draft.tokens, (0, 1), value=-1)[rows, n_accepted]  # -1: all were accepted
        V = torch.arange(target.shape[-1], device=token.device)
        drafted = (rejected[:, None] == V).to(target.dtype)
    else:
        drafted = F.pad(draft.probs, (0, 0, 0, 1))[rows, n_accepted]  # zero: all were accepted
    residual = (target - drafted).clamp_min(0)
    # Empty only where the two distributions are equal up to rounding.
    empty = residual.sum(dim=-1, keepdim=True) == 0
    return n_accepted, sample(torch.where(empty, target, residual), u_next)


def accept(
    draft: Draft,
    logits: Tensor,  # [B, gamma + 1, V], the target's
    sampling: Sampling,
    u: Tensor | None,  # [B, gamma + 1] uniforms in [0, 1); None when greedy
) -> tuple[Tensor, Tensor]:  # n_accepted [B], next_token [B]
    """How many drafts stay and what follows them, by the rule that the sampling asks for."""
    if u is None:
        return accept_greedy(draft.tokens, logits.argmax(dim=-1))
    return accept_sampled(draft, logits_to_probs(logits, sampling), u[:, 1:], u[:, 0])


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
