"""The stack of blocks in training on a GPU, with one kernel for all that lies between two parts of a block.

Plain blocks leave sums, norms, GELUs and the gradients of biases to PyTorch, which makes a pass over the memory of
each, and a compiler, which sees one block at a time, still makes several. Here what a part adds to the stream goes to
the next norm as it is, without the bias of the product that made it: `hippos.ops.add_norm` adds both, and its backward
pass makes every gradient that is a sum over tokens. Module names, parameters and results are those of the plain blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hippos.layers import H3, MLP
from hippos.layers.projections import is_plain_linear
from hippos.models.attention import CachedSelfAttention
from hippos.models.block import H3Block, mix_ssm
from hippos.models.context import mix_part
from hippos.models.layout import TokenLayout
from hippos.ops.add_norm import NormKept, add_norm_kept, takes_kernels
from hippos.ops.add_norm.split import SPLIT_DTYPE
from hippos.ops.embed import embed
from hippos.ops.gelu_mlp import gelu_mlp
from hippos.ops.precision import product_dtype
from hippos.ops.tracing import has_values

__all__ = ["embed_tokens", "run_fused_trunk", "run_mixer", "run_mlp", "takes_fused_trunk"]


def embed_tokens(embedding: nn.Module, ids: Tensor) -> Tensor:
    """Call the module; in training, if it is plain, sum its gradient by kernels of our own where they run.

    Args:
        embedding: Of tokens.
        ids: Shape (B, L).

    Returns:
        Shape (B, L, D).
    """
    if _is_plain_embedding(embedding) and embedding.training and torch.is_grad_enabled() and has_values(ids):
        return embed(ids, embedding.weight)
    rows: Tensor = embedding(ids)
    return rows


def takes_fused_trunk(blocks: Iterable[nn.Module], norm: nn.Module, stream: Tensor) -> bool:
    """Whether `run_fused_trunk` gives what the blocks and the norm behind them would give, but faster.

    It calls norms' and MLPs' parameters and not the modules, so these must be plain: no hooks, nothing replaced (as by
    LoRA), not compiled. Blocks may be sharded as `hippos.train` does it: each gathers its matrices alone. Only hybrids
    of H3 and attention: other SSMs spend their time elsewhere.

    Args:
        blocks: The blocks.
        norm: The norm behind the last one.
        stream: What goes in.
    """
    if not (has_values(stream) and torch.is_grad_enabled() and takes_kernels(stream)):
        return False
    return _is_plain_norm(norm) and all(_is_plain_block(block) for block in blocks)


def run_fused_trunk(blocks: Iterable[Any], norm: Any, stream: Tensor, layout: TokenLayout) -> Tensor:
    """Run the blocks, in training, and the norm behind them.

    Args:
        blocks: Those that `takes_fused_trunk` has looked at.
        norm: The norm behind the last one.
        stream: Embedded tokens, shape (B, L, D).
        layout: Masks, documents and positions of the tokens.

    Returns:
        Normalised hidden states, shape (B, L, D), dtype of ``stream``.
    """
    update: Tensor | None = None
    update_bias: Tensor | None = None
    dtype = stream.dtype
    for block in blocks:
        inputs = (_run_block, stream, update, update_bias, layout)
        if _is_checkpointed(block):
            stream, update = checkpoint(block.lend, *inputs, use_reentrant=False)
        else:
            stream, update = block.lend(*inputs)
        update_bias = block.mlp.fc2.bias
    return _add_norm(norm, stream, update, update_bias, dtype).normed


def _run_block(
    block: Any, stream: Tensor, update: Tensor | None, update_bias: Tensor | None, layout: TokenLayout
) -> tuple[Tensor, Tensor]:
    stream, update, update_bias = run_mixer(block, stream, update, update_bias, layout)
    return run_mlp(block, stream, update, update_bias)


def run_mixer(
    block: Any, stream: Tensor, update: Tensor | None, update_bias: Tensor | None, layout: TokenLayout
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring the stream up to date, and give it with what the block's mixer adds to it and the bias that this lacks."""
    kept = _add_norm(block.norm1, stream, update, update_bias, product_dtype(stream.device, stream.dtype))
    with _made_again(kept) if _recomputes_cheap_parts(block) else nullcontext():
        return kept.total, *_mix(block.mixer, kept.normed, layout, keeps_keys=not block.recomputes_cheap_parts)


def run_mlp(block: Any, stream: Tensor, update: Tensor, update_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Bring the stream up to date, and give it with what the block's MLP adds to it, the last bias left out."""
    recomputes = _recomputes_cheap_parts(block)
    kept = _add_norm(block.norm2, stream, update, update_bias, product_dtype(stream.device, stream.dtype))
    fc1, fc2 = block.mlp.fc1, block.mlp.fc2
    with _made_again(kept) if recomputes else nullcontext():
        return kept.total, gelu_mlp(kept.normed, fc1.weight, fc1.bias, fc2.weight, recomputes=recomputes, impl="triton")


def _add_norm(
    norm: nn.LayerNorm, stream: Tensor, update: Tensor | None, update_bias: Tensor | None, dtype: torch.dtype
) -> NormKept:
    splits = False
    if update is not None:
        is_wide = stream.dtype == torch.float32 or stream.dim() > update.dim()
        splits = is_wide and update.dtype == SPLIT_DTYPE
    return add_norm_kept(
        stream, update, norm.weight, norm.bias, update_bias=update_bias, eps=norm.eps, dtype=dtype, splits=splits
    )


def _mix(mixer: Any, u: Tensor, layout: TokenLayout, *, keeps_keys: bool) -> tuple[Tensor, Tensor | None]:
    if isinstance(mixer, CachedSelfAttention):
        leaves_bias = _is_untouched(mixer) and is_plain_linear(mixer.out_proj)
        update = mixer.mix(u, layout, None, adds_bias=not leaves_bias)[0]
        return update, mixer.out_proj.bias if leaves_bias else None
    bounds, mixed = layout.cu_seqlens, None
    if layout.context is not None:
        mixed = mix_part(mixer, u, layout.context, adds_bias=False)
    elif (bounds is not None or layout.real is None) and _is_untouched(mixer):
        tokens = u if bounds is None else u.reshape(1, -1, u.shape[-1])  # (1, B * L, D)
        mixed = mixer.mix_without_bias(tokens, bounds, keeps_keys)
    if mixed is not None:
        return mixed.view_as(u), mixer.out_proj.bias
    return mix_ssm(mixer, u, layout, None), None


def _is_checkpointed(block: Any) -> bool:
    """Whether all of a block is computed again in the backward pass, as Transformers marks it."""
    return bool(getattr(block, "gradient_checkpointing", False))


def _recomputes_cheap_parts(block: Any) -> bool:
    """Whether to make them again: where all is, nothing of the block is kept that they would save."""
    return block.recomputes_cheap_parts and not _is_checkpointed(block)


def _made_again(kept: NormKept) -> AbstractContextManager[Any]:
    """Let the backward pass of what runs in this context make the norm's output once more, instead of keeping it."""
    place, size = kept.normed.data_ptr(), kept.normed.numel()
    again = kept.forget_normed()

    def pack(saved: Tensor) -> Any:
        is_normed = saved.data_ptr() == place and saved.numel() == size  # in whatever order of axes
        return (saved.shape, saved.stride()) if is_normed else saved

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else again().as_strided(*packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_plain_block(block: nn.Module) -> bool:
    return (
        isinstance(block, H3Block)
        and (_is_sharded(block) if block.is_lent_whole else type(block) is H3Block and _is_untouched(block))
        and not (block.training and block.dropout)
        and type(block.mixer) in (H3, CachedSelfAttention)
        and _is_plain_norm(block.norm1)
        and _is_plain_norm(block.norm2)
        and type(block.mlp) is MLP
        and _is_untouched(block.mlp)
        and all(
            _is_plain_linear(linear, block) and linear.bias is not None for linear in (block.mlp.fc1, block.mlp.fc2)
        )
    )


def _is_sharded(block: H3Block) -> bool:
    """Whether a block is FSDP's, which gathers its weights for a call and for `H3Block.lend`, and nothing else."""
    hooks = (block._forward_pre_hooks, block._forward_hooks)
    is_hooked_once = all(len(kind) == 1 for kind in hooks) and not (block._backward_hooks or block._backward_pre_hooks)
    is_changed = "forward" in block.__dict__ or block._compiled_call_impl is not None
    return H3Block in type(block).__bases__ and is_hooked_once and not is_changed


def _is_plain_linear(linear: nn.Module, block: H3Block) -> bool:
    # The parameter of a sharded matrix, outside of the block's call, is of another type.
    is_linear = type(linear) is nn.Linear and _is_untouched(linear)
    return is_linear if block.is_lent_whole else is_plain_linear(linear)


def _is_plain_embedding(embedding: nn.Module) -> TypeGuard[nn.Embedding]:
    return (
        type(embedding) is nn.Embedding
        and _is_untouched(embedding)
        and type(embedding.weight) is nn.Parameter
        and embedding.padding_idx is None
        and embedding.max_norm is None
        and not (embedding.scale_grad_by_freq or embedding.sparse)
    )


def _is_plain_norm(norm: nn.Module) -> bool:
    return type(norm) is nn.LayerNorm and norm.bias is not None and _is_untouched(norm)


def _is_untouched(module: nn.Module) -> bool:
    """Whether a call of the module would run its class's forward and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in module.__dict__ and module._compiled_call_impl is None
