"""What all SSM parametrisations share: full precision, learning rates of their own, operators kept for decoding."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

Operators = TypeVar("Operators", bound=tuple[Tensor, ...])

_FULL_PRECISION_BYTES = 4


def ssm_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Give the dtype of SSM parameters in a layer of ``dtype`` (None: the default dtype): at least float32."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


class SSMModule(nn.Module, abc.ABC, Generic[Operators]):
    """Parameters of a bank of SSMs, and the tensors that the operators of `hippos.ops` take instead of them.

    * Parameters are float32 whatever happens around them: ``.half()``, ``.bfloat16()``, ``.to(dtype)`` here or on any
      module above move them but do not round them, since 8 bits of mantissa destroy the phases of slow modes. Only
      float64 (``.double()``) changes their dtype.
    * Calling the module gives the operators, so that hooks on a module's call (FSDP gathers parameters in one) work.
    * Without gradients, `operators` with ``reuse=True`` returns a cached result while the parameters are unchanged: a
      decode step does not discretise again.

    Args:
        ssm_lr: Ceiling of the learning rate of the parameters named in ``dynamics``; 0 freezes them.

    Raises:
        ValueError: If ``ssm_lr`` is negative.
    """

    dynamics: ClassVar[tuple[str, ...]]
    """Names of the parameters that shape the recurrence itself; they learn at ``min(ssm_lr, lr)``."""

    def __init__(self, ssm_lr: float) -> None:
        super().__init__()
        if not ssm_lr >= 0:
            raise ValueError(f"ssm_lr must be at least 0, got {ssm_lr}")
        self.ssm_lr = ssm_lr
        self._memory: _Memory[Operators] | None = None

    @abc.abstractmethod
    def forward(self) -> Operators:
        """Compute the operators from the parameters.

        No operator is a view or shares memory with a parameter: FSDP frees gathered parameters when this returns.
        """

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Draw new parameters with torch's global random generator; does nothing on the meta device."""

    def operators(self, *, reuse: bool = False) -> Operators:
        """Give the operators, as a call of the module does.

        Args:
            reuse: Whether a result remembered from an earlier call may serve, if gradients are off and neither the
                parameters' storage nor their version counters have changed since. Writing through ``parameter.data``
                leaves no such trace, therefore ``reuse=False`` always computes (and remembers).

        Returns:
            The operators.
        """
        if torch.compiler.is_compiling():
            return self()
        if torch.is_grad_enabled() or not self._is_traceable():
            self.forget()
            return self()
        if not reuse or self._memory is None or not self._memory.matches(self):
            self._memory = _Memory(self, self())
        return self._memory.operators

    @property
    def remembered(self) -> object:
        """What `operators` remembers; the next computation drops it."""
        return self._memory

    def forget(self) -> None:
        """Drop what `operators` remembers."""
        self._memory = None

    def freeze_dynamics(self) -> None:
        """Take the parameters named in ``dynamics`` out of training if ``ssm_lr`` is 0."""
        for parameter in self.dynamic_parameters():
            parameter.requires_grad_(self.ssm_lr > 0)

    def dynamic_parameters(self) -> list[nn.Parameter]:
        """Give the parameters named in ``dynamics``, those that this module has."""
        own = dict(self.named_parameters(recurse=False))
        return [own[name] for name in self.dynamics if name in own]

    def _is_traceable(self) -> bool:
        # Sharded parameters have no address of their own, inference tensors no version counter.
        return all(type(p) is nn.Parameter and not p.is_inference() for p in self._parameters.values())

    def _check_precision(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not None and parameter.dtype.itemsize < _FULL_PRECISION_BYTES:
                raise TypeError(
                    f"SSM parameter {type(self).__name__}.{name} must be float32 or float64, got {parameter.dtype}; "
                    "leave SSM modules out of mixed-precision casts (under FSDP give them a policy of their own)"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def keep_precision(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if tensor.is_floating_point() and applied.dtype.itemsize < _FULL_PRECISION_BYTES:
                return tensor.to(device=applied.device, dtype=torch.float32)
            return applied

        self.forget()
        return super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None}


class _Memory(Generic[Operators]):
    """Operators together with the parameters that they were made from."""

    def __init__(self, module: SSMModule[Operators], operators: Operators) -> None:
        self.operators = operators
        # The aliases keep the storages alive, so an equal address means the same storage.
        self._aliases = [parameter.detach() for parameter in module._parameters.values() if parameter is not None]
        self._trace = _trace(module)

    def matches(self, module: SSMModule[Operators]) -> bool:
        return self._trace == _trace(module)


def _trace(module: nn.Module) -> list[tuple[int, int]]:
    return [(p.data_ptr(), p._version) for p in module._parameters.values() if p is not None]
