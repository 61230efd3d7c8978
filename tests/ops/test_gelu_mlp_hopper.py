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


def exactly(dy, weight, inner):
    x = inner.double().requires_grad_()
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


def run(kernel, matrices, *args, n_programs=1, rows=16, columns=16, depth=8, stages=3, **constants):
    """Run a program with small tiles."""

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
        MODULE, kernel, (n_programs, 1), *map(Matrix, matrices), *args,
        STEPS=-(-matrices[0].shape[1] // depth), STAGES=stages, ROWS=rows, COLUMNS=columns, DEPTH=depth,
        more=more, **constants,
    )  # fmt: skip


def run_forward(rows, weight, bias, **options):
    inner, act = (torch.full((len(rows), len(weight)), torch.nan) for _ in range(2))
    run("gelu_product_hopper_kernel", (rows, weight, inner, act), bias, *inner.shape, **options)
    return inner, act


def run_backward(dy, weight, inner, **options):
    dinner, shares = torch.full_like(inner, torch.nan), torch.full((-(-len(dy) // 16) * 2, inner.shape[1]), torch.nan)
    matrices = (dy, weight, inner, dinner)
    run("gelu_product_bwd_hopper_kernel", matrices, shares, *inner.shape, PARTS=2, **options)
    return dinner, shares.sum(0)


SIZES = [(48, 32, 64), (41, 44, 40), (16, 8, 16)]


@pytest.mark.parametrize("n_programs", [1, 3, 12])
@pytest.mark.parametrize(("n_rows", "d_model", "d_ff"), SIZES)
def test_outputs(generator, n_programs, n_rows, d_model, d_ff):
    rows, weight, _, bias = draw(generator, n_rows, d_model, d_ff)
    inner, act = run_forward(rows, weight.t().contiguous(), bias, n_programs=n_programs)
    torch.testing.assert_close(inner, rows @ weight + bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(act, F.gelu(rows @ weight + bias, approximate="tanh"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_programs", [1, 3, 12])
@pytest.mark.parametrize(("n_rows", "d_model", "d_ff"), SIZES)
def test_gradients(generator, n_programs, n_rows, d_model, d_ff):
    tensors = draw(generator, n_rows, d_model, d_ff)[:3]
    for found, wanted in zip(run_backward(*tensors, n_programs=n_programs), exactly(*tensors), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_large_inputs(generator):
    dy, weight, *_ = draw(generator, 16, 8, 16)
    inner = torch.linspace(-300, 300, 256).view(16, 16)
    found, _ = run_backward(dy, weight, inner)
    torch.testing.assert_close(found.double(), exactly(dy, weight, inner)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n_rows", "d_model", "d_ff"), [(4096, 768, 3072), (32768, 768, 3072), (5001, 200, 1000), (4100, 2048, 8192)]
)
def test_programs_on_a_gpu(generator, dtype, n_rows, d_model, d_ff):
    from hippos.ops.gelu_mlp.launch import gelu, gelu_bwd_
    from hippos.ops.ssm_conv.launch_hopper import has_hopper_programs

    dy, weight, inner, bias = (x.cuda() for x in draw(generator, n_rows, d_model, d_ff, dtype))
    assert not launch_hopper.takes_hopper(dy[:100], weight, d_ff)
    if not has_hopper_programs(dy.device):
        pytest.skip("the programs are for Hopper and the Triton that they were written with")
    usual = dy @ weight
    usual = (usual, gelu_bwd_(inner, usual, None))
    check(lambda: launch_hopper.gelu_product_bwd(dy, weight, inner), usual, exactly(dy, weight, inner))
    usual = torch.addmm(bias.to(dtype), dy, weight)
    wanted = dy.double() @ weight.double() + bias.double()
    wanted = (wanted, F.gelu(wanted, approximate="tanh"))
    transposed = weight.t().contiguous()
    check(lambda: launch_hopper.gelu_product(dy, transposed, bias), (usual, gelu(usual)), wanted)
    found, act = launch_hopper.gelu_product(dy, transposed, bias)
    error = float((gelu(found).double() - act.double()).norm() / act.double().norm())
    assert error < 2 * torch.finfo(dtype).eps, "as good as what is made again"


def check(function, usual, wanted):
    for got, same, other, right in zip(function(), function(), usual, wanted, strict=True):
        error, usual_error = (float((x.double() - right).norm() / right.norm()) for x in (got, other))
        assert error < 1.1 * usual_error
        assert torch.equal(got, same)
