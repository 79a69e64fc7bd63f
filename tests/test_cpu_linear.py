"""Linear layers by oneDNN: the same layers, where they can be."""

import pytest
import torch
from reference import tiny_model
from torch import nn
from torch.nn.functional import linear

import cpu_linear
from cpu_linear import OneDNNLinear, use_onednn
from kernels import compile_blocks

needed = pytest.mark.skipif(not cpu_linear.runs(), reason="this PyTorch has no oneDNN")


@needed
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 40), (3, 7, 40), (0, 40)])
def test_it_is_a_linear_layer(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(40, 56, bias).requires_grad_(False)
    x = torch.randn(*shape[:-1], 80)[..., ::2]  # not contiguous
    expected = linear(x, layer.weight, layer.bias)
    use_onednn(layer)
    ours = [layer(x), torch.compile(layer, fullgraph=True)(x)]
    assert isinstance(layer, OneDNNLinear)
    for y in ours:
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous() and y.shape == expected.shape


@needed
def test_whole_models_have_them_when_they_are_compiled():
    model = tiny_model()
    compile_blocks(model)
    made = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert len(made) == 9 and {type(layer) for layer in made} == {OneDNNLinear}


@pytest.mark.parametrize("other", ["bfloat16", "trained", "absent"])
def test_what_it_cannot_compute_stays(other, monkeypatch):
    layer = nn.Linear(8, 8).requires_grad_(other == "trained")
    if other == "bfloat16":
        layer.bfloat16()
    if other == "absent":
        monkeypatch.setattr(cpu_linear, "runs", lambda: False)
    use_onednn(layer)
    assert type(layer) is nn.Linear
