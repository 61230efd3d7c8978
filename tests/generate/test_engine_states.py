"""The engine's states: gone on from, forked, kept, counted."""

from __future__ import annotations

import pytest
import torch

from hippos.generate import Generator, Sampling, chunk, generate
from hippos.generate.fused_read import FusedRead
from hippos.generate.h3_decoder import H3Decoder
from hippos.generate.state import GenerationState, n_bytes_of_row
from hippos.layers.ssm_diagonal import DiagonalSSM
from tests.generate.small_models import N_NEW, SHAPES, VOCAB, written_by_transformers


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


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_state_of_rows_that_end_early_is_theirs(make_model, ids, shape):
    model, prompt = make_model(**shape), ids(2, 4)
    eos = int(generate(model, prompt, max_new_tokens=N_NEW).tokens[0, 2])
    got = generate(model, prompt, max_new_tokens=N_NEW, eos_token_id=eos, keep_state=True)
    rows = [torch.cat((p, t[:n])) for p, t, n in zip(prompt, got.tokens, got.lengths.tolist(), strict=True)]
    expected = Generator(model).read(rows)
    assert got.state.n_tokens == expected.n_tokens
    torch.testing.assert_close(got.state.hidden, expected.hidden, rtol=1e-9, atol=1e-9)


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


def test_operators_are_made_once_for_a_generator_and_follow_the_weights(make_model, ids, monkeypatch):
    monkeypatch.setattr(FusedRead, "fits", staticmethod(lambda model: True))  # as on a GPU
    model, prompt = make_model(attn_layers=()), ids(1, 4)
    diags, made = [layer.mixer.diag for layer in model.model.layers], []
    make = DiagonalSSM.forward
    monkeypatch.setattr(DiagonalSSM, "forward", lambda ssm: made.append(ssm) or make(ssm))
    writer = Generator(model)
    first = writer.read(prompt).hidden
    assert torch.equal(writer.read(prompt).hidden, first)
    assert made == diags
    with torch.no_grad():
        diags[0].C.mul_(2)
    assert not torch.equal(writer.read(prompt).hidden, first)
    assert made == [*diags, diags[0]]
    diags[0].C.data.div_(2)  # leaves no trace
    assert torch.equal(Generator(model).read(prompt).hidden, first)


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
        for is_fused, pads in ((False, False), (True, False), (True, True)):
            decoder = H3Decoder(model, GenerationState.empty(model, len(pieces), context=40), chunk_len=chunk_len)
            decoder._reads_fused = is_fused
            decoder._can_pad = decoder._can_pad and pads
            decoder.read(pieces)
            decoder.read([piece[:2] for piece in pieces])
            states.append(decoder.state)
        for fused in states[1:]:
            assert_same_state(fused, states[0])


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[5]])
def test_padded_prompts_of_any_length_leave_the_same_state(make_model, shape, batch, monkeypatch):
    monkeypatch.setattr(FusedRead, "fits", staticmethod(lambda model: True))
    monkeypatch.setattr(chunk, "_LEAST_PADDED", 8)
    model = make_model(**shape)
    read, writer = [], Generator(model, context=64)
    padded = H3Decoder.read_padded
    monkeypatch.setattr(H3Decoder, "read_padded", lambda *args: read.append(args[1].shape) or padded(*args))
    for n in (1, 7, 8, 9, 31, 32, 33):
        texts = [torch.randint(VOCAB, (n - i,), generator=torch.Generator().manual_seed(n)) for i in range(batch)]
        if n > 1 or batch == 1:
            state = GenerationState.empty(model, batch, context=64)
            decoder = H3Decoder(model, state)
            decoder._reads_fused = False
            decoder.read(texts)
            assert_same_state(writer.read(texts), state)
    assert read == [(batch, length) for length in (8, 8, 8, 16, 32, 32, 40)[batch - 1 :]]


def test_a_padded_prompt_is_gone_on_from(make_model, ids, monkeypatch):
    model, text = make_model(attn_layers=(1,)), ids(1, 30)
    wanted = generate(model, text, max_new_tokens=N_NEW).tokens
    monkeypatch.setattr(FusedRead, "fits", staticmethod(lambda model: True))
    writer = Generator(model)
    state = writer.read(text[:, :11])
    greedy = Sampling(max_new_tokens=N_NEW, temperature=0)
    assert torch.equal(writer.generate(text[:, 11:], greedy, state=state).tokens, wanted)


def assert_same_state(got: GenerationState, wanted: GenerationState) -> None:
    """Equal but for keys and values behind the ends of texts."""
    assert got.n_tokens == wanted.n_tokens
    for (name, x), (_, y) in zip(got.tensors(), wanted.tensors(), strict=True):
        for row, n in enumerate(got.n_tokens):
            ends = (slice(None), slice(n)) if name.endswith(("keys", "values")) else ()
            torch.testing.assert_close(
                x[row][ends], y[row][ends], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )
