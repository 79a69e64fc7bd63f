"""Who drafts: five ways to guess the next tokens, behind one small interface.

A drafter proposes tokens and the target verifies them. Nothing that a drafter does can change the
output. It can be cheap (a small T_D) and it can be right (a high acceptance); `cost_model.py` has
the speedup that follows from both.

    SelfDrafter              the target's weights with a sparse cache of the target's own K and V
    ModelDrafter             a small model with all of the text in a cache of its own
    SparseModelDrafter       the same, drafting from a few of its own tokens
    StreamingModelDrafter    a small model that never reads the text, only sinks and newest tokens
    LookupDrafter            no model: what followed these tokens the last time (prompt lookup)

A `Strategy` says how to draft, `DRAFTERS` which class does it. The engine (`spec_decode.py`) calls
`refresh` before a round and `propose` in it. A new drafter is one class and one line in `DRAFTERS`.

**Keeping up.** A round without this drafter is text that it has not read. `leave` notes how much it
has read of each row, `refresh` reads the rest, and lets the policy select again when that is due.

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

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from batch import Batch
from config import ModelConfig
from kv_cache import CacheSpec, KVCache, SparseKVCache
from lookup import NGRAM, Histograms, look_back, lookup
from model import Caches, Transformer
from policies import POLICIES, Layer, Strategy, observed
from sampling import Draft


class Target(NamedTuple):
    """What is drafted for."""

    model: Transformer
    full: KVCache  # K and V of all decided tokens but the newest
    batch: Batch


# Logits [B, V] of the i-th draft -> its tokens [B], and what they were drawn from, [B, V] or None.
Pick = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]


class Drafter:
    """One strategy at work. The engine asks it to `refresh`, then to `propose`."""

    reads = "{policy} draft cache of {budget} tokens ({n_sink} sinks)"  # for people, see `label`
    judges_itself = False  # by `look_back`: what it would have got right, without any rounds
    look_back: Callable[[int], Histograms]
    n_selected = 0  # tokens of a row that `select` keeps by choice
    caches: tuple[Any, ...]  # what `build` made
    writes: Caches = ()  # what a verification writes besides the target's own cache

    def __init__(
        self, strategy: Strategy, target: Target, draft_model: Transformer | None = None
    ) -> None:
        """`draft_model` if it has one of its own. They must have passed `check_strategy`."""
        self.strategy, self.target, self.batch = strategy, target, target.batch
        self.own_model = draft_model
        self.select_every = strategy.select_every  # rounds after which `select` is due; 0: never
        self.caches = self.own_caches(strategy, target.full, draft_model)
        self.n_bytes = sum(cache.n_bytes for cache in self.caches)
        self.n_read = torch.zeros_like(self.batch.seq_len)  # [B], tokens that it has read,
        self.away = True  # while rounds go on without it
        self.selected_at: int | None = None  # round before which it selected last

    @classmethod
    def own_caches(
        cls, strategy: Strategy, full: KVCache, draft_model: Transformer | None, allocated=True
    ) -> Caches:
        """What `build` makes beside the target's full cache; see CacheSpec for `allocated`."""
        spec = CacheSpec.for_model(draft_model, full.spec.batch_size) if draft_model else full.spec
        return cls.build(strategy, replace(spec, allocated=allocated), full.capacity, full.finished)

    @staticmethod
    def check(strategy: Strategy, draft: Any, max_len: int) -> None:
        """ValueError if the strategy does not go with the longest text, or with its own model.

        `draft` is the ModelConfig of that model, None if it has none.
        """

    @staticmethod
    def build(
        strategy: Strategy,
        spec: CacheSpec,  # of the model that drafts
        capacity: int,  # tokens per row of the target's cache
        finished: Tensor | None = None,  # [B] bool
    ) -> Caches:
        """Its own caches."""
        return ()

    def logits(self, i: int, token: Tensor) -> Tensor:  # [B, 1] -> [B, V]
        """After the i-th token of this round: the newest decided one, or a draft."""
        raise NotImplementedError

    def propose(self, gamma: int, pick: Pick) -> Draft:
        """The next gamma tokens of every row. Decides nothing: it may be called again."""
        token, _ = self.batch.newest()
        B, V, device = len(token), self.target.model.config.vocab_size, token.device
        tokens, probs = torch.empty(B, gamma, dtype=torch.int64, device=device), None
        for i in range(gamma):
            picked, p = pick(self.logits(i, token), i)
            tokens[:, i], token = picked, picked[:, None]
            if p is not None:
                probs = torch.empty(B, gamma, V, device=device) if probs is None else probs
                probs[:, i] = p
        return Draft(tokens, probs)

    def label(self, model_name: str) -> str:
        """For people: who drafts, and from what. `model_name` is that of its own model."""
        who = model_name if self.own_model else "self-speculation"
        again = f", selected again every {self.select_every} rounds" if self.select_every else ""
        return f"{who}, {self.reads.format(**asdict(self.strategy))}{again}"

    def catch_up(self, n_read: Tensor) -> None:  # [B]
        """Read the decided text behind the first n_read tokens of every row."""

    def select(self) -> None:
        """Load, from all of the decided text, what drafting reads."""

    def read_missed(self) -> None:
        """Read the prompts, or the text of rounds that went on without it."""
        if self.away:
            self.catch_up(self.n_read)
            self.away, self.selected_at = False, None

    def refresh(self, now: int) -> None:
        """Bring it up to date before round `now`: what it missed, and a selection if one is due.

        One is due once there is text, again every `select_every` rounds, and once more when rows
        that were shorter than the selection have as many tokens as it can hold.
        """
        self.read_missed()
        last, every = self.selected_at, self.select_every
        grown = self.n_selected - self.batch.shortest  # a round adds at least one token
        if last is None or (every and now - last >= every) or last <= grown < now:
            self.select()
            self.selected_at = now

    def leave(self) -> None:
        """A round begins without it."""
        if not self.away:
            self.n_read, self.away = self.batch.seq_len - 2, True

    def forget(self, n_kept: Tensor) -> None:  # [B]
        """Another text begins; of what it may have read, the first n_kept tokens stay."""
        self.leave()
        self.n_read = self.n_read.minimum(n_kept).clamp_min(0)

    def rewind(self) -> None:
        """The text ends behind the prompts again."""
        self.n_read, self.selected_at = self.n_read.minimum(self.batch.prompt_len), None

    def load(self, sparse: SparseKVCache, model: Transformer, full: KVCache, n_cached: Tensor):
        """Let the policy choose, layer by layer, what `sparse` keeps of n_cached [B] tokens."""
        policy, n_sink = self.strategy.entry, self.strategy.n_sink
        queries: Iterator[Tensor | None] = repeat(None)
        windows = full.spec.windows
        if policy.observes and None in windows:
            pos = observed(n_cached, self.strategy.n_observed)
            tokens = within_vocabulary(model, self.batch.tokens.gather(1, pos))
            queries = model.queries(tokens, pos, full)
        for i, (window, q) in enumerate(zip(windows, queries, strict=False)):
            layer = Layer(full.k[i], full.v[i], n_cached, n_sink, q)
            selected = policy.select(layer, sparse.n_selected) if window is None else None
            sparse.fill(i, full, selected, n_cached)


def within_vocabulary(model: Transformer, tokens: Tensor) -> Tensor:  # [B, T] int64, both
    """Tokens that the model has: the target may have more padding rows, which no text uses."""
    return tokens.clamp_max(model.config.vocab_size - 1)


class SelfDrafter(Drafter):
    """Self-speculation: the target itself, reading a few of its own K and V."""

    def __init__(self, strategy: Strategy, target: Target, draft_model: None = None) -> None:
        super().__init__(strategy, target)
        (self.sparse,) = self.writes = self.caches
        self.n_selected = self.sparse.n_selected

    @staticmethod
    def build(strategy, spec, capacity, finished=None) -> Caches:
        return (strategy.sparse_cache(spec, capacity),)

    def select(self) -> None:
        model, full, batch = self.target
        self.load(self.sparse, model, full, batch.seq_len - 1)

    def logits(self, i: int, token: Tensor) -> Tensor:
        return self.target.model(token, self.batch.seq_len[:, None] - 1 + i, self.sparse)[:, -1]


class ModelDrafter(Drafter):
    """A draft model that has all of the text in a full cache of its own."""

    reads = "full draft cache"
    own_model: Transformer

    def __init__(self, strategy: Strategy, target: Target, draft_model: Transformer) -> None:
        super().__init__(strategy, target, draft_model)
        self.offset = torch.zeros_like(target.batch.seq_len)  # [B], place in text - own position
        self.full = self.read = self.caches[0]
        self.write: Caches = (self.full,)

    @staticmethod
    def check(strategy: Strategy, draft: ModelConfig, max_len: int) -> None:
        if max_len > draft.max_seq_len:
            raise ValueError(
                f"draft policy {strategy.policy}: the draft model's context is {draft.max_seq_len} "
                f"tokens, the text may have {max_len}; --draft streaming needs sinks and newest "
                f"tokens only"
            )

    @staticmethod
    def build(strategy, spec, capacity, finished=None) -> Caches:
        return (KVCache.empty(spec, capacity, finished),)

    def catch_up(self, n_read: Tensor) -> None:
        """All but the newest token. Copies lengths to the host."""
        n_read = n_read.masked_fill(~self.full.holds(n_read), 0)
        chunk = min(self.full.spec.prefill_chunk, self.full.capacity)
        lengths = zip(n_read.tolist(), self.batch.seq_len.tolist(), strict=True)
        for b, (n_cached, length) in enumerate(lengths):
            tokens = within_vocabulary(self.own_model, self.batch.tokens[b : b + 1])
            if n_cached < length - 1:
                self.own_model.prefill(tokens, length - 1, chunk, self.full.row(b), n_cached)

    def rewind(self) -> None:
        super().rewind()
        if not self.away:
            self.catch_up(self.batch.prompt_len)  # what its cache has overwritten

    def logits(self, i: int, token: Tensor) -> Tensor:
        """Of the target's vocabulary: padding rows are added, with no probability, or cut off."""
        pos = self.batch.seq_len[:, None] - 1 + i
        if i == 0:
            token, pos = self.batch.newest(2)
        token, pos = within_vocabulary(self.own_model, token), pos - self.offset[:, None]
        logits = self.own_model(token, pos, self.read, self.write)[:, -1]
        padding = self.target.model.config.vocab_size - logits.shape[-1]
        return F.pad(logits, (0, padding), value=-torch.inf)  # a negative padding slices


class SparseModelDrafter(ModelDrafter):
    """A draft model with a full cache of its own, of which a policy selects what it reads."""

    reads = Drafter.reads

    def __init__(self, strategy: Strategy, target: Target, draft_model: Transformer) -> None:
        super().__init__(strategy, target, draft_model)
        self.sparse = self.read = self.caches[1]
        self.write = (self.sparse, self.full)
        self.n_selected = self.sparse.n_selected

    @staticmethod
    def build(strategy, spec, capacity, finished=None) -> Caches:
        full = KVCache.empty(spec, capacity, finished)
        return full, strategy.sparse_cache(spec, full.capacity)

    def select(self) -> None:
        self.load(self.sparse, self.own_model, self.full, self.batch.seq_len - 2)


class StreamingModelDrafter(SparseModelDrafter):
    """A draft model that sees sinks and newest tokens only, at positions of its own."""

    def __init__(self, strategy: Strategy, target: Target, draft_model: Transformer) -> None:
        super().__init__(strategy, target, draft_model)
        self.write = (self.sparse,)
        room = draft_model.config.max_seq_len - strategy.budget - strategy.gamma
        self.select_every = (room - 1) // (strategy.gamma + 1) + 1  # before the context ends

    @staticmethod
    def check(strategy: Strategy, draft: ModelConfig, max_len: int) -> None:
        max_budget = draft.max_seq_len - strategy.gamma - 1
        if strategy.budget > max_budget:
            raise ValueError(
                f"draft_budget {strategy.budget} does not fit into the draft model's context of "
                f"{draft.max_seq_len} tokens; with {strategy.gamma} drafts use {max_budget} or less"
            )

    @staticmethod
    def build(strategy, spec, capacity, finished=None) -> Caches:
        """The full cache holds no more than is read to re-anchor; finished rows are read too."""
        K = strategy.budget
        return KVCache.empty(spec, K, longest=K), strategy.sparse_cache(spec, K)

    def catch_up(self, n_read: Tensor) -> None:
        """Nothing to do: it never reads the whole text."""

    def select(self) -> None:
        """Re-anchor: read sinks and newest tokens again, from position 0."""
        K, n_sink, n_cached = self.strategy.budget, self.strategy.n_sink, self.batch.seq_len - 2
        self.offset.copy_((n_cached - K).clamp_min(0))
        pos = torch.arange(K, device=n_cached.device)
        pos = pos + self.offset[:, None] * (pos >= n_sink)
        tokens = self.batch.tokens.gather(1, pos.clamp_max(self.batch.tokens.shape[1] - 1))
        own_pos = torch.arange(K, device=n_cached.device).expand_as(tokens)
        self.own_model.hidden(within_vocabulary(self.own_model, tokens), own_pos, self.full)
        self.load(self.sparse, self.own_model, self.full, n_cached - self.offset)


class LookupDrafter(Drafter):
    """Prompt lookup: copies from the row's own text. No model, no cache, no doubt."""

    judges_itself = True

    def propose(self, gamma: int, pick: Pick) -> Draft:
        return Draft(lookup(self.batch.tokens, self.batch.seq_len, gamma), None)

    def label(self, model_name: str) -> str:
        return f"prompt lookup, matches of at most {NGRAM} tokens"

    def look_back(self, gamma: int) -> Histograms:
        """What `lookup.look_back` says of this batch. Copies to the host."""
        return look_back(self.batch.tokens, self.batch.seq_len, self.batch.finished, gamma)


ANY_POLICY = "a name in POLICIES"
DRAFTERS: dict[tuple[str, bool], type[Drafter]] = {  # by policy, and whether by a draft model
    ("full", True): ModelDrafter,
    ("streaming", True): StreamingModelDrafter,
    (ANY_POLICY, True): SparseModelDrafter,
    (ANY_POLICY, False): SelfDrafter,
    ("ngram", False): LookupDrafter,
}


def drafter_class(strategy: Strategy, own_model: bool) -> type[Drafter]:
    """Who does it. ValueError if nobody does, with a draft model or without one."""
    name = strategy.policy
    kind = DRAFTERS.get((name, own_model))
    if kind is None and name in POLICIES:
        kind = DRAFTERS[ANY_POLICY, own_model]
    if kind is not None:
        return kind
    if (name, True) in DRAFTERS:
        raise ValueError(
            f"draft policy {name} needs a draft model (--draft_checkpoint_path): the target "
            "itself, with all of its KV, would draft no faster than it decodes"
        )
    if (name, False) in DRAFTERS or name == "none":
        raise ValueError(f"draft policy {name} has no use for a draft model")
    others = dict.fromkeys(name for name, _ in DRAFTERS if name not in (ANY_POLICY, *POLICIES))
    raise ValueError(
        f"draft policy {name!r} is unknown; known: {', '.join(['none', *POLICIES, *others])}, and "
        f"for --draft also auto"
    )


def check_strategy(strategy: Strategy, draft: ModelConfig | None, max_len: int) -> None:
    """ValueError if the strategy does not go with the draft model, or with texts of max_len."""
    if strategy.enabled or draft is not None:
        drafter_class(strategy, draft is not None).check(strategy, draft, max_len)


def draft_cache_bytes(
    strategy: Strategy,
    full: KVCache,  # the target's, allocated or not
    draft_model: Transformer | None,
) -> int:
    """What the drafter's own caches will take."""
    if not strategy.enabled:
        return 0
    kind = drafter_class(strategy, draft_model is not None)
    caches = kind.own_caches(strategy, full, draft_model, allocated=False)
    return sum(cache.n_bytes for cache in caches)
