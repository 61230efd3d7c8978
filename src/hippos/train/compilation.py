"""torch.compile for training: block by block, so that one graph serves all blocks of a kind."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hippos.errors import UnsupportedError

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
        UnsupportedError: If it is on a CPU, for which torch.compile finds no C++ compiler.
    """
    if model.device.type == "cpu" and options.get("backend", "inductor") == "inductor":
        _require_cpp_compiler()
    # A block holds about as many gradients as DDP reduces at once, so its graph need not be cut for that.
    torch._dynamo.config.optimize_ddp = False
    names = model._no_split_modules or ()
    blocks = [block for block in model.modules() if type(block).__name__ in names]
    if not blocks:
        raise ValueError(f"{type(model).__name__} names no blocks to compile")
    for block in blocks:
        # Every batch of a run has the same shape; a graph for any shape would be slower.
        block.compile(**{"dynamic": False, **options})


def _require_cpp_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UnsupportedError(
            "run.compile needs a C++ compiler on a CPU: g++, or what the environment variable CXX names; "
            "set run.compile=no, or install one"
        ) from error


def without_compilation() -> Any:
    """Give a context in which compiled blocks run as they are: shapes that come up once are not worth compiling."""
    return torch.compiler.set_stance("force_eager")
