"""The PyTorch implementations on a CUDA device: the same numbers as the definition on the CPU."""

from __future__ import annotations

import pytest
import torch

from hippos.ops import H3State, fft_conv, h3_mix, h3_step, ssm_conv, ssm_filter
from tests.ops.ssm_cases import PACKED, leaves, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def gradients(run, inputs, device, impl):
    inputs = leaves(*(x.to(device) for x in inputs))
    outputs = run(*inputs, impl=impl)
    sum(x.square().sum() for x in outputs).backward()
    return [x.cpu() for x in (*outputs, *(x.grad for x in inputs))]


@pytest.mark.parametrize("bounds", [None, PACKED])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ssm_conv(random, bounds, dtype):
    n_states = 1 if bounds is None else len(bounds) - 1
    inputs = [random.normal(1, 3, 300), *random.modes(3, 4), random.normal(3), random.normal(n_states, 3, 4, 2)]

    def run(u, log_a, b, c, d, state, impl):
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=u.device)
        options = {"initial_state": state, "return_state": True, "cu_seqlens": cu_seqlens}
        return ssm_conv(u, log_a, b, c, d, **options, impl=impl)

    wanted = gradients(run, inputs, "cpu", "reference")
    found = gradients(run, [x.to(dtype) for x in inputs], "cuda", "torch")
    for left, right in zip(found, wanted, strict=True):
        assert relative_error(left, right) < (1e-11 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("bounds", [None, PACKED])
def test_h3_mix(random, head_dim, bounds):
    n_states = 1 if bounds is None else len(bounds) - 1
    d_model, outer = 2 * head_dim, (head_dim, head_dim) if head_dim > 1 else ()
    inputs = [
        *(random.normal(1, d_model, 300) for _ in range(3)),
        random.normal(d_model, 8),
        random.normal(d_model),
        *random.modes(2, 3),
        random.normal(2),
        random.normal(n_states, d_model, 7),
        random.normal(n_states, 2, *outer, 3, 2),
    ]

    def run(*tensors, impl):
        *tensors, shift, diag = tensors
        cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=shift.device)
        options = {"initial_state": H3State(shift, diag), "return_state": True, "cu_seqlens": cu_seqlens}
        y, state = h3_mix(*tensors, head_dim=head_dim, **options, impl=impl)
        return y, *state

    wanted = gradients(run, inputs, "cpu", "reference")
    for left, right in zip(gradients(run, inputs, "cuda", "torch"), wanted, strict=True):
        assert relative_error(left, right) < 1e-11


def test_filters_and_fft(random):
    inputs = [random.normal(2, 3, 100), *random.modes(3, 4)]

    def run(u, log_a, b, c, impl):
        taps = ssm_filter(log_a, b, c, 90, impl=impl)
        return taps, fft_conv(u, taps, impl=impl)

    wanted = gradients(run, inputs, "cpu", "reference")
    for left, right in zip(gradients(run, inputs, "cuda", "torch"), wanted, strict=True):
        assert relative_error(left, right) < 1e-11


def test_steps(random):
    q, k, v = (random.normal(2, 4, 20).cuda() for _ in range(3))
    parameters = [x.cuda() for x in (random.normal(4, 8), random.normal(4), *random.modes(4, 3), random.normal(4))]
    wanted, last = h3_mix(q, k, v, *parameters, return_state=True)
    state = H3State(torch.zeros_like(last.shift), torch.zeros_like(last.diag))
    steps = [h3_step(q[..., t], k[..., t], v[..., t], state, *parameters) for t in range(20)]
    assert relative_error(torch.stack(steps, dim=-1).cpu(), wanted.cpu()) < 1e-11
    assert relative_error(state.diag.cpu(), last.diag.cpu()) < 1e-11
