"""The kernels of a decode step against their definitions: in Triton's interpreter on a CPU, or on a GPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.decode import (
    BIAS_COLUMNS,
    StepBooks,
    add_norm,
    attention_step,
    finish_step,
    greedy_step,
    linear_step,
    linear_step_parts,
    norm_tokens,
)

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
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5}
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


def skip_interpreted_bfloat16(device: str, dtype: torch.dtype) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bfloat16 is wrong")


pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def draw(generator: torch.Generator, *shape: int, device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@on_a_device
@dtypes
@pytest.mark.parametrize("batch", [1, 2, 17, 64])
@pytest.mark.parametrize(
    ("n_weights", "n_rows", "n_inputs", "gelu"),
    [(1, 128, 64, True), (3, 64, 128, False), (2, 192, 320, False), (1, 64, 1024, True)],
)
def test_linear_maps(generator, device, dtype, batch, n_weights, n_rows, n_inputs, gelu):
    skip_interpreted_bfloat16(device, dtype)
    x = draw(generator, batch, n_inputs, device=device, dtype=dtype)
    weights = [draw(generator, n_rows, n_inputs, device=device, dtype=dtype, scale=0.1) for _ in range(n_weights)]
    biases = [draw(generator, n_rows, device=device, dtype=dtype) for _ in range(n_weights)]
    got = linear_step(x, weights, biases, gelu=gelu)
    wanted = linear_step(
        x.double(), [w.double() for w in weights], [b.double() for b in biases], gelu=gelu, impl="reference"
    )
    assert got.dtype == dtype
    assert distance(got, wanted) < TOLERANCES[dtype]


@on_a_device
@dtypes
@pytest.mark.parametrize("n_inputs", [64, 192, 2048])
def test_one_token_normalised_before_and_added_after(generator, device, dtype, n_inputs):
    skip_interpreted_bfloat16(device, dtype)
    x = draw(generator, 1, n_inputs, device=device, dtype=dtype)
    weight = draw(generator, 128, n_inputs, device=device, dtype=dtype, scale=0.1)
    bias = draw(generator, 128, device=device, dtype=dtype)
    norm = (
        draw(generator, n_inputs, device=device, dtype=dtype),
        draw(generator, n_inputs, device=device, dtype=dtype),
    )
    stream = draw(generator, 1, 128, device=device, dtype=dtype)
    wide = [tensor.double() for tensor in (x, weight, bias, *norm, stream)]
    got = linear_step(x, [weight], [bias], norm=(*norm, 1e-5))
    wanted = linear_step(wide[0], [wide[1]], [wide[2]], norm=(wide[3], wide[4], 1e-5), impl="reference")
    assert distance(got, wanted) < TOLERANCES[dtype]
    summed = linear_step(x, [weight], [bias], add_to=stream)
    assert summed is stream
    wanted = linear_step(wide[0], [wide[1]], [wide[2]], add_to=wide[5], impl="reference")
    assert distance(stream, wanted) < TOLERANCES[dtype]


@on_a_device
@dtypes
@pytest.mark.parametrize("batch", [2, 5, 64])
@pytest.mark.parametrize(("n_rows", "n_inputs"), [(128, 64), (64, 1024), (192, 768)])
def test_parts_are_added_and_normalised(generator, device, dtype, batch, n_rows, n_inputs):
    skip_interpreted_bfloat16(device, dtype)
    x = draw(generator, batch, n_inputs, device=device, dtype=dtype)
    weight = draw(generator, n_rows, n_inputs, device=device, dtype=dtype, scale=0.1)
    bias, *norm = (draw(generator, n_rows, device=device, dtype=dtype) for _ in range(3))
    stream = draw(generator, batch, n_rows, device=device, dtype=dtype)
    before = stream.clone()
    parts = linear_step_parts(x, weight)
    product = x.double() @ weight.double().t()
    assert distance(parts.sum(0), product) < TOLERANCES[dtype] / 2
    u = add_norm(stream, parts, bias, *norm, 1e-5)
    wanted = before.double() + product + bias.double()
    assert distance(stream, wanted) < TOLERANCES[dtype]
    wanted = torch.layer_norm(stream.double(), (n_rows,), *(tensor.double() for tensor in norm), 1e-5)
    assert distance(u, wanted) < TOLERANCES[dtype]
    kept = stream.clone()
    assert distance(add_norm(stream, None, None, *norm, 1e-5), wanted) < TOLERANCES[dtype]
    assert torch.equal(stream, kept)


@on_a_device
@dtypes
@pytest.mark.parametrize("n_parts", [0, 3])
def test_the_end_of_a_step_keeps_the_books(generator, device, dtype, n_parts):
    skip_interpreted_bfloat16(device, dtype)
    batch, d_model, n_tokens = 3, 192, 11
    x = draw(generator, batch, d_model, device=device, dtype=dtype)
    parts = draw(generator, 3, batch, d_model, device=device, dtype=torch.float32) if n_parts else None
    bias, weight, shift = (draw(generator, d_model, device=device, dtype=dtype) for _ in range(3))
    books = []
    for impl in ("triton", "reference"):
        kept = StepBooks(
            hidden=torch.full_like(x, torch.nan),
            tokens=torch.tensor([4, 0, 10], device=device),
            seen=torch.zeros(batch, 2 * n_tokens, dtype=torch.bool, device=device)[:, :n_tokens],
            lengths=torch.tensor([7, 1, 100], device=device),
            ring=torch.tensor([41], device=device),
        )
        finish_step(x.clone(), parts, bias if n_parts else None, (weight, shift, 1e-5), kept, impl=impl)
        books.append(kept)
    found, wanted = books
    assert distance(found.hidden, wanted.hidden) < TOLERANCES[dtype]
    assert found.seen.nonzero().tolist() == [[0, 4], [1, 0], [2, 10]]
    assert found.lengths.tolist() == [8, 2, 101]
    assert found.ring.tolist() == [42]
    assert all(torch.equal(a, b) for a, b in zip(found[1:], wanted[1:], strict=True))


@on_a_device
@dtypes
@pytest.mark.parametrize("has_ones", [False, True])
@pytest.mark.parametrize(("n_tokens", "d_model"), [(1, 64), (5, 192), (33, 128)])
def test_tokens_of_a_prompt_normalised(generator, device, dtype, has_ones, n_tokens, d_model):
    skip_interpreted_bfloat16(device, dtype)
    x, weight, bias = (
        draw(generator, *size, device=device, dtype=dtype) for size in ((n_tokens, d_model), (d_model,), (d_model,))
    )
    shift = draw(generator, d_model, device=device, dtype=torch.float32)
    got = norm_tokens(x, shift, weight, bias, 1e-5, has_ones=has_ones)
    wide = [tensor.double() for tensor in (x, shift, weight, bias)]
    wanted = norm_tokens(*wide, 1e-5, has_ones=has_ones, impl="reference")
    assert got.shape == wanted.shape == (n_tokens, d_model + has_ones * BIAS_COLUMNS)
    assert distance(got[:, :d_model], wanted[:, :d_model]) < TOLERANCES[dtype]
    assert torch.equal(got[:, d_model:].double(), wanted[:, d_model:])
    normal = torch.layer_norm(wide[0] + wide[1], (d_model,), *wide[2:], 1e-5)
    torch.testing.assert_close(wanted[:, :d_model], normal)


@on_a_device
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["float16", "bfloat16", "float32"]
)
@pytest.mark.parametrize(("n_heads", "head_dim"), [(2, 64), (3, 16), (1, 80)])
@pytest.mark.parametrize("lengths", [[0], [5, 0, 40], [299, 128, 127, 1]])
@pytest.mark.parametrize("layout", ["one product", "turned queries and keys", "transposed"])
def test_attention(generator, device, dtype, n_heads, head_dim, lengths, layout):
    skip_interpreted_bfloat16(device, dtype)
    batch, context = len(lengths), 300
    tokens = draw(generator, batch, 3 * n_heads * head_dim, device=device, dtype=dtype)
    q, k, v = tokens.view(batch, 3, n_heads, head_dim).unbind(1)
    if layout == "turned queries and keys":
        q, k = q.clone(memory_format=torch.contiguous_format), k.clone(memory_format=torch.contiguous_format)
    elif layout == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    keys, values = (draw(generator, batch, n_heads, context, head_dim, device=device, dtype=dtype) for _ in range(2))
    for row, length in enumerate(lengths):  # what lies behind a text must not matter, whatever it is
        keys[row, :, length:] = values[row, :, length:] = float("nan")
    n_tokens = torch.tensor(lengths, device=device)
    wide = [tensor.double().nan_to_num() for tensor in (q, k, v, keys, values)]
    wanted = attention_step(*wide, n_tokens, impl="reference")
    got = attention_step(q, k, v, keys, values, n_tokens)
    assert distance(got, wanted) < TOLERANCES[dtype]
    for row, length in enumerate(lengths):
        assert torch.equal(keys[row, :, length], k[row])
        assert torch.equal(values[row, :, length], v[row])
        assert values[row, :, length + 1 :].isnan().all()


@on_a_device
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["float16", "bfloat16", "float32"]
)
@pytest.mark.parametrize("batch", [1, 5, 600])
def test_the_most_probable_token(generator, device, dtype, batch):
    skip_interpreted_bfloat16(device, dtype)
    n_tokens = 3000 if batch < 600 else 7
    logits = draw(generator, batch, n_tokens + 9, device=device, dtype=dtype)
    logits[:, n_tokens:] = 100
    logits[0, [2, 5]] = 50
    if batch > 1:
        for row, value in enumerate((float("nan"), float("inf"), float("-inf")), start=1):
            logits[row, 3 if value > 0 or value != value else slice(None, n_tokens)] = value
    got = greedy_step(logits, n_tokens, not_finite=-7)
    assert got.dtype == torch.int64
    assert got[0] == 2
    if batch > 1:
        assert got[1:4].tolist() == [-7, -7, -7]
        chosen = logits[4:, :n_tokens].gather(1, got[4:].unsqueeze(1)).squeeze(1)
        assert torch.equal(chosen, logits[4:, :n_tokens].amax(dim=1))


def test_refusals(generator):
    x, weight = torch.randn(2, 64, generator=generator), torch.randn(64, 64, generator=generator)
    if not IS_INTERPRETED:
        with pytest.raises(UnsupportedError, match=r"bfloat16 or float16 on a CUDA device .* got tokens \(2, 64\)"):
            linear_step(x, [weight], [weight[0]])
        with pytest.raises(UnsupportedError, match="up to 64 tokens"):
            linear_step_parts(x, weight)
    with pytest.raises(ValueError, match="for one token, got 2"):
        linear_step(x, [weight], [weight[0]], add_to=x)
