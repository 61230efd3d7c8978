"""Sums of columns: in Triton's interpreter, and on a GPU (marked gpu)."""

from __future__ import annotations

import os

import pytest
import torch

# numpy 2 warns of a conversion in Triton's own code.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
SHAPES = [(1, 1), (300, 40), (3, 5, 33), (3, 264, 768)]


def check(generator, shape, device):
    from hippos.ops.column_sums.launch import column_sums

    x = torch.randn(shape, generator=generator).to(device)
    found = column_sums(x)
    torch.testing.assert_close(found, x.double().sum(-2).float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(found, column_sums(x))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_in_the_interpreter(generator, shape):
    check(generator, shape, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (308, 3072), (1000, 8193)])
def test_sums_on_a_gpu(generator, shape):
    check(generator, shape, "cuda")
