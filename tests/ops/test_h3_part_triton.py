"""An H3 layer on two parts of a sequence, by Triton's kernels, is the layer on all of it, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import pytest
import torch
from torch import Tensor

from hippos.ops.h3_mix.stacked import Projections
from hippos.ops.h3_part import h3_part
from hippos.ops.ssm_state import pass_time
from tests.ops.ssm_cases import leaves, relative_error
from tests.ops.test_h3_mix_projected_triton import gradients_of, make_inputs, one_by_one
from tests.ops.test_h3_mix_triton import interpreter, on_gpu

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


class Record:
    """`Neighbours` for parts that run one after another: what each says is written down for those that ask later."""

    def __init__(self, log_a: Tensor, seqlen: int, n_parts: int) -> None:
        self.log_a, self.seqlen, self.rank = log_a, seqlen, 0
        self.keys, self.added, self.asked, self.dkeys = ([torch.empty(0)] * n_parts for _ in range(4))

    def of(self, rank: int) -> Record:
        part = copy(self)
        part.rank = rank
        return part

    def before(self, last_keys: Tensor, added: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        past = self.keys[self.rank - 1] if self.rank else torch.zeros_like(last_keys)
        self.keys[self.rank], self.added[self.rank] = last_keys, added(past)
        return past, self._chain(self.added, range(self.rank), is_adjoint=False)

    def gradient_behind(self, added: Tensor) -> Tensor:
        self.asked[self.rank] = added
        return self._chain(self.asked, range(len(self.asked) - 1, self.rank, -1), is_adjoint=True)

    def key_gradient_behind(self, dpast: Tensor) -> Tensor:
        self.dkeys[self.rank] = dpast
        return torch.zeros_like(dpast) if self.rank + 1 == len(self.dkeys) else self.dkeys[self.rank + 1]

    def _chain(self, states: list[Tensor], ranks: range, *, is_adjoint: bool) -> Tensor:
        total = torch.zeros_like(states[self.rank])
        for rank in ranks:
            total = pass_time(total, self.log_a, self.seqlen, is_adjoint=is_adjoint) + states[rank]
        return total


def run_parts(inputs: list[Tensor | None], dout: Tensor, n_parts: int) -> list[Tensor]:
    """Outputs, and gradients of all inputs: forward from the first part on, backward from the last."""
    us, douts = inputs[0].chunk(n_parts, dim=1), dout.chunk(n_parts, dim=1)
    others = leaves(*inputs[1:])
    record = Record(others[10].detach(), us[0].shape[1], n_parts)
    us = [u.clone().requires_grad_() for u in us]
    ys = [h3_part(u, Projections(*others[:8]), *others[8:], record.of(rank)) for rank, u in enumerate(us)]
    for y, dy in reversed([*zip(ys, douts, strict=True)]):
        y.backward(dy)
    gradients = [x.grad for x in others if x is not None]
    return [torch.cat(ys, dim=1).detach(), torch.cat([u.grad for u in us], dim=1), *gradients]


def check(batch, d_model, seqlen, n_taps, n_modes, dtype, device, *, n_parts=2, has_bias=True, tolerance) -> None:
    inputs, dout = make_inputs(batch, d_model, seqlen, n_taps, n_modes, dtype, has_bias=has_bias)
    inputs = [None if x is None else x.to(device) for x in inputs]
    dout = dout.to(device)
    inputs[11][..., 0] *= 0.02  # states reach from part to part
    found = run_parts(inputs, dout, n_parts)
    wanted = gradients_of(one_by_one, inputs, dout, torch.float64)
    for index, (got, want) in enumerate(zip(found, wanted, strict=True)):
        assert relative_error(got, want) < tolerance, index


@interpreter
@pytest.mark.parametrize(
    ("batch", "seqlen", "n_taps", "has_bias", "n_parts"),
    [(1, 320, 16, True, 2), (2, 48, 8, True, 3), (1, 64, 8, False, 2), (1, 32, 1, True, 2)],
)
def test_interpreted(batch: int, seqlen: int, n_taps: int, has_bias: bool, n_parts: int) -> None:
    check(batch, 2, seqlen, n_taps, 3, torch.float32, "cpu", n_parts=n_parts, has_bias=has_bias, tolerance=2e-5)


def test_without_kernels() -> None:
    check(2, 3, 96, 8, 4, torch.float32, "cpu", n_parts=3, tolerance=2e-5)


@pytest.mark.parametrize(("batch", "d_model", "seqlen"), [(1, 768, 16384), (2, 64, 8192), (1, 256, 2 * 4160)])
class TestGpu:
    """On a GPU: whole sequences by Hopper's backward program and others, states and keys from before and behind."""

    pytestmark = on_gpu

    def test_against_float64(self, batch: int, d_model: int, seqlen: int) -> None:
        check(batch, d_model, seqlen, 64, 32, torch.bfloat16, "cuda", tolerance=2e-2)
