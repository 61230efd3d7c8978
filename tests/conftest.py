"""Fixtures for every room: golden data made by the public reference implementation of H3."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

LOCAL_GOLDEN = Path(__file__).parent / "golden"

GoldenPath = Callable[[str], Path]
Golden = Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over all that imports have made: it would look at it again in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden_path() -> GoldenPath:
    """Find a golden file by its full name in tests/golden or else in $HIPPOS_SHARED/golden; skip without it."""

    def find(filename: str) -> Path:
        folders = [LOCAL_GOLDEN]
        if "HIPPOS_SHARED" in os.environ:
            folders.append(Path(os.environ["HIPPOS_SHARED"]) / "golden")
        for folder in folders:
            if (folder / filename).is_file():
                return folder / filename
        if len(folders) == 1:
            pytest.skip(f"{filename} is not among tests/golden, and HIPPOS_SHARED names no folder that could hold it")
        raise FileNotFoundError(f"{filename} is neither in tests/golden nor in {folders[1]}")

    return find


@pytest.fixture(scope="session")
def golden(golden_path: GoldenPath) -> Golden:
    """Load a golden case by its name without suffix: its tensors (none if there is only .json) and description."""

    def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        description = json.loads(golden_path(f"{name}.json").read_text())
        tensors_path = golden_path(f"{name}.json").with_suffix(".safetensors")
        return (load_file(tensors_path) if tensors_path.is_file() else {}), description

    return load


@pytest.fixture
def generator() -> torch.Generator:
    """Give a CPU random generator with a fixed seed, one per test."""
    return torch.Generator().manual_seed(20230501)
