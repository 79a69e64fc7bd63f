"""torch.compile for a GPU that is not there: Triton kernels are compiled, recorded, not launched.

Inductor generates code as for the pretended H200. Where it would load and launch a kernel, the
hooks here compile it with Triton down to a cubin, if that is asked for, and keep what ptxas says.
`install` changes torch and Triton for the rest of the process.
"""

import logging
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch._dynamo import device_interface
from torch._inductor import config
from torch._inductor.fx_passes import fuse_attention
from torch._subclasses.fake_impls import register_op_impl

from scripts.cuda_offline import pretend
from scripts.cuda_offline.report import scratch

PTXAS_SECONDS = 60  # a kernel that takes longer is a failure: it spills, and compiles for minutes


class Build(NamedTuple):
    """What ptxas made of one kernel."""

    shared: int  # bytes per program
    registers: int  # per thread
    spilled: int  # bytes stored to and loaded from local memory


@dataclass
class Kernel:
    """A Triton kernel that Inductor generated."""

    name: str
    settings: dict  # of a template: tile sizes and so on
    n_candidates: int  # versions that Inductor would time against each other
    writes: list[str]  # arguments that it changes in place
    n_warps: int
    builds: list[Build] = field(default_factory=list)
    function: str = ""  # its name in the generated source
    file: str = ""  # which is here

    @property
    def is_attention(self) -> bool:
        return "_tem_" in self.name

    @property
    def splits(self) -> bool:
        return "SPLIT_KV" in self.settings


class Launch(NamedTuple):
    kernel: Kernel
    arguments: list[tuple[str, object]]  # name; shape of a tensor, or a number


class Ptxas:
    """Stands for the module subprocess in Triton's compiler: bounds ptxas, and keeps its report."""

    def __init__(self) -> None:
        self.report = ""

    def __getattr__(self, name: str) -> object:
        return getattr(subprocess, name)

    def run(self, command: list[str], stderr, **options) -> subprocess.CompletedProcess:
        done = subprocess.run(command, stderr=stderr, timeout=PTXAS_SECONDS, **options)
        self.report = Path(stderr.name).read_text()
        return done

    def number(self, pattern: str) -> int:
        return sum(map(int, re.findall(pattern, self.report)))


class Recorder:
    """What was generated, launched and allocated since `clear`."""

    def __init__(self) -> None:
        self.builds = "attention"  # which kernels are compiled to a cubin: also all, none
        self.ptxas = Ptxas()
        self.clear()

    def clear(self) -> None:
        self.kernels: list[Kernel] = []
        self.launches: list[Launch] = []
        self.allocated: list[int] = []  # bytes

    def precompile(self, autotuner, *args, **kwargs) -> None:
        """In place of CachingAutotuner.precompile: build every candidate."""
        meta, candidates = autotuner.inductor_meta, list(autotuner.configs)
        kernel = Kernel(
            meta["kernel_name"], meta.get("config_args", {}), len(candidates),
            list(autotuner.mutated_arg_names), candidates[0].num_warps,
            function=autotuner.fn.fn.__name__, file=autotuner.fn.fn.__code__.co_filename,
        )  # fmt: skip
        self.kernels.append(kernel)
        autotuner.offline = kernel
        if self.builds == "none" or (self.builds == "attention" and not kernel.is_attention):
            return
        for candidate in candidates:
            self.ptxas.report = ""
            metadata = autotuner._precompile_config(candidate).kernel.metadata
            spilled = self.ptxas.number(r"(\d+) bytes spill")
            registers = self.ptxas.number(r"Used (\d+) registers")
            kernel.builds.append(Build(metadata.shared, registers, spilled))

    def run(self, autotuner, *args, **kwargs) -> None:
        """In place of CachingAutotuner.run: launch nothing."""
        values = [[*a.shape] if isinstance(a, torch.Tensor) else a for a in args]
        names = [*autotuner.fn.arg_names, *(f"grid_{i}" for i in range(len(args)))]
        arguments = list(zip(names, values, strict=False))
        self.launches.append(Launch(autotuner.offline, arguments))

    def allocate(self, size: tuple, stride: tuple, dtype: torch.dtype) -> torch.Tensor:
        t = torch.empty_strided(size, stride, dtype=dtype, device="cuda")
        self.allocated.append(t.untyped_storage().nbytes())
        return t


class Driver:
    """What Triton and Inductor ask a driver for while they compile."""

    def __init__(self, target) -> None:
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda

    def is_active(self) -> bool:
        return True


def prepare_environment() -> None:
    """Compile every kernel anew, in a folder of its own; before Triton is imported."""
    folder = scratch()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    for name in ("runtime.triton_heuristics", "utils"):  # they print what is a failure anyway
        logging.getLogger(f"torch._inductor.{name}").setLevel(logging.CRITICAL)
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # what ptxas reports is not in a cache


def install() -> Recorder:
    """Hook Inductor and Triton; `pretend.install` comes first."""
    prepare_environment()
    import triton
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler

    recorder = Recorder()
    compiler.subprocess = recorder.ptxas
    triton.runtime.driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
    triton_helpers.set_driver_to_gpu = lambda: None
    CachingAutotuner.precompile = lambda self, *a, **k: recorder.precompile(self, *a, **k)
    CachingAutotuner.run = lambda self, *a, **k: recorder.run(self, *a, **k)
    config.compile_threads = 1
    config.force_disable_caches = True
    config.use_static_triton_launcher = False  # it keeps nothing of what Triton says of a kernel
    config.shape_padding = False  # it times matrix products,
    config.joint_graph_constant_folding = False  # and this computes with real tensors
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    hook_wrapper(recorder)
    hook_device_interface()
    trace_patterns_on_cpu()
    know_scaled_products()
    return recorder


def hook_wrapper(recorder: Recorder) -> None:
    """The C++ helpers that generated wrappers import do not know tensors without data."""
    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = recorder.allocate
    guards._reinterpret_tensor = lambda t, *geometry: torch.as_strided(t, *geometry)
    guards.assert_size_stride = lambda *args: None


def hook_device_interface() -> None:
    """Dynamo's and Inductor's own view of the device."""
    device_interface.get_interface_for_device("cuda")  # which registers it
    interface = device_interface.CudaInterface
    answers = {
        "get_compute_capability": 90, "get_device_properties": pretend.H200, "device_count": 1,
        "get_raw_stream": 0, "current_device": 0, "is_available": True,
    }  # fmt: skip
    for name, value in answers.items():
        setattr(interface, name, staticmethod(lambda *args, value=value: value))
    for name in ("get_device_properties", "current_device"):
        setattr(interface.Worker, name, getattr(interface, name))


def trace_patterns_on_cpu() -> None:
    """Inductor traces its patterns of attention with real tensors, on the GPU if there is one."""
    original = fuse_attention._sfdp_init

    def on_cpu(*device: torch.device):
        available, torch.cuda.is_available = torch.cuda.is_available, lambda: False
        try:
            return original(*(torch.device("cpu") for _ in device))
        finally:
            torch.cuda.is_available = available

    fuse_attention._sfdp_init = on_cpu


def know_scaled_products() -> None:
    """Fake tensors have the rules of a scaled product, but not for one into a given tensor."""
    product = torch.ops.aten._scaled_mm

    @register_op_impl(product.out)
    def into(mode, func, *args, out: torch.Tensor, **kwargs) -> torch.Tensor:
        assert product.default(*args, **kwargs).shape == out.shape
        return out
