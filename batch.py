"""The text of a batch: what is decided, who is finished, what was counted.

B rows share one buffer, ``tokens [B, S]``. How much of a row is text says `seq_len [B]` alone::

    tokens    p p p p p p f d d d x x . . .        p prompt, f the first token, d decided since
              |           |     |
              0           |     newest = seq_len - 1: decided, but its K and V are in no cache yet
                          prompt_len                x written by a round, and not accepted

A round writes a block of gamma + 1 tokens behind the newest and advances `seq_len` over those that
stay. Nothing is erased: the next round overwrites the rest. So to roll back is to set a number, and
so is `rewind`, which begins the decoding again behind the same prompts.

Rows are independent. Each has its own prompt, limit, sampling and end. A finished row keeps its
length and takes part in later rounds without effect: what they write to the caches for it lies
behind its newest token. So a row can be *refilled* between two rounds. It counts as finished while
its new prompt is read, in chunks, and `seq_len` says how far the reading is::

    tokens    p p p p p p p p p p . . . .          n tokens have been read into the caches
                      |
                      newest = n: rounds write here, and the next chunk writes over it

Everything is a static tensor, written in place: a captured round replays on the same addresses.
This class is the only one that writes them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sampling import RowSampling, Sampling, Stats, choose, judge, pick, pick_by_place

MAX_GAMMA = 32  # draft tokens per round
MAX_EOS = 16  # tokens that may end a text


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be continued, and how."""

    prompt: list[int]  # token ids, at least one
    max_new_tokens: int  # at least 1
    sampling: Sampling = Sampling()
    seed: int = 0  # of its random numbers, in 0 .. 2^63 - 1
    # Told all new tokens after a round: how many of them are the answer, None while it goes on.
    stop: Callable[[list[int]], int | None] | None = None

    @property
    def n_tokens(self) -> int:
        """Of prompt and continuation, at most."""
        return len(self.prompt) + self.max_new_tokens


class Batch:
    """The state of B rows, see the module docstring."""

    def __init__(
        self,
        n_rows: int,  # B
        max_len: int,  # tokens of the longest row, prompt and continuation together
        n_slots: int,  # S, with room for what a round writes behind them
        device: torch.device,
    ) -> None:
        integers = {"dtype": torch.int64, "device": device}
        self.max_len = max_len
        self.tokens = torch.zeros(n_rows, n_slots, **integers)  # [B, S]
        self.prompt_len = torch.ones(n_rows, **integers)  # [B]
        self.seq_len = self.prompt_len + 1  # [B], decided tokens, at least 2
        self.limit = torch.ones(n_rows, **integers)  # [B], most tokens that a row may reach
        self.finished = torch.zeros(n_rows, dtype=torch.bool, device=device)  # [B]
        self.eos = torch.full((MAX_EOS,), -1, **integers)  # tokens that end a row; -1: none
        self.sampling = RowSampling.greedy(n_rows, device)  # each [B]
        self.counts = torch.zeros(2, n_rows + 1, MAX_GAMMA + 1, **integers)
        self.accepted, self.drafted = self.counts  # histograms by row; last: of rows that were
        self.n_rounds = torch.zeros((), **integers)  # in which a row was not finished yet
        self.progress = self.seq_len, self.finished, self.counts, self.n_rounds
        self.n_texts = 0  # how often texts were begun in all rows; 0: there is none

    @property
    def n_rows(self) -> int:
        """B."""
        return len(self.tokens)

    def check(self, request: Request, vocab_size: int) -> None:
        """ValueError for a request that a row cannot hold."""
        prompt, n = request.prompt, request.max_new_tokens
        if not prompt or n < 1:
            raise ValueError(f"{len(prompt)} tokens of prompt and {n} new ones; each needs 1")
        if request.n_tokens > self.max_len:
            raise ValueError(
                f"{len(prompt)} tokens of prompt and {n} new ones are more than the "
                f"{self.max_len} that this engine was built for"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ValueError(f"token ids must be in 0..{vocab_size - 1}")

    def begin(self, eos_ids: tuple[int, ...], keep: bool = False) -> None:
        """Make room for new texts. What rows hold can be continued if it is to be kept.

        ValueError if too many tokens end a text.
        """
        if len(eos_ids) > MAX_EOS:
            raise ValueError(f"{len(eos_ids)} tokens end a text; at most {MAX_EOS} are possible")
        self.n_texts += 1
        self.finished.fill_(True)
        if not keep:
            self.seq_len.fill_(2)
        self.eos.fill_(-1)
        self.eos[: len(eos_ids)] = torch.tensor(eos_ids, dtype=torch.int64)
        self.forget_counts()

    def in_common(self, prompt: list[int]) -> list[int]:
        """By row, how many first tokens of the prompt, but not its last, its caches hold already.

        At most one too many where a row was not begun yet. Copies to the host.
        """
        n = len(prompt) - 1 if self.n_texts else 0
        same = self.tokens[:, :n] == torch.tensor(prompt[:n], device=self.tokens.device)
        return same.long().cumprod(dim=1).sum(dim=1).minimum(self.seq_len - 1).tolist()

    def start_row(self, b: int, request: Request, n_read: int) -> None:
        """Give row b a new text. It counts as finished until its first token is decided.

        n_read of the prompt's tokens are in the caches.
        """
        prompt = request.prompt
        self.tokens[b, : len(prompt)] = torch.tensor(prompt)
        self.prompt_len[b] = len(prompt)
        self.limit[b] = request.n_tokens
        self.sampling.set_row(b, request.sampling, request.seed)
        self.counts[:, -1] += self.counts[:, b]
        self.counts[:, b] = 0
        self.note_read(b, n_read)

    def resample(self, sampling: Sampling, seeds: list[int]) -> None:
        """Let all rows sample like this from here on, with a seed for each."""
        for b, seed in enumerate(seeds):
            self.sampling.set_row(b, sampling, seed)

    def note_read(self, b: int, n_read: int) -> None:
        """So many tokens of row b's prompt are in the caches; later ones may be written over."""
        self.finished[b] = True
        self.seq_len[b] = max(n_read, 1) + 1

    def decide_first(self, b: int, token: Tensor) -> None:  # [1]
        """Write row b's first token behind its prompt; the row runs, if that does not end it."""
        self.tokens[b, self.prompt_len[b]] = token[0]
        self.rewind_rows(slice(b, b + 1))

    def rewind_rows(self, rows: slice) -> None:
        """Back to the first token of these rows."""
        length = self.prompt_len[rows]
        first = self.tokens[rows].gather(1, length[:, None])
        self.seq_len[rows] = length + 1
        self.finished[rows] = (first == self.eos).any(dim=1) | (length + 1 >= self.limit[rows])

    def rewind(self) -> None:
        """Back to the first token of every row. ValueError if there is no text."""
        self.need_text()
        self.rewind_rows(slice(None))
        self.forget_counts()

    def stop_row(self, b: int) -> None:
        """End row b here."""
        self.finished[b] = True

    def forget_counts(self) -> None:
        """Count from here on."""
        self.counts.zero_()
        self.n_rounds.zero_()

    def need_text(self) -> None:
        """ValueError before the first prefill."""
        if not self.n_texts:
            raise ValueError("there is no text to continue: prefill the engine first")

    def newest(self, n: int = 1) -> tuple[Tensor, Tensor]:  # tokens [B, n], positions [B, n]
        """The last n decided tokens, 1 or 2."""
        pos = self.seq_len[:, None] - n + torch.arange(n, device=self.tokens.device)
        return self.tokens.gather(1, pos), pos

    def commit(
        self,
        draft_tokens: Tensor,  # [B, gamma]
        n_accepted: Tensor,  # [B] in 0..gamma
        next_token: Tensor,  # [B]
    ) -> None:
        """Append accepted drafts and the next token, cut at EOS and at the limit, in place.

        Counted are the tokens that were appended, and as drafted only those drafts for which there
        was room: what the end of a row cuts off was neither accepted nor rejected.
        """
        B, gamma = draft_tokens.shape
        i = torch.arange(gamma + 1, device=draft_tokens.device)
        n = n_accepted[:, None]
        block = torch.where(i == n, next_token[:, None], F.pad(draft_tokens, (0, 1)))
        ends = (block[..., None] == self.eos).any(dim=-1) & (i <= n)
        until_eos = torch.where(ends, i + 1, gamma + 1).amin(dim=1)
        room = self.limit - self.seq_len
        n_new = torch.minimum(torch.minimum(n_accepted + 1, until_eos), room)
        going = ~self.finished
        # Tokens past seq_len are not decided yet, so writing all of them is harmless. But behind
        # that of a finished row there may be a prompt that is being read.
        rows = torch.arange(B, device=draft_tokens.device)[:, None]
        place = self.seq_len[:, None] + i
        self.tokens[rows, place] = torch.where(going[:, None], block, self.tokens[rows, place])
        n_drafted = torch.where(until_eos <= n_accepted, until_eos, gamma + 1).minimum(room) - 1
        for count, value in ((self.accepted, n_new - 1), (self.drafted, n_drafted)):
            count[:B, : gamma + 1] += (i == value[:, None]) & going[:, None]
        self.n_rounds.add_(going.any())
        n_new = n_new.masked_fill(self.finished, 0)
        self.seq_len.add_(n_new)
        self.finished.logical_or_(
            (ends & (i < n_new[:, None])).any(dim=1) | (self.seq_len >= self.limit)
        )

    def snapshot(self) -> list[Tensor]:  # [B], [B], [2, B + 1, MAX_GAMMA + 1], []
        """Copies of all that a round changes, but not of the tokens that it writes."""
        return [t.clone() for t in self.progress]

    def restore(self, snapshot: list[Tensor]) -> None:
        """Back to a snapshot ([B], [B], [2, B + 1, MAX_GAMMA + 1], []), in place."""
        for t, value in zip(self.progress, snapshot, strict=True):
            t.copy_(value)

    @contextmanager
    def pretend(
        self, lengths: Tensor, max_new_tokens: int, sampling: Sampling
    ) -> Iterator[None]:  # [B] int64
        """Inside, row b has lengths[b] decided tokens, at least 2, and may get so many new ones.

        All rows sample like this. What they say means nothing. ValueError if there is a text, which
        would be written over.
        """
        if self.n_texts:
            raise ValueError("warm the engine up before its first prefill, not after it")
        before = self.snapshot()
        self.n_texts = 1
        self.prompt_len.copy_(lengths - 1)
        self.limit.copy_(lengths + max_new_tokens)
        self.resample(sampling, [0] * self.n_rows)
        try:
            self.rewind()
            yield
        finally:
            self.n_texts = 0
            self.prompt_len.fill_(1)
            self.limit.fill_(1)
            self.restore(before)

    def stats(self, b: int | None = None) -> Stats:
        """The counts since the last rewind, or of the text in row b. Copies to the host."""
        accepted, drafted = self.counts.sum(dim=1) if b is None else self.counts[:, b]
        row_rounds = int(drafted.sum())
        rounds = int(self.n_rounds) if b is None else row_rounds
        gamma = int(drafted.nonzero().max()) if row_rounds else 0
        counts = [h[: gamma + 1].tolist() for h in (accepted, drafted)]
        decoded = sum((n + 1) * count for n, count in enumerate(counts[0]))
        return Stats(rounds, decoded, *counts)

    def output(self, b: int) -> list[int]:
        """The new tokens of row b, EOS included. Copies to the host."""
        return self.tokens[b, self.prompt_len[b] : self.seq_len[b]].tolist()

    def outputs(self) -> list[list[int]]:
        """The same of every row."""
        return [self.output(b) for b in range(self.n_rows)]


class Around(NamedTuple):
    """What a round does beside the models' forwards."""

    pick: Callable = pick
    judge: Callable = judge
    commit: Callable = Batch.commit

    def compiled(self, on_gpu: bool) -> "Around":
        """The same: on a GPU each as one function, a kernel or two; on a CPU sampling alone."""
        one = partial(torch.compile, fullgraph=True, dynamic=False)
        if on_gpu:
            return Around(*map(one, self))
        by_place = partial(pick_by_place, one(choose))
        return self._replace(pick=by_place, judge=partial(judge, pick=by_place))
