"""The Triton kernels of h3_mix for heads of several channels: in Triton's interpreter, and on a GPU (marked gpu)."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from hippos.ops import H3State, h3_mix
from hippos.ops.h3_mix.autograd import h3_mix_triton
from hippos.ops.h3_mix.heads import h3_heads_kernel_op
from tests.ops.ssm_cases import PACKED, Draw, leaves, relative_error
from tests.ops.test_h3_mix_triton import INTERPRETED, ROUNDING, Inputs, assert_accurate, interpreter, no_waiting, on_gpu

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def make_inputs(batch, n_heads, head_dim, seqlen, n_taps, n_modes, dtype, *, has_state=True, n_docs=None) -> Inputs:
    random, d_model = Draw(dtype=torch.float32), n_heads * head_dim
    n_states = batch if n_docs is None else n_docs
    signals = [random.normal(batch, d_model, seqlen, dtype=dtype) for _ in range(3)]
    layer = (random.normal(d_model, n_taps), random.normal(d_model), *random.modes(n_heads, n_modes))
    past = random.normal(n_states, d_model, n_taps - 1, dtype=dtype)
    initial = random.normal(n_states, n_heads, head_dim, head_dim, n_modes, 2)
    return Inputs(*signals, *layer, random.normal(n_heads), *((past, initial) if has_state else (None, None)))


def call(inputs: Inputs, head_dim, impl, *, return_state=True, bounds=None):
    state = None if inputs.past is None else H3State(inputs.past, inputs.initial)
    offsets = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=inputs.q.device)
    options = {"head_dim": head_dim, "initial_state": state, "return_state": return_state, "cu_seqlens": offsets}
    return h3_mix(*inputs[:9], **options, impl=impl)


def run(inputs: Inputs, head_dim, impl, *, dtype=None, bounds=None):
    """Output, state, and the gradients of a random functional of both."""
    inputs = Inputs(*leaves(*inputs, dtype=dtype))
    y, state = call(inputs, head_dim, impl, bounds=bounds)
    weights = Draw(seed=1)
    loss = sum((x.double() * weights.normal(*x.shape).bfloat16().to(x.device)).sum() for x in (y, *state))
    loss.backward()
    gradients = {f"d_{name}": x.grad for name, x in inputs._asdict().items() if x is not None}
    return {"y": y.detach(), "shift": state.shift.detach(), "diag": state.diag.detach(), **gradients}


def counted(shift_keys, shifted: list[int]):
    """The function that shifts keys, noting how many channels it is given."""

    def shift(inputs, *others):
        shifted.append(inputs.k.shape[1])
        return shift_keys(inputs, *others)

    return shift


@interpreter
class TestInterpreted:
    @pytest.mark.parametrize(
        ("batch", "head_dim", "seqlen"), [(1, 2, 1), (5, 2, 37), (1, 3, 32), (1, 8, 20), (1, 2, 275)]
    )
    def test_outputs_and_gradients(self, batch, head_dim, seqlen):
        inputs = make_inputs(batch, 1, head_dim, seqlen, 8, 4, torch.float32)
        wanted = run(inputs, head_dim, "reference", dtype=torch.float64)
        assert_accurate(run(inputs, head_dim, "triton"), wanted, torch.float32)

    def test_half_precision(self):
        inputs = make_inputs(2, 2, 2, 70, 8, 4, torch.float16)
        wanted = run(inputs, 2, "reference", dtype=torch.float64)
        assert_accurate(run(inputs, 2, "triton"), wanted, torch.float16)

    def test_without_a_state(self):
        inputs = make_inputs(2, 1, 4, 40, 8, 3, torch.float32, has_state=False)
        assert_accurate(run(inputs, 4, "triton"), run(inputs, 4, "reference", dtype=torch.float64), torch.float32)

    @pytest.mark.parametrize(("head_dim", "dtype"), [(8, torch.float32), (2, torch.float16)])
    def test_few_heads_at_a_time(self, head_dim, dtype, monkeypatch):
        """So that shifted keys of some heads alone are in memory."""
        from hippos.ops.h3_mix import launch_heads

        inputs = make_inputs(2, 4, head_dim, 40, 8, 3, dtype)
        y, state = call(inputs, head_dim, "triton")
        shifted = []
        monkeypatch.setattr(launch_heads, "LEAST_PROGRAMS", 1)
        monkeypatch.setattr(launch_heads, "_shift_keys", counted(launch_heads._shift_keys, shifted))
        again, last = call(inputs, head_dim, "triton")
        assert max(shifted) <= inputs.q.shape[1] // 2
        assert sum(shifted) == inputs.q.shape[1]
        assert torch.equal(again, y)
        assert torch.equal(last.diag, state.diag)

    @pytest.mark.parametrize("has_state", [True, False])
    def test_packed_documents(self, has_state):
        inputs = make_inputs(1, 1, 3, 300, 8, 4, torch.float32, has_state=has_state, n_docs=len(PACKED) - 1)
        wanted = run(inputs, 3, "reference", dtype=torch.float64, bounds=PACKED)
        assert_accurate(run(inputs, 3, "triton", bounds=PACKED), wanted, torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="opcheck's tracing does not run Triton's interpreter")
class TestOperator:
    """Registration, on any device: without a GPU the operator runs the definition."""

    def test_opcheck(self):
        inputs = make_inputs(2, 2, 2, 20, 4, 3, torch.float32)
        opcheck(h3_heads_kernel_op, (*leaves(*inputs), None, 2, True))
        opcheck(h3_heads_kernel_op, (*leaves(*inputs)[:9], None, None, None, 2, False))

    def test_opcheck_of_packed_documents(self):
        inputs, offsets = make_inputs(1, 2, 2, 20, 4, 3, torch.float32, n_docs=3), torch.tensor([0, 5, 5, 20])
        opcheck(h3_heads_kernel_op, (*leaves(*inputs), offsets, 2, True))

    @pytest.mark.parametrize("has_state", [True, False])
    @pytest.mark.parametrize("bounds", [None, [0, 5, 5, 40, 48]])
    def test_the_operator_is_the_mixing(self, bounds, has_state):
        batch, n_docs = (2, None) if bounds is None else (1, 4)
        inputs = make_inputs(batch, 2, 2, 48, 4, 3, torch.float32, has_state=has_state, n_docs=n_docs)
        inputs = Inputs(*leaves(*inputs))
        offsets = None if bounds is None else torch.tensor(bounds)
        y, state = h3_mix_triton(*inputs[:9], 2, H3State(*inputs[9:]) if has_state else None, offsets, True)
        (y.square().sum() + state.diag.sum()).backward()
        exact = Inputs(*leaves(*inputs))
        want, last = call(exact, 2, "reference", bounds=bounds)
        (want.square().sum() + last.diag.sum()).backward()
        assert relative_error(y, want) < 1e-5
        assert relative_error(state.diag, last.diag) < 1e-5
        assert torch.equal(state.shift, last.shift)
        for found, wanted in zip(inputs, exact, strict=True):
            assert found is None or relative_error(found.grad, wanted.grad) < 1e-5


class TestGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(
        ("batch", "head_dim", "seqlen"), [(3, 2, 65), (3, 8, 1), (2, 8, 1000), (1, 5, 300), (2, 4, 2500), (1, 32, 130)]
    )
    def test_outputs_and_gradients(self, batch, head_dim, seqlen, dtype):
        inputs = make_inputs(batch, 2, head_dim, seqlen, 64, 32, dtype)
        wanted = run(inputs, head_dim, "torch", dtype=torch.float64)
        assert_accurate(run(inputs.to("cuda"), head_dim, "triton"), wanted, dtype)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_packed_documents(self, dtype):
        bounds = [*PACKED, 1500, 1501, 3000]
        inputs = make_inputs(1, 2, 4, 3000, 64, 32, dtype, n_docs=len(bounds) - 1)
        wanted = run(inputs, 4, "torch", dtype=torch.float64, bounds=bounds)
        assert_accurate(run(inputs.to("cuda"), 4, "triton", bounds=bounds), wanted, dtype)

    @pytest.mark.parametrize("head_dim", [2, 8, 64])
    def test_they_are_the_default(self, head_dim):
        inputs = make_inputs(2, 2, head_dim, 200, 64, 32, torch.bfloat16, has_state=False).to("cuda")
        found, wanted = (call(inputs, head_dim, impl, return_state=False) for impl in ("auto", "triton"))
        assert torch.equal(found, wanted)

    def test_gradients_are_bit_identical(self):
        inputs = make_inputs(5, 3, 8, 1500, 64, 32, torch.bfloat16).to("cuda")
        first, second = run(inputs, 8, "triton"), run(inputs, 8, "triton")
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_no_channel_is_far_off(self):
        inputs = make_inputs(2, 8, 8, 4096, 64, 32, torch.bfloat16, has_state=False)
        exact = Inputs(*(None if x is None else x.cuda().double() for x in inputs))
        wanted = call(exact, 8, "torch", return_state=False)
        found = call(inputs.to("cuda"), 8, "triton", return_state=False)
        plain = relative_error(wanted.to(torch.bfloat16), wanted)
        errors = (found.double() - wanted).norm(dim=(0, 2)) / wanted.norm(dim=(0, 2))
        assert relative_error(found, wanted) <= 2 * plain
        assert float(errors.max()) <= 2.5 * plain

    def test_bad_offsets_stay_in_bounds(self, monkeypatch):
        monkeypatch.setenv("HIPPOS_DEBUG", "0")
        inputs = make_inputs(1, 2, 4, 1000, 64, 32, torch.bfloat16, n_docs=4).to("cuda")
        for bounds in ([0, -5, 2000, 300, 10**6], [900, 800, 1000, 0, 1000]):
            run(inputs, 4, "triton", bounds=bounds)
        torch.cuda.synchronize()

    @pytest.mark.parametrize("head_dim", [2, 8, 16, 64])
    def test_memory_beside_inputs_and_output(self, head_dim):
        inputs = make_inputs(32, 512 // head_dim, head_dim, 1024, 64, 32, torch.bfloat16, has_state=False).to("cuda")
        call(inputs, head_dim, "triton", return_state=False)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = call(inputs, head_dim, "triton", return_state=False)
        extra = torch.cuda.max_memory_allocated() - before - y.nbytes
        assert extra <= 0.1 * 4 * y.nbytes + 512 * 32 * 1024

    @pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # advice of the compiler
    def test_compiled_captured_and_without_waiting(self):
        inputs = make_inputs(2, 2, 4, 1000, 64, 32, torch.bfloat16).to("cuda")
        wanted, last = call(inputs, 4, "triton")
        with no_waiting():
            call(inputs, 4, "triton")
        y, state = torch.compile(lambda *x: call(Inputs(*x), 4, "triton"), fullgraph=True)(*inputs)
        assert torch.equal(y, wanted)
        assert relative_error(state.diag, last.diag) < 1e-5
        static = Inputs(*leaves(*inputs))
        run(inputs, 4, "triton")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, state = call(static, 4, "triton")
            gradients = torch.autograd.grad(y, static, torch.ones_like(y), allow_unused=True)
        y.detach().zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, wanted)
        assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)
        assert relative_error(y, wanted) < ROUNDING[torch.bfloat16]
