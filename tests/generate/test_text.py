from __future__ import annotations

import json

import pytest
import torch

from hippos.errors import CheckpointError, TokenizerError
from hippos.generate import Sampling, generate_text, stream_text

GREEDY = Sampling(temperature=0, max_new_tokens=12)


def test_pieces_come_as_they_are_written(script, tokenizer):
    model = script("h\u00e9llo" + "." * 20)
    stream = stream_text(model, tokenizer, "p", GREEDY)
    assert next(stream) == "h"
    assert model.n_calls == 1
    assert next(stream) == "\u00e9"
    assert model.n_calls == 3


def test_length_ends_the_text(script, tokenizer):
    result = generate_text(script("abcdef" * 3), tokenizer, "prompt", GREEDY)
    assert (result.text, result.finish_reason) == ("abcdefabcdef", "length")
    assert (result.n_prompt_tokens, result.n_new_tokens) == (6, 12)


def test_end_of_text_token_ends_the_text_and_is_not_part_of_it(script, tokenizer):
    result = generate_text(script("ab<|endoftext|>cd"), tokenizer, "p", GREEDY)
    assert (result.text, result.finish_reason, result.n_new_tokens) == ("ab", "eos", 3)


def test_stop_string_across_tokens_ends_the_text_at_once(script, tokenizer):
    model = script("one\n\ntwo")
    result = generate_text(model, tokenizer, "p", Sampling(temperature=0, stop=("\n\n",)))
    assert (result.text, result.finish_reason) == ("one", "stop")
    assert model.n_calls == 5


def test_no_piece_holds_a_part_of_the_stop_string(script, tokenizer):
    stream = stream_text(script("a\nb\n\nc"), tokenizer, "p", Sampling(temperature=0, stop=("\n\n",)))
    assert list(stream) == ["a", "\nb"]


def test_a_beginning_of_a_stop_string_at_the_end_is_text(script, tokenizer):
    result = generate_text(script("ab\n"), tokenizer, "p", Sampling(temperature=0, stop=("\n\n",), max_new_tokens=3))
    assert (result.text, result.finish_reason) == ("ab\n", "length")


def test_result_before_the_end_is_refused(script, tokenizer):
    stream = stream_text(script("abc" * 9), tokenizer, "p", GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="not been read to its end"):
        _ = stream.result


def test_result_is_ready_for_json(script, tokenizer):
    result = generate_text(script("abc" * 9), tokenizer, "p", GREEDY)
    data = json.loads(json.dumps(result.as_dict()))
    assert data["text"] == result.text
    assert data["tokens_per_s"] == pytest.approx(11 / result.rest_s)


def test_speed_of_a_single_token_is_unknown(script, tokenizer):
    assert generate_text(script("a"), tokenizer, "p", Sampling(max_new_tokens=1)).tokens_per_s is None


def test_empty_prompt_is_an_error(script, tokenizer):
    with pytest.raises(TokenizerError, match="makes no token"):
        stream_text(script("a"), tokenizer, "")


def test_tokenizer_of_another_model_is_an_error(script, tokenizer):
    with pytest.raises(TokenizerError, match=r"makes id \d+ for 'z', the model knows ids below 10"):
        stream_text(script("a", vocab_size=10), tokenizer, "z")


@pytest.mark.parametrize("name", ["random_gpt2", "random_h3"])
def test_greedy_is_what_transformers_writes(name, request, tokenizer):
    model = request.getfixturevalue(name)
    prompt = tokenizer("hello", return_tensors="pt")
    beyond = list(range(len(tokenizer), model.config.vocab_size))
    expected = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0, suppress_tokens=beyond)
    expected_text = tokenizer.decode(expected[0, 5:], skip_special_tokens=True)
    assert generate_text(model, tokenizer, "hello", GREEDY).text == expected_text


def test_same_seed_same_text_and_another_seed_another(random_gpt2, tokenizer):
    def write(seed: int) -> str:
        return generate_text(random_gpt2, tokenizer, "hello", Sampling(seed=seed, max_new_tokens=20)).text

    assert write(1) == write(1)
    assert write(1) != write(2)


def test_rows_beyond_the_tokenizer_are_never_written(random_gpt2, tokenizer):
    stream = stream_text(random_gpt2, tokenizer, "hello", Sampling(seed=0, temperature=5.0, max_new_tokens=100))
    assert random_gpt2.config.vocab_size > len(tokenizer)
    list(stream)  # a row beyond the tokenizer would raise in its decoder or come out as nothing
    assert all(token < len(tokenizer) for token in stream._steps.new_tokens[0])


def test_nothing_is_left_in_inference_mode(random_gpt2, tokenizer):
    stream = stream_text(random_gpt2, tokenizer, "hello", GREEDY)
    next(stream)
    assert not torch.is_inference_mode_enabled()


def test_error_of_the_model_reaches_the_reader(script, tokenizer):
    model = script("ab")  # the script ends after two tokens
    with pytest.raises(IndexError):
        generate_text(model, tokenizer, "p", GREEDY)


def test_diverged_model_is_a_clear_error(random_gpt2, tokenizer):
    class Diverged(type(random_gpt2)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * float("nan")
            return output

    model = Diverged(random_gpt2.config).eval()
    with pytest.raises(CheckpointError, match="not finite"):
        generate_text(model, tokenizer, "hello", GREEDY)
