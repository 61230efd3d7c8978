"""States without outputs by Triton's kernels, in Triton's interpreter and on a GPU (marked gpu)."""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch

from hippos.ops.ssm_state import h3_initial_gradient, h3_state_after, initial_gradient, state_after
from tests.ops.ssm_cases import Draw, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(
    not (importlib.util.find_spec("triton") and INTERPRETED and not torch.cuda.is_available()),
    reason="needs Triton with TRITON_INTERPRET=1 and no CUDA device",
)
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# Products of operands rounded to 16 bits once.
ERRORS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def check(dtype: torch.dtype, seqlen: int, device: str, *, batch: int = 2, n_heads: int = 3, n_modes: int = 20) -> None:
    random = Draw(seed=seqlen)
    parameters = [x.float().to(device) for x in random.modes(n_heads, n_modes)]
    q, k, v = (random.normal(batch, n_heads, seqlen, dtype=dtype).to(device) for _ in range(3))
    shift, skip = (random.normal(*shape, dtype=torch.float32).to(device) for shape in ((n_heads, 64), (n_heads,)))
    past = random.normal(batch, n_heads, 63, dtype=dtype).to(device)
    log_a, b, c = parameters
    exact = [x.double() for x in (log_a, b, c)]
    tolerance = ERRORS[dtype]
    found = state_after(v, log_a, b, in_gate=k, impl="triton")
    wanted = state_after(v.double(), *exact[:2], in_gate=k.double(), impl="torch")
    assert relative_error(found, wanted) < tolerance
    found = initial_gradient(v, log_a, c, impl="triton")
    wanted = initial_gradient(v.double(), exact[0], exact[2], impl="torch")
    assert relative_error(found, wanted) < tolerance
    found = h3_state_after(k, v, shift, skip, log_a, b, past=past, impl="triton")
    doubles = [x.double() for x in (k, v, shift, skip, log_a, b)]
    assert relative_error(found, h3_state_after(*doubles, past=past.double(), impl="torch")) < tolerance
    bias = random.normal(3, n_heads, dtype=torch.float32).to(device).to(dtype).float()
    found = h3_state_after(k, v, shift, skip, log_a, b, past=past, bias=bias, impl="triton")
    doubles[:2] = (x + row.unsqueeze(-1).double() for x, row in zip(doubles[:2], bias[1:], strict=True))
    assert relative_error(found, h3_state_after(*doubles, past=past.double(), impl="torch")) < 2 * tolerance
    found = h3_initial_gradient(v, q, log_a, c, impl="triton")
    wanted = h3_initial_gradient(v.double(), q.double(), exact[0], exact[2], impl="torch")
    assert relative_error(found, wanted) < tolerance


@interpreter
@pytest.mark.parametrize("seqlen", [1, 16, 50, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted(dtype: torch.dtype, seqlen: int) -> None:
    check(dtype, seqlen, "cpu", n_modes=3)


def check_reach(seqlen: int, device: str) -> None:
    """Channels whose modes die at once, within reach, and never; what is out of reach is not even read."""
    random = Draw(seed=5, dtype=torch.float32)
    log_a, b, c = (x.to(device) for x in random.modes(4, 3))
    for channel, rate in enumerate((torch.inf, 2.0, 32 / seqlen, 0.0)):
        log_a[channel, :, 0] = -rate
    u = random.normal(1, 4, seqlen).to(device)
    exact = [x.double() for x in (u, log_a, b, c)]
    # A mode that never dies turns with every sample, by a phase that is exact to 2**-31 of a turn.
    tolerance = ERRORS[torch.float32] + 2 * math.pi * 2**-31 * seqlen
    for fold, weight, left_out in ((state_after, b, slice(0, 40)), (initial_gradient, c, slice(seqlen - 40, seqlen))):
        wanted = fold(exact[0], exact[1], exact[2] if weight is b else exact[3], impl="torch")
        poisoned = u.clone()
        poisoned[:, :2, left_out] = torch.nan
        found = fold(poisoned, log_a, weight, impl="triton")
        assert bool(torch.isfinite(found).all())
        for got, want in zip(found.unbind(1), wanted.unbind(1), strict=True):
            assert relative_error(got, want) < tolerance or float(want.norm()) == 0 == float(got.norm())


@interpreter
def test_what_is_out_of_reach_is_left_alone() -> None:
    check_reach(600, "cpu")


@pytest.mark.parametrize(("batch", "n_heads", "seqlen"), [(1, 64, 262144), (2, 48, 1000), (3, 5, 64), (1, 4, 100_003)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
class TestGpu:
    """On a GPU."""

    pytestmark = on_gpu

    def test_against_float64(self, dtype: torch.dtype, batch: int, n_heads: int, seqlen: int) -> None:
        check(dtype, seqlen, "cuda", batch=batch, n_heads=n_heads, n_modes=32)


class TestReachOnGpu:
    """On a GPU, whose tiles are larger."""

    pytestmark = on_gpu

    def test_what_is_out_of_reach_is_left_alone(self) -> None:
        check_reach(100_000, "cuda")
