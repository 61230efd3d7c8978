"""discretise: the two rules in complex arithmetic, the places where naive formulas lose digits, and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from hippos.errors import UnsupportedError
from hippos.ops import discretise, ssm_filter
from hippos.ops.discretise import discretise_op
from tests.ops.ssm_cases import Draw, relative_error


def rule(A: torch.Tensor, B: torch.Tensor, dt: torch.Tensor, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Abar and Bbar by the formulas as written, complex128."""
    A, B, dt = torch.view_as_complex(A.double()), torch.view_as_complex(B.double()), dt.double()[:, None]
    if method == "bilinear":
        return (1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2)
    return torch.exp(dt * A), B * (torch.exp(dt * A) - 1) / A


def poles(random: Draw, n_heads: int = 5, n_modes: int = 7, dtype=torch.float64):
    A = torch.stack((-random.normal(n_heads, n_modes).exp(), 3 * random.normal(n_heads, n_modes)), dim=-1)
    return A.to(dtype), random.normal(n_heads, n_modes, 2, dtype=dtype), random.normal(n_heads, dtype=dtype).exp()


@pytest.mark.parametrize("method", ["bilinear", "zoh"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_is_the_rule(random, method, dtype, limit):
    A, B, dt = poles(random, dtype=dtype)
    log_a, b = discretise(A, B, dt, method=method)
    abar, bbar = rule(A, B, dt, method)
    assert log_a.dtype == b.dtype == dtype
    found = torch.polar(log_a[..., 0].double().exp(), log_a[..., 1].double())
    assert relative_error(torch.view_as_real(found), torch.view_as_real(abar)) < limit
    assert relative_error(b, torch.view_as_real(bbar)) < limit


@pytest.mark.parametrize("method", ["bilinear", "zoh"])
def test_gradients(random, method):
    inputs = [x.requires_grad_() for x in poles(random, 2, 3)]
    assert torch.autograd.gradcheck(lambda *tensors: discretise(*tensors, method=method), inputs)


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-4, 1e-6])
def test_bilinear_keeps_digits_of_slow_modes(size):
    """log Abar = 2 artanh(z) = 2 (z + z^3/3 + ...) with z = dt A / 2; |Abar| rounded to float32 first would lose it."""
    A = torch.tensor([[[-1.0, 0.7]]])
    log_a, _ = discretise(A, torch.ones(1, 1, 2), torch.tensor([size]))
    z = complex(-1.0, torch.tensor(0.7).item()) * torch.tensor(size).item() / 2
    wanted = 2 * sum(z**k / k for k in range(1, 30, 2))
    assert log_a[0, 0, 0].item() == pytest.approx(wanted.real, rel=5e-7)
    assert log_a[0, 0, 1].item() == pytest.approx(wanted.imag, rel=5e-7)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_bilinear_keeps_digits_of_fast_modes(distance):
    """Near dt A = -2, Abar is small; log |Abar| must still be right to float32."""
    real = torch.tensor(-2 + distance)
    log_a, _ = discretise(torch.tensor([[[real, 0.0]]]), torch.ones(1, 1, 2), torch.ones(1))
    x = real.item() / 2
    assert log_a[0, 0, 0].item() == pytest.approx(math.log((1 + x) / (1 - x)), rel=1e-6)


@pytest.mark.parametrize("method", ["bilinear", "zoh"])
@pytest.mark.parametrize("pole", [(-2.0, 0.0), (-2.0, 1e-30), (0.0, 0.0), (-1e-20, 0.0), (-1e4, 0.0), (-1e4, 1e4)])
def test_extreme_poles_give_numbers(method, pole):
    A = torch.tensor([[pole]], requires_grad=True)
    B, C = torch.ones(1, 1, 2, requires_grad=True), torch.ones(1, 1, 2)
    dt = torch.ones(1, requires_grad=True)
    log_a, b = discretise(A, B, dt, method=method)
    taps = ssm_filter(log_a, b, C, 5)
    taps.sum().backward()
    for tensor in (taps, b, A.grad, B.grad, dt.grad):
        assert tensor.isfinite().all()


def test_bilinear_pole_that_forgets_at_once():
    log_a, b = discretise(torch.tensor([[[-2.0, 0.0]]]), torch.ones(1, 1, 2), torch.ones(1))
    assert log_a[0, 0].tolist() == [-math.inf, 0.0]
    assert b[0, 0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-3, 0.2, 0.49, 0.51])
def test_zoh_input_weight_near_zero(size):
    """(exp(z) - 1) / z and its derivative by their series, on both sides of the switch between formulas."""
    z = complex(-0.6, 0.8) * size
    A = torch.tensor([[[z.real, z.imag]]], dtype=torch.float64, requires_grad=True)
    B = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    _, b = discretise(A, B, torch.ones(1, dtype=torch.float64), method="zoh")
    wanted = sum(z**k / math.factorial(k + 1) for k in range(30))
    slope = sum(k * z ** (k - 1) / math.factorial(k + 1) for k in range(1, 30))
    assert complex(*b[0, 0].tolist()) == pytest.approx(wanted, rel=1e-14)
    (gradient,) = torch.autograd.grad(b[0, 0, 0], A)
    assert complex(*gradient[0, 0].tolist()) == pytest.approx(slope.conjugate(), rel=1e-14)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"A": torch.zeros(2, 3)}, ValueError, r"A must have shape \(H, M, 2\)"),
        ({"A": torch.zeros(2, 3, 2).half()}, TypeError, "A must have one of the dtypes float32, float64, got float16"),
        ({"B": torch.zeros(2, 4, 2)}, ValueError, r"B must have shape \(H, M, 2\) = \(2, 3, 2\), got \(2, 4, 2\)"),
        ({"dt": torch.zeros(3)}, ValueError, r"dt must have shape \(H\) = \(2\), got \(3,\)"),
        ({"dt": torch.zeros(2, device="meta")}, ValueError, "dt must be on cpu.*got meta"),
        ({"method": "euler"}, ValueError, "method must be 'bilinear' or 'zoh', got 'euler'"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"A": torch.zeros(2, 3, 2), "B": torch.zeros(2, 3, 2), "dt": torch.ones(2)} | change
    with pytest.raises(error, match=message):
        discretise(**arguments)


@pytest.mark.parametrize("is_zoh", [True, False])
def test_operator(random, is_zoh):
    inputs = [x.requires_grad_() for x in poles(random, 2, 3)]
    torch.library.opcheck(discretise_op, (*inputs, is_zoh))


@pytest.mark.parametrize("method", ["bilinear", "zoh"])
def test_second_derivatives_are_refused(random, method):
    inputs = [x.requires_grad_() for x in poles(random, 2, 3)]
    _, b = discretise(*inputs, method=method)
    (gradient,) = torch.autograd.grad(b.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(UnsupportedError, match="discretise has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("method", ["bilinear", "zoh"])
def test_compilers_see_the_steps_and_get_the_same(random, method):
    A, B, dt = poles(random)
    A[0, 0], dt[0] = torch.tensor([-2.0, 0.0]), 1.0  # Abar = 0 for the bilinear rule
    weights = [random.normal(*A.shape) for _ in range(2)]
    weights[0][0, 0] = 0
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    def run(convert):
        tensors = [x.clone().requires_grad_() for x in (A, B, dt)]
        log_a, b = convert(*tensors)
        loss = (torch.where(log_a == -torch.inf, 0.0, log_a) * weights[0] + b * weights[1]).sum()
        return [log_a, b, *torch.autograd.grad(loss, tensors)]

    def convert(A, B, dt):
        return discretise(A, B, dt, method=method)

    torch.compiler.reset()
    found, wanted = (run(f) for f in (torch.compile(convert, backend=backend, fullgraph=True), convert))
    assert "hippos.discretise" not in seen[0].code
    for got, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.compiler.reset()
