"""Where a number was measured: hardware, versions, commit, load."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

VERSIONED = ("torch", "transformers", "numpy", "triton", "hippos")


@dataclass(frozen=True)
class Machine:
    """The machine and software of one run.

    Args:
        cpu: Model name of the processor.
        n_cores: Cores this process may use.
        n_threads: Threads that torch used.
        memory_bytes: Memory of the machine, or None where the system does not say.
        gpu: Name of the GPU the run used, or None.
        system: Operating system and architecture.
        versions: Package to version, "python" included; packages that are not installed are left out.
        commit: Commit of the package's source, with "-dirty" behind it if files of the package differ from it; None
            outside a git checkout.
    """

    cpu: str
    n_cores: int
    n_threads: int
    memory_bytes: int | None
    gpu: str | None
    system: str
    versions: dict[str, str]
    commit: str | None

    @property
    def slug(self) -> str:
        """The machine's part of a result's file name, such as "amd-epyc-2c" or "nvidia-h100-80gb-hbm3"."""
        name = self.gpu or f"{self.cpu} {self.n_threads}c"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def available_cores() -> int:
    """Count the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_machine(device: torch.device) -> Machine:
    """Describe this machine as it runs now; torch's current number of threads is recorded."""
    return Machine(
        cpu=_cpu_name(),
        n_cores=available_cores(),
        n_threads=torch.get_num_threads(),
        memory_bytes=_memory_bytes(),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        system=f"{platform.system()} {platform.machine()}",
        versions=_versions(),
        commit=_commit(),
    )


def load_average() -> float | None:
    """Processes that wanted to run over the last minute, or None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    if sys.platform == "darwin":
        return _output_of(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    package = Path(__file__).resolve().parents[2]
    commit = _output_of(["git", "-C", str(package), "rev-parse", "--short=12", "HEAD"])
    if not commit:
        return None
    # An installed copy may lie inside somebody else's repository: a file that git does not track has no commit.
    if not _output_of(["git", "-C", str(package), "ls-files", "version.py"]):
        return None
    is_dirty = _output_of(["git", "-C", str(package), "status", "--porcelain", "--untracked-files=no", "--", "."])
    return f"{commit}-dirty" if is_dirty else commit


def _output_of(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
