"""What the machine has, as far as it can be told without it, and clocks."""

import time

import pytest
import torch

import device
from device import check_fits, find_device, median_seconds, timed

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu9", "meta", "mps", ""])
def test_a_device_of_another_kind_is_refused(name):
    with pytest.raises(ValueError, match=f"--device {name} is not supported; use cpu, cuda"):
        find_device(name)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with pytest.raises(ValueError, match="--device cuda:2: torch sees 2 GPUs here"):
        find_device("cuda:2")
    assert find_device("cuda:1") == torch.device("cuda:1") == current.pop()
    assert find_device("cuda") == torch.device("cuda")
    assert find_device("cpu") == CPU


def test_too_little_memory_is_said_with_both_numbers():
    with pytest.raises(ValueError, match=r"need 1048576.0 GiB, but cpu has [\d.]+ GiB free"):
        check_fits(2**50, CPU, "they", lambda share: "less")
    check_fits(2**20, CPU, "they", lambda share: "less")


def test_the_remedy_is_told_which_share_would_fit(monkeypatch):
    monkeypatch.setattr(device, "free_memory", lambda device: 2**30)
    with pytest.raises(ValueError, match=r"need 4.0 GiB, but cpu has 1.0 GiB free; use 0.25 of it"):
        check_fits(2**32, CPU, "they", lambda share: f"{share} of it")
    check_fits(2**30, CPU, "they", lambda share: "less")
    monkeypatch.setattr(device, "free_memory", lambda device: None)  # the system does not tell
    check_fits(2**50, CPU, "they", lambda share: "less")


def test_the_pools_of_cuda_graphs_are_not_free(monkeypatch):
    """Free is what the driver says, and what this GPU's shared pool holds without using it."""

    def segment(total: int, active: int, pool=(0, 0), device: int = 1) -> dict:
        return {"device": device, "segment_pool_id": pool, "total_size": total,
                "active_size": active, "allocated_size": active - 1}  # fmt: skip

    segments = [segment(100, 60), segment(30, 1), segment(5000, 2000, pool=(0, 3)),
                segment(700, 1, pool=(2, 0)), segment(900, 1, device=0)]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**9))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for name, free in (("cuda:1", 10**6 + 40 + 29), ("cuda", 10**6 + 69), ("cuda:0", 10**6 + 899)):
        assert device.free_memory(torch.device(name)) == free


def test_a_clock_returns_the_seconds_and_the_result():
    seconds, result = timed(CPU, lambda: time.sleep(0.02) or "done")
    assert 0.02 <= seconds < 5 and result == "done"


def test_the_median_leaves_out_the_run_that_compiles(monkeypatch):
    """Short work is repeated until its sum can be measured, but not for ever."""
    taken = iter([9.0, 0.01, 0.03, 0.02])
    monkeypatch.setattr(device, "timed", lambda device, work: (next(taken), work()))
    assert median_seconds(CPU, lambda: None) == 0.02
    calls = []
    monkeypatch.setattr(device, "timed", lambda device, work: (1e-9, work()))
    median_seconds(CPU, lambda: calls.append(1))
    assert len(calls) == 1 + 20
