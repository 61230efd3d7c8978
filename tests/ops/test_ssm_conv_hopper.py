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
MODULES = ("kernels", "kernels_operators", "kernels_hopper", "kernels_hopper_scan", "kernels_hopper_operators")
BACKWARD = ("kernels_hopper_parameters", "kernels_hopper_backward")
ROUNDING = {torch.bfloat16: 1.65e-3, torch.float16: 2.1e-4}


def make_inputs(batch, n_heads, seqlen, dtype, n_modes=MODES) -> tuple[Inputs, torch.Tensor]:
    random = Draw(seed=0)
    u, in_gate, out_gate, dout = (random.normal(batch, n_heads, seqlen, dtype=dtype) for _ in range(4))
    modes = random.modes(n_heads, n_modes, dtype=torch.float32)
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


def padded(x):
    """Zero modes up to those of a program."""
    return torch.nn.functional.pad(x, (0, 0, 0, MODES - x.shape[-2]))


def strides(*signals):
    return [stride for signal in signals for stride in signal.stride()[:2]]


def exact(inputs: Inputs) -> Inputs:
    return Inputs(*(None if x is None else x.double().requires_grad_() for x in inputs))


def convolve(inputs: Inputs, **options):
    return ssm_conv(*inputs[:5], in_gate=inputs.in_gate, out_gate=inputs.out_gate, impl="torch", **options)


def stored(taps, into, outof, planes):
    """The operators as `chunk_operators_kernel` stores them in float16, and the exponents of their scales."""
    parts, exponents = [], []
    for x in (taps, into, outof):
        exponent = 13 - torch.floor(torch.log2(x.abs().flatten(1).amax(1)))
        scaled = x * torch.exp2(exponent).view(-1, *[1] * (x.dim() - 1))
        leading = scaled.half()
        parts.append(torch.stack((leading, (scaled - leading).half())[:planes]).contiguous())
        exponents.append(exponent.to(torch.int32))
    return *parts, torch.stack(exponents, 1).contiguous()


def without(inputs: Inputs, absent: tuple[str, ...]) -> Inputs:
    return inputs._replace(**dict.fromkeys(absent))


def or_u(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """u and the gates, in whose place u stands for those that are absent."""
    return tuple(inputs.u if x is None else x for x in (inputs.u, inputs.in_gate, inputs.out_gate))


@pytest.mark.parametrize("makes", [True, False])
@pytest.mark.parametrize(
    ("batch", "seqlen", "run", "dtype", "n_modes", "has_initial", "absent"),
    [
        (16, 512, 4, torch.bfloat16, 32, True, ()),
        (8, 512, 8, torch.float16, 32, False, ("out_gate",)),
        (4, 1024, 16, torch.bfloat16, 20, False, ("in_gate",)),
        (2, 4096, 32, torch.bfloat16, 32, False, ()),
        (1, 8192, 64, torch.bfloat16, 32, True, ()),
        # Tiles that are not full: of sequences, of chunks, of both.
        (3, 1024, 16, torch.float16, 32, True, ()),
        (1, 2048, 64, torch.bfloat16, 17, True, ()),
        (5, 320, 8, torch.bfloat16, 32, True, ("in_gate", "out_gate")),
        (1, 64, 4, torch.bfloat16, 32, True, ()),
    ],
)
def test_forward(batch, seqlen, run, dtype, n_modes, has_initial, absent, makes):
    inputs = without(make_inputs(batch, 1, seqlen, dtype, n_modes)[0], absent)
    initial = Draw(seed=1).normal(batch, 1, n_modes, 2, dtype=torch.float32) if has_initial else None
    taps, into, outof, decay = operators(*(padded(x).double() for x in inputs[1:4]), inputs.d.double())
    y, n_saved = torch.empty_like(inputs.u), -(-seqlen // 256)
    state = torch.empty(batch, 1, MODES, 2)
    saved_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    saved = torch.empty(batch, 1, n_saved, MODES, 2, dtype=saved_dtype)
    planar = torch.empty(1) if initial is None else padded(initial).transpose(-1, -2).contiguous()
    signals, planes = (*or_u(inputs), y), 2 if dtype == torch.float16 else 1
    taps, into, outof, exponents = stored(taps, into, outof, planes)
    n_groups = -(-batch * run // 64)
    run_program(
        FOLDER, (*MODULES, "kernels_hopper_forward"), "ssm_conv_fwd_hopper_kernel", 1,
        *signals, taps, into, outof, decay.float().contiguous(), exponents, *inputs[1:5], planar, state, saved,
        *strides(*signals), 1, n_modes, batch, seqlen, -(-seqlen // (64 * run)), n_groups, n_groups, n_saved,
        0 if initial is None else batch,
        RUN=run, PLANES=planes, SAVES=True, WANTS_STATE=True, MAKES=makes,
        HAS_D=True, HAS_IN="in_gate" not in absent, HAS_OUT="out_gate" not in absent,
        IS_FULL=batch * run % 64 == 0 and seqlen % (64 * run) == 0, n_warps=4,
    )  # fmt: skip
    wanted, wanted_state = convolve(exact(inputs), initial_state=initial, return_state=True)
    # Samples and states are rounded to float16, which is noticed in float16 alone.
    assert relative_error(y, wanted) < (1.9 if dtype == torch.float16 else 1.2) * ROUNDING[dtype]
    # Samples enter the states with the eleven digits of float16, operators of bfloat16 signals too.
    assert relative_error(state[..., :n_modes, :], wanted_state) < (3.2e-4 if dtype == torch.float16 else 5e-4)
    if n_saved > 1:
        until = (x[..., :256] if x is not None and x.dim() == 3 and x.shape[-1] == seqlen else x for x in inputs)
        _, second = convolve(exact(Inputs(*until)), initial_state=initial, return_state=True)
        assert relative_error(saved[:, :, 1, :n_modes], second) < 2 * ROUNDING[torch.bfloat16]


def adjoint_states(inputs: Inputs, dout, ends) -> torch.Tensor:
    """The adjoint state after each of the samples ``ends``, planar, (B, len(ends), H, 2, M)."""
    log_a, c = (torch.view_as_complex(x.double()) for x in (inputs.log_a, inputs.c))
    gradient = (dout if inputs.out_gate is None else dout * inputs.out_gate).to(torch.complex128)
    states = []
    for end in ends:
        times = torch.arange(1, dout.shape[-1] - end + 1)
        factors = c.unsqueeze(1) * torch.exp(log_a.unsqueeze(1) * times.unsqueeze(1))
        states.append(torch.einsum("bhl,hlm->bhm", gradient[..., end:], factors))
    states = torch.stack(states, dim=1)
    return torch.stack((2 * states.real, -2 * states.imag), dim=-2).float().contiguous()


@pytest.mark.parametrize(
    ("batch", "seqlen", "run", "n_pieces", "n_modes", "absent"),
    [
        (16, 512, 4, 1, 32, ()),
        (32, 256, 4, 1, 32, ("in_gate",)),
        (8, 1024, 4, 2, 32, ()),
        (8, 1024, 8, 1, 20, ("out_gate",)),
        (4, 1024, 16, 1, 32, ()),
        (2, 4096, 32, 1, 32, ()),
        (1, 8192, 64, 1, 32, ()),
        # Tiles that are not full: of sequences, of chunks, of both.
        (3, 1024, 16, 1, 32, ()),
        (1, 2048, 64, 1, 17, ()),
        (5, 320, 8, 1, 32, ("in_gate", "out_gate")),
        (1, 64, 4, 1, 32, ()),
    ],
)
@pytest.mark.parametrize("ends", [True, False], ids=["parameters", "operators"])
def test_backward(batch, seqlen, run, n_pieces, n_modes, absent, ends):
    check_backward(batch, seqlen, run, n_pieces, n_modes, absent, ends)


@pytest.mark.parametrize(("batch", "seqlen", "run", "ends"), [(1, 8192, 64, False), (2, 4096, 32, True)])
def test_backward_with_the_gradient_of_what_follows(batch, seqlen, run, ends):
    dstate = Draw(seed=2).normal(batch, 1, MODES, 2, dtype=torch.float32)
    check_backward(batch, seqlen, run, 1, MODES, (), ends, dstate)


@pytest.mark.parametrize(
    ("batch", "seqlen", "run", "ends"), [(16, 512, 4, True), (3, 1024, 16, True), (32, 256, 4, False)]
)
def test_backward_with_biases_to_be_added(batch, seqlen, run, ends):
    check_backward(batch, seqlen, run, 1, MODES, (), ends, has_bias=True)


def check_backward(batch, seqlen, run, n_pieces, n_modes, absent, ends, dstate=None, has_bias=False):
    inputs, dout = make_inputs(batch, 1, seqlen, torch.bfloat16, n_modes)
    inputs = without(inputs, absent)
    biases, lacking = [torch.empty(1)] * 4, inputs
    if has_bias:
        added = [torch.tensor([0.5]), torch.tensor([-1.0])]
        whole = [(x.float() + bias).bfloat16() for x, bias in zip((inputs.u, inputs.out_gate), added, strict=True)]
        inputs = inputs._replace(u=whole[0], out_gate=whole[1])
    taps, into, outof, decay = operators(*(padded(x).double() for x in inputs[1:4]), inputs.d.double())
    n_saved, length, n_groups = -(-seqlen // 256), seqlen // n_pieces, -(-batch * n_pieces * run // 64)
    splits = 1 if n_groups == 1 or ends else 2
    saved = torch.zeros(batch, 1, n_saved, MODES, 2, dtype=torch.bfloat16)
    for i in range(1, n_saved):
        until = (x[..., : 256 * i] if x is not None and x.dim() == 3 and x.shape[-1] == seqlen else x for x in inputs)
        saved[:, :, i, :n_modes] = convolve(Inputs(*until), return_state=True)[1]
    later = padded(adjoint_states(inputs, dout, [length * (i + 1) for i in range(n_pieces)]).mT).mT.contiguous()
    if dstate is not None:
        later = dstate.mT.contiguous()
    gradients = [torch.full_like(dout, torch.nan) for _ in range(3)]
    shapes = ((CHUNK, CHUNK), (CHUNK, MODES, 2), (CHUNK, MODES, 2), (MODES, 2))
    partial = [torch.empty(splits, *shape) for shape in shapes]
    parameters = [torch.full_like(x, torch.nan) for x in inputs[1:5]]
    if has_bias:
        biases = [*added, *(torch.full((splits,), torch.nan) for _ in range(2))]
    signals = (*or_u(lacking), dout)
    halved = [x.bfloat16().contiguous() for x in (taps, into, outof)]
    run_program(
        FOLDER, (*MODULES, *BACKWARD), "ssm_conv_bwd_hopper_kernel", splits,
        *signals, *gradients, *halved, decay.float().contiguous(), *inputs[1:5], saved, later, *partial, *parameters,
        *biases, *strides(*signals), 1, n_modes, batch, seqlen, n_pieces, length, -(-length // (64 * run)), n_groups,
        -(-n_groups // splits), n_saved, batch * n_pieces if n_pieces > 1 or dstate is not None else 0,
        RUN=run, IS_CUT=n_pieces > 1, IS_FULL=batch * n_pieces * run % 64 == 0 and length % (64 * run) == 0,
        MAKES=ends, ENDS=ends, HAS_D=True, HAS_IN="in_gate" not in absent, HAS_OUT="out_gate" not in absent,
        HAS_BIAS=has_bias, n_warps=8,
    )  # fmt: skip
    leaves = exact(inputs)
    if has_bias:
        for gradient, sums in zip(gradients[::2], biases[2:], strict=True):
            assert relative_error(sums.sum(), gradient.double().sum()) < 1e-5
    u, log_a, b, c, d, in_gate, out_gate, _ = leaves
    gradients = [gradient for gradient, x in zip(gradients, (u, in_gate, out_gate), strict=True) if x is not None]
    present = [x for x in (u, in_gate, out_gate) if x is not None] + [log_a, b, c, d]
    y, state = convolve(leaves, return_state=True)
    dstate = torch.zeros_like(state) if dstate is None else dstate.double()
    wanted = torch.autograd.grad((y, state), present, (dout.double(), dstate))
    if not ends:
        made = operators(*(padded(x) for x in (log_a, b, c)), d)
        lag = torch.arange(CHUNK) - torch.arange(CHUNK).unsqueeze(1)
        toeplitz = torch.where(lag >= 0, made[0][:, lag.clamp(min=0)], 0.0)
        sums = [x.sum(0, dtype=torch.float64) for x in partial]
        loss = sum((x * gradient).sum() for x, gradient in zip((toeplitz, *made[1:]), sums, strict=True))
        parameters = torch.autograd.grad(loss, present[-4:])
    found = (*gradients, *parameters)
    summands = inputs.u.double() * dout.double()
    for gate in (inputs.in_gate, inputs.out_gate):
        summands = summands if gate is None else summands * gate
    assert abs(float(found[-1] - wanted[-1])) < 3 * ROUNDING[torch.bfloat16] * float(summands.norm())  # d's, one number
    for got, want in zip(found[:-1], wanted[:-1], strict=True):
        # Few numbers do not average their errors out.
        assert relative_error(got, want) < (3 if want.numel() > 256 else 6) * ROUNDING[torch.bfloat16]


def test_a_mode_that_forgets_at_once_has_gradients():
    inputs, dout = make_inputs(1, 1, 64, torch.bfloat16)
    inputs.log_a[:, 3, 0] = -torch.inf
    parameters = [torch.full_like(x, torch.nan) for x in inputs[1:5]]
    signals, gradients = (inputs.u, inputs.in_gate, inputs.out_gate, dout), [torch.empty_like(dout) for _ in range(3)]
    saved, unused = torch.zeros(1, 1, 1, MODES, 2, dtype=torch.bfloat16), [torch.empty(1)] * 4
    run_program(
        FOLDER, (*MODULES, *BACKWARD), "ssm_conv_bwd_hopper_kernel", 1,
        *signals, *gradients, *unused, *inputs[1:5], saved, torch.empty(1), *unused, *parameters, *unused,
        *strides(*signals), 1, MODES, 1, 64, 1, 64, 1, 1, 1, 1, 0,
        RUN=4, IS_CUT=False, IS_FULL=False, MAKES=True, ENDS=True, HAS_D=True, HAS_IN=True, HAS_OUT=True,
        HAS_BIAS=False, n_warps=8,
    )  # fmt: skip
    assert all(bool(torch.isfinite(x).all()) for x in (*gradients, *parameters))
