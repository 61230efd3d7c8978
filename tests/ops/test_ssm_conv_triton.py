"""The Triton kernels of ssm_conv against the definition, in Triton's interpreter, and their operator on any device.

The interpreter is chosen when Triton is imported, so its tests run where TRITON_INTERPRET=1 is set:
``TRITON_INTERPRET=1 pytest tests/ops/test_ssm_conv_triton.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest
import torch
from torch.library import opcheck

from hippos.errors import UnsupportedError
from hippos.ops import ssm_conv
from hippos.ops.ssm_conv import schedule as schedules
from hippos.ops.ssm_conv.autograd import ssm_conv_kernel_op
from hippos.ops.ssm_conv.chunked import Inputs
from tests.ops.ssm_cases import PACKED, leaves, relative_error
from tests.ops.ssm_conv_kernel_cases import OPTIONAL, assert_accurate, make_inputs, run

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(
    not (HAS_TRITON and INTERPRETED and not torch.cuda.is_available()),
    reason="needs Triton with TRITON_INTERPRET=1 and no CUDA device",
)
# The interpreter of Triton 3.6 makes scalars of one-element arrays, which numpy 2 warns of.
# It also warns of 0 * inf where a comparison drops the result.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def launch_module():
    """The module that names the cuts of its sequences; Triton is imported here only."""
    return importlib.import_module("hippos.ops.ssm_conv.launch")


def hopper_module():
    """The module that launches the programs for Hopper."""
    return importlib.import_module("hippos.ops.ssm_conv.launch_hopper")


@interpreter
class TestInterpreted:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(
        ("batch", "seqlen", "n_modes"), [(1, 1, 3), (2, 2, 4), (3, 63, 4), (1, 64, 3), (5, 65, 4), (1, 300, 4)]
    )
    def test_outputs_and_gradients(self, batch, seqlen, n_modes, dtype):
        inputs = make_inputs(batch, 2, seqlen, n_modes, dtype)
        assert_accurate(inputs, run(inputs, "triton"), run(inputs, "reference", dtype=torch.float64))

    @pytest.mark.parametrize("absent", [(name,) for name in OPTIONAL] + [OPTIONAL])
    def test_absent_arguments(self, absent):
        inputs = make_inputs(2, 1, 40, 3, torch.float32, absent=absent)
        found = run(inputs, "triton", with_state=len(absent) == 1)
        wanted = run(inputs, "reference", dtype=torch.float64, with_state=len(absent) == 1)
        assert_accurate(inputs, found, wanted)

    def test_strided_inputs(self):
        inputs = make_inputs(2, 2, 40, 3, torch.float32)
        stacked = torch.stack([inputs.u, inputs.in_gate, inputs.out_gate], dim=1).flatten(1, 2)  # (B, 3H, L)
        u, in_gate, out_gate = stacked.chunk(3, dim=1)
        u = u.transpose(0, 1).contiguous().transpose(0, 1)
        late = in_gate.transpose(1, 2).contiguous().transpose(1, 2)  # time is not the fastest axis
        strided = inputs._replace(u=u, in_gate=late, out_gate=out_gate)
        call = lambda x: ssm_conv(*x[:5], in_gate=x.in_gate, out_gate=x.out_gate, impl="triton")  # noqa: E731
        assert torch.equal(call(strided), call(inputs))

    def test_a_mode_that_forgets_at_once(self):
        inputs = make_inputs(1, 1, 40, 3, torch.float32)
        inputs.log_a[:, 0, 0] = -torch.inf
        found = run(inputs, "triton")
        assert all(torch.isfinite(tensor).all() for tensor in found.values())
        assert_accurate(inputs, found, run(inputs, "reference", dtype=torch.float64) | {"d_log_a": found["d_log_a"]})

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("offsets", [[0, 208], PACKED, [0, 64, 128, 192, 256], [0, 1, 2, 3]])
    def test_packed_documents(self, offsets, dtype):
        inputs = make_inputs(1, 2, offsets[-1], 3, dtype, n_docs=len(offsets) - 1)
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
        wanted = run(inputs, "reference", dtype=torch.float64, cu_seqlens=cu_seqlens)
        assert_accurate(inputs, run(inputs, "triton", cu_seqlens=cu_seqlens), wanted)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_long_sequences_of_few_channels_are_cut(self, monkeypatch, dtype):
        monkeypatch.setattr(schedules, "forward_pieces", schedules.backward_pieces)
        monkeypatch.setattr(launch_module(), "forward_pieces", schedules.backward_pieces)
        inputs = make_inputs(2, 1, 500, 3, dtype)
        assert_accurate(inputs, run(inputs, "triton"), run(inputs, "reference", dtype=torch.float64))

    def test_large_and_small_samples_keep_their_digits(self):
        inputs = make_inputs(1, 1, 64, 3, torch.float16, absent=OPTIONAL)
        for scale in (2.0**-12, 2.0**10):
            scaled = inputs._replace(u=inputs.u * scale)
            wanted = run(scaled, "reference", dtype=torch.float64)
            assert relative_error(run(scaled, "triton")["y"], wanted["y"]) < 1e-3


class TestOperator:
    """Registration, on any device: without a GPU the operator runs the definition."""

    @pytest.mark.skipif(INTERPRETED, reason="opcheck's tracing does not run Triton's interpreter")
    def test_opcheck(self):
        inputs = make_inputs(2, 2, 20, 3, torch.float32)
        opcheck(ssm_conv_kernel_op, (*leaves(*inputs), None, True, True))
        opcheck(ssm_conv_kernel_op, (*leaves(*inputs)[:4], None, None, None, None, None, False, True))

    @pytest.mark.skipif(INTERPRETED, reason="opcheck's tracing does not run Triton's interpreter")
    def test_opcheck_of_packed_documents(self):
        inputs = make_inputs(1, 2, 50, 3, torch.float32, n_docs=3)
        opcheck(ssm_conv_kernel_op, (*leaves(*inputs), torch.tensor([0, 7, 7, 50]), True, True))

    @pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on CPU tensors")
    def test_refusals(self):
        inputs = make_inputs(1, 2, 20, 3, torch.float32)
        with pytest.raises(UnsupportedError, match="needs CUDA tensors, got cpu"):
            ssm_conv(*inputs[:5], impl="triton")

    def test_no_second_derivative(self):
        inputs = Inputs(*leaves(*make_inputs(1, 1, 8, 3, torch.float32)))
        y, _, _ = ssm_conv_kernel_op(*inputs, None, False, True)
        (gradient,) = torch.autograd.grad(y.sum(), inputs.u, create_graph=True)
        with pytest.raises(UnsupportedError, match="no second derivative"):
            gradient.sum().backward()


@interpreter
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(1, 2, 20, dtype=torch.float64)}, "not float64"),
        ({"log_a": torch.zeros(2, 65, 2), "b": torch.zeros(2, 65, 2), "c": torch.zeros(2, 65, 2)}, "up to 32 modes"),
    ],
)
def test_interpreted_refusals(change, message):
    inputs = make_inputs(1, 2, 20, 3, torch.float32)._replace(**change)
    with pytest.raises(UnsupportedError, match=message):
        ssm_conv(*inputs[:4], impl="triton")


@interpreter
class TestHopperTiles:
    """How the programs for Hopper cut their work; they themselves are run by test_ssm_conv_hopper.py."""

    @pytest.mark.parametrize(
        ("batch", "seqlen", "run", "n_tiles", "n_groups", "is_full"),
        [
            (32, 2048, 4, 8, 2, True),
            (8, 8192, 8, 16, 1, True),
            (2, 32768, 32, 16, 1, True),
            (1, 262144, 64, 64, 1, True),
            (1, 2048, 32, 1, 1, False),
            (3, 1024, 16, 1, 1, False),
            (5, 64, 4, 1, 1, False),
        ],
    )
    def test_sequences(self, batch, seqlen, run, n_tiles, n_groups, is_full):
        tiles = hopper_module().whole_tiles(batch, 768, seqlen, least=192)
        assert (tiles.run, tiles.n_tiles, tiles.n_groups, tiles.fullness == 1) == (run, n_tiles, n_groups, is_full)

    def test_what_they_do_not_serve(self):
        whole_tiles = hopper_module().whole_tiles
        assert whole_tiles(1, 768, 2049, least=192) is None  # a part of a chunk
        assert whole_tiles(0, 768, 2048, least=192) is None
        assert whole_tiles(1, 128, 2048, least=192) is None  # few programs

    def test_pieces_fill_their_tiles(self):
        cut_tiles = hopper_module().cut_tiles
        tiles = cut_tiles(1, 1 << 20, schedules.Pieces(64, 64, 1 << 14))
        assert (tiles.run, tiles.n_tiles, tiles.n_groups, tiles.fullness) == (4, 64, 4, 1)
        assert cut_tiles(1, 1 << 20, schedules.Pieces(1, 1, 1 << 20)) is None
        assert cut_tiles(1, 1000, schedules.Pieces(4, 4, 256)) is None

    def test_short_loops_and_short_runs_make_their_operators(self):
        hopper = hopper_module()
        makes = [
            hopper.backward_makes_operators(hopper.whole_tiles(batch, 768, seqlen, least=96))
            for batch, seqlen in ((1, 2048), (32, 2048), (8, 8192), (1, 262144))
        ]
        assert makes == [True, True, False, False]
