"""Filters are made without a tensor of channels x modes x taps, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hippos.ops import ssm_filter
from hippos.ops.modes import Modes, filter_taps_adjoint
from hippos.ops.powers import power_tables
from hippos.ops.ssm_filter.dplr import dplr_filter
from hippos.ops.ssm_filter.two_level import ssm_filter_two_level
from tests.ops.ssm_cases import leaves

N_HEADS, N_MODES, FILTER_LEN = 3, 16, 4096


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation's result has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.numel = max(self.numel, *sizes, 0)
        return result


def draw_dplr(random, n_heads, n_modes, device="cpu"):
    A, P, B, C = (random.normal(n_heads, n_modes, 2, dtype=torch.float32).to(device) for _ in range(4))
    A = torch.stack((-A[..., 0].abs(), A[..., 1]), dim=-1)
    dt = torch.full((n_heads,), 0.01, device=device)
    return leaves(A, P.unsqueeze(0) / n_modes, B, C, dt)


def test_diagonal(random):
    modes = leaves(*random.modes(N_HEADS, N_MODES))
    with LargestTensor() as largest:
        taps = ssm_filter_two_level(*modes, FILTER_LEN)
        pairs = Modes.split(*(x.detach() for x in modes), torch.float64)
        gradients = filter_taps_adjoint(pairs, power_tables(pairs.log_a, FILTER_LEN), torch.ones_like(taps))
    assert N_HEADS * FILTER_LEN <= largest.numel < N_HEADS * N_MODES * FILTER_LEN / 4
    taps.sum().backward()
    torch.testing.assert_close(gradients.join()[1], modes[1].grad, rtol=1e-9, atol=1e-9)


def test_diagonal_plus_low_rank(random):
    parameters = draw_dplr(random, N_HEADS, N_MODES)
    with LargestTensor() as largest:
        dplr_filter(*parameters, FILTER_LEN).sum().backward()
    assert N_HEADS * FILTER_LEN <= largest.numel < N_HEADS * N_MODES * FILTER_LEN / 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["diagonal", "low rank"])
def test_on_a_gpu(random, name):
    n_heads, n_modes, filter_len = 64, 32, 32768
    if name == "diagonal":
        parameters = leaves(*(x.float().cuda() for x in random.modes(n_heads, n_modes)))
        make = ssm_filter
    else:
        parameters, make = draw_dplr(random, n_heads, n_modes, "cuda"), dplr_filter
    make(*parameters, filter_len).sum().backward()  # allocates what libraries keep
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    make(*parameters, filter_len).sum().backward()
    all_powers = 4 * n_heads * n_modes * filter_len
    assert torch.cuda.max_memory_allocated() - before < all_powers / 4
