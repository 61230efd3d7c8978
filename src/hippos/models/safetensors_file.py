"""Writing one safetensors file as any other file is written: its mode follows the umask, a full disk is an OSError."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors to a file, which is replaced if it is there.

    Args:
        tensors: Name -> tensor; contiguous, no memory shared.
        path: The file.
        metadata: Texts for the file's header.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    usual_mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
    except SafetensorError as error:  # Not an OSError, but with its text: "... No space left on device (os error 28)".
        raise OSError(f"cannot write {path.name}: {error}") from error
    path.chmod(usual_mode)  # safetensors lets only the owner read.
