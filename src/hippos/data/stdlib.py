"""The source of Python's standard library as a corpus: real text that lies on every machine."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from hippos.data.corpus import FileCorpus
from hippos.errors import CorpusError

__all__ = ["stdlib_corpus"]

# Not the library's own prose and code: installed packages, tables of character codes, generated help topics, tests
# (which some distributions leave out, so that the corpus would depend on the machine).
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "test", "tests", "idle_test"}
    | {"lib2to3", "distutils", "ensurepip", "turtledemo", "__phello__"}
)
_FEWEST_FILES = 100


def stdlib_corpus() -> FileCorpus:
    """The ``.py`` files of the running Python's standard library, sorted by path; each is one document.

    Returns:
        The corpus.

    Raises:
        CorpusError: If the library's source is not there as files (frozen or zipped interpreters).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        path
        for path in root.rglob("*.py")
        if not any(part in _LEFT_OUT or part.startswith("config-") for part in path.relative_to(root).parts)
    )
    if len(files) < _FEWEST_FILES:
        raise CorpusError(f"the standard library's source is not in {root}: {len(files)} files found there")
    return FileCorpus("stdlib", tuple(files))
