"""The lookup's gradient against PyTorch's: on a CPU, in Triton's interpreter, and on a GPU (marked gpu)."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

from hippos.errors import UnsupportedError
from hippos.ops.embed import embed
from hippos.ops.embed.autograd import embed_op

# numpy 2 warns of a conversion in Triton's own code.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1")


def draw_ids(generator, kind, n_places, n_rows):
    """Numbers of rows: all alike, most of them alike, few, or many different ones."""
    if kind == "alike":
        return torch.full((n_places,), n_rows - 1)
    ids = torch.randint(n_rows if kind == "many" else 3, (n_places,), generator=generator)
    if kind == "mostly":
        ids[torch.rand(n_places, generator=generator) < 0.8] = 1
    return ids


def check(generator, kind, n_places, n_rows, width, dtype, device):
    ids = draw_ids(generator, kind, n_places, n_rows).to(device)
    weight = torch.randn(n_rows, width, generator=generator).to(dtype).to(device).requires_grad_()
    dout = torch.randn(n_places, width, generator=generator).to(dtype).to(device)
    rows = embed(ids, weight, impl="triton")
    assert torch.equal(rows, weight[ids])
    (found,) = torch.autograd.grad(rows, weight, dout)
    wanted = torch.zeros(n_rows, width, dtype=torch.float64, device=device).index_add(0, ids, dout.double())
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted.to(dtype), rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-4)
    (again,) = torch.autograd.grad(embed(ids, weight, impl="triton"), weight, dout)
    assert torch.equal(found, again)


@interpreted
@pytest.mark.parametrize("kind", ["alike", "mostly", "few", "many"])
@pytest.mark.parametrize(("n_places", "n_rows"), [(1, 5), (16, 20), (17, 20), (100, 40)])
def test_gradients_in_the_interpreter(generator, kind, n_places, n_rows):
    check(generator, kind, n_places, n_rows, 12, torch.float32, "cpu")
    check(generator, kind, n_places, n_rows, 16, torch.float16, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["alike", "mostly", "few", "many"])
@pytest.mark.parametrize(("n_places", "n_rows", "width"), [(1, 5, 48), (1000, 300, 768), (32768, 50264, 768)])
def test_gradients_on_a_gpu(generator, kind, n_places, n_rows, width, dtype):
    check(generator, kind, n_places, n_rows, width, dtype, "cuda")


@interpreted
def test_places_of_any_shape_in_the_interpreter(generator):
    ids = torch.randint(7, (2, 3, 5), generator=generator, dtype=torch.int32)
    weight = torch.randn(7, 4, generator=generator, requires_grad=True)
    rows = embed(ids, weight, impl="triton")
    torch.testing.assert_close(rows, F.embedding(ids, weight))
    dout = torch.randn(5, 3, 2, 4, generator=generator).transpose(0, 2)
    found, wanted = (torch.autograd.grad(y, weight, dout)[0] for y in (rows, F.embedding(ids, weight)))
    torch.testing.assert_close(found, wanted)


@pytest.mark.skipif(IS_INTERPRETED, reason="Triton's interpreter runs on a CPU")
def test_the_operator_keeps_its_promises(generator):
    weight = torch.randn(7, 4, generator=generator, requires_grad=True)
    arguments = (torch.randint(7, (2, 3), generator=generator), weight)
    torch.library.opcheck(embed_op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(IS_INTERPRETED, reason="Triton's interpreter runs on a CPU")
def test_a_cpu_looks_up_as_pytorch_does(generator):
    weight, ids = torch.randn(7, 4, generator=generator), torch.tensor([[0, 6], [3, 3]])
    assert torch.equal(embed(ids, weight), weight[ids])
    assert embed(ids[:0], weight).shape == (0, 2, 4)
    with pytest.raises(UnsupportedError, match="it needs CUDA tensors, got cpu"):
        embed(ids, weight, impl="triton")
    with pytest.raises(UnsupportedError, match="not float64"):
        embed(ids, weight.double(), impl="triton")
    with pytest.raises(ValueError, match=r"shape \(rows, D\), got \(7,\)"):
        embed(ids, weight[:, 0])
    with pytest.raises(TypeError, match=r"got torch\.float32"):
        embed(ids.float(), weight)
