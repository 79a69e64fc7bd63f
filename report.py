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

from collections.abc import Callable
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
    result[leg(result["plan"])] = main
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


def leg(plan: dict) -> str:
    """The key of the run that was asked for."""
    return "speculative" if plan["gamma"] or "candidates" in plan else "baseline"


def run_numbers(m: Measurement, run: Run) -> dict:
    """One run's figures; those of acceptance only if it drafted."""
    return decoding_numbers(run) | {
        "prefill_seconds": m.prefill_seconds,
        "compile_seconds": m.compile_seconds,
        "peak_memory_bytes": m.peak_memory_bytes,
        "target_step_ms": m.step_ms["target_step_ms"],
    }


def decoding_numbers(run: Run) -> dict:
    """Those of the decoding alone."""
    return {
        "decode_tokens_per_second": run.tokens_per_second,
        "ms_per_token": run.ms_per_token,  # while a row runs
        "decode_seconds": run.seconds,
        "rounds": run.rounds,
        "row_rounds": run.row_rounds,
        "generated_tokens": sum(map(len, run.outputs)),
        **run.acceptance,
    }


def table(result: dict) -> str:
    """The numbers of the runs, side by side, and a line for the steps."""
    n_rows = len(result["outputs"])
    cells: dict[str, Callable[[dict], str]] = {
        "decode tokens/s": lambda r: f"{r['decode_tokens_per_second']:.1f}",
        "ms per token": lambda r: f"{r['ms_per_token']:.2f}",
        "rounds, slowest row": lambda r: f"{r['rounds']}",
        "rounds, mean row": lambda r: f"{r['row_rounds'] / n_rows:.1f}",
        "mean acceptance length": lambda r: f"{r.get('mean_acceptance_length', 1):.2f}",
    }
    lines = side_by_side(result, cells, 24)
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


@dataclass(frozen=True, slots=True)
class Line:
    """One of several runs from the same prefill: a line of the demo's table."""

    name: str  # who drafts, for people
    plan: dict  # the same for programs; its gamma is that of the steps
    temperature: float  # of all rows
    run: Run
    step_ms: dict[str, float]  # as in Measurement


def compared(lines: list[Line]) -> list[dict]:
    """What the JSON says of these runs, each beside the first one of its temperature, a plain one.

    `formula` is what a row should gain while it runs, by the steps' times and the tokens of a
    round: T_T * tokens / (gamma * T_D + T_V). Where the draft changed, it is that of the last steps
    timed. Speedups are absent where the prefill decided everything.
    """
    plain: dict[float, Run] = {}
    runs = []
    for line in lines:
        run, baseline = line.run, plain.setdefault(line.temperature, line.run)
        entry = line.plan | {"name": line.name, "temperature": line.temperature}
        entry |= decoding_numbers(run) | line.step_ms
        same = [a == b for a, b in zip(run.outputs, baseline.outputs, strict=True)]
        entry |= {"rows": len(same), "identical_rows": sum(same)}
        if run.decoded_tokens:
            entry["tokens_per_round"] = run.decoded_tokens / run.row_rounds
            entry["round_cost"] = round_cost(entry)
            entry["formula"] = entry["tokens_per_round"] / entry["round_cost"]
            entry["speedup"] = run.tokens_per_second / baseline.tokens_per_second
            entry["row_speedup"] = baseline.ms_per_token / run.ms_per_token
        runs.append(entry)
    return runs


def round_cost(run: dict) -> float:
    """Plain steps that a round takes."""
    if "verify_ms" not in run:
        return 1.0
    return (run["gamma"] * run["draft_step_ms"] + run["verify_ms"]) / run["target_step_ms"]


def compared_table(runs: list[dict]) -> str:
    """A line for each run, under its temperature."""
    columns: dict[tuple[str, str], Callable[[dict], str]] = {
        ("", "tokens/s"): lambda r: f"{r['decode_tokens_per_second']:.1f}",
        ("speedup:", "batch"): lambda r: f"{r['speedup']:.2f}",
        ("", "row"): lambda r: f"{r['row_speedup']:.2f}",
        ("by", "formula"): lambda r: f"{r['formula']:.2f}",
        ("accep-", "tance"): lambda r: f"{r['draft_acceptance_rate']:.2f}",
        ("tokens", "a round"): lambda r: f"{r['tokens_per_round']:.2f}",
        ("T_D", "ms"): lambda r: f"{r['draft_step_ms']:.1f}",
        ("T_V", "ms"): lambda r: f"{r.get('verify_ms', r['target_step_ms']):.1f}",
        ("same", "output"): lambda r: f"{r['identical_rows']}/{r['rows']}",
    }

    def cell(show: Callable[[dict], str], run: dict) -> str:
        try:
            return f"{show(run):>9}"
        except KeyError:  # does not apply
            return " " * 9

    lines = [" " * 24 + "".join(f"{title[i]:>9}" for title in columns) for i in range(2)]
    told = None
    for run in runs:
        if run["temperature"] != told:
            told = run["temperature"]
            lines.append(f"temperature {told}" if told else "greedy")
        lines.append(f"  {run['name']:22}" + "".join(cell(c, run) for c in columns.values()))
    return "\n".join(lines)


def lessons(runs: list[dict]) -> str:
    """What these runs show, in three lines; the last one says what to try next."""
    first = [r for r in runs if r["temperature"] == runs[0]["temperature"]]
    drafted = [r for r in first if "draft_acceptance_rate" in r and r["strategy"] != "auto"]
    if not drafted:
        return "nothing was left to decode after the first tokens"
    best = max(drafted, key=lambda r: r["speedup"])
    gained = "gained most" if best["speedup"] > 1 else "came nearest to plain decoding"
    why = (
        f"{best['name']} {gained}, {best['speedup']:.2f}x: a round of {best['gamma']} drafts costs "
        f"{best['round_cost']:.2f} plain steps and yields {best['tokens_per_round']:.2f} tokens"
    )
    if sampled := [r for r in runs if r["temperature"] != best["temperature"] and r["gamma"]]:
        most = max(sampled, key=lambda r: r["speedup"])
        why += (
            f"; at temperature {most['temperature']} it is {most['name']}, {most['speedup']:.2f}x"
        )
    waits = (
        f"the batch waits for its slowest row: {best['rounds']} rounds, the mean row needs "
        f"{best['row_rounds'] / best['rows']:.0f}; while it runs a row gains "
        f"{best['row_speedup']:.2f}x (--prompts FILE --output FILE refills rows that end)"
    )
    return f"{why}\n{waits}\n{try_next(best)}"


def try_next(run: dict) -> str:
    """Whether its last draft pays, and a command: for more drafts, for fewer, or to look closer.

    A draft pays if it brings its share of a round's time, in tokens.
    """
    gamma, rates = run["gamma"], [1.0, *run["acceptance_rate_per_position"]]
    t_more = run["draft_step_ms"] + (run["verify_ms"] - run["target_step_ms"]) / gamma
    needed = run["tokens_per_round"] * t_more / (run["round_cost"] * run["target_step_ms"])
    n = gamma if rates[-1] > needed else max(gamma // 2, 1)
    if rates[-1] * rates[-1] / max(rates[-2], rates[-1], 1e-9) > needed:  # the next draft would too
        n = 2 * gamma
    how = "--explain" if n == gamma else f"--gamma {n} --compare"
    return (
        f"draft {gamma} is kept {rates[-1]:.2f} of the time and pays from {needed:.2f} on: try "
        f"python generate.py --draft {run['strategy']} {how}"
    )


@dataclass(frozen=True, slots=True)
class Served:
    """One pass over a file of requests, through rows that are refilled."""

    totals: dict  # seconds and rounds of all, busy_share, longest_gap_seconds, decoded_tokens
    new_tokens: list[int]  # by request, with its first token
    first_token_seconds: list[float]  # by request, from when a row has begun with its prompt
    decode_seconds: list[float]  # by request, from its first token to its last
    acceptance: dict  # figures, as the JSON has them; none if nothing was drafted


def served_numbers(served: Served) -> dict:
    """The figures of a pass as the JSON has them; `ms_per_token` is of requests with a second."""
    totals, n_tokens = served.totals, sum(served.new_tokens)
    times = zip(served.decode_seconds, served.new_tokens, strict=True)
    return totals | {
        "requests": len(served.new_tokens),
        "generated_tokens": n_tokens,
        "tokens_per_second": n_tokens / max(totals["seconds"], 1e-9),
        "decode_tokens_per_second": totals["decoded_tokens"] / max(totals["decode_seconds"], 1e-9),
        "first_token_ms": spread([1e3 * seconds for seconds in served.first_token_seconds]),
        "ms_per_token": spread([1e3 * seconds / (n - 1) for seconds, n in times if n > 1]),
        **served.acceptance,
    }


def spread(values: list[float]) -> dict:
    """Mean, median and 99th percentile, which is one of the values; 0 of none."""
    ordered = sorted(values) or [0.0]
    return {
        "mean": sum(ordered) / len(ordered),
        "median": ordered[(len(ordered) - 1) // 2],
        "p99": ordered[-(-99 * len(ordered) // 100) - 1],
    }


def served_table(result: dict) -> str:
    """The figures of the passes over a file, side by side, and the speedup if there are two."""

    def three(times: dict) -> str:
        return " / ".join(f"{times[key]:.1f}" for key in ("mean", "median", "p99"))

    cells: dict[str, Callable[[dict], str]] = {
        "tokens/s, decoding": lambda r: f"{r['decode_tokens_per_second']:.1f}",
        "tokens/s, prefill included": lambda r: f"{r['tokens_per_second']:.1f}",
        "ms to first, mean / median / p99": lambda r: three(r["first_token_ms"]),
        "ms per token, the same": lambda r: three(r["ms_per_token"]),
        "rows busy": lambda r: f"{r['busy_share']:.0%}",
        "longest gap": lambda r: f"{1e3 * r['longest_gap_seconds']:.0f} ms",
        "mean acceptance length": lambda r: f"{r.get('mean_acceptance_length', 1):.2f}",
    }
    lines = side_by_side(result, cells, 34)
    if "speedup" in result:
        lines.append(
            f"speedup {result['speedup']:.2f}x over plain decoding, "
            f"{result['total_speedup']:.2f}x prefill included"
        )
    if "identical" in result:
        n, differing = result["speculative"]["requests"], result.get("differing_ids", [])
        lines.append(f"{n - len(differing)} of {n} outputs identical")
        lines += [f"not: {', '.join(differing[:9])}"] if differing else []
    return "\n".join(lines)


def side_by_side(result: dict, cells: dict[str, Callable[[dict], str]], width: int) -> list[str]:
    """A column for every run of a result, with a title; the labels take `width` characters."""
    name = "auto" if "candidates" in result["plan"] else result["plan"]["strategy"]
    keys = {"plain": "baseline", name: "speculative"}
    runs = {name: result[key] for name, key in keys.items() if key in result}
    lines = [" " * width + "".join(f"{name:>28}" for name in runs)]
    for label, cell in cells.items():
        lines.append(f"{label:{width}}" + "".join(f"{cell(run):>28}" for run in runs.values()))
    return lines


def progress_line(done: int, total: int, figures: dict) -> str:
    """How far a pass is: "3 of 9 done, 2 rows busy, ...", with the time left once it is known."""
    line = (
        f"{done} of {total} done, {figures['busy']} rows busy, "
        f"{figures['tokens_per_second']:.1f} tokens/s, "
        f"acceptance length {figures['mean_acceptance_length']:.2f}"
    )
    return line + (f", {clock(figures['seconds_left'])} left" if done else "")


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
