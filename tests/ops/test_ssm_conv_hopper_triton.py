"""How ssm_conv launches its Hopper programs: the whole operator on a CPU, these programs run by `gluon_on_cpu`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hippos.ops.ssm_conv import schedule as schedules
from tests.ops.gluon_on_cpu import run_program
from tests.ops.ssm_conv_kernel_cases import assert_accurate, make_inputs, run

pytestmark = [
    pytest.mark.skipif(
        not (
            importlib.util.find_spec("triton") is not None
            and os.environ.get("TRITON_INTERPRET") == "1"
            and not torch.cuda.is_available()
        ),
        reason="needs Triton with TRITON_INTERPRET=1 and no CUDA device",
    ),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

FOLDER = Path(schedules.__file__).parent
SHARED = ("kernels", "kernels_operators", "kernels_hopper", "kernels_hopper_scan", "kernels_hopper_operators")


class OnCpu:
    """A Gluon kernel that `gluon_on_cpu` runs; counts its launches."""

    def __init__(self, name: str, modules: tuple[str, ...]) -> None:
        self.name, self.modules, self.launches = name, modules, 0

    def __getitem__(self, grid):
        def launch(*args, num_warps, maxnreg=None, **constants):
            del maxnreg
            self.launches += 1
            run_program(FOLDER, (*SHARED, *self.modules), self.name, grid[0], *args, n_warps=num_warps, **constants)

        return launch


@pytest.fixture
def programs(monkeypatch) -> tuple[OnCpu, OnCpu]:
    """The forward and the backward program, on a CPU that passes for a Hopper GPU."""
    launch = importlib.import_module("hippos.ops.ssm_conv.launch")
    hopper = importlib.import_module("hippos.ops.ssm_conv.launch_hopper")
    autograd = importlib.import_module("hippos.ops.ssm_conv.autograd")
    gpu = torch.device("cuda")
    forward, backward = schedules.forward_schedule, schedules.backward_schedule
    for module in (launch, autograd, schedules):
        monkeypatch.setattr(module, "forward_schedule", lambda dtype, n_modes, _: forward(dtype, n_modes, gpu))
    for module in (launch, schedules):
        monkeypatch.setattr(module, "backward_schedule", lambda dtype, n_modes, _: backward(dtype, n_modes, gpu))
    monkeypatch.setattr(schedules, "has_large_shared_memory", lambda _: True)
    monkeypatch.setattr(hopper, "has_hopper_programs", lambda _: True)
    monkeypatch.setattr(launch, "LEAST_FORWARD_PROGRAMS", 1)
    monkeypatch.setattr(launch, "LEAST_PROGRAMS", 1)
    both = (
        OnCpu("ssm_conv_fwd_hopper_kernel", ("kernels_hopper_forward",)),
        OnCpu("ssm_conv_bwd_hopper_kernel", ("kernels_hopper_parameters", "kernels_hopper_backward")),
    )
    for program in both:
        module = SimpleNamespace(**{program.name: program})
        monkeypatch.setitem(sys.modules, f"hippos.ops.ssm_conv.{program.modules[-1]}", module)
    return both


@pytest.mark.parametrize(
    ("batch", "seqlen", "n_modes", "absent"),
    [
        (1, 2048, 32, ()),
        (16, 256, 20, ("out_gate",)),
        (3, 1024, 32, ("d", "in_gate")),
        (5, 448, 17, ("in_gate", "out_gate")),
    ],
)
def test_outputs_and_gradients(programs, batch, seqlen, n_modes, absent):
    inputs = make_inputs(batch, 2, seqlen, n_modes, torch.bfloat16, absent=("initial_state", *absent))
    found = run(inputs, "triton", with_state=False)
    assert [program.launches for program in programs] == [1, 1]
    assert_accurate(inputs, found, run(inputs, "torch", dtype=torch.float64, with_state=False))


def test_gradients_of_states_are_left_to_the_other_kernels(programs):
    inputs = make_inputs(16, 1, 256, 32, torch.float16)
    found, wanted = run(inputs, "triton"), run(inputs, "reference", dtype=torch.float64)
    assert [program.launches for program in programs] == [1, 0]
    assert_accurate(inputs, found, wanted)


def test_strides_of_stacked_signals(programs):
    inputs = make_inputs(16, 2, 256, 32, torch.bfloat16, absent=("initial_state",))
    stacked = torch.cat([inputs.u, inputs.in_gate, inputs.out_gate], dim=1)  # (B, 3H, L)
    u, in_gate, out_gate = stacked.transpose(0, 1).contiguous().transpose(0, 1).chunk(3, dim=1)
    found = run(inputs._replace(u=u, in_gate=in_gate, out_gate=out_gate), "triton", with_state=False)
    wanted = run(inputs, "triton", with_state=False)
    assert [program.launches for program in programs] == [2, 2]
    assert all(torch.equal(found[name], wanted[name]) for name in found)
