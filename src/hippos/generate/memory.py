"""How many texts fit into a device's memory, and what to say when they don't."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hippos.errors import OutOfMemoryError
from hippos.generate.fused_read import FusedRead
from hippos.generate.h3_decoder import TOKENS_AT_ONCE
from hippos.generate.state import n_bytes_of_row

_SHARE_OF_FREE = 0.9
_CONTAINER = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where nobody tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        told = [amount for amount in (_free_on_host(), _free_in_container(_CONTAINER)) if amount is not None]
        return min(told, default=None)
    return None


def _free_on_host() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return None


def _free_in_container(group: Path) -> int | None:
    """What a container's limit (of Linux, cgroup v2) leaves; files read before give way. None without a limit."""
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        amounts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(limit - used + int(amounts["inactive_file"]), 0)
    except (OSError, ValueError, KeyError):  # no such file, or "max": no limit
        return None


def largest_batch(model: Any, *, context: int, free: int | None = None, chunk_len: int | None = None) -> int | None:
    """How many texts of ``context`` tokens fit into the free memory of the model's device, prompt reading included.

    Args:
        model: An H3 language model.
        context: Tokens of a text, prompt and continuation.
        free: Bytes to be had; None asks the device.
        chunk_len: Tokens of each text that are read at once; None as in `H3Decoder`.

    Returns:
        The number, at least 0; None where the device does not tell.
    """
    free = free_bytes(model.device) if free is None else free
    if free is None:
        return None
    row = n_bytes_of_row(model, context=context)
    per_token = _bytes_per_token(model)
    usable = int(free * _SHARE_OF_FREE)
    if chunk_len is not None:
        return usable // (row + chunk_len * per_token)
    tokens = TOKENS_AT_ONCE.get(model.device.type, TOKENS_AT_ONCE["cpu"])
    n_many = (usable - tokens * per_token) // row
    return n_many if n_many * context >= tokens else usable // (row + context * per_token)


def _bytes_per_token(model: Any) -> int:
    """Of the activations while a prompt is read: the MLP's, and the mixers' (in float32 where they are not fused)."""
    config = model.config
    width: int = model.model.norm.weight.dtype.itemsize
    if FusedRead.fits(model):
        return int(config.intermediate_size + 6 * config.hidden_size) * width
    return 2 * config.intermediate_size * width + 12 * config.hidden_size * max(width, 4)


def check_fits(model: Any, batch: int, *, context: int, held: int = 0, chunk_len: int | None = None) -> None:
    """Raise before memory is taken for a state that cannot fit.

    Args:
        model: An H3 language model.
        batch: Texts wanted.
        context: Tokens of each.
        held: Bytes that will be given back first.
        chunk_len: Tokens of each text that are read at once.

    Raises:
        OutOfMemoryError: If it does not fit; the message says which batch would.
    """
    free = free_bytes(model.device)
    if free is None or n_bytes_of_row(model, context=context) * batch <= free + held:
        return
    raise OutOfMemoryError(_advice(model, batch, context, free + held, chunk_len))


@contextmanager
def advising_on_memory(model: Any, batch: int, *, context: int, held: int, chunk_len: int | None) -> Iterator[None]:
    """Turn the allocator's error into one that says which batch would fit; arguments as for `check_fits`.

    Raises:
        OutOfMemoryError: In place of the allocator's.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        free = free_bytes(model.device)
        free = None if free is None else free + held
        raise OutOfMemoryError(_advice(model, batch, context, free, chunk_len)) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocator raised it: PyTorch's for CPUs has no exception of its own, and words for each system."""
    is_plain = any(sign in str(error) for sign in ("not enough memory", "can't allocate memory"))
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or is_plain


def _advice(model: Any, batch: int, context: int, free: int | None, chunk_len: int | None) -> str:
    fitting = None if free is None else largest_batch(model, context=context, free=free, chunk_len=chunk_len)
    fitting = max(batch // 2, 0) if fitting is None or fitting >= batch else fitting
    row = n_bytes_of_row(model, context=context)
    told = "" if free is None else f", {free / 2**30:.2f} GiB are free"
    advice = f"a batch of {fitting} would fit" if fitting else "not even one fits: take a shorter text"
    return (
        f"out of memory on {model.device}: {batch} texts of {context} tokens take {batch * row / 2**30:.2f} GiB for "
        f"their states{told}; {advice}"
    )
