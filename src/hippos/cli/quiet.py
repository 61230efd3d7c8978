"""Silence for what other libraries tell their developers; a person at the command line gets our own words instead."""

from __future__ import annotations

from hippos.cli.failures import is_debugging


def quiet_transformers() -> None:
    """Show no warnings or loading bars of Transformers: what matters of them, hippos checks and raises."""
    from transformers.utils import logging

    if is_debugging():
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
