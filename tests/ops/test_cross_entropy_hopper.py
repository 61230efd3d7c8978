"""The softmax for Hopper: its arithmetic run on a CPU by `gluon_on_cpu`, and itself on a GPU (marked gpu)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hippos.ops import cross_entropy
from tests.ops.gluon_on_cpu import Value
from tests.ops.tma_on_cpu import run_program

MODULE = Path(cross_entropy.__file__).parent / "kernels_hopper.py"
IGNORED = -100


def draw(generator, n_rows, n_columns, vocab_size):
    logits = 3 * torch.randn(n_rows, n_columns, generator=generator)
    targets = torch.randint(vocab_size, (n_rows,), generator=generator)
    targets[n_rows // 2] = IGNORED
    return logits, targets


def exactly(logits, targets, vocab_size):
    """The nll of each row, and the gradient of their sum."""
    x = logits.double().requires_grad_()
    nll = F.cross_entropy(x[:, :vocab_size], targets, ignore_index=IGNORED, reduction="none")
    nll.sum().backward()
    return nll.detach(), x.grad


@pytest.mark.parametrize("n_programs", [1, 2, 5])
@pytest.mark.parametrize(("n_columns", "vocab_size"), [(64, 64), (56, 50), (49, 48)])
def test_rows(generator, n_programs, n_columns, vocab_size):
    logits, targets = draw(generator, 5, n_columns, vocab_size)
    found, nll = logits.clone(), torch.full((5,), torch.nan)

    def more(names):
        names["gl"].num_programs = lambda axis: n_programs
        names["gl"].exp2 = lambda x: Value(x.tensor.exp2())
        names["gl"].log2 = lambda x: Value(x.tensor.log2())
        names["async_copy"].async_copy_global_to_shared = copy

    def copy(tile, pointer, mask):
        at, inside = pointer.places(mask)
        tile.tensor.copy_(torch.where(inside, pointer.memory[torch.where(inside, at, 0)], torch.nan))

    run_program(
        MODULE, "row_softmax_hopper_kernel", (n_programs, 1), found, targets, nll, n_columns, 5, vocab_size, n_columns,
        IGNORED, BLOCK=16, N_BLOCKS=-(-n_columns // 16), more=more,
    )  # fmt: skip
    wanted_nll, wanted = exactly(logits, targets, vocab_size)
    torch.testing.assert_close(nll.double(), wanted_nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n_rows", "n_columns", "vocab_size"), [(4096, 50304, 50257), (3, 16384, 16384), (700, 53248, 53001)]
)
def test_rows_on_a_gpu(generator, dtype, n_rows, n_columns, vocab_size):
    from hippos.ops.cross_entropy import launch

    logits, targets = draw(generator, n_rows, n_columns, vocab_size)
    logits, targets = logits.to(dtype).cuda(), targets.cuda()
    if not launch.takes_hopper(logits):
        pytest.skip("the program is for Hopper and the Triton that it was written with")
    found = logits.clone()
    total, _ = launch.softmax_cross_entropy(found, targets, vocab_size, IGNORED, wants_grad=True)
    few = slice(0, 200)
    wanted_nll, wanted = exactly(logits[few], targets[few], vocab_size)
    assert float((found[few].double() - wanted).norm() / wanted.norm()) < torch.finfo(dtype).eps
    assert not found[:, vocab_size:].any()
    expected, _ = launch.softmax_cross_entropy(logits.clone(), targets, vocab_size, IGNORED, wants_grad=False)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-3)
    alone, _ = launch.softmax_cross_entropy(logits[few].clone(), targets[few], vocab_size, IGNORED, wants_grad=True)
    torch.testing.assert_close(alone.double(), wanted_nll.sum(), rtol=1e-5, atol=1e-3)
