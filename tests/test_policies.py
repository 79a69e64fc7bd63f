"""What a draft keeps: against loops over float64 scores, and a policy as a stranger writes it."""

import pytest
import torch

import policies
from kv_cache import NEVER, CacheSpec
from policies import (
    AFTER,
    BEFORE,
    POLICIES,
    Policy,
    Strategy,
    attention_received,
    observed,
    select_snapkv,
)
from refill import generate
from selection import newest_queries
from spec_decode import Engine
from tests.reference import plain_greedy, reference_logits, snapkv_scores, tiny_model
from tests.test_drafters import ROOT
from tests.test_spec_decode import GREEDY, PROMPTS, prompts_of


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1), (4, 1), (7, 1)])
@pytest.mark.parametrize("chunk", [16, 13, 100])
def test_snapkv_selects_what_a_loop_selects(heads, chunk):
    """H / Hkv of 1, 2, 3, 4, 7; prompts shorter than the window, than the budget, and longer."""
    model = tiny_model(*heads)
    prompts = prompts_of([61, 3, 20, 37])
    strategy = Strategy("snapkv", 2, budget=24, n_sink=3, obs_window=9)
    engine = Engine(model, 4, 100, strategy, GREEDY)
    engine.prefill_chunk = chunk
    engine.prefill(prompts, [10] * 4)
    engine.refresh()
    sparse = engine.drafter.sparse
    assert sparse.n_selected == 12 and sparse.n_recent == 12
    for b, prompt in enumerate(prompts):
        trace = []
        reference_logits(model, prompt, trace=trace)
        for i, (queries, keys) in enumerate(trace):
            for h, scores in enumerate(snapkv_scores(queries, keys, 9, BEFORE, AFTER)):
                got = [p for p in sparse.selected_pos[i, b, h].tolist() if p != NEVER]
                n = len(prompt)
                assert len(set(got)) == len(got) == min(12, n)
                assert set(range(min(3, n))) <= set(got)
                scores = scores[: max(n - 12, 0)]  # what the window holds comes last
                left_out = [s for p, s in enumerate(scores) if p not in got]
                kept = [scores[p] for p in got if 3 <= p < len(scores)]
                if left_out:
                    assert max(got) < len(scores)
                    assert min(kept) > max(left_out) - 1e-7
                    assert max(kept) == pytest.approx(max(scores[3:]), abs=1e-7)
                for slot, p in enumerate(sparse.selected_pos[i, b, h].tolist()):
                    if p != NEVER:  # and it holds that token's K
                        expected = keys[p][h].float()
                        assert torch.allclose(sparse.k[i][b, h, slot], expected, atol=1e-4)


@pytest.mark.parametrize("window", [5, 12, 20])
def test_policies_select_in_layers_without_a_window_only(window):
    """Of three layers the second one has none. The others keep their newest tokens."""
    model, W, n_sink = tiny_model(sliding_window=window, full_every=2, n_layer=3), 7, 2
    (prompt,) = prompts_of([50])
    strategy = Strategy("snapkv", 2, budget=17, n_sink=n_sink, obs_window=W)
    engine = Engine(model, 1, 60, strategy, GREEDY)
    engine.prefill([prompt], [9])
    engine.refresh()
    sparse, full, trace = engine.drafter.sparse, engine.full, []
    reference_logits(model, prompt, trace=trace)
    pos = observed(torch.tensor([50]), W)
    ours, (queries, keys) = newest_queries(sparse.q[1], pos), trace[1]
    assert sparse.q[0] is sparse.q[2] is None and sparse.n_recent == 8
    got = attention_received(full.k[1], ours, torch.tensor([50]))[0, :, :50]
    expected = torch.tensor(snapkv_scores(queries, keys, W, 0, 0))
    assert (got - expected).abs().max() < 1e-5
    pooled = torch.tensor(snapkv_scores(queries, keys, W, BEFORE, AFTER))
    for h in range(2):
        kept = sparse.selected_pos[0, 0, h]
        left_out = [p for p in range(n_sink, 50 - 8) if p not in kept]
        assert set(range(n_sink)) < set(kept.tolist())
        assert pooled[h, kept[kept >= n_sink]].min() > pooled[h, left_out].max() - 1e-6
    assert len(sparse.selected_pos) == 1
    assert [k.shape[2] for k in sparse.k] == [n + 3 for n in (min(window, 17), 17, min(window, 17))]
    slots, newest = sparse.slots(torch.arange(50)[None]), min(window, 17)
    for i in (0, 2):
        for p in range(50 - newest, 50):
            expected = trace[i][1][p][1].float()
            assert torch.allclose(sparse.k[i][0, 1, slots[i][0, p]], expected, atol=1e-4)


def test_snapkv_scores_do_not_depend_on_how_rows_are_split(monkeypatch):
    model, strategy = tiny_model(), Strategy("snapkv", 2, 24, 3, obs_window=9)
    selected = []
    for n_bytes in (2**28, 1):
        monkeypatch.setattr(policies, "SCORE_BYTES", n_bytes)
        engine = Engine(model, 4, 100, strategy, GREEDY)
        engine.prefill(PROMPTS, [10] * 4)
        engine.refresh()
        selected.append(engine.drafter.sparse.selected_pos.sort().values)
    assert torch.equal(*selected)


def test_a_policy_brings_the_number_of_tokens_that_it_observes(monkeypatch):
    """What is asked for comes first; without either it is 1, as for snapkv."""
    seen = []

    def select(layer, n_selected):
        seen.append(layer.queries.shape[1])
        return select_snapkv(layer, n_selected)

    for own, asked, n in [({"obs_window": 5}, None, 5), ({"obs_window": 5}, 7, 7), ({}, None, 1)]:
        policy = Policy(select, recent_share=0.1, observes=True, **own)
        monkeypatch.setitem(POLICIES, "mine", policy)
        strategy = Strategy("mine", 3, n + 4, n_sink=3, obs_window=asked)
        sparse = strategy.sparse_cache(CacheSpec.for_model(tiny_model(), 1), 100)
        assert (sparse.n_selected, sparse.n_recent) == (4, n)  # all observed are in the window
        engine = Engine(tiny_model(), 4, 100, strategy, GREEDY)
        assert generate(engine, PROMPTS, 9)[0] == [
            plain_greedy(tiny_model(), p, 9) for p in PROMPTS
        ]
        assert set(seen) == {n}
        seen.clear()
        with pytest.raises(ValueError, match=f"n_sink [+] obs_window [+] 1 = {n + 4}"):
            Strategy("mine", 3, n + 3, n_sink=3, obs_window=asked)
    monkeypatch.setitem(POLICIES, "mine", Policy(select, 0.5, observes=True, obs_window=129))
    with pytest.raises(ValueError, match="obs_window 129 must be in 1..128"):
        Strategy("mine")


def test_the_readmes_policy_works(monkeypatch):
    """The code of the section "Hack it", as it is printed there."""
    section = (ROOT / "README.md").read_text().split("## Hack it")[1]
    code = section.split("```python")[1].split("```")[0]
    assert len(code.strip().splitlines()) < 30
    monkeypatch.setitem(POLICIES, "low_norm", None)  # so that it is taken out again
    exec(code, {})
    model = tiny_model()
    expected = [plain_greedy(model, p, 30) for p in PROMPTS]
    small = Engine(model, 4, 100, Strategy("low_norm", 3, 16, 3, reselect_every=2), GREEDY)
    outputs, stats = generate(small, PROMPTS, 30)
    assert outputs == expected and 0 < stats.draft_acceptance_rate < 1
    norms = small.full.k[1][2, 1, :70].norm(dim=-1)
    fresh = Engine(model, 4, 100, Strategy("low_norm", 3, 16, 3), GREEDY)
    fresh.prefill(PROMPTS, [30] * 4)
    fresh.refresh()
    kept = set(fresh.drafter.sparse.selected_pos[1, 2, 1].tolist())
    assert kept == {0, 1, 2} | set((3 + norms[3:].argsort()[:5]).tolist())
    large = Engine(model, 4, 100, Strategy("low_norm", 3, 400), GREEDY)
    assert generate(large, PROMPTS, 30)[1].draft_acceptance_rate == 1.0
