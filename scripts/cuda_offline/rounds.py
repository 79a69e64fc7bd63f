"""Whole rounds of every drafter on tensors without data: would they run, could they be captured?

Attention through flex_attention is left out (it is always compiled, see `kernels`), and what it
would launch with it. Selections are not captured, and could be; to make anew what they start from
waits for nobody but may touch the CPU, and only must run.
"""

import itertools
from unittest import mock

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from config import ModelConfig
from drafters import shared_policies
from policies import POLICIES, Strategy
from sampling import Sampling
from scripts.cuda_offline import pretend
from scripts.cuda_offline.report import Report, here
from spec_decode import Engine

TARGET = ModelConfig(256, 2, 8, 2, 32, 512, 1000, max_seq_len=8192)
DRAFT = ModelConfig(64, 1, 4, 2, 16, 128, 990, max_seq_len=8192)
SHORT = ModelConfig(64, 1, 4, 2, 16, 128, 990, max_seq_len=200)  # cannot read the whole text
STRATEGIES = [
    ("none", None), ("ngram", None), *((policy, None) for policy in POLICIES),
    ("full", DRAFT), *((policy, DRAFT) for policy in shared_policies() if policy != "streaming"),
    ("streaming", SHORT),
]  # fmt: skip


class Watch(TorchDispatchMode):
    """Counts operations that launch a kernel; notes the lines that touch a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.on_cpu = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in func._schema.returns]
        writes = any(a is not None and a.is_write for a in aliases)
        fresh = all(a is None for a in aliases) and "empty" not in func.name()
        self.kernels += writes or (fresh and "_unsafe_view" not in func.name())
        tensors = pytree.tree_leaves((args, kwargs, out))
        if any(isinstance(t, torch.Tensor) and t.device.type == "cpu" for t in tensors):
            self.on_cpu.add(f"{func} at {here()}")
        return out


def outside_blocks(engine: Engine, models: list) -> int:
    """Kernels of an eager round without those of the blocks: what there is to be compiled."""
    layers = [layer for model in models for layer in model.layers]
    for layer in layers:
        layer.forward = lambda x, *rest: x
    with Watch() as around:
        engine.eager_round(engine.gamma)
    for layer in layers:
        del layer.forward
    return around.kernels


def one(report: Report, name: str, strategy: tuple, dtype: torch.dtype, sampling: Sampling) -> None:
    """A round and a selection of one strategy."""
    policy, draft_config = strategy
    with report.case(name) as said, pretend.gpu():
        models = [pretend.model_on_gpu(c, dtype) for c in (TARGET, draft_config) if c]
        strategy = Strategy(policy, 3, 128)
        engine = Engine(models[0], 4, 4096, strategy, sampling, 0, *models[1:])
        with Watch() as watch:
            engine.eager_round(engine.gamma)
        for where in watch.on_cpu:
            report.fail(f"{name}: a round touches the CPU: {where}")
        if engine.drafter:
            engine.drafter.renew()
            with Watch() as watch:
                engine.drafter.select()
            for where in watch.on_cpu:
                report.fail(f"{name}: a selection touches the CPU: {where}")
            said.append(f"{watch.kernels} eager kernels select")
        said.append(
            f"{outside_blocks(engine, models)} eager kernels of a round are outside of blocks"
        )


def check(match: str) -> list[str]:
    """The failures."""
    pretend.install()
    report = Report(match)
    samplings = {"greedy": Sampling(), "sampled": Sampling(0.8, 50, 0.9)}
    attention = mock.patch.object(
        model_module, "flex_attention", lambda q, k, v, **options: torch.empty_like(q)
    )
    with attention:
        for dtype, (how, sampling), strategy in itertools.product(
            (torch.bfloat16, torch.float32), samplings.items(), STRATEGIES
        ):
            who = " by a draft model" if strategy[1] else ""
            name = f"{str(dtype).removeprefix('torch.')} {how} {strategy[0]}{who}"
            if report.wants(name):
                one(report, name, strategy, dtype, sampling)
    return report.end()
