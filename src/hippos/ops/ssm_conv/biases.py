"""Biases that signals of the backward pass still lack, and the sums that are their gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hippos.ops.ssm_conv.chunked import Inputs


class Biases(NamedTuple):
    """What is yet to be added to the samples of each channel, and memory for the gradients, each (H,), float32.

    Attributes:
        u: Added to u.
        out_gate: Added to the output's gate.
        du: For the sum of the gradient of u.
        dout_gate: For that of the output's gate.
    """

    u: Tensor
    out_gate: Tensor
    du: Tensor
    dout_gate: Tensor

    def added(self, inputs: Inputs) -> Inputs:
        """The inputs with their biases, rounded as the programs round them."""
        u, gate = (
            (x.float() + bias.unsqueeze(-1)).to(x.dtype)
            for x, bias in ((inputs.u, self.u), (_present(inputs.out_gate), self.out_gate))
        )
        return inputs._replace(u=u, out_gate=gate)

    def sum_up(self, du: Tensor, dout_gate: Tensor) -> None:
        """Make the gradients from those of the signals, each (B, H, L)."""
        torch.sum(du, (0, 2), dtype=torch.float32, out=self.du)
        torch.sum(dout_gate, (0, 2), dtype=torch.float32, out=self.dout_gate)


def _present(gate: Tensor | None) -> Tensor:
    if gate is None:
        raise ValueError("biases need an output gate")
    return gate
