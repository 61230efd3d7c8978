"""Runs Gluon programs that copy tiles by descriptors on a CPU, on a grid of two axes; see `gluon_on_cpu`."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.ops.gluon_on_cpu import Pointer, Value, _load, _namespace, _reach, raw

Value.__truediv__ = lambda self, other: Value(self.tensor / raw(other))


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


def run_program(module: Path, kernel: str, grid: tuple[int, int], *args, **constants) -> None:
    """Run a Gluon kernel for every program of a grid.

    Args:
        module: The kernel's file.
        kernel: Its name.
        grid: Programs along both axes.
        args: Tensors, descriptors and integers, as in a launch.
        constants: Its constants.
    """
    given = [_given(x) for x in args]
    source = re.sub(r"^from (triton|hippos)[^(\n]*$", "", module.read_text(), flags=re.MULTILINE)
    code = compile(source, module.stem, "exec")
    for program in itertools.product(*map(range, grid)):
        names = _namespace(0, 4) | {"__name__": "tma_on_cpu"}
        names["gl"].program_id = lambda axis, program=program: Value(torch.tensor(program[axis], dtype=torch.int32))
        names["gl"].allocate_shared_memory = _allocating(names["gl"].allocate_shared_memory)
        names["gl"].multiple_of = names["gl"].max_contiguous = lambda x, n: x
        names["async_copy"].async_copy_global_to_shared = lambda tile, pointer, mask=None: tile.store(
            _load(pointer, mask, float("nan"))  # rows without tokens hold anything
        )
        names["mbarrier"] = SimpleNamespace(init=_nothing, expect=_nothing, wait=_nothing, MBarrierLayout=_nothing)
        names["tma"] = SimpleNamespace(async_copy_global_to_shared=_copy_tile)
        names |= {"gdc_wait": _nothing, "gdc_launch_dependents": _nothing}
        exec(code, names)
        names[kernel](*given, **constants)


def _allocating(allocate):
    """Barriers are no numbers."""
    return lambda dtype, shape, layout: allocate(torch.float32 if dtype == torch.int64 else dtype, shape, layout)


def _given(x):
    if isinstance(x, Descriptor):
        return x
    if isinstance(x, torch.Tensor):
        return Pointer(x.as_strided((_reach(x),), (1,)))
    return Value(torch.tensor(x, dtype=torch.int32))
