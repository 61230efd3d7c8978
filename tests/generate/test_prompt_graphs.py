"""Graphs of reading, with single operations in the place of a captured graph: what is kept, and what goes where."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hippos.generate import Generator, prompt_graphs
from hippos.generate.chunk import padded_len
from hippos.generate.fused_read import FusedRead
from hippos.generate.h3_decoder import H3Decoder
from hippos.generate.prompt_graphs import PromptGraphs


@pytest.fixture
def captured(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes that were captured."""
    shapes = []

    def capture(graph: prompt_graphs._PromptGraph, pool: object) -> SimpleNamespace:
        shapes.append(tuple(graph._ids.shape))
        return SimpleNamespace(replay=lambda: graph._decoder.read_padded(graph._ids, graph._n_padding))

    monkeypatch.setattr(FusedRead, "fits", staticmethod(lambda model: True))
    monkeypatch.setattr(prompt_graphs._PromptGraph, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return shapes


@pytest.mark.parametrize("shape", [{"attn_layers": (1,)}, {"attn_layers": (0, 2), "rotary_dim": 4}])
def test_a_length_that_comes_again_is_captured_and_leaves_the_same_state(make_model, ids, captured, shape):
    model = make_model(**shape)
    plain, writer = Generator(model), Generator(model)
    writer._prompts = PromptGraphs(model)
    texts = [ids(1, 7), ids(1, 40), ids(1, 3), ids(1, 70), ids(2, 9), ids(1, 64)]
    for text in texts:
        got, wanted = writer.read(text), plain.read(text)
        assert got.n_tokens == wanted.n_tokens
        for (name, x), (_, y) in zip(got.tensors(), wanted.tensors(), strict=True):
            assert torch.equal(x, y), name
    assert captured == [(1, 64)]
    ragged = [texts[3][0], texts[4][0]]
    assert torch.equal(writer.read(ragged).hidden, plain.read(ragged).hidden)
    assert writer.read(texts[4]).n_tokens == [9, 9]
    assert captured == [(1, 64), (2, 64)]


def test_later_tokens_and_many_are_read_without_a_graph(make_model, ids, captured, monkeypatch):
    model, padded = make_model(attn_layers=(1,)), []
    monkeypatch.setattr("hippos.generate.h3_decoder.MOST_REPLAYED", 128)
    monkeypatch.setattr("hippos.generate.h3_decoder.MOST_PADDED", 512)
    read = H3Decoder.read_padded
    monkeypatch.setattr(H3Decoder, "read_padded", lambda *args: padded.append(tuple(args[1].shape)) or read(*args))
    writer = Generator(model)
    writer._prompts = PromptGraphs(model)
    for _ in range(2):
        state = writer.read(ids(2, 65))
        writer.read(ids(2, 2), state=state)
        for text in (ids(5, 2), ids(2, 128), ids(2, 257), [ids(65), ids(64)], [ids(65), ids(66)]):
            writer.read(text)
    assert captured == []
    assert padded == [(2, 128), (5, 64), (2, 128)] * 2


def test_prompts_are_padded_to_few_lengths_and_by_little():
    short = {padded_len(n) for n in range(1, 2049)}
    assert len(short) == 24
    for n in (1, 64, 65, 513, 1025, 2047, 2049, 5000):
        assert n <= padded_len(n) < max(n + 64, 1.125 * n)
        assert padded_len(n) % 64 == 0
        assert padded_len(padded_len(n)) == padded_len(n)


def test_graphs_go_with_the_weights_and_are_few(make_model, ids, captured, monkeypatch):
    monkeypatch.setattr(prompt_graphs, "_MOST_GRAPHS", 2)
    model, text = make_model(attn_layers=()), ids(1, 9)
    writer = Generator(model)
    writer._prompts = PromptGraphs(model)
    before = [writer.read(text).hidden for _ in range(3)]
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert not torch.equal(writer.read(text).hidden, before[-1])
    assert captured == [(1, 64), (1, 64)]
    for n in (65, 129, 9, 65):
        for _ in range(2):
            writer.read(ids(1, n))
        assert len(writer._prompts._graphs) <= 2
    assert captured[2:] == [(1, 128), (1, 192), (1, 64), (1, 128)]
