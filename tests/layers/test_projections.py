"""Projections in and out of the channels-first layout: plain modules directly, all others through their own call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from hippos.layers import H3, projections
from hippos.layers.projections import (
    HAS_MKL,
    is_plain_linear,
    project_from_channels,
    project_to_channels,
    project_tokens,
)


class TwiceLinear(nn.Linear):
    """Stands for a linear layer with quantised weights: same attributes, another product."""

    def forward(self, x):
        return 2 * super().forward(x)


class RecordOperators(TorchDispatchMode):
    """Notes the name of every operator that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def _hooked(linear):
    linear.register_forward_hook(lambda module, args, output: 2 * output)
    return linear


def _pre_hooked(linear):
    linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return linear


def _replaced_forward(linear):
    original = linear.forward
    linear.forward = lambda x: 2 * original(x)
    return linear


def _subclass(linear):
    twice = TwiceLinear(linear.in_features, linear.out_features, dtype=torch.float64)
    twice.load_state_dict(linear.state_dict())
    return twice


def _parametrised(linear):
    return parametrize.register_parametrization(linear, "weight", Doubled())


WRAPPINGS = pytest.mark.parametrize("wrap", [_hooked, _pre_hooked, _replaced_forward, _subclass, _parametrised])


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 7, dtype=torch.float64)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_plain_projections(generator, batch, bias):
    linear = nn.Linear(5, 7, bias=bias, dtype=torch.float64)
    u = torch.randn(batch, 11, 5, generator=generator, dtype=torch.float64)
    channels = project_to_channels(linear, u)
    torch.testing.assert_close(channels, linear(u).transpose(1, 2))
    assert channels.stride(2) == 1
    back = nn.Linear(7, 5, bias=bias, dtype=torch.float64)
    torch.testing.assert_close(project_from_channels(back, channels), back(channels.transpose(1, 2)))
    torch.testing.assert_close(project_from_channels(back, channels.contiguous()), back(channels.transpose(1, 2)))


def test_nothing_is_transposed_in_memory(linear, generator):
    u = torch.randn(2, 11, 5, generator=generator, dtype=torch.float64)
    back = nn.Linear(7, 5, dtype=torch.float64)
    with torch.no_grad(), RecordOperators() as record:
        project_from_channels(back, project_to_channels(linear, u))
    assert [name for name in record.names if name not in ("view", "t", "transpose", "unsqueeze")] == ["addmm", "addmm"]


@WRAPPINGS
def test_other_modules_are_called(linear, generator, wrap):
    assert is_plain_linear(linear)
    u = torch.randn(2, 11, 5, generator=generator, dtype=torch.float64)
    wrapped = wrap(copy.deepcopy(linear))
    assert not is_plain_linear(wrapped)
    wanted = wrapped(u)
    assert not torch.allclose(wanted, linear(u))
    torch.testing.assert_close(project_to_channels(wrapped, u), wanted.transpose(1, 2))
    torch.testing.assert_close(project_from_channels(wrapped, u.transpose(1, 2).contiguous()), wanted)


def test_tensor_subclasses_are_not_plain(linear):
    class Quantised(torch.Tensor):
        pass

    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised))
    assert not is_plain_linear(linear)


def test_global_hooks_are_called(linear, generator):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        project_to_channels(linear, torch.randn(1, 2, 5, generator=generator, dtype=torch.float64))
    finally:
        handle.remove()
    assert seen == [linear]


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "out_proj"])
@WRAPPINGS
def test_h3_respects_wrapped_projections_in_every_mode(generator, name, wrap):
    torch.manual_seed(0)
    layer = H3(6, d_state=4, dtype=torch.float64)
    u = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    plain = layer(u)
    setattr(layer, name, wrap(layer.get_submodule(name)))
    y = layer(u)
    assert not torch.allclose(y, plain)
    state = layer.init_state(2, dtype=torch.float64)
    stepped = torch.stack([layer.step(u[:, t], state) for t in range(5)], dim=1)
    torch.testing.assert_close(stepped, y.detach())


def test_lora(generator):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    layer = H3(6, d_state=4)
    u = torch.randn(2, 5, 6, generator=generator)
    plain = layer(u)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, layer)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{proj}_proj.lora_{factor}.default.weight" for proj in ("q", "k", "v", "out") for factor in "AB"
    }
    y = model(u)
    assert not torch.allclose(y, plain)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    merged = copy.deepcopy(model)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        lora = merged.get_submodule(name)
        lora.merge()
        setattr(merged, name, lora.get_base_layer())
    assert is_plain_linear(merged.q_proj)
    torch.testing.assert_close(merged(u), y, rtol=1e-4, atol=1e-5)


@pytest.fixture
def _blocks_of_any_size(monkeypatch):
    monkeypatch.setattr(projections, "LEAST_WEIGHTS_IN_BLOCKS", 0)


@pytest.mark.usefixtures("_blocks_of_any_size")
@pytest.mark.parametrize("n_out", [1, 6, 7, 24])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5), (2, 1, 5), (1, 3, 5), (0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_tokens_are_projected_as_by_the_module(generator, n_out, shape, bias):
    linear = nn.Linear(5, n_out, bias=bias)
    u = torch.randn(shape, generator=generator)
    with torch.no_grad():
        wanted = linear(u)
        found = project_tokens(linear, u)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def _operators_of(linear, u):
    with torch.no_grad(), RecordOperators() as record:
        project_tokens(linear, u)
    return record.names


@pytest.mark.skipif(not HAS_MKL, reason="this torch is built without MKL")
def test_one_token_goes_in_blocks_and_the_rest_as_it_is(generator):
    linear = nn.Linear(256, 512)
    assert "baddbmm" in _operators_of(linear, torch.randn(1, 1, 256, generator=generator))
    assert "baddbmm" not in _operators_of(linear, torch.randn(1, 3, 256, generator=generator))
    assert "baddbmm" not in _operators_of(nn.Linear(256, 256), torch.randn(1, 256, generator=generator))
    assert "baddbmm" not in _operators_of(linear.double(), torch.randn(1, 256, generator=generator).double())


def test_gradients_of_one_token_take_the_modules_own_way(generator):
    linear = nn.Linear(8, 16)
    u = torch.randn(1, 8, generator=generator, requires_grad=True)
    project_tokens(linear, u).sum().backward()
    torch.testing.assert_close(u.grad, linear.weight.sum(0, keepdim=True))


@pytest.mark.usefixtures("_blocks_of_any_size")
@WRAPPINGS
def test_tokens_through_wrapped_modules_call_them(wrap):
    torch.manual_seed(0)
    linear = nn.Linear(5, 8)
    token = torch.ones(1, 5)
    with torch.no_grad():
        plain = linear(token)
        wrapped = wrap(linear) if wrap is not _subclass else _subclass(linear.double()).float()
        found = project_tokens(wrapped, token)
        torch.testing.assert_close(found, wrapped(token))
        assert not torch.allclose(found, plain)
