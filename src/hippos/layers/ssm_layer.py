"""What the layers with one SSM share: S4D, S4, DSS and GSS differ in the SSM and in what stands around it."""

from __future__ import annotations

import abc
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippos.errors import UnsupportedError
from hippos.layers.arguments import check_mask, check_tokens
from hippos.layers.param_groups import ParamGroup, param_groups
from hippos.layers.projections import project_tokens
from hippos.layers.ssm_module import SSMModule
from hippos.ops import ssm_conv, ssm_step
from hippos.ops.precision import without_autocast


class SSMLayer(nn.Module, abc.ABC):
    """Mix the tokens of a sequence by convolving each of H channels with the filter of an SSM.

    The same function in three forms, as for `H3`: `forward` on a whole sequence, `forward` chunk by chunk
    (``initial_state``, ``return_state``), and `step` token by token. The state is one tensor, (B, H, M, 2): pairs (re,
    im) of the modes, float32 (float64 in float64 layers).

    Args:
        d_model: Width D of the tokens.
        bidirectional: Whether a second filter runs backwards over the tokens that follow; then there is no recurrence.

    Raises:
        ValueError: If ``d_model`` < 1.
    """

    out_proj: nn.Linear

    def __init__(self, d_model: int, *, bidirectional: bool = False) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model must be at least 1, got {d_model}")
        self.d_model, self.bidirectional = d_model, bidirectional

    @property
    @abc.abstractmethod
    def ssm(self) -> SSMModule[Any]:
        """The SSM's parameters."""

    @property
    @abc.abstractmethod
    def _state_sizes(self) -> tuple[int, int]:
        """Channels H and modes M."""

    @abc.abstractmethod
    def _enter(self, u: Tensor) -> Tensor:
        """Make the SSM's inputs, (..., H), from tokens, (..., D)."""

    @abc.abstractmethod
    def _leave(self, y: Tensor, u: Tensor) -> Tensor:
        """Make the tokens, (..., D), from the SSM's outputs, (..., H), and the tokens read, (..., D)."""

    @abc.abstractmethod
    def _convolve(
        self, x: Tensor, initial_state: Tensor | None, return_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the SSM over x, (B, H, L); H is doubled in bidirectional layers."""

    @abc.abstractmethod
    def _advance(self, x: Tensor, state: Tensor) -> Tensor:
        """Advance the SSM by x, (B, H), the state in place."""

    @overload
    def forward(
        self,
        u: Tensor,
        *,
        initial_state: Tensor | None = ...,
        return_state: Literal[False] = ...,
        cu_seqlens: Tensor | None = ...,
        mask: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        u: Tensor,
        *,
        initial_state: Tensor | None = ...,
        return_state: Literal[True],
        cu_seqlens: Tensor | None = ...,
        mask: Tensor | None = ...,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        u: Tensor,
        *,
        initial_state: Tensor | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Mix the tokens of each sequence.

        Args:
            u: Tokens, shape (B, L, D), L >= 1, dtype of the projections (any under autocast).
            initial_state: State after the tokens before these, as `init_state` shapes it; None to start from zero. Not
                changed.
            return_state: Whether to return the state after the last token too.
            cu_seqlens: Bounds of packed documents, shape (n_docs + 1,), int32, from 0 to L; needs B = 1. Each document
                starts from its own state, and the first axis of states counts documents.
            mask: Real tokens, shape (B, L), bool or integer; where it is 0, the SSM's input is zeroed, so that padding
                on the left leaves the state empty. Time passes on masked tokens.

        Returns:
            Tokens, shape (B, L, D), dtype of the projections; with ``return_state`` also the state after the last
            token. Gradients flow through both states.

        Raises:
            ValueError: If a shape is wrong or L is 0.
            TypeError: If the dtype of ``u`` or ``mask`` is wrong.
            UnsupportedError: If the layer cannot do what is asked: a bidirectional layer has no states and takes no
                packed documents; for more see the layer.
        """
        check_tokens(u, "(B, L, D)", 3, self.d_model, self.out_proj)
        check_mask(mask, u)
        if initial_state is not None or return_state:
            self._check_recurrence("state")
        if cu_seqlens is not None and self.bidirectional:
            raise UnsupportedError(
                f"a bidirectional {type(self).__name__} layer takes no packed documents (cu_seqlens)"
            )
        x = self._enter(u)
        if mask is not None:
            x = x.masked_fill((mask == 0).unsqueeze(-1), 0)
        with without_autocast(u.device):
            y, state = self._run(x.transpose(1, 2), initial_state, return_state, cu_seqlens)
        out = self._leave(y.transpose(1, 2), u)
        return out if state is None else (out, state)

    @torch.no_grad()
    def step(self, u: Tensor, state: Tensor) -> Tensor:
        """Mix one more token of each sequence, at a cost independent of the position. Not differentiable.

        Args:
            u: The tokens, shape (B, D) or (B, 1, D), dtype of the projections.
            state: State after the tokens before, as `init_state` shapes it; updated in place.

        Returns:
            The tokens' outputs, shape of ``u``, dtype of the projections.

        Raises:
            ValueError: If a shape is wrong.
            TypeError: If the dtype of ``u`` is wrong.
            UnsupportedError: If the layer is no recurrence.
        """
        if u.ndim == 3 and u.shape[1] == 1:
            return self.step(u.squeeze(1), state).unsqueeze(1)
        check_tokens(u, "(B, D) or (B, 1, D)", 2, self.d_model, self.out_proj)
        self._check_recurrence("step")
        x = self._enter(u)
        with without_autocast(u.device):
            y = self._advance(x, state)
        return self._leave(y, u)

    def init_state(self, batch: int, *, device: torch.device | str | None = None) -> Tensor:
        """Make the state before the first token: all zeros.

        Args:
            batch: Number of sequences (or packed documents) B.
            device: Where to make it; None for where the parameters are.

        Returns:
            State, shape (B, H, M, 2), dtype of the SSM parameters.

        Raises:
            ValueError: If ``batch`` is less than 1.
            UnsupportedError: If the layer is no recurrence.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self._check_recurrence("state")
        # A decode that starts here never calls forward, which would notice parameters written through .data.
        self.ssm.forget()
        parameter = next(self.ssm.parameters())
        return torch.zeros(batch, *self._state_sizes, 2, device=device or parameter.device, dtype=parameter.dtype)

    def param_groups(self, lr: float, weight_decay: float) -> list[ParamGroup]:
        """Sort the layer's parameters into optimiser groups, see `hippos.layers.param_groups`."""
        return param_groups(self, lr, weight_decay)

    def extra_repr(self) -> str:
        """Show the sizes and choices."""
        return f"d_model={self.d_model}" + (", bidirectional=True" if self.bidirectional else "")

    def _check_recurrence(self, wish: str) -> None:
        """Raise UnsupportedError if the layer cannot go from token to token, which ``wish`` needs."""
        if self.bidirectional:
            raise UnsupportedError(
                f"a bidirectional {type(self).__name__} layer reads the tokens that follow: there is no {wish} for it"
            )

    def _run(
        self, x: Tensor, initial_state: Tensor | None, return_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not self.bidirectional:
            return self._convolve(x, initial_state, return_state, cu_seqlens)
        # The backward filter starts with the token after: reversed in time, the input is one sample late.
        backwards = F.pad(x.flip(-1), (1, 0))[..., :-1]
        y, _ = self._convolve(torch.cat((x, backwards), dim=1), None, False, None)
        ahead, behind = y.chunk(2, dim=1)
        return ahead + behind.flip(-1), None


class ActivatedSSMLayer(SSMLayer):
    """A layer that convolves the tokens themselves: ``out_proj(GELU(K * u + D u))``, the block of S4.

    What its kinds, `S4`, `S4D` and `DSS`, have in common. Whole sequences, pieces, packed documents and single steps
    are as for `H3`, where a kind does not say otherwise; the state is a tensor, (B, D, M, 2) with M = N/2.

    Args:
        d_model: Width D of the tokens.
        d_state: State size N of each channel's SSM, even and at least 2.
        n_ssm: Of every kind: number of different state matrices, a divisor of D; None for D.
        dt_min: Of every kind: smallest initial step.
        dt_max: Of every kind: largest initial step.
        glu: Whether a gated linear unit ends the layer, rather than a linear map alone: ``out_proj`` maps to 2D, of
            which the second half gates the first by its sigmoid.
        bidirectional: Whether each channel has a second filter, over the tokens that follow; without it the layer is
            causal.
        ssm_lr: Of every kind: ceiling of the learning rate of the SSM's dynamics (see `param_groups`); 0 freezes them.
        device: Device of the parameters.
        dtype: Dtype of the projection; SSM parameters are float32 (float64 for float64).

    Attributes:
        out_proj: ``nn.Linear`` from D to D, or to 2D.

    Raises:
        ValueError: If a size, range or name is none that the layer or its SSM knows.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        glu: bool,
        bidirectional: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(d_model, bidirectional=bidirectional)
        self.d_state, self.glu = d_state, glu
        self.out_proj = nn.Linear(d_model, 2 * d_model if glu else d_model, device=device, dtype=dtype)

    @property
    def _state_sizes(self) -> tuple[int, int]:
        return self.d_model, self.d_state // 2

    def _enter(self, u: Tensor) -> Tensor:
        return u

    def _leave(self, y: Tensor, u: Tensor) -> Tensor:
        # The projection would copy it into this order; before the GELU, that and its gradient read memory in order too.
        out = project_tokens(self.out_proj, F.gelu(y.contiguous()))
        return F.glu(out, dim=-1) if self.glu else out

    def extra_repr(self) -> str:
        """Show the sizes and choices."""
        return super().extra_repr() + (", glu=True" if self.glu else "")


def convolve_diagonal(
    ssm: SSMModule[Any], x: Tensor, initial_state: Tensor | None, return_state: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Run an SSM with diagonal operators over x, (B, H, L)."""
    mixed = ssm_conv(x, *ssm.operators(), initial_state=initial_state, return_state=return_state, cu_seqlens=cu_seqlens)
    return mixed if isinstance(mixed, tuple) else (mixed, None)


def advance_diagonal(ssm: SSMModule[Any], x: Tensor, state: Tensor) -> Tensor:
    """Advance an SSM with diagonal operators by x, (B, H), the state in place."""
    return ssm_step(x, state, *ssm.operators(reuse=True))
