"""The rows of the table once more, from the equations alone: complex numbers, FFTs, one parameter list, no `hippos`.

Each mixer is a function of its parameters, by our names. `PlainLM` is the language model around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = Mapping[str, Tensor]


def causal_conv(u: Tensor, taps: Tensor) -> Tensor:
    """(B, L, D) with (D, L), by an FFT of twice the length."""
    seqlen = u.shape[1]
    spectrum = torch.fft.rfft(u, n=2 * seqlen, dim=1) * torch.fft.rfft(taps.T, n=2 * seqlen, dim=0)
    return torch.fft.irfft(spectrum, n=2 * seqlen, dim=1)[:, :seqlen]


def linear(p: Parameters, name: str, u: Tensor) -> Tensor:
    return F.linear(u, p[f"{name}.weight"], p.get(f"{name}.bias"))


def vandermonde(weight: Tensor, log_a: Tensor, seqlen: int) -> Tensor:
    """sum_m weight_m exp(l log_a_m): (H, M) -> (H, L), complex."""
    steps = torch.arange(seqlen, dtype=log_a.real.dtype)
    return (weight.unsqueeze(-1) * torch.exp(log_a.unsqueeze(-1) * steps)).sum(1)


def s4d(p: Parameters, u: Tensor, *, is_bilinear: bool = False) -> Tensor:
    """GELU(K * u + D u), then a linear map; K by zero-order hold of A shared by all channels, B = 1."""
    A = torch.complex(-p["diag.A_real"].exp(), p["diag.A_imag"])  # (1, M)
    dt, C = p["diag.log_dt"].exp().unsqueeze(-1), torch.view_as_complex(p["diag.C"])
    if is_bilinear:
        abar, bbar = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
        taps = 2 * vandermonde(C * bbar, abar.log(), u.shape[1]).real
    else:
        taps = 2 * vandermonde(C * (torch.exp(dt * A) - 1) / A, dt * A, u.shape[1]).real
    return linear(p, "out_proj", F.gelu(causal_conv(u, taps) + p["diag.D"] * u))


def gss(p: Parameters, u: Tensor) -> Tensor:
    """out(GELU(gate u) * expand(K * v + D v)), v = LN(GELU(in u)), steps of 1, no conjugates."""
    v = F.gelu(linear(p, "in_proj", u))
    v = F.layer_norm(v, v.shape[-1:], p["norm.weight"], p["norm.bias"])
    A = torch.complex(-p["diag.A_real"].exp(), p["diag.A_imag"].exp())  # (M,)
    C = torch.view_as_complex(p["diag.C"])
    taps = vandermonde(C * (torch.exp(A) - 1) / A, A.expand_as(C), u.shape[1]).real
    y = linear(p, "expand_proj", causal_conv(v, taps) + p["diag.D"] * v)
    return linear(p, "out_proj", F.gelu(linear(p, "gate_proj", u)) * y)


def h3(p: Parameters, u: Tensor) -> Tensor:
    """q * (K_diag * (K_shift * k . v)), with skips; bilinear, B trained."""
    q, k, v = (linear(p, f"{name}_proj", u) for name in "qkv")
    B, C = p["shift.B"], p["shift.C"]
    d_state = B.shape[-1]
    shift = torch.stack([(B[:, : d_state - lag] * C[:, lag:]).sum(-1) for lag in range(d_state)], dim=-1)
    shift = F.pad(shift, (0, max(u.shape[1] - d_state, 0)))[:, : u.shape[1]]
    A = torch.complex(-p["diag.A_real"].exp(), p["diag.A_imag"])
    dt = p["diag.log_dt"].exp().unsqueeze(-1)
    weight = torch.view_as_complex(p["diag.C"]) * dt * torch.view_as_complex(p["diag.B"]) / (1 - dt * A / 2)
    taps = 2 * vandermonde(weight, ((1 + dt * A / 2) / (1 - dt * A / 2)).log(), u.shape[1]).real
    kv = (causal_conv(k, shift) + p["shift.D"] * k) * v
    return linear(p, "out_proj", q * (causal_conv(kv, taps) + p["diag.D"] * kv))


def attention(p: Parameters, u: Tensor) -> Tensor:
    """One head, causal."""
    q, k, v = linear(p, "qkv_proj", u).chunk(3, dim=-1)
    scores = q @ k.transpose(1, 2) / math.sqrt(u.shape[-1])
    is_later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return linear(p, "out_proj", scores.masked_fill(is_later, -torch.inf).softmax(-1) @ v)


MIXERS: dict[str, Callable[[Parameters, Tensor], Tensor]] = {
    "h3": h3,
    "s4d": s4d,
    "gss": gss,
    "attention": attention,
}


class PlainLM:
    """The language model of the table without dropout, trained by AdamW as published.

    Args:
        parameters: By our names; copied.
        mixer: What mixes the tokens.
        dynamics: Names of parameters that are not decayed.
        weight_decay: AdamW's, for the others.
    """

    def __init__(
        self,
        parameters: Parameters,
        mixer: Callable[[Parameters, Tensor], Tensor],
        dynamics: set[str],
        weight_decay: float,
    ) -> None:
        self.p = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        self.mixer = mixer
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [value for name, value in self.p.items() if name in dynamics], "weight_decay": 0.0},
                {
                    "params": [value for name, value in self.p.items() if name not in dynamics],
                    "weight_decay": weight_decay,
                },
            ],
            betas=(0.9, 0.999),
        )

    def logits(self, ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, V)."""
        p = self.p
        x = p["model.embed_tokens.weight"][ids]
        if "model.embed_positions.weight" in p:
            x = x + p["model.embed_positions.weight"][: ids.shape[1]]
        for number in range(2):
            start = f"model.layers.{number}."
            own = {name.removeprefix(start): value for name, value in p.items() if name.startswith(start)}
            mixer = {name.removeprefix("mixer."): value for name, value in own.items() if name.startswith("mixer.")}
            x = x + self.mixer(mixer, self._norm(own, "norm1", x))
            inner = F.gelu(linear(own, "mlp.fc1", self._norm(own, "norm2", x)), approximate="tanh")
            x = x + linear(own, "mlp.fc2", inner)
        return self._norm(p, "model.norm", x) @ p["model.embed_tokens.weight"].T

    @staticmethod
    def _norm(p: Parameters, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    def step(self, ids: Tensor, targets: Tensor, lr: float, dynamics_lr: float) -> float:
        """Take a step on one batch; returns its loss, nats a token."""
        for group, rate in zip(self.optimizer.param_groups, (dynamics_lr, lr), strict=True):
            group["lr"] = rate
        loss = F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
