"""Products with int8 weights against their definition: in Triton's interpreter on a CPU, or on a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.decode.int8_weight import Int8Weight, linear_step_int8, linear_step_int8_parts, why_not_int8

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
on_a_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param(
            "cpu",
            marks=pytest.mark.skipif(not (HAS_TRITON and IS_INTERPRETED), reason="needs TRITON_INTERPRET=1 and Triton"),
        ),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def skip_interpreted_bfloat16(device: str, dtype: torch.dtype) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 is wrong")


def draw(generator: torch.Generator, *shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator) * scale).to(device, dtype)


def draw_weight(generator: torch.Generator, n_outputs: int, n_inputs: int, *, device: str) -> Int8Weight:
    """Every int8 value occurs, -128 too; scales differ by a factor of a hundred."""
    values = torch.randint(-128, 128, (n_outputs, n_inputs), generator=generator, dtype=torch.int8)
    scale = torch.logspace(-4, -2, n_outputs)[torch.randperm(n_outputs, generator=generator)]
    return Int8Weight(values.to(device), scale.to(device))


def exact(x: Tensor, weights: list[Int8Weight], biases: list[Tensor] | None) -> Tensor:
    y = torch.cat([x.double() @ w.unpacked(torch.float64).t() for w in weights], dim=1)
    return y if biases is None else y + torch.cat(biases).double()


@on_a_device
@dtypes
@pytest.mark.parametrize("batch", [1, 2, 17, 64])
@pytest.mark.parametrize(
    ("count", "n_outputs", "n_inputs", "has_bias"),
    [(1, 64, 64, True), (3, 128, 192, True), (1, 200, 320, False), (1, 1, 128, True)],
)
def test_linear_maps(generator, device, dtype, batch, count, n_outputs, n_inputs, has_bias):
    skip_interpreted_bfloat16(device, dtype)
    x = draw(generator, batch, n_inputs, device=device, dtype=dtype)
    weights = [draw_weight(generator, n_outputs, n_inputs, device=device) for _ in range(count)]
    biases = [draw(generator, n_outputs, device=device, dtype=dtype) for _ in range(count)] if has_bias else None
    wanted = exact(x, weights, biases)
    assert linear_step_int8(x, weights, biases, impl="reference").sub(wanted).norm() < TOLERANCES[dtype] * wanted.norm()
    y = linear_step_int8(x, weights, biases)
    assert (y.dtype, y.shape) == (dtype, wanted.shape)
    assert (y - wanted).norm() < TOLERANCES[dtype] * wanted.norm()
    assert (y[:, -1] - wanted[:, -1]).norm() < 4 * TOLERANCES[dtype] * wanted[:, -1].norm()
    y = linear_step_int8(x, weights, biases, gelu=True)
    wanted = F.gelu(wanted, approximate="tanh")
    assert (y - wanted).norm() < TOLERANCES[dtype] * wanted.norm()


@on_a_device
@dtypes
@pytest.mark.parametrize("large", [1e2, 3e4])
def test_one_large_input_hides_no_other(generator, device, dtype, large):
    skip_interpreted_bfloat16(device, dtype)
    x = draw(generator, 1, 2048, device=device, dtype=dtype)
    weight = draw_weight(generator, 64, 2048, device=device)
    x[0, 5] = large
    wanted = exact(x, [weight], None)
    assert (linear_step_int8(x, [weight], None) - wanted).norm() < TOLERANCES[dtype] * wanted.norm()


@on_a_device
@dtypes
@pytest.mark.parametrize("n_inputs", [64, 192, 1024])
def test_one_token_is_normalised_first_or_added_to_what_is_there(generator, device, dtype, n_inputs):
    skip_interpreted_bfloat16(device, dtype)
    x, norm_w, norm_b = (
        draw(generator, *shape, device=device, dtype=dtype) for shape in ((1, n_inputs), (n_inputs,), (n_inputs,))
    )
    weight, bias = draw_weight(generator, 64, n_inputs, device=device), draw(generator, 64, device=device, dtype=dtype)
    u = F.layer_norm(x.double(), (n_inputs,), norm_w.double(), norm_b.double(), 1e-5).to(dtype)
    wanted = exact(u, [weight], [bias])
    for impl in ("triton", "reference"):
        y = linear_step_int8(x, [weight], [bias], norm=(norm_w, norm_b, 1e-5), impl=impl)
        assert (y - wanted).norm() < TOLERANCES[dtype] * wanted.norm()
        stream = draw(generator, 1, 64, device=device, dtype=dtype)
        total = stream.double() + exact(x, [weight], [bias])
        assert linear_step_int8(x, [weight], [bias], add_to=stream, impl=impl) is stream
        assert (stream - total).norm() < TOLERANCES[dtype] * total.norm()


@on_a_device
@dtypes
@pytest.mark.parametrize(
    ("batch", "n_outputs", "n_inputs"), [(2, 64, 64), (64, 128, 512), (5, 192, 1024), (33, 64, 320)]
)
def test_parts_sum_up(generator, device, dtype, batch, n_outputs, n_inputs):
    skip_interpreted_bfloat16(device, dtype)
    x = draw(generator, batch, n_inputs, device=device, dtype=dtype)
    weight = draw_weight(generator, n_outputs, n_inputs, device=device)
    wanted = exact(x, [weight], None)
    for impl in ("triton", "reference"):
        parts = linear_step_int8_parts(x, weight, impl=impl)
        assert parts.dtype == torch.float32
        assert parts.shape[1:] == wanted.shape
        assert (parts.sum(0) - wanted).norm() < 1e-5 * wanted.norm()


def test_what_the_kernels_do_not_take_is_refused(generator, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = draw_weight(generator, 64, 64, device="cpu")
    x = draw(generator, 2, 64, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match=r"int8 weights of \(64, 64\): it needs CUDA tensors, got cpu"):
        linear_step_int8(x, [weight], None)
    with pytest.raises(UnsupportedError, match="it needs CUDA tensors, got cpu"):
        linear_step_int8_parts(x, weight)
    with pytest.raises(ValueError, match="norm and add_to are for one token, got 2"):
        linear_step_int8(x, [weight], None, add_to=x)


@pytest.mark.parametrize(
    ("dtype", "n_inputs", "reason"),
    [
        (torch.float32, 64, "it needs tokens in bfloat16 or float16, got float32"),
        (torch.bfloat16, 100, "it needs widths that are multiples of 64, 32768 at most, got 100"),
        (torch.bfloat16, 65536, "it needs widths that are multiples of 64, 32768 at most, got 65536"),
        (torch.float16, 128, None),
    ],
)
def test_why_the_kernels_do_not_serve(monkeypatch, dtype, n_inputs, reason):
    monkeypatch.setattr("hippos.ops.decode.int8_weight.why_not_device", lambda device: None)
    monkeypatch.setattr("hippos.ops.decode.int8_weight.is_interpreted", lambda: False)
    assert why_not_int8(torch.device("cuda"), dtype, n_inputs) == reason


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_splits_make_a_program_for_each_multiprocessor_and_no_more():
    from hippos.ops.decode.launch_int8 import splits_of_inputs

    assert splits_of_inputs(2048, 2048, 128) == splits_of_inputs(2048, 8192, 128) == 4
    assert splits_of_inputs(768, 3072, 128) == 8
    assert splits_of_inputs(128, 192, 64) == 1
    assert splits_of_inputs(8192, 2048, 128) == 1
