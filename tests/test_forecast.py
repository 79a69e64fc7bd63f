"""Acceptance by row and by place, the time to the end of a batch, and what rounds really take."""

import math
import random

import pytest

from acceptance import omega
from forecast import MEMORY, NOISE, OPTIMISTIC, OUTLIER, PRIOR, Ahead, Clock, Record


def histograms(*rows: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Of rows whose rounds had as many drafts as some kept."""
    return [*rows], [[0] * (len(row) - 1) + [sum(row)] for row in rows]


def saw(*rows: list[int], record: Record | None = None) -> Record:
    return (record or Record()).after(*histograms(*rows))


def tokens(record: Record, gamma: int) -> float:
    """Of the only row."""
    return record.tokens(gamma)[0][gamma]


def test_every_place_in_a_round_has_an_acceptance_of_its_own():
    """Acceptance comes in runs: one number, measured at gamma 5, says 2.01 tokens at gamma 2."""
    record = saw([70, 0, 0, 0, 0, 30])
    assert tokens(record, 2) == pytest.approx(1.6) and tokens(record, 5) == pytest.approx(2.5)
    for gamma in (1, 2, 3):  # of a shorter round, whatever the histogram: its drafts are a prefix
        kept = 7 * 0 + 3 * min(1, gamma) + 5 * min(2, gamma) + 4 * min(3, gamma)
        assert tokens(saw([7, 3, 5, 4]), gamma) == pytest.approx(1 + kept / 19)
        assert tokens(saw([7, 3, 5, 4]), 3) >= tokens(saw([7, 3, 5, 4]), gamma)


def test_drafts_that_the_end_of_a_row_cuts_off_are_not_judged():
    """Of 10 rounds, 4 had room for one draft only; they kept it, the others kept 1 of 3 or all."""
    record = Record().after([[0, 7, 0, 3]], [[0, 4, 0, 6]])
    assert record.rows == [([10, 6, 3], [10, 3, 3], 10)]
    assert tokens(record, 3) == pytest.approx(1 + 1 + 0.5 + 0.5)
    room_for_none = [[5, 0, 0]]
    assert record.after(room_for_none, room_for_none) is record
    assert record.known and not Record().known


def test_longer_rounds_than_seen_go_on_like_the_last_place():
    record = saw([4, 4, 2])  # 6 of 10 keep the first draft, 2 of these 6 the second
    known = 1 + 0.6 + 0.2
    assert tokens(record, 2) == pytest.approx(known)
    assert tokens(record, 4) == pytest.approx(known + 0.2 / 3 + 0.2 / 9)
    record = saw([3, 0, 0, 3], record=record)  # now with 3 drafts; what was before counts for 6
    assert record.rows[0].judged == pytest.approx([12, 6.6, 3])
    rates = 6.6 / 12, 4.2 / 6.6, 1.0
    assert tokens(record, 3) == pytest.approx(1 + rates[0] + 2 * rates[0] * rates[1])
    assert tokens(record, 4) == pytest.approx(tokens(record, 3) + rates[0] * rates[1])
    record = saw([0, 10], record=record)  # with one draft: nothing new of the others
    first = (6.6 / 2 + 10) / (6 + 10)
    assert tokens(record, 3) == pytest.approx(1 + first * (1 + 2 * rates[1]))
    for _ in range(5):
        record = saw([0, 16], record=record)
    assert record.rows[0].judged[1] < 1  # so long ago that it is not known any more
    assert tokens(record, 3) == pytest.approx(4, rel=0.02)


def test_what_was_seen_before_counts_for_a_few_rounds_at_most():
    record = saw([10, 0, 0, 0])
    assert (tokens(record, 3), record.rows[0].rounds) == (1, 10)
    record = saw([0, 0, 0, 10], record=record)
    assert tokens(record, 3) == pytest.approx(1 + 3 * 10 / 16) and record.rows[0].rounds == 16
    record = saw([0, 0, 0, 14], record=record)  # the 16 before weigh as much as 6
    assert tokens(record, 3) == pytest.approx(1 + 3 * (6 * 10 / 16 + 14) / 20)
    assert saw([0, 0, 0, 0], record=record) is record and record.rows[0].rounds == 20
    only = saw([0, 0, 5], record=record.forgotten())  # what comes counts alone
    assert tokens(record.forgotten(), 3) == tokens(record, 3) and tokens(only, 2) == 3


def test_a_row_goes_like_all_rows_until_its_own_rounds_are_known():
    """Row 0 keeps all, row 1 nothing, of row 2 nothing is known yet."""
    record = saw([0, 8], [8, 0], [0, 0])
    pooled = 8 / 16
    rates = [(8 + PRIOR * pooled) / (8 + PRIOR), PRIOR * pooled / (8 + PRIOR), pooled]
    assert [row[1] for row in record.tokens(1)] == pytest.approx([1 + rate for rate in rates])
    assert [row[2] for row in record.tokens(2)] == pytest.approx([omega(2, r) for r in rates])
    assert [row[0] for row in record.tokens(2)] == [1, 1, 1]
    more = saw([0, 8], [8, 0], [0, 80], record=record)  # each row has a memory of its own
    assert [row.rounds for row in more.rows] == [MEMORY + 8, MEMORY + 8, 80]
    assert more.tokens(1)[2][1] > 1.95 and more.tokens(1)[1][1] < 1.15
    assert tokens(Record(), 3) == pytest.approx(omega(3, OPTIMISTIC))


def test_what_is_believed_of_a_kind_of_rows_counts_for_a_few_rounds():
    """Kind 1 keeps nothing though it is believed to; of kind 0 nothing is seen."""
    believed = [[0.0, 0.5], [0.5, 0.8]]
    record = Record(believed=believed)
    assert record.known and record.tokens(2) == [[1, 1, 1], [1, 1.5, pytest.approx(1.9)]]
    record = saw([0, 0], [8, 0], record=record)  # of one draft
    rate = PRIOR * 0.5 / (PRIOR + 8)
    assert record.tokens(2)[1] == pytest.approx([1, 1 + rate, 1 + rate + rate * 0.8])
    assert record.tokens(2)[0] == [1, 1, 1] and [row.rounds for row in record.rows] == [0, 8]
    assert saw([0, 4], [0, 0], record=record).believed is believed


def test_the_time_to_the_end_is_that_of_the_rounds_one_by_one():
    """Against a loop over rounds, in which rows that have ended read nothing."""
    verify, idle, draft = 11.0, 3.0, 0.5
    ahead = Ahead([30.0, 0, 12, 7], {0: 8.0, 5: verify}, {0: 2.0, 5: idle})
    rounds = [n / tokens for n, tokens in zip(ahead.remaining, (3, 9, 4, 7), strict=True)]
    assert rounds == [10, 0, 3, 1]
    busy = [sum(r > i for r in rounds) for i in range(10)]
    expected = sum(draft + idle + n * (verify - idle) / 4 for n in busy)
    assert ahead.seconds(5, rounds, draft) == pytest.approx(expected)
    assert ahead.plain == pytest.approx(30 * 2 + (30 + 12 + 7) * 6 / 4)
    refilled = ahead._replace(refilled=True)  # of the three that run, nobody waits
    assert refilled.seconds(5, rounds, draft) == pytest.approx(14 / 3 * 3.5 + 14 * 8 / 4)


def rounds(clock: Clock, true: dict[int, float], gammas: list[int], noise: float = 0.0) -> None:
    """The clock sees so many rounds, that take what is true, where 1 was calibrated."""
    rng = random.Random(0)
    for gamma in gammas:
        foreseen = clock.corrected(dict.fromkeys(true, 1.0))[gamma]
        clock.saw(gamma, true[gamma] * math.exp(rng.gauss(0, noise)) / foreseen)


def test_the_clock_finds_what_rounds_take():
    true = {0: 0.9, 2: 1.0, 5: 1.1, 12: 1.3}
    for noise, within in ((0.0, 0.03), (NOISE, 0.07)):
        clock = Clock([*true])
        rounds(clock, true, [0, 2, 5, 12] * 50, noise)
        assert clock.corrected(dict.fromkeys(true, 2.0)) == pytest.approx(
            {g: 2 * t for g, t in true.items()}, rel=within
        )


def test_rounds_of_one_gamma_say_more_of_its_neighbours_than_of_others():
    """That all took longer is as likely as that one did; near gammas are alike."""
    clock = Clock([0, 2, 5, 12])
    rounds(clock, dict.fromkeys((0, 2, 5, 12), 1.3), [12] * 9)
    factors = clock.corrected(dict.fromkeys((0, 2, 5, 12), 1.0))
    assert 1.05 < factors[0] < factors[2] < factors[5] < factors[12] < 1.3
    rounds(clock, dict.fromkeys((0, 2, 5, 12), 1.0), [0] * 9)  # so plain steps are not slow
    again = clock.corrected(dict.fromkeys((0, 2, 5, 12), 1.0))
    assert again[0] == pytest.approx(1, abs=0.01)
    assert all(1.05 < again[gamma] < factors[gamma] for gamma in (2, 5, 12))


def test_a_round_that_was_interrupted_hardly_counts_and_all_is_forgotten_in_time():
    clock = Clock([0, 5])
    rounds(clock, {0: 1.0, 5: 1.0}, [0, 5] * 20)
    clock.saw(5, 1000.0)
    factors = clock.corrected({0: 1.0, 5: 1.0})
    assert 1 < factors[5] / factors[0] < math.exp(OUTLIER / 5)
    rounds(clock, {0: 1.0, 5: 1.0}, [0] * 500)
    assert clock.corrected({5: 1.0})[5] == pytest.approx(1, abs=0.01)
    rounds(clock, {0: 1.0, 5: 1.4}, [0, 5] * 10)  # the machine is another one now: soon noticed
    assert clock.corrected({0: 1.0, 5: 1.0})[5] > 1.3
