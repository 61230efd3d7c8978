"""Names on the Hugging Face hub: asked once and quickly, where the libraries that load them retry for a minute."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

__all__ = ["first_line", "is_hub_name", "why_not_on_hub"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_ANSWER_S = 10.0


def is_hub_name(name: str) -> bool:
    """Whether ``name`` is written like one: ``gpt2``, ``owner/model``."""
    return _NAME.fullmatch(name) is not None


def why_not_on_hub(name: str, files: Sequence[str] = (), *, kind: Literal["model", "dataset"] = "model") -> str | None:
    """None if the hub or its local cache knows the name, else the reason in one line.

    Args:
        name: Of a model, or of a data set.
        files: Of a model: any of these in the local cache is enough.
        kind: What the name should be of.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if not is_hub_name(name):
        return "it is not written like one"
    if kind == "dataset" and _is_cached_dataset(name):
        return None
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return None
    if constants.HF_HUB_OFFLINE:
        return "offline by HF_HUB_OFFLINE, and not in the local cache"
    api = HfApi()
    try:
        if kind == "model":
            api.model_info(name, timeout=_ANSWER_S)
        else:
            api.dataset_info(name, timeout=_ANSWER_S)
    except Exception as error:  # whatever the HTTP library of the installed version raises
        return first_line(error)
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _is_cached_dataset(name: str) -> bool:
    """Whether Datasets has a folder for the name, which it writes as ``owner___name``, in its own spelling."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE)
    return folder.is_dir() and any(_letters(path.name) == _letters(name) for path in folder.iterdir())


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
