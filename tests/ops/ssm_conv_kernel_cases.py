"""Inputs of ssm_conv's kernels, a run of them with its gradients, and the errors that they may make."""

from __future__ import annotations

import torch

from hippos.ops import ssm_conv
from hippos.ops.ssm_conv.chunked import Inputs
from tests.ops.ssm_cases import Draw, leaves, relative_error

NAMES = ("u", "log_a", "b", "c", "d", "in_gate", "out_gate", "initial_state")
OPTIONAL = NAMES[4:]
# Multiples of the error that the exact float32 result makes when it is rounded once to the signal's dtype.
LIMITS = {torch.bfloat16: (2.0, 3.0), torch.float16: (2.0, 3.0)}
ROUNDING = {torch.bfloat16: 1.65e-3, torch.float16: 2.1e-4}


def make_inputs(batch, n_heads, seqlen, n_modes, dtype, device="cpu", absent=(), seed=0, n_docs=None) -> Inputs:
    random = Draw(seed=seed)
    signals = [random.normal(batch, n_heads, seqlen, dtype=dtype) for _ in range(3)]
    modes = random.modes(n_heads, n_modes, dtype=torch.float32)
    d = random.normal(n_heads, dtype=torch.float32)
    state = random.normal(n_docs or batch, n_heads, n_modes, 2, dtype=torch.float32)
    inputs = Inputs(signals[0], *modes, d, *signals[1:], state)
    inputs = inputs._replace(**dict.fromkeys(absent))
    return Inputs(*(None if x is None else x.to(device) for x in inputs))


def run(inputs: Inputs, impl: str, *, with_state=True, dtype=None, cu_seqlens=None) -> dict:
    """Output, state, and the gradients of a random functional of both."""
    inputs = Inputs(*leaves(*inputs, dtype=dtype))
    u, log_a, b, c, d, in_gate, out_gate, initial_state = inputs
    gates = {"in_gate": in_gate, "out_gate": out_gate}
    options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "return_state": True, "impl": impl}
    y, state = ssm_conv(u, log_a, b, c, d, **gates, **options)
    weights = Draw(seed=1)
    loss = (y.double() * weights.normal(*y.shape).bfloat16().to(y.device)).sum()
    if with_state:
        loss = loss + (state.double() * weights.normal(*state.shape).bfloat16().to(y.device)).sum()
    loss.backward()
    gradients = {f"d_{name}": x.grad for name, x in inputs._asdict().items() if x is not None}
    return {"y": y.detach(), "state": state.detach(), **gradients}


def assert_accurate(inputs: Inputs, found: dict, wanted: dict) -> None:
    dtype = inputs.u.dtype
    for name, tensor in found.items():
        error = relative_error(tensor.cpu(), wanted[name].cpu())
        if dtype == torch.float32:
            limit = 1e-5 if name.startswith("d_") else 4e-6
        else:
            limit = LIMITS[dtype][name.startswith("d_")] * ROUNDING[dtype]
            # Few numbers do not average their errors out.
            limit *= 1 if tensor.numel() > 256 else 3
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.2e}"
