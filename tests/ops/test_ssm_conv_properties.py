"""What ssm_conv keeps to whatever the numbers: causality, linearity, splits, documents, modes that forget at once."""

from __future__ import annotations

import itertools

import pytest
import torch

from hippos.ops.chunks import Chunks
from hippos.ops.ssm_conv.chunked import Inputs
from tests.ops.ssm_cases import PACKED, leaves, numpy_ssm_conv, relative_error
from tests.ops.ssm_conv_cases import N_HEADS, N_MODES, call, make_inputs, outputs_and_gradients


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
