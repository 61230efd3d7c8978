"""H3 against the public reference's tensors; tolerances are those of the golden data's own description."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hippos.layers import H3
from hippos.layers.projections import project_to_channels
from hippos.ops import ssm_filter

CASES = (
    "b1_l127_d16_n64_h1",
    "b1_l21_d8_n32_h1_lltn",
    "b2_l200_d32_n16_h8",
    "b2_l48_d16_n16_h1_diag",
    "b2_l48_d16_n16_h1_diaginv",
    "b2_l48_d16_n16_h1_diaglegs",
    "b2_l48_d16_n16_h1_nssm2",
    "b2_l48_d16_n16_h1_relu",
    "b2_l48_d16_n16_h1_softplus",
    "b2_l48_d16_n16_h1_zoh",
    "b2_l64_d16_n16_h1_lmax24",
    "b2_l64_d32_n64_h1",
    "b2_l64_d32_n64_h1_refinit",
    "b3_l1_d16_n8_h1",
    "b4_l30_d24_n16_h2",
)

REFERENCE_NAMES = {
    **{f"{proj}_proj.{kind}": f"{proj}_proj.{kind}" for proj in "qkv" for kind in ("weight", "bias")},
    "out_proj.weight": "output_linear.weight",
    "out_proj.bias": "output_linear.bias",
    "shift.B": "ssm_k_kernel.kernel.B",
    "shift.C": "ssm_k_kernel.kernel.C",
    "shift.D": "ssm_k_D",
    "diag.log_dt": "kernel.kernel.log_dt",
    "diag.A_real": "kernel.kernel.inv_A_real",
    "diag.A_imag": "kernel.kernel.A_imag",
    "diag.B": "kernel.kernel.B",
    "diag.C": "kernel.kernel.C",
    "diag.D": "D",
}


DTYPES = pytest.mark.parametrize(
    ("prefix", "dtype"), [("", torch.float32), ("f64/", torch.float64)], ids=["f32", "f64"]
)
EVERY_CASE = pytest.mark.parametrize("case", CASES)
TRUNCATED = "b2_l64_d16_n16_h1_lmax24"  # the reference cuts its filters at 24 taps in parallel mode; we never do
OUTPUT, GRADIENT, FILTER, FLOAT64 = 3e-5, 5e-5, 3e-5, 1e-10


def build_layer(
    tensors: dict[str, Tensor], description: dict[str, Any], dtype: torch.dtype, head_layout: str = "hd"
) -> H3:
    """Build our layer with the parameters of a golden case."""
    config = description["config"]
    layer = H3(
        config["d_model"],
        d_state=config["d_state"],
        head_dim=config["head_dim"],
        n_ssm=config.get("n_ssm"),
        discretisation=description["disc"],
        init=config.get("measure", "diag-lin"),
        real_type=description["real_type"],
        head_layout=head_layout,
        dtype=dtype,
    )
    layer.load_state_dict(
        {
            ours: tensors[f"param/{theirs}"].reshape(layer.get_parameter(ours).shape)
            for ours, theirs in REFERENCE_NAMES.items()
        }
    )
    return layer


def reference_shift_state(keys: Tensor, B: Tensor) -> Tensor:
    """Translate our shift state, the last N - 1 keys, to the entries n < N - 1 of the reference's.

    Theirs is s[n] = sum_{m <= n} B[m] k[t - n + m]: the contributions of B taken at entry, not at exit.

    Args:
        keys: Shape (B, D, N - 1), oldest first.
        B: Input weights, shape (D, N).

    Returns:
        Shape (B, D, N - 1).
    """
    newest_first = keys.flip(-1)
    entries = [(B[:, : n + 1] * newest_first[..., : n + 1].flip(-1)).sum(-1) for n in range(keys.shape[-1])]
    return torch.stack(entries, dim=-1)


def reference_diag_state(diag: Tensor, head_dim: int) -> Tensor:
    """Translate our diagonal state to the reference's shape, (B * P * P, H, M, 2)."""
    return diag if head_dim == 1 else diag.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


def assert_near(got: Tensor, wanted: Tensor, relative: float) -> None:
    """Compare within a multiple of the largest wanted magnitude."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert (got - wanted).abs().max() <= relative * wanted.abs().max()


def run_steps(layer: H3, u: Tensor, state) -> Tensor:
    return torch.stack([layer.step(u[:, t], state) for t in range(u.shape[1])], dim=1)


@DTYPES
@EVERY_CASE
def test_forward(golden, case, prefix, dtype):
    tensors, description = golden(f"h3_layer_{case}")
    layer = build_layer(tensors, description, dtype, head_layout="dh")
    wanted = tensors[f"{prefix}recurrent_y"] if case == TRUNCATED else tensors[f"{prefix}y"]
    assert_near(layer(tensors["u"].to(dtype)), wanted, FLOAT64 if prefix else OUTPUT)


@EVERY_CASE
def test_forward_in_the_fast_paths_head_layout(golden, case):
    tensors, description = golden(f"h3_layer_{case}")
    layer = build_layer(tensors, description, torch.float32)
    wanted = tensors["recurrent_y" if case == TRUNCATED else "y_fast_path"]
    assert_near(layer(tensors["u"]), wanted, OUTPUT)


def test_forward_agrees_with_truncated_filters_up_to_their_length(golden):
    tensors, description = golden(f"h3_layer_{TRUNCATED}")
    l_max = description["config"]["l_max"]
    y = build_layer(tensors, description, torch.float64)(tensors["u"].double())
    assert_near(y[:, :l_max], tensors["f64/y"][:, :l_max], FLOAT64)
    assert not torch.allclose(y[:, l_max:], tensors["f64/y"][:, l_max:])


@DTYPES
@pytest.mark.parametrize("case", [case for case in CASES if case != TRUNCATED])
def test_gradients(golden, case, prefix, dtype):
    tensors, description = golden(f"h3_layer_{case}")
    layer = build_layer(tensors, description, dtype, head_layout="dh")
    u = tensors["u"].to(dtype).requires_grad_()
    y = layer(u)
    loss = y.square().sum() / y.numel()
    assert_near(loss.detach(), tensors[f"{prefix}loss"], FLOAT64 if prefix else OUTPUT)
    loss.backward()
    assert_near(u.grad, tensors[f"{prefix}grad/u"], FLOAT64 if prefix else GRADIENT)
    for ours, theirs in REFERENCE_NAMES.items():
        wanted = tensors[f"{prefix}grad/{theirs}"]
        # The reference's zoh loses digits of A's gradient in float32; ours is compared with the exact one.
        is_imprecise = description["disc"] == "zoh" and ours in ("diag.A_real", "diag.A_imag")
        if is_imprecise:
            wanted = tensors[f"f64/grad/{theirs}"].to(dtype)
        got = layer.get_parameter(ours).grad
        assert_near(got, wanted.reshape(got.shape), FLOAT64 if prefix else GRADIENT)


@DTYPES
@EVERY_CASE
def test_filters_and_shifted_keys(golden, case, prefix, dtype):
    tensors, description = golden(f"h3_layer_{case}")
    layer = build_layer(tensors, description, dtype)
    tolerance = FLOAT64 if prefix else FILTER
    with torch.no_grad():
        shift, diag = layer.shift(), layer.diag()
        wanted = tensors[f"{prefix}kernel_shift"]
        n_taps = min(shift.filter.shape[1], wanted.shape[1])
        assert_near(shift.filter[:, :n_taps], wanted[:, :n_taps], tolerance)
        assert not wanted[:, n_taps:].any()
        wanted = tensors[f"{prefix}kernel_diag"]
        assert_near(ssm_filter(diag.log_a, diag.b, diag.c, wanted.shape[1]), wanted, tolerance)


@EVERY_CASE
def test_projections(golden, case):
    tensors, description = golden(f"h3_layer_{case}")
    layer = build_layer(tensors, description, torch.float32)
    for name in "qkv":
        got = project_to_channels(layer.get_submodule(f"{name}_proj"), tensors["u"])
        assert_near(got.detach(), tensors[name], 1e-6)


@DTYPES
@EVERY_CASE
def test_prompt_then_tokens(golden, case, prefix, dtype):
    tensors, description = golden(f"h3_layer_{case}")
    layer = build_layer(tensors, description, dtype, head_layout="dh")
    head_dim, prompt_len = description["config"]["head_dim"], description["config"]["prompt_len"]
    u = tensors["u"].to(dtype)
    tolerance = FLOAT64 if prefix else OUTPUT
    with torch.no_grad():
        y_prompt, state = layer(u[:, :prompt_len], return_state=True)
        shift = reference_shift_state(state.shift, layer.shift.B)
        assert_near(shift, tensors[f"{prefix}state_shift_after_prompt"][..., :-1], tolerance)
        diag = reference_diag_state(state.diag, head_dim)
        assert_near(diag, tensors[f"{prefix}state_diag_after_prompt"], tolerance)
        y = torch.cat([y_prompt, *(layer.step(u[:, t : t + 1], state) for t in range(prompt_len, u.shape[1]))], dim=1)
    assert_near(y, tensors[f"{prefix}recurrent_y"], tolerance)
    if not prefix:
        assert_near(
            reference_shift_state(state.shift, layer.shift.B).detach(), tensors["state_shift_final"][..., :-1], OUTPUT
        )
        assert_near(reference_diag_state(state.diag, head_dim), tensors["state_diag_final"], OUTPUT)
        if head_dim > 1:
            layer.head_layout = "hd"
            assert_near(layer(u).detach(), tensors["recurrent_y_hd_layout"], OUTPUT)


@pytest.mark.parametrize("case", [case for case in CASES if "_h1" in case])
def test_tokens_from_the_start(golden, case):
    tensors, description = golden(f"h3_layer_{case}")
    layer = build_layer(tensors, description, torch.float32)
    state = layer.init_state(tensors["u"].shape[0])
    y = run_steps(layer, tensors["u"], state)
    assert_near(y, tensors["step_y"], OUTPUT)
    assert_near(reference_diag_state(state.diag, 1), tensors["step_state_diag_final"], OUTPUT)
    shift = reference_shift_state(state.shift, layer.shift.B.detach())
    assert_near(shift, tensors["step_state_shift_final"][..., :-1], OUTPUT)
