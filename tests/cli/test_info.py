from __future__ import annotations

import json

import torch
import transformers
from typer.testing import CliRunner

from hippos import __version__, cli


def test_json_tells_versions_and_devices():
    result = CliRunner().invoke(cli.app, ["info", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["versions"]["hippos"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["transformers"] == transformers.__version__
    assert "cpu" in report["devices"]


def test_text_names_every_entry_of_the_json():
    report = json.loads(CliRunner().invoke(cli.app, ["info", "--json"]).stdout)
    text = CliRunner().invoke(cli.app, ["info"]).stdout
    for section, entries in report.items():
        assert section in text
        for name, value in entries.items():
            assert any(name in line and str(value) in line for line in text.splitlines()), name
