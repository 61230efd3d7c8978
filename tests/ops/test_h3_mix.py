"""h3_mix: the definition against NumPy, the chunked form against the definition, splits, documents, and refusals."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from hippos.errors import UnsupportedError
from hippos.ops import H3State, h3_mix
from tests.ops.ssm_cases import LENGTHS, PACKED, Draw, leaves, nan_memory, numpy_ssm_conv, relative_error, tolerance

N_MODES = 3
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


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
    entering: Tensor | None

    @property
    def head_dim(self) -> int:
        return self.q.shape[1] // self.log_a.shape[0]


def make_inputs(random: Draw, batch, seqlen, *, head_dim=1, n_taps=8, n_states=None, dtype=torch.float64) -> Inputs:
    """Two heads; parameters and the diagonal states in float32 unless ``dtype`` is float64."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    n_heads, d_model = 2, 2 * head_dim
    outer = (head_dim, head_dim) if head_dim > 1 else ()
    return Inputs(
        *(random.normal(batch, d_model, seqlen, dtype=dtype) for _ in range(3)),
        random.normal(d_model, n_taps, dtype=exact),
        random.normal(d_model, dtype=exact),
        *random.modes(n_heads, N_MODES, dtype=exact),
        random.normal(n_heads, dtype=exact),
        random.normal(n_states or batch, d_model, n_taps - 1, dtype=dtype),
        random.normal(n_states or batch, n_heads, *outer, N_MODES, 2, dtype=exact),
    )


def call(inputs: Inputs, bounds: list[int] | None = None, **options) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, past, entering = inputs
    state = None if past is None else H3State(past, entering)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    y, (shift, diag) = h3_mix(
        *tensors,
        head_dim=inputs.head_dim,
        initial_state=state,
        return_state=True,
        cu_seqlens=cu_seqlens,
        **options,
    )
    return y, shift, diag


def outputs_and_gradients(inputs: Inputs, bounds=None, *, dtype=None, **options) -> dict[str, Tensor]:
    inputs = Inputs(*leaves(*inputs, dtype=dtype))
    y, shift, diag = call(inputs, bounds, **options)
    weights = Draw(seed=1)
    sum((x.double() * weights.normal(*x.shape).bfloat16()).sum() for x in (y, shift, diag)).backward()
    gradients = {f"d_{name}": x.grad for name, x in inputs._asdict().items() if x is not None and x.numel()}
    return {"y": y.detach(), "shift": shift.detach(), "diag": diag.detach(), **gradients}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, tensor in found.items():
        error, limit = relative_error(tensor, wanted[name]), tolerance(wanted[name], tensor.dtype)
        if name in ("d_k", "d_past"):
            limit *= 2  # gradients from the output and from the state are rounded, added, and rounded again
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.2e}"


def numpy_h3_mix(inputs: Inputs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over taps for the shift SSM, the convolution sum for each product, one channel after another."""
    q, k, v, taps, shift_d = (x.numpy() for x in inputs[:5])
    batch, d_model, seqlen = q.shape
    n_past, head_dim = taps.shape[1] - 1, inputs.head_dim
    past = np.zeros((batch, d_model, n_past)) if inputs.past is None else inputs.past.numpy()
    keys = np.concatenate((past, k), axis=-1)
    shifted = shift_d[:, None] * k
    for t, lag in itertools.product(range(seqlen), range(n_past + 1)):
        shifted[..., t] += taps[:, lag] * keys[..., n_past + t - lag]
    y, diag = np.zeros_like(q), np.zeros((batch, d_model // head_dim, head_dim, head_dim, N_MODES, 2))
    for h, i, j in itertools.product(range(d_model // head_dim), range(head_dim), range(head_dim)):
        row, column = h * head_dim + i, h * head_dim + j
        product = torch.from_numpy(shifted[:, row] * v[:, column])[:, None]
        modes = [x[h : h + 1] for x in (inputs.log_a, inputs.b, inputs.c, inputs.d)]
        entering = inputs.entering
        if entering is not None:
            entering = entering.reshape(batch, -1, head_dim, head_dim, N_MODES, 2)[:, h : h + 1, i, j]
        mixed, state = numpy_ssm_conv(product, *modes, initial_state=entering)
        y[:, column] += q[:, row] * mixed[:, 0]
        diag[:, h, i, j] = state[:, 0]
    return y, keys[..., seqlen:], diag[:, :, 0, 0] if head_dim == 1 else diag


class TestReference:
    @pytest.mark.parametrize("head_dim", [1, 2, 3])
    @pytest.mark.parametrize("seqlen", [1, 2, 20])
    @pytest.mark.parametrize("has_state", [True, False])
    def test_is_the_sum(self, random, seqlen, head_dim, has_state):
        inputs = make_inputs(random, 2, seqlen, head_dim=head_dim)
        if not has_state:
            inputs = inputs._replace(past=None, entering=None)
        for found, wanted in zip(call(inputs, impl="reference"), numpy_h3_mix(inputs), strict=True):
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-10, atol=1e-11)

    @pytest.mark.parametrize("head_dim", [1, 2])
    def test_gradients(self, random, head_dim):
        inputs = leaves(*make_inputs(random, 1, 4, head_dim=head_dim, n_taps=3))
        assert torch.autograd.gradcheck(lambda *tensors: call(Inputs(*tensors), impl="reference"), inputs)


class TestTorch:
    # The definition takes a second for 1000 steps, so that length has fewer cases.
    @pytest.mark.parametrize(
        ("seqlen", "dtype", "head_dim"),
        [*itertools.product(LENGTHS[:-1], DTYPES, (1, 2)), *((1000, dtype, 1) for dtype in DTYPES[:3])],
    )
    def test_is_the_definition(self, random, seqlen, dtype, head_dim):
        inputs = make_inputs(random, 3 if seqlen < 100 else 1, seqlen, head_dim=head_dim, dtype=dtype)
        wanted = outputs_and_gradients(inputs, dtype=torch.float64, impl="reference")
        with nan_memory():
            found = outputs_and_gradients(inputs, impl="torch")
        assert found["y"].dtype == found["shift"].dtype == dtype
        assert found["diag"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(found, wanted)

    @pytest.mark.parametrize("head_dim", [1, 3])
    @pytest.mark.parametrize("n_taps", [1, 2, 64, 100])
    @pytest.mark.parametrize("bounds", [None, PACKED])
    @pytest.mark.parametrize("has_state", [True, False])
    def test_windows_states_and_documents(self, random, head_dim, n_taps, bounds, has_state):
        n_states = None if bounds is None else len(bounds) - 1
        inputs = make_inputs(random, 1, PACKED[-1], head_dim=head_dim, n_taps=n_taps, n_states=n_states)
        if not has_state:
            inputs = inputs._replace(past=None, entering=None)
        wanted = outputs_and_gradients(inputs, bounds, impl="reference")
        with nan_memory():
            assert_close(outputs_and_gradients(inputs, bounds, impl="torch"), wanted)

    @pytest.mark.parametrize("head_dim", [1, 2])
    def test_gradients(self, random, head_dim):
        inputs = leaves(*make_inputs(random, 1, 4, head_dim=head_dim, n_taps=3))
        assert torch.autograd.gradcheck(lambda *tensors: call(Inputs(*tensors), impl="torch"), inputs)

    def test_strides(self, random):
        inputs = make_inputs(random, 3, 70, head_dim=2)
        turned = inputs._replace(
            q=inputs.q.permute(2, 0, 1).contiguous().permute(1, 2, 0),
            k=inputs.k.transpose(0, 1).contiguous().transpose(0, 1),
            v=torch.stack((inputs.v, inputs.v), dim=-1)[..., 1],
            shift_filter=inputs.shift_filter.T.contiguous().T,
            past=inputs.past.transpose(0, 2).contiguous().transpose(0, 2),
            entering=inputs.entering.transpose(0, 1).contiguous().transpose(0, 1),
        )
        assert_close(outputs_and_gradients(turned), outputs_and_gradients(inputs))

    def test_autocast_changes_nothing(self, random):
        inputs = make_inputs(random, 2, 70, head_dim=2, dtype=torch.float32)
        wanted = outputs_and_gradients(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = outputs_and_gradients(inputs)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    @pytest.mark.parametrize("bounds", [None, [0, 5, 39]])
    def test_operator_registration(self, random, bounds):
        inputs = Inputs(*leaves(*make_inputs(random, 1, 39, n_states=1 if bounds is None else 2)))
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        for past in (inputs.past, None):
            arguments = (inputs.k, inputs.shift_filter, past, bounds)
            opcheck(torch.ops.hippos.shift_conv.default, arguments, test_utils=checks)

    @pytest.mark.parametrize("head_dim", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_compiles_as_one_graph_and_exports(self, random, head_dim):
        class Mix(torch.nn.Module):
            def forward(self, *tensors):
                return call(Inputs(*tensors))

        inputs = make_inputs(random, 2, 70, head_dim=head_dim)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(inputs), call(inputs))
        program = torch.export.export(Mix(), tuple(inputs))
        assert not [node for node in program.graph.nodes if "hippos" in str(node.target)]
        torch.testing.assert_close(program.module()(*inputs), call(inputs))

    def test_second_derivative_is_refused(self, random):
        inputs = Inputs(*leaves(*make_inputs(random, 1, 5)))
        (d_q,) = torch.autograd.grad(call(inputs)[0].square().sum(), inputs.k, create_graph=True)
        with pytest.raises(UnsupportedError, match="second derivative"):
            d_q.sum().backward()


class TestProperties:
    @pytest.mark.parametrize("head_dim", [1, 2])
    def test_any_split_is_the_whole(self, random, head_dim):
        inputs = make_inputs(random, 2, 300, head_dim=head_dim, n_taps=16)
        y, shift, diag = call(inputs)
        for _ in range(50):
            n_cuts = int(torch.randint(1, 12, (), generator=random.generator))
            cuts = torch.randperm(299, generator=random.generator)[:n_cuts].sort().values + 1
            pieces, past, entering = [], inputs.past, inputs.entering
            for left, right in itertools.pairwise([0, *cuts.tolist(), 300]):
                signals = {name: getattr(inputs, name)[..., left:right] for name in "qkv"}
                piece, past, entering = call(inputs._replace(**signals, past=past, entering=entering))
                pieces.append(piece)
            torch.testing.assert_close(torch.cat(pieces, dim=-1), y, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(entering, diag, rtol=1e-10, atol=1e-10)
            assert torch.equal(past, shift)

    def test_gradients_flow_through_a_split(self, random):
        inputs = make_inputs(random, 1, 60)
        whole, split = Inputs(*leaves(*inputs)), Inputs(*leaves(*inputs))
        call(whole)[0].square().sum().backward()
        past, entering, total = split.past, split.entering, torch.zeros(())
        for span in (slice(0, 3), slice(3, 60)):
            signals = {name: getattr(split, name)[..., span] for name in "qkv"}
            y, past, entering = call(split._replace(**signals, past=past, entering=entering))
            total = total + y.square().sum()
        total.backward()
        for left, right in zip(split, whole, strict=True):
            assert relative_error(left.grad, right.grad) < 1e-12

    @pytest.mark.parametrize("head_dim", [1, 2])
    def test_packed_is_separate(self, random, head_dim):
        inputs = make_inputs(random, 1, PACKED[-1], head_dim=head_dim, n_states=len(PACKED) - 1)
        packed = call(inputs, PACKED)
        for doc, (left, right) in enumerate(itertools.pairwise(PACKED)):
            past, entering = inputs.past[doc : doc + 1], inputs.entering[doc : doc + 1]
            if left == right:
                assert torch.equal(packed[1][doc], past[0])
                assert torch.equal(packed[2][doc], entering[0])
                continue
            signals = {name: getattr(inputs, name)[..., left:right] for name in "qkv"}
            alone = call(inputs._replace(**signals, past=past, entering=entering))
            torch.testing.assert_close(packed[0][..., left:right], alone[0], rtol=1e-11, atol=1e-11)
            assert torch.equal(packed[1][doc], alone[1][0])
            torch.testing.assert_close(packed[2][doc], alone[2][0], rtol=1e-11, atol=1e-11)

    def test_causality(self, random):
        inputs = make_inputs(random, 2, 200, head_dim=2)
        before = call(inputs)[0]
        for name in "qkv":
            signal = getattr(inputs, name).clone()
            signal[..., 130:] = random.normal(2, 4, 70)
            after = call(inputs._replace(**{name: signal}))[0]
            torch.testing.assert_close(after[..., :130], before[..., :130], rtol=1e-12, atol=1e-12)
            assert (after[..., 130:] != before[..., 130:]).all()

    def test_linear_in_queries_and_values(self, random):
        inputs = make_inputs(random, 2, 100)._replace(past=None, entering=None)
        for name in "qv":
            other = random.normal(2, 2, 100)
            total = call(inputs._replace(**{name: 2 * getattr(inputs, name) - other}))[0]
            wanted = 2 * call(inputs)[0] - call(inputs._replace(**{name: other}))[0]
            torch.testing.assert_close(total, wanted, rtol=1e-11, atol=1e-11)

    def test_modes_that_forget_at_once(self, random):
        inputs = make_inputs(random, 2, 150, dtype=torch.float32)
        inputs.log_a[..., 0] = -math.inf
        assert all(x.isfinite().all() for x in outputs_and_gradients(inputs).values())


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"q": torch.zeros(2, 4)}, ValueError, r"q must have shape \(B, H, L\)"),
            ({name: torch.zeros(2, 4, 0) for name in "qkv"}, ValueError, "at least one channel and one time step"),
            ({"k": torch.zeros(2, 4, 6)}, ValueError, r"k must have shape \(B, D, L\) = \(2, 4, 5\), got \(2, 4, 6\)"),
            ({"v": torch.zeros(2, 4, 5).half()}, TypeError, "v must have the dtype of q, torch.float32, got"),
            ({"k": torch.zeros(2, 4, 5, dtype=torch.int64)}, TypeError, "k must have one of the dtypes"),
            ({"shift_filter": torch.zeros(3, 8)}, ValueError, r"shift_filter must have shape \(D, N\) = \(4, any\)"),
            ({"shift_filter": torch.zeros(4, 0)}, ValueError, "shift_filter needs at least one tap"),
            ({"shift_d": torch.zeros(5)}, ValueError, r"shift_d must have shape \(D\) = \(4\)"),
            ({"log_a": torch.zeros(4, 3, 2)}, ValueError, r"log_a must have shape \(H, M, 2\) = \(2, any, 2\)"),
            ({"b": torch.zeros(2, 3, 2).half()}, TypeError, "b must have one of the dtypes float32, float64"),
            ({"d": torch.zeros(4)}, ValueError, r"d must have shape \(H\) = \(2\)"),
            ({"head_dim": 3}, ValueError, "head_dim must be a positive divisor of D = 4, got 3"),
            ({"head_dim": 0}, ValueError, "head_dim must be a positive divisor of D = 4, got 0"),
            ({"head_dim": 2.0}, TypeError, "head_dim must be an integer, got float"),
            ({"impl": "flash"}, ValueError, "impl must be one of"),
            ({"impl": "triton"}, UnsupportedError, "h3_mix"),
            ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "B must be 1, got B = 2"),
            (
                {"initial_state": torch.zeros(2)},
                TypeError,
                r"initial_state must be an H3State\(shift, diag\), got Tensor",
            ),
            (
                {"initial_state": H3State(torch.zeros(2, 4, 8), torch.zeros(2, 2, 2, 2, 3, 2))},
                ValueError,
                r"initial_state.shift must have shape \(B or n_docs, D, N - 1\) = \(2, 4, 7\)",
            ),
            (
                {"initial_state": H3State(torch.zeros(2, 4, 7), torch.zeros(2, 2, 3, 2))},
                ValueError,
                r"initial_state.diag must have shape \(B or n_docs, H, P, P, M, 2\) = \(2, 2, 2, 2, 3, 2\)",
            ),
            (
                {"initial_state": H3State(torch.zeros(2, 4, 7), torch.zeros(2, 2, 2, 2, 3, 2).half())},
                TypeError,
                "initial_state.diag must have one of the dtypes float32, float64",
            ),
        ],
    )
    def test_arguments(self, random, change, error, message):
        inputs = make_inputs(random, 2, 5, head_dim=2, dtype=torch.float32)
        arguments = {name: x for name, x in inputs._asdict().items() if name not in ("past", "entering")}
        with pytest.raises(error, match=message):
            h3_mix(**(arguments | {"head_dim": 2} | change))
