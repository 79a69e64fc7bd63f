"""Config."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from reprlib import repr as brief
from typing import Any

# What a family's code fixes, or assumes where its config.json is silent.
ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"use_sliding_window": True, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True, "head_dim": 128},
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# The least and the largest normal number of float32.
FLOAT32_MIN, FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127
RANDOM = "random:"  # before the name of a preset: no directory, random weights
HF_NAMES = {  # our fields whose names in config.json are others
    "dim": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "original_max_seq_len": "original_max_position_embeddings",
}


@dataclass(frozen=True, slots=True)
class Json:
    """A part of a JSON file that knows its place, so that a complaint names file and field."""

    path: Path
    name: str  # as "model.merges[3]"; "" is the whole file
    value: Any  # None where the file has no such field

    def __getitem__(self, key: str | int) -> "Json":
        """A field of an object, an item of a list. ValueError if this is no object or list."""
        if isinstance(key, int):
            return Json(self.path, f"{self.name}[{key}]", self.of(list)[key])
        name = f"{self.name}.{ascii(key)[1:-1]}".lstrip(".")
        return Json(self.path, name, self.of(dict).get(key))

    def __iter__(self) -> Iterator["Json"]:
        return (self[i] for i in range(len(self.of(list))))

    def of(self, kind: type) -> Any:
        """The value. Raises ValueError unless it is of this type."""
        if type(self.value) is not kind:
            raise self.refused(f"of type {kind.__name__}")
        return self.value

    def only(self, *supported: object, hint: str = "") -> None:
        """Raises ValueError, which ends with the hint, unless the value is one of these."""
        if self.value not in supported:
            raise self.refused(" or ".join(map(json.dumps, supported)) + hint)

    def refused(self, supported: str) -> ValueError:
        """The complaint: file, field, value, and what is supported instead."""
        shown = brief(self.value).encode("ascii", "backslashreplace").decode()
        return ValueError(f"{self.path}: {self.name} is {shown}, supported is only {supported}")


def open_json(path: Path) -> Json:
    """The object in a JSON file. Raises FileNotFoundError, or ValueError if it holds no object."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; a checkpoint directory is one of Hugging Face, "
            f"with config.json, *.safetensors and a tokenizer"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return Json(path, "", value)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How RoPE is stretched to a context longer than the one it was first trained on."""

    kind: str  # linear, llama3 or yarn
    factor: float
    original_max_seq_len: int  # tokens
    low_freq_factor: float = 1.0  # llama3: turns in the old context, below: stretched,
    high_freq_factor: float = 4.0  # above: unchanged
    beta_fast: float = 32.0  # yarn: the same as high_freq_factor,
    beta_slow: float = 1.0  # and as low_freq_factor
    attention_factor: float = 1.0  # yarn: of rotated queries and keys
    truncate: bool = True  # yarn: the boundaries between pairs are whole numbers

    def __post_init__(self) -> None:
        check_fields(self)
        if self.factor < 1:
            raise ValueError(f"factor {self.factor} of the RoPE scaling must be at least 1")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} must be less than high_freq_factor "
                f"{self.high_freq_factor}"
            )


def check_fields(config: object) -> None:
    """Check every field of a dataclass against its type; ValueError has config.json's name."""
    for field in fields(config):
        check_value(HF_NAMES.get(field.name, field.name), getattr(config, field.name), field.type)


def check_value(name: str, value: object, kind: type) -> None:
    """ValueError unless the value is an integer in 1..2**31 - 1, a positive number, or a boolean.

    Numbers are used in float32. What is infinite or zero there is refused.
    """
    if kind is int and not (type(value) is int and 0 < value < 2**31):
        raise ValueError(f"{name} = {brief(value)} is not a positive integer below 2**31")
    if kind is float and not (type(value) in (int, float) and FLOAT32_MIN <= value <= FLOAT32_MAX):
        raise ValueError(f"{name} = {brief(value)} is not a positive number within float32")
    if kind is bool and type(value) is not bool:
        raise ValueError(f"{name} = {brief(value)} is neither true nor false")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Dimensions of a Llama-family model. Defaults are the values Hugging Face assumes."""

    dim: int
    n_layer: int
    n_head: int  # H, query heads
    n_kv_head: int  # Hkv, key/value heads
    head_dim: int  # D
    ffn_dim: int
    vocab_size: int  # V
    max_seq_len: int = 2048  # tokens of trained context
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every head's query and key, before RoPE
    sliding_window: int | None = None  # newest tokens that attention sees; None: all

    def __post_init__(self) -> None:
        check_fields(self)
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"num_attention_heads {self.n_head} is not a multiple of "
                f"num_key_value_heads {self.n_kv_head}"
            )
        if self.sliding_window is not None:
            check_value("sliding_window", self.sliding_window, int)
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs")
        yarn = self.rope_scaling is not None and self.rope_scaling.kind == "yarn"
        if self.rope_theta < 1 or (yarn and self.rope_theta == 1):  # yarn divides by its logarithm
            more = "more than" if yarn else "at least"
            raise ValueError(f"rope_theta = {self.rope_theta} must be {more} 1")

    @property
    def n_group(self) -> int:
        """G, query heads per KV head."""
        return self.n_head // self.n_kv_head

    @classmethod
    def from_hf(cls, hf: dict, source: str = "config.json") -> "ModelConfig":
        """Read a Hugging Face `config.json`; ValueError names any field that is not supported."""
        try:
            return cls(**read_fields(check_supported(hf)))
        except ValueError as e:
            raise ValueError(f"{source}: {e}") from None


def read_fields(hf: dict) -> dict:
    """The arguments of ModelConfig, from a config that has its family's defaults.

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
    windowed = given(hf, "use_sliding_window", False)
    check_value("use_sliding_window", windowed, bool)
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
        "qkv_bias": given(hf, "qkv_bias", bias),
        "o_bias": bias,
        "qk_norm": given(hf, "qk_norm", False),
        "sliding_window": hf.get("sliding_window") if windowed else None,
    }


def required(hf: dict, name: str):
    """The field's value; ValueError if there is none."""
    if name not in hf:
        raise ValueError(f"no field {name!r}")
    return hf[name]


def given(hf: dict, name: str, default):
    """The field's value, or the default where it is absent or null."""
    return default if hf.get(name) is None else hf[name]


def check_supported(hf: dict) -> dict:
    """The config with its family's defaults.

    Raises ValueError for a field whose value changes the arithmetic in a way we do not do.
    """
    architectures = hf.get("architectures") or [f"of model_type {hf.get('model_type')}"]
    architecture = architectures[0] if isinstance(architectures, list) else architectures
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    only = {"hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1.0}
    family = ARCHITECTURES[architecture]
    if "use_sliding_window" not in family:  # Qwen's would be of some layers only
        only["use_sliding_window"] = False
    for field, value in only.items():
        found = rope_fields(hf).get(field, hf.get(field, value))
        if found != value:
            raise ValueError(f"{field} = {brief(found)} is not supported, only {value!r}")
    layers = given(hf, "layer_types", [])
    for kind in layers if isinstance(layers, list) else [layers]:
        if kind != "full_attention" and "use_sliding_window" not in family:
            raise ValueError(f"layer_types has {brief(kind)}; supported is only 'full_attention'")
    kind = rope_type(hf)
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"rope_type {brief(kind)} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    if hf.get("quantization_config"):
        raise ValueError("quantization_config is not supported; use the bf16 checkpoint")
    return family | hf


def rope_fields(hf: dict) -> dict:
    """RoPE settings from either spelling: transformers 5 nests them, 4 keeps theta outside."""
    nested = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"the RoPE settings {brief(nested)} are not an object")
    return {k: v for k, v in hf.items() if k == "rope_theta"} | nested


def rope_type(hf: dict) -> str:
    fields = rope_fields(hf)
    return given(fields, "rope_type", given(fields, "type", "default"))


def rope_scaling(hf: dict) -> RopeScaling | None:
    """The RoPE scaling of a config, None where there is none."""
    kind, rope = rope_type(hf), rope_fields(hf)
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


MODELS = {
    "llama-2-7b": ModelConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096),
    "llama-2-7b-32k": ModelConfig(4096, 32, 32, 32, 128, 11008, 32000, 32768),
    "llama-3.1-8b": ModelConfig(4096, 32, 32, 8, 128, 14336, 128256, 131072),
    "llama-3.1-70b": ModelConfig(8192, 80, 64, 8, 128, 28672, 128256, 131072),
    "llama-3.2-1b": ModelConfig(2048, 16, 32, 8, 64, 8192, 128256, 131072, tie_embeddings=True),
    "tinyllama-1.1b": ModelConfig(2048, 22, 32, 4, 64, 5632, 32000, 2048),
    "mistral-7b": ModelConfig(4096, 32, 32, 8, 128, 14336, 32768, 32768),
    "qwen2.5-7b": ModelConfig(3584, 28, 28, 4, 128, 18944, 152064, 32768),
    "qwen2.5-32b": ModelConfig(5120, 64, 40, 8, 128, 27648, 152064, 32768),
}


def lookup_name(table: dict, name: str, kind: str):
    """table[name], or a ValueError that lists the names there are."""
    if name not in table:
        raise ValueError(f"{kind} {name!r} is unknown; known: {', '.join(table)}")
    return table[name]


def is_random(checkpoint_dir: Path) -> bool:
    return str(checkpoint_dir).startswith(RANDOM)


def load_config(checkpoint_dir: Path) -> ModelConfig:
    """The dimensions in a directory's `config.json`, or of a preset behind `random:`.

    ValueError says what is not supported.
    """
    if is_random(checkpoint_dir):
        preset = lookup_name(MODELS, str(checkpoint_dir).removeprefix(RANDOM), "model")
        return preset
    path = checkpoint_dir / "config.json"
    return ModelConfig.from_hf(open_json(path).of(dict), str(path))


PREFILL_CHUNK = 2048  # prompt tokens per forward on a GPU, as in kv_cache.CacheSpec
# Float32 numbers that sampling holds at once for a logit of the target while it becomes a
# probability, and for one of a row while it becomes a token: measured, see the test of work_bytes.
PROBS_PER_LOGIT = 5
PROBS_PER_ROW = 3


def layer_params(m: ModelConfig) -> int:
    """Numbers in the matrices of one layer: q, k, v, o and the gated feed-forward."""
    return m.dim * m.head_dim * 2 * (m.n_head + m.n_kv_head) + 3 * m.dim * m.ffn_dim


def matrix_params(m: ModelConfig) -> int:
    """Numbers in all matrices that a token is multiplied by, the output layer included."""
    return m.n_layer * layer_params(m) + m.dim * m.vocab_size


def total_params(m: ModelConfig) -> int:
    """All parameters: matrices, norms, and the embedding table where it is one of its own."""
    table = 0 if m.tie_embeddings else m.dim * m.vocab_size
    return matrix_params(m) + table + (2 * m.n_layer + 1) * m.dim


def kv_bytes_per_token(m: ModelConfig, itemsize: int = 2) -> int:
    """Bytes of K and V of one token in all layers and heads."""
    return 2 * m.n_layer * m.n_kv_head * m.head_dim * itemsize


def work_bytes(
    m: ModelConfig,
    batch_size: int,
    gamma: int,  # most draft tokens of a round
    prefill_chunk: int,  # prompt tokens per forward
    itemsize: int,  # bytes of a weight, and so of an activation and a logit
    sampled: bool,  # at a temperature; False: greedy
) -> int:
    """Bytes that a prefill and a round need for a while, beside weights and caches.

    A token in a block: the residual stream and its norm (4 dim), q, k and v before and after their
    rotation, gate, up, their product and what it is made of (4 ffn). That is taken for a chunk and
    for a round together: CUDA graphs keep a memory pool of their own.
    A round's logits [B, gamma + 1, V]. Sampling adds float32: the draft's probabilities
    [B, gamma, V], PROBS_PER_LOGIT times [B, gamma + 1, V], PROBS_PER_ROW times [B, V].

    Not counted: the scores and masks of attention where it is not compiled, SnapKV's scores, and a
    draft model's part, taken to be the smaller.
    """
    rows = batch_size * (gamma + 1)
    qkv = (m.n_head + 2 * m.n_kv_head) * m.head_dim
    activations = (prefill_chunk + rows) * (4 * m.dim + 2 * qkv + 4 * m.ffn_dim) * itemsize
    probs = batch_size * (gamma + PROBS_PER_ROW) + rows * PROBS_PER_LOGIT
    return activations + m.vocab_size * (rows * itemsize + (4 * probs if sampled else 0))
