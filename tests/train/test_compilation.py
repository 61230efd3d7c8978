"""Blocks through torch.compile: the same losses, and names that stay."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from safetensors.torch import load_file

from hippos.errors import UnsupportedError
from hippos.models import H3Config, H3ForCausalLM
from hippos.train import RunProgress, TrainConfig, apply_settings, train, trainer
from hippos.train.arguments import recompute_cheap_parts
from hippos.train.compilation import compile_blocks, without_compilation
from hippos.train.metrics import read_metrics

# Dynamo looks at the .grad of a block's input while it traces.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "state_size": 8}


def test_one_graph_serves_all_blocks_of_a_kind() -> None:
    torch.manual_seed(0)
    model = H3ForCausalLM(H3Config(**SIZES, attn_layers=(1, 3))).train()
    ids = torch.randint(31, (2, 40))
    names = list(model.state_dict())
    plain = model(ids, labels=ids).loss
    plain.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_blocks(model, backend=backend, fullgraph=True)
    assert list(model.state_dict()) == names
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert len(graphs) == 2  # H3 and attention
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)
    with without_compilation(), torch.no_grad():
        model(ids[:, :7])
    assert len(graphs) == 2


def test_a_compiled_run(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = ["embedding_dropout=0", "residual_dropout=0", "attention_dropout=0", "log_steps=1", "steps=4"]
    config = apply_settings(tiny, still)
    train(config, tmp_path / "plain", progress=RunProgress(is_quiet=True))
    torch._dynamo.reset()
    monkeypatch.setattr(trainer, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    train(apply_settings(config, ["compile=yes"]), tmp_path / "run", progress=RunProgress(is_quiet=True))
    losses = [[row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row] for name in ("plain", "run")]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-5, atol=0)
    plain, found = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "run"))
    assert found.keys() == plain.keys()


def test_a_cpu_without_a_compiler_says_so_and_the_folder_stays_free(tiny: TrainConfig, tmp_path: Path) -> None:
    progress = RunProgress(is_quiet=True)
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(UnsupportedError, match=r"run.compile needs a C.. compiler on a CPU"),
    ):
        train(apply_settings(tiny, ["compile=yes"]), tmp_path / "run", progress=progress)
    train(apply_settings(tiny, ["steps=1"]), tmp_path / "run", progress=progress)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_cheap_parts_are_made_again(is_compiled: bool) -> None:
    torch.manual_seed(0)
    model = H3ForCausalLM(H3Config(**SIZES, attn_layers=(1, 3))).train()
    ids = torch.randint(31, (2, 40))
    torch._dynamo.reset()
    found = []
    for is_again in (False, True):
        if is_again:
            recompute_cheap_parts(model)
            if is_compiled:
                compile_blocks(model, backend="aot_eager", fullgraph=True)
        widths: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (widths.append(x.shape[-1:]), x)[1], lambda x: x):  # noqa: B023
            loss = model(ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, widths))
        model.zero_grad()
    (loss, gradients, kept), (loss_again, gradients_again, kept_again) = found
    torch.testing.assert_close(loss_again, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-4, atol=1e-6)
    assert kept_again.count((64,)) < kept.count((64,))  # the MLP's inner width
