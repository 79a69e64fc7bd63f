"""Speculative decoding of a batch: draft, verify, accept, commit.

The state of a batch is ``tokens [B, S]`` and ``seq_len [B]``: how many tokens of each row are
decided. The full KV cache holds K and V of all decided tokens but the newest. One round::

    draft    gamma tokens from a drafter, see `drafters.py`                   gamma * T_D
    verify   one pass over [newest, draft_1 .. draft_gamma], full cache       T_V(gamma)
    accept   how many drafts stay, and the token that follows them
    commit   write them, cut at EOS and at the row's limit, advance seq_len

It yields 1 to gamma + 1 tokens per row, and the rows accept different numbers. Nothing here
branches on that: ragged acceptance is `cumprod`, `gather` and `where` over static shapes, and what
was rejected is forgotten by not advancing `seq_len` over it (see `kv_cache.py`). The expected
number of tokens is Omega = (1 - alpha^(gamma+1)) / (1 - alpha) at acceptance alpha, so speculation
wins when T_T * Omega > gamma * T_D + T_V(gamma). With a long context T_V is close to T_T, because
both read the same KV cache once, and T_D is small, because the draft reads `budget` tokens of it.

``gamma = 0`` is plain decoding: the round drafts nothing, verifies one token against the full cache
alone and commits the target's next token. The baseline is the same code with zero drafts.

**Losslessness.** Greedy: a draft stays while it equals the target's argmax. Sampling (Leviathan et
al., arXiv 2211.17192): a draft token x stays with probability min(1, target(x) / draft(x)); at the
first rejection the next token comes from normalize(max(target - draft, 0)); if all stay, from the
target. Both models' logits become probabilities through one function, and randomness is an
argument (uniforms), so that a test can enumerate every outcome.

Nothing is decided before `commit`: `draft` and `verify` can be repeated at will, which is how
they are warmed up and timed. Timing itself is the caller's business; `Stats` counts.

**On a GPU a round is one CUDA graph** (`Engine.capture`). Launching the hundreds of kernels of a
round from Python takes longer than running them; a graph launches them all at once. That is
possible because a round reads and writes static tensors only and never looks at a value. Plain
decoding is captured in the same way, so no speedup comes from that. The host learns that all rows
are finished from a flag in pinned memory that is LAG rounds old, so the device never waits for it.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config import work_bytes
from device import check_fits
from drafters import MAX_GAMMA, Strategy, Text, check_strategy, draft_cache_bytes, make_drafter
from kv_cache import CacheSpec, KVCache
from model import Transformer

MAX_EOS = 16  # tokens that may end a text
LAG = 2  # rounds that the host may be ahead of the device
HALVINGS = 28  # of the interval in which top-p cuts: 2^(40 / 2^28) is 1 in float32
WARM_UP = 3  # times that work runs before it is captured: compiling, autotuning, workspaces


@dataclass(frozen=True, slots=True)
class Sampling:
    """How logits become probabilities, for the target and the draft alike."""

    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # then the smallest set with at least this much probability

    def __post_init__(self) -> None:
        least = torch.finfo(torch.float32).tiny  # less would divide, or cut, by zero
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be a number >= 0 (0 is greedy)")
        if 0 < self.temperature < least:
            raise ValueError(
                f"temperature {self.temperature} must be at least {least}, or 0: greedy"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} must be at least 1")
        if self.top_p is not None and not least <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be in (0, 1], and at least {least}")
        if self.greedy and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p need a temperature above 0; 0 is greedy decoding")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True, slots=True)
class Stats:
    """What a decoding run did. Definitions are vLLM's; a finished row drafts nothing."""

    rounds: int  # passes of the target
    decoded_tokens: int  # all rows, without the first tokens, which the prefill decided
    accepted_histogram: list[int]  # index n -> how often a row accepted exactly n drafts
    drafted_histogram: list[int]  # index g -> how often a row was drafted for with gamma = g

    @property
    def row_rounds(self) -> int:
        """Rounds, summed over the rows that were not finished yet."""
        return sum(self.drafted_histogram)

    @property
    def drafts(self) -> int:
        """How often a row was drafted for."""
        return sum(self.drafted_histogram[1:])

    @property
    def drafted(self) -> int:
        return sum(g * count for g, count in enumerate(self.drafted_histogram))

    @property
    def accepted(self) -> int:
        return sum(n * count for n, count in enumerate(self.accepted_histogram))

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per row and round, the target's own token included: 1 + accepted / drafts."""
        return 1 + self.accepted / max(self.drafts, 1)

    @property
    def draft_acceptance_rate(self) -> float:
        """Accepted / drafted tokens."""
        return self.accepted / max(self.drafted, 1)

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """Share of the first, second, ... drafts that were accepted."""
        accepted, drafted = self.accepted_histogram, self.drafted_histogram
        return [
            sum(accepted[i:]) / sum(drafted[i:]) for i in range(1, len(drafted)) if sum(drafted[i:])
        ]


class Draft(NamedTuple):
    tokens: Tensor  # [B, gamma] int64
    probs: Tensor | None  # [B, gamma, V] float32, what they were sampled from; None when greedy


def logits_to_probs(logits: Tensor, sampling: Sampling) -> Tensor:  # [..., V] -> [..., V] float32
    """Probabilities after temperature, top-k and top-p, in this order. Ties at a cut are kept."""
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    probs = logits.softmax(dim=-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        probs = nucleus(probs, sampling.top_p)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def nucleus(probs: Tensor, top_p: float) -> Tensor:  # [..., V] float32 -> [..., V]
    """Zero all but the smallest set of likeliest tokens whose sum is at least top_p, ties included.

    The probability at which to cut is found by halving an interval instead of by sorting: summing
    over a vocabulary is cheap, sorting one is not. What is below the first `low` sums to less than
    1 - top_p. Each halving takes the square root of high / low, until float32 sees no difference.
    """
    high = probs.amax(dim=-1, keepdim=True)  # above it: nothing
    low = torch.full_like(high, (1 - top_p) / probs.shape[-1] / 2)  # above it: at least top_p
    for _ in range(HALVINGS):
        middle = (low * high).sqrt()
        too_high = (probs * (probs > middle)).sum(dim=-1, keepdim=True) < top_p
        low, high = torch.where(too_high, low, middle), torch.where(too_high, middle, high)
    return probs.masked_fill(probs <= low, 0)


def sample(
    weights: Tensor,  # [..., V] float, >= 0 with a positive sum; need not be normalised
    u: Tensor,  # [...] uniforms in [0, 1)
) -> Tensor:  # [...] int64
    """Draw one index by inverting the cumulative distribution; never one of weight 0.

    The total is the largest sum that ends at a positive weight: a parallel cumsum need not be
    monotone in float32. The drawn point is kept below it, also where u * total rounds up to it.
    """
    cdf = weights.cumsum(dim=-1).masked_fill(weights <= 0, 0)
    total = cdf.amax(dim=-1, keepdim=True)
    x = (u[..., None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    return (cdf > x).to(torch.uint8).argmax(dim=-1)


def pick(
    logits: Tensor,  # [B, V]
    sampling: Sampling,
    u: Tensor | None,  # [B] uniforms in [0, 1); None when greedy
) -> tuple[Tensor, Tensor | None]:  # tokens [B] int64, probs [B, V] float32 or None
    """The next token of every row, and what it was drawn from when sampling."""
    if sampling.greedy:
        return logits.argmax(dim=-1), None
    probs = logits_to_probs(logits, sampling)
    return sample(probs, u), probs


def accept_greedy(
    draft_tokens: Tensor,  # [B, gamma]
    target_tokens: Tensor,  # [B, gamma + 1], the target's argmax at each place
) -> tuple[Tensor, Tensor]:  # n_accepted [B], next_token [B]
    """Keep the longest prefix of drafts that the target would have chosen itself."""
    agree = draft_tokens == target_tokens[:, :-1]
    n_accepted = agree.long().cumprod(dim=1).sum(dim=1)
    return n_accepted, target_tokens.gather(1, n_accepted[:, None])[:, 0]


def accept_sampled(
    draft: Draft,
    target_probs: Tensor,  # [B, gamma + 1, V]
    u_accept: Tensor,  # [B, gamma] uniforms in [0, 1)
    u_next: Tensor,  # [B] uniforms in [0, 1)
) -> tuple[Tensor, Tensor]:  # n_accepted [B], next_token [B]
    """Speculative sampling (arXiv 2211.17192, algorithm 1): the output is the target's, exactly."""
    B = len(u_next)
    token = draft.tokens[..., None]
    p = target_probs[:, :-1].gather(2, token)[..., 0]
    q = draft.probs.gather(2, token)[..., 0]
    n_accepted = (u_accept * q < p).long().cumprod(dim=1).sum(dim=1)  # u < p / q
    rows = torch.arange(B, device=token.device)
    target = target_probs[rows, n_accepted]
    drafted = F.pad(draft.probs, (0, 0, 0, 1))[rows, n_accepted]  # zero where all were accepted
    residual = (target - drafted).clamp_min(0)
    # Empty only where the two distributions are equal up to rounding.
    empty = residual.sum(dim=-1, keepdim=True) == 0
    return n_accepted, sample(torch.where(empty, target, residual), u_next)


def accept(
    draft: Draft,
    logits: Tensor,  # [B, gamma + 1, V], the target's
    sampling: Sampling,
    u: Tensor | None,  # [B, gamma + 1] uniforms in [0, 1); None when greedy
) -> tuple[Tensor, Tensor]:  # n_accepted [B], next_token [B]
    """How many drafts stay and what follows them, by the rule that the sampling asks for."""
    if sampling.greedy:
        return accept_greedy(draft.tokens, logits.argmax(dim=-1))
    return accept_sampled(draft, logits_to_probs(logits, sampling), u[:, 1:], u[:, 0])


def commit(
    text: Text,
    draft_tokens: Tensor,  # [B, gamma]
    n_accepted: Tensor,  # [B] in 0..gamma
    next_token: Tensor,  # [B]
) -> None:
    """Append accepted drafts and the next token, cut at EOS and at the limit, in place.

    Counted are the tokens that were appended, and as drafted only those drafts for which there was
    room: what the end of a row cuts off was neither accepted nor rejected.
    """
    B, gamma = draft_tokens.shape
    i = torch.arange(gamma + 1, device=draft_tokens.device)
    n = n_accepted[:, None]
    block = torch.where(i == n, next_token[:, None], F.pad(draft_tokens, (0, 1)))
    ends = (block[..., None] == text.eos).any(dim=-1) & (i <= n)
    until_eos = torch.where(ends, i + 1, gamma + 1).amin(dim=1)
    room = text.limit - text.seq_len
    n_new = torch.minimum(torch.minimum(n_accepted + 1, until_eos), room)
    # Tokens past seq_len are not decided yet, so writing all of them is harmless.
    rows = torch.arange(B, device=draft_tokens.device)[:, None]
    text.tokens[rows, text.seq_len[:, None] + i] = block
    n_drafted = torch.where(until_eos <= n_accepted, until_eos, gamma + 1).minimum(room) - 1
    going = ~text.finished
    for count, value in ((text.accepted, n_new - 1), (text.drafted, n_drafted)):
        count[: gamma + 1] += ((i == value[:, None]) & going[:, None]).sum(dim=0)
    text.n_rounds.add_(going.any())
    n_new = n_new.masked_fill(text.finished, 0)
    text.seq_len.add_(n_new)
    text.finished.logical_or_(
        (ends & (i < n_new[:, None])).any(dim=1) | (text.seq_len >= text.limit)
    )


def accept_synthetic(
    rate: float,  # probability of each draft to be accepted, given that those before it were
    u_accept: Tensor,  # [B, gamma] uniforms
) -> Tensor:  # n_accepted [B]
    """Benchmarks only: a drawn number of accepted drafts, whatever the target says."""
    return (u_accept < rate).long().cumprod(dim=1).sum(dim=1)


class Around(NamedTuple):
    """What a round does beside the models' forwards. On a GPU it is compiled: a kernel or two each.

    On a CPU that pays where top-p is asked for.
    """

    pick: Callable = pick
    accept: Callable = accept
    commit: Callable = commit

    def compiled(self) -> "Around":
        return Around(*(torch.compile(f, fullgraph=True, dynamic=False) for f in self))


class Engine:
    """One static batch: model, caches, state; `prefill`, then `round` until all rows are finished.

    The state is in tensors that are written in place. Rows are independent: each has its own
    prompt length, limit and end. A finished row keeps its length; what a round still writes for
    it lies at or past its newest token, where `rewind` and the next prefill overwrite it unseen.

    Drafters may miss text: the prompt, rounds without drafts. `refresh` reads what is missing and
    selects when that is due; every round that drafts begins with it.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,  # B, at least 1
        max_len: int,  # tokens of the longest row, prompt and continuation together
        strategy: Strategy,
        sampling: Sampling,
        seed: int = 0,
        draft_model: Transformer | None = None,  # None: drafting needs none
    ) -> None:
        """Allocates the caches; ValueError if they will not fit into the memory that is free."""
        if batch_size < 1 or max_len < 1:
            raise ValueError(f"batch_size {batch_size} and max_len {max_len} must be at least 1")
        spec = CacheSpec.for_model(model, batch_size)
        self.model, self.sampling, self.max_len = model, sampling, max_len
        self.prefill_chunk = min(spec.prefill_chunk, max_len)
        n_slots = KVCache.round_up(spec, max_len + MAX_GAMMA + 1)  # a round may overshoot
        self.check(spec, strategy, draft_model, n_slots, n_slots * spec.bytes_per_slot)
        self.full = KVCache.empty(spec, n_slots)
        integers = {"dtype": torch.int64, "device": spec.device}
        self.prompt_len = torch.ones(batch_size, **integers)
        self.text = Text(
            tokens=torch.zeros(batch_size, n_slots, **integers),
            seq_len=self.prompt_len + 1,
            finished=torch.zeros(batch_size, dtype=torch.bool, device=spec.device),
            limit=torch.ones(batch_size, **integers),
            eos=torch.full((MAX_EOS,), -1, **integers),
            accepted=torch.zeros(MAX_GAMMA + 1, **integers),
            drafted=torch.zeros(MAX_GAMMA + 1, **integers),
            n_rounds=torch.zeros((), **integers),
        )
        self.tokens, self.seq_len, self.finished, self.limit, self.eos = self.text[:5]
        self.accepted, self.drafted, self.n_rounds = self.text[5:]
        self.full.finished = self.finished  # such rows read no KV any more
        self.rows = torch.arange(batch_size, device=spec.device)[:, None]
        self.seed, self.generator = seed, torch.Generator(spec.device)
        self.n_prefills = 0  # 0: there is no text yet
        self.host_rounds = 0  # since the last rewind, as the host counts them
        self.n_read = torch.zeros_like(self.seq_len)  # tokens that the drafter has read,
        self.behind = False  # where it has not read all
        self.selected_at: int | None = None  # round before which the drafter selected last
        self.shortest = 1  # tokens of the shortest prompt
        on_gpu = spec.device.type == "cuda"
        self.graphs = model.compiled and on_gpu
        self.pool = torch.cuda.graph_pool_handle() if self.graphs else None  # lives as long as
        self.newest_graph: object = None  # one of the graphs that share it
        self.stream = torch.cuda.Stream() if self.graphs else None
        self.rounds: dict[int, Callable[[], object]] = {}  # by gamma, captured
        self.around = Around()
        if model.compiled and (on_gpu or sampling.top_p is not None):
            self.around = self.around.compiled()
        self.strategy, self.gamma, self.drafter = Strategy(), 0, None
        self.use(strategy, draft_model)

    def check(self, spec, strategy, draft_model, n_slots: int, other_bytes: int) -> None:
        """ValueError if these do not go together, or do not fit beside `other_bytes` more."""
        check_strategy(strategy, draft_model and draft_model.config, self.max_len)
        caches = other_bytes + draft_cache_bytes(strategy, spec, draft_model, n_slots)
        gamma = strategy.gamma if strategy.enabled else 0
        sizes = gamma, self.prefill_chunk, spec.dtype.itemsize, not self.sampling.greedy
        chunk, work = (work_bytes(self.model.config, B, *sizes) for B in (0, spec.batch_size))
        needed = caches + work

        def remedy(share: float) -> str:
            rows = (round(share * needed) - chunk) * spec.batch_size // (needed - chunk)
            fewer = f"--batch_size {rows} (the most that fits) or " if rows > 0 else ""
            return fewer + "a smaller --max_context"

        check_fits(needed, spec.device, "the KV caches and the work of a round", remedy)

    def use(self, strategy: Strategy, draft_model: Transformer | None = None) -> None:
        """Draft like this from here on, between any two rounds.

        ValueError if it cannot be; the engine then drafts as before.
        """
        held = self.drafter.n_bytes if self.drafter else 0
        self.check(self.full.spec, strategy, draft_model, self.full.capacity, -held)
        self.drafter, self.gamma = None, 0  # its memory is free for the next,
        self.rounds = {gamma: work for gamma, work in self.rounds.items() if gamma == 0}  # so too
        self.strategy, self.selected_at = strategy, None
        self.n_read, self.behind = torch.zeros_like(self.n_read), False
        if strategy.enabled:
            self.drafter = make_drafter(strategy, self.model, self.full, self.text, draft_model)
            self.gamma = strategy.gamma  # most drafts a round can have
            self.behind = True

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
        self.check_prompts(prompts, max_new_tokens, eos_ids)
        reused = [self.n_reused(b, p) if reuse else 0 for b, p in enumerate(prompts)]
        n_read = self.n_read if self.behind else self.seq_len - 2
        self.n_read = n_read.minimum(torch.tensor(reused, device=n_read.device)).clamp_min(0)
        self.behind = self.drafter is not None
        self.n_prefills += 1
        self.shortest = min(map(len, prompts))
        self.eos.fill_(-1)
        self.eos[: len(eos_ids)] = torch.tensor(eos_ids, dtype=torch.int64)
        last = []
        for b, prompt in enumerate(prompts):
            self.tokens[b, : len(prompt)] = torch.tensor(prompt)
            self.prompt_len[b] = len(prompt)
            self.limit[b] = len(prompt) + max_new_tokens[b]
            last.append(self.prefill_row(b, len(prompt), reused[b]))
            on_row(b)
        self.reseed("prefill")
        u = None if self.sampling.greedy else self.uniforms(1)[:, 0]
        first, _ = pick(self.model.logits(torch.stack(last)), self.sampling, u)
        self.tokens[self.rows[:, 0], self.prompt_len] = first
        self.rewind()

    def check_prompts(self, prompts, max_new_tokens, eos_ids) -> None:
        """ValueError, naming the row, for anything that `prefill` cannot use."""
        B, V = len(self.rows), self.model.config.vocab_size
        if len(prompts) != B or len(max_new_tokens) != B:
            raise ValueError(
                f"{len(prompts)} prompts and {len(max_new_tokens)} limits for an engine of {B} rows"
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
            if not 0 <= min(prompt) <= max(prompt) < V:
                raise ValueError(f"row {b}: token ids must be in 0..{V - 1}")
        if len(eos_ids) > MAX_EOS:
            raise ValueError(f"{len(eos_ids)} tokens end a text; at most {MAX_EOS} are possible")

    def n_reused(self, b: int, prompt: list[int]) -> int:
        """How many of the prompt's tokens the row's cache holds, but not its last one."""
        n = min(len(prompt), int(self.seq_len[b])) - 1 if self.n_prefills else 0
        same = self.tokens[b, :n].cpu() == torch.tensor(prompt[:n])
        return int(same.long().cumprod(dim=0).sum())

    @torch.inference_mode()
    def prefill_row(self, b: int, length: int, n_cached: int = 0) -> Tensor:
        """Hidden state [dim] of the row's last prompt token; its K and V are cached on the way."""
        tokens = self.tokens[b : b + 1]
        return self.model.prefill(tokens, length, self.prefill_chunk, self.full.row(b), n_cached)

    @torch.inference_mode()
    def rewind(self) -> None:
        """Back to the end of the prefill: decode (again) from the same first tokens and seed."""
        self.need_text()
        self.reseed("decode")
        first = self.tokens.gather(1, self.prompt_len[:, None])
        self.seq_len.copy_(self.prompt_len + 1)
        self.finished.copy_((first == self.eos).any(dim=1) | (self.seq_len >= self.limit))
        for count in (self.accepted, self.drafted, self.n_rounds):
            count.zero_()
        self.host_rounds, self.selected_at = 0, None
        self.n_read = self.n_read.minimum(self.prompt_len)

    @torch.inference_mode()
    def warm_up(self, later_turns: bool = False) -> None:
        """Compile, twice run and capture what the first turn, or also later ones, will need.

        It decides nothing but writes into the caches, so ValueError once they hold a text.
        """
        self.refuse_text()
        for _ in range(2):
            for n_cached in (0, 1) if later_turns else (0,):
                self.prefill_row(0, 2, n_cached)
        self.warm_up_rounds()

    @torch.inference_mode()
    def warm_up_rounds(self) -> None:
        """The same for rounds and the drafter alone: after `use`."""
        self.refuse_text()
        before = self.seq_len.clone()
        self.seq_len.fill_(3)
        for _ in range(2):
            if self.drafter:
                for n_read in (0, 1):  # it may have missed a prompt, or some rounds
                    self.drafter.catch_up(torch.full_like(before, n_read))
                self.drafter.select()
            for gamma in {0, self.gamma}:
                self.decide(self.draft(gamma))
        self.seq_len.copy_(before)
        for gamma in {0, self.gamma}:
            self.prepare(gamma)

    def refuse_text(self) -> None:
        if self.n_prefills:
            raise ValueError("warm the engine up before its first prefill, not after it")

    def need_text(self) -> None:
        if not self.n_prefills:
            raise ValueError("there is no text to continue: prefill the engine first")

    def reseed(self, what: str) -> None:
        """Begin the stream of random numbers of this name, prefill and seed; all are unrelated."""
        name = f"{what} {self.n_prefills} of seed {self.seed}"
        self.generator.manual_seed(random.Random(name).getrandbits(63))

    def uniforms(self, n: int) -> Tensor:  # [B, n] float32 in [0, 1)
        return torch.rand(len(self.rows), n, device=self.rows.device, generator=self.generator)

    def newest(self) -> tuple[Tensor, Tensor]:  # [B, 1] token, [B, 1] its position
        pos = self.seq_len[:, None] - 1
        return self.tokens.gather(1, pos), pos

    @torch.inference_mode()
    def catch_up(self) -> None:
        """Let the drafter read the text that it has missed."""
        if self.behind:
            self.drafter.catch_up(self.n_read)
            self.behind, self.selected_at = False, None

    @torch.inference_mode()
    def refresh(self) -> None:
        """Bring the drafter up to date: what it has missed, and a selection if one is due.

        One is due once there is text, again every `select_every` rounds, and once more when rows
        that were shorter than the selection have as many tokens as it can hold.
        """
        self.catch_up()
        now, last, every = self.host_rounds, self.selected_at, self.drafter.select_every
        grown = self.drafter.n_selected - self.shortest  # a round adds at least one token
        if last is None or (every and now - last >= every) or last <= grown < now:
            self.drafter.select()
            self.selected_at = now

    @torch.inference_mode()
    def draft(self, gamma: int) -> Draft:
        """gamma tokens per row from the drafter, one at a time."""
        token, _ = self.newest()
        B, V, device = len(token), self.model.config.vocab_size, token.device
        tokens = torch.empty(B, gamma, dtype=torch.int64, device=device)
        probs = None if self.sampling.greedy else torch.empty(B, gamma, V, device=device)
        u = None if self.sampling.greedy else self.uniforms(gamma)
        for i in range(gamma):
            logits = self.drafter.logits(i, token)
            picked, p = self.around.pick(logits, self.sampling, None if u is None else u[:, i])
            tokens[:, i], token = picked, picked[:, None]
            if probs is not None:
                probs[:, i] = p
        return Draft(tokens, probs)

    @torch.inference_mode()
    def verify(self, draft_tokens: Tensor) -> Tensor:  # [B, gamma] -> logits [B, gamma + 1, V]
        """The target's logits after the newest token and after each draft, in one pass."""
        token, pos = self.newest()
        gamma = draft_tokens.shape[1]
        pos = pos + torch.arange(gamma + 1, device=pos.device)
        write = (self.full, *self.drafter.writes) if gamma else None
        return self.model(torch.cat((token, draft_tokens), dim=1), pos, self.full, write)

    @torch.inference_mode()
    def accept(self, draft: Draft, logits: Tensor) -> tuple[Tensor, Tensor]:
        """n_accepted [B], next_token [B], from the target's logits [B, gamma + 1, V]."""
        gamma, rate = draft.tokens.shape[1], self.strategy.synthetic_acceptance
        u = None if self.sampling.greedy else self.uniforms(gamma + 1)
        n_accepted, next_token = self.around.accept(draft, logits, self.sampling, u)
        if rate is not None:  # after doing all the work
            n_accepted = accept_synthetic(rate, self.uniforms(gamma))
        return n_accepted, next_token

    def decide(self, draft: Draft) -> tuple[Tensor, Tensor]:
        """Verify and accept: n_accepted [B], next_token [B]. What T_V and, undrafted, T_T are."""
        return self.accept(draft, self.verify(draft.tokens))

    @torch.inference_mode()
    def eager_round(self, gamma: int) -> None:
        draft = self.draft(gamma)
        n_accepted, next_token = self.decide(draft)
        self.around.commit(self.text, draft.tokens, n_accepted, next_token)

    @torch.inference_mode()
    def round(self, gamma: int) -> None:
        """Decide 1 to gamma + 1 more tokens of every unfinished row. gamma 0 is plain decoding.

        ValueError for a gamma that this engine does not draft, and without a prefill.
        """
        self.need_text()
        if not 0 <= gamma <= self.gamma:
            raise ValueError(f"gamma {gamma} must be in 0..{self.gamma}, what this engine drafts")
        if gamma:
            self.refresh()
        elif self.drafter and not self.behind:
            self.n_read, self.behind = self.seq_len - 2, True
        if self.graphs:
            self.prepare(gamma)
            self.rounds[gamma]()
        else:
            self.eager_round(gamma)
        self.host_rounds += 1

    def prepare(self, gamma: int) -> None:
        """Capture the round now, where rounds are captured, and not when it is first needed."""
        if self.graphs and gamma not in self.rounds:
            self.rounds[gamma] = self.capture(lambda: self.eager_round(gamma))

    @torch.inference_mode()
    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        """The work as one CUDA graph; the work itself on a CPU, or where nothing is compiled.

        It must read and write static tensors only. Before it is captured it runs a few times from
        the same state, which is put back: nothing can be compiled during a capture. A replay
        returns the tensors of the capture, written anew.
        """
        if not self.graphs:
            return work
        state = (self.seq_len, self.finished, self.accepted, self.drafted, self.n_rounds)
        before, random_state = [t.clone() for t in state], self.generator.get_state()
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UP):
                work()
                for t, value in zip(state, before, strict=True):
                    t.copy_(value)
        here.wait_stream(self.stream)
        self.generator.set_state(random_state)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        with (
            torch.compiler.set_stance("fail_on_recompile"),
            torch.cuda.graph(graph, pool=self.pool, stream=self.stream),
        ):
            result = work()
        self.newest_graph = graph

        @torch.inference_mode()  # as in the capture: the generator's state is of that mode
        def replay() -> object:
            graph.replay()
            return result

        return replay

    @torch.inference_mode()
    def run(
        self,
        gamma: int,
        most: float = math.inf,
        on_round: Callable[[], None] = lambda: None,  # called after every round
    ) -> None:
        """Rounds until every row is finished, at most so many."""
        done = LaggingFlag(self.finished) if self.graphs else self.finished.all
        while most > 0 and not done():
            self.round(gamma)
            on_round()
            most -= 1

    def stats(self) -> Stats:
        """The counts since the last rewind. Copies to the host."""
        decoded = (self.seq_len - self.prompt_len - 1).sum().item()
        rounds = self.n_rounds.item()
        most = int(self.drafted.nonzero().max()) if rounds else 0
        counts = (h[: most + 1].tolist() for h in (self.accepted, self.drafted))
        return Stats(rounds, decoded, *counts)

    def outputs(self) -> list[list[int]]:
        """The new tokens of every row, EOS included. Copies to the host."""
        rows = zip(
            self.tokens.tolist(), self.prompt_len.tolist(), self.seq_len.tolist(), strict=True
        )
        return [tokens[start:end] for tokens, start, end in rows]


def decode(
    engine: Engine,
    gamma: int | None = None,  # draft tokens per round, 0..engine.gamma; None: engine.gamma
    on_round: Callable[[], None] = lambda: None,  # called after every round
) -> Stats:
    """Run rounds until every row is finished. The engine must have been prefilled or rewound."""
    engine.need_text()
    engine.run(engine.gamma if gamma is None else gamma, on_round=on_round)
    return engine.stats()


class LaggingFlag:
    """Whether all of some flags on the device are set, as it was LAG calls ago.

    The answer of each call is copied to pinned memory behind what the device has to do, and read
    LAG calls later: the host waits for work of then, while that of the calls since is queued.
    """

    def __init__(self, flags: Tensor) -> None:  # [B] bool
        self.flags = flags
        self.copies = torch.zeros(LAG + 1, dtype=torch.bool, pin_memory=True)
        self.events = [torch.cuda.Event() for _ in range(LAG + 1)]
        self.calls = 0

    def __call__(self) -> bool:
        i = self.calls % (LAG + 1)
        self.copies[i].copy_(self.flags.all(), non_blocking=True)
        self.events[i].record()
        self.calls += 1
        oldest = self.calls % (LAG + 1)
        if self.calls <= LAG:
            return False
        self.events[oldest].synchronize()
        return bool(self.copies[oldest])


def generate(
    engine: Engine,
    prompts: list[list[int]],  # one per row of the engine
    max_new_tokens: int,
    eos_ids: tuple[int, ...] = (),
) -> tuple[list[list[int]], Stats]:
    """Continue the prompts with the engine's own drafting: new tokens per row, and the counts.

    ValueError for prompts and limits that do not fit the engine.
    """
    engine.prefill(prompts, [max_new_tokens] * len(prompts), eos_ids)
    stats = decode(engine)
    return engine.outputs(), stats
