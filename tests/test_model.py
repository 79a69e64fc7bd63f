"""The forward against a float64 loop; loading of Hugging Face directories and its errors."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cost_model import MODELS, Dimensions
from kv_cache import CacheSpec, KVCache
from model import (
    ModelConfig,
    RopeScaling,
    Transformer,
    compile_blocks,
    eos_token_ids,
    load_config,
    load_model,
    save_model,
)
from tests.reference import reference_logits, tiny_model

RATIOS = [(3, 3), (4, 2), (4, 1), (7, 1)]  # H, Hkv: G = 1, 2, 4, 7
LLAMA3 = RopeScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0)


def cached_logits(model: Transformer, rows: list[list[int]], chunks: list[int]) -> torch.Tensor:
    """Logits [B, T, V] of equally long rows, fed through a cache in pieces of the given sizes."""
    cache = KVCache.empty(CacheSpec.for_model(model, len(rows)), len(rows[0]))
    tokens, pieces, start = torch.tensor(rows), [], 0
    for n in chunks:
        pos = torch.arange(start, start + n).expand(len(rows), n)
        pieces.append(model(tokens[:, start : start + n], pos, cache))
        start += n
    assert start == len(rows[0])
    return torch.cat(pieces, dim=1)


def random_rows(n_rows: int, length: int, vocab_size: int = 97, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (n_rows, length), generator=generator).tolist()


@pytest.mark.parametrize("heads", RATIOS)
@pytest.mark.parametrize("chunks", [[37], [1] * 37, [5, 31, 1], [36, 1]])
def test_cached_forward_equals_float64_reference(heads, chunks):
    model = tiny_model(*heads)
    rows = random_rows(2, 37)
    expected = torch.stack([reference_logits(model, row) for row in rows])
    got = cached_logits(model, rows, chunks).double()
    assert (got - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("changes", [{"tie_embeddings": True}, {"rope_scaling": LLAMA3}])
def test_variants_equal_float64_reference(changes):
    model = tiny_model(**changes)
    rows = random_rows(1, 90)
    expected = reference_logits(model, rows[0])
    got = cached_logits(model, rows, [60, 30])[0].double()
    assert (got - expected).abs().max() < 1e-4 * expected.std()


def test_llama3_scaling_changes_something():
    rows = random_rows(1, 90)
    plain, scaled = (tiny_model(rope_scaling=s) for s in (None, LLAMA3))
    difference = cached_logits(plain, rows, [90]) - cached_logits(scaled, rows, [90])
    assert difference.abs().max() > 0.1


@pytest.mark.parametrize("heads", RATIOS)
def test_compiled_flex_equals_reference(heads):
    """One chunk that is a multiple of the query block and one that is not, then single tokens."""
    model = tiny_model(*heads)
    compile_blocks(model)
    rows = random_rows(2, 134)
    expected = torch.stack([reference_logits(model, row) for row in rows])
    got = cached_logits(model, rows, [128, 5, 1]).double()
    assert (got - expected).abs().max() < 1e-4 * expected.std()


def test_a_sliding_window_is_the_same_compiled():
    """Eager, it is held against transformers (tests/test_checkpoints.py)."""
    eager, compiled = (tiny_model(sliding_window=50) for _ in range(2))
    compile_blocks(compiled)
    rows, chunks = random_rows(2, 644), [640, 4]
    expected = cached_logits(eager, rows, chunks)
    got = cached_logits(compiled, rows, chunks)
    assert (got - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("window", [1, 50, 300, 444, 445, None])
def test_a_sliding_window_visits_only_its_blocks(window):
    spec = CacheSpec.for_model(tiny_model(sliding_window=window), 2)
    cache = KVCache.empty(replace(spec, flex=True), 700)
    mask = cache.steps(torch.tensor([[699], [255]]))[0].mask
    for b, (p, last) in enumerate([(699, 2), (255, 0)]):
        first = 0 if window is None else max(p - window + 1, 0) // 256
        assert mask.kv_num_blocks[b, 0, 0] == last - first + 1
        assert mask.kv_indices[b, 0, 0, : last - first + 1].tolist() == [*range(first, last + 1)]


@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_at_different_lengths_equal_the_rows_alone(compiled, n_tokens):
    """A batch step where every row stands somewhere else; also with garbage in unseen slots."""
    model = tiny_model()
    if compiled:
        compile_blocks(model)
    lengths = [3, 100, 61]
    rows = random_rows(3, 104)
    spec = CacheSpec.for_model(model, 3)
    cache = KVCache.empty(spec, 600)
    for b, n in enumerate(lengths):
        model(torch.tensor([rows[b][:n]]), torch.arange(n)[None], cache.row(b))
    pos = torch.tensor(lengths)[:, None] + torch.arange(n_tokens)
    tokens = torch.tensor([rows[b][n : n + n_tokens] for b, n in enumerate(lengths)])
    together = model(tokens, pos, cache)
    for b, n in enumerate(lengths):
        alone = reference_logits(model, rows[b][: n + n_tokens])[-n_tokens:]
        assert (together[b].double() - alone).abs().max() < 1e-4 * alone.std()
    for b, n in enumerate(lengths):
        for k, v in zip(cache.k, cache.v, strict=True):
            k[b, :, n + n_tokens :] = 1e6
            v[b, :, n + n_tokens :] = -1e30
    assert torch.equal(model(tokens, pos, cache), together)


def load(path) -> Transformer:
    return load_model(path, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("n_shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_load_model_reads_what_is_there(tmp_path, n_shards, tied):
    model = tiny_model(7, 1, tie_embeddings=tied)
    save_model(model, tmp_path, n_shards, eos_token_id=[2, 5])
    loaded = load(tmp_path)
    assert loaded.config == model.config
    rows = random_rows(1, 20)
    assert torch.equal(cached_logits(loaded, rows, [20]), cached_logits(model, rows, [20]))
    assert (loaded.output.weight is loaded.tok_embeddings.weight) == tied
    assert eos_token_ids(tmp_path) == (2, 5)


def test_both_spellings_of_rope_settings():
    base = {"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}  # fmt: skip
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}  # fmt: skip
    old = ModelConfig.from_hf(base | {"rope_theta": 5e5, "rope_scaling": llama3})
    new = ModelConfig.from_hf(base | {"rope_parameters": llama3 | {"rope_theta": 5e5}})
    assert old == new
    assert old.rope_theta == 5e5 and old.rope_scaling == LLAMA3
    assert ModelConfig.from_hf(base).n_kv_head == 2  # absent: one KV head per query head


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": []}, ["config.json", "model_type llama", "Qwen3ForCausalLM"]),
        ({"hidden_act": "gelu"}, ["config.json", "hidden_act = 'gelu'", "only 'silu'"]),
        ({"mlp_bias": True}, ["mlp_bias = True", "only False"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5", "only 1.0"]),
        ({"use_sliding_window": True}, ["use_sliding_window = True", "only False"]),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            ["layer_types", "'sliding_attention'", "'full_attention'"],
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, ["sliding_window = 0"]),
        ({"attention_bias": True}, ["missing", "self_attn.q_proj.bias"]),
        ({"architectures": ["Qwen3ForCausalLM"]}, ["missing", "self_attn.q_norm.weight"]),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            ["config.json", "rope_type 'dynamic'", "default, linear, llama3, yarn"],
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["config.json", "no field 'factor'"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": "x"}}, ["config.json", "factor"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, ["config.json", "factor"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
        ({"num_attention_heads": "4"}, ["config.json", "4"]),
        ({"num_attention_heads": 0}, ["config.json"]),
        ({"hidden_size": -4}, ["dim = -4", "positive"]),
        ({"rope_theta": "x"}, ["rope_theta", "x"]),
        ({"rope_scaling": "linear"}, ["config.json"]),
        ({"max_position_embeddings": None}, ["max_seq_len", "None"]),
        ({"rope_scaling": {"rope_type": "llama3"}}, ["no field", "factor"]),
        ({"intermediate_size": 57}, ["misshapen", "down_proj", "56", "57"]),
        ({"num_hidden_layers": 3}, ["missing", "model.layers.2.", "more"]),
        ({"num_hidden_layers": 1}, ["unexpected", "model.layers.1."]),
    ],
)
def test_strange_checkpoints_are_refused_by_name(tmp_path, changes, words):
    save_model(tiny_model(), tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


def one_tensor(offsets: list[int], shape: list[int], n_bytes: int, dtype: str = "F32") -> bytes:
    """A safetensors file whose header says this of its one tensor, with so many bytes behind."""
    header = {"model.norm.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(n_bytes)


@pytest.mark.parametrize(
    "content, words",
    [
        (one_tensor([0, 4 * 40], [40], 80), "corrupt or incomplete"),  # data cut off
        (one_tensor([0, 4 * 40], [40], 400), "corrupt or incomplete"),  # more than was said
        (one_tensor([0, 4 * 40], [80], 160), "corrupt or incomplete"),  # shape against offsets
        (one_tensor([0, 2**63], [2**61], 16), "corrupt or incomplete"),
        (one_tensor([0, 16], [2**40, 2**40], 16), "corrupt or incomplete"),  # overflows
        ((2**62).to_bytes(8, "little") + b"{}", "corrupt or incomplete"),  # endless header
        (b"", "corrupt or incomplete"),
        (one_tensor([0, 4 * 41], [41], 164), r"misshapen: model.norm.weight \[41\], .* \[40\]"),
        (one_tensor([0, 40], [40], 40, "I8"), "dtype I8; supported: F64, F32, F16, BF16"),
        (one_tensor([0, 160], [40], 160), "missing: model.embed_tokens.weight, .* more"),
    ],
)
def test_headers_are_checked_before_anything_is_allocated(tmp_path, monkeypatch, content, words):
    save_model(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    monkeypatch.setattr("model.check_fits", lambda *args: pytest.fail("too late"))
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


def test_a_tensor_may_be_in_one_shard_only(tmp_path):
    save_model(tiny_model(), tmp_path, n_shards=2)
    one, two = sorted(tmp_path.glob("*.safetensors"))
    two.write_bytes(one.read_bytes())
    with pytest.raises(ValueError, match=r"00002-of-00002.*is in model-00001-of-00002"):
        load(tmp_path)


def test_pickles_are_not_opened(tmp_path):
    save_model(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle, .* never opened"):
        load(tmp_path)


def test_weights_that_do_not_fit_are_not_loaded(tmp_path, monkeypatch):
    save_model(tiny_model(), tmp_path)
    monkeypatch.setattr("kv_cache.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"weights of .* need 0.0 GiB, .*; use a smaller model"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_read_into_the_dtype_that_was_asked_for(tmp_path, dtype):
    model = tiny_model()
    save_model(model, tmp_path)
    seen = []
    loaded = load_model(tmp_path, torch.device("cpu"), dtype, lambda *now: seen.append(now))
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs.to(dtype))
    total = sum(p.nbytes for p in loaded.parameters())
    assert seen[0] == (0, total) and seen[-1] == (total, total) and seen == sorted(seen)


def test_random_weights_of_a_presets_geometry(monkeypatch):
    monkeypatch.setitem(MODELS, "tiny", Dimensions(32, 2, 4, 2, 8, 48, 99, 500, True))
    config = load_config(Path("random:tiny"))
    assert (config.dim, config.n_kv_head, config.max_seq_len) == (32, 2, 500)
    model = load_model(Path("random:tiny"), torch.device("cpu"), torch.float32)
    assert model.output.weight is model.tok_embeddings.weight
    logits = model(torch.tensor([[3, 4]]), torch.tensor([[0, 1]]))
    assert logits.isfinite().all() and logits.std() > 0
    with pytest.raises(ValueError, match="model 'tinny' is unknown; known: llama-2-7b"):
        load_config(Path("random:tinny"))
    for name in ("llama-3.1-8b", "qwen2.5-7b"):
        assert load_config(Path(f"random:{name}")).n_layer == MODELS[name].n_layer


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        load(tmp_path)
    save_model(tiny_model(), tmp_path, n_shards=2)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="corrupt"):
        load(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00002"):
        load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises((ValueError, FileNotFoundError), match="not a file name|not exist"):
            load(tmp_path)
    for content, words in [("{}", "no object weight_map"), ("[]", "not hold a JSON object")]:
        index.write_text(content)
        with pytest.raises(ValueError, match=words):
            load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match="eos_token_id"):
        eos_token_ids(tmp_path)
