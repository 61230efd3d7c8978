from __future__ import annotations

import json
import sys

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
    operators = {"ssm_filter", "ssm_conv", "ssm_step", "fft_conv", "h3_mix", "h3_step", "linear_cross_entropy"}
    assert set(report["operators"]) == operators
    if not torch.cuda.is_available():
        assert set(report["operators"].values()) == {"torch on cpu"}


def test_says_whether_there_is_a_compiler(monkeypatch, tmp_path):
    def compiler() -> str:
        return json.loads(CliRunner().invoke(cli.app, ["info", "--json"]).stdout)["torch.compile"]["C++ compiler"]

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert compiler().startswith("none")
    default = "clang++" if sys.platform == "darwin" else "g++"
    for name in (default, "other"):
        (tmp_path / name).touch(mode=0o755)
    assert compiler() == str(tmp_path / default)
    monkeypatch.setenv("CXX", "other")
    assert compiler() == str(tmp_path / "other")
    monkeypatch.setenv("CXX", "missing")
    assert compiler().startswith("none"), "torch takes no other one then"


def test_text_names_every_entry_of_the_json():
    report = json.loads(CliRunner().invoke(cli.app, ["info", "--json"]).stdout)
    text = CliRunner().invoke(cli.app, ["info"]).stdout
    for section, entries in report.items():
        assert section in text
        for name, value in entries.items():
            assert any(name in line and str(value) in line for line in text.splitlines()), name
