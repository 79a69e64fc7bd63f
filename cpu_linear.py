"""Linear layers in float32 on the CPU: oneDNN's, in place of those that F.linear takes.

PyTorch gives products in float32 to MKL. For the few tokens of a decoding step oneDNN, which is in
PyTorch too, takes between a third and nine tenths of MKL's time (LOG.md; measured on one AMD EPYC;
a call costs 15 microseconds more, which tiny layers feel). Inductor takes its operator for weights
that are constants, and ours are inputs of a function that all layers share. So it is called inside
an operator that Inductor knows nothing about.
"""

import torch
from torch import Tensor, nn
from torch.library import Library, register_fake

LIBRARY = Library("magicdec", "FRAGMENT")  # custom_op would add 10 microseconds to every call
LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def linear(
    x: Tensor,  # [..., K] float32
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor:  # [..., N]
    """x @ weight.T + bias; there is no derivative. `runs` must have said that it can be."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


LIBRARY.impl("linear", linear, "CPU")
register_fake(
    "magicdec::linear", lambda x, weight, _: x.new_empty(*x.shape[:-1], len(weight)), lib=LIBRARY
)


def runs() -> bool:
    """Whether this PyTorch has oneDNN and its operator, which is not a documented one."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class OneDNNLinear(nn.Linear):
    """The same layer, for decoding."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return torch.ops.magicdec.linear(x, self.weight, self.bias)


def use_onednn(model: nn.Module) -> None:
    """Give it such layers, in place: on the CPU, in float32, where nothing is trained."""
    for layer in model.modules():
        if type(layer) is nn.Linear and runs():
            weight = layer.weight
            if weight.is_cpu and weight.dtype == torch.float32 and not weight.requires_grad:
                layer.__class__ = OneDNNLinear
