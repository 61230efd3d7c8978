"""One token of an H3 layer's mixing on a GPU, states in place, beside rewriting the states alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hippos.bench.cases.replay import Work, replayed
from hippos.bench.cases.ssm_conv import draw_ssm
from hippos.bench.harness import Context, Workload
from hippos.ops import H3State
from hippos.ops.arguments import Impl
from hippos.ops.ssm_step import H3Step, h3_step_operators, h3_step_prepared

STEP = "one token"
STATES, RING, MOVED, TORCH = "states read and written", "h3_step, ring", "h3_step, keys moved", "h3_step, PyTorch"


@dataclass(frozen=True)
class StepSize:
    """Layers of one model: batch B, width D, state size N; together too large for any cache."""

    batch: int
    d_model: int = 2048
    n_layers: int = 24
    d_state: int = 64
    dtype: str = "bfloat16"


def prepare_h3_step(size: StepSize, context: Context) -> Workload:
    """Allocate one size: a step goes through all layers, each with its own state.

    Args:
        size: The size.
        context: Where it runs.

    Returns:
        The workload.
    """
    generator, device, dtype = context.generator(), context.device, getattr(torch, size.dtype)
    q, k, v = (torch.randn(size.batch, size.d_model, generator=generator, device=device).to(dtype) for _ in range(3))
    layer = _make_layer(size, context)
    operators = h3_step_operators(*layer)
    position = torch.full((1,), 5, dtype=torch.int64, device=device)
    rings = [_make_state(size, device, slots_first=True) for _ in range(size.n_layers)]
    windows = [_make_state(size, device, slots_first=False) for _ in range(size.n_layers)]

    def steps(states: list[H3State], ring_position: Tensor | None, impl: Impl) -> Work:
        def work() -> None:
            for state in states:
                h3_step_prepared(q, k, v, state, operators, ring_position=ring_position, impl=impl)

        return work

    def rewrite() -> None:
        for state in rings:
            state.diag.mul_(0.5)

    works: dict[str, Callable[[], object]] = {
        STATES: rewrite,
        RING: steps(rings, position, "triton"),
        MOVED: steps(windows, None, "triton"),
        TORCH: steps(windows, None, "torch"),
    }
    return Workload(
        methods={name: replayed({STEP: work}) for name, work in works.items()},
        check=lambda: {RING: _error(size, context, layer, operators, (q, k, v))},
        max_error=1e-2,
        baseline=STATES,
        work_per_call={STEP: size.batch},
        notes={"timed": "replays of CUDA graphs of all layers", "keys": "in the ring's memory the slots come first"},
    )


def _make_layer(size: StepSize, context: Context) -> tuple[Tensor, ...]:
    generator, device = context.generator(), context.device
    taps = torch.randn(size.d_model, size.d_state, generator=generator, device=device) / size.d_state**0.5
    skip = torch.randn(size.d_model, generator=generator, device=device)
    return (taps, skip, *draw_ssm(size.d_model, size.d_state // 2, context))


def _make_state(size: StepSize, device: torch.device, *, slots_first: bool) -> H3State:
    n_keys, dtype = size.d_state - 1, getattr(torch, size.dtype)
    shape = (n_keys, size.batch, size.d_model) if slots_first else (size.batch, size.d_model, n_keys)
    shift = torch.zeros(shape, dtype=dtype, device=device)
    diag = torch.zeros(size.batch, size.d_model, size.d_state // 2, 2, device=device)
    return H3State(shift.permute(1, 2, 0) if slots_first else shift, diag)


def _error(
    size: StepSize, context: Context, layer: tuple[Tensor, ...], operators: H3Step, qkv: tuple[Tensor, Tensor, Tensor]
) -> float:
    """The largest relative L2 error of the output and the state of one step, against float64."""
    device, generator = context.device, context.generator()
    state = _make_state(size, device, slots_first=True)
    for part in state:
        part.normal_(generator=generator)
    exact = H3State(*(part.double() for part in state))
    position = torch.zeros(1, dtype=torch.int64, device=device)
    exact_operators = h3_step_operators(*(x.double() for x in layer))
    q, k, v = qkv
    wanted = h3_step_prepared(q.double(), k.double(), v.double(), exact, exact_operators, impl="torch")
    found = h3_step_prepared(q, k, v, state, operators, ring_position=position, impl="triton")
    pairs = ((found, wanted), (state.diag, exact.diag))
    return max(float((got - want).norm() / want.norm()) for got, want in pairs)
