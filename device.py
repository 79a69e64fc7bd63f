"""What the machine has (devices, memory, compiler, kernels), and how long work takes on it.

Work on a GPU is only queued by the call that asks for it, so a clock is read when the device has
nothing left to do. `timed` is one such reading, `median_seconds` a repeated one.

Where several processes run one model together (`parallel.py`), what they decide must not depend on
which of them asks. Then the time of some work is that of the slowest, and free is what is free on
all of them.
"""

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def several_ranks() -> bool:
    """Whether other processes run the same model with this one."""
    return dist.is_available() and dist.is_initialized()


def first_rank() -> bool:
    """Whether this process writes files for all of them: it is rank 0, or alone."""
    return not several_ranks() or dist.get_rank() == 0


def agreed(value: float, which: str = "max") -> float:
    """The largest value of all ranks, or the least ("min"); alone, the value."""
    if not several_ranks():
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(shared, dist.ReduceOp.MAX if which == "max" else dist.ReduceOp.MIN)
    return shared.item()


def find_device(name: str) -> torch.device:
    """The device of that name, made the current one. ValueError if this machine has not got it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(device)  # streams and graphs are of the current device
    return device


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where the system does not tell.

    A CPU is shared with the processes that `torchrun` has started beside this one.
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
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(fields["MemAvailable"].split()[0]) * 1024 // n_processes


def check_fits(
    n_bytes: int,
    device: torch.device,
    what: str,
    remedy: Callable[[float], str],  # is told which share of what is needed would fit
) -> None:
    """ValueError with both numbers and the remedy if the device has not that much memory free."""
    free: float | None = free_memory(device)
    if free is not None and n_bytes > (free := agreed(free, "min")):
        raise ValueError(
            f"{what} need {n_bytes / 2**30:.1f} GiB, but {device} has "
            f"{free / 2**30:.1f} GiB free; use {remedy(free / n_bytes)}"
        )


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    kind = f"{names[0]}, {len(names)} CPUs" if names else platform.machine()
    return f"{kind}, {torch.backends.cpu.get_cpu_capability()}"


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, not torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def machine(device: torch.device) -> dict:
    """Device, versions and threads: what a figure of this process depends on."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of this process: its tensors on a GPU, all of its memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def median_seconds(device: torch.device, work: Callable[[], object], repeats: int = 3) -> float:
    """Median seconds of the work, after one run that may compile; short work is repeated more."""
    seconds: list[float] = []
    timed(device, work)
    while len(seconds) < repeats or (sum(seconds) < 0.03 and len(seconds) < 20):
        seconds.append(timed(device, work)[0])
    return statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds that the work took, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return agreed(time.perf_counter() - start), result
