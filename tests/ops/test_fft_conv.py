"""fft_conv: the definition against NumPy, the FFT against the definition, properties, and refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.library import opcheck

from hippos.errors import UnsupportedError
from hippos.ops import fft_conv, ssm_conv, ssm_filter
from hippos.ops.fft_conv.spectral import fft_length
from tests.ops.ssm_cases import Draw, leaves, nan_memory, relative_error, tolerance

N_HEADS = 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_inputs(random: Draw, batch: int, seqlen: int, filter_len: int, dtype=torch.float64):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    u, in_gate, out_gate = (random.normal(batch, N_HEADS, seqlen, dtype=dtype) for _ in range(3))
    return [u, random.normal(N_HEADS, filter_len, dtype=exact), random.normal(N_HEADS, dtype=exact), in_gate, out_gate]


def call(inputs, **options):
    u, ssm_filter, d, in_gate, out_gate = inputs
    return fft_conv(u, ssm_filter, d, in_gate=in_gate, out_gate=out_gate, **options)


def output_and_gradients(inputs, dtype=None, **options):
    inputs = leaves(*inputs, dtype=dtype)
    y = call(inputs, **options)
    (y.double() * Draw(seed=1).normal(*y.shape).bfloat16()).sum().backward()
    return [y.detach(), *(x.grad for x in inputs if x is not None)]


def assert_close(found, wanted):
    for left, right in zip(found, wanted, strict=True):
        assert relative_error(left, right) <= tolerance(right, left.dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("seqlen", "filter_len"), [(1, 1), (2, 1), (9, 4), (9, 9)])
def test_reference_is_the_convolution_sum(random, seqlen, filter_len, causal):
    inputs = make_inputs(random, 2, seqlen, filter_len)
    u, taps, d, in_gate, out_gate = (x.numpy() for x in inputs)
    v, wanted = in_gate * u, np.zeros_like(u)
    for t, s in itertools.product(range(seqlen), range(filter_len)):
        if t >= s or not causal:
            wanted[..., t] += taps[:, s] * v[..., t - s]
    wanted = out_gate * (wanted + d[:, None] * v)
    np.testing.assert_allclose(call(inputs, causal=causal, impl="reference").numpy(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "seqlen", "filter_len"),
    [(1, 1, 1), (3, 2, 2), (1, 63, 5), (3, 64, 64), (1, 65, 65), (3, 129, 128), (1, 1000, 300)],
)
def test_torch_is_the_definition(random, batch, seqlen, filter_len, dtype, causal):
    inputs = make_inputs(random, batch, seqlen, filter_len, dtype)
    wanted = output_and_gradients(inputs, torch.float64, causal=causal, impl="reference")
    with nan_memory():
        found = output_and_gradients(inputs, causal=causal, impl="torch")
    assert found[0].dtype == dtype
    assert_close(found, wanted)


@pytest.mark.parametrize("absent", [absent for n in range(4) for absent in itertools.combinations((2, 3, 4), n)])
def test_optional_arguments(random, absent):
    inputs = [None if place in absent else x for place, x in enumerate(make_inputs(random, 2, 40, 30))]
    wanted = output_and_gradients(inputs, impl="reference")
    assert_close(output_and_gradients(inputs, impl="torch"), wanted)


def test_strides(random):
    inputs = make_inputs(random, 3, 40, 30)
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    turned[0] = torch.stack((turned[0], turned[0]), dim=-1)[..., 0]
    assert_close(output_and_gradients(turned), output_and_gradients(inputs))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_gradients(random, impl, causal):
    inputs = leaves(*make_inputs(random, 2, 6, 4))
    assert torch.autograd.gradcheck(lambda *tensors: call(tensors, causal=causal, impl=impl), inputs)


def test_is_what_ssm_conv_computes(random):
    u, _, d, in_gate, out_gate = make_inputs(random, 2, 150, 1)
    modes = random.modes(N_HEADS, 4)
    wanted = ssm_conv(u, *modes, d, in_gate=in_gate, out_gate=out_gate)
    found = fft_conv(u, ssm_filter(*modes, 150), d, in_gate=in_gate, out_gate=out_gate)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_causality(random):
    inputs = make_inputs(random, 2, 50, 50)
    changed = [torch.cat((inputs[0][..., :30], random.normal(2, N_HEADS, 20)), dim=-1), *inputs[1:]]
    before, after = call(inputs), call(changed)
    torch.testing.assert_close(after[..., :30], before[..., :30], rtol=1e-12, atol=1e-12)
    assert (after[..., 30:] != before[..., 30:]).all()


def test_linearity(random):
    first, second = make_inputs(random, 2, 50, 50), make_inputs(random, 2, 50, 50)
    total = call([2 * first[0] - second[0], *first[1:]])
    torch.testing.assert_close(total, 2 * call(first) - call([second[0], *first[1:]]), rtol=1e-11, atol=1e-11)


def test_transforms_are_long_enough_and_not_much_longer():
    for seqlen in range(1, 3000, 7):
        length = fft_length(seqlen, seqlen, causal=True)
        assert 2 * seqlen - 1 <= length <= max(1.34 * (2 * seqlen - 1), 2)
        assert fft_length(seqlen, 1, causal=False) == seqlen


def test_operator_registration(random):
    u, taps, *_ = leaves(*make_inputs(random, 2, 20, 7))
    for causal in (True, False):
        opcheck(torch.ops.hippos.spectral_conv.default, (u, taps, causal))


def test_compiles_as_one_graph_and_exports(random):
    class Convolve(torch.nn.Module):
        def forward(self, *tensors):
            return call(tensors)

    inputs = make_inputs(random, 2, 20, 7)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs), call(inputs))
    program = torch.export.export(Convolve(), tuple(inputs))
    assert not [node for node in program.graph.nodes if "hippos" in str(node.target)]
    torch.testing.assert_close(program.module()(*inputs), call(inputs))


def test_second_derivative_is_refused(random):
    inputs = leaves(*make_inputs(random, 1, 5, 5))
    (d_u,) = torch.autograd.grad(call(inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        d_u.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.zeros(3, 5)}, ValueError, r"u must have shape \(B, H, L\)"),
        ({"u": torch.zeros(2, 3, 0)}, ValueError, "at least one channel and one time step"),
        ({"u": torch.zeros(2, 3, 5, dtype=torch.int32)}, TypeError, "got int32"),
        ({"ssm_filter": torch.zeros(2, 5)}, ValueError, r"ssm_filter must have shape \(H, K\) = \(3, any\)"),
        ({"ssm_filter": torch.zeros(3, 6)}, ValueError, "1 <= K <= L = 5 taps, got 6"),
        ({"ssm_filter": torch.zeros(3, 0)}, ValueError, "1 <= K <= L = 5 taps, got 0"),
        ({"ssm_filter": torch.zeros(3, 5, dtype=torch.complex64)}, TypeError, "got complex64"),
        ({"ssm_filter": torch.zeros(3, 5, device="meta")}, ValueError, "ssm_filter must be on cpu"),
        ({"d": torch.zeros(1)}, ValueError, r"d must have shape \(H\) = \(3\)"),
        ({"in_gate": torch.zeros(2, 3, 4)}, ValueError, "in_gate must have shape"),
        ({"out_gate": torch.zeros(2, 3)}, ValueError, "out_gate must have shape"),
        ({"impl": "fftw"}, ValueError, "impl must be one of"),
        ({"impl": "triton"}, UnsupportedError, "fft_conv"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        fft_conv(**({"u": torch.zeros(2, 3, 5), "ssm_filter": torch.zeros(3, 5)} | change))
