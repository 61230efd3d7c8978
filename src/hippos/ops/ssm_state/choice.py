"""Whether the Triton kernels can run, in the words of an error message."""

from __future__ import annotations

from torch import Tensor

from hippos.ops.h3_mix.autograd import why_not_triton as why_not_h3_mix
from hippos.ops.ssm_conv.autograd import why_not_triton as why_not_ssm_conv


def why_not_triton(signal: Tensor, log_a: Tensor) -> str | None:
    """What keeps the kernels of `state_after` from these inputs; None if nothing does."""
    return why_not_ssm_conv(signal, log_a)


def why_not_shift_kernel(k: Tensor, shift_filter: Tensor, log_a: Tensor, head_dim: int) -> str | None:
    """What keeps the kernel of the shift SSM from these inputs; None if nothing does."""
    return why_not_h3_mix(k, shift_filter, log_a, head_dim)
