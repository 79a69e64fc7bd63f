"""A timed run: what is measured, that it is measured as what it is, and that nothing is moved."""

from dataclasses import replace

import pytest
import torch

import config
import measure as measure_module
from measure import (
    Job,
    Progress,
    decode,
    differences,
    measure,
    step_bytes,
    step_times,
    top2_margin,
)
from policies import Strategy
from report import Run
from sampling import Sampling
from spec_decode import Engine
from tests.reference import plain_greedy, reference_logits, tiny_model
from tests.test_spec_decode import PROMPTS

GREEDY = Sampling()


def engine_of(strategy: Strategy, sampling: Sampling = GREEDY, n: int = 20) -> Engine:
    engine = Engine(tiny_model(), 4, 70 + n, strategy, sampling)
    engine.prefill(PROMPTS, [n] * 4)
    return engine


def silent(*text: str, end: str = "") -> None:
    """In place of printing."""


def test_steps_are_timed_as_what_they_are(monkeypatch):
    """By a clock that counts tokens fed to the model and, as a tenth, tokens that are picked."""
    engine = engine_of(Strategy("streaming", 3, 20), Sampling(1.0, top_p=0.9))
    clock, hidden, (pick, judge, _) = [0.0], engine.model.hidden, engine.around

    def fed(tokens, *more):
        clock[0] += tokens.shape[1]
        return hidden(tokens, *more)

    def picking(work):
        def picked(logits, *more):
            clock[0] += logits.shape[1] / 10
            return work(logits, *more)

        return picked

    def timed(device, work):
        before = clock[0]
        result = work()
        return clock[0] - before, result

    monkeypatch.setattr(engine.model, "hidden", fed)
    engine.around = engine.around._replace(pick=picking(pick), judge=picking(judge))
    monkeypatch.setattr(measure_module, "timed", timed)
    seconds = {k: v[0] / 1e3 for k, v in step_times(engine, repeats=1).items()}
    expected = {"target_step_ms": 1.1, "draft_step_ms": 1.1, "verify_ms": 4.4, "accept_ms": 0.4}
    assert seconds == pytest.approx(expected)
    assert step_times(engine, 1, gamma=0).keys() == {"target_step_ms"}


def test_both_runs_start_from_the_same_prefill():
    said: list[str] = []
    engine = Engine(tiny_model(), 4, 90, Strategy("streaming", 3, 20), GREEDY)
    m = measure(engine, None, Job(PROMPTS, 20, compare=True), lambda *t, end="": said.extend(t))
    expected = [plain_greedy(tiny_model(), p, 20) for p in PROMPTS]
    assert m.main.outputs == m.baseline.outputs == expected and m.differences == []
    assert m.baseline.acceptance == {}
    accepted = m.main.acceptance["accepted_histogram"]
    assert sum(accepted) == m.main.row_rounds < m.baseline.row_rounds == 4 * 19
    assert sum((n + 1) * rows for n, rows in enumerate(accepted)) == m.main.decoded_tokens == 76
    assert m.main.rounds < m.baseline.rounds == 19
    assert m.prompt_lengths == [len(p) for p in PROMPTS]
    assert m.draft_prefill_seconds is None
    assert m.step_ms.keys() == {"target_step_ms", "draft_step_ms", "verify_ms", "accept_ms"}
    assert m.step_bytes == step_bytes(engine, m.prompt_lengths)
    assert m.setting["plan"] == {"strategy": "streaming", "gamma": 3, "draft_budget": 20}
    assert m.setting["environment"]["threads"] == torch.get_num_threads()
    words = ("warming up", "prefilling", "decoding plainly", "decoding")
    assert [s for s in said if s[0].isalpha()] == [
        w if w != "prefilling" else f"prefilling {sum(m.prompt_lengths)} tokens" for w in words
    ]


def test_a_draft_models_own_prefill_is_no_part_of_the_decoding():
    """It reads the prompts when it is first needed: here, before the clock of the rounds."""
    draft, strategy = tiny_model(2, 1, seed=5), Strategy("full", 3)
    engine = Engine(tiny_model(), 4, 90, strategy, GREEDY, draft_model=draft)
    m = measure(engine, None, Job(PROMPTS, 20), silent)
    assert m.draft_prefill_seconds > 0 and m.setting["draft_model"]["n_head"] == 2
    assert m.baseline is None and m.differences is None


def test_progress_is_told_by_quarters():
    said: list[str] = []
    progress = Progress(lambda text, end: said.append(text))
    for done in range(11):
        progress(done, 10)
    assert said == ["25%", "50%", "75%", "100%"]


def test_differences_are_where_rows_part(monkeypatch):
    """Without memory to look again, a finished run is not lost."""

    def no_room(*_):
        raise torch.OutOfMemoryError

    engine = engine_of(Strategy())
    runs = [Run(1.0, [[1, 2, 3]] * 3 + [end], 1, 4, 4, {}) for end in ([1, 2], [1, 4])]
    (found,) = differences(engine, PROMPTS, *runs)
    assert (found["row"], found["new_token"]) == (3, 1)
    assert found["top2_logit_margin"] == top2_margin(engine, PROMPTS[3] + [1])
    sampled = engine_of(Strategy(), Sampling(1.0))  # two logits then say nothing of the choice
    assert differences(sampled, PROMPTS, *runs) == [{"row": 3, "new_token": 1}]
    monkeypatch.setattr(measure_module, "top2_margin", no_room)
    assert differences(engine, PROMPTS, *runs) == [{"row": 3, "new_token": 1}]
    short = replace(runs[0], outputs=[*runs[0].outputs[:3], [1]])
    assert differences(engine, PROMPTS, short, runs[0])[0]["new_token"] == 1
    assert differences(engine, PROMPTS, runs[0], None) is None


def test_a_margin_touches_nothing_of_the_engine():
    """Asked for in the middle of a conversation, whose next turn reads only what is new."""
    engine, model = engine_of(Strategy("streaming", 3, 20)), tiny_model()
    decode(engine)
    margin = top2_margin(engine, PROMPTS[2][:40])
    first, second = reference_logits(model, PROMPTS[2][:40])[-1].topk(2).values.tolist()
    assert margin == pytest.approx(first - second, abs=1e-4)
    texts = [p + a + [3] for p, a in zip(PROMPTS, engine.batch.outputs(), strict=True)]
    engine = Engine(model, 4, 200, Strategy(), Sampling())
    engine.prefill(PROMPTS, [20] * 4)
    decode(engine)
    top2_margin(engine, PROMPTS[2][:40])
    engine.prefill(texts, [10] * 4, reuse=True)
    decode(engine)
    assert engine.batch.outputs() == [plain_greedy(model, t, 10) for t in texts]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("window", [None, 20, 64])
def test_step_bytes_are_what_a_plain_step_reads(tied, window):
    """K and V within the window, every matrix and norm once, and of a table of its own one row."""
    model = tiny_model(tie_embeddings=tied, sliding_window=window)
    c, lengths = model.config, [7, 30, 64]
    engine = Engine(model, 3, 100, Strategy(), Sampling())
    n_seen = sum(min(n, window or n) for n in lengths)
    numbers = config.matrix_params(c) + (2 * c.n_layer + 1) * c.dim
    numbers += n_seen * 2 * c.n_layer * c.n_kv_head * c.head_dim
    numbers += 0 if tied else 3 * c.dim
    assert step_bytes(engine, lengths) == 4 * numbers
