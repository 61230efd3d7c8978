"""Whole models against the public reference: logits, loss, gradients, states, greedy tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hippos.models.released import rename_released

MODELS = ("pure", "hybrid1", "hybrid2", "hybrid2_rotary", "hybrid1_h8")


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_loss(reference_model, name):
    model, tensors, _ = reference_model(name)
    out = model(tensors["input_ids"], labels=tensors["input_ids"])
    torch.testing.assert_close(out.logits, tensors["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(out.loss, tensors["loss"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_loss_in_float64(reference_model, name):
    model, tensors, _ = reference_model(name)
    out = model.double()(tensors["input_ids"], labels=tensors["input_ids"])
    torch.testing.assert_close(out.logits, tensors["f64/logits"], rtol=0, atol=1e-10)
    torch.testing.assert_close(out.loss, tensors["f64/loss"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states(reference_model, name):
    model, tensors, _ = reference_model(name)
    states = model(tensors["input_ids"], output_hidden_states=True).hidden_states
    for i in range(model.config.num_hidden_layers - 1):
        stream = tensors[f"layer_out/{i}/hidden"] + tensors[f"layer_out/{i}/residual"]
        torch.testing.assert_close(states[i + 1], stream, rtol=1e-5, atol=1e-5 * stream.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_gradients(reference_model, name):
    model, tensors, _ = reference_model(name)
    model(tensors["input_ids"], labels=tensors["input_ids"]).loss.backward()
    wanted = {key.removeprefix("grad/"): value for key, value in tensors.items() if key.startswith("grad/")}
    wanted = rename_released(wanted)
    for name_, parameter in model.named_parameters():
        scale = wanted[name_].abs().max().item()
        torch.testing.assert_close(parameter.grad, wanted[name_], rtol=0, atol=5e-5 * scale, msg=name_)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(reference_model, name):
    model, tensors, _ = reference_model(name)
    mask = torch.ones_like(tensors["prompt_ids"])
    ids = model.generate(tensors["prompt_ids"], attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(ids, tensors["generated_ids"])


@pytest.mark.parametrize("name", ["hybrid2_rotary", "hybrid1_h8"])
def test_greedy_tokens_within_the_vocabulary(reference_model, name):
    model, tensors, _ = reference_model(name, vocab_size=97)
    mask = torch.ones_like(tensors["prompt_ids"])
    ids = model.generate(tensors["prompt_ids"], attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(ids, tensors["generated_ids_vocab97"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_logits_step_by_step(reference_model, name, kind):
    model, tensors, _ = reference_model(name)
    ids, prompt_len = tensors["generated_ids"], tensors["prompt_ids"].shape[1]
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
    steps = [model(ids[:, :prompt_len], past_key_values=cache).logits[:, -1]]
    steps += [
        model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1] for t in range(prompt_len, ids.shape[1] - 1)
    ]
    torch.testing.assert_close(torch.stack(steps, 1), tensors["generate_step_logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS[:-1])
@torch.no_grad()
def test_states_after_the_prompt(reference_model, name):
    model, tensors, _ = reference_model(name)
    cache = model(tensors["prompt_ids"], use_cache=True).past_key_values
    for i, layer in enumerate(cache.layers):
        if f"prompt_state/{i}/kv" in tensors:
            keys, values = tensors[f"prompt_state/{i}/kv"].permute(2, 0, 3, 1, 4)
            torch.testing.assert_close(layer.keys, keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(layer.values, values, rtol=1e-5, atol=1e-5)
            continue
        diag, shift = tensors[f"prompt_state/{i}/diag"], tensors[f"prompt_state/{i}/shift"]
        torch.testing.assert_close(layer.recurrent_states[0], diag, rtol=1e-4, atol=1e-5 * diag.abs().max().item())
        torch.testing.assert_close(
            _reference_shift_state(model.model.layers[i].mixer.shift.B, layer.conv_states[0]),
            shift[..., :-1],
            rtol=1e-4,
            atol=1e-5 * shift.abs().max().item(),
        )


def _reference_shift_state(B, keys):
    """The reference keeps s[n] = sum_{m <= n} B[m] k[t - n + m]; ours are the keys, oldest first."""
    newest_first = keys.flip(-1)  # k[t], k[t-1], ...
    state = torch.zeros_like(newest_first)
    for n in range(state.shape[-1]):
        for m in range(n + 1):
            state[..., n] += B[:, m] * newest_first[..., n - m]
    return state


@pytest.mark.parametrize(("dtype", "mean_error"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
@torch.no_grad()
def test_half_precision_is_near_the_reference(reference_model, golden, dtype, mean_error):
    model, tensors, _ = reference_model("hybrid1")
    half, _ = golden("h3_lm_hybrid1_halfcast")
    logits = model.to(dtype)(tensors["input_ids"]).logits
    assert logits.dtype == dtype
    wanted = half[f"{str(dtype).removeprefix('torch.')}/logits"]
    assert (logits.float() - wanted.float()).abs().mean() < mean_error
