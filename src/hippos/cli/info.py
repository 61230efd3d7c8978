"""``hippos info``: what this machine offers and what hippos makes of it."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, devices, and the implementation each operator takes here.

    Example:
        hippos info --json
        hippos info --json | jq
    """
    report = _report()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for section, entries in report.items():
        typer.secho(section, bold=True)
        width = max(len(name) for name in entries)
        for name, value in entries.items():
            typer.echo(f"  {name:<{width}}  {value}")


def _report() -> dict[str, dict[str, Any]]:
    return {
        "versions": _versions(),
        "devices": _devices(),
        "operators": _operators(),
        "torch.compile": {"C++ compiler": _cpp_compiler()},
    }


def _versions() -> dict[str, str]:
    """Installed versions; a library that is not there is said to be missing."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("hippos", "torch", "transformers", "triton"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _devices() -> dict[str, str]:
    """The CPU and each accelerator that torch sees."""
    import torch

    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def _operators() -> dict[str, str]:
    """Operator -> the implementation that ``impl="auto"`` takes on the first CUDA device, or on the CPU.

    It takes the kernels wherever they run (docs/decisions/0011-kernels-by-default.md).
    """
    import torch

    from hippos import ops
    from hippos.errors import UnsupportedError

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one, rows = torch.ones(1, 1, 1, device=device), torch.ones(1, 1, device=device)
    channel, pairs = torch.ones(1, device=device), torch.zeros(1, 1, 2, device=device)
    state = ops.H3State(torch.zeros(1, 1, 0, device=device), torch.zeros(1, 1, 1, 2, device=device))
    mixer = (rows, channel, pairs, pairs, pairs, channel)
    calls = {
        "ssm_filter": (pairs, pairs, pairs, 1),
        "ssm_conv": (one, pairs, pairs, pairs),
        "ssm_step": (rows, state.diag.clone(), pairs, pairs, pairs),
        "fft_conv": (one, rows),
        "h3_mix": (one, one, one, *mixer),
        "h3_step": (rows, rows, rows, state, *mixer),
        "linear_cross_entropy": (rows, rows, torch.zeros(1, dtype=torch.long, device=device)),
    }
    taken = {}
    for name, arguments in calls.items():
        try:
            getattr(ops, name)(*arguments, impl="triton")
            taken[name] = f"triton on {device}"
        except UnsupportedError:
            taken[name] = f"torch on {device}"
    return taken


def _cpp_compiler() -> str:
    """What torch.compile needs to compile for the CPU; nothing else here does."""
    import os
    import shutil
    import sys

    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch._inductor.config has it
    return shutil.which(name) or "none: torch.compile works on GPUs only"
