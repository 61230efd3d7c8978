"""Writing text with a language model: prompts read in parallel, tokens written in steps, sampled, streamed, batched."""

from __future__ import annotations

from hippos.generate.engine import Generated, Generator, generate
from hippos.generate.load import load_text_model
from hippos.generate.sampling import Sampling
from hippos.generate.state import GenerationState
from hippos.generate.stream import NewTokens, TokenStream
from hippos.generate.text import GeneratedText, TextStream, generate_text, stream_text

__all__ = [
    "Generated",
    "GeneratedText",
    "GenerationState",
    "Generator",
    "NewTokens",
    "Sampling",
    "TextStream",
    "TokenStream",
    "generate",
    "generate_text",
    "load_text_model",
    "stream_text",
]
