"""--draft auto: lossless whatever it decides, and it decides by the numbers it was given."""

import pytest
import torch

from auto import MARGIN, STAY, Auto, Candidate, calibration_file, lookup_rounds
from cost_model import Timing, Workload, omega
from drafters import Drafting
from spec_decode import Engine, Sampling, generate
from tests.reference import plain_greedy, tiny_model
from tests.test_spec_decode import PROMPTS

GAMMAS = (1, 3)
CHEAP = {0: 1.0, 1: 1.0, 3: 1.1}  # verifying costs little: seconds by gamma
DEAR = {0: 1.0, 1: 1.8, 3: 3.5}  # drafting can hardly win


def candidates(*policies: str) -> list[Candidate]:
    return [Candidate(Drafting(p, max(GAMMAS), 24, 3, obs_window=7)) for p in policies]


def prefilled(found: list[Candidate], verify: dict[int, float], monkeypatch, n: int = 60) -> Auto:
    """An Auto that has these candidates and believes these times."""
    engine = Engine(tiny_model(), 4, 80 + n, Drafting(), Sampling())
    auto = Auto(engine, found, GAMMAS)
    monkeypatch.setattr(auto, "verify_seconds", lambda length: verify)
    engine.prefill(PROMPTS, [n] * 4)
    return auto


def test_a_candidates_speedup_is_the_formula():
    c = Candidate(Drafting("snapkv"), t_draft=0.1, t_select=0.8, select_every=4, alpha=0.5)
    assert c.speedup(3, CHEAP) == pytest.approx(omega(3, 0.5) / (3 * 0.1 + 0.2 + 1.1))
    c.alpha, c.t_select = 0.3, 0.0
    assert c.best(CHEAP) == (pytest.approx(1.3 / 1.1), 1)
    c.alpha = 0.95
    assert c.best(CHEAP)[1] == 3 and c.best(DEAR) == (1.0, 0)
    c.alpha = None
    assert c.speedup(3, CHEAP) == pytest.approx(omega(3, 0.95) / 1.4)  # optimistic
    assert MARGIN > 1


@pytest.mark.parametrize("verify", [CHEAP, DEAR])
def test_whatever_it_decides_the_output_is_the_models_own(monkeypatch, verify):
    model = tiny_model()
    auto = prefilled(candidates("ngram", "streaming", "snapkv"), verify, monkeypatch)
    expected = [plain_greedy(model, p, 60) for p in PROMPTS]
    for _ in range(2):
        auto.engine.rewind()
        stats = auto.decode()
        assert auto.engine.outputs() == expected
        assert stats.decoded_tokens == 4 * 59
        assert sum(stats.drafted_histogram) == stats.row_rounds > 0


def reject(draft, logits):
    """In place of Engine.accept: no draft is kept."""
    return torch.zeros(len(logits), dtype=torch.int64), logits[:, 0].argmax(dim=-1)


def test_where_nothing_can_win_no_round_is_spent_on_it(monkeypatch):
    auto = prefilled(candidates("ngram", "streaming"), {0: 1.0, 1: 3.0, 3: 9.0}, monkeypatch)
    stats = auto.decode()
    assert stats.drafts == 0 and stats.rounds == 59
    assert auto.chosen is None and auto.gamma == 0 and auto.predicted_speedup == 1.0
    assert "no draft" in auto.explain()


def test_a_good_draft_is_chosen_and_kept(monkeypatch):
    """A budget for everything is always accepted; the lookup in random text hardly ever."""
    everything = Candidate(Drafting("streaming", 3, 400), t_draft=0.01)
    auto = prefilled([*candidates("ngram"), everything], CHEAP, monkeypatch)
    stats = auto.decode()
    assert auto.chosen is everything and auto.gamma == 3
    assert everything.acceptance(3) > 0.99 and auto.predicted_speedup > 3
    assert stats.rounds <= 4 + 15
    assert "streaming 400, gamma 3" in auto.explain()
    drafts = [c["draft"] for c in auto.decision()["candidates"]]
    assert drafts == ["ngram", "streaming 400"]


def test_what_prompt_lookup_would_have_had_accepted():
    """Text of period 3 is foreseen completely; text without repetition not at all."""
    engine = Engine(tiny_model(), 3, 100, Drafting(), Sampling())
    engine.prefill([[5, 6, 7] * 20, list(range(60)), [5, 6, 7] * 20], [9] * 3)
    engine.tokens[0, 60], engine.tokens[1, 60], engine.tokens[2, 60] = 5, 90, 5
    # 12 tokens back: 3 rounds of 4 drafts and one token where all are kept, else 12
    assert lookup_rounds(engine, 4) == [12, 0, 0, 0, 3 + 3]
    engine.finished[1] = True
    assert lookup_rounds(engine, 4) == [0, 0, 0, 0, 6]


def test_every_place_in_a_round_has_an_acceptance_of_its_own():
    """Acceptance comes in runs: one number, measured at gamma 5, says 2.01 tokens at gamma 2."""
    c = Candidate(Drafting("ngram"))
    c.saw([70, 0, 0, 0, 0, 30])
    assert c.tokens(2) == pytest.approx(1.6) and c.tokens(5) == pytest.approx(2.5)
    assert c.acceptance(2) == pytest.approx(0.3)
    for gamma in (1, 2, 3):  # of a shorter round, whatever the histogram: its drafts are a prefix
        c = Candidate(Drafting("ngram"))
        c.saw([7, 3, 5, 4])
        kept = 7 * 0 + 3 * min(1, gamma) + 5 * min(2, gamma) + 4 * min(3, gamma)
        assert c.tokens(gamma) == pytest.approx(1 + kept / 19)


def test_longer_rounds_than_seen_go_on_like_the_last_place():
    c = Candidate(Drafting("ngram"))
    c.saw([4, 4, 2])  # 6 of 10 keep the first draft, 2 of these 6 the second
    known = 1 + 0.6 + 0.2
    assert c.tokens(2) == pytest.approx(known)
    assert c.tokens(4) == pytest.approx(known + 0.2 / 3 + 0.2 / 9)
    c.saw([5, 0, 0, 5])  # later, with 3 drafts: 11 of 20, 7 of 11, 5 of 5
    assert c.tokens(3) == pytest.approx(1 + 11 / 20 + 7 / 20 + 7 / 20)
    assert c.tokens(4) == pytest.approx(c.tokens(3) + 7 / 20)
    c.saw([0, 10])  # with one draft: nothing new of the others
    first = (11 * 16 / 20 + 10) / (16 + 10)
    assert c.tokens(3) == pytest.approx(1 + first * (1 + 7 / 11 + 7 / 11))
    for _ in range(5):
        c.saw([0, 16])
    assert c.places[1][0] < 1  # so long ago that it is not known any more
    assert c.tokens(3) == pytest.approx(4, rel=0.02)


def test_what_was_seen_before_counts_for_a_few_rounds_at_most():
    c = Candidate(Drafting("ngram"))
    c.saw([10, 0, 0, 0])
    assert (c.tokens(3), c.seen) == (1, 10)
    c.saw([0, 0, 0, 10])
    assert c.tokens(3) == pytest.approx(1 + 1.5) and c.seen == 20
    c.saw([0, 0, 0, 16])  # the 20 before weigh as much as 16
    assert c.tokens(3) == pytest.approx(1 + (16 * 1.5 + 48) / 32)
    before = c.tokens(3)
    c.saw([0, 0, 0, 0])
    assert c.tokens(3) == before and c.seen == 32
    c.saw([0, 5], memory=0)
    assert c.tokens(1) == 2 and c.seen == 5


def test_the_first_choice_has_the_least_predicted_time_whoever_was_probed_last(monkeypatch):
    better, later = candidates("streaming", "snapkv")
    better.t_draft, later.t_draft = 0.10, 0.112
    auto = prefilled([better, later], CHEAP, monkeypatch)

    def probe(verify):
        for c in (better, later):
            auto.install(c)
            c.saw([10, 10, 10, 70])

    monkeypatch.setattr(auto, "probe", probe)
    gain = better.best(CHEAP)[0] / later.best(CHEAP)[0]
    assert 1 < gain < STAY  # the one in use would be kept
    auto.decode()
    assert auto.chosen is better


def test_nothing_is_decided_any_more_when_all_rows_are_finished(monkeypatch):
    """The rows end at the first look; what it would change to is neither made nor reported."""
    auto = prefilled(candidates("streaming"), {0: 1.0, 1: 1.4, 3: 1.9}, monkeypatch, n=4)
    (c,) = auto.candidates
    monkeypatch.setattr(auto, "probe", lambda verify: c.saw([1, 0, 0, 3]))
    monkeypatch.setattr(auto.engine, "accept", reject)
    auto.decode()
    assert auto.last == "streaming 24, gamma 3" and auto.current is c


def test_the_acceptance_of_the_first_prediction_is_printed_beside_it(monkeypatch):
    """And not that of the end, when all drafts have been rejected for a while."""
    auto = prefilled(candidates("streaming"), {0: 1.0, 1: 1.4, 3: 1.9}, monkeypatch, n=30)
    (c,) = auto.candidates
    monkeypatch.setattr(auto, "probe", lambda verify: c.saw([1, 0, 0, 9]))
    monkeypatch.setattr(auto.engine, "accept", reject)
    auto.decode()
    assert c.acceptance(3) < 0.2 and auto.last == "no draft"
    assert auto.predicted_speedup == pytest.approx((1 + 3 * 0.9) / 1.9)
    assert "acceptance 0.90 at gamma 3" in auto.explain()
    (said,) = auto.decision()["candidates"]
    assert (said["gamma"], said["acceptance"]) == (3, pytest.approx(0.9))
    assert auto.decision()["verify_seconds"] == {0: 1.0, 1: 1.4, 3: 1.9}


def test_prompt_lookup_takes_over_where_the_text_begins_to_repeat(monkeypatch):
    bad = Candidate(Drafting("streaming", 3, 24, 3), t_draft=0.02)
    auto = prefilled([bad, *candidates("ngram")], CHEAP, monkeypatch, n=120)
    engine = auto.engine
    monkeypatch.setattr(auto, "probe", lambda verify: setattr(bad, "alpha", 0.9))
    seen = iter([0.1])  # at first

    def look_back(lookup):
        lookup.alpha = next(seen, 0.99)

    monkeypatch.setattr(auto, "look_back", look_back)
    auto.decode()
    assert auto.chosen is bad and auto.current is auto.candidates[1]
    assert engine.outputs() == [plain_greedy(tiny_model(), p, 120) for p in PROMPTS]


def test_a_draft_that_turns_bad_is_given_up(monkeypatch):
    """It is chosen at a high acceptance and then sees only its own sinks: gamma goes to 0."""
    auto = prefilled(candidates("streaming"), {0: 1.0, 1: 1.4, 3: 1.9}, monkeypatch, n=200)
    (c,) = auto.candidates
    monkeypatch.setattr(auto, "probe", lambda verify: setattr(c, "alpha", 0.99))
    monkeypatch.setattr(auto.engine, "accept", reject)
    stats = auto.decode()
    assert auto.chosen is c and auto.predicted_speedup > 1.5
    assert 0 < stats.drafts <= 4 * 64  # some looks later
    assert stats.drafted_histogram[0] == stats.row_rounds - stats.drafts > 4 * 100
    assert auto.engine.outputs() == [plain_greedy(tiny_model(), p, 200) for p in PROMPTS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_kept_calibration_is_used_while_it_is_true(monkeypatch):
    engine = Engine(tiny_model(), 2, 300, Drafting(), Sampling())
    first = Auto(engine, candidates("streaming"), GAMMAS)
    first.calibrate()
    again = Auto(engine, candidates("streaming"), GAMMAS)
    true = first.verify_seconds(300)[0]
    timed = []

    def clock(gamma, length, seconds=None):
        timed.append((gamma, length))
        return Timing(Workload(2, length, itemsize=4), gamma + 1, length, pretended)

    monkeypatch.setattr(again, "time", clock)
    pretended = 1.05 * true
    again.calibrate()
    assert timed == [(0, 300)]
    assert again.verify_seconds(99) == first.verify_seconds(99)
    pretended = 2 * true  # the machine has changed
    again.calibrate()
    assert len(timed) == 2 + 3 * 9
    assert again.verify_seconds(300)[0] > 1.5 * true


def test_calibration_explains_the_steps_it_saw():
    """Eager and tiny, so only roughly; but it must be of the right size at another length."""
    engine = Engine(tiny_model(), 4, 800, Drafting(), Sampling())
    auto = Auto(engine, candidates("streaming", "snapkv", "ngram"), GAMMAS)
    auto.prepare()
    seconds = auto.verify_seconds(400)
    assert set(seconds) == {0, *GAMMAS} and auto.fit_error < 0.5
    assert all(1e-5 < s < 1 for s in seconds.values())
    for c in auto.candidates:
        assert 0 < c.t_draft < 1
        assert (c.t_select > 1e-5) == (c.drafting.policy != "ngram")
    outputs, _ = generate(engine, PROMPTS, 20)  # what it wrote into the caches does no harm
    assert outputs == [plain_greedy(tiny_model(), p, 20) for p in PROMPTS]


def test_calibrations_are_kept_only_where_there_is_a_place(monkeypatch):
    """Not in the current directory; and without a home the run goes on without a file."""
    monkeypatch.setenv("HOME", "/home/somebody")
    for value, folder in [("/cache", "/cache"), ("", "/home/somebody/.cache"),
                          ("relative", "/home/somebody/.cache")]:  # fmt: skip
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert str(calibration_file()) == f"{folder}/magicdec.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as for an unknown user
    path = calibration_file()
    assert not path.exists()
    with pytest.raises(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
