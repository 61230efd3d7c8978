from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hippos() -> Command:
    """Runs the installed command as a shell would: its own process, no terminal."""

    def run(*args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if name != "HIPPOS_DEBUG"}
        return subprocess.run(
            [os.path.join(os.path.dirname(sys.executable), "hippos"), *args],
            input=stdin,
            env=clean | {"TERM": "dumb", "COLUMNS": "120", "HF_HUB_OFFLINE": "1"} | env,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
            check=False,
        )

    return run
