"""Sum and norm against their definition: on a CPU, in Triton's interpreter, and on a GPU (marked gpu)."""

from __future__ import annotations

import os

import pytest
import torch

from hippos.errors import UnsupportedError
from hippos.ops.add_norm import add_norm, add_norm_kept
from hippos.ops.add_norm.autograd import renorm_op
from hippos.ops.add_norm.split import joined, split

# numpy 2 warns of a conversion in Triton's own code.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1")
NAMES = ("stream", "update", "weight", "bias", "update_bias")


def make(generator, shape, dtype, device="cpu"):
    width = shape[-1]
    draw = [torch.randn(s, generator=generator) for s in (shape, shape, width, width, width)]
    draw[0] += 3  # a mean that matters
    tensors = dict(zip(NAMES, draw, strict=True))
    tensors["update"] = tensors["update"].to(dtype)
    tensors = {name: x.to(device).requires_grad_() for name, x in tensors.items()}
    dout = [torch.randn(shape, generator=generator).to(device), torch.randn(shape, generator=generator).to(device)]
    return tensors, (dout[0], dout[1].to(dtype))


def run(tensors, douts, impl, dtype, uses=(True, True)):
    outputs = add_norm(**tensors, dtype=dtype, impl=impl)
    chosen = [(y, dy.to(y.dtype)) for y, dy, used in zip(outputs, douts, uses, strict=True) if used]
    inputs = [x for x in tensors.values() if x is not None]
    ys, dys = zip(*chosen, strict=True)
    gradients = torch.autograd.grad(ys, inputs, dys, allow_unused=True)
    return [*(y.detach() for y in outputs), *gradients]


def check(generator, shape, dtype, device, *, left_out=(), uses=(True, True)):
    tensors, douts = make(generator, shape, dtype, device)
    tensors |= dict.fromkeys(left_out)
    exact = {name: None if x is None else x.detach().double().requires_grad_() for name, x in tensors.items()}
    wanted = run(exact, douts, "reference", torch.float64, uses)
    found, usual = (run(tensors, douts, impl, dtype, uses) for impl in ("triton", "torch"))
    for got, other, right in zip(found, usual, wanted, strict=True):
        if right is None:
            assert got is None or not got.any()
            continue
        assert got.dtype == other.dtype
        error, usual_error = (float((x.double() - right).norm() / right.norm()) for x in (got, other))
        assert error < max(1.5 * usual_error, 2e-6)


SHAPES = [(1, 16), (3, 7, 48), (2, 40, 96), (5, 1025)]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_in_the_interpreter(generator, shape, dtype):
    check(generator, shape, dtype, "cpu")


@interpreted
@pytest.mark.parametrize("uses", [(True, False), (False, True)])
def test_one_output_in_the_interpreter(generator, uses):
    check(generator, (30, 48), torch.float16, "cpu", uses=uses)


@interpreted
@pytest.mark.parametrize("left_out", [("update_bias",), ("update", "update_bias")])
def test_without_an_update_in_the_interpreter(generator, left_out):
    check(generator, (30, 48), torch.float16, "cpu", left_out=left_out)


@interpreted
def test_the_norm_once_more_in_the_interpreter(generator):
    check_renorm(generator, "cpu", torch.float16)


def check_renorm(generator, device, dtype):
    tensors, _ = make(generator, (30, 48), dtype, device)
    values = {name: x.detach() for name, x in tensors.items()}
    args = (
        values["stream"],
        values["update"],
        values["update_bias"],
        values["weight"],
        values["bias"],
        1e-5,
        dtype,
        False,
    )
    total, normed, mean, rstd = torch.ops.hippos.add_norm(*args)
    assert torch.equal(renorm_op(total, mean, rstd, values["weight"], values["bias"], dtype, False), normed)


def run_chain(tensors, splits):
    """Two sums and norms one after the other; all that is given, and all gradients."""
    inputs = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    stream, found = inputs["stream"], []
    for update in ("update", "second"):
        kept = add_norm_kept(
            stream, inputs[update], inputs["weight"], inputs["bias"], update_bias=inputs["update_bias"], eps=1e-5,
            dtype=torch.bfloat16, splits=splits,
        )  # fmt: skip
        stream = kept.total
        found.append(kept.normed)
        assert torch.equal(kept.forget_normed()(), kept.normed)
    total = joined(stream.detach()) if splits else stream.detach()
    douts = [tensors["dtotal"], *(tensors[name].bfloat16() for name in ("dnormed", "second_dnormed"))]
    douts[0] = split(douts[0]) if splits else douts[0]
    names = ("stream", "update", "second", "weight", "bias", "update_bias")
    gradients = torch.autograd.grad((stream, *found), [inputs[name] for name in names], douts)
    return [total, *(x.detach() for x in found)], dict(zip(names, gradients, strict=True))


def check_split(generator, shape, device):
    tensors, _ = make(generator, shape, torch.bfloat16, device)
    more = ("second", "dtotal", "dnormed", "second_dnormed")
    tensors |= {name: torch.randn(shape, generator=generator).to(device) for name in more}
    tensors["second"] = tensors["second"].bfloat16()
    values = {name: x.detach() for name, x in tensors.items()}
    outputs, gradients = run_chain(values, True)
    wanted, usual = run_chain(values | {"second": values["second"].float()}, False)  # its gradient is not rounded then
    usual["second"] = split(usual["second"])[0]
    for got, want in zip(outputs, wanted, strict=True):  # in the same arithmetic, but not in the same order
        torch.testing.assert_close(got, want, rtol=1e-6 if got.dtype == torch.float32 else 2**-7, atol=1e-6)
    for name, gradient in gradients.items():
        assert gradient.dtype == usual[name].dtype
        error = float((gradient.double() - usual[name].double()).norm() / usual[name].double().norm())
        # Norms of rounded sums: in the weights' gradients the error of a rounding, in others of a small part.
        assert error < {"weight": 2**-7, "bias": 2e-6}.get(name, 2**-8), name


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (4, 1000, 768)])
def test_a_split_stream_has_the_same_numbers_on_a_gpu(generator, shape):
    check_split(generator, shape, "cuda")


@pytest.mark.parametrize("shape", [(1, 16), (3, 7, 48)])
@interpreted
def test_a_split_stream_has_the_same_numbers_in_the_interpreter(generator, shape):
    check_split(generator, shape, "cpu")


def test_split_numbers_are_whole_again_and_rounded():
    bits = torch.tensor([0, 1, 0x8000, 0x8001, 0x18000, 0x7FFF, 0x3F80FFFF, 0x7F7F8000, 0x7F800000, -0x7FFF8001])
    x = torch.cat([bits.to(torch.int32).view(torch.float32), torch.randn(1000)])
    both = split(x)
    assert torch.equal(joined(both).view(torch.int32), x.view(torch.int32))
    is_between = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(both[0][~is_between], x.bfloat16()[~is_between])
    assert not (both[0].float().abs()[is_between] < x.abs()[is_between]).any()
    nothing = split(torch.tensor([torch.nan]).view(torch.int32).fill_(0x7FFFFFFF).view(torch.float32))
    assert nothing[0].isnan().all()
    assert joined(nothing).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 1000, 768), (2, 100, 2048), (3, 8192)])
def test_kernels_on_a_gpu(generator, shape, dtype):
    check(generator, shape, dtype, "cuda")
    check(generator, shape, dtype, "cuda", left_out=("update", "update_bias"))
    check(generator, shape, dtype, "cuda", uses=(False, True))


@pytest.mark.gpu
def test_the_norm_once_more_on_a_gpu(generator):
    check_renorm(generator, "cuda", torch.bfloat16)


@pytest.mark.gpu
def test_the_operator_keeps_its_promises(generator):
    tensors, _ = make(generator, (30, 48), torch.bfloat16, "cuda")
    args = (
        *(tensors[name] for name in ("stream", "update", "update_bias", "weight", "bias")),
        1e-5,
        torch.bfloat16,
        False,
    )
    torch.library.opcheck(torch.ops.hippos.add_norm, args, test_utils=("test_schema", "test_faketensor"))
    args = (args[0], None, None, *args[3:])
    torch.library.opcheck(torch.ops.hippos.add_norm, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(IS_INTERPRETED, reason="Triton's interpreter runs on a CPU")
class TestOnACPU:
    """Plain PyTorch, and what is refused."""

    def test_the_sum_and_its_norm(self, generator):
        tensors, _ = make(generator, (3, 5, 8), torch.float64)
        tensors = {name: x.double() for name, x in tensors.items()}
        total, normed = add_norm(**tensors)
        assert torch.equal(total, tensors["stream"] + tensors["update"] + tensors["update_bias"])
        centred = total - total.mean(-1, keepdim=True)
        wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(normed, wanted * tensors["weight"] + tensors["bias"])

    def test_without_an_update_the_stream_itself_is_given(self, generator):
        tensors, _ = make(generator, (3, 8), torch.float32)
        total, normed = add_norm(tensors["stream"], None, tensors["weight"], tensors["bias"], dtype=torch.bfloat16)
        assert total is tensors["stream"]
        assert normed.dtype == torch.bfloat16

    def test_wrong_arguments(self, generator):
        tensors, _ = make(generator, (3, 8), torch.float32)
        with pytest.raises(ValueError, match=r"update must have the stream's shape \(3, 8\), got \(2, 8\)"):
            add_norm(**{**tensors, "update": torch.zeros(2, 8)})
        with pytest.raises(ValueError, match="update_bias needs an update"):
            add_norm(**{**tensors, "update": None})
        with pytest.raises(ValueError, match=r"weight must have shape \(8,\), got \(9,\)"):
            add_norm(**{**tensors, "weight": torch.zeros(9)})
        with pytest.raises(UnsupportedError, match="it needs CUDA tensors, got cpu"):
            add_norm(**tensors, impl="triton")
        with pytest.raises(UnsupportedError, match="not float64"):
            add_norm(**{name: x.double() for name, x in tensors.items()}, impl="triton")
        with pytest.raises(UnsupportedError, match="up to 8,192 numbers, got 8,193"):
            add_norm(torch.zeros(2, 8193), None, torch.ones(8193), torch.zeros(8193), impl="triton")
