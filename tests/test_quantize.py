"""A twin is the model, but for matrices of few bits: near it, and never in the output."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import quantize
from checkpoint import DEMO_CHECKPOINT, open_checkpoint
from config import WEIGHT_BYTES
from generate import main
from load import weighed
from model import Transformer
from options import AUTO_POLICIES, parse_args
from policies import Strategy
from prompts import demo_prompts
from quantize import (
    FP8,
    KINDS,
    LAYERS,
    EmulatedFP8,
    Twins,
    automatic,
    emulated,
    linears,
    make_twin,
    resolve,
)
from refill import generate
from sampling import Sampling
from spec_decode import Engine
from tests.reference import plain_greedy, tiny_model
from tests.test_generate import one_line
from tests.test_spec_decode import PROMPTS

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GREEDY, LOW = Sampling(), [*WEIGHT_BYTES]
CONFIG = dataclasses.replace(tiny_model().config, dim=48, ffn_dim=64)


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Rows of very different sizes, one of them empty."""
    rows = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    rows *= 10.0 ** torch.arange(n).sub(n // 2)[:, None]
    rows[n // 2] = 0
    return rows


@pytest.mark.parametrize("dtype, error", [(torch.int8, 1 / 254), (torch.float8_e4m3fn, 1 / 16)])
def test_every_row_has_a_scale_of_its_own(dtype, error):
    """One scale for all would leave nothing of the small rows. A zero row stays zero."""
    x = weight(7, 100)
    low, scale = quantize.by_row(x, dtype)
    assert low.dtype == dtype and scale.shape == (7, 1)
    back = torch.stack([row.float() * s for row, s in zip(low, scale, strict=True)])
    largest = x.abs().amax(dim=1, keepdim=True)
    assert ((back - x).abs() <= error * largest).all() and (back[3] == 0).all()
    assert torch.equal(quantize.rounded(x[None], dtype)[0], back)


@pytest.mark.parametrize("kind", LAYERS, ids=str)
def test_a_layers_product_is_nearly_that_of_the_full_weights(kind):
    """Also FP8's own, on a CPU that has that product (not in torch 2.11)."""
    w, b, x = weight(48, 32) / 1e20, torch.randn(48), torch.randn(2, 3, 32)
    try:
        got = LAYERS[kind](w, b)(x)
    except (NotImplementedError, RuntimeError):
        assert LAYERS[kind] is FP8
        pytest.skip("this torch has no scaled product for the CPU")
    exact = F.linear(x.double(), w.double())
    size = (x.norm(dim=-1, keepdim=True) * w.norm(dim=1)).double()
    share = {"bf16": 0.01, "fp8": 0.05, "int8": 0.01}[kind[0]]
    assert got.dtype == x.dtype and got.shape == exact.shape
    assert ((got.double() - b - exact).abs() <= share * size + 1e-2 * b.abs() + 1e-6).all()


def test_emulation_computes_what_the_kernel_would():
    w, x = torch.randn(48, 64), torch.randn(5, 64)
    try:
        got = FP8(w, None)(x)
    except (NotImplementedError, RuntimeError):
        pytest.skip("this torch has no scaled product for the CPU")
    assert torch.allclose(got, EmulatedFP8(w, None)(x), atol=0.1, rtol=1e-2)


@pytest.mark.parametrize("kind", LOW)
def test_a_twin_shares_all_but_its_blocks_matrices(kind):
    model = tiny_model(qkv_bias=True)
    twin = make_twin(model, kind)
    theirs = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    own = [t for t in (*twin.parameters(), *twin.buffers()) if t.data_ptr() not in theirs]
    assert len(own) >= 4 * CONFIG.n_layer
    assert sum(t.nbytes for t in own) == Twins(model).n_bytes(kind)
    for name in ("norm.weight", "tok_embeddings.weight", "output.weight"):
        assert twin.get_parameter(name) is model.get_parameter(name)
    assert twin.layers[0].attention.wqkv.bias is model.layers[0].attention.wqkv.bias
    assert not linears(twin) and len(linears(model)) == 4 * CONFIG.n_layer


@pytest.mark.parametrize("kind, share", [("bf16", 0.98), ("int8", 0.96), ("fp8", 0.9)])
def test_a_twin_agrees_with_its_model_on_the_demo(kind, share, demo):
    """Teacher-forced: how often its likeliest token is the model's. Wrong scales give 0.1."""
    model, tokens = demo
    pos = torch.arange(tokens.shape[1]).expand_as(tokens)
    ours, theirs = (m(tokens, pos).argmax(dim=-1) for m in (model, make_twin(model, kind)))
    assert (ours == theirs).float().mean() > share


@pytest.fixture(scope="module")
def demo() -> tuple[Transformer, torch.Tensor]:
    checkpoint = open_checkpoint(DEMO_CHECKPOINT)
    texts = [text[-200:] for text in demo_prompts(checkpoint.tokenizer, 2, 1000)]
    return checkpoint.load(CPU, torch.float32), torch.tensor(texts)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 9)])
@pytest.mark.parametrize("kind", LOW)
def test_the_output_is_the_models_own(kind, sampling):
    """Though a twin's drafts are others: with all of the text to read, some are rejected."""
    model = tiny_model(4, 2)
    plain = generate(Engine(model, 4, 111, Strategy(), sampling), PROMPTS, 41)[0]
    engine = Engine(model, 4, 111, Strategy("streaming", 3, 400, weights=kind), sampling)
    outputs, stats = generate(engine, PROMPTS, 41)
    assert outputs == plain
    assert stats.draft_acceptance_rate > 0.6  # nearly the same model; 0.3 with other weights
    if sampling.greedy:
        assert outputs == [plain_greedy(model, p, 41) for p in PROMPTS]


@pytest.mark.parametrize("kind", LOW)
def test_the_drafts_window_holds_the_targets_keys(kind):
    """A twin's own K and V are overwritten by those of the verification; bf16 rounds them."""
    model = tiny_model()
    engine = Engine(model, 4, 111, Strategy("streaming", 3, 400, 4, weights=kind), GREEDY)
    engine.prefill(PROMPTS, [41] * 4)
    engine.run(3, 5)
    sparse = engine.drafter.sparse
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    assert sparse.k[0].dtype == dtype
    for b, n in enumerate((engine.batch.seq_len - 1).tolist()):
        p = torch.arange(max(n - 50, 0), n)
        slot = sparse.n_selected + p % (sparse.n_recent + sparse.slack)
        assert torch.equal(sparse.k[0][b, :, slot], engine.full.k[0][b, :, p].to(dtype))


def test_drafters_share_a_twin_which_goes_with_the_last_of_them():
    model = tiny_model()
    engine = Engine(model, 2, 99, Strategy("streaming", 3, 20, weights="int8"), GREEDY)
    first, twin = engine.drafter, engine.drafter.model
    assert twin is not model and engine.twins.n_bytes("int8") == 0 < engine.twins.n_bytes("fp8")
    second = engine.add(Strategy("snapkv", 3, 20, weights="int8"))
    assert second.model is twin
    engine.remove(first)
    engine.switch(second)
    assert engine.twins.get("int8") is twin
    engine.use(Strategy("streaming", 3, 24, weights="int8"))
    assert engine.drafter.model is twin
    engine.use(Strategy("streaming", 3, 20))
    assert engine.drafter.model is model and not engine.twins.made


def test_a_twins_memory_is_asked_for(monkeypatch):
    model = tiny_model()
    engine = Engine(model, 2, 99, Strategy(), GREEDY)
    needed = []
    monkeypatch.setattr("spec_decode.check_fits", lambda n, *more: needed.append(n))
    for kind in ("same", "fp8"):
        engine.add(Strategy("streaming", 3, 20, weights=kind))
    engine.add(Strategy("streaming", 3, 20, weights="fp8"))  # there is one now
    assert needed == [needed[0], needed[0] + Twins(model).n_bytes("fp8"), needed[0]]


def on_gpu(monkeypatch, *capability: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize("avx", [True, False])
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_what_is_chosen_has_a_kernel(monkeypatch, avx, capability):
    """bfloat16 beside float32 on CPUs that multiply it, float8 from Hopper on, else nothing."""
    on_gpu(monkeypatch, *capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": avx})
    odd = dataclasses.replace(CONFIG, ffn_dim=CONFIG.ffn_dim + 8)
    for device in (CPU, GPU):
        for dtype in (torch.float32, torch.bfloat16):
            for config in (CONFIG, odd):
                kind = automatic(config, device, dtype)
                assert not emulated(kind, config, device)
                fp8 = device == GPU and capability >= (9, 0) and config is CONFIG
                bf16 = device == CPU and dtype == torch.float32 and avx
                assert kind == ("fp8" if fp8 else "bf16" if bf16 else "same")
                assert resolve("auto", config, device, dtype) == kind


def test_kinds_without_a_kernel_are_emulated_and_say_so(monkeypatch):
    on_gpu(monkeypatch, 8, 0)
    for device in (CPU, GPU):
        assert [k for k in KINDS if emulated(k, CONFIG, device)] == ["fp8", "int8"]
    for kind, words in (("fp8", "emulated fp8"), ("bf16", "in bf16")):
        engine = Engine(tiny_model(), 1, 99, Strategy("streaming", 3, 20, weights=kind), GREEDY)
        assert f", with weights {words}"[-12:] in engine.drafter.label("")
        assert str(engine.drafter.strategy) == f"streaming 20 {kind}"
        assert engine.drafter.strategy.describe()["draft_weights"] == kind
    assert "draft_weights" not in Strategy("streaming").describe()


class Opened:
    """As `load.Opened`, of a target and maybe a draft model."""

    def __init__(self, draft: object = None, dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint, self.draft, self.device, self.dtype = self, draft, CPU, dtype
        self.config = CONFIG


def test_only_self_speculation_gets_them(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})

    def kinds(*flags: str, draft: object = None) -> list[tuple[str, str]]:
        o = parse_args([*flags])
        return [(d.policy, d.weights) for d in weighed(o, Opened(draft), o.strategies(3))]

    auto = [(name, "same" if name == "ngram" else "bf16") for name in AUTO_POLICIES]
    assert kinds() == kinds("--draft_weights", "bf16") == auto
    assert kinds(draft="one") == auto  # its own candidates are added later
    assert kinds("--draft_weights", "same") == [(policy, "same") for policy, _ in auto]
    assert kinds("--draft", "streaming") == [("streaming", "bf16")]
    assert kinds("--draft", "streaming", draft="one") == [("streaming", "same")]
    assert kinds("--draft", "ngram") == [("ngram", "same")]
    assert kinds("--draft", "none") == [("none", "same")]
    assert kinds("--draft", "snapkv", "--draft_weights", "fp8") == [("snapkv", "fp8")]


def test_the_command_says_that_weights_are_emulated(checkpoint, capsys):
    flags = ["--checkpoint_path", str(checkpoint), "--no-compile", "--prompt", "40", "--gamma", "1"]
    flags += ["--max_new_tokens", "2", "--draft_budget", "20", "--draft_weights", "int8"]
    assert main([*flags, "--draft", "streaming"]) == 0
    out, err = capsys.readouterr()
    assert "int8 draft weights have no kernel here: they are emulated, which is no faster" in err
    assert "with weights in emulated int8" in out
    assert main([*flags, "--draft", "ngram"]) == 2
    assert "draft policy ngram does not draft with the target's weights" in one_line(capsys)


@pytest.mark.parametrize("make, words", [
    (lambda: Strategy("streaming", weights="int3"), "'int3' must be one of same, bf16, fp8, int8"),
    (lambda: Engine(tiny_model(), 1, 99, Strategy("ngram", weights="int8"), GREEDY),
     "draft_weights int8 is for self-speculation: draft policy ngram does not"),
    (lambda: Engine(tiny_model(), 1, 99, Strategy("streaming", 3, 20, weights="int8"), GREEDY, 0,
                    tiny_model()),
     "draft_weights int8 is for self-speculation: a draft model does not"),
    (lambda: parse_args(["--draft", "none", "--draft_weights", "fp8"]),
     "--draft_weights needs a draft"),
    (lambda: resolve("bf16", CONFIG, CPU, torch.bfloat16), "bfloat16 already; use same"),
])  # fmt: skip
def test_what_has_no_use_for_them_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
