from __future__ import annotations

import subprocess
import sys

import pytest

import hippos.bench
from hippos.bench import load_suite, suite_names
from hippos.errors import ConfigError


def test_an_unknown_suite_is_refused_by_name():
    with pytest.raises(ConfigError, match="there is no benchmark suite 'gpu'; the suites are: "):
        load_suite("gpu")


@pytest.mark.parametrize("name", ["harness", "cases", "__init__"])
def test_the_machinery_is_no_suite(name):
    assert name not in suite_names()


def test_adding_a_suite_is_adding_a_file(tmp_path, monkeypatch):
    (tmp_path / "added.py").write_text("SUITE = 'the added suite'\n")
    monkeypatch.setattr(hippos.bench, "__path__", [*hippos.bench.__path__, str(tmp_path)])
    assert "added" in suite_names()
    assert load_suite("added") == "the added suite"
    monkeypatch.delitem(sys.modules, "hippos.bench.added")


def test_listing_suites_does_not_import_torch():
    code = (
        "import sys; sys.modules['hippos_command'] = sys; import hippos.bench; hippos.bench.suite_names();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", suite_names())
def test_every_suite_is_a_table_under_its_own_name(name):
    suite = load_suite(name)
    assert suite.name == name
    assert suite.device in ("cpu", "cuda")
    names = [case.name for case in suite.cases]
    assert len(set(names)) == len(names)
    for case in suite.cases:
        assert case.sizes
        assert case.quick_sizes
        assert case.name.isidentifier()
