"""Writing text with a language model: decoding, sampling, streaming, stop strings."""

from __future__ import annotations

from hippos.generate.load import load_text_model
from hippos.generate.sampling import Sampling
from hippos.generate.text import GeneratedText, TextStream, generate_text, stream_text
from hippos.generate.tokens import generate_tokens

__all__ = [
    "GeneratedText",
    "Sampling",
    "TextStream",
    "generate_text",
    "generate_tokens",
    "load_text_model",
    "stream_text",
]
