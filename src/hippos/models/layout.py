"""What a batch says beside its tokens: padding, packed documents, positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils.import_utils import is_tracing

from hippos.models.configuration_h3 import ATTENTION, LINEAR, H3Config
from hippos.models.context import ContextPart
from hippos.ops.tracing import is_exporting


class TokenLayout(NamedTuple):
    """How the tokens (B, L) of a call hang together, in the form in which the layers take it.

    Attributes:
        real: False at padding, shape (B, L); None if all tokens are real.
        cu_seqlens: Bounds of packed documents in the B * L tokens, row after row, shape (n_docs + 1,); None if every
            row is one text.
        position_ids: Positions for rotary attention or learned embeddings, shape (B, L) or (1, L); None without them.
        attention_mask: The mask as the model's attention implementation takes it.
        context: This process's part, where the sequences are split over processes.
    """

    real: Tensor | None
    cu_seqlens: Tensor | None
    position_ids: Tensor | None
    attention_mask: Any
    context: ContextPart | None = None


class Padding(NamedTuple):
    """Where a batch is padded.

    Attributes:
        real: False at padding, shape (B, L), the tokens of this call; None if all of them are real.
        is_right: Whether a text has padding behind it.
    """

    real: Tensor | None
    is_right: bool


def read_padding(mask: Tensor | Mapping[str, Any] | None, tokens: Tensor, past: Cache | None) -> Padding:
    """Find the padding that ``attention_mask`` tells of.

    The values are looked at (which waits for the device) only outside compilation and capture: inside, the mask is
    taken to be one that was checked, and a single token to be real.

    Args:
        mask: ``attention_mask`` as `H3Model.forward` takes it.
        tokens: Ids (B, L) or embeddings (B, L, D) of this call.
        past: The cache before this call.

    Returns:
        The padding.

    Raises:
        ValueError: If the mask has another shape, or the real tokens of a text are not in one piece.
    """
    batch, seqlen = tokens.shape[:2]
    if isinstance(mask, Mapping):
        mask, width = mask.get(LINEAR), seqlen
    else:
        width = _mask_width(mask, seqlen, past)
    if mask is None:
        return Padding(None, is_right=False)
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] != width:
        raise ValueError(
            f"attention_mask must have shape (batch, past tokens + tokens) = ({batch}, {width}), got "
            f"{tuple(mask.shape)}; SSM layers cannot follow a mask between pairs of tokens"
        )
    mask = mask != 0
    real = mask[:, width - seqlen :]
    if is_tracing(mask):
        return Padding(real if seqlen > 1 else None, is_right=False)
    if bool(mask.all()):
        return Padding(None, is_right=False)
    first, last = mask[:, :1], mask[:, -1]
    begins = torch.cat((first, mask[:, 1:] & ~mask[:, :-1]), dim=1).sum(dim=1)
    if bool((begins > 1).any()):
        row = int((begins > 1).nonzero()[0])
        raise ValueError(
            f"attention_mask has padding between real tokens in row {row}; pad on the left or on the right"
        )
    is_right = bool((mask.any(dim=1) & ~last).any())
    return Padding(None if bool(real.all()) else real, is_right=is_right)


def _mask_width(mask: Tensor | None, seqlen: int, past: Cache | None) -> int:
    if mask is None or past is None:
        return seqlen
    n_past = past.get_seq_length()
    if isinstance(n_past, Tensor) and (is_tracing(n_past) or n_past.device.type != "cpu"):
        return mask.shape[-1]  # a static cache counts on its device, and a check is not worth waiting for it
    return int(n_past) + seqlen


def read_documents(
    tokens: Tensor, position_ids: Tensor | None, seq_idx: Tensor | None, cu_seq_lens: Tensor | None
) -> Tensor | None:
    """Find the bounds of packed documents.

    As in Transformers, a document begins where ``position_ids`` do not go up by one, where ``seq_idx`` changes, or
    where ``cu_seq_lens`` says so. Their number is data, so this part of a compiled model runs outside of the graph.

    Args:
        tokens: Ids (B, L) or embeddings (B, L, D).
        position_ids: Positions, shape (B, L) or (1, L).
        seq_idx: Number of each token's document, shape (B, L).
        cu_seq_lens: Bounds, shape (n_docs + 1,), from 0 to L; needs B = 1.

    Returns:
        Bounds in the B * L tokens, row after row, shape (n_docs + 1,), int32; None if no row has two documents.

    Raises:
        ValueError: If a shape is wrong or two of the arguments contradict each other.
    """
    is_first = find_first_tokens(tokens, position_ids, seq_idx, cu_seq_lens)
    if cu_seq_lens is not None and is_first is not None:
        if not is_tracing(cu_seq_lens):
            _check_agreement(is_first, tokens, {"position_ids": (position_ids, 1), "seq_idx": (seq_idx, 0)})
        return cu_seq_lens.to(device=tokens.device, dtype=torch.int32)
    if is_first is None or is_first.shape[1] == 1:
        return None
    if seq_idx is not None and not is_tracing(seq_idx):
        _check_agreement(is_first, tokens, {"position_ids": (position_ids, 1)})
    return _bounds(is_first)


def find_first_tokens(
    tokens: Tensor, position_ids: Tensor | None, seq_idx: Tensor | None, cu_seq_lens: Tensor | None
) -> Tensor | None:
    """Tell which tokens begin a document, shape (B, L), bool; None without arguments, which are `read_documents`'s."""
    if cu_seq_lens is not None:
        return _first_by_bounds(tokens, cu_seq_lens)
    if seq_idx is not None:
        return _first_by_steps("seq_idx", seq_idx, 0, tokens)
    if position_ids is not None:
        return _first_by_steps("position_ids", position_ids, 1, tokens)
    return None


def _first_by_bounds(tokens: Tensor, cu_seq_lens: Tensor) -> Tensor:
    batch, seqlen = tokens.shape[:2]
    if batch != 1 or cu_seq_lens.ndim != 1:
        raise ValueError(
            f"cu_seq_lens_q must have shape (documents + 1,) and the batch one row, got shape "
            f"{tuple(cu_seq_lens.shape)} and {batch} rows"
        )
    if not is_tracing(cu_seq_lens):
        bounds = cu_seq_lens.tolist()
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != seqlen or bounds != sorted(bounds):
            raise ValueError(f"cu_seq_lens_q must go up from 0 to the {seqlen} tokens, got {bounds}")
    is_first = torch.zeros(seqlen + 1, dtype=torch.bool, device=tokens.device)
    return is_first.index_fill(0, cu_seq_lens.to(device=tokens.device, dtype=torch.long), True)[:seqlen].unsqueeze(0)


def _first_by_steps(name: str, values: Tensor, step: int, tokens: Tensor) -> Tensor:
    """Tokens at which ``values`` do not go on in steps of ``step``."""
    batch, seqlen = tokens.shape[:2]
    if values.ndim != 2 or values.shape[0] not in (1, batch) or values.shape[1] != seqlen:
        raise ValueError(f"{name} must have shape ({batch}, {seqlen}) or (1, {seqlen}), got {tuple(values.shape)}")
    breaks = values[:, 1:] != values[:, :-1] + step
    return F.pad(breaks, (1, 0), value=True).expand(batch, seqlen)


@torch.compiler.disable(reason="packed documents break the graph: their number is data")  # type: ignore[no-untyped-call]
def _bounds(is_first: Tensor) -> Tensor | None:
    starts = is_first.flatten().nonzero().squeeze(1)
    if starts.numel() == is_first.shape[0]:
        return None
    return F.pad(starts, (0, 1), value=is_first.numel()).to(torch.int32)


def _check_agreement(is_first: Tensor, tokens: Tensor, others: Mapping[str, tuple[Tensor | None, int]]) -> None:
    for name, (values, step) in others.items():
        if values is None:
            continue
        disagrees = _first_by_steps(name, values, step, tokens) & ~is_first
        if bool(disagrees.any()):
            token = int(disagrees.flatten().nonzero()[0])
            raise ValueError(f"{name} begin a document at token {token}, where the other arguments go on with one")


def document_positions(cu_seqlens: Tensor, batch: int, seqlen: int) -> Tensor:
    """Count the tokens of each document from 0: shape (B, L), int64."""
    token = torch.arange(batch * seqlen, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, token, right=True) - 1
    return (token - cu_seqlens[document]).long().view(batch, seqlen)


def lay_out(
    config: H3Config,
    embeddings: Tensor,
    mask: Tensor | Mapping[str, Any] | None,
    position_ids: Tensor | None,
    past: Cache | None,
    real: Tensor | None,
    cu_seqlens: Tensor | None,
) -> TokenLayout:
    """Bring padding, documents and positions into the form that the layers take.

    Args:
        config: The model's configuration.
        embeddings: Embeddings of this call's tokens, shape (B, L, D).
        mask: ``attention_mask`` as `H3Model.forward` takes it.
        position_ids: Positions, shape (B, L) or (1, L); None: from the mask and the cache.
        past: The cache before this call.
        real: From `read_padding`.
        cu_seqlens: From `read_documents`.

    Returns:
        The layout.
    """
    has_rotary = bool(config.attn_layers and config.rotary_dim)
    has_positions = has_rotary or config.learned_positions > 0
    batch, seqlen = embeddings.shape[:2]
    if cu_seqlens is not None and (has_positions or config.attn_layers):
        position_ids = document_positions(cu_seqlens, batch, seqlen)
    elif has_positions and position_ids is None:
        position_ids = _positions(mask, seqlen, past, embeddings.device)
    if not config.attn_layers:
        attention_mask = None
    elif isinstance(mask, Mapping):
        attention_mask = mask.get(ATTENTION)
    elif _is_plainly_causal(config, mask, past, cu_seqlens):
        attention_mask = None
    else:
        attention_mask = create_causal_mask(
            config=config,
            inputs_embeds=embeddings,
            attention_mask=mask if cu_seqlens is None else None,
            past_key_values=past,
            position_ids=None if cu_seqlens is None else position_ids,
        )
    return TokenLayout(real, cu_seqlens, position_ids if has_positions else None, attention_mask)


def _is_plainly_causal(config: H3Config, mask: Any, past: Cache | None, cu_seqlens: Tensor | None) -> bool:
    """Whether PyTorch's attention needs no mask beside its flag.

    Transformers finds the same, but some of its versions not while a graph is traced or captured, where a mask is
    slower by the whole difference between attention kernels.
    """
    is_alone = mask is None and past is None and cu_seqlens is None
    return is_alone and config._attn_implementation == "sdpa" and not is_exporting()


def _positions(mask: Tensor | Mapping[str, Any] | None, seqlen: int, past: Cache | None, device: Any) -> Tensor:
    """Count real tokens from 0; without a plain mask, all tokens.

    (Rotary attention sees differences only, and `generate`, which makes other masks, gives positions with them.)
    """
    if isinstance(mask, Tensor):
        return (mask.to(device=device, dtype=torch.long).cumsum(dim=1) - 1).clamp(min=0)[:, -seqlen:]
    n_past = 0 if past is None else past.get_seq_length()
    return (torch.arange(seqlen, device=device) + n_past).unsqueeze(0)
