"""The numbers of a run: as a table, as a verdict on the speedup, and as JSON.

* compile and prefill are never part of decode tokens/s; a row's first token belongs to the prefill.
* `T_T`, `T_D`, `T_V` are medians of repeated single steps from the state after the prefill.
* acceptance figures have vLLM's definitions (`spec_decode.Stats`).
"""

import platform
from dataclasses import asdict, dataclass, replace

import torch

from auto import Auto
from device import device_name, peak_memory_bytes
from drafters import ModelDrafter
from kv_cache import KVCache
from spec_decode import Engine, Stats
from tokenizer import Tokenizer, continuation


@dataclass(slots=True)
class Run:
    """One timed decoding of the batch."""

    stats: Stats
    outputs: list[list[int]]
    seconds: float  # decoding alone

    @property
    def tokens_per_second(self) -> float:
        return self.stats.decoded_tokens / self.seconds

    @property
    def ms_per_token(self) -> float:
        """Milliseconds from a token to the next one of its row, while the row runs."""
        ms_per_round = 1e3 * self.seconds / max(self.stats.rounds, 1)
        return ms_per_round * self.stats.row_rounds / max(self.stats.decoded_tokens, 1)


@dataclass(slots=True)
class Report:
    """Everything that the table and the JSON show."""

    engine: Engine
    prompts: list[list[int]]
    compile_seconds: float
    prefill_seconds: float
    draft_prefill_seconds: float | None  # of a draft model of its own
    step_ms: dict[str, float]  # target_step_ms, and drafting draft_step_ms, verify_ms, accept_ms
    main: Run
    baseline: Run | None  # plain decoding, with --compare
    auto: Auto | None  # what decided, if anything did

    @property
    def speedup(self) -> float | None:
        """Over the baseline; None without one, or when the prefill already decided everything."""
        if self.baseline is None or not self.main.stats.decoded_tokens:
            return None
        return self.main.tokens_per_second / self.baseline.tokens_per_second

    @property
    def row_speedup(self) -> float | None:
        """The same while a row runs: a static batch as a whole waits for its slowest row."""
        if self.speedup is None:
            return None
        return self.baseline.ms_per_token / self.main.ms_per_token

    @property
    def gamma(self) -> int:
        """Draft tokens per round, where it was chosen the first choice; 0: none."""
        return self.auto.gamma if self.auto else self.engine.gamma

    @property
    def synthetic(self) -> float | None:
        return self.engine.strategy.synthetic_acceptance

    @property
    def identical(self) -> list[bool] | None:
        """Per row: the same tokens as the baseline; None where they need not be the same."""
        if self.baseline is None or not self.engine.sampling.greedy or self.synthetic is not None:
            return None
        pairs = zip(self.main.outputs, self.baseline.outputs, strict=True)
        return [ours == theirs for ours, theirs in pairs]


def table(report: Report) -> str:
    """The numbers of both runs, side by side."""
    engine, stats, ms = report.engine, report.main.stats, report.step_ms
    synthetic = "" if report.synthetic is None else f" (synthetic {report.synthetic})"
    name = engine.strategy.policy + synthetic if report.gamma else "plain"
    if report.auto:
        name = "auto"
    runs = {"plain": report.baseline} if report.baseline else {}
    runs[name] = report.main
    lines = [f"{'':24}" + "".join(f"{head:>28}" for head in runs)]
    for label, value in {
        "decode tokens/s": lambda r: f"{r.tokens_per_second:.1f}",
        "ms per token": lambda r: f"{r.ms_per_token:.2f}",
        "rounds, slowest row": lambda r: f"{r.stats.rounds}",
        "rounds, mean row": lambda r: f"{r.stats.row_rounds / len(r.outputs):.1f}",
        "mean acceptance length": lambda r: f"{r.stats.mean_acceptance_length:.2f}",
    }.items():
        lines.append(f"{label:24}" + "".join(f"{value(r):>28}" for r in runs.values()))
    if stats.drafts:
        rates = " ".join(f"{rate:.3f}" for rate in stats.acceptance_rate_per_position)
        lines.append(
            f"acceptance rate {stats.draft_acceptance_rate:.3f}, by position {rates}{synthetic}"
        )
    steps = f"T_T {ms['target_step_ms']:.1f} ms"
    if report.gamma:
        ratio = ms["verify_ms"] / ms["target_step_ms"]
        steps += f", T_D {ms['draft_step_ms']:.1f} ms"
        steps += f", T_V({report.gamma}) {ms['verify_ms']:.1f} ms = {ratio:.2f} T_T"
        if not engine.sampling.greedy:
            steps += f", of which accepting {ms['accept_ms']:.1f} ms"
    bandwidth = step_bytes(engine, report.prompts) / ms["target_step_ms"] / 1e6
    memory = peak_memory_bytes(engine.tokens.device) / 2**30
    lines.append(f"{steps}; T_T reads {bandwidth:.1f} GB/s; peak memory {memory:.1f} GiB")
    return "\n".join(lines)


def step_bytes(engine: Engine, prompts: list[list[int]]) -> int:
    """Bytes that a plain step after the prefill must read: K and V of the prompts, the weights.

    A sliding window sees the newest tokens of a prompt only. An embedding table of its own gives a
    row per token; tied to the output layer it is read whole, and counts once.
    """
    spec, config, table = engine.full.spec, engine.model.config, engine.model.tok_embeddings.weight
    n_seen = sum(min(len(prompt), config.sliding_window or len(prompt)) for prompt in prompts)
    weight_bytes = sum(p.nbytes for p in engine.model.parameters())
    if not config.tie_embeddings:
        weight_bytes -= table.nbytes - len(prompts) * table[0].nbytes
    return n_seen * spec.bytes_per_slot // spec.batch_size + weight_bytes


@torch.inference_mode()
def top2_margin(engine: Engine, ids: list[int]) -> float:
    """Difference of the two largest logits after the tokens `ids`, read into a cache of its own."""
    spec = replace(engine.full.spec, batch_size=1)
    cache = KVCache.empty(spec, engine.full.capacity)  # of one shape with a row: nothing compiles
    tokens = torch.zeros(1, engine.full.capacity, dtype=torch.int64, device=spec.device)
    tokens[0, : len(ids)] = torch.tensor(ids)
    x = engine.model.prefill(tokens, len(ids), engine.prefill_chunk, cache)
    first, second = engine.model.logits(x).float().topk(2).values.tolist()
    return first - second


def verdict(report: Report) -> str:
    """Speedup, and whether the outputs are the same; if not, where they part and how closely."""
    if report.speedup is None:
        return "nothing was left to decode after the first tokens"
    stats = report.main.stats
    line = (
        f"speedup {report.speedup:.2f}x over plain decoding for the whole batch, "
        f"{report.row_speedup:.2f}x while a row runs: the batch waits for its slowest row, "
        f"{stats.rounds} rounds where the mean row needs "
        f"{stats.row_rounds / len(report.prompts):.0f}"
    )
    if report.synthetic is not None:
        return f"{line}\n(synthetic acceptance {report.synthetic}: the outputs mean nothing)"
    if report.identical is None:
        return line
    lines = [line, f"{sum(report.identical)} of {len(report.prompts)} outputs identical"]
    rows = zip(report.prompts, report.main.outputs, report.baseline.outputs, strict=True)
    for row, (prompt, ours, theirs) in enumerate(rows):
        if ours != theirs:
            same = [a == b for a, b in zip(ours, theirs, strict=False)]
            at = (same + [False]).index(False)
            margin = top2_margin(report.engine, prompt + theirs[:at])
            lines.append(f"row {row} differs from new token {at}; top-2 logit margin {margin:.2g}")
    return "\n".join(lines)


def environment(engine: Engine) -> dict:
    device = engine.tokens.device
    return {
        "device": device.type,
        "device_name": device_name(device),
        "dtype": str(engine.full.spec.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "compiled": engine.model.compiled,
    }


def run_json(report: Report, r: Run) -> dict:
    """One run's figures; the speculative keys only if it drafted."""
    stats = r.stats
    result = {
        "decode_tokens_per_second": r.tokens_per_second,
        "ms_per_token": r.ms_per_token,
        "decode_seconds": r.seconds,
        "prefill_seconds": report.prefill_seconds,
        "compile_seconds": report.compile_seconds,
        "generated_tokens": sum(map(len, r.outputs)),
        "peak_memory_bytes": peak_memory_bytes(report.engine.tokens.device),
        "target_step_ms": report.step_ms["target_step_ms"],
    }
    if stats.drafts:
        result |= {
            "mean_acceptance_length": stats.mean_acceptance_length,
            "draft_acceptance_rate": stats.draft_acceptance_rate,
            "acceptance_rate_per_position": stats.acceptance_rate_per_position,
            "accepted_histogram": stats.accepted_histogram,
            **report.step_ms,
        }
        if report.draft_prefill_seconds is not None:
            result["draft_prefill_seconds"] = report.draft_prefill_seconds
    return result


def to_json(report: Report, tokenizer: Tokenizer) -> dict:
    """The object that `--json` writes; keys that do not apply are absent."""
    engine, strategy = report.engine, report.engine.strategy
    plan = {"strategy": "none", "gamma": 0}
    if report.gamma:
        plan = {"strategy": strategy.policy, "gamma": engine.gamma}
        if strategy.policy not in ("full", "ngram"):
            plan["draft_budget"] = strategy.budget
        if engine.drafter.select_every:
            plan["select_every"] = engine.drafter.select_every
    if report.auto:
        plan |= report.auto.decision() | {"gamma": report.auto.gamma}
    if report.synthetic is not None:
        plan["synthetic_acceptance"] = report.synthetic
    eos = set(engine.eos.tolist())
    result = {
        "environment": environment(engine),
        "model": asdict(engine.model.config),
        "plan": plan,
        "outputs": [
            {
                "prompt_length": len(prompt),
                "token_ids": ids,
                "text": continuation(tokenizer, prompt, ids),
                "finish_reason": "eos" if ids[-1] in eos else "length",
            }
            for prompt, ids in zip(report.prompts, report.main.outputs, strict=True)
        ],
    }
    if isinstance(engine.drafter, ModelDrafter):
        result["draft_model"] = asdict(engine.drafter.model.config)
    name = "speculative" if report.gamma or report.auto else "baseline"
    result[name] = run_json(report, report.main)
    if report.baseline:
        result["baseline"] = run_json(report, report.baseline)
    if report.speedup is not None:
        result["speedup"], result["row_speedup"] = report.speedup, report.row_speedup
    if report.identical is not None:
        result["identical"] = all(report.identical)
    return result
