"""Filters from SSM parameters on a GPU, diagonal and diagonal plus low rank, beside all powers of all modes at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hippos.bench.cases.replay import Work, replayed
from hippos.bench.cases.ssm_conv import BOTH, FORWARD, draw_ssm
from hippos.bench.harness import Context, Workload
from hippos.ops import ssm_filter
from hippos.ops.ssm_filter.dplr import dplr_filter

DIAGONAL, LOW_RANK, POWERS = "ssm_filter", "dplr_filter", "all powers of all modes"
CHECKED_CHANNELS = 8

Filter = Callable[..., Tensor]


@dataclass(frozen=True)
class FilterSize:
    """Filters of K taps for H channels with M modes."""

    filter_len: int
    n_heads: int = 768
    n_modes: int = 32


def prepare_ssm_filter(size: FilterSize, context: Context) -> Workload:
    """Allocate one size, all in float32.

    Args:
        size: The size.
        context: Where it runs.

    Returns:
        The workload.
    """
    generator, device = context.generator(), context.device
    modes = tuple(x.detach() for x in draw_ssm(size.n_heads, size.n_modes, context)[:3])
    shape = (size.n_heads, size.n_modes)
    A = torch.stack((torch.full(shape, -0.5), torch.pi * torch.arange(size.n_modes).expand(shape)), dim=-1).to(device)
    P, B, C = (torch.randn(*shape, 2, generator=generator, device=device) / size.n_modes for _ in range(3))
    dt = torch.logspace(-3, -1, size.n_heads, device=device)
    dplr = (A, P.unsqueeze(0), B, C, dt)
    make = {
        DIAGONAL: (partial(ssm_filter, filter_len=size.filter_len), modes),
        LOW_RANK: (partial(dplr_filter, filter_len=size.filter_len), dplr),
        POWERS: (partial(ssm_filter, filter_len=size.filter_len, impl="reference"), modes),
    }
    return Workload(
        methods={name: replayed(_passes(filter_, parameters)) for name, (filter_, parameters) in make.items()},
        check=lambda: {name: _error(filter_, parameters) for name, (filter_, parameters) in make.items()},
        max_error=1e-2,
        baseline=POWERS,
        notes={"timed": "replays of CUDA graphs"},
    )


def _passes(make: Filter, parameters: tuple[Tensor, ...]) -> dict[str, Work]:
    leaves = tuple(x.clone().requires_grad_() for x in parameters)

    def forward() -> None:
        with torch.no_grad():
            make(*leaves)

    def both() -> None:
        torch.autograd.grad(make(*leaves).square().sum(), leaves)

    return {FORWARD: forward, BOTH: both}


def _error(make: Filter, parameters: tuple[Tensor, ...]) -> float:
    """The relative L2 error of a few channels' filters against float64."""
    n_heads = parameters[0].shape[0]
    channels = torch.linspace(0, n_heads - 1, min(CHECKED_CHANNELS, n_heads), device=parameters[0].device).long()
    picked = [(x[:, channels] if x.shape[0] != n_heads else x[channels]).double() for x in parameters]
    found, wanted = make(*parameters)[channels].double(), make(*picked)
    return float((found - wanted).norm() / wanted.norm())
