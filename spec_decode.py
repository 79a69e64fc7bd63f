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
they are warmed up and timed. Timing itself is the caller's business; the batch counts. On a GPU a
round is one CUDA graph (`graphs.py`), and so is a plain one.

Rows begin one by one (`start`), all before the first round, or between two rounds, in the place of
a row that has ended (`refill.py`). To read a prompt takes a few forwards, and rounds of the other
rows may come between them. What a prompt has in common with a text that some row holds is copied.
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from batch import MAX_GAMMA, Around, Batch, Request
from config import SAMPLING_COMPILED, SAMPLING_EAGER, most, work_bytes
from device import check_fits
from drafter import Drafter, Target
from drafters import check_strategy, draft_cache_bytes, drafter_class
from exact import check_gamma, padded
from graphs import LAG, Graphs, Watch
from kv_cache import CacheSpec, KVCache
from model import Transformer, short_chunk
from policies import Strategy
from quantize import Twins
from sampling import Sampling, pick, row_seed

SHARED = 256  # tokens that a prompt must have in common with another row's text to copy their KV


class Engine:
    """A batch of rows: model, caches, text. `prefill` or `start` begin texts, `round` decides more.

    It drafts with one drafter at a time, or with none, and keeps as many as are added: to switch
    between two rounds costs nothing. A drafter that was away reads what it missed when it is back.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,  # B, at least 1
        max_len: int,  # tokens of the longest row, prompt and continuation together
        strategy: Strategy,
        sampling: Sampling,  # that rows have, or the widest of what they may have
        seed: int = 0,
        draft_model: Transformer | None = None,  # None: the strategy needs none
    ) -> None:
        """Allocates the caches; ValueError if they will not fit into the memory that is free."""
        if min(batch_size, max_len) < 1:
            raise ValueError(f"batch_size {batch_size} and max_len {max_len} must be at least 1")
        spec = CacheSpec.for_model(model, batch_size)
        self.model, self.twins, self.sampling = model, Twins(model), sampling
        self.max_len, self.seed, self.device = max_len, seed, spec.device
        self.prefill_chunk = min(spec.prefill_chunk, max_len)
        n_slots = max_len + MAX_GAMMA + 1  # a round may overshoot
        self.full = KVCache.empty(replace(spec, allocated=False), n_slots)
        self.check(strategy, draft_model)
        self.batch = Batch(batch_size, max_len, self.full.capacity, spec.device)
        self.full = KVCache.empty(spec, n_slots, self.batch.finished)
        self.host_rounds = 0  # since the last rewind, as the host counts them
        self.begun = [(0, 1)] * batch_size  # by row: round before which it began, prompt's tokens
        self.drafters: list[Drafter] = []
        self.drafter: Drafter | None = None  # who drafts; None: plain decoding
        on_gpu = spec.device.type == "cuda"
        self.graphs = Graphs(self.batch) if model.compiled and on_gpu else None
        self.watch = Watch(self.batch.finished, LAG if self.graphs else 0)
        self.captured: dict[tuple[Drafter | None, int], Callable[[], object]] = {}  # captured
        pays = model.compiled and (on_gpu or not sampling.greedy)
        self.around = Around().compiled(on_gpu) if pays else Around()
        self.use(strategy, draft_model)

    @property
    def gamma(self) -> int:
        """Most drafts that a round can have; 0 without a drafter."""
        return self.drafter.strategy.gamma if self.drafter else 0

    def check(
        self, strategy: Strategy, draft_model: Transformer | None, held_bytes: int = 0
    ) -> None:
        """ValueError if these do not go together, or need more memory than is free, or held."""
        check_strategy(strategy, draft_model and draft_model.config, self.max_len)
        B, longest, needs = self.full.spec.batch_size, self.max_len, self.bytes_needed

        def remedy(share: float) -> str:
            room = held_bytes + round(share * needed)
            rows = most(B, lambda n: needs(n, longest, strategy, draft_model) <= room)
            tokens = most(longest, lambda n: needs(B, n, strategy, draft_model) <= room)
            fits = {"--batch_size": rows, "--max_context": tokens}
            ways = [f"{flag} {n} (the most that fits)" for flag, n in fits.items() if n]
            return " or ".join(ways) or "a smaller --batch_size and --max_context"

        needed = needs(B, longest, strategy, draft_model) - held_bytes
        check_fits(needed, self.device, "the KV caches and the work of a round", remedy)

    def bytes_needed(
        self, n_rows: int, max_len: int, strategy: Strategy, draft_model: Transformer | None
    ) -> int:
        """Beside the model: caches, a drafter's own and its copy of weights, and work."""
        spec = replace(self.full.spec, batch_size=n_rows, allocated=False)
        full = KVCache.empty(spec, max_len + MAX_GAMMA + 1)
        gamma = check_gamma(strategy.gamma * strategy.enabled, spec.exact)
        per_logit = SAMPLING_COMPILED if self.model.compiled else SAMPLING_EAGER
        per_logit *= not self.sampling.greedy
        sizes = min(self.prefill_chunk, max_len), spec.dtype.itemsize, per_logit
        work = work_bytes(self.model.config, n_rows, gamma, *sizes)
        work += self.twins.n_bytes(strategy.weights)
        return full.n_bytes + work + draft_cache_bytes(strategy, full, draft_model)

    def add(self, strategy: Strategy, draft_model: Transformer | None = None) -> Drafter:
        """Make a drafter, to be kept with its captured rounds until `remove`.

        ValueError if it does not go with the models and max_len, or does not fit into memory.
        """
        self.check(strategy, draft_model, self.full.n_bytes)
        return self.make(strategy, draft_model)

    def make(self, strategy: Strategy, draft_model: Transformer | None) -> Drafter:
        """The same, unchecked."""
        kind = drafter_class(strategy, draft_model is not None)
        drafter = kind(strategy, Target(self.model, self.full, self.batch, self.twins), draft_model)
        self.drafters.append(drafter)
        return drafter

    def remove(self, drafter: Drafter) -> None:
        """Forget a drafter; its memory is free when the caller forgets it too."""
        self.drafters.remove(drafter)
        self.captured = {key: work for key, work in self.captured.items() if key[0] is not drafter}
        if self.drafter is drafter:
            self.drafter = None

    def switch(self, drafter: Drafter | None) -> None:
        """Draft with this one from here on (None: not at all). ValueError if it was not added."""
        if drafter is not None and drafter not in self.drafters:
            raise ValueError(f"{drafter.strategy} is not one of this engine's drafters")
        self.drafter = drafter
        self.twins.keep({d.strategy.weights for d in self.drafters})

    def use(self, strategy: Strategy, draft_model: Transformer | None = None) -> None:
        """Draft like this from here on, instead of all drafters that there were.

        ValueError if it cannot be; the engine then drafts as before.
        """
        held = self.full.n_bytes + sum(drafter.n_bytes for drafter in self.drafters)
        self.check(strategy, draft_model, held)
        while self.drafters:  # nothing here refers to them: their memory is free for the next
            self.remove(self.drafters[-1])
        self.switch(self.make(strategy, draft_model) if strategy.enabled else None)

    def requests(
        self, prompts: list[list[int]], max_new_tokens: list[int], sampling: Sampling | None = None
    ) -> list[Request]:
        """A request for each prompt and limit, with a seed of this turn. None: own sampling."""
        turn, sampling = self.batch.n_texts, sampling or self.sampling
        return [
            Request(prompt, n, sampling, row_seed(self.seed, i, turn))
            for i, (prompt, n) in enumerate(zip(prompts, max_new_tokens, strict=True))
        ]

    def check_requests(
        self, requests: Sequence[Request], name: str = "request", first: int = 0
    ) -> None:
        """ValueError, naming its place, for a request that no row of this engine can serve."""
        for i, request in enumerate(requests, start=first):
            try:
                self.batch.check(request, self.model.config.vocab_size)
            except ValueError as e:
                raise ValueError(f"{name} {i}: {e}") from None
            if not self.sampling.covers(request.sampling):
                raise ValueError(f"{name} {i}: {request.sampling} in an engine for {self.sampling}")

    def begin(self, eos_ids: tuple[int, ...] = (), keep: bool = False) -> None:
        """Make room for new texts in all rows, to be given by `start`; these tokens end one.

        What rows hold is forgotten, unless it is to be kept for texts that begin in the same way.
        """
        for drafter in self.drafters:
            drafter.leave()
        self.batch.begin(eos_ids, keep)
        self.host_rounds = 0

    @torch.inference_mode()
    def start(
        self,
        b: int,
        request: Request,
        share: float = SHARED,  # tokens that must be there to be used; inf: read all, in chunks
    ) -> Generator[None, None, int]:
        """Read a prompt into row b and decide its first token. Yields between two forwards.

        There may be rounds of the other rows then; when it is exhausted, row b runs too. Returns
        how many of the prompt's tokens needed no reading. The request must have passed
        `check_requests`.
        """
        batch, length = self.batch, len(request.prompt)
        common = batch.in_common(request.prompt)
        back = short_chunk(self.prefill_chunk) - 1
        held = self.full.holds(torch.tensor(common, device=self.device), back).tolist()
        common = [n * can for n, can in zip(common, held, strict=True)]
        source = max(range(len(common)), key=lambda r: (common[r], r == b))
        n = common[source] if common[source] >= share else 0
        for drafter in self.drafters:
            drafter.forget(slice(b, b + 1), n if source == b else 0)
        batch.start_row(b, request, n)
        if source != b and n:
            self.full.copy_row(source, b, n)
        for n_read, x in self.read_row(b, length, n, tail=share < math.inf):
            batch.note_read(b, n_read)
            if n_read < length:
                yield
            else:
                logits, pos = self.model.logits(x[None, None]), batch.prompt_len[b : b + 1, None]
                batch.decide_first(b, pick(logits, pos, batch.sampling.row(b), self.sampling)[0])
        self.begun[b] = self.host_rounds, length
        self.watch.restart(b)
        for drafter in self.drafters:
            drafter.start(b)
        return n

    def end(self, b: int) -> None:
        """Row b takes part in no more rounds."""
        self.batch.stop_row(b)
        self.watch.rows[b] = True

    @torch.inference_mode()
    def prefill(
        self,
        prompts: list[list[int]],  # B prompts of at least one token
        max_new_tokens: list[int],  # per row, at least 1
        eos_ids: tuple[int, ...] = (),
        on_row: Callable[[int], None] = lambda b: None,  # told of each row that is done
        reuse: bool = False,
        sampling: Sampling | None = None,  # of all rows; None: the engine's own
    ) -> None:
        """Start all rows, with a seed for each.

        With reuse, what a prompt has in common with the beginning of its row's text, prompt and
        continuation of before, is not read again: the next turn of a conversation. ValueError,
        before anything is read, for prompts and limits that do not fit the engine.
        """
        n = len(prompts), len(max_new_tokens), self.batch.n_rows
        if len({*n}) > 1:
            raise ValueError("{} prompts and {} limits for an engine of {} rows".format(*n))
        requests = self.requests(prompts, max_new_tokens, sampling)
        self.check_requests(requests, "row")
        self.begin(eos_ids, keep=reuse)
        for b, request in enumerate(requests):
            for _ in self.start(b, request, share=1 if reuse else math.inf):
                pass
            on_row(b)
        self.rewind()

    def read_row(
        self, b: int, length: int, n_cached: int = 0, tail: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """Cache a row's K and V, see `Transformer.read`: tokens that are read, the last's [dim]."""
        tokens, row = self.batch.tokens[b : b + 1], self.full.row(b)
        return self.model.read(tokens, length, self.prefill_chunk, row, n_cached, tail)

    @torch.inference_mode()
    def prefill_row(self, b: int, length: int, n_cached: int = 0) -> Tensor:
        """The same at once; the hidden state [dim] of the row's last prompt token."""
        *_, (_, x) = self.read_row(b, length, n_cached)
        return x

    @torch.inference_mode()
    def rewind(self) -> None:
        """Back to the end of the prefill: decode (again) from the same first tokens.

        ValueError before the first prefill.
        """
        self.batch.rewind()
        lengths = self.batch.prompt_len.tolist()
        for b in (~self.full.holds(self.batch.prompt_len)).nonzero()[:, 0].tolist():
            self.prefill_row(b, lengths[b])  # decoding has overwritten what its end sees
        self.host_rounds, self.begun = 0, [(0, n) for n in lengths]
        for b in range(self.batch.n_rows):
            self.watch.restart(b)
        for drafter in self.drafters:
            drafter.rewind()

    @contextmanager
    def pretend(self, lengths: int | list[int], max_new_tokens: int = 1) -> Iterator[None]:
        """Inside, every row has that many decided tokens, at least 2: for timing and compiling.

        Rounds run, and leave what means nothing in the caches. ValueError once there is a text.
        """
        lengths = torch.as_tensor(lengths, device=self.device).expand(self.batch.n_rows)
        with torch.inference_mode(), self.batch.pretend(lengths, max_new_tokens, self.sampling):
            try:
                yield
            finally:
                for drafter in self.drafters:
                    drafter.leave()
                    drafter.forget(slice(None), 0)

    def warm_up(self, refills: bool = False) -> None:
        """Compile, twice run and capture what the first texts will need, or also later ones.

        ValueError once there is a text, which this would write over.
        """
        with self.pretend(3):
            for _ in range(2):
                for n_cached in (0, 1) if refills else (0,):
                    self.prefill_row(0, 2, n_cached)
        self.warm_up_rounds(refills)

    def warm_up_rounds(self, refills: bool = False, gamma: int | None = None) -> None:
        """The same for the drafter alone, and its rounds of gamma drafts; None: of the most."""
        gammas = {0, self.gamma if gamma is None else gamma}
        with self.pretend(3):
            for _ in range(2):
                if self.drafter:
                    for n_read in (0, 1):  # it may have missed a prompt, or some rounds
                        self.drafter.catch_up(torch.full_like(self.batch.seq_len, n_read))
                    for b in (None, 0) if refills else (None,):
                        self.drafter.renew(b)
                        self.drafter.select(b)
                for n in gammas:
                    self.eager_round(n)
            for n in gammas:
                self.capture_round(n)

    @torch.inference_mode()
    def catch_up(self) -> None:
        """Let the drafter read the text that it has missed."""
        if self.drafter:
            self.drafter.read_missed()

    @torch.inference_mode()
    def refresh(self) -> None:
        """The same, and let it select if that is due."""
        if self.drafter:
            self.drafter.refresh(self.host_rounds, self.begun)

    @torch.inference_mode()
    def draft(self, gamma: int) -> Tensor:  # [B, gamma]
        """The next gamma tokens of every row, as the drafter guesses them."""
        if not gamma or self.drafter is None:
            return self.batch.tokens[:, :0]

        def pick_draft(logits: Tensor, i: int | Tensor) -> Tensor:
            pos = self.batch.seq_len[:, None] + i
            return self.around.pick(logits[:, None], pos, self.batch.sampling, self.sampling)[:, 0]

        return self.drafter.propose(gamma, pick_draft)

    @torch.inference_mode()
    def verify(self, draft: Tensor) -> Tensor:  # [B, gamma] -> logits [B, gamma + 1, V]
        """The target's logits after the newest token and after each draft, in one pass."""
        token, pos = self.batch.newest()
        n, tokens = draft.shape[1] + 1, padded(token, draft, self.full.spec.exact)
        pos = pos + torch.arange(tokens.shape[1], device=pos.device)
        write = (self.full, *self.drafter.writes) if n > 1 and self.drafter else None
        return self.model(tokens, pos, self.full, write)[:, :n]

    @torch.inference_mode()
    def accept(self, draft: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """n_accepted [B], next_token [B], from [B, gamma] and the target's [B, gamma + 1, V]."""
        batch = self.batch
        return self.around.judge(logits, draft, batch.seq_len, batch.sampling, self.sampling)

    def decide(self, draft: Tensor) -> tuple[Tensor, Tensor]:  # [B, gamma]
        """Verify and accept: n_accepted [B], next_token [B]. What T_V and, undrafted, T_T are."""
        return self.accept(draft, self.verify(draft))

    @torch.inference_mode()
    def eager_round(self, gamma: int) -> None:
        """Draft, verify, accept, commit."""
        draft = self.draft(gamma)
        n_accepted, next_token = self.decide(draft)
        self.around.commit(self.batch, draft, n_accepted, next_token)

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
        self.watch.look()

    def capture_round(self, gamma: int) -> Callable[[], object]:
        """The round that `round` runs: captured once, where rounds are, and then kept."""
        if not self.graphs:
            return partial(self.eager_round, gamma)
        key = self.drafter if gamma else None, gamma
        if key not in self.captured:
            self.captured[key] = self.capture(partial(self.eager_round, gamma))
        return self.captured[key]

    @torch.inference_mode()
    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """The work as one CUDA graph; the work itself on a CPU, or where nothing is compiled."""
        return self.graphs.capture(work) if self.graphs else work

    def rounds(
        self,
        gamma: int | None = None,  # draft tokens per round, 0..self.gamma; None: self.gamma
        max_rounds: float = math.inf,
    ) -> Iterator[None]:
        """Rounds until every row is finished; after each, the caller may start others.

        ValueError without a prefill.
        """
        self.batch.need_text()
        gamma = self.gamma if gamma is None else gamma
        while max_rounds > 0 and not all(self.watch.rows):
            self.round(gamma)
            max_rounds -= 1
            yield

    def run(self, gamma: int | None = None, max_rounds: float = math.inf) -> None:
        """The same, all of them. ValueError without a prefill."""
        for _ in self.rounds(gamma, max_rounds):
            pass
