"""The Triton kernels of the model's blocks, as Inductor generates and ptxas compiles them.

Two kinds of cases. *Blocks* are the real ones of Llama-3.1-8B, of Qwen3-8B's kind and of the demo,
with the caches of every part of a round: all their kernels are compiled, and those of a selection.
*Attention* are narrow blocks with attention's real geometry, for many head ratios and lengths: the
kernels of attention alone are compiled. And two whole rounds are generated, to see that everything
that is compiled on a GPU can be, once for all rounds; the launches that are left are counted.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from config import ModelConfig
from kernels import compile_blocks
from kv_cache import CacheSpec, KVCache, SparseKVCache
from policies import POLICIES, Strategy
from quantize import Twins
from sampling import Sampling
from scripts.cuda_offline import inductor, pretend
from scripts.cuda_offline.inductor import Kernel, Launch, Recorder
from scripts.cuda_offline.report import Report
from spec_decode import Engine

SLOTS = 65536 - 64  # of the full cache, so that nothing else is as large as one of its buffers
LENGTHS = (1, 4, 6, 8, 12, 17, 33)
CHUNK = 2048  # a prefill's
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


Caches = tuple[KVCache | SparseKVCache, tuple]  # what is read, and what is written


def full(spec: CacheSpec) -> KVCache:
    return KVCache.empty(spec, SLOTS)


def sparse(spec: CacheSpec) -> SparseKVCache:
    return SparseKVCache(spec, n_selected=4, n_recent=508, gamma=5, n_observed=1)


def full_alone(spec: CacheSpec) -> Caches:
    read = full(spec)
    return read, (read,)


def sparse_alone(spec: CacheSpec) -> Caches:
    read = sparse(spec)
    return read, (read,)


def verifying(spec: CacheSpec) -> Caches:
    read = full(spec)
    return read, (read, sparse(spec))


def observing(spec: CacheSpec) -> Caches:
    return full(spec), (sparse(spec),)


def own_sparse(spec: CacheSpec) -> Caches:
    """What a draft model that selects from its own full cache drafts with."""
    read = sparse(spec)
    return read, (read, full(spec))


@dataclass(frozen=True)
class Case:
    name: str
    config: ModelConfig  # of two layers
    dtype: str
    B: int
    T: int
    caches: Callable[[CacheSpec], Caches] = full_alone
    all_kernels: bool = False  # not only those of attention
    kv_dtype: torch.dtype | None = None  # of the caches, if another
    weights: str = "same"  # of the blocks, or a kind of twin
    exact: bool = False

    @property
    def splits(self) -> bool:
        """Whether attention is to be the split-KV kernel."""
        return self.caches not in (sparse_alone, own_sparse) and self.config.n_group * self.T < 128


def config(dim: int, H: int, Hkv: int, D: int, ffn: int, **more) -> ModelConfig:
    return ModelConfig(dim, 2, H, Hkv, D, ffn, 1000, max_seq_len=131072, **more)


LLAMA = config(4096, 32, 8, 128, 14336)  # Llama-3.1-8B
QWEN = config(4096, 32, 8, 128, 12288, qk_norm=True)  # Qwen3-8B
DEMO = config(256, 4, 4, 128, 704)  # checkpoints/demo
TRAITS = {"attention_cap": 50.0, "post_norms": True, "norm_plus_one": True, "qk_norm": True}
GEMMA = config(3584, 16, 8, 256, 14336, activation="gelu_tanh", sliding_window=4096, **TRAITS)


def blocks() -> Iterator[Case]:
    """Real blocks, all of their kernels."""
    parts = [("plain", 8, 1, full_alone), ("plain", 24, 1, full_alone), ("verify", 8, 6, verifying),
             ("draft", 8, 1, sparse_alone), ("draft model", 8, 2, own_sparse),
             ("observe", 8, 1, observing), ("prefill", 1, CHUNK, full_alone)]  # fmt: skip
    for what, B, T, caches in parts:
        name = f"block Llama {what} bfloat16 B {B} T {T}"
        yield Case(name, LLAMA, "bfloat16", B, T, caches, True)
    for what, B, T, caches in (parts[0], parts[2]):
        name = f"block Llama {what} bfloat16, KV float8 B {B} T {T}"
        yield Case(name, LLAMA, "bfloat16", B, T, caches, True, torch.float8_e4m3fn)
    for B in (8, 24):  # few rows: the cache is cut into pieces
        name = f"block Llama exact verify bfloat16 B {B} T 6"
        yield Case(name, LLAMA, "bfloat16", B, 6, verifying, True, exact=True)
    name = "block Llama draft fp8 weights B 24 T 1"
    yield Case(name, LLAMA, "bfloat16", 24, 1, sparse_alone, True, weights="fp8")
    yield Case("block Qwen verify bfloat16 B 8 T 4", QWEN, "bfloat16", 8, 4, verifying, True)
    for T, B, caches in ((1, 8, full_alone), (6, 8, verifying)):  # a chunk is as large as a ring
        yield Case(f"block Gemma ring bfloat16 B {B} T {T}", GEMMA, "bfloat16", B, T, caches, True)
    for T, B, caches in ((1, 16, full_alone), (6, 16, verifying), (CHUNK, 1, full_alone)):
        yield Case(f"block demo float32 B {B} T {T}", DEMO, "float32", B, T, caches, True)


def attention(dtype: str, G: int, T: int, D: int = 128, exact: bool = False) -> Case:
    B = 1 if T == CHUNK else 8
    narrow, name = config(128, 8 * G, 8, D, 128), f"attention {dtype} G {G} T {T} D {D}"
    return Case(name + " exact" * exact, narrow, dtype, B, T, exact=exact)


def attentions() -> Iterator[Case]:
    """In bfloat16 all; in float32 every tile of queries, and other head dimensions."""
    for G in (1, 4, 7):
        for T in (*LENGTHS, CHUNK):
            yield attention("bfloat16", G, T)
    for G, T in ((1, 33), (4, 1), (4, 4), (4, 12), (4, 17), (4, 33), (4, CHUNK), (7, 6)):
        yield attention("float32", G, T)
    for D in (16, 32, 64):
        yield attention("float32", 4, 6, D)
    yield attention("bfloat16", 4, 17, 64)
    for dtype, G, T in (("bfloat16", 1, 4), ("bfloat16", 7, 8), ("float32", 4, 6)):
        yield attention(dtype, G, T, exact=True)
    for T in (1, 6, 12, 33, CHUNK):
        yield attention("bfloat16", 2, T, 256)


def check_kernel(report: Report, case: Case, kernel: Kernel) -> None:
    """Registers, shared memory, candidates."""
    shown = f"{case.name}: {kernel.name}"
    limit = pretend.H200.shared_memory_per_block_optin
    for build in kernel.builds:
        if build.shared > limit:
            report.fail(f"{shown} needs {build.shared} bytes of shared memory, of {limit}")
        if build.spilled and kernel.is_attention:
            report.fail(f"{shown} spills: ptxas counts {build.spilled} bytes of loads and stores")
        if not build.registers:
            report.fail(f"{shown}: no registers in what ptxas reported")
    if kernel.n_candidates != 1 and kernel.writes:
        report.fail(
            f"{shown} writes to {', '.join(kernel.writes)} and has {kernel.n_candidates} "
            f"candidates: to time them Inductor copies what they write to"
        )


def programs_at_once(kernel: Kernel) -> int:
    """How many programs a multiprocessor holds, by shared memory and registers."""
    gpu, build = pretend.H200, kernel.builds[0]
    by_shared = gpu.shared_memory_per_multiprocessor // (build.shared + 1024)
    by_registers = gpu.regs_per_multiprocessor // (32 * kernel.n_warps * build.registers)
    return min(by_shared, by_registers)


def check_split(report: Report, case: Case, launch: Launch) -> None:
    """All programs of a split-KV kernel should run at once; there is one for each piece anyway.

    Where it is to be exact, pieces are heads, and as many as would have been parts.
    """
    kernel, heads = launch.kernel, dict(launch.arguments)["arg_M"][2]
    tile, split = kernel.settings["BLOCK_M"], kernel.settings["SPLIT_KV"]
    pieces = case.B * heads * -(-case.config.n_group * case.T // tile)
    room = pretend.H200.multi_processor_count * programs_at_once(kernel)
    if case.exact and (split > 1 or pieces > room or 4 * pieces < room):
        report.fail(f"{case.name}: split {split}, {pieces} pieces, of which {room} run at once")
    if split > 1 and split * pieces > room:
        report.fail(f"{case.name}: {split * pieces} programs, of which {room} run at once")


def describe(kernel: Kernel) -> str:
    build, s = kernel.builds[0], kernel.settings
    how = f"split {s['SPLIT_KV']}" if kernel.splits else "not split"
    return (
        f"{how}, tile {s['BLOCK_M']} x {s['BLOCK_N']}, {kernel.n_warps} warps, {build.registers} "
        f"registers, {build.shared} bytes shared, {programs_at_once(kernel)} at once"
    )


def forward(case: Case, model, caches: Caches) -> None:
    """One forward with a mask, positions and closures of its own."""
    with torch.device("cuda"):
        pos = torch.full((case.B, 1), 30000) + torch.arange(case.T)
        tokens = torch.zeros_like(pos)
    model.hidden(tokens, pos, *caches)


def one(report: Report, case: Case, recorder: Recorder) -> None:
    """Compile the case's block; look at what comes out."""
    recorder.clear()
    recorder.builds = "all" if case.all_kernels else "attention"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with report.case(case.name) as said, pretend.gpu():
        model = pretend.model_on_gpu(case.config, DTYPES[case.dtype])
        model.kv_dtype, model.exact = case.kv_dtype, case.exact * (case.T - 1)
        compile_blocks(model)
        if case.weights != "same":
            model = Twins(model).get(case.weights)
        caches = case.caches(CacheSpec.for_model(model, case.B))
        forward(case, model, caches)
        with torch.compiler.set_stance("fail_on_recompile"):
            forward(case, model, caches)
        n_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if n_graphs != 1:
            report.fail(f"{case.name}: {n_graphs} compiled functions for two layers, not 1")
        buffer = max(cache.k[0].nbytes for cache in (caches[0], *caches[1]))
        largest = max(recorder.allocated)
        if largest >= buffer and case.caches is not sparse_alone:
            report.fail(f"{case.name} allocates {largest} bytes, a buffer of the cache is {buffer}")
        for kernel in recorder.kernels:
            check_kernel(report, case, kernel)
        kernels = [kernel for kernel in recorder.kernels if kernel.is_attention]
        if case.splits and not any(kernel.splits for kernel in kernels):
            report.fail(f"{case.name}: attention is not the split-KV kernel")
        for kernel in kernels:
            said.append(describe(kernel))
        for launch in recorder.launches[: len(recorder.launches) // 4]:  # of the first layer
            if launch.kernel.splits:
                check_split(report, case, launch)
        said.append(f"{len(recorder.launches) // 4} Triton launches a layer")


def selecting(report: Report, name: str, policy: str, recorder: Recorder) -> None:
    """A selection at the geometry of Llama-3.1-8B: no kernel spills, and K is not copied."""
    recorder.clear()
    recorder.builds = "all"
    torch._dynamo.reset()
    with report.case(name) as said, pretend.gpu():
        model = pretend.model_on_gpu(LLAMA, torch.bfloat16)
        compile_blocks(model)
        engine = Engine(model, 8, SLOTS, Strategy(policy, 5, 512), Sampling())
        engine.drafter.select()
        recorder.launches.clear()
        with torch.compiler.set_stance("fail_on_recompile"):
            engine.drafter.select()
        for kernel in recorder.kernels:
            check_kernel(report, Case(name, LLAMA, "bfloat16", 8, 1), kernel)
        largest = max(recorder.allocated)
        if largest >= engine.full.k[0].nbytes / 8:
            report.fail(f"{name} allocates {largest} bytes")
        said.append(f"{len(recorder.launches) // 2} Triton launches a layer, {largest} bytes")


def whole_round(report: Report, name: str, sampling: Sampling, recorder: Recorder) -> None:
    """A round of a compiled engine, with what is compiled around the blocks."""
    recorder.clear()
    recorder.builds = "none"
    torch._dynamo.reset()
    with report.case(name) as said, pretend.gpu():
        model = pretend.model_on_gpu(config(256, 8, 2, 32, 512), torch.bfloat16)
        compile_blocks(model)
        engine = Engine(model, 8, 4096, Strategy("streaming", 3, 128), sampling)
        engine.eager_round(3)
        recorder.launches.clear()
        with torch.compiler.set_stance("fail_on_recompile"):
            engine.eager_round(3)
        said.append(f"{len(recorder.launches)} Triton kernels are launched")


def check(match: str) -> list[str]:
    """The failures."""
    pretend.install()
    recorder, report = inductor.install(), Report(match)
    for case in (*blocks(), *attentions()):
        if report.wants(case.name):
            one(report, case, recorder)
    for policy in (policy for policy in POLICIES if POLICIES[policy].observes):
        if report.wants(name := f"block selection {policy}"):
            selecting(report, name, policy, recorder)
    for how, sampling in {"greedy": Sampling(), "sampled": Sampling(0.8, 50, 0.9)}.items():
        if report.wants(name := f"block whole round {how}"):
            whole_round(report, name, sampling, recorder)
    return report.end()
