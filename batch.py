"""The text of a batch: what is decided, who is finished, what was counted.

B rows share one buffer, ``tokens [B, S]``. How much of a row is text says `seq_len [B]` alone::

    tokens    p p p p p p f d d d x x . . .        p prompt, f the first token, d decided since
              |           |     |
              0           |     newest = seq_len - 1: decided, but its K and V are in no cache yet
                          prompt_len                x written by a round, and not accepted

A round writes a block of gamma + 1 tokens behind the newest and advances `seq_len` over those that
stay. Nothing is erased: the next round overwrites the rest. So to roll back is to set a number, and
so is `rewind`, which begins the decoding again behind the same prompts.

Rows are independent. Each has its own prompt, limit and end. A finished row keeps its length and
takes part in later rounds without effect: what they write for it lies behind its newest token.

Everything is a static tensor, written in place: a captured round replays on the same addresses.
This class is the only one that writes them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from sampling import Stats

MAX_GAMMA = 32  # draft tokens per round
MAX_EOS = 16  # tokens that may end a text


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
        self.accepted = torch.zeros(MAX_GAMMA + 1, **integers)  # histograms, see Stats
        self.drafted = torch.zeros(MAX_GAMMA + 1, **integers)
        self.n_rounds = torch.zeros((), **integers)  # in which a row was not finished yet
        self.progress = self.seq_len, self.finished, self.accepted, self.drafted, self.n_rounds
        self.n_texts = 0  # batches of prompts that were begun; 0: there is no text
        self.shortest = 1  # tokens of the shortest prompt

    @property
    def n_rows(self) -> int:
        """B."""
        return len(self.tokens)

    def check(
        self,
        prompts: list[list[int]],
        max_new_tokens: list[int],
        eos_ids: tuple[int, ...],
        vocab_size: int,
    ) -> None:
        """ValueError, naming the row, for anything that these rows cannot hold."""
        if len(prompts) != self.n_rows or len(max_new_tokens) != self.n_rows:
            raise ValueError(
                f"{len(prompts)} prompts and {len(max_new_tokens)} limits for an engine of "
                f"{self.n_rows} rows"
            )
        for b, (prompt, n) in enumerate(zip(prompts, max_new_tokens, strict=True)):
            if not prompt or n < 1:
                raise ValueError(
                    f"row {b}: {len(prompt)} tokens of prompt and {n} new ones; each needs 1"
                )
            if len(prompt) + n > self.max_len:
                raise ValueError(
                    f"row {b}: {len(prompt)} tokens of prompt and {n} new ones are more than the "
                    f"{self.max_len} that this engine was built for"
                )
            if not 0 <= min(prompt) <= max(prompt) < vocab_size:
                raise ValueError(f"row {b}: token ids must be in 0..{vocab_size - 1}")
        if len(eos_ids) > MAX_EOS:
            raise ValueError(f"{len(eos_ids)} tokens end a text; at most {MAX_EOS} are possible")

    def begin(self, shortest: int, eos_ids: tuple[int, ...]) -> None:
        """Make room for new prompts, of at least `shortest` tokens."""
        self.n_texts, self.shortest = self.n_texts + 1, shortest
        self.eos.fill_(-1)
        self.eos[: len(eos_ids)] = torch.tensor(eos_ids, dtype=torch.int64)

    def start_row(self, b: int, prompt: list[int], max_new_tokens: int) -> None:
        """Write the prompt of row b."""
        self.tokens[b, : len(prompt)] = torch.tensor(prompt)
        self.prompt_len[b] = len(prompt)
        self.limit[b] = len(prompt) + max_new_tokens

    def decide_first(self, token: Tensor) -> None:  # [B]
        """Write each row's first token behind its prompt; `rewind` then begins the decoding."""
        self.tokens.scatter_(1, self.prompt_len[:, None], token[:, None])

    def rewind(self) -> None:
        """Back to the first token of every row. ValueError if there is no text."""
        self.need_text()
        first = self.tokens.gather(1, self.prompt_len[:, None])
        self.seq_len.copy_(self.prompt_len + 1)
        self.finished.copy_((first == self.eos).any(dim=1) | (self.seq_len >= self.limit))
        for count in (self.accepted, self.drafted, self.n_rounds):
            count.zero_()

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
        # Tokens past seq_len are not decided yet, so writing all of them is harmless.
        rows = torch.arange(B, device=draft_tokens.device)[:, None]
        self.tokens[rows, self.seq_len[:, None] + i] = block
        n_drafted = torch.where(until_eos <= n_accepted, until_eos, gamma + 1).minimum(room) - 1
        going = ~self.finished
        for count, value in ((self.accepted, n_new - 1), (self.drafted, n_drafted)):
            count[: gamma + 1] += ((i == value[:, None]) & going[:, None]).sum(dim=0)
        self.n_rounds.add_(going.any())
        n_new = n_new.masked_fill(self.finished, 0)
        self.seq_len.add_(n_new)
        self.finished.logical_or_(
            (ends & (i < n_new[:, None])).any(dim=1) | (self.seq_len >= self.limit)
        )

    def snapshot(self) -> list[Tensor]:  # [B], [B], [MAX_GAMMA + 1] twice, []
        """Copies of all that a round changes, but not of the tokens that it writes."""
        return [t.clone() for t in self.progress]

    def restore(self, snapshot: list[Tensor]) -> None:
        """Back to a snapshot ([B], [B], [MAX_GAMMA + 1] twice, []), in place."""
        for t, value in zip(self.progress, snapshot, strict=True):
            t.copy_(value)

    @contextmanager
    def pretend(self, lengths: Tensor, max_new_tokens: int) -> Iterator[None]:  # [B] int64
        """Inside, row b has lengths[b] decided tokens, at least 2, and may get so many new ones.

        What they are means nothing. ValueError if there is a text, which would be written over.
        """
        if self.n_texts:
            raise ValueError("warm the engine up before its first prefill, not after it")
        before = self.snapshot()
        self.n_texts = 1
        self.prompt_len.copy_(lengths - 1)
        self.limit.copy_(lengths + max_new_tokens)
        try:
            self.rewind()
            yield
        finally:
            self.n_texts = 0
            self.prompt_len.fill_(1)
            self.limit.fill_(1)
            self.restore(before)

    def n_reused(self, b: int, prompt: list[int]) -> int:
        """How many of the prompt's tokens row b holds already, but not the prompt's last one."""
        n = min(len(prompt), int(self.seq_len[b])) - 1 if self.n_texts else 0
        same = self.tokens[b, :n].cpu() == torch.tensor(prompt[:n])
        return int(same.long().cumprod(dim=0).sum())

    def stats(self) -> Stats:
        """The counts since the last rewind. Copies to the host."""
        decoded = int((self.seq_len - self.prompt_len - 1).sum())
        rounds = int(self.n_rounds)
        gamma = int(self.drafted.nonzero().max()) if rounds else 0
        counts = (h[: gamma + 1].tolist() for h in (self.accepted, self.drafted))
        return Stats(rounds, decoded, *counts)

    def outputs(self) -> list[list[int]]:
        """The new tokens of every row, EOS included. Copies to the host."""
        rows = zip(
            self.tokens.tolist(), self.prompt_len.tolist(), self.seq_len.tolist(), strict=True
        )
        return [tokens[start:end] for tokens, start, end in rows]
