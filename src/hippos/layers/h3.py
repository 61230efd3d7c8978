"""The H3 layer: a shift SSM and a diagonal SSM between multiplications, in place of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from hippos.layers.arguments import check_mask, check_tokens
from hippos.layers.param_groups import ParamGroup, param_groups
from hippos.layers.projections import (
    plain_projections,
    project_from_channels,
    project_to_channels,
    project_tokens,
)
from hippos.layers.ssm_diagonal import DiagonalSSM
from hippos.layers.ssm_shift import ShiftOperators, ShiftSSM
from hippos.ops import H3State, h3_mix
from hippos.ops.arguments import check_offsets, document_bounds, must_read_offsets
from hippos.ops.h3_mix.projected import h3_projected, takes_projected
from hippos.ops.precision import product_dtype, without_autocast
from hippos.ops.ssm_step import H3Step, h3_step_operators, h3_step_prepared
from hippos.ops.tracing import is_exporting

HEAD_LAYOUTS = ("hd", "dh")
SHIFTS = ("learned", "frozen", "none")


class H3(nn.Module):
    """Mix the tokens of a sequence causally: q * SSM_diag(SSM_shift(k) * v), projected in and out.

    With P = head_dim and H = D/P heads, per head: k' = shift SSM of k (each channel its own), the P x P products k'_i
    v_j go through the head's diagonal SSM, and o_j = sum_i q_i s_ij. The same function in three forms, which agree for
    every split of a sequence: `forward` on a whole sequence, `forward` chunk by chunk (``initial_state``,
    ``return_state``), and `step` token by token.

    Args:
        d_model: Width D of the tokens.
        d_state: State size N of both SSMs, even and at least 2.
        head_dim: Head width P, a divisor of D; 1 in every released model.
        n_ssm: Number of different diagonal state matrices, a divisor of H (head h takes number h mod n_ssm); None for
            H.
        discretisation: "bilinear" or "zoh".
        init: Initial frequencies of the diagonal SSM: "diag-lin", "diag-inv", "diag-legs" or "diag".
        real_type: How its raw real part parametrises the decay: "exp", "relu", "softplus", "sigmoid" or "none".
        dt_min: Smallest initial step of the diagonal SSM.
        dt_max: Largest initial step.
        head_layout: Order of the channels that ``out_proj`` reads: "hd" (head h, coordinate j at h * P + j, as trained
            weights need) or "dh" (at j * H + h, as the public reference's slow path has it).
        shift: "learned"; or, for ablations, "frozen" (parameters keep their initial values) or "none" (k in place of
            k').
        has_gates: False leaves out both multiplications, and the projections q and v with them: what remains is the
            diagonal SSM of the shift SSM of k. Needs ``head_dim`` 1.
        ssm_lr: Ceiling of the learning rate of the SSMs' dynamics (see `param_groups`); 0 freezes them.
        device: Device of the parameters.
        dtype: Dtype of the projections. SSM parameters are float32 (float64 for float64) and stay so under ``.half()``,
            ``.bfloat16()`` and ``.to(dtype)``.

    Attributes:
        q_proj: ``nn.Linear`` from D to D; None without gates.
        k_proj: ``nn.Linear`` from D to D.
        v_proj: ``nn.Linear`` from D to D; None without gates.
        out_proj: ``nn.Linear`` from D to D.
        shift: `ShiftSSM` over the D channels of k; None if there is none.
        diag: `DiagonalSSM` over the H heads.

    Raises:
        ValueError: If a size, range or name is not one of the above.

    Source:
        Fu et al. 2023 (arXiv:2212.14052), section 3 and algorithm 1; docs/math/h3_layer.md.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        head_dim: int = 1,
        n_ssm: int | None = None,
        discretisation: str = "bilinear",
        init: str = "diag-lin",
        real_type: str = "exp",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        head_layout: str = "hd",
        shift: str = "learned",
        has_gates: bool = True,
        ssm_lr: float = 1e-3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model must be at least 1, got {d_model}")
        if head_dim < 1 or d_model % head_dim:
            raise ValueError(f"head_dim {head_dim} must divide d_model {d_model}")
        if head_layout not in HEAD_LAYOUTS:
            raise ValueError(f"head_layout must be one of {', '.join(map(repr, HEAD_LAYOUTS))}, got {head_layout!r}")
        if shift not in SHIFTS:
            raise ValueError(f"shift must be one of {', '.join(map(repr, SHIFTS))}, got {shift!r}")
        if not has_gates and head_dim > 1:
            raise ValueError(f"the gates make heads wider than 1, so has_gates=False needs head_dim 1, got {head_dim}")
        self.d_model, self.d_state, self.head_dim = d_model, d_state, head_dim
        self.n_heads = d_model // head_dim
        self.head_layout = head_layout
        self.diag = DiagonalSSM(
            self.n_heads,
            d_state,
            n_ssm=n_ssm,
            discretisation=discretisation,
            init=init,
            real_type=real_type,
            dt_min=dt_min,
            dt_max=dt_max,
            ssm_lr=ssm_lr,
            device=device,
            dtype=dtype,
        )
        self.shift: ShiftSSM | None = None
        if shift != "none":
            self.shift = ShiftSSM(d_model, d_state, ssm_lr=ssm_lr, device=device, dtype=dtype)
        if self.shift is not None and shift == "frozen":
            self.shift.requires_grad_(False)
        self.q_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype) if has_gates else None
        self.k_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype)
        self.v_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype) if has_gates else None
        self.out_proj = nn.Linear(d_model, d_model, device=device, dtype=dtype)
        self._prepared: tuple[object, object, H3Step] | None = None

    @overload
    def forward(
        self,
        u: Tensor,
        *,
        initial_state: H3State | None = ...,
        return_state: Literal[False] = ...,
        cu_seqlens: Tensor | None = ...,
        mask: Tensor | None = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        u: Tensor,
        *,
        initial_state: H3State | None = ...,
        return_state: Literal[True],
        cu_seqlens: Tensor | None = ...,
        mask: Tensor | None = ...,
    ) -> tuple[Tensor, H3State]: ...

    def forward(
        self,
        u: Tensor,
        *,
        initial_state: H3State | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, H3State]:
        """Mix the tokens of each sequence.

        Args:
            u: Tokens, shape (B, L, D), L >= 1, dtype of the projections (any under autocast).
            initial_state: State after the tokens before these, as `init_state` shapes it; None to start from zero. Not
                changed.
            return_state: Whether to return the state after the last token too.
            cu_seqlens: Bounds of packed documents, shape (n_docs + 1,), int32, from 0 to L; needs B = 1. Each document
                starts from its own state, and the first axis of states counts documents.
            mask: Real tokens, shape (B, L), bool or integer; where it is 0, key and value are zeroed after the
                projection (their biases too), so that padding on the left leaves the state empty. Time passes on masked
                tokens: a state after padding on the right has decayed.

        Returns:
            Tokens, shape (B, L, D), dtype of the projections; with ``return_state`` also the state after the last
            token. Gradients flow through both states.

        Raises:
            ValueError: If a shape is wrong or L is 0.
            TypeError: If the dtype of ``u`` or ``mask`` is wrong.
        """
        check_tokens(u, "(B, L, D)", 3, self.d_model, self.k_proj)
        check_mask(mask, u)
        if u.is_cuda and initial_state is None and not return_state and mask is None:
            tokens = self._project_and_mix(u, cu_seqlens)
            if tokens is not None:
                return tokens
        q, k, v = self._project(u, project_to_channels)  # (B, D, L)
        if mask is not None:
            is_padding = (mask == 0).unsqueeze(1)
            k, v = k.masked_fill(is_padding, 0), v.masked_fill(is_padding, 0)
        with without_autocast(u.device):
            diag = self.diag.operators()
            shift = _no_shift(self.d_model, diag.skip) if self.shift is None else self.shift.operators()
            mixed = h3_mix(
                q,
                k,
                v,
                *shift,
                *diag,
                head_dim=self.head_dim,
                initial_state=initial_state,
                return_state=return_state,
                cu_seqlens=cu_seqlens,
            )
        if not isinstance(mixed, tuple):
            return project_from_channels(self.out_proj, self._order_channels(mixed))
        o, state = mixed
        return project_from_channels(self.out_proj, self._order_channels(o)), state

    @torch.no_grad()
    def step(self, u: Tensor, state: H3State, *, ring_position: Tensor | None = None) -> Tensor:
        """Mix one more token of each sequence, at a cost independent of the position. Not differentiable.

        Args:
            u: The tokens, shape (B, D) or (B, 1, D), dtype of the projections.
            state: State after the tokens before, as `init_state` shapes it; updated in place.
            ring_position: Makes the keys in ``state`` a ring, see `hippos.ops.h3_step`; None keeps them oldest first.

        Returns:
            The tokens' outputs, shape of ``u``, dtype of the projections.

        Raises:
            ValueError: If a shape is wrong.
            TypeError: If the dtype of ``u`` is wrong.
        """
        if u.ndim == 3 and u.shape[1] == 1:
            return self.step(u.squeeze(1), state, ring_position=ring_position).unsqueeze(1)
        check_tokens(u, "(B, D) or (B, 1, D)", 2, self.d_model, self.k_proj)
        q, k, v = self._project(u, project_tokens)  # (B, D)
        with without_autocast(u.device):
            o = h3_step_prepared(q, k, v, state, self.step_operators(), ring_position=ring_position)
        return project_tokens(self.out_proj, self._order_channels(o))

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> H3State:
        """Make the state before the first token: all zeros.

        Args:
            batch: Number of sequences (or packed documents) B.
            device: Where to make it; None for where the parameters are.
            dtype: Dtype of the keys that the shift state holds; None for the projections' dtype.

        Returns:
            ``shift``: the last N - 1 keys, shape (B, D, N - 1), oldest first; (B, D, 0) without a shift SSM. ``diag``:
            modes, shape (B, H, M, 2), or (B, H, P, P, M, 2) if P > 1, in the dtype of the SSM parameters.

        Raises:
            ValueError: If ``batch`` is less than 1.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        # A decode that starts here never calls forward, which would notice parameters written through .data.
        if self.shift is not None:
            self.shift.forget()
        self.diag.forget()
        device = self.diag.D.device if device is None else device
        heads = (self.n_heads,) if self.head_dim == 1 else (self.n_heads, self.head_dim, self.head_dim)
        n_keys = 0 if self.shift is None else self.d_state - 1
        return H3State(
            torch.zeros(batch, self.d_model, n_keys, device=device, dtype=dtype or self._key_dtype()),
            torch.zeros(batch, *heads, self.d_state // 2, 2, device=device, dtype=self.diag.D.dtype),
        )

    def param_groups(self, lr: float, weight_decay: float) -> list[ParamGroup]:
        """Sort the layer's parameters into optimiser groups, see `hippos.layers.param_groups`."""
        return param_groups(self, lr, weight_decay)

    def extra_repr(self) -> str:
        """Show the sizes and choices."""
        layout = f", head_layout={self.head_layout!r}" if self.head_dim > 1 else ""
        return f"d_model={self.d_model}, d_state={self.d_state}, head_dim={self.head_dim}{layout}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}

    def step_operators(self) -> H3Step:
        """Give what `hippos.ops.ssm_step.h3_step_prepared` needs; recomputed when the SSMs' parameters change."""
        shift = None if self.shift is None else self.shift.operators(reuse=True)
        diag = self.diag.operators(reuse=True)
        is_compiling = torch.compiler.is_compiling()
        if is_compiling or self._prepared is None or self._prepared[0] is not shift or self._prepared[1] is not diag:
            taps = _no_shift(self.d_model, diag.skip) if shift is None else shift
            operators = h3_step_operators(*taps, *diag, head_dim=self.head_dim)
            if is_compiling:
                return operators
            self._prepared = (shift, diag, operators)
        return self._prepared[2]

    @property
    def remembered(self) -> object:
        """What `step_operators` has made last; forward passes make it stale, and the next step drops it then."""
        return self._prepared

    def _project(self, u: Tensor, project: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Make queries, keys and values; without gates, queries and values are 1."""
        k = project(self.k_proj, u)
        if self.q_proj is None or self.v_proj is None:
            ones = k.new_ones(()).expand_as(k)
            return ones, k, ones
        return project(self.q_proj, u), k, project(self.v_proj, u)

    def mix_without_bias(self, u: Tensor, cu_seqlens: Tensor | None, keeps_keys: bool = False) -> Tensor | None:
        """Mix as `forward` does, but leave the bias of ``out_proj`` to the caller; None where only `forward` can.

        With ``keeps_keys`` the backward pass need not make the shifted keys again, for their memory.
        """
        return self._project_and_mix(u, cu_seqlens, adds_bias=False, keeps_keys=keeps_keys)

    def _project_and_mix(
        self, u: Tensor, cu_seqlens: Tensor | None, *, adds_bias: bool = True, keeps_keys: bool = False
    ) -> Tensor | None:
        """Go from tokens to tokens in one operator; None where that cannot be."""
        if self.head_dim > 1 or is_exporting():
            return None
        projections = plain_projections(self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        if projections is None:
            return None
        if not adds_bias:
            projections = projections._replace(out_bias=None)
        u = u.to(product_dtype(u.device, projections.q.dtype))
        with without_autocast(u.device):
            diag = self.diag.operators()
            shift = _no_shift(self.d_model, diag.skip) if self.shift is None else self.shift.operators()
            if not takes_projected(u, projections.q, shift.filter, diag.log_a):
                return None
            check_offsets(cu_seqlens, batch=u.shape[0])
            if must_read_offsets(cu_seqlens, takes_kernels=True):
                document_bounds(cu_seqlens, batch=u.shape[0], seqlen=u.shape[1])
            return h3_projected(u, projections, *shift, *diag, cu_seqlens, keeps_keys=keeps_keys)

    def _order_channels(self, o: Tensor) -> Tensor:
        """Bring the operators' channel order (head, coordinate), on axis 1, into the order of ``head_layout``."""
        if self.head_layout == "hd" or self.head_dim == 1:
            return o
        by_head = o.reshape(o.shape[0], self.n_heads, self.head_dim, *o.shape[2:])
        return by_head.transpose(1, 2).flatten(1, 2)

    def _key_dtype(self) -> torch.dtype:
        # Quantised weights are integers, and their outputs' dtype cannot be known here; float32 holds any key exactly.
        weight, D = getattr(self.k_proj, "weight", None), self.diag.D
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return product_dtype(D.device, weight.dtype)
        return product_dtype(D.device, D.dtype)


def _no_shift(d_model: int, like: Tensor) -> ShiftOperators:
    """A shift SSM of one tap that gives its input."""
    return ShiftOperators(like.new_ones(d_model, 1), like.new_zeros(d_model))
