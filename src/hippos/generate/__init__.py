"""Writing text with a language model: decoding loops, streaming, stop strings."""
