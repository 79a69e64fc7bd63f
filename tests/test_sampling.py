"""From logits to tokens, and which drafts stay: against loops, by counting, at float32's edges."""

import math
import random
from functools import partial
from itertools import product

import pytest
import torch

import sampling as sampling_module
from sampling import (
    RowSampling,
    Sampling,
    accept,
    choose,
    filtered,
    gumbel,
    mix,
    noise,
    nucleus,
    pick,
    pick_by_place,
    place_keys,
    row_seed,
    widest,
)
from tests.reference import reference_noise, reference_probs

MIXED = [Sampling(*options) for options in (
    (1.0, None, None), (0.7, 3, None), (1.5, None, 0.6), (0.9, 5, 0.8), (0.0, None, None),
    (1.2, 11, 1.0), (0.8, 400, None),
)]  # fmt: skip


def rows_of(samplings: list[Sampling], seed: torch.Tensor) -> RowSampling:
    return RowSampling(
        torch.tensor([s.temperature for s in samplings]),
        torch.tensor([s.top_k or 0 for s in samplings]),
        torch.tensor([1.0 if s.top_p is None else s.top_p for s in samplings]),
        seed,
    )


def alone(sampling: Sampling, seed: torch.Tensor) -> tuple[RowSampling, Sampling]:
    return rows_of([sampling] * len(seed), seed), sampling


def random_logits(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 2


def chi_square(drawn: torch.Tensor, expected: list[float]) -> float:
    """Standard deviations by which the counts of `drawn` are too uneven, of a chi-square."""
    counts = drawn.flatten().bincount(minlength=len(expected)).tolist()
    assert all(p > 0 or n == 0 for n, p in zip(counts, expected, strict=True))
    total, degrees = sum(counts), sum(p > 0 for p in expected) - 1
    terms = ((n - total * p) ** 2 / (total * p)
             for n, p in zip(counts, expected, strict=True) if p > 0)  # fmt: skip
    return (sum(terms) - degrees) / math.sqrt(2 * degrees)


def test_every_row_is_filtered_as_it_asks():
    logits = random_logits(len(MIXED), 3, 11)
    got = filtered(logits, rows_of(MIXED, torch.zeros(len(MIXED))), widest(MIXED)).softmax(-1)
    for sampling, places, probs in zip(MIXED, logits.tolist(), got.tolist(), strict=True):
        for t, place in enumerate(places):
            expected = reference_probs(place, sampling.temperature or 1, sampling.top_k,
                                       sampling.top_p)  # fmt: skip
            assert probs[t] == pytest.approx(expected, abs=1e-6)


def test_ties_at_a_cut_are_kept():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0])[None, None]

    def kept(sampling: Sampling) -> list[int]:
        out = filtered(logits, *alone(sampling, torch.zeros(1)))[0, 0]
        return (out > -torch.inf).nonzero()[:, 0].tolist()

    # 3.0 has 0.44 of the probability, each 2.0 has 0.16
    for sampling in [Sampling(1.0, k) for k in (2, 3, 4)] + [
        Sampling(1.0, None, p) for p in (0.45, 0.6, 0.9)
    ]:
        assert kept(sampling) == [1, 2, 3, 5]
    assert kept(Sampling(1.0, 1)) == kept(Sampling(1.0, top_p=0.3)) == [1]


def test_top_p_keeps_what_sorting_keeps():
    """Long vocabularies, flat and peaked, ties at the cut, and next to nothing left out."""
    for scale, top_p in product((0.01, 1.0, 8.0), (1e-6, 0.3, 0.9, 0.999)):
        probs = (random_logits(7, 5000) / 2 * scale).softmax(dim=-1)
        probs[:, 1::2] = probs[:, ::2]  # every value twice
        probs /= probs.sum(dim=-1, keepdim=True)
        ordered = probs.double().sort(dim=-1, descending=True).values
        before = ordered.cumsum(dim=-1) - ordered
        least = ordered.masked_fill(before >= top_p, torch.inf).amin(dim=-1, keepdim=True)
        lost = nucleus(probs, torch.tensor([top_p])) ^ (probs >= least)
        assert (probs * lost).sum(dim=-1).max() < 1e-5 and lost.sum(dim=-1).max() <= 2
    assert torch.equal(nucleus(torch.eye(3), torch.tensor([0.5])), torch.eye(3).bool())
    assert nucleus(probs, torch.ones(1)).all()


def test_noise_is_what_integers_of_any_size_say():
    seeds, places, tokens = [0, 1, 2**31, 2**32, 2**63 - 1], [0, 3, 131071], [0, 1, 4000, 127999]
    got = noise(place_keys(torch.tensor(seeds), torch.tensor(places).expand(5, 3)), 128000)[
        ..., tokens
    ]
    expected = [reference_noise(*place) for place in product(seeds, places, tokens)]
    assert got.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_mixing_is_a_permutation():
    """So the noise of a token is exactly Gumbel's where either key of its place is uniform."""
    words = torch.arange(2**20) * 4093 & 0xFFFFFFFF
    for key in (0, 2**32 - 1, torch.tensor(0x12345678)):
        assert len(mix(words, key).unique()) == len(words)


def test_every_word_has_the_noise_of_its_rank():
    """Also where v rounds to 1, and where 1 - v would lose the tail."""
    words = [0, 1, 2, 3, 1000, 2**16 + 1, 2**24 + 1, 2**31, 2**32 - 2**12, 2**32 - 1]
    got = gumbel(torch.tensor(words)).tolist()
    exact = [-math.log(-math.log1p(-(word + 0.5) / 2**32)) for word in words]
    assert got[:-1] == pytest.approx(exact[:-1], abs=1e-5)
    assert exact[-1] < got[-1] < -2.8  # 24 bits reach this far down; no such token is ever chosen
    assert got == sorted(got, reverse=True) and got[0] > 22.8


def test_noise_is_gumbel_and_unrelated_between_neighbours():
    z = noise(place_keys(torch.arange(90), torch.arange(100).expand(90, 100)), 111).double()
    n, gamma = z.numel(), 0.5772156649
    assert abs(z.mean() - gamma) < 4 * math.sqrt(math.pi**2 / 6 / n)
    assert abs(z.var() - math.pi**2 / 6) < 0.015
    for x in (-1.0, 0.0, 2.0, 6.0, 9.0):  # its distribution function
        p = math.exp(-math.exp(-x))
        assert abs((z < x).double().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    z -= gamma
    for neighbour in (z[1:] * z[:-1], z[:, 1:] * z[:, :-1], z[..., 1:] * z[..., :-1],
                      z[1:, 1:] * z[:-1, :-1], z[1:, :-1] * z[:-1, 1:]):  # fmt: skip
        assert abs(neighbour.mean()) < 4 * math.pi**2 / 6 / math.sqrt(n)


@pytest.mark.parametrize("what", ["low half", "high half", "both halves", "place", "all"])
def test_no_two_places_share_their_noise(what):
    """One key of 32 bits would be shared by some ten pairs of this many unrelated places."""
    n = torch.arange(300_000)
    unrelated = torch.randint(2**63 - 1, n.shape, generator=torch.Generator().manual_seed(4))
    seed, pos = {
        "low half": (n, n * 0),
        "high half": (n << 32, n * 0),
        "both halves": (n << 32 | n, n * 0),
        "place": (n * 0 + 77, n),
        "all": (unrelated, n % 3000),
    }[what]
    pairs = noise(place_keys(seed, pos[:, None]), 2).view(
        torch.int64
    )  # of two tokens, as one number
    assert len(pairs.unique()) == len(n)


def test_noise_is_of_seed_place_and_token_alone():
    """Whatever is asked for beside them: neighbours, places, more tokens."""
    seed = torch.tensor([row_seed(3, i) for i in range(5)])
    pos = torch.tensor([0, 7, 8, 131071]).expand(5, 4)
    z = noise(place_keys(seed, pos), 100)
    assert torch.equal(z[2:3, 1:], noise(place_keys(seed[2:3], pos[:1, 1:]), 100))
    assert torch.equal(z[..., :41], noise(place_keys(seed, pos), 41))
    assert not torch.equal(z, noise(place_keys(seed.flip(0), pos), 100))


def test_seeds_of_requests_are_unrelated():
    seeds = [row_seed(*names) for names in product(range(12), repeat=3)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62 and row_seed(3, 1) == row_seed(3, 1)


@pytest.mark.parametrize("sampling", [s for s in MIXED if not s.greedy], ids=str)
def test_what_is_picked_has_the_distribution_asked_for(sampling):
    """Seeds that follow each other, and place 3 of each: nothing a hash likes."""
    n, logits = 100_000, random_logits(11)
    seed, pos = torch.arange(n), torch.full((n, 1), 3)
    drawn = pick(logits.expand(n, 1, 11), pos, *alone(sampling, seed))
    expected = reference_probs(
        logits.tolist(), sampling.temperature, sampling.top_k, sampling.top_p
    )
    assert chi_square(drawn, expected) < 3.5


@pytest.mark.parametrize("many", ["seeds", "places"])
def test_texts_have_the_joint_distribution_of_their_tokens(many):
    """Two tokens, where the second depends on the first: the product of the conditionals."""
    n, sampling = 150_000, Sampling(1.0)
    logits, after = random_logits(3), random_logits(2, 3, 3)[1]
    seed, pos = torch.arange(n), torch.zeros(n, 1, dtype=torch.int64)
    if many == "places":
        seed, pos = torch.full_like(seed, 12345), 2 * seed[:, None]
    asked = alone(sampling, seed)
    first = pick(logits.expand(n, 1, 3), pos, *asked)
    second = pick(after[first], pos + 1, *asked)
    joint = logits.softmax(0)[:, None] * after.softmax(1)
    assert chi_square(3 * first + second, joint.flatten().tolist()) < 3.5


def test_draft_and_target_agree_as_often_as_theory_says():
    """Both choose v with probability 1 / sum over w of max(p(w) / p(v), q(w) / q(v))."""
    n = 100_000
    p, q = random_logits(2, 7)
    asked, pos = alone(Sampling(1.0), torch.arange(n)), torch.full((n, 1), 9)
    ours, theirs = (pick(x.expand(n, 1, 7), pos, *asked) for x in (p, q))
    p, q = p.double().softmax(0), q.double().softmax(0)
    expected = sum(float(1 / torch.maximum(p / p[v], q / q[v]).sum()) for v in range(7))
    got = (ours == theirs).double().mean().item()
    assert got == pytest.approx(expected, abs=4 * math.sqrt(0.25 / n))
    assert expected < torch.minimum(p, q).sum() - 0.01  # what the optimal coupling has


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_rows_take_the_argmax_among_sampled_ones(dtype):
    logits = (random_logits(40, 3, 50) * 2).round().to(dtype) / 3  # many ties
    samplings = [Sampling(), Sampling(0.9, 7, 0.9)] * 20
    rows, pos = rows_of(samplings, torch.arange(40)), torch.arange(3).expand(40, 3)
    got = pick(logits, pos, rows, widest(samplings))
    assert torch.equal(got[::2], logits.argmax(dim=-1)[::2])
    assert not torch.equal(got[1::2], logits.argmax(dim=-1)[1::2])
    assert torch.equal(pick(logits, pos, rows, Sampling()), logits.argmax(dim=-1))


def test_a_row_picks_as_it_does_alone():
    """Whatever its neighbours ask for, also with so cold a temperature that most p are 0."""
    samplings = [*MIXED, Sampling(1e-30), Sampling(torch.finfo().tiny, 3, 0.5)]
    B, T = len(samplings), 29
    logits, pos = random_logits(B, T, 101), torch.arange(T).expand(B, T)
    rows = rows_of(samplings, torch.tensor([row_seed(0, b) for b in range(B)]))
    together = pick(logits, pos, rows, widest(samplings))
    assert torch.equal(together[-2:], logits[-2:].argmax(dim=-1))
    for b, sampling in enumerate(samplings):
        row = RowSampling(*(setting[b : b + 1] for setting in rows))
        for t in range(T):
            one = pick(logits[b : b + 1, t : t + 1], pos[:1, t : t + 1], row, sampling)
            assert one == together[b, t]


def test_compiled_it_picks_the_same(monkeypatch):
    """What rows ask for is not compiled. Each halving of top-p is: a few show what all would."""
    monkeypatch.setattr(sampling_module, "HALVINGS", 5)
    compiled = partial(pick_by_place, torch.compile(choose, fullgraph=True, dynamic=False))
    B, stance = len(MIXED), "default"
    for samplings, T in product((MIXED, MIXED[::-1], [Sampling()] * B), (3, 1)):
        logits, pos = random_logits(B, T, 1001), torch.arange(T).expand(B, T)
        asked = logits, pos, rows_of(samplings, torch.arange(B) << 31), widest(MIXED)
        with torch.compiler.set_stance(stance):
            assert torch.equal(compiled(*asked), pick(*asked))
        stance = "fail_on_recompile"  # one place alone is compiled, for any T


def test_the_widest_covers_all_and_a_narrower_one_does_not():
    for one, other in product(MIXED, MIXED):
        both = widest([one, other])
        assert both.covers(one) and both.covers(other) and widest([one]) == one
    wide = Sampling(0.5, 5, 0.9)
    covered = Sampling(), Sampling(2.0), Sampling(1.0, 4), Sampling(1.0, 5, 0.1)
    assert all(wide.covers(s) and widest([wide, s]).covers(s) for s in covered)
    assert not wide.covers(Sampling(0.5, 6, 0.9))
    assert not Sampling(0.5, 5).covers(wide) and not Sampling(0.5, None, 0.9).covers(wide)
    assert not Sampling(1.0, 5, 1.0).covers(wide) and Sampling(1.0).covers(Sampling(1.0, None, 1.0))
    assert not Sampling().covers(Sampling(1.0)) and widest([]) == Sampling()


def test_accept_against_a_loop():
    rng = random.Random(0)
    for _ in range(300):
        gamma = rng.randint(0, 5)
        draft = [[rng.randrange(2) for _ in range(gamma)] for _ in range(3)]
        target = [[rng.randrange(2) for _ in range(gamma + 1)] for _ in range(3)]
        n, token = accept(torch.tensor(draft).view(3, gamma), torch.tensor(target))
        for b in range(3):
            kept = 0
            while kept < gamma and draft[b][kept] == target[b][kept]:
                kept += 1
            assert (n[b], token[b]) == (kept, target[b][kept])


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: Sampling(-1.0), "temperature"),
        (lambda: Sampling(float("nan")), "temperature"),
        (lambda: Sampling(1e-46), "temperature 1e-46 must be at least"),  # 0 in float32
        (lambda: Sampling(1.0, top_p=1e-46), "top_p 1e-46 must be"),
        (lambda: Sampling(1.0, top_k=0), "top_k"),
        (lambda: Sampling(1.0, top_p=0.0), "top_p"),
        (lambda: Sampling(0.0, top_k=5), "greedy"),
    ],
)
def test_impossible_settings_are_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()
