"""The target model: a Llama-family transformer that is handed its KV cache.

There is one forward for everything this program does::

    model(tokens [B, T], pos [B, T], cache) -> logits [B, T, V]

Prefill, plain decoding, drafting and verification differ only in T and in the cache they are
handed, so a lossless speculative decoder needs no second model code path that could disagree
with the first. The cache (see `kv_cache.py`) answers two questions once per forward, in
`cache.steps(pos)`, for each layer: into which slots do these tokens go, and which slots may each
of them see?

Attention at long context is a memory problem: a decode step does about one multiply-add per
cached number it reads. Two things keep the reading fast:

* **The query heads of a KV head are folded into the query length.** With grouped-query attention,
  G = H / Hkv query heads share one KV head. Instead of repeating K and V G times we view the
  queries as ``[B, Hkv, G * T, D]``: the cache is read once per group, for any G, and a decode
  step (T = 1) and a verification (T = gamma + 1) are the same kernel with a taller query.
* **flex_attention with a block mask made from lengths.** It reads ceil(len / block) blocks of
  each row, not the capacity of the static buffer, and compiles to a split-KV kernel on CUDA.
  Where flex_attention cannot run (no compiler, no AVX2), and for the few slots of a draft cache,
  the cache hands out a boolean mask instead, and attention is two matrix products and a softmax.

Blocks are compiled one by one (`compile_blocks`): all layers share one compiled function, so a
32-layer model compiles as fast as a 2-layer one, and no Python runs between the kernels of a
block. ``cache=None`` is plain causal attention over the given tokens: training, and tests.

Weights are read from a Hugging Face directory as it is. Positions are rotated in float32 with the
half-split convention of those checkpoints. What the families differ in are a few fields of
`ModelConfig`; a new family is a line in `ARCHITECTURES`. What a config asks for and we do not do is
refused by field and value before a weight is read, and of the weights only safetensors are opened:
a checkpoint is data from strangers, and a pickle is a program.
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from reprlib import repr as brief
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from cost_model import MODELS, known, total_params
from kv_cache import Step, check_fits, seen

# What a family's code fixes, or assumes where its config.json is silent.
ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"use_sliding_window": True, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True, "head_dim": 128},
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
STORED_DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors call them
SHORT = 64  # tokens per forward, at least, where few of a text are new
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
    limits = torch.finfo(torch.float32)
    if kind is int and not (type(value) is int and 0 < value < 2**31):
        raise ValueError(f"{name} = {brief(value)} is not a positive integer below 2**31")
    if kind is float and not (type(value) in (int, float) and limits.tiny <= value <= limits.max):
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


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each rotated pair, [D/2] float32 (RoFormer, arXiv 2104.09864).

    A stretched model divides by `factor` what turns slowly and keeps what turns fast: linear
    divides all, llama3 goes from one to the other linearly in the turns that a pair makes in the
    old context, yarn linearly in the pair's number.
    """
    D, theta, s = config.head_dim, config.rope_theta, config.rope_scaling
    freq = theta ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)
    if s is None:
        return freq
    keep = torch.zeros_like(freq)  # 1: unchanged; 0: divided by `factor`
    if s.kind == "llama3":
        turns = s.original_max_seq_len * freq / (2 * math.pi)
        keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    elif s.kind == "yarn":

        def pair(turns: float) -> float:  # the number of the pair that makes so many
            return D * math.log(s.original_max_seq_len / (2 * math.pi * turns), theta) / 2

        first, last = pair(s.beta_fast), pair(s.beta_slow)
        if s.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, D - 1)
        keep = 1 - (torch.arange(D // 2) - first) / max(last - first, 0.001)
    keep = keep.clamp(0, 1)
    return freq * (keep + (1 - keep) / s.factor)


def rotate(
    x: Tensor,  # [B, T, heads, D]
    cos: Tensor,  # [B, T, 1, D/2] float32
    sin: Tensor,  # [B, T, 1, D/2] float32
) -> Tensor:
    """Turn the pairs (x_i, x_{i + D/2}) by their position's angle."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def attend(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,  # [B, Hkv, S, D]
    step: Step | None,  # with a mask over folded queries, see the module docstring; None: causal
    window: int | None = None,  # without a step: newest tokens that a query sees; None: all
) -> Tensor:  # [B, T, H * D]
    """Attention of every query head to its KV head, with G folded into the query length."""
    B, T, H, D = q.shape
    Hkv = k.shape[1]
    G = H // Hkv
    if step is None:
        p = torch.arange(T, device=q.device)
        mask = None if window is None else seen(p, p[:, None], window)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=G > 1
        )
        return y.transpose(1, 2).reshape(B, T, H * D)
    q = q.view(B, T, Hkv, G, D).permute(0, 2, 3, 1, 4).reshape(B, Hkv, G * T, D)
    q = q * D**-0.5  # scaled here, not in the kernel: flex on the CPU wants a computed query
    if isinstance(step.mask, BlockMask):
        y = flex_attention(
            q, k, v, block_mask=step.mask, scale=1.0, kernel_options=step.kernel_options
        )
    elif q.dtype == torch.float32:  # for a draft's few slots faster than the next line (LOG.md)
        y = (q @ k.transpose(-1, -2)).masked_fill(~step.mask, -torch.inf).softmax(dim=-1) @ v
    else:  # keeps the scores in float32
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask, scale=1.0)
    return y.view(B, Hkv, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.n_head * config.head_dim
        kv_width = config.n_kv_head * config.head_dim
        self.wqkv = nn.Linear(config.dim, width + 2 * kv_width, bias=config.qkv_bias)
        self.wo = nn.Linear(width, config.dim, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,  # [B, T, dim]
        rope: tuple[Tensor, Tensor],  # cos, sin, each [B, T, 1, D/2]
        step: Step | None,  # slots to write and who sees what; None: causal, no cache
        buffers: tuple[tuple[Tensor, Tensor], ...],  # (k, v) pairs; the first is attended to
    ) -> Tensor:  # [B, T, dim]
        """Write K and V into the buffers that have slots, in place, then attend to the first."""
        B, T, _ = x.shape
        c = self.config
        q, k, v = (
            self.wqkv(x)
            .view(B, T, -1, c.head_dim)
            .split((c.n_head, c.n_kv_head, c.n_kv_head), dim=2)
        )
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if step is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            return self.wo(attend(q, k, v, step, c.sliding_window))
        rows = torch.arange(B, device=x.device)[:, None]
        for (k_buffer, v_buffer), slot in zip(buffers, step.slots, strict=False):
            k_buffer[rows, :, slot] = k  # this form stays in place under torch.compile
            v_buffer[rows, :, slot] = v
        return self.wo(attend(q, *buffers[0], step))

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """The rotated queries alone, [B, T, H, D]."""
        c = self.config
        width = c.n_head * c.head_dim
        bias = self.wqkv.bias[:width] if c.qkv_bias else None
        q = F.linear(x, self.wqkv.weight[:width], bias).unflatten(-1, (-1, c.head_dim))
        return rotate(self.q_norm(q) if c.qk_norm else q, *rope)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.w_down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, dim] -> [B, T, dim]
        gate, up = self.w_gate_up(x).chunk(2, dim=-1)
        return self.w_down(F.silu(gate) * up)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # [..., dim] -> [..., dim]
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


class Block(nn.Module):
    """One transformer layer, the unit of compilation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,  # [B, T, dim]
        rope: tuple[Tensor, Tensor],
        step: Step | None,
        buffers: tuple[tuple[Tensor, Tensor], ...],
    ) -> Tensor:  # [B, T, dim]
        x = x + self.attention(self.attention_norm(x), rope, step, buffers)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.compiled = False  # set by compile_blocks
        self.flex = False  # whether attention to a full cache goes through flex_attention
        self.register_buffer("rope_freq", rope_frequencies(config), persistent=False)

    def forward(
        self,
        tokens: Tensor,  # [B, T] int64
        pos: Tensor,  # [B, T] int64, place in the text, consecutive within a row
        cache=None,  # any cache of kv_cache.py; None: causal attention over these tokens alone
    ) -> Tensor:  # [B, T, V]
        """Logits of the token after each given one; writes the tokens' K and V into the cache."""
        return self.logits(self.hidden(tokens, pos, cache))

    def hidden(self, tokens: Tensor, pos: Tensor, cache=None) -> Tensor:
        """The forward without its output layer, [B, T, dim]: what a prefill chunk needs."""
        x, rope = self.tok_embeddings(tokens), self.rope(pos)
        steps = [None] * len(self.layers) if cache is None else cache.steps(pos)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, steps[i], () if cache is None else cache.layer(i))
        return x

    def rope(self, pos: Tensor) -> tuple[Tensor, Tensor]:  # [B, T] -> cos, sin [B, T, 1, D/2]
        angle = (pos[..., None].float() * self.rope_freq)[:, :, None, :]
        scaling = self.config.rope_scaling
        factor = scaling.attention_factor if scaling else 1.0
        return angle.cos() * factor, angle.sin() * factor

    def queries(self, tokens: Tensor, pos: Tensor, cache) -> Iterator[Tensor]:
        """Layer by layer the rotated queries [B, T, H, D] of tokens that are in the cache."""
        x, rope, steps = self.tok_embeddings(tokens), self.rope(pos), cache.steps(pos)
        for i, layer in enumerate(self.layers):
            yield layer.attention.queries(layer.attention_norm(x), rope)
            x = layer(x, rope, steps[i], cache.layer(i))

    def prefill(
        self,
        tokens: Tensor,  # [1, S] int64
        length: int,  # how many of them to read
        chunk: int,  # tokens per forward
        cache,
        n_cached: int = 0,  # fewer than `length`, the first ones, which the cache holds already
    ) -> Tensor:
        """Read a text into the cache; the hidden state [dim] of its last token.

        Two static shapes: chunks, and where something was cached, short ones for what is less than
        a chunk. The last forward is moved back to end with the text: what it computes twice, it
        computes the same. A text shorter than that is followed by tokens that do not exist yet, in
        slots that nobody sees before they are overwritten.
        """
        short = min(max(chunk // 8, SHORT), chunk) if n_cached else chunk
        start = n_cached
        while start < length:
            T = chunk if length - start >= chunk else short
            at = max(min(start, length - T), 0)
            pos = torch.arange(at, at + T, device=tokens.device)[None]
            x = self.hidden(tokens[:, at : at + T], pos, cache)
            start = at + T
        return x[0, length - 1 - at]

    def logits(self, x: Tensor) -> Tensor:  # [..., dim] -> [..., V]
        return self.output(self.norm(x))


def compile_blocks(model: Transformer) -> None:
    """Compile every block, in place, into one shared function per (T, cache geometry).

    On CUDA nothing is autotuned. Inductor would time several versions of the kernel that writes
    the cache, each on copies of all that it writes to: two whole buffers of the cache. That kernel
    is elementwise, or, where keys are normalised, a reduction.
    """
    torch._dynamo.config.recompile_limit = (
        64  # static shapes: one entry per T and cache, few in all
    )
    device = model.norm.weight.device
    one_version = {"triton.autotune_pointwise": False, "deterministic": True}
    options = one_version if device.type == "cuda" else None
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False, options=options)
    model.compiled = True
    model.flex = flex_runs(device)


def flex_runs(device: torch.device) -> bool:
    """Whether compiled flex_attention has a kernel for the device (CPU: x86 with AVX2)."""
    # Not `in`: a CPU without it is said to have "NO AVX".
    return device.type == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX")


def compiler_runs(device: torch.device) -> bool:
    """Whether torch.compile works for the device on this machine: the CPU needs a C++ compiler."""
    compilers = [name for name in torch._inductor.config.cpp.cxx if name]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return False  # asked first, because a warm cache would hide it from the probe below
    try:
        torch.compile(torch.neg)(torch.ones(3, device=device))
    except Exception:  # whatever is missing or broken, the answer is to run eagerly
        return False
    return True


def hf_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a Hugging Face Llama checkpoint: its name, and where it lives in our model.

    The tensors are views of the parameters (q, k, v and gate, up are row slices of the fused
    ones), so a loader copies into them and an exporter copies from them.
    """
    c = model.config
    kv_width = c.n_kv_head * c.head_dim
    yield "model.embed_tokens.weight", model.tok_embeddings.weight.data
    for i, layer in enumerate(model.layers):
        prefix, attention = f"model.layers.{i}.", layer.attention
        for kind, p in attention.wqkv.named_parameters():  # weight, bias
            qkv = p.data.split((c.n_head * c.head_dim, kv_width, kv_width))
            for name, rows in zip("qkv", qkv, strict=True):
                yield f"{prefix}self_attn.{name}_proj.{kind}", rows
        for kind, p in attention.wo.named_parameters():
            yield f"{prefix}self_attn.o_proj.{kind}", p.data
        if c.qk_norm:
            yield f"{prefix}self_attn.q_norm.weight", attention.q_norm.weight.data
            yield f"{prefix}self_attn.k_norm.weight", attention.k_norm.weight.data
        gate, up = layer.feed_forward.w_gate_up.weight.data.chunk(2)
        yield f"{prefix}mlp.gate_proj.weight", gate
        yield f"{prefix}mlp.up_proj.weight", up
        yield f"{prefix}mlp.down_proj.weight", layer.feed_forward.w_down.weight.data
        yield f"{prefix}input_layernorm.weight", layer.attention_norm.weight.data
        yield f"{prefix}post_attention_layernorm.weight", layer.ffn_norm.weight.data
    yield "model.norm.weight", model.norm.weight.data
    if not c.tie_embeddings:
        yield "lm_head.weight", model.output.weight.data


def load_model(
    checkpoint_dir: Path,
    device: torch.device,
    dtype: torch.dtype,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,  # bytes of the model
) -> Transformer:
    """The model of a Hugging Face directory: `config.json` and safetensors, single or sharded.

    All headers and sizes are checked before anything is allocated; then one tensor at a time goes
    from the memory-mapped file to its place, so that there is never a second full copy.
    `random:NAME` instead of a directory makes random weights of a preset's geometry. Raises OSError
    for a file that cannot be read, and ValueError, naming file and tensor; NaN and infinity are no
    weights.
    """
    config, random = load_config(checkpoint_dir), is_random(checkpoint_dir)
    headers = {} if random else read_headers(weight_files(checkpoint_dir))
    what = f"the weights of {checkpoint_dir}"
    n_bytes = total_params(config) * dtype.itemsize
    check_fits(n_bytes, device, what, lambda share: "a smaller model or --dtype")
    if not random:
        check_headers(checkpoint_dir, headers, config)
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    total, done = sum(p.nbytes for p in model.parameters()), 0
    on_tensor(0, total)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight  # to_empty made them two
    model.rope_freq = rope_frequencies(config).to(device)
    if random:
        randomize(model)
        on_tensor(total, total)
    places = dict(hf_weights(model))
    for shard in sorted({header.shard for header in headers.values()}):
        with safe_open(shard, framework="pt") as file:
            for name in places.keys() & file.keys():
                place = places[name].copy_(file.get_tensor(name))
                if not all(end.isfinite() for end in place.aminmax()):  # NaN is both ends
                    raise ValueError(
                        f"{shard}: {name} has NaN or infinite numbers in "
                        f"{str(dtype).removeprefix('torch.')}; download it again, or take a wider "
                        f"--dtype"
                    )
                done += place.nbytes
                on_tensor(done, total)
    return model


def is_random(checkpoint_dir: Path) -> bool:
    return str(checkpoint_dir).startswith(RANDOM)


def randomize(model: Transformer) -> None:
    """Weights as at the start of a training: their values mean nothing, their reading costs."""
    for p in model.parameters():
        p.fill_(1.0) if p.dim() == 1 else p.normal_(0, 0.02)


def load_config(checkpoint_dir: Path) -> ModelConfig:
    """The dimensions in a directory's `config.json`, or of a preset behind `random:`.

    ValueError says what is not supported.
    """
    if is_random(checkpoint_dir):
        preset = known(MODELS, str(checkpoint_dir).removeprefix(RANDOM), "model")
        return ModelConfig(**asdict(preset))
    path = checkpoint_dir / "config.json"
    return ModelConfig.from_hf(read_json(path), str(path))


def read_json(path: Path) -> dict:
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
    return value


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """The safetensors files of a directory, all of which exist.

    As in transformers, model.safetensors goes before an index, which may be left over.
    """
    index = checkpoint_dir / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists() and not (checkpoint_dir / names[0]).is_file():
        weight_map = read_json(index).get("weight_map")
        named = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not named or not all(isinstance(name, str) for name in named):
            raise ValueError(f"{index} has no object weight_map that names files")
        names = sorted(set(named))
    for name in names:
        if not name or Path(name).name != name:
            raise ValueError(f"{index}: shard {name!r} is not a file name in this directory")
        if not (checkpoint_dir / name).is_file():
            pickles = sorted(path.name for path in checkpoint_dir.glob("*.bin"))
            hint = "the download is incomplete"
            if pickles and not index.exists():
                hint = f"{pickles[0]} is a pickle, which is never opened; convert it to safetensors"
            raise FileNotFoundError(f"{checkpoint_dir / name} does not exist; {hint}")
    return [checkpoint_dir / name for name in names]


class Header(NamedTuple):
    """What a safetensors file says about one of its tensors."""

    shard: Path
    shape: list[int]
    dtype: str  # as safetensors calls it


def read_headers(shards: list[Path]) -> dict[str, Header]:
    """The tensors of all shards by name, none of which is in two.

    safetensors refuses a header that does not fit the size of its file. Raises OSError or
    ValueError for a file that cannot be used.
    """
    found: dict[str, Header] = {}
    for shard in shards:
        shard.open("rb").close()  # safetensors calls every file that it cannot open missing
        try:
            os.fspath(shard).encode()
            with safe_open(shard, framework="pt") as file:
                headers = {name: file.get_slice(name) for name in file.keys()}
                headers = {
                    n: Header(shard, h.get_shape(), h.get_dtype()) for n, h in headers.items()
                }
        except UnicodeEncodeError:
            raise ValueError(
                f"{shard}: safetensors opens paths in UTF-8 only; rename the directory"
            ) from None
        except SafetensorError as e:
            raise ValueError(f"{shard} is corrupt or incomplete ({e}); download it again") from None
        for name in headers.keys() & found.keys():
            raise ValueError(f"{shard}: tensor {name} is in {found[name].shard.name} already")
        found |= headers
    return found


def check_headers(checkpoint_dir: Path, headers: dict[str, Header], config: ModelConfig) -> None:
    """ValueError unless the files hold exactly the tensors of these sizes."""
    there = {name.split(".")[2] for name in headers if name.startswith("model.layers.")}
    n_layer = min(config.n_layer, len(there) + 1)  # a typing error may ask for millions
    with torch.device("meta"):
        places = dict(hf_weights(Transformer(replace(config, n_layer=n_layer))))
    per_layer = sum(name.startswith("model.layers.0.") for name in places)
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()  # is the embedding
    unexpected, misshapen = [], []
    for name, (shard, shape, dtype) in headers.items():
        if name.endswith("rotary_emb.inv_freq") or name in ignored:  # follows from the config
            continue
        if name not in places:
            unexpected.append(name)
        elif shape != [*places[name].shape]:
            misshapen.append(f"{name} {shape}, should be {[*places[name].shape]}")
        elif dtype not in STORED_DTYPES:
            raise ValueError(
                f"{shard}: {name} has dtype {dtype}; supported: {', '.join(STORED_DTYPES)}"
            )
    missing = [name for name in places if name not in headers]
    n_missing = len(missing) + (config.n_layer - n_layer) * per_layer
    wrong = [("missing", missing, n_missing), ("unexpected", unexpected, len(unexpected)),
             ("misshapen", misshapen, len(misshapen))]  # fmt: skip
    if missing or unexpected or misshapen:
        lists = "; ".join(f"{kind}: {some(names, n)}" for kind, names, n in wrong if names)
        raise ValueError(f"{checkpoint_dir}: the tensors are not config.json's; {lists}")


def some(names: list[str], n: int) -> str:
    """The first few of n names."""
    more = n - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def eos_token_ids(checkpoint_dir: Path) -> tuple[int, ...]:
    """End-of-text tokens: `generation_config.json` if it names them, else `config.json`."""
    for name in ("generation_config.json", "config.json"):
        path = checkpoint_dir / name
        ids = read_json(path).get("eos_token_id") if path.exists() else None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int and abs(i) < 2**31 for i in ids):
                raise ValueError(
                    f"{path}: eos_token_id = {brief(ids)} is not a token id or a list of them"
                )
            return tuple(ids)
    return ()


def save_model(model: Transformer, checkpoint_dir: Path, n_shards: int = 1, **config) -> None:
    """Write a Llama as a Hugging Face directory; `config` replaces or adds `config.json` fields.

    The index is written last and files are replaced whole, so an interruption leaves no half one.
    A single file that shards replace is deleted then: it would go before them.
    """
    c = model.config
    if c.qk_norm or c.sliding_window or c.qkv_bias != c.o_bias:
        raise ValueError("save_model writes the Llama family only")
    weights = {name: w.cpu().contiguous() for name, w in hf_weights(model)}
    names = ["model.safetensors"]
    if n_shards > 1:
        names = [f"model-{i + 1:05}-of-{n_shards:05}.safetensors" for i in range(n_shards)]
    weight_map = {tensor: names[i % n_shards] for i, tensor in enumerate(weights)}
    for name in names:
        specs = {  # the low-level interface: safetensors.torch.save_file wants NumPy
            tensor: TensorSpec(
                dtype=str(w.dtype).removeprefix("torch."),
                shape=[*w.shape],
                data_ptr=w.data_ptr(),
                data_len=w.nbytes,
            )
            for tensor, w in weights.items()
            if weight_map[tensor] == name
        }
        part = checkpoint_dir / f"{name}.part"
        serialize_file(specs, part, metadata={"format": "pt"})
        part.chmod(0o644)
        part.replace(checkpoint_dir / name)
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": c.dim,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_seq_len,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.qkv_bias,
        "mlp_bias": False,
        "torch_dtype": str(model.norm.weight.dtype).removeprefix("torch."),
    }
    write_json(hf | config, checkpoint_dir / "config.json")
    if n_shards > 1:
        write_json({"weight_map": weight_map}, checkpoint_dir / "model.safetensors.index.json")
        (checkpoint_dir / "model.safetensors").unlink(missing_ok=True)


def write_json(value: dict, path: Path) -> None:
    """Write a JSON file, see `write_file`."""
    write_file((json.dumps(value, indent=2) + "\n").encode(), path)


def write_file(data: bytes, path: Path) -> None:
    """Write a file in one step: an interruption leaves the old one or the new one.

    A symbolic link stays one. To a device, a pipe or a file that is open already, the data are
    appended. OSError with the path if that is not possible.
    """
    target, part = resolved(path)
    try:
        if written_in_place(path):
            with path.open("ab") as file:
                file.write(data)
            return
        try:
            part.write_bytes(data)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    except OSError as e:
        raise OSError(f"cannot write {path}: {e.strerror}") from None


def check_writable(path: Path) -> None:
    """OSError if `write_file` cannot write there, as far as this can be told beforehand."""
    if path.exists() and not path.is_dir() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    if not written_in_place(path):
        path, part = resolved(path)
        try:
            part.write_bytes(bytes(4096))  # fails on a full disk too
        finally:
            part.unlink(missing_ok=True)
    elif not path.is_fifo():  # its reader would take the end of this for the end of all
        path.open("ab").close()


def written_in_place(path: Path) -> bool:
    """Whether there is something that must not be replaced by a file."""
    opened = re.match(r"/dev/(fd/|std)|/proc/[^/]+/fd/", str(path))
    return path.exists() and (opened is not None or not path.is_file())


def resolved(path: Path) -> tuple[Path, Path]:
    """The path behind symbolic links, and beside it the one that is written first."""
    path = Path(os.path.realpath(path))
    return path, path.with_name(path.name + ".part")
