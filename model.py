"""The target model: a Llama-family transformer that is handed its KV cache.

There is one forward for everything this program does::

    model(tokens [B, T], pos [B, T], read, write) -> logits [B, T, V]

Prefill, plain decoding, drafting and verification differ only in T and in the caches they are
handed, so a lossless speculative decoder needs no second model code path that could disagree
with the first. One cache is read, any number of them are written (`write`; by default the one that
is read). A cache (see `kv_cache.py`) answers two questions once per forward: into which slots do
these tokens go, `cache.slots(pos)`, and which slots may each of them see, `cache.access(pos)`?

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
block. Without a cache it is plain causal attention over the given tokens: training, and tests.

Weights are read from a Hugging Face directory as it is. Positions are rotated in float32 with the
half-split convention of those checkpoints. What the families differ in are a few fields of
`ModelConfig`; a new family is a line in `ARCHITECTURES`. What a config asks for and we do not do is
refused by field and value before a weight is read, and of the weights only safetensors are opened:
a checkpoint is data from strangers, and a pickle is a program.
"""

import math
from collections.abc import Iterator
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from config import ModelConfig
from device import flex_runs
from kv_cache import Access, KVCache, SparseKVCache, seen

SHORT = 64  # tokens per forward, at least, where few of a text are new

Caches = tuple[KVCache | SparseKVCache, ...]
Read = tuple[Tensor, Tensor, Access]  # K and V of a layer [B, Hkv, S, D], and who sees what
Write = tuple[Tensor, Tensor, Tensor]  # K and V of a layer [B, Hkv, S, D], and slots [B, T]


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
    access: Access | None,  # its mask is over folded queries; None: causal over k and v
    window: int | None = None,  # if causal: newest tokens that a query sees; None: all
) -> Tensor:  # [B, T, H * D]
    """Attention of every query head to its KV head, with G folded into the query length."""
    B, T, H, D = q.shape
    Hkv = k.shape[1]
    G = H // Hkv
    if access is None:
        p = torch.arange(T, device=q.device)
        mask = None if window is None else seen(p, p[:, None], window)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=G > 1
        )
        return y.transpose(1, 2).reshape(B, T, H * D)
    q = q.view(B, T, Hkv, G, D).permute(0, 2, 3, 1, 4).reshape(B, Hkv, G * T, D)
    q = q * D**-0.5  # scaled here, not in the kernel: flex on the CPU wants a computed query
    if isinstance(access.mask, BlockMask):
        y = flex_attention(
            q, k, v, block_mask=access.mask, scale=1.0, kernel_options=access.kernel_options
        )
    elif q.dtype == torch.float32:  # for a draft's few slots faster than the next line (LOG.md)
        y = (q @ k.transpose(-1, -2)).masked_fill(~access.mask, -torch.inf).softmax(dim=-1) @ v
    else:  # keeps the scores in float32
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=access.mask, scale=1.0)
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
        read: Read | None,  # None: causal attention over x alone
        write: list[Write],
    ) -> Tensor:  # [B, T, dim]
        """Write K and V of these tokens in place, then attend to what is read."""
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
        if read is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            return self.wo(attend(q, k, v, None, c.sliding_window))
        rows = torch.arange(B, device=x.device)[:, None]
        for k_buffer, v_buffer, slot in write:
            k_buffer[rows, :, slot] = k  # this form stays in place under torch.compile
            v_buffer[rows, :, slot] = v
        return self.wo(attend(q, *read))

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
        read: Read | None,
        write: list[Write],
    ) -> Tensor:  # [B, T, dim]
        x = x + self.attention(self.attention_norm(x), rope, read, write)
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
        read: KVCache | SparseKVCache | None = None,  # None: causal attention over these alone
        write: Caches | None = None,  # where their K and V go; None: where they read
    ) -> Tensor:  # [B, T, V]
        """Logits of the token after each given one; writes the tokens' K and V, in place."""
        return self.logits(self.hidden(tokens, pos, read, write))

    def hidden(
        self,
        tokens: Tensor,  # [B, T]
        pos: Tensor,  # [B, T]
        read: KVCache | SparseKVCache | None = None,
        write: Caches | None = None,
    ) -> Tensor:  # [B, T, dim]
        """The forward without its output layer, [B, T, dim]: what a prefill chunk needs."""
        x, rope = self.tok_embeddings(tokens), self.rope(pos)
        for layer, memory in zip(self.layers, self.memory(pos, read, write), strict=False):
            x = layer(x, rope, *memory)
        return x

    @staticmethod
    def memory(
        pos: Tensor,  # [B, T]
        read: KVCache | SparseKVCache | None,
        write: Caches | None,
    ) -> Iterator[tuple[Read | None, list[Write]]]:
        """What each layer reads, and where it writes the K and V of tokens at these positions."""
        if read is None:
            yield from repeat((None, []))
            return
        write = (read,) if write is None else write
        slots = [cache.slots(pos) for cache in write]
        for i, access in enumerate(read.access(pos)):
            written = [(c.k[i], c.v[i], slot) for c, slot in zip(write, slots, strict=True)]
            yield (read.k[i], read.v[i], access), written

    def rope(self, pos: Tensor) -> tuple[Tensor, Tensor]:  # [B, T] -> cos, sin [B, T, 1, D/2]
        angle = (pos[..., None].float() * self.rope_freq)[:, :, None, :]
        scaling = self.config.rope_scaling
        factor = scaling.attention_factor if scaling else 1.0
        return angle.cos() * factor, angle.sin() * factor

    def queries(
        self,
        tokens: Tensor,  # [B, T]
        pos: Tensor,  # [B, T]
        read: KVCache,  # holds K and V of these tokens, and is not written
    ) -> Iterator[Tensor]:
        """Layer by layer the rotated queries [B, T, H, D] of the tokens."""
        x, rope = self.tok_embeddings(tokens), self.rope(pos)
        for layer, memory in zip(self.layers, self.memory(pos, read, ()), strict=True):
            yield layer.attention.queries(layer.attention_norm(x), rope)
            x = layer(x, rope, *memory)

    def prefill(
        self,
        tokens: Tensor,  # [1, S] int64
        length: int,  # how many of them to read
        chunk: int,  # tokens per forward
        cache: KVCache,
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
