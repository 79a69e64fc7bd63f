"""What the table and the JSON say of a run: every figure against one worked out by hand."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from report import (
    Line,
    Measurement,
    Run,
    Served,
    build,
    clock,
    compared,
    compared_table,
    lessons,
    progress_line,
    served_numbers,
    served_table,
    spread,
    table,
    verdict,
)

# Two rows of 5 and 9 tokens: plainly 4 and 8 rounds of 1 s, speculatively 2 and 6 of 1.5 s.
ACCEPTANCE = {
    "mean_acceptance_length": 1.5,
    "draft_acceptance_rate": 0.25,
    "acceptance_rate_per_position": [0.375, 0.125],
    "accepted_histogram": [5, 2, 1],
}
PLAIN = Run(8.0, [[0] * 5, [0] * 9], 8, 12, 12, {})
DRAFTED = Run(9.0, [[0] * 5, [0] * 9], 6, 8, 12, ACCEPTANCE)
SETTING = {
    "environment": {"device": "cpu"},
    "model": {"dim": 40},
    "sampling": {"temperature": 0.0, "top_k": None, "top_p": None},
    "plan": {"strategy": "streaming", "gamma": 2, "draft_budget": 20},
}
MEASURED = Measurement(
    setting=SETTING,
    prompt_lengths=[30, 50],
    compile_seconds=1.0,
    prefill_seconds=2.0,
    draft_prefill_seconds=None,
    step_ms={"target_step_ms": 4.0, "draft_step_ms": 3.0, "verify_ms": 8.0, "accept_ms": 0.5},
    step_bytes=6 * 10**7,
    peak_memory_bytes=3 * 2**30,
    main=DRAFTED,
    baseline=PLAIN,
    differences=[],
)
ALONE = replace(
    MEASURED,
    setting=SETTING | {"plan": {"strategy": "none", "gamma": 0}},
    step_ms={"target_step_ms": 4.0},
    main=PLAIN,
    baseline=None,
    differences=None,
)


def report_of(m: Measurement) -> dict:
    return build(m, ["one", "two"], (7,))


def test_a_row_waits_for_others_but_its_milliseconds_do_not():
    """7.5 s of rounds for two rows that run 2 and 6 of them: 8 rows' rounds for 12 tokens."""
    assert PLAIN.ms_per_token == 1000
    assert DRAFTED.ms_per_token == pytest.approx(1500 * 8 / 12)
    assert DRAFTED.tokens_per_second == pytest.approx(12 / 9)
    result = report_of(MEASURED)
    assert result["speedup"] == pytest.approx(8 / 9)
    assert result["row_speedup"] == pytest.approx(1.0)
    line = verdict(result).splitlines()[0]
    assert "0.89x" in line and "1.00x while a row runs" in line
    assert "6 rounds where the mean row needs 4" in line


def test_the_table_shows_both_runs_and_the_bandwidth():
    text = table(report_of(MEASURED))
    lines = {line[:24].strip(): line[24:].split() for line in text.splitlines()}
    assert lines[""] == ["plain", "streaming"]
    assert lines["decode tokens/s"] == ["1.5", "1.3"]
    assert lines["rounds, slowest row"] == ["8", "6"]
    assert lines["rounds, mean row"] == ["6.0", "4.0"]
    assert lines["mean acceptance length"] == ["1.00", "1.50"]
    assert "acceptance rate 0.250, by position 0.375 0.125\n" in text
    steps = "T_T 4.0 ms, T_D 3.0 ms, T_V(2) 8.0 ms = 2.00 T_T; T_T reads 15.0 GB/s"
    assert text.endswith(f"\n{steps}; peak memory 3.0 GiB")


def test_what_accepting_takes_is_told_where_it_takes_something():
    sampled = SETTING | {"sampling": {"temperature": 0.8, "top_k": None, "top_p": None}}
    result = report_of(replace(MEASURED, setting=sampled, differences=None))
    assert "= 2.00 T_T, of which accepting 0.5 ms; T_T reads" in table(result)
    assert "identical" not in result and len(verdict(result).splitlines()) == 1


def test_a_plain_run_is_its_own_baseline():
    result = report_of(ALONE)
    text = table(result)
    assert text.splitlines()[0].split() == ["plain"]
    assert "T_T 4.0 ms; T_T reads" in text and "acceptance rate" not in text


def test_a_run_that_chose_by_itself_is_called_auto():
    plan = {"strategy": "none", "gamma": 0, "candidates": []}
    m = replace(MEASURED, setting=SETTING | {"plan": plan}, step_ms={"target_step_ms": 4.0})
    text = table(report_of(m))
    assert text.splitlines()[0].split() == ["plain", "auto"] and "T_D" not in text
    assert "acceptance rate 0.250" in text  # it drafted, if not in the end


def test_rows_that_part_are_told_with_place_and_margin():
    found = [{"row": 0, "new_token": 2}, {"row": 1, "new_token": 3, "top2_logit_margin": 0.00123}]
    result = report_of(replace(MEASURED, differences=found))
    assert result["identical"] is False and result["differences"] == found
    assert verdict(result).splitlines()[1:] == [
        "0 of 2 outputs identical",
        "row 0 differs from new token 2; top-2 logit margin not known",
        "row 1 differs from new token 3; top-2 logit margin 0.0012",
    ]


def test_where_the_prefill_decided_everything_there_is_no_speedup():
    nothing = Run(0.001, [[7], [0]], 0, 0, 0, {})
    result = report_of(replace(MEASURED, main=nothing, baseline=nothing))
    assert "speedup" not in result and result["identical"]
    assert "nothing was left to decode" in verdict(result)
    assert table(result)


RUN = {
    "decode_tokens_per_second", "ms_per_token", "decode_seconds", "rounds", "row_rounds",
    "prefill_seconds", "compile_seconds", "generated_tokens", "peak_memory_bytes", "target_step_ms",
}  # fmt: skip
SPECULATIVE = RUN | {
    "mean_acceptance_length", "draft_acceptance_rate", "acceptance_rate_per_position",
    "accepted_histogram", "draft_step_ms", "verify_ms", "accept_ms",
}  # fmt: skip
KEYS = {"environment", "model", "sampling", "plan", "target_step_bytes", "outputs"}


def test_the_json_has_these_keys_and_no_others():
    """Programs read them: a key that goes or is renamed is a change to tell of."""
    result = report_of(MEASURED)
    more = {"speculative", "baseline", "speedup", "row_speedup", "identical"}
    assert result.keys() == KEYS | more
    assert result["speculative"].keys() == SPECULATIVE and result["baseline"].keys() == RUN
    row = {"prompt_length": 30, "token_ids": [0] * 5, "text": "one", "finish_reason": "length"}
    assert result["outputs"][0] == row
    result = report_of(replace(MEASURED, draft_prefill_seconds=0.25))
    assert result["speculative"].keys() == SPECULATIVE | {"draft_prefill_seconds"}
    result = report_of(ALONE)
    assert result.keys() == KEYS | {"baseline"} and result["baseline"].keys() == RUN


def test_a_row_finishes_at_a_token_that_ends_it():
    main = replace(DRAFTED, outputs=[[0, 0, 7], [7, 0]])
    result = report_of(replace(MEASURED, main=main))
    assert [row["finish_reason"] for row in result["outputs"]] == ["eos", "length"]


def test_the_json_has_the_tables_figures():
    result = report_of(MEASURED)
    assert result["baseline"]["ms_per_token"] == 1000
    assert result["speculative"]["mean_acceptance_length"] == 1.5
    assert result["speculative"]["accept_ms"] == 0.5
    assert result["speculative"]["generated_tokens"] == 14


def test_a_report_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import report"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


# Three requests of 1, 3 and 5 tokens in 4 s, half of them reading.
SERVED = Served(
    {"seconds": 4.0, "prefill_seconds": 2.0, "decode_seconds": 2.0, "longest_gap_seconds": 0.25,
     "rounds": 4, "row_rounds": 6, "decoded_tokens": 6, "busy_share": 0.75},
    [1, 3, 5], [0.1, 0.2, 0.6], [0.0, 0.5, 1.6], ACCEPTANCE,
)  # fmt: skip


def test_the_figures_of_a_file_are_those_of_its_requests():
    """An answer's first token is the prefill's: one of a single token has no time per token."""
    numbers = served_numbers(SERVED)
    assert numbers["requests"] == 3 and numbers["generated_tokens"] == 9
    assert numbers["tokens_per_second"] == 9 / 4 and numbers["decode_tokens_per_second"] == 3
    assert numbers["first_token_ms"] == pytest.approx({"mean": 300, "median": 200, "p99": 600})
    assert numbers["ms_per_token"] == pytest.approx({"mean": 325, "median": 250, "p99": 400})
    assert numbers["mean_acceptance_length"] == 1.5 and numbers["busy_share"] == 0.75
    nothing = replace(SERVED, new_tokens=[1], first_token_seconds=[1.0], decode_seconds=[0.0])
    assert served_numbers(nothing)["ms_per_token"] == {"mean": 0, "median": 0, "p99": 0}


def test_a_percentile_is_one_of_the_values():
    assert spread([3.0, 1.0, 2.0]) == {"mean": 2, "median": 2, "p99": 3}
    assert spread([float(n) for n in range(1, 101)]) == {"mean": 50.5, "median": 50, "p99": 99}
    assert spread([float(n) for n in range(1, 102)])["p99"] == 100
    assert spread([4.0]) == {"mean": 4, "median": 4, "p99": 4}


def test_the_table_of_a_file():
    main, plain = served_numbers(SERVED), served_numbers(replace(SERVED, acceptance={}))
    result = {"plan": SETTING["plan"], "speculative": main, "baseline": plain,
              "speedup": 1.5, "total_speedup": 1.25,
              "identical": False, "differing_ids": ["b"]}  # fmt: skip
    lines = [" ".join(line.split()) for line in served_table(result).split("\n")]
    assert lines == [
        "plain streaming",
        "tokens/s, decoding 3.0 3.0",
        "tokens/s, prefill included 2.2 2.2",
        "ms to first, mean / median / p99 300.0 / 200.0 / 600.0 300.0 / 200.0 / 600.0",
        "ms per token, the same 325.0 / 250.0 / 400.0 325.0 / 250.0 / 400.0",
        "rows busy 75% 75%",
        "longest gap 250 ms 250 ms",
        "mean acceptance length 1.00 1.50",
        "speedup 1.50x over plain decoding, 1.25x prefill included",
        "2 of 3 outputs identical",
        "not: b",
    ]
    alone = {"plan": {"strategy": "none", "gamma": 0}, "baseline": plain}
    assert "speedup" not in served_table(alone) and "identical" not in served_table(alone)


def test_progress_tells_the_time_left_once_it_can():
    figures = {"busy": 3, "tokens_per_second": 12.34, "mean_acceptance_length": 2.5,
               "seconds_left": 3725.4}  # fmt: skip
    line = "of 9 done, 3 rows busy, 12.3 tokens/s, acceptance length 2.50"
    assert progress_line(0, 9, figures) == f"0 {line}"
    assert progress_line(4, 9, figures) == f"4 {line}, 1:02:05 left"
    assert [clock(s) for s in (0, 59.6, 3599.6)] == ["0:00", "1:00", "1:00:00"]


# The runs above as lines of a table, and a sampled pair: T_T 4, T_D 3 and T_V 8 ms, gamma 2. So a
# round costs 3.5 plain steps, and with its 1.5 tokens a row should get 0.43 of plain decoding.
STEPS = {"target_step_ms": 4.0, "draft_step_ms": 3.0, "verify_ms": 8.0, "accept_ms": 0.5}
DRAFT_PLAN = {"strategy": "streaming", "gamma": 2, "draft_budget": 20}
NOTHING = {"strategy": "none", "gamma": 0}
OTHER = replace(DRAFTED, seconds=4.0, outputs=[[1] * 5, [0] * 9])
LINES = [
    Line("plain", NOTHING, 0.0, PLAIN, {"target_step_ms": 4.0}),
    Line("streaming 20", DRAFT_PLAN, 0.0, DRAFTED, STEPS),
    Line("auto: no draft", {"strategy": "auto", "gamma": 0}, 0.0, PLAIN, {"target_step_ms": 4.0}),
    Line("plain", NOTHING, 0.5, replace(PLAIN, seconds=2.0), {"target_step_ms": 4.0}),
    Line("streaming 20", DRAFT_PLAN, 0.5, OTHER, STEPS),
]


def test_a_run_is_compared_with_the_plain_one_of_its_temperature():
    runs = compared(LINES)
    assert [r["speedup"] for r in runs] == pytest.approx([1, 8 / 9, 1, 1, 0.5])
    assert [r["row_speedup"] for r in runs] == pytest.approx([1, 1, 1, 1, 0.5625])
    assert [r["round_cost"] for r in runs] == [1, 3.5, 1, 1, 3.5]
    assert [r["formula"] for r in runs] == pytest.approx([1, 1.5 / 3.5, 1, 1, 1.5 / 3.5])
    assert [r["identical_rows"] for r in runs] == [2, 2, 2, 2, 1] and runs[0]["rows"] == 2
    assert runs[1]["draft_budget"] == 20 and runs[1]["accepted_histogram"] == [5, 2, 1]
    assert runs[1]["tokens_per_round"] == 1.5 and runs[1]["verify_ms"] == 8


def test_the_table_has_a_line_for_every_run():
    lines = compared_table(compared(LINES)).splitlines()
    assert max(map(len, lines)) <= 105
    assert [" ".join(line.split()) for line in lines[2:]] == [
        "greedy",
        "plain 1.5 1.00 1.00 1.00 1.00 4.0 2/2",
        "streaming 20 1.3 0.89 1.00 0.43 0.25 1.50 3.0 8.0 2/2",
        "auto: no draft 1.5 1.00 1.00 1.00 1.00 4.0 2/2",
        "temperature 0.5",
        "plain 6.0 1.00 1.00 1.00 1.00 4.0 2/2",
        "streaming 20 3.0 0.50 0.56 0.43 0.25 1.50 3.0 8.0 1/2",
    ]
    under = lines[3].index("4.0") + 2  # a plain step stands under T_V: both end with a decision
    assert lines[4][under] == "0" and lines[1][: under + 1].endswith("ms")


def lessons_of(rates: list[float]) -> list[str]:
    """With other acceptances of the first and second drafts."""
    figures = ACCEPTANCE | {"acceptance_rate_per_position": rates}
    lines = [replace(x, run=replace(x.run, acceptance=figures)) if x.plan["gamma"] else x
             for x in LINES]  # fmt: skip
    return lessons(compared(lines)).splitlines()


def test_lessons_are_drawn_from_the_numbers():
    """A draft costs 3 + (8 - 4) / 2 = 5 of a round's 14 ms: it has to bring 0.54 of 1.5 tokens."""
    first, second, third = lessons_of([0.375, 0.125])
    assert first == (
        "streaming 20 came nearest to plain decoding, 0.89x: a round of 2 drafts costs 3.50 plain "
        "steps and yields 1.50 tokens; at temperature 0.5 it is streaming 20, 0.50x"
    )
    assert second.startswith("the batch waits for its slowest row: 6 rounds, the mean row needs 4")
    assert "1.00x" in second
    assert third == (
        "draft 2 is kept 0.12 of the time and pays from 0.54 on: try python generate.py "
        "--draft streaming --gamma 1 --compare"
    )
    assert lessons_of([0.9, 0.85])[2].endswith("--draft streaming --gamma 4 --compare")
    assert lessons_of([0.9, 0.6])[2].endswith("--draft streaming --explain")
    fast = [LINES[0], replace(LINES[1], run=replace(DRAFTED, seconds=4.0))]
    first, *_ = lessons(compared(fast)).splitlines()
    assert first.startswith("streaming 20 gained most, 2.00x") and "temperature" not in first
    nothing = Run(0.001, [[7], [0]], 0, 0, 0, {})
    runs = compared([replace(line, run=nothing) for line in LINES])
    assert "nothing was left" in lessons(runs) and "speedup" not in runs[1]
    assert compared_table(runs).splitlines()[4].split()[2:] == ["0.0", "3.0", "8.0", "2/2"]
