"""Every drafting strategy: lossless, exact where it must be, and selecting what it says."""

import math
import random
import re
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import drafters
import policies
from batch import Request
from draft_models import StreamingModelDrafter
from drafter import Drafter
from drafters import ANY_POLICY, DRAFTERS, shared_policies
from kernels import STEP_LAYERS, compile_blocks, compile_step
from kv_cache import NEVER, CacheSpec
from lookup import lookup
from measure import decode
from model import Transformer
from policies import POLICIES, Strategy
from refill import generate
from sampling import Sampling, widest
from spec_decode import Engine
from tests.reference import (
    COMPILED_BUDGET,
    COMPILED_CHUNK,
    plain_greedy,
    reference_logits,
    sinks_and_window,
    tiny_model,
)
from tests.test_spec_decode import (
    PROMPTS,
    REQUESTS,
    SAMPLINGS,
    compiled_engine,
    greedy_of,
    prompts_of,
    run_requests,
    texts_of,
)

GREEDY = Sampling()
ROOT = Path(policies.__file__).parent


def draft_model(context: int = 4096, vocab_size: int = 97, seed: int = 5) -> Transformer:
    """Another tiny model, with other heads and another context."""
    return tiny_model(2, 1, vocab_size, seed, max_seq_len=context)


SHARED = shared_policies()
RESELECTING = [name for name, policy in POLICIES.items() if policy.reselect_every]


def settings_of(policy: str, **more) -> dict:
    """Of a Strategy: a budget that leaves out much of the text."""
    own = {"budget": 24, "obs_window": 7} if POLICIES[policy].observes else {"budget": 12}
    return own | more


# name -> policy, other settings of Strategy, and the draft model's context or None
STRATEGIES = {
    **{
        p: (p, settings_of(p, reselect_every=2 if p in RESELECTING else None), None)
        for p in POLICIES
    },
    "streaming int8": ("streaming", settings_of("streaming", weights="int8"), None),
    **{
        f"{p} once": (p, settings_of(p, reselect_every=0), None) for p in RESELECTING if p in SHARED
    },
    **{
        f"draft model, {name}" if own_model else name: (name, {}, 4096 if own_model else None)
        for name, own_model in DRAFTERS
        if name not in (ANY_POLICY, *POLICIES)
    },
    **{f"draft model, {p}": (p, settings_of(p), 30 if p == "streaming" else 4096) for p in SHARED},
}


def run(model, prompts, n, strategy, gamma, sampling=GREEDY, draft=None, seed=0, **changes):
    policy, settings, context = STRATEGIES[strategy]
    strategy = Strategy(policy, gamma, n_sink=3, **settings | changes)
    if context and draft is None:
        draft = draft_model(context, model.config.vocab_size)
    max_len = max(map(len, prompts)) + n
    engine = Engine(model, len(prompts), max_len, strategy, sampling, seed, draft)
    return generate(engine, prompts, n)


@pytest.mark.parametrize("gamma", [1, 3, 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_greedy_output_is_the_models_own(strategy, gamma):
    """Every strategy and every gamma meets all numbers of heads."""
    heads = [(3, 3), (4, 2), (7, 1)][(gamma // 2 + [*STRATEGIES].index(strategy)) % 3]
    assert run(tiny_model(*heads), PROMPTS, 45, strategy, gamma)[0] == greedy_of(heads, 45)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_greedy_output_is_the_same_compiled(strategy, monkeypatch):
    """Draft models are of the target's shapes here, so that they find its blocks compiled."""
    monkeypatch.setattr(CacheSpec, "prefill_chunk", COMPILED_CHUNK)
    policy, settings, context = STRATEGIES[strategy]
    settings = settings | ({"budget": COMPILED_BUDGET} if settings else {})
    model, draft = (
        tiny_model(),
        tiny_model(seed=5, max_seq_len=max(context, 40)) if context else None,
    )
    for m in (model, draft) if draft else (model,):
        compile_blocks(m)
    engine = compiled_engine(model, Strategy(policy, 3, n_sink=3, **settings), draft=draft)
    assert generate(engine, PROMPTS, 45)[0] == greedy_of((4, 2), 45)


def test_a_draft_step_is_one_compiled_function():
    """For all steps and rounds; and it copies no buffer of a cache. Choosing the token is another.

    A model of more layers than are worth it has its blocks compiled, one by one.
    """
    model = tiny_model()
    compile_blocks(model)
    strategy = Strategy("streaming", 3, COMPILED_BUDGET, 3, weights="int8")
    engine = compiled_engine(model, strategy, Sampling(0.8, top_k=5))
    with engine.pretend(50):
        one_function(engine)
    model = tiny_model(n_layer=STEP_LAYERS + 1)
    model.compiled = True
    assert compile_step(len, model) is None
    model.layers = model.layers[:-1]
    assert compile_step(len, model) is not None


def one_function(engine: Engine) -> None:
    torch._dynamo.utils.counters.clear()
    draft, code = run_and_get_code(engine.draft, 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(code) == 2
    sizes = re.findall(r"= empty_strided_cpu\(\(([0-9, ]+)\)", code[0])
    assert sizes and draft.shape == (4, 1)
    largest = max(math.prod(int(n) for n in size.split(",") if n.strip()) for size in sizes)
    assert largest < engine.drafter.sparse.k[0].numel()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(engine.draft(3)[:, :1], draft)
        engine.draft(2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sampled_output_is_the_models_own(strategy):
    policy, settings, context = STRATEGIES[strategy]
    model, draft = tiny_model(), draft_model(context) if context else None
    strategy = Strategy(policy, 2, n_sink=3, **settings)
    engine = Engine(model, 4, 115, strategy, widest(SAMPLINGS), draft_model=draft)
    assert run_requests(engine, REQUESTS) == texts_of(model, REQUESTS)
    assert 0 < engine.batch.stats().draft_acceptance_rate < 1  # or the test would show nothing


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, top_k=5)])
@pytest.mark.parametrize("own_model", [False, True])
@pytest.mark.parametrize("policy", [*SHARED, "full"])
def test_a_draft_that_sees_everything_is_always_accepted(policy, own_model, sampling):
    """The target drafts for itself, from its own cache or, as a draft model, from another one.

    The latter also shows that the two-token step closes the gap after a fully accepted round.
    """
    if policy == "full" and not own_model:
        pytest.skip("needs a draft model")
    model = tiny_model()
    for reselect_every in (None, 0) if policy != "full" else (None,):
        strategy = Strategy(policy, 4, budget=400, n_sink=4, reselect_every=reselect_every)
        draft = model if own_model else None
        engine = Engine(model, 4, 111, strategy, sampling, draft_model=draft)
        _, stats = generate(engine, PROMPTS, 41)
        assert stats.draft_acceptance_rate > 0.999
        assert stats.rounds == 8  # 40 tokens at 5 a round


def test_drafts_are_accepted_sometimes_and_rejected_sometimes():
    """The equalities above would say little otherwise."""
    model = tiny_model()
    near = tiny_model()
    for p in near.parameters():
        p += 0.1 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    for strategy, (_, _, context) in STRATEGIES.items():
        draft = near if context else None
        _, stats = run(model, PROMPTS, 60, strategy, 3, draft=draft)
        assert stats.accepted_histogram[0] > 0 and sum(stats.accepted_histogram[1:]) > 0, strategy


def test_reselection_is_the_selection_of_the_longer_text():
    """In mid-generation the draft keeps what a fresh prefill of the same text would keep."""
    model = tiny_model()
    strategy = Strategy("snapkv", 3, 24, 3, obs_window=9, reselect_every=20)
    engine = Engine(model, 4, 100, strategy, GREEDY)
    engine.prefill(PROMPTS, [30] * 4)
    engine.refresh()
    before = engine.drafter.sparse.selected_pos.clone()
    for _ in range(5):
        engine.round(3)
    assert torch.equal(engine.drafter.sparse.selected_pos, before)
    engine.drafter.select()
    after = engine.drafter.sparse.selected_pos
    assert not torch.equal(after, before)
    texts = [
        t[: n - 1]
        for t, n in zip(engine.batch.tokens.tolist(), engine.batch.seq_len.tolist(), strict=True)
    ]
    fresh = Engine(model, 4, 100, strategy, GREEDY)
    fresh.prefill(texts, [1] * 4)
    fresh.refresh()
    assert torch.equal(after.sort().values, fresh.drafter.sparse.selected_pos.sort().values)


def test_selection_is_repeated_every_so_many_rounds(monkeypatch):
    engine = Engine(tiny_model(), 4, 100, Strategy("snapkv", 1, 24, 3, 7, 3), GREEDY)
    engine.prefill(PROMPTS, [20] * 4)
    calls = []
    monkeypatch.setattr(engine.drafter, "select", lambda: calls.append(1))
    stats = decode(engine)
    assert len(calls) == math.ceil(stats.rounds / 3) > 1
    engine.rewind()
    calls.clear()
    decode(engine, 0)
    assert not calls  # plain decoding pays for none of it


@pytest.mark.parametrize("strategy", ["full", "snapkv", "streaming", "own snapkv"])
def test_rounds_without_drafts_do_not_blind_the_drafter(strategy):
    """It reads what it missed: with a budget for everything all its drafts are accepted again.

    No selection is due for another reason: none is repeated, and no prompt lacks a sink.
    """
    model, policy, prompts = (
        tiny_model(),
        strategy.removeprefix("own "),
        prompts_of([33, 9, 70, 12]),
    )
    draft = model if strategy in ("full", "own snapkv") else None
    strategy = Strategy(policy, 3, 400, 3, reselect_every=0 if policy == "snapkv" else None)
    engine = Engine(model, 4, 230, strategy, GREEDY, draft_model=draft)
    engine.prefill(prompts, [150] * 4)
    for rewind in (True, False):
        engine.run(3, 3)
        for n in (1, 70):  # the second time there is nothing more to remember
            engine.run(0, n)
        if rewind:
            engine.rewind()
    engine.run(3, 5)
    if draft:
        holds_the_same(engine)
    assert decode(engine).draft_acceptance_rate == 1.0
    assert engine.batch.outputs() == [plain_greedy(model, p, 150) for p in prompts]
    engine.rewind()
    assert decode(engine).draft_acceptance_rate == 1.0


def holds_the_same(engine: Engine) -> None:
    """A draft model with the target's weights: its own cache has the target's K, to rounding."""
    for own, target in zip(engine.drafter.full.k, engine.full.k, strict=True):
        for b, n in enumerate((engine.batch.seq_len - 2).tolist()):
            assert torch.allclose(own[b, :, :n], target[b, :, :n], atol=1e-4)


def test_a_drafter_that_is_behind_forgets_what_is_rewound():
    """Other seeds then give another text."""
    model = tiny_model()
    engine = Engine(model, 4, 230, Strategy("full", 3), Sampling(1.0), draft_model=model)
    engine.prefill(PROMPTS, [150] * 4)
    engine.run(3, 20)
    engine.run(0, 1)
    engine.rewind()
    engine.batch.sampling.seed.add_(1)
    engine.run(0, 90)
    engine.run(3, 1)
    holds_the_same(engine)


def test_a_short_context_holds_through_rounds_without_drafts(monkeypatch):
    """After them the draft model is anchored anew; its 28 positions are never left."""
    draft = draft_model(context=28)
    engine = Engine(tiny_model(), 3, 370, Strategy("streaming", 3, 12, 3), GREEDY, 0, draft)
    highest, forward = [], draft.hidden

    def watched(tokens, pos, *caches):
        highest.append(pos.max().item())
        return forward(tokens, pos, *caches)

    monkeypatch.setattr(draft, "hidden", watched)
    engine.prefill(prompts_of([70, 1, 9]), [200] * 3)
    while not engine.batch.finished.all():
        for gamma in (3, 0, 0, 3, 0):
            engine.round(gamma)
    assert max(highest) <= 27


@pytest.mark.parametrize("policy, n_prompt", [("streaming", 1), ("streaming", 3), ("snapkv", 2)])
def test_sinks_that_a_short_prompt_lacks_are_kept_once_they_exist(policy, n_prompt):
    strategy = Strategy(policy, 3, 24, 4, obs_window=7, reselect_every=0)
    engine = Engine(tiny_model(), 1, 200, strategy, GREEDY)
    engine.prefill(prompts_of([n_prompt]), [150])
    engine.refresh()
    assert (engine.drafter.sparse.selected_pos == NEVER).any()
    decode(engine)
    for kept in engine.drafter.sparse.selected_pos.flatten(0, 2).tolist():
        assert {0, 1, 2, 3} <= set(kept)
    if policy == "streaming":
        assert engine.drafter.selected_at <= 4  # selected once more, not every round


def test_selecting_is_part_of_decoding(monkeypatch):
    """Not of the prefill, whose time is reported apart."""
    engine = Engine(tiny_model(), 4, 100, Strategy("snapkv", 3, 24, 3, 7), GREEDY)
    calls = []
    monkeypatch.setattr(engine.drafter, "select", lambda: calls.append(1))
    engine.prefill(PROMPTS, [20] * 4)
    assert not calls
    engine.round(3)
    assert calls == [1]


def test_a_streaming_draft_model_uses_its_context_to_the_last_position(monkeypatch):
    """A context of 28 tokens drafts for a text of 370; every draft accepted takes it furthest.

    From an anchor of 12 tokens: the pair, 3 drafts, of which the last is not fed, and 3 more
    rounds of 4 tokens: position 12 + 3 + 3 * 4 = 27.
    """
    draft = draft_model(context=28)
    engine = Engine(tiny_model(), 3, 370, Strategy("streaming", 3, 12, 3), GREEDY, 0, draft)

    def accept_all(drafted, logits):
        n = torch.full((3,), drafted.shape[1])
        return n, logits[:, -1].argmax(dim=-1)

    highest, forward = [], draft.hidden

    def watched(tokens, pos, *caches):
        highest.append(pos.max().item())
        return forward(tokens, pos, *caches)

    monkeypatch.setattr(engine, "accept", accept_all)
    monkeypatch.setattr(draft, "hidden", watched)
    generate(engine, prompts_of([70, 1, 9]), 300)
    assert max(highest) == 27


@pytest.mark.parametrize("length", [50, 13, 12, 11, 5, 1])
def test_a_streaming_draft_model_sees_sinks_and_window_at_positions_of_its_own(length):
    target, draft = tiny_model(), draft_model(context=30)
    engine = Engine(target, 1, 100, Strategy("streaming", 3, 12, 3), GREEDY, draft_model=draft)
    engine.prefill(prompts_of([length]), [40])
    assert isinstance(engine.drafter, StreamingModelDrafter)
    engine.refresh()
    for _ in range(3):  # after the prefill, and re-anchored in mid-generation
        text = engine.batch.tokens[0, : engine.batch.seq_len[0]].tolist()
        n_cached = len(text) - 2
        packed = text if n_cached <= 12 else text[:3] + text[n_cached - 9 : n_cached] + text[-2:]
        n_anchor = len(packed) - 2
        seen = sinks_and_window(min(3, n_anchor), 9, first=n_anchor)
        expected = reference_logits(draft, packed, seen)[-1]
        got = engine.drafter.logits(0, torch.tensor([text[-1:]]))[0].double()
        assert (got - expected).abs().max() < 1e-4 * expected.std()
        for _ in range(2):
            engine.round(3)
        engine.drafter.select()


@pytest.mark.parametrize("policy", ["full", *SHARED])
@pytest.mark.parametrize("vocab_size", [60, 97, 128])
def test_padded_vocabularies_are_cut_to_the_targets(vocab_size, policy):
    """A draft with fewer rows never proposes the rest; one with more never proposes its own."""
    model, draft = tiny_model(), draft_model(vocab_size=vocab_size)
    strategy = Strategy(policy, 3, 24, 3, obs_window=7)
    engine = Engine(model, 4, 100, strategy, GREEDY, draft_model=draft)
    outputs, _ = generate(engine, PROMPTS, 20)
    assert outputs == [plain_greedy(model, p, 20) for p in PROMPTS]
    logits = engine.drafter.logits(0, engine.batch.newest()[0])
    assert logits.shape == (4, 97)
    assert logits.isneginf().sum(dim=1).tolist() == [max(97 - vocab_size, 0)] * 4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_drafter_can_be_changed_in_mid_generation(strategy):
    """It reads what was decided without it; the output does not change."""
    policy, settings, context = STRATEGIES[strategy]
    model, draft = tiny_model(), draft_model(context) if context else None
    engine = Engine(model, 4, 120, Strategy(), GREEDY)
    engine.prefill(PROMPTS, [45] * 4)
    for _ in range(9):
        engine.round(0)
    engine.use(Strategy(policy, 3, n_sink=3, **settings), draft)
    decode(engine)
    assert engine.batch.outputs() == [plain_greedy(model, p, 45) for p in PROMPTS]
    if policy == "full":  # what it has read is all of the text: the same weights agree
        same = Engine(model, 4, 120, Strategy(), GREEDY)
        same.prefill(PROMPTS, [45] * 4)
        same.round(0)
        same.use(Strategy("full", 3), model)
        assert decode(same).draft_acceptance_rate > 0.999


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_next_turn_of_a_conversation_reads_only_what_is_new(strategy, monkeypatch):
    """Prompt, answer, more prompt: the output is that of reading everything anew.

    Counted are tokens that go through the models in a prefill: those of a chunk of 16 at a time.
    """
    policy, settings, context = STRATEGIES[strategy]
    model, draft = tiny_model(), draft_model(context) if context else None
    strategy = Strategy(policy, 3, n_sink=3, **settings)
    engine = Engine(model, 4, 300, strategy, GREEDY, draft_model=draft)
    engine.prefill_chunk = 16
    read, hidden = [], Transformer.hidden

    def counted(self, tokens, *more):
        if self is model and tokens.shape[0] == 1:
            read.append(tokens.shape[1])
        return hidden(self, tokens, *more)

    def turn(texts, n_new, reuse):
        """What follows the texts; n_new tokens of each are not in the caches."""
        read.clear()
        engine.prefill(texts, [20] * 4, reuse=reuse)
        assert sum(read) == sum(math.ceil(n / 16) * 16 for n in n_new)
        decode(engine)
        assert engine.batch.outputs() == [plain_greedy(model, t, 20) for t in texts]
        return engine.batch.outputs()

    monkeypatch.setattr(Transformer, "hidden", counted)
    text = PROMPTS
    answers = turn(text, map(len, text), False)
    for seed, n_new in enumerate([40, 1, 17]):
        text = [
            t + a + prompts_of([n_new], seed=seed)[0] for t, a in zip(text, answers, strict=True)
        ]
        answers = turn(text, [n_new + 1] * 4, True)  # an answer's last token was not fed
    changed = [t[: len(p)] + [(t[len(p)] + 1) % 97] + t[len(p) + 1 :]
               for t, p in zip(text, PROMPTS, strict=True)]  # fmt: skip
    turn(changed, [len(t) - len(p) for t, p in zip(text, PROMPTS, strict=True)], True)


@pytest.mark.parametrize("policy", ["full", "snapkv"])
def test_a_draft_model_reads_only_what_is_new_too(policy, monkeypatch):
    """With the target's own weights its cache must hold what the target's does.

    An answer ends with a round of which all drafts were accepted, the last of them never fed.
    """
    model, draft, read = tiny_model(), tiny_model(), []
    engine = Engine(model, 1, 900, Strategy(policy, 3, 2000), GREEDY, draft_model=draft)
    hidden = draft.hidden
    monkeypatch.setattr(draft, "hidden", lambda t, *a: read.append(t.shape[1]) or hidden(t, *a))
    (text,) = prompts_of([700])
    for n_new, n_read in ((0, 2 * 512), (3, 64), (70, 2 * 64)):  # chunks first, then short ones
        text = text + prompts_of([n_new])[0]
        engine.prefill([text], [21], reuse=n_new > 0)
        read.clear()
        engine.catch_up()
        assert sum(read) == n_read
        holds_the_same(engine)
        decode(engine)
        assert engine.batch.outputs() == [plain_greedy(model, text, 21)]
        text = text + engine.batch.outputs()[0]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: engine("snapkw", None), f"known: none, {', '.join(POLICIES)}, full, ngram"),
        (
            lambda: Strategy("snapkv", budget=36, n_sink=4, obs_window=32),
            "n_sink [+] obs_window [+] 1 = 37",
        ),
        (lambda: Strategy("snapkv", obs_window=0), "obs_window 0 must be in 1..128"),
        (
            lambda: Strategy("streaming", reselect_every=4),
            f"nothing to reselect; use it with {', '.join(RESELECTING)}",
        ),
        (lambda: Strategy("ngram", reselect_every=4), "ngram has nothing to reselect"),
        (lambda: Strategy("snapkv", reselect_every=-1), "at least 0"),
        (lambda: engine("full", None), "needs a draft model"),
        (lambda: engine("ngram", 4096), "no use for a draft model"),
        (lambda: engine("mixed", 4096), "draft policy mixed has no use for a draft model"),
        (lambda: engine("full", 99), "context is 99 tokens, the text may have 100"),
        (lambda: engine("snapkv", 99), "--draft streaming needs"),
        (lambda: engine("streaming", 130), "with 5 drafts use 124 or less"),
    ],
)
def test_impossible_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def engine(policy: str, context: int | None) -> Engine:
    draft = draft_model(context) if context else None
    return Engine(tiny_model(), 1, 100, Strategy(policy, budget=128), GREEDY, draft_model=draft)


def test_what_a_look_at_the_matches_found_is_proposed_while_the_text_is_the_same(monkeypatch):
    """A round need not look again. Whatever else happens to the text, nothing old is kept."""
    engine = Engine(tiny_model(), 4, 110, Strategy(), Sampling())
    ngram, other = (engine.add(Strategy(name, 3, 24, 3)) for name in ("ngram", "streaming"))
    batch, rng = engine.batch, random.Random(0)
    engine.prefill(PROMPTS, [40] * 4)

    def refill() -> None:
        for _ in engine.start(1, Request(PROMPTS[rng.randrange(4)], 30)):
            engine.round(0)

    def round_of(drafter: Drafter, gamma: int) -> None:
        engine.switch(drafter)
        engine.round(gamma)

    events = [lambda: ngram.found, engine.rewind, refill, lambda: engine.prefill(PROMPTS, [40] * 4)]
    events += [lambda d=d, g=g: round_of(d, g) for d in (ngram, other) for g in (0, 2)]
    looks = []
    monkeypatch.setattr(drafters, "lookup", lambda *given: looks.append(given) or lookup(*given))
    for event in rng.choices(events, k=150):
        engine.rewind() if batch.finished.all() else ngram.kinds()
        event()
        fresh = lookup(batch.tokens, batch.seq_len, 3)[0]
        assert ngram.found is None or torch.equal(ngram.found, fresh)
        ngram.kinds()
        looks.clear()
        for gamma, n_looks in ((2, 0), (3, 1)):  # a second proposal looks for itself
            assert torch.equal(ngram.propose(gamma, None), fresh[:, :gamma])
            assert len(looks) == n_looks
