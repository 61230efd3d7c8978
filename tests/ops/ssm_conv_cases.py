"""Inputs of ssm_conv on a CPU, its outputs and gradients by name, and how close they must be."""

from __future__ import annotations

import torch

from hippos.ops import ssm_conv
from hippos.ops.ssm_conv.chunked import Inputs
from tests.ops.ssm_cases import Draw, leaves, relative_error, tolerance

N_HEADS, N_MODES = 3, 4
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_inputs(random: Draw, batch: int, seqlen: int, n_states: int | None = None, dtype=torch.float64) -> Inputs:
    """All eight input tensors; parameters and states in float32 unless ``dtype`` is float64."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    signals = [random.normal(batch, N_HEADS, seqlen, dtype=dtype) for _ in range(3)]
    modes = random.modes(N_HEADS, N_MODES, dtype=exact)
    state = random.normal(n_states or batch, N_HEADS, N_MODES, 2, dtype=exact)
    return Inputs(signals[0], *modes, random.normal(N_HEADS, dtype=exact), *signals[1:], state)


def call(inputs: Inputs, bounds: list[int] | None = None, **options):
    u, log_a, b, c, d, in_gate, out_gate, initial_state = inputs
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    gates = {"in_gate": in_gate, "out_gate": out_gate}
    return ssm_conv(
        u, log_a, b, c, d, **gates, initial_state=initial_state, return_state=True, cu_seqlens=cu_seqlens, **options
    )


def outputs_and_gradients(inputs: Inputs, bounds: list[int] | None = None, *, dtype=None, **options) -> dict:
    """Outputs, and gradients of a random functional of them, by name; ``dtype`` casts the inputs first."""
    inputs = Inputs(*leaves(*inputs, dtype=dtype))
    y, state = call(inputs, bounds, **options)
    functional_of(y, state).backward()
    gradients = {f"d_{name}": tensor.grad for name, tensor in inputs._asdict().items() if tensor is not None}
    return {"y": y.detach(), "state": state.detach(), **gradients}


def functional_of(*outputs: torch.Tensor) -> torch.Tensor:
    """A random linear functional whose weights every dtype can represent."""
    weights = Draw(seed=1)
    return sum((x.double() * weights.normal(*x.shape).bfloat16()).sum() for x in outputs)


def assert_close(found: dict, wanted: dict) -> None:
    for name, tensor in found.items():
        error, limit = relative_error(tensor, wanted[name]), tolerance(wanted[name], tensor.dtype)
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.2e}"


def without(inputs: Inputs, absent: tuple[str, ...]) -> Inputs:
    return inputs._replace(**dict.fromkeys(absent))
