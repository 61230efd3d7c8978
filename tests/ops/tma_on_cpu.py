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


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes that were expected have come."""

    def __init__(self, is_over: threading.Event) -> None:
        self._changed, self._is_over = threading.Condition(), is_over
        self._phase = self._n_bytes = 0
        self._count = self._missing = 1

    def init(self, count: int) -> None:
        self._count = self._missing = count

    def move(self, *, arrivals: int = 0, n_bytes: int = 0) -> None:
        with self._changed:
            self._missing -= arrivals
            self._n_bytes += n_bytes
            assert self._missing >= 0, "more have arrived than were expected"
            if self._missing == 0 and self._n_bytes == 0:
                self._phase, self._missing = self._phase + 1, self._count
                self._changed.notify_all()

    def wait(self, parity: int) -> None:
        """Until the phase of this parity has ended: the one that goes on is of the other."""
        with self._changed:
            while self._phase % 2 == parity:
                if self._is_over.is_set():
                    raise threading.BrokenBarrierError
                self._changed.wait(timeout=0.2)


class Barriers(list):
    """Some of them."""

    def index(self, index) -> Barrier:  # type: ignore[override]
        return self[int(index)]


def run_meeting_programs(module: Path, kernel: str, n_programs: int, *args, ask=_nothing, **constants) -> None:
    """As `run_program`, for programs of one axis of which each waits for all others in ``_meet``; so do their warps.

    What they ask the cache for is told to ``ask``: pointers and numbers of bytes.
    """
    given = [_given(x) for x in args]
    meeting, errors, is_over = threading.Barrier(n_programs), [], threading.Event()

    def run(work) -> None:
        try:
            work()
        except threading.BrokenBarrierError:
            pass  # another program has failed
        except BaseException as error:
            errors.append(error)
            is_over.set()
            meeting.abort()

    def specialise(works, n_warps, n_registers) -> None:
        assert len(works) == len(n_warps) + 1 == len(n_registers) + 1
        _run_together([lambda work=work, given=given: run(lambda: work(*given)) for work, given in works])

    def program(number: int) -> None:
        names = _names(module, (number, 0))
        gl = names["gl"]
        allocate = gl.allocate_shared_memory
        gl.num_programs = lambda axis: n_programs
        gl.inline_asm_elementwise = _nothing
        gl.warp_specialize = specialise
        gl.allocate_shared_memory = lambda dtype, shape, layout: (
            allocate(dtype, shape, layout) if dtype != torch.int64 else _barriers(shape, is_over)
        )
        names["_meet"] = lambda count, n: meeting.wait(timeout=60)
        names["_ask"] = ask
        names["_power_of_two"] = lambda x: Value(x.tensor.exp2())
        names["_inverse"] = lambda x: Value(1.0 / x.tensor)
        names["mbarrier"] = SimpleNamespace(
            MBarrierLayout=_nothing,
            init=lambda barrier, count: barrier.init(count),
            expect=lambda barrier, n_bytes, pred=True: bool(raw(pred)) and barrier.move(arrivals=1, n_bytes=n_bytes),
            wait=lambda barrier, parity: barrier.wait(int(raw(parity))),
            arrive=lambda barrier, count, pred=True: bool(raw(pred)) and barrier.move(arrivals=count),
        )
        names["tma"] = SimpleNamespace(async_copy_global_to_shared=_copy_tile_and_tell)
        names[kernel](*given, **constants)

    _run_together([lambda number=number: run(lambda: program(number)) for number in range(n_programs)])
    if errors:
        raise errors[0]


def _run_together(works) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _barriers(shape, is_over):
    return Barriers(Barrier(is_over) for _ in range(shape[0])) if len(shape) > 1 else Barrier(is_over)


def _copy_tile_and_tell(source, place, barrier, tile, pred=True):
    """Two bytes a number, as on a GPU; what lies below the matrix is zero."""
    row, column = (int(raw(x)) for x in place)
    n_rows, n_columns = tile.tensor.shape
    if bool(raw(pred)):
        assert 0 <= row < len(source.matrix)
        assert 0 <= column <= source.matrix.shape[1] - n_columns
        found = source.matrix[row : row + n_rows, column : column + n_columns]
        tile.tensor.zero_()[: len(found)] = found
        barrier.move(n_bytes=-2 * n_rows * n_columns)


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
