"""The MLP's operator against its definition: on a CPU, in Triton's interpreter, and on a GPU (marked gpu)."""

from __future__ import annotations

import os

import pytest
import torch

from hippos.errors import UnsupportedError
from hippos.ops.gelu_mlp import gelu_mlp

# numpy 2 warns of a conversion in Triton's own code.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1")


def make(generator, shape, d_ff, dtype, weight_dtype, device="cpu"):
    width = shape[-1]
    u = torch.randn(shape, generator=generator)
    w1 = torch.randn(d_ff, width, generator=generator) / width**0.5
    b1 = torch.randn(d_ff, generator=generator)
    w2 = torch.randn(width, d_ff, generator=generator) / d_ff**0.5
    dout = torch.randn(shape, generator=generator).to(dtype).to(device)
    tensors = (u.to(dtype), w1.to(weight_dtype), b1.to(weight_dtype), w2.to(weight_dtype))
    return [x.to(device).requires_grad_() for x in tensors], dout


def run(tensors, dout, **options):
    y = gelu_mlp(*tensors, **options)
    return [y.detach(), *torch.autograd.grad(y, tensors, dout.to(y.dtype))]


def check(generator, shape, d_ff, dtype, weight_dtype, device, **options):
    tensors, dout = make(generator, shape, d_ff, dtype, weight_dtype, device)
    exact = [x.detach().to(dtype).double().requires_grad_() for x in tensors]
    wanted = run(exact, dout, impl="reference")
    found, usual = run(tensors, dout, impl="triton", **options), run(tensors, dout, impl="torch")
    for got, other, right in zip(found, usual, wanted, strict=True):
        assert got.dtype == other.dtype
        assert got.shape == other.shape
        error, usual_error = (float((x.double() - right).norm() / right.norm()) for x in (got, other))
        assert error < max(1.5 * usual_error, 2e-6)


@interpreted
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.float32)])
@pytest.mark.parametrize(("shape", "d_ff"), [((1, 8), 16), ((3, 7, 24), 96), ((50, 16), 600)])
def test_kernels_in_the_interpreter(generator, shape, d_ff, dtypes, recomputes):
    check(generator, shape, d_ff, *dtypes, "cpu", recomputes=recomputes)


@interpreted
def test_large_inputs_in_the_interpreter():
    u = torch.tensor([[-200.0], [-30.0], [0.0], [30.0], [200.0]], requires_grad=True)
    one, zero = torch.ones(1, 1), torch.zeros(1)
    y = gelu_mlp(u, one, zero, one, impl="triton")
    (du,) = torch.autograd.grad(y.sum(), u)
    torch.testing.assert_close(y.detach(), u.detach().clamp(min=0))
    torch.testing.assert_close(du, torch.tensor([[0.0], [0.0], [0.5], [1.0], [1.0]]))


@pytest.mark.gpu
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(
    ("shape", "d_ff"), [((1, 8), 16), ((50, 16), 600), ((2, 1000, 768), 3072), ((5, 1000, 768), 3072)]
)
def test_kernels_on_a_gpu(generator, shape, d_ff, dtypes, recomputes):
    check(generator, shape, d_ff, *dtypes, "cuda", recomputes=recomputes)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputes", [False, True])
def test_the_operator_keeps_its_promises(generator, weight_dtype, recomputes):
    tensors, _ = make(generator, (2, 30, 16), 64, torch.bfloat16, weight_dtype, "cuda")
    args = (*tensors, True, recomputes)
    torch.library.opcheck(torch.ops.hippos.gelu_mlp, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
def test_gradients_of_float32_weights_are_not_rounded(generator):
    tensors, dout = make(generator, (4096, 64), 256, torch.bfloat16, torch.float32, "cuda")
    _, _, dw1, _, dw2 = run(tensors, dout, impl="triton")
    for gradient in (dw1, dw2):
        assert not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.skipif(IS_INTERPRETED, reason="Triton's interpreter runs on a CPU")
def test_what_is_refused(generator):
    tensors, _ = make(generator, (3, 8), 16, torch.float32, torch.float32)
    with pytest.raises(UnsupportedError, match="it needs CUDA tensors, got cpu"):
        gelu_mlp(*tensors, impl="triton")
    with pytest.raises(UnsupportedError, match="not float64"):
        gelu_mlp(*(x.double() for x in tensors), impl="triton")
    with pytest.raises(ValueError, match=r"got \(3, 8\), \(16, 8\), \(15,\) and \(8, 16\)"):
        gelu_mlp(tensors[0], tensors[1], torch.zeros(15), tensors[3])
    with pytest.raises(TypeError, match="one dtype"):
        gelu_mlp(tensors[0], tensors[1], tensors[2], tensors[3].double())
