"""Metrics: perplexity and bits per byte, and n-gram models for comparison."""

from __future__ import annotations

from hippos.evaluate.ngram import NgramModel
from hippos.evaluate.perplexity import TextScore, score_packed, score_text, token_nll

__all__ = ["NgramModel", "TextScore", "score_packed", "score_text", "token_nll"]
