"""Runs programs written in Gluon on a CPU, one after another: tensors are PyTorch's, layouts mean nothing.

Gluon has no interpreter. What layouts, copies and barriers do is for a GPU to show; this shows that the arithmetic and
every address are right, and an address out of bounds is an error.
"""

from __future__ import annotations

import operator
import re
from pathlib import Path
from types import SimpleNamespace

import torch

BINARY = ["add", "sub", "mul", "and_", "or_", "xor", "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne"]


class Value:
    """A tensor or scalar of a program."""

    def __init__(self, tensor):
        self.tensor = torch.as_tensor(tensor)

    def to(self, dtype, bitcast=False):
        return Value(self.tensor.view(dtype) if bitcast else self.tensor.to(dtype))

    @property
    def shape(self):
        return self.tensor.shape

    @property
    def type(self):
        return SimpleNamespace(layout=None)

    def __getitem__(self, index):
        return Value(self.tensor[index])

    def __floordiv__(self, other):
        return Value(torch.div(self.tensor, raw(other), rounding_mode="trunc"))

    def __mod__(self, other):
        return Value(torch.fmod(self.tensor, raw(other)))

    def __neg__(self):
        return Value(-self.tensor)

    def __bool__(self):
        return bool(self.tensor)

    def __index__(self):
        return int(self.tensor)

    __hash__ = None


def _binary(name):
    function = getattr(operator, name)

    def apply(self, other):
        return NotImplemented if isinstance(other, Pointer) else Value(function(self.tensor, raw(other)))

    def apply_reflected(self, other):
        return Value(function(raw(other), self.tensor))

    return apply, apply_reflected


for _name in BINARY:
    _applied, _reflected = _binary(_name)
    _plain = _name.strip("_")
    setattr(Value, f"__{_plain}__", _applied)
    if _plain in ("add", "sub", "mul", "and", "or", "xor"):
        setattr(Value, f"__r{_plain}__", _reflected)


class Pointer:
    """Places in one tensor's memory."""

    def __init__(self, memory, at=0):
        self.memory, self.at = memory, torch.as_tensor(at)

    def __add__(self, other):
        return Pointer(self.memory, self.at + torch.as_tensor(raw(other)).to(torch.int64))

    def to(self, dtype):
        return Pointer(self.memory.view(dtype), self.at)

    @property
    def dtype(self):
        return SimpleNamespace(element_ty=self.memory.dtype)

    def places(self, mask):
        at, mask = torch.broadcast_tensors(self.at, torch.tensor(True) if mask is None else raw(mask))
        inside = (at >= 0) & (at < self.memory.numel())
        assert bool((inside | ~mask).all()), "an address out of bounds"
        return at, mask


class Shared:
    """A tile in shared memory; what was never written is no number."""

    def __init__(self, tensor):
        self.tensor, self.dtype, self.shape = tensor, tensor.dtype, tensor.shape

    def index(self, index):
        return Shared(self.tensor[int(index)])

    def slice(self, start, length, dim=0):
        return Shared(self.tensor.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.tensor.permute(order))

    def load(self, _layout):
        return Value(self.tensor.clone())

    def store(self, value):
        self.tensor.copy_(raw(value))


def raw(x):
    return x.tensor if isinstance(x, Value) else x


def _alike(x, y):
    """Both as tensors, a number in the dtype of the other."""
    x, y = raw(x), raw(y)
    dtype = next((z.dtype for z in (x, y) if isinstance(z, torch.Tensor)), None)
    return tuple(z if isinstance(z, torch.Tensor) else torch.tensor(z, dtype=dtype) for z in (x, y))


def _load(pointer, mask=None, other=0.0):
    at, mask = pointer.places(mask)
    loaded = pointer.memory[torch.where(mask, at, 0)]
    return Value(torch.where(mask, loaded, torch.tensor(other, dtype=loaded.dtype)))


def _store(pointer, value, mask=None):
    at, mask = pointer.places(mask)
    pointer.memory[at[mask]] = torch.broadcast_to(raw(value), at.shape)[mask].to(pointer.memory.dtype)


def _allocate(dtype, shape, _layout, value=None):
    tile = Shared(torch.full(shape, torch.nan, dtype=dtype))
    if value is not None:
        tile.store(value)
    return tile


def _xor_sum(x, axis, keep_dims=False):
    first, second = x.tensor.unbind(axis)
    return Value((first ^ second).unsqueeze(axis) if keep_dims else first ^ second)


def _reduce(x, axis, function):
    if isinstance(x, tuple):  # of moments, which are summed
        return tuple(Value(torch.broadcast_to(part.tensor, x[0].tensor.shape).sum(axis)) for part in x)
    assert function.__name__ == "_first"  # of what is the same in all
    return Value(x.tensor.select(axis, 0))


def _product(left, right, acc, use_acc=True, is_async=False):
    del is_async
    product = left.tensor.float() @ right.tensor.float()
    return Value(product + acc.tensor if use_acc else product)


def _anything(*_, **__):
    return None


class _Constant:
    def __init__(self, value):
        self.value = value


def _language(program, n_warps):
    where = lambda c, x, y: Value(torch.where(*(torch.as_tensor(raw(z)) for z in (c, x, y))))  # noqa: E731
    larger = lambda x, y: Value(torch.maximum(*_alike(x, y)))  # noqa: E731
    layouts = "NVMMADistributedLayout NVMMASharedLayout SwizzledSharedLayout SharedLinearLayout BlockedLayout "
    layouts += "DistributedLinearLayout DotOperandLayout"
    return SimpleNamespace(
        **dict.fromkeys((*layouts.split(), "SliceLayout", "thread_barrier"), _anything),
        constexpr=_Constant, num_warps=lambda: n_warps, static_range=range, pointer_type=lambda dtype: dtype,
        **{name: getattr(torch, name) for name in ["float32", "bfloat16", "float16", "int16", "int32", "int64"]},
        program_id=lambda axis: Value(torch.tensor(program, dtype=torch.int32)),
        arange=lambda start, end, layout=None: Value(torch.arange(start, end, dtype=torch.int32)),
        full=lambda shape, value, dtype, layout: Value(torch.full(shape, value, dtype=dtype)),
        full_like=lambda x, value: Value(torch.full_like(x.tensor, value)),
        zeros=lambda shape, dtype, layout: Value(torch.zeros(shape, dtype=dtype)),
        cdiv=lambda x, y: (x + y - 1) // y,
        minimum=lambda x, y: Value(torch.minimum(*_alike(x, y))),
        exp=lambda x: Value(x.tensor.exp()), floor=lambda x: Value(x.tensor.floor()),
        gather=lambda x, index, axis: Value(x.tensor.gather(axis, index.tensor.long())),
        abs=lambda x: Value(torch.as_tensor(raw(x)).abs()),
        maximum=larger, max=lambda x, axis: Value(x.tensor.amax(axis)),
        where=where, load=_load, store=_store, allocate_shared_memory=_allocate,
        reshape=lambda x, shape: Value(x.tensor.reshape(shape)),
        permute=lambda x, order: Value(x.tensor.permute(order)),
        split=lambda x: tuple(Value(part) for part in x.tensor.unbind(-1)),
        join=lambda x, y: Value(torch.stack((x.tensor, y.tensor), -1)),
        convert_layout=lambda x, layout, assert_trivial=False: x,
        sum=lambda x, axis: Value(x.tensor.sum(axis)), xor_sum=_xor_sum,
        zeros_like=lambda x: Value(torch.zeros_like(x.tensor)), reduce=_reduce,
    )  # fmt: skip


def _namespace(program, n_warps):
    hopper = SimpleNamespace(
        fence_async_shared=_anything,
        warpgroup_mma=_product,
        warpgroup_mma_wait=lambda pending, deps: deps[0] if len(deps) == 1 else tuple(deps),
    )
    async_copy = SimpleNamespace(
        async_copy_global_to_shared=lambda tile, pointer, mask=None: tile.store(_load(pointer, mask)),
        commit_group=_anything,
        wait_group=_anything,
    )
    jit = lambda function=None, **_: function if function is not None else lambda decorated: decorated  # noqa: E731
    language = _language(program, n_warps)
    triton = {"triton": SimpleNamespace(jit=jit), "tl": language}  # whose plain functions Gluon calls
    gluon = SimpleNamespace(jit=jit, constexpr_function=jit)
    return {"gluon": gluon, "gl": language, "hopper": hopper, "async_copy": async_copy} | triton


def run_program(
    folder: Path, modules: tuple[str, ...], kernel: str, n_programs: int, *args, n_warps: int, **constants
) -> None:
    """Run a Gluon kernel for every program of a one-dimensional grid.

    Args:
        folder: Where the modules lie.
        modules: Names of the modules that make it up, each importing from those before it only.
        kernel: The kernel's name.
        n_programs: Size of the grid.
        args: Tensors and integers, as in a launch.
        n_warps: Warps a program.
        constants: Its constants.
    """
    given = [Pointer(x.as_strided((_reach(x),), (1,))) if isinstance(x, torch.Tensor) else _scalar(x) for x in args]
    for program in range(n_programs):
        names = _namespace(program, n_warps) | {"__name__": "gluon_on_cpu"}
        for module in modules:
            source = (folder / f"{module}.py").read_text()
            source = re.sub(r"^(from|import) (triton|hippos)[^(\n]*(\([^)]*\))?$", "", source, flags=re.MULTILINE)
            exec(compile(source, module, "exec"), names)
        names[kernel](*given, **constants)


def _reach(x: torch.Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def _scalar(x: int) -> Value:
    return Value(torch.tensor(x, dtype=torch.int32))
