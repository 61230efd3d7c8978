"""Opening a model and its tokenizer by what a person types: a folder, a training run, or a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hippos.data.hub import first_line, is_hub_name, why_not_on_hub
from hippos.errors import CheckpointError, ConfigError, TokenizerError, UnsupportedError
from hippos.generate.int8 import quantise_int8, require_int8

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_text_model(
    name: str,
    *,
    tokenizer: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    int8: bool = False,
) -> tuple[Any, Any]:
    """Load a model for generation.

    Args:
        name: A model folder, a training run's folder, or the name of a model on the Hugging Face hub.
        tokenizer: Folder or hub name of the tokenizer, if the model's folder has none.
        dtype: Of the weights: "float32", "bfloat16", "float16", "float64", one of torch's, or "auto", which keeps the
            checkpoint's. SSM parameters of H3 stay float32.
        device: "auto" takes the first CUDA device, or the CPU.
        int8: Whether the weights become int8, see `quantise_int8`.

    Returns:
        The model in evaluation mode on ``device``, and its tokenizer.

    Raises:
        ConfigError: If ``dtype`` is none of these.
        CheckpointError: If there is no such model, or it cannot be opened.
        TokenizerError: If there is no tokenizer.
        UnsupportedError: If the device is not there, or `quantise_int8` refuses.
    """
    from transformers import AutoTokenizer

    import hippos.models  # noqa: F401  (the command has not registered H3 yet)

    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    place = find_device(device)
    if int8:
        require_int8(place)
    source = find_model(name)
    tokenizer_source = _find_tokenizer(source, tokenizer)
    try:
        opened = AutoTokenizer.from_pretrained(tokenizer_source)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"no tokenizer can be read from {tokenizer_source}: {first_line(error)}") from error
    model = _open_model(source, dtype).eval()
    if int8:
        quantise_int8(model, device=place)
    return model.to(place), opened


def _open_model(source: str, dtype: str | torch.dtype) -> Any:
    """The model, every weight of it from the checkpoint: Transformers only warns of those it had to make up."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"no model can be read from {source}: {first_line(error)}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise CheckpointError(f"{source} lacks {len(missing)} of the model's weights, {missing[0]} among them")
    return model


def find_device(device: str | torch.device) -> torch.device:
    """The device meant by ``device``.

    Raises:
        UnsupportedError: If it is not a device's name, or this machine does not have it.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(f"this machine has no device {str(device)!r}: {first_line(error)}") from error
    return place


def find_model(name: str) -> str:
    """The folder, or the hub name, that ``name`` means.

    Raises:
        CheckpointError: If it means nothing; the message says what was looked for.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _check_holds_model(path)
        return str(path)
    if path.exists():
        raise CheckpointError(f"{name} is a file, not a model folder; hippos convert makes a folder of a checkpoint")
    is_local = not is_hub_name(name) or Path(path.parts[0]).is_dir()
    if is_local:
        raise CheckpointError(f"no model folder {name}")
    reason = why_not_on_hub(name, ("config.json",))
    if reason is not None:
        raise CheckpointError(f"no model {name}: there is no such folder, and no such model on the hub ({reason})")
    return name


def _check_holds_model(folder: Path) -> None:
    """Raise unless ``config.json`` is there, and in a run's folder weights, as when the run has finished."""
    is_run, has_weights = (folder / "run.json").is_file(), any(folder.glob("model*.safetensors*"))
    if (folder / "config.json").is_file() and (has_weights or not is_run):
        return
    checkpoints = [path for path in folder.glob("checkpoint-*") if (path / "config.json").is_file()]
    if checkpoints:
        newest = max(checkpoints, key=lambda path: path.stat().st_mtime)
        raise CheckpointError(
            f"{folder} holds no finished model, only checkpoints of its training: {newest} is the last"
        )
    if is_run:
        raise CheckpointError(f"{folder} holds a run that has neither finished nor saved a checkpoint")
    raise CheckpointError(f"{folder} holds no model: there is no config.json in it")


def _find_tokenizer(source: str, tokenizer: str | None) -> str:
    """Where to read the tokenizer from: as said, or beside the model, or in the run that a checkpoint belongs to."""
    if tokenizer is not None:
        return tokenizer
    if not Path(source).is_dir():
        return source
    for folder in (Path(source), Path(source).resolve().parent):
        # Of a folder without any of these, Transformers would make an empty tokenizer.
        if any((folder / file).is_file() for file in _TOKENIZER_FILES):
            return str(folder)
        if not folder.name.startswith("checkpoint-"):
            break
    raise TokenizerError(f"{source} holds no tokenizer (tokenizer.json); name one with --tokenizer")
