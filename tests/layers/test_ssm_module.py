"""SSM parameters keep their precision, and decoding reuses operators only while the parameters are the same."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hippos.layers import H3, DiagonalSSM, ShiftSSM, SSMModule, h3, ssm_diagonal
from hippos.ops import H3State
from hippos.ops.ssm_step import h3_step_operators


def ssm_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}": parameter
        for path, submodule in module.named_modules()
        if isinstance(submodule, SSMModule)
        for name, parameter in submodule.named_parameters()
    }


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), H3(8, d_state=8), nn.LayerNorm(8))


class TestPrecision:
    @pytest.mark.parametrize(
        "cast",
        [
            lambda m: m.half(),
            lambda m: m.bfloat16(),
            lambda m: m.to(torch.bfloat16),
            lambda m: m.to(dtype=torch.float16),
            lambda m: m.to("cpu", torch.bfloat16),
            lambda m: m.type(torch.float16),
            lambda m: m.to(torch.float8_e4m3fn),
            lambda m: m.bfloat16().half().float(),
        ],
        ids=["half", "bfloat16", "to", "to_dtype", "to_device", "type", "to_float8", "there_and_back"],
    )
    def test_narrow_casts_leave_ssm_parameters_alone(self, model, cast):
        before = {name: parameter.detach().clone() for name, parameter in ssm_parameters(model).items()}
        cast(model)
        assert len(before) == 9
        for name, parameter in ssm_parameters(model).items():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, before[name])

    def test_projections_are_cast(self, model):
        assert model.bfloat16()[1].q_proj.weight.dtype == torch.bfloat16

    def test_double_and_back(self, model):
        model.double()
        assert {p.dtype for p in ssm_parameters(model).values()} == {torch.float64}
        model.half()
        assert {p.dtype for p in ssm_parameters(model).values()} == {torch.float32}

    def test_gradients_keep_their_precision(self, model):
        model(torch.ones(1, 3, 8)).sum().backward()
        model.bfloat16()
        assert {p.grad.dtype for p in ssm_parameters(model).values()} == {torch.float32}

    def test_moving_and_casting_at_once_moves(self, model):
        model.to("meta", torch.bfloat16)
        assert all(p.is_meta and p.dtype == torch.float32 for p in ssm_parameters(model).values())
        model.to_empty(device="cpu")
        assert all(not p.is_meta and p.dtype == torch.float32 for p in ssm_parameters(model).values())

    @pytest.mark.parametrize(("default", "wanted"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
    def test_default_dtype(self, default, wanted):
        torch.set_default_dtype(default)
        try:
            layer = H3(4, d_state=4)
        finally:
            torch.set_default_dtype(torch.float32)
        assert layer.q_proj.weight.dtype == default
        assert {p.dtype for p in ssm_parameters(layer).values()} == {wanted}

    @pytest.mark.parametrize("module", [ShiftSSM(4, 4), DiagonalSSM(4, 4)], ids=["shift", "diagonal"])
    def test_forced_half_precision_is_refused(self, module):
        module = copy.deepcopy(module)
        module.D.data = module.D.data.bfloat16()
        with pytest.raises(TypeError, match=r"SSM\.D must be float32 or float64, got torch\.bfloat16"):
            module()

    def test_fsdp_mixed_precision_with_a_policy_of_their_own(self, model, tmp_path):
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        u = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
        expected = copy.deepcopy(model).bfloat16()
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
        try:
            for submodule in model.modules():
                if isinstance(submodule, SSMModule):
                    fully_shard(submodule, mp_policy=MixedPrecisionPolicy())
            fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
            y = model(u)
            y.float().square().sum().backward()
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ssm_parameters(model).values())
        finally:
            dist.destroy_process_group()
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y, expected(u.bfloat16()))


class TestMemory:
    """`step` discretises once, and again after every change of the parameters."""

    @pytest.fixture
    def calls(self, monkeypatch) -> list[int]:
        calls: list[int] = []
        discretise = ssm_diagonal.discretise

        def counted(*args, **kwargs):
            calls.append(1)
            return discretise(*args, **kwargs)

        monkeypatch.setattr(ssm_diagonal, "discretise", counted)
        return calls

    @pytest.fixture
    def layer(self) -> H3:
        torch.manual_seed(0)
        return H3(4, d_state=4)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_steps_share_one_discretisation(self, layer, calls, mode):
        with mode():
            state = layer.init_state(1)
            for _ in range(5):
                layer.step(torch.ones(1, 4), state)
        assert len(calls) == 1

    def test_steps_share_what_they_prepare(self, layer, monkeypatch):
        prepared = []

        def counted(*args, **kwargs):
            prepared.append(1)
            return h3_step_operators(*args, **kwargs)

        monkeypatch.setattr(h3, "h3_step_operators", counted)
        with torch.no_grad():
            state = layer.init_state(1)
            for _ in range(5):
                layer.step(torch.ones(1, 4), state)
            assert len(prepared) == 1
            layer.diag.log_dt.add_(1)
            layer.step(torch.ones(1, 4), state)
        assert len(prepared) == 2

    def test_prefill_prepares_the_steps(self, layer, calls):
        with torch.no_grad():
            _, state = layer(torch.ones(1, 3, 4), return_state=True)
            layer.step(torch.ones(1, 4), state)
        assert len(calls) == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()}),
            lambda layer: _train_one_step(layer),
            lambda layer: layer.double().float(),
            lambda layer: _assign(layer, "log_dt", layer.diag.log_dt.detach() + 1),
            lambda layer: setattr(layer.diag.C, "data", 2 * layer.diag.C.data),
            lambda layer: layer.diag.C.detach().mul_(2),
            lambda layer: layer.shift.reset_parameters(),
        ],
        ids=["load_state_dict", "optimiser", "cast", "new_parameter", "new_data", "in_place", "reset"],
    )
    def test_changed_parameters_are_noticed(self, layer, change):
        u = torch.ones(1, 4)
        layer.step(u, layer.init_state(1))
        state = layer.init_state(1)
        layer.step(u, state)
        change(layer)
        fresh = copy.deepcopy(layer)
        got = layer.step(u, copy.deepcopy(state))
        assert torch.equal(got, fresh.step(u, copy.deepcopy(state)))

    @pytest.mark.parametrize("start", ["forward", "forward_with_gradients", "init_state"])
    def test_a_new_sequence_notices_writes_through_data(self, layer, start):
        u = torch.ones(1, 4)
        with torch.no_grad():
            layer.step(u, layer.init_state(1))
            layer.diag.C.data.mul_(2)  # leaves neither a new address nor a new version
            fresh = copy.deepcopy(layer)
            if start == "init_state":
                state = layer.init_state(1)
            else:
                with torch.set_grad_enabled(start == "forward_with_gradients"):
                    _, state = layer(u.unsqueeze(1), return_state=True)
                state = H3State(*(part.detach() for part in state))
            assert torch.equal(layer.step(u, copy.deepcopy(state)), fresh.step(u, state))

    def test_parameters_made_in_inference_mode(self, calls):
        with torch.inference_mode():
            layer = H3(4, d_state=4)
            state = layer.init_state(1)
            layer.step(torch.ones(1, 4), state)
            layer.diag.log_dt.add_(1)  # leaves no trace, so nothing may be remembered
            layer.step(torch.ones(1, 4), state)
        assert len(calls) == 2

    def test_gradients_are_those_of_this_forward(self, layer):
        u = torch.ones(1, 3, 4)
        with torch.no_grad():
            layer(u)
        layer(u).sum().backward()
        assert layer.diag.log_dt.grad.abs().sum() > 0


def _assign(layer: H3, name: str, value: torch.Tensor) -> None:
    setattr(layer.diag, name, nn.Parameter(value))


def _train_one_step(layer: H3) -> None:
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3, 4)).square().sum().backward()
    optimiser.step()
