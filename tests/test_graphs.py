"""Rounds as graphs, replayed from a tape of their operations where there is no GPU."""

import pytest
import torch

from graphs import LAG, Watch
from refill import generate
from sampling import Sampling
from scripts.cuda_offline.graphs import NEW_TOKENS, PROMPTS, engine_for, strategies, tapes
from tests.reference import plain_greedy, tiny_model


@pytest.mark.parametrize("name", ["none", "ngram", "mixed", "streaming", "snapkv by a draft model"])
def test_replays_are_the_models_own_text(name):
    """A graph keeps what Python decided while it was captured; nothing of that may be a length."""
    made, (strategy, context) = [], strategies()[name]
    with tapes(made), torch.inference_mode():
        engine = engine_for(strategy, context, Sampling(), graphs=True)
        outputs, stats = generate(engine, PROMPTS, NEW_TOKENS)
        assert outputs == [plain_greedy(engine.model, p, NEW_TOKENS) for p in PROMPTS]
        assert len(made) == 1 and stats.rounds <= made[0].n_replays <= stats.rounds + LAG


def test_a_drafter_keeps_its_captured_rounds():
    """To switch between drafters captures nothing again; one that is removed takes them along."""
    made, (strategy, _), (other, _) = [], strategies()["streaming"], strategies()["ngram"]
    with tapes(made), torch.inference_mode():
        engine = engine_for(strategy, None, Sampling(), graphs=True)
        first, second = engine.drafter, engine.add(other)
        engine.prefill(PROMPTS, [NEW_TOKENS] * 4)
        for _ in range(2):
            for drafter in (first, second, None):
                engine.switch(drafter)
                engine.run(max_rounds=2)
        assert len(made) == len(engine.captured) == 3
        engine.remove(first)
        assert {drafter for drafter, _ in engine.captured} == {second, None}
        engine.switch(second)
        engine.run()
        assert engine.batch.outputs() == [
            plain_greedy(tiny_model(), p, NEW_TOKENS) for p in PROMPTS
        ]
        with pytest.raises(ValueError, match="not one of this engine's drafters"):
            engine.switch(first)


def test_the_host_learns_of_the_end_a_few_rounds_late():
    with tapes([]):
        flags = torch.zeros(3, dtype=torch.bool)
        watch = Watch(flags, LAG)
        answers = []
        for i in range(7):
            flags[:] = i >= 3
            watch.look()
            answers.append(all(watch.rows))
    assert answers == [i >= 3 + LAG for i in range(7)]
