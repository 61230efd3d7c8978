"""The Triton kernel of the cross entropy against its definition: in Triton's interpreter, and on a GPU (marked gpu)."""

from __future__ import annotations

import os

import pytest
import torch

from hippos.errors import UnsupportedError
from hippos.ops import linear_cross_entropy
from tests.ops.test_cross_entropy import make, plain, run

# numpy 2 warns of a conversion in Triton's own code.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(IS_INTERPRETED, reason="Triton's interpreter runs on a CPU")
def test_triton_is_refused_on_a_cpu(generator):
    with pytest.raises(UnsupportedError, match="it needs CUDA tensors, got cpu"):
        linear_cross_entropy(*make(generator, 9), impl="triton")


@pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [40, 9000])
def test_kernel_in_the_interpreter(generator, dtype, rows):
    _check_kernel(generator, "cpu", dtype, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [40, 9000, 50264])
def test_kernel_on_a_gpu(generator, dtype, rows):
    _check_kernel(generator, "cuda", dtype, rows)


def _check_kernel(generator, device, dtype, rows):
    vocab = rows - 3
    tensors = make(generator, 50, 64, rows, vocab, dtype, device)
    exact = run(lambda *t: plain(*t, vocab), *(x.detach().double().requires_grad_() for x in tensors[:2]), tensors[2])
    found, usual = (
        run(lambda *t: linear_cross_entropy(*t, vocab_size=vocab, chunk_tokens=32, impl=impl), *tensors)  # noqa: B023
        for impl in ("triton", "torch")
    )
    for got, other, wanted in zip(found, usual, exact, strict=True):
        error, usual_error = (float((x.double() - wanted).norm() / wanted.norm()) for x in (got, other))
        assert error < max(1.5 * usual_error, 2e-6)


@pytest.mark.gpu
def test_logits_never_exist_whole(generator):
    n_tokens, rows = 16384, 50264
    hidden, weight, targets = make(generator, n_tokens, 256, rows, rows, torch.bfloat16, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, targets, chunk_tokens=1024).backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used < 0.35 * n_tokens * rows * 2, f"{used / 2**20:.0f} MiB"
