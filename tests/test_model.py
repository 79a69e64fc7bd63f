"""The forward against a float64 loop; loading of Hugging Face directories and its errors."""

import json
import os
import resource
import stat
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoint import check_writable, eos_token_ids, load_model, save_model, write_json
from config import MODELS, ModelConfig, RopeScaling, load_config
from kv_cache import Access, CacheSpec, KVCache
from model import Block, Transformer, attend, compile_blocks, rope_frequencies
from tests.reference import (
    COMPILED_CHUNK,
    COMPILED_LEN,
    COMPILED_ROWS,
    reference_logits,
    tiny_model,
)

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


@pytest.mark.parametrize("device, options", [
    ("cpu", None), ("cuda", {"triton.autotune_pointwise": False, "deterministic": True}),
])  # fmt: skip
def test_no_kernel_is_autotuned_on_cuda(device, options):
    """Autotuning copies what a kernel writes to: whole buffers of the cache."""
    compiled = []
    block = SimpleNamespace(compile=lambda **settings: compiled.append(settings))
    weight = SimpleNamespace(device=torch.device(device))
    compile_blocks(SimpleNamespace(layers=[block] * 2, norm=SimpleNamespace(weight=weight)))
    assert compiled == [{"fullgraph": True, "dynamic": False, "options": options}] * 2
    for name, value in (options or {}).items():
        with torch._inductor.config.patch({name: value}):  # an error if there is no such setting
            pass


def test_compiled_flex_equals_reference():
    """One chunk that is a multiple of the query block, row by row, then four tokens and one.

    Other numbers of heads: tests/test_spec_decode.py.
    """
    model = tiny_model()
    compile_blocks(model)
    n, rows = COMPILED_CHUNK, random_rows(COMPILED_ROWS, COMPILED_CHUNK + 5)
    tokens, pos = torch.tensor(rows), torch.arange(n + 5).expand(COMPILED_ROWS, -1)
    cache = KVCache.empty(CacheSpec.for_model(model, COMPILED_ROWS), COMPILED_LEN)
    pieces = [
        torch.cat([model(tokens[b : b + 1, :n], pos[:1, :n], cache.row(b)) for b in range(4)]),
        model(tokens[:, n : n + 4], pos[:, n : n + 4], cache),
        model(tokens[:, n + 4 :], pos[:, n + 4 :], cache),
    ]
    for row, got in zip(rows[:2], torch.cat(pieces, dim=1), strict=False):
        expected = reference_logits(model, row)
        assert (got.double() - expected).abs().max() < 1e-4 * expected.std()


def test_a_sliding_window_is_the_same_compiled():
    """Eager, it is held against transformers (tests/test_checkpoints.py)."""
    eager, compiled = (tiny_model(sliding_window=50) for _ in range(2))
    compile_blocks(compiled)
    tokens, pos = torch.tensor(random_rows(4, 644)), torch.arange(644).expand(4, 644)
    cache = KVCache.empty(CacheSpec.for_model(eager, 4), COMPILED_LEN)
    eager(tokens[:, :640], pos[:, :640], cache)
    expected = eager(tokens[:, 640:], pos[:, 640:], cache)
    flex = KVCache(replace(cache.spec, flex=True), cache.k, cache.v)
    got = compiled(tokens[:, 640:], pos[:, 640:], flex)
    assert (got - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("window", [None, 1, 50, 300])
@pytest.mark.parametrize(
    "n_group, n_tokens", [(1, 1), (7, 5), (7, 33), (1, 256), (2, 128), (3, 384)]
)
def test_the_block_mask_is_the_dense_mask(n_group, n_tokens, window):
    """The rule inside the blocks; and those that are not visited hold nothing that is seen."""
    spec = CacheSpec.for_model(tiny_model(n_group, 1, sliding_window=window), 3)
    cache = KVCache.empty(replace(spec, flex=True), 1200)
    pos = torch.tensor([[0], [250], [701]]) + torch.arange(n_tokens)
    mask, dense = cache.block_mask(pos), cache.dense_mask(pos)[:, 0]  # [B, G * T, S]
    assert mask.seq_lengths == dense.shape[1:]
    b, q, slot = (torch.arange(n) for n in dense.shape)
    assert torch.equal(mask.mask_mod(b[:, None, None], 0, q[:, None], slot), dense)
    for b in range(3):
        for i, part in enumerate(dense[b].split(128)):
            needed = part.any(dim=0).view(-1, spec.kv_block).any(dim=1).nonzero()[:, 0].tolist()
            visited = mask.kv_indices[b, 0, i, : mask.kv_num_blocks[b, 0, i]].tolist()
            assert visited == sorted(set(visited)) and set(needed) <= set(visited)
            if n_tokens % 128 == 0 or len(dense[b]) <= 128:
                assert needed == visited


@pytest.mark.parametrize("window", [1, 5, 29, 30, None])
def test_without_a_cache_a_sliding_window_is_the_same(window):
    model, rows = tiny_model(sliding_window=window), random_rows(2, 30)
    got = model(torch.tensor(rows), torch.arange(30).expand(2, 30)).double()

    def visible(q: int, p: int) -> bool:
        return q - (window or 30) < p <= q

    expected = torch.stack([reference_logits(model, row, visible) for row in rows])
    assert (got - expected).abs().max() < 1e-4 * expected.std()
    assert (got - cached_logits(model, rows, [30])).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_with_a_mask_in_every_dtype(dtype):
    """Against a loop in float64. What is masked is large, so that a leak cannot be missed."""
    B, T, H, Hkv, S, D = 2, 3, 6, 2, 11, 8
    generator = torch.Generator().manual_seed(6)
    q, k, v = (
        torch.randn(B, *shape, D, generator=generator).to(dtype)
        for shape in ((T, H), (Hkv, S), (Hkv, S))
    )
    mask = torch.rand(B, Hkv, H // Hkv * T, S, generator=generator) < 0.4
    mask[..., 0] = True  # every query sees something
    hidden = ~mask.any(dim=2)[..., None]  # of slots that no query sees
    assert hidden.any()
    k, v = k + 5 * hidden, v + 100 * hidden
    got = attend(q, k.to(dtype), v.to(dtype), Access(mask)).view(B, T, H, D)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = mask[b, h // 3, h % 3 * T + t]
                scores = k[b, h // 3, seen].double() @ q[b, t, h].double() / D**0.5
                expected = scores.softmax(0) @ v[b, h // 3, seen].double()
                tolerance = 1e-5 if dtype == torch.float32 else 0.05
                assert (got[b, t, h] - expected).abs().max() < tolerance


@pytest.mark.parametrize("window", [1, 50, 300, 444, 445, None])
def test_a_sliding_window_visits_only_its_blocks(window):
    spec = CacheSpec.for_model(tiny_model(sliding_window=window), 2)
    cache = KVCache.empty(replace(spec, flex=True), 700)
    mask = cache.access(torch.tensor([[699], [255]]))[0].mask
    for b, (p, last) in enumerate([(699, 2), (255, 0)]):
        first = 0 if window is None else max(p - window + 1, 0) // 256
        assert mask.kv_num_blocks[b, 0, 0] == last - first + 1
        assert mask.kv_indices[b, 0, 0, : last - first + 1].tolist() == [*range(first, last + 1)]


@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize("compiled", [False, True])
def test_rows_at_different_lengths_equal_the_rows_alone(compiled, n_tokens):
    """A batch step where every row stands somewhere else; also with garbage in unseen slots."""
    model = tiny_model()
    lengths = [3, 100, 61, 1]
    rows = random_rows(COMPILED_ROWS, 104)
    cache = KVCache.empty(CacheSpec.for_model(model, COMPILED_ROWS), COMPILED_LEN)
    for b, n in enumerate(lengths):
        model(torch.tensor([rows[b][:n]]), torch.arange(n)[None], cache.row(b))
    if compiled:
        compile_blocks(model)
        cache = KVCache(CacheSpec.for_model(model, COMPILED_ROWS), cache.k, cache.v)
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
        ({"num_attention_heads": 0}, ["config.json: num_attention_heads = 0 is not a positive"]),
        ({"num_key_value_heads": 0}, ["config.json: num_key_value_heads = 0 is not a positive"]),
        ({"hidden_size": -4}, ["config.json: hidden_size = -4 is not a positive integer"]),
        ({"intermediate_size": 10**30}, ["config.json: intermediate_size = 1000", "below 2**31"]),
        ({"vocab_size": 10**18}, ["config.json: vocab_size = 1000000000000000000 is not"]),
        ({"rms_norm_eps": 1e-60}, ["config.json: rms_norm_eps = 1e-60 is not", "within float32"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings = 'false' is neither true nor"]),
        ({"attention_bias": "false"}, ["attention_bias = 'false' is neither true nor false"]),
        (
            {"architectures": ["MistralForCausalLM"], "use_sliding_window": "false"},
            ["use_sliding_window = 'false' is neither true nor false"],
        ),
        ({"rope_theta": "x"}, ["config.json: rope_theta = 'x' is not a positive number"]),
        ({"rope_theta": float("inf")}, ["config.json: rope_theta = inf is not"]),
        ({"rope_theta": 10**400}, ["config.json: rope_theta = 1000", "within float32"]),
        ({"rope_theta": 0.5}, ["config.json: rope_theta = 0.5 must be at least 1"]),
        (
            {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            ["config.json: rope_theta = 1.0 must be more than 1"],
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, ["factor 0.5", "at least 1"]),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": float("inf")}},
            ["config.json: factor = inf is not a positive number"],
        ),
        ({"rope_scaling": "linear"}, ["config.json"]),
        ({"rope_scaling": {"rope_type": {}}}, ["config.json: rope_type {} is not supported"]),
        ({"max_position_embeddings": None}, ["max_position_embeddings = None is not"]),
        ({"rope_scaling": {"rope_type": "llama3"}}, ["no field", "factor"]),
        ({"intermediate_size": 57}, ["misshapen", "down_proj", "56", "57"]),
        ({"num_hidden_layers": 3}, ["missing", "model.layers.2.", "and 6 more"]),
        ({"num_hidden_layers": 10**5}, ["missing", "model.layers.2.", "and 899979 more"]),
        ({"num_hidden_layers": 1}, ["unexpected", "model.layers.1."]),
    ],
)
def test_strange_checkpoints_are_refused_by_name(tmp_path, changes, words):
    save_model(tiny_model(), tmp_path, **changes)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


def test_a_config_with_any_field_of_any_type_is_read_or_refused():
    """A ValueError that begins with the file is the only other answer; no run on NaN either."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "beta_fast": 32, "beta_slow": 1, "truncate": True}  # fmt: skip
    base = {"architectures": ["MistralForCausalLM"], "hidden_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            "intermediate_size": 8, "vocab_size": 9, "layer_types": ["full_attention"],
            "hidden_act": "silu", "use_sliding_window": False, "sliding_window": 5,
            "max_position_embeddings": 64, "rope_theta": 1e4, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
            "quantization_config": None, "rope_scaling": yarn}  # fmt: skip
    values = [None, True, -1, 0, 1, 1.5, 1e-60, 1e60, float("inf"), float("nan"), 10**400, "", "x",
              [], [1], [[]], {}, {"a": []}, "7"]  # fmt: skip
    ModelConfig.from_hf(base)
    n_read = 0
    for kind in ("yarn", "linear", "llama3"):
        scaling = yarn | {"rope_type": kind, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        hf = base | {"rope_scaling": scaling}
        for value in values:
            changed = [hf | {name: value} for name in hf]
            changed += [hf | {"rope_scaling": scaling | {name: value}} for name in scaling]
            for one in changed:
                try:
                    frequencies = rope_frequencies(ModelConfig.from_hf(one))
                    assert frequencies.isfinite().all()
                    n_read += 1
                except ValueError as e:
                    assert str(e).startswith("config.json: ") and "\n" not in str(e)
    assert n_read > 200


def test_our_own_mistakes_are_not_called_the_users(monkeypatch):
    def broken(hf):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr("config.rope_scaling", broken)
    with pytest.raises(TypeError, match="a mistake of ours"):
        ModelConfig.from_hf({"architectures": ["LlamaForCausalLM"], "hidden_size": 8,
                             "num_attention_heads": 1})  # fmt: skip


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
    monkeypatch.setattr(Transformer, "to_empty", lambda *args, **how: pytest.fail("too late"))
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


def test_sizes_are_checked_before_layers_are_built(tmp_path, monkeypatch):
    """Building a hundred thousand layers takes most of a minute, without any weights in them."""
    save_model(tiny_model(), tmp_path, num_hidden_layers=10**5)
    built = []
    monkeypatch.setattr("model.Block", lambda config: built.append(0) or Block(config))
    with pytest.raises(ValueError, match="missing: model.layers.2."):
        load(tmp_path)
    assert len(built) <= 3
    monkeypatch.setattr("device.free_memory", lambda device: 2**30)
    with pytest.raises(ValueError, match="weights of .* need .* but cpu has 1.0 GiB free"):
        load(tmp_path)
    assert len(built) <= 3


def test_a_tensor_may_be_in_one_shard_only(tmp_path):
    save_model(tiny_model(), tmp_path, n_shards=2)
    one, two = sorted(tmp_path.glob("*.safetensors"))
    two.write_bytes(one.read_bytes())
    with pytest.raises(ValueError, match=r"00002-of-00002.*is in model-00001-of-00002"):
        load(tmp_path)


def test_an_index_without_files_is_refused(tmp_path):
    """No files are not `random:`."""
    save_model(tiny_model(), tmp_path, n_shards=2)
    index = tmp_path / "model.safetensors.index.json"
    for weight_map in ({}, None, [], {"a": None}, {"a": "b", "c": 5}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(
            ValueError, match="index.json has no object weight_map that names files"
        ):
            load(tmp_path)
    for name in ("", "."):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match=f"shard {name!r} is not a file name in this"):
            load(tmp_path)


def test_a_single_file_goes_before_an_index(tmp_path):
    """As in transformers: what an index beside it says is left over."""
    old, new = tiny_model(seed=1), tiny_model(seed=2)
    save_model(old, tmp_path, n_shards=2)
    save_model(new, tmp_path)
    assert torch.equal(load(tmp_path).norm.weight, new.norm.weight)
    save_model(old, tmp_path, n_shards=3)  # must not be hidden by the single file of before
    assert torch.equal(load(tmp_path).norm.weight, old.norm.weight)


@pytest.mark.parametrize("dtype, bad", [("float32", torch.nan), ("float32", -torch.inf),
                                        ("float16", 1e5)])  # fmt: skip
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, dtype, bad):
    model = tiny_model()
    model.layers[1].feed_forward.w_gate_up.weight.data[60, 3] = bad
    save_model(model, tmp_path)
    words = rf"model.safetensors: model.layers.1.mlp.up_proj.weight has NaN or .* {dtype}"
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path, torch.device("cpu"), getattr(torch, dtype))


@contextmanager
def without_privileges():
    """As a user who may not read everything, also where the tests are run by root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_weights_that_may_not_be_read_are_not_called_missing():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        path.chmod(0o755)
        save_model(tiny_model(), path)
        (path / "model.safetensors").chmod(0)
        with without_privileges(), pytest.raises(PermissionError, match="model.safetensors"):
            load(path)


def test_a_path_that_is_not_utf8_is_not_called_corrupt(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9")
    path.mkdir()
    save_model(tiny_model(), path.parent)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).rename(path / name)
    with pytest.raises(ValueError, match="paths in UTF-8 only; rename the directory"):
        load(path)


def test_pickles_are_not_opened(tmp_path):
    save_model(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle, .* never opened"):
        load(tmp_path)


def test_weights_that_do_not_fit_are_not_loaded(tmp_path, monkeypatch):
    save_model(tiny_model(), tmp_path)
    monkeypatch.setattr("device.free_memory", lambda device: 1000)
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
    monkeypatch.setitem(
        MODELS, "tiny", ModelConfig(32, 2, 4, 2, 8, 48, 99, 500, tie_embeddings=True)
    )
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
    for content, words in [("{}", "no object weight_map"), ("[]", "not hold a JSON object"),
                           ('{"a":' * 10**5, "not valid JSON")]:  # fmt: skip
        index.write_text(content)
        with pytest.raises(ValueError, match=words):
            load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(tmp_path)
    for ids in ('"</s>"', "[1, null]", "1e3", "9" * 30, "true"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
        with pytest.raises(ValueError, match="generation_config.json: eos_token_id = .* not a tok"):
            eos_token_ids(tmp_path)


def test_a_pipe_is_not_opened_before_there_is_something_to_write(tmp_path, monkeypatch):
    """Its reader would see the end of the file, and without one it does not open."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Path, "open", lambda *args: pytest.fail("opened"))
    check_writable(tmp_path / "pipe")


def test_files_are_replaced_behind_links_and_nothing_else_is(tmp_path):
    """Devices, pipes and open files are written to as they are; what cannot be is told before."""
    file, link, pipe = tmp_path / "a.json", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to("a.json")
    for value in ({"a": 1}, {"b": 2}):
        check_writable(link)
        write_json(value, link)
        assert link.is_symlink() and json.loads(file.read_text()) == value
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with open(tmp_path / "log", "w+") as log:
        log.write("before\n")
        log.flush()
        opened = Path(f"/dev/fd/{log.fileno()}")
        for path in (pipe, opened):  # no device: a mistake would replace it for everybody
            kind = stat.S_IFMT(path.stat().st_mode)
            check_writable(path)
            write_json({}, path)
            assert stat.S_IFMT(path.stat().st_mode) == kind
        assert (tmp_path / "log").read_text() == "before\n{}\n"
    assert os.read(reader, 99) == b"{}\n"
    os.close(reader)
    for path in (tmp_path, file / "b", Path("/proc/version"), Path("/proc/new"),
                 tmp_path / ("x" * 253)):  # fmt: skip
        with pytest.raises(OSError):
            check_writable(path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # as on a full disk
    try:
        with pytest.raises(OSError):
            check_writable(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "link", "log", "pipe"]
