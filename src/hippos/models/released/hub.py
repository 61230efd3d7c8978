"""Where a released checkpoint comes from: a file, a folder laid out like a hub repository, or a hub name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hippos.errors import CheckpointError

# Repository -> file -> preset; the first file is the one taken when neither --file nor --preset says which.
RELEASED = {
    "danfu09/H3-125M": {"model.pt": "125m"},
    "danfu09/H3-355M": {"model.pt": "355m"},
    "danfu09/H3-1.3B": {"model.pt": "1.3b"},
    "danfu09/H3-2.7B": {"model-3attn.pt": "2.7b", "model-2attn-rotary.pt": "2.7b-rotary"},
}
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


@dataclass(frozen=True)
class Source:
    """A checkpoint file on this machine.

    Attributes:
        path: The file.
        implied_preset: Preset that the name of the repository and file stands for, None for any other file.
    """

    path: Path
    implied_preset: str | None = None


def find_source(source: str, *, file: str | None = None, preset: str | None = None) -> Source:
    """Find the checkpoint file that a name stands for; download it if it is a hub name.

    Args:
        source: A file; a folder with a checkpoint in it, such as a clone of a hub repository; or a hub name
            (owner/name) where there is no such folder.
        file: Which file of the folder or repository, where it holds several.
        preset: A preset also says which, where both files of danfu09/H3-2.7B are there.

    Returns:
        The file, in the hub's cache if it was downloaded.

    Raises:
        CheckpointError: If there is no such file, folder or repository, the hub cannot be reached, or the folder
            holds several checkpoints and neither argument says which.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path, file=file, preset=preset)
    if path.exists():
        if file is not None:
            raise CheckpointError(f"{source} is a file, so it has no file {file} in it")
        return Source(path)
    if _HUB_NAME.fullmatch(source) and not source.endswith(_SUFFIXES):
        return _on_hub(source, file=file, preset=preset)
    raise CheckpointError(
        f"{source}: no such file or folder, nor a hub name (owner/name); the released ones are {', '.join(RELEASED)}"
    )


def _released_repo(name: str) -> str | None:
    """The released repository that a hub name or the last part of a folder's name means."""
    for repo in RELEASED:
        if name.lower() in (repo.lower(), repo.split("/")[1].lower()):
            return repo
    return None


def _released_file(repo: str, preset: str | None) -> str:
    files = RELEASED[repo]
    return next((file for file, theirs in files.items() if preset and theirs == preset.lower()), next(iter(files)))


def _in_folder(folder: Path, *, file: str | None, preset: str | None) -> Source:
    repo = _released_repo(folder.resolve().name)
    presets = RELEASED[repo] if repo else {}
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _SUFFIXES and entry.is_file())
    if file is None and len(found) == 1:
        file = found[0]
    if file is None and repo and _released_file(repo, preset) in found:
        file = _released_file(repo, preset)
    if file is None and not found:
        raise CheckpointError(f"{folder}: no checkpoint in this folder (a file that ends in {', '.join(_SUFFIXES)})")
    if file is None:
        raise CheckpointError(f"{folder}: several checkpoints, choose one with --file: {', '.join(found)}")
    if not (folder / file).is_file():
        raise CheckpointError(f"{folder}: no file {file} in it; it has {', '.join(found) or 'no checkpoint'}")
    return Source(folder / file, presets.get(file))


def _on_hub(name: str, *, file: str | None, preset: str | None) -> Source:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    repo = _released_repo(name) or name
    wanted = file or (_released_file(repo, preset) if repo in RELEASED else "model.pt")
    try:
        with _quiet():
            path = Path(huggingface_hub.hf_hub_download(repo_id=repo, filename=wanted))
    except LocalEntryNotFoundError as error:  # A kind of EntryNotFoundError, so it comes first.
        raise CheckpointError(
            f"{repo}: {wanted} is not in the hub's cache on this machine, and the hub cannot be reached; "
            "download it elsewhere and give its path"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{repo}: no such file or folder here, nor a repository on the hub") from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repo}: no file {wanted} in it; choose with --file{_listing(repo)}") from error
    except Exception as error:  # HTTP, TLS and proxy errors of whichever client the hub library uses.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(f"{repo}: cannot download {wanted} from the hub ({reason})") from error
    return Source(path, RELEASED.get(repo, {}).get(wanted))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the hub library from warning at each try to connect; what comes of them is raised in the end."""
    import logging as levels

    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(levels.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _listing(repo: str) -> str:
    """The checkpoints of a repository, for a message; nothing if the hub does not answer."""
    import huggingface_hub

    try:
        files = [file for file in huggingface_hub.list_repo_files(repo) if file.endswith(_SUFFIXES)]
    except Exception:  # The list only improves a message that is raised anyway.
        return ""
    return f": {', '.join(files) or 'none of its files is a checkpoint'}"
