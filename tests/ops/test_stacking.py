from __future__ import annotations

import warnings

import pytest
import torch

from hippos.ops import fft_conv, h3_mix, ssm_conv
from hippos.ops.h3_mix.autograd import h3_mix_triton
from hippos.ops.ssm_conv.autograd import ssm_conv_triton

S, BATCH, HEADS, SEQLEN, MODES, TAPS = 3, 2, 4, 21, 3, 5


def draw(generator, *sizes):
    return torch.randn(*sizes, generator=generator, dtype=torch.float64, requires_grad=True)


def modes(generator):
    decay = -draw(generator, S, HEADS, MODES).detach().abs()
    log_a = torch.stack((decay, draw(generator, S, HEADS, MODES).detach()), dim=-1).requires_grad_()
    return log_a, draw(generator, S, HEADS, MODES, 2), draw(generator, S, HEADS, MODES, 2)


def signal(generator):
    return draw(generator, S, BATCH, HEADS, SEQLEN)


def gated_conv(generator):
    inputs = (signal(generator), *modes(generator), draw(generator, S, HEADS), signal(generator), signal(generator))
    state = draw(generator, S, BATCH, HEADS, MODES, 2)

    def call(u, log_a, b, c, d, in_gate, out_gate, state):
        y, last = ssm_conv(
            u, log_a, b, c, d, in_gate=in_gate, out_gate=out_gate, initial_state=state, return_state=True
        )
        return torch.cat((y.flatten(), last.flatten()))

    return call, (*inputs, state)


def plain_conv(generator):
    return lambda u, *parameters: ssm_conv(u, *parameters), (signal(generator), *modes(generator))


def kernel_conv(generator):
    inputs = (signal(generator), *modes(generator), draw(generator, S, HEADS), signal(generator), signal(generator))
    inputs = tuple(x.detach().float().requires_grad_() for x in inputs)

    def call(u, log_a, b, c, d, in_gate, out_gate):
        return ssm_conv_triton(u, log_a, b, c, d, in_gate, out_gate, None, None, False)[0]

    return call, inputs


def mix(generator):
    q, k, v = (signal(generator) for _ in range(3))
    shift = (draw(generator, S, HEADS, TAPS), draw(generator, S, HEADS))
    return h3_mix, (q, k, v, *shift, *modes(generator), draw(generator, S, HEADS))


def kernel_mix(generator):
    _, inputs = mix(generator)
    inputs = tuple(x.detach().float().requires_grad_() for x in inputs)
    return lambda *x: h3_mix_triton(*x, 1, None, None, False)[0], inputs


def kernel_mix_of_heads(generator):
    _, inputs = kernel_mix(generator)
    inputs = (*inputs[:5], *(x[:, : x.shape[1] // 2].detach().requires_grad_() for x in inputs[5:]))
    return lambda *x: h3_mix_triton(*x, 2, None, None, False)[0], inputs


def spectral(generator):
    return fft_conv, (signal(generator), draw(generator, S, HEADS, SEQLEN), draw(generator, S, HEADS))


@pytest.mark.parametrize("make", [gated_conv, plain_conv, kernel_conv, mix, kernel_mix, kernel_mix_of_heads, spectral])
def test_a_stack_is_one_call_and_equals_one_call_after_the_other(make, generator):
    call, inputs = make(generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns where it loops over the stack
        stacked = torch.vmap(call)(*inputs)
    small = 1e-5 if stacked.dtype == torch.float32 else 1e-12
    looped = torch.stack([call(*row) for row in zip(*inputs, strict=True)])
    torch.testing.assert_close(stacked, looped, rtol=small, atol=small)
    weights = torch.randn(looped.shape, generator=generator, dtype=looped.dtype)
    wanted = torch.autograd.grad((looped * weights).sum(), inputs)
    found = torch.autograd.grad((stacked * weights).sum(), inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=10 * small, atol=10 * small)


def test_what_is_not_stacked_is_shared(generator):
    call, (u, log_a, b, c) = plain_conv(generator)
    shared = torch.vmap(call, in_dims=(None, 0, 0, 0))(u[0], log_a, b, c)
    wanted = torch.stack([call(u[0], *row) for row in zip(log_a, b, c, strict=True)])
    torch.testing.assert_close(shared, wanted, rtol=1e-12, atol=1e-12)


def test_the_stack_may_lie_on_any_axis(generator):
    call, (u, log_a, b, c) = plain_conv(generator)
    moved = torch.vmap(call, in_dims=(3, 0, 0, 1), out_dims=2)(u.movedim(0, 3), log_a, b, c.movedim(0, 1))
    torch.testing.assert_close(moved.movedim(2, 0), torch.vmap(call)(u, log_a, b, c), rtol=1e-12, atol=1e-12)
