"""Which tokens a draft keeps: one function per policy. The file to hack.

A draft of budget K reads the newest tokens (`SparseKVCache`'s window) and, before them, the tokens
that a *policy* selected. A policy is a pure function: it looks at one layer of the full cache and
returns the positions to keep, per row and KV head, ``[B, Hkv, n_selected]``. `POLICIES` has them:

    streaming   the first tokens of the text, the attention sinks (StreamingLLM, arXiv 2309.17453)
    snapkv      what the newest tokens' queries attend to most (SnapKV, arXiv 2404.14469)
    chunks      passages whose mean key the newest query attends to most (TriForce, arXiv
                2404.11912)

Everything else is done for it (`selection.py`): gathering, the window, masks, compiling, selecting
again. It may return any position; one that holds no text yet is never seen. And it cannot break the
output: a bad policy only lowers the acceptance rate. A policy that `observes` is shown the queries
of the newest tokens. One that has `summarise` is shown what this function makes of every CHUNK
tokens' keys, so it can choose in every round and read no more than that.

A `Strategy` names a policy, or a way to draft that needs none, and divides its budget.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batch import MAX_GAMMA
from kv_cache import NEVER, CacheSpec, SparseKVCache, fold_mask
from quantize import KINDS

BEFORE, AFTER = 16, 5  # neighbours over which SnapKV's scores are averaged (LOG.md)
CHUNK = 16  # tokens that an entry of a summary is made of
SCORE_BYTES = 2**28  # most memory that SnapKV's scores may take at a time


class Layer(NamedTuple):
    """What a policy sees: one layer of the full cache, and how much of it is text."""

    k: Tensor  # [B, Hkv, S, D], rotated; position p in slot p
    v: Tensor  # [B, Hkv, S, D]
    n_cached: Tensor  # [B] int64, tokens of each row that are held
    n_sink: int  # how many of the first tokens to keep in any case
    n_recent: int  # newest tokens that the draft sees without being told
    queries: Tensor | None  # [B, W, H, D] of the tokens at `observed`, scaled; None: not asked for
    summary: Tensor | None  # [B, Hkv, S // CHUNK, ...], by `summarise`; None: there is none


class Policy(NamedTuple):
    """An entry of the registry: how to select, and how a budget is divided."""

    select: Callable[[Layer, int], Tensor]  # (layer, n_selected) -> [B, Hkv, n_selected] positions
    recent_share: float  # of the budget, for the window of newest tokens (what the sinks leave)
    observes: bool = False  # wants Layer.queries
    reselect_every: int = 16  # rounds until it is asked again by default; 0: its answer is final
    obs_window: int = 1  # newest tokens whose queries it observes by default (LOG.md)
    # Keys [B, Hkv, n, CHUNK, D], and which of these tokens exist [B, n, CHUNK], to Layer.summary.
    summarise: Callable[[Tensor, Tensor], Tensor] | None = None  # -> [B, Hkv, n, ...]

    def n_recent(self, budget: int, n_sink: int, obs_window: int) -> int:
        """Tokens of the budget that go to the window; an observed window lies in it."""
        n = max(int(self.recent_share * budget), obs_window if self.observes else 1)
        return min(n, budget - n_sink)

    def summary_shape(self, spec: CacheSpec, capacity: int) -> tuple[int, ...]:
        """What it keeps of a row's KV head for `capacity` tokens: [n, ...]; () if nothing."""
        if self.summarise is None:
            return ()
        k = torch.zeros(1, 1, 1, CHUNK, spec.head_dim)
        one = self.summarise(k, torch.ones(1, 1, CHUNK, dtype=torch.bool))
        return capacity // CHUNK, *one.shape[3:]


def observed(n_cached: Tensor, obs_window: int) -> Tensor:  # [B] -> [B, W]
    """Positions of the newest W cached tokens; a row with fewer has them first, then others."""
    start = (n_cached - obs_window).clamp_min(0)
    return start[:, None] + torch.arange(obs_window, device=n_cached.device)


def select_streaming(layer: Layer, n_selected: int) -> Tensor:  # [B, Hkv, n_selected]
    """StreamingLLM (arXiv 2309.17453): the first tokens of the text, the attention sinks."""
    first = torch.arange(n_selected, device=layer.k.device)
    return first.expand(*layer.k.shape[:2], n_selected)


def attention_received(
    k: Tensor,  # [B, Hkv, S, D], of tokens, or of every stride-th place
    queries: Tensor,  # [B, W, H, D]
    n_cached: Tensor,  # [B]
    stride: int = 1,
) -> Tensor:  # [B, Hkv, S] float32
    """Mean attention of the observed queries, over the query heads of each KV head, to each slot.

    Where a model caps its scores, these are not: they only rank, and a cap keeps the order of a
    query's scores.
    """
    (B, W, H, D), (Hkv, S) = queries.shape, k.shape[1:3]
    pos = observed(n_cached, W)
    slot = stride * torch.arange(S, device=k.device)
    q = queries.view(B, W, Hkv, -1, D).permute(0, 2, 3, 1, 4).flatten(2, 3).contiguous()
    scores = (k.to(q.dtype) @ q.transpose(-1, -2)).transpose(-1, -2).float()  # this form: LOG.md
    hidden = fold_mask(slot > pos[:, None, :, None], H // Hkv)
    probs = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    exists = (pos < n_cached[:, None]).repeat(1, H // Hkv)  # [B, G * W]; others are not asked
    weight = exists / exists.sum(dim=1, keepdim=True).clamp_min(1)
    return (weight[:, None, :, None] * probs).sum(dim=2)


def ranks(received: Tensor, layer: Layer, stride: int = 1) -> Tensor:  # [B, Hkv, S]
    """By which to choose slots: the sinks, then what received most attention before the window.

    Then what the window still holds, at -1 or more; what is no text yet is at -2.
    """
    n = layer.n_cached[:, None, None]
    slot = stride * torch.arange(received.shape[-1], device=received.device)
    rank = torch.where(slot < n - layer.n_recent, received, received - 1)
    rank = torch.where(slot < layer.n_sink, 2 - slot / max(layer.n_sink, 1), rank)
    return rank.masked_fill(slot >= n, -2)


def select_snapkv(layer: Layer, n_selected: int) -> Tensor:  # [B, Hkv, n_selected]
    """SnapKV (arXiv 2404.14469): per KV head, what the newest queries attend to most.

    Scores are pooled over neighbours, more BEFORE a slot than AFTER it: a token is kept with its
    surroundings, for a draft that follows a passage needs what comes after the tokens that are
    attended to now. Row by row if need be: the scores of all rows are [B, H, W, S].
    """
    k, queries, n_cached = layer.k, layer.queries, layer.n_cached
    assert queries is not None, "an entry that observes is given them"
    W, H = queries.shape[1:3]
    rows = max(SCORE_BYTES // (4 * H * W * k.shape[2]), 1)
    parts = zip(k.split(rows), queries.split(rows), n_cached.split(rows), strict=True)
    received = torch.cat([attention_received(*part) for part in parts])
    n = BEFORE + 1 + AFTER
    total = F.pad(received, (BEFORE + 1, AFTER)).cumsum(dim=-1)
    pooled = ((total[..., n:] - total[..., :-n]) / n).clamp_min(0)
    rank, pos = ranks(pooled, layer).topk(n_selected, dim=-1)
    return pos.masked_fill(rank < -1, NEVER)


def mean_keys(k: Tensor, exists: Tensor) -> Tensor:  # [B, Hkv, n, CHUNK, D] -> [B, Hkv, n, D]
    """The mean key of each chunk, of those tokens that exist [B, n, CHUNK]."""
    weight = exists / exists.sum(dim=-1, keepdim=True).clamp_min(1)
    return (k.float() * weight[:, None, ..., None]).sum(dim=-2)


def select_chunks(layer: Layer, n_selected: int) -> Tensor:  # [B, Hkv, n_selected]
    """TriForce (arXiv 2404.11912): chunks whose mean key the newest query attends to most."""
    assert layer.summary is not None and layer.queries is not None
    received = attention_received(layer.summary, layer.queries, layer.n_cached, CHUNK)
    rank, chunk = ranks(received, layer, CHUNK).topk(-(-n_selected // CHUNK), dim=-1)
    pos = CHUNK * chunk[..., None] + torch.arange(CHUNK, device=chunk.device)
    return pos.masked_fill(rank[..., None] < -1, NEVER).flatten(-2)[..., :n_selected]


SNAPKV = Policy(select_snapkv, recent_share=0.5, observes=True, reselect_every=4)
POLICIES = {
    "streaming": Policy(select_streaming, recent_share=1.0, reselect_every=0),
    "snapkv": SNAPKV,
    "mixed": SNAPKV,  # of the self-draft beside prompt lookup, see `drafters.py`
    "chunks": Policy(select_chunks, 0.35, observes=True, reselect_every=1, summarise=mean_keys),
}
NO_POLICY = Policy(select_streaming, recent_share=1.0, reselect_every=0, obs_window=1)


@dataclass(frozen=True, slots=True)
class Strategy:
    """How drafts are made: by whom, from whose KV, and how many tokens at a time."""

    policy: str = "none"  # "none", "ngram", "full" (with a draft model), or a name in POLICIES
    gamma: int = 5  # draft tokens per round
    budget: int = 128  # K, tokens of draft KV per row: sinks, selected ones and window
    n_sink: int = 4  # of them, always the first ones of the text
    obs_window: int | None = None  # newest tokens whose queries are observed; None: the policy's
    reselect_every: int | None = None  # rounds; 0: never; None: the policy's own default
    weights: str = "same"  # of the target's copy that drafts for it: a kind of `quantize.py`

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= MAX_GAMMA:
            raise ValueError(f"speculate_k {self.gamma} must be in 0..{MAX_GAMMA}")
        if self.n_sink < 0:
            raise ValueError(f"n_sink {self.n_sink} must be at least 0")
        if not 1 <= self.n_observed <= 128:
            raise ValueError(f"obs_window {self.n_observed} must be in 1..128")
        if self.weights not in KINDS:
            raise ValueError(f"draft_weights {self.weights!r} must be one of {', '.join(KINDS)}")
        observes = self.entry.observes
        min_budget = self.n_sink + 1 + (self.n_observed if observes else 0)
        if self.budget < min_budget:
            terms = "n_sink + obs_window + 1" if observes else "n_sink + 1"
            raise ValueError(f"draft_budget {self.budget} must be at least {terms} = {min_budget}")
        if self.reselect_every is not None and self.reselect_every < 0:
            raise ValueError(f"reselect_every {self.reselect_every} must be at least 0 (0: never)")
        if self.reselect_every and not self.entry.reselect_every:
            able = ", ".join(name for name, p in POLICIES.items() if p.reselect_every)
            raise ValueError(
                f"reselect_every {self.reselect_every}: {self.policy} has nothing to reselect; "
                f"use it with {able}"
            )

    @property
    def enabled(self) -> bool:
        """Whether anything is drafted at all."""
        return self.policy != "none" and self.gamma > 0

    @property
    def entry(self) -> Policy:
        """The registered policy, or one that selects nothing."""
        return POLICIES.get(self.policy, NO_POLICY)

    @property
    def n_observed(self) -> int:
        """Newest tokens whose queries a policy that observes is shown."""
        return self.entry.obs_window if self.obs_window is None else self.obs_window

    @property
    def select_every(self) -> int:
        """Rounds from one selection to the next; 0: never again."""
        return self.entry.reselect_every if self.reselect_every is None else self.reselect_every

    def sparse_cache(self, spec: CacheSpec, capacity: int) -> SparseKVCache:
        """The draft's cache for a text of at most `capacity` tokens."""
        n_recent = self.entry.n_recent(self.budget, self.n_sink, self.n_observed)
        n_selected = min(self.budget - n_recent, capacity)
        n_observed = self.n_observed if self.entry.observes else 0
        return SparseKVCache(
            spec, n_selected, min(n_recent, capacity), self.gamma, n_observed,
            self.entry.summary_shape(spec, capacity),
        )  # fmt: skip

    def describe(self) -> dict[str, str | int]:
        """What the JSON says of it."""
        named: dict[str, str | int] = {"strategy": self.policy, "gamma": self.gamma}
        named |= {"draft_budget": self.budget} if self.policy in POLICIES else {}
        return named | ({"draft_weights": self.weights} if self.weights != "same" else {})

    def __str__(self) -> str:
        budget = f" {self.budget}" if self.policy in POLICIES else ""
        return self.policy + budget + (f" {self.weights}" if self.weights != "same" else "")
