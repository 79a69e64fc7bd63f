"""Lets a policy choose what a draft reads, and loads it: from the full cache into the sparse one.

A policy is shown K and V, which the full cache has. What else it wants to know is kept up to date
by the rounds themselves, so that to select again needs no forward:

    window     each verification writes its K and V into the draft's cache too
    queries    and its queries, see `SparseKVCache`: those of the newest cached tokens are there
    summary    of every CHUNK tokens; new tokens change its last few entries only

    round r, verification          round r, accepted          before round r + 1
    ... q q q Q Q Q Q Q Q          ... q q q Q Q Q . . .      observed: the last W of q q q Q Q Q

Where rounds went on without the drafter, or another text began, all three are made anew: `renew`,
with one forward over the observed tokens. It depends on the text alone, not on how it was read.

Both are made of static tensors and never look at a value, so they could be captured. Where blocks
are compiled, so is the selection of a layer, once for all of them, if it is to be repeated. A draft
model's observed queries are those of its own draft steps, which have read the sparse cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import compile_options
from kv_cache import KVCache, Selected, SparseKVCache
from model import Transformer
from policies import CHUNK, Layer, Policy, Strategy, observed


class Sizes(NamedTuple):
    """Of a selection, the same for all layers."""

    n_sink: int  # first tokens that are kept in any case
    n_recent: int  # newest tokens, in the window
    n_observed: int  # newest tokens whose queries a policy is shown
    n_changed: int  # last entries of a summary that may not be up to date


class Part(NamedTuple):
    """One layer, as a selection reads and writes it."""

    k: Tensor  # [B, Hkv, S, D], of the full cache
    v: Tensor  # [B, Hkv, S, D]
    own: Selected
    q: Tensor | None  # [B, H, n_ring, D], the newest tokens' queries
    summary: Tensor | None  # [B, Hkv, S // CHUNK, ...]


def select_layer(policy: Policy, sizes: Sizes, part: Part, n_cached: Tensor) -> None:  # [B]
    """Let the policy choose what the draft keeps of a layer, and load it, in place."""
    summarise(policy, sizes.n_changed, part, n_cached)
    queries = newest_queries(part.q, observed(n_cached, sizes.n_observed))
    shown = sizes.n_sink, sizes.n_recent, queries, part.summary
    pos = policy.select(Layer(part.k, part.v, n_cached, *shown), part.own.pos.shape[-1])
    part.own.fill(part.k, part.v, pos, n_cached)


def summarise(policy: Policy, n_changed: int, part: Part, n_cached: Tensor) -> None:  # [B]
    """Bring the last entries of a layer's summary up to date, in place, if there is one."""
    if policy.summarise is None or part.summary is None:
        return
    last = (n_cached[:, None] - 1).clamp_min(0) // CHUNK
    chunk = (last - torch.arange(n_changed, device=last.device)).clamp_min(0)  # [B, n]
    pos = CHUNK * chunk[..., None] + torch.arange(CHUNK, device=last.device)  # [B, n, CHUNK]
    row = torch.arange(len(last), device=last.device)[:, None]
    k = part.k[row[..., None], :, pos].permute(0, 3, 1, 2, 4)  # [B, Hkv, n, CHUNK, D]
    entry = policy.summarise(k, pos < n_cached[:, None, None])
    part.summary[row, :, chunk] = entry.transpose(1, 2).to(part.summary.dtype)


def newest_queries(ring: Tensor | None, pos: Tensor) -> Tensor | None:
    """Of tokens at these positions [B, W], from a ring [B, H, n_ring, D]: [B, W, H, D]."""
    if ring is None:
        return None
    row = torch.arange(len(pos), device=pos.device)[:, None]
    return ring[row, :, pos % ring.shape[2]]


class Selection:
    """What one policy keeps of one model's full cache."""

    def __init__(
        self, strategy: Strategy, model: Transformer, full: KVCache, sparse: SparseKVCache
    ) -> None:
        self.policy, self.model, self.full, self.sparse = strategy.entry, model, full, sparse
        n_new = strategy.select_every * (strategy.gamma + 1)  # most tokens since the last selection
        self.n_all = full.capacity // CHUNK
        n_changed = min((n_new + CHUNK - 2) // CHUNK + 1, self.n_all) if n_new else self.n_all
        self.sizes = Sizes(strategy.n_sink, sparse.n_recent, sparse.n_observed, n_changed)
        self.select_layer = select_layer
        if model.compiled and strategy.select_every:  # not for once
            options = compile_options(full.spec.device)
            self.select_layer = torch.compile(select_layer, dynamic=False, options=options)

    def rows(self, b: int | None) -> tuple[KVCache, SparseKVCache, slice]:
        """The caches of row b, or of all rows for None."""
        if b is None:
            return self.full, self.sparse, slice(None)
        return self.full.row(b), self.sparse.row(b), slice(b, b + 1)

    def parts(self, b: int | None) -> list[Part]:
        """The layers without a window."""
        full, sparse, _ = self.rows(b)
        return [
            Part(full.k[i], full.v[i], sparse.selected(i), sparse.q[i], sparse.summary[i])
            for i, window in enumerate(full.spec.windows)
            if window is None
        ]

    def renew(self, tokens: Tensor, n_cached: Tensor, b: int | None = None) -> None:
        """Make anew, of row b or of all, what rounds only keep up to date.

        tokens [B, S] are the texts, in the model's vocabulary; n_cached [B] of them are cached.
        """
        full, sparse, rows = self.rows(b)
        n = n_cached[rows]
        if any(q is not None for q in sparse.q):
            pos = observed(n, sparse.n_observed)
            self.model.hidden(tokens[rows].gather(1, pos), pos, full, (sparse,))
        sparse.follow(full, n)
        for row in range(len(n_cached))[rows]:  # one by one: it copies K
            for part in self.parts(row):
                summarise(self.policy, self.n_all, part, n_cached[row : row + 1])

    def select(self, n_cached: Tensor, b: int | None = None) -> None:
        """Ask the policy what to keep of the n_cached [B] tokens of row b, or of all; load it.

        One row alone is not compiled: it is rare, and would be compiled for itself.
        """
        one_layer = self.select_layer if b is None else select_layer
        n = n_cached if b is None else n_cached[b : b + 1]
        for part in self.parts(b):
            one_layer(self.policy, self.sizes, part, n)
