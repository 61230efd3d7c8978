"""The MLP's backward product for Hopper: its arithmetic run on a CPU by `tma_on_cpu`, and itself on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hippos.ops.gelu_mlp import launch_hopper
from tests.ops.gluon_on_cpu import Value
from tests.ops.tma_on_cpu import Descriptor, run_program

# Loops count in Python's integers.
Value.__rfloordiv__ = lambda self, other: other // int(self)
Value.__rmod__ = lambda self, other: other % int(self)
MODULE = Path(launch_hopper.__file__).parent / "kernels_hopper.py"


def draw(generator, n_rows, d_model, d_ff, dtype=torch.float32):
    dy = torch.randn(n_rows, d_model, generator=generator)
    weight = torch.randn(d_model, d_ff, generator=generator) / d_model**0.5
    inner, bias = torch.randn(n_rows, d_ff, generator=generator), torch.randn(d_ff, generator=generator)
    return dy.to(dtype), weight.to(dtype), inner.to(dtype), bias


def exactly(dy, weight, inner, bias):
    x = (inner.double() + bias.double()).requires_grad_()
    F.gelu(x, approximate="tanh").backward(dy.double() @ weight.double())
    return x.grad, x.grad.sum(0)


class Matrix(Descriptor):
    """A matrix of which tiles are copied; behind its ends zeros are read, and nothing is written."""

    dtype = torch.float32

    def read(self, place, tile, pred):
        if bool(pred):
            row, column = map(int, place)
            tile.tensor.zero_()
            piece = self.matrix[row : row + tile.tensor.shape[0], column : column + tile.tensor.shape[1]]
            tile.tensor[: piece.shape[0], : piece.shape[1]] = piece

    def write(self, place, tile):
        row, column = map(int, place)
        piece = self.matrix[row : row + tile.tensor.shape[0], column : column + tile.tensor.shape[1]]
        piece.copy_(tile.tensor[: piece.shape[0], : piece.shape[1]])


def run(dy, weight, inner, bias, *, n_programs, rows=16, columns=16, depth=8, stages=3):
    """What the program gives, with small tiles."""
    dinner, shares = torch.full_like(inner, torch.nan), torch.full((-(-len(dy) // rows), len(bias)), torch.nan)

    def sigmoid(code, _, arguments, **__):
        assert all(word in code for word in ("ex2", "rcp"))
        return Value(1 / (1 + torch.exp2(arguments[0].tensor)))

    def more(names):
        names["gl"].num_programs = lambda axis: n_programs
        names["gl"].inline_asm_elementwise = sigmoid
        names["tma"].async_copy_global_to_shared = lambda matrix, place, _, tile, pred=True: matrix.read(
            place, tile, pred
        )
        names["tma"].async_copy_shared_to_global = lambda matrix, place, tile: matrix.write(place, tile)
        names["tma"].store_wait = lambda pending: None

    run_program(
        MODULE, "gelu_product_bwd_hopper_kernel", (n_programs, 1),
        *map(Matrix, (dy, weight, inner, dinner)), bias, shares, *inner.shape,
        STEPS=-(-dy.shape[1] // depth), STAGES=stages, ROWS=rows, COLUMNS=columns, DEPTH=depth, more=more,
    )  # fmt: skip
    return dinner, shares.sum(0)


@pytest.mark.parametrize("n_programs", [1, 3, 12])
@pytest.mark.parametrize(("n_rows", "d_model", "d_ff"), [(48, 32, 64), (41, 20, 40), (16, 8, 16)])
def test_gradients(generator, n_programs, n_rows, d_model, d_ff):
    tensors = draw(generator, n_rows, d_model, d_ff)
    for found, wanted in zip(run(*tensors, n_programs=n_programs), exactly(*tensors), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_large_inputs(generator):
    dy, weight, _, bias = draw(generator, 16, 8, 16)
    inner = torch.linspace(-300, 300, 256).view(16, 16)
    found, _ = run(dy, weight, inner, bias, n_programs=1)
    torch.testing.assert_close(found.double(), exactly(dy, weight, inner, bias)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n_rows", "d_model", "d_ff"), [(4096, 768, 3072), (32768, 768, 3072), (5001, 200, 1000), (4100, 2048, 8192)]
)
def test_gradients_on_a_gpu(generator, monkeypatch, dtype, n_rows, d_model, d_ff):
    from hippos.ops.gelu_mlp.launch import gelu_bwd_

    monkeypatch.setattr(launch_hopper, "IS_CHOSEN", True)
    *tensors, bias = (x.cuda() for x in draw(generator, n_rows, d_model, d_ff, dtype))
    if not launch_hopper.takes_hopper(*tensors):
        pytest.skip("the program is for Hopper and the Triton that it was written with")
    dy, weight, inner = tensors
    found = launch_hopper.gelu_product_bwd(dy, weight, inner, bias)
    usual = dy @ weight
    usual_sums = gelu_bwd_(inner, bias, usual, None)
    again = launch_hopper.gelu_product_bwd(dy, weight, inner, bias)
    wanted = exactly(dy, weight, inner, bias)
    for got, other, right, same in zip(found, (usual, usual_sums), wanted, again, strict=True):
        error, usual_error = (float((x.double() - right).norm() / right.norm()) for x in (got, other))
        assert error < 1.1 * usual_error
        assert torch.equal(got, same)
