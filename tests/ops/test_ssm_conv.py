"""ssm_conv: the definition against NumPy, state passing and the FFT against the definition."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from torch.library import opcheck

from hippos.errors import UnsupportedError
from hippos.ops import ssm_conv
from hippos.ops.ssm_conv.choice import takes_fft
from hippos.ops.ssm_conv.chunked import Inputs, choose_chunk_len
from tests.ops.ssm_cases import LENGTHS, PACKED, leaves, nan_memory, numpy_ssm_conv, relative_error
from tests.ops.ssm_conv_cases import (
    DTYPES,
    assert_close,
    call,
    functional_of,
    make_inputs,
    outputs_and_gradients,
    without,
)


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
