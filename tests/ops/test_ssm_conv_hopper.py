"""The programs of ssm_conv for Hopper, run on a CPU by `gluon_on_cpu`, against the definition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hippos.ops import ssm_conv
from hippos.ops.ssm_conv import chunked
from hippos.ops.ssm_conv.chunked import Inputs
from tests.ops.gluon_on_cpu import run_program
from tests.ops.ssm_cases import Draw, relative_error

FOLDER = Path(chunked.__file__).parent
CHUNK, MODES = 64, 32
ROUNDING = {torch.bfloat16: 1.65e-3, torch.float16: 2.1e-4}


def make_inputs(batch, n_heads, seqlen, dtype) -> tuple[Inputs, torch.Tensor]:
    random = Draw(seed=0)
    u, in_gate, out_gate, dout = (random.normal(batch, n_heads, seqlen, dtype=dtype) for _ in range(4))
    modes = random.modes(n_heads, MODES, dtype=torch.float32)
    return Inputs(u, *modes, random.normal(n_heads, dtype=torch.float32), in_gate, out_gate, None), dout


def operators(log_a, b, c, d):
    """taps (H, T), into and outof (H, T, M, 2), decay (H, M, 2), in the parameters' dtype."""
    log_a, b, c = (torch.view_as_complex(x) for x in (log_a, b, c))
    powers = torch.exp(log_a.unsqueeze(1) * torch.arange(CHUNK).unsqueeze(1))  # (H, T, M)
    taps = 2 * (b.unsqueeze(1) * c.unsqueeze(1) * powers).real.sum(-1)
    taps = torch.cat((taps[:, :1] + d.unsqueeze(1), taps[:, 1:]), dim=1)
    into = torch.view_as_real((b.unsqueeze(1) * powers).flip(1))
    outof = c.unsqueeze(1) * torch.exp(log_a).unsqueeze(1) * powers
    return taps, into, torch.stack((2 * outof.real, -2 * outof.imag), -1), torch.view_as_real(torch.exp(log_a * CHUNK))


def in_parts(x):
    leading = x.bfloat16()
    return torch.stack((leading, (x - leading).bfloat16())).contiguous()


def strides(*signals):
    return [stride for signal in signals for stride in signal.stride()[:2]]


def exact(inputs: Inputs) -> Inputs:
    return Inputs(*(None if x is None else x.double().requires_grad_() for x in inputs))


def convolve(inputs: Inputs, **options):
    return ssm_conv(*inputs[:5], in_gate=inputs.in_gate, out_gate=inputs.out_gate, impl="torch", **options)


@pytest.mark.parametrize(
    ("batch", "seqlen", "run", "dtype", "has_initial"),
    [
        (16, 512, 4, torch.bfloat16, True),
        (8, 512, 8, torch.float16, False),
        (4, 1024, 16, torch.bfloat16, False),
        (2, 4096, 32, torch.bfloat16, False),
        (1, 8192, 64, torch.bfloat16, True),
    ],
)
def test_forward(batch, seqlen, run, dtype, has_initial):
    inputs, _ = make_inputs(batch, 1, seqlen, dtype)
    initial = Draw(seed=1).normal(batch, 1, MODES, 2, dtype=torch.float32) if has_initial else None
    taps, into, outof, decay = operators(*(x.double() for x in inputs[1:5]))
    y = torch.empty_like(inputs.u)
    state = torch.empty(batch, 1, MODES, 2)
    saved = torch.empty(batch, 1, seqlen // 256, MODES, 2, dtype=torch.bfloat16)
    planar = torch.empty(1) if initial is None else initial.transpose(-1, -2).contiguous()
    signals = (inputs.u, inputs.in_gate, inputs.out_gate, y)
    modules = ("kernels_hopper", "kernels_hopper_forward")
    run_program(
        FOLDER, modules, "ssm_conv_fwd_hopper_kernel", 1,
        *signals, in_parts(taps), in_parts(into), in_parts(outof), decay.float().contiguous(), planar, state, saved,
        *strides(*signals), 1, seqlen // (64 * run), batch * run // 64, batch * run // 64, seqlen // 256,
        0 if initial is None else batch,
        RUN=run, SAVES=True, WANTS_STATE=True,
    )  # fmt: skip
    wanted, wanted_state = convolve(exact(inputs), initial_state=initial, return_state=True)
    assert relative_error(y, wanted) < 1.1 * ROUNDING[dtype]
    assert relative_error(state, wanted_state) < 1e-5
    until = Inputs(*(x[..., :256] if x is not None and x.dim() == 3 and x.shape[-1] == seqlen else x for x in inputs))
    _, second = convolve(exact(until), initial_state=initial, return_state=True)
    assert relative_error(saved[:, :, 1], second) < 2 * ROUNDING[torch.bfloat16]


def adjoint_states(inputs: Inputs, dout, ends) -> torch.Tensor:
    """The adjoint state after each of the samples ``ends``, planar, (B, len(ends), H, 2, M)."""
    log_a, c = (torch.view_as_complex(x.double()) for x in (inputs.log_a, inputs.c))
    gradient = (dout * inputs.out_gate).to(torch.complex128)
    states = []
    for end in ends:
        times = torch.arange(1, dout.shape[-1] - end + 1)
        factors = c.unsqueeze(1) * torch.exp(log_a.unsqueeze(1) * times.unsqueeze(1))
        states.append(torch.einsum("bhl,hlm->bhm", gradient[..., end:], factors))
    states = torch.stack(states, dim=1)
    return torch.stack((2 * states.real, -2 * states.imag), dim=-2).float().contiguous()


@pytest.mark.parametrize(
    ("batch", "seqlen", "run", "n_pieces"),
    [
        (16, 512, 4, 1),
        (32, 256, 4, 1),
        (8, 1024, 4, 2),
        (8, 1024, 8, 1),
        (4, 1024, 16, 1),
        (2, 4096, 32, 1),
        (1, 8192, 64, 1),
    ],
)
def test_backward(batch, seqlen, run, n_pieces):
    inputs, dout = make_inputs(batch, 1, seqlen, torch.bfloat16)
    taps, into, outof, decay = operators(*(x.double() for x in inputs[1:5]))
    n_saved, length, n_groups = seqlen // 256, seqlen // n_pieces, batch * n_pieces * run // 64
    splits = 1 if n_groups == 1 else 2
    saved = torch.zeros(batch, 1, n_saved, MODES, 2, dtype=torch.bfloat16)
    for i in range(1, n_saved):
        until = (x[..., : 256 * i] if x is not None and x.dim() == 3 and x.shape[-1] == seqlen else x for x in inputs)
        saved[:, :, i] = convolve(Inputs(*until), return_state=True)[1]
    later = adjoint_states(inputs, dout, [length * (i + 1) for i in range(n_pieces)])
    gradients = [torch.empty_like(dout) for _ in range(3)]
    shapes = ((CHUNK, CHUNK), (CHUNK, MODES, 2), (CHUNK, MODES, 2), (MODES, 2))
    partial = [torch.empty(splits, *shape) for shape in shapes]
    signals = (inputs.u, inputs.in_gate, inputs.out_gate, dout)
    halved = [x.bfloat16().contiguous() for x in (taps, into, outof)]
    run_program(
        FOLDER, ("kernels_hopper", "kernels_hopper_backward"), "ssm_conv_bwd_hopper_kernel", splits,
        *signals, *gradients, *halved, decay.float().contiguous(), saved, later, *partial, *strides(*signals),
        1, n_pieces, length, length // (64 * run), n_groups, -(-n_groups // splits), n_saved,
        batch * n_pieces if n_pieces > 1 else 0,
        RUN=run, IS_CUT=n_pieces > 1,
    )  # fmt: skip
    leaves = exact(inputs)
    u, log_a, b, c, d, in_gate, out_gate, _ = leaves
    present = (u, in_gate, out_gate, log_a, b, c, d)
    wanted = torch.autograd.grad(convolve(leaves), present, dout.double())
    made = operators(log_a, b, c, d)
    lag = torch.arange(CHUNK) - torch.arange(CHUNK).unsqueeze(1)
    toeplitz = torch.where(lag >= 0, made[0][:, lag.clamp(min=0)], 0.0)
    sums = [x.sum(0, dtype=torch.float64) for x in partial]
    loss = sum((x * gradient).sum() for x, gradient in zip((toeplitz, *made[1:]), sums, strict=True))
    found = (*gradients, *torch.autograd.grad(loss, present[3:]))
    for got, want in zip(found, wanted, strict=True):
        # Few numbers do not average their errors out.
        assert relative_error(got, want) < (3 if want.numel() > 256 else 6) * ROUNDING[torch.bfloat16]
