"""Small models that draft: with all of the text, with a few of its tokens, or never reading it.

    ModelDrafter             a small model with all of the text in a cache of its own
    SparseModelDrafter       the same, drafting from a few of its own tokens
    StreamingModelDrafter    a small model that never reads the text, only sinks and newest tokens

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

import torch
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig
from drafter import Drafter, Target, within_vocabulary
from kv_cache import KVCache
from model import Caches, Transformer
from policies import Strategy
from selection import Selection


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

    def logits(self, i: int | Tensor, token: Tensor) -> Tensor:
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
        self.selection = Selection(strategy, draft_model, self.full, self.sparse)

    @staticmethod
    def build(strategy, spec, capacity, finished=None) -> Caches:
        full = KVCache.empty(spec, capacity, finished)
        return full, strategy.sparse_cache(spec, full.capacity)

    def renew(self, b: int | None = None) -> None:
        tokens = within_vocabulary(self.own_model, self.batch.tokens)
        self.selection.renew(tokens, self.batch.seq_len - 2 - self.offset, b)

    def select(self, b: int | None = None) -> None:
        self.selection.select(self.batch.seq_len - 2 - self.offset, b)


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

    def renew(self, b: int | None = None) -> None:
        """Nothing to do: every selection does."""

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
        super().renew(b)
        super().select(b)
