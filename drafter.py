"""What a drafter is: it proposes tokens, and keeps up with the text.

A drafter proposes tokens and the target verifies them. Nothing that a drafter does can change the
output. It can be cheap (a small T_D) and it can be right (a high acceptance); `cost_model.py` has
the speedup that follows from both. The drafters there are: `drafters.py`, `draft_models.py`.

A `Strategy` says how to draft. The engine (`spec_decode.py`) calls `refresh` before a round and
`propose` in it.

**Keeping up.** A round without this drafter is text that it has not read. `leave` notes how much it
has read of each row, `refresh` reads the rest, and lets the policy select again when that is due.
A row with a new prompt is told twice: `forget` when its reading begins, `start` when it runs.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batch import Batch
from kv_cache import CacheSpec, KVCache
from model import Caches, Transformer
from policies import Strategy
from quantize import Twins


class Target(NamedTuple):
    """What is drafted for."""

    model: Transformer
    full: KVCache  # K and V of all decided tokens but the newest
    batch: Batch
    twins: Twins  # of the model


Pick = Callable[[Tensor, int | Tensor], Tensor]  # logits [B, V] of the i-th draft -> tokens [B]


class Drafter:
    """One strategy at work. The engine asks it to `refresh`, then to `propose`."""

    reads = "{policy} draft cache of {budget} tokens ({n_sink} sinks)"  # for people, see `label`
    trust: list[list[float]] | None = None  # [n kinds of rows, gamma], by place; None: not known
    has_twin = False  # whether it drafts with `Strategy.weights`
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

    def logits(self, i: int | Tensor, token: Tensor) -> Tensor:  # [], [B, 1] -> [B, V]
        """After the i-th token of this round: the newest decided one, or a draft."""
        raise NotImplementedError

    def propose(self, gamma: int, pick: Pick) -> Tensor:  # [B, gamma]
        """The next gamma tokens of every row. Decides nothing: it may be called again."""
        tokens = [self.batch.newest()[0]]
        for i in range(gamma):
            tokens.append(pick(self.logits(i, tokens[-1]), i)[:, None])
        return torch.cat(tokens[1:], dim=1)

    def kinds(self) -> list[int] | None:  # B
        """Of what kind each row is now, of those that `trust` tells of."""

    def copies(self) -> Tensor:  # [B] bool
        """Rows whose latest proposal is copied from their own text."""
        return torch.zeros_like(self.batch.finished)

    def label(self, model_name: str) -> str:
        """For people: who drafts, and from what. `model_name` is that of its own model."""
        who = model_name if self.own_model else "self-speculation"
        again = f", selected again every {self.select_every} rounds" if self.select_every else ""
        return f"{who}, {self.reads.format(**asdict(self.strategy))}{again}"

    def catch_up(self, n_read: Tensor, b: int | None = None) -> None:  # [B]
        """Read the decided text behind the first n_read tokens of every row, or of row b."""

    def renew(self, b: int | None = None) -> None:
        """Make anew what rounds keep up to date for selecting, in every row or in row b."""

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
        if last is None:
            self.renew()
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
            self.renew(b)
            self.select(b)

    def rewind(self) -> None:
        """The text ends behind the prompts again."""
        self.n_read, self.selected_at = self.n_read.minimum(self.batch.prompt_len), None


def within_vocabulary(model: Transformer, tokens: Tensor) -> Tensor:  # [B, T] int64, both
    """Tokens that the model has: the target may have more padding rows, which no text uses."""
    return tokens.clamp_max(model.config.vocab_size - 1)
