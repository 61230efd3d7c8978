"""A batch that does not fit into a computer's memory is refused before a step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hippos.train.host_memory
from hippos import H3Config, H3ForCausalLM
from hippos.errors import TrainingError
from hippos.train import RunProgress, TrainConfig, apply_settings, train
from hippos.train.arguments import recompute_cheap_parts
from hippos.train.host_memory import check_fits_on_host, kept_bytes


def model(mixer: str = "h3", device: str = "cpu") -> H3ForCausalLM:
    torch.manual_seed(0)
    with torch.device(device):
        config = H3Config(
            vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, attn_layers=(1,), mixer=mixer
        )
        return H3ForCausalLM(config)


def really_kept(model: H3ForCausalLM, batch: int, seqlen: int) -> int:
    """Bytes that autograd has been given to keep, of each storage once, in a real pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.zeros(batch, seqlen, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(input_ids=tokens, labels=tokens, loss_chunk_tokens=64)
    assert out.loss.isfinite()
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


@pytest.mark.parametrize("mixer", ["h3", "s4d", "s4", "dss", "gss"])
def test_the_count_on_shapes_is_about_what_a_pass_keeps(mixer: str) -> None:
    counted = kept_bytes(model(mixer, "meta"), 4, 96, loss_chunk_tokens=64)
    assert counted == pytest.approx(really_kept(model(mixer), 4, 96), rel=0.35)


def test_the_count_grows_with_the_batch_and_falls_with_what_is_made_again() -> None:
    whole = kept_bytes(model(device="meta"), 8, 96, loss_chunk_tokens=64)
    assert 2.5 < whole / kept_bytes(model(device="meta"), 2, 96, loss_chunk_tokens=64) <= 4.0
    frugal = model(device="meta")
    recompute_cheap_parts(frugal)
    assert kept_bytes(frugal, 8, 96, loss_chunk_tokens=64) < 0.9 * whole


def test_what_cannot_fit_is_refused_and_what_would_is_named(
    tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 3 << 20
    monkeypatch.setattr(hippos.train.host_memory, "free_bytes", lambda device: free)
    large = apply_settings(tiny, ["batch_size=4096", "micro_batch_size=none"])
    with pytest.raises(TrainingError, match=r"^4096 sequences of 24 tokens do not fit into memory") as caught:
        train(large, tmp_path / "run", progress=RunProgress(is_quiet=True))
    said = str(caught.value)
    advised = int(said.partition("--set micro_batch_size=")[2].split()[0])
    assert 1 <= advised < 4096
    assert 4096 % advised == 0
    small = apply_settings(large, [f"micro_batch_size={advised}", "steps=1"])
    assert check_fits_on_host(H3ForCausalLM(large.model.h3_config(vocab_size=300)), small, advised) is None


def test_a_batch_that_may_fit_is_warned_of(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    small = H3ForCausalLM(tiny.model.h3_config(vocab_size=300))
    needed = hippos.train.host_memory._needed_bytes(small, tiny, 2)
    assert needed is not None
    monkeypatch.setattr(hippos.train.host_memory, "free_bytes", lambda device: needed)
    warning = check_fits_on_host(small, tiny, 2)
    assert warning is not None
    assert warning.startswith("Perhaps 2 sequences of 24 tokens do not fit into memory: they take 0.0 GiB at the very ")


def test_where_not_even_one_fits_another_model_is_advised(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hippos.train.host_memory, "free_bytes", lambda device: 1)
    with pytest.raises(
        TrainingError, match=r"not even one would for certain: a shorter data\.seqlen or a smaller model"
    ):
        check_fits_on_host(H3ForCausalLM(tiny.model.h3_config(vocab_size=300)), tiny, 2)


def test_nobody_tells_how_much_is_free(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hippos.train.host_memory, "free_bytes", lambda device: None)
    assert check_fits_on_host(H3ForCausalLM(tiny.model.h3_config(vocab_size=300)), tiny, 4) is None
