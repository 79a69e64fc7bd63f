"""The numbers of a run: as JSON, as a table, and as a verdict on the speedup.

`build` puts them into one dictionary, once. That dictionary is the JSON, and the table and the
verdict are printed from it, so that the three cannot say different things. No engine is touched
here and no torch is needed. Keys that do not apply are absent, not null.

* "speculative" is the run that was asked for, "baseline" plain decoding from the same prefill; a
  run that drafts nothing is a baseline itself.
* Compiling and prefill are in no decode tokens/s; a row's first token belongs to the prefill.
* `T_T`, `T_D`, `T_V` are one plain step, one draft step, one verification (`measure.step_times`).
* Acceptance figures have vLLM's definitions (`Stats`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """One timed decoding of a batch."""

    seconds: float  # decoding alone
    outputs: list[list[int]]  # new tokens of every row
    rounds: int  # of the slowest row
    row_rounds: int  # summed over the rows
    decoded_tokens: int  # all rows, without the first tokens, which the prefill decided
    acceptance: dict  # figures, as the JSON has them; none if nothing was drafted

    @property
    def tokens_per_second(self) -> float:
        """Of the whole batch, which ends with its slowest row."""
        return self.decoded_tokens / self.seconds

    @property
    def ms_per_token(self) -> float:
        """Milliseconds from a token to the next one of its row, while the row runs."""
        ms_per_round = 1e3 * self.seconds / max(self.rounds, 1)
        return ms_per_round * self.row_rounds / max(self.decoded_tokens, 1)


@dataclass(frozen=True, slots=True)
class Measurement:
    """Everything that a report is made of."""

    setting: dict  # what ran, as the JSON has it: environment, model, sampling, plan
    prompt_lengths: list[int]  # tokens, by row
    compile_seconds: float
    prefill_seconds: float
    draft_prefill_seconds: float | None  # of a draft model of its own
    step_ms: dict[str, float]  # target_step_ms, and drafting draft_step_ms, verify_ms, accept_ms
    step_bytes: int  # that a plain step must read
    peak_memory_bytes: int
    main: Run
    baseline: Run | None  # plain decoding from the same prefill
    differences: list[dict] | None  # rows that are not the baseline's; None: they need not be


def build(m: Measurement, texts: list[str], end_ids: tuple[int, ...]) -> dict:
    """The object that `--json` writes; `texts` are those of the outputs, `end_ids` end a row."""
    outputs = zip(m.prompt_lengths, m.main.outputs, texts, strict=True)
    result = m.setting | {
        "target_step_bytes": m.step_bytes,
        "outputs": [
            {
                "prompt_length": n,
                "token_ids": ids,
                "text": text,
                "finish_reason": "eos" if ids[-1] in end_ids else "length",
            }
            for n, ids, text in outputs
        ],
    }
    main = run_numbers(m, m.main) | m.step_ms
    if m.draft_prefill_seconds is not None:
        main["draft_prefill_seconds"] = m.draft_prefill_seconds
    drafts = result["plan"]["gamma"] or "candidates" in result["plan"]
    result["speculative" if drafts else "baseline"] = main
    if m.baseline:
        result["baseline"] = run_numbers(m, m.baseline)
        if m.main.decoded_tokens:  # else the prefill has decided everything
            result["speedup"] = m.main.tokens_per_second / m.baseline.tokens_per_second
            result["row_speedup"] = m.baseline.ms_per_token / m.main.ms_per_token
    if m.differences is not None:
        result["identical"] = not m.differences
        if m.differences:
            result["differences"] = m.differences
    return result


def run_numbers(m: Measurement, run: Run) -> dict:
    """One run's figures; those of acceptance only if it drafted."""
    return {
        "decode_tokens_per_second": run.tokens_per_second,
        "ms_per_token": run.ms_per_token,  # while a row runs
        "decode_seconds": run.seconds,
        "rounds": run.rounds,
        "row_rounds": run.row_rounds,
        "prefill_seconds": m.prefill_seconds,
        "compile_seconds": m.compile_seconds,
        "generated_tokens": sum(map(len, run.outputs)),
        "peak_memory_bytes": m.peak_memory_bytes,
        "target_step_ms": m.step_ms["target_step_ms"],
        **run.acceptance,
    }


def table(result: dict) -> str:
    """The numbers of the runs, side by side, and a line for the steps."""
    plan, n_rows = result["plan"], len(result["outputs"])
    name = "auto" if "candidates" in plan else plan["strategy"]
    keys = {"plain": "baseline", name: "speculative"}
    runs = {name: result[key] for name, key in keys.items() if key in result}
    lines = [f"{'':24}" + "".join(f"{name:>28}" for name in runs)]
    for label, value in {
        "decode tokens/s": lambda r: f"{r['decode_tokens_per_second']:.1f}",
        "ms per token": lambda r: f"{r['ms_per_token']:.2f}",
        "rounds, slowest row": lambda r: f"{r['rounds']}",
        "rounds, mean row": lambda r: f"{r['row_rounds'] / n_rows:.1f}",
        "mean acceptance length": lambda r: f"{r.get('mean_acceptance_length', 1):.2f}",
    }.items():
        lines.append(f"{label:24}" + "".join(f"{value(r):>28}" for r in runs.values()))
    main = result["speculative" if "speculative" in result else "baseline"]
    if "draft_acceptance_rate" in main:
        rates = " ".join(f"{rate:.3f}" for rate in main["acceptance_rate_per_position"])
        lines.append(f"acceptance rate {main['draft_acceptance_rate']:.3f}, by position {rates}")
    return "\n".join([*lines, steps(result, main)])


def steps(result: dict, main: dict) -> str:
    """What single steps took, how fast a plain one reads, and the peak of memory."""
    t_target = main["target_step_ms"]
    line = f"T_T {t_target:.1f} ms"
    if "verify_ms" in main:
        t_verify = main["verify_ms"]
        line += f", T_D {main['draft_step_ms']:.1f} ms"
        line += (
            f", T_V({result['plan']['gamma']}) {t_verify:.1f} ms = {t_verify / t_target:.2f} T_T"
        )
        if result["sampling"]["temperature"]:
            line += f", of which accepting {main['accept_ms']:.1f} ms"
    bandwidth = result["target_step_bytes"] / t_target / 1e6
    memory = main["peak_memory_bytes"] / 2**30
    return f"{line}; T_T reads {bandwidth:.1f} GB/s; peak memory {memory:.1f} GiB"


def verdict(result: dict) -> str:
    """Speedup, and whether the outputs are the same; if not, where they part and how closely."""
    if "speedup" not in result:
        return "nothing was left to decode after the first tokens"
    main, n_rows = result["speculative"], len(result["outputs"])
    lines = [
        f"speedup {result['speedup']:.2f}x over plain decoding for the whole batch, "
        f"{result['row_speedup']:.2f}x while a row runs: the batch waits for its slowest row, "
        f"{main['rounds']} rounds where the mean row needs {main['row_rounds'] / n_rows:.0f}"
    ]
    if "identical" in result:
        differences = result.get("differences", [])
        lines.append(f"{n_rows - len(differences)} of {n_rows} outputs identical")
        for d in differences:
            margin = f"{d['top2_logit_margin']:.2g}" if "top2_logit_margin" in d else "not known"
            lines.append(
                f"row {d['row']} differs from new token {d['new_token']}; "
                f"top-2 logit margin {margin}"
            )
    return "\n".join(lines)
