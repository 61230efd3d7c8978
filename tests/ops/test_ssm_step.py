"""ssm_step and h3_step: a sequence step by step equals the whole, and refusals. test_step_in_place.py has the rest."""

from __future__ import annotations

import pytest
import torch

from hippos.errors import UnsupportedError
from hippos.ops import H3State, h3_mix, h3_step, ssm_conv, ssm_step
from tests.ops.ssm_cases import relative_error

IMPLS = ["reference", "torch"]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_ssm_steps_are_the_sequence(random, impl, dtype, limit):
    modes, d = random.modes(3, 4, dtype=dtype), random.normal(3, dtype=dtype)
    u, initial_state = random.normal(2, 3, 150, dtype=dtype), random.normal(2, 3, 4, 2, dtype=dtype)
    exact = [x.double() for x in (u, *modes, d)]
    y, last = ssm_conv(*exact, initial_state=initial_state.double(), return_state=True, impl="reference")
    state = initial_state.clone()
    steps = torch.stack([ssm_step(column, state, *modes, d, impl=impl) for column in u.unbind(-1)], dim=-1)
    assert steps.dtype == dtype
    assert relative_error(steps, y) < limit
    assert relative_error(state, last) < limit


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("head_dim", [1, 2])
@pytest.mark.parametrize("prompt_len", [0, 3, 90])
def test_h3_steps_go_on_where_the_prompt_ends(random, impl, head_dim, prompt_len):
    n_heads, d_model, n_taps, seqlen = 2, 2 * head_dim, 8, 110
    q, k, v = (random.normal(2, d_model, seqlen) for _ in range(3))
    parameters = (
        random.normal(d_model, n_taps),
        random.normal(d_model),
        *random.modes(n_heads, 3),
        random.normal(n_heads),
    )
    y, wanted = h3_mix(q, k, v, *parameters, head_dim=head_dim, return_state=True, impl="reference")
    outer = (head_dim, head_dim) if head_dim > 1 else ()
    zeros = torch.zeros(2, n_heads, *outer, 3, 2, dtype=torch.float64)
    state = H3State(torch.zeros(2, d_model, n_taps - 1, dtype=torch.float64), zeros)
    pieces = []
    if prompt_len:
        prompt = (x[..., :prompt_len] for x in (q, k, v))
        piece, state = h3_mix(*prompt, *parameters, head_dim=head_dim, return_state=True)
        pieces.append(piece)
    for t in range(prompt_len, seqlen):
        step = h3_step(q[..., t], k[..., t], v[..., t], state, *parameters, head_dim=head_dim, impl=impl)
        pieces.append(step.unsqueeze(-1))
    torch.testing.assert_close(torch.cat(pieces, dim=-1), y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state.diag, wanted.diag, rtol=1e-11, atol=1e-11)
    assert torch.equal(state.shift, wanted.shift)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.zeros(2)}, ValueError, r"u must have shape \(B, H\)"),
        ({"u": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "u must have one of the dtypes"),
        ({"state": torch.zeros(1, 3, 4, 2)}, ValueError, r"state must have shape \(B, H, M, 2\) = \(2, 3, 4, 2\)"),
        ({"state": torch.zeros(2, 3, 4, 2).half()}, TypeError, "state must have one of the dtypes float32, float64"),
        ({"log_a": torch.zeros(4, 4, 2)}, ValueError, r"log_a must have shape \(H, M, 2\) = \(3, any, 2\)"),
        ({"d": torch.zeros(2)}, ValueError, r"d must have shape \(H\) = \(3\)"),
        ({"impl": "slow"}, ValueError, "impl must be one of"),
        ({"impl": "triton"}, UnsupportedError, "ssm_step"),
    ],
)
def test_ssm_step_refusals(change, error, message):
    modes = {name: torch.zeros(3, 4, 2) for name in ("log_a", "b", "c")}
    with pytest.raises(error, match=message):
        ssm_step(**({"u": torch.zeros(2, 3), "state": torch.zeros(2, 3, 4, 2)} | modes | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 1)}, ValueError, r"q must have shape \(B, D\)"),
        ({"k": torch.zeros(1, 4)}, ValueError, r"k must have shape \(B, D\) = \(2, 4\)"),
        ({"v": torch.zeros(2, 4).half()}, TypeError, "v must have the dtype of q"),
        ({"head_dim": 3}, ValueError, "head_dim must be a positive divisor of D = 4, got 3"),
        ({"state": H3State(torch.zeros(2, 4, 8), torch.zeros(2, 4, 3, 2))}, ValueError, "state.shift must have shape"),
        ({"state": H3State(torch.zeros(2, 4, 7), torch.zeros(2, 4, 4, 2))}, ValueError, "state.diag must have shape"),
        ({"state": None}, TypeError, r"state must be an H3State\(shift, diag\), got NoneType"),
        ({"impl": "triton"}, UnsupportedError, "h3_step"),
    ],
)
def test_h3_step_refusals(change, error, message):
    signals = {name: torch.zeros(2, 4) for name in "qkv"}
    modes = {name: torch.zeros(4, 3, 2) for name in ("log_a", "b", "c")}
    rest = {"shift_filter": torch.zeros(4, 8), "shift_d": torch.zeros(4), "d": torch.zeros(4)}
    state = H3State(torch.zeros(2, 4, 7), torch.zeros(2, 4, 3, 2))
    with pytest.raises(error, match=message):
        h3_step(**(signals | modes | rest | {"state": state} | change))
