"""What can still be taken: the machine's memory, or the container's."""

from __future__ import annotations

import pytest
import torch

import hippos.generate.memory
from hippos.generate.memory import free_bytes

CPU = torch.device("cpu")


@pytest.fixture
def container(tmp_path, monkeypatch):
    """A control group whose files the test writes."""
    monkeypatch.setattr(hippos.generate.memory, "_CONTAINER", tmp_path)

    def write(limit: str, current: int, inactive_file: int) -> None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{current}\n")
        (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\n")

    return write


def test_a_containers_limit_counts(container):
    container("1000000", current=400_000, inactive_file=100_000)
    assert free_bytes(CPU) == 700_000
    container("1000000", current=1_200_000, inactive_file=0)
    assert free_bytes(CPU) == 0


def test_without_a_limit_the_machine_counts(container, monkeypatch):
    monkeypatch.setattr(hippos.generate.memory, "_free_on_host", lambda: 12345)
    assert free_bytes(CPU) == 12345
    container("max", current=400_000, inactive_file=0)
    assert free_bytes(CPU) == 12345
    container("10000", current=0, inactive_file=0)
    assert free_bytes(CPU) == 10_000


def test_where_nobody_tells_it_is_not_known(container, monkeypatch):
    monkeypatch.setattr(hippos.generate.memory, "_free_on_host", lambda: None)
    assert free_bytes(CPU) is None
    assert free_bytes(torch.device("meta")) is None
