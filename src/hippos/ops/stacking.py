"""Rules by which `torch.vmap` takes operators over channels: a stack of models is one call with more channels.

Channels never meet inside these operators, so S stacked calls with H channels each are one call with S H channels. No
call is looped over, forward or backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef  # type: ignore[attr-defined]  # documented there, imported from elsewhere


def stack_as_channels(
    op: CustomOpDef,
    inputs: Sequence[int | None],
    outputs: Sequence[int],
    *,
    saves: int | None = None,
    any_strides: bool = False,
) -> None:
    """Register for `torch.vmap` that an operator acts on each channel alone.

    Args:
        op: The operator.
        inputs: For each argument, the axis of its channels; None for arguments that are no tensors.
        outputs: For each result, the axis of its channels. A result without elements has none and stays as it is.
        saves: Place of the argument that says whether a gradient will be wanted, if there is one. It is set here, as
            tensors inside of `torch.vmap` don't tell.
        any_strides: Whether the operator reads tensors as they lie; if not, it is given contiguous ones.
    """

    def fold(tensor: Tensor, stacked: int | None, channels: int, n_stacked: int) -> Tensor:
        folded = _fold(tensor, stacked, channels, n_stacked)
        return folded if any_strides else folded.contiguous()

    def in_one_call(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        folded = [
            argument if channels is None or argument is None else fold(argument, stacked, channels, info.batch_size)
            for argument, stacked, channels in zip(arguments, in_dims, inputs, strict=True)
        ]
        if saves is not None:
            tensors = [argument for argument in folded if isinstance(argument, Tensor)]
            folded[saves] = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        results = op(*folded)
        results = results if isinstance(results, tuple) else (results,)
        unfolded = tuple(
            torch.unflatten(result, channels, (info.batch_size, -1)) if result.numel() else result
            for result, channels in zip(results, outputs, strict=True)
        )
        out_dims = tuple(
            channels if result.numel() else None for result, channels in zip(results, outputs, strict=True)
        )
        return (unfolded, out_dims) if len(outputs) > 1 else (unfolded[0], out_dims[0])

    torch.library.register_vmap(op, in_one_call)


def _fold(tensor: Tensor, stacked: int | None, channels: int, n_stacked: int) -> Tensor:
    """Bring the axis of the stack before that of the channels, and make one axis of the two."""
    if stacked is None:
        tensor = tensor.unsqueeze(channels).expand(*tensor.shape[:channels], n_stacked, *tensor.shape[channels:])
    else:
        tensor = tensor.movedim(stacked, channels)
    return tensor.flatten(channels, channels + 1)
