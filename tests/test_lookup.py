"""Prompt lookup: against a loop over the text, and how far it is trusted."""

import random
from itertools import pairwise

import torch

from lookup import NGRAM, lookup, trust
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


def test_the_longer_a_copy_was_right_the_more_it_is_trusted():
    """In its match and since; without a match not at all."""
    rates = trust(5)
    assert rates[0][0] == 0 and rates[1] == [1 / 2, 2 / 3, 3 / 4, 4 / 5, 5 / 6]
    for match in range(NGRAM):
        assert rates[match][1:] == rates[match + 1][:-1]
    assert [len(row) for row in rates] == [5] * (NGRAM + 1)
    assert all(a < b for row in rates for a, b in pairwise(row))
