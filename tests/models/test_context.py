"""Sequences split over processes: loss and gradients of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hippos.models import H3Config, H3ForCausalLM
from hippos.models.context import ContextPart, split_context
from tests.train.workers import run_workers

SIZES = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "state_size": 8}
KINDS = {
    "pure": {},
    "hybrid": {"attn_layers": (1,), "rotary_dim": 4},
    "head_dim": {"head_dim": 4, "attn_layers": (2,)},
    "s4d": {"mixer": "s4d"},
    "gss": {"mixer": "gss"},
    "recomputed": {},
    "recomputed gss": {"mixer": "gss"},
    "transformer": {"attn_layers": (0, 1, 2), "learned_positions": 64},
}


def make(fields: dict[str, Any], dtype: torch.dtype) -> tuple[H3ForCausalLM, torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    model = H3ForCausalLM(H3Config(**SIZES, **fields, initializer_range=0.3)).to(dtype).train()
    ids = torch.randint(41, (2, 49))
    targets = ids[:, 1:].clone()
    targets[0, 3:9] = -100
    return model, ids[:, :-1], targets


def compute(model: H3ForCausalLM, arguments: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(**arguments, loss_chunk_tokens=7).loss
    loss.backward()
    found = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), found


def count_exchanges(kinds: dict[str, dict[str, Any]], out: Path) -> None:
    """How often processes exchange tensors in a step, with and without activation checkpointing."""
    import torch.distributed as dist

    from hippos.models import context

    dist.init_process_group("gloo")
    part, exchange, counts = ContextPart.of(dist.group.WORLD), context._gathered, {}
    for name, fields in kinds.items():
        for is_repeated in (False, True):
            calls: list[object] = []
            context._gathered = lambda *arguments, calls=calls: calls.append(arguments) or exchange(*arguments)
            model, ids, targets = make(fields, torch.float32)
            if is_repeated:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            compute(model, split_context(ids, targets, part))
            counts[name, is_repeated] = len(calls)
    if part.rank == 0:
        torch.save(counts, out)


def test_repeated_passes_exchange_nothing(tmp_path: Path) -> None:
    kinds = {name: KINDS[name] for name in ("pure", "gss")}
    run_workers(2, count_exchanges, kinds, tmp_path / "counts.pt", log=tmp_path / "log")
    counts = torch.load(tmp_path / "counts.pt")
    layers = SIZES["num_hidden_layers"]
    # Keys, states, and the gradient of states; layers without a shift SSM have no keys to pass on.
    assert counts["pure", True] == counts["pure", False] == 3 * layers
    assert counts["gss", True] == counts["gss", False] == 2 * layers


def compute_parts(kinds: dict[str, dict[str, Any]], dtype: torch.dtype, out: Path) -> None:
    """Loss and gradients of every kind of model, by all processes together."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    part = ContextPart.of(dist.group.WORLD)
    results = {}
    for name, fields in kinds.items():
        model, ids, targets = make(fields, dtype)
        if name == "hybrid" or name.startswith("recomputed"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss, gradients = compute(model, split_context(ids, targets, part))
        for tensor in (loss, *gradients.values()):
            dist.all_reduce(tensor)
        results[name] = (loss, gradients)
    if part.rank == 0:
        torch.save(results, out)


@pytest.mark.parametrize(
    ("world_size", "dtype"),
    [
        (2, torch.float64),
        pytest.param(3, torch.float64, marks=pytest.mark.slow),
        pytest.param(4, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_parts_add_up_to_one_process(tmp_path: Path, world_size: int, dtype: torch.dtype) -> None:
    out = tmp_path / "results.pt"
    run_workers(world_size, compute_parts, KINDS, dtype, out, log=tmp_path / "log")
    results = torch.load(out)
    assert results.keys() == KINDS.keys()
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    for kind, fields in KINDS.items():
        model, ids, targets = make(fields, dtype)
        loss, gradients = compute(model, {"input_ids": ids, "labels": targets, "shift_labels": targets})
        found_loss, found = results[kind]
        torch.testing.assert_close(
            found_loss, loss, rtol=tolerance, atol=0, msg=lambda text, kind=kind: f"{kind}: {text}"
        )
        for name, gradient in gradients.items():
            error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error < tolerance, (kind, name, float(error))


def compute_parts_in_one_operator(out: Path) -> None:
    """Loss and gradients of parts whose H3 layers go from tokens to tokens, as on a GPU."""
    import torch.distributed as dist

    from hippos.models import context

    taken: list[bool] = []
    whole_chunks = 16

    def takes_part(u: torch.Tensor, *others: torch.Tensor) -> bool:
        taken.append(u.shape[1] % whole_chunks == 0)
        return taken[-1]

    context.takes_part = takes_part
    dist.init_process_group("gloo")
    part = ContextPart.of(dist.group.WORLD)
    results = {}
    for name, arguments in IN_ONE.items():
        model, ids, targets = make_long(dict(arguments))
        if name == "recomputed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss, gradients = compute(model, split_context(ids, targets, part))
        for tensor in (loss, *gradients.values()):
            dist.all_reduce(tensor)
        results[name] = (loss, gradients)
    assert taken
    assert all(taken)
    if part.rank == 0:
        torch.save(results, out)


IN_ONE = {"pure": {}, "recomputed": {}, "no shift": {"shift": "none"}}


def make_long(fields: dict[str, Any]) -> tuple[H3ForCausalLM, torch.Tensor, torch.Tensor]:
    """A model whose keys and states reach over several parts, and sequences of whole chunks."""
    torch.manual_seed(4)
    shift = fields.pop("shift", None)
    model = H3ForCausalLM(H3Config(**SIZES, initializer_range=0.3, dt_min=1e-3, dt_max=1e-2)).train()
    if shift == "none":
        for block in model.model.layers:
            block.mixer.shift = None
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(41, (2, 97))
    return model, ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_layers_in_one_operator_add_up_to_one_process(tmp_path: Path, world_size: int) -> None:
    out = tmp_path / "results.pt"
    run_workers(world_size, compute_parts_in_one_operator, out, log=tmp_path / "log")
    for kind, (found_loss, found) in torch.load(out).items():
        model, ids, targets = make_long(dict(IN_ONE[kind]))
        model.double()
        loss, gradients = compute(model, {"input_ids": ids, "labels": targets, "shift_labels": targets})
        torch.testing.assert_close(found_loss.double(), loss, rtol=1e-6, atol=0)
        for name, gradient in gradients.items():
            error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error < 2e-5, (kind, name, float(error))


class TestRefusals:
    """What cannot be split."""

    def test_uneven_parts(self) -> None:
        with pytest.raises(ValueError, match="a sequence of 7 tokens cannot be split evenly over 2 processes"):
            split_context(torch.zeros(1, 7, dtype=torch.long), None, ContextPart(None, 0, 2))

    def test_masks_and_caches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ContextPart, "of", classmethod(lambda cls, group: cls(group, 0, 2)))
        model, ids, _ = make({}, torch.float32)
        for arguments in ({"use_cache": True}, {"attention_mask": torch.ones_like(ids)}):
            with pytest.raises(ValueError, match="context_group goes with no mask"):
                model(ids, context_group=object(), **arguments)
