"""The Triton kernels of h3_mix against the definition: in Triton's interpreter, and on a GPU (marked gpu).

The interpreter is chosen when Triton is imported, so its tests run where TRITON_INTERPRET=1 is set:
``TRITON_INTERPRET=1 pytest tests/ops/test_h3_mix_triton.py``.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from hippos.errors import UnsupportedError
from hippos.ops import H3State, h3_mix
from hippos.ops.h3_mix.autograd import h3_mix_kernel_op, h3_mix_triton
from tests.ops.ssm_cases import PACKED, Draw, leaves, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(
    not (importlib.util.find_spec("triton") and INTERPRETED and not torch.cuda.is_available()),
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


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    shift_filter: Tensor
    shift_d: Tensor
    log_a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    past: Tensor | None
    initial: Tensor | None

    def to(self, device):
        return Inputs(*(None if x is None else x.to(device) for x in self))


def make_inputs(batch, d_model, seqlen, n_taps, n_modes, dtype, *, has_state=True, n_docs=None, seed=0) -> Inputs:
    n_states = batch if n_docs is None else n_docs
    random = Draw(seed=seed, dtype=torch.float32)
    signals = [random.normal(batch, d_model, seqlen, dtype=dtype) for _ in range(3)]
    layer = (random.normal(d_model, n_taps), random.normal(d_model), *random.modes(d_model, n_modes))
    past = random.normal(n_states, d_model, n_taps - 1, dtype=dtype)
    initial = random.normal(n_states, d_model, n_modes, 2)
    return Inputs(*signals, *layer, random.normal(d_model), *((past, initial) if has_state else (None, None)))


def call(inputs: Inputs, impl: str, *, return_state=True, bounds=None):
    state = None if inputs.past is None else H3State(inputs.past, inputs.initial)
    offsets = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=inputs.q.device)
    return h3_mix(*inputs[:9], initial_state=state, return_state=return_state, cu_seqlens=offsets, impl=impl)


def run(inputs: Inputs, impl: str, *, dtype=None, bounds=None) -> dict[str, Tensor]:
    """Output, state, and the gradients of a random functional of both."""
    inputs = Inputs(*leaves(*inputs, dtype=dtype))
    y, state = call(inputs, impl, bounds=bounds)
    weights = Draw(seed=1)
    loss = sum((x.double() * weights.normal(*x.shape).bfloat16().to(x.device)).sum() for x in (y, *state))
    loss.backward()
    gradients = {f"d_{name}": x.grad for name, x in inputs._asdict().items() if x is not None}
    return {"y": y.detach(), "shift": state.shift.detach(), "diag": state.diag.detach(), **gradients}


# The error that float32 rounded once to the dtype makes, and the multiples of it that issues allow.
ROUNDING = {torch.bfloat16: 1.65e-3, torch.float16: 2.1e-4}


def assert_accurate(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, tensor in found.items():
        if tensor is None or tensor.numel() == 0:
            continue
        is_gradient = name.startswith("d_")
        if dtype == torch.float32:
            limit = 1e-5 if is_gradient else 4e-6
        else:
            limit = (3 if is_gradient else 2) * ROUNDING[dtype]
            limit *= 1 if tensor.numel() > 256 else 3  # few numbers do not average their errors out
        error = relative_error(tensor.cpu(), wanted[name].cpu())
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.2e}"


@contextmanager
def no_waiting():
    """Make every wait for the GPU an error."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # setting the mode warns that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore"):
            torch.cuda.set_sync_debug_mode(mode)


@interpreter
class TestInterpreted:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(
        ("batch", "seqlen", "n_taps", "n_modes"),
        [(1, 1, 4, 3), (2, 2, 8, 4), (3, 63, 8, 4), (1, 64, 17, 3), (5, 65, 1, 4), (1, 300, 40, 4), (1, 2100, 8, 3)],
    )
    def test_outputs_and_gradients(self, batch, seqlen, n_taps, n_modes, dtype):
        inputs = make_inputs(batch, 2, seqlen, n_taps, n_modes, dtype)
        assert_accurate(run(inputs, "triton"), run(inputs, "reference", dtype=torch.float64), dtype)

    def test_without_a_state(self):
        inputs = make_inputs(2, 2, 70, 8, 4, torch.float32, has_state=False)
        assert_accurate(run(inputs, "triton"), run(inputs, "reference", dtype=torch.float64), torch.float32)

    def test_strides_of_projections(self):
        inputs = make_inputs(3, 4, 40, 8, 3, torch.float32)
        wanted = run(inputs, "triton")
        channels_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs[:3]]
        y, _ = call(inputs._replace(**dict(zip("qkv", channels_first, strict=True))), "triton")
        assert y.stride() == channels_first[0].stride()
        assert torch.equal(y, wanted["y"])
        late = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]  # time is not the fastest axis
        assert torch.equal(call(inputs._replace(**dict(zip("qkv", late, strict=True))), "triton")[0], wanted["y"])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(("n_taps", "has_state"), [(8, True), (40, True), (1, True), (20, False)])
    def test_packed_documents(self, n_taps, has_state, dtype):
        inputs = make_inputs(1, 2, PACKED[-1], n_taps, 4, dtype, has_state=has_state, n_docs=len(PACKED) - 1)
        wanted = run(inputs, "reference", dtype=torch.float64, bounds=PACKED)
        assert_accurate(run(inputs, "triton", bounds=PACKED), wanted, dtype)

    def test_a_mode_that_forgets_at_once(self):
        inputs = make_inputs(1, 1, 40, 4, 3, torch.float32)
        inputs.log_a[:, 0, 0] = -torch.inf
        found = run(inputs, "triton")
        assert all(torch.isfinite(tensor).all() for tensor in found.values())
        wanted = run(inputs, "reference", dtype=torch.float64)
        assert_accurate(found, wanted | {"d_log_a": found["d_log_a"]}, torch.float32)

    def test_any_split_gives_the_same(self):
        inputs = make_inputs(2, 2, 100, 8, 4, torch.float32)
        y, state = call(inputs, "reference")
        left, right = ([x[..., :33], x[..., 33:]] for x in (inputs.q, inputs.k)), inputs.v.split((33, 67), dim=-1)
        (q0, q1), (k0, k1) = left
        y0, middle = call(inputs._replace(q=q0, k=k0, v=right[0]), "triton")
        y1, last = call(inputs._replace(q=q1, k=k1, v=right[1], past=middle.shift, initial=middle.diag), "triton")
        assert relative_error(torch.cat((y0, y1), -1), y) < 1e-5
        assert relative_error(last.diag, state.diag) < 1e-5
        assert torch.equal(last.shift, state.shift)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"shift_filter": torch.zeros(2, 65), "past": None}, "up to 64 taps in torch.float32, got 65"),
            ({name: torch.zeros(1, 2, 20).double() for name in "qkv"} | {"past": None}, "not float64"),
            ({name: torch.zeros(2, 65, 2) for name in ("log_a", "b", "c")} | {"past": None}, "up to 32 modes"),
        ],
    )
    def test_refusals(self, change, message):
        inputs = make_inputs(1, 2, 20, 4, 3, torch.float32)._replace(**change)
        with pytest.raises(UnsupportedError, match=message):
            call(inputs, "triton")


@pytest.mark.skipif(INTERPRETED, reason="opcheck's tracing does not run Triton's interpreter")
class TestOperator:
    """Registration, on any device: without a GPU the operator runs the definition."""

    def test_opcheck(self):
        inputs = make_inputs(2, 2, 20, 4, 3, torch.float32)
        opcheck(h3_mix_kernel_op, (*leaves(*inputs), None, True, True))
        opcheck(h3_mix_kernel_op, (*leaves(*inputs)[:9], None, None, None, False, True))

    def test_opcheck_of_packed_documents(self):
        inputs, offsets = make_inputs(1, 2, 20, 4, 3, torch.float32, n_docs=3), torch.tensor([0, 5, 5, 20])
        opcheck(h3_mix_kernel_op, (*leaves(*inputs), offsets, True, True))

    def test_packed_documents_by_the_operator(self):
        bounds = [0, 5, 5, 48]
        inputs = Inputs(*leaves(*make_inputs(1, 2, 48, 4, 3, torch.float32, n_docs=3)))
        y, state = h3_mix_triton(*inputs[:9], 1, H3State(*inputs[9:]), torch.tensor(bounds), True)
        (y.square().sum() + state.diag.sum()).backward()
        exact = Inputs(*leaves(*inputs))
        want, last = call(exact, "reference", bounds=bounds)
        (want.square().sum() + last.diag.sum()).backward()
        assert relative_error(y, want) < 1e-5
        assert relative_error(state.diag, last.diag) < 1e-5
        assert torch.equal(state.shift, last.shift)
        for found, wanted in zip(inputs, exact, strict=True):
            assert relative_error(found.grad, wanted.grad) < 1e-5

    def test_the_operator_is_the_mixing(self):
        inputs = make_inputs(2, 2, 48, 4, 3, torch.float32)
        tensors = leaves(*inputs)
        y, _, _ = h3_mix_kernel_op(*tensors, None, False, True)
        y.sin().sum().backward()
        wanted = Inputs(*leaves(*inputs))
        want, _ = call(wanted, "reference")
        want.sin().sum().backward()
        assert relative_error(y, want) < 1e-5
        for found, exact in zip(tensors, wanted, strict=True):
            assert relative_error(found.grad, exact.grad) < 1e-5

    def test_compiled_without_a_break(self):
        inputs = Inputs(*leaves(*make_inputs(2, 2, 37, 4, 3, torch.float32)))

        def mix(*x):
            return h3_mix_triton(*x[:9], 1, H3State(*x[9:]), None, True)

        y, state = torch.compile(mix, backend="aot_eager", fullgraph=True)(*inputs)
        wanted, last = mix(*inputs)
        assert torch.equal(y, wanted)
        assert relative_error(state.diag, last.diag) < 1e-6
        (y.sin().sum() + state.diag.sin().sum() + state.shift.sum()).backward()
        assert all(torch.isfinite(x.grad).all() for x in inputs)

    def test_the_cpu_is_refused(self):
        with pytest.raises(UnsupportedError, match="needs CUDA tensors, got cpu"):
            call(make_inputs(1, 2, 20, 4, 3, torch.float32), "triton")

    def test_no_second_derivative(self):
        inputs = leaves(*make_inputs(1, 1, 8, 4, 3, torch.float32))
        y, _, _ = h3_mix_kernel_op(*inputs, None, False, True)
        (gradient,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
        with pytest.raises(UnsupportedError, match="no second derivative"):
            gradient.sum().backward()


class TestGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(
        ("batch", "seqlen"), [(3, 1), (3, 2), (3, 63), (3, 64), (3, 65), (3, 1000), (20, 1000), (1, 4097), (2, 9000)]
    )
    def test_outputs_and_gradients(self, batch, seqlen, dtype):
        inputs = make_inputs(batch, 3, seqlen, 64, 32, dtype)
        wanted = run(inputs, "torch", dtype=torch.float64)
        assert_accurate(run(inputs.to("cuda"), "triton"), wanted, dtype)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("n_taps", "n_modes"), [(1, 5), (16, 16), (128, 64)])
    def test_sizes(self, n_taps, n_modes, dtype):
        inputs = make_inputs(2, 3, 1000, n_taps, n_modes, dtype)
        wanted = run(inputs, "torch", dtype=torch.float64)
        assert_accurate(run(inputs.to("cuda"), "triton"), wanted, dtype)

    def test_without_a_state(self):
        inputs = make_inputs(3, 2, 1000, 64, 32, torch.bfloat16, has_state=False)
        wanted = run(inputs, "torch", dtype=torch.float64)
        assert_accurate(run(inputs.to("cuda"), "triton"), wanted, torch.bfloat16)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_no_channel_is_far_off(self, dtype):
        inputs = make_inputs(4, 64, 4096, 64, 32, dtype, has_state=False)
        exact = Inputs(*(None if x is None else x.cuda().double() for x in inputs))
        wanted = call(exact, "torch", return_state=False)
        found = call(inputs.to("cuda"), "triton", return_state=False)
        plain = relative_error(wanted.to(dtype), wanted)
        errors = (found.double() - wanted).norm(dim=(0, 2)) / wanted.norm(dim=(0, 2))
        assert relative_error(found, wanted) <= 2 * plain
        assert float(errors.max()) <= 2.5 * plain

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("has_state", [True, False])
    def test_packed_documents(self, has_state, dtype):
        bounds = [*PACKED, 4000, 4001, 5000]
        inputs = make_inputs(1, 3, 5000, 64, 32, dtype, has_state=has_state, n_docs=len(bounds) - 1)
        wanted = run(inputs, "torch", dtype=torch.float64, bounds=bounds)
        found = run(inputs.to("cuda"), "triton", bounds=bounds)
        assert_accurate(found, wanted, dtype)
        again = run(inputs.to("cuda"), "triton", bounds=bounds)
        assert all(torch.equal(found[name], again[name]) for name in found)

    @pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # advice of the compiler
    def test_packed_documents_compiled_and_without_waiting(self, monkeypatch):
        monkeypatch.setenv("HIPPOS_DEBUG", "0")
        bounds = [0, 700, 1000]
        inputs = Inputs(*leaves(*make_inputs(1, 3, 1000, 64, 32, torch.bfloat16, n_docs=2).to("cuda")))
        offsets = torch.tensor(bounds, dtype=torch.int32, device="cuda")

        def mix(*x):
            return h3_mix(*x[:9], initial_state=H3State(*x[9:]), return_state=True, cu_seqlens=offsets)

        wanted, last = call(inputs, "triton", bounds=bounds)
        with no_waiting():
            y, state = mix(*inputs)
        assert torch.equal(y, wanted)
        y, state = torch.compile(mix, fullgraph=True)(*inputs)
        assert torch.equal(y, wanted)
        assert relative_error(state.diag, last.diag) < 1e-5

    def test_bad_offsets_stay_in_bounds(self, monkeypatch):
        monkeypatch.setenv("HIPPOS_DEBUG", "0")
        inputs = make_inputs(1, 3, 1000, 64, 32, torch.bfloat16, n_docs=4).to("cuda")
        for bounds in ([0, -5, 2000, 300, 10**6], [900, 800, 1000, 0, 1000]):
            run(inputs, "triton", bounds=bounds)
        torch.cuda.synchronize()

    @pytest.mark.slow
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_a_long_sequence(self, dtype):
        inputs = make_inputs(1, 2, 100_003, 64, 32, dtype)
        wanted = run(inputs, "torch", dtype=torch.float64)
        assert_accurate(run(inputs.to("cuda"), "triton"), wanted, dtype)

    def test_gradients_are_bit_identical(self):
        inputs = make_inputs(20, 3, 1000, 64, 32, torch.bfloat16).to("cuda")
        first, second = run(inputs, "triton"), run(inputs, "triton")
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_memory_left_unwritten_is_never_read(self):
        inputs = make_inputs(3, 3, 1000, 64, 32, torch.bfloat16).to("cuda")
        first = run(inputs, "triton")
        waste = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
        del waste
        second = run(inputs, "triton")
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_strides_of_projections(self):
        inputs = make_inputs(3, 3, 1000, 64, 32, torch.bfloat16).to("cuda")
        stacked = torch.cat(inputs[:3], dim=1).transpose(0, 1).contiguous().transpose(0, 1)  # (B, 3D, L)
        q, k, v = stacked.chunk(3, dim=1)
        found, wanted = run(inputs._replace(q=q, k=k, v=v), "triton"), run(inputs, "triton")
        assert all(torch.equal(found[name], wanted[name]) for name in found)

    def test_gradients_lie_in_memory_as_that_of_y(self):
        inputs = Inputs(*leaves(*make_inputs(3, 3, 1000, 64, 32, torch.bfloat16).to("cuda")))
        dout = Draw(seed=1).normal(3, 3, 1000, dtype=torch.bfloat16).cuda()
        y, _ = call(inputs, "triton")
        wanted = torch.autograd.grad(y, inputs[:3], dout, retain_graph=True)
        found = torch.autograd.grad(y, inputs[:3], dout.transpose(0, 1).contiguous().transpose(0, 1))
        for dx, want in zip(found, wanted, strict=True):
            assert dx.stride() == (1000, 3000, 1)
            assert torch.equal(dx, want)

    @pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # advice of the compiler
    def test_compiled_without_a_break(self):
        inputs = Inputs(*leaves(*make_inputs(3, 3, 1000, 64, 32, torch.bfloat16).to("cuda")))
        y, state = torch.compile(lambda *x: call(Inputs(*x), "triton"), fullgraph=True)(*inputs)
        (y.float().square().sum() + state.diag.square().sum()).backward()
        wanted, last = call(inputs, "triton")
        assert torch.equal(y, wanted)
        assert relative_error(state.diag, last.diag) < 1e-5
        assert torch.isfinite(inputs.log_a.grad).all()

    def test_opcheck(self):
        inputs = make_inputs(3, 3, 1000, 64, 32, torch.bfloat16).to("cuda")
        opcheck(h3_mix_kernel_op, (*leaves(*inputs), None, True, True))

    def test_captured_by_a_cuda_graph(self):
        inputs = make_inputs(3, 3, 1000, 64, 32, torch.bfloat16).to("cuda")
        wanted = run(inputs, "triton")
        static = Inputs(*leaves(*inputs))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, state = call(static, "triton")
            gradients = torch.autograd.grad(y, static, torch.ones_like(y), allow_unused=True)
        y.detach().zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, wanted["y"])
        assert torch.equal(state.diag, wanted["diag"])
        assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)

    @pytest.mark.slow
    def test_offsets_past_32_bits(self):
        shape = (3, 768, 1_000_000)  # 2.3e9 samples
        tail = make_inputs(1, 4, 2000, 64, 16, torch.bfloat16, has_state=False).to("cuda")
        layer = [x.repeat_interleave(192, dim=0) for x in tail[3:9]]
        q, k, v = (torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        for signal, end in zip((q, k, v), tail[:3], strict=True):
            signal[-1, -4:, -2000:] = end[0]
        for whole, part in zip(layer, tail[3:9], strict=True):
            whole[-4:] = part
        y = h3_mix(q, k, v, *layer, impl="triton")[-1:, -4:, -2000:]
        exact = Inputs(*(None if x is None else x.double() for x in tail))
        wanted = call(exact, "torch", return_state=False)
        assert relative_error(y, wanted) < 2 * ROUNDING[torch.bfloat16]
