"""An H200 that is not there: torch answers as if it had one, and its tensors hold no data.

A fake tensor knows its shape, dtype and device. Operations on it run the checks and shape rules of
the real ones and compute nothing; a value that is asked for raises. `install` changes torch for
the rest of the process, so it is for processes that do nothing else.
"""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from config import ModelConfig
from model import Transformer
from scripts.cuda_offline.report import scratch

H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 2**30,
    warp_size=32, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    regs_per_multiprocessor=65536, shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10, shared_memory_per_multiprocessor=228 * 2**10,
    L2_cache_size=60 * 2**20, gcnArchName="", is_integrated=0, clock_rate=1980000,
    memory_clock_rate=3201000, memory_bus_width=6144,
)  # fmt: skip
# In a CPU build of torch nobody switches devices, without which a view of a fake tensor raises.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
"""


def load_guard() -> None:
    """Compile and load GUARD."""
    folder, home = scratch(), Path(torch.__file__).parent
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    command = ["g++", "-std=c++20", "-fPIC", "-shared", f"-I{home / 'include'}", str(source)]
    command += ["-o", str(library), f"-L{home / 'lib'}", "-lc10"]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library))


def install() -> None:
    """Make torch believe in one H200."""
    load_guard()
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "get_device_properties": H200, "get_device_capability": (H200.major, H200.minor),
        "get_device_name": H200.name, "is_bf16_supported": True, "synchronize": None,
        "set_device": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "_lazy_init": None,
        "mem_get_info": (H200.total_memory, H200.total_memory), "memory_snapshot": [],
        "graph_pool_handle": None, "Stream": None, "Event": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
    }  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *args, value=value, **kwargs: value)
    torch.version.cuda = torch.version.cuda or "13.0"
    fake_tensor.init_gpu_context = lambda device: None


@contextmanager
def gpu() -> Iterator[None]:
    """Inside, tensors have no data, and attention to full caches goes through flex_attention."""
    flex = mock.patch.object(Transformer, "flex", True)
    with flex, torch.inference_mode(), FakeTensorMode():
        yield


def model_on_gpu(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A model without weights, inside of `gpu`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model = Transformer(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    return model
