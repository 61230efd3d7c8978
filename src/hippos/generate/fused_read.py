"""Reading prompts on a GPU near the speed of the matrix products: what lies between them is fused into them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hippos.generate.int8_linear import Int8Linear
from hippos.layers import H3, MLP
from hippos.layers.projections import is_plain_linear
from hippos.ops import H3State, h3_mix
from hippos.ops.decode import BIAS_COLUMNS, StepImpl, norm_tokens


class FusedRead:
    """The residual stream of tokens that are read, and the layers that add to it.

    Outputs of layers are added by the products that make them. Their biases are not: the stream lacks the sum of all
    biases so far, which the norms add. The biases of q, k and v, whose products have channels first, are columns of the
    weights, multiplied by a column of ones beside the normalised tokens. A short prompt's time is that of launching its
    kernels, so what all layers share is made once.

    Args:
        x: Embedded tokens, shape (b, L, D), contiguous; changed in place.
        linears: The maps whose products will be added, by `add_mixed` and `add_mapped`, in this order.
        padding: True at tokens of no text, shape (b, L). H3 layers have keys and values of 0 there, so that behind
            them a text begins from nothing.
        impl: "triton" or "reference".
    """

    def __init__(
        self, x: Tensor, linears: Iterable[Any], *, padding: Tensor | None = None, impl: StepImpl = "triton"
    ) -> None:
        self._shape = x.shape
        self._rows = x.view(-1, x.shape[-1])
        self._padding = None if padding is None else padding.flatten()
        self._biases = iter(_sums_of_biases(linears, x))
        self._bias = next(self._biases)
        self._joint: _JointWeight | None = None
        self._impl: StepImpl = impl

    @staticmethod
    def fits(model: Any) -> bool:
        """Tell whether a model's prompts can be read so: half precision on CUDA, plain or int8 weights."""
        weight = model.model.norm.weight
        if weight.device.type != "cuda" or weight.dtype not in (torch.bfloat16, torch.float16):
            return False
        return all(takes_mlp(block.mlp) for block in model.model.layers)

    def normalised(self, norm: nn.LayerNorm) -> Tensor:
        """The tokens as a layer sees them, shape (b, L, D)."""
        return self._norm(norm, has_ones=False).view(self._shape)

    def add(self, y: Tensor) -> None:
        """Add a layer's output, shape (b, L, D)."""
        self._rows.add_(y.reshape(self._rows.shape))

    def add_mixed(self, mixer: H3, norm: nn.LayerNorm, *, state: H3State | None, cu_seqlens: Tensor | None) -> H3State:
        """Add what an H3 layer for which `takes_mixer` holds makes of the tokens.

        Args:
            mixer: The layer.
            norm: The norm before it.
            state: Its state before these tokens; None for a fresh start.
            cu_seqlens: As in `H3.forward`.

        Returns:
            Its state after them.
        """
        batch, seqlen, d_model = self._shape
        qkv = self._project(mixer, norm) if self._padding is None else self._project_padded(mixer, norm, self._padding)
        q, k, v = qkv.view(3, d_model, batch, seqlen).transpose(1, 2)  # (B, D, L)
        operators: Any = (*mixer.shift.operators(reuse=True), *mixer.diag.operators(reuse=True))  # type: ignore[union-attr]
        o, after = h3_mix(q, k, v, *operators, initial_state=state, return_state=True, cu_seqlens=cu_seqlens)
        self._add_product(o.transpose(0, 1).flatten(1).t(), mixer.out_proj)
        return after

    def _project(self, mixer: H3, norm: nn.LayerNorm) -> Tensor:
        """Queries, keys and values, (3 D, b L), by one product, which is what many tokens are about."""
        self._joint = self._joint or _JointWeight(mixer)
        return self._joint.of(mixer) @ self._norm(norm, has_ones=True).t()

    def _project_padded(self, mixer: Any, norm: nn.LayerNorm, padding: Tensor) -> Tensor:
        """The same, but keys and values of padding are 0; by three products, as few tokens are not worth the copies."""
        columns = self._norm(norm, has_ones=False).t()
        qkv = columns.new_empty(3, len(columns), columns.shape[1])
        for place, linear in zip(qkv, (mixer.q_proj, mixer.k_proj, mixer.v_proj), strict=True):
            torch.addmm(linear.bias.unsqueeze(1), linear.weight, columns, out=place)
        qkv[1:].masked_fill_(padding, 0)
        return qkv

    def add_mapped(self, mlp: MLP, norm: nn.LayerNorm) -> None:
        """Add what an MLP for which `takes_mlp` holds makes of the tokens."""
        u = self._norm(norm, has_ones=False)
        if self._impl == "triton":
            inner = torch._addmm_activation(mlp.fc1.bias, u, mlp.fc1.weight.t(), use_gelu=True)
        else:
            inner = F.gelu(F.linear(u, mlp.fc1.weight, mlp.fc1.bias), approximate="tanh")
        self._add_product(inner, mlp.fc2)

    def taken(self, rows: Tensor) -> Tensor:
        """Some tokens of the stream, by their numbers, shape (n, D)."""
        return (self._rows.index_select(0, rows) + self._bias).to(self._rows.dtype)

    def _norm(self, norm: nn.LayerNorm, *, has_ones: bool) -> Tensor:
        return norm_tokens(self._rows, self._bias, norm.weight, norm.bias, norm.eps, has_ones=has_ones, impl=self._impl)

    def _add_product(self, inputs: Tensor, linear: nn.Linear) -> None:
        self._rows.addmm_(inputs, linear.weight.t())
        if linear.bias is not None:
            self._bias = next(self._biases)


def takes_mixer(mixer: nn.Module) -> bool:
    """Tell whether `FusedRead.add_mixed` takes a layer."""
    if not isinstance(mixer, H3) or mixer.head_dim > 1 or mixer.shift is None or not _has_weight(mixer.out_proj):
        return False
    linears = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    return all(_has_weight(linear) and linear.bias is not None for linear in linears)


def takes_mlp(mlp: MLP) -> bool:
    """Tell whether `FusedRead.add_mapped` takes an MLP."""
    return _has_weight(mlp.fc1) and mlp.fc1.bias is not None and _has_weight(mlp.fc2)


def _has_weight(linear: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a map is its weight and bias and nothing else; int8 weights are unpacked when they are asked for."""
    return is_plain_linear(linear) or isinstance(linear, Int8Linear)


def _sums_of_biases(linears: Iterable[Any], x: Tensor) -> tuple[Tensor, ...]:
    """What the stream lacks: nothing at first, then the first product's bias, then the sum of the first two, ..."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.stack([x.new_zeros(x.shape[-1]), *biases]).cumsum(0, dtype=dtype).unbind(0)


class _JointWeight:
    """Memory for the weights of q, k and v below each other, their biases as a further column, then zeros."""

    def __init__(self, mixer: H3) -> None:
        weight = mixer.k_proj.weight
        n_rows, n_inputs = weight.shape
        parts = weight.new_zeros(3, n_rows, n_inputs + BIAS_COLUMNS)
        self._places = [place for part in parts for place in (part[:, :n_inputs], part[:, n_inputs])]
        self._joint = parts.flatten(0, 1)

    def of(self, mixer: Any) -> Tensor:
        """Those of one layer after the other, which are all of one size."""
        linears = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        torch._foreach_copy_(self._places, [x for linear in linears for x in (linear.weight, linear.bias)])
        return self._joint
