"""The product of a decode step for Hopper, its arithmetic run on a CPU by `tma_on_cpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hippos.ops import decode
from hippos.ops.decode.launch_hopper import BLOCK_N, hopper_splits, hopper_tiles
from tests.ops.tma_on_cpu import Descriptor, run_program

MODULE = Path(decode.__file__).parent / "kernels_hopper.py"


def run(x, weights, biases, *, gelu=False, splits=None, tiles=(64, 5, 3)):
    """The kernel's output, or its parts; the biases lie in one tensor, apart from each other."""
    batch, n_inputs = x.shape
    n_rows = weights[0].shape[0]
    n_outputs = n_rows * len(weights)
    shape = (batch, n_outputs) if splits is None else (splits, batch, n_outputs)
    y = torch.full(shape, torch.nan)
    descriptors = [Descriptor(weight) for weight in weights] * (3 if len(weights) == 1 else 1)
    run_program(
        MODULE, "rows_linear_hopper_kernel", (n_outputs // BLOCK_N, splits or 1),
        x, *descriptors, biases, 2 * n_rows, n_rows, y, batch, n_rows, n_outputs,
        K=n_inputs, COUNT=len(weights), SPLITS=splits or 1, LEAVES_PARTS=splits is not None, HAS_GELU=gelu,
        BLOCK_N=BLOCK_N, BLOCK_K=tiles[0], WEIGHT_TILES=tiles[1], TOKEN_TILES=tiles[2],
    )  # fmt: skip
    return y


def draw(generator, *shape):
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize(("count", "n_inputs", "gelu"), [(1, 64, True), (3, 320, False), (1, 768, False)])
def test_linear_maps(generator, batch, count, n_inputs, gelu):
    x, biases = draw(generator, batch, n_inputs), draw(generator, 3, 128)
    weights = [draw(generator, 128, n_inputs) for _ in range(count)]
    y = run(x, weights, biases, gelu=gelu)
    order = [0, 2, 1][:count]  # the second weight's bias lies behind the third's
    wanted = torch.cat([F.linear(x, w, biases[i]) for w, i in zip(weights, order, strict=True)], dim=1)
    torch.testing.assert_close(y, F.gelu(wanted, approximate="tanh") if gelu else wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("n_inputs", "splits"), [(512, 1), (512, 2), (512, 4), (2048, 2), (320, 1)])
def test_parts_sum_up_with_the_tiles_that_are_chosen(generator, n_inputs, splits):
    x, weight = draw(generator, 3, n_inputs), draw(generator, 64, n_inputs)
    parts = run(x, [weight], draw(generator, 3, 64), splits=splits, tiles=hopper_tiles(n_inputs, 1))
    torch.testing.assert_close(parts.sum(0), x @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_inputs", [128, 1024, 320])
def test_joint_maps_with_the_tiles_that_are_chosen(generator, n_inputs):
    x, biases = draw(generator, 2, n_inputs), draw(generator, 3, 64)
    weights = [draw(generator, 64, n_inputs) for _ in range(3)]
    y = run(x, weights, biases, tiles=hopper_tiles(n_inputs, 3))
    wanted = torch.cat([F.linear(x, w, biases[i]) for w, i in zip(weights, (0, 2, 1), strict=True)], dim=1)
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)


def test_splits_make_a_program_for_each_multiprocessor_and_no_more():
    assert hopper_splits(2048, 2048) == hopper_splits(2048, 8192) == 4
    assert hopper_splits(768, 3072) == 8
    assert hopper_splits(128, 512) == 8
    assert hopper_splits(128, 64) == 1
    assert hopper_splits(8192, 2048) == 1
