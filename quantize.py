"""Low-precision twins: a second copy of a model's matrices, to draft with.

With a sparse cache a draft step reads little but weights, so with half of their bytes it takes
little more than half of its time. The target verifies with its own weights, and its verification
writes K and V into the draft's window. So a twin can lower the acceptance rate, and nothing else.
It is the model itself but for the linear layers of the blocks:

    bf16    bfloat16, beside a float32 target; so are K and V in the draft's cache
    fp8     float8 e4m3, with a scale per row of the weights and per token: Hopper and later
    int8    with a scale per row of the weights; PyTorch has no product that is faster so (LOG.md)

Norms, embedding and output layer are the very same tensors: an error in the output layer would go
straight into the draft.

Where a kind has no kernel it is *emulated*: rounded to that kind, and kept in the model's numbers.
That is no faster. It tells the acceptance on any machine, and `auto` never chooses it. On the demo
(16 texts, gamma 5, budget 128) drafts keep their acceptance within 0.009 in all kinds, greedy and
sampled. The likeliest token is the target's in 99.6% of places with bf16, 99.0% with int8, 94.9%
with fp8. Where it is another one, the draft was mostly wrong anyway.
"""

import copy
import gc

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import WEIGHT_BYTES, ModelConfig
from kernels import compile_blocks
from model import Transformer

KINDS = ("same", *WEIGHT_BYTES)


def by_row(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # [N, K] -> [N, K], [N, 1]
    """Numbers of that dtype, and the float32 scale of each row that makes its largest one fit."""
    largest = (torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / largest
    x = x / scale
    return (x if dtype.is_floating_point else x.round()).to(dtype), scale


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:  # [..., K] -> [..., K]
    """What is left of the numbers after `by_row`."""
    rows, scale = by_row(x.flatten(0, -2), dtype)
    return (rows.float() * scale).to(x.dtype).view_as(x)


class LowLinear(nn.Module):
    """A linear layer with weights of its own, from those of another; the bias is the other's."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:  # [N, K], [N]
        super().__init__()
        self.bias = bias
        for name, tensor in zip(("weight", "scale"), self.keep(weight), strict=False):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias

    @staticmethod
    def keep(weight: Tensor) -> tuple[Tensor, ...]:  # [N, K]
        """Its own weights, and their scales if there are any."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        """Without the bias, in the numbers of x."""
        raise NotImplementedError


class BF16(LowLinear):
    """bfloat16: half of a float32 target's bytes, and products that its processor may have."""

    @staticmethod
    def keep(weight: Tensor) -> tuple[Tensor, ...]:
        return (weight.bfloat16(),)

    def product(self, x: Tensor) -> Tensor:
        # Weights first: a CPU's library then packs the few tokens, not the weights (LOG.md).
        y = (self.weight @ x.bfloat16().flatten(0, -2).T).T
        return y.unflatten(0, x.shape[:-1]).to(x.dtype)


class FP8(LowLinear):
    """float8, both operands scaled by row: in cuBLAS or CUTLASS, for any number of tokens."""

    @staticmethod
    def keep(weight: Tensor) -> tuple[Tensor, ...]:
        weight, scale = by_row(weight, torch.float8_e4m3fn)
        return weight, scale.T.contiguous()  # [N, K], [1, N]

    def product(self, x: Tensor) -> Tensor:
        rows, scale = by_row(x.flatten(0, -2), torch.float8_e4m3fn)
        by = F.ScalingType.RowWise
        y = F.scaled_mm(rows, self.weight.T, scale, by, self.scale, by)  # bfloat16
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class EmulatedFP8(LowLinear):
    """What FP8 would compute, but for the order of its sums."""

    @staticmethod
    def keep(weight: Tensor) -> tuple[Tensor, ...]:
        return (rounded(weight, torch.float8_e4m3fn),)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(rounded(x, torch.float8_e4m3fn), self.weight)


class EmulatedInt8(LowLinear):
    """What int8 weights, each times the scale of its row, would compute."""

    @staticmethod
    def keep(weight: Tensor) -> tuple[Tensor, ...]:
        return (rounded(weight, torch.int8),)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


LAYERS = {  # by kind, and whether it is emulated
    ("bf16", False): BF16,
    ("fp8", False): FP8,
    ("fp8", True): EmulatedFP8,
    ("int8", True): EmulatedInt8,
}


def emulated(kind: str, config: ModelConfig, device: torch.device) -> bool:
    """Whether the device has no kernel for the kind, or none for matrices of these sizes."""
    on_gpu = device.type == "cuda"
    if kind == "fp8":
        sizes = config.dim, config.ffn_dim, config.head_dim
        on_gpu = on_gpu and not torch.version.hip
        hopper = on_gpu and torch.cuda.get_device_capability(device) >= (9, 0)
        return not hopper or any(n % 16 for n in sizes)
    return kind == "int8"


def automatic(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The kind that is faster on this device than the model's own weights; `same` if none is."""
    if not emulated("fp8", config, device):
        return "fp8"
    native = (
        torch.cpu.get_capabilities().get("avx512_bf16") and torch.backends.mkldnn.is_available()
    )
    return "bf16" if device.type == "cpu" and dtype == torch.float32 and native else "same"


def resolve(asked: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The kind that was asked for, or the automatic one. ValueError for the target's own dtype."""
    if asked == "bf16" and dtype == torch.bfloat16:
        raise ValueError("draft_weights bf16: the target's weights are bfloat16 already; use same")
    return automatic(config, device, dtype) if asked == "auto" else asked


def linears(model: Transformer) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of a model's blocks, each with its owner and its name there."""
    return [
        (owner, name, layer)
        for owner in model.layers.modules()
        for name, layer in owner.named_children()
        if isinstance(layer, nn.Linear)
    ]


def layer_class(model: Transformer, kind: str) -> type[LowLinear]:
    """What a twin's linear layers are."""
    return LAYERS[kind, emulated(kind, model.config, model.norm.weight.device)]


@torch.no_grad()
def make_twin(model: Transformer, kind: str) -> Transformer:
    """A second model with the same tensors but for those of its blocks' linear layers."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    layer = layer_class(model, kind)
    for owner, name, linear in linears(twin):
        setattr(owner, name, layer(linear.weight, linear.bias))
    if model.compiled:
        compile_blocks(twin)
    return twin


class Twins:
    """A model's twins. All drafters of a kind share one."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.made: dict[str, Transformer] = {}  # by kind

    def get(self, kind: str) -> Transformer:
        """The twin of that kind, made where there is none; `same` is the model itself."""
        if kind == "same":
            return self.model
        if kind not in self.made:
            self.made[kind] = make_twin(self.model, kind)
        return self.made[kind]

    def keep(self, kinds: set[str]) -> None:
        """Forget those of other kinds. Their memory is free if nobody else refers to them."""
        if self.made.keys() - kinds:
            self.made = {kind: twin for kind, twin in self.made.items() if kind in kinds}
            gc.collect()  # compiled blocks refer to themselves

    def n_bytes(self, kind: str) -> int:
        """What `get` would allocate."""
        if kind == "same" or kind in self.made:
            return 0
        keep = layer_class(self.model, kind).keep
        weights = (linear.weight.to("meta") for *_, linear in linears(self.model))
        return sum(tensor.nbytes for weight in weights for tensor in keep(weight))
