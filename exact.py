"""The same bits, whatever is verified beside a token: `--exact`.

A matrix product of 16 rows and one of 96 add up the same numbers in different orders. In float32 no
token was ever seen to change for it. In bfloat16 two nearly equal logits can change places. So the
text of plain decoding, one token per row and forward, is not always that of verifications of
gamma + 1. Here it is: every bit of a token's logits is a function of the text before it.

**One shape.** Plain steps and shorter drafts are padded, to the same number of tokens always::

    verifying 3 of at most 5    newest  draft  draft  draft    .      .
    plain                       newest    .      .      .      .      .      -> K and V of 6 tokens

So every matrix product, every norm and every compiled function is the same one. The padding is text
that nobody decided: its K and V lie behind the newest token, in slots that no query sees before the
next verification has written over them, as those of rejected drafts are. A verification costs what
it did. A plain step costs what a verification does.

**One place in that shape does as well as another.** The token at some position is the first of
a plain step, and any one of a verification. Rows of a matrix product are computed in the same way,
and so are the queries of an attention kernel, if they visit the same keys in the same order.

**Attention is divided by position, not by length.** A query that sees n keys must add them up in an
order that n fixes. The CPU's operator divides slots into parts of 1,024. The split-KV kernel on a
GPU divides what this row's longest query sees, and that depends on what is verified beside it. So
it is told not to divide. Where rows and KV heads alone do not fill the GPU, the cache is cut into
pieces by slot, as if it had more heads, and their results are put together::

    K [B, Hkv, S, D] = [B, Hkv * n, S / n, D]      y = sum_i w_i y_i,  w = softmax over i of lse_i

A piece that a query does not see at all has weight 0. Each y_i is rounded to the queries' type.

A prompt is read in chunks of one shape from its beginning to its end, so nothing is copied from
other rows, whose K and V may have been written by rounds. A layer with a window is not cut.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from kernels import Q_BLOCK, kernel_options


def by_position(
    options: dict | None,  # of the kernel, which would divide by length; see kernels.py
    spec,  # a kv_cache.CacheSpec
    T: int,  # queries per row
    size: int,  # slots of a layer
    window: int | None,  # newest tokens that it sees; None: all
) -> tuple[dict | None, int]:
    """The kernel's options for one piece, and how many equal pieces there are.

    Of a verification only, and where exactness is asked for; else nothing changes, and 1.
    """
    if options is None or not T == spec.exact + 1 > 1 or "SPLIT_KV" not in options:
        return options, 1
    most = options["SPLIT_KV"] if window is None else 1
    n = max(n for n in range(1, most + 1) if size // spec.kv_block % n == 0)
    return options | {"SPLIT_KV": 1}, n


def slots_for(spec, n_tokens: int) -> int:  # of a kv_cache.CacheSpec
    """Whole blocks for so many tokens, and where exact as many as the wanted pieces divide."""
    n_blocks = -(-n_tokens // spec.kv_block)
    options = kernel_options(spec, spec.batch_size, spec.exact + 1) if spec.exact else None
    n = min((options or {}).get("SPLIT_KV", 1), n_blocks)
    return -(-n_blocks // n) * n * spec.kv_block


def mask_by_position(
    pos: Tensor,  # [B, T] int64, consecutive within a row
    size: int,  # slots of the cache
    n: int,  # pieces
    spec,  # a kv_cache.CacheSpec: heads, block
    finished: Tensor | None,  # [B] bool, rows that visit nothing
) -> BlockMask:  # [B, Hkv * n, G * T, S / n], of at most Q_BLOCK queries
    """As `kv_cache.KVCache.block_mask`, for a layer that sees all."""
    (B, T), Hkv, n_slots = pos.shape, spec.n_kv_head, size // n
    start = pos[:, 0].clone(memory_format=torch.contiguous_format)
    m = n_slots // spec.kv_block  # blocks of a piece
    visited = (start + T - 1) // spec.kv_block + 1  # [B], of all pieces
    if finished is not None:
        visited = visited.masked_fill(finished, 0)
    before = m * torch.arange(n, device=pos.device)
    n_blocks = (visited[:, None] - before).clamp(0, m).repeat(1, Hkv)  # [B, Hkv * n]
    index = torch.arange(m, device=pos.device, dtype=torch.int32)

    def visible(b: Tensor, h: Tensor, q: Tensor, slot: Tensor) -> Tensor:
        return slot + h % n * n_slots <= start[b] + q % T

    return BlockMask.from_kv_blocks(
        n_blocks[..., None].to(torch.int32),
        index.expand(B, Hkv * n, 1, m).contiguous(),
        BLOCK_SIZE=(Q_BLOCK, spec.kv_block),
        mask_mod=visible,
        seq_lengths=(spec.n_group * T, n_slots),
        compute_q_blocks=False,
    )


def attend_by_position(
    q: Tensor,  # [B, Hkv, G * T, D], scaled
    k: Tensor,  # [B, Hkv, S, D]
    v: Tensor,  # [B, Hkv, S, D]
    n: int,  # pieces
    **how,  # for flex_attention; its mask is over Hkv * n heads
) -> Tensor:  # [B, Hkv, G * T, D]
    """Attention to n pieces, as to n times as many heads, put together; zeros where all is hidden.

    Weights are computed in float32.
    """
    B, Hkv, R, D = q.shape
    q = q[:, :, None].expand(B, Hkv, n, R, D).reshape(B, Hkv * n, R, D)
    k, v = (x.view(B, Hkv * n, -1, D) for x in (k, v))
    y, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **how)
    lse = aux.lse.view(B, Hkv, n, R, 1).float()
    w = (lse - lse.amax(dim=2, keepdim=True).clamp_min(-1e30)).exp()
    w = w / w.sum(dim=2, keepdim=True).clamp_min(1e-30)
    return (w * y.view(B, Hkv, n, R, D).float()).sum(dim=2).to(q.dtype)


def check_gamma(gamma: int, exact: int) -> int:
    """The most drafts that are verified, of an engine that drafts as many, or 0: with no drafter.

    ValueError for a drafter of fewer than are verified always: its window has no room for them.
    """
    if exact and gamma not in (0, exact):
        raise ValueError(f"gamma {gamma}: this engine verifies {exact} drafts always (--exact)")
    return max(gamma, exact)


def padded(token: Tensor, draft: Tensor, n: int) -> Tensor:  # [B, 1], [B, gamma]
    """What is verified, [B, max(n, gamma) + 1]: the newest token, its drafts, itself again."""
    padding = token.expand(-1, max(n - draft.shape[1], 0))
    return torch.cat((token, draft, padding), dim=1)
