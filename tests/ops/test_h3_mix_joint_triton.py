"""The mixing of signals in one tensor is the mixing of three, forward and backward."""

from __future__ import annotations

import os

import pytest
import torch
from torch.library import opcheck

from hippos.layers import H3
from hippos.ops import h3_mix
from hippos.ops.h3_mix.joint import h3_mix_joint, h3_mix_joint_op
from tests.ops.ssm_cases import Draw, leaves, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")]


def make_inputs(batch, d_model, seqlen, n_taps, n_modes, dtype):
    """qkv as one product makes it, (3, D, B, L) in memory; the layer's parameters; the gradient of y."""
    random = Draw(dtype=torch.float32)
    qkv = random.normal(3, d_model, batch, seqlen, dtype=dtype).transpose(1, 2)
    layer = (random.normal(d_model, n_taps), random.normal(d_model), *random.modes(d_model, n_modes))
    dout = random.normal(d_model, batch, seqlen, dtype=dtype).transpose(0, 1)
    return [qkv, *layer, random.normal(d_model)], dout


def run_both(inputs, dout):
    """Values and gradients of the joint operator and of `h3_mix` on the same device."""
    results = []
    for function in (h3_mix_joint, lambda qkv, *rest: h3_mix(*qkv.unbind(0), *rest)):
        tensors = [x.detach().requires_grad_() for x in inputs]
        y = function(*tensors)
        results.append([y.detach(), *torch.autograd.grad(y, tensors, dout)])
    return results


def test_values_and_gradients():
    inputs, dout = make_inputs(2, 3, 70, 8, 4, torch.float32)
    found, wanted = run_both(inputs, dout)
    assert found[1].stride() == inputs[0].stride()
    for got, want in zip(found, wanted, strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.skipif(INTERPRETED, reason="opcheck's tracing does not run Triton's interpreter")
def test_opcheck():
    inputs, _ = make_inputs(2, 2, 20, 4, 3, torch.float32)
    opcheck(h3_mix_joint_op, (*leaves(*inputs), None, True))
    opcheck(h3_mix_joint_op, (*leaves(*inputs), None, False))


@pytest.mark.skipif(INTERPRETED, reason="the compiler does not run Triton's interpreter")
def test_compiled_without_a_break():
    inputs, dout = make_inputs(2, 2, 37, 4, 3, torch.float32)
    tensors = [x.detach().requires_grad_() for x in inputs]
    y = torch.compile(h3_mix_joint, backend="aot_eager", fullgraph=True)(*tensors)
    gradients = torch.autograd.grad(y, tensors, dout)
    wanted, *want_gradients = run_both(inputs, dout)[0]
    assert torch.equal(y, wanted)
    assert all(torch.equal(got, want) for got, want in zip(gradients, want_gradients, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_the_same_bits(self, dtype):
        inputs, dout = make_inputs(3, 5, 1000, 64, 32, dtype)
        found, wanted = run_both([x.cuda() for x in inputs], dout.cuda())
        assert found[1].stride() == inputs[0].stride()
        assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))

    def test_a_layer_projects_jointly(self):
        torch.manual_seed(0)
        layer = H3(64, d_state=64, device="cuda")
        u = torch.randn(3, 200, 64, device="cuda", requires_grad=True)
        wanted = H3(64, d_state=64, dtype=torch.float64)
        wanted.load_state_dict({name: x.double().cpu() for name, x in layer.state_dict().items()})
        exact = u.detach().cpu().double().requires_grad_()
        y, want = layer(u), wanted(exact)
        dout = Draw().normal(*y.shape)
        want.backward(dout)
        y.backward(dout.float().cuda())
        assert relative_error(y.cpu(), want) < 1e-5
        assert relative_error(u.grad.cpu(), exact.grad) < 1e-5
        parameters = zip(layer.named_parameters(), wanted.parameters(), strict=True)
        errors = {name: relative_error(found.grad.cpu(), exact.grad) for (name, found), exact in parameters}
        assert max(errors.values()) < 3e-5, errors
