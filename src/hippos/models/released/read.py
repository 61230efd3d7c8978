"""Opening checkpoint files without running code from them and without reading what is not needed."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hippos.errors import CheckpointError
from hippos.models.released.tensors import unwrap

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_READ_BYTES = 1 << 22


class ReleasedFile:
    """One checkpoint file: a torch zip file or safetensors, mapped into memory; or torch's older format, read whole.

    Args:
        path: The file.

    Raises:
        CheckpointError: If it is empty, a Git LFS pointer, or of no known format.
        OSError: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n_bytes = path.stat().st_size
        self._format = _file_format(path)
        self._whole: dict[str, Tensor] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Open the file anew: key -> tensor.

        Pages that were read through an earlier mapping count as this process's memory for as long as that mapping
        lives, so a caller who reads a large file in parts opens it once a part.

        Raises:
            CheckpointError: If opening it would run code, it is damaged, or it holds no state dict.
        """
        if self._whole is not None:
            return self._whole
        if self._format == "safetensors":
            return _open_safetensors(self.path)
        tensors = unwrap(_load_torch(self.path, mmap=self._format == "zip"))
        if self._format == "pickle":
            self._whole = tensors
        return tensors

    def check(self, progress: Callable[[int], None]) -> None:
        """Compare the data of a torch zip file with its checksums, which a memory-mapped read does not look at.

        Args:
            progress: Called with the number of bytes just read.

        Raises:
            CheckpointError: If a record fails, or is compressed and so cannot be mapped.
        """
        if self._format != "zip":
            progress(self.n_bytes)
            return
        try:
            with zipfile.ZipFile(self.path) as archive:
                for record in archive.infolist():
                    _check_record(archive, record, progress)
        except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise CheckpointError(f"the file is damaged or incomplete: {error}") from error


def _file_format(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError("the file is empty")
    if head.startswith(_LFS_POINTER):
        raise CheckpointError("the file is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    if head.startswith(_ZIP):
        return "zip"
    if head.startswith(_PICKLE):
        return "pickle"
    header_bytes = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_bytes <= path.stat().st_size - 8:
        return "safetensors"
    raise CheckpointError("neither a PyTorch checkpoint nor safetensors (or cut off at the start)")


def _load_torch(path: Path, *, mmap: bool) -> Any:
    """Unpickle with nothing but tensors and plain containers allowed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # About the pickle's protocol; what matters is raised.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(str(error))) from error
    except Exception as error:  # A damaged pickle can raise anything, and torch's reader of zip files an OSError.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the file is damaged, incomplete or no PyTorch checkpoint: {reason}") from error


def _refusal(message: str) -> str:
    """Say in one line what torch's restricted unpickler would not do."""
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if found:
        return (
            f"refused: its pickle calls {found[1]}, and opening it could run code; only tensors in plain containers "
            "are read (if you trust the file, save its state_dict alone with torch.save)"
        )
    return "refused: its pickle is damaged or does more than hold tensors in plain containers"


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"the safetensors file is damaged or incomplete: {error}") from error


def _check_record(archive: zipfile.ZipFile, record: zipfile.ZipInfo, progress: Callable[[int], None]) -> None:
    if record.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{record.filename} is compressed; PyTorch checkpoints are stored uncompressed")
    if record.CRC == 0:  # Written with torch.serialization.set_crc32_options(False).
        progress(record.file_size)
        return
    with archive.open(record) as stream:
        while block := stream.read(_READ_BYTES):
            progress(len(block))
