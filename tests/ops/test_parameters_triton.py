"""The GPU programs between a layer's SSM parameters and its operators: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck

from hippos.layers.ssm_diagonal import DiagonalSSM
from hippos.layers.ssm_shift import ShiftSSM
from hippos.ops.parameters.layers import diagonal_operators_op, shift_operators_op
from tests.ops.ssm_cases import Draw, leaves, relative_error
from tests.ops.test_h3_mix_triton import interpreter

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_layers(n_heads, n_modes, n_taps):
    """An SSM of each kind, away from where they start."""
    torch.manual_seed(0)
    layers = DiagonalSSM(n_heads, 2 * n_modes), ShiftSSM(n_heads, n_taps)
    with torch.no_grad():
        for parameter in (x for layer in layers for x in layer.parameters()):
            parameter += 0.3 * Draw(dtype=torch.float32).normal(*parameter.shape)
    return layers


def outcome(layer):
    """Operators and gradients of all parameters."""
    outputs = layer()
    weights = [Draw(seed=1).normal(*y.shape).to(y) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(layer.parameters()), weights)]


@pytest.fixture
def interpreted_libdevice(monkeypatch):
    """What the interpreter lacks: CUDA's mathematical functions, by numpy."""
    import numpy
    import triton.language as tl

    from hippos.ops.parameters import kernels

    def wrap(function):
        def apply(*values):
            arrays = [value.handle.data for value in values]
            handle = type(values[0].handle)(function(*arrays).astype(numpy.float32), values[0].handle.dtype)
            return tl.core.tensor(handle, values[0].type)

        return apply

    names = {"exp": numpy.exp, "log": numpy.log, "log1p": numpy.log1p, "atan2": numpy.arctan2}
    monkeypatch.setattr(kernels, "libdevice", SimpleNamespace(**{k: wrap(f) for k, f in names.items()}))


@interpreter
@pytest.mark.usefixtures("interpreted_libdevice")
class TestInterpreted:
    @pytest.mark.parametrize("n_modes", [1, 5])
    def test_diagonal(self, n_modes):
        from hippos.ops.parameters.launch import diagonal, diagonal_bwd

        layer = make_layers(3, n_modes, 4)[0]
        wanted = outcome(layer.double())
        layer.float()
        parameters = [x.detach() for x in layer.parameters()]
        found = diagonal(*parameters)
        weights = [Draw(seed=1).normal(*y.shape).to(y) for y in found]
        gradients = [*diagonal_bwd(*parameters[:4], *weights[:2]), *weights[2:]]
        for got, want in zip([*found, *gradients], wanted, strict=True):
            assert got.shape == want.shape
            assert relative_error(got, want) < 1e-5

    @pytest.mark.parametrize("n_taps", [2, 6])
    def test_shift(self, n_taps):
        from hippos.ops.parameters.launch import shift_filter_bwd, shift_filter_fwd

        layer = make_layers(3, 1, n_taps)[1]
        wanted = outcome(layer.double())
        layer.float()
        b, c, d = (x.detach() for x in layer.parameters())
        found = shift_filter_fwd(b, c, d)
        weights = [Draw(seed=1).normal(*y.shape).to(y) for y in found]
        for got, want in zip([*found, *shift_filter_bwd(b, c, weights[0]), weights[1]], wanted, strict=True):
            assert relative_error(got, want) < 1e-5


class TestGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("n_modes", [1, 5, 32])
    def test_operators_and_gradients(self, n_modes):
        for layer in make_layers(40, n_modes, 2 * n_modes):
            wanted = outcome(layer.double())
            layer.float().cuda()
            for got, want in zip(outcome(layer), wanted, strict=True):
                assert relative_error(got.cpu(), want.cpu()) < 1e-6

    def test_results_share_no_memory_with_parameters(self):
        for layer in (layer.cuda() for layer in make_layers(4, 3, 6)):
            addresses = {x.data_ptr() for x in layer.parameters()}
            assert addresses.isdisjoint({x.data_ptr() for x in layer()})

    def test_other_forms_agree_with_the_cpu(self):
        for options in ({"discretisation": "zoh"}, {"real_type": "softplus"}, {"n_ssm": 2}, {"bidirectional": True}):
            layer = DiagonalSSM(4, 6, **options)
            wanted = [x.detach() for x in layer()]
            for got, want in zip(layer.cuda()(), wanted, strict=True):
                assert relative_error(got.cpu(), want) < 1e-5

    def test_opcheck(self):
        diag, shift = (layer.cuda() for layer in make_layers(4, 3, 6))
        opcheck(diagonal_operators_op, tuple(leaves(*diag.parameters())))
        opcheck(shift_operators_op, tuple(leaves(*shift.parameters())))

    def test_compiled_without_a_break(self):
        for layer in (layer.cuda() for layer in make_layers(4, 3, 6)):
            found = torch.compile(layer, fullgraph=True)()
            assert all(torch.equal(got, want) for got, want in zip(found, layer(), strict=True))
