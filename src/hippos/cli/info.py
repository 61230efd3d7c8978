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
    return {"versions": _versions(), "devices": _devices()}


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
