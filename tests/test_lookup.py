"""Prompt lookup: against a loop over the text, and what it would have got right."""

import random

import torch

from lookup import NGRAM, look_back, lookup
from tests.reference import latest_match


def test_lookup_against_a_loop():
    rng = random.Random(3)
    for _ in range(200):
        rows = [[rng.randrange(3) for _ in range(rng.randint(2, 25))] for _ in range(3)]
        seq_len = torch.tensor([len(row) for row in rows])
        tokens = torch.randint(3, (3, 32))  # what lies behind the text must not matter
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = torch.tensor(row)
        for gamma in (1, 4):
            drafts, lengths = lookup(tokens, seq_len, gamma)
            got = zip(drafts.tolist(), lengths.tolist(), strict=True)
            assert [*got] == [latest_match(row, NGRAM, gamma) for row in rows]


def judged(rows: list[list[int]], finished: list[bool], gamma: int) -> list[list[int]]:
    """Of rows in a buffer whose rest is full of 5s."""
    tokens = torch.full((len(rows), 100), 5)
    for row, text in zip(tokens, rows, strict=True):
        row[: len(text)] = torch.tensor(text)
    lengths = torch.tensor([len(text) for text in rows])
    kept, had = look_back(tokens, lengths, torch.tensor(finished), gamma)
    assert had[:, :gamma].sum() == 0 and had[:, gamma].tolist() == kept.sum(dim=1).tolist()
    return kept.tolist()


def test_what_it_would_have_got_right():
    """Text of period 3 is foreseen completely, text without repetition not at all."""
    rows = [[5, 6, 7] * 20 + [5], [*range(60), 90], [5, 6, 7] * 20 + [5]]
    # 12 tokens back: 3 rounds of 4 drafts and one token where all are kept, else 12
    foreseen = [0, 0, 0, 0, 3]
    assert judged(rows, [False] * 3, 4) == [foreseen, [12, 0, 0, 0, 0], foreseen]
    assert judged(rows, [False, True, False], 4) == [foreseen, [0] * 5, foreseen]


def test_it_is_judged_by_decided_text_alone():
    """What a run before left behind a short text must not be looked at: all of it is foreseen."""
    assert judged([[5, 5]], [False], 4) == [[0] * 5]
    # from 2 tokens on: 4 drafts, and the newest token
    assert judged([[5] * 7], [False], 4) == [[0, 0, 0, 0, 1]]
