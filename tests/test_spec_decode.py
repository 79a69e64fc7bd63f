"""Lossless: greedy token by token, sampling in distribution; ends, limits, and static shapes."""

import functools
import math
import random
import weakref
from contextlib import contextmanager
from itertools import product
from unittest import mock

import pytest
import torch

import sampling as sampling_module
from batch import MAX_GAMMA, Stats
from config import work_bytes
from kv_cache import CacheSpec, SparseKVCache
from model import Transformer, compile_blocks
from policies import Strategy
from sampling import (
    Draft,
    Sampling,
    accept_greedy,
    accept_sampled,
    logits_to_probs,
    nucleus,
    sample,
)
from spec_decode import Engine, generate
from tests.reference import (
    COMPILED_BUDGET,
    COMPILED_CHUNK,
    COMPILED_LEN,
    COMPILED_ROWS,
    plain_greedy,
    reference_logits,
    reference_probs,
    sequences,
    tiny_model,
)

GREEDY = Sampling()


def decode(engine: Engine, gamma: int | None = None) -> Stats:
    """Run rounds until every row is finished."""
    engine.run(gamma)
    return engine.batch.stats()


def streaming(gamma: int, budget: int = 20, n_sink: int = 3) -> Strategy:
    return Strategy("streaming", gamma, budget, n_sink)


def prompts_of(lengths: list[int], vocab_size: int = 97, seed: int = 2) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(n)] for n in lengths]


def run(model: Transformer, prompts, n, strategy, sampling=GREEDY, eos=(), seed=0, draft=None):
    max_len = max(map(len, prompts)) + n
    engine = Engine(model, len(prompts), max_len, strategy, sampling, seed, draft)
    return generate(engine, prompts, n, eos)


PROMPTS = prompts_of([33, 1, 70, 12])


@functools.cache
def greedy_of(heads: tuple[int, int], n: int) -> list[list[int]]:
    """The continuations of PROMPTS by a tiny model with these heads."""
    model = tiny_model(*heads)
    return [plain_greedy(model, p, n) for p in PROMPTS]


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (4, 1), (7, 1)])
@pytest.mark.parametrize("gamma", [1, 2, 3, 4, 5, 6])
def test_greedy_output_is_the_models_own(heads, gamma):
    """Against an uncached forward: ragged prompts, budgets from one slot to everything."""
    model, expected = tiny_model(*heads), greedy_of(heads, 23)
    assert run(model, PROMPTS, 23, Strategy())[0] == expected
    for budget, n_sink in [(1, 0), (9, 4), (20, 3), (128, 4)]:
        outputs, stats = run(model, PROMPTS, 23, streaming(gamma, budget, n_sink))
        assert outputs == expected
        assert stats.decoded_tokens == 4 * 22  # the prefill decided the first of 23


def compiled_engine(model, strategy, sampling=GREEDY, draft=None) -> Engine:
    """Of the shapes that tests of compiled models share, see `tests/reference.py`."""
    engine = Engine(model, COMPILED_ROWS, COMPILED_LEN, strategy, sampling, draft_model=draft)
    engine.prefill_chunk = COMPILED_CHUNK
    return engine


@pytest.mark.parametrize(
    "heads, gamma, budget, chunk",
    [((4, 2), 0, COMPILED_BUDGET, COMPILED_CHUNK), ((4, 2), 3, COMPILED_BUDGET, COMPILED_CHUNK),
     ((7, 1), 4, 9, 33)],
)  # fmt: skip
def test_greedy_output_is_the_same_compiled(heads, gamma, budget, chunk):
    """With chunks of whole query blocks, and with seven heads folded into one and a half."""
    model = tiny_model(*heads)
    compile_blocks(model)
    engine = compiled_engine(model, streaming(gamma, budget))
    engine.prefill_chunk = chunk
    assert generate(engine, PROMPTS, 23)[0] == greedy_of(heads, 23)


def test_some_drafts_are_rejected_and_some_accepted():
    """The equalities above would say little if every draft were accepted, or none."""
    _, stats = run(tiny_model(), PROMPTS, 60, streaming(4, 20))
    assert all(count > 0 for count in stats.accepted_histogram)


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(1.0), Sampling(0.8, top_k=3), Sampling(1.2, top_p=0.7)]
)
def test_a_budget_for_everything_accepts_everything(sampling):
    """When sampling, also a test that top-k and top-p shape draft and target alike."""
    _, stats = run(tiny_model(), PROMPTS, 41, streaming(4, budget=128, n_sink=4), sampling)
    assert stats.draft_acceptance_rate > 0.999
    assert stats.rounds == 8  # 40 tokens at 5 a round


def test_prompt_lengths_around_the_chunk():
    model = tiny_model()
    for length in (63, 64, 65, 128, 129):
        prompts = prompts_of([length, 5])
        expected = [plain_greedy(model, p, 6) for p in prompts]
        engine = Engine(model, 2, length + 6, streaming(2), GREEDY)
        engine.prefill_chunk = 64 if length >= 64 else length
        assert generate(engine, prompts, 6)[0] == expected


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


def test_gamma_0_never_touches_the_draft_cache(monkeypatch):
    def fail(*_):
        raise AssertionError("the sparse cache was used")

    monkeypatch.setattr(SparseKVCache, "access", fail)
    monkeypatch.setattr(SparseKVCache, "slots", fail)
    model = tiny_model()
    engine = Engine(model, 4, 100, streaming(3), GREEDY)
    engine.prefill(PROMPTS, [9] * 4)
    stats = decode(engine, 0)
    assert engine.batch.outputs() == [plain_greedy(model, p, 9) for p in PROMPTS]
    assert stats.rounds == 8 and stats.mean_acceptance_length == 1.0


@pytest.mark.parametrize("compiled, gammas", [(False, (0, 3, 3, 1)), (True, (0, 3, 3, 0))])
def test_an_engine_can_be_rewound_and_used_again(compiled, gammas):
    """Also after rounds in which some rows were finished: compiled, these read no KV any more."""
    eager, model = tiny_model(), tiny_model()
    if compiled:
        compile_blocks(model)
    engine = compiled_engine(model, streaming(3, COMPILED_BUDGET))
    for prompts in (PROMPTS, PROMPTS[::-1]):
        expected = [plain_greedy(eager, p, 20) for p in prompts]
        engine.prefill(prompts, [20] * 4)
        for gamma in gammas:
            engine.rewind()
            decode(engine, gamma)
            assert engine.batch.outputs() == expected


@pytest.mark.parametrize("strategy", [Strategy(), streaming(2)])
def test_an_engine_that_is_dropped_frees_its_caches_at_once(strategy):
    """No reference cycle: the next engine may need the memory before garbage is collected."""
    engine = Engine(tiny_model(), 2, 50, strategy, GREEDY)
    generate(engine, PROMPTS[:2], 3)
    cache = weakref.ref(engine.full)
    del engine
    assert cache() is None


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


def test_an_engine_without_a_text_says_what_is_missing():
    engine = Engine(tiny_model(), 1, 50, streaming(3), GREEDY)
    for work in (engine.rewind, lambda: engine.round(0), lambda: decode(engine)):
        with pytest.raises(ValueError, match="prefill the engine first"):
            work()
    engine.warm_up(later_turns=True)
    engine.prefill([[1, 2]], [9])
    with pytest.raises(ValueError, match="before its first prefill"):
        engine.warm_up()
    for gamma in (-1, 4):
        with pytest.raises(ValueError, match=f"gamma {gamma} must be in 0..3"):
            engine.round(gamma)
    for sizes in ((0, 50), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            Engine(tiny_model(), *sizes, streaming(3), GREEDY)


def test_a_refused_draft_leaves_the_engine_as_it_was(monkeypatch):
    model = tiny_model()
    engine = Engine(model, 4, 100, streaming(3), GREEDY)
    engine.prefill(PROMPTS, [20] * 4)
    drafter = engine.drafter
    with pytest.raises(ValueError, match="needs a draft model"):
        engine.use(Strategy("full", 3))
    work = work_bytes(model.config, 4, 3, engine.prefill_chunk, 4, sampled=False)
    monkeypatch.setattr("device.free_memory", lambda device: work)
    with pytest.raises(ValueError, match="GiB free"):
        engine.use(streaming(3, budget=60))
    engine.use(streaming(3))  # no more than the one it replaces
    assert engine.drafter is not drafter
    decode(engine)
    assert engine.batch.outputs() == [plain_greedy(model, p, 20) for p in PROMPTS]


def test_an_engine_works_whoever_calls_it():
    """In inference mode or out of it, also in turns: generators and graphs are of one mode."""
    model = tiny_model()
    outputs = []
    for inside in ((), ("prefill",), ("run", "use")):

        def scope(name, inside=inside):
            return torch.inference_mode(name in inside)

        engine = Engine(model, 4, 100, streaming(3), Sampling(1.0))
        with scope("prefill"):
            engine.prefill(PROMPTS, [20] * 4)
        with scope("run"):
            engine.run(3, 3)
        with scope("use"):
            engine.use(streaming(3, 60))
        decode(engine)
        engine.rewind()
        decode(engine)
        outputs.append(engine.batch.outputs())
    assert outputs[0] == outputs[1] == outputs[2]


def test_drafting_and_verifying_decide_nothing():
    """They may be repeated at will: this is how they are warmed up and timed."""
    model = tiny_model()
    engine = Engine(model, 4, 100, streaming(3), GREEDY)
    engine.prefill(PROMPTS, [20] * 4)
    for _ in range(3):
        draft = engine.draft(3)
        engine.verify(draft.tokens)
        engine.verify(draft.tokens.flip(0))
    decode(engine, 3)
    assert engine.batch.outputs() == [plain_greedy(model, p, 20) for p in PROMPTS]


def test_nothing_recompiles_while_lengths_grow():
    """Also where rows accept different numbers of drafts and pass from one KV block to the next."""
    model = tiny_model()
    compile_blocks(model)
    engine = compiled_engine(model, streaming(3, COMPILED_BUDGET))
    engine.prefill(prompts_of([490, 3, 230, 5]), [200] * 4)
    for gamma in (0, 3):  # warm-up: every shape twice
        engine.round(gamma)
        engine.round(gamma)
    blocks, ragged, accepted = engine.batch.seq_len // 256, False, engine.batch.accepted.clone()
    with torch.compiler.set_stance("fail_on_recompile"):
        for gamma in [3] * 20 + [0, 3] * 5:
            before = engine.batch.seq_len.clone()
            engine.round(gamma)
            ragged |= len((engine.batch.seq_len - before).unique()) > 1
        assert (engine.batch.seq_len // 256 - blocks).tolist() == [1, 0, 1, 0]
        accepted = (engine.batch.accepted - accepted).tolist()
        plain = 4 * 5  # rows of plain rounds, which accept no draft
        assert ragged and accepted[0] > plain and accepted[3] > 0
        engine.prefill(prompts_of([613, 3, 77, 5]), [50] * 4)
        engine.round(3)


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


def midpoints(n: int) -> list[float]:
    """n equally likely values of a uniform; exact for thresholds that are multiples of 1/n."""
    return [(i + 0.5) / n for i in range(n)]


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


def test_sample_inverts_the_distribution_and_never_draws_weight_zero():
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0])
    drawn = sample(weights.expand(8, 6), torch.tensor(midpoints(8)))
    assert drawn.bincount(minlength=6).tolist() == [0, 2, 0, 4, 2, 0]
    edge = torch.tensor([0.0, 1 - 2**-24])
    for scale in (1.0, 0.3, 1 + 2**-23, 1e-6, 3e5):
        assert sample((weights * scale).expand(2, 6), edge).tolist() == [1, 4]


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


@pytest.mark.parametrize(
    "options", [(1.0, None, None), (0.7, 3, None), (1.5, None, 0.6), (0.9, 5, 0.8)]
)
def test_logits_to_probs_against_a_loop(options):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20, 11, generator=generator) * 2
    got = logits_to_probs(logits, Sampling(*options))
    for row, probs in zip(logits, got, strict=True):
        assert probs.tolist() == pytest.approx(reference_probs(row.tolist(), *options), abs=1e-6)


@functools.cache
def five_tokens() -> Transformer:
    """The model of all tests of distributions, so that its exact ones are computed once."""
    return tiny_model(vocab_size=5)


@functools.cache
def next_logits(model: Transformer, tokens: tuple[int, ...]) -> list[float]:
    return reference_logits(model, [*tokens])[-1].tolist()


def exact_distribution(model: Transformer, prompt: list[int], n: int, sampling: Sampling) -> dict:
    """Probability of every continuation of n tokens, from float64 logits."""
    options = sampling.temperature, sampling.top_k, sampling.top_p
    result = {(): 1.0}
    for _ in range(n):
        longer = {}
        for so_far, mass in result.items():
            logits = next_logits(model, (*prompt, *so_far))
            for token, p in enumerate(reference_probs(logits, *options)):
                if p > 0:
                    longer[(*so_far, token)] = mass * p
        result = longer
    return result


@contextmanager
def equal_prompts_are_read_once():
    """Inside, what is read for one row is copied for the others with the same tokens."""
    prefill, first = Transformer.prefill, {}

    def copied(self, tokens, length, chunk, cache, *more):
        key = self, *tokens[0, :length].tolist()
        if key not in first:
            first[key] = prefill(self, tokens, length, chunk, cache, *more), cache
        hidden, read = first[key]
        for ours, theirs in zip(cache.k + cache.v, read.k + read.v, strict=True):
            ours[:, :, :length] = theirs[:, :, :length]
        return hidden

    with mock.patch.object(Transformer, "prefill", copied):
        yield


def chi_square_excess(model, prompt, sampling, strategy, n=4, rows=6000, draft=None) -> float:
    """Distance of sampled continuations from the exact distribution, in standard deviations.

    The statistic has mean k - 1 and variance 2 (k - 1) for k cells if the sampler is right.
    """
    exact = exact_distribution(model, prompt, n, sampling)
    # Small KV blocks, because the rows are short and many.
    with equal_prompts_are_read_once(), mock.patch.object(CacheSpec, "kv_block", 48):
        outputs, _ = run(model, [prompt] * rows, n, strategy, sampling, seed=7, draft=draft)
    counts = dict.fromkeys(exact, 0)
    for output in outputs:
        counts[tuple(output)] += 1  # KeyError: a continuation of probability 0
    rare = [s for s, p in exact.items() if p * rows < 5]
    cells = [(counts[s], p * rows) for s, p in exact.items() if p * rows >= 5]
    if rare:
        cells.append((sum(counts[s] for s in rare), rows * sum(exact[s] for s in rare)))
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells if expected)
    k = len(cells)
    return (statistic - (k - 1)) / math.sqrt(2 * (k - 1))


SAMPLINGS = [Sampling(1.0), Sampling(0.8, top_k=3), Sampling(1.2, top_p=0.7)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("strategy", [Strategy(), streaming(1, 1, 0), streaming(3, 1, 0)])
def test_the_sampled_loop_has_the_targets_distribution(sampling, strategy):
    assert chi_square_excess(five_tokens(), [1, 4, 2, 0, 3, 1, 1, 2], sampling, strategy) < 4


def accept_all(draft, target, u_accept, u_next):
    n = torch.full_like(u_next, draft.tokens.shape[1]).long()
    return n, sample(target[:, -1], u_next)


def resample_from_target(draft, target, u_accept, u_next):
    n, _ = accept_sampled(draft, target, u_accept, u_next)
    return n, sample(target[torch.arange(len(n)), n], u_next)


def reuse_a_uniform(draft, target, u_accept, u_next):
    return accept_sampled(draft, target, u_accept, u_accept[:, 0] if u_accept.shape[1] else u_next)


def forget_draft_probs(draft, target, u_accept, u_next):
    uniform = torch.full_like(draft.probs, 1 / draft.probs.shape[-1])
    return accept_sampled(draft._replace(probs=uniform), target, u_accept, u_next)


@pytest.mark.parametrize(
    "mistake", [accept_all, resample_from_target, reuse_a_uniform, forget_draft_probs]
)
def test_the_chi_square_test_notices_mistakes(monkeypatch, mistake):
    monkeypatch.setattr(sampling_module, "accept_sampled", mistake)
    prompt = [1, 4, 2, 0, 3, 1, 1, 2]
    assert chi_square_excess(five_tokens(), prompt, Sampling(1.0), streaming(3, 1, 0)) > 10


def test_low_temperature_sampling_is_greedy():
    model = tiny_model()
    cold, _ = run(model, PROMPTS, 20, streaming(3), Sampling(1e-4))
    assert cold == [plain_greedy(model, p, 20) for p in PROMPTS]


def test_a_seed_fixes_the_sampled_output():
    model, warm = tiny_model(), Sampling(1.0)
    first, again, other = (
        run(model, PROMPTS, 20, streaming(3), warm, seed=s)[0] for s in (1, 1, 2)
    )
    assert first == again != other


def test_the_same_question_twice_is_sampled_twice():
    """A turn of a conversation does not draw the numbers of the turn before."""
    engine = Engine(tiny_model(), 1, 200, Strategy(), Sampling(1.0))
    first, second = (generate(engine, PROMPTS[:1], 30)[0] for _ in range(2))
    assert first != second
    engine.rewind()
    decode(engine)
    assert engine.batch.outputs() == second


def test_no_two_streams_of_random_numbers_are_the_same():
    """Of neighbouring seeds, of the prefill and the rounds, of one prefill and the next."""
    streams = set()
    for seed in range(9):
        engine = Engine(tiny_model(), 1, 20, Strategy(), Sampling(1.0), seed)
        for _ in range(3):
            engine.batch.n_texts += 1
            for what in ("prefill", "decode"):
                engine.reseed(what)
                streams.add(tuple(engine.uniforms(4)[0].tolist()))
        engine.generator.manual_seed(seed)
        streams.add(tuple(engine.uniforms(4)[0].tolist()))
    assert len(streams) == 9 * 7


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, top_k=9, top_p=0.9)])
def test_compiling_what_is_around_the_blocks_changes_nothing(sampling):
    """On the CPU only top-p is worth it; on a GPU all of it is compiled."""
    model, outputs = tiny_model(), []
    for fused in (False, True):
        engine = Engine(model, 4, 100, streaming(2), sampling)
        if fused:
            engine.around = engine.around.compiled()
        outputs.append(generate(engine, PROMPTS, 20))
    assert outputs[0] == outputs[1]


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


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: Strategy("streaming", gamma=-1), "speculate_k -1"),
        (lambda: Strategy("streaming", budget=4, n_sink=4), "n_sink [+] 1 = 5"),
        (lambda: Strategy("streaming", n_sink=-1), "n_sink"),
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


@pytest.mark.parametrize("max_len", [224, 256])  # with a round's overshoot 256; a whole KV block
def test_the_buffers_hold_what_a_round_writes_behind_max_len(max_len):
    """Row 0 ends there and takes part in all later rounds, of as many drafts as there can be."""
    model = tiny_model()
    engine = Engine(model, 2, max_len, streaming(MAX_GAMMA, 64), GREEDY)
    assert max_len % engine.full.spec.kv_block == 0 or max_len + MAX_GAMMA == 256
    prompts, limits = prompts_of([max_len - 2, 5]), [2, 80]
    engine.prefill(prompts, limits)
    decode(engine)
    assert engine.batch.seq_len[0] == max_len
    expected = [plain_greedy(model, p, n) for p, n in zip(prompts, limits, strict=True)]
    assert engine.batch.outputs() == expected


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


def test_an_empty_residual_is_answered_with_a_token_of_the_target():
    """The target is nowhere above the draft, and below it by one rounding where it was drafted."""
    drafted, target = torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0, 0.5 - 2**-25, 0.5, 0.0]])
    draft = Draft(torch.ones(2, 1, dtype=torch.int64), drafted.expand(2, 1, 4))
    u_accept, u_next = torch.full((2, 1), 1 - 2**-24), torch.tensor([0.25, 0.75])
    n_accepted, token = accept_sampled(draft, target.expand(2, 2, 4), u_accept, u_next)
    assert n_accepted.tolist() == [0, 0] and token.tolist() == [1, 2]


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
