"""Records of acceptance by row and by place, and the time to the end of a batch."""

import pytest
import torch

from acceptance import omega
from forecast import MEMORY, OPTIMISTIC, PRIOR, Ahead, Record


def histograms(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows whose rounds had as many drafts as some kept."""
    accepted = torch.tensor(rows)
    drafted = torch.zeros_like(accepted)
    drafted[:, -1] = accepted.sum(dim=1)
    return accepted, drafted


def saw(*rows: list[int], record: Record | None = None) -> Record:
    return (record or Record()).after(*histograms(*rows))


def tokens(record: Record, gamma: int) -> float:
    """Of the only row."""
    return float(record.tokens(gamma)[0, gamma])


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
    record = Record().after(torch.tensor([[0, 7, 0, 3]]), torch.tensor([[0, 4, 0, 6]]))
    assert record.judged.tolist() == [[10, 6, 3]] and record.kept.tolist() == [[10, 3, 3]]
    assert tokens(record, 3) == pytest.approx(1 + 1 + 0.5 + 0.5)
    room_for_none = torch.tensor([[5, 0, 0]])
    assert record.after(room_for_none, room_for_none) is record
    assert record.known and not Record().known


def test_longer_rounds_than_seen_go_on_like_the_last_place():
    record = saw([4, 4, 2])  # 6 of 10 keep the first draft, 2 of these 6 the second
    known = 1 + 0.6 + 0.2
    assert tokens(record, 2) == pytest.approx(known)
    assert tokens(record, 4) == pytest.approx(known + 0.2 / 3 + 0.2 / 9)
    record = saw([3, 0, 0, 3], record=record)  # now with 3 drafts; what was before counts for 6
    assert record.judged[0].tolist() == pytest.approx([12, 6.6, 3])
    rates = 6.6 / 12, 4.2 / 6.6, 1.0
    assert tokens(record, 3) == pytest.approx(1 + rates[0] + 2 * rates[0] * rates[1])
    assert tokens(record, 4) == pytest.approx(tokens(record, 3) + rates[0] * rates[1])
    record = saw([0, 10], record=record)  # with one draft: nothing new of the others
    first = (6.6 / 2 + 10) / (6 + 10)
    assert tokens(record, 3) == pytest.approx(1 + first * (1 + 2 * rates[1]))
    for _ in range(5):
        record = saw([0, 16], record=record)
    assert record.judged[0, 1] < 1  # so long ago that it is not known any more
    assert tokens(record, 3) == pytest.approx(4, rel=0.02)


def test_what_was_seen_before_counts_for_a_few_rounds_at_most():
    record = saw([10, 0, 0, 0])
    assert (tokens(record, 3), float(record.rounds)) == (1, 10)
    record = saw([0, 0, 0, 10], record=record)
    assert tokens(record, 3) == pytest.approx(1 + 3 * 10 / 16) and record.rounds == 16
    record = saw([0, 0, 0, 14], record=record)  # the 16 before weigh as much as 6
    assert tokens(record, 3) == pytest.approx(1 + 3 * (6 * 10 / 16 + 14) / 20)
    assert saw([0, 0, 0, 0], record=record) is record and record.rounds == 20


def test_a_row_goes_like_all_rows_until_its_own_rounds_are_known():
    """Row 0 keeps all, row 1 nothing, of row 2 nothing is known yet."""
    record = saw([0, 8], [8, 0], [0, 0])
    pooled = 8 / 16
    rates = [(8 + PRIOR * pooled) / (8 + PRIOR), PRIOR * pooled / (8 + PRIOR), pooled]
    assert record.tokens(1)[:, 1].tolist() == pytest.approx([1 + rate for rate in rates])
    assert record.tokens(2)[:, 2].tolist() == pytest.approx([omega(2, rate) for rate in rates])
    assert record.tokens(2)[:, 0].tolist() == [1, 1, 1]
    more = saw([0, 8], [8, 0], [0, 80], record=record)  # each row has a memory of its own
    assert more.rounds.tolist() == [MEMORY + 8, MEMORY + 8, 80]
    assert more.tokens(1)[2, 1] > 1.95 and more.tokens(1)[1, 1] < 1.15
    assert tokens(Record(), 3) == pytest.approx(omega(3, OPTIMISTIC))


def test_what_is_believed_of_a_kind_of_rows_counts_for_a_few_rounds():
    """Kind 1 keeps nothing though it is believed to; of kind 0 nothing is seen."""
    believed = torch.tensor([[0.0, 0.5], [0.5, 0.8]])
    record = Record(believed=believed)
    assert record.known and record.tokens(2).tolist() == [[1, 1, 1], [1, 1.5, pytest.approx(1.9)]]
    record = saw([0, 0], [8, 0], record=record)  # of one draft
    rate = PRIOR * 0.5 / (PRIOR + 8)
    assert record.tokens(2)[1].tolist() == pytest.approx([1, 1 + rate, 1 + rate + rate * 0.8])
    assert record.tokens(2)[0].tolist() == [1, 1, 1] and record.rounds.tolist() == [0, 8]
    assert saw([0, 4], [0, 0], record=record).believed is believed


def test_the_time_to_the_end_is_that_of_the_rounds_one_by_one():
    """Against a loop over rounds, in which rows that have ended read nothing."""
    verify, idle, draft = 11.0, 3.0, 0.5
    ahead = Ahead(torch.tensor([30.0, 0, 12, 7]), {0: 8.0, 5: verify}, {0: 2.0, 5: idle})
    rounds = ahead.remaining / torch.tensor([3.0, 9, 4, 7])  # 10, 0, 3, 1
    busy = [sum(int(r) > i for r in rounds) for i in range(10)]
    expected = sum(draft + idle + n * (verify - idle) / 4 for n in busy)
    assert ahead.seconds(5, rounds.tolist(), draft) == pytest.approx(expected)
    assert ahead.plain == pytest.approx(30 * 2 + (30 + 12 + 7) * 6 / 4)
    refilled = ahead._replace(refilled=True)  # of the three that run, nobody waits
    assert refilled.seconds(5, rounds, draft) == pytest.approx(14 / 3 * 3.5 + 14 * 8 / 4)
