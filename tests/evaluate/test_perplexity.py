"""Perplexity: every token once, whatever the windows, and equal to the model's own loss."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from hippos.data import pack_in_memory, train_tokenizer
from hippos.errors import CorpusError, TokenizerError
from hippos.evaluate import TextScore, score_packed, score_text, token_nll
from hippos.models import H3Config, H3ForCausalLM
from hippos.ops.cross_entropy import chunked

VOCAB = 300
TEXTS = ("The hippo déjà vu.\n" * 3, "Another text.")


@pytest.fixture(scope="module")
def model() -> H3ForCausalLM:
    torch.manual_seed(0)
    config = H3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_layers=(1,),
        state_size=4,
        initializer_range=0.3,
        residual_dropout=0.2,
    )
    return H3ForCausalLM(config).double().train()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(1, VOCAB, 41).astype(np.uint16)


def reference_nll(model: H3ForCausalLM, ids: np.ndarray) -> torch.Tensor:
    """Nll of ids[1:], each from all ids before it."""
    inputs = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        logits = model.eval()(inputs).logits[0, :-1]
    model.train()
    return F.cross_entropy(logits.float(), inputs[0, 1:], reduction="none")


@pytest.mark.parametrize("n_parts", [2, 3, 7])
def test_parts_add_up_and_call_the_model_equally_often(
    model: H3ForCausalLM, tokens: np.ndarray, n_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0] * n_parts
    forward = model.model.forward
    total = 0.0
    for index in range(n_parts):

        def counted(*args: object, index: int = index, **kwargs: object) -> object:
            calls[index] += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(model.model, "forward", counted)
        total += token_nll(model, tokens, window=7, batch_size=2, part=(index, n_parts))
    monkeypatch.undo()
    assert len(set(calls)) == 1
    assert total == pytest.approx(token_nll(model, tokens, window=7, batch_size=2), rel=1e-9)


def test_one_window_is_the_models_own_loss(model: H3ForCausalLM, tokens: np.ndarray) -> None:
    expected = reference_nll(model, tokens).sum().item()
    assert token_nll(model, tokens, window=40) == pytest.approx(expected, rel=1e-6)
    assert token_nll(model, tokens, window=1000) == pytest.approx(expected, rel=1e-6)
    assert model.training, "the model comes back in the mode it was in"


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_windows_without_overlap_start_afresh(model: H3ForCausalLM, tokens: np.ndarray, batch_size: int) -> None:
    parts = [tokens[start : start + 13] for start in (0, 12, 24, 36)]  # the last is shorter: 5 ids
    expected = sum(reference_nll(model, part).sum().item() for part in parts)
    assert token_nll(model, tokens, window=12, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_overlapping_windows_count_each_token_once(model: H3ForCausalLM, tokens: np.ndarray, batch_size: int) -> None:
    expected = reference_nll(model, tokens[:13]).sum().item()
    for start in (5, 10, 15, 20, 25):
        expected += reference_nll(model, tokens[start : start + 13])[-5:].sum().item()
    # Inputs 37, 38, 39 are left, for the window that starts at 30.
    expected += reference_nll(model, tokens[30:41])[-3:].sum().item()
    actual = token_nll(model, tokens, window=12, stride=5, batch_size=batch_size)
    assert actual == pytest.approx(expected, rel=1e-6)


def test_reset_id_separates_documents(model: H3ForCausalLM, tokens: np.ndarray) -> None:
    packed = tokens.copy()
    packed[[0, 15, 30]] = 0
    expected = sum(reference_nll(model, packed[a : b + 1]).sum().item() for a, b in ((0, 15), (15, 30), (30, 40)))
    assert token_nll(model, packed, window=100, reset_id=0) == pytest.approx(expected, rel=1e-6)
    assert token_nll(model, packed, window=100) != pytest.approx(expected, rel=1e-4)


def test_progress_counts_to_the_end(model: H3ForCausalLM, tokens: np.ndarray) -> None:
    seen: list[int] = []
    token_nll(model, tokens, window=12, stride=5, batch_size=2, on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 40


def test_whole_logits_score_the_same(model: H3ForCausalLM, tokens: np.ndarray) -> None:
    chunked = token_nll(model, tokens, window=12, stride=5, batch_size=2)
    head = copy.deepcopy(model)
    head.lm_head = torch.nn.Sequential(head.lm_head)  # no plain product any more
    assert token_nll(head, tokens, window=12, stride=5, batch_size=2) == pytest.approx(chunked, rel=1e-6)


def test_logits_never_exist_whole(model: H3ForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hippos.evaluate.perplexity.CHUNK_TOKENS", 8)
    seen = []

    def spy(logits: torch.Tensor, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(logits.shape)
        return softmax(logits, *args)

    softmax = chunked._softmax
    monkeypatch.setattr(chunked, "_softmax", spy)
    text = np.random.default_rng(1).integers(1, VOCAB, 101)
    whole = token_nll(model, text, window=50, batch_size=2)
    assert len(seen) == 13
    assert {shape[0] for shape in seen} == {8, 4}
    monkeypatch.setattr("hippos.evaluate.perplexity.CHUNK_TOKENS", 1000)
    assert token_nll(model, text, window=50, batch_size=2) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(("window", "stride"), [(0, None), (4, 0), (4, 5)])
def test_impossible_windows_are_refused(
    model: H3ForCausalLM, tokens: np.ndarray, window: int, stride: int | None
) -> None:
    with pytest.raises(ValueError, match=f"got window {window} and stride"):
        token_nll(model, tokens, window=window, stride=stride)


def test_one_id_predicts_nothing(model: H3ForCausalLM) -> None:
    with pytest.raises(ValueError, match="at least 2 ids are needed to predict one, got 1"):
        token_nll(model, np.asarray([3]), window=4)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 270)


class TestText:
    """Scores of texts."""

    def test_bits_per_byte_count_the_text_only(self, model: H3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        score = score_text(model, tokenizer, TEXTS, window=64)
        ids = pack_in_memory(TEXTS, tokenizer).tokens
        assert score.nll_sum == pytest.approx(reference_nll(model, ids).sum().item(), rel=1e-6)
        assert score.n_bytes == sum(len(text.encode()) for text in TEXTS)
        assert score.n_tokens == len(ids) - 1
        assert score.bits_per_byte == pytest.approx(score.nll_sum / math.log(2) / score.n_bytes)
        assert score.perplexity == pytest.approx(math.exp(score.nll_sum / score.n_tokens))

    def test_packed_text_scores_the_same(self, model: H3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        packed = pack_in_memory(TEXTS, tokenizer)
        assert score_packed(model, packed, window=16) == score_text(model, tokenizer, TEXTS, window=16)
        apart = score_packed(model, packed, window=1000, reset_at_documents=True)
        assert apart.nll_sum == pytest.approx(token_nll(model, packed.tokens, window=1000, reset_id=0))

    def test_no_text_is_refused(self, model: H3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(CorpusError, match="the corpus is empty"):
            score_text(model, tokenizer, [], window=16)

    def test_tokenizer_that_does_not_fit_is_refused(self, model: H3ForCausalLM) -> None:
        draw = np.random.default_rng(0)
        text = " ".join("".join(draw.choice(list("abcdefgh"), 5)) for _ in range(400))
        larger = train_tokenizer([text], 400)
        with pytest.raises(TokenizerError, match="the model has only 300 tokens"):
            score_text(model, larger, [text], window=16)


def test_hopeless_model_has_a_finite_perplexity() -> None:
    assert math.isfinite(TextScore(1e6, 10, 10).perplexity)
