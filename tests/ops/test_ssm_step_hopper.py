"""The step of many sequences for Hopper: its arithmetic on a CPU by `tma_on_cpu`, and the program on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hippos.ops import H3State, h3_step
from hippos.ops.ssm_step import h3_step_operators
from hippos.ops.ssm_step.launch_hopper import N_MODES, N_PAST, h3_step_hopper, has_its_form
from tests.ops.ssm_cases import Draw, relative_error
from tests.ops.tma_on_cpu import run_program

MODULE = Path(h3_step_operators.__code__.co_filename).parent / "kernels_hopper.py"
ROUNDING = {torch.bfloat16: 1.65e-3, torch.float16: 2.1e-4}


def make_case(batch, d_model, dtype, device="cpu"):
    """Parameters, a state with its keys in slots, and tokens side by side as a joint product leaves them."""
    random = Draw(seed=0, dtype=torch.float32)
    layer = (random.normal(d_model, N_PAST + 1), random.normal(d_model), *random.modes(d_model, N_MODES))
    layer = [x.to(device) for x in (*layer, random.normal(d_model))]
    slots = random.normal(N_PAST, batch, d_model, dtype=dtype).to(device).permute(1, 2, 0)
    state = H3State(slots, random.normal(batch, d_model, N_MODES, 2).to(device))
    tokens = [random.normal(batch, 3 * d_model, dtype=dtype).to(device).chunk(3, dim=1) for _ in range(3)]
    return layer, state, tokens


def assert_steps_agree(case, step):
    layer, state, tokens = case
    dtype = tokens[0][0].dtype
    exact = H3State(*(x.double().cpu() for x in state))
    exact_layer = [x.double().cpu() for x in layer]
    operators = h3_step_operators(*layer, head_dim=1)
    position = torch.zeros(1, dtype=torch.int64, device=state.diag.device)
    for qkv in tokens:
        wanted = h3_step(*(x.double().cpu() for x in qkv), exact, *exact_layer, impl="reference")
        a, b, read, d = (x.contiguous() for x in operators.diag)
        found = step(*qkv, *state, position, operators.taps, a, b, read, d)
        position += 1
        assert relative_error(found.cpu(), wanted) < 2 * ROUNDING[dtype]
        assert relative_error(state.diag.cpu(), exact.diag) < 1e-5
    order = (torch.arange(N_PAST) + len(tokens)) % N_PAST
    torch.testing.assert_close(state.shift.cpu()[..., order].double(), exact.shift)


def on_cpu(q, k, v, shift, diag, position, taps, a, b, read, d):
    batch, d_model = q.shape
    y = torch.full((batch, d_model), torch.nan, dtype=q.dtype)
    run_program(
        MODULE, "h3_step_hopper_kernel", (d_model // 16, -(-batch // 3)),
        q, k, v, y, shift, diag, position, taps, a, b, read, d,
        q.stride(0), shift.stride(0), shift.stride(2), diag.stride(0), batch, d_model, *taps.stride(),
        CHANNELS=16, SEQUENCES=3, STAGES=3, WARPS=2,
    )  # fmt: skip
    return y


@pytest.mark.parametrize("batch", [1, 7])
def test_steps_as_on_a_gpu(batch):
    assert_steps_agree(make_case(batch, 32, torch.float16), on_cpu)


def test_what_the_program_takes():
    layer, state, ((q, k, v), *_) = make_case(17, 64, torch.float16)
    position, a = torch.zeros(1, dtype=torch.int64), h3_step_operators(*layer, head_dim=1).diag.a
    assert has_its_form(q, k, v, *state, position, a)
    assert has_its_form(q, k, v, state.shift[:16], state.diag[:16], position, a)
    assert not has_its_form(q, k, v, *state, None, a)
    assert not has_its_form(q, k, v.contiguous(), *state, position, a)
    assert not has_its_form(q, k, v, state.shift.contiguous(), state.diag, position, a)
    assert not has_its_form(q, k, v, state.shift.float(), state.diag, position, a)
    assert not has_its_form(q, k, v, *state, position, a[:, :16])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "d_model"), [(1, 64), (19, 192), (64, 2048)])
def test_steps_on_a_gpu(batch, d_model, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    assert_steps_agree(make_case(batch, d_model, dtype, "cuda"), h3_step_hopper)
