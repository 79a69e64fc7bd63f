"""What the compiler and the attention kernels are told.

Blocks are compiled one by one, into one function that all layers share: a 32-layer model compiles
as fast as a 2-layer one. Attention is flex_attention. On a CPU with AVX2 it becomes C++, for a
prefill; few queries have an operator of their own (`cpu_attention.py`), and linear layers are
oneDNN's (`cpu_linear.py`). On CUDA it becomes one of two Triton kernels: one for prefill, and for
few queries a split-KV kernel, which divides the slots of each row among its programs. Left to
themselves these kernels waste a Hopper GPU in ways that can be counted without one
(`scripts/check_cuda_offline.py`): registers that are spilled, shared memory, programs that run at
once. No time has been measured yet.
"""

import shutil
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._inductor.cpu_vec_isa import valid_vec_isa_list

from cpu_linear import use_onednn

Q_BLOCK = 128  # queries per flex_attention block
# Programs of the split-KV kernel that a multiprocessor of Hopper runs at once, by tile of queries:
# as many as its shared memory holds, and for 128 its registers (D = 128, 16 bits).
PROGRAMS_PER_SM = {16: 3, 32: 2, 64: 2, 128: 1}
STEP_LAYERS = 8  # most that are compiled into one function


def flex_runs(device: torch.device) -> bool:
    """Whether compiled flex_attention has a kernel for the device (CPU: x86 with AVX2)."""
    # Not `in`: a CPU without it is said to have "NO AVX".
    return device.type == "cuda" or torch.backends.cpu.get_cpu_capability().startswith("AVX")


def compiler_runs(device: torch.device) -> bool:
    """Whether torch.compile works for the device on this machine: the CPU needs a C++ compiler."""
    compilers = [name for name in torch._inductor.config.cpp.cxx if name]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        return False  # asked first, because a warm cache would hide it from the probe below
    # Inductor would build and load a library for each set of vector instructions that the CPU
    # names, 8 seconds. What is compiled here, and needs PyTorch's vector functions, tells as much.
    for trusted in (True, None):
        torch._inductor.config.cpp.vec_isa_ok = trusted
        try:
            torch.compile(torch.exp)(torch.ones(3, device=device))
        except Exception:  # whatever is missing or broken: in the end, the answer is to run eagerly
            valid_vec_isa_list.cache_clear()
        else:
            return True
    return False


def compile_options(device: torch.device) -> dict | None:
    """Settings of Inductor. On CUDA nothing is autotuned, see `compile_blocks`."""
    one_version = {"triton.autotune_pointwise": False, "deterministic": True}
    return one_version if device.type == "cuda" else None


def compile_blocks(model) -> None:  # a model.Transformer
    """Compile every block, in place, into one shared function per (T, cache geometry).

    Before, linear layers become oneDNN's, where they can. On CUDA nothing is autotuned: Inductor
    would time several versions of the kernel that writes the cache, each on copies of all that it
    writes to, two whole buffers of the cache. That kernel is elementwise, or, where keys are
    normalised, a reduction.
    """
    # One entry per T and cache: few, but more than the default of 8. It is for the whole process,
    # because it counts where a new shape is run for the first time, in anybody's code.
    torch._dynamo.config.recompile_limit = 64
    use_onednn(model)
    options = compile_options(model.norm.weight.device)
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False, options=options)
    model.compiled = True


def serve_any_length(tensors: Iterable[Tensor]) -> None:  # [B, T, ...], T at least 2
    """Let what is called with these be compiled once for all T: a third of the time for 3 of them.

    Only for a CPU, where nothing but loops depends on T. A kernel of CUDA is made for its T.
    """
    for tensor in {id(tensor): tensor for tensor in tensors}.values():
        torch._dynamo.mark_dynamic(tensor, 1)


def compile_step(step: Callable, model) -> Callable | None:  # what a drafter does with that model
    """A whole forward of a draft as one function; None where blocks alone are compiled.

    On a CPU each call of a compiled function first checks what it was compiled for, block by block,
    and between blocks there is Python: a sixth of a draft step of the demo. Compiling takes longer
    with every layer. On a GPU a captured round has neither.
    """
    on_cpu = model.norm.weight.device.type == "cpu"
    if not (model.compiled and on_cpu and len(model.layers) <= STEP_LAYERS):
        return None
    return torch.compile(step, fullgraph=True, dynamic=False)


def query_tile(n_query: int) -> int:
    """Folded queries that the split-KV kernel computes at a time: a power of two, at least 16."""
    return max(1 << (n_query - 1).bit_length(), 16)


def kernel_options(
    spec,  # a kv_cache.CacheSpec: heads, dtype, device
    B: int,
    T: int,  # queries per row
    contiguous: bool = True,  # the blocks that a row visits follow each other; not so in a ring
) -> dict | None:
    """Settings of the kernels of flex_attention on CUDA; None where its own are good.

    A tile of queries that registers cannot hold is spilled to memory, hundreds of times per tile of
    K. So warps grow with the tile, and float32, which multiplies without tensor cores, has small
    tiles, and so have wide heads.

    Fewer than 128 folded queries take the split-KV kernel. By itself it has no pipeline on Hopper,
    and too few programs for ragged rows. Here it has as many as run at once.
    """
    n_query = spec.n_group * T
    if spec.device.type != "cuda":
        return None
    tile, options = query_tile(n_query), {}
    if spec.dtype == torch.float32:
        tile = min(tile, 32)
        options = {"BLOCK_M": tile, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if n_query >= Q_BLOCK:
        return options or None
    if spec.head_dim > 128 and not options:
        tile = min(tile, 32)
        options = {"BLOCK_M": tile, "num_warps": tile // 8, "num_stages": 2}
    n_sm = torch.cuda.get_device_properties(spec.device).multi_processor_count
    n_pieces = B * spec.n_kv_head * -(-n_query // tile)
    split = max((spec.programs_per_sm or PROGRAMS_PER_SM[tile]) * n_sm // n_pieces, 1)
    decoding = {"SPLIT_KV": split, "BLOCKS_ARE_CONTIGUOUS": contiguous}
    return {"num_warps": max(tile // 16, 2), "num_stages": 3} | decoding | options
