"""--draft auto: lossless whatever it decides, and it decides by the numbers it was given."""

import json
import math
from dataclasses import replace
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

import auto as auto_module
import device
from auto import (
    FOLLOW,
    MARGIN,
    STAY,
    Auto,
    Candidate,
    calibration_file,
    draft_lengths,
    keep_calibration,
    lookup_rounds,
)
from cost_model import omega
from kv_cache import SparseKVCache
from policies import Strategy
from roofline import HARDWARE, Timing, Workload, forward_time
from sampling import Sampling
from spec_decode import Engine, generate
from tests.reference import plain_greedy, tiny_model
from tests.test_spec_decode import PROMPTS

GAMMAS = (1, 3)
CHEAP = {0: 1.0, 1: 1.0, 3: 1.1}  # verifying costs little: seconds by gamma
DEAR = {0: 1.0, 1: 1.8, 3: 3.5}  # drafting can hardly win


def candidates(*policies: str) -> list[Candidate]:
    return [Candidate(Strategy(p, max(GAMMAS), 24, 3, obs_window=7)) for p in policies]


def saw(c: Candidate, accepted: list[int], **memory: int) -> None:
    """All of these rounds had as many drafts as some of them kept."""
    c.saw(accepted, [0] * (len(accepted) - 1) + [sum(accepted)], **memory)


def prefilled(
    found: list[Candidate], verify: dict[int, float], monkeypatch, n: int = 60, named: bool = False
) -> Auto:
    """An Auto that has these candidates and believes these times."""
    engine = Engine(tiny_model(), 4, 80 + n, Strategy(), Sampling())
    auto = Auto(engine, found, GAMMAS, named)
    monkeypatch.setattr(auto, "verify_seconds", lambda length: verify)
    engine.prefill(PROMPTS, [n] * 4)
    return auto


def test_a_candidates_speedup_is_the_formula():
    c = Candidate(Strategy("snapkv"), t_draft=0.1, t_select=0.8, select_every=4, alpha=0.5)
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
        assert auto.engine.batch.outputs() == expected
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


@pytest.mark.parametrize("policy", ["streaming", "ngram"])
def test_a_named_draft_is_used_from_the_first_round_to_the_last(monkeypatch, policy):
    """Also where it cannot win: only its gamma is chosen, here the shorter one soon."""
    auto = prefilled(candidates(policy), {0: 1.0, 1: 2.5, 3: 6.0}, monkeypatch, named=True)
    stats = auto.decode()
    assert stats.drafted_histogram[0] <= 4  # the last round of a row has room for no draft
    assert (len(stats.drafted_histogram) == 4) == (policy == "streaming")  # the probe's gamma
    assert auto.gamma == 1
    assert auto.chosen is auto.candidates[0] is auto.current
    assert 0 < auto.predicted_speedup < 1
    assert auto.engine.batch.outputs() == [plain_greedy(tiny_model(), p, 60) for p in PROMPTS]
    assert f"{auto.chosen}, gamma 1 (the draft as asked), predicted speedup 0." in auto.explain()


def test_a_named_draft_is_never_dropped_but_refused(monkeypatch):
    engine = Engine(tiny_model(), 2, 300, Strategy(), Sampling())
    auto = Auto(engine, candidates("streaming"), GAMMAS, named=True)
    monkeypatch.setattr(auto, "calibrate", lambda: None)
    monkeypatch.setattr(auto, "verify_seconds", lambda length: {0: 1.0, 1: 30.0, 3: 90.0})
    auto.prepare()  # an unnamed one could not win
    assert auto.candidates == [auto.current] and not auto.dropped
    auto = Auto(engine, [Candidate(Strategy("full", 3))], GAMMAS, named=True)
    with pytest.raises(ValueError, match="needs a draft model"):
        auto.prepare()


@pytest.mark.parametrize("when", ["probing", "choosing"])
def test_a_candidate_that_the_engine_refuses_is_dropped_for_the_others(monkeypatch, when):
    """Memory that was free when it was measured need not be free when it is its turn."""
    everything = Candidate(Strategy("streaming", 3, 400), t_draft=0.01)
    auto = prefilled([*candidates("snapkv"), everything], CHEAP, monkeypatch)
    refused, use = auto.candidates[0], auto.engine.use

    def scarce(strategy, draft_model=None):
        if strategy == refused.strategy:
            raise ValueError("the KV caches need 9 GiB")
        use(strategy, draft_model)

    def probe(verify):
        saw(refused, [0, 0, 0, 50])
        saw(everything, [5, 0, 0, 45])

    monkeypatch.setattr(auto.engine, "use", scarce)
    if when == "choosing":
        monkeypatch.setattr(auto, "probe", probe)
    auto.decode()
    assert auto.chosen is everything and auto.candidates == [everything]
    assert auto.dropped == ["snapkv 24: the KV caches need 9 GiB"]
    assert auto.engine.batch.outputs() == [plain_greedy(tiny_model(), p, 60) for p in PROMPTS]


def test_a_good_draft_is_chosen_and_kept(monkeypatch):
    """A budget for everything is always accepted; the lookup in random text hardly ever."""
    everything = Candidate(Strategy("streaming", 3, 400), t_draft=0.01)
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
    engine = Engine(tiny_model(), 3, 100, Strategy(), Sampling())
    engine.prefill([[5, 6, 7] * 20, list(range(60)), [5, 6, 7] * 20], [9] * 3)
    engine.batch.tokens[0, 60], engine.batch.tokens[1, 60], engine.batch.tokens[2, 60] = 5, 90, 5
    # 12 tokens back: 3 rounds of 4 drafts and one token where all are kept, else 12
    assert lookup_rounds(engine, 4) == ([12, 0, 0, 0, 3 + 3], [0, 0, 0, 0, 18])
    engine.batch.finished[1] = True
    assert lookup_rounds(engine, 4) == ([0, 0, 0, 0, 6], [0, 0, 0, 0, 6])


def test_prompt_lookup_is_judged_by_decided_text_alone():
    """What a run before left behind a short text must not be looked at."""
    engine = Engine(tiny_model(), 1, 100, Strategy(), Sampling())
    engine.prefill([[5]], [60])
    engine.batch.tokens.fill_(5)  # all of it would be foreseen
    assert engine.batch.seq_len.item() == 2 and lookup_rounds(engine, 4) == ([0] * 5, [0] * 5)
    engine.batch.seq_len.fill_(7)  # from 2 tokens on: 4 drafts, and the newest token
    assert lookup_rounds(engine, 4) == ([0, 0, 0, 0, 1], [0, 0, 0, 0, 1])


def test_every_place_in_a_round_has_an_acceptance_of_its_own():
    """Acceptance comes in runs: one number, measured at gamma 5, says 2.01 tokens at gamma 2."""
    c = Candidate(Strategy("ngram"))
    saw(c, [70, 0, 0, 0, 0, 30])
    assert c.tokens(2) == pytest.approx(1.6) and c.tokens(5) == pytest.approx(2.5)
    assert c.acceptance(2) == pytest.approx(0.3)
    for gamma in (1, 2, 3):  # of a shorter round, whatever the histogram: its drafts are a prefix
        c = Candidate(Strategy("ngram"))
        saw(c, [7, 3, 5, 4])
        kept = 7 * 0 + 3 * min(1, gamma) + 5 * min(2, gamma) + 4 * min(3, gamma)
        assert c.tokens(gamma) == pytest.approx(1 + kept / 19)


def test_drafts_that_the_end_of_a_row_cuts_off_are_not_judged():
    """Of 10 rounds, 4 had room for one draft only; they kept it, the others kept 1 of 3 or all."""
    c = Candidate(Strategy("ngram"))
    c.saw([0, 7, 0, 3], [0, 4, 0, 6])
    assert c.places == ((10, 10), (6, 3), (3, 3))
    assert c.tokens(3) == pytest.approx(1 + 1 + 0.5 + 0.5)
    c = Candidate(Strategy("ngram"))
    c.saw([5, 0, 0], [5, 0, 0])  # there was room for none
    assert c.tokens(2) == Candidate(Strategy("ngram")).tokens(2)


def test_longer_rounds_than_seen_go_on_like_the_last_place():
    c = Candidate(Strategy("ngram"))
    saw(c, [4, 4, 2])  # 6 of 10 keep the first draft, 2 of these 6 the second
    known = 1 + 0.6 + 0.2
    assert c.tokens(2) == pytest.approx(known)
    assert c.tokens(4) == pytest.approx(known + 0.2 / 3 + 0.2 / 9)
    saw(c, [5, 0, 0, 5])  # later, with 3 drafts: 11 of 20, 7 of 11, 5 of 5
    assert c.tokens(3) == pytest.approx(1 + 11 / 20 + 7 / 20 + 7 / 20)
    assert c.tokens(4) == pytest.approx(c.tokens(3) + 7 / 20)
    saw(c, [0, 10])  # with one draft: nothing new of the others
    first = (11 * 16 / 20 + 10) / (16 + 10)
    assert c.tokens(3) == pytest.approx(1 + first * (1 + 7 / 11 + 7 / 11))
    for _ in range(5):
        saw(c, [0, 16])
    assert c.places[1][0] < 1  # so long ago that it is not known any more
    assert c.tokens(3) == pytest.approx(4, rel=0.02)


def test_what_was_seen_before_counts_for_a_few_rounds_at_most():
    c = Candidate(Strategy("ngram"))
    saw(c, [10, 0, 0, 0])
    assert (c.tokens(3), c.seen) == (1, 10)
    saw(c, [0, 0, 0, 10])
    assert c.tokens(3) == pytest.approx(1 + 1.5) and c.seen == 20
    saw(c, [0, 0, 0, 16])  # the 20 before weigh as much as 16
    assert c.tokens(3) == pytest.approx(1 + (16 * 1.5 + 48) / 32)
    before = c.tokens(3)
    saw(c, [0, 0, 0, 0])
    assert c.tokens(3) == before and c.seen == 32
    saw(c, [0, 5], memory=0)
    assert c.tokens(1) == 2 and c.seen == 5


def test_the_first_choice_has_the_least_predicted_time_whoever_was_probed_last(monkeypatch):
    better, later = candidates("streaming", "snapkv")
    better.t_draft, later.t_draft = 0.10, 0.112
    auto = prefilled([better, later], CHEAP, monkeypatch)

    def probe(verify):
        for c in (better, later):
            auto.install(c)
            saw(c, [10, 10, 10, 70])

    monkeypatch.setattr(auto, "probe", probe)
    gain = better.best(CHEAP)[0] / later.best(CHEAP)[0]
    assert 1 < gain < STAY  # the one in use would be kept
    auto.decode()
    assert auto.chosen is better


def test_nothing_is_decided_any_more_when_all_rows_are_finished(monkeypatch):
    """The rows end at the first look; what it would change to is neither made nor reported."""
    auto = prefilled(candidates("streaming"), {0: 1.0, 1: 1.4, 3: 1.9}, monkeypatch, n=4)
    (c,) = auto.candidates
    monkeypatch.setattr(auto, "probe", lambda verify: saw(c, [1, 0, 0, 3]))
    monkeypatch.setattr(auto.engine, "accept", reject)
    auto.decode()
    assert auto.last == "streaming 24, gamma 3" and auto.current is c


def test_the_acceptance_of_the_first_prediction_is_printed_beside_it(monkeypatch):
    """And not that of the end, when all drafts have been rejected for a while."""
    auto = prefilled(candidates("streaming"), {0: 1.0, 1: 1.4, 3: 1.9}, monkeypatch, n=30)
    (c,) = auto.candidates
    monkeypatch.setattr(auto, "probe", lambda verify: saw(c, [1, 0, 0, 9]))
    monkeypatch.setattr(auto.engine, "accept", reject)
    auto.decode()
    assert c.acceptance(3) < 0.2 and auto.last == "no draft"
    assert auto.predicted_speedup == pytest.approx((1 + 3 * 0.9) / 1.9)
    assert "acceptance 0.90 at gamma 3" in auto.explain()
    (said,) = auto.decision()["candidates"]
    assert (said["gamma"], said["acceptance"]) == (3, pytest.approx(0.9))
    assert auto.decision()["verify_seconds"] == {0: 1.0, 1: 1.4, 3: 1.9}


def test_prompt_lookup_takes_over_where_the_text_begins_to_repeat(monkeypatch):
    bad = Candidate(Strategy("streaming", 3, 24, 3), t_draft=0.02)
    auto = prefilled([bad, *candidates("ngram")], CHEAP, monkeypatch, n=120)
    engine = auto.engine
    monkeypatch.setattr(auto, "probe", lambda verify: setattr(bad, "alpha", 0.9))
    seen = iter([0.1])  # at first

    def look_back(lookup):
        lookup.alpha = next(seen, 0.99)

    monkeypatch.setattr(auto, "look_back", look_back)
    auto.decode()
    assert auto.chosen is bad and auto.current is auto.candidates[1]
    assert engine.batch.outputs() == [plain_greedy(tiny_model(), p, 120) for p in PROMPTS]


def test_a_draft_that_turns_bad_is_given_up_and_tried_again_after_longer_and_longer(monkeypatch):
    """Its first rounds were good. When it is tried again, the latest rounds alone count."""
    auto = prefilled(candidates("streaming"), {0: 1.0, 1: 1.4, 3: 1.9}, monkeypatch, n=250)
    (c,) = auto.candidates
    monkeypatch.setattr(auto, "probe", lambda verify: saw(c, [10, 0, 0, 90]))
    monkeypatch.setattr(auto.engine, "accept", reject)
    runs, run = [], auto.run
    monkeypatch.setattr(auto, "run", lambda *what: runs.append(what) or run(*what))
    stats = auto.decode()
    assert auto.chosen is c and auto.predicted_speedup > 1.5
    tried = (FOLLOW, 3)
    assert runs == [tried, tried, (32, 0), tried, (64, 0), tried, (128, 0), tried, (256, 0)]
    assert stats.drafted_histogram[0] == stats.row_rounds - stats.drafts > 4 * 200
    assert auto.engine.batch.outputs() == [plain_greedy(tiny_model(), p, 250) for p in PROMPTS]


def test_a_draft_that_did_not_pay_is_not_tried_for_what_one_acceptance_would_say(monkeypatch):
    """All drafts are kept or none: 1.9 tokens a round. 90 of 160 judged would say 2.06."""
    auto = prefilled(candidates("streaming"), {0: 1.0, 1: 1.8, 3: 1.92}, monkeypatch, n=80)
    (c,) = auto.candidates
    monkeypatch.setattr(auto, "probe", lambda verify: saw(c, [70, 0, 0, 30]))
    stats = auto.decode()
    assert c.alpha == 90 / 160 and omega(3, c.alpha) > STAY * 1.92
    assert stats.rounds == 79 and stats.drafts == 0


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_kept_calibration_is_used_while_it_is_true(monkeypatch):
    engine = Engine(tiny_model(), 2, 300, Strategy(), Sampling())
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


def test_a_calibration_that_cannot_be_used_is_measured_again(tmp_path, monkeypatch):
    """One of another version, or damaged: never a traceback."""
    engine = Engine(tiny_model(), 2, 300, Strategy(), Sampling())
    measured = []

    def time(gamma, length):
        measured.append(gamma)
        w = Workload(2, length, itemsize=4)
        return Timing(
            w, gamma + 1, length, forward_time(engine.model.config, HARDWARE["cpu"], w).total
        )

    def calibrate() -> int:
        """How many steps it timed."""
        measured.clear()
        auto = Auto(engine, candidates("ngram"), GAMMAS)
        monkeypatch.setattr(auto, "time", time)
        auto.calibrate()
        return len(measured)

    file = tmp_path / "magicdec.json"
    assert calibrate() == 27 and calibrate() == 1
    ((key, good),) = json.loads(file.read_text()).items()
    hardware, residual = good["hardware"], good["residual"]
    deep = json.loads("[" * 900 + "]" * 900)
    for entry in [
        None, "x", 5, [], {}, deep, {"hardware": hardware},
        *(good | {"hardware": h} for h in (
            None, "x", [], {}, hardware | {"speed": 1}, hardware | {"memory": None},
            hardware | {"peak_flops": "1e12"}, hardware | {"peak_bandwidth": 0},
            hardware | {"layer_seconds": math.nan}, hardware | {"flop_efficiency": 10**400},
            hardware | {"bandwidth_efficiency": -0.5}, {**hardware, "peak_flops": deep},
        )),
        *(good | {"residual": r} for r in (
            None, {}, residual[1:], [*residual, [7, 1.0]], [[0, 1.0], [1, 1.0], [3, math.inf]],
            [[0, 1.0], [1, 1.0], [3, "1"]], [[[0], 1.0]], [1, 2, 3],
        )),
        good | {"fit_error": None}, good | {"fit_error": math.nan},
    ]:  # fmt: skip
        file.write_text(json.dumps({key: entry}))
        assert calibrate() == 27, entry
        assert json.loads(file.read_text()) == {key: good}
    file.write_text(json.dumps({"another": deep}))
    assert calibrate() == 27
    for text in ["", "{", "[1]", "null", "[" * 10**6, '{"a": ' * 10**5, "\udce4"]:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        assert calibrate() == 27 and calibrate() == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no directory can be there
    assert calibrate() == 27


def test_two_processes_that_calibrate_at_once_keep_both_entries(tmp_path, monkeypatch):
    """The second one has to wait where the first one has read the file and not yet written it."""
    file, write, others = tmp_path / "magicdec.json", auto_module.write_json, []

    def slowly(value, path):
        if not others:
            others.append(Thread(target=keep_calibration, args=(file, "b", {"of": 2})))
            others[0].start()
            others[0].join(0.3)
        write(value, path)

    monkeypatch.setattr(auto_module, "write_json", slowly)
    keep_calibration(file, "a", {"of": 1})
    others[0].join()
    assert json.loads(file.read_text()) == {"a": {"of": 1}, "b": {"of": 2}}
    keep_calibration(file, "a", {"of": 3})
    assert json.loads(file.read_text()) == {"a": {"of": 3}, "b": {"of": 2}}


def test_what_another_process_kept_during_a_calibration_is_not_lost(tmp_path, monkeypatch):
    engine = Engine(tiny_model(), 2, 300, Strategy(), Sampling())
    auto = Auto(engine, candidates("ngram"), GAMMAS)

    def time(gamma, length):
        keep_calibration(tmp_path / "magicdec.json", "another", {})
        return Timing(Workload(2, length, itemsize=4), gamma + 1, length, 1e-3)

    monkeypatch.setattr(auto, "time", time)
    auto.calibrate()
    assert json.loads((tmp_path / "magicdec.json").read_text()).keys() == {"another", auto.key()}


MACHINE = replace(HARDWARE["cpu"], flop_efficiency=0.05, layer_seconds=1e-6)
T_SELECT = 0.5  # seconds of a selection's forward


def on_a_known_machine(engine: Engine, factor: dict[int, float], monkeypatch) -> list[float]:
    """Forwards take what the cost model says of MACHINE, times a factor by drafts verified.

    A draft step reads 24 tokens. No time passes otherwise. Returns the clock.
    """
    clock, model, config = [0.0], engine.model, engine.model.config
    hidden, queries = model.hidden, model.queries

    def timed_hidden(tokens, pos, read=None, write=None):
        w, T = Workload(len(tokens), int(pos[0, 0]) + 1, itemsize=4), tokens.shape[1]
        context, share = (24, 1.0) if isinstance(read, SparseKVCache) else (None, factor.get(T - 1))
        clock[0] += forward_time(config, MACHINE, w, T, context).total * (share or 1.0)
        return hidden(tokens, pos, read, write)

    def timed_queries(*args):
        clock[0] += T_SELECT
        return queries(*args)

    monkeypatch.setattr(model, "hidden", timed_hidden)
    monkeypatch.setattr(model, "queries", timed_queries)
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    return clock


@pytest.mark.parametrize(
    "factor, within", [({0: 1.0, 1: 1.0, 3: 1.0}, 0.003), ({0: 1.0, 1: 2.0, 3: 1.2}, 0.05)]
)
def test_calibration_finds_the_times_of_a_known_machine(monkeypatch, factor, within):
    """At lengths that it did not time, too; the second machine is none that a formula explains."""
    engine = Engine(tiny_model(), 4, 800, Strategy(), Sampling())
    on_a_known_machine(engine, factor, monkeypatch)
    auto = Auto(engine, candidates("streaming", "snapkv", "ngram"), GAMMAS)
    measured = list(auto.candidates)
    auto.prepare()
    config = engine.model.config
    for length in (100, 300, 800):
        w = Workload(4, length, itemsize=4)
        true = {g: forward_time(config, MACHINE, w, g + 1).total * f for g, f in factor.items()}
        assert auto.verify_seconds(length) == pytest.approx(true, rel=within)
    draft = forward_time(config, MACHINE, Workload(4, 800, itemsize=4), 1, 24).total
    for c in measured:
        assert c.t_draft == pytest.approx(0 if c.is_lookup else draft)
        assert c.t_select == pytest.approx(T_SELECT if c.strategy.policy == "snapkv" else 0)
        assert c.select_every == (16 if c.strategy.policy == "snapkv" else 0)
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


def test_what_is_decided_after_a_forward_is_part_of_its_time(monkeypatch):
    """Sampling from a large vocabulary takes longer than the forward here."""
    engine = Engine(tiny_model(), 2, 200, Strategy(), Sampling(1.0, top_p=0.9))
    clock, accept = on_a_known_machine(engine, {}, monkeypatch), engine.accept

    def slow(draft, logits):
        clock[0] += logits.shape[1]
        return accept(draft, logits)

    monkeypatch.setattr(engine, "accept", slow)
    auto = Auto(engine, candidates("ngram"), GAMMAS)
    auto.calibrate()
    for gamma, seconds in auto.verify_seconds(100).items():
        assert seconds == pytest.approx(gamma + 1, rel=0.05)
    greedy = Engine(tiny_model(), 2, 200, Strategy(), Sampling())
    assert Auto(greedy, candidates("ngram"), GAMMAS).key() != auto.key()


@pytest.mark.parametrize("G, gammas", [
    (1, (1, 3, 11)), (2, (1, 3, 7, 11)), (3, (1, 3, 4, 9, 11)), (4, (1, 3, 7, 11)),
    (7, (1, 3, 8)), (8, (1, 3, 7)), (16, (1, 3)), (64, (1, 3)),
])  # fmt: skip
def test_on_cuda_drafts_fill_a_tile_of_queries(G, gammas):
    assert draft_lengths("cuda", G) == gammas
    assert draft_lengths("cpu", G) == (2, 5)
