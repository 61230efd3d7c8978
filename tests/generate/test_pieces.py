from __future__ import annotations

import pytest

from hippos.generate.pieces import PieceDecoder, StopFilter

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("text", ["plain", "na\u00efve \u20ac5 \U0001f99b \u6cb3\u9a6c!", " lead  and trail \n"])
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, text):
    decoder = PieceDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert decoder.flush() == ""
    assert REPLACEMENT not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) == len(text)


def test_half_a_character_at_the_end_is_flushed_as_the_tokenizer_decodes_it(tokenizer):
    ids = tokenizer("a\U0001f99b")["input_ids"][:-1]
    decoder = PieceDecoder(tokenizer)
    shown = "".join(decoder.push(token) for token in ids)
    assert shown == "a"
    assert shown + decoder.flush() == tokenizer.decode(ids)


def test_bytes_that_are_no_character_do_not_hold_back_what_follows(tokenizer):
    ids = [*tokenizer("\u20ac")["input_ids"][:1], *tokenizer("ok")["input_ids"]]
    decoder = PieceDecoder(tokenizer)
    assert "".join(decoder.push(token) for token in ids) == REPLACEMENT + "ok"


def test_special_tokens_are_not_text(tokenizer):
    assert PieceDecoder(tokenizer).push(tokenizer.eos_token_id) == ""


class SpaceBetweenWords:
    """A tokenizer whose words get their leading space only after another word, as SentencePiece's do."""

    words = ("state", "space", "models")

    def decode(self, ids, **_):
        return " ".join(self.words[index] for index in ids)


def test_a_space_that_depends_on_the_word_before_is_kept():
    decoder = PieceDecoder(SpaceBetweenWords())
    assert [decoder.push(token) for token in range(3)] == ["state", " space", " models"]


def let_through(stop: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    """The text let through piece by piece (flush last), and whether a stop string came."""
    stops = StopFilter(stop)
    shown = []
    for piece in pieces:
        shown.append(stops.push(piece))
        if stops.has_stopped:
            return shown, True
    return [*shown, stops.flush()], False


def test_without_stop_strings_nothing_is_held_back():
    assert let_through((), ["ab", "c"]) == (["ab", "c", ""], False)


@pytest.mark.parametrize("pieces", [["one END two"], list("one END two"), ["one E", "ND two"], ["one ", "EN", "D"]])
def test_stop_string_is_cut_wherever_the_pieces_break(pieces):
    shown, has_stopped = let_through(("END",), pieces)
    assert has_stopped
    assert "".join(shown) == "one "


def test_the_first_of_several_stop_strings_counts():
    assert "".join(let_through(("cd", "b"), ["ab", "cd"])[0]) == "a"


def test_a_beginning_that_comes_to_nothing_is_shown():
    assert let_through(("aab",), ["a", "a", "a", "c"]) == (["", "", "a", "aac", ""], False)


def test_a_beginning_at_the_very_end_is_flushed():
    assert let_through(("END",), ["x", "EN"]) == (["x", "", "EN"], False)
