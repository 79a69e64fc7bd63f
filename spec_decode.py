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
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drafters import MAX_GAMMA, Drafting, Text, check_drafting, draft_cache_bytes, make_drafter
from kv_cache import CacheSpec, KVCache, check_fits
from model import Transformer

MAX_EOS = 16  # tokens that may end a text
LAG = 2  # rounds that the host may be ahead of the device
WARM_UP = 3  # times that work runs before it is captured: compiling, autotuning, workspaces


@dataclass(frozen=True, slots=True)
class Sampling:
    """How logits become probabilities, for the target and the draft alike."""

    temperature: float = 0.0  # 0: greedy
    top_k: int | None = None  # keep the k likeliest tokens
    top_p: float | None = None  # then the smallest set with at least this much probability

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be a number >= 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be in (0, 1]")
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
        ordered = probs.sort(dim=-1, descending=True).values
        before = ordered.cumsum(dim=-1) - ordered  # probability of all likelier tokens
        least = ordered.masked_fill(before >= sampling.top_p, torch.inf).amin(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < least, 0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def sample(
    weights: Tensor,  # [..., V] float, >= 0 with a positive sum; need not be normalised
    u: Tensor,  # [...] uniforms in [0, 1)
) -> Tensor:  # [...] int64
    """Draw one index by inverting the cumulative distribution; never one of weight 0."""
    cdf = weights.cumsum(dim=-1)
    total = cdf[..., -1:]
    x = (u[..., None] * total).minimum(total * (1 - 2**-23))  # below the total, also in float32
    # The first crossing of positive weight: a parallel cumsum need not be monotone in float32.
    return ((cdf > x) & (weights > 0)).to(torch.uint8).argmax(dim=-1)


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


def accept_synthetic(
    rate: float,  # probability of each draft to be accepted, given that those before it were
    u_accept: Tensor,  # [B, gamma] uniforms
) -> Tensor:  # n_accepted [B]
    """Benchmarks only: a drawn number of accepted drafts, whatever the target says."""
    return (u_accept < rate).long().cumprod(dim=1).sum(dim=1)


class Engine:
    """One static batch: model, caches, state; `prefill`, then `round` until all rows are finished.

    The state is in tensors that are written in place. Rows are independent: each has its own
    prompt length, limit and end. A finished row keeps its length; what a round still writes for
    it lies at or past its newest token, where `rewind` and the next prefill overwrite it unseen.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,  # B
        max_len: int,  # tokens of the longest row, prompt and continuation together
        drafting: Drafting,
        sampling: Sampling,
        seed: int = 0,
        draft_model: Transformer | None = None,  # None: drafting needs none
    ) -> None:
        """Allocates the caches; ValueError if they will not fit into the memory that is free."""
        spec = CacheSpec.for_model(model, batch_size)
        self.model, self.sampling, self.max_len = model, sampling, max_len
        self.prefill_chunk = min(spec.prefill_chunk, max_len)
        n_slots = KVCache.round_up(spec, max_len + MAX_GAMMA + 1)  # a round may overshoot
        self.check(spec, drafting, draft_model, n_slots, n_slots * spec.bytes_per_slot)
        self.full = KVCache.empty(spec, n_slots)
        integers = {"dtype": torch.int64, "device": spec.device}
        self.tokens = torch.zeros(batch_size, n_slots, **integers)
        self.prompt_len = torch.ones(batch_size, **integers)
        self.seq_len = self.prompt_len + 1  # decided tokens
        self.limit = torch.ones(batch_size, **integers)  # most tokens a row may reach
        self.finished = torch.zeros(batch_size, dtype=torch.bool, device=spec.device)
        self.full.finished = self.finished  # such rows read no KV any more
        self.eos = torch.full((MAX_EOS,), -1, **integers)  # -1: none
        self.n_rounds = torch.zeros((), **integers)  # in which a row was not finished yet
        self.accepted = torch.zeros(MAX_GAMMA + 1, **integers)  # histograms, see Stats
        self.drafted = torch.zeros(MAX_GAMMA + 1, **integers)
        self.rows = torch.arange(batch_size, device=spec.device)[:, None]
        self.seed = seed
        self.generator = torch.Generator(spec.device)
        self.started = False  # nothing was prefilled yet
        self.graphs = model.compiled and spec.device.type == "cuda"
        if self.graphs:  # they share memory, which lives as long as one of them does
            self.pool, self.newest_graph = torch.cuda.graph_pool_handle(), None
            self.stream = torch.cuda.Stream()
        self.rounds: dict[int, Callable[[], object]] = {}  # by gamma, captured
        self.use(drafting, draft_model)

    def check(self, spec, drafting, draft_model, n_slots: int, other_bytes: int) -> None:
        """ValueError if these do not go together, or do not fit beside `other_bytes` more."""
        check_drafting(drafting, draft_model and draft_model.config, self.max_len)
        n_bytes = draft_cache_bytes(drafting, spec, draft_model, n_slots)

        def remedy(share: float) -> str:
            rows = int(share * spec.batch_size)
            fewer = f"--batch_size {rows} (the most that fits) or " if rows else ""
            return fewer + "a smaller --max_context"

        check_fits(other_bytes + n_bytes, spec.device, "the KV caches", remedy)

    def use(self, drafting: Drafting, draft_model: Transformer | None = None) -> None:
        """Draft like this from here on, between any two rounds; ValueError if it cannot be."""
        self.drafter = None  # its memory is free for the next,
        self.rounds = {gamma: work for gamma, work in self.rounds.items() if gamma == 0}  # so too
        self.check(self.full.spec, drafting, draft_model, self.full.capacity, 0)
        self.drafting = drafting
        self.gamma = drafting.gamma if drafting.enabled else 0  # most drafts a round can have
        if drafting.enabled:
            text = Text(self.tokens, self.seq_len, self.finished)
            self.drafter = make_drafter(drafting, self.model, self.full, text, draft_model)
        if self.started and self.drafter:
            for b, length in enumerate(self.seq_len.tolist()):
                self.drafter.prefill(b, length - 1)
            self.drafter.select()

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
        continuation of before, is not read again: the next turn of a conversation.
        """
        if len(eos_ids) > MAX_EOS:
            raise ValueError(f"{len(eos_ids)} tokens end a text; at most {MAX_EOS} are possible")
        self.eos.fill_(-1)
        self.eos[: len(eos_ids)] = torch.tensor(eos_ids, dtype=torch.int64)
        self.generator.manual_seed(self.seed)
        last = []
        for b, prompt in enumerate(prompts):
            held = self.held(b, prompt) if reuse and self.started else 0
            self.tokens[b, : len(prompt)] = torch.tensor(prompt)
            self.prompt_len[b] = len(prompt)
            self.limit[b] = len(prompt) + max_new_tokens[b]
            last.append(self.prefill_row(b, len(prompt), held))
            if self.drafter:
                self.drafter.prefill(b, len(prompt))
            on_row(b)
        logits = self.model.logits(torch.stack(last))  # [B, V]
        if self.sampling.greedy:
            first = logits.argmax(dim=-1)
        else:
            first = sample(logits_to_probs(logits, self.sampling), self.uniforms(1)[:, 0])
        self.tokens[self.rows[:, 0], self.prompt_len] = first
        self.started = True
        self.rewind()

    def held(self, b: int, prompt: list[int]) -> int:
        """How many of the prompt's tokens the row's cache holds, but not its last one."""
        n = min(len(prompt), int(self.seq_len[b])) - 1
        same = self.tokens[b, :n].cpu() == torch.tensor(prompt[:n])
        return int(same.long().cumprod(dim=0).sum())

    def prefill_row(self, b: int, length: int, held: int = 0) -> Tensor:
        """Hidden state [dim] of the row's last prompt token; its K and V are cached on the way."""
        tokens = self.tokens[b : b + 1]
        return self.model.prefill(tokens, length, self.prefill_chunk, self.full.row(b), held)

    def rewind(self) -> None:
        """Back to the end of the prefill: decode (again) from the same first tokens and seed."""
        self.generator.manual_seed(self.seed + 1)  # the prefill drew from `seed`
        first = self.tokens.gather(1, self.prompt_len[:, None])
        self.seq_len.copy_(self.prompt_len + 1)
        self.finished.copy_((first == self.eos).any(dim=1) | (self.seq_len >= self.limit))
        for count in (self.accepted, self.drafted, self.n_rounds):
            count.zero_()
        self.host_rounds = 0  # rounds since, as the host counts them
        if self.drafter:
            self.drafter.select()

    def uniforms(self, n: int) -> Tensor:  # [B, n] float32 in [0, 1)
        return torch.rand(len(self.rows), n, device=self.rows.device, generator=self.generator)

    def newest(self) -> tuple[Tensor, Tensor]:  # [B, 1] token, [B, 1] its position
        pos = self.seq_len[:, None] - 1
        return self.tokens.gather(1, pos), pos

    def draft(self, gamma: int) -> Draft:
        """gamma tokens per row from the drafter, one at a time."""
        token, _ = self.newest()
        B, V, device = len(token), self.model.config.vocab_size, token.device
        tokens = torch.empty(B, gamma, dtype=torch.int64, device=device)
        probs = None if self.sampling.greedy else torch.empty(B, gamma, V, device=device)
        u = None if self.sampling.greedy else self.uniforms(gamma)
        for i in range(gamma):
            logits = self.drafter.logits(i, token)
            if self.sampling.greedy:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                probs[:, i] = logits_to_probs(logits, self.sampling)
                token = sample(probs[:, i], u[:, i])[:, None]
            tokens[:, i] = token[:, 0]
        return Draft(tokens, probs)

    def verify(self, draft_tokens: Tensor) -> Tensor:  # [B, gamma] -> logits [B, gamma + 1, V]
        """The target's logits after the newest token and after each draft, in one pass."""
        token, pos = self.newest()
        gamma = draft_tokens.shape[1]
        pos = pos + torch.arange(gamma + 1, device=pos.device)
        cache = self.drafter.verify_cache if gamma else self.full
        return self.model(torch.cat((token, draft_tokens), dim=1), pos, cache)

    def accept(self, draft: Draft, logits: Tensor) -> tuple[Tensor, Tensor]:
        """n_accepted [B], next_token [B], by the rule that the sampling asks for."""
        gamma, rate = draft.tokens.shape[1], self.drafting.synthetic_acceptance
        if self.sampling.greedy:
            n_accepted, next_token = accept_greedy(draft.tokens, logits.argmax(dim=-1))
        else:
            u = self.uniforms(gamma + 1)
            target_probs = logits_to_probs(logits, self.sampling)
            n_accepted, next_token = accept_sampled(draft, target_probs, u[:, 1:], u[:, 0])
        if rate is not None:  # after doing all the work
            n_accepted = accept_synthetic(rate, self.uniforms(gamma))
        return n_accepted, next_token

    def commit(self, draft_tokens: Tensor, n_accepted: Tensor, next_token: Tensor) -> None:
        """Append accepted drafts and the next token, cut at EOS and at the limit, in place."""
        gamma = draft_tokens.shape[1]
        i = torch.arange(gamma + 1, device=draft_tokens.device)
        n = n_accepted[:, None]
        block = torch.where(i == n, next_token[:, None], F.pad(draft_tokens, (0, 1)))
        ends = (block[..., None] == self.eos).any(dim=-1) & (i <= n)
        until_eos = torch.where(ends, i + 1, gamma + 1).amin(dim=1)
        room = self.limit - self.seq_len
        n_new = torch.minimum(torch.minimum(n_accepted + 1, until_eos), room)
        n_new = n_new.masked_fill(self.finished, 0)
        # Tokens past seq_len are not decided yet, so writing all of them is harmless.
        self.tokens[self.rows, self.seq_len[:, None] + i] = block
        self.accepted[: gamma + 1] += ((i == n) & ~self.finished[:, None]).sum(dim=0)
        self.drafted[gamma] += (~self.finished).sum()
        self.n_rounds += (~self.finished).any()
        self.seq_len += n_new
        self.finished |= (ends & (i < n_new[:, None])).any(dim=1) | (self.seq_len >= self.limit)

    def round(self, gamma: int) -> None:
        """Decide 1 to gamma + 1 more tokens of every unfinished row. gamma 0 is plain decoding."""
        if self.graphs:
            self.prepare(gamma)
            self.rounds[gamma]()
        else:
            self.eager_round(gamma)

    def prepare(self, gamma: int) -> None:
        """Capture the round now, where rounds are captured, and not when it is first needed."""
        if self.graphs and gamma not in self.rounds:
            self.rounds[gamma] = self.capture(lambda: self.eager_round(gamma))

    def eager_round(self, gamma: int) -> None:
        draft = self.draft(gamma)
        logits = self.verify(draft.tokens)
        n_accepted, next_token = self.accept(draft, logits)
        self.commit(draft.tokens, n_accepted, next_token)

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

        def replay() -> object:
            graph.replay()
            return result

        return replay

    def run(
        self,
        gamma: int,
        most: float = math.inf,
        on_round: Callable[[], None] = lambda: None,  # called after every round
    ) -> None:
        """Rounds until every row is finished, at most so many; reselects when it is due."""
        done = LaggingFlag(self.finished) if self.graphs else self.finished.all
        every = self.drafter.select_every if gamma else 0
        while most > 0 and not done():
            self.round(gamma)
            self.host_rounds += 1
            if every and self.host_rounds % every == 0:
                self.drafter.select()
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
    gamma = engine.gamma if gamma is None else gamma
    if gamma > engine.gamma:
        raise ValueError(f"gamma {gamma} is more than the {engine.gamma} this engine was built for")
    engine.run(gamma, on_round=on_round)
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
    """Continue the prompts with the engine's own drafting: new tokens per row, and the counts."""
    with torch.inference_mode():
        engine.prefill(prompts, [max_new_tokens] * len(prompts), eos_ids)
        stats = decode(engine)
        return engine.outputs(), stats
