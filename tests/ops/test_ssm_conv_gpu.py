"""The kernels of ssm_conv on a GPU, against the definition in float64."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch.library import opcheck

from hippos.ops import ssm_conv
from hippos.ops.ssm_conv.autograd import ssm_conv_kernel_op
from hippos.ops.ssm_conv.chunked import Inputs
from tests.ops.ssm_cases import PACKED, Draw, leaves, relative_error
from tests.ops.ssm_conv_kernel_cases import OPTIONAL, ROUNDING, assert_accurate, make_inputs, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def without_debugging(monkeypatch):
    """Checks of values on a GPU wait for it."""
    monkeypatch.delenv("HIPPOS_DEBUG", raising=False)


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


class TestGpu:
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

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        ("batch", "n_heads", "seqlen", "n_modes"),
        [(3, 96, 1024, 32), (1, 200, 2048, 17), (5, 100, 320, 32), (1, 192, 64, 32), (7, 200, 4160, 20)],
    )
    def test_tiles_that_are_not_full(self, batch, n_heads, seqlen, n_modes, dtype):
        inputs = make_inputs(batch, n_heads, seqlen, n_modes, dtype, "cuda", absent=("initial_state",))
        found = run(inputs, "triton", with_state=False)
        again = run(inputs, "triton", with_state=False)
        assert all(torch.equal(found[name], again[name]) for name in found)
        assert_accurate(inputs, found, run(inputs, "torch", dtype=torch.float64, with_state=False))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("absent", [("in_gate",), ("out_gate",), ("d", "in_gate", "out_gate")])
    def test_full_tiles_without_gates(self, absent, dtype):
        inputs = make_inputs(8, 100, 1024, 32, dtype, "cuda", absent=("initial_state", *absent))
        found = run(inputs, "triton", with_state=False)
        assert_accurate(inputs, found, run(inputs, "torch", dtype=torch.float64, with_state=False))

    @pytest.mark.parametrize(
        ("batch", "n_heads", "seqlen"), [(3, 100, 1024), (1, 200, 2048), (1, 200, 8192), (16, 96, 512), (4, 60, 8256)]
    )
    def test_final_states(self, batch, n_heads, seqlen):
        inputs = make_inputs(batch, n_heads, seqlen, 32, torch.bfloat16, "cuda")
        options = {"in_gate": inputs.in_gate, "out_gate": inputs.out_gate, "return_state": True}
        found = ssm_conv(*inputs[:5], initial_state=inputs.initial_state, **options, impl="triton")
        exact = Inputs(*(x.double() for x in inputs))
        options |= {"in_gate": exact.in_gate, "out_gate": exact.out_gate}
        wanted = ssm_conv(*exact[:5], initial_state=exact.initial_state, **options, impl="torch")
        for got, want in zip(found, wanted, strict=True):
            assert relative_error(got, want) < 2 * ROUNDING[torch.bfloat16]

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
