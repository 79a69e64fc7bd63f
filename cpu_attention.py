"""Attention of a few queries to a long cache on the CPU: one operator of C++.

Decoding is bound by reading K and V, and what PyTorch generates for the CPU does not read them at
the speed of memory (LOG.md). `cpu_attention.cpp` does. It is compiled once per head size and type
of cache, by the compiler that torch.compile needs anyway, kept in torch.compile's own cache of
compiled code, and called as a custom operator, in the middle of a compiled block. Where it cannot
be built, flex_attention does the work.

K and V are float32 or bfloat16, the arithmetic is float32.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.codecache import CppCodeCache

FEW = 64  # tokens per row from which on flex_attention is used: a prefill is bound by arithmetic
TYPES = {torch.float32: "float", torch.bfloat16: "uint16_t"}  # of K and V
W, TILE, PART = 16, 32, 1024  # floats of the widest vector; slots; as in the source
ALL = 2**31 - 1  # a window that hides nothing


class Call(ctypes.Structure):
    """Sizes of one call, see the source."""

    _fields_ = [(name, ctypes.c_int64) for name in ("B", "H", "R", "T", "S", "n_masks", "window")]
    _fields_ += [("cap", ctypes.c_float), ("n_threads", ctypes.c_int)]


@cache
def build(head_dim: int, dtype: torch.dtype) -> Callable[..., None]:
    """The compiled function. Raises whatever a compiler that is missing or broken makes of it."""
    source = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    types = f"#include <cstdint>\nconstexpr int D = {head_dim};\nusing KV = {TYPES[dtype]};\n"
    function = CppCodeCache.load(types + source, extra_flags=("-ffp-contract=fast",)).attend
    function.argtypes, function.restype = [ctypes.c_void_p] * 8, None
    return function


@cache
def runs(device_type: str, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether there is an operator for such a cache on this machine."""
    if device_type != "cpu" or head_dim % 16 or dtype not in TYPES:
        return False
    try:
        build(head_dim, dtype)
    except Exception:  # whatever is wrong with the compiler, flex_attention remains
        return False
    return True


@torch.library.custom_op("magicdec::attend", mutates_args=())
def attend(
    q: Tensor,  # [B, Hkv, G, T, D] float32, scaled; T tokens that follow each other
    k: Tensor,  # [B, Hkv, S, D]; slot s holds the newest position p with p % S == s
    v: Tensor,  # [B, Hkv, S, D]
    start: Tensor,  # [B] int64, position of the first token; -T: nothing is read
    window: int,  # newest tokens that a query sees
    cap: float,  # of scores, see `model.capped`; 0: none
    mask: Tensor | None = None,  # [B, 1 or Hkv, G * T, S] bool: what is seen, instead of all that
) -> Tensor:  # [B, Hkv, G, T, D] float32
    """Attention to all positions up to each query's own; zeros where nothing is read.

    `runs` must have said that it can be.
    """
    (B, H, G, T, D), S = q.shape, k.shape[2]
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    states = q.new_empty(B * H * G * T * -(-S // PART), 2 * W + D + TILE)
    assert k.is_contiguous() and v.is_contiguous() and start.is_contiguous()
    mask = None if mask is None else mask.contiguous()
    n_masks = 1 if mask is None else mask.shape[1]
    sizes = Call(B, H, G * T, T, S, n_masks, window, cap, torch.get_num_threads())
    tensors = (q, k, v, out, states, start, mask)
    pointers = (None if t is None else t.data_ptr() for t in tensors)
    build(D, k.dtype)(ctypes.byref(sizes), *pointers)
    return out


attend.register_fake(lambda q, *_: torch.empty_like(q, memory_format=torch.contiguous_format))
