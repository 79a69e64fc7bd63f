"""What the table and the JSON say of a run: every figure against one worked out by hand."""

import pytest
import torch

import config
import generate
from drafters import Strategy
from report import Report, Run, step_bytes, table, to_json, top2_margin, verdict
from spec_decode import Engine, Sampling, Stats, decode
from tests.reference import plain_greedy, reference_logits, tiny_model
from tests.test_spec_decode import PROMPTS
from tokenizer import NumberTokenizer

GREEDY = Sampling()


def engine_of(strategy: Strategy, sampling: Sampling = GREEDY, n: int = 20) -> Engine:
    engine = Engine(tiny_model(), 4, 70 + n, strategy, sampling)
    engine.prefill(PROMPTS, [n] * 4)
    return engine


# Two rows of 5 and 9 tokens: plainly 4 and 8 rounds of 1 s, speculatively 2 and 6 of 1.5 s.
PLAIN = Run(Stats(8, 12, [12], [12]), [[0] * 5, [0] * 9], 8.0)
DRAFTED = Run(Stats(6, 12, [5, 2, 1], [0, 0, 8]), [[0] * 5, [0] * 9], 9.0)


def report_of(main: Run, baseline: Run | None, engine: Engine, **step_ms: float) -> Report:
    prompts = [[1] * 30, [1] * 50]
    return Report(engine, prompts, 1.0, 2.0, None, step_ms, main, baseline, None)


def test_a_row_waits_for_others_but_its_milliseconds_do_not():
    """7.5 s of rounds for two rows that run 2 and 6 of them: 8 rows' rounds for 12 tokens."""
    assert PLAIN.ms_per_token == 1000
    assert DRAFTED.ms_per_token == pytest.approx(1500 * 8 / 12)
    assert DRAFTED.tokens_per_second == pytest.approx(12 / 9)
    report = report_of(DRAFTED, PLAIN, engine_of(Strategy("streaming", 2, 20)))
    assert report.speedup == pytest.approx(8 / 9)
    assert report.row_speedup == pytest.approx(1.0)
    line = verdict(report).splitlines()[0]
    assert "0.89x" in line and "1.00x while a row runs" in line
    assert "6 rounds where the mean row needs 4" in line


def test_the_table_shows_both_runs_and_the_bandwidth():
    engine = engine_of(Strategy("streaming", 2, 20))
    ms = {"target_step_ms": 0.01, "draft_step_ms": 3.0, "verify_ms": 0.02, "accept_ms": 0.5}
    report = report_of(DRAFTED, PLAIN, engine, **ms)
    lines = {line[:24].strip(): line[24:].split() for line in table(report).splitlines()}
    assert lines["decode tokens/s"] == ["1.5", "1.3"]
    assert lines["rounds, slowest row"] == ["8", "6"]
    assert lines["rounds, mean row"] == ["6.0", "4.0"]
    assert lines["mean acceptance length"] == ["1.00", "1.50"]
    kv = (30 + 50) * 2 * 2 * 2 * 16 * 4  # tokens, layers, K and V, KV heads, head_dim, bytes
    assert step_bytes(engine, report.prompts) > kv
    speed = step_bytes(engine, report.prompts) / 0.01 / 1e6
    assert f"T_T 0.0 ms, T_D 3.0 ms, T_V(2) 0.0 ms = 2.00 T_T; T_T reads {speed:.1f} GB/s" in table(
        report
    )


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_p=0.9)])
def test_steps_are_timed_as_what_they_are(monkeypatch, sampling):
    """By a clock that counts tokens fed to the model and, as a tenth, uniforms that are drawn."""
    engine = engine_of(Strategy("streaming", 3, 20), sampling)
    clock, hidden, uniforms = [0.0], engine.model.hidden, engine.uniforms

    def fed(tokens, *more):
        clock[0] += tokens.shape[1]
        return hidden(tokens, *more)

    def drawn(n):
        clock[0] += n / 10
        return uniforms(n)

    def timed(device, work):
        before = clock[0]
        result = work()
        return clock[0] - before, result

    monkeypatch.setattr(engine.model, "hidden", fed)
    monkeypatch.setattr(engine, "uniforms", drawn)
    monkeypatch.setattr(generate, "timed", timed)
    seconds = {k: v[0] / 1e3 for k, v in generate.step_times(engine, repeats=1).items()}
    u = 0.0 if sampling.greedy else 0.1
    expected = {"target_step_ms": 1 + u, "draft_step_ms": 1 + u, "verify_ms": 4 * (1 + u)}
    assert seconds == pytest.approx(expected | {"accept_ms": 4 * u})
    assert generate.step_times(engine, 1, gamma=0).keys() == {"target_step_ms"}


def test_a_margin_touches_nothing_of_the_engine():
    """Asked for in the middle of a conversation, whose next turn reads only what is new."""
    engine, model = engine_of(Strategy("streaming", 3, 20)), tiny_model()
    decode(engine)
    margin = top2_margin(engine, PROMPTS[2][:40])
    first, second = reference_logits(model, PROMPTS[2][:40])[-1].topk(2).values.tolist()
    assert margin == pytest.approx(first - second, abs=1e-4)
    texts = [p + a + [3] for p, a in zip(PROMPTS, engine.outputs(), strict=True)]
    engine = Engine(model, 4, 200, Strategy(), Sampling())
    engine.prefill(PROMPTS, [20] * 4)
    decode(engine)
    top2_margin(engine, PROMPTS[2][:40])
    engine.prefill(texts, [10] * 4, reuse=True)
    decode(engine)
    assert engine.outputs() == [plain_greedy(model, t, 10) for t in texts]


def test_the_json_has_the_tables_figures():
    ms = {"target_step_ms": 1.0, "draft_step_ms": 3.0, "verify_ms": 2.0, "accept_ms": 0.5}
    report = report_of(DRAFTED, PLAIN, engine_of(Strategy("streaming", 2, 20)), **ms)
    result = to_json(report, NumberTokenizer(97))
    assert result["speedup"] == report.speedup and result["row_speedup"] == report.row_speedup
    assert result["baseline"]["ms_per_token"] == 1000
    assert result["speculative"]["mean_acceptance_length"] == 1.5
    assert result["speculative"]["accept_ms"] == 0.5 and "accept_ms" not in result["baseline"]
    assert "draft_prefill_seconds" not in result["speculative"]
    report.draft_prefill_seconds = 0.25
    assert to_json(report, NumberTokenizer(97))["speculative"]["draft_prefill_seconds"] == 0.25
    assert torch.get_num_threads() == result["environment"]["threads"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("window", [None, 20, 64])
def test_step_bytes_are_what_a_plain_step_reads(tied, window):
    """K and V within the window, every matrix and norm once, and of a table of its own one row."""
    model = tiny_model(tie_embeddings=tied, sliding_window=window)
    c, lengths = model.config, (7, 30, 64)
    engine = Engine(model, 3, 100, Strategy(), Sampling())
    n_seen = sum(min(n, window or n) for n in lengths)
    numbers = config.matrix_params(c) + (2 * c.n_layer + 1) * c.dim
    numbers += n_seen * 2 * c.n_layer * c.n_kv_head * c.head_dim
    numbers += 0 if tied else 3 * c.dim
    assert step_bytes(engine, [[1] * n for n in lengths]) == 4 * numbers
