"""The ``hippos`` command.

A module of its own, beside the package, because importing `hippos` imports torch and Transformers (to register H3 with
the Auto classes), while ``hippos --help`` and shell completion should answer at once. `hippos` sees this module in
``sys.modules`` and leaves that import to the verb that needs it.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C while it is still being put together is one plain line too."""
    try:
        from hippos.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("hippos: stopped: interrupted\n")
        sys.exit(130)
