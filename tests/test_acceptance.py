"""What acceptance means, in tokens per round, and what is read of it from a run."""

import json
import math
import random

import pytest

from acceptance import DRAFTS, alpha_of, omega, read_acceptance
from config import MODELS
from cost_model import PLAIN, all_strategies


def test_omega_and_its_limits():
    for gamma in range(6):
        assert omega(gamma, 0.0) == 1
        assert omega(gamma, 1.0) == gamma + 1
        for alpha in (0.3, 0.9):
            assert omega(gamma, alpha) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))
            if gamma:
                assert alpha_of(omega(gamma, alpha), gamma) == pytest.approx(alpha)
    assert omega(0, 0.7) == 1
    with pytest.raises(ValueError, match="not in 1..4"):
        alpha_of(4.5, 3)


def test_omega_is_the_mean_of_a_simulation():
    """Not of the formula: accept drafts one by one with probability alpha."""
    rng, alpha, gamma, total = random.Random(0), 0.7, 4, 0
    for _ in range(20000):
        n = 0
        while n < gamma and rng.random() < alpha:
            n += 1
        total += n + 1
    assert total / 20000 == pytest.approx(omega(gamma, alpha), rel=0.01)


def test_a_run_of_every_draft_that_has_a_cost_can_be_read():
    ways = all_strategies({"small": MODELS["llama-3.2-1b"]}, [512], [3])
    assert {s.policy for s in ways} - {PLAIN.policy} == set(DRAFTS)


def test_a_measured_run_is_read(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RUN))
    a = read_acceptance(path)
    assert (a.policy, a.own_model, a.budget, a.prefix_len) == ("streaming", False, 512, 7000)
    assert omega(4, a.alpha) == pytest.approx(3)
    path.write_text(json.dumps(RUN | {"draft_model": {}, "plan": {"strategy": "full", "gamma": 4}}))
    a = read_acceptance(path)
    assert (a.policy, a.own_model, a.budget) == ("full", True, 0)


RUN = {
    "plan": {"strategy": "streaming", "gamma": 4, "draft_budget": 512},
    "outputs": [{"prompt_length": 7000}],
    "speculative": {"mean_acceptance_length": 3.0},
}


@pytest.mark.parametrize(
    "text, words",
    [
        ("[]", "TypeError"),
        ("[" * 100_000, "RecursionError"),
        ("\udcff", "UnicodeDecodeError"),
        (json.dumps(RUN | {"plan": {}}), "KeyError"),
        (json.dumps(RUN | {"speculative": {}}), "KeyError: 'mean_acceptance_length'"),
        (json.dumps(RUN | {"outputs": []}), "empty"),
        *(
            (json.dumps(RUN | {"plan": RUN["plan"] | change}), words)
            for change, words in [
                ({"predicted_speedup": 1.5}, "its plan has predicted_speedup"),
                ({"strategy": "low_norm"}, "draft 'low_norm' is unknown; known: streaming, snapkv"),
                ({"draft_budget": "9"}, "budget '9' must be a whole number in 0.."),
                ({"draft_budget": -5}, "budget -5 must be"),
                ({"gamma": 1}, "3.0 tokens per round is not in 1..2"),
                ({"gamma": "4"}, "TypeError"),
            ]
        ),
        *(
            (json.dumps(RUN | {"outputs": [{"prompt_length": n}]}), "prefix_len")
            for n in (0, -1, "7", 1.5, True, math.nan, 10**400)
        ),
    ],
)
def test_what_is_no_measured_run_is_refused(tmp_path, text, words):
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="not the JSON of generate.py with a fixed --draft") as e:
        read_acceptance(path)
    assert words in str(e.value)
