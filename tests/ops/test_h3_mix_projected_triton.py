"""Projections and mixing in one operator are the projections, then the mixing, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from hippos.layers import H3
from hippos.ops import h3_mix
from hippos.ops.h3_mix import projected
from hippos.ops.h3_mix.projected import h3_projected, h3_projected_op
from hippos.ops.h3_mix.schedule import leaves_bias
from hippos.ops.h3_mix.stacked import Projections, stack_projections
from hippos.ops.precision import product_in
from tests.ops.ssm_cases import Draw, leaves, relative_error
from tests.ops.test_h3_mix_triton import INTERPRETED, ROUNDING

pytestmark = [pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")]


def make_inputs(batch, d_model, seqlen, n_taps, n_modes, dtype, *, has_bias=True, has_last=True):
    """Tokens, weights and biases; the layer's parameters; the gradient of the tokens."""
    random = Draw(dtype=torch.float32)
    u = random.normal(batch, seqlen, d_model, dtype=dtype)
    weights = [(random.normal(d_model, d_model) / d_model**0.5).to(dtype) for _ in range(4)]
    biases = [random.normal(d_model, dtype=dtype) if has_bias else None for _ in range(4)]
    biases[3] = biases[3] if has_last else None
    layer = (random.normal(d_model, n_taps), random.normal(d_model), *random.modes(d_model, n_modes))
    return [u, *weights, *biases, *layer, random.normal(d_model)], random.normal(batch, seqlen, d_model, dtype=dtype)


def in_one(u, *others, cu_seqlens=None, keeps_keys=False):
    return h3_projected(u, Projections(*others[:8]), *others[8:], cu_seqlens, keeps_keys=keeps_keys)


def one_by_one(u, *others, cu_seqlens=None):
    """The same by plain products and the definition of the mixing."""
    *weights, out_weight = others[:4]
    *biases, out_bias = others[4:8]
    linear = torch.nn.functional.linear
    q, k, v = (linear(u, weight, bias).transpose(1, 2) for weight, bias in zip(weights, biases, strict=True))
    y = h3_mix(q, k, v, *others[8:], cu_seqlens=cu_seqlens, impl="torch")
    return linear(y.transpose(1, 2), out_weight, out_bias)


def gradients_of(function, inputs, dout, dtype=None, **options):
    tensors = leaves(*inputs, dtype=dtype)
    y = function(*tensors, **options)
    present = [x for x in tensors if x is not None]
    return [y.detach(), *torch.autograd.grad(y, present, dout.to(y.dtype))]


@pytest.mark.parametrize(("has_bias", "has_last"), [(True, True), (True, False), (False, False)])
def test_values_and_gradients(has_bias, has_last):
    inputs, dout = make_inputs(2, 3, 70, 8, 4, torch.float32, has_bias=has_bias, has_last=has_last)
    found = gradients_of(in_one, inputs, dout)
    wanted = gradients_of(one_by_one, inputs, dout, torch.float64)
    assert found[0].is_contiguous()
    for got, want in zip(found, wanted, strict=True):
        assert relative_error(got, want) < 1e-5
    tensors = leaves(*inputs)
    with torch.no_grad():
        assert torch.equal(in_one(*tensors), found[0])


def test_weights_of_another_dtype():
    inputs, dout = make_inputs(2, 3, 40, 8, 4, torch.float32)
    u, *others = leaves(*inputs)
    half = u.detach().half().requires_grad_()
    tokens = in_one(half, *others)
    wanted = gradients_of(one_by_one, inputs, dout, torch.float64)
    assert tokens.dtype == torch.float16
    assert relative_error(tokens, wanted[0]) < 4 * ROUNDING[torch.float16]
    found = torch.autograd.grad(tokens, [half, *others], dout.half())
    assert all(x.dtype == torch.float32 for x in found[1:])
    assert max(relative_error(got, want) for got, want in zip(found, wanted[1:], strict=True)) < 3e-3


def test_frozen_projections_get_no_gradients():
    inputs, dout = make_inputs(2, 3, 40, 8, 4, torch.float32)
    wanted = gradients_of(in_one, inputs, dout)
    tensors = leaves(*inputs)
    for frozen in tensors[1:9]:
        frozen.requires_grad_(False)
    trained = [tensors[0], *tensors[9:]]
    found = torch.autograd.grad(in_one(*tensors), trained, dout)
    assert all(torch.equal(got, want) for got, want in zip(found, [wanted[1], *wanted[10:]], strict=True))


def test_stacked_projections():
    random = Draw(dtype=torch.float32)
    weights, biases = [random.normal(70, 70) for _ in range(4)], [random.normal(70) for _ in range(4)]
    weights[1] = weights[1].t()
    stacked = stack_projections(Projections(*weights, *biases), torch.float16)
    assert torch.equal(stacked.weights, torch.cat(weights).half())
    assert torch.equal(stacked.biases, torch.cat(biases))
    assert torch.equal(stacked.rounded, torch.cat(biases).half())
    stacked = stack_projections(Projections(*weights, *biases[:3]), torch.float16)
    assert torch.equal(stacked.biases, torch.cat(biases[:3]))
    assert torch.equal(stacked.rounded, torch.cat(biases[:3]).half())
    stacked = stack_projections(Projections(*weights), torch.float32)
    assert torch.equal(stacked.weights, torch.cat(weights))
    assert stacked.biases.numel() == 0


def test_packed_documents():
    inputs, dout = make_inputs(1, 2, 60, 8, 4, torch.float32)
    offsets = torch.tensor([0, 7, 7, 40, 60])
    found = gradients_of(in_one, inputs, dout, cu_seqlens=offsets)
    wanted = gradients_of(one_by_one, inputs, dout, torch.float64, cu_seqlens=offsets)
    for got, want in zip(found, wanted, strict=True):
        assert relative_error(got, want) < 1e-5


@pytest.mark.skipif(INTERPRETED, reason="opcheck's tracing does not run Triton's interpreter")
def test_opcheck():
    inputs, _ = make_inputs(2, 2, 20, 4, 3, torch.float32)
    opcheck(h3_projected_op, (*leaves(*inputs), None, True, False))
    inputs, _ = make_inputs(1, 2, 20, 4, 3, torch.float32, has_bias=False)
    opcheck(h3_projected_op, (*leaves(*inputs), torch.tensor([0, 5, 20]), True, False))
    opcheck(h3_projected_op, (*inputs, None, False, True))
    inputs, _ = make_inputs(2, 2, 20, 4, 3, torch.float32, has_last=False)
    opcheck(h3_projected_op, (*leaves(*inputs), None, True, False))


@pytest.mark.skipif(INTERPRETED, reason="the compiler does not run Triton's interpreter")
def test_compiled_without_a_break():
    inputs, dout = make_inputs(2, 2, 37, 4, 3, torch.float32)
    compiled = torch.compile(in_one, backend="aot_eager", fullgraph=True)
    found, wanted = gradients_of(compiled, inputs, dout), gradients_of(in_one, inputs, dout)
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize(
        ("offsets", "has_bias", "has_last"),
        [(None, True, True), (None, True, False), (None, False, False), ([0, 300, 1000], True, False)],
    )
    def test_values_and_gradients(self, dtype, offsets, has_bias, has_last):
        batch = 4 if offsets is None else 1
        inputs, dout = make_inputs(batch, 256, 1000, 64, 32, dtype, has_bias=has_bias, has_last=has_last)
        inputs, dout = [None if x is None else x.cuda() for x in inputs], dout.cuda()
        packed = None if offsets is None else torch.tensor(offsets, device="cuda")
        found = gradients_of(in_one, inputs, dout, cu_seqlens=packed)
        again = gradients_of(in_one, inputs, dout, cu_seqlens=packed)
        wanted = gradients_of(one_by_one, inputs, dout, torch.float64, cu_seqlens=packed)
        usual = gradients_of(one_by_one, inputs, dout, cu_seqlens=packed)
        for got, want, other, same in zip(found, wanted, usual, again, strict=True):
            # Plain PyTorch rounds queries, keys and values too, but neither shifted keys nor states.
            limit = 2.5 * relative_error(other, want) if dtype == torch.bfloat16 else 2e-5
            assert relative_error(got, want) < limit
            assert torch.equal(got, same)

    @pytest.mark.parametrize(("batch", "seqlen"), [(32, 128), (8, 1024), (3, 2048), (2, 4096)])
    def test_biases_added_and_summed_by_the_mixing(self, monkeypatch, batch, seqlen):
        inputs, dout = make_inputs(batch, 256, seqlen, 64, 32, torch.bfloat16, has_last=False)
        inputs, dout = [None if x is None else x.cuda() for x in inputs], dout.cuda()
        if torch.cuda.get_device_capability() == (9, 0):
            assert leaves_bias(torch.bfloat16, batch, 256, seqlen, 64, 32, dout.device)
        found, again = (gradients_of(in_one, inputs, dout) for _ in range(2))
        kept = gradients_of(in_one, inputs, dout, keeps_keys=True)
        monkeypatch.setattr(projected, "leaves_bias", lambda *_: False)
        usual = gradients_of(in_one, inputs, dout)
        wanted = gradients_of(one_by_one, inputs, dout, torch.float64)
        names = ["tokens", "u", *"qkvo", "q bias", "k bias", "v bias", "filter", "skip", "log_a", "b", "c", "d"]
        for name, got, other, want, same, more in zip(names, found, usual, wanted, again, kept, strict=True):
            assert relative_error(got, want) < 1.2 * relative_error(other, want) + 1e-6, name
            assert relative_error(more, want) < 1.2 * relative_error(other, want) + 1e-6, name
            assert torch.equal(got, same), name
        tensors = leaves(*inputs)
        tensors[1:8] = [x if x is None else x.detach() for x in tensors[1:8]]
        assert torch.equal(torch.autograd.grad(in_one(*tensors), tensors[0], dout)[0], found[1])

    def test_products_leave_the_accumulators_unrounded(self):
        left, right = (Draw(dtype=torch.bfloat16).normal(64, 64).cuda() for _ in range(2))
        exact = left.double() @ right.double()
        assert relative_error(product_in(left, right, torch.float32), exact) < 1e-6
        assert relative_error(product_in(left, right, torch.bfloat16), exact) < 2 * ROUNDING[torch.bfloat16]

    def test_a_layer_takes_it(self):
        torch.manual_seed(0)
        layer = H3(256, d_state=64, device="cuda")
        u = torch.randn(4, 200, 256, device="cuda", requires_grad=True)
        wanted = H3(256, d_state=64, dtype=torch.float64)
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
        with torch.autocast("cuda", torch.bfloat16):
            assert relative_error(layer(u).cpu(), want) < 4 * ROUNDING[torch.bfloat16]
