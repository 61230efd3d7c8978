"""The Triton kernels of ssm_conv against the definition: in Triton's interpreter, and on a GPU (marked gpu).

The interpreter is chosen when Triton is imported, so its tests run where TRITON_INTERPRET=1 is set:
``TRITON_INTERPRET=1 pytest tests/ops/test_ssm_conv_triton.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.library import opcheck

from hippos.errors import UnsupportedError
from hippos.ops import ssm_conv
from hippos.ops.ssm_conv import schedule as schedules
from hippos.ops.ssm_conv.autograd import ssm_conv_kernel_op
from hippos.ops.ssm_conv.chunked import Inputs
from hippos.ops.ssm_conv.schedule import Pieces, Schedule, backward_pieces, forward_pieces, place
from tests.ops.ssm_cases import PACKED, Draw, leaves, relative_error

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
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("u", "log_a", "b", "c", "d", "in_gate", "out_gate", "initial_state")
OPTIONAL = NAMES[4:]
# Multiples of the error that the exact float32 result makes when it is rounded once to the signal's dtype.
LIMITS = {torch.bfloat16: (2.0, 3.0), torch.float16: (2.0, 3.0)}
ROUNDING = {torch.bfloat16: 1.65e-3, torch.float16: 2.1e-4}


@pytest.fixture(autouse=True)
def without_debugging(monkeypatch):
    """Checks of values on a GPU wait for it."""
    monkeypatch.delenv("HIPPOS_DEBUG", raising=False)


def make_inputs(batch, n_heads, seqlen, n_modes, dtype, device="cpu", absent=(), seed=0, n_docs=None) -> Inputs:
    random = Draw(seed=seed)
    signals = [random.normal(batch, n_heads, seqlen, dtype=dtype) for _ in range(3)]
    modes = random.modes(n_heads, n_modes, dtype=torch.float32)
    d = random.normal(n_heads, dtype=torch.float32)
    state = random.normal(n_docs or batch, n_heads, n_modes, 2, dtype=torch.float32)
    inputs = Inputs(signals[0], *modes, d, *signals[1:], state)
    inputs = inputs._replace(**dict.fromkeys(absent))
    return Inputs(*(None if x is None else x.to(device) for x in inputs))


def run(inputs: Inputs, impl: str, *, with_state=True, dtype=None, cu_seqlens=None) -> dict:
    """Output, state, and the gradients of a random functional of both."""
    inputs = Inputs(*leaves(*inputs, dtype=dtype))
    u, log_a, b, c, d, in_gate, out_gate, initial_state = inputs
    gates = {"in_gate": in_gate, "out_gate": out_gate}
    options = {"initial_state": initial_state, "cu_seqlens": cu_seqlens, "return_state": True, "impl": impl}
    y, state = ssm_conv(u, log_a, b, c, d, **gates, **options)
    weights = Draw(seed=1)
    loss = (y.double() * weights.normal(*y.shape).bfloat16().to(y.device)).sum()
    if with_state:
        loss = loss + (state.double() * weights.normal(*state.shape).bfloat16().to(y.device)).sum()
    loss.backward()
    gradients = {f"d_{name}": x.grad for name, x in inputs._asdict().items() if x is not None}
    return {"y": y.detach(), "state": state.detach(), **gradients}


@contextmanager
def waiting_forbidden():
    """Raise where the host would wait for the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launch_module():
    """The module that names the cuts of its sequences; Triton is imported here only."""
    return importlib.import_module("hippos.ops.ssm_conv.launch")


def assert_accurate(inputs: Inputs, found: dict, wanted: dict) -> None:
    dtype = inputs.u.dtype
    for name, tensor in found.items():
        error = relative_error(tensor.cpu(), wanted[name].cpu())
        if dtype == torch.float32:
            limit = 1e-5 if name.startswith("d_") else 4e-6
        else:
            limit = LIMITS[dtype][name.startswith("d_")] * ROUNDING[dtype]
            # Few numbers do not average their errors out.
            limit *= 1 if tensor.numel() > 256 else 3
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.2e}"


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


class TestGeometry:
    @pytest.mark.parametrize(("rows", "lanes"), [(64, 16), (128, 32), (16, 4)])
    @pytest.mark.parametrize("has_segments", [False, True])
    def test_every_chunk_has_one_row(self, rows, lanes, has_segments):
        schedule = Schedule(chunk=32, rows=rows, lanes=lanes)
        for batch, seqlen in itertools.product([1, 2, 3, 8, 100], [1, 31, 32, 33, 1000, 5000]):
            at = place(Pieces(batch, 1, seqlen), schedule, has_segments=has_segments)
            assert at.steps * at.pieces * at.segments == rows
            assert at.span == 32 * at.steps * at.segments
            assert at.n_tiles * at.span >= seqlen > (at.n_tiles - 1) * at.span
            assert at.n_groups * at.pieces >= batch > (at.n_groups - 1) * at.pieces

    def test_pieces_cover_their_sequence(self):
        schedule = Schedule(chunk=32, rows=64, lanes=16)
        for batch, n_heads, seqlen in itertools.product([1, 3, 16, 20], [1, 128, 768], [1, 128, 129, 5000, 10**6]):
            for cut in (forward_pieces, backward_pieces):
                pieces = cut(batch, n_heads, seqlen, schedule)
                assert pieces.total == batch * pieces.per_sequence
                assert pieces.per_sequence * pieces.length >= seqlen > (pieces.per_sequence - 1) * pieces.length
                at = place(pieces, schedule, has_segments=False)
                assert pieces.per_sequence == 1 or pieces.length % at.span == 0

    def test_a_long_sequence_of_few_channels_fills_a_gpu(self):
        schedule = Schedule(chunk=64, rows=64, lanes=16)
        pieces = forward_pieces(1, 128, 1 << 20, schedule)
        at = place(pieces, schedule, has_segments=False)
        assert 128 * at.n_groups >= schedule.least_programs


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


class TestGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(
        ("batch", "seqlen"), [(1, 1), (3, 2), (8, 63), (3, 64), (1, 65), (8, 1000), (3, 1000), (1, 4097), (20, 300)]
    )
    def test_outputs_and_gradients(self, batch, seqlen, dtype):
        inputs = make_inputs(batch, 3, seqlen, 32, dtype, "cuda")
        wanted = run(Inputs(*(x.cpu() for x in inputs)), "torch", dtype=torch.float64)
        assert_accurate(inputs, run(inputs, "triton"), wanted)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_a_long_sequence_alone(self, dtype):
        inputs = make_inputs(1, 2, 100_003, 32, dtype, "cuda")
        wanted = run(inputs, "torch", dtype=torch.float64)
        assert_accurate(inputs, run(inputs, "triton"), wanted)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("offsets", [PACKED, [0, 3000, 3001, 9000, 9064, 9064, 20000]])
    def test_packed_documents(self, offsets, dtype):
        inputs = make_inputs(1, 3, offsets[-1], 32, dtype, "cuda", n_docs=len(offsets) - 1)
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device="cuda")
        cpu = Inputs(*(x.cpu() for x in inputs))
        wanted = run(cpu, "torch", dtype=torch.float64, cu_seqlens=cu_seqlens.cpu())
        assert_accurate(inputs, run(inputs, "triton", cu_seqlens=cu_seqlens), wanted)

    def test_wrong_offsets_stay_in_bounds(self):
        inputs = make_inputs(1, 3, 1000, 32, torch.bfloat16, "cuda", n_docs=5)
        for offsets in ([0, -5, 900, 300, 5000, 1000], [2**31 - 1] * 6, [-(2**31)] * 6, [500, 0, 0, 0, 0, 20]):
            run(inputs, "triton", cu_seqlens=torch.tensor(offsets, dtype=torch.int32, device="cuda"))
        torch.cuda.synchronize()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_few_channels(self, dtype):
        inputs = make_inputs(1, 2, 300_000, 16, dtype, "cuda")
        wanted = run(inputs, "torch", dtype=torch.float64)
        assert_accurate(inputs, run(inputs, "triton"), wanted)

    @pytest.mark.parametrize("n_modes", [1, 5, 16, 64])
    def test_modes(self, n_modes):
        inputs = make_inputs(2, 3, 1000, n_modes, torch.bfloat16, "cuda")
        wanted = run(Inputs(*(x.cpu() for x in inputs)), "torch", dtype=torch.float64)
        assert_accurate(inputs, run(inputs, "triton"), wanted)

    @pytest.mark.parametrize("absent", [(name,) for name in OPTIONAL] + [OPTIONAL])
    def test_absent_arguments(self, absent):
        inputs = make_inputs(3, 2, 1000, 32, torch.bfloat16, "cuda", absent=absent)
        wanted = run(Inputs(*(None if x is None else x.cpu() for x in inputs)), "torch", dtype=torch.float64)
        assert_accurate(inputs, run(inputs, "triton"), wanted)

    def test_gradients_are_bit_identical(self):
        inputs = make_inputs(16, 8, 2000, 32, torch.bfloat16, "cuda")
        first, second = run(inputs, "triton"), run(inputs, "triton")
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_memory_left_unwritten_is_never_read(self):
        inputs = make_inputs(3, 4, 1001, 32, torch.bfloat16, "cuda")
        first = run(inputs, "triton")
        waste = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
        del waste
        second = run(inputs, "triton")
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("batch", "n_heads", "seqlen"),
        [
            (16, 100, 256),
            (32, 50, 768),
            (8, 96, 1024),
            (12, 48, 2048),
            (2, 96, 4096),
            (1, 96, 8192),
            (1, 200, 32_768),
            (1, 2, 262_144),
        ],
    )
    def test_full_tiles(self, batch, n_heads, seqlen, dtype):
        inputs = make_inputs(batch, n_heads, seqlen, 32, dtype, "cuda", absent=("initial_state",))
        found = run(inputs, "triton", with_state=False)
        again = run(inputs, "triton", with_state=False)
        assert all(torch.equal(found[name], again[name]) for name in found)
        assert_accurate(inputs, found, run(inputs, "torch", dtype=torch.float64, with_state=False))

    def test_full_tiles_between_states(self):
        inputs = make_inputs(16, 96, 512, 20, torch.bfloat16, "cuda")
        assert_accurate(inputs, run(inputs, "triton"), run(inputs, "torch", dtype=torch.float64))

    def test_a_sample_that_is_no_number_stays_in_its_sequence(self):
        inputs = make_inputs(16, 96, 512, 32, torch.bfloat16, "cuda", absent=("initial_state",))
        wanted = run(inputs, "triton", with_state=False)
        inputs.u[3, :, 100] = torch.nan
        found = run(inputs, "triton", with_state=False)
        others = [i for i in range(16) if i != 3]
        for name in ("y", "d_u", "d_in_gate", "d_out_gate"):
            assert torch.equal(found[name][others], wanted[name][others])
        assert torch.equal(found["y"][3, :, :64], wanted["y"][3, :, :64])  # the chunk before

    def test_full_tiles_of_strided_inputs(self):
        inputs = make_inputs(16, 96, 512, 32, torch.bfloat16, "cuda", absent=("initial_state",))
        stacked = torch.cat([inputs.u, inputs.in_gate, inputs.out_gate], dim=1)  # (B, 3H, L)
        u, in_gate, out_gate = stacked.transpose(0, 1).contiguous().transpose(0, 1).chunk(3, dim=1)
        found = run(inputs._replace(u=u, in_gate=in_gate, out_gate=out_gate), "triton", with_state=False)
        wanted = run(inputs, "triton", with_state=False)
        assert all(torch.equal(found[name], wanted[name]) for name in found)

    def test_strided_inputs(self):
        inputs = make_inputs(3, 4, 1000, 32, torch.bfloat16, "cuda")
        stacked = torch.cat([inputs.u, inputs.in_gate, inputs.out_gate], dim=1)  # (B, 3H, L)
        u, in_gate, out_gate = stacked.transpose(0, 1).contiguous().transpose(0, 1).chunk(3, dim=1)
        found = run(inputs._replace(u=u, in_gate=in_gate, out_gate=out_gate), "triton")
        wanted = run(inputs, "triton")
        assert all(torch.equal(found[name], wanted[name]) for name in found)

    def test_compiled_without_a_break(self):
        inputs = Inputs(*leaves(*make_inputs(2, 4, 500, 32, torch.bfloat16, "cuda")))
        call = lambda *x: ssm_conv(*x[:5], in_gate=x[5], out_gate=x[6], initial_state=x[7], impl="triton")  # noqa: E731
        y = torch.compile(call, fullgraph=True)(*inputs)
        y.float().square().sum().backward()
        wanted = call(*inputs)
        assert torch.equal(y, wanted)
        assert torch.isfinite(inputs.log_a.grad).all()

    @pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
    def test_packed_documents_compiled_without_a_break(self):
        inputs = Inputs(*leaves(*make_inputs(1, 4, 500, 32, torch.bfloat16, "cuda", n_docs=3)))
        cu_seqlens = torch.tensor([0, 100, 101, 500], device="cuda")

        def call(*x):
            options = {"initial_state": x[7], "cu_seqlens": cu_seqlens, "return_state": True}
            return ssm_conv(*x[:5], in_gate=x[5], out_gate=x[6], **options)

        y, state = torch.compile(call, fullgraph=True)(*inputs)
        (y.float().square().sum() + state.square().sum()).backward()
        wanted, wanted_state = call(*inputs)
        assert torch.equal(y, wanted)
        torch.testing.assert_close(state, wanted_state)
        assert torch.isfinite(inputs.log_a.grad).all()

    def test_opcheck(self):
        inputs = make_inputs(2, 2, 200, 3, torch.float32, "cuda")
        opcheck(ssm_conv_kernel_op, (*leaves(*inputs), None, True, True))
        inputs = make_inputs(1, 2, 200, 3, torch.bfloat16, "cuda", n_docs=2)
        opcheck(ssm_conv_kernel_op, (*leaves(*inputs), torch.tensor([0, 99, 200], device="cuda"), True, True))

    def test_chosen_on_a_gpu_without_waiting_for_it(self):
        inputs = make_inputs(1, 4, 500, 32, torch.bfloat16, "cuda", n_docs=2)
        cu_seqlens = torch.tensor([0, 100, 500], device="cuda")
        options = {"initial_state": inputs.initial_state, "cu_seqlens": cu_seqlens, "return_state": True}
        wanted = ssm_conv(*inputs[:5], **options, impl="triton")
        with waiting_forbidden():
            found = ssm_conv(*inputs[:5], **options)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])

    def test_captured_by_a_cuda_graph(self):
        inputs = make_inputs(2, 4, 500, 32, torch.bfloat16, "cuda", absent=("initial_state",))
        gates = {"in_gate": inputs.in_gate, "out_gate": inputs.out_gate}
        call = lambda: ssm_conv(*inputs[:5], **gates, impl="triton")  # noqa: E731
        wanted = call().clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, wanted)

    @pytest.mark.slow
    def test_offsets_past_32_bits(self):
        shape = (3, 768, 1_000_000)  # 2.3e9 samples
        u = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        tail = torch.randn(4, 2000, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
        u[-1, -4:, -2000:] = tail
        modes = [x.cuda() for x in Draw(seed=0).modes(768, 16, dtype=torch.float32)]
        y = ssm_conv(u, *modes, impl="triton")[-1:, -4:, -2000:]
        wanted = ssm_conv(tail[None].double(), *(x[-4:].double() for x in modes), impl="torch")
        assert relative_error(y.cpu(), wanted.cpu()) < 2 * ROUNDING[torch.bfloat16]
