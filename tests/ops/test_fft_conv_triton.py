"""The Triton kernels of fft_conv against the definition: in Triton's interpreter, and on a GPU (marked gpu).

The interpreter is chosen when Triton is imported, so its tests run where TRITON_INTERPRET=1 is set:
``TRITON_INTERPRET=1 pytest tests/ops/test_fft_conv_triton.py``.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch.library import opcheck

from hippos.errors import UnsupportedError
from hippos.ops import fft_conv
from hippos.ops.fft_conv.autograd import fft_conv_kernel_op, fft_conv_triton
from hippos.ops.fft_conv.plan import LongPlan, backward_plan, forward_plan, long_plan, longest, longest_in_one
from tests.ops.ssm_cases import Draw, leaves, nan_memory, relative_error

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(
    not (HAS_TRITON and INTERPRETED and not torch.cuda.is_available()),
    reason="needs Triton with TRITON_INTERPRET=1 and no CUDA device",
)
# The interpreter of Triton 3.6 makes scalars of one-element arrays, which numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("y", "d_u", "d_ssm_filter", "d_d", "d_in_gate", "d_out_gate")
# Multiples of the error of float32 arithmetic rounded once to the signal's dtype: outputs, gradients.
LIMITS = {torch.bfloat16: (4.0, 3.0), torch.float16: (4.0, 3.0), torch.float32: (3.0, 3.0)}
# What that error is for unit-normal inputs; plain float32 is 3e-7 there, whatever the length.
ROUNDING = {torch.bfloat16: 1.65e-3, torch.float16: 2.08e-4, torch.float32: 3e-7}


def make_inputs(batch, n_heads, seqlen, filter_len, dtype, device="cpu", absent=(), seed=0):
    random = Draw(seed=seed)
    u, in_gate, out_gate = (random.normal(batch, n_heads, seqlen, dtype=dtype) for _ in range(3))
    taps = random.normal(n_heads, filter_len, dtype=torch.float32)
    inputs = [u, taps, random.normal(n_heads, dtype=torch.float32), in_gate, out_gate]
    return [None if place in absent else x.to(device) for place, x in enumerate(inputs)]


def call(u, ssm_filter, d, in_gate, out_gate, **options):
    return fft_conv(u, ssm_filter, d, in_gate=in_gate, out_gate=out_gate, **options)


def run(inputs, impl, *, causal=True, dtype=None):
    """Output and the gradients of a random functional of it."""
    inputs = leaves(*inputs, dtype=dtype)
    y = call(*inputs, causal=causal, impl=impl)
    weights = Draw(seed=1).normal(*y.shape).bfloat16().to(y.device)
    (y.double() * weights).sum().backward()
    return [y.detach(), *(None if x is None else x.grad for x in inputs)]


def assert_accurate(inputs, found, wanted, plain=None):
    """Hold errors against what plain float32 makes of such inputs, or, if that is more, of these: `plain`."""
    dtype = inputs[0].dtype
    for place, (name, left, right) in enumerate(zip(NAMES, found, wanted, strict=True)):
        if right is None:
            assert left is None
            continue
        rounding = ROUNDING[dtype]
        if plain is not None:
            rounding = max(rounding, relative_error(plain[place].cpu(), right.cpu()))
        limit = LIMITS[dtype][name != "y"] * rounding
        limit *= 1 if right.numel() > 256 else 3  # few numbers do not average their errors out
        error = relative_error(left.cpu(), right.cpu())
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.2e}"


@interpreter
class TestInterpreted:
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(
        ("batch", "seqlen", "filter_len"),
        [(1, 1, 1), (2, 2, 2), (1, 63, 5), (1, 64, 64), (5, 65, 65), (2, 256, 256), (1, 300, 300)],
    )
    def test_outputs_and_gradients(self, batch, seqlen, filter_len, dtype, causal):
        inputs = make_inputs(batch, 2 if batch == 1 else 1, seqlen, filter_len, dtype)
        with nan_memory():
            found = run(inputs, "triton", causal=causal)
        assert_accurate(inputs, found, run(inputs, "reference", causal=causal, dtype=torch.float64))

    @pytest.mark.parametrize("seqlen", [1000, 2000])
    def test_wider_matrices(self, seqlen):
        inputs = make_inputs(1, 1, seqlen, seqlen, torch.float16)
        assert_accurate(inputs, run(inputs, "triton"), run(inputs, "torch", dtype=torch.float64))

    @pytest.mark.parametrize("absent", [absent for n in range(4) for absent in itertools.combinations((2, 3, 4), n)])
    def test_absent_arguments(self, absent):
        inputs = make_inputs(2, 1, 40, 30, torch.float32, absent=absent)
        assert_accurate(inputs, run(inputs, "triton"), run(inputs, "reference", dtype=torch.float64))

    def test_strided_inputs(self):
        inputs = make_inputs(2, 2, 40, 30, torch.float32)
        u, taps, d, in_gate, out_gate = inputs
        stacked = torch.cat([u, in_gate, out_gate], dim=1)  # (B, 3H, L)
        parts = list(stacked.transpose(0, 1).contiguous().transpose(0, 1).chunk(3, dim=1))
        parts[1] = parts[1].transpose(1, 2).contiguous().transpose(1, 2)  # time is not the fastest axis
        found = run([parts[0], taps, d, *parts[1:]], "triton")
        assert all(torch.equal(left, right) for left, right in zip(found, run(inputs, "triton"), strict=True))

    @pytest.mark.parametrize("scale", [2.0**-14, 2.0**12])
    def test_large_and_small_samples_keep_their_digits(self, scale):
        u, taps, *_ = make_inputs(1, 1, 64, 64, torch.float16, absent=(2, 3, 4))
        for dtype, limit in ((torch.float16, 1e-3), (torch.float32, 1e-6)):
            inputs = (u.to(dtype) * scale, taps / scale)
            wanted = fft_conv(*(x.double() for x in inputs), impl="reference")
            assert relative_error(fft_conv(*inputs, impl="triton"), wanted) < limit

    def test_a_spectrum_put_aside(self):
        from hippos.ops.fft_conv.launch import Inputs, fft_conv_bwd

        inputs = make_inputs(5, 1, 250, 200, torch.float16, absent=(2,))
        dout = Draw(seed=1).normal(5, 1, 250).bfloat16()
        plan = replace(backward_plan(250, torch.float16, torch.device("cpu")), keeps_spectrum=True)
        found = fft_conv_bwd(Inputs(*inputs), dout.half(), True, wants_filter=True, plan=plan)
        wanted = run(inputs, "torch", dtype=torch.float64)
        assert_accurate(inputs, [wanted[0], *(x if x.numel() else None for x in found)], wanted)

    @pytest.fixture
    def short_is_long(self, monkeypatch):
        """Send sequences of more than 256 samples through memory, one channel at a time."""
        autograd, launch = (import_module(f"hippos.ops.fft_conv.{name}") for name in ("autograd", "launch_long"))
        monkeypatch.setattr(autograd, "longest_in_one", lambda dtype, device: 256)
        monkeypatch.setattr(launch, "MOST_SCRATCH_BYTES", 0)
        plans = {torch.float32: LongPlan(16, 16, 16, 1, (2, 2)), torch.float16: LongPlan(16, 16, 16, 1, (1, 2))}
        monkeypatch.setattr(launch, "long_plan", lambda length, dtype, **_: plans[dtype])

    @pytest.mark.usefixtures("short_is_long")
    def test_long_sequences(self):
        inputs = make_inputs(1, 1, 3000, 3000, torch.float32)
        with torch.no_grad():
            y = call(*inputs, impl="triton")
        assert relative_error(y, call(*(x.double() for x in inputs), impl="torch")) < 1e-6

    def test_groups_take_every_channel_once(self):
        launch, plan = import_module("hippos.ops.fft_conv.launch_long"), LongPlan(16, 16, 16, 1)
        transform = 8 * plan.n_fft
        for n_heads, budget, tensors, least in itertools.product((1, 5, 768), (0, 10**6, 10**9), (2, 18), (1, 4)):
            cuts = list(launch._groups(n_heads, budget, plan, tensors=tensors, least=least))
            assert [channel for cut in cuts for channel in range(n_heads)[cut]] == list(range(n_heads))
            assert len(cuts) >= min(least, n_heads)
            largest = max(cut.stop - cut.start for cut in cuts)
            assert largest == 1 or largest * tensors * transform <= min(budget, launch.MOST_SCRATCH_BYTES)

    @pytest.mark.slow
    @pytest.mark.usefixtures("short_is_long")
    @pytest.mark.parametrize("absent", [(), (2, 3, 4), (3,), (4,)])
    @pytest.mark.parametrize(
        ("dtype", "causal"), [(torch.float32, True), (torch.float16, True), (torch.float32, False)]
    )
    def test_gradients_of_long_sequences(self, dtype, causal, absent):
        seqlen = 3000 if causal else 4096
        inputs = make_inputs(1, 1, seqlen, seqlen, dtype, absent=absent)
        wanted = run(inputs, "torch", causal=causal, dtype=torch.float64)
        assert_accurate(inputs, run(inputs, "triton", causal=causal), wanted)

    def test_zeros_give_zeros(self):
        inputs = make_inputs(1, 2, 40, 40, torch.float16)
        inputs[0].zero_()
        inputs[1][0] = 0
        found = run(inputs, "triton")
        assert all(torch.isfinite(x).all() for x in found)
        assert not found[0].any()

    def test_only_the_wanted_gradients(self):
        u, taps, d, in_gate, out_gate = make_inputs(2, 2, 40, 30, torch.float32)
        wanted = run([u, taps, d, in_gate, out_gate], "triton")
        (x,) = leaves(u)
        weights = Draw(seed=1).normal(*u.shape).bfloat16()
        (call(x, taps, d, in_gate, out_gate, impl="triton").double() * weights).sum().backward()
        assert torch.equal(x.grad, wanted[1])

    def test_an_empty_batch(self):
        inputs = make_inputs(0, 2, 40, 30, torch.float32)
        y, *gradients = run(inputs, "triton")
        assert y.shape == (0, 2, 40)
        assert all(gradient.shape == x.shape for gradient, x in zip(gradients, inputs, strict=True))
        assert not gradients[1].any()

    def test_refusals(self):
        with pytest.raises(UnsupportedError, match="not float64"):
            fft_conv(torch.zeros(1, 2, 20).double(), torch.zeros(2, 20), impl="triton")
        with pytest.raises(
            UnsupportedError, match=r"up to 524288 samples in torch\.float32, and to wrap around adds K - 1"
        ):
            fft_conv(torch.zeros(1, 1, 2**19 - 5), torch.zeros(1, 20), causal=False, impl="triton")


class TestPlan:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_every_length_has_sizes(self, dtype):
        device = torch.device("cpu")
        limit = longest_in_one(dtype, device)
        for length in (1, 255, 256, 257, 1000, 4096, limit):
            forward, backward = forward_plan(length, dtype, device), backward_plan(length, dtype, device)
            assert forward.n_fft == backward.n_fft
            assert length <= forward.n_fft < max(2 * length, 257)
        for length in (limit + 1, 2 * limit, 100_003, longest(dtype, device)):
            plan = long_plan(length, dtype)
            assert length <= plan.n_fft < 2 * length
            assert plan.inner <= limit
            assert plan.inner % plan.block == 0

    def test_small_devices_take_small_matrices(self, monkeypatch):
        module = import_module("hippos.ops.fft_conv.plan")
        monkeypatch.setattr(module, "has_large_shared_memory", lambda device: False)
        for dtype, length in itertools.product([torch.float16, torch.float32], [1, 1000, 4096]):
            for plan in (forward_plan(length, dtype, "cuda"), backward_plan(length, dtype, "cuda")):
                assert plan.n_fft >= length
                assert max(plan.rows, plan.cols) <= 64
                assert plan.stages == 1
        assert longest_in_one(torch.float16, "cuda") == 4096

    def test_programs_take_every_sequence_once(self):
        for n_heads, batch in itertools.product([1, 3, 768, 100_000], [1, 2, 7, 128]):
            for most in (None, 1, -(-batch // 4)):
                count = forward_plan(512, torch.float16, torch.device("cpu")).per_program(
                    n_heads, batch, most_splits=most
                )
                assert 1 <= count <= batch
                assert most is None or -(-batch // count) <= most


class TestOperator:
    """Registration, on any device: without a GPU the operator runs torch.fft."""

    @pytest.mark.skipif(INTERPRETED, reason="opcheck's tracing does not run Triton's interpreter")
    @pytest.mark.parametrize("absent", [(), (2, 3, 4)])
    def test_opcheck(self, absent):
        inputs = leaves(*make_inputs(2, 2, 20, 7, torch.float32, absent=absent))
        opcheck(fft_conv_kernel_op, (*inputs, True))

    @pytest.mark.skipif(INTERPRETED, reason="checks what stands in for the kernels")
    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("absent", [(), (3,), (2, 4)])
    def test_without_kernels(self, causal, absent):
        inputs = make_inputs(2, 2, 20, 7, torch.float32, absent=absent)
        x = leaves(*inputs)
        y = fft_conv_triton(*x, causal)
        (y.double() * Draw(seed=1).normal(*y.shape).bfloat16()).sum().backward()
        found = [y.detach(), *(None if t is None else t.grad for t in x)]
        assert_accurate(inputs, found, run(inputs, "reference", causal=causal, dtype=torch.float64))

    @pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on CPU tensors")
    def test_refuses_other_devices(self):
        with pytest.raises(UnsupportedError, match="needs CUDA tensors, got cpu"):
            fft_conv(torch.zeros(1, 2, 20), torch.zeros(2, 20), impl="triton")

    def test_no_second_derivative(self):
        inputs = leaves(*make_inputs(1, 1, 8, 3, torch.float32))
        (gradient,) = torch.autograd.grad(fft_conv_kernel_op(*inputs, True).sum(), inputs[0], create_graph=True)
        with pytest.raises(UnsupportedError, match="no second derivative"):
            gradient.sum().backward()

    def test_a_stack_is_one_call(self):
        inputs = [torch.stack([x, 2 * x]) for x in make_inputs(2, 2, 20, 7, torch.float32)]
        stacked = torch.vmap(lambda *x: fft_conv_kernel_op(*x, True))(*inputs)
        for i in range(2):
            single = fft_conv_kernel_op(*(x[i] for x in inputs), True)
            assert relative_error(stacked[i], single) < 1e-6


class TestGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(
        ("batch", "seqlen"),
        [(1, 1), (3, 2), (3, 63), (3, 64), (8, 65), (8, 512), (8, 1000), (3, 2048), (2, 4096), (5, 4097), (1, 100_003)],
    )
    def test_outputs_and_gradients(self, batch, seqlen, dtype):
        inputs = make_inputs(batch, 3, seqlen, seqlen, dtype, "cuda")
        wanted = run(inputs, "torch", dtype=torch.float64)
        assert_accurate(inputs, run(inputs, "triton"), wanted)

    @pytest.mark.parametrize(
        ("dtype", "seqlen"),
        [(torch.float32, 100), (torch.float16, 256), (torch.bfloat16, 1000), (torch.bfloat16, 1024),
         (torch.bfloat16, 8192), (torch.bfloat16, 20_001), (torch.float32, 32768)],
    )  # fmt: skip
    def test_circular(self, seqlen, dtype):
        inputs = make_inputs(3, 2, seqlen, seqlen, dtype, "cuda")
        wanted = run(inputs, "torch", causal=False, dtype=torch.float64)
        assert_accurate(inputs, run(inputs, "triton", causal=False), wanted)

    def test_channels_of_a_group_keep_apart(self):
        inputs = make_inputs(2, 24, 20_000, 20_000, torch.bfloat16, "cuda")
        assert_accurate(inputs, run(inputs, "triton"), run(inputs, "torch", dtype=torch.float64))

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_longest(self, dtype):
        seqlen = longest(dtype, torch.device("cuda"))
        inputs = make_inputs(2, 2, seqlen, seqlen, dtype, "cuda")
        wanted = run(inputs, "torch", dtype=torch.float64)
        # A GPU's own FFT is further from float64 than the CPU's, of which ROUNDING tells (1.5 times at 8,192 samples).
        assert_accurate(inputs, run(inputs, "triton"), wanted, plain=run(inputs, "torch"))

    @pytest.mark.parametrize("absent", [absent for n in range(1, 4) for absent in itertools.combinations((2, 3, 4), n)])
    def test_absent_arguments(self, absent):
        inputs = make_inputs(3, 2, 300, 200, torch.bfloat16, "cuda", absent=absent)
        assert_accurate(inputs, run(inputs, "triton"), run(inputs, "torch", dtype=torch.float64))

    @pytest.mark.parametrize("seqlen", [2000, 20_000])
    def test_gradients_are_bit_identical(self, seqlen):
        inputs = make_inputs(16, 8, seqlen, seqlen, torch.bfloat16, "cuda")
        first, second = run(inputs, "triton"), run(inputs, "triton")
        assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))

    def test_memory_left_unwritten_is_never_read(self):
        inputs = make_inputs(9, 4, 1001, 1001, torch.bfloat16, "cuda")
        first = run(inputs, "triton")
        waste = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
        del waste
        second = run(inputs, "triton")
        assert all(torch.equal(left, right) for left, right in zip(first, second, strict=True))

    def test_strided_inputs(self):
        u, taps, d, in_gate, out_gate = make_inputs(3, 4, 1000, 1000, torch.bfloat16, "cuda")
        stacked = torch.cat([u, in_gate, out_gate], dim=1).transpose(0, 1).contiguous().transpose(0, 1)  # (B, 3H, L)
        parts = stacked.chunk(3, dim=1)
        found = run([parts[0], taps, d, *parts[1:]], "triton")
        wanted = run([u, taps, d, in_gate, out_gate], "triton")
        assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))

    def test_float64_is_refused(self):
        inputs = make_inputs(1, 2, 20, 20, torch.float64, "cuda")
        with pytest.raises(UnsupportedError, match="not float64"):
            call(*inputs, impl="triton")

    def test_compiled_without_a_break(self):
        inputs = leaves(*make_inputs(2, 4, 500, 500, torch.bfloat16, "cuda"))
        compiled = torch.compile(lambda *x: call(*x, impl="triton"), fullgraph=True)
        y = compiled(*inputs)
        y.float().square().sum().backward()
        assert torch.equal(y, call(*inputs, impl="triton"))
        assert torch.isfinite(inputs[1].grad).all()

    def test_opcheck(self):
        opcheck(fft_conv_kernel_op, (*leaves(*make_inputs(2, 2, 200, 200, torch.float32, "cuda")), True))

    def test_captured_by_a_cuda_graph(self):
        inputs = make_inputs(2, 4, 500, 500, torch.bfloat16, "cuda")
        wanted = call(*inputs, impl="triton").clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call(*inputs, impl="triton")
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, wanted)

    @pytest.mark.parametrize("seqlen", [2048, 8192, 32768])
    def test_needs_little_memory(self, seqlen):
        inputs = make_inputs(8, 64, seqlen, seqlen, torch.bfloat16, "cuda")
        call(*inputs, impl="triton")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = call(*inputs, impl="triton")
        extra = torch.cuda.max_memory_allocated() - before - y.nbytes
        signals = 4 * y.nbytes
        assert extra <= 0.1 * signals + 64 * 32 * 1024

    @pytest.mark.slow
    def test_offsets_past_32_bits(self):
        shape = (3, 90_000, 8192)  # 2.2e9 samples
        u = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        tail = torch.randn(4, 8192, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
        u[-1, -4:] = tail
        taps = torch.randn(90_000, 100, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        y = fft_conv(u, taps, impl="triton")[-1:, -4:]
        wanted = fft_conv(tail[None].double(), taps[-4:].double(), impl="torch")
        assert relative_error(y.cpu(), wanted.cpu()) < 2 * ROUNDING[torch.bfloat16]
