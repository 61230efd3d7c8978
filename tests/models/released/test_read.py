from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hippos.errors import CheckpointError
from hippos.models.released.read import ReleasedFile
from tests.models.released.examples import released_state_dict

Save = Callable[[Any, Path], None]


def _save_legacy(data: Any, path: Path) -> None:
    torch.save(data, path, _use_new_zipfile_serialization=False)


def _save_safetensors(data: Any, path: Path) -> None:
    save_file({key: tensor.clone() for key, tensor in data.items()}, path)


SAVERS: dict[str, Save] = {"zip": torch.save, "legacy": _save_legacy, "safetensors": _save_safetensors}


@pytest.mark.parametrize("kind", SAVERS)
def test_each_format_gives_the_tensors(tmp_path, kind):
    state_dict = released_state_dict()
    SAVERS[kind](state_dict, tmp_path / "model.pt")
    checkpoint = ReleasedFile(tmp_path / "model.pt")
    read: list[int] = []
    checkpoint.check(read.append)
    assert checkpoint.n_bytes * 0.8 < sum(read) <= checkpoint.n_bytes
    for _ in range(2):  # Opened anew.
        tensors = checkpoint.tensors()
        assert tensors.keys() == state_dict.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in state_dict.items())


class _Command:
    """Runs a command when unpickled without restrictions."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.sentinel}'",)


def _pickled(protocol: int) -> Save:
    def save(data: Any, path: Path) -> None:
        path.write_bytes(pickle.dumps(data, protocol=protocol))

    return save


CODE_SAVERS: dict[str, Save] = {
    "zip": torch.save,
    "legacy": _save_legacy,
    **{f"pickle{protocol}": _pickled(protocol) for protocol in (0, 1, 2, 4, 5)},
}


@pytest.mark.parametrize("kind", CODE_SAVERS)
def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path, kind):
    sentinel = tmp_path / "it ran"
    path = tmp_path / "model.pt"
    CODE_SAVERS[kind](released_state_dict() | {"zz": _Command(sentinel)}, path)
    with pytest.raises(CheckpointError) as caught:
        ReleasedFile(path).tensors()
    assert not sentinel.exists()
    assert "\n" not in str(caught.value)
    if kind in ("zip", "legacy"):
        assert "system, and opening it could run code" in str(caught.value)

    # The same bytes do run the command in an unrestricted reader, so the test can fail.
    if kind == "zip":
        torch.load(path, weights_only=False)
        assert sentinel.exists()


def test_an_object_beside_the_weights_is_refused_by_name(tmp_path):
    checkpoint = {"state_dict": released_state_dict(), "hyper_parameters": argparse.Namespace(lr=1)}
    torch.save(checkpoint, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"refused: its pickle calls argparse\.Namespace"):
        ReleasedFile(tmp_path / "model.pt").tensors()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
@pytest.mark.parametrize("kind", SAVERS)
def test_a_file_cut_off_anywhere_is_refused(tmp_path, kind, share):
    path = tmp_path / "model.pt"
    SAVERS[kind](released_state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError) as caught:
        ReleasedFile(path).tensors()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (
            b"Once upon a time there was a hippo that was hungry, hungry.",
            "neither a PyTorch checkpoint nor safetensors",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5", "Git LFS pointer.*git lfs pull"),
        (b"\x80\x02}q\x00.", "got no|damaged|refused"),
        (bytes(range(256)) * 8, "neither"),
        (b"PK\x03\x04" + bytes(500), "damaged, incomplete or no PyTorch checkpoint"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        ReleasedFile(tmp_path / "model.pt").tensors()


def test_another_zip_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("holiday/photo.txt", "a hippo")
    with pytest.raises(CheckpointError, match="damaged, incomplete or no PyTorch checkpoint"):
        ReleasedFile(tmp_path / "model.pt").tensors()


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        ReleasedFile(tmp_path / "model.pt")


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(released_state_dict(), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    checkpoint = ReleasedFile(path)
    checkpoint.tensors()  # Mapped memory is not looked at.
    with pytest.raises(CheckpointError, match="damaged or incomplete: Bad CRC-32"):
        checkpoint.check(lambda n_bytes: None)


def test_a_checkpoint_written_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(released_state_dict(), tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    ReleasedFile(tmp_path / "model.pt").check(lambda n_bytes: None)


def test_a_checkpoint_that_was_compressed_afterwards_is_refused(tmp_path):
    torch.save(released_state_dict(), tmp_path / "plain.pt")
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record))
    with pytest.raises(CheckpointError, match=r"is compressed|damaged"):
        ReleasedFile(path).check(lambda n_bytes: None)
