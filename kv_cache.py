"""KV caches: where keys and values live, and which of them a query may see.

Two caches, one rule. `KVCache` keeps every token of the text. `SparseKVCache` keeps a few that a
*policy* selected, and the newest ones. Both are static buffers ``[B, Hkv, slots, D]``, one tensor
per layer for K and one for V, written in place. The rule that makes them safe to reuse:

    a query at text position q sees a slot  iff  the slot holds a token at some 0 <= p <= q

Nothing is ever erased. A rejected draft token stays in its slot; it is invisible, because its
position is larger than that of any query until the next token for that position overwrites it.
Rolling back is arithmetic on the lengths, and the lengths are kept by the engine, per row.

**Full.** The token at position p lives in slot p, so the rule is ``slot <= q``.

**Sparse.** A draft budget of K = n_selected + n_recent tokens, and slack::

    [ selected: n_selected slots | ring: n_recent newest tokens + gamma + 1 slack ]

    ring slot of position p  =  n_selected + p % ring_size,     ring_size = n_recent + gamma + 1

Which token a visible ring slot holds follows from the newest written position alone: the largest p
of its residue class that does not exceed it. A query at q sees the ring's tokens with
q - n_recent < p <= q, and a selected slot only if its token lies before that window, so no token is
seen twice, also when the prompt is shorter than the budget. The slack is why rejected drafts never
damage the window: what a round writes overwrites tokens that are ring_size older. If it rejects all
of its gamma drafts, the next query is at the first one's position, and the last one lies gamma - 1
positions further, so a slack of gamma - 1 keeps the window whole. A draft model needs at least 1,
because it is fed two tokens at once: the second is written before the first one's query looks. The
rest of gamma + 1 is a margin.

A **policy** is a pure function that looks at one layer of the full cache and returns the positions
to keep, ``[B, Hkv, n_selected]``; each layer and each KV head may keep others. `SparseKVCache.fill`
gathers them; reading is the same for all policies. `POLICIES` is the registry:

    streaming   the first tokens of the text, the attention sinks (StreamingLLM, arXiv 2309.17453)
    snapkv      what the newest tokens' queries attend to most (SnapKV, arXiv 2404.14469)

**Read one, write several.** A forward reads one cache and writes the K and V of its tokens into any
number of them. In self-speculation a verification reads the full cache and writes both, so the
draft's window always holds exact values. Drafting reads and writes the sparse cache alone.

A cache answers a forward twice: `slots(pos)` says where these tokens go, and `access(pos)`, for
each layer, which slots they see. Masks are over queries with the G = H / Hkv heads of a KV head
folded into the query length (index g * T + t), as `model.attend` wants them.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

NEVER = 2**62  # position of a selected slot that holds nothing: later than any query
Q_BLOCK = 128  # queries per flex_attention block
# Programs of the split-KV kernel that a multiprocessor of Hopper runs at once, by tile of queries:
# as many as its shared memory holds, and for 128 its registers (D = 128, 16 bits).
PROGRAMS_PER_SM = {16: 3, 32: 2, 64: 2, 128: 1}


class Access(NamedTuple):
    """How one layer's attention reads a cache."""

    mask: BlockMask | Tensor  # which slots each folded query sees
    kernel_options: dict | None = None  # for flex_attention


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Geometry of a cache: everything but its number of slots."""

    n_layer: int
    batch_size: int  # B
    n_kv_head: int  # Hkv
    head_dim: int  # D
    n_group: int  # G, query heads per KV head
    dtype: torch.dtype
    device: torch.device
    flex: bool  # mask the full cache for flex_attention; False: boolean masks
    window: int | None = None  # newest tokens that the model's attention sees; None: all
    programs_per_sm: int | None = None  # of the split-KV kernel; None: PROGRAMS_PER_SM
    allocated: bool = True  # False: caches without memory, to be asked how much they would take

    @classmethod
    def for_model(cls, model, batch_size: int) -> "CacheSpec":
        """The geometry that `model` (a model.Transformer) wants for `batch_size` rows."""
        c, weight = model.config, model.norm.weight
        heads = (c.n_kv_head, c.head_dim, c.n_group)
        device, window = weight.device, c.sliding_window
        return cls(c.n_layer, batch_size, *heads, weight.dtype, device, model.flex, window)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of K and V of one slot in all rows, heads and layers."""
        numbers = 2 * self.n_layer * self.batch_size * self.n_kv_head * self.head_dim
        return numbers * self.dtype.itemsize

    @property
    def prefill_chunk(self) -> int:
        """Prompt tokens per forward: enough to be bound by arithmetic."""
        return 2048 if self.device.type == "cuda" else 512

    @property
    def kv_block(self) -> int:
        """Slots per flex_attention block: Triton's tile, or the fastest on the CPU (LOG.md)."""
        return 128 if self.device.type == "cuda" else 256


def allocate(spec: CacheSpec, n_slots: int) -> list[Tensor]:
    """One zeroed [B, Hkv, n_slots, D] tensor per layer. Zero, so that unseen slots are finite."""
    shape = (spec.batch_size, spec.n_kv_head, n_slots, spec.head_dim)
    device = spec.device if spec.allocated else "meta"
    return [torch.zeros(shape, dtype=spec.dtype, device=device) for _ in range(spec.n_layer)]


def seen(p: Tensor, q: Tensor, window: int | None) -> Tensor:
    """Whether the model's attention at position q sees the token at position p."""
    return p <= q if window is None else (p <= q) & (p > q - window)


def fold_mask(visible: Tensor, n_group: int) -> Tensor:  # [..., T, S] -> [..., G * T, S]
    """Repeat a boolean mask for the query heads folded into the query length."""
    *lead, T, S = visible.shape
    return visible.unsqueeze(-3).expand(*lead, n_group, T, S).flatten(-3, -2)


def query_tile(n_query: int) -> int:
    """Folded queries that the split-KV kernel computes for so many: a power of two, at least 16."""
    return max(1 << (n_query - 1).bit_length(), 16)


class KVCache:
    """The full cache: position p in slot p."""

    def __init__(
        self,
        spec: CacheSpec,
        k: list[Tensor],
        v: list[Tensor],
        finished: Tensor | None = None,  # [B] bool, rows whose results nobody needs
    ) -> None:
        self.spec, self.finished = spec, finished
        self.k, self.v = k, v  # per layer [B, Hkv, S, D]

    @classmethod
    def empty(cls, spec: CacheSpec, n_slots: int, finished: Tensor | None = None) -> "KVCache":
        """Room for n_slots tokens per row, rounded up to whole flex_attention blocks."""
        capacity = -(-n_slots // spec.kv_block) * spec.kv_block
        return cls(spec, allocate(spec, capacity), allocate(spec, capacity), finished)

    @property
    def capacity(self) -> int:
        return self.k[0].shape[2]

    @property
    def n_bytes(self) -> int:
        return self.capacity * self.spec.bytes_per_slot

    def row(self, b: int) -> "KVCache":
        """Row b alone, a view that shares its memory: prompts are prefilled row by row."""
        spec = replace(self.spec, batch_size=1)
        return KVCache(spec, [k[b : b + 1] for k in self.k], [v[b : b + 1] for v in self.v])

    def slots(self, pos: Tensor) -> Tensor:  # [B, T] -> [B, T]
        return pos

    def access(self, pos: Tensor) -> list[Access]:  # [B, T], consecutive within a row
        """How queries at these positions read; all layers alike."""
        if self.spec.flex:
            access = Access(self.block_mask(pos), self.kernel_options(*pos.shape))
        else:
            access = Access(self.dense_mask(pos))
        return [access] * self.spec.n_layer

    def kernel_options(self, B: int, T: int) -> dict | None:
        """Settings of the kernels of flex_attention on CUDA; None where its own are good.

        A tile of queries that registers cannot hold is spilled to memory, hundreds of times per
        tile of K. So warps grow with the tile, and float32, which multiplies without tensor
        cores, has small tiles (`scripts/check_cuda_offline.py` counts the spills).

        Fewer than 128 folded queries take the split-KV kernel. By itself it has no pipeline on
        Hopper, and too few programs for ragged rows. Here it has as many as run at once.
        """
        spec, n_query = self.spec, self.spec.n_group * T
        if spec.device.type != "cuda":
            return None
        tile, options = query_tile(n_query), {}
        if spec.dtype == torch.float32:
            tile = min(tile, 32)
            options = {"BLOCK_M": tile, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
        if n_query >= Q_BLOCK:
            return options or None
        n_sm = torch.cuda.get_device_properties(spec.device).multi_processor_count
        n_pieces = B * spec.n_kv_head * -(-n_query // tile)
        split = max((spec.programs_per_sm or PROGRAMS_PER_SM[tile]) * n_sm // n_pieces, 1)
        decoding = {"SPLIT_KV": split, "BLOCKS_ARE_CONTIGUOUS": True}
        return {"num_warps": max(tile // 16, 2), "num_stages": 3} | decoding | options

    def dense_mask(self, pos: Tensor) -> Tensor:
        """[B, 1, G * T, S] bool: slot <= q, and within the model's window if it has one."""
        slot, q = torch.arange(self.capacity, device=pos.device), pos[:, None, :, None]
        return fold_mask(seen(slot, q, self.spec.window), self.spec.n_group)

    def block_mask(self, pos: Tensor) -> BlockMask:
        """The same rule for flex_attention: which blocks to visit, and the rule inside them.

        A model with a sliding window visits only the blocks that it touches.

        Only partial blocks are listed (`kv_num_blocks`): on CUDA the split-KV kernel then divides
        each row's own blocks among its programs, not the static capacity. A finished row visits no
        block and gets zeros: the last rounds of a batch cost what its last rows cost.
        """
        B, T = pos.shape
        size, n_query, window = self.spec.kv_block, self.spec.n_group * T, self.spec.window
        start = pos[:, 0].clone(memory_format=torch.contiguous_format)  # stride 1, also at B = 1
        block = torch.arange(-(-n_query // Q_BLOCK), device=pos.device)
        if T % Q_BLOCK == 0:  # a block of queries lies within one head: it sees up to its last one
            first = start[:, None] + block * Q_BLOCK % T
            last = first + Q_BLOCK - 1
        else:
            first = start[:, None].expand(B, len(block))
            last = first + T - 1
        first = torch.zeros_like(first) if window is None else (first - window + 1).clamp_min(0)
        n_blocks = last // size - first // size + 1
        if self.finished is not None:
            n_blocks = n_blocks.masked_fill(self.finished[:, None], 0)
        n_blocks = n_blocks.to(torch.int32)[:, None]
        most = self.capacity // size
        index = torch.arange(most, device=pos.device) + first[:, None, :, None] // size
        index = index.clamp_max(most - 1).to(torch.int32)  # [B, 1, query blocks, KV blocks]

        def visible(b: Tensor, h: Tensor, q: Tensor, slot: Tensor) -> Tensor:
            return seen(slot, start[b] + q % T, window)

        return BlockMask.from_kv_blocks(
            n_blocks,
            index,
            BLOCK_SIZE=(Q_BLOCK, size),
            mask_mod=visible,
            seq_lengths=(n_query, self.capacity),
            compute_q_blocks=False,
        )


class SparseKVCache:
    """The draft's cache: selected tokens and a ring of the newest; see the module docstring."""

    def __init__(self, spec: CacheSpec, n_selected: int, n_recent: int, gamma: int) -> None:
        self.spec = spec
        self.n_selected, self.n_recent = n_selected, n_recent
        self.ring_size = n_recent + gamma + 1
        n_slots = self.n_slots(n_selected, n_recent, gamma)
        self.k, self.v = allocate(spec, n_slots), allocate(spec, n_slots)
        shape = (spec.n_layer, spec.batch_size, spec.n_kv_head, n_selected)
        self.selected_pos = torch.full(shape, NEVER, dtype=torch.int64, device=self.k[0].device)

    @staticmethod
    def n_slots(n_selected: int, n_recent: int, gamma: int) -> int:
        return n_selected + n_recent + gamma + 1

    @property
    def n_bytes(self) -> int:
        return (self.n_selected + self.ring_size) * self.spec.bytes_per_slot

    def slots(self, pos: Tensor) -> Tensor:  # [B, T] -> [B, T]
        return self.n_selected + pos % self.ring_size

    def access(self, pos: Tensor) -> list[Access]:  # [B, T], consecutive within a row
        masks = fold_mask(self.visible(pos), self.spec.n_group)
        return [Access(mask) for mask in masks]

    def ring_pos(self, newest: Tensor) -> Tensor:  # [B], newest written position -> [B, ring_size]
        """Position held by each ring slot; negative where nothing was written yet."""
        slot = torch.arange(self.ring_size, device=newest.device)
        return newest[:, None] - (newest[:, None] - slot) % self.ring_size

    def visible(self, pos: Tensor) -> Tensor:
        """[L, B, Hkv, T, slots] bool, by the rule of the module docstring."""
        q, window = pos[:, None, :, None], self.spec.window  # [B, 1, T, 1]
        p = self.selected_pos[..., None, :]
        selected = (p <= q - self.n_recent) & seen(p, q, window)
        p = self.ring_pos(pos[:, -1])[:, None, None]  # [B, 1, 1, ring_size]
        ring = (p > q - self.n_recent) & (p >= 0) & seen(p, q, window)
        return torch.cat((selected, ring.expand(*selected.shape[:-1], -1)), dim=-1)

    def fill(self, i: int, full: KVCache, selected_pos: Tensor, n_cached: Tensor) -> None:
        """Load selection and window of layer i from the full cache, in place.

        selected_pos [B, Hkv, n_selected] are positions, in a policy's answer; those that the full
        cache does not hold yet (>= n_cached [B]) stay invisible for good.
        """
        unknown = selected_pos >= n_cached[:, None, None]
        self.selected_pos[i] = selected_pos.masked_fill(unknown, NEVER)
        ring = self.ring_pos(n_cached - 1)[:, None].expand(-1, selected_pos.shape[1], -1)
        index = torch.cat((selected_pos, ring), dim=-1).clamp(0, full.capacity - 1)
        index = index[..., None].expand(-1, -1, -1, self.spec.head_dim)
        torch.gather(full.k[i], 2, index, out=self.k[i])
        torch.gather(full.v[i], 2, index, out=self.v[i])
