"""Training runs in processes of their own, to be killed: forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hippos.train import TrainConfig

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["hippos.train.trainer", "hippos.models", "torch._dynamo"])


def start(config: TrainConfig, run: Path, *, resume: bool = False, die_at: int | None = None) -> BaseProcess:
    """Start a session; with ``die_at`` it kills itself at that one of its steps towards the disk."""
    process = _SERVER.Process(target=_session, args=(config.to_dict(), run, resume, die_at))
    process.start()
    return process


def finish(config: TrainConfig, run: Path, *, resume: bool = False) -> None:
    """Run a session to its end."""
    process = start(config, run, resume=resume)
    process.join()
    output = (run.parent / f"{run.name}.log").read_text()
    assert process.exitcode == 0, output


def _session(config: dict[str, Any], run: Path, resume: bool, die_at: int | None) -> None:
    log = (run.parent / f"{run.name}.log").open("a")
    os.dup2(log.fileno(), sys.stderr.fileno())
    os.dup2(log.fileno(), sys.stdout.fileno())
    import torch

    torch.set_num_threads(1)
    from hippos.train import train

    if die_at is not None:
        _die_at(die_at)
    train(TrainConfig.from_dict(config), run, resume=resume)


def _die_at(count: int) -> None:
    """Kill this process, with no chance to clean up, at the ``count``-th call of what changes the disk."""
    left = count

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    import torch

    for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir")):
        setattr(module, name, deadly(getattr(module, name)))
    torch.save = deadly(torch.save)
