"""Models on a CUDA device: no waiting between steps, CUDA graphs, compiled generation."""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache, StaticCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [
    pytest.param({"attn_layers": ()}, id="pure"),
    pytest.param({"attn_layers": (1,), "rotary_dim": 4}, id="hybrid"),
    pytest.param({"attn_layers": (1,), "head_dim": 4}, id="head_dim-4"),
    pytest.param({"attn_layers": (), "mixer_options": {"shift": "none"}}, id="no-shift"),
    *(pytest.param({"attn_layers": (1,), "mixer": name}, id=name) for name in ("s4d", "s4", "dss", "gss")),
]


@pytest.fixture
def cuda_model(make_model):
    return lambda **shape: make_model(**shape).cuda()


@contextmanager
def no_waiting():
    """Make every wait of the host for the device an error."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(action="ignore"):  # PyTorch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_same_logits_as_on_the_cpu(make_model, ids, shape):
    model, text = make_model(**shape), ids(2, 33)
    wanted = model(text).logits
    got = copy.deepcopy(model).cuda()(text.cuda()).logits
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_decoding_never_waits_for_the_device(cuda_model, ids, shape):
    model, text = cuda_model(**shape), ids(2, 12).cuda()
    cache = DynamicCache(config=model.config)
    model(text[:, :6], past_key_values=cache)
    model(text[:, 6:7], past_key_values=cache)
    with no_waiting():
        for t in range(7, 12):
            model(text[:, t : t + 1], past_key_values=cache)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_step_is_captured_in_a_cuda_graph(cuda_model, ids, shape):
    model, text = cuda_model(**shape), ids(2, 16).cuda()
    cache = StaticCache(model.config, max_cache_len=16)
    logits = [model(text[:, :6], past_key_values=cache).logits]
    saved = copy.deepcopy(cache)
    token = text[:, 6:7].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up, as capture demands
        model(token, past_key_values=saved)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(token, past_key_values=cache).logits
    for t in range(6, 16):
        token.copy_(text[:, t : t + 1])
        graph.replay()
        logits.append(out.clone())
    torch.testing.assert_close(torch.cat(logits, 1), model(text).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # advice of the compiler, for float32 models
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # of the compiler's own graphs
@pytest.mark.parametrize("shape", [*SHAPES[:2], pytest.param({"mixer": "s4"}, id="s4")])
def test_generation_with_a_static_cache_is_compiled_and_gives_the_same_tokens(cuda_model, ids, shape):
    model, prompt = cuda_model(**shape), ids(2, 9).cuda()
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), wanted)
    mask = torch.ones_like(prompt)
    mask[0, :4] = 0
    wanted = model.generate(prompt, attention_mask=mask, pad_token_id=0, **options)
    got = model.generate(prompt, attention_mask=mask, pad_token_id=0, cache_implementation="static", **options)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_under_autocast(cuda_model, ids, dtype):
    model, text = cuda_model(attn_layers=(1,)).train(), ids(2, 40).cuda()
    with torch.autocast("cuda", dtype=dtype):
        loss = model(text, labels=text).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
