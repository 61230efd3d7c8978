"""The Triton kernel of h3_step against the definition: in Triton's interpreter, and on a GPU (marked gpu).

Interpreted: ``TRITON_INTERPRET=1 pytest tests/ops/test_ssm_step_triton.py``.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch.library import opcheck

from hippos.errors import UnsupportedError
from hippos.ops import H3State, h3_step
from hippos.ops.ssm_step import h3_step_operators, h3_step_prepared
from hippos.ops.ssm_step.kernel_op import h3_step_op
from tests.ops.ssm_cases import Draw, relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(
    not (importlib.util.find_spec("triton") and INTERPRETED and not torch.cuda.is_available()),
    reason="needs Triton with TRITON_INTERPRET=1 and no CUDA device",
)
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# Float32 rounded once to the dtype makes this relative error on normal numbers; 2 of it are allowed.
ROUNDING = {torch.bfloat16: 1.65e-3, torch.float16: 2.1e-4, torch.float32: 1e-6}

LAYOUTS = {
    "contiguous": lambda state: state.clone(),
    "slots first": lambda state: state.movedim(-1, 0).contiguous().movedim(0, -1),
    "sequences inside": lambda state: state.transpose(0, 1).contiguous().transpose(0, 1),
}


def make_case(batch, d_model, n_taps, n_modes, dtype, device="cpu", seed=0):
    random = Draw(seed=seed, dtype=torch.float32)
    layer = (random.normal(d_model, n_taps), random.normal(d_model), *random.modes(d_model, n_modes))
    layer = (*layer, random.normal(d_model))
    shift = random.normal(batch, d_model, n_taps - 1, dtype=dtype)
    state = H3State(shift, random.normal(batch, d_model, n_modes, 2))
    tokens = [[random.normal(batch, d_model, dtype=dtype).to(device) for _ in range(3)] for _ in range(5)]
    return [x.to(device) for x in layer], H3State(*(x.to(device) for x in state)), tokens


def assert_steps_agree(case, *, layout="contiguous", is_ring=False, impl="triton"):
    layer, start, tokens = case
    dtype, n_past = tokens[0][0].dtype, start.shift.shape[-1]
    exact = H3State(*(x.double().cpu() for x in start))
    exact_layer = [x.double().cpu() for x in layer]
    state = H3State(*(LAYOUTS[layout](x) for x in start))
    addresses = [x.data_ptr() for x in state]
    position = torch.zeros((), dtype=torch.int64, device=start.diag.device)
    for qkv in tokens:
        wanted = h3_step(*(x.double().cpu() for x in qkv), exact, *exact_layer, impl="reference")
        found = h3_step(*qkv, state, *layer, ring_position=position if is_ring else None, impl=impl)
        assert found.dtype == dtype
        assert relative_error(found.cpu(), wanted) < 2 * ROUNDING[dtype]
        position += 1
    assert [x.data_ptr() for x in state] == addresses
    assert relative_error(state.diag.cpu(), exact.diag) < 2e-6
    if n_past:
        slots = torch.arange(n_past)
        order = slots.add(len(tokens)).remainder(n_past) if is_ring else slots
        assert torch.equal(state.shift.cpu()[..., order].double(), exact.shift)  # keys are only moved


@interpreter
class TestInterpreted:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("is_ring", [False, True])
    @pytest.mark.parametrize(
        ("batch", "d_model", "n_taps", "n_modes"), [(1, 3, 8, 4), (3, 20, 5, 3), (17, 33, 2, 1), (2, 5, 1, 2)]
    )
    def test_steps(self, batch, d_model, n_taps, n_modes, dtype, is_ring):
        assert_steps_agree(make_case(batch, d_model, n_taps, n_modes, dtype), is_ring=is_ring)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("is_ring", [False, True])
    def test_layouts(self, layout, is_ring):
        assert_steps_agree(make_case(3, 20, 8, 4, torch.float32), layout=layout, is_ring=is_ring)

    def test_strided_tokens(self):
        layer, start, tokens = make_case(3, 6, 8, 4, torch.float32)
        tokens = [[x.t().contiguous().t() for x in torch.cat(qkv, dim=1).chunk(3, dim=1)] for qkv in tokens]
        assert_steps_agree((layer, start, tokens))

    def test_a_mode_that_forgets_at_once(self):
        case = make_case(2, 3, 4, 2, torch.float32)
        case[0][2][:, 0, 0] = -torch.inf
        assert_steps_agree(case)

    @pytest.mark.parametrize(
        ("head_dim", "dtype", "message"),
        [(2, torch.float32, "it takes head_dim 1, got 2"), (1, torch.float64, "not float64")],
    )
    def test_refusals(self, head_dim, dtype, message):
        random = Draw(dtype=torch.float32)
        n_heads, outer = 4 // head_dim, (head_dim, head_dim) if head_dim > 1 else ()
        layer = (random.normal(4, 3), random.normal(4), *random.modes(n_heads, 2), random.normal(n_heads))
        state = H3State(random.normal(1, 4, 2, dtype=dtype), random.normal(1, n_heads, *outer, 2, 2))
        qkv = [random.normal(1, 4, dtype=dtype) for _ in range(3)]
        with pytest.raises(UnsupportedError, match=message):
            h3_step(*qkv, state, *layer, head_dim=head_dim, impl="triton")


class TestOperator:
    """Registration, on any device: without a GPU the operator runs the PyTorch step."""

    @pytest.mark.skipif(INTERPRETED, reason="opcheck's tracing does not run Triton's interpreter")
    @pytest.mark.parametrize("position", [None, torch.tensor(3)])
    def test_opcheck(self, position):
        layer, state, tokens = make_case(2, 3, 4, 2, torch.float32)
        taps, diag, _ = h3_step_operators(*layer)
        opcheck(h3_step_op, (*tokens[0], *state, position, taps, *diag))

    @pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on CPU tensors")
    def test_the_cpu_is_refused(self):
        layer, state, tokens = make_case(2, 3, 4, 2, torch.float32)
        with pytest.raises(UnsupportedError, match="needs CUDA tensors, got cpu"):
            h3_step(*tokens[0], state, *layer, impl="triton")


class TestGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize("is_ring", [False, True])
    @pytest.mark.parametrize("batch", [1, 3, 65])
    def test_steps(self, batch, dtype, is_ring):
        assert_steps_agree(make_case(batch, 200, 64, 32, dtype, "cuda"), is_ring=is_ring)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize(("n_taps", "n_modes"), [(128, 64), (1, 5), (64, 32)])
    def test_layouts_and_sizes(self, layout, n_taps, n_modes):
        case = make_case(20, 100, n_taps, n_modes, torch.bfloat16, "cuda")
        for is_ring in (False, True):
            assert_steps_agree(case, layout=layout, is_ring=is_ring)

    def test_auto_takes_it_and_torch_agrees(self):
        for impl in ("auto", "torch"):
            for is_ring in (False, True):
                assert_steps_agree(make_case(2, 40, 64, 32, torch.bfloat16, "cuda"), is_ring=is_ring, impl=impl)

    def test_captured_by_a_cuda_graph(self):
        layer, start, tokens = make_case(4, 40, 64, 32, torch.bfloat16, "cuda")
        states = [H3State(*(x.clone() for x in start)) for _ in range(2)]
        position, operators = torch.zeros(1, dtype=torch.int64, device="cuda"), h3_step_operators(*layer)
        static = [x.clone() for x in tokens[0]]
        h3_step_prepared(*static, H3State(*(x.clone() for x in start)), operators, ring_position=position)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = h3_step_prepared(*static, states[0], operators, ring_position=position)
            position += 1
        position.zero_()
        for state, fresh in zip(states[0], start, strict=True):
            state.copy_(fresh)
        for qkv in tokens:
            for x, new in zip(static, qkv, strict=True):
                x.copy_(new)
            graph.replay()
            assert torch.equal(y, h3_step_prepared(*qkv, states[1], operators))

    def test_preparing_copies_nothing_from_the_host(self):
        layer, _, _ = make_case(1, 40, 64, 32, torch.float32, "cuda")
        h3_step_operators(*layer)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            h3_step_operators(*layer)

    @pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # advice of the compiler
    def test_compiled_without_a_break(self):
        layer, start, tokens = make_case(4, 40, 64, 32, torch.bfloat16, "cuda")
        operators, position = h3_step_operators(*layer), torch.zeros((), dtype=torch.int64, device="cuda")
        states = [H3State(*(x.clone() for x in start)) for _ in range(2)]
        compiled = torch.compile(h3_step_prepared, fullgraph=True)
        for qkv in tokens:
            wanted = h3_step_prepared(*qkv, states[0], operators, ring_position=position)
            found = compiled(*qkv, states[1], operators, ring_position=position)
            assert relative_error(found, wanted) < 1e-3  # layouts, hence the order of sums, may differ
            position += 1
        assert torch.equal(states[0].shift, states[1].shift)
        assert relative_error(states[0].diag, states[1].diag) < 1e-6

    def test_opcheck(self):
        layer, state, tokens = make_case(2, 30, 4, 2, torch.float32, "cuda")
        taps, diag, _ = h3_step_operators(*layer)
        opcheck(h3_step_op, (*tokens[0], *state, torch.tensor(3, device="cuda"), taps, *diag))
