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
damage the window: a round writes gamma + 1 positions, the newest decided token's and those of gamma
drafts, and the tokens they overwrite are ring_size older, outside every window still to come.

A **policy** is a pure function that returns the positions to keep, ``[B, Hkv, n_selected]``.
`SparseKVCache.fill` gathers them from the full cache; reading is the same for all policies.
StreamingLLM (arXiv 2309.17453) is the policy that keeps the first tokens, the attention sinks.

**Self-speculation** joins one of each (`SelfSpeculationCache`): verification attends to the full
cache and writes its K and V into both, so the draft's window always holds exact values. Drafting
uses the sparse cache alone.

A cache is handed to the model's forward and answers with a `Step`: the slots to write, and the
mask. Masks are over queries with the G = H / Hkv heads of a KV head folded into the query length
(index g * T + t), as `model.attend` wants them.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

NEVER = 2**62  # position of a selected slot that holds nothing: later than any query
Q_BLOCK = 128  # queries per flex_attention block


class Step(NamedTuple):
    """What one forward needs to know of a cache; the same for all layers."""

    slots: tuple[Tensor, ...]  # per buffer: [B, T] int64, where these tokens are written
    mask: BlockMask | Tensor  # what each folded query sees of the first buffer
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

    @classmethod
    def for_model(cls, model, batch_size: int) -> "CacheSpec":
        """The geometry that `model` (a model.Transformer) wants for `batch_size` rows."""
        c, weight = model.config, model.norm.weight
        heads = (c.n_kv_head, c.head_dim, c.n_group)
        return cls(c.n_layer, batch_size, *heads, weight.dtype, weight.device, model.flex)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of K and V of one slot in all rows, heads and layers."""
        numbers = 2 * self.n_layer * self.batch_size * self.n_kv_head * self.head_dim
        return numbers * self.dtype.itemsize

    @property
    def kv_block(self) -> int:
        """Slots per flex_attention block: Triton's tile, or the fastest on the CPU (LOG.md)."""
        return 128 if self.device.type == "cuda" else 256


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where the system does not tell."""
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def check_fits(n_bytes: int, device: torch.device) -> None:
    """ValueError with both numbers if the device has not that much memory free."""
    free = free_memory(device)
    if free is not None and n_bytes > free:
        raise ValueError(
            f"the KV caches need {n_bytes / 2**30:.1f} GiB, but {device} has "
            f"{free / 2**30:.1f} GiB free; use fewer rows (--batch_size) or shorter prompts"
        )


def allocate(spec: CacheSpec, n_slots: int) -> list[Tensor]:
    """One zeroed [B, Hkv, n_slots, D] tensor per layer. Zero, so that unseen slots are finite."""
    shape = (spec.batch_size, spec.n_kv_head, n_slots, spec.head_dim)
    return [torch.zeros(shape, dtype=spec.dtype, device=spec.device) for _ in range(spec.n_layer)]


def fold_mask(visible: Tensor, n_group: int) -> Tensor:  # [B, h, T, S] -> [B, h, G * T, S]
    """Repeat a boolean mask for the query heads folded into the query length."""
    B, h, T, S = visible.shape
    return visible[:, :, None].expand(B, h, n_group, T, S).reshape(B, h, n_group * T, S)


class KVCache:
    """The full cache: position p in slot p."""

    def __init__(self, spec: CacheSpec, k: list[Tensor], v: list[Tensor]) -> None:
        self.spec = spec
        self.k, self.v = k, v  # per layer [B, Hkv, S, D]
        self.finished: Tensor | None = None  # [B] bool: rows whose results nobody needs

    @classmethod
    def empty(cls, spec: CacheSpec, n_slots: int) -> "KVCache":
        """Room for n_slots tokens per row, rounded up to whole flex_attention blocks."""
        capacity = cls.round_up(spec, n_slots)
        return cls(spec, allocate(spec, capacity), allocate(spec, capacity))

    @staticmethod
    def round_up(spec: CacheSpec, n_slots: int) -> int:
        return -(-n_slots // spec.kv_block) * spec.kv_block

    @property
    def capacity(self) -> int:
        return self.k[0].shape[2]

    def row(self, b: int) -> "KVCache":
        """Row b alone, a view that shares its memory: prompts are prefilled row by row."""
        spec = replace(self.spec, batch_size=1)
        return KVCache(spec, [k[b : b + 1] for k in self.k], [v[b : b + 1] for v in self.v])

    def layer(self, i: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """The (k, v) buffers of layer i; the first pair is the one attended to."""
        return ((self.k[i], self.v[i]),)

    def step(self, pos: Tensor) -> Step:  # [B, T], consecutive within a row
        if not self.spec.flex:
            return Step((pos,), self.dense_mask(pos))
        return Step((pos,), self.block_mask(pos), self.kernel_options(*pos.shape))

    def kernel_options(self, B: int, T: int) -> dict | None:
        """Settings of the split-KV kernel that CUDA uses for fewer than 128 folded queries.

        Its default for Hopper has one pipeline stage, and splits a row's blocks among too few
        programs for ragged rows; about four programs per multiprocessor keep all of them busy.
        """
        if self.spec.device.type != "cuda" or self.spec.n_group * T >= Q_BLOCK:
            return None
        n_sm = torch.cuda.get_device_properties(self.spec.device).multi_processor_count
        options = {
            "SPLIT_KV": max(4 * n_sm // (B * self.spec.n_kv_head), 1),
            "BLOCKS_ARE_CONTIGUOUS": True,
        }
        if self.spec.dtype != torch.float32:  # in float32 three stages outgrow shared memory
            options["num_stages"] = 3
        return options

    def dense_mask(self, pos: Tensor) -> Tensor:
        """[B, 1, G * T, S] bool: slot <= q."""
        slot = torch.arange(self.capacity, device=pos.device)
        return fold_mask(slot <= pos[:, None, :, None], self.spec.n_group)

    def block_mask(self, pos: Tensor) -> BlockMask:
        """The same rule for flex_attention: which blocks to visit, and the rule inside them.

        Only partial blocks are listed (`kv_num_blocks`): on CUDA the split-KV kernel then divides
        each row's own blocks among its programs, not the static capacity. A finished row visits no
        block and gets zeros: the last rounds of a batch cost what its last rows cost.
        """
        B, T = pos.shape
        size, n_query = self.spec.kv_block, self.spec.n_group * T
        start = pos[:, 0].clone(memory_format=torch.contiguous_format)  # stride 1, also at B = 1
        block = torch.arange(-(-n_query // Q_BLOCK), device=pos.device)
        if T % Q_BLOCK == 0:  # a block of queries lies within one head: it sees up to its last one
            last = start[:, None] + block * Q_BLOCK % T + Q_BLOCK - 1
        else:
            last = (start + T - 1)[:, None].expand(B, len(block))
        n_blocks = last // size + 1
        if self.finished is not None:
            n_blocks = n_blocks.masked_fill(self.finished[:, None], 0)
        n_blocks = n_blocks.to(torch.int32)[:, None]
        index = torch.arange(self.capacity // size, dtype=torch.int32, device=pos.device)
        index = index.expand(B, 1, len(block), -1).contiguous()

        def visible(b: Tensor, h: Tensor, q: Tensor, slot: Tensor) -> Tensor:
            return slot <= start[b] + q % T

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
        self.k = allocate(spec, n_selected + self.ring_size)
        self.v = allocate(spec, n_selected + self.ring_size)
        shape = (spec.batch_size, spec.n_kv_head, n_selected)
        self.selected_pos = torch.full(shape, NEVER, dtype=torch.int64, device=spec.device)

    def layer(self, i: int) -> tuple[tuple[Tensor, Tensor], ...]:
        return ((self.k[i], self.v[i]),)

    def slots(self, pos: Tensor) -> Tensor:  # [B, T] -> [B, T]
        return self.n_selected + pos % self.ring_size

    def step(self, pos: Tensor) -> Step:  # [B, T], consecutive within a row
        return Step((self.slots(pos),), fold_mask(self.visible(pos), self.spec.n_group))

    def ring_pos(self, newest: Tensor) -> Tensor:  # [B], newest written position -> [B, ring_size]
        """Position held by each ring slot; negative where nothing was written yet."""
        slot = torch.arange(self.ring_size, device=newest.device)
        return newest[:, None] - (newest[:, None] - slot) % self.ring_size

    def visible(self, pos: Tensor) -> Tensor:
        """[B, Hkv, T, slots] bool, by the rule of the module docstring."""
        q = pos[:, None, :, None]  # [B, 1, T, 1]
        selected = self.selected_pos[:, :, None] <= q - self.n_recent
        p = self.ring_pos(pos[:, -1])[:, None, None]  # [B, 1, 1, ring_size]
        ring = (p > q - self.n_recent) & (p <= q) & (p >= 0)
        return torch.cat((selected, ring.expand(*selected.shape[:3], -1)), dim=-1)

    def fill(self, full: KVCache, selected_pos: Tensor, n_cached: Tensor) -> None:
        """Load selection and window from the full cache, in place.

        selected_pos [B, Hkv, n_selected] are positions, in a policy's answer; those that the full
        cache does not hold yet (>= n_cached [B]) stay invisible for good.
        """
        unknown = selected_pos >= n_cached[:, None, None]
        self.selected_pos.copy_(selected_pos.masked_fill(unknown, NEVER))
        ring = self.ring_pos(n_cached - 1)[:, None].expand(-1, selected_pos.shape[1], -1)
        index = torch.cat((selected_pos, ring), dim=-1).clamp(0, full.capacity - 1)
        index = index[..., None].expand(-1, -1, -1, self.spec.head_dim)
        for mine, theirs in zip(self.k + self.v, full.k + full.v, strict=True):
            torch.gather(theirs, 2, index, out=mine)


class SelfSpeculationCache:
    """A full cache to verify with and a sparse one to draft with, for the same weights.

    Handed to the model itself it is the verification cache: attends to `full`, writes both.
    """

    def __init__(self, full: KVCache, sparse: SparseKVCache) -> None:
        self.full, self.sparse = full, sparse

    def layer(self, i: int) -> tuple[tuple[Tensor, Tensor], ...]:
        return self.full.layer(i) + self.sparse.layer(i)

    def step(self, pos: Tensor) -> Step:
        step = self.full.step(pos)
        return step._replace(slots=(*step.slots, self.sparse.slots(pos)))


def select_streaming(
    full: KVCache,
    n_cached: Tensor,  # [B] int64, tokens of each row that the full cache holds
    n_selected: int,
) -> Tensor:  # [B, Hkv, n_selected] int64, positions
    """StreamingLLM (arXiv 2309.17453): the first tokens of the text, the attention sinks."""
    first = torch.arange(n_selected, device=n_cached.device)
    return first.expand(len(n_cached), full.spec.n_kv_head, n_selected)


POLICIES = {"streaming": select_streaming}  # name -> function of (full, n_cached, n_selected)
