"""`embed` as a torch.library operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hippos.errors import UnsupportedError
from hippos.ops.direct import Direct


@torch.library.custom_op("hippos::embed", mutates_args=())
def embed_op(ids: Tensor, weight: Tensor) -> Tensor:
    """The rows."""
    return F.embedding(ids, weight)


@embed_op.register_fake
def _shapes(ids: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty(*ids.shape, weight.shape[1])


@torch.library.custom_op("hippos::embed_backward", mutates_args=())
def embed_backward_op(dout: Tensor, ids: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    """Gradient of the table, (rows, D), in ``dtype``."""
    from hippos.ops.embed.launch import embed_bwd

    return embed_bwd(dout.reshape(-1, dout.shape[-1]).contiguous(), ids.flatten(), n_rows, dtype)


@embed_backward_op.register_fake
def _backward_shapes(dout: Tensor, ids: Tensor, n_rows: int, dtype: torch.dtype) -> Tensor:
    return dout.new_empty(n_rows, dout.shape[-1], dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight = inputs
    ctx.save_for_backward(ids)
    ctx.table = weight.shape[0], weight.dtype


def _backward(ctx: Any, dout: Tensor) -> tuple[None, Tensor]:
    if torch.is_grad_enabled():  # only then would this pass be recorded
        raise UnsupportedError("embed cannot be differentiated twice (create_graph=True)")
    return None, embed_backward_op(dout, *ctx.saved_tensors, *ctx.table)


embed_op.register_autograd(_backward, setup_context=_save)
embed_call = Direct(embed_op, _save, _backward)
