"""What a policy is shown stays what it would be if it were computed from the text alone."""

import math

import pytest
import torch
from torch import Tensor

import model as model_module
from batch import Request
from drafters import draft_cache_bytes, shared_policies
from kv_cache import NEVER
from measure import decode
from model import Transformer
from policies import CHUNK, POLICIES, Strategy, observed
from refill import generate
from sampling import Sampling
from selection import Selection, newest_queries
from spec_decode import Engine
from tests.reference import tiny_model
from tests.test_drafters import RESELECTING, draft_model, settings_of
from tests.test_spec_decode import GREEDY, PROMPTS, prompts_of

OBSERVING = [name for name, policy in POLICIES.items() if policy.observes]
MODELS = {  # G of 2, 7 and 1; the last has a window in two of three layers
    "two": ((4, 2), {}),
    "norms": ((7, 1), {"qk_norm": True}),
    "windows": ((3, 3), {"sliding_window": 11, "full_every": 2, "n_layer": 3}),
}


def texts(engine: Engine) -> list[list[int]]:
    lengths = engine.batch.seq_len.tolist()
    return [t[:n] for t, n in zip(engine.batch.tokens.tolist(), lengths, strict=True)]


def queries_of(model: Transformer, text: list[int], monkeypatch) -> list[Tensor]:
    """Per layer [n, H, D], scaled, as attention gets them in a forward without any cache."""
    seen, attend = [], model_module.attend

    def watched(q, k, v, access, scale, cap=None):
        seen.append(q[0] * scale)
        return attend(q, k, v, access, scale, cap)

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "attend", watched)
        model(torch.tensor([text]), torch.arange(len(text))[None])
    return seen


@pytest.mark.parametrize("kind, obs_window", [("two", 2), ("norms", 1), ("windows", 7)])
def test_rounds_keep_the_newest_queries(kind, obs_window, monkeypatch):
    """Of ragged rows, some shorter than what is observed; drafts were rejected in most rounds."""
    heads, more = MODELS[kind]
    model = tiny_model(*heads, **more)
    strategy = Strategy("snapkv", 3, 24, 3, obs_window, reselect_every=0)
    engine = Engine(model, 4, 120, strategy, GREEDY)
    engine.prefill(PROMPTS, [45] * 4)
    engine.refresh()
    whole = [i for i, window in enumerate(model.config.windows) if window is None]
    kept = []
    while not engine.batch.finished.all():
        n = engine.batch.seq_len - 1
        pos = observed(n, obs_window)
        sparse = engine.drafter.sparse
        kept.append((n.tolist(), pos.tolist(), [newest_queries(sparse.q[i], pos) for i in whole]))
        engine.round(3)
    assert len(kept) > 12 and 0 < engine.batch.stats().draft_acceptance_rate < 0.9
    for b, text in enumerate(texts(engine)):
        expected = [queries_of(model, text, monkeypatch)[i] for i in whole]
        for n, pos, queries in kept:
            there = sum(p < n[b] for p in pos[b])
            for q, own in zip(queries, expected, strict=True):
                same = own[pos[b][0] : pos[b][0] + there]
                assert torch.allclose(q[b, :there], same, atol=1e-4 * float(own.std()))


def check_selection(engine: Engine, fresh) -> bool:
    """Bring it up to date; if it selects, it selects what one does that has seen no round."""
    engine.refresh()
    drafter = engine.drafter
    if drafter.selected_at != engine.host_rounds:
        return False
    fresh.renew()
    fresh.select()
    running = ~engine.batch.finished
    ours, expected = (d.sparse.selected_pos[:, running].sort().values for d in (drafter, fresh))
    assert torch.equal(ours, expected)
    token = engine.batch.newest()[0]
    ours, expected = (d.logits(0, token)[running] for d in (drafter, fresh))
    assert torch.allclose(ours, expected, atol=1e-3)
    return True


@pytest.mark.parametrize("policy", RESELECTING)
@pytest.mark.parametrize("every, kind", [(1, "two"), (1, "norms"), (3, "windows")])
def test_a_selection_depends_on_the_text_alone(policy, every, kind):
    """After rounds, after rounds without drafts, after a rewind, in rows that began meanwhile."""
    heads, more = MODELS[kind]
    settings = settings_of(policy, reselect_every=every) | {"budget": 40}
    strategy = Strategy(policy, 3, n_sink=3, **settings)
    engine = Engine(tiny_model(*heads, **more), 4, 160, strategy, GREEDY)
    engine.prefill(PROMPTS, [60, 60, 60, 7])
    fresh, checked = engine.make(strategy, None), 0
    for i in range(14):
        checked += check_selection(engine, fresh)
        engine.round(0 if i == 9 else 3)
    engine.rewind()
    for _ in range(3):
        checked += check_selection(engine, fresh)
        engine.round(2)
    engine.end(3)
    (again,) = engine.requests(prompts_of([77], seed=8), [60])
    for _ in engine.start(3, again):  # in the place of a row that has ended
        checked += check_selection(engine, fresh)
        engine.round(3)
    for _ in range(4):
        checked += check_selection(engine, fresh)
        engine.round(3)
    assert checked >= 18 / every


@pytest.mark.parametrize("own_model", [False, True])
@pytest.mark.parametrize("policy", OBSERVING)
def test_to_select_again_takes_no_forward(policy, own_model, monkeypatch):
    if own_model and policy not in shared_policies():
        pytest.skip("a draft model does not draft in this way")
    draft = draft_model() if own_model else None
    strategy = Strategy(policy, 3, n_sink=3, **settings_of(policy, reselect_every=1))
    engine = Engine(tiny_model(), 4, 120, strategy, GREEDY, draft_model=draft)
    engine.prefill(PROMPTS, [30] * 4)
    engine.catch_up()
    calls, hidden = [], Transformer.hidden
    monkeypatch.setattr(Transformer, "hidden", lambda *args: calls.append(1) or hidden(*args))
    engine.refresh()
    assert len(calls) == 1  # nothing was verified yet
    for _ in range(4):
        engine.round(3)
        calls.clear()
        engine.refresh()
        assert not calls and engine.drafter.selected_at == engine.host_rounds


def wrong_entries(selection: Selection, n_cached: list[int]) -> int:
    """Entries of the summary that are not the mean of the keys that are there, by loops."""
    wrong = 0
    for k, summary in zip(selection.full.k, selection.sparse.summary, strict=True):
        for b, n in enumerate(n_cached):
            for c, start in enumerate(range(0, n, CHUNK)):
                mean = k[b, :, start : min(start + CHUNK, n)].double().mean(dim=1)
                wrong += not torch.allclose(summary[b, :, c].double(), mean, atol=1e-5)
    return wrong


@pytest.mark.parametrize(
    "gamma, every, n_changed, own_model",
    [(2, 1, 2, False), (5, 3, 3, False), (5, 3, 3, True), (16, 1, 2, False)],
)
@pytest.mark.parametrize("too_few", [False, True])
def test_the_summary_is_that_of_the_text(gamma, every, n_changed, own_model, too_few, monkeypatch):
    """Rows that accept everything, or by turns. One entry less is too few."""
    draft = draft_model() if own_model else None
    strategy = Strategy("chunks", gamma, 40, 3, reselect_every=every)
    engine = Engine(tiny_model(), 4, 260, strategy, GREEDY, draft_model=draft)

    def accept(drafted: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        most = torch.tensor([gamma, gamma, engine.host_rounds % (gamma + 1), 0])
        return most.clamp_max(drafted.shape[1]), logits[:, -1].argmax(dim=-1)

    monkeypatch.setattr(engine, "accept", accept)
    engine.prefill(prompts_of([47, 48, 16, 20]), [99] * 4)
    selection = engine.drafter.selection
    assert selection.sizes.n_changed == n_changed
    selection.sizes = selection.sizes._replace(n_changed=n_changed - too_few)
    wrong = n_checked = 0
    while not engine.batch.finished[:2].any():
        engine.refresh()
        if engine.drafter.selected_at == engine.host_rounds:
            cached = (engine.batch.seq_len - 1 - int(own_model)).tolist()
            wrong, n_checked = wrong + wrong_entries(selection, cached), n_checked + 1
        engine.round(gamma)
    assert bool(wrong) == too_few and n_checked > 5


def chunk_scores(keys: Tensor, queries: Tensor, n: int) -> list[float]:
    """Attention [S, D] of the heads that share them, each with its own newest query [G, D]."""
    means = [keys[i : min(i + CHUNK, n)].double().mean(dim=0) for i in range(0, n, CHUNK)]
    total = [0.0] * len(means)
    for q in queries.double():
        weights = [math.exp(float(q @ mean)) for mean in means]
        total = [t + w / sum(weights) / len(queries) for t, w in zip(total, weights, strict=True)]
    return total


@pytest.mark.parametrize("n_sink, budget", [(3, 66), (0, 128), (20, 100), (4, 21)])
def test_chunks_selects_what_a_loop_selects(n_sink, budget, monkeypatch):
    """Sinks first, then whole chunks before the window, the last of them as far as there is room.

    H / Hkv is 2; a row is shorter than its budget, and one than a chunk.
    """
    model, prompts = tiny_model(4, 2), prompts_of([301, 5, 100, 176])
    engine = Engine(model, 4, 320, Strategy("chunks", 3, budget, n_sink), GREEDY)
    engine.prefill(prompts, [9] * 4)
    engine.refresh()
    sparse, full = engine.drafter.sparse, engine.full
    n_selected, n_recent = sparse.n_selected, sparse.n_recent
    assert n_selected + n_recent == budget
    for b, prompt in enumerate(prompts):
        n, queries = len(prompt), queries_of(model, prompt, monkeypatch)
        for i, h in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            newest = queries[i][-1].view(2, 2, 16)[h]
            scores = chunk_scores(full.k[i][b, h], newest, n)
            sinks = list(range(min(-(-n_sink // CHUNK), len(scores))))
            outside = range(len(sinks), max(-(-(n - n_recent) // CHUNK), 0))
            best = sorted(outside, key=lambda c: -scores[c])
            expected = [p for c in sinks + best for p in range(c * CHUNK, c * CHUNK + CHUNK)]
            got = [p for p in sparse.selected_pos[i, b, h].tolist() if p != NEVER]
            expected = [p for p in expected[:n_selected] if p < n]
            assert got[: len(expected)] == expected
            assert len(set(got)) == len(got) and all(p < n for p in got)
            for slot, p in enumerate(got[: len(expected)]):
                assert torch.equal(sparse.v[i][b, h, slot], full.v[i][b, h, p])


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("policy", OBSERVING)
def test_caches_of_fewer_bits_are_selected_from(policy, kv_dtype):
    """Queries are kept in K's precision, but never in 8 bits. The text is plain decoding's."""
    model, outputs = tiny_model(), []
    model.kv_dtype = kv_dtype
    for strategy in (Strategy(), Strategy(policy, 3, n_sink=3, **settings_of(policy))):
        engine = Engine(model, 4, 111, strategy, GREEDY)
        outputs.append(generate(engine, PROMPTS, 30)[0])
    assert outputs[0] == outputs[1]
    sparse = engine.drafter.sparse
    assert sparse.k[0].dtype == kv_dtype and sparse.q[0].dtype == torch.bfloat16
    queries = newest_queries(sparse.q[0], engine.batch.seq_len[:, None] - 2)
    assert (queries.float().norm(dim=-1) > 0.1).all()


def test_what_a_policy_is_shown_takes_memory():
    """K and V of 2 layers, 2 heads of 16, in float32; a ring of queries; a summary of 256 slots."""
    n_bytes = {}
    for policy in POLICIES:
        strategy = Strategy(policy, 3, 40, 3)
        engine = Engine(tiny_model(), 4, 111, strategy, GREEDY)
        n_bytes[policy] = engine.drafter.n_bytes
        assert n_bytes[policy] == draft_cache_bytes(strategy, engine.full, None)
    rows = 4 * 2 * 16 * 4  # rows, layers, D, bytes
    assert n_bytes["streaming"] == rows * 2 * 2 * (40 + 4)
    assert n_bytes["snapkv"] == n_bytes["streaming"] + rows * 4 * (1 + 4)
    assert n_bytes["chunks"] == n_bytes["streaming"] + rows * (4 * (1 + 4) + 2 * 256 // CHUNK)


def test_a_request_may_end_before_anything_is_selected():
    """A prompt of one token, a limit of one: the policy is never asked for that row."""
    engine = Engine(tiny_model(), 2, 50, Strategy("chunks", 3, 24, 3), Sampling())
    engine.begin()
    for b, n in enumerate((1, 30)):
        for _ in engine.start(b, Request([5], n)):
            pass
    assert len(engine.batch.outputs()[0]) == 1
    assert decode(engine).rounds > 1 and len(engine.batch.output(1)) == 30
