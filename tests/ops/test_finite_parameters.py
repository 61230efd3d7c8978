"""Parameters that are not finite are refused where that costs no waiting, and never stand in a compiler's way."""

from __future__ import annotations

import pytest
import torch

from hippos.ops import discretise, dplr_filter, fft_conv, h3_mix, shift_filter, ssm_conv, ssm_filter, ssm_step
from hippos.ops.arguments import check_finite

CALLS = {
    "ssm_conv": (("log_a", "b", "c", "d"), lambda x: ssm_conv(x["u"], x["log_a"], x["b"], x["c"], x["d"])),
    "ssm_filter": (("log_a", "b", "c"), lambda x: ssm_filter(x["log_a"], x["b"], x["c"], 7)),
    "ssm_step": (("log_a", "b", "c"), lambda x: ssm_step(x["u"][..., 0], x["state"], x["log_a"], x["b"], x["c"])),
    "fft_conv": (("ssm_filter", "d"), lambda x: fft_conv(x["u"], x["ssm_filter"], x["d"])),
    "shift_filter": (("b", "c"), lambda x: shift_filter(x["b"].flatten(1), x["c"].flatten(1))),
    "discretise": (("B", "dt"), lambda x: discretise(x["log_a"], x["B"], x["dt"])),
    "dplr_filter": (
        ("A", "P", "B", "C", "dt"),
        lambda x: dplr_filter(x["A"], x["P"], x["B"], x["C"], x["dt"], 7),
    ),
    "h3_mix": (
        ("shift_filter", "shift_d", "log_a", "b", "c", "d"),
        lambda x: h3_mix(
            *(x["u"],) * 3, x["shift_filter"], x["shift_d"], x["log_a"], x["b"], x["c"], x["d"]
        ),
    ),
}  # fmt: skip


@pytest.fixture
def arguments(random):
    def draw(*shape):
        return random.normal(*shape, dtype=torch.float32)

    modes = dict(zip(("log_a", "b", "c"), random.modes(3, 4, dtype=torch.float32), strict=True))
    shapes = {"u": (2, 3, 20), "state": (2, 3, 4, 2), "d": (3,), "ssm_filter": (3, 9)}
    shapes |= {
        "shift_filter": (3, 4),
        "shift_d": (3,),
        "A": (3, 4, 2),
        "P": (1, 3, 4, 2),
        "B": (3, 4, 2),
        "C": (3, 4, 2),
    }
    arguments = modes | {name: draw(*shape) for name, shape in shapes.items()} | {"dt": torch.full((3,), 0.1)}
    arguments["A"][..., 0] = -0.5
    return arguments


@pytest.mark.parametrize(("operator", "name"), [(op, name) for op, (names, _) in CALLS.items() for name in names])
@pytest.mark.parametrize("flaw", [torch.nan, torch.inf])
def test_refused_by_name_and_place(arguments, operator, name, flaw):
    call = CALLS[operator][1]
    call(arguments)
    arguments[name].view(-1)[-1] = flaw
    with pytest.raises(ValueError, match=rf"^{name} must be finite.*, got {flaw} at \("):
        call(arguments)


def test_a_mode_may_forget_at_once(arguments):
    log_a = arguments["log_a"]
    log_a[1, 2, 0] = -torch.inf
    ssm_conv(arguments["u"], log_a, arguments["b"], arguments["c"])
    log_a[1, 2, 1] = -torch.inf
    with pytest.raises(ValueError, match=r"log_a must be finite, but for a real part of -inf, got -inf at \(1, 2, 1\)"):
        ssm_conv(arguments["u"], log_a, arguments["b"], arguments["c"])


def test_large_values_are_finite():
    check_finite(x=torch.full((10,), 3e38), y=torch.full((10,), 60000.0, dtype=torch.float16), z=None)


def test_compilers_and_stacks_see_no_values(arguments):
    inputs = [arguments[name] for name in ("u", "log_a", "b", "c", "d")]
    wanted = ssm_conv(*inputs)
    found = torch.compile(ssm_conv, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(found, wanted)
    stacked = torch.vmap(ssm_conv)(*(torch.stack((x, x)) for x in inputs))
    torch.testing.assert_close(stacked[1], wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_when_debugging(arguments, monkeypatch):
    arguments["d"][0] = torch.nan
    inputs = [arguments[name].cuda() for name in ("u", "log_a", "b", "c", "d")]
    ssm_conv(*inputs)
    monkeypatch.setenv("HIPPOS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"d must be finite, got nan at \(0,\)"):
        ssm_conv(*inputs)
