"""One transformer for all families, which is handed its KV cache.

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
  On the CPU an operator of our own reads K and V at the speed of memory (`cpu_attention.py`).
  Where neither can run (no compiler, no AVX2), and for the few slots of a draft cache,
  the cache hands out a boolean mask instead, and attention is two matrix products and a softmax.

Blocks are compiled one by one (`compile_blocks`): all layers share one compiled function, so a
32-layer model compiles as fast as a 2-layer one, and no Python runs between the kernels of a
block. Without a cache it is plain causal attention over the given tokens: training, and tests.

The families differ in traits, which are fields of `ModelConfig`: an activation, norms and their
places, caps, scales, windows. Layers differ only in what they see and in their rotation, and both
are handed to them. Positions are rotated in float32, in the half-split convention of Hugging Face.
"""

import math
from collections.abc import Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import cpu_attention
from config import ModelConfig
from cpu_attention import FEW
from exact import attend_by_position
from kernels import flex_runs, serve_any_length
from kv_cache import Access, KVCache, Span, SparseKVCache, Write, fold_mask, once_each, seen

SHORT = 64  # tokens per forward, at least, where few of a text are new
TAIL = 0.6  # of a chunk: it is faster than short forwards for more tokens than this (LOG.md)
Caches = tuple[KVCache | SparseKVCache, ...]
Rope = tuple[Tensor, Tensor]  # cos and sin, each [B, T, 1, D/2] float32
# K and V of a layer [B, Hkv, S, D], or None for those of the tokens themselves; and who sees what.
Read = tuple[Tensor | None, Tensor | None, Access]


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each rotated pair (RoFormer, arXiv 2104.09864), [2, D/2] float32.

    Row 1 is of layers with a window: where they have a base of their own, it is not stretched.
    """
    exponent = -torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    everywhere = stretched(config.rope_theta**exponent, config)
    theta = config.local_rope_theta
    return torch.stack((everywhere, everywhere if theta is None else theta**exponent))


def stretched(freq: Tensor, config: ModelConfig) -> Tensor:  # [D // 2] -> [D // 2]
    """Frequencies for a context longer than the one that was trained on.

    Slow pairs turn `factor` times more slowly, fast pairs are left alone. `linear` slows all of
    them. `llama3` and `yarn` (arXiv 2309.00071) blend between the two: llama3 by how often a pair
    turns within the original context, yarn by the pair's index.
    """
    s, D = config.rope_scaling, config.head_dim
    if s is None:
        return freq
    keep = torch.zeros_like(freq)  # 1: unchanged; 0: divided by `factor`
    if s.kind == "llama3":
        turns = s.original_max_seq_len * freq / (2 * math.pi)
        keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    elif s.kind == "yarn":
        first, last = (
            D * math.log(s.original_max_seq_len / (2 * math.pi * turns), config.rope_theta) / 2
            for turns in (s.beta_fast, s.beta_slow)
        )  # the pairs that turn so often
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


def capped(scores: Tensor, cap: float | None) -> Tensor:  # [..., S] -> [..., S]
    """cap * tanh(scores / cap), never beyond the cap (Gemma 2, arXiv 2408.00118); None: as is."""
    return scores if cap is None else torch.tanh(scores / cap) * cap


def attend(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,  # [B, Hkv, S, D]
    access: Access,  # its mask is over folded queries; None: causal over k and v
    scale: float,  # of the products of queries and keys
    cap: float | None = None,  # see `capped`
) -> Tensor:  # [B, T, H * D]
    """Attention of every query head to its KV head, with G folded into the query length."""
    B, T, H, D = q.shape
    Hkv, mask = k.shape[1], access.mask
    G = H // Hkv
    if mask is None:
        q = q.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=G > 1)
        return y.transpose(1, 2).reshape(B, T, H * D)
    q = q.view(B, T, Hkv, G, D).permute(0, 2, 3, 1, 4).reshape(B, Hkv, G * T, D)
    q = q * scale  # here, not in the kernel: flex on the CPU wants a computed query
    if isinstance(mask, Span):
        q5 = q.view(B, Hkv, G, T, D).float()
        y = cpu_attention.attend(q5, k, v, *mask[:2], cap or 0.0, mask.mask).to(q.dtype)
        return y.permute(0, 3, 1, 2, 4).reshape(B, T, H * D)
    if not k.is_cuda or not isinstance(mask, BlockMask):  # flex on CUDA converts tiles as it reads
        k, v = k.to(q.dtype), v.to(q.dtype)
    if isinstance(mask, BlockMask):

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, slot: Tensor) -> Tensor:
            return capped(score, cap)

        how = {"block_mask": mask, "scale": 1.0, "kernel_options": access.kernel_options}
        how |= {"score_mod": None if cap is None else score_mod}
        n = access.n_pieces
        y = flex_attention(q, k, v, **how) if n == 1 else attend_by_position(q, k, v, n, **how)
    elif q.dtype == torch.float32 or cap is not None:  # LOG.md: faster than the next for few slots
        scores = capped((q @ k.transpose(-1, -2)).float(), cap)
        y = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1).to(v.dtype) @ v
    else:  # keeps the scores in float32
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return y.view(B, Hkv, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)


def short_chunk(chunk: int) -> int:
    """Tokens per forward where few of a text are new."""
    return min(max(chunk // 8, SHORT), chunk)


class Attention(nn.Module):
    """Grouped-query attention over the cache that is read."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.n_head * config.head_dim
        kv_width = config.n_kv_head * config.head_dim
        self.wqkv = nn.Linear(config.dim, width + 2 * kv_width, bias=config.qkv_bias)
        self.wo = nn.Linear(width, config.dim, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config)
            self.k_norm = RMSNorm(config.head_dim, config)

    def forward(
        self,
        x: Tensor,  # [B, T, dim]
        rope: Rope,
        read: Read,
        write: list[Write],
    ) -> Tensor:  # [B, T, dim]
        """Write K and V of these tokens in place, then attend to what is read."""
        B, T, _ = x.shape
        c = self.config
        heads = self.wqkv(x).view(B, T, -1, c.head_dim)
        q, k, v = heads.split((c.n_head, c.n_kv_head, c.n_kv_head), dim=2)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        rows = torch.arange(B, device=x.device)[:, None]
        for to in write:
            to.k[rows, :, to.slot] = k.to(to.k.dtype)  # stays in place under torch.compile
            to.v[rows, :, to.slot] = v.to(to.v.dtype)
            if to.q is not None:
                to.q[rows, :, to.q_slot] = (q * c.attention_scale).to(to.q.dtype)
        k_read, v_read, access = read
        if k_read is None:
            k_read, v_read = k.transpose(1, 2), v.transpose(1, 2)
        return self.wo(attend(q, k_read, v_read, access, c.attention_scale, c.attention_cap))


class FeedForward(nn.Module):
    """Gated: down(activation(gate x) * up x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.w_gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.w_down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        gate, up = self.w_gate_up(x).chunk(2, dim=-1)
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.w_down(gate * up)


class RMSNorm(nn.Module):
    """x / rms(x) * w, or with `norm_plus_one` x / rms(x) * (1 + w) in float32."""

    def __init__(self, dim: int, config: ModelConfig) -> None:
        super().__init__()
        self.eps, self.plus_one = config.norm_eps, config.norm_plus_one
        self.weight = nn.Parameter(torch.full((dim,), 0.0 if self.plus_one else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + self.eps)
        if self.plus_one:
            return (y * (1 + self.weight.float())).to(x.dtype)
        return y.to(x.dtype) * self.weight


class Block(nn.Module):
    """One transformer layer, the unit of compilation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config)
        self.feed_forward = FeedForward(config)
        self.post_norms = config.post_norms
        if self.post_norms:
            self.attention_post_norm = RMSNorm(config.dim, config)
            self.ffn_post_norm = RMSNorm(config.dim, config)

    def forward(self, x: Tensor, rope: Rope, read: Read, write: list[Write]) -> Tensor:
        """[B, T, dim] -> [B, T, dim]; K and V are written in place."""
        y = self.attention(self.attention_norm(x), rope, read, write)
        x = x + (self.attention_post_norm(y) if self.post_norms else y)
        y = self.feed_forward(self.ffn_norm(x))
        return x + (self.ffn_post_norm(y) if self.post_norms else y)


@torch.compiler.nested_compile_region
def one_of_many(layer: Block, *args) -> Tensor:  # its arguments -> [B, T, dim]
    """A layer; where all of them are compiled into one function, they are compiled as one."""
    return layer(*args)


class Transformer(nn.Module):
    """All layers; see the module docstring."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.compiled = False  # set by compile_blocks
        self.kv_dtype: torch.dtype | None = None  # of caches; None: that of the weights
        self.exact = 0  # drafts that every verification is padded to, see `exact.py`; 0: none
        self.register_buffer("rope_freq", rope_frequencies(config), persistent=False)

    def weight_bytes(self, n_tokens: int) -> int:
        """Bytes of weights that a forward of so many tokens must read.

        An embedding table of its own gives a row per token; tied to the output layer it is read
        whole, and counts once. Of several ranks each has an output layer of its own.
        """
        table, others = self.tok_embeddings.weight, (p for p in self.parameters())
        kept = (b for name, b in self.named_buffers() if name != "rope_freq")  # LowLinear's
        total = sum(t.nbytes for t in (*others, *kept))
        if self.config.tie_embeddings and self.config.n_ranks == 1:
            return total
        return total - table.nbytes + n_tokens * table[0].nbytes

    @property
    def flex(self) -> bool:
        """Whether attention to a full cache goes through flex_attention."""
        return self.compiled and flex_runs(self.norm.weight.device)

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
        x, ropes = self.embed(tokens), self.ropes(pos)
        memory = self.memory(pos, read, write)
        if isinstance(read, KVCache) and read.spec.operator and 1 < pos.shape[1] < FEW:
            writes = (to for _, part in memory for to in part)
            slots = (slot for to in writes for slot in (to.slot, to.q_slot) if slot is not None)
            serve_any_length((x, *chain(*ropes), *slots))
        for layer, rope, part in zip(self.layers, ropes, memory, strict=True):
            x = one_of_many(layer, x, rope, *part)
        return x

    def embed(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, dim]
        """What enters the first layer. The scale is rounded as the weights are."""
        x, scale = self.tok_embeddings(tokens), self.config.embedding_scale
        return x if scale == 1 else x * torch.tensor(scale, dtype=x.dtype)

    def memory(
        self,
        pos: Tensor,  # [B, T]
        read: KVCache | SparseKVCache | None,
        write: Caches | None,
    ) -> list[tuple[Read, list[Write]]]:
        """Per layer, what it reads, and where it writes K and V of tokens at these positions."""
        if read is None:
            accesses = once_each(lambda w: self.causal(pos, w), self.config.windows)
            return [((None, None, access), []) for access in accesses]
        write = (read,) if write is None else write
        writes = [cache.writes(pos) for cache in write]
        reads = zip(read.k, read.v, read.access(pos), strict=True)
        return [(layer, [w[i] for w in writes]) for i, layer in enumerate(reads)]

    def causal(self, pos: Tensor, window: int | None) -> Access:
        """How [B, T] tokens see each other without a cache; a mask only where it takes one."""
        if window is None and self.config.attention_cap is None:
            return Access(None)
        p = torch.arange(pos.shape[1], device=pos.device)
        return Access(fold_mask(seen(p, p[:, None], window), self.config.n_group))

    def ropes(self, pos: Tensor) -> list[Rope]:  # [B, T] -> per layer
        """The rotation of these positions, cos and sin."""
        c = self.config

        def rope(local: bool) -> Rope:
            angle = (pos[..., None].float() * self.rope_freq[int(local)])[:, :, None, :]
            factor = c.rope_scaling.attention_factor if c.rope_scaling and not local else 1.0
            return angle.cos() * factor, angle.sin() * factor

        own = c.local_rope_theta is not None
        return once_each(rope, [own and window is not None for window in c.windows])

    def read(
        self,
        tokens: Tensor,  # [1, S] int64
        length: int,  # how many of them to read
        chunk: int,  # tokens per forward
        cache: KVCache,
        n_cached: int = 0,  # fewer than `length`, the first ones, which the cache holds already
        tail: bool = False,  # short forwards at the end, where they are faster than a chunk
    ) -> Iterator[tuple[int, Tensor]]:
        """Read a text into the cache. After each forward: tokens that are not read again, and the
        hidden state [dim] of the last one that was read.

        Two static shapes: chunks, and with `tail`, or where something was cached, short ones for
        what is less than a chunk. The last forward is moved back to end with the text: what it
        computes twice, it computes the same. A text shorter than that is followed by tokens that do
        not exist yet, in slots that nobody sees before they are overwritten. Where the cache has
        lost what the first new tokens see, all of the text is read again. Waits for the device to
        know it.
        """
        short = short_chunk(chunk)
        if n_cached and not cache.holds(n_cached, short - 1):
            n_cached = 0
        few = chunk if n_cached else TAIL * chunk if tail else 0  # up to which short ones are used
        parts, end = [], n_cached
        while end < length:
            T = chunk if length - end >= chunk or length - end > few else short
            parts.append((max(min(end, length - T), 0), T))
            end = sum(parts[-1])
        for i, (at, T) in enumerate(parts, start=1):
            pos = torch.arange(at, at + T, device=tokens.device)[None]
            x = self.hidden(tokens[:, at : at + T], pos, cache)
            yield parts[i][0] if i < len(parts) else length, x[0, min(T, length - at) - 1]

    def prefill(
        self,
        tokens: Tensor,  # [1, S] int64
        length: int,
        chunk: int,
        cache: KVCache,
        n_cached: int = 0,
    ) -> Tensor:
        """The same at once; the hidden state [dim] of the text's last token."""
        *_, (_, x) = self.read(tokens, length, chunk, cache, n_cached)
        return x

    def logits(self, x: Tensor) -> Tensor:  # [..., dim] -> [..., V]
        """The output layer: of the token that follows each hidden state."""
        return capped(self.output(self.norm(x)), self.config.logit_cap)
