"""KV caches: where keys and values live, and which of them a query may see.

Two caches, one rule. `KVCache` keeps all that the model can see. `SparseKVCache` keeps a few tokens
that a *policy* selected, and the newest ones. Both are static buffers ``[B, Hkv, slots, D]``, one
tensor per layer for K and one for V, written in place. The rule that makes them safe to reuse:

    a query at text position q sees a slot  iff  the slot holds a token at some 0 <= p <= q

Nothing is erased. A rejected draft token stays in its slot; it is invisible, because its position
is larger than that of any query until the next token for that position overwrites it. Rolling back
is arithmetic on the lengths, and the lengths are kept by the engine, per row.

**Full.** A layer that sees all of the text has a slot for every token: position p in slot p.

**Windowed.** Where queries see only the newest `window` tokens, the buffer is a *ring*: position p
goes to slot ``p % ring_size``, over a token that is ring_size older. What a slot holds follows from
the newest position: the largest p of its residue class that does not exceed it (`ring_pos`)::

    window 4, ring_size 8, newest token 13       slot      0  1  2  3  4  5  6  7
    query 13 sees 10 .. 13                       position  8  9 10 11 12 13  6  7

A forward writes its T tokens before the first of them looks, so a ring needs window + T - 1 slots.
It has window + the longest T, in whole blocks, and never more than the text. What was written and
taken back since, up to the longest T, has overwritten nothing that is still seen. Who goes back
further, to the beginning of a continuation or to where two conversations part, asks
`KVCache.holds`, and reads the text again if it must.

**Sparse.** A draft budget of K = n_selected + n_recent tokens, and slack::

    [ selected: n_selected slots | ring: n_recent newest tokens + gamma + 1 slack ]

A query at q sees the ring's tokens with q - n_recent < p <= q, and a selected slot only if its
token lies before that window, so no token is seen twice, also when the prompt is shorter than the
budget. Because of the slack rejected drafts never damage the window. If a round rejects all of its
gamma drafts, the next query is at the first one's position, and the last one lies gamma - 1
positions further: as many spare slots are needed. A draft model is fed two tokens at once, and the
second is written before the first one's query looks: it needs 1. The rest is a margin.

A *policy* (`policies.py`) returns the positions to keep of one layer, ``[B, Hkv, n_selected]``, and
`Selected.fill` gathers them. A layer with a window offers no choice: there a draft sees the
newest min(K, window) tokens. A policy that observes is shown the newest tokens' queries. They go
into one more ring, with the same slack: what was rejected has not overwritten those that count.

**Read one, write several.** A forward reads one cache and writes its K and V into any number. In
self-speculation a verification reads the full cache and writes both, so the draft's window holds
what the target computed, if with fewer bits. Drafting reads and writes the sparse cache alone.

A cache answers a forward twice, layer by layer: `slots(pos)` says where these tokens go, and
`access(pos)` which slots they see. Masks are over queries with the G = H / Hkv heads of a KV head
folded into the query length (index g * T + t), as `model.attend` wants them.
"""

from collections.abc import Callable, Hashable, Iterable
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from cpu_attention import ALL, FEW, runs
from exact import by_position, mask_by_position, slots_for
from kernels import Q_BLOCK, kernel_options

NEVER = 2**62  # position of a selected slot that holds nothing: later than any query
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Span(NamedTuple):
    """What a few queries see, for the operator of `cpu_attention.py`: the newest of the text."""

    start: Tensor  # [B] int64, position of the first query; -T: the row is finished
    window: int = ALL  # newest tokens that a query sees
    mask: Tensor | None = None  # [B, 1 or Hkv, G * T, S] bool, what queries see instead


class Access(NamedTuple):
    """How one layer's attention reads a cache."""

    mask: BlockMask | Tensor | Span | None  # [B, 1 or Hkv, G * T, S], what is seen; None: causal
    kernel_options: dict | None = None  # for flex_attention
    n_pieces: int = 1  # into which the layer is cut, see `exact.py`


class Write(NamedTuple):
    """Where one layer puts what it computes of the tokens of a forward."""

    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, D]
    slot: Tensor  # [B, T]
    q: Tensor | None = None  # [B, H, n_ring, D], of scaled queries; None: nobody asks for them
    q_slot: Tensor | None = None  # [B, T]


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Geometry of a cache: everything but its number of slots."""

    windows: tuple[int | None, ...]  # per layer: newest tokens that attention sees; None: all
    batch_size: int  # B
    n_kv_head: int  # Hkv
    head_dim: int  # D
    n_group: int  # G, query heads per KV head
    dtype: torch.dtype  # of queries
    device: torch.device
    flex: bool  # mask the full cache for flex_attention; False: boolean masks
    kv_dtype: torch.dtype | None = None  # of what is stored; None: the same
    exact: int = 0  # drafts that every verification is padded to, see `exact.py`; 0: none
    operator: bool = False  # few queries go to `cpu_attention.py`
    draft_dtype: torch.dtype | None = None  # of what a sparse cache stores; None: the same
    programs_per_sm: int | None = None  # of the split-KV kernel; None: kernels.PROGRAMS_PER_SM
    allocated: bool = True  # False: caches without memory, to be asked how much they would take

    @classmethod
    def for_model(cls, model, batch_size: int) -> "CacheSpec":
        """The geometry that `model` (a model.Transformer) wants for `batch_size` rows."""
        c, weight = model.config, model.norm.weight
        heads = c.n_kv_head, c.head_dim, c.n_group
        kv_dtype = model.kv_dtype or weight.dtype
        operator = model.compiled and runs(weight.device.type, c.head_dim, kv_dtype)
        kinds = weight.dtype, weight.device, model.flex, kv_dtype, model.exact
        return cls(c.windows, batch_size, *heads, *kinds, operator)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of K and V in the buffers."""
        return self.kv_dtype or self.dtype

    @property
    def wide(self) -> torch.dtype:
        """Of what is multiplied with K, or computed from it: that of K, of 16 bits at least."""
        return self.stored_dtype if self.stored_dtype.itemsize > 1 else torch.bfloat16

    @property
    def prefill_chunk(self) -> int:
        """Prompt tokens per forward: on an H200 a tenth of them is bound by arithmetic already."""
        return 2048 if self.device.type == "cuda" else 512

    @property
    def kv_block(self) -> int:
        """Slots per flex_attention block: Triton's tile, or the fastest on the CPU (LOG.md)."""
        return 128 if self.device.type == "cuda" else 256


def allocate(spec: CacheSpec, n_slots: list[int]) -> list[Tensor]:
    """A zeroed [B, Hkv, slots, D] tensor for each layer. Zero, so that unseen slots are finite."""
    shapes = [(spec.batch_size, spec.n_kv_head, n, spec.head_dim) for n in n_slots]
    device = spec.device if spec.allocated else "meta"
    return [torch.zeros(shape, dtype=spec.stored_dtype, device=device) for shape in shapes]


def seen(p: Tensor, q: Tensor, window: int | None) -> Tensor:  # [...], [...] -> [...] bool
    """Whether attention at position q sees the token at position p."""
    return p <= q if window is None else (p <= q) & (p > q - window)


def ring_pos(newest: Tensor, slot: Tensor, ring_size: int) -> Tensor:  # [...], [...] -> [...]
    """Position that a ring's slot holds; negative where nothing was written yet."""
    turn = newest % ring_size  # one division for all slots
    return newest - turn + slot - ring_size * (slot > turn)


def fold_mask(visible: Tensor, n_group: int) -> Tensor:  # [..., T, S] -> [..., G * T, S]
    """Repeat a boolean mask for the query heads folded into the query length."""
    *lead, T, S = visible.shape
    return visible.unsqueeze(-3).expand(*lead, n_group, T, S).flatten(-3, -2)


def once_each(function: Callable[[Key], Value], keys: Iterable[Key]) -> list[Value]:
    """[function(key) for key in keys], where equal keys share one value: layers that are alike."""
    values: dict[Key, Value] = {}
    return [values[key] if key in values else values.setdefault(key, function(key)) for key in keys]


@dataclass(frozen=True, eq=False, repr=False)
class KVCache:
    """All that the model can see: position p in slot p, or in slot p % ring_size of a ring."""

    spec: CacheSpec
    k: list[Tensor]  # per layer [B, Hkv, slots, D]
    v: list[Tensor]  # per layer [B, Hkv, slots, D]
    capacity: int  # tokens of a row; a layer with fewer slots is a ring
    newest: Tensor  # [B] int64, where there are rings: the last position of this text ever written
    finished: Tensor | None = None  # [B] bool, rows whose results nobody needs

    @classmethod
    def empty(
        cls,
        spec: CacheSpec,
        n_tokens: int,  # of a row; rounded up to whole flex_attention blocks
        finished: Tensor | None = None,  # [B] bool, kept, not copied
        longest: int | None = None,  # tokens of the longest forward; None: a prefill's chunk
    ) -> "KVCache":
        """Zeroed buffers."""
        longest = spec.prefill_chunk if longest is None else longest
        needed = [n_tokens if w is None else min(n_tokens, w + longest) for w in spec.windows]
        capacity, *n_slots = (slots_for(spec, n) for n in (n_tokens, *needed))
        buffers = allocate(spec, n_slots), allocate(spec, n_slots)
        newest = torch.full((spec.batch_size,), -1, device=buffers[0][0].device)
        return cls(spec, *buffers, capacity, newest, finished)

    @property
    def n_bytes(self) -> int:
        """Bytes of K and V in all buffers."""
        return sum(t.nbytes for t in self.k + self.v)

    @cached_property
    def layers(self) -> list[tuple[int, int | None]]:
        """Of each layer: slots, and newest tokens that it sees (None: all)."""
        return [(k.shape[2], w) for k, w in zip(self.k, self.spec.windows, strict=True)]

    @cached_property
    def rings(self) -> dict[int, int]:
        """The window by the size of the ring, for each size that there is."""
        return {size: window for size, window in self.layers if window and size < self.capacity}

    def row(self, b: int) -> "KVCache":
        """Row b alone, a view that shares its memory: prompts are prefilled row by row."""
        rows = slice(b, b + 1)
        k, v, newest = [k[rows] for k in self.k], [v[rows] for v in self.v], self.newest[rows]
        return KVCache(replace(self.spec, batch_size=1), k, v, self.capacity, newest)

    def copy_row(self, source: int, b: int, n_tokens: int) -> None:
        """Let row b begin with the first n_tokens of row `source`, which holds them. In place."""
        for buffer in self.k + self.v:
            n = buffer.shape[2] if buffer.shape[2] in self.rings else n_tokens  # rings: all of it
            buffer[b, :, :n] = buffer[source, :, :n]
        self.newest[b] = self.newest[source]

    def holds(self, n_tokens: Tensor | int, back: int = 0) -> Tensor:  # [B], or one for all
        """Whether a row can be continued behind its first n_tokens, [B] bool.

        It can be if every ring still has what the token behind them sees, and what the last `back`
        of them see. Other layers have everything.
        """
        held = torch.ones_like(self.newest, dtype=torch.bool)
        for size, window in self.rings.items():
            lost = self.newest - size  # the last position that is overwritten, if not negative
            held &= (lost < 0) | (lost < n_tokens - back - window + 1)
        return held

    def slots(self, pos: Tensor) -> list[Tensor]:  # [B, T] -> per layer [B, T]
        """Where tokens at these positions are written. Notes, in place, that they are."""
        if self.rings:
            newest = self.newest.masked_fill(pos[:, 0] == 0, -1)  # another text begins
            self.newest.copy_(torch.maximum(newest, pos[:, -1]))
        return once_each(lambda ring: pos % ring if ring in self.rings else pos,
                         (k.shape[2] for k in self.k))  # fmt: skip

    def writes(self, pos: Tensor) -> list[Write]:  # [B, T]
        """The same with the buffers, layer by layer."""
        return [Write(*layer) for layer in zip(self.k, self.v, self.slots(pos), strict=True)]

    def access(self, pos: Tensor) -> list[Access]:  # [B, T], consecutive within a row
        """How queries at these positions read each layer."""

        def read(layer: tuple[int, int | None]) -> Access:
            (B, T), (size, _) = pos.shape, layer
            assert size - (self.rings.get(size) or 0) >= T
            if self.spec.operator and T < FEW:
                return Access(self.span(pos, layer[1]))
            if self.spec.flex:
                options = kernel_options(self.spec, B, T, size not in self.rings)
                options, n = by_position(options, self.spec, T, *layer)
                if n == 1:
                    return Access(self.block_mask(pos, *layer), options)
                return Access(mask_by_position(pos, size, n, self.spec, self.finished), options, n)
            return Access(self.dense_mask(pos, *layer))

        return once_each(read, self.layers)

    def span(self, pos: Tensor, window: int | None) -> Span:  # [B, T]
        """The same for `cpu_attention.py`. A finished row reads nothing."""
        start, T = pos[:, 0], pos.shape[1]
        if self.finished is not None:
            start = start.masked_fill(self.finished, -T)
        return Span(start.contiguous(), ALL if window is None else window)

    def dense_mask(self, pos: Tensor, size: int, window: int | None) -> Tensor:
        """[B, 1, G * T, size] bool: which slots of a layer queries at [B, T] positions see."""
        p, q = torch.arange(size, device=pos.device), pos[:, None, :, None]
        if size in self.rings:
            p = ring_pos(pos[:, -1, None, None, None], p, size)
        return fold_mask(seen(p, q, window) & (p >= 0), self.spec.n_group)

    def block_mask(self, pos: Tensor, size: int, window: int | None) -> BlockMask:  # [B, T]
        """The same rule for flex_attention: which blocks to visit, and the rule inside them.

        A layer with a window visits only the blocks that it touches. In a ring the last of these
        may be the first one again. Then all are visited, each once.

        Only partial blocks are listed (`kv_num_blocks`): on CUDA the split-KV kernel then divides
        each row's own blocks among its programs, not the static capacity. A finished row visits no
        block and gets zeros: the last rounds of a batch cost what its last rows cost.
        """
        B, T = pos.shape
        kv_block, n_query = self.spec.kv_block, self.spec.n_group * T
        start = pos[:, 0].clone(memory_format=torch.contiguous_format)  # stride 1, also at B = 1
        block = torch.arange(-(-n_query // Q_BLOCK), device=pos.device)
        if T % Q_BLOCK == 0:  # a block of queries lies within one head: it sees up to its last one
            first = start[:, None] + block * Q_BLOCK % T
            last = first + Q_BLOCK - 1
        else:
            first = start[:, None].expand(B, len(block))
            last = first + T - 1
        first = torch.zeros_like(first) if window is None else (first - window + 1).clamp_min(0)
        first, total = first // kv_block, size // kv_block
        n_blocks = (last // kv_block - first + 1).clamp_max(total)
        if self.finished is not None:
            n_blocks = n_blocks.masked_fill(self.finished[:, None], 0)
        index = torch.arange(total, device=pos.device) + first[:, None, :, None]
        ring_size = size if size in self.rings else None

        def visible(b: Tensor, h: Tensor, q: Tensor, slot: Tensor) -> Tensor:
            if ring_size is None:
                return seen(slot, start[b] + q % T, window)
            p = ring_pos(start[b] + T - 1, slot, ring_size)
            return seen(p, start[b] + q % T, window) & (p >= 0)

        return BlockMask.from_kv_blocks(
            n_blocks.to(torch.int32)[:, None],
            (index % total).to(torch.int32),  # [B, 1, query blocks, KV blocks]
            BLOCK_SIZE=(Q_BLOCK, kv_block),
            mask_mod=visible,
            seq_lengths=(n_query, size),
            compute_q_blocks=False,
        )


class Selected(NamedTuple):
    """Where the selection of one layer is."""

    k: Tensor  # [B, Hkv, slots, D], in the first n_selected slots
    v: Tensor  # [B, Hkv, slots, D]
    pos: Tensor  # [B, Hkv, n_selected] int64, NEVER: nothing

    def fill(self, k: Tensor, v: Tensor, pos: Tensor, n_cached: Tensor) -> None:
        """Load tokens from a layer of the full cache, in place.

        k and v are [B, Hkv, S, D]; positions [B, Hkv, n_selected] that it does not hold yet
        (>= n_cached [B]) stay invisible for good.
        """
        (B, Hkv, n), device = pos.shape, pos.device
        b, h, slot = (torch.arange(size, device=device) for size in (B, Hkv, n))
        b, h = b[:, None, None], h[:, None]
        unknown = pos >= n_cached[:, None, None]
        self.pos.copy_(pos.masked_fill(unknown, NEVER))
        known = pos.masked_fill(unknown, 0)
        self.k[b, h, slot] = k[b, h, known].to(self.k.dtype)  # compiled, this is one pass
        self.v[b, h, slot] = v[b, h, known].to(self.v.dtype)


class SparseKVCache:
    """The draft's cache: selected tokens and a ring of the newest; see the module docstring."""

    def __init__(
        self,
        spec: CacheSpec,
        n_selected: int,
        n_recent: int,
        gamma: int,
        n_observed: int = 0,  # newest tokens whose queries are kept too
        summary: tuple[int, ...] = (),  # shape of what a policy keeps of a row's KV head and layer
    ) -> None:
        self.spec, self.slack, K = spec, gamma + 1, n_selected + n_recent
        self.n_selected, self.n_recent = n_selected, n_recent  # of layers without a window
        self.n_observed = n_observed
        self.parts = [(n_selected, n_recent) if w is None else (0, min(K, w)) for w in spec.windows]
        n_slots = [sum(part) + self.slack for part in self.parts]
        own = replace(spec, kv_dtype=spec.draft_dtype or spec.kv_dtype)
        self.k, self.v = allocate(own, n_slots), allocate(own, n_slots)
        ring = (spec.n_kv_head * spec.n_group, n_observed + self.slack, spec.head_dim)
        self.q = self.beside(*(ring if n_observed else ()))  # [B, H, n_ring, D]
        self.summary = self.beside(*((spec.n_kv_head, *summary) if summary else ()))
        shape = (spec.windows.count(None), spec.batch_size, spec.n_kv_head, n_selected)
        self.selected_pos = torch.full(shape, NEVER, device=self.k[0].device)

    def beside(self, *shape: int) -> list[Tensor | None]:
        """A zeroed tensor [B, ...] of that shape for each layer without a window; None if empty."""
        size = self.spec.batch_size, *shape
        like = {"dtype": self.spec.wide, "device": self.k[0].device}
        whole = [w is None and bool(shape) for w in self.spec.windows]
        return [torch.zeros(size, **like) if wanted else None for wanted in whole]

    @property
    def n_bytes(self) -> int:
        """Bytes of all buffers but the selected positions."""
        every = self.k + self.v + self.q + self.summary
        return sum(t.nbytes for t in every if t is not None)

    def row(self, b: int) -> "SparseKVCache":
        """Row b alone, a view that shares its memory."""
        rows, part = slice(b, b + 1), copy(self)
        part.spec = replace(self.spec, batch_size=1)
        for name in ("k", "v", "q", "summary"):
            buffers = getattr(self, name)
            setattr(part, name, [None if t is None else t[rows] for t in buffers])
        part.selected_pos = self.selected_pos[:, rows]
        return part

    def slots(self, pos: Tensor) -> list[Tensor]:  # [B, T] -> per layer [B, T]
        """Where tokens at these positions are written."""
        return once_each(lambda part: part[0] + pos % (part[1] + self.slack), self.parts)

    def writes(self, pos: Tensor) -> list[Write]:  # [B, T]
        """The same with the buffers, layer by layer, and where their queries are."""
        q_slot = pos % (self.n_observed + self.slack)
        layers = zip(self.k, self.v, self.slots(pos), self.q, strict=True)
        return [Write(k, v, slot, q, None if q is None else q_slot) for k, v, slot, q in layers]

    def access(self, pos: Tensor) -> list[Access]:  # [B, T], consecutive within a row
        """How queries at these positions read each layer."""
        G, windows = self.spec.n_group, self.spec.windows
        chosen = iter(fold_mask(self.visible(pos), G))  # of layers without a window, at once
        local = [n_recent for (_, n_recent), w in zip(self.parts, windows, strict=True) if w]
        masks = iter(once_each(lambda n: fold_mask(self.in_ring(pos, n), G), local))
        seen = [next(chosen if window is None else masks) for window in windows]
        if self.spec.operator:
            start = pos[:, 0].contiguous()
            return [Access(Span(start, mask=mask)) for mask in seen]
        return [Access(mask) for mask in seen]

    def in_ring(self, pos: Tensor, n_recent: int) -> Tensor:  # [B, T] -> [B, 1, T, ring_size] bool
        """Which slots of a layer's ring queries at these positions see."""
        slot = torch.arange(n_recent + self.slack, device=pos.device)
        p = ring_pos(pos[:, -1, None, None, None], slot, len(slot))
        return seen(p, pos[:, None, :, None], n_recent) & (p >= 0)

    def visible(self, pos: Tensor) -> Tensor:  # [B, T] -> [layers, B, Hkv, T, slots] bool
        """Which slots they see of the layers without a window."""
        selected = self.selected_pos[..., None, :] <= pos[:, None, :, None] - self.n_recent
        ring = self.in_ring(pos, self.n_recent).expand(*selected.shape[:-1], -1)
        return torch.cat((selected, ring), dim=-1)

    def follow(self, full: KVCache, n_cached: Tensor) -> None:  # [B]
        """Load the window of every layer from the full cache, in place."""
        rows = torch.arange(len(n_cached), device=n_cached.device)[:, None]
        for i, (n_selected, n_recent) in enumerate(self.parts):
            slot = torch.arange(n_recent + self.slack, device=n_cached.device)
            pos = ring_pos(n_cached[:, None] - 1, slot, len(slot)).clamp_min(0)
            for own, source in ((self.k[i], full.k[i]), (self.v[i], full.v[i])):
                own[:, :, n_selected:] = source[rows, :, pos % source.shape[2]].transpose(1, 2)

    def selected(self, i: int) -> Selected:
        """Where the selection of layer i goes, which has no window."""
        rank = self.spec.windows[:i].count(None)
        return Selected(self.k[i], self.v[i], self.selected_pos[rank])
