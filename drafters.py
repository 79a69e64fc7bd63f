"""Who drafts: five ways to guess the next tokens, behind one small interface.

A drafter proposes tokens, the target verifies them, and nothing that a drafter does can change the
output. It can be cheap (a small T_D) and it can be right (a high acceptance); `cost_model.py` has
the speedup that follows from both.

    SelfDrafter              the target's weights with a sparse cache of the target's own K and V
    ModelDrafter             a small model with all of the text in a cache of its own
    SparseModelDrafter       the same, drafting from a few of its own tokens
    StreamingModelDrafter    a small model that never reads the text, only sinks and newest tokens
    LookupDrafter            no model: what followed these tokens the last time (prompt lookup)

`Drafting` says which; the engine (`spec_decode.py`) calls, per round, ``logits(i, token)`` for
i = 0 .. gamma - 1. Before a round it calls ``catch_up`` if there is text that the drafter has not
read, and then, or every `select_every` rounds, ``select``.

**A draft model lags by one token.** In a round it is fed the newest decided token and all drafts
but the last. If all are accepted, the last draft has become text that the draft's cache does not
hold. So the first step of every round feeds the last *two* decided tokens: a static shape, and in
all other rounds the first of them is only written again. Self-speculation needs none of it, because
verification writes into the draft's cache.

**A short context can serve a long text.** The streaming draft model sees the sinks and the newest
tokens, packed at positions of its own that start at 0:

    text        s s s s . . . . . . . . . . . . . . . . r r r r r r | n n n ->
    own         0 1 2 3                                 4 5 6 7 8 9   10 ...

With every new token its positions grow. Before they reach the end of its trained context it is
*re-anchored*: sinks and newest tokens are read again from position 0, a prefill of `budget` tokens.
So a draft that was trained on 512 tokens drafts for a text of 32,768.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig
from kv_cache import CacheSpec, KVCache, SparseKVCache
from model import Caches, Transformer
from policies import POLICIES, Layer, observed, select_streaming

MAX_GAMMA = 32
NGRAM = 3  # prompt lookup matches the newest 3 tokens, or as many as it can


@dataclass(frozen=True, slots=True)
class Strategy:
    """How drafts are made: by whom, from whose KV, and how many tokens at a time."""

    policy: str = "none"  # "none", "ngram", "full" (with a draft model), or a name in POLICIES
    gamma: int = 5  # draft tokens per round
    budget: int = 128  # K, tokens of draft KV per row: sinks, selected ones and window
    n_sink: int = 4  # of them, always the first ones of the text
    obs_window: int | None = None  # newest tokens whose queries are observed; None: the policy's
    reselect_every: int | None = None  # rounds; 0: never; None: the policy's own default
    synthetic_acceptance: float | None = None  # benchmarks only: draw who is accepted; not lossless

    def __post_init__(self) -> None:
        known = ["none", *POLICIES, "full", "ngram"]
        if self.policy not in known:
            raise ValueError(
                f"draft policy {self.policy!r} is unknown; known: {', '.join(known)}, and for "
                f"--draft also auto"
            )
        if not 0 <= self.gamma <= MAX_GAMMA:
            raise ValueError(f"speculate_k {self.gamma} must be in 0..{MAX_GAMMA}")
        if self.n_sink < 0:
            raise ValueError(f"n_sink {self.n_sink} must be at least 0")
        if not 1 <= self.n_observed <= 128:
            raise ValueError(f"obs_window {self.n_observed} must be in 1..128")
        policy = POLICIES.get(self.policy)
        observing = policy is not None and policy.observes
        least = self.n_sink + 1 + (self.n_observed if observing else 0)
        if self.budget < least:
            terms = "n_sink + obs_window + 1" if observing else "n_sink + 1"
            raise ValueError(f"draft_budget {self.budget} must be at least {terms} = {least}")
        if self.reselect_every is not None and self.reselect_every < 0:
            raise ValueError(f"reselect_every {self.reselect_every} must be at least 0 (0: never)")
        if self.reselect_every and not (policy and policy.reselect_every):
            able = ", ".join(name for name, p in POLICIES.items() if p.reselect_every)
            raise ValueError(
                f"reselect_every {self.reselect_every}: {self.policy} has nothing to reselect; "
                f"use it with {able}"
            )
        if self.synthetic_acceptance is not None and not 0 <= self.synthetic_acceptance <= 1:
            raise ValueError(f"synthetic_acceptance {self.synthetic_acceptance} must be in 0..1")

    @property
    def enabled(self) -> bool:
        return self.policy != "none" and self.gamma > 0

    @property
    def n_observed(self) -> int:
        """Newest tokens whose queries a policy that observes is shown."""
        own = POLICIES[self.policy].obs_window if self.policy in POLICIES else 1
        return own if self.obs_window is None else self.obs_window

    @property
    def select_every(self) -> int:
        """Rounds from one selection to the next; 0: never again."""
        if self.policy not in POLICIES:
            return 0
        default = POLICIES[self.policy].reselect_every
        return default if self.reselect_every is None else self.reselect_every

    def sparse_cache(self, spec: CacheSpec, capacity: int) -> SparseKVCache:
        """The draft's cache for a text of at most `capacity` tokens."""
        return SparseKVCache(spec, *self.split(capacity), self.gamma)

    def split(self, capacity: int) -> tuple[int, int]:
        """How a budget is divided: n_selected, n_recent."""
        n_recent = POLICIES[self.policy].n_recent(self.budget, self.n_sink, self.n_observed)
        return min(self.budget - n_recent, capacity), min(n_recent, capacity)


class Text(NamedTuple):
    """The state of a batch, written in place by the engine; drafters read the first three."""

    tokens: Tensor  # [B, S] int64
    seq_len: Tensor  # [B] int64, decided tokens, at least 2
    finished: Tensor  # [B] bool
    limit: Tensor  # [B] int64, most tokens that a row may reach
    eos: Tensor  # [n] int64, tokens that end a row; -1: none
    accepted: Tensor  # [MAX_GAMMA + 1] int64, histograms, see spec_decode.Stats
    drafted: Tensor  # [MAX_GAMMA + 1] int64
    n_rounds: Tensor  # [] int64, rounds in which a row was not finished yet

    def pair(self) -> tuple[Tensor, Tensor]:  # tokens [B, 2], positions [B, 2]
        """The last two decided tokens."""
        pos = self.seq_len[:, None] - 2 + torch.arange(2, device=self.tokens.device)
        return self.tokens.gather(1, pos), pos


class Drafter(ABC):
    writes: Caches = ()  # what a verification writes besides the target's own cache
    select_every = 0  # rounds after which `select` is due again; 0: never
    n_selected = 0  # tokens of a row that `select` keeps by choice
    n_bytes = 0  # of its caches

    def catch_up(self, n_read: Tensor) -> None:  # [B]  # noqa: B027
        """Read the decided text behind the first n_read tokens of every row."""

    def select(self) -> None:  # noqa: B027
        """Load, from all of the decided text, what drafting reads."""

    @abstractmethod
    def logits(self, i: int, token: Tensor) -> Tensor:  # [B, 1] -> [B, V]
        """After the i-th token of this round: the newest decided one, or a draft."""


def within_vocabulary(model: Transformer, tokens: Tensor) -> Tensor:
    """Tokens that the model has: the target may have more padding rows, which no text uses."""
    return tokens.clamp_max(model.config.vocab_size - 1)


def select(
    strategy: Strategy,
    model: Transformer,
    text: Text,
    n_cached: Tensor,  # [B], tokens that `full` holds
    full: KVCache,
    sparse: SparseKVCache,
) -> None:
    """Let the policy choose, layer by layer, what the sparse cache keeps of the full one."""
    policy = POLICIES[strategy.policy]
    queries: Iterator[Tensor | None] = repeat(None)
    if policy.observes:
        pos = observed(n_cached, strategy.n_observed)
        tokens = within_vocabulary(model, text.tokens.gather(1, pos))
        queries = model.queries(tokens, pos, full)
    for i, q in zip(range(full.spec.n_layer), queries, strict=False):
        layer = Layer(full.k[i], full.v[i], n_cached, strategy.n_sink, q, full.spec.window)
        sparse.fill(i, full, policy.select(layer, sparse.n_selected), n_cached)


class SelfDrafter(Drafter):
    """Self-speculation: the target itself, reading a few of its own K and V."""

    def __init__(self, strategy: Strategy, model: Transformer, full: KVCache, text: Text) -> None:
        self.strategy, self.model, self.full, self.text = strategy, model, full, text
        self.sparse = strategy.sparse_cache(full.spec, full.capacity)
        self.writes = (self.sparse,)
        self.select_every, self.n_selected = strategy.select_every, self.sparse.n_selected
        self.n_bytes = self.sparse.n_bytes

    def select(self) -> None:
        n_cached = self.text.seq_len - 1
        select(self.strategy, self.model, self.text, n_cached, self.full, self.sparse)

    def logits(self, i: int, token: Tensor) -> Tensor:
        return self.model(token, self.text.seq_len[:, None] - 1 + i, self.sparse)[:, -1]


class ModelDrafter(Drafter):
    """A draft model that has all of the text in a full cache of its own."""

    def __init__(
        self,
        strategy: Strategy,
        model: Transformer,  # the draft model
        target: Transformer,
        full: KVCache,  # the target's
        text: Text,
    ) -> None:
        self.strategy, self.model, self.text = strategy, model, text
        self.select_every = strategy.select_every
        self.vocab_size = target.config.vocab_size
        self.spec = CacheSpec.for_model(model, len(text.seq_len))
        self.offset = torch.zeros_like(text.seq_len)  # [B], place in the text - own position
        self.allocate()

    def allocate(self) -> None:
        self.full = KVCache.empty(self.spec, self.text.tokens.shape[1])
        self.full.finished = self.text.finished
        self.read: KVCache | SparseKVCache = self.full
        self.write: Caches = (self.full,)
        self.n_bytes = self.full.n_bytes

    def catch_up(self, n_read: Tensor) -> None:
        """All but the newest token. Copies lengths to the host."""
        chunk = min(self.spec.prefill_chunk, self.full.capacity)
        lengths = zip(n_read.tolist(), self.text.seq_len.tolist(), strict=True)
        for b, (n_cached, length) in enumerate(lengths):
            tokens = within_vocabulary(self.model, self.text.tokens[b : b + 1])
            if n_cached < length - 1:
                self.model.prefill(tokens, length - 1, chunk, self.full.row(b), n_cached)

    def logits(self, i: int, token: Tensor) -> Tensor:
        token, pos = self.text.pair() if i == 0 else (token, self.text.seq_len[:, None] - 1 + i)
        token = within_vocabulary(self.model, token)
        pos = pos - self.offset[:, None]
        logits = self.model(token, pos, self.read, self.write)[:, -1]
        padding = self.vocab_size - logits.shape[-1]
        return F.pad(logits, (0, padding), value=-torch.inf)  # a negative padding slices


class SparseModelDrafter(ModelDrafter):
    """A draft model with a full cache of its own, of which a policy selects what it reads."""

    def allocate(self) -> None:
        super().allocate()
        self.sparse = self.strategy.sparse_cache(self.spec, self.full.capacity)
        self.n_selected, self.n_bytes = self.sparse.n_selected, self.n_bytes + self.sparse.n_bytes
        self.read, self.write = self.sparse, (self.sparse, self.full)

    def select(self) -> None:
        n_cached = self.text.seq_len - 2
        select(self.strategy, self.model, self.text, n_cached, self.full, self.sparse)


class StreamingModelDrafter(ModelDrafter):
    """A draft model that sees sinks and newest tokens only, at positions of its own."""

    def allocate(self) -> None:
        K, gamma = self.strategy.budget, self.strategy.gamma
        room = self.model.config.max_seq_len - K - gamma  # rounds may go so many positions on
        self.select_every = (room - 1) // (gamma + 1) + 1
        self.anchor = KVCache.empty(self.spec, K)
        self.sparse = self.read = self.strategy.sparse_cache(self.spec, K)
        self.write = (self.sparse,)
        self.n_selected = self.sparse.n_selected
        self.n_bytes = self.anchor.n_bytes + self.sparse.n_bytes

    def catch_up(self, n_read: Tensor) -> None:
        """Nothing to do: it never reads the whole text."""

    def select(self) -> None:
        """Re-anchor: read sinks and newest tokens again, from position 0."""
        K, n_sink, n_cached = self.strategy.budget, self.strategy.n_sink, self.text.seq_len - 2
        self.offset.copy_((n_cached - K).clamp_min(0))
        pos = torch.arange(K, device=n_cached.device)
        pos = pos + self.offset[:, None] * (pos >= n_sink)
        tokens = self.text.tokens.gather(1, pos.clamp_max(self.text.tokens.shape[1] - 1))
        own_pos = torch.arange(K, device=n_cached.device).expand_as(tokens)
        self.model.hidden(within_vocabulary(self.model, tokens), own_pos, self.anchor)
        n_own = n_cached - self.offset
        for i in range(self.spec.n_layer):
            layer = Layer(self.anchor.k[i], self.anchor.v[i], n_own, n_sink, None)
            self.sparse.fill(i, self.anchor, select_streaming(layer, n_sink), n_own)


def lookup(tokens: Tensor, seq_len: Tensor, gamma: int) -> Tensor:  # [B, S], [B] -> [B, gamma]
    """What followed the latest earlier occurrence of the newest tokens, the longest match first.

    Where the occurrence is so near that the copy runs into the end of the text, it goes on
    periodically. Without any occurrence the newest token is repeated.
    """
    newest = seq_len[:, None] - 1
    end = torch.arange(tokens.shape[1], device=tokens.device)  # where an occurrence would end
    same, matched = end < newest, torch.zeros_like(tokens)
    for n in range(NGRAM):
        key = tokens.gather(1, (newest - n).clamp_min(0))
        same = same & (tokens.roll(n, dims=1) == key) & (end >= n) & (newest >= n)
        matched += same
    rank = torch.where(end < newest, matched * tokens.shape[1] + end, -1)
    end = rank.argmax(dim=1, keepdim=True)
    step = torch.arange(gamma, device=tokens.device) % (newest - end)
    return tokens.gather(1, end + 1 + step)


class LookupDrafter(Drafter):
    """Prompt lookup: copies from the row's own text. No model, no cache."""

    def __init__(self, strategy: Strategy, target: Transformer, full: KVCache, text: Text) -> None:
        self.text, self.gamma = text, strategy.gamma
        self.vocab_size = target.config.vocab_size

    def logits(self, i: int, token: Tensor) -> Tensor:
        """All probability on the looked-up token."""
        if i == 0:
            self.found = lookup(self.text.tokens, self.text.seq_len, self.gamma)
        logits = torch.full((len(token), self.vocab_size), -torch.inf, device=token.device)
        return logits.scatter_(1, self.found[:, i : i + 1], 0.0)


def check_strategy(strategy: Strategy, draft: ModelConfig | None, max_len: int) -> None:
    """ValueError if the drafting and the draft model, or its context, do not go together."""
    policy = strategy.policy
    if draft is None:
        if policy == "full":
            raise ValueError(
                "draft policy full needs a draft model (--draft_checkpoint_path): the target "
                "itself, with all of its KV, would draft no faster than it decodes"
            )
    elif policy in ("none", "ngram"):
        raise ValueError(f"draft policy {policy} has no use for a draft model")
    elif policy == "streaming":
        most = draft.max_seq_len - strategy.gamma - 1
        if strategy.budget > most:
            raise ValueError(
                f"draft_budget {strategy.budget} does not fit into the draft model's context of "
                f"{draft.max_seq_len} tokens; with {strategy.gamma} drafts use {most} or less"
            )
    elif max_len > draft.max_seq_len:
        raise ValueError(
            f"draft policy {policy}: the draft model's context is {draft.max_seq_len} tokens, the "
            f"text may have {max_len}; --draft streaming needs sinks and newest tokens only"
        )


def make_drafter(
    strategy: Strategy,
    target: Transformer,
    full: KVCache,  # the target's
    text: Text,
    draft_model: Transformer | None,
) -> Drafter:
    """The drafter that `drafting` asks for; they must have passed `check_drafting`."""
    if strategy.policy == "ngram":
        return LookupDrafter(strategy, target, full, text)
    if draft_model is None:
        return SelfDrafter(strategy, target, full, text)
    kinds = {"full": ModelDrafter, "streaming": StreamingModelDrafter}
    kind = kinds.get(strategy.policy, SparseModelDrafter)
    return kind(strategy, draft_model, target, full, text)


def draft_cache_bytes(
    strategy: Strategy, spec: CacheSpec, draft_model: Transformer | None, capacity: int
) -> int:
    """What the drafter's caches will take; spec is the target's, capacity that of the text."""
    if not strategy.enabled or strategy.policy == "ngram":
        return 0
    draft_spec = draft_model and CacheSpec.for_model(draft_model, spec.batch_size)
    if strategy.policy == "full":
        return capacity * draft_spec.bytes_per_slot
    n_sparse = SparseKVCache.n_slots(*strategy.split(capacity), strategy.gamma)
    if draft_spec is None:
        return n_sparse * spec.bytes_per_slot
    n_full = strategy.budget if strategy.policy == "streaming" else capacity
    return (n_sparse + n_full) * draft_spec.bytes_per_slot
