"""Text generation: parallel prefill, step by step decoding, sampling, streaming, batches."""

from __future__ import annotations

from hippos.generate.batch_file import BatchReport, answer_file
from hippos.generate.engine import Generator
from hippos.generate.generated import Generated
from hippos.generate.int8 import quantise_int8
from hippos.generate.load import load_text_model
from hippos.generate.one_call import generate
from hippos.generate.sampling import Sampling
from hippos.generate.state import GenerationState
from hippos.generate.state_file import load_state, save_state
from hippos.generate.stream import NewTokens, TokenStream
from hippos.generate.text import GeneratedText, TextStream, generate_text, stream_text

__all__ = [
    "BatchReport",
    "Generated",
    "GeneratedText",
    "GenerationState",
    "Generator",
    "NewTokens",
    "Sampling",
    "TextStream",
    "TokenStream",
    "answer_file",
    "generate",
    "generate_text",
    "load_state",
    "load_text_model",
    "quantise_int8",
    "save_state",
    "stream_text",
]
