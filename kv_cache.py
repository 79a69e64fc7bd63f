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

**Self-speculation** joins one of each (`JointCache`): verification attends to the full cache and
writes its K and V into both, so the draft's window always holds exact values. Drafting uses the
sparse cache alone.

A cache is handed to the model's forward and answers with a `Step` per layer: the slots to write,
and the mask. Masks are over queries with the G = H / Hkv heads of a KV head folded into the query
length (index g * T + t), as `model.attend` wants them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

NEVER = 2**62  # position of a selected slot that holds nothing: later than any query
Q_BLOCK = 128  # queries per flex_attention block
# Programs of the split-KV kernel that a multiprocessor of Hopper runs at once, by tile of queries:
# as many as its shared memory holds, and for 128 its registers (D = 128, 16 bits).
PROGRAMS_PER_SM = {16: 3, 32: 2, 64: 2, 128: 1}
POOL = 31  # SnapKV's scores are averaged over this many neighbours, an odd number (LOG.md)
SCORE_BYTES = 2**28  # most memory that SnapKV's scores may take at a time


class Step(NamedTuple):
    """What one layer's forward needs to know of a cache."""

    slots: tuple[Tensor, ...]  # per written buffer: [B, T] int64, where these tokens go
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
    window: int | None = None  # newest tokens that the model's attention sees; None: all
    programs_per_sm: int | None = None  # of the split-KV kernel; None: PROGRAMS_PER_SM

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


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where the system does not tell.

    On CUDA also what PyTorch keeps for its next tensors, but not what a CUDA graph's own pool
    keeps: only that graph's replays, and captures into its pool, ever use it.
    """
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        reusable = sum(
            segment["total_size"] - segment["active_size"]
            for segment in torch.cuda.memory_snapshot()
            if segment["device"] == index and tuple(segment["segment_pool_id"]) == (0, 0)
        )
        return torch.cuda.mem_get_info(device)[0] + reusable
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def check_fits(
    n_bytes: int,
    device: torch.device,
    what: str,
    remedy: Callable[[float], str],  # is told which share of what is needed would fit
) -> None:
    """ValueError with both numbers and the remedy if the device has not that much memory free."""
    free = free_memory(device)
    if free is not None and n_bytes > free:
        raise ValueError(
            f"{what} need {n_bytes / 2**30:.1f} GiB, but {device} has "
            f"{free / 2**30:.1f} GiB free; use {remedy(free / n_bytes)}"
        )


def allocate(spec: CacheSpec, n_slots: int) -> list[Tensor]:
    """One zeroed [B, Hkv, n_slots, D] tensor per layer. Zero, so that unseen slots are finite."""
    shape = (spec.batch_size, spec.n_kv_head, n_slots, spec.head_dim)
    return [torch.zeros(shape, dtype=spec.dtype, device=spec.device) for _ in range(spec.n_layer)]


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

    @property
    def n_bytes(self) -> int:
        return self.capacity * self.spec.bytes_per_slot

    def row(self, b: int) -> "KVCache":
        """Row b alone, a view that shares its memory: prompts are prefilled row by row."""
        spec = replace(self.spec, batch_size=1)
        return KVCache(spec, [k[b : b + 1] for k in self.k], [v[b : b + 1] for v in self.v])

    def layer(self, i: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """The (k, v) buffers of layer i; the first pair is the one attended to."""
        return ((self.k[i], self.v[i]),)

    def slots(self, pos: Tensor) -> Tensor:  # [B, T] -> [B, T]
        return pos

    def steps(self, pos: Tensor) -> list[Step]:  # [B, T], consecutive within a row
        """One Step, for all layers the same."""
        if self.spec.flex:
            step = Step((pos,), self.block_mask(pos), self.kernel_options(*pos.shape))
        else:
            step = Step((pos,), self.dense_mask(pos))
        return [step] * self.spec.n_layer

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
        self.selected_pos = torch.full(shape, NEVER, dtype=torch.int64, device=spec.device)

    @staticmethod
    def n_slots(n_selected: int, n_recent: int, gamma: int) -> int:
        return n_selected + n_recent + gamma + 1

    def layer(self, i: int) -> tuple[tuple[Tensor, Tensor], ...]:
        return ((self.k[i], self.v[i]),)

    @property
    def n_bytes(self) -> int:
        return (self.n_selected + self.ring_size) * self.spec.bytes_per_slot

    def slots(self, pos: Tensor) -> Tensor:  # [B, T] -> [B, T]
        return self.n_selected + pos % self.ring_size

    def steps(self, pos: Tensor) -> list[Step]:  # [B, T], consecutive within a row
        masks = fold_mask(self.visible(pos), self.spec.n_group)
        return [Step((self.slots(pos),), mask) for mask in masks]

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


@dataclass(frozen=True, slots=True)
class JointCache:
    """Attends to one cache and writes two.

    Self-speculation verifies with (full, sparse); a draft model of its own that selects from its
    own full cache drafts with (sparse, full).
    """

    attended: KVCache | SparseKVCache
    written: KVCache | SparseKVCache

    def layer(self, i: int) -> tuple[tuple[Tensor, Tensor], ...]:
        return self.attended.layer(i) + self.written.layer(i)

    def steps(self, pos: Tensor) -> list[Step]:
        slots = self.written.slots(pos)
        return [s._replace(slots=(*s.slots, slots)) for s in self.attended.steps(pos)]


@dataclass(frozen=True, slots=True)
class ReadOnlyCache:
    """Attends to a cache and writes nothing: for tokens whose K and V it holds already."""

    attended: KVCache

    def layer(self, i: int) -> tuple[tuple[Tensor, Tensor], ...]:
        return self.attended.layer(i)

    def steps(self, pos: Tensor) -> list[Step]:
        return [s._replace(slots=()) for s in self.attended.steps(pos)]


class Layer(NamedTuple):
    """What a policy sees: one layer of the full cache, and how much of it is text."""

    k: Tensor  # [B, Hkv, S, D], rotated; position p in slot p
    v: Tensor  # [B, Hkv, S, D]
    n_cached: Tensor  # [B] int64, tokens of each row that are held
    n_sink: int  # how many of the first tokens to keep in any case
    queries: Tensor | None  # [B, W, H, D] of the tokens at `observed`; None if not asked for
    window: int | None = None  # of the model's attention


class Policy(NamedTuple):
    """An entry of the registry: how to select, and how a budget is divided."""

    select: Callable[[Layer, int], Tensor]  # (layer, n_selected) -> [B, Hkv, n_selected] positions
    recent_share: float  # of the budget, for the window of newest tokens (what the sinks leave)
    observes: bool = False  # wants Layer.queries
    reselect_every: int = 16  # rounds until it is asked again by default; 0: its answer is final
    obs_window: int = 8  # newest tokens whose queries it observes by default

    def n_recent(self, budget: int, n_sink: int, obs_window: int) -> int:
        """Tokens of the budget that go to the window; an observed window lies in it."""
        n = max(int(self.recent_share * budget), obs_window if self.observes else 1)
        return min(n, budget - n_sink)


def observed(n_cached: Tensor, obs_window: int) -> Tensor:  # [B] -> [B, W]
    """Positions of the newest W cached tokens; a row with fewer has them first, then others."""
    start = (n_cached - obs_window).clamp_min(0)
    return start[:, None] + torch.arange(obs_window, device=n_cached.device)


def select_streaming(layer: Layer, n_selected: int) -> Tensor:
    """StreamingLLM (arXiv 2309.17453): the first tokens of the text, the attention sinks."""
    first = torch.arange(n_selected, device=layer.k.device)
    return first.expand(*layer.k.shape[:2], n_selected)


def attention_received(
    k: Tensor,  # [B, Hkv, S, D]
    queries: Tensor,  # [B, W, H, D]
    n_cached: Tensor,  # [B]
    window: int | None = None,
) -> Tensor:  # [B, Hkv, S] float32
    """Mean attention of the observed queries, over the query heads of each KV head, to each slot.

    Zero for the observed tokens themselves: they are in the window anyway.
    """
    (B, W, H, D), (Hkv, S) = queries.shape, k.shape[1:3]
    pos = observed(n_cached, W)
    slot = torch.arange(S, device=k.device)
    q = queries.view(B, W, Hkv, -1, D).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, G * W, D]
    scores = (q * D**-0.5 @ k.transpose(-1, -2)).float()
    hidden = fold_mask(~seen(slot, pos[:, None, :, None], window), H // Hkv)
    probs = scores.masked_fill_(hidden, -torch.inf).softmax(dim=-1)
    exists = (pos < n_cached[:, None]).repeat(1, H // Hkv)  # [B, G * W]; others are not asked
    weight = exists / exists.sum(dim=1, keepdim=True).clamp_min(1)
    received = (weight[:, None, None] @ probs)[:, :, 0]
    return received.masked_fill(slot >= pos[:, None, :1], 0)


def select_snapkv(layer: Layer, n_selected: int) -> Tensor:
    """SnapKV (arXiv 2404.14469): per KV head, what the newest queries attend to most.

    Scores are pooled over POOL neighbours, so that a token is kept with its surroundings: a draft
    that follows a passage needs what comes after the tokens that are attended to now. The sinks
    come first; the observed window is left out. Row by row if need be: the scores of all rows are
    [B, H, W, S].
    """
    W, H = layer.queries.shape[1:3]
    rows = max(SCORE_BYTES // (4 * H * W * layer.k.shape[2]), 1)
    parts = zip(*(t.split(rows) for t in (layer.k, layer.queries, layer.n_cached)), strict=True)
    scores = torch.cat([attention_received(*part, layer.window) for part in parts])
    scores = F.avg_pool1d(scores, POOL, stride=1, padding=POOL // 2)
    slot = torch.arange(scores.shape[-1], device=scores.device)
    start = observed(layer.n_cached, W)[:, None, :1]
    scores = scores.masked_fill(slot < layer.n_sink, torch.inf).masked_fill(slot >= start, -1)
    score, pos = scores.topk(n_selected, dim=-1)
    return pos.masked_fill(score < 0, NEVER)


POLICIES = {
    "streaming": Policy(select_streaming, recent_share=1.0, reselect_every=0),
    "snapkv": Policy(select_snapkv, recent_share=0.5, observes=True),
}
