"""Runs Gluon programs that copy tiles by descriptors on a CPU, on a grid of two axes; see `gluon_on_cpu`.

Programs that meet run in threads, all others one after another.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.ops.gluon_on_cpu import Pointer, Shared, Value, _load, _namespace, _reach, raw

Value.__truediv__ = lambda self, other: Value(self.tensor / raw(other))
Value.__rtruediv__ = lambda self, other: Value(other / self.tensor)
Shared._reinterpret = lambda self, dtype, shape, layout: Shared(self.tensor.view(shape))


class Descriptor:
    """A matrix of which tiles are copied."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix


def _copy_tile(source, place, barrier, tile, pred=True):
    del barrier
    if not bool(raw(pred)):
        return
    row, column = (int(raw(x)) for x in place)
    n_rows, n_columns = tile.tensor.shape
    assert 0 <= row <= source.matrix.shape[0] - n_rows
    assert 0 <= column <= source.matrix.shape[1] - n_columns
    tile.tensor.copy_(source.matrix[row : row + n_rows, column : column + n_columns])


def _nothing(*_, **__):
    return None


def run_program(module: Path, kernel: str, grid: tuple[int, int], *args, more=_nothing, **constants) -> None:
    """Run a Gluon kernel for every program of a grid.

    Args:
        module: The kernel's file.
        kernel: Its name.
        grid: Programs along both axes.
        args: Tensors, descriptors and integers, as in a launch.
        more: Called with the program's names, to add some.
        constants: Its constants.
    """
    given = [_given(x) for x in args]
    names = [_names(module, program, more) for program in itertools.product(*map(range, grid))]
    for space in names:
        space[kernel](*given, **constants)


def run_meeting_programs(module: Path, kernel: str, n_programs: int, *args, **constants) -> None:
    """As `run_program`, for programs of one axis of which each waits for all others in ``_meet``."""
    given = [_given(x) for x in args]
    meeting, errors = threading.Barrier(n_programs), []

    def run(program: int) -> None:
        names = _names(module, (program, 0))
        names["gl"].num_programs = lambda axis: n_programs
        names["_meet"] = lambda count, n: meeting.wait(timeout=60)
        try:
            names[kernel](*given, **constants)
        except threading.BrokenBarrierError:
            pass  # another program has failed
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=run, args=(program,)) for program in range(n_programs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert not meeting.broken


def _names(
    module: Path, program: tuple[int, int], more: Callable[[dict[str, Any]], object] = _nothing
) -> dict[str, Any]:
    """What the module holds, for one program."""
    source = re.sub(r"^from (triton|hippos)[^(\n]*$", "", module.read_text(), flags=re.MULTILINE)
    names = _namespace(0, 4) | {"__name__": "tma_on_cpu"}
    names["gl"].program_id = lambda axis: Value(torch.tensor(program[axis], dtype=torch.int32))
    names["gl"].allocate_shared_memory = _allocating(names["gl"].allocate_shared_memory)
    names["gl"].multiple_of = names["gl"].max_contiguous = lambda x, n: x
    names["gl"].sqrt = lambda x: Value(x.tensor.sqrt())
    names["gl"].load = lambda pointer, mask=None, other=0.0, cache_modifier="": _load(pointer, mask, other)
    names["async_copy"].async_copy_global_to_shared = lambda tile, pointer, mask=None: tile.store(
        _load(pointer, mask, float("nan"))  # rows without tokens hold anything
    )
    names["mbarrier"] = SimpleNamespace(init=_nothing, expect=_nothing, wait=_nothing, MBarrierLayout=_nothing)
    names["tma"] = SimpleNamespace(async_copy_global_to_shared=_copy_tile)
    names |= {"gdc_wait": _nothing, "gdc_launch_dependents": _nothing}
    more(names)
    exec(compile(source, module.stem, "exec"), names)
    return names


def _allocating(allocate):
    """Barriers are no numbers, and bytes know none that stands for what was never written."""
    wide = {torch.int64: torch.float32, torch.int8: torch.float32}
    return lambda dtype, shape, layout: allocate(wide.get(dtype, dtype), shape, layout)


def _given(x):
    if isinstance(x, Descriptor):
        return x
    if isinstance(x, float):
        return x
    if isinstance(x, torch.Tensor):
        return Pointer(x.as_strided((_reach(x),), (1,)))
    return Value(torch.tensor(x, dtype=torch.int32))
