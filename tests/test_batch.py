"""The text of a batch: ends, limits, what is counted and what is refused."""

import math
import random

import pytest
import torch

from batch import Batch, Request
from measure import decode
from policies import Strategy
from refill import generate
from sampling import Stats
from spec_decode import Engine
from tests.reference import plain_greedy, tiny_model
from tests.test_spec_decode import GREEDY, PROMPTS, greedy_of, run, streaming


def test_stats_have_vllms_definitions():
    stats = Stats(4, 9, accepted_histogram=[2, 1, 3], drafted_histogram=[0, 0, 6])
    assert (stats.drafts, stats.accepted, stats.drafted) == (6, 7, 12)
    assert stats.mean_acceptance_length == 1 + 7 / 6
    assert stats.draft_acceptance_rate == 7 / 12
    assert stats.acceptance_rate_per_position == [4 / 6, 3 / 6]
    mixed = Stats(9, 30, accepted_histogram=[5, 2, 2], drafted_histogram=[3, 2, 4])
    assert (mixed.row_rounds, mixed.drafts, mixed.drafted) == (9, 6, 10)
    assert mixed.acceptance_rate_per_position == [4 / 6, 2 / 4]
    assert mixed.mean_acceptance_length == 2


def test_limits_are_exact_per_row():
    model = tiny_model()
    limits = [1, 2, 17, 30]
    for gamma in (0, 1, 6):
        engine = Engine(model, 4, 100, streaming(gamma, 128), GREEDY)
        engine.prefill(PROMPTS, limits)
        stats = decode(engine, gamma)
        tokens_per_round = gamma + 1  # the budget covers everything
        assert stats.row_rounds == sum(math.ceil((n - 1) / tokens_per_round) for n in limits)
        plain = [plain_greedy(model, p, n) for p, n in zip(PROMPTS, limits, strict=True)]
        assert engine.batch.outputs() == plain


def test_eos_ends_its_row_only_and_inside_an_accepted_draft():
    """EOS is chosen from the plain output, so it falls at every place of a round."""
    model, plain = tiny_model(), greedy_of((4, 2), 40)
    for at in range(8):
        eos = (plain[0][at], 10**6)
        expected = [row[: row.index(eos[0]) + 1] if eos[0] in row else row for row in plain]
        assert min(map(len, expected)) < 40  # at least one row ends early
        assert run(model, PROMPTS, 40, Strategy(), eos=eos)[0] == expected
        assert run(model, PROMPTS, 40, streaming(5, 128), eos=eos)[0] == expected  # all accepted
        assert run(model, PROMPTS, 40, streaming(5, 9), eos=eos)[0] == expected


def test_what_the_end_of_a_row_cuts_off_is_not_counted():
    """Every draft is right, and rows end at a limit or at EOS in the middle of a round."""
    model = tiny_model()
    plain = [plain_greedy(model, p, 40) for p in PROMPTS]
    for limits, eos in (([3, 9, 22, 40], ()), ([40] * 4, (plain[0][9], plain[2][7]))):
        engine = Engine(model, 4, 120, streaming(5, 128), GREEDY)
        engine.prefill(PROMPTS, limits, eos)
        stats = decode(engine)
        assert stats.accepted == stats.drafted > 0
        assert stats.decoded_tokens == stats.row_rounds + stats.accepted
    _, stats = run(model, PROMPTS, 40, streaming(5, 9), eos=(plain[0][9],))
    assert stats.decoded_tokens == stats.row_rounds + stats.accepted
    assert stats.accepted < stats.drafted


def test_more_ends_than_there_is_room_for_are_refused():
    engine = Engine(tiny_model(), 1, 50, Strategy(), GREEDY)
    with pytest.raises(ValueError, match="17 tokens end a text; at most 16"):
        engine.prefill([[1]], [3], tuple(range(17)))


@pytest.mark.parametrize(
    "prompts, limits, words",
    [
        (PROMPTS[:1], [9] * 4, "1 prompts and 4 limits for an engine of 4 rows"),
        (PROMPTS, [9] * 3, "4 prompts and 3 limits"),
        ([*PROMPTS[:3], []], [9] * 4, "row 3: 0 tokens of prompt and 9 new ones; each needs 1"),
        (PROMPTS, [9, 9, 0, 9], "row 2: 70 tokens of prompt and 0 new ones"),
        (PROMPTS, [9, 9, -1, 9], "row 2: 70 tokens of prompt and -1 new ones"),
        (PROMPTS, [9, 9, 31, 9], "70 tokens of prompt and 31 new ones are more than the 100"),
        ([*PROMPTS[:3], [5, 97]], [9] * 4, "row 3: token ids must be in 0..96"),
        ([*PROMPTS[:3], [-1]], [9] * 4, "row 3: token ids must be in 0..96"),
    ],
)
def test_prompts_that_do_not_fit_the_engine_are_refused(prompts, limits, words):
    """Before anything is read: the engine goes on with the text that it has."""
    model = tiny_model()
    engine = Engine(model, 4, 100, streaming(3), GREEDY)
    engine.prefill(PROMPTS, [20] * 4)
    with pytest.raises(ValueError, match=words):
        engine.prefill(prompts, limits)
    decode(engine)
    assert engine.batch.outputs() == [plain_greedy(model, p, 20) for p in PROMPTS]


def test_commit_against_a_loop():
    """Random rounds of random rows: what is text, who is finished, what was counted."""
    rng, gamma, B, n_eos = random.Random(0), 3, 40, 2
    batch = Batch(B, 30, 40, torch.device("cpu"))
    prompts = [[rng.randrange(2, 9) for _ in range(rng.randint(1, 6))] for _ in range(B)]
    limits = [rng.randint(1, 12) for _ in range(B)]
    batch.begin(tuple(range(n_eos)))
    first = [rng.randrange(9) for _ in range(B)]
    for b, prompt in enumerate(prompts):
        batch.start_row(b, Request(prompt, limits[b]), 0)
        assert batch.finished[b]
        batch.decide_first(b, torch.tensor(first[b : b + 1]))
    texts = [[token] for token in first]
    accepted, drafted, n_rounds = [0] * 4, [0] * 4, 0

    def ended(b: int) -> bool:
        return texts[b][-1] < n_eos or len(texts[b]) == limits[b]

    for _ in range(8):
        drafts = [[rng.randrange(9) for _ in range(gamma)] for _ in range(B)]
        kept, token = [rng.randint(0, gamma) for _ in range(B)], [rng.randrange(9) for _ in drafts]
        n_rounds += not all(map(ended, range(B)))
        for b in range(B):
            if ended(b):
                continue
            room, n = limits[b] - len(texts[b]), 0
            for t in [*drafts[b][: kept[b]], token[b]]:
                texts[b].append(t)
                n += 1
                if ended(b):
                    break
            cut = texts[b][-1] < n_eos and n <= kept[b]  # by a draft that ends the text
            accepted[n - 1] += 1
            drafted[min(n if cut else gamma + 1, room) - 1] += 1
        batch.commit(torch.tensor(drafts), torch.tensor(kept), torch.tensor(token))
        assert batch.outputs() == texts
        assert batch.finished.tolist() == [ended(b) for b in range(B)]
    assert batch.finished.all() and not all(t[-1] < n_eos for t in texts)
    stats, most = batch.stats(), max(g for g in range(4) if drafted[g])
    assert stats == Stats(n_rounds, sum(len(t) - 1 for t in texts),
                          accepted[: most + 1], drafted[: most + 1])  # fmt: skip


def test_to_pretend_leaves_nothing_behind():
    engine = Engine(tiny_model(), 4, 100, streaming(3), GREEDY)
    names = ("seq_len", "prompt_len", "limit", "finished", "accepted", "drafted", "n_rounds")
    before = {name: getattr(engine.batch, name).clone() for name in names}
    with engine.pretend([30, 2, 70, 12], max_new_tokens=20):
        assert engine.batch.seq_len.tolist() == [30, 2, 70, 12]
        engine.run(3, 2)
        assert (engine.batch.seq_len > before["seq_len"]).all()
        engine.rewind()
        assert engine.batch.seq_len.tolist() == [30, 2, 70, 12]
    with pytest.raises(RuntimeError, match="in between"), engine.pretend(50):
        raise RuntimeError("in between")
    for name, value in before.items():
        assert torch.equal(getattr(engine.batch, name), value), name
    with pytest.raises(ValueError, match="prefill the engine first"):
        engine.run()
    assert generate(engine, PROMPTS, 20)[0] == [plain_greedy(engine.model, p, 20) for p in PROMPTS]
    with pytest.raises(ValueError, match="before its first prefill"), engine.pretend(50):
        pass
