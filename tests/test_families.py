"""Every model family: logits and greedy text equal those of `transformers`.

The checkpoints under fixtures/models, and what they must answer, were written by
`scripts/make_model_fixtures.py`; where `transformers` is installed they are also made anew.
"""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors import safe_open

from checkpoint import load_model
from config import RopeScaling
from families import ARCHITECTURES, load_config, read_config
from kv_cache import CacheSpec, KVCache
from model import Transformer, rope_frequencies
from policies import Strategy
from refill import generate
from sampling import Sampling
from scripts.make_model_fixtures import FAMILIES, LENGTHS, NEW_TOKENS, SHARDED, make
from scripts.save_model import save_model
from spec_decode import Engine
from tests.reference import tiny_model

FIXTURES = Path(__file__).parent / "fixtures" / "models"
DRAFTINGS = {
    "plain": Strategy(),
    "streaming": Strategy("streaming", 3, 24),
    "snapkv": Strategy("snapkv", 3, 24, obs_window=7, reselect_every=4),
    "ngram": Strategy("ngram", 3),
}
WINDOWED = ("mistral-v0.1", "phi-3", "gemma-2", "gemma-3")


def load(directory: Path) -> tuple[Transformer, dict[str, torch.Tensor]]:
    with safe_open(directory / "expected.safetensors", framework="pt") as file:
        expected = {name: file.get_tensor(name) for name in file.keys()}
    return load_model(directory, torch.device("cpu"), torch.float32), expected


@contextmanager
def short_rings():
    """Inside, windows of these models are short enough that their layers' buffers wrap often."""
    sizes = {"prefill_chunk": 29, "kv_block": 8}
    with mock.patch.multiple(CacheSpec, **sizes):
        yield


def check_logits(directory: Path, longest: int = 300) -> None:
    """At all lengths, read in pieces of at most `longest` tokens and of 7."""
    model, expected = load(directory)
    for n in LENGTHS:
        tokens = expected["prompt"][None, :n]
        for piece in (min(n, longest), 7):
            cache = KVCache.empty(CacheSpec.for_model(model, 1), n)
            logits = torch.cat([
                model(part, torch.arange(i * piece, i * piece + part.shape[1])[None], cache)
                for i, part in enumerate(tokens.split(piece, dim=1))
            ], dim=1)[0]  # fmt: skip
            difference = logits[expected[f"positions_{n}"]] - expected[f"logits_{n}"]
            assert difference.abs().max() < 1e-4 * expected[f"std_{n}"]


def check_text(directory: Path, strategy: Strategy, draft: Path | None = None) -> Engine:
    """Both prompts in one batch."""
    model, expected = load(directory)
    prompts = [expected["prompt"][:n].tolist() for n in LENGTHS[1:]]
    draft_model = draft and load(draft)[0]
    length = max(LENGTHS) + NEW_TOKENS
    engine = Engine(model, 2, length, strategy, Sampling(), draft_model=draft_model)
    outputs, stats = generate(engine, prompts, NEW_TOKENS)
    assert outputs == [expected[f"greedy_{n}"].tolist() for n in LENGTHS[1:]]
    assert bool(stats.drafts) == strategy.enabled
    return engine


def test_a_directory_for_every_family():
    assert {path.name for path in FIXTURES.iterdir()} == set(FAMILIES)
    configs = [json.loads((FIXTURES / name / "config.json").read_text()) for name in FAMILIES]
    assert {name for config in configs for name in config["architectures"]} == set(ARCHITECTURES)
    for name in FAMILIES:
        weights = list((FIXTURES / name).glob("model*.safetensors"))
        assert (len(weights) > 1) == (name in SHARDED)
        assert sum(path.stat().st_size for path in weights) < 200_000


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name):
    check_logits(FIXTURES / name)


@pytest.mark.parametrize("strategy", DRAFTINGS.values(), ids=DRAFTINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_is_that_of_transformers(name, strategy):
    check_text(FIXTURES / name, strategy)


@pytest.mark.parametrize("name", WINDOWED)
def test_logits_are_the_same_where_rings_wrap(name):
    with short_rings():
        check_logits(FIXTURES / name, 29)


@pytest.mark.parametrize("strategy", DRAFTINGS.values(), ids=DRAFTINGS)
@pytest.mark.parametrize("name", WINDOWED)
def test_greedy_text_is_the_same_where_rings_wrap(name, strategy):
    """Decoded twice: a rewound ring has lost what the prompt's end sees, which is read again."""
    with short_rings():
        engine = check_text(FIXTURES / name, strategy)
        first = engine.batch.outputs()
        for size, window in engine.full.layers:
            assert size < 104 if window else size == engine.full.capacity
        assert not engine.full.holds(engine.batch.prompt_len)[1]
        engine.rewind()
        assert engine.batch.outputs() == [row[:1] for row in first]
        engine.run()
        assert engine.batch.outputs() == first


@pytest.mark.parametrize("draft", [None, "gemma-2-draft"])
def test_a_conversation_goes_on_where_rings_wrap(draft, monkeypatch):
    """What is continued is not read again, what parts too early from the last text is."""
    (model, expected), read = load(FIXTURES / "gemma-2"), []
    draft_model = draft and load(FIXTURES / draft)[0]
    hidden = Transformer.hidden

    def spy(self, tokens, pos, *caches):
        read.extend(pos[0].tolist() if self is model else [])
        return hidden(self, tokens, pos, *caches)

    monkeypatch.setattr(Transformer, "hidden", spy)
    strategy = Strategy("full" if draft else "streaming", 3, 24)
    with short_rings(), mock.patch("model.SHORT", 5):
        engine = Engine(model, 1, 400, strategy, Sampling(), draft_model=draft_model)
        prompt = expected["prompt"][:280].tolist()
        for n_kept, n_new, first_read in ((280, 0, 0), (295, 9, 295), (150, 41, 0), (190, 2, 187)):
            prompt = [*prompt, *engine.batch.outputs()[0]][:n_kept]
            prompt += expected["prompt"][:n_new].tolist()
            read.clear()
            engine.prefill([prompt], [20], reuse=True)
            assert min(read) == first_read
            engine.run()
            fresh = Engine(model, 1, 400, Strategy(), Sampling())
            assert engine.batch.outputs() == generate(fresh, [prompt], 20)[0]


@pytest.mark.parametrize("draft", ["gemma-2", "gemma-2-draft"])
@pytest.mark.parametrize("policy", ["full", "streaming", "snapkv"])
def test_a_windowed_draft_model_drafts_for_a_windowed_model(policy, draft):
    """Twice, and its own rings are read again too; the target itself is always right."""
    strategy = Strategy(policy, 3, 50)
    with short_rings():
        engine = check_text(FIXTURES / "gemma-2", strategy, FIXTURES / draft)
        first, stats = engine.batch.outputs(), engine.batch.stats()
        engine.rewind()
        engine.run()
        assert engine.batch.outputs() == first and engine.batch.stats() == stats
        if (policy, draft) == ("full", "gemma-2"):
            assert stats.draft_acceptance_rate == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_itself_if_it_is_here(name, tmp_path):
    pytest.importorskip("transformers")
    make(name, tmp_path)
    check_logits(tmp_path)
    for strategy in DRAFTINGS.values():
        check_text(tmp_path, strategy)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_spelling_of_transformers_4(name):
    """Which has theta outside, and calls the scaling `rope_scaling`, its kind also `type`."""
    new = json.loads((FIXTURES / name / "config.json").read_text())
    rope = new["rope_parameters"]
    old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types")}
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else rope | {"type": kind}
    assert read_config(old) == load_config(FIXTURES / name)


def test_what_the_fixtures_are_meant_to_exercise():
    configs = {name: load_config(FIXTURES / name) for name in FAMILIES}
    assert {c.n_group for c in configs.values()} >= {1, 2, 4, 7}
    assert configs["mistral-v0.1"].sliding_window == 64
    assert configs["mistral-v0.3"].sliding_window is None
    assert configs["qwen2.5"].qkv_bias and not configs["qwen2.5"].o_bias
    assert configs["llama-bias"].qkv_bias and configs["llama-bias"].o_bias
    assert configs["qwen3"].qk_norm
    assert configs["qwen3"].head_dim * configs["qwen3"].n_head != configs["qwen3"].dim
    assert configs["llama-3.2"].tie_embeddings
    scalings = {c.rope_scaling.kind for c in configs.values() if c.rope_scaling}
    assert scalings == {"linear", "llama3", "yarn"}
    assert configs["qwen2.5-yarn"].max_seq_len == 512  # 4 times the original context


def test_both_spellings_of_rope_settings():
    base = {"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}  # fmt: skip
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64}  # fmt: skip
    old = read_config(base | {"rope_theta": 5e5, "rope_scaling": llama3})
    new = read_config(base | {"rope_parameters": llama3 | {"rope_theta": 5e5}})
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 64, 1.0, 4.0)
    assert read_config(base).n_kv_head == 2  # absent: one KV head per query head


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
        load_model(tmp_path, torch.device("cpu"), torch.float32)
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
    read_config(base)
    n_read = 0
    for kind in ("yarn", "linear", "llama3"):
        scaling = yarn | {"rope_type": kind, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        hf = base | {"rope_scaling": scaling}
        for value in values:
            changed = [hf | {name: value} for name in hf]
            changed += [hf | {"rope_scaling": scaling | {name: value}} for name in scaling]
            for one in changed:
                try:
                    frequencies = rope_frequencies(read_config(one))
                    assert frequencies.isfinite().all()
                    n_read += 1
                except ValueError as e:
                    assert str(e).startswith("config.json: ") and "\n" not in str(e)
    assert n_read > 200


def test_our_own_mistakes_are_not_called_the_users(monkeypatch):
    def broken(hf):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr("families.rope_scaling", broken)
    with pytest.raises(TypeError, match="a mistake of ours"):
        read_config({"architectures": ["LlamaForCausalLM"], "hidden_size": 8,
                             "num_attention_heads": 1})  # fmt: skip


def gemma(**changes) -> dict:
    """A config.json in which Gemma's own defaults hold, but for changes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 7, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 8, "vocab_size": 9}
    return {"architectures": ["Gemma3ForCausalLM"]} | sizes | changes


def test_what_gemma_means_where_its_config_is_silent():
    config = read_config(gemma())
    assert (config.head_dim, config.tie_embeddings, config.rope_theta) == (256, True, 1e6)
    assert config.windows == (4096,) * 5 + (None, 4096) and config.local_rope_theta == 10000
    assert (config.attention_cap, config.logit_cap, config.attention_scale) == (None, None, 1 / 16)
    assert config.embedding_scale == 32**0.5
    config = read_config(gemma(architectures=["Gemma2ForCausalLM"]))
    assert config.windows == (4096, None) * 3 + (4096,) and config.local_rope_theta is None
    assert (config.attention_cap, config.logit_cap, config.rope_theta) == (50, 30, 10000)
    phi = read_config(gemma(architectures=["Phi3ForCausalLM"], sliding_window=2047))
    assert phi.windows == (2047,) * 7 and phi.fused_weights and phi.norm_eps == 1e-5


@pytest.mark.parametrize("changes, windows", [
    ({"sliding_window": 5}, (5, 5, 5, 5, 5, None, 5)),
    ({"sliding_window_pattern": 3}, (4096, 4096, None) * 2 + (4096,)),
    ({"layer_types": ["sliding_attention"] * 7}, (4096,) * 7),
    ({"layer_types": ["full_attention"] * 7}, (None,) * 7),
    ({"layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]},
     (4096, None) * 3 + (4096,)),
    ({"sliding_window": None}, (None,) * 7),
    ({"use_sliding_window": False}, (None,) * 7),
])  # fmt: skip
def test_which_layers_have_a_window(changes, windows):
    assert read_config(gemma(**changes)).windows == windows


@pytest.mark.parametrize("changes, words", [
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .* not supported"),
    ({"layer_types": ["sliding_attention"] * 6}, "layer_types = .* is not supported"),
    ({"layer_types": ["chunked_attention"] * 7}, "layer_types = .* is not supported"),
    ({"layer_types": "full_attention"}, "layer_types = .* is not supported"),
    ({"sliding_window_pattern": 0}, "sliding_window_pattern = 0 is not a positive integer"),
    ({"sliding_window_pattern": "6"}, "sliding_window_pattern = '6' is not a positive integer"),
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True is not supported"),
    ({"hidden_activation": "gelu"}, "hidden_activation = 'gelu' is not .* 'gelu_pytorch_tanh'"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0 is not .* only None"),
    ({"final_logit_softcapping": 0}, "final_logit_softcapping = 0 is not a positive number"),
    ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar = -1 is not a positive number"),
    ({"rope_local_base_freq": 0.5}, "rope_local_base_freq = 0.5 must be at least 1"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention":
                          {"rope_type": "linear"}}}, "rope_type 'linear' of windowed layers"),
    ({"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGen.* is not"),
    ({"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.75},
     "partial_rotary_factor = 0.75 is not supported"),
    ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"}},
     "rope_type 'longrope' is not supported; supported: default$"),
])  # fmt: skip
def test_what_a_family_does_and_we_do_not_is_refused(changes, words):
    with pytest.raises(ValueError, match=f"^config.json: .*{words}"):
        read_config(gemma(**changes))


def test_only_llamas_are_saved(tmp_path):
    """Another family's directory would be read as a Llama, and answer nonsense."""
    for name in ("gemma-2", "gemma-3", "phi-3", "qwen3", "qwen2.5", "mistral-v0.1"):
        with pytest.raises(ValueError, match="Llama family only"):
            save_model(load(FIXTURES / name)[0], tmp_path)
    save_model(load(FIXTURES / "llama-bias")[0], tmp_path)


def test_fused_weights_are_the_separate_ones(tmp_path):
    """Phi-3's tensors, cut by hand, in a Llama's directory."""
    model, _ = load(FIXTURES / "phi-3")
    llama = Transformer(replace(model.config, fused_weights=False, sliding_window=None))
    llama.load_state_dict(model.state_dict())
    save_model(llama, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}
    with safe_open(FIXTURES / "phi-3" / "model.safetensors", framework="pt") as file:
        qkv = file.get_tensor("model.layers.1.self_attn.qkv_proj.weight")
        gate_up = file.get_tensor("model.layers.1.mlp.gate_up_proj.weight")
    parts = [kept[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(torch.cat(parts), qkv)
    parts = [kept[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(torch.cat(parts), gate_up)
