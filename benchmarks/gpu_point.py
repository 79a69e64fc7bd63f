"""What `gpu.py` measures at one batch size and context: steps, rounds, variants of the kernels.

All is real work on random weights and random K and V, but how many drafts stay is drawn, at rates
that the paper or a run has measured: then tokens/s are those of a batch of which no row is
finished, Omega tokens a round. Times are medians of CUDA graph replays by device events (on a CPU:
of calls by clock). A floor is the bytes that must be read, over the bandwidth measured before.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from synthetic import SyntheticEngine, random_prompts

import kv_cache
from acceptance import omega
from config import kv_bytes_per_token, layer_params
from device import timed
from kernels import compile_blocks, kernel_options
from kv_cache import KVCache
from model import Transformer
from policies import Strategy
from sampling import Sampling
from spec_decode import Engine

POLICY_GAMMA = 5  # draft caches are made for it and serve all smaller ones
ROUNDS = 16  # that are timed together; a policy selects again every 4
NEW_TOKENS = ROUNDS * (POLICY_GAMMA + 1) + 2  # per row: none is finished meanwhile


@dataclass(frozen=True)
class Settings:
    """How much of it."""

    budgets: tuple[int, ...]  # of T_D
    gammas: tuple[int, ...]  # of T_V
    round_gammas: tuple[int, ...]  # of whole rounds
    repeats: int


def milliseconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of the work on the device, after one run of it."""
    work()
    if device.type != "cuda":
        return 1e3 * statistics.median(timed(device, work)[0] for _ in range(repeats))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
              for _ in range(repeats)]  # fmt: skip
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events)


def bandwidth(device: torch.device, n_bytes: int) -> dict[str, float]:
    """Bytes/s of a copy (read and written) and of a sum (read), of a buffer beyond any cache."""
    a = torch.randn(n_bytes // 4, device=device)
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / (1e-3 * milliseconds(lambda: b.copy_(a), device, 10))
    read = a.nbytes / (1e-3 * milliseconds(lambda: a.sum(), device, 10))
    return {"copy_bytes_per_s": copy, "read_bytes_per_s": read, "bytes_per_s": max(copy, read)}


def kernel_milliseconds(work: Callable[[], object], device: torch.device) -> float | None:
    """What the kernels of the work take together, by the profiler; None on a CPU."""
    if device.type != "cuda":
        return None
    n = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(n):
            work()
        torch.cuda.synchronize(device)
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.time_range.elapsed_us() for e in kernels) / n / 1e3


class Point:
    """One batch size and context: an engine with a full cache, and what is measured on it."""

    def __init__(
        self, model: Transformer, B: int, S: int, per_second: float, settings: Settings
    ) -> None:
        self.model, self.B, self.S, self.settings = model, B, S, settings
        self.per_second, self.device = per_second, model.norm.weight.device
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.engine = SyntheticEngine(model, B, S + NEW_TOKENS, Strategy(), Sampling())
        prompts = random_prompts([S] * B, model.config.vocab_size)
        self.engine.prefill(prompts, [NEW_TOKENS] * B)
        self.weight_bytes = sum(p.nbytes for p in model.parameters())
        if not model.config.tie_embeddings:
            self.weight_bytes -= model.tok_embeddings.weight.nbytes  # of which B rows are read
        itemsize = self.engine.full.spec.stored_dtype.itemsize
        self.slot_bytes = B * kv_bytes_per_token(model.config, itemsize)

    def against_floor(self, ms: float, n_slots: int, saved: int = 0) -> dict:
        """With the floor: the time to read the weights and n_slots tokens of KV per row."""
        n_bytes = self.weight_bytes - saved + n_slots * self.slot_bytes
        floor = 1e3 * n_bytes / self.per_second
        return {"ms": ms, "floor_ms": floor, "over_floor": ms / floor}

    def time(self, work: Callable[[], object]) -> float:
        return milliseconds(work, self.device, self.settings.repeats)

    def decide(self, drafts: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """A forward of the target alone, reading the full cache (None) and writing only that."""
        token, pos = self.engine.batch.newest()
        pos = pos + torch.arange(drafts.shape[1] + 1, device=pos.device)
        tokens = torch.cat((token, drafts), dim=1)
        return self.model(tokens, pos, cache or self.engine.full).argmax(dim=-1)

    def verify_ms(self, gamma: int, cache: KVCache | None = None) -> float:
        """T_V of so many drafts; of none: T_T."""
        drafts = self.engine.batch.tokens[:, :gamma].contiguous()
        return self.time(self.engine.capture(partial(self.decide, drafts, cache)))

    def plain(self) -> dict:
        """T_T, and what its kernels take together."""
        engine, numbers = self.engine, {}
        engine.use(Strategy())
        nothing = engine.draft(0)
        seconds, work = timed(self.device, lambda: engine.capture(lambda: self.decide(nothing)))
        numbers["compile_and_capture_seconds"] = seconds
        numbers["T_T"] = self.against_floor(self.time(work), self.S)
        kernels = kernel_milliseconds(work, self.device)
        numbers["kernels_ms"] = kernels
        numbers["replay_over_kernels"] = kernels and numbers["T_T"]["ms"] / kernels
        return numbers

    def verifications(self, gammas: tuple[int, ...]) -> dict:
        """T_V against the same floor as T_T."""
        self.engine.use(Strategy())
        return {f"T_V({g})": self.against_floor(self.verify_ms(g), self.S) for g in gammas}

    def drafts(self, budgets: tuple[int, ...], weights: str = "same") -> dict:
        """T_D of the streaming draft, with weights of that kind."""
        found = {}
        for budget in budgets:
            strategy = Strategy("streaming", POLICY_GAMMA, budget, weights=weights)
            found[f"T_D({budget})"] = self.draft_step(strategy)
        return found

    def draft_step(self, strategy: Strategy) -> dict:
        """T_D; the engine drafts like this from here on."""
        self.engine.use(strategy)
        work = self.engine.capture(lambda: self.engine.draft(strategy.gamma))
        c, size = self.model.config, self.engine.full.spec.dtype.itemsize
        saved = (size - 1) * c.n_layer * layer_params(c) if strategy.weights == "fp8" else 0
        ms = self.time(work) / strategy.gamma
        return self.against_floor(ms, min(strategy.budget, self.S), saved)

    def tokens_per_second(self, gamma: int, rate: float = 0.0) -> float:
        """Of whole rounds, selections and the host's part included, while no row is finished."""
        seconds: list[float] = []
        self.engine.accept_at(rate)
        for _ in range(4):  # the first one compiles and captures
            self.engine.rewind()
            seconds.append(timed(self.device, lambda: self.engine.run(gamma, ROUNDS))[0])
        return self.B * omega(gamma, rate) * ROUNDS / statistics.median(seconds[1:])

    def rounds(self, strategy: Strategy, rates: tuple[float, ...]) -> dict:
        """Plain decoding without a drafter and beside one, and rounds at these acceptances."""
        self.engine.use(Strategy())
        plain = self.tokens_per_second(0)
        numbers: dict = {"plain_tokens_per_s": plain, "runs": []}
        numbers["T_D"] = self.draft_step(strategy)
        numbers["gamma_0_beside_a_drafter"] = self.tokens_per_second(0) / plain
        for gamma in self.settings.round_gammas:
            for rate in rates:
                speed = self.tokens_per_second(gamma, rate)
                numbers["runs"].append({
                    "policy": strategy.policy, "budget": strategy.budget, "gamma": gamma,
                    "weights": strategy.weights, "synthetic_acceptance": rate,
                    "tokens_per_s": speed, "speedup": speed / plain,
                })  # fmt: skip
        return numbers

    def selection(self, strategy: Strategy) -> dict:
        """One selection of all rows, beside a plain step; ms."""
        self.engine.use(strategy)
        self.engine.refresh()
        return {"ms": self.time(self.engine.drafter.select), "T_T_ms": self.verify_ms(0)}

    @contextmanager
    def kernels(self, **changes: object) -> Iterator[None]:
        """Inside, the split-KV kernel has these settings instead."""

        def changed(*args, **more) -> dict | None:
            options = kernel_options(*args, **more)
            return options and options | changes

        torch._dynamo.reset()  # what was compiled for others is not looked up again
        with mock.patch.object(kv_cache, "kernel_options", changed):
            yield
        torch._dynamo.reset()

    def sweep(self, gamma: int, changes: list[dict]) -> list[dict]:
        """T_V(gamma) with other settings of the kernel; ms. On a CPU there are none."""
        self.engine.use(Strategy())
        found = [{"ms": self.verify_ms(gamma)}]
        for change in changes:
            try:
                with self.kernels(**change):
                    found.append(change | {"ms": self.verify_ms(gamma)})
            except Exception as e:  # more than a multiprocessor has
                found.append(change | {"failed": f"{type(e).__name__}: {e}"[:200]})
        return found

    def split_sweep(self, gamma: int, programs_per_sm: tuple[int, ...]) -> dict[int, float]:
        """T_V(gamma) by split-KV programs per multiprocessor; ms."""
        self.engine.use(Strategy())
        full, times = self.engine.full, {}
        for n in programs_per_sm:
            cache = replace(full, spec=replace(full.spec, programs_per_sm=n))
            times[n] = self.verify_ms(gamma, cache)
        return times

    def exact(self, gamma: int) -> dict:
        """What a plain step of `--exact` takes, and whether bits are those of verifications.

        The newest token is decided as the first, and as the last of gamma + 1, in its own shape
        each. Bits are compared with those of a plain step, over all rows.
        """
        engine, full = self.engine, self.engine.full
        engine.use(Strategy())
        fixed = replace(full, spec=replace(full.spec, exact=gamma))
        found = {"T_T_ms": self.verify_ms(0, full), "exact_T_T_ms": self.verify_ms(gamma, fixed)}
        found["n_pieces"] = fixed.access(torch.zeros_like(self.places(0, gamma)))[0].n_pieces
        for name, cache, T in (("exact", fixed, gamma + 1), ("usual", full, 1)):
            last = self.logits(gamma, gamma + 1, cache)[:, -1]
            first = self.logits(0, T, cache)[:, 0]
            again = self.logits(0, T, cache)[:, 0]
            found[f"{name}_rows_with_equal_bits"] = int((first == last).all(dim=-1).sum())
            found[f"{name}_largest_difference"] = float((first - last).abs().max())
            found[f"{name}_repeats"] = bool(torch.equal(first, again))
        return found | {"rows": self.B}

    def places(self, back: int, gamma: int) -> torch.Tensor:  # [B, gamma + 1]
        """Of tokens that follow each other from the newest one on, or from some before it."""
        pos = self.engine.batch.newest()[1] - back
        return pos + torch.arange(gamma + 1, device=pos.device)

    def logits(self, back: int, T: int, cache: KVCache) -> torch.Tensor:  # [B, T, V]
        """After T tokens of every row, from `back` before the newest one on."""
        pos = self.places(back, T - 1)
        return self.model(self.engine.batch.tokens.gather(1, pos), pos, cache).float()

    def baselines(self) -> dict:
        """The same plain step with SDPA, and as gpt-fast compiles it; ms."""
        engine, numbers = self.engine, {}
        engine.use(Strategy())
        token, pos = engine.batch.newest()
        cache = replace(engine.full, spec=replace(engine.full.spec, flex=False))
        other = same_weights(self.model)
        if self.model.compiled:
            compile_blocks(other)
        numbers["sdpa_ms"] = self.time(
            engine.capture(lambda: other(token, pos, cache).argmax(dim=-1))
        )
        for buffer in cache.k + cache.v:
            torch._dynamo.mark_static_address(buffer)
        whole = same_weights(self.model)
        how = {"mode": "reduce-overhead"} if token.is_cuda else {"backend": "eager"}  # at toy sizes
        gpt_fast = torch.compile(
            lambda token, pos: whole(token, pos, cache).argmax(dim=-1),
            fullgraph=True, dynamic=False, **how,
        )  # fmt: skip
        for _ in range(3):  # compile, record, replay
            gpt_fast(token, pos)
        numbers["gpt_fast_style_ms"] = self.time(lambda: gpt_fast(token, pos))
        return numbers

    def prefill(self, chunks: tuple[int, ...]) -> dict:
        """One row's prompt by tokens per forward: tokens/s, FLOP/s of its matrices and attention,
        bytes beside weights and caches."""
        c, found = self.model.config, {}
        flops = 2 * c.n_layer * layer_params(c) * self.S  # no logits but the last
        flops += 4 * c.n_layer * c.n_head * c.head_dim * self.S**2 / 2
        usual, cuda = self.engine.prefill_chunk, self.device.type == "cuda"
        for chunk in chunks:
            self.engine.prefill_chunk = min(chunk, self.engine.max_len)
            work = lambda: [*Engine.read_row(self.engine, 0, self.S)]  # noqa: E731
            if cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device) if cuda else 0
            seconds = 1e-3 * milliseconds(work, self.device, 1)
            found[chunk] = {"tokens_per_s": self.S / seconds, "flops_per_s": flops / seconds}
            if cuda:
                found[chunk]["work_bytes"] = torch.cuda.max_memory_allocated(self.device) - before
        self.engine.prefill_chunk = usual
        return found


def same_weights(model: Transformer) -> Transformer:
    """Another module around the same parameters, with nothing compiled."""
    with torch.device("meta"):
        other = Transformer(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.rope_freq = model.rope_freq
    return other.eval().requires_grad_(False)
