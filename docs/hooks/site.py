"""What is made while the site is built: navigation by folder, the command's help, MathML of formulas."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
_HELP = re.compile(r"^<!-- (hippos[a-z ]*) --help -->$", re.MULTILINE)


def on_config(config: Any) -> Any:
    """Replace ``FOLDER/*`` in the navigation by the folder's pages, its index first."""
    docs = Path(config["docs_dir"])
    for section in config["nav"]:
        for title, target in section.items():
            if isinstance(target, str) and target.endswith("/*"):
                pages = sorted(docs.glob(f"{target[:-2]}/*.md"), key=lambda page: (page.stem != "index", page.name))
                section[title] = [str(page.relative_to(docs)) for page in pages]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace ``<!-- hippos VERB --help -->`` by what the command prints."""
    return _HELP.sub(lambda match: f"```text\n{_help(match[1].split())}\n```", markdown)


def on_page_content(page_html: str, **_: Any) -> str:
    """Replace what the arithmatex extension marked; a formula that cannot be read ends the build."""
    page_html = _INLINE.sub(lambda match: _to_mathml(match[1], "inline"), page_html)
    return _DISPLAY.sub(lambda match: _to_mathml(match[1], "block"), page_html)


def _help(command: list[str]) -> str:
    program = Path(sys.executable).with_name(command[0])
    plain = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    shown = subprocess.run(
        [program, *command[1:], "--help"], env=os.environ | plain, capture_output=True, text=True, check=True
    ).stdout
    return "\n".join(line.rstrip() for line in shown.strip("\n").splitlines())


def _to_mathml(latex: str, display: str) -> str:
    return convert(html.unescape(latex).strip(), display=display)
