"""The engine against Transformers' `generate`, and against itself: any batch, padding, chunks and states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from hippos import H3Config, H3ForCausalLM
from hippos.errors import CheckpointError, ConfigError, OutOfMemoryError, PromptError, UnsupportedError
from hippos.generate import Generator, Sampling, generate
from hippos.generate.h3_decoder import H3Decoder
from hippos.generate.memory import largest_batch
from hippos.generate.sampling import Sampler
from hippos.generate.state import GenerationState, n_bytes_of_row

VOCAB = 97
N_NEW = 9
SHAPES = [
    pytest.param({"attn_layers": ()}, id="pure"),
    pytest.param({"attn_layers": (1,)}, id="hybrid"),
    pytest.param({"attn_layers": (0, 2), "rotary_dim": 4}, id="rotary"),
    pytest.param({"attn_layers": (1,), "head_dim": 4}, id="head_dim-4"),
    pytest.param({"attn_layers": (1,), "head_dim": 4, "head_layout": "dh"}, id="head_layout-dh"),
    pytest.param({"attn_layers": (1,), "learned_positions": 64}, id="learned-positions"),
    pytest.param({"attn_layers": (), "mixer_options": {"shift": "none"}}, id="no-shift"),
    pytest.param({"attn_layers": (1,), "mixer": "s4d"}, id="s4d"),
    pytest.param({"attn_layers": (1,), "mixer": "s4"}, id="s4"),
    pytest.param({"attn_layers": (1,), "mixer": "dss"}, id="dss"),
    pytest.param({"attn_layers": (1,), "mixer": "gss"}, id="gss"),
    pytest.param({"attn_layers": (0, 1, 2)}, id="attention"),
]
MakeModel = Callable[..., H3ForCausalLM]


@pytest.fixture
def make_model() -> MakeModel:
    """A small random model in float64, in which the greedy token is never a close call."""

    def make(seed: int = 0, **changes: Any) -> H3ForCausalLM:
        fields = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "state_size": 8,
            "initializer_range": 0.2,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return H3ForCausalLM(H3Config(**{**fields, **changes})).eval().double()

    return make


@pytest.fixture
def ids(generator: torch.Generator) -> Callable[..., Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randint(VOCAB, shape, generator=generator)

    return draw


def written_by_transformers(model: H3ForCausalLM, prompts: list[Tensor], **options: Any) -> Tensor:
    """New tokens of left-padded prompts, as Transformers writes them."""
    longest = max(map(len, prompts))
    batch = torch.stack([F.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([F.pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts])
    options = {"max_new_tokens": N_NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(batch, attention_mask=mask, **options)[:, longest:]


@pytest.mark.parametrize("chunk_len", [None, 1, 3, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_sequences_are_those_of_transformers(make_model, ids, shape, chunk_len):
    model, prompt = make_model(**shape), ids(3, 10)
    expected = model.generate(prompt, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    got = generate(model, prompt, max_new_tokens=N_NEW, chunk_len=chunk_len)
    assert torch.equal(got.sequences, expected)
    assert got.finish_reasons == ("length",) * 3
    assert got.lengths.tolist() == [N_NEW] * 3


@pytest.mark.parametrize("chunk_len", [None, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_prompts_in_any_form(make_model, ids, shape, chunk_len):
    model = make_model(**shape)
    prompts = [ids(n) for n in (12, 5, 1, 9)]
    expected = written_by_transformers(model, prompts)
    writer = Generator(model, chunk_len=chunk_len)
    sampling = Sampling(max_new_tokens=N_NEW, temperature=0)
    left = torch.stack([F.pad(prompt, (12 - len(prompt), 0), value=96) for prompt in prompts])
    right = torch.stack([F.pad(prompt, (0, 12 - len(prompt)), value=96) for prompt in prompts])
    ones = [torch.ones_like(prompt) for prompt in prompts]
    left_mask = torch.stack([F.pad(one, (12 - len(one), 0)) for one in ones])
    right_mask = torch.stack([F.pad(one, (0, 12 - len(one))) for one in ones])
    forms: list[tuple[Any, dict[str, Any]]] = [
        (prompts, {}),
        ([prompt.tolist() for prompt in prompts], {}),
        (left, {"attention_mask": left_mask}),
        (right, {"attention_mask": right_mask}),
        (right, {"lengths": [12, 5, 1, 9]}),
        (right, {"lengths": torch.tensor([12, 5, 1, 9])}),
    ]
    for prompt, options in forms:
        assert torch.equal(writer.generate(prompt, sampling, **options).tokens, expected)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_the_static_cache_of_transformers_writes_the_same(make_model, ids, shape):
    model, prompt = make_model(**shape), ids(2, 6)
    expected = model.generate(prompt, max_new_tokens=N_NEW, do_sample=False, cache_implementation="static")
    assert torch.equal(generate(model, prompt, max_new_tokens=N_NEW).sequences, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_going_on_from_a_state_equals_the_uninterrupted_run(make_model, ids, shape):
    model = make_model(**shape)
    prompts = [ids(n) for n in (7, 2, 4)]
    whole = generate(model, prompts, max_new_tokens=2 * N_NEW, keep_state=True)
    first = generate(model, prompts, max_new_tokens=N_NEW, keep_state=True)
    nothing = torch.zeros(3, 0, dtype=torch.long)
    second = generate(model, nothing, max_new_tokens=N_NEW, state=first.state, keep_state=True)
    assert torch.equal(torch.cat((first.tokens, second.tokens), 1), whole.tokens)
    assert second.state.n_tokens == whole.state.n_tokens == [7 + 18, 2 + 18, 4 + 18]
    for (name, got), (_, wanted) in zip(second.state.tensors(), whole.state.tensors(), strict=True):
        rows = [x[:, :, :25] if x.ndim == 4 and "keys" in name else x for x in (got, wanted)]
        torch.testing.assert_close(rows[0].double(), rows[1].double(), rtol=1e-9, atol=1e-9, check_dtype=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_turns_of_different_lengths(make_model, ids, shape):
    """Two turns, ragged both times, against the whole conversations read at once."""
    model = make_model(**shape)
    writer = Generator(model, chunk_len=5)
    turns = [[ids(n) for n in lengths] for lengths in ((6, 1, 11), (2, 8, 0))]
    state = writer.read(turns[0])
    before = [tensor.clone() for _, tensor in state.tensors()]
    got = writer.generate(turns[1], Sampling(max_new_tokens=N_NEW, temperature=0), state=state)
    whole = [torch.cat(parts) for parts in zip(*turns, strict=True)]
    assert torch.equal(got.tokens, written_by_transformers(model, whole))
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, state.tensors(), strict=True))


def test_forks_go_their_own_ways(make_model, ids):
    model = make_model(attn_layers=(1,))
    prompt = ids(2, 5)
    state = Generator(model).read(prompt)
    forked = state.fork(4)
    assert forked.batch == 8
    nothing = torch.zeros(8, 0, dtype=torch.long)
    got = generate(model, nothing, state=forked, temperature=1.0, seed=3, max_new_tokens=N_NEW)
    assert len({tuple(row) for row in got.tokens.tolist()}) > 6
    again = generate(model, prompt.repeat_interleave(4, 0), temperature=1.0, seed=3, max_new_tokens=N_NEW)
    assert torch.equal(got.tokens, again.tokens)
    with pytest.raises(ValueError, match="at least 1"):
        state.fork(0)


def test_the_end_token_ends_a_row_and_padding_follows(make_model, ids):
    model, prompts = make_model(attn_layers=(1,)), [ids(4), ids(8), ids(8)]
    free = generate(model, prompts, max_new_tokens=N_NEW)
    eos = int(free.tokens[1, 3])
    model.generation_config.eos_token_id = eos
    expected = written_by_transformers(model, prompts, pad_token_id=5)
    got = generate(model, prompts, max_new_tokens=N_NEW, pad_token_id=5, log_probs=True)
    assert torch.equal(got.tokens, expected)
    assert got.finish_reasons[1] == "eos"
    assert got.lengths[1] == free.tokens[1].tolist().index(eos) + 1
    assert (got.log_probs[1, got.lengths[1] :] == 0).all()
    other = generate(model, prompts, max_new_tokens=N_NEW, eos_token_id=())
    assert torch.equal(other.tokens, free.tokens)
    several = generate(model, prompts, max_new_tokens=N_NEW, eos_token_id=[eos, int(free.tokens[0, 1])])
    assert several.lengths[0] <= 2


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_rows_that_have_ended_are_dropped(make_model, ids, shape, monkeypatch):
    model, prompts = make_model(**shape), [ids(n) for n in (4, 7, 2, 9, 5)]
    options = {"temperature": 1.0, "seed": 3, "max_new_tokens": 80, "log_probs": True}
    batches = []
    advance = H3Decoder.advance
    monkeypatch.setattr(
        H3Decoder, "advance", lambda self, tokens: (batches.append(len(tokens)), advance(self, tokens))[1]
    )
    together = generate(model, prompts, eos_token_id=range(0, 97, 8), **options)
    assert batches[0] == 5
    assert batches[-1] == 1
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], eos_token_id=range(0, 97, 8), rows=[row], **options)
        n = int(alone.lengths[0])
        assert together.lengths[row] == n
        assert torch.equal(together.tokens[row, :n], alone.tokens[0])
        torch.testing.assert_close(together.log_probs[row, :n], alone.log_probs[0], rtol=1e-5, atol=1e-5)


def test_all_rows_ended_ends_the_work(make_model, ids):
    model, prompt = make_model(), ids(1, 4)
    eos = int(generate(model, prompt, max_new_tokens=3).tokens[0, 2])
    calls = []
    got = generate(model, prompt, max_new_tokens=500, eos_token_id=eos, on_tokens=calls.append)
    assert len(calls) == got.lengths[0] <= 3


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_state_of_rows_that_end_early_is_theirs(make_model, ids, shape):
    model, prompt = make_model(**shape), ids(2, 4)
    eos = int(generate(model, prompt, max_new_tokens=N_NEW).tokens[0, 2])
    got = generate(model, prompt, max_new_tokens=N_NEW, eos_token_id=eos, keep_state=True)
    rows = [torch.cat((p, t[:n])) for p, t, n in zip(prompt, got.tokens, got.lengths.tolist(), strict=True)]
    expected = Generator(model).read(rows)
    assert got.state.n_tokens == expected.n_tokens
    torch.testing.assert_close(got.state.hidden, expected.hidden, rtol=1e-9, atol=1e-9)


def test_log_probabilities_are_the_models_own(make_model, ids):
    model, prompt = make_model(attn_layers=(1,)), ids(2, 6)
    got = generate(model, prompt, max_new_tokens=N_NEW, temperature=2.0, top_k=5, seed=1, log_probs=True)
    logits = model(got.sequences).logits[:, 5:-1].float()
    expected = logits.log_softmax(-1).gather(2, got.tokens.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(got.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert generate(model, prompt, max_new_tokens=2).log_probs is None


def test_repetition_penalty_is_that_of_transformers(make_model, ids):
    model, prompts = make_model(attn_layers=(1,)), [ids(7), ids(7)]
    for penalty in (1.3, 0.7, 5.0):
        expected = written_by_transformers(model, prompts, repetition_penalty=penalty, max_new_tokens=25)
        got = generate(model, prompts, repetition_penalty=penalty, max_new_tokens=25)
        assert torch.equal(got.tokens, expected)
    ragged = [ids(7), ids(3)]
    alone = [generate(model, [prompt], repetition_penalty=5.0, max_new_tokens=25).tokens[0] for prompt in ragged]
    together = generate(model, ragged, repetition_penalty=5.0, max_new_tokens=25).tokens
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(generator, min_p):
    logits = torch.randn(1, 40, generator=generator) * 2
    kept = LogitsProcessorList([MinPLogitsWarper(min_p)])(None, logits.clone()).isfinite()[0]
    sampler = Sampler(Sampling(temperature=1, min_p=min_p, seed=0), 40, device=torch.device("cpu"))
    drawn = {sampler(logits) for _ in range(3000)}
    assert drawn <= set(kept.nonzero().flatten().tolist())
    if min_p >= 0.05:
        assert drawn == set(kept.nonzero().flatten().tolist())


def test_penalty_alone_in_the_sampler(generator):
    logits, text = torch.randn(2, 30, generator=generator), torch.tensor([[1, 4, 4], [2, 3, 5]])
    seen = torch.zeros(2, 30, dtype=torch.bool).scatter_(1, text, True)
    expected = RepetitionPenaltyLogitsProcessor(3.0)(text, logits.clone()).argmax(-1)
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=3.0), 30, device=torch.device("cpu"), batch=2)
    assert torch.equal(sampler.choose(logits, seen), expected)


def test_same_seed_same_text_in_any_company(make_model, ids):
    model = make_model(attn_layers=(1,))
    prompts = [ids(n) for n in (5, 9, 2)]
    options = {"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 20}
    together = generate(model, prompts, seed=11, **options)
    assert torch.equal(generate(model, prompts, seed=together.seed, **options).tokens, together.tokens)
    alone = generate(model, prompts[1:2], seed=11, rows=[1], **options)
    assert torch.equal(alone.tokens[0], together.tokens[1])
    assert not torch.equal(generate(model, prompts, seed=12, **options).tokens, together.tokens)
    free = generate(model, prompts, **options)
    assert torch.equal(generate(model, prompts, seed=free.seed, **options).tokens, free.tokens)


def test_draws_are_not_repeated_after_many_steps(make_model, ids):
    """Random numbers are made 256 steps ahead."""
    sampler = Sampler(Sampling(temperature=1, seed=5), 1000, device=torch.device("cpu"))
    logits = torch.zeros(1, 1000)
    drawn = [sampler(logits) for _ in range(600)]
    assert drawn[:200] != drawn[256:456]
    assert len(set(drawn)) > 400


def test_rows_beyond_the_vocabulary_are_never_written(make_model, ids):
    model = make_model(vocab_size=20, padded_vocab_size=64)
    with torch.no_grad():
        model.lm_head.weight[20:] *= 100
    prompt = ids(4, 4) % 20
    assert generate(model, prompt, max_new_tokens=40, temperature=9.0, seed=0).tokens.max() < 20
    assert generate(model, prompt, max_new_tokens=10).tokens.max() < 20


def test_a_generator_is_used_again(make_model, ids):
    model = make_model(attn_layers=(1,))
    writer = Generator(model)
    sampling = Sampling(max_new_tokens=N_NEW, temperature=0)
    prompts = [ids(3, 6), ids(1, 9), ids(3, 2), ids(5, 12)]
    for prompt in prompts:
        assert torch.equal(writer.generate(prompt, sampling).tokens, written_by_transformers(model, list(prompt)))


def test_streams_step_by_step(make_model, ids):
    model, prompt = make_model(attn_layers=(1,)), ids(2, 5)
    expected = generate(model, prompt, max_new_tokens=N_NEW).tokens.T.tolist()
    writer = Generator(model)
    stream = writer.stream(prompt, Sampling(max_new_tokens=N_NEW, temperature=0))
    assert [step.tokens for step in stream] == expected
    with pytest.raises(StopIteration):
        next(stream)
    first = writer.stream(prompt, Sampling(max_new_tokens=N_NEW, temperature=0))
    next(first)
    writer.generate(prompt, Sampling(max_new_tokens=2, temperature=0))
    assert list(first) == []  # the generator went on to another batch


def test_stop_strings_end_rows_of_a_batch(random_h3, tokenizer):
    writer = Generator(random_h3, tokenizer)
    prompts = [tokenizer(text)["input_ids"] for text in ("hello", "a b c")]
    free = writer.generate(prompts, Sampling(max_new_tokens=30, temperature=1.0, seed=2), eos_token_id=())
    stop = free.texts[0][4:7]
    got = writer.generate(prompts, Sampling(max_new_tokens=30, temperature=1.0, seed=2, stop=(stop,)), eos_token_id=())
    assert got.texts[0] == free.texts[0][: free.texts[0].index(stop)]
    assert got.finish_reasons[0] == "stop"
    assert got.texts[1] == free.texts[1].partition(stop)[0]
    with pytest.raises(ConfigError, match="need a tokenizer"):
        generate(random_h3, prompts, stop="x")


def test_other_models_of_transformers(random_gpt2, ids):
    prompts = [ids(n) for n in (7, 3, 5)]
    expected = written_by_transformers(random_gpt2, prompts)
    for chunk_len in (None, 2):
        got = generate(random_gpt2, prompts, max_new_tokens=N_NEW, chunk_len=chunk_len, pad_token_id=0)
        assert torch.equal(got.tokens, expected)
    with pytest.raises(UnsupportedError, match="H3 models only"):
        Generator(random_gpt2).read(prompts)
    with pytest.raises(UnsupportedError, match="H3 models only"):
        generate(random_gpt2, prompts, keep_state=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_half_precision_keeps_its_recurrence_in_float32(make_model, ids, shape, dtype):
    model = make_model(**shape).to(dtype=torch.float32).to(dtype)
    prompt = ids(2, 8)
    got = generate(model, prompt, max_new_tokens=N_NEW, keep_state=True)
    by_name = dict(got.state.tensors())
    assert by_name["layers.0.diag"].dtype == torch.float32
    assert by_name["layers.0.shift"].dtype == dtype
    with torch.no_grad():
        logits = model(got.sequences).logits[:, 7:-1].float()
    chosen = logits.gather(2, got.tokens.unsqueeze(2)).squeeze(2)
    assert (logits.amax(-1) - chosen).max() <= 0.05 * logits.abs().max()  # greedy, but for rounding


@pytest.mark.parametrize(
    ("prompt", "options", "error", "words"),
    [
        (torch.zeros(2, 0, dtype=torch.long), {}, PromptError, "prompt 0 has no token"),
        ([[1], []], {}, PromptError, "prompt 1 has no token"),
        ([], {}, PromptError, "the batch is empty"),
        (torch.tensor([1, 2]), {}, ValueError, r"shape \(B, L\), got \(2,\)"),
        (torch.tensor([[1.0, 2.0]]), {}, TypeError, "must be integers, got torch.float32"),
        (torch.tensor([[1, VOCAB]]), {}, ValueError, "token id 97 is not in the vocabulary of 97"),
        (torch.tensor([[1, -1]]), {}, ValueError, "token id -1"),
        (torch.tensor([[1, 2]]), {"lengths": [3]}, ValueError, "from 0 to 2"),
        (torch.tensor([[1, 2]]), {"lengths": [1], "attention_mask": torch.ones(1, 2)}, ValueError, "not both"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.ones(2, 2)}, ValueError, "shape of input_ids"),
        (torch.tensor([[1, 2, 3]]), {"attention_mask": torch.tensor([[1, 0, 1]])}, ValueError, "row 0"),
        ([[1, 2]], {"lengths": [1]}, ValueError, "tensor of input_ids"),
        (
            torch.tensor([[1, 2]]),
            {"context": 5},
            PromptError,
            "prompt 0 has 2 tokens, and 9 more .* cache .context. has room for 5",
        ),
        (torch.tensor([[1, 2]]), {"context": 0}, ConfigError, "context must be at least 1"),
        (torch.tensor([[1, 2]]), {"min_p": 1.5}, ConfigError, "min_p must be from 0 to 1"),
        (torch.tensor([[1, 2]]), {"repetition_penalty": 0.0}, ConfigError, "repetition_penalty must be"),
    ],
)
def test_bad_input(make_model, prompt, options, error, words):
    with pytest.raises(error, match=words):
        generate(make_model(attn_layers=(1,)), prompt, max_new_tokens=N_NEW, **options)


def test_a_text_longer_than_the_learned_positions_is_refused(make_model, ids):
    with pytest.raises(PromptError, match="learned positions has room for 16"):
        generate(make_model(attn_layers=(1,), learned_positions=16), ids(1, 10), max_new_tokens=7)


def test_states_of_other_models_and_batches_are_refused(make_model, ids):
    model, other = make_model(), make_model(1)
    state = Generator(model).read(ids(2, 4))
    with pytest.raises(ValueError, match="another model's"):
        generate(other, ids(2, 1), state=state)
    with pytest.raises(ValueError, match="holds 2 texts, got 3 prompts"):
        generate(model, ids(3, 1), state=state)


def test_a_diverged_model_is_a_clear_error(make_model, ids):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        generate(model, ids(2, 4), max_new_tokens=3)


def test_out_of_memory_says_which_batch_would_fit(make_model, ids, monkeypatch):
    model = make_model(attn_layers=(1,))
    row = n_bytes_of_row(model, context=20)
    monkeypatch.setattr("hippos.generate.memory.free_bytes", lambda device: 40 * row)
    fitting = largest_batch(model, context=20)
    assert 1 <= fitting < 40
    with pytest.raises(OutOfMemoryError, match=rf"50 texts of 20 tokens .* a batch of {fitting} would fit"):
        generate(model, ids(50, 11), max_new_tokens=N_NEW)
    assert len(generate(model, ids(fitting, 11), max_new_tokens=N_NEW).tokens) == fitting


def test_the_allocators_error_says_it_too(make_model, ids, monkeypatch):
    model = make_model(attn_layers=(1,))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(model.model.layers[0].mlp, "forward", fail)
    with pytest.raises(OutOfMemoryError, match="out of memory on cpu: 2 texts of 13 tokens"):
        generate(model, ids(2, 4), max_new_tokens=N_NEW)


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_of_a_row_are_counted_right(make_model, shape):
    model = make_model(**shape)
    one, two = (GenerationState.empty(model, batch, context=11).n_bytes for batch in (1, 2))
    assert two - one == n_bytes_of_row(model, context=11)


def test_nothing_is_left_behind(make_model, ids):
    model = make_model()
    writer = Generator(model)
    stream = writer.stream(ids(1, 4), Sampling(max_new_tokens=3))
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not stream.padded_tokens().is_inference()


@pytest.mark.parametrize("chunk_len", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_reading_as_on_a_gpu_leaves_the_same_state(make_model, shape, chunk_len):
    model = make_model(**shape)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias") or "mlp" in name:  # biases begin as zeros
            parameter.data.normal_(0, 0.2, generator=generator)
    texts = [torch.randint(VOCAB, (n,), generator=generator) for n in (9, 17, 1)]
    for pieces in (texts, [texts[1], texts[1].flip(0)]):
        states = []
        for is_fused in (False, True):
            decoder = H3Decoder(model, GenerationState.empty(model, len(pieces), context=40), chunk_len=chunk_len)
            decoder._reads_fused = is_fused
            decoder.read(pieces)
            decoder.read([piece[:2] for piece in pieces])
            states.append(decoder.state)
        for (name, plain), (_, fused) in zip(*(state.tensors() for state in states), strict=True):
            torch.testing.assert_close(
                fused, plain, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )
