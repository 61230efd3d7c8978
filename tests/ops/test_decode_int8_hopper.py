"""The product with int8 weights for Hopper, its arithmetic run on a CPU by `tma_on_cpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hippos.ops import decode
from hippos.ops.decode.launch_int8_hopper import BLOCK_N, hopper_tiles, splits_of_inputs
from tests.ops.tma_on_cpu import Descriptor, run_program

FOLDER = Path(decode.__file__).parent


@pytest.fixture
def module(tmp_path):
    """One file of the kernel and of what it takes from another."""
    first, second = ((FOLDER / name).read_text() for name in ("kernels_hopper.py", "kernels_int8_hopper.py"))
    path = tmp_path / "kernels.py"
    path.write_text(first + second.split("from __future__ import annotations\n")[1])
    return path


def draw(generator, *shape):
    return torch.randn(shape, generator=generator)


def draw_bytes(generator, *shape):
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def run(module, x, weights, scales, biases, *, gelu=False, splits=None, block_k=64):
    """The kernel's output, or its parts; scales and biases lie in one tensor each, apart from each other."""
    batch, n_inputs = x.shape
    n_rows = weights[0].shape[0]
    n_outputs = n_rows * len(weights)
    y = torch.full((batch, n_outputs) if splits is None else (splits, batch, n_outputs), torch.nan)
    descriptors = [Descriptor(weight) for weight in weights] * (3 if len(weights) == 1 else 1)
    block_b = 16 if batch <= 16 else 64
    run_program(
        module, "rows_linear_int8_hopper_kernel", (n_outputs // BLOCK_N, splits or 1),
        x, *descriptors, scales, n_rows, 2 * n_rows, biases, 2 * n_rows, n_rows, y, batch, n_rows, n_outputs,
        K=n_inputs, COUNT=len(weights), SPLITS=splits or 1, LEAVES_PARTS=splits is not None, HAS_BIAS=True,
        HAS_GELU=gelu, BLOCK_B=block_b, BLOCK_N=BLOCK_N, BLOCK_K=block_k, **hopper_tiles(block_b, block_k),
        more=lambda names: setattr(names["gl"], "int8", torch.int8),
    )  # fmt: skip
    return y


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize(
    ("count", "n_inputs", "gelu", "block_k"), [(1, 64, True, 64), (3, 320, False, 64), (1, 768, False, 128)]
)
def test_linear_maps(generator, module, batch, count, n_inputs, gelu, block_k):
    x, biases, scales = draw(generator, batch, n_inputs), draw(generator, 3, 128), draw(generator, 3, 128).abs()
    weights = [draw_bytes(generator, 128, n_inputs) for _ in range(count)]
    y = run(module, x, weights, scales, biases, gelu=gelu, block_k=block_k)
    order = [0, 2, 1]  # the second weight's bias lies behind the third's
    matrices = [w * scale[:, None] for w, scale in zip(weights, scales, strict=False)]
    wanted = torch.cat([F.linear(x, w, biases[order[i]]) for i, w in enumerate(matrices)], dim=1)
    torch.testing.assert_close(y, F.gelu(wanted, approximate="tanh") if gelu else wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("n_inputs", "splits", "block_k"), [(512, 1, 128), (512, 4, 128), (2048, 2, 64), (320, 1, 64)])
def test_parts_sum_up(generator, module, n_inputs, splits, block_k):
    x, weight, scales = draw(generator, 3, n_inputs), draw_bytes(generator, 64, n_inputs), draw(generator, 3, 64).abs()
    parts = run(module, x, [weight], scales, draw(generator, 3, 64), splits=splits, block_k=block_k)
    assert parts.shape == (splits, 3, 64)
    torch.testing.assert_close(parts.sum(0), x @ (weight * scales[0, :, None]).t(), rtol=1e-4, atol=1e-2)


def test_splits_make_a_program_for_each_multiprocessor_and_no_more():
    assert splits_of_inputs(2048, 2048, 128) == splits_of_inputs(2048, 8192, 128) == 4
    assert splits_of_inputs(768, 3072, 128) == 8
    assert splits_of_inputs(128, 192, 64) == 1
    assert splits_of_inputs(8192, 2048, 128) == 1


@pytest.mark.parametrize(("block_b", "block_k"), [(16, 64), (16, 128), (32, 128), (64, 64), (64, 128)])
def test_tiles_leave_half_a_multiprocessor_to_others(block_b, block_k):
    tiles = hopper_tiles(block_b, block_k)
    n_bytes = tiles["WEIGHT_TILES"] * BLOCK_N * block_k + tiles["TOKEN_TILES"] * block_b * block_k * 2
    assert 48 * 1024 < n_bytes <= 104 * 1024
    assert tiles["WEIGHT_TILES"] * BLOCK_N * block_k >= 48 * 1024
