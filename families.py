"""What a `config.json` of Hugging Face means, family by family. No torch.

An entry of `ARCHITECTURES` says what the family's code fixes, and what it assumes where the file is
silent. All else is in the file, under names that the families share. A new family is a few lines
here, if it differs from the others in traits that `ModelConfig` has.

A checkpoint is data from strangers. Every value that enters arithmetic is checked, and a setting
that would change the arithmetic in a way that this program does not do is refused, by name: wrong
text that looks right is the worst answer. Every complaint names the file and the field.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as brief

from config import (
    GEMMA,
    MODELS,
    RANDOM,
    ModelConfig,
    RopeScaling,
    check_value,
    is_random,
    lookup_name,
    one_rank,
    open_json,
    output_rows,
)

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture's code does, as far as its config.json does not say it."""

    traits: dict = field(default_factory=dict)  # fields of ModelConfig that its code fixes
    silent: dict = field(default_factory=dict)  # fields of config.json where it has none
    only: dict = field(default_factory=lambda: {"hidden_act": "silu"})  # what they must be
    rope_types: tuple[str, ...] = ROPE_TYPES


GEMMA_SILENT = {"head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256,
                "use_sliding_window": True, "sliding_window": 4096}  # fmt: skip
GEMMA_ONLY = {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False}
ARCHITECTURES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(silent={"use_sliding_window": True, "sliding_window": 4096}),
    "Qwen2ForCausalLM": Family({"qkv_bias": True}),
    "Qwen3ForCausalLM": Family({"qk_norm": True}, {"head_dim": 128}),
    "Phi3ForCausalLM": Family(
        {"fused_weights": True},
        {"use_sliding_window": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        rope_types=("default",)),
    "Gemma2ForCausalLM": Family(
        GEMMA,
        GEMMA_SILENT | {"sliding_window_pattern": 2, "attn_logit_softcapping": 50.0,
                        "final_logit_softcapping": 30.0, "max_position_embeddings": 8192},
        GEMMA_ONLY),
    "Gemma3ForCausalLM": Family(
        GEMMA | {"qk_norm": True},
        GEMMA_SILENT | {"sliding_window_pattern": 6, "rope_local_base_freq": 10000.0,
                        "rope_theta": 1e6, "max_position_embeddings": 131072},
        GEMMA_ONLY | {"attn_logit_softcapping": None}),
}  # fmt: skip


def load_config(checkpoint_dir: Path) -> ModelConfig:
    """The model of a directory's `config.json`, or of a preset behind `random:`, or one rank of it.

    Raises FileNotFoundError, or ValueError for what is not supported.
    """
    if is_random(checkpoint_dir):
        return load_preset(str(checkpoint_dir).removeprefix(RANDOM))
    path = checkpoint_dir / "config.json"
    return read_config(open_json(path).of(dict), str(path))


def load_preset(name: str) -> ModelConfig:
    """A preset; NAME/8: one rank of eight as a model of its own, with an eighth of the vocabulary.

    What it takes is what each of eight GPUs takes, but for their all-reduces. ValueError for a name
    that is unknown, and as in `one_rank`.
    """
    name, slash, ranks = name.partition("/")
    whole = lookup_name(MODELS, name, "model")
    if not slash:
        return whole
    if not (ranks.isdecimal() and ranks.isascii() and 1 <= len(ranks) <= 6 and int(ranks)):
        raise ValueError(f"{RANDOM}{name}/{ranks}: {ranks!r} is no number of ranks")
    part = one_rank(whole, int(ranks))
    return replace(part, n_ranks=1, vocab_size=output_rows(part))


def read_config(hf: dict, source: str = "config.json") -> ModelConfig:
    """What a `config.json` says; ValueError names the file and any field that is not supported."""
    try:
        family = find_family(hf)
        hf = family.silent | hf
        check_supported(hf, family)
        return ModelConfig(**read_fields(hf) | family.traits)
    except ValueError as e:
        raise ValueError(f"{source}: {e}") from None


def find_family(hf: dict) -> Family:
    """The family of a config; ValueError, with those there are, if it is none of ours."""
    architectures = hf.get("architectures") or [f"of model_type {hf.get('model_type')}"]
    architecture = architectures[0] if isinstance(architectures, list) else architectures
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[architecture]


def check_supported(hf: dict, family: Family) -> None:
    """ValueError for a field whose value changes the arithmetic in a way that we do not do."""
    only = {"mlp_bias": False, "partial_rotary_factor": 1.0} | family.only
    if "use_sliding_window" not in family.silent:  # Qwen's would be of some layers only
        only["use_sliding_window"] = False
        layers = given(hf, "layer_types", [])
        for kind in layers if isinstance(layers, list) else [layers]:
            if kind != "full_attention":
                raise ValueError(f"layer_types has {brief(kind)}; supported is 'full_attention'")
    for name, value in only.items():
        found = rope_fields(hf).get(name, given(hf, name, value))
        if found != value:
            raise ValueError(f"{name} = {brief(found)} is not supported, only {value!r}")
    kind = rope_type(rope_fields(hf))
    if kind not in family.rope_types:
        raise ValueError(
            f"rope_type {brief(kind)} is not supported; supported: {', '.join(family.rope_types)}"
        )
    if hf.get("quantization_config"):
        raise ValueError("quantization_config is not supported; use the bf16 checkpoint")


def read_fields(hf: dict) -> dict:
    """The arguments of ModelConfig that a config says, where its family's silent values are in it.

    Raises ValueError for a field that is missing. What is calculated with is checked here, all else
    by ModelConfig.
    """
    dim, n_head = required(hf, "hidden_size"), required(hf, "num_attention_heads")
    max_seq_len = hf.get("max_position_embeddings", 2048)
    for name, value in (("hidden_size", dim), ("num_attention_heads", n_head),
                        ("max_position_embeddings", max_seq_len)):  # fmt: skip
        check_value(name, value, int)
    scaling = rope_scaling(hf)
    if scaling and scaling.kind == "yarn":  # Qwen's are edited in without a new maximum
        max_seq_len = max(max_seq_len, int(scaling.factor * scaling.original_max_seq_len))
    bias = given(hf, "attention_bias", False)
    window, full_every = read_windows(hf)
    return {
        "dim": dim,
        "n_layer": required(hf, "num_hidden_layers"),
        "n_head": n_head,
        "n_kv_head": given(hf, "num_key_value_heads", n_head),
        "head_dim": given(hf, "head_dim", dim // n_head),
        "ffn_dim": required(hf, "intermediate_size"),
        "vocab_size": required(hf, "vocab_size"),
        "max_seq_len": max_seq_len,
        "rope_theta": rope_fields(hf).get("rope_theta", 10000.0),
        "rope_scaling": scaling,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "tie_embeddings": given(hf, "tie_word_embeddings", False),
        "qkv_bias": bias,
        "o_bias": bias,
        "sliding_window": window,
        "full_every": full_every,
        "local_rope_theta": local_rope_theta(hf) if window else None,
        "query_pre_attn_scalar": hf.get("query_pre_attn_scalar"),
        "attention_cap": hf.get("attn_logit_softcapping"),
        "logit_cap": hf.get("final_logit_softcapping"),
    }


def required(hf: dict, name: str):
    """The field's value; ValueError if there is none."""
    if name not in hf:
        raise ValueError(f"no field {name!r}")
    return hf[name]


def given(hf: dict, name: str, default):
    """The field's value, or the default where it is absent or null."""
    return default if hf.get(name) is None else hf[name]


def read_windows(hf: dict) -> tuple[int | None, int | None]:
    """sliding_window and full_every; ValueError for layer_types that do not repeat like that.

    Families whose layers are all alike have no sliding_window_pattern, and ignore layer_types.
    """
    windowed = given(hf, "use_sliding_window", False)
    check_value("use_sliding_window", windowed, bool)
    window, every = hf.get("sliding_window") if windowed else None, hf.get("sliding_window_pattern")
    kinds = hf.get("layer_types")
    if every is not None and kinds is not None:
        full, local = "full_attention", "sliding_attention"
        kinds = kinds if isinstance(kinds, list) else [kinds]
        every = kinds.index(full) + 1 if full in kinds else len(kinds) + 1
        pattern = [local if (i + 1) % every else full for i in range(len(kinds))]
        if kinds != pattern or len(kinds) != hf.get("num_hidden_layers"):
            raise ValueError(
                f"layer_types = {brief(kinds)} is not supported, only every n-th of "
                f"num_hidden_layers {full!r} and the others {local!r}"
            )
    return (None, None) if window is None or every == 1 else (window, every)


def rope_fields(hf: dict, layers: str = "full_attention") -> dict:
    """RoPE settings from any spelling: transformers 4 keeps theta outside, 5 nests all of them.

    Where layers are of two kinds, 5 has settings for each; 4 scales those without a window.
    ValueError if they are no object.
    """
    nested = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if isinstance(nested, dict) and ("full_attention" in nested or layers != "full_attention"):
        nested = nested.get(layers) or {}
    if not isinstance(nested, dict):
        raise ValueError(f"the RoPE settings {brief(nested)} are not an object")
    return {k: v for k, v in hf.items() if k == "rope_theta"} | nested


def rope_type(rope: dict) -> str:
    """The kind of scaling in RoPE settings."""
    return given(rope, "rope_type", given(rope, "type", "default"))


def local_rope_theta(hf: dict) -> float | None:
    """RoPE's base in windowed layers; None: as in the others. ValueError if it is scaled there."""
    theta = hf.get("rope_local_base_freq")
    if theta is None:
        return None
    rope = rope_fields(hf | {"rope_theta": theta}, "sliding_attention")
    if rope_type(rope) != "default":
        raise ValueError(f"rope_type {brief(rope_type(rope))} of windowed layers is not supported")
    return rope["rope_theta"]


def rope_scaling(hf: dict) -> RopeScaling | None:
    """The RoPE scaling of a config, None where there is none."""
    rope = rope_fields(hf)
    kind = rope_type(rope)
    if kind == "default":
        return None
    old = hf.get("max_position_embeddings", 2048)
    old = given(rope, "original_max_position_embeddings", old)
    names = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ()
    more = {name: required(rope, name) for name in names}
    if kind == "yarn":
        for name in ("beta_fast", "beta_slow", "truncate"):
            if rope.get(name) is not None:
                more[name] = rope[name]
    scaling = RopeScaling(kind, required(rope, "factor"), old, **more)
    if kind == "yarn":
        scaling = replace(scaling, attention_factor=yarn_attention(scaling.factor, rope))
    return scaling


def yarn_attention(factor: float, rope: dict) -> float:
    """What YaRN multiplies rotated queries and keys with (arXiv 2309.00071, section 3.4)."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    names = "mscale", "mscale_all_dim"
    above, below = 1.0, 0.0
    if all(rope.get(name) for name in names):
        for name in names:
            check_value(name, rope[name], float)
        above, below = rope["mscale"], rope["mscale_all_dim"]
    log = math.log(max(factor, 1.0))
    return (0.1 * above * log + 1) / (0.1 * below * log + 1)
