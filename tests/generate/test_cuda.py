"""The engine on a GPU: captured steps against single operations, against the model's forward pass and Transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hippos import H3Config, H3ForCausalLM
from hippos.generate import Generator, Sampling, generate
from hippos.generate.fused_step import FusedStep
from hippos.generate.h3_decoder import H3Decoder

pytestmark = pytest.mark.gpu
N_NEW = 12
GREEDY = Sampling(max_new_tokens=N_NEW, temperature=0)
SHAPES = [
    pytest.param({"attn_layers": ()}, id="pure"),
    pytest.param({"attn_layers": (1,)}, id="hybrid"),
    pytest.param({"attn_layers": (0, 2), "rotary_dim": 8}, id="rotary"),
    pytest.param({"attn_layers": (1,), "head_dim": 4}, id="head_dim-4"),
    pytest.param({"attn_layers": (1,), "mixer": "s4d"}, id="s4d"),
    pytest.param({"attn_layers": (1,), "learned_positions": 64}, id="learned-positions"),
]


def make_model(seed: int = 0, *, dtype: torch.dtype = torch.float64, **changes: Any) -> H3ForCausalLM:
    fields = {
        "vocab_size": 199,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "state_size": 16,
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return H3ForCausalLM(H3Config(**{**fields, **changes})).eval().to("cuda", dtype)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(199, shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("shape", SHAPES)
def test_captured_steps_write_what_transformers_writes(shape):
    model, prompt = make_model(**shape), draw(3, 9)
    expected = model.generate(prompt, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    writer = Generator(model)
    assert writer.cuda_graph
    for _ in range(2):
        assert torch.equal(writer.generate(prompt, GREEDY).sequences, expected)
    assert torch.equal(Generator(model, cuda_graph=False, chunk_len=4).generate(prompt, GREEDY).sequences, expected)
    ragged = [prompt[0], prompt[1, :4], prompt[2, :1]]
    alone = [generate(model, [text], max_new_tokens=N_NEW).tokens[0] for text in ragged]
    assert torch.equal(writer.generate(ragged, GREEDY).tokens, torch.stack(alone))


@pytest.mark.parametrize(
    ("batch", "dtype"), [(1, torch.bfloat16), (5, torch.bfloat16), (64, torch.float16), (65, torch.bfloat16)]
)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[4]])
def test_fused_steps_are_as_near_to_float64_as_the_layers(shape, dtype, batch):
    assert_steps_are_as_near_to_float64_as_the_layers(shape, dtype, batch)


@pytest.mark.parametrize(("batch", "dtype"), [(2, torch.bfloat16), (16, torch.bfloat16), (64, torch.float16)])
def test_steps_of_a_wide_model_are_as_near_to_float64_as_the_layers(batch, dtype):
    shape = {"hidden_size": 2048, "num_attention_heads": 16, "attn_layers": (1,), "state_size": 64}
    assert_steps_are_as_near_to_float64_as_the_layers({**shape, "initializer_range": 0.02}, dtype, batch)


@torch.no_grad()
def assert_steps_are_as_near_to_float64_as_the_layers(shape, dtype, batch):
    exact = make_model(**shape)
    model = make_model(**shape, dtype=dtype)
    assert FusedStep.fits(model)
    text = draw(batch, 20)
    wanted = exact(text).logits[:, -1]
    plain = _distance(model(text).logits[:, -1], wanted)
    writer = Generator(model, context=40)
    state = writer.read(text[:, :10])
    stream = writer.stream(text[:, :10], Sampling(max_new_tokens=20, temperature=0))
    next(stream)
    decoder = stream._steps.decoder
    decoder.state.copy_from(state)
    for token in text[:, 10:].unbind(1):
        decoder.advance(token)
    assert _distance(decoder.logits(), wanted) < 1.5 * plain + 2e-3


@pytest.mark.parametrize(
    ("lengths", "chunk_len"),
    [((70, 200, 1, 129), None), ((70, 200, 1, 129), 64), ((70, 600, 1, 129), None)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4]])
@torch.no_grad()
def test_ragged_prompts_are_read_as_near_to_float64_as_by_the_layers(shape, dtype, lengths, chunk_len):
    exact, model = make_model(**shape), make_model(**shape, dtype=dtype)
    texts = [draw(n, seed=n) for n in lengths]
    wanted = torch.stack([exact(text[None]).logits[0, -1] for text in texts])
    plain = torch.stack([model(text[None]).logits[0, -1] for text in texts])
    state = Generator(model, chunk_len=chunk_len).read(texts)
    decoder = H3Decoder(model, state)
    assert decoder._reads_fused
    assert _distance(decoder.logits(), wanted) < 1.5 * _distance(plain, wanted) + 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES[:3], SHAPES[5]])
@torch.no_grad()
def test_short_prompts_are_read_from_graphs(shape, dtype):
    exact, model = make_model(**shape), make_model(**shape, dtype=dtype)
    writer, plain = Generator(model), Generator(model, cuda_graph=False)
    lengths = (40, 64, 63, 5) if "learned_positions" in shape else (70, 90, 128, 5, 64, 70, 500, 512)
    for n in lengths:
        text = draw(1, n, seed=n)
        got, wanted = writer.read(text), plain.read(text)
        for (name, x), (_, y) in zip(got.tensors(), wanted.tensors(), strict=True):
            assert torch.equal(x, y), f"{name} of {n} tokens"
        true = exact(text).logits[:, -1]
        read = _distance(H3Decoder(model, got).logits(), true)
        assert read < 1.5 * _distance(model(text).logits[:, -1], true) + 4e-3
    assert len(writer._prompts._graphs) == len({length // 65 for length in lengths})
    torch.cuda.empty_cache()
    for n in (40, 50):
        wanted = plain.generate(draw(1, n), GREEDY).tokens
        for _ in range(2):
            assert torch.equal(writer.generate(draw(1, n), GREEDY).tokens, wanted)


def test_wide_models_write_the_same_from_two_streams():
    """Their steps' programs wait for each other, and take turns."""
    fields = {"hidden_size": 2048, "num_attention_heads": 16, "attn_layers": (1,), "state_size": 64}
    model, prompt = make_model(dtype=torch.bfloat16, **fields), draw(16, 7)
    writers = [Generator(model, context=64) for _ in range(2)]
    sampling = Sampling(max_new_tokens=40, temperature=0)
    wanted = [writer.generate(prompt, sampling).tokens for writer in writers]
    assert torch.equal(*wanted)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in writers]
    texts = []
    for writer, stream in zip(writers, streams, strict=True):
        with torch.cuda.stream(stream):
            texts.append(writer.stream(prompt, sampling))
    written = [[], []]
    for _ in range(40):
        for text, stream, tokens in zip(texts, streams, written, strict=True):
            with torch.cuda.stream(stream):
                tokens.append(next(text).tokens)
    assert written[0] == written[1]
    assert torch.equal(torch.tensor(written[0]).t(), wanted[0].cpu())


def test_sampling_in_a_graph_is_repeatable_and_the_same_as_without():
    model, prompt = make_model(attn_layers=(1,)), draw(4, 6)
    options = {"temperature": 1.1, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2}
    sampling = Sampling(max_new_tokens=300, seed=5, **options)
    writer = Generator(model)
    first = writer.generate(prompt, sampling, log_probs=True)
    assert torch.equal(writer.generate(prompt, sampling, log_probs=True).tokens, first.tokens)
    plain = Generator(model, cuda_graph=False).generate(prompt, sampling, log_probs=True)
    assert torch.equal(plain.tokens, first.tokens)
    torch.testing.assert_close(plain.log_probs, first.log_probs)
    other = writer.generate(prompt, Sampling(max_new_tokens=300, seed=6, **options))
    assert not torch.equal(other.tokens, first.tokens)
    on_cpu = generate(model.cpu(), prompt.cpu(), max_new_tokens=300, seed=5, **options)
    assert torch.equal(on_cpu.tokens, first.tokens.cpu())


def test_changed_weights_are_noticed():
    model, prompt = make_model(), draw(2, 5)
    writer = Generator(model)
    writer.generate(prompt, GREEDY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05)
    assert torch.equal(writer.generate(prompt, GREEDY).tokens, Generator(model).generate(prompt, GREEDY).tokens)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3], SHAPES[4]])
def test_a_graph_outlives_what_other_generators_make_the_layers_drop(shape):
    model, prompt = make_model(**shape), draw(2, 7)
    first = Generator(model)
    wanted = first.generate(prompt, GREEDY).tokens
    for _ in range(2):
        assert torch.equal(Generator(model).generate(prompt, GREEDY).tokens, wanted)
        torch.cuda.empty_cache()
        kept = torch.randn(64, 2**18, device="cuda")  # where freed memory was
        assert torch.equal(first.generate(prompt, GREEDY).tokens, wanted)
        del kept


def test_a_step_allocates_nothing_and_rows_end_alone():
    model, prompt = make_model(attn_layers=(1,)), draw(3, 5)
    writer = Generator(model)
    free = writer.generate(prompt, GREEDY)
    eos = int(free.tokens[1, 3])
    ended = writer.generate(prompt, GREEDY, eos_token_id=eos, keep_state=True)
    for row, n in enumerate(ended.lengths.tolist()):
        assert torch.equal(ended.tokens[row, :n], free.tokens[row, :n])
        assert n == N_NEW or ended.tokens[row, n - 1] == eos
    stream = writer.stream(prompt, Sampling(max_new_tokens=50, temperature=0))
    next(stream)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(20):
        next(stream)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_states_go_on_after_captured_steps():
    model, prompt = make_model(attn_layers=(1,)), draw(2, 7)
    writer = Generator(model)
    whole = writer.generate(prompt, Sampling(max_new_tokens=2 * N_NEW, temperature=0))
    first = writer.generate(prompt, GREEDY, keep_state=True)
    nothing = prompt[:, :0]
    second = writer.generate(nothing, GREEDY, state=first.state)
    assert torch.equal(torch.cat((first.tokens, second.tokens), 1), whole.tokens)


def _distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
