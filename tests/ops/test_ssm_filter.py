"""ssm_filter and shift_filter: definitions, golden filters of the public reference, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.library import opcheck

from hippos.errors import UnsupportedError
from hippos.ops import discretise, shift_filter, ssm_conv, ssm_filter
from tests.ops.ssm_cases import leaves, nan_memory, numpy_filter, relative_error

IMPLS = ["reference", "torch"]
GOLDEN_CASES = [
    f"{init}_n{d_state}_{rule}_{values}"
    for init in ("diag-lin", "diag-inv", "diag-legs", "diag")
    for d_state in (16, 64)
    for rule in ("zoh", "bilinear")
    for values in ("init", "pert")
]


def golden_file(case: str) -> str:
    """The part of the filters that lies in this repository, or the whole file, for which HIPPOS_SHARED is needed."""
    return "kernels_h3repo_small" if "_n16_" in case and case.endswith("_pert") else "kernels_h3repo"


class TestDiagonal:
    @pytest.mark.parametrize("filter_len", [1, 2, 3, 8, 9, 63, 64, 65, 200])
    def test_definition(self, random, filter_len):
        modes = random.modes(3, 4)
        found = ssm_filter(*modes, filter_len, impl="reference")
        np.testing.assert_allclose(found.numpy(), numpy_filter(*modes, filter_len), rtol=1e-10, atol=1e-11)

    @pytest.mark.parametrize("filter_len", [1, 2, 63, 64, 65, 127, 128, 129, 1000, 5000])
    @pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
    def test_torch_is_the_definition(self, random, filter_len, dtype, limit):
        modes = random.modes(3, 4, dtype=dtype)
        weights = random.normal(3, filter_len)
        exact, fast = leaves(*modes, dtype=torch.float64), leaves(*modes)
        wanted = ssm_filter(*exact, filter_len, impl="reference")
        with nan_memory():
            found = ssm_filter(*fast, filter_len, impl="torch")
            (found * weights).sum().backward()
        (wanted * weights).sum().backward()
        assert found.dtype == dtype
        assert relative_error(found, wanted) < limit
        for left, right in zip(fast, exact, strict=True):
            assert relative_error(left.grad, right.grad) < 10 * limit

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("filter_len", [11, 70])  # a table of all powers, or two short ones
    def test_gradients(self, random, impl, filter_len):
        modes = leaves(*random.modes(2, 3))
        assert torch.autograd.gradcheck(lambda *tensors: ssm_filter(*tensors, filter_len, impl=impl), modes)

    @pytest.mark.parametrize("filter_len", [5, 70])
    def test_second_derivative_is_refused(self, random, filter_len):
        modes = leaves(*random.modes(2, 3))
        (d_b,) = torch.autograd.grad(ssm_filter(*modes, filter_len).square().sum(), modes[1], create_graph=True)
        with pytest.raises(UnsupportedError, match="second derivative"):
            d_b.sum().backward()

    def test_operator_registration(self, random):
        for filter_len in (1, 20):
            modes = leaves(*random.modes(2, 3))
            opcheck(torch.ops.hippos.ssm_filter.default, (*modes, filter_len))
            opcheck(torch.ops.hippos.ssm_filter_small.default, (*modes, filter_len))

    @pytest.mark.parametrize("impl", IMPLS)
    def test_strides_and_autocast(self, random, impl):
        modes = random.modes(3, 4, dtype=torch.float32)
        turned = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in modes]
        wanted = ssm_filter(*modes, 50, impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = ssm_filter(*turned, 50, impl=impl)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize("filter_len", [40, 70])
    def test_modes_that_forget_at_once(self, random, impl, filter_len):
        log_a, b, c = random.modes(2, 3)
        log_a[..., 0] = -torch.inf
        log_a.requires_grad_()
        taps = ssm_filter(log_a, b, c, filter_len, impl=impl)
        torch.testing.assert_close(taps[:, 0], 2 * (b * c * torch.tensor([1.0, -1.0])).sum((1, 2)))
        assert (taps[:, 1:] == 0).all()
        taps.sum().backward()
        assert (log_a.grad == 0).all()

    def test_is_the_impulse_response(self, random):
        modes = random.modes(3, 4)
        impulse = torch.zeros(1, 3, 150, dtype=torch.float64)
        impulse[..., 0] = 1
        torch.testing.assert_close(ssm_conv(impulse, *modes)[0], ssm_filter(*modes, 150))

    @pytest.mark.parametrize("filter_len", [20, 100])
    def test_compiles_as_one_graph(self, random, filter_len):
        modes = random.modes(3, 4)
        compiled = torch.compile(ssm_filter, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*modes, filter_len), ssm_filter(*modes, filter_len))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"filter_len": 0}, ValueError, "filter_len must be at least 1, got 0"),
            ({"filter_len": 4.0}, TypeError, "filter_len must be an integer, got float"),
            ({"b": torch.zeros(3, 5, 2)}, ValueError, "b must have shape"),
            ({"c": torch.zeros(3, 4, 2).bfloat16()}, TypeError, "c must have one of the dtypes"),
            ({"impl": "fast"}, ValueError, "impl must be one of"),
            ({"impl": "triton"}, UnsupportedError, "ssm_filter"),
        ],
    )
    def test_refusals(self, change, error, message):
        zeros = torch.zeros(3, 4, 2)
        with pytest.raises(error, match=message):
            ssm_filter(**({"log_a": zeros, "b": zeros, "c": zeros, "filter_len": 4} | change))


class TestGolden:
    """Filters, states and steps of the public reference code, with the tolerances that its README gives."""

    @staticmethod
    def parameters(tensors, case, rule, dtype):
        prefix = "f64/" if dtype == torch.float64 else ""
        A = tensors[f"{case}/{prefix}A"]
        B, C, log_dt = (tensors[f"{case}/param/{name}"].to(dtype) for name in ("B", "C", "log_dt"))
        rate_of = lambda rate: discretise(A, B.expand_as(A), rate * log_dt.exp(), method=rule)  # noqa: E731
        return rate_of, C[0], prefix

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
    @pytest.mark.parametrize("case", GOLDEN_CASES)
    def test_filters(self, golden, case, dtype, limit, impl):
        tensors, description = golden(golden_file(case))
        rule = description["cases"][case]["disc"]
        rate_of, C, prefix = self.parameters(tensors, case, rule, dtype)
        for name, rate in (("K", 1.0), ("K_rate2_L128", 2.0), ("K_rate0.5_L512", 0.5)):
            if f"{case}/{prefix}{name}" in tensors:
                wanted = tensors[f"{case}/{prefix}{name}"]
                found = ssm_filter(*rate_of(rate), C, wanted.shape[-1], impl=impl)
                assert (found - wanted).abs().max() <= limit * wanted.abs().max()

    @pytest.mark.parametrize("impl", IMPLS)
    @pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
    @pytest.mark.parametrize("case", [case for case in GOLDEN_CASES if "_n16_" in case])
    def test_states(self, golden, case, dtype, limit, impl):
        tensors, description = golden(golden_file(case))
        rate_of, C, prefix = self.parameters(tensors, case, description["cases"][case]["disc"], dtype)
        u, initial_state = (tensors[f"{case}/{name}"].to(dtype) for name in ("u", "state0"))
        modes = (*rate_of(1.0), C)
        y, state = ssm_conv(u, *modes, initial_state=initial_state, return_state=True, impl=impl)
        for found, name in ((y, "step_y"), (state, "step_state"), (state, "forward_state")):
            wanted = tensors[f"{case}/{prefix}{name}"]
            assert (found - wanted).abs().max() <= limit * wanted.abs().max()
        silent = ssm_conv(torch.zeros_like(u), *modes, initial_state=initial_state, impl=impl)
        wanted = tensors[f"{case}/{prefix}K_state_L40"]
        assert (silent - wanted).abs().max() <= limit * wanted.abs().max()

    @pytest.mark.parametrize("case", [f"shift_n{n}_{values}" for n in (8, 64) for values in ("init", "pert")])
    def test_shift(self, golden, case):
        tensors, _ = golden("kernels_h3repo_small")
        B, C = tensors[f"{case}/param/B"], tensors[f"{case}/param/C"][0]
        found = shift_filter(B, C)
        for filter_len in (5, 40):
            if f"{case}/K_L{filter_len}" in tensors:
                wanted = tensors[f"{case}/K_L{filter_len}"]
                padded = torch.nn.functional.pad(found, (0, filter_len))[:, : wanted.shape[-1]]
                torch.testing.assert_close(padded, wanted, rtol=3e-5, atol=3e-6)


class TestShift:
    @pytest.mark.parametrize("d_state", [1, 2, 8])
    def test_definition(self, random, d_state):
        b, c = random.normal(3, d_state), random.normal(3, d_state)
        wanted = [
            [sum(x[n] * y[n + lag] for n in range(d_state - lag)) for lag in range(d_state)]
            for x, y in zip(b, c, strict=True)
        ]
        torch.testing.assert_close(shift_filter(b, c), torch.tensor(wanted, dtype=torch.float64))

    def test_gradients(self, random):
        assert torch.autograd.gradcheck(shift_filter, leaves(random.normal(2, 4), random.normal(2, 4)))

    def test_autocast_changes_nothing(self, random):
        b, c = random.normal(3, 16, dtype=torch.float32), random.normal(3, 16, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = shift_filter(b, c)
        assert torch.equal(found, shift_filter(b, c))

    @pytest.mark.parametrize(
        ("b", "c", "error", "message"),
        [
            (torch.zeros(3), torch.zeros(3), ValueError, r"b must have shape \(D, N\)"),
            (torch.zeros(3, 0), torch.zeros(3, 0), ValueError, "at least one state"),
            (torch.zeros(3, 4), torch.zeros(3, 5), ValueError, r"c must have shape \(D, N\) = \(3, 4\), got \(3, 5\)"),
            (torch.zeros(3, 4).half(), torch.zeros(3, 4), TypeError, "got float16"),
        ],
    )
    def test_refusals(self, b, c, error, message):
        with pytest.raises(error, match=message):
            shift_filter(b, c)
