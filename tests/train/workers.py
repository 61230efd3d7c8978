"""Training runs of several processes under torchrun's environment, on the CPU by gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from hippos.train import TrainConfig

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["hippos.train.trainer", "hippos.models", "torch._dynamo"])


def start_workers(world_size: int, work: Callable[..., None], *arguments: Any, log: Path) -> list[BaseProcess]:
    """Start ``work(*arguments)``, a module's function, in processes that find each other as torchrun's do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = []
    for rank in range(world_size):
        process = _SERVER.Process(target=_enter, args=(rank, world_size, port, log, work, arguments))
        process.start()
        workers.append(process)
    return workers


def run_workers(world_size: int, work: Callable[..., None], *arguments: Any, log: Path) -> None:
    """Run ``work(*arguments)`` in several processes to its end."""
    workers = start_workers(world_size, work, *arguments, log=log)
    for worker in workers:
        worker.join(timeout=80)
    exit_codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert exit_codes == [0] * world_size, f"{exit_codes}\n{log.read_text()}"


def train_run(config: dict[str, Any], run: Path, resume: bool = False) -> None:
    """Train, or go on with a run, as one of the processes."""
    from hippos.train import train

    train(TrainConfig.from_dict(config), run, resume=resume)


def train_together(config: TrainConfig, run: Path, *, world_size: int, resume: bool = False) -> None:
    """Train with several processes to the end."""
    run_workers(world_size, train_run, config.to_dict(), run, resume, log=run.parent / f"{run.name}.log")


def _enter(
    rank: int, world_size: int, port: int, log: Path, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    stream = log.open("a")
    os.dup2(stream.fileno(), sys.stderr.fileno())
    os.dup2(stream.fileno(), sys.stdout.fileno())
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(1)
    work(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
