"""Speculative decoding of a batch: draft, verify, accept, commit.

The full KV cache holds K and V of all decided tokens but the newest (`batch.py`). One round::

    draft    gamma tokens from a drafter, see `drafters.py`                   gamma * T_D
    verify   one pass over [newest, draft_1 .. draft_gamma], full cache       T_V(gamma)
    accept   how many drafts stay, and the token that follows them            see `sampling.py`
    commit   write them, cut at EOS and at the row's limit, advance seq_len

It yields 1 to gamma + 1 tokens per row, and rows accept different numbers. Nothing here branches
on that: what was rejected is forgotten by not advancing `seq_len` over it. At acceptance alpha the
expected number of tokens is Omega = (1 - alpha^(gamma+1)) / (1 - alpha), so speculation wins when
T_T * Omega > gamma * T_D + T_V(gamma). With a long context T_V is close to T_T, because both read
the same KV cache once, and T_D is small, because the draft reads `budget` tokens of it.

``gamma = 0`` is plain decoding: the round drafts nothing, verifies one token against the full cache
alone and commits the target's next token. The baseline is the same code with zero drafts.

Nothing is decided before `commit`: `draft` and `verify` can be repeated at will, which is how
they are warmed up and timed. Timing itself is the caller's business; the batch counts.

On a GPU a round is one CUDA graph (`graphs.py`), and so is a plain one.
"""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from batch import MAX_GAMMA, Batch
from config import work_bytes
from device import check_fits
from drafters import Drafter, Target, check_strategy, draft_cache_bytes, drafter_class
from graphs import Graphs, LaggingFlag
from kv_cache import CacheSpec, KVCache
from model import Transformer
from policies import Strategy
from sampling import Draft, Sampling, Stats, accept, pick


class Around(NamedTuple):
    """What a round does beside the models' forwards. On a GPU it is compiled: a kernel or two each.

    On a CPU that pays where top-p is asked for.
    """

    pick: Callable = pick
    accept: Callable = accept
    commit: Callable = Batch.commit

    def compiled(self) -> "Around":
        """The same, each as one compiled function."""
        return Around(*(torch.compile(f, fullgraph=True, dynamic=False) for f in self))


class Engine:
    """One static batch: model, caches, text; `prefill`, then `round` until all rows are finished.

    It drafts with one drafter at a time, or with none, and keeps as many as are added: to switch
    between two rounds costs nothing. A drafter that was away reads what it missed when it is back.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,  # B, at least 1
        max_len: int,  # tokens of the longest row, prompt and continuation together
        strategy: Strategy,
        sampling: Sampling,
        seed: int = 0,
        draft_model: Transformer | None = None,  # None: the strategy needs none
    ) -> None:
        """Allocates the caches; ValueError if they will not fit into the memory that is free."""
        if batch_size < 1 or max_len < 1:
            raise ValueError(f"batch_size {batch_size} and max_len {max_len} must be at least 1")
        spec = CacheSpec.for_model(model, batch_size)
        self.model, self.sampling, self.max_len, self.seed = model, sampling, max_len, seed
        self.device = spec.device
        self.prefill_chunk = min(spec.prefill_chunk, max_len)
        n_slots = max_len + MAX_GAMMA + 1  # a round may overshoot
        unallocated = KVCache.empty(replace(spec, allocated=False), n_slots)
        self.check(unallocated, strategy, draft_model, unallocated.n_bytes)
        self.batch = Batch(batch_size, max_len, unallocated.capacity, spec.device)
        self.full = KVCache.empty(spec, n_slots, self.batch.finished)
        self.generator = torch.Generator(spec.device)
        self.host_rounds = 0  # since the last rewind, as the host counts them
        self.drafters: list[Drafter] = []
        self.drafter: Drafter | None = None  # who drafts; None: plain decoding
        on_gpu = spec.device.type == "cuda"
        self.graphs = Graphs(self.batch, self.generator) if model.compiled and on_gpu else None
        self.rounds: dict[tuple[Drafter | None, int], Callable[[], object]] = {}  # captured
        self.around = Around()
        if model.compiled and (on_gpu or sampling.top_p is not None):
            self.around = self.around.compiled()
        self.use(strategy, draft_model)

    @property
    def gamma(self) -> int:
        """Most drafts that a round can have; 0 without a drafter."""
        return self.drafter.strategy.gamma if self.drafter else 0

    def check(
        self,
        full: KVCache,  # of this engine
        strategy: Strategy,
        draft_model: Transformer | None,
        other_bytes: int,  # that are needed too
    ) -> None:
        """ValueError if these do not go together, or need more memory than is free."""
        check_strategy(strategy, draft_model and draft_model.config, self.max_len)
        spec, gamma = full.spec, strategy.gamma if strategy.enabled else 0
        sizes = gamma, self.prefill_chunk, spec.dtype.itemsize, not self.sampling.greedy
        chunk, work = (work_bytes(self.model.config, B, *sizes) for B in (0, spec.batch_size))
        needed = other_bytes + work + draft_cache_bytes(strategy, full, draft_model)

        def remedy(share: float) -> str:
            rows = (round(share * needed) - chunk) * spec.batch_size // (needed - chunk)
            fewer = f"--batch_size {rows} (the most that fits) or " if rows > 0 else ""
            return fewer + "a smaller --max_context"

        check_fits(needed, spec.device, "the KV caches and the work of a round", remedy)

    def add(self, strategy: Strategy, draft_model: Transformer | None = None) -> Drafter:
        """Make a drafter, to be kept with its captured rounds until `remove`.

        ValueError if it does not go with the models and max_len, or does not fit into memory.
        """
        self.check(self.full, strategy, draft_model, 0)
        return self.make(strategy, draft_model)

    def make(self, strategy: Strategy, draft_model: Transformer | None) -> Drafter:
        """The same, unchecked."""
        kind = drafter_class(strategy, draft_model is not None)
        drafter = kind(strategy, Target(self.model, self.full, self.batch), draft_model)
        self.drafters.append(drafter)
        return drafter

    def remove(self, drafter: Drafter) -> None:
        """Forget a drafter; its memory is free when the caller forgets it too."""
        self.drafters.remove(drafter)
        self.rounds = {key: work for key, work in self.rounds.items() if key[0] is not drafter}
        if self.drafter is drafter:
            self.drafter = None

    def switch(self, drafter: Drafter | None) -> None:
        """Draft with this one from here on (None: not at all). ValueError if it was not added."""
        if drafter is not None and drafter not in self.drafters:
            raise ValueError(f"{drafter.strategy} is not one of this engine's drafters")
        self.drafter = drafter

    def use(self, strategy: Strategy, draft_model: Transformer | None = None) -> None:
        """Draft like this from here on, instead of all drafters that there were.

        ValueError if it cannot be; the engine then drafts as before.
        """
        held = sum(drafter.n_bytes for drafter in self.drafters)
        self.check(self.full, strategy, draft_model, -held)
        while self.drafters:  # nothing here refers to them: their memory is free for the next
            self.remove(self.drafters[-1])
        self.switch(self.make(strategy, draft_model) if strategy.enabled else None)

    @torch.inference_mode()
    def prefill(
        self,
        prompts: list[list[int]],  # B prompts of at least one token
        max_new_tokens: list[int],  # per row, at least 1
        eos_ids: tuple[int, ...] = (),
        on_row: Callable[[int], None] = lambda b: None,  # told of each row that is done
        reuse: bool = False,
    ) -> None:
        """Read the prompts into the caches, row by row in chunks, and decide each first token.

        With reuse, what a prompt has in common with the beginning of its row's text, prompt and
        continuation of before, is not read again: the next turn of a conversation. ValueError,
        before anything is read, for prompts and limits that do not fit the engine.
        """
        batch = self.batch
        batch.check(prompts, max_new_tokens, eos_ids, self.model.config.vocab_size)
        reused = [batch.n_reused(b, p) if reuse else 0 for b, p in enumerate(prompts)]
        n_kept = torch.tensor(reused, device=self.device)
        for drafter in self.drafters:
            drafter.forget(n_kept)
        batch.begin(min(map(len, prompts)), eos_ids)
        last = []
        for b, (prompt, n) in enumerate(zip(prompts, max_new_tokens, strict=True)):
            batch.start_row(b, prompt, n)
            last.append(self.prefill_row(b, len(prompt), reused[b]))
            on_row(b)
        self.reseed("prefill")
        u = None if self.sampling.greedy else self.uniforms(1)[:, 0]
        first, _ = pick(self.model.logits(torch.stack(last)), self.sampling, u)
        batch.decide_first(first)
        self.rewind()

    @torch.inference_mode()
    def prefill_row(self, b: int, length: int, n_cached: int = 0) -> Tensor:
        """Hidden state [dim] of the row's last prompt token; its K and V are cached on the way."""
        tokens = self.batch.tokens[b : b + 1]
        return self.model.prefill(tokens, length, self.prefill_chunk, self.full.row(b), n_cached)

    @torch.inference_mode()
    def rewind(self) -> None:
        """Back to the end of the prefill: decode (again) from the same first tokens and seed.

        ValueError before the first prefill.
        """
        self.batch.rewind()
        lengths = self.batch.prompt_len
        for b in (~self.full.holds(lengths)).nonzero()[:, 0].tolist():
            self.prefill_row(b, int(lengths[b]))  # decoding has overwritten what its end sees
        self.reseed("decode")
        self.host_rounds = 0
        for drafter in self.drafters:
            drafter.rewind()

    @contextmanager
    def pretend(self, lengths: int | list[int], max_new_tokens: int = 1) -> Iterator[None]:
        """Inside, every row has that many decided tokens, at least 2: for timing and compiling.

        Rounds run, and leave what means nothing in the caches. ValueError once there is a text.
        """
        lengths = torch.as_tensor(lengths, device=self.device).expand(self.batch.n_rows)
        with torch.inference_mode(), self.batch.pretend(lengths, max_new_tokens):
            try:
                yield
            finally:
                for drafter in self.drafters:
                    drafter.forget(torch.zeros_like(lengths))

    def warm_up(self, later_turns: bool = False) -> None:
        """Compile, twice run and capture what the first turn, or also later ones, will need.

        ValueError once there is a text, which this would write over.
        """
        with self.pretend(3):
            for _ in range(2):
                for n_cached in (0, 1) if later_turns else (0,):
                    self.prefill_row(0, 2, n_cached)
        self.warm_up_rounds()

    def warm_up_rounds(self) -> None:
        """The same for rounds and the drafter alone."""
        with self.pretend(3):
            for _ in range(2):
                if self.drafter:
                    for n_read in (0, 1):  # it may have missed a prompt, or some rounds
                        self.drafter.catch_up(torch.full_like(self.batch.seq_len, n_read))
                    self.drafter.select()
                for gamma in {0, self.gamma}:
                    self.decide(self.draft(gamma))
            for gamma in {0, self.gamma}:
                self.capture_round(gamma)

    def reseed(self, what: str) -> None:
        """Begin the stream of random numbers of this name, prefill and seed; all are unrelated."""
        name = f"{what} {self.batch.n_texts} of seed {self.seed}"
        self.generator.manual_seed(random.Random(name).getrandbits(63))

    def uniforms(self, n: int) -> Tensor:  # [B, n] float32 in [0, 1)
        """The next random numbers of the stream."""
        return torch.rand(self.batch.n_rows, n, device=self.device, generator=self.generator)

    @torch.inference_mode()
    def catch_up(self) -> None:
        """Let the drafter read the text that it has missed."""
        if self.drafter:
            self.drafter.read_missed()

    @torch.inference_mode()
    def refresh(self) -> None:
        """The same, and let it select if that is due."""
        if self.drafter:
            self.drafter.refresh(self.host_rounds)

    @torch.inference_mode()
    def draft(self, gamma: int) -> Draft:
        """gamma tokens per row from the drafter."""
        if not gamma or self.drafter is None:
            return Draft(self.batch.tokens[:, :0], None)
        u = None if self.sampling.greedy else self.uniforms(gamma)

        def pick_draft(logits: Tensor, i: int) -> tuple[Tensor, Tensor | None]:
            return self.around.pick(logits, self.sampling, None if u is None else u[:, i])

        return self.drafter.propose(gamma, pick_draft)

    @torch.inference_mode()
    def verify(self, draft_tokens: Tensor) -> Tensor:  # [B, gamma] -> logits [B, gamma + 1, V]
        """The target's logits after the newest token and after each draft, in one pass."""
        token, pos = self.batch.newest()
        gamma = draft_tokens.shape[1]
        pos = pos + torch.arange(gamma + 1, device=pos.device)
        write = (self.full, *self.drafter.writes) if gamma and self.drafter else None
        return self.model(torch.cat((token, draft_tokens), dim=1), pos, self.full, write)

    @torch.inference_mode()
    def accept(self, draft: Draft, logits: Tensor) -> tuple[Tensor, Tensor]:
        """n_accepted [B], next_token [B], from the target's logits [B, gamma + 1, V]."""
        u = None if self.sampling.greedy else self.uniforms(draft.tokens.shape[1] + 1)
        return self.around.accept(draft, logits, self.sampling, u)

    def decide(self, draft: Draft) -> tuple[Tensor, Tensor]:
        """Verify and accept: n_accepted [B], next_token [B]. What T_V and, undrafted, T_T are."""
        return self.accept(draft, self.verify(draft.tokens))

    @torch.inference_mode()
    def eager_round(self, gamma: int) -> None:
        """Draft, verify, accept, commit."""
        draft = self.draft(gamma)
        n_accepted, next_token = self.decide(draft)
        self.around.commit(self.batch, draft.tokens, n_accepted, next_token)

    @torch.inference_mode()
    def round(self, gamma: int) -> None:
        """Decide 1 to gamma + 1 more tokens of every unfinished row. gamma 0 is plain decoding.

        ValueError for a gamma that is not drafted here, and without a prefill.
        """
        self.batch.need_text()
        if not 0 <= gamma <= self.gamma:
            raise ValueError(f"gamma {gamma} must be in 0..{self.gamma}, what this engine drafts")
        for drafter in self.drafters:
            if not gamma or drafter is not self.drafter:
                drafter.leave()
        if gamma:
            self.refresh()
        self.capture_round(gamma)()
        self.host_rounds += 1

    def capture_round(self, gamma: int) -> Callable[[], object]:
        """The round that `round` runs: captured once, where rounds are, and then kept."""
        if not self.graphs:
            return partial(self.eager_round, gamma)
        key = self.drafter if gamma else None, gamma
        if key not in self.rounds:
            self.rounds[key] = self.capture(partial(self.eager_round, gamma))
        return self.rounds[key]

    @torch.inference_mode()
    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """The work as one CUDA graph; the work itself on a CPU, or where nothing is compiled."""
        return self.graphs.capture(work) if self.graphs else work

    @torch.inference_mode()
    def run(
        self,
        gamma: int | None = None,  # draft tokens per round, 0..self.gamma; None: self.gamma
        max_rounds: float = math.inf,
        on_round: Callable[[], None] = lambda: None,  # called after every round
    ) -> None:
        """Rounds until every row is finished. ValueError without a prefill."""
        self.batch.need_text()
        gamma = self.gamma if gamma is None else gamma
        finished = self.batch.finished
        done = LaggingFlag(finished) if self.graphs else finished.all
        while max_rounds > 0 and not done():
            self.round(gamma)
            on_round()
            max_rounds -= 1


def generate(
    engine: Engine,
    prompts: list[list[int]],  # one per row of the engine
    max_new_tokens: int,
    eos_ids: tuple[int, ...] = (),
) -> tuple[list[list[int]], Stats]:
    """Continue the prompts with the engine's own drafter: new tokens per row, and the counts.

    ValueError for prompts and limits that do not fit the engine.
    """
    engine.prefill(prompts, [max_new_tokens] * len(prompts), eos_ids)
    engine.run()
    return engine.batch.outputs(), engine.batch.stats()
