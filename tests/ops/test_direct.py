"""Operators called past PyTorch's dispatcher do what they do through it, and only where nothing else looks on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hippos.ops.direct import Direct

calls: list[str] = []


@torch.library.custom_op("hippos_tests::scaled_square", mutates_args=())
def scaled_square_op(x: Tensor, y: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    calls.append("forward")
    square = x * x * scale
    return square if y is None else square + y, x.new_empty(0)


@scaled_square_op.register_fake
def _shapes(x: Tensor, y: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0)


@torch.library.custom_op("hippos_tests::scaled_square_backward", mutates_args=())
def backward_op(x: Tensor, grad: Tensor, scale: float) -> Tensor:
    calls.append("backward")
    return 2 * scale * x * grad


@backward_op.register_fake
def _gradient_shape(x: Tensor, grad: Tensor, scale: float) -> Tensor:
    return torch.empty_like(x)


def _save(ctx, inputs, output):
    x, _, ctx.scale = inputs
    ctx.save_for_backward(x)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    dy = grad.clone() if ctx.needs_input_grad[1] else None
    return _gradient(ctx.saved_tensors[0], grad, ctx.scale), dy, None


def _refuse(ctx, *grads):
    raise RuntimeError("no second derivative")


scaled_square_op.register_autograd(_backward, setup_context=_save)
backward_op.register_autograd(_refuse)
scaled_square, _gradient = Direct(scaled_square_op, _save, _backward), Direct(backward_op)


@pytest.fixture
def dispatched(monkeypatch):
    """The calls that went through the dispatcher."""
    seen = []
    for direct in (scaled_square, _gradient):

        def spy(*arguments, op=direct._op):
            seen.append(op._name)
            return op(*arguments)

        monkeypatch.setattr(direct, "_op", spy)
    return seen


def make_inputs():
    return torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)


def test_values_and_gradients(dispatched):
    x, y = make_inputs()
    found = scaled_square(x, y, 3.0)[0]
    wanted = scaled_square_op(x, y, 3.0)[0]
    assert torch.equal(found, wanted)
    for got, want in zip(*(torch.autograd.grad(z.sum(), (x, y)) for z in (found, wanted)), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(scaled_square(x, None, 1.0)[0].sum(), x)[0], 2 * x)
    assert not dispatched


def test_without_gradients(dispatched):
    x, y = make_inputs()
    with torch.no_grad():
        assert not scaled_square(x, y, 1.0)[0].requires_grad
    assert not scaled_square(x.detach(), None, 1.0)[0].requires_grad
    with torch.inference_mode():
        scaled_square(x, y, 1.0)
    assert not dispatched


def test_a_second_derivative_is_refused():
    x, y = make_inputs()
    (dx,) = torch.autograd.grad(scaled_square(x, y, 1.0)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_modes_see_the_operator(dispatched):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    x, y = make_inputs()
    with Mode():
        scaled_square(x, y, 1.0)
    assert dispatched == ["scaled_square"]


def test_subclasses_see_the_operator(dispatched):
    class Subclass(Tensor):
        pass

    scaled_square(torch.ones(2).as_subclass(Subclass), None, 1.0)
    assert dispatched == ["scaled_square"]


def test_transforms_see_the_operator(dispatched):
    scaled_square_op.register_vmap(lambda info, dims, x, y, scale: ((x * x * scale, x.new_empty(0)), (0, None)))
    (value, _) = torch.vmap(lambda x: scaled_square(x, None, 1.0), out_dims=(0, None))(torch.ones(3, 2))
    assert torch.equal(value, torch.ones(3, 2))
    assert dispatched == ["scaled_square"]


def test_compilers_see_the_operator():
    nodes = []

    def look(graph, _):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x, y = make_inputs()
    torch.compile(lambda x, y: scaled_square(x, y, 1.0)[0], backend=look, fullgraph=True)(x, y)
    assert any("scaled_square" in node for node in nodes)


def test_saved_tensors_go_through_hooks():
    x, y = make_inputs()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        z = scaled_square(x, y, 1.0)[0]
    z.sum().backward()
    assert len(packed) == 1
    assert torch.equal(x.grad, 2 * x)
