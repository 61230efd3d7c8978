"""ssm_conv: the definition against NumPy, state passing against the definition, properties, and refusals."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from torch.library import opcheck

from hippos.errors import UnsupportedError
from hippos.ops import ssm_conv
from hippos.ops.chunks import Chunks
from hippos.ops.ssm_conv.choice import takes_fft
from hippos.ops.ssm_conv.chunked import Inputs, choose_chunk_len
from tests.ops.ssm_cases import (
    LENGTHS,
    PACKED,
    Draw,
    leaves,
    nan_memory,
    numpy_ssm_conv,
    relative_error,
    tolerance,
)

N_HEADS, N_MODES = 3, 4
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_inputs(random: Draw, batch: int, seqlen: int, n_states: int | None = None, dtype=torch.float64) -> Inputs:
    """All eight input tensors; parameters and states in float32 unless ``dtype`` is float64."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    signals = [random.normal(batch, N_HEADS, seqlen, dtype=dtype) for _ in range(3)]
    modes = random.modes(N_HEADS, N_MODES, dtype=exact)
    state = random.normal(n_states or batch, N_HEADS, N_MODES, 2, dtype=exact)
    return Inputs(signals[0], *modes, random.normal(N_HEADS, dtype=exact), *signals[1:], state)


def call(inputs: Inputs, bounds: list[int] | None = None, **options):
    u, log_a, b, c, d, in_gate, out_gate, initial_state = inputs
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    gates = {"in_gate": in_gate, "out_gate": out_gate}
    return ssm_conv(
        u, log_a, b, c, d, **gates, initial_state=initial_state, return_state=True, cu_seqlens=cu_seqlens, **options
    )


def outputs_and_gradients(inputs: Inputs, bounds: list[int] | None = None, *, dtype=None, **options) -> dict:
    """Outputs, and gradients of a random functional of them, by name; ``dtype`` casts the inputs first."""
    inputs = Inputs(*leaves(*inputs, dtype=dtype))
    y, state = call(inputs, bounds, **options)
    functional_of(y, state).backward()
    gradients = {f"d_{name}": tensor.grad for name, tensor in inputs._asdict().items() if tensor is not None}
    return {"y": y.detach(), "state": state.detach(), **gradients}


def functional_of(*outputs: torch.Tensor) -> torch.Tensor:
    """A random linear functional whose weights every dtype can represent."""
    weights = Draw(seed=1)
    return sum((x.double() * weights.normal(*x.shape).bfloat16()).sum() for x in outputs)


def assert_close(found: dict, wanted: dict) -> None:
    for name, tensor in found.items():
        error, limit = relative_error(tensor, wanted[name]), tolerance(wanted[name], tensor.dtype)
        assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.2e}"


def without(inputs: Inputs, absent: tuple[str, ...]) -> Inputs:
    return inputs._replace(**dict.fromkeys(absent))


class TestReference:
    @pytest.mark.parametrize("seqlen", [1, 2, 65])
    @pytest.mark.parametrize("absent", [(), ("d", "in_gate", "out_gate", "initial_state")])
    def test_is_the_convolution_sum(self, random, seqlen, absent):
        inputs = without(make_inputs(random, 3, seqlen), absent)
        for found, wanted in zip(call(inputs, impl="reference"), numpy_ssm_conv(*inputs), strict=True):
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-10, atol=1e-11)

    def test_packed_documents_are_convolution_sums(self, random):
        inputs = make_inputs(random, 1, PACKED[-1], n_states=len(PACKED) - 1)
        wanted = numpy_ssm_conv(*inputs, bounds=PACKED)
        for found, expected in zip(call(inputs, PACKED, impl="reference"), wanted, strict=True):
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-11)

    def test_gradients(self, random):
        inputs = leaves(*make_inputs(random, 2, 5))
        assert torch.autograd.gradcheck(lambda *tensors: call(Inputs(*tensors), impl="reference"), inputs)


class TestTorch:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("seqlen", LENGTHS)
    def test_is_the_definition(self, random, seqlen, dtype):
        inputs = make_inputs(random, 3 if seqlen < 200 else 1, seqlen, dtype=dtype)
        wanted = outputs_and_gradients(inputs, dtype=torch.float64, impl="reference")
        with nan_memory():
            found = outputs_and_gradients(inputs, impl="torch")
        assert found["y"].dtype == dtype
        assert found["state"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(found, wanted)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_packed_documents(self, random, dtype):
        inputs = make_inputs(random, 1, PACKED[-1], n_states=len(PACKED) - 1, dtype=dtype)
        wanted = outputs_and_gradients(inputs, PACKED, dtype=torch.float64, impl="reference")
        with nan_memory():
            assert_close(outputs_and_gradients(inputs, PACKED, impl="torch"), wanted)

    @pytest.mark.parametrize("chunk_len", [1, 4, 16], indirect=True)
    @pytest.mark.parametrize("bounds", [None, [0, 5, 5, 6, 22, 39]])
    @pytest.mark.parametrize(
        "absent",
        [
            absent
            for count in range(5)
            for absent in itertools.combinations(("d", "in_gate", "out_gate", "initial_state"), count)
        ],
        ids=lambda absent: "-".join(absent) or "all",
    )
    def test_optional_arguments(self, random, chunk_len, bounds, absent):
        inputs = make_inputs(random, 1, 39, n_states=1 if bounds is None else len(bounds) - 1)
        inputs = without(inputs, absent)
        wanted = outputs_and_gradients(inputs, bounds, impl="reference")
        assert_close(outputs_and_gradients(inputs, bounds, impl="torch"), wanted)

    @pytest.mark.parametrize("chunk_len", [4], indirect=True)
    def test_gradients(self, random, chunk_len):
        inputs = leaves(*make_inputs(random, 2, 11))
        assert torch.autograd.gradcheck(lambda *tensors: call(Inputs(*tensors), impl="torch"), inputs)

    @pytest.mark.parametrize("chunk_len", [2], indirect=True)
    @pytest.mark.parametrize("bounds", [None, [0, 40, 41, 41, 100]])
    def test_many_chunks_advance_in_groups(self, random, chunk_len, bounds, monkeypatch):
        monkeypatch.setattr(sys.modules["hippos.ops.ssm_conv.scan"], "MAX_STEPS", 5)
        inputs = make_inputs(random, 1, 100, n_states=1 if bounds is None else len(bounds) - 1)
        wanted = outputs_and_gradients(inputs, bounds, impl="reference")
        assert_close(outputs_and_gradients(inputs, bounds, impl="torch"), wanted)

    def test_strides(self, random):
        inputs = make_inputs(random, 2, 70)
        turned = inputs._replace(
            u=inputs.u.permute(2, 0, 1).contiguous().permute(1, 2, 0),
            in_gate=inputs.in_gate.transpose(0, 1).contiguous().transpose(0, 1),
            out_gate=torch.stack((inputs.out_gate, inputs.out_gate), dim=-1)[..., 1],
            c=inputs.c.transpose(0, 2).contiguous().transpose(0, 2),
            d=inputs.d[:, None].expand(-1, 2)[:, 0],
        )
        wanted, found = outputs_and_gradients(inputs, impl="torch"), outputs_and_gradients(turned, impl="torch")
        assert_close(found, wanted)
        expanded = inputs._replace(u=inputs.u[:1].expand(2, -1, -1))
        assert_close(outputs_and_gradients(expanded), outputs_and_gradients(expanded, impl="reference"))

    def test_gradients_are_the_same_every_time(self, random):
        inputs = make_inputs(random, 2, 300, dtype=torch.float32)
        first, second = outputs_and_gradients(inputs), outputs_and_gradients(inputs)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_only_some_gradients(self, random):
        inputs = make_inputs(random, 2, 70)
        wanted = outputs_and_gradients(inputs, impl="reference")
        for name in ("u", "log_a", "out_gate", "initial_state"):
            chosen = inputs._replace(**{name: getattr(inputs, name).clone().requires_grad_()})
            functional_of(*call(chosen)).backward()
            assert relative_error(getattr(chosen, name).grad, wanted[f"d_{name}"]) < 1e-12

    def test_autocast_changes_nothing(self, random):
        inputs = make_inputs(random, 2, 70, dtype=torch.float32)
        wanted = outputs_and_gradients(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = outputs_and_gradients(inputs)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    @pytest.mark.parametrize(
        ("bounds", "checks"),
        [
            (None, ("test_schema", "test_autograd_registration", "test_faketensor")),
            ([0, 5, 39], ("test_schema", "test_autograd_registration", "test_faketensor")),
            pytest.param(None, ("test_aot_dispatch_dynamic",), marks=pytest.mark.slow),
        ],
    )
    def test_operator_registration(self, random, bounds, checks):
        inputs = make_inputs(random, 1, 39, n_states=1 if bounds is None else 2, dtype=torch.float32)
        for tensors in (leaves(*inputs), leaves(*without(inputs, ("d", "in_gate", "out_gate", "initial_state")))):
            opcheck(torch.ops.hippos.ssm_conv_chunked.default, (*tensors, bounds, True, 8), test_utils=checks)

    def test_compiles_as_one_graph(self, random):
        inputs = make_inputs(random, 2, 70)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        with_gradients = Inputs(*leaves(*inputs))
        for found, wanted in zip(compiled(with_gradients), call(inputs), strict=True):
            torch.testing.assert_close(found.detach(), wanted)
            found.sum().backward(retain_graph=True)
        longer = make_inputs(random, 2, 90)
        torch.testing.assert_close(compiled(longer), call(longer))

    def test_exports_as_plain_pytorch(self, random):
        class Convolve(torch.nn.Module):
            def forward(self, *tensors):
                return call(Inputs(*tensors))

        inputs = make_inputs(random, 2, 70)
        program = torch.export.export(Convolve(), tuple(inputs))
        assert not [node for node in program.graph.nodes if "hippos" in str(node.target)]
        torch.testing.assert_close(program.module()(*inputs), call(inputs))

    def test_second_derivative_is_refused(self, random):
        inputs = Inputs(*leaves(*make_inputs(random, 1, 5)))
        y, _ = call(inputs)
        (d_u,) = torch.autograd.grad(y.square().sum(), inputs.u, create_graph=True)
        with pytest.raises(UnsupportedError, match="second derivative"):
            d_u.sum().backward()


class TestFft:
    """Without states and documents a short sequence takes an FFT: the same function with the same gradients."""

    @pytest.fixture(autouse=True)
    def take_fft(self, monkeypatch):
        monkeypatch.setattr(sys.modules["hippos.ops.ssm_conv.choice"], "takes_fft", lambda u, n_modes: True)

    @staticmethod
    def run(inputs: Inputs, **options) -> dict:
        u, log_a, b, c, d, in_gate, out_gate, _ = inputs = Inputs(*leaves(*inputs))
        y = ssm_conv(u, log_a, b, c, d, in_gate=in_gate, out_gate=out_gate, **options)
        functional_of(y).backward()
        gradients = {
            f"d_{name}": x.grad for name, x in inputs._asdict().items() if x is not None and x.grad is not None
        }
        return {"y": y.detach(), **gradients}

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("seqlen", [1, 2, 63, 65, 300])
    @pytest.mark.parametrize("absent", [(), ("d",), ("in_gate",), ("out_gate",), ("d", "in_gate", "out_gate")])
    def test_is_the_definition(self, random, seqlen, dtype, absent):
        inputs = without(make_inputs(random, 2, seqlen, dtype=dtype), absent)
        wanted = self.run(Inputs(*leaves(*inputs, dtype=torch.float64)), impl="reference")
        with nan_memory():
            found = self.run(inputs)
        assert found["y"].dtype == dtype
        assert_close(found, wanted)

    def test_compiles_as_one_graph_and_exports(self, random):
        class Convolve(torch.nn.Module):
            def forward(self, *tensors):
                return ssm_conv(*tensors)

        inputs = make_inputs(random, 2, 70)[:5]
        compiled = torch.compile(ssm_conv, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), ssm_conv(*inputs))
        program = torch.export.export(Convolve(), inputs)
        assert not [node for node in program.graph.nodes if "hippos" in str(node.target)]
        torch.testing.assert_close(program.module()(*inputs), ssm_conv(*inputs))


def test_fft_and_chunks_are_chosen_by_size():
    def choice(seqlen, n_modes, n_heads=1, device="cpu"):
        return takes_fft(torch.empty(1, n_heads, seqlen, device=device), n_modes)

    assert [choice(seqlen, 32) for seqlen in (64, 65, 2048, 2049)] == [False, True, True, False]
    assert [choice(2048, n_modes) for n_modes in (8, 31, 32, 64)] == [False, False, True, True]
    assert [choice(8192, n_modes, n_heads=513) for n_modes in (32, 64, 65)] == [False, False, True]
    assert not choice(1024, 32, device="meta")
    assert [choose_chunk_len(1, seqlen) for seqlen in (1, 2, 5, 900, 2048, 10**6)] == [1, 2, 8, 16, 32, 64]
    assert choose_chunk_len(1, 10**6, n_docs=10**5) == 16
    assert choose_chunk_len(64, 1024) == 64


class TestProperties:
    def test_causality(self, random):
        inputs = make_inputs(random, 2, 200)
        y, _ = call(inputs)
        changed = inputs._replace(u=torch.cat((inputs.u[..., :130], random.normal(2, N_HEADS, 70)), dim=-1))
        y_changed, _ = call(changed)
        assert torch.equal(y[..., :128], y_changed[..., :128])  # whole chunks before the change
        torch.testing.assert_close(y[..., :130], y_changed[..., :130], rtol=1e-12, atol=1e-12)
        assert (y[..., 130:] != y_changed[..., 130:]).all()

    def test_linearity(self, random):
        inputs = make_inputs(random, 2, 150)
        other = inputs._replace(u=random.normal(2, N_HEADS, 150), initial_state=random.normal(2, N_HEADS, N_MODES, 2))
        total = inputs._replace(u=2 * inputs.u - other.u, initial_state=2 * inputs.initial_state - other.initial_state)
        for first, second, both in zip(call(inputs), call(other), call(total), strict=True):
            torch.testing.assert_close(2 * first - second, both, rtol=1e-11, atol=1e-11)

    def test_any_split_is_the_whole(self, random):
        inputs = make_inputs(random, 2, 300)
        y, state = call(inputs)
        for _ in range(50):
            n_cuts = int(torch.randint(1, 8, (), generator=random.generator))
            cuts = torch.randperm(299, generator=random.generator)[:n_cuts].sort().values + 1
            pieces, carried = [], inputs.initial_state
            for left, right in itertools.pairwise([0, *cuts.tolist(), 300]):
                signals = {name: getattr(inputs, name)[..., left:right] for name in ("u", "in_gate", "out_gate")}
                piece, carried = call(inputs._replace(**signals, initial_state=carried))
                pieces.append(piece)
            torch.testing.assert_close(torch.cat(pieces, dim=-1), y, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(carried, state, rtol=1e-10, atol=1e-10)

    def test_gradients_flow_through_a_split(self, random):
        inputs = make_inputs(random, 1, 100)
        whole, split = Inputs(*leaves(*inputs)), Inputs(*leaves(*inputs))
        call(whole)[0].square().sum().backward()
        carried, total = split.initial_state, torch.zeros(())
        for span in (slice(0, 37), slice(37, 100)):
            signals = {name: getattr(split, name)[..., span] for name in ("u", "in_gate", "out_gate")}
            y, carried = call(split._replace(**signals, initial_state=carried))
            total = total + y.square().sum()
        total.backward()
        for left, right in zip(split, whole, strict=True):
            assert relative_error(left.grad, right.grad) < 1e-12

    def test_packed_is_separate(self, random):
        inputs = make_inputs(random, 1, PACKED[-1], n_states=len(PACKED) - 1)
        y, states = call(inputs, PACKED)
        for doc, (left, right) in enumerate(itertools.pairwise(PACKED)):
            if left == right:
                assert torch.equal(states[doc], inputs.initial_state[doc])
                continue
            signals = {name: getattr(inputs, name)[..., left:right] for name in ("u", "in_gate", "out_gate")}
            alone, state = call(inputs._replace(**signals, initial_state=inputs.initial_state[doc : doc + 1]))
            torch.testing.assert_close(y[..., left:right], alone, rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(states[doc], state[0], rtol=1e-11, atol=1e-11)

    def test_packing_pads_no_document_to_the_longest(self):
        bounds = [0, *range(1000, 1100)]
        chunks = Chunks(1, bounds[-1], 64, bounds, like=torch.zeros(()))
        assert chunks.n_rows <= bounds[-1] // 64 + len(bounds) - 1

    @pytest.mark.parametrize("impl", ["reference", "torch"])
    @pytest.mark.parametrize("log_modulus", [-torch.inf, -1e4, -80.0])
    def test_modes_that_forget_at_once(self, random, impl, log_modulus):
        inputs = make_inputs(random, 2, 150, dtype=torch.float32)
        inputs.log_a[:, 1:, 0] = log_modulus
        inputs.log_a[:, 1, 1] = 0.0
        found = outputs_and_gradients(inputs, impl=impl)
        assert all(tensor.isfinite().all() for tensor in found.values())
        y, state = numpy_ssm_conv(*inputs)
        assert relative_error(found["y"], torch.from_numpy(y)) < 5e-6
        assert relative_error(found["state"], torch.from_numpy(state)) < 5e-6

    @pytest.mark.slow
    def test_a_million_samples(self, random):
        inputs = make_inputs(random, 1, 2**20)
        y, state = call(inputs)
        half = 2**19 + 17
        signals = {name: getattr(inputs, name)[..., :half] for name in ("u", "in_gate", "out_gate")}
        first, carried = call(inputs._replace(**signals))
        signals = {name: getattr(inputs, name)[..., half:] for name in ("u", "in_gate", "out_gate")}
        second, last = call(inputs._replace(**signals, initial_state=carried))
        torch.testing.assert_close(torch.cat((first, second), dim=-1), y, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(last, state, rtol=1e-9, atol=1e-9)


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"u": torch.zeros(2, 3)}, ValueError, r"u must have shape \(B, H, L\).*got \(2, 3\)"),
            ({"u": torch.zeros(2, 3, 0)}, ValueError, r"at least one channel and one time step, got shape \(2, 3, 0\)"),
            ({"u": torch.zeros(2, 3, 5, dtype=torch.int64)}, TypeError, "u must have one of the dtypes.*got int64"),
            ({"u": torch.zeros(2, 3, 5, dtype=torch.complex64)}, TypeError, "got complex64"),
            ({"u": [1.0]}, TypeError, "u must be a tensor.*got list"),
            ({"u": torch.zeros(2, 3, 5, device="meta")}, ValueError, "log_a must be on meta.*got cpu"),
            ({"log_a": torch.zeros(4, 4, 2)}, ValueError, r"log_a must have shape \(H, M, 2\) = \(3, any, 2\)"),
            ({"log_a": torch.zeros(3, 0, 2)}, ValueError, "at least one channel and one mode"),
            ({"log_a": torch.zeros(3, 4, 2, dtype=torch.bfloat16)}, TypeError, "float32, float64, got bfloat16"),
            ({"b": torch.zeros(3, 5, 2)}, ValueError, r"b must have shape \(H, M, 2\) = \(3, 4, 2\), got \(3, 5, 2\)"),
            ({"c": torch.zeros(3, 4, dtype=torch.complex64)}, TypeError, "c must have one of the dtypes"),
            ({"d": torch.zeros(4)}, ValueError, r"d must have shape \(H\) = \(3\), got \(4,\)"),
            ({"in_gate": torch.zeros(2, 3, 6)}, ValueError, "in_gate must have shape"),
            ({"out_gate": torch.zeros(2, 3, 5, dtype=torch.bool)}, TypeError, "out_gate must have one of the dtypes"),
            ({"initial_state": torch.zeros(1, 3, 4, 2)}, ValueError, r"\(B, H, M, 2\) = \(2, 3, 4, 2\), got \(1,"),
            ({"initial_state": torch.zeros(2, 3, 4, 2).half()}, TypeError, "initial_state.*got float16"),
        ],
    )
    def test_tensors(self, random, change, error, message):
        with pytest.raises(error, match=message):
            call(make_inputs(random, 2, 5, dtype=torch.float32)._replace(**change))

    @pytest.mark.parametrize(
        ("cu_seqlens", "error", "message"),
        [
            (torch.tensor([0.0, 5.0]), TypeError, "cu_seqlens must have one of the dtypes int32, int64"),
            (torch.tensor([[0, 5]]), ValueError, r"cu_seqlens must have shape \(n_docs \+ 1\)"),
            (torch.tensor([0]), ValueError, "at least 2|>= 2 entries, got 1"),
            (torch.tensor([1, 5]), ValueError, "from 0 to L = 5, got 1 to 5"),
            (torch.tensor([0, 4]), ValueError, "from 0 to L = 5, got 0 to 4"),
            (torch.tensor([0, 3, 2, 5]), ValueError, "must not decrease, got 2 after 3"),
        ],
    )
    def test_documents(self, random, cu_seqlens, error, message):
        u, *modes = make_inputs(random, 1, 5)[:4]
        with pytest.raises(error, match=message):
            ssm_conv(u, *modes, cu_seqlens=cu_seqlens)

    def test_documents_in_a_batch(self, random):
        u, *modes = make_inputs(random, 2, 5)[:4]
        with pytest.raises(ValueError, match="B must be 1, got B = 2"):
            ssm_conv(u, *modes, cu_seqlens=torch.tensor([0, 5]))

    def test_states_count_documents(self, random):
        u, *modes = make_inputs(random, 1, 5)[:4]
        with pytest.raises(ValueError, match=r"\(n_docs, H, M, 2\) = \(2, 3, 4, 2\), got \(1, 3, 4, 2\)"):
            ssm_conv(u, *modes, initial_state=torch.zeros(1, 3, 4, 2), cu_seqlens=torch.tensor([0, 2, 5]))

    def test_implementations(self, random):
        u, *modes = make_inputs(random, 2, 5)[:4]
        with pytest.raises(ValueError, match="impl must be one of auto, reference, torch, triton, got 'cuda'"):
            ssm_conv(u, *modes, impl="cuda")
        with pytest.raises(UnsupportedError):
            ssm_conv(u, *modes, impl="triton")
