"""torch.compile for training: block by block, so that one graph serves all blocks of a kind."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

__all__ = ["compile_blocks", "without_compilation"]


def compile_blocks(model: PreTrainedModel, **options: Any) -> None:
    """Compile each block's forward pass, in place; names of modules and parameters stay.

    A graph of the whole model repeats its blocks, takes as many times longer to compile, and saves little: what it
    could fuse between blocks is the sum at the end of one with the norm of the next.

    Args:
        model: A model whose ``_no_split_modules`` are its blocks.
        **options: For torch.compile.

    Raises:
        ValueError: If it has no such blocks.
    """
    # A block holds about as many gradients as DDP reduces at once, so its graph need not be cut for that.
    torch._dynamo.config.optimize_ddp = False
    names = model._no_split_modules or ()
    blocks = [block for block in model.modules() if type(block).__name__ in names]
    if not blocks:
        raise ValueError(f"{type(model).__name__} names no blocks to compile")
    for block in blocks:
        # Every batch of a run has the same shape; a graph for any shape would be slower.
        block.compile(**{"dynamic": False, **options})


def without_compilation() -> Any:
    """Give a context in which compiled blocks run as they are: shapes that come up once are not worth compiling."""
    return torch.compiler.set_stance("force_eager")
