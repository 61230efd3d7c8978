"""Fused blocks against plain ones: in Triton's interpreter, and on a GPU (marked gpu)."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch

from hippos.layers import H3
from hippos.models import H3Config, H3ForCausalLM, fused_trunk
from hippos.models.fused_trunk import takes_fused_trunk
from hippos.train.arguments import checkpoint_activations, recompute_cheap_parts
from tests.train import workers

# numpy 2 warns of a conversion in Triton's own code.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1")
SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "attn_layers": (1,)}


def make(device="cpu", **fields):
    torch.manual_seed(0)
    model = H3ForCausalLM(H3Config(**{**SIZES, "state_size": 8, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device).train()


def run(model, ids, *, autocast=False, **inputs):
    model.zero_grad()
    with torch.autocast(ids.device.type, torch.bfloat16) if autocast else nullcontext():
        loss = model(ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def plainly(monkeypatch):
    return monkeypatch.setattr("hippos.models.modeling_h3.takes_fused_trunk", lambda *args: False)


def calls_of(monkeypatch):
    calls = []
    kept = fused_trunk.run_fused_trunk
    monkeypatch.setattr("hippos.models.modeling_h3.run_fused_trunk", lambda *a: (calls.append(1), kept(*a))[1])
    return calls


@interpreted
@pytest.mark.parametrize("is_frugal", [False, True])
def test_same_loss_and_gradients_in_the_interpreter(monkeypatch, is_frugal):
    model, ids = make(), torch.randint(31, (2, 20))
    if is_frugal:
        recompute_cheap_parts(model)
    calls = calls_of(monkeypatch)
    loss, gradients = run(model, ids)
    assert calls
    plainly(monkeypatch)
    wanted, wanted_gradients = run(model, ids)
    assert len(calls) == 1
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@interpreted
@pytest.mark.parametrize("is_frugal", [False, True])
def test_checkpointed_blocks_keep_only_what_enters_them(monkeypatch, is_frugal):
    model, ids = make(), torch.randint(31, (2, 20))
    if is_frugal:
        recompute_cheap_parts(model)
    plain, plain_gradients = run(model, ids)
    checkpoint_activations(model)
    norms, calls = [], calls_of(monkeypatch)
    add_norm = fused_trunk._add_norm
    monkeypatch.setattr(fused_trunk, "_add_norm", lambda *args: (norms.append(1), add_norm(*args))[1])
    loss, gradients = run(model, ids)
    assert calls
    assert len(norms) == 2 * 6 + 1, "two a block in each pass, and the last"
    assert torch.equal(loss, plain)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-6 if is_frugal else 0, atol=1e-9, msg=name)


@interpreted
@pytest.mark.parametrize("how", ["", "frugal", "checkpointed"])
def test_a_stream_is_split_under_autocast(monkeypatch, how):
    model, ids = make(), torch.randint(31, (2, 20))
    if how == "frugal":
        recompute_cheap_parts(model)
    if how == "checkpointed":
        checkpoint_activations(model)
    splits, add_norm = [], fused_trunk.add_norm_kept
    monkeypatch.setattr(
        fused_trunk, "add_norm_kept", lambda *a, **k: (splits.append(k["splits"]), add_norm(*a, **k))[1]
    )
    loss, gradients = run(model, ids, autocast=True)
    assert splits[:7] == [False] + [True] * 6
    monkeypatch.setattr(fused_trunk, "SPLIT_DTYPE", None)
    usual, usual_gradients = run(model, ids, autocast=True)
    assert torch.equal(loss, usual), "sums are whole"
    for name, gradient in usual_gradients.items():  # updates' gradients are rounded in another way
        error = float((gradients[name] - gradient).norm() / gradient.norm())
        assert error < 2e-2, name


@interpreted
def test_an_attention_layer_leaves_its_last_bias_unless_it_is_looked_at(monkeypatch):
    model, ids = make(), torch.randint(31, (2, 20))
    left, mixer = [], model.model.layers[1].mixer
    mix = type(mixer).mix
    monkeypatch.setattr(type(mixer), "mix", lambda *a, **k: (left.append(not k["adds_bias"]), mix(*a, **k))[1])
    loss, gradients = run(model, ids)
    seen = []
    mixer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    wanted, wanted_gradients = run(model, ids)
    assert left == [True, False]
    assert len(seen) == 1
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@interpreted
@pytest.mark.parametrize("is_packed", [False, True])
def test_an_h3_layer_leaves_its_last_bias_to_the_norm_behind_it(monkeypatch, is_packed):
    model, ids = make(), torch.randint(31, (2, 20))
    inputs = {"position_ids": torch.tensor([[*range(8), *range(12)], [*range(20)]])} if is_packed else {}
    plain, plain_gradients = run(model, ids, **inputs)
    left = []
    mix = H3.mix_without_bias
    monkeypatch.setattr("hippos.layers.h3.takes_projected", lambda *args: True)
    monkeypatch.setattr(H3, "mix_without_bias", lambda self, *args: (left.append(self), mix(self, *args))[1])
    loss, gradients = run(model, ids, **inputs)
    assert left == [block.mixer for block in model.model.layers if isinstance(block.mixer, H3)]
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    left.clear()
    for block in model.model.layers:  # a hook may want all of what a layer gives
        block.mixer.register_forward_hook(lambda *args: None)
    again = model(ids, labels=ids, use_cache=False, **inputs).loss.detach()
    torch.testing.assert_close(again, plain, rtol=1e-6, atol=0)
    assert not left


@interpreted
def test_packed_documents_in_the_interpreter(monkeypatch):
    model, ids = make(), torch.randint(31, (2, 20))
    positions = torch.tensor([[*range(8), *range(12)], [*range(20)]])
    calls = calls_of(monkeypatch)
    loss, _ = run(model, ids, position_ids=positions)
    assert calls
    plainly(monkeypatch)
    torch.testing.assert_close(loss, run(model, ids, position_ids=positions)[0], rtol=1e-6, atol=0)


@interpreted
def test_the_embedding_sums_its_gradient_by_kernels_where_it_is_plain(monkeypatch):
    model, ids = make(), torch.randint(31, (2, 20))
    calls = []
    embed = fused_trunk.embed
    monkeypatch.setattr(fused_trunk, "embed", lambda *args: (calls.append(1), embed(*args))[1])
    _, gradients = run(model, ids)
    assert len(calls) == 1
    model.model.embed_tokens.register_forward_hook(lambda *args: None)
    _, wanted = run(model, ids)
    assert len(calls) == 1
    torch.testing.assert_close(gradients["model.embed_tokens.weight"], wanted["model.embed_tokens.weight"])


@interpreted
def test_frugal_blocks_keep_neither_norms_nor_gelus(monkeypatch):
    model, ids = make(), torch.randint(31, (2, 20))
    recompute_cheap_parts(model)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def noting(pack, unpack):
        return hooks(lambda x: (kept.append(pack(x)), kept[-1])[1], unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", noting)
    run(model, ids)
    shapes = [tuple(x.shape) for x in kept if isinstance(x, torch.Tensor)]
    assert shapes.count((40, 64)) == 3, "what the GELU takes, and not what it gives"
    assert sum(isinstance(x, tuple) for x in kept) >= 6, "a norm before each MLP and each mixer"
    assert (2, 20, 16) not in shapes


@interpreted
def test_who_must_be_plain():
    stream = torch.zeros(2, 5, 16)

    def takes(model):
        return takes_fused_trunk(model.model.layers, model.model.norm, stream)

    assert takes(make())
    assert not takes(make(residual_dropout=0.1))
    assert not takes(make(mixer="s4d"))
    assert not takes_fused_trunk(make().model.layers, torch.nn.Identity(), stream)
    hooked = make()
    hooked.model.layers[1].mlp.fc1.register_forward_hook(lambda *args: None)
    assert not takes(hooked)
    replaced = make()
    replaced.model.layers[0].mlp.fc2 = torch.nn.Sequential(replaced.model.layers[0].mlp.fc2)
    assert not takes(replaced)
    compiled = make()
    compiled.model.layers[2].compile(backend="eager")
    assert not takes(compiled)
    checkpointed = make()
    checkpoint_activations(checkpointed)
    assert takes(checkpointed)
    with torch.no_grad():
        assert not takes(make())


@pytest.mark.skipif(IS_INTERPRETED, reason="Triton's interpreter runs on a CPU")
def test_a_cpu_runs_plain_blocks():
    model = make()
    assert not takes_fused_trunk(model.model.layers, model.model.norm, torch.zeros(2, 5, 16))


@pytest.mark.gpu
@pytest.mark.parametrize("is_frugal", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_same_loss_and_gradients_on_a_gpu(monkeypatch, is_frugal, autocast):
    sizes = {"hidden_size": 128, "state_size": 64, "num_attention_heads": 2, "vocab_size": 320}
    model, ids = make("cuda", **sizes), torch.randint(320, (4, 200), device="cuda")
    exact = make("cpu", **sizes).double()
    _, wanted = run(exact, ids.cpu())
    if is_frugal:
        recompute_cheap_parts(model)
    calls = calls_of(monkeypatch)
    found = run(model, ids, autocast=autocast)
    assert calls
    plainly(monkeypatch)
    usual = run(model, ids, autocast=autocast)
    torch.testing.assert_close(found[0], usual[0], rtol=2e-3 if autocast else 1e-5, atol=0)
    for name, right in wanted.items():
        errors = [float((x[1][name].cpu().double() - right).norm() / right.norm()) for x in (found, usual)]
        assert errors[0] < max(1.5 * errors[1], 1e-4), name


@pytest.mark.gpu
def test_matrices_are_in_half_precision_beside_other_parameters_as_sharded_blocks_gather_them(monkeypatch):
    sizes = {"hidden_size": 128, "state_size": 64, "num_attention_heads": 2, "vocab_size": 320}
    model, ids = make("cuda", **sizes), torch.randint(320, (4, 200), device="cuda")
    usual = run(model, ids, autocast=True)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.bfloat16()
    calls = calls_of(monkeypatch)
    found = run(model, ids, autocast=True)
    assert calls
    torch.testing.assert_close(found[0], usual[0], rtol=2e-3, atol=0)
    for name, gradient in usual[1].items():
        assert found[1][name].dtype == dict(model.named_parameters())[name].dtype
        assert float((found[1][name] - gradient).norm() / gradient.norm()) < 2e-2, name


def sharded(out):
    """Steps of a plain model and a sharded one, whose blocks keep their gathered weights or do not."""
    from torch.distributed.tensor import DTensor

    from hippos.train.processes import Processes
    from hippos.train.sharding import shard_model

    rank = Processes.join().rank
    found, ids = {}, torch.randint(31, (2, 20), generator=torch.Generator().manual_seed(1))
    for name in ("plain", "kept", "again", "checkpointed"):
        model, calls = make(), []
        run_block = fused_trunk._run_block
        fused_trunk._run_block = lambda *args, calls=calls, run_block=run_block: (calls.append(1), run_block(*args))[1]
        if name == "checkpointed":
            checkpoint_activations(model)
        if name != "plain":
            shard_model(model, torch.device("cpu"), dtype=torch.float32, keeps_gathered=name == "kept")
        for _ in range(2):
            loss, gradients = run(model, ids[rank : rank + 1] if name != "plain" else ids)
        fused_trunk._run_block = run_block
        whole = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in gradients.items()}
        torch.distributed.all_reduce(loss)
        found[name] = loss / 2, whole, len(calls)
    if rank == 0:
        torch.save(found, out)


@interpreted
def test_sharded_blocks_are_fused_too(tmp_path):
    workers.run_workers(2, sharded, tmp_path / "found.pt", log=tmp_path / "log")
    found = torch.load(tmp_path / "found.pt")
    loss, gradients, n_calls = found.pop("plain")
    assert n_calls == 6
    for name, (other_loss, others, n) in found.items():
        assert n == (12 if name == "checkpointed" else 6), name
        torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=0)
        for key, gradient in gradients.items():
            torch.testing.assert_close(others[key], gradient, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


def test_hooks_on_sharded_blocks_are_not_passed_over(tmp_path):
    workers.run_workers(2, hooked, tmp_path / "found.pt", log=tmp_path / "log")
    assert torch.load(tmp_path / "found.pt") == [True, False, True, False]


def hooked(out):
    """Whether a sharded block is plain, with a hook of someone's on itself or its MLP and without."""
    from hippos.train.processes import Processes
    from hippos.train.sharding import shard_model

    rank, model = Processes.join().rank, make()
    shard_model(model, torch.device("cpu"), dtype=torch.float32)
    block, found = model.model.layers[0], []
    for module in (block, block.mlp.fc1):
        found.append(fused_trunk._is_plain_block(block))
        hook = module.register_forward_hook(lambda *args: None)
        found.append(fused_trunk._is_plain_block(block))
        hook.remove()
    if rank == 0:
        torch.save(found, out)
