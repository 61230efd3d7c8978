"""SSMs with a full state matrix: every form against the recurrence, one sample after another."""

from __future__ import annotations

import pytest
import torch

from hippos.ops import fft_conv
from hippos.ops.ssm_dense import dense_advance, dense_filter, dense_response, dense_step

LENGTHS = (1, 2, 3, 5, 16, 17, 63, 100)


def make_ssm(generator: torch.Generator, n_heads: int = 3, d_state: int = 6) -> tuple[torch.Tensor, ...]:
    """Draw a contraction and vectors, float64."""
    square = torch.randn(n_heads, d_state, d_state, generator=generator, dtype=torch.float64)
    a = 0.97 * torch.linalg.qr(square)[0]
    b, c = torch.randn(2, n_heads, d_state, generator=generator, dtype=torch.float64)
    return a, b, c


@pytest.mark.parametrize("seqlen", LENGTHS)
def test_filter_is_the_impulse_response(generator, seqlen):
    a, b, c = make_ssm(generator)
    taps = [torch.einsum("hn,hnm,hm->h", c, torch.linalg.matrix_power(a, lag), b) for lag in range(seqlen)]
    torch.testing.assert_close(dense_filter(a, b, c, seqlen), torch.stack(taps, dim=-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seqlen", LENGTHS)
@pytest.mark.parametrize("has_state", [True, False])
def test_whole_sequence_equals_steps(generator, seqlen, has_state):
    a, b, c = make_ssm(generator)
    d = torch.randn(3, generator=generator, dtype=torch.float64)
    u = torch.randn(2, 3, seqlen, generator=generator, dtype=torch.float64)
    state = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64) if has_state else None
    y = fft_conv(u, dense_filter(a, b, c, seqlen), d)
    if state is not None:
        y = y + dense_response(state, a, c, seqlen)
    stepped = torch.zeros(2, 3, 6, dtype=torch.float64) if state is None else state.clone()
    columns = [dense_step(u[..., i], stepped, a, b, c, d) for i in range(seqlen)]
    torch.testing.assert_close(y, torch.stack(columns, dim=-1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(dense_advance(u, state, a, b), stepped, rtol=1e-11, atol=1e-11)


def test_gradients(generator):
    a, b, c = (tensor[:2].requires_grad_() for tensor in make_ssm(generator, n_heads=2, d_state=3))
    u = torch.randn(1, 2, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    state = torch.randn(1, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *values: dense_filter(*values, 7), (a, b, c))
    assert torch.autograd.gradcheck(lambda *values: dense_response(*values, 7), (state, a, c))
    assert torch.autograd.gradcheck(dense_advance, (u, state, a, b))


def test_bad_input(generator):
    a, b, c = make_ssm(generator)
    with pytest.raises(ValueError, match=r"a must have shape \(H, N, N\) = \(3, 6, 6\)"):
        dense_filter(a[:, :5], b, c, 4)
    with pytest.raises(ValueError, match="filter_len must be at least 1, got 0"):
        dense_filter(a, b, c, 0)
    with pytest.raises(ValueError, match="seqlen must be at least 1, got 0"):
        dense_response(torch.zeros(1, 3, 6), a, c, 0)
    with pytest.raises(ValueError, match="state must have shape"):
        dense_response(torch.zeros(1, 3, 5), a, c, 2)
    with pytest.raises(TypeError, match="b must have one of the dtypes"):
        dense_filter(a, b.half(), c, 4)
    with pytest.raises(ValueError, match="b must have shape"):
        dense_advance(torch.zeros(1, 4, 2), None, a, b)
    with pytest.raises(ValueError, match="d must have shape"):
        dense_step(torch.zeros(1, 3), torch.zeros(1, 3, 6), a, b, c, torch.zeros(2))
