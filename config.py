"""What a model is: its sizes and traits, presets, and what it takes in bytes. No torch.

A family of models is a description. Llama, Mistral, Qwen, Phi and Gemma are one transformer that
differs in a few traits, and each trait is a field of `ModelConfig`: which activation, where norms
stand, what caps the scores, how far a layer sees. The model asks for the trait, never for the
family (`families.py` has these).

Layers may differ in what they see. In a layer with a *window* a query sees the newest
`sliding_window` tokens only, and every `full_every`-th layer sees all of them::

    Mistral v0.1, Phi-3      w w w w w w       full_every None
    Gemma 2                  w . w . w .       full_every 2
    Gemma 3                  w w w w w .       full_every 6

`windows` says it layer by layer; `visible_tokens` adds it up, and what is read and stored follows.
"""

import json
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from reprlib import repr as brief
from typing import Any, get_args

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
    "full_every": "sliding_window_pattern",
    "attention_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
    "local_rope_theta": "rope_local_base_freq",
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


def check_fields(config: Any) -> None:
    """Check every field of a dataclass against its type; ValueError has config.json's name."""
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None and type(None) in get_args(f.type):
            continue
        kind = (get_args(f.type) or (f.type,))[0]  # of `int | None`: int
        check_value(HF_NAMES.get(f.name, f.name), value, kind)


def check_value(name: str, value: Any, kind: type) -> None:
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
    """Sizes and traits of a model. Defaults are Llama's, and the values Hugging Face assumes."""

    dim: int
    n_layer: int  # L
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
    sliding_window: int | None = None  # newest tokens that a windowed layer sees; None: all
    full_every: int | None = None  # each such layer has no window; None: all layers have it
    local_rope_theta: float | None = None  # of windowed layers, unscaled; None: as all others
    activation: str = "silu"  # of the gate: silu or gelu_tanh
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(dim)
    norm_plus_one: bool = False  # RMSNorm multiplies by 1 + w, in float32
    post_norms: bool = False  # norms also of what attention and feed-forward give
    query_pre_attn_scalar: float | None = None  # instead of D under the root of the score's scale
    attention_cap: float | None = None  # scores become cap * tanh(score / cap); None: they stay
    logit_cap: float | None = None  # the same for logits
    fused_weights: bool = False  # one tensor in files for q, k, v, and one for gate, up
    n_ranks: int = 1  # of which this is one: heads and ffn_dim are its own (see `one_rank`)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"num_attention_heads {self.n_head} is not a multiple of "
                f"num_key_value_heads {self.n_kv_head}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs")
        yarn = self.rope_scaling is not None and self.rope_scaling.kind == "yarn"
        if self.rope_theta < 1 or (yarn and self.rope_theta == 1):  # yarn divides by its logarithm
            more = "more than" if yarn else "at least"
            raise ValueError(f"rope_theta = {self.rope_theta} must be {more} 1")
        if (self.local_rope_theta or 1) < 1:
            raise ValueError(f"rope_local_base_freq = {self.local_rope_theta} must be at least 1")

    @property
    def n_group(self) -> int:
        """G, query heads per KV head."""
        return self.n_head // self.n_kv_head

    @property
    def attention_scale(self) -> float:
        """What a query's products with keys are multiplied by: the one place that says it."""
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def embedding_scale(self) -> float:
        """What a token's embedding is multiplied by."""
        return self.dim**0.5 if self.scaled_embedding else 1.0

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, how many of the newest tokens a query sees, itself included; None: all."""
        every = self.full_every or self.n_layer + 1
        return tuple(
            None if (i + 1) % every == 0 else self.sliding_window for i in range(self.n_layer)
        )


def one_rank(m: ModelConfig, n: int) -> ModelConfig:
    """What one of n ranks has of a model: some of its heads, and an n-th of its feed-forward.

    KV heads that are fewer than ranks are on several of them. A feed-forward that does not divide
    is filled up with zeros. ValueError for heads that do not divide.
    """

    def divides(n: int) -> bool:
        return m.n_head % n == 0 and max(m.n_kv_head, n) % min(m.n_kv_head, n) == 0

    if not divides(n):
        fitting = ", ".join(str(k) for k in range(1, m.n_head + 1) if divides(k))
        raise ValueError(
            f"{m.n_head} query heads and {m.n_kv_head} KV heads cannot be divided among {n} ranks; "
            f"take {fitting}"
        )
    n_head, n_kv_head = m.n_head // n, max(m.n_kv_head // n, 1)
    return replace(m, n_head=n_head, n_kv_head=n_kv_head, ffn_dim=-(-m.ffn_dim // n), n_ranks=n)


GEMMA: dict[str, Any] = {"activation": "gelu_tanh", "scaled_embedding": True, "norm_plus_one": True,
         "post_norms": True}  # fmt: skip
MODELS = {
    "llama-2-7b": ModelConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096),
    "llama-2-7b-32k": ModelConfig(4096, 32, 32, 32, 128, 11008, 32000, 32768),
    "llama-3.1-8b": ModelConfig(4096, 32, 32, 8, 128, 14336, 128256, 131072),
    "llama-3.1-70b": ModelConfig(8192, 80, 64, 8, 128, 28672, 128256, 131072),
    "llama-3.2-1b": ModelConfig(2048, 16, 32, 8, 64, 8192, 128256, 131072, tie_embeddings=True),
    "tinyllama-1.1b": ModelConfig(2048, 22, 32, 4, 64, 5632, 32000, 2048),
    "gemma-2-9b": ModelConfig(3584, 42, 16, 8, 256, 14336, 256000, 8192, tie_embeddings=True,
                              sliding_window=4096, full_every=2, attention_cap=50.0,
                              logit_cap=30.0, **GEMMA),
    "gemma-3-1b": ModelConfig(1152, 26, 4, 1, 256, 6912, 262144, 32768, 1e6, tie_embeddings=True,
                              qk_norm=True, sliding_window=512, full_every=6,
                              local_rope_theta=10000.0, **GEMMA),
    "mistral-7b": ModelConfig(4096, 32, 32, 8, 128, 14336, 32768, 32768),
    "phi-3-mini-4k": ModelConfig(3072, 32, 32, 32, 96, 8192, 32064, 4096, norm_eps=1e-5,
                                 sliding_window=2047, fused_weights=True),
    "qwen2.5-7b": ModelConfig(3584, 28, 28, 4, 128, 18944, 152064, 32768),
    "qwen2.5-32b": ModelConfig(5120, 64, 40, 8, 128, 27648, 152064, 32768),
}  # fmt: skip


def lookup_name(table: dict, name: str, kind: str):
    """table[name], or a ValueError that lists the names there are."""
    if name not in table:
        raise ValueError(f"{kind} {name!r} is unknown; known: {', '.join(table)}")
    return table[name]


def most(high: int, fits: Callable[[int], bool]) -> int:
    """The largest of 1 .. high that fits, if all smaller ones do; 0 if none does."""
    return bisect(range(1, high + 1), False, key=lambda n: not fits(n))


def is_random(checkpoint_dir: Path) -> bool:
    """Whether it names a preset with random weights instead of a directory."""
    return str(checkpoint_dir).startswith(RANDOM)


PREFILL_CHUNK = 2048  # prompt tokens per forward on a GPU, as in kv_cache.CacheSpec
# Bytes that sampling holds at once for a logit, with top-p; measured on a CPU, 4 and 41.
SAMPLING_COMPILED, SAMPLING_EAGER = 8, 41
WEIGHT_BYTES = {"bf16": 2, "fp8": 1, "int8": 1}  # of a number, by kind of a twin (quantize.py)


def layer_params(m: ModelConfig) -> int:
    """Numbers in the matrices of one layer: q, k, v, o and the gated feed-forward."""
    return m.dim * m.head_dim * 2 * (m.n_head + m.n_kv_head) + 3 * m.dim * m.ffn_dim


def output_rows(m: ModelConfig) -> int:
    """Rows of the output layer: each rank has some of the vocabulary, at most so much."""
    return -(-m.vocab_size // m.n_ranks)


def matrix_params(m: ModelConfig) -> int:
    """Numbers in all matrices that a token is multiplied by, the output layer included."""
    return m.n_layer * layer_params(m) + m.dim * output_rows(m)


def total_params(m: ModelConfig) -> int:
    """All parameters: matrices, norms, and the embedding table, which every rank has whole.

    The output layer is a part of the table where both are one.
    """
    output = 0 if m.tie_embeddings else output_rows(m)
    norms = (4 if m.post_norms else 2) * m.n_layer + 1
    return m.n_layer * layer_params(m) + m.dim * (m.vocab_size + output + norms)


def visible_tokens(m: ModelConfig, n_tokens: int, margin: int = 0) -> int:
    """Tokens that the query behind n_tokens sees, summed over the layers.

    What attention reads and computes is proportional to it. With PREFILL_CHUNK as margin of every
    window it is what the caches hold of so long a text (see kv_cache.KVCache.empty).
    """
    return sum(n_tokens if w is None else min(n_tokens, w + margin) for w in m.windows)


def kv_bytes(m: ModelConfig, n_tokens: int, itemsize: int) -> int:
    """Bytes of K and V that the query behind n_tokens reads, in all layers and heads."""
    return visible_tokens(m, n_tokens) * kv_bytes_per_token(m, itemsize) // m.n_layer


def kv_bytes_per_token(m: ModelConfig, itemsize: int = 2) -> int:
    """Bytes of K and V of one token in all layers and heads."""
    return 2 * m.n_layer * m.n_kv_head * m.head_dim * itemsize


def work_bytes(
    m: ModelConfig,
    batch_size: int,
    gamma: int,  # most draft tokens of a round
    prefill_chunk: int,  # prompt tokens per forward
    itemsize: int,  # bytes of a weight, and so of an activation and a logit
    sampling: int,  # bytes for a logit, one of the two above; 0: greedy
) -> int:
    """Bytes that a prefill and a round need for a while, beside weights and caches.

    A token in a block: the residual stream and its norm (4 dim), q, k and v before and after their
    rotation, gate, up, their product and what it is made of (4 ffn). That is taken for a chunk and
    for a round together: CUDA graphs keep a memory pool of their own.
    A round's logits [B, gamma + 1, V], and what sampling makes of them.

    Not counted: the scores and masks of attention where it is not compiled, SnapKV's scores, and a
    draft model's part, taken to be the smaller.
    """
    rows = batch_size * (gamma + 1)
    qkv = (m.n_head + 2 * m.n_kv_head) * m.head_dim
    activations = (prefill_chunk + rows) * (4 * m.dim + 2 * qkv + 4 * m.ffn_dim) * itemsize
    return activations + rows * m.vocab_size * (itemsize + sampling)
