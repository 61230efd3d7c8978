"""States without outputs, against the states and gradients of the operators that make outputs too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops import H3State, h3_mix, ssm_conv
from hippos.ops.ssm_state import (
    folding,
    h3_initial_gradient,
    h3_state_after,
    initial_gradient,
    pass_time,
    state_after,
)
from tests.ops.ssm_cases import LENGTHS, Draw, relative_error

PRECISE = 1e-11


def wanted_state(u: Tensor, gate: Tensor | None, log_a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return ssm_conv(u, log_a, b, c, in_gate=gate, return_state=True, impl="reference")[1]


def wanted_gradient(dout: Tensor, gate: Tensor | None, log_a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    state = dout.new_zeros(dout.shape[0], *log_a.shape).requires_grad_()
    y = ssm_conv(torch.zeros_like(dout), log_a, b, c, out_gate=gate, initial_state=state, impl="reference")
    return torch.autograd.grad(y, state, dout)[0]


@pytest.mark.parametrize("has_gate", [False, True])
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_against_the_operators(random: Draw, seqlen: int, has_gate: bool) -> None:
    log_a, b, c = random.modes(3, 5)
    u = random.normal(2, 3, seqlen)
    gate = random.normal(2, 3, seqlen) if has_gate else None
    assert relative_error(state_after(u, log_a, b, in_gate=gate), wanted_state(u, gate, log_a, b, c)) < PRECISE
    found = initial_gradient(u, log_a, c, out_gate=gate)
    assert relative_error(found, wanted_gradient(u, gate, log_a, b, c)) < PRECISE


def test_spans_are_joined(random: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "SPAN_LEN", 150)
    log_a, b, c = random.modes(2, 4)
    u = random.normal(1, 2, 1000)
    assert relative_error(state_after(u, log_a, b), wanted_state(u, None, log_a, b, c)) < PRECISE
    assert relative_error(initial_gradient(u, log_a, c), wanted_gradient(u, None, log_a, b, c)) < PRECISE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(random: Draw, dtype: torch.dtype) -> None:
    log_a, b, c = random.modes(4, 8)
    u, gate = random.normal(2, 4, 700, dtype=dtype), random.normal(2, 4, 700, dtype=dtype)
    parameters = (log_a.float(), b.float(), c.float())
    exact = [x.double() for x in (u, gate, *parameters)]
    found = state_after(u, parameters[0], parameters[1], in_gate=gate)
    assert found.dtype == torch.float32
    assert relative_error(found, wanted_state(*exact)) < 2e-5
    assert relative_error(initial_gradient(u, parameters[0], parameters[2]), wanted_gradient(
        exact[0], None, *exact[2:])) < 2e-5  # fmt: skip


def test_a_mode_that_forgets_at_once(random: Draw) -> None:
    log_a, b, c = random.modes(2, 3)
    log_a[:, 0, 0] = -torch.inf
    u = random.normal(1, 2, 130)
    assert relative_error(state_after(u, log_a, b), wanted_state(u, None, log_a, b, c)) < PRECISE
    gradient = initial_gradient(u, log_a, c)
    assert relative_error(gradient[:, :, 1:], wanted_gradient(u, None, log_a, b, c)[:, :, 1:]) < PRECISE
    assert bool((gradient[:, :, 0] == 0).all())


@pytest.mark.parametrize("seqlen", [3, 64, 200])
@pytest.mark.parametrize("head_dim", [1, 2])
def test_of_h3(random: Draw, head_dim: int, seqlen: int) -> None:
    n_heads, n_taps = 3, 6
    d_model = n_heads * head_dim
    q, k, v = (random.normal(2, d_model, seqlen) for _ in range(3))
    shift, skip = random.normal(d_model, n_taps), random.normal(d_model)
    log_a, b, c = random.modes(n_heads, 4)
    past = random.normal(2, d_model, n_taps - 1)
    shape = (2, n_heads, *((head_dim, head_dim) if head_dim > 1 else ()), 4, 2)
    empty = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y, wanted = h3_mix(
        q, k, v, shift, skip, log_a, b, c, random.normal(n_heads),
        head_dim=head_dim, initial_state=H3State(past, empty), return_state=True, impl="reference",
    )  # fmt: skip
    found = h3_state_after(k, v, shift, skip, log_a, b, past=past, head_dim=head_dim)
    assert relative_error(found, wanted.diag) < PRECISE
    dout = random.normal(2, d_model, seqlen)
    gradient = torch.autograd.grad(y, empty, dout)[0]
    assert relative_error(h3_initial_gradient(dout, q, log_a, c, head_dim=head_dim), gradient) < PRECISE


def test_time_passes(random: Draw) -> None:
    log_a, b, c = random.modes(2, 3)
    state = random.normal(1, 2, 3, 2)
    silence = torch.zeros(1, 2, 37, dtype=torch.float64)
    _, wanted = ssm_conv(silence, log_a, b, c, initial_state=state, return_state=True, impl="reference")
    assert relative_error(pass_time(state, log_a, 37), wanted) < PRECISE


class TestRefusals:
    """What cannot be summed."""

    def test_shapes(self, random: Draw) -> None:
        log_a, b, _ = random.modes(2, 3)
        with pytest.raises(ValueError, match="gate must have shape"):
            state_after(random.normal(1, 2, 5), log_a, b, in_gate=random.normal(1, 2, 4))
        with pytest.raises(ValueError, match="log_a must have shape"):
            state_after(random.normal(1, 3, 5), log_a, b)

    def test_no_kernels_here(self, random: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        log_a, b, _ = random.modes(2, 3)
        with pytest.raises(UnsupportedError, match="state_after cannot run with impl='triton'"):
            state_after(random.normal(1, 2, 5), log_a, b, impl="triton")
