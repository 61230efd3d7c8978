"""Two commands for one folder, and processes whose launcher is gone."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from hippos.errors import TrainingError
from hippos.train import TrainConfig, claim, train
from hippos.train.claim import FolderClaim
from hippos.train.processes import _die_with_the_launcher
from tests.train.left import QUIET

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["hippos.train.trainer", "hippos.models", "torch._dynamo"])


def _hold(run: Path, told: Connection) -> None:
    with FolderClaim() as taken:
        taken.take(run)
        taken.take(run)
        told.send("held")
        time.sleep(60)


def _launch(told: Connection) -> None:
    """Be a launcher with one worker, which tells its number when it is up."""
    if not os.fork():
        _die_with_the_launcher()
        told.send(os.getpid())
    time.sleep(60)


def test_a_folder_has_one_writer_until_that_is_killed(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_PATIENCE_S", 0.2)
    run = tmp_path / "run"
    train(tiny, run, progress=QUIET)
    hears, tells = _SERVER.Pipe(duplex=False)
    holder = _SERVER.Process(target=_hold, args=(run, tells))
    holder.start()
    assert hears.recv() == "held"
    with pytest.raises(TrainingError, match=f"process {holder.pid} is training in {run}: wait until it ends"):
        train(None, run, resume=True, progress=QUIET)
    with pytest.raises(TrainingError, match=f"process {holder.pid} is training"):
        train(tiny, run, overwrite=True, progress=QUIET)
    assert (run / "model.safetensors").exists()
    holder.kill()
    holder.join()
    with FolderClaim() as taken:
        taken.take(run)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux's kernel")
def test_workers_end_with_a_launcher_that_is_killed() -> None:
    hears, tells = _SERVER.Pipe(duplex=False)
    launcher = _SERVER.Process(target=_launch, args=(tells,))
    launcher.start()
    worker = hears.recv()
    launcher.kill()
    launcher.join()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _is_alive(worker):
        time.sleep(0.01)
    assert not _is_alive(worker)


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
