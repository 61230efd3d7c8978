"""Speed, measured: every module directly in this room is a suite that ``hippos bench --suite NAME`` can run.

A suite module defines ``SUITE``, a `hippos.bench.harness.Suite`, and nothing has to be edited to add one. What suites
share lives one level down: `hippos.bench.harness` (clocks, runner, results, tables, figures) and `hippos.bench.cases`
(what is measured). This module imports only the standard library, so that the command line can list the suites.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hippos.bench.harness import Suite

__all__ = ["load_suite", "suite_names"]


def suite_names() -> list[str]:
    """List the suites that exist: the plain modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def load_suite(name: str) -> Suite:
    """Import one suite.

    Args:
        name: One of `suite_names`.

    Returns:
        The suite's table of cases.

    Raises:
        ConfigError: If there is no suite of this name.
    """
    from hippos.errors import ConfigError

    if name not in suite_names():
        raise ConfigError(f"there is no benchmark suite {name!r}; the suites are: {', '.join(suite_names())}")
    suite: Suite = importlib.import_module(f"{__name__}.{name}").SUITE
    return suite
