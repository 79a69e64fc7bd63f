"""On a GPU: the CPU's results, through CUDA graphs and the split-KV kernel. Skipped without one."""

from dataclasses import replace

import pytest
import torch

from checkpoint import load_model
from generate import main
from graphs import LAG
from kernels import compile_blocks, kernel_options
from kv_cache import CacheSpec, KVCache
from measure import decode
from model import Transformer
from policies import Strategy
from refill import generate
from sampling import Sampling, widest
from scripts.make_model_fixtures import FAMILIES, LENGTHS
from spec_decode import Engine
from tests.reference import plain_greedy, tiny_model
from tests.test_drafters import STRATEGIES, draft_model
from tests.test_families import FIXTURES, load
from tests.test_spec_decode import PROMPTS, REQUESTS, SAMPLINGS, run_requests, texts_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GREEDY = Sampling()


@pytest.fixture(autouse=True)
def exact_float32():
    torch._dynamo.reset()  # every test compiles its own shapes; there is a limit to their number
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(model: Transformer, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model on the GPU, compiled; RoPE stays in float32."""
    frequencies = model.rope_freq
    model = model.to("cuda", dtype)
    model.rope_freq = frequencies.to("cuda")
    compile_blocks(model)
    return model


def engine_for(model, strategy: str | None, gamma: int = 3, n: int = 45, sampling=GREEDY):
    """An engine of four rows that drafts by a name in STRATEGIES."""
    if strategy is None:
        return Engine(model, 4, 80 + n, Strategy(), sampling)
    policy, settings, context = STRATEGIES[strategy]
    draft = on_gpu(draft_model(context)) if context else None
    strategy = Strategy(policy, gamma, n_sink=3, **settings)
    return Engine(model, 4, 80 + n, strategy, sampling, draft_model=draft)


@pytest.mark.parametrize(
    "strategy, heads",
    [(s, (4, 2)) for s in (None, *STRATEGIES)] + [("streaming", (3, 3)), ("snapkv", (7, 1))],
)
def test_greedy_output_is_the_models_own(strategy, heads):
    expected = [plain_greedy(tiny_model(*heads), p, 45) for p in PROMPTS]
    engine = engine_for(on_gpu(tiny_model(*heads)), strategy)
    assert engine.graphs
    outputs, stats = generate(engine, PROMPTS, 45)
    assert outputs == expected
    assert engine.captured, "nothing was captured"
    for _ in range(2):  # again, from the graphs that are there
        engine.rewind()
        assert decode(engine) == stats and engine.batch.outputs() == expected


@pytest.mark.parametrize("strategy", [None, "streaming", "mixed", "ngram"])
def test_replays_equal_eager_rounds(strategy):
    """State by state, for 200 rounds; no row ends."""
    model = on_gpu(tiny_model())
    graphs, eager = (engine_for(model, strategy, n=900) for _ in range(2))
    eager.graphs = None
    gamma = graphs.gamma
    for engine in (graphs, eager):
        engine.prefill(PROMPTS, [900] * 4)
    for n in range(200):
        for engine in (graphs, eager):
            engine.run(gamma, 1)
        if n % 20 == 0 or n == 199:
            for name in ("seq_len", "finished", "accepted", "drafted", "n_rounds"):
                assert torch.equal(getattr(graphs.batch, name), getattr(eager.batch, name)), name
            assert graphs.batch.outputs() == eager.batch.outputs()
    assert int(graphs.batch.n_rounds) > 50


def test_the_host_is_at_most_a_few_rounds_late():
    engine = engine_for(on_gpu(tiny_model()), None)
    generate(engine, PROMPTS, 45)
    assert int(engine.batch.n_rounds) == 44
    assert 44 <= engine.host_rounds <= 44 + LAG


def test_two_engines_and_changing_drafts_in_one_process():
    model = on_gpu(tiny_model())
    expected = [plain_greedy(tiny_model(), p, 45) for p in PROMPTS]
    one, two = engine_for(model, "streaming", 3), engine_for(model, "snapkv", 2)
    for engine in (one, two):
        engine.prefill(PROMPTS, [45] * 4)
    while not (one.batch.finished.all() and two.batch.finished.all()):
        for engine in (one, two):
            engine.run(engine.gamma, 2)
    assert one.batch.outputs() == two.batch.outputs() == expected
    for strategy in (Strategy("ngram", 4), Strategy(), Strategy("streaming", 2, 20)):
        one.use(strategy)
        one.rewind()
        decode(one)
        assert one.batch.outputs() == expected


@pytest.mark.parametrize("strategy", [None, "streaming", "snapkv", "ngram"])
def test_sampled_output_is_the_models_own(strategy):
    """Each row samples in its way; other seeds need nothing captured anew."""
    engine = engine_for(on_gpu(tiny_model()), strategy, sampling=widest(SAMPLINGS))
    captured = []
    for seed in (0, 1):
        requests = [replace(r, seed=r.seed ^ seed) for r in REQUESTS]
        assert run_requests(engine, requests) == texts_of(tiny_model(), requests)
        captured.append(len(engine.captured))
    assert captured[0] == captured[1] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_logits_of_transformers(name):
    """Eager: their head dimensions are too odd for flex_attention."""
    _, expected = load(FIXTURES / name)
    model = load_model(FIXTURES / name, torch.device("cuda"), torch.float32)
    for n in LENGTHS:
        cache = KVCache.empty(CacheSpec.for_model(model, 1), n)
        tokens = expected["prompt"][None, :n].cuda()
        logits = model(tokens, torch.arange(n, device="cuda")[None], cache)[0].cpu()
        difference = logits[expected[f"positions_{n}"]] - expected[f"logits_{n}"]
        assert difference.abs().max() < 1e-3 * expected[f"std_{n}"]


def test_bfloat16_is_near_float32():
    """Tolerance: 5% of the logits' norm (on the CPU 2.5%), over prefill and decode shapes."""
    model = on_gpu(tiny_model(), torch.bfloat16)
    reference = tiny_model()
    tokens = torch.randint(97, (2, 300), generator=torch.Generator().manual_seed(1))
    expected = reference(tokens, torch.arange(300).expand(2, 300))
    cache = KVCache.empty(CacheSpec.for_model(model, 2), 300)
    pieces, start = [], 0
    for n in (256, 38, 5, 1):
        pos = torch.arange(start, start + n, device="cuda").expand(2, n)
        pieces.append(model(tokens[:, start : start + n].cuda(), pos, cache).float().cpu())
        start += n
    error = (torch.cat(pieces, dim=1) - expected).norm() / expected.norm()
    assert error < 0.05


def test_exact_bfloat16_has_one_text_for_all_strategies():
    """A few rows: the cache is cut into pieces. Every third round drafts less."""
    texts = []
    for strategy in (None, "streaming", "snapkv", "mixed", "ngram"):
        model = on_gpu(tiny_model(), torch.bfloat16)
        model.exact = 3
        engine = engine_for(model, strategy, n=300)
        assert (
            engine.full.access(torch.zeros(4, 4, dtype=torch.long, device="cuda"))[0].n_pieces > 1
        )
        engine.prefill(PROMPTS, [300] * 4)
        while not engine.batch.finished.all():
            engine.run(engine.gamma, 2)
            engine.run(min(engine.gamma, 1), 1)
        texts.append(engine.batch.outputs())
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize("B", [1, 40])
def test_exact_logits_are_the_same_bits_at_every_place(B):
    """Of a verification: B = 40 fills the GPU with rows, B = 1 is cut into many pieces."""
    model, T = on_gpu(tiny_model(8, 8), torch.bfloat16), 6
    model.exact = T - 1
    cache = KVCache.empty(CacheSpec.for_model(model, B), 3000)
    for buffer in cache.k + cache.v:
        buffer.normal_()
    tokens = torch.randint(97, (B, 2 * T), device="cuda")
    start = torch.linspace(100, 2900, B, device="cuda").long()[:, None]
    pos = start + torch.arange(2 * T, device="cuda")
    first = model(tokens[:, :T], pos[:, :T], cache)
    for t in range(1, T):
        again = model(tokens[:, t : t + T], pos[:, t : t + T], cache)
        assert torch.equal(again[:, : T - t], first[:, t:]), t


@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1)])
def test_decoding_is_the_split_kv_kernel(monkeypatch, heads):
    """TRITON_DECODE makes flex_attention fail where it would take another kernel."""
    split = []

    def decode_only(*args, **options):
        found = kernel_options(*args, **options)
        if found is None or "SPLIT_KV" not in found:
            return found
        split.append(args[2])
        return found | {"BACKEND": "TRITON_DECODE"}

    monkeypatch.setattr("kv_cache.kernel_options", decode_only)
    engine = engine_for(on_gpu(tiny_model(*heads)), "streaming")
    outputs, _ = generate(engine, PROMPTS, 45)
    assert outputs == [plain_greedy(tiny_model(*heads), p, 45) for p in PROMPTS]
    assert {1, 4} <= set(split)  # tokens of plain steps and of verifications


def test_the_demo_is_lossless_on_the_gpu():
    flags = [
        "--device",
        "cuda",
        "--dtype",
        "float32",
        "--batch_size",
        "4",
        "--max_new_tokens",
        "48",
    ]
    assert main([*flags, "--draft", "streaming", "--speculate_k", "5", "--check_lossless"]) == 0
    assert main([*flags, "--draft", "auto", "--check_lossless"]) == 0
