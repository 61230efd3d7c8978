"""The processes of a run under torchrun: who they are, and work that one of them does for all."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hippos.errors import ConfigError

__all__ = ["Processes", "leave_processes"]

Result = TypeVar("Result")

# For one process the others wait as long as its work takes: encoding a large corpus can take a day.
_LONGEST_WORK = timedelta(days=7)

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Args:
        rank: Its number, from 0.
        world_size: How many there are.
        waiting: Group in which processes wait for each other's work without a time limit; None for a single process.
    """

    rank: int = 0
    world_size: int = 1
    waiting: Any = None

    @classmethod
    def join(cls) -> Processes:
        """Meet the other processes that torchrun has started; a single process is alone.

        Raises:
            ConfigError: If torchrun's environment is not complete.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size <= 1:
            return cls()
        if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise ConfigError(
                f"WORLD_SIZE is {world_size}, but {', '.join(missing)} is not set: start several processes with "
                "torchrun, as in torchrun --nproc-per-node 2 -m hippos train ..."
            )
        if "TORCHELASTIC_RUN_ID" in os.environ:
            _die_with_the_launcher()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), world_size, dist.new_group(backend="gloo", timeout=_LONGEST_WORK))

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the run's files."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other process."""
        return self.world_size == 1

    @property
    def share_a_machine(self) -> bool:
        """Whether torchrun has started all processes on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == self.world_size

    def lead(self, work: Callable[[], Result]) -> Result:
        """Let the main process work and give all processes its result, which must be picklable.

        An error goes on in the main process; the others, who have nothing to add, exit with code 1.
        """
        if self.is_alone:
            return work()
        box: list[Any] = [None, True]
        if self.is_main:
            try:
                box = [work(), False]
            finally:
                dist.broadcast_object_list(box, src=0, group=self.waiting)
        else:
            dist.broadcast_object_list(box, src=0, group=self.waiting)
            if box[1]:
                raise SystemExit(1)
        result: Result = box[0]
        return result

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks; values must be picklable."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.waiting)
        return values

    def context_group(self, size: int) -> Any:
        """The processes that share this one's sequences, ``size`` neighbours; called by all processes."""
        groups = [dist.new_group(range(start, start + size)) for start in range(0, self.world_size, size)]
        return groups[self.rank // size]

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if not self.is_alone:
            dist.barrier(group=self.waiting)


def _die_with_the_launcher() -> None:
    """Ask Linux to kill this process when torchrun is killed, since it would wait for it for ever, on its GPU."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leave_processes() -> None:
    """Leave the process group, as torch requires before exit; does nothing in a single process."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
