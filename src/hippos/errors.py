"""Every exception that a caller may want to catch.

The command line prints any `HipposError` as one plain line; a library caller catches the class that says what happened.
Wrong arguments of a function (shapes, dtypes, ranges) raise the built-in ``ValueError`` or ``TypeError``.
"""

from __future__ import annotations


class HipposError(Exception):
    """Base of all errors that this package raises on purpose."""


class UnsupportedError(HipposError, NotImplementedError):
    """The request is meaningful, but this implementation, device or dtype cannot meet it."""


class ConfigError(HipposError, ValueError):
    """A configuration, recipe or ``--set`` value is unknown or contradicts another."""


class CheckpointError(HipposError):
    """A checkpoint is damaged, foreign, unsafe to open, or does not match the model."""


class CorpusError(HipposError, ValueError):
    """A corpus is missing, empty, binary, or too short for the requested sequence length."""


class TokenizerError(HipposError, ValueError):
    """A tokenizer is missing or does not fit the model."""


class TrainingError(HipposError):
    """A training run cannot go on: the loss is not finite, the disk is full, or the resume state does not fit."""


class BenchmarkError(HipposError):
    """A benchmarked method gives a wrong result, so its time is not shown."""


class PromptError(HipposError, ValueError):
    """A prompt is empty, or longer than the model or its cache can hold."""


class OutOfMemoryError(HipposError, MemoryError):
    """The device has too little memory for a batch; the message says which batch would fit."""


class StateError(HipposError):
    """A saved state is damaged, foreign, or does not belong to the model."""
