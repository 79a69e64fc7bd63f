"""From logits to tokens, and which drafts stay: enumerated, by loops, at the edges of float32."""

import math
import random
from itertools import product

import pytest
import torch

from sampling import (
    Draft,
    Sampling,
    accept_greedy,
    accept_sampled,
    logits_to_probs,
    nucleus,
    sample,
)
from tests.reference import reference_probs, sequences


@pytest.mark.parametrize(
    "options", [(1.0, None, None), (0.7, 3, None), (1.5, None, 0.6), (0.9, 5, 0.8)]
)
def test_logits_to_probs_against_a_loop(options):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20, 11, generator=generator) * 2
    got = logits_to_probs(logits, Sampling(*options))
    for row, probs in zip(logits, got, strict=True):
        assert probs.tolist() == pytest.approx(reference_probs(row.tolist(), *options), abs=1e-6)


def test_ties_at_a_cut_are_kept():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0])
    weights = [0.0, math.e, 1.0, 1.0, 0.0, 1.0]
    expected = [w / (math.e + 3) for w in weights]
    for k in (2, 3, 4):
        assert logits_to_probs(logits, Sampling(1.0, k)).tolist() == pytest.approx(expected)
    for p in (0.45, 0.6, 0.9):  # 3.0 has 0.44 of the probability, each 2.0 has 0.16
        sampling = Sampling(1.0, top_p=p)
        assert logits_to_probs(logits, sampling).tolist() == pytest.approx(expected)
    alone = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    for sampling in (Sampling(1.0, 1), Sampling(1.0, top_p=0.3)):
        assert logits_to_probs(logits, sampling).tolist() == alone


def test_top_p_keeps_what_sorting_keeps():
    """Long vocabularies, flat and peaked, ties at the cut, and next to nothing left out."""
    generator = torch.Generator().manual_seed(3)
    for scale, top_p in product((0.01, 1.0, 8.0), (1e-6, 0.3, 0.9, 0.999)):
        probs = (torch.randn(7, 5000, generator=generator) * scale).softmax(dim=-1)
        probs[:, 1::2] = probs[:, ::2]  # every value twice
        probs /= probs.sum(dim=-1, keepdim=True)
        ordered = probs.double().sort(dim=-1, descending=True).values
        before = ordered.cumsum(dim=-1) - ordered
        least = ordered.masked_fill(before >= top_p, torch.inf).amin(dim=-1, keepdim=True)
        expected = probs * (probs >= least)
        lost = (nucleus(probs, top_p) - expected).abs()
        assert lost.sum(dim=-1).max() < 1e-5 and (lost > 0).sum(dim=-1).max() <= 2
    assert torch.equal(nucleus(torch.eye(3), 0.5), torch.eye(3))


def midpoints(n: int) -> list[float]:
    """n equally likely values of a uniform; exact for thresholds that are multiples of 1/n."""
    return [(i + 0.5) / n for i in range(n)]


def test_sample_inverts_the_distribution_and_never_draws_weight_zero():
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    drawn = sample(weights.expand(8, 6), torch.tensor(midpoints(8)))
    assert drawn.bincount(minlength=6).tolist() == [0, 2, 0, 4, 2, 0]
    edge = torch.tensor([0.0, 1 - 2**-24])
    for scale in (1.0, 0.3, 1 + 2**-23, 1e-6, 3e5):
        assert sample((weights * scale).expand(2, 6), edge).tolist() == [1, 4]


@pytest.mark.parametrize("scale", [2.0**-149, 2.0**-140, 2.0**-127, 1e-30, 1 / 3, 1.0, 1e30])
@pytest.mark.parametrize("u", [0.0, 2**-24, 1 / 3, 0.5, 0.75, 1 - 2**-23, 1 - 2**-24])
def test_sample_never_draws_weight_zero(u, scale):
    """Down to the smallest denormal number, where a sum times u is rounded up to the sum."""
    generator = torch.Generator().manual_seed(8)
    for size, share in [(3, 0.0), (7, 0.5), (100, 0.9), (4099, 0.01), (4099, 0.999)]:
        weights = torch.rand(60, size, generator=generator)
        if scale < 2.0**-126:
            weights = (weights * 4).ceil()  # the smallest denormal has no fractions
        weights *= (torch.rand(60, size, generator=generator) >= share) * scale
        weights[:, 0] = weights[:, -1] = 0
        weights[:, size // 2] = scale  # none without any
        drawn = sample(weights, torch.full((60,), u))
        assert (weights.gather(1, drawn[:, None]) > 0).all()


def test_sample_trusts_no_sum_to_be_monotone(monkeypatch):
    """A GPU sums in parallel: the sums before and after a weight of 0 may differ, either way."""
    generator = torch.Generator().manual_seed(9)
    weights = (torch.rand(200, 100, generator=generator) < 0.2).float()
    weights[:, 50] = 1
    number = weights.sum(dim=1)
    cumsum = torch.Tensor.cumsum

    def parallel(self: torch.Tensor, dim: int) -> torch.Tensor:
        noise = torch.randint(-1, 2, self.shape, generator=generator)
        return cumsum(self, dim) * (1 + noise * 2**-23)

    monkeypatch.setattr(torch.Tensor, "cumsum", parallel)
    for n in range(8):  # a point at the sum of some weights
        drawn = sample(weights, (n / number).clamp_max(1 - 2**-24))
        assert (weights.gather(1, drawn[:, None]) > 0).all()


def test_accept_greedy_against_a_loop():
    rng = random.Random(0)
    for _ in range(300):
        gamma = rng.randint(0, 5)
        draft = [[rng.randrange(2) for _ in range(gamma)] for _ in range(3)]
        target = [[rng.randrange(2) for _ in range(gamma + 1)] for _ in range(3)]
        n, token = accept_greedy(torch.tensor(draft).view(3, gamma), torch.tensor(target))
        for b in range(3):
            kept = 0
            while kept < gamma and draft[b][kept] == target[b][kept]:
                kept += 1
            assert (n[b], token[b]) == (kept, target[b][kept])


def test_the_acceptance_rule_is_lossless_by_enumeration():
    """Every outcome of one round with gamma = 2 on a vocabulary of 3, with its exact probability.

    Target and draft depend on the tokens before. Rounds that end early are continued with the
    target, so the result must be the target's joint distribution of two tokens, to rounding.
    """
    N = 24  # all thresholds below are multiples of 1/24
    q0, p0 = [1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4]
    q1 = {0: [1 / 4, 3 / 4, 0.0], 1: [1 / 2, 0.0, 1 / 2], 2: [1 / 4, 1 / 4, 1 / 2]}
    p1 = {0: [1 / 4, 1 / 4, 1 / 2], 1: [1 / 4, 1 / 2, 1 / 4], 2: [1 / 4, 1 / 4, 1 / 2]}
    p2 = [1 / 3, 1 / 3, 1 / 3]
    joint = dict.fromkeys(sequences(3, 2), 0.0)
    drafts = [(a, b) for a, b in sequences(3, 2) if q1[a][b] > 0]
    for a, b in drafts:
        u = torch.tensor(list(product(midpoints(N), repeat=3)), dtype=torch.float64)
        n = len(u)
        draft = Draft(torch.tensor([[a, b]]).expand(n, 2),
                      torch.tensor([q0, q1[a]], dtype=torch.float64).expand(n, 2, 3))  # fmt: skip
        target = torch.tensor([p0, p1[a], p2], dtype=torch.float64).expand(n, 3, 3)
        kept, token = accept_sampled(draft, target, u[:, :2], u[:, 2])
        weight = q0[a] * q1[a][b] / n
        for k, t in zip(kept.tolist(), token.tolist(), strict=True):
            out = [*(a, b)[:k], t]
            for last in range(3):
                if len(out) >= 2:
                    joint[out[0], out[1]] += weight / 3
                else:
                    joint[out[0], last] += weight * p1[out[0]][last]
    for (a, b), probability in joint.items():
        assert probability == pytest.approx(p0[a] * p1[a][b], abs=1e-12)


def test_an_empty_residual_is_answered_with_a_token_of_the_target():
    """The target is nowhere above the draft, and below it by one rounding where it was drafted."""
    drafted, target = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0, 0.5 - 2**-25, 0.5, 0.0]])
    draft = Draft(torch.ones(2, 1, dtype=torch.int64), drafted.expand(2, 1, 4))
    u_accept, u_next = torch.full((2, 1), 1 - 2**-24), torch.tensor([0.25, 0.75])
    n_accepted, token = accept_sampled(draft, target.expand(2, 2, 4), u_accept, u_next)
    assert n_accepted.tolist() == [0, 0] and token.tolist() == [1, 2]


@pytest.mark.parametrize("gamma", [0, 1, 3])
def test_drafts_that_are_certain_need_no_probabilities(gamma):
    """Prompt lookup's: the same decisions as with all probability on the drafted tokens."""
    generator = torch.Generator().manual_seed(4)
    B, V = 500, 7
    tokens = torch.randint(V, (B, gamma), generator=generator)
    target = torch.randn(B, gamma + 1, V, generator=generator).softmax(dim=-1)
    u = torch.rand(B, gamma + 1, generator=generator)
    one_hot = torch.nn.functional.one_hot(tokens, V).float()
    expected = accept_sampled(Draft(tokens, one_hot), target, u[:, 1:], u[:, 0])
    got = accept_sampled(Draft(tokens, None), target, u[:, 1:], u[:, 0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
    assert set(got[0].tolist()) == set(range(gamma + 1))


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
