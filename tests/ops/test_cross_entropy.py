"""The chunked cross entropy against its definition: loss, gradients, memory, compilers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hippos.errors import UnsupportedError
from hippos.ops import linear_cross_entropy
from hippos.ops.cross_entropy.autograd import linear_cross_entropy_op


def make(generator, n_tokens, d_model=12, rows=40, vocab=37, dtype=torch.float32, device="cpu"):
    hidden = torch.randn(n_tokens, d_model, generator=generator, dtype=torch.float64).to(device, dtype)
    weight = torch.randn(rows, d_model, generator=generator, dtype=torch.float64).to(device, dtype)
    targets = torch.randint(vocab, (n_tokens,), generator=generator).to(device)
    targets[::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def run(function, *tensors):
    loss = function(*tensors)
    return loss.detach(), *torch.autograd.grad(2.5 * loss, tensors[:2])


def plain(hidden, weight, targets, vocab=37):
    return F.cross_entropy((hidden @ weight.t())[:, :vocab], targets, reduction="sum")


@pytest.mark.parametrize("n_tokens", [1, 2, 63, 64, 65])
@pytest.mark.parametrize("chunk_tokens", [1, 16, 64, 1000])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_loss_and_gradients_are_those_of_the_whole_product(generator, n_tokens, chunk_tokens, impl):
    tensors = make(generator, n_tokens, dtype=torch.float64)
    found = run(lambda *t: linear_cross_entropy(*t, vocab_size=37, chunk_tokens=chunk_tokens, impl=impl), *tensors)
    for got, wanted in zip(found, run(plain, *tensors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_rows_that_only_fill_up_get_no_gradient(generator):
    hidden, weight, targets = make(generator, 10)
    linear_cross_entropy(hidden, weight, targets, vocab_size=37, chunk_tokens=4).backward()
    assert weight.grad[37:].eq(0).all()
    assert weight.grad[:37].abs().sum() > 0


def test_compiled_model_gives_the_same(generator):
    tensors = make(generator, 30)

    def loss(hidden, weight, targets):
        return linear_cross_entropy(torch.tanh(hidden), weight, targets, chunk_tokens=8)

    found = run(torch.compile(loss, backend="aot_eager", fullgraph=True), *tensors)
    for got, wanted in zip(found, run(loss, *tensors), strict=True):
        torch.testing.assert_close(got, wanted)


def test_nothing_counts(generator):
    hidden, weight, targets = make(generator, 6)
    loss, *gradients = run(lambda *t: linear_cross_entropy(*t, chunk_tokens=4), hidden, weight, targets.fill_(-100))
    assert loss == 0
    assert all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_rounds_as_the_plain_way_does(generator, dtype):
    tensors = make(generator, 50)
    exact = run(plain, *(x.detach().double().requires_grad_() for x in tensors[:2]), tensors[2])
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = run(lambda *t: linear_cross_entropy(*t, vocab_size=37, chunk_tokens=16), *tensors)
        usual = run(plain, *tensors)
    for got, other, wanted in zip(found, usual, exact, strict=True):
        assert got.dtype == torch.float32
        error, usual_error = ((x.double() - wanted).norm() / wanted.norm() for x in (got, other))
        assert error < max(2 * usual_error, 1e-6)


def test_half_precision_weights(generator):
    tensors = make(generator, 20, dtype=torch.bfloat16)
    loss, d_hidden, d_weight = run(lambda *t: linear_cross_entropy(*t, chunk_tokens=8), *tensors)
    assert (loss.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)


def test_backward_may_run_twice(generator):
    hidden, weight, targets = make(generator, 9)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=4)
    first = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 3 * b)


def test_double_backward_is_refused(generator):
    hidden, weight, targets = make(generator, 9)
    loss = linear_cross_entropy(hidden, weight, targets)
    with pytest.raises(UnsupportedError, match="differentiated twice"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("wants_grad", [True, False])
def test_operator_is_sound(generator, wants_grad):
    hidden, weight, targets = make(generator, 9)
    arguments = (hidden, weight, targets, 37, 4, -100, torch.float32, wants_grad, False)
    if not wants_grad:
        arguments = (hidden.detach(), weight.detach(), *arguments[2:])
    torch.library.opcheck(
        linear_cross_entropy_op, arguments, test_utils=["test_schema", "test_faketensor", "test_autograd_registration"]
    )


def test_no_gradient_is_made_where_none_is_wanted(generator):
    hidden, weight, targets = make(generator, 9)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets, chunk_tokens=4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy(hidden, weight, targets).detach())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be at least 1, got 0"),
        ({"vocab_size": 41}, ValueError, "vocab_size must be from 1 to the 40 rows of weight, got 41"),
        ({"vocab_size": 5}, ValueError, r"target \d+ is not in the vocabulary of 5 tokens"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets must have shape \(9,\), got \(3,\)"),
        ({"targets": torch.zeros(9)}, TypeError, "targets must be int64"),
        ({"hidden": torch.zeros(9, 5)}, ValueError, r"hidden must have shape \(N, D\) and weight \(rows, D\)"),
        ({"hidden": torch.zeros(9, 12).double()}, TypeError, "of one precision"),
    ],
)
def test_wrong_arguments(generator, changes, error, message):
    hidden, weight, targets = make(generator, 9)
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{"hidden": hidden, "weight": weight, "targets": targets, **changes})
