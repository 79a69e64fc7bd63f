"""What flex_attention and the compiler are told, by the numbers that ptxas gave for Hopper."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kernels import compile_blocks, compiler_runs, flex_runs, kernel_options, query_tile
from kv_cache import CacheSpec
from tests.reference import tiny_model

CPU = torch.device("cpu")


def cuda_options(monkeypatch, B: int, T: int, contiguous=True, **changes) -> dict | None:
    """The kernel options on a GPU of 132 multiprocessors; 8 KV heads of 4 query heads each."""
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    spec = CacheSpec((None,), B, 8, 128, 4, torch.bfloat16, torch.device("cuda"), True)
    return kernel_options(replace(spec, **changes), B, T, contiguous)


def test_a_query_tile_is_a_power_of_two_of_at_least_16():
    sizes = {n: query_tile(n) for n in (1, 15, 16, 17, 32, 33, 64, 65, 127)}
    assert sizes == {1: 16, 15: 16, 16: 16, 17: 32, 32: 32, 33: 64, 64: 64, 65: 128, 127: 128}


@pytest.mark.parametrize("G, T, warps", [
    (4, 1, 2), (4, 4, 2), (4, 8, 2), (4, 9, 4), (4, 16, 4), (4, 17, 8), (4, 31, 8),
    (7, 4, 2), (7, 9, 4), (7, 10, 8), (1, 1, 2), (1, 33, 4),
])  # fmt: skip
def test_warps_grow_with_the_folded_queries(monkeypatch, G, T, warps):
    """With two warps for a tile of 128 queries ptxas spills 50 KB per thread block."""
    options = cuda_options(monkeypatch, 8, T, n_group=G)
    assert options["num_warps"] == warps and options["num_stages"] == 3
    assert "BLOCK_M" not in options and "BLOCK_N" not in options  # the kernel's own, 64 slots


@pytest.mark.parametrize("G, T, tile", [(4, 1, 16), (4, 6, 32), (4, 17, 32), (1, 33, 32)])
def test_float32_has_small_tiles(monkeypatch, G, T, tile):
    """Its products are not on tensor cores: every other tile spills where D is 128."""
    options = cuda_options(monkeypatch, 8, T, n_group=G, dtype=torch.float32)
    assert (options["BLOCK_M"], options["BLOCK_N"]) == (tile, 32)
    assert (options["num_warps"], options["num_stages"]) == (8, 2)


@pytest.mark.parametrize("T, tile, warps", [(1, 16, 2), (8, 32, 4), (17, 32, 4), (31, 32, 4)])
def test_wide_heads_have_small_tiles(monkeypatch, T, tile, warps):
    """With D = 256 a tile of 128 queries takes more shared memory than Hopper has."""
    options = cuda_options(monkeypatch, 8, T, head_dim=256)
    assert (options["BLOCK_M"], options["num_warps"], options["num_stages"]) == (tile, warps, 2)
    assert "BLOCK_M" not in cuda_options(monkeypatch, 8, T, head_dim=128)
    assert cuda_options(monkeypatch, 1, 2048, head_dim=256) is None


def test_prefill_keeps_the_kernels_own_options_but_in_float32(monkeypatch):
    assert cuda_options(monkeypatch, 1, 2048) is None
    assert cuda_options(monkeypatch, 8, 32) is None  # 128 folded queries
    options = cuda_options(monkeypatch, 1, 2048, dtype=torch.float32)
    assert options == {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    spec = CacheSpec.for_model(tiny_model(), 1)
    assert kernel_options(spec, 1, 1) is None  # on the CPU


def test_only_blocks_that_follow_each_other_are_said_to(monkeypatch):
    for contiguous in (True, False):
        options = cuda_options(monkeypatch, 8, 1, contiguous)
        assert options["BLOCKS_ARE_CONTIGUOUS"] == contiguous


def test_slots_are_split_among_as_many_programs_as_run_at_once(monkeypatch):
    splits = [cuda_options(monkeypatch, B, 1)["SPLIT_KV"] for B in (1, 8, 16, 24, 64)]
    assert splits == [49, 6, 3, 2, 1]  # 3 * 132 programs for B * 8 heads
    splits = [cuda_options(monkeypatch, 4, T)["SPLIT_KV"] for T in (1, 8, 16, 17)]
    assert splits == [12, 8, 8, 4]  # 3, 2, 2 and 1 programs per multiprocessor
    swept = [cuda_options(monkeypatch, 8, 6, programs_per_sm=n)["SPLIT_KV"] for n in (1, 2, 3, 4)]
    assert swept == [2, 4, 6, 8]
    f32 = {"dtype": torch.float32}
    splits = [cuda_options(monkeypatch, 8, T, **f32)["SPLIT_KV"] for T in (1, 9, 17)]
    assert splits == [6, 2, 1]  # 1, 2 and 3 tiles of at most 32 queries


@pytest.mark.parametrize(
    "capability, runs",
    [("AVX2", True), ("AVX512", True), ("NO AVX", False), ("DEFAULT", False), ("SVE256", False)],
)
def test_flex_attention_on_the_cpu_needs_avx2(monkeypatch, capability, runs):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert flex_runs(CPU) == runs
    assert flex_runs(torch.device("cuda"))


def test_a_compiler_that_is_missing_is_noticed_before_the_cache_hides_it(monkeypatch):
    def broken(f):
        raise RuntimeError("no such target")

    monkeypatch.setattr(torch, "compile", lambda f: f)  # as if all were in the cache
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        assert not compiler_runs(CPU)
    with torch._inductor.config.patch({"cpp.cxx": (None, "python"), "cpp.vec_isa_ok": None}):
        assert compiler_runs(CPU)
        monkeypatch.setattr(torch, "compile", broken)
        assert not compiler_runs(CPU)


def test_a_compiler_that_lacks_what_the_cpu_names_is_asked_what_it_has(monkeypatch):
    def compile_for(f):
        if torch._inductor.config.cpp.vec_isa_ok:
            raise RuntimeError("unrecognized command-line option -mavx512f")
        return f

    monkeypatch.setattr(torch, "compile", compile_for)
    with torch._inductor.config.patch({"cpp.cxx": (None, "python"), "cpp.vec_isa_ok": None}):
        assert compiler_runs(CPU) and torch._inductor.config.cpp.vec_isa_ok is None


@pytest.mark.parametrize("device, options", [
    ("cpu", None), ("cuda", {"triton.autotune_pointwise": False, "deterministic": True}),
])  # fmt: skip
def test_no_kernel_is_autotuned_on_cuda(device, options):
    """Autotuning copies what a kernel writes to: whole buffers of the cache."""
    compiled = []
    block = SimpleNamespace(compile=lambda **settings: compiled.append(settings))
    weight = SimpleNamespace(device=torch.device(device))
    norm = SimpleNamespace(weight=weight)
    compile_blocks(SimpleNamespace(layers=[block] * 2, norm=norm, modules=lambda: []))
    assert compiled == [{"fullgraph": True, "dynamic": False, "options": options}] * 2
    for name, value in (options or {}).items():
        with torch._inductor.config.patch({name: value}):  # an error if there is no such setting
            pass
