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
A row with a new prompt is told twice: `forget` when its reading begins, `start` when it runs.

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


class Target(NamedTuple):
    """What is drafted for."""

    model: Transformer
    full: KVCache  # K and V of all decided tokens but the newest
    batch: Batch


Pick = Callable[[Tensor, int], Tensor]  # logits [B, V] of the i-th draft -> its tokens [B]


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
        self.waiting: set[int] = set()  # rows that do not run yet
        self.selected_at: int | None = None  # round before which it selected last, in all rows

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

    def propose(self, gamma: int, pick: Pick) -> Tensor:  # [B, gamma]
        """The next gamma tokens of every row. Decides nothing: it may be called again."""
        tokens = [self.batch.newest()[0]]
        for i in range(gamma):
            tokens.append(pick(self.logits(i, tokens[-1]), i)[:, None])
        return torch.cat(tokens[1:], dim=1)

    def label(self, model_name: str) -> str:
        """For people: who drafts, and from what. `model_name` is that of its own model."""
        who = model_name if self.own_model else "self-speculation"
        again = f", selected again every {self.select_every} rounds" if self.select_every else ""
        return f"{who}, {self.reads.format(**asdict(self.strategy))}{again}"

    def catch_up(self, n_read: Tensor, b: int | None = None) -> None:  # [B]
        """Read the decided text behind the first n_read tokens of every row, or of row b."""

    def select(self, b: int | None = None) -> None:
        """Load, from all of the decided text, what drafting reads, in every row or in row b."""

    def read_missed(self) -> None:
        """Read the prompts, or the text of rounds that went on without it."""
        if self.away:
            self.catch_up(self.n_read)
            self.away, self.selected_at = False, None

    def refresh(self, now: int, begun: list[tuple[int, int]]) -> None:
        """Bring it up to date before round `now`: what it missed, and a selection if one is due.

        One is due once there is text, again every `select_every` rounds, and once more when rows
        that were shorter than the selection have as many tokens as it can hold. `begun` has of
        each row the round before which it began, and the tokens of its prompt.
        """
        self.read_missed()
        last, every, short = self.selected_at, self.select_every, self.n_selected
        if (
            last is None
            or (every and now - last >= every)
            or any(n < short and last <= begin + short - n < now for begin, n in begun)
        ):  # a round adds at least one token
            self.select()
            self.selected_at = now

    def leave(self) -> None:
        """A round begins without it."""
        if not self.away:
            self.n_read, self.away = self.read_of_rows(), True

    def read_of_rows(self) -> Tensor:  # [B]
        """How many tokens it has read, at least."""
        if self.away:
            return self.n_read
        waiting = torch.zeros_like(self.batch.finished)
        waiting[[*self.waiting]] = True
        return torch.where(waiting, self.n_read, self.batch.seq_len - 2)

    def forget(self, rows: slice, n_kept: int) -> None:
        """Another text is going to begin in these rows; the first n_kept tokens are the same.

        Until it does, rounds may write over the last of them.
        """
        self.n_read[rows] = self.read_of_rows()[rows].clamp(0, max(n_kept - 1, 0))
        self.waiting.update(range(self.batch.n_rows)[rows])

    def start(self, b: int) -> None:
        """Row b begins to run with its new text."""
        self.waiting.discard(b)
        if not self.away:
            self.catch_up(self.n_read, b)
            self.select(b)

    def rewind(self) -> None:
        """The text ends behind the prompts again."""
        self.n_read, self.selected_at = self.n_read.minimum(self.batch.prompt_len), None

    def load(
        self,
        sparse: SparseKVCache,
        full: KVCache,
        n_cached: Tensor,  # [B]
        b: int | None,
    ) -> None:
        """Let the policy choose, layer by layer, what `sparse` keeps of row b's n_cached tokens.

        None: of all rows.
        """
        tokens, policy, n_sink = self.batch.tokens, self.strategy.entry, self.strategy.n_sink
        if b is not None:
            sparse, full = sparse.row(b), full.row(b)
            tokens, n_cached = tokens[b : b + 1], n_cached[b : b + 1]
        queries: Iterator[Tensor | None] = repeat(None)
        windows, model = full.spec.windows, self.own_model or self.target.model
        if policy.observes and None in windows:
            pos = observed(n_cached, self.strategy.n_observed)
            queries = model.queries(within_vocabulary(model, tokens.gather(1, pos)), pos, full)
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

    def select(self, b: int | None = None) -> None:
        self.load(self.sparse, self.target.full, self.batch.seq_len - 1, b)

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

    def catch_up(self, n_read: Tensor, b: int | None = None) -> None:
        """All but the newest token. Copies lengths to the host."""
        n_read = n_read.masked_fill(~self.full.holds(n_read), 0)
        chunk = min(self.full.spec.prefill_chunk, self.full.capacity)
        lengths = [*zip(n_read.tolist(), self.batch.seq_len.tolist(), strict=True)]
        for row in range(len(lengths)) if b is None else (b,):
            n_cached, length = lengths[row]
            tokens = within_vocabulary(self.own_model, self.batch.tokens[row : row + 1])
            if n_cached < length - 1:
                self.own_model.prefill(tokens, length - 1, chunk, self.full.row(row), n_cached)

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

    def select(self, b: int | None = None) -> None:
        self.load(self.sparse, self.full, self.batch.seq_len - 2, b)


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

    def catch_up(self, n_read: Tensor, b: int | None = None) -> None:
        """Nothing to do: it never reads the whole text."""

    def select(self, b: int | None = None) -> None:
        """Re-anchor: read sinks and newest tokens again, from position 0."""
        K, n_sink, n_cached = self.strategy.budget, self.strategy.n_sink, self.batch.seq_len - 2
        rows, full = slice(None), self.full
        if b is not None:
            rows, full = slice(b, b + 1), self.full.row(b)
        self.offset[rows] = (n_cached - K).clamp_min(0)[rows]
        own_pos = torch.arange(K, device=n_cached.device)
        pos = own_pos + self.offset[rows, None] * (own_pos >= n_sink)
        tokens = self.batch.tokens[rows].gather(1, pos.clamp_max(self.batch.tokens.shape[1] - 1))
        tokens = within_vocabulary(self.own_model, tokens)
        self.own_model.hidden(tokens, own_pos.expand_as(tokens), full)
        self.load(self.sparse, self.full, n_cached - self.offset, b)


class LookupDrafter(Drafter):
    """Prompt lookup: copies from the row's own text. No model, no cache, no doubt."""

    judges_itself = True

    def propose(self, gamma: int, pick: Pick) -> Tensor:
        return lookup(self.batch.tokens, self.batch.seq_len, gamma)

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
