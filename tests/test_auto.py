"""--draft auto: lossless whatever it decides, and it decides by the numbers it was given."""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import device
from acceptance import omega
from auto import (
    FOLLOW,
    LEAD,
    MARGIN,
    MAX_SWEEPS,
    SHORT,
    STAY,
    STEADY,
    SWEEPS,
    Auto,
    Candidate,
    Choice,
)
from forecast import MEMORY, PRIOR, Ahead, Record
from kv_cache import SparseKVCache
from lookup import NGRAM
from measure import decode
from policies import POLICIES, Strategy
from refill import generate
from roofline import HARDWARE, Workload, forward_time
from sampling import Sampling
from selection import Selection
from spec_decode import Engine
from tests.reference import plain_greedy, tiny_model
from tests.test_spec_decode import PROMPTS

GAMMAS = (1, 3)
CHEAP = {0: 1.0, 1: 1.0, 3: 1.1}  # verifying costs little: seconds by gamma
DEAR = {0: 1.0, 1: 1.8, 3: 3.5}  # drafting can hardly win


def candidates(*policies: str) -> list[Candidate]:
    return [Candidate(Strategy(p, max(GAMMAS), 24, 3, obs_window=7)) for p in policies]


def counts(accepted: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Histograms of one row, all of whose rounds had as many drafts as some of them kept."""
    return [accepted], [[0] * (len(accepted) - 1) + [sum(accepted)]]


def saw(accepted: list[int]) -> Record:
    return Record().after(*counts(accepted))


def ahead(verify: dict[int, float]) -> Ahead:
    """One row, with one token to come."""
    return Ahead([1], verify, verify)


def prefilled(
    found: list[Candidate], verify: dict[int, float], monkeypatch, n: int = 60, named: bool = False
) -> Auto:
    """An Auto that has these candidates, costing what they say, and believes these times."""
    engine = Engine(tiny_model(), 4, 80 + n, Strategy(), Sampling())
    auto = Auto(engine, found, GAMMAS, named)
    monkeypatch.setattr(auto, "verify_seconds", lambda length, seen=None: verify)
    for c in found:
        c.drafter = engine.add(c.strategy, c.draft_model)
    engine.prefill(PROMPTS, [n] * 4)
    return auto


def probes(auto: Auto, monkeypatch, **accepted: list[int]) -> None:
    """Instead of probing, let candidates have this record, by policy."""

    def probe() -> Iterator[None]:
        for c in auto.candidates:
            if c.strategy.policy in accepted and not c.record.known:
                c.record = saw(accepted[c.strategy.policy])
        yield from ()

    monkeypatch.setattr(auto, "probe", probe)


def test_a_candidates_speedup_is_the_formula():
    """Of one row. Half of all drafts at every place; a selection every fourth round."""
    selecting = SimpleNamespace(select_every=4)
    c = Candidate(Strategy("snapkv"), t_draft=0.1, t_select=0.8)
    c.drafter = selecting
    c.record = saw([8, 4, 2, 2])
    assert c.seconds(ahead(CHEAP), 3, [1.0]) == pytest.approx(3 * 0.1 + 0.2 + 1.1)
    best = c.best(ahead({0: 2.0, 3: 1.1}), 0.0)
    assert best == (c, 3, pytest.approx(2 * omega(3, 0.5) / 1.6))
    c.record, c.t_select = saw([7000, 2100, 630, 270]), 0.0
    assert c.best(ahead(CHEAP)) == (c, 1, pytest.approx(1.3 / 1.1))
    c.record = saw([2000, 1900, 1805, 34295])  # 0.95 of each
    assert c.best(ahead(CHEAP)).gamma == 3 and c.best(ahead(DEAR)) == Choice()
    c.record = Record()
    assert c.best(ahead(CHEAP)).speedup == pytest.approx(omega(3, 0.95) / 1.4)  # optimistic
    assert MARGIN > 1


def test_a_batch_is_chosen_for_by_its_slowest_row_and_refilled_rows_by_the_mean():
    """Long drafts help three rows of four; the fourth keeps none, and pays for their places."""
    c = Candidate(Strategy("ngram", 12))
    c.drafter = SimpleNamespace(select_every=0)
    all_kept, none_kept = [0] * 12 + [100], [100] + [0] * 12
    c.record = Record().after([*[all_kept] * 3, none_kept], [all_kept] * 4)
    times = {0: 1.0, 2: 1.2, 12: 1.5}, {0: 0.6, 2: 0.8, 12: 1.1}
    fixed = Ahead([100] * 4, *times)
    assert c.best(fixed) == Choice() and c.best(fixed, 0.0).gamma == 2
    assert c.best(fixed._replace(refilled=True)).gamma == 12
    ended = fixed._replace(remaining=[100, 100, 100, 0])
    assert c.best(ended)[1:] == (12, pytest.approx(8.0, rel=0.05))


@pytest.mark.parametrize("verify", [CHEAP, DEAR])
def test_whatever_it_decides_the_output_is_the_models_own(monkeypatch, verify):
    model = tiny_model()
    auto = prefilled(candidates("ngram", "streaming", "mixed"), verify, monkeypatch)
    expected = [plain_greedy(model, p, 60) for p in PROMPTS]
    for _ in range(2):
        auto.engine.rewind()
        stats = decode(auto.engine, auto=auto)
        assert auto.engine.batch.outputs() == expected
        assert stats.decoded_tokens == 4 * 59
        assert sum(stats.drafted_histogram) == stats.row_rounds > 0


def reject(draft, logits):
    """In place of Engine.accept: no draft is kept."""
    return torch.zeros(len(logits), dtype=torch.int64), logits[:, 0].argmax(dim=-1)


def test_where_nothing_can_win_no_round_is_spent_on_it(monkeypatch):
    auto = prefilled(candidates("ngram", "streaming"), {0: 1.0, 1: 3.0, 3: 9.0}, monkeypatch)
    stats = decode(auto.engine, auto=auto)
    assert stats.drafts == 0 and stats.rounds == 59
    assert auto.first == Choice()
    assert "no draft" in auto.explain()


@pytest.mark.parametrize("policy", ["streaming", "ngram"])
def test_a_named_draft_is_used_from_the_first_round_to_the_last(monkeypatch, policy):
    """Also where it cannot win: only its gamma is chosen, here the shorter one soon."""
    auto = prefilled(candidates(policy), {0: 1.0, 1: 2.5, 3: 6.0}, monkeypatch, named=True)
    stats = decode(auto.engine, auto=auto)
    assert stats.drafted_histogram[0] <= 4  # the last round of a row has room for no draft
    assert len(stats.drafted_histogram) == 2  # also in the trial
    (c,) = auto.candidates
    assert auto.first[:2] == (c, 1) and auto.engine.drafter is c.drafter
    assert 0 < auto.first.speedup < 1
    assert auto.engine.batch.outputs() == [plain_greedy(tiny_model(), p, 60) for p in PROMPTS]
    assert f"{c}, gamma 1 (the draft as asked), predicted speedup 0." in auto.explain()


@pytest.mark.parametrize("match, tried", [(0, True), (NGRAM, False)])
def test_a_named_draft_with_a_part_that_may_do_alone_has_a_trial_if_it_may_gain(
    monkeypatch, match, tried
):
    """Something drafts in any case, though plain decoding would be faster."""
    auto = prefilled(candidates("ngram", "mixed"), {0: 1.0, 1: 4.0, 3: 4.0}, monkeypatch, 99, True)
    lookup, both = auto.candidates
    both.t_draft = 0.01
    monkeypatch.setattr(lookup.drafter, "kinds", lambda: [match] * 4)

    def accept(draft, logits):
        return torch.full((len(logits),), 0 if tried else 3), logits[:, 0].argmax(dim=-1)

    monkeypatch.setattr(auto.engine, "accept", accept)
    who, run = [], auto.run
    monkeypatch.setattr(auto, "run", lambda c, *how: who.append((c, *how)) or run(c, *how))
    for _, _ in zip(auto.rounds(), range(9), strict=False):
        pass
    assert [c for c, *_ in who[:LEAD]] == [lookup] * LEAD and None not in [c for c, *_ in who]
    assert (who[LEAD][0] is both) == tried
    assert "as asked" not in auto.explain()


def test_a_named_draft_is_never_dropped_but_refused(monkeypatch):
    engine = Engine(tiny_model(), 2, 300, Strategy(), Sampling())
    auto = Auto(engine, candidates("streaming"), GAMMAS, named=True)
    times = {0: 1.0, 1: 30.0, 3: 90.0}
    monkeypatch.setattr(auto, "verify_seconds", lambda length, seen=None: times)
    auto.calibrate()  # an unnamed one could not win
    (c,) = auto.candidates
    assert engine.drafter is c.drafter and not auto.dropped
    auto = Auto(engine, [Candidate(Strategy("full", 3))], GAMMAS, named=True)
    with pytest.raises(ValueError, match="needs a draft model"):
        auto.calibrate()


def test_what_the_engine_refuses_or_cannot_win_is_dropped_for_the_others(monkeypatch):
    """And no drafter is left behind of it."""
    engine = Engine(tiny_model(), 2, 300, Strategy(), Sampling())
    found = [*candidates("snapkv", "streaming", "ngram"), Candidate(Strategy("full", 3))]
    auto, add = Auto(engine, found, GAMMAS), engine.add

    def scarce(strategy, draft_model=None):
        if strategy == found[0].strategy:
            raise ValueError("the KV caches need 9 GiB")
        return add(strategy, draft_model)

    monkeypatch.setattr(engine, "add", scarce)
    times = {0: 1.0, 1: 1.0, 3: 1.0}
    monkeypatch.setattr(auto, "verify_seconds", lambda length, seen=None: times)
    monkeypatch.setattr(
        auto, "measure", lambda c, _: setattr(c, "t_draft", 9 * len(c.drafter.caches))
    )
    auto.calibrate()
    kept = found[2]
    assert auto.candidates == [kept] and engine.drafters == [kept.drafter]
    assert engine.drafter is kept.drafter and len(found) == 4  # the caller's own list
    snapkv, streaming, full = auto.dropped
    assert snapkv == "snapkv 24: the KV caches need 9 GiB"
    assert full.startswith("full: draft policy full needs a draft model")
    assert streaming == "streaming 24: T_D 9000.0 ms, could not win"


def test_who_cannot_win_makes_room_for_the_next(monkeypatch):
    """Before the next one is made, though the candidates are still listed."""
    engine = Engine(tiny_model(), 2, 300, Strategy(), Sampling())
    auto, add, made = Auto(engine, candidates("snapkv", "streaming"), GAMMAS), engine.add, []

    def note(*args):
        assert all(drafter() is None for drafter in made)
        made.append(weakref.ref(drafter := add(*args)))
        return drafter

    monkeypatch.setattr(engine, "add", note)
    times = {0: 1.0, 1: 30.0, 3: 90.0}
    monkeypatch.setattr(auto, "verify_seconds", lambda length, seen=None: times)
    auto.calibrate()
    assert len(made) == len(auto.dropped) == 2


def test_a_good_draft_is_chosen_and_kept(monkeypatch):
    """A budget for everything is always accepted; the lookup in random text hardly ever."""
    everything = Candidate(Strategy("streaming", 3, 400), t_draft=0.01)
    auto = prefilled([*candidates("ngram"), everything], CHEAP, monkeypatch)
    stats = decode(auto.engine, auto=auto)
    assert auto.first[:2] == (everything, 3) and auto.first.speedup > 3
    assert all(row[3] > 1 + 3 * 0.98 for row in everything.record.tokens(3))
    assert stats.rounds <= 4 + 15
    assert "streaming 400, gamma 3" in auto.explain()
    drafts = [c["draft"] for c in auto.decision()["candidates"]]
    assert drafts == ["ngram", "streaming 400"]


def trials(auto: Auto, monkeypatch, **accepted: list[int]) -> list[tuple[str, int, int]]:
    """Who is probed, with which gamma, for how many rounds; they have these outcomes, by policy."""
    runs = []

    def run(c, gamma, n):
        runs.append((c.strategy.policy, gamma, n))
        kept = accepted[c.strategy.policy]
        c.record = c.record.after(*counts([*kept[:gamma], sum(kept[gamma:])]))
        yield

    monkeypatch.setattr(auto, "run", run)
    for _ in auto.probe():
        pass
    return runs


@pytest.mark.parametrize("to_come, n", [(60, 1), (300, 3), (9999, 13)])
def test_a_trial_is_short_where_little_is_to_come(monkeypatch, to_come, n):
    """4% of the tokens to come, or 200 drafts for 4 rows, in quarters."""
    auto = prefilled(candidates("streaming"), CHEAP, monkeypatch)
    auto.engine.batch.limit.copy_(auto.engine.batch.seq_len + to_come)
    quarters = [("streaming", gamma, n) for gamma in (1, 3, 3, 3)]
    assert trials(auto, monkeypatch, streaming=[0, 0, 0, 9]) == quarters


@pytest.mark.parametrize(
    "kept, gammas", [(12, (5, 12, 12, 12)), (5, (5, 12, 5, 5)), (1, (5, 2, 2, 2))]
)
def test_the_longest_drafts_are_tried_where_the_others_are_kept(monkeypatch, kept, gammas):
    """What 5 drafts say of 12 is held against what became of 12."""
    auto = prefilled(candidates("streaming"), {0: 1.0, 2: 1.1, 5: 1.2, 12: 1.6}, monkeypatch)
    auto.gammas = 2, 5, 12
    auto.engine.batch.limit.add_(9999)
    outcome = [0] * kept + [9] + [0] * (12 - kept)
    assert tuple(gamma for _, gamma, _ in trials(auto, monkeypatch, streaming=outcome)) == gammas


def test_a_trial_ends_after_a_quarter_if_the_draft_cannot_win(monkeypatch):
    auto = prefilled(candidates("streaming"), {0: 1.0, 1: 1.4, 3: 1.9}, monkeypatch)
    assert trials(auto, monkeypatch, streaming=[9, 0, 0, 0]) == [("streaming", 1, 1)]


@pytest.mark.parametrize(
    "renew, to_come, tried", [(0.0, 8, False), (0.0, 9, True), (0.5, 13, False), (0.5, 14, True)]
)
def test_a_trial_is_worth_it_if_what_it_costs_is_less_than_hoped(
    monkeypatch, renew, to_come, tried
):
    """A round takes 1.9 plain steps, makes 2.7 tokens, and saves 31% of what is to come."""
    verify = {0: 1.0, 1: 1.9, 3: 1.9}
    auto = prefilled(candidates("streaming"), verify, monkeypatch)
    auto.candidates[0].t_renew = renew
    auto.engine.batch.limit.copy_(auto.engine.batch.seq_len + to_come)
    saved = to_come * (1 - 1.9 / omega(3, 0.75))
    assert (0.35 * saved > 0.9 + renew) == tried
    runs = trials(auto, monkeypatch, streaming=[0, 0, 0, 9])
    assert bool(runs) == tried


def test_nobody_is_tried_who_cannot_beat_the_best(monkeypatch):
    """The cheapest goes first; what it reaches, or prompt lookup, is what others must hope for."""
    cheap, dear = candidates("streaming", "snapkv")
    cheap.t_draft, dear.t_draft = 0.01, 0.02
    auto = prefilled([dear, cheap], CHEAP, monkeypatch, n=300)
    runs = trials(auto, monkeypatch, streaming=[0, 0, 0, 9], snapkv=[0, 0, 0, 9])
    assert {policy for policy, _, _ in runs} == {"streaming"}
    cheap.record = dear.record = Record()
    runs = trials(auto, monkeypatch, streaming=[9, 0, 0, 0], snapkv=[0, 0, 0, 9])
    assert {policy for policy, _, _ in runs} == {"streaming", "snapkv"}
    cheap.record, dear.record = Record(), saw([0, 0, 0, 9])  # known already, as by looking back
    assert not trials(auto, monkeypatch)


def test_every_text_is_judged_anew(monkeypatch):
    """By what is believed of its matches; then by the rounds of who led, and of who was probed."""
    auto = prefilled(candidates("ngram", "streaming"), CHEAP, monkeypatch)
    lookup, streaming = auto.candidates
    monkeypatch.setattr(lookup.drafter, "kinds", lambda: [NGRAM] * 4)
    monkeypatch.setattr(auto.engine, "accept", reject)
    records, choose = [], auto.choose
    monkeypatch.setattr(auto, "choose", lambda *how: records.append(lookup.record) or choose(*how))
    for _ in range(2):
        lookup.record = streaming.record = saw([0, 0, 0, 9])
        auto.engine.rewind()
        records.clear()
        for _, _ in zip(range(LEAD), auto.rounds(), strict=False):
            assert auto.engine.drafter is lookup.drafter and not streaming.record.known
        assert records[0].tokens(1)[NGRAM][1] == 1 + NGRAM / (NGRAM + 1)
        of_4_rows = PRIOR * NGRAM / (NGRAM + 1) / (PRIOR + MEMORY + 4)
        assert records[-1].tokens(1)[NGRAM][1] == pytest.approx(1 + of_4_rows)


def test_how_far_lookup_drafts_depends_on_the_matches_of_this_round(monkeypatch):
    """Without one not at all, though all before were kept; each length has its own record."""
    auto = prefilled(candidates("ngram"), {0: 1.0, 1: 1.2, 3: 1.8}, monkeypatch)
    (c,) = auto.candidates
    matches = [[0] * 4, [1] * 4, [NGRAM] * 4, [0] * 4, [NGRAM, NGRAM, NGRAM, 1]]
    looks, drafted, run = iter([matches[0], *matches, [0] * 4]), [], auto.run
    monkeypatch.setattr(c.drafter, "kinds", lambda: next(looks))
    monkeypatch.setattr(
        auto, "run", lambda c, gamma, n: drafted.append((gamma, n)) or run(c, gamma, n)
    )
    kept = iter([[0] * 4, [1, 0, 0, 0], [3, 3, 0, 3], [0] * 4, [1] * 4, [0] * 4])

    def accept(draft, logits):
        return torch.tensor(next(kept)), logits[:, 0].argmax(dim=-1)

    monkeypatch.setattr(auto.engine, "accept", accept)
    for _, _ in zip(range(6), auto.rounds(), strict=False):
        pass
    assert drafted == [(0, 1), (1, 1), (3, 1), (0, 1), (1, 1), (0, 1)]
    places = [(row.judged, row.kept) for row in c.record.rows]
    assert places == [((), ()), ([5], [2]), ((), ()), ([7, 3, 3], [6, 3, 3])]


@pytest.mark.parametrize("kept", [0, 3])
def test_who_was_not_worth_a_trial_has_it_when_it_is(monkeypatch, kept):
    """Prompt lookup leads and is good, or soon keeps nothing: then the other one is tried."""
    auto = prefilled(candidates("ngram", "streaming"), CHEAP, monkeypatch, n=200)
    lookup, other = auto.candidates
    other.t_draft, other.t_renew = 0.05, 3.0
    monkeypatch.setattr(lookup.drafter, "kinds", lambda: [NGRAM] * 4)

    def accept(draft, logits):
        n = kept if auto.engine.drafter is lookup.drafter else 0
        return torch.full((len(logits),), n), logits[:, 0].argmax(dim=-1)

    monkeypatch.setattr(auto.engine, "accept", accept)
    tried, run = [], auto.run
    monkeypatch.setattr(auto, "run", lambda c, *how: tried.append(c) or run(c, *how))
    decode(auto.engine, auto=auto)
    assert tried[0] is lookup and (other in tried) == (not kept)


def test_one_bad_look_is_no_reason_for_a_trial(monkeypatch):
    """At the look that trials are considered at, nothing matches; before and after it all does."""
    auto = prefilled(candidates("ngram", "streaming"), CHEAP, monkeypatch, n=200)
    lookup, other = auto.candidates
    other.t_draft, looks = 0.05, []
    bad = LEAD + 2 + LEAD  # after those of the lead, of the probe and of the first choice

    def kinds() -> list[int]:
        looks.append(0 if len(looks) == bad - 1 else NGRAM)
        return looks[-1:] * 4

    def accept(draft, logits):
        return torch.full((len(logits),), draft.shape[1]), logits[:, 0].argmax(dim=-1)

    monkeypatch.setattr(lookup.drafter, "kinds", kinds)
    monkeypatch.setattr(auto.engine, "accept", accept)
    tried, run = [], auto.run
    monkeypatch.setattr(auto, "run", lambda c, *how: tried.append(c) or run(c, *how))
    decode(auto.engine, auto=auto)
    assert set(tried) == {lookup, None} and tried.index(None) == LEAD + LEAD


def test_who_was_not_probed_is_not_chosen(monkeypatch):
    auto = prefilled(candidates("streaming", "snapkv"), CHEAP, monkeypatch)
    probes(auto, monkeypatch, snapkv=[50, 0, 0, 50])
    decode(auto.engine, auto=auto)
    assert auto.first.candidate is auto.candidates[1]
    assert "streaming 24: T_D 0.0 ms, not probed" in auto.explain()


def test_the_first_choice_has_the_least_predicted_time_whoever_was_probed_last(monkeypatch):
    better, later = candidates("streaming", "snapkv")
    better.t_draft, later.t_draft = 0.10, 0.112
    auto = prefilled([better, later], CHEAP, monkeypatch)
    probes(auto, monkeypatch, streaming=[10, 10, 10, 70], snapkv=[10, 10, 10, 70])
    auto.engine.switch(later.drafter)
    gain = better.best(ahead(CHEAP)).speedup / later.best(ahead(CHEAP)).speedup
    assert 1 < gain < STAY  # the one in use would be kept
    decode(auto.engine, auto=auto)
    assert auto.first.candidate is better
    better.record = later.record = better.probed
    assert auto.choose(ahead(CHEAP), None, STAY).candidate is better
    assert auto.choose(ahead(CHEAP), later, STAY).candidate is later


def test_nothing_is_decided_any_more_when_all_rows_are_finished(monkeypatch):
    """The rows end at the first look; what it would change to is neither made nor reported."""
    auto = prefilled(candidates("streaming"), {0: 1.0, 1: 1.4, 3: 1.9}, monkeypatch, n=4)
    (c,) = auto.candidates
    probes(auto, monkeypatch, streaming=[1, 0, 0, 3])
    monkeypatch.setattr(auto.engine, "accept", reject)
    decode(auto.engine, auto=auto)
    assert auto.mostly[:2] == (c, 3) and auto.engine.drafter is c.drafter


def test_the_acceptance_of_the_first_prediction_is_printed_beside_it(monkeypatch):
    """And not that of the end, when all drafts have been rejected for a while."""
    auto = prefilled(candidates("streaming"), {0: 1.0, 1: 1.4, 3: 1.9}, monkeypatch, n=30)
    (c,) = auto.candidates
    probes(auto, monkeypatch, streaming=[1, 0, 0, 9])
    monkeypatch.setattr(auto.engine, "accept", reject)
    decode(auto.engine, auto=auto)
    assert max(row[3] for row in c.record.tokens(3)) < 1.9 and auto.mostly == Choice()
    assert auto.first.speedup == pytest.approx((1 + 3 * 0.9) / 1.9)
    assert "acceptance 0.90 at gamma 3" in auto.explain()
    (said,) = auto.decision()["candidates"]
    assert (said["gamma"], said["acceptance"]) == (3, pytest.approx(0.9))
    assert auto.decision()["verify_seconds"] == {0: 1.0, 1: 1.4, 3: 1.9}


def test_prompt_lookup_takes_over_where_the_text_begins_to_repeat(monkeypatch):
    bad = Candidate(Strategy("streaming", 3, 24, 3), t_draft=0.02)
    auto = prefilled([bad, *candidates("ngram")], CHEAP, monkeypatch, n=120)
    engine, (_, lookup) = auto.engine, auto.candidates
    probes(auto, monkeypatch, streaming=[10, 0, 0, 90])
    looks = iter([0] * (LEAD + 1))  # before the first choice
    monkeypatch.setattr(lookup.drafter, "kinds", lambda: [next(looks, NGRAM)] * 4)
    decode(auto.engine, auto=auto)
    assert auto.first.candidate is bad and engine.drafter is lookup.drafter
    assert auto.mostly.candidate is lookup
    assert engine.batch.outputs() == [plain_greedy(tiny_model(), p, 120) for p in PROMPTS]


@pytest.mark.parametrize("others", [(), ("ngram",)])
def test_a_draft_that_turns_bad_is_given_up_and_tried_again_after_longer_and_longer(
    monkeypatch, others
):
    """Its first rounds were good. When it is tried again, the latest rounds alone count.

    If there is prompt lookup, which never pays here, it is looked at in between.
    """
    found = candidates("streaming", *others)
    auto = prefilled(found, {0: 1.0, 1: 1.4, 3: 1.9}, monkeypatch, n=250)
    c, *lookups = auto.candidates
    for lookup in lookups:
        monkeypatch.setattr(lookup.drafter, "kinds", lambda: [0] * 4)
    probes(auto, monkeypatch, streaming=[10, 0, 0, 90])
    monkeypatch.setattr(auto.engine, "accept", reject)
    runs, run = [], auto.run
    monkeypatch.setattr(auto, "run", lambda *what: runs.append(what) or run(*what))
    stats = decode(auto.engine, auto=auto)
    assert auto.first.candidate is c and auto.first.speedup > 1.5
    tried = (c, 3, FOLLOW)
    rests = [[(None, 0, 1)] * n if others else [(None, 0, n)] for n in (32, 64, 128, 256)]
    led = [(None, 0, 1)] * LEAD if others else []
    until_the_end = [
        *led,
        *[tried] * 4,
        *rests[0],
        tried,
        *rests[1],
        tried,
        *rests[2],
        tried,
        *rests[3],
    ]
    assert runs == until_the_end[: len(runs)] and len(runs) > len(until_the_end) - len(rests[3])
    assert stats.drafted_histogram[0] == stats.row_rounds - stats.drafts > 4 * 200
    assert auto.engine.batch.outputs() == [plain_greedy(tiny_model(), p, 250) for p in PROMPTS]


def test_it_follows_by_the_times_at_the_length_that_the_text_has_reached(monkeypatch):
    """And then stays with whom it has, unless another one is clearly better."""
    auto = prefilled(candidates("streaming"), CHEAP, monkeypatch)
    (c,) = auto.candidates
    probes(auto, monkeypatch, streaming=[0, 0, 0, 9])
    times, choose, asked = iter([CHEAP, DEAR]), auto.choose, []
    monkeypatch.setattr(auto, "ahead", lambda: Ahead([1] * 4, *[next(times, DEAR)] * 2))
    monkeypatch.setattr(auto.engine, "accept", reject)
    monkeypatch.setattr(auto, "choose", lambda *how: asked.append(how) or choose(*how))
    decode(auto.engine, auto=auto)
    said = [(what.verify, now, stay) for what, now, stay, *_ in asked[:3]]
    assert said == [(CHEAP, None, 1.0), (DEAR, c, STAY), (DEAR, None, STAY)]
    assert auto.verify == CHEAP


def test_a_draft_that_did_not_pay_is_not_tried_for_what_one_acceptance_would_say(monkeypatch):
    """All drafts are kept or none: 1.9 tokens a round. 90 of 160 judged would say 2.06."""
    auto = prefilled(candidates("streaming"), {0: 1.0, 1: 1.8, 3: 1.92}, monkeypatch, n=80)
    (c,) = auto.candidates
    probes(auto, monkeypatch, streaming=[70, 0, 0, 30])
    stats = decode(auto.engine, auto=auto)
    assert omega(3, 90 / 160) > STAY * 1.92
    assert stats.rounds == 79 and stats.drafts == 0


MACHINE = replace(HARDWARE["cpu"], flop_efficiency=0.05, layer_seconds=1e-6)
T_SELECT = 0.5  # seconds of a selection


def on_a_known_machine(engine: Engine, factor: dict[int, float], monkeypatch) -> list[float]:
    """Forwards take what the cost model says of MACHINE, times a factor by drafts verified.

    A draft step reads 24 tokens. No time passes otherwise. Returns the clock.
    """
    clock, model, config = [0.0], engine.model, engine.model.config
    hidden, select = model.hidden, Selection.select

    def timed_hidden(tokens, pos, read=None, write=None):
        w, T = Workload(len(tokens), int(pos[0, 0]) + 1, itemsize=4), tokens.shape[1]
        context, share = (24, 1.0) if isinstance(read, SparseKVCache) else (None, factor.get(T - 1))
        clock[0] += forward_time(config, MACHINE, w, T, context).total * (share or 1.0)
        return hidden(tokens, pos, read, write)

    def timed_select(self, *args):
        clock[0] += T_SELECT * bool(self.sparse.n_observed)
        return select(self, *args)

    monkeypatch.setattr(model, "hidden", timed_hidden)
    monkeypatch.setattr(Selection, "select", timed_select)
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    return clock


@pytest.mark.parametrize(
    "factor, within", [({0: 1.0, 1: 1.0, 3: 1.0}, 0.01), ({0: 1.0, 1: 2.0, 3: 1.2}, 0.05)]
)
def test_calibration_finds_the_times_of_a_known_machine(monkeypatch, factor, within):
    """At lengths that it did not time, too; the second machine is none that a formula explains."""
    engine = Engine(tiny_model(), 4, 800, Strategy(), Sampling())
    on_a_known_machine(engine, factor, monkeypatch)
    auto = Auto(engine, candidates("streaming", "snapkv", "ngram"), GAMMAS)
    measured = list(auto.candidates)
    auto.calibrate()
    config = engine.model.config
    for length in (100, 300, 800):
        w = Workload(4, length, itemsize=4)
        true = {g: forward_time(config, MACHINE, w, g + 1).total * f for g, f in factor.items()}
        assert auto.verify_seconds(length) == pytest.approx(true, rel=within)
    draft = forward_time(config, MACHINE, Workload(4, 800, itemsize=4), 1, 24).total
    for c in measured:
        assert c.t_draft == pytest.approx(draft if c.strategy.policy in POLICIES else 0)
        assert c.t_select == pytest.approx(T_SELECT if c.strategy.select_every else 0)
        assert (c.t_renew > 0) == bool(c.strategy.select_every)
    outputs, _ = generate(engine, PROMPTS, 20)  # what it wrote into the caches does no harm
    assert outputs == [plain_greedy(tiny_model(), p, 20) for p in PROMPTS]


def test_a_slow_moment_does_not_count(monkeypatch):
    """Two of the first sweeps take far longer: it goes on until three agree, and believes those."""
    monkeypatch.setattr("auto.STEADY", STEADY)
    engine = Engine(tiny_model(), 2, 200, Strategy("streaming", 3, 24, 3), Sampling())
    clock, accept = on_a_known_machine(engine, {}, monkeypatch), engine.accept
    calls = []

    def slow(draft, logits):
        sweep, gamma = len(calls) // 6, draft.shape[1]  # of 2 lengths and 3 gammas
        calls.append(gamma)
        clock[0] += (gamma + 1) * (100 if sweep in (0, 2) else 1)
        return accept(draft, logits)

    monkeypatch.setattr(engine, "accept", slow)
    auto = Auto(engine, [], GAMMAS)
    auto.fit()
    assert calls == [0, 1, 3, 0, 1, 3] * (SWEEPS + 3)
    assert engine.drafter is None  # the verifications wrote into the full cache alone
    for gamma, seconds in auto.verify_seconds(100).items():
        assert seconds == pytest.approx(gamma + 1, rel=0.05)


@pytest.mark.parametrize("policy, learns", [("ngram", True), ("streaming", False)])
def test_what_rounds_take_corrects_the_calibration(monkeypatch, policy, learns):
    """Three drafts pay, until verifying them takes six times as long. All drafts are kept.

    A round with forwards of its own says nothing of the verification.
    """
    engine = Engine(tiny_model(), 4, 230, Strategy(), Sampling())
    factor = {0: 1.0, 1: 0.6, 3: 0.4}  # verifying costs little
    clock = on_a_known_machine(engine, factor, monkeypatch)
    monkeypatch.setattr("auto.time", device.time)
    auto = Auto(engine, candidates(policy), GAMMAS, named=True)
    auto.calibrate()
    (c,) = auto.candidates
    engine.prefill(PROMPTS, [150] * 4)
    monkeypatch.setattr(c.drafter, "kinds", lambda: [NGRAM] * 4 if learns else None)

    def accept(draft, logits):
        return torch.full((4,), draft.shape[1]), logits[:, 0].argmax(dim=-1)

    monkeypatch.setattr(engine, "accept", accept)
    used, run = [], auto.run
    monkeypatch.setattr(auto, "run", lambda c, gamma, n: used.append(gamma) or run(c, gamma, n))
    for _, n in zip(auto.rounds(), range(34), strict=False):
        clock[0] += 99.0  # between two rounds: others begin
        factor[3] = 0.4 if n < 8 else 2.4
    assert auto.clock is not None
    factors = auto.clock.corrected(dict.fromkeys(factor, 1.0))
    if learns:
        assert set(used[:9]) == {3} and set(used[-4:]) == {1}
        assert factors[3] / factors[1] > 1.5
    else:
        assert used and factors == dict.fromkeys(factor, 1.0)


@pytest.mark.parametrize("seconds, sweeps", [(0.001, MAX_SWEEPS + 1), (0.05, 5), (0.2, SWEEPS + 1)])
def test_a_short_calibration_has_more_sweeps(monkeypatch, seconds, sweeps):
    """So that its medians are of many."""
    monkeypatch.setattr("auto.SHORT", SHORT)
    engine, calls = Engine(tiny_model(), 2, 200, Strategy(), Sampling()), []
    clock = on_a_known_machine(engine, {}, monkeypatch)

    def accept(draft, logits):
        calls.append(draft)
        clock[0] += seconds

    monkeypatch.setattr(engine, "accept", accept)
    Auto(engine, [], GAMMAS).fit()
    assert len(calls) == 2 * 3 * sweeps  # of 2 lengths and 3 gammas
    assert 21 * 6 * 0.001 < SHORT <= 5 * 6 * 0.05


def test_a_record_of_long_matches_asks_for_long_drafts():
    """By the times of the demo, B = 16: 12 drafts pay where 11 of 12 are kept, 5 where 5 are."""
    verify = {0: 45e-3, 2: 50e-3, 5: 58e-3, 12: 80e-3}
    for t_draft in (0.0, 6e-3):
        c = Candidate(Strategy("ngram", 12), t_draft=t_draft)
        c.drafter = SimpleNamespace(select_every=0)
        for kept, gamma in ((11, 12), (5, 5), (1, 2)):
            c.record = saw([0] * kept + [9] + [0] * (12 - kept))
            assert c.best(ahead(verify))[:2] == (c, gamma)
