"""The command as a whole: how fast it answers, how it fails, what it promises in its help."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import resource
import subprocess
import sys
import typing

import pytest
import typer
from typer.models import OptionInfo
from typer.testing import CliRunner

from hippos import cli
from hippos.cli import failures
from hippos.errors import CheckpointError, CorpusError


def cpu_seconds(run) -> float:
    """Processor time of the child process, the least of three: what the answer costs, however busy the machine is."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def once() -> float:
        start = spent()
        run()
        return spent() - start

    return min(once() for _ in range(3))


def test_help_answers_in_under_a_second(hippos):
    assert cpu_seconds(lambda: hippos("--help")) < 1.0


def test_completion_answers_in_under_a_second_and_knows_the_verbs(hippos):
    def complete(words: str, index: int) -> str:
        return hippos(_HIPPOS_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(index)).stdout

    assert {"generate", "info"} <= set(complete("hippos ", 1).split())
    assert "--max-new-tokens" in complete("hippos generate --max", 2)
    assert cpu_seconds(lambda: complete("hippos g", 1)) < 1.0


def test_help_of_every_verb_needs_no_torch():
    script = """
import sys, hippos_command
from typer.testing import CliRunner
from hippos import cli
for args in [["--help"], *[[verb, "--help"] for verb in cli.app_verbs()]]:
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == 0, (args, result.output, result.exception)
print(*sorted({"torch", "transformers", "numpy", "triton"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("verb", cli.app_verbs())
def test_every_verb_shows_an_example(verb):
    text = CliRunner().invoke(cli.app, [verb, "--help"], env={"COLUMNS": "200"}).output
    assert "Example:" in text
    assert f"hippos {verb}" in text.split("Example:")[1]


def test_version(hippos):
    from hippos import __version__

    assert hippos("--version").stdout == f"hippos {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "no such command 'trian'. Did you mean 'train'? (see hippos --help)"),
        (["--nonsense"], "no such option: --nonsense (see hippos --help)"),
        (["generate"], "missing argument 'model' (see hippos generate --help)"),
        (["info", "--jsn"], "no such option: --jsn (Possible options: --json) (see hippos info --help)"),
        (
            ["evaluate", "m", "--window", "-1"],
            "invalid value for '--window': must be at least 1, got -1 (see hippos evaluate --help)",
        ),
        (
            ["synthetics", "--jobs", "0"],
            "invalid value for '--jobs': must be at least 1, got 0 (see hippos synthetics --help)",
        ),
    ],
)
def test_misuse_is_one_plain_line_too(hippos, arguments, line):
    done = hippos(*arguments)
    assert done.returncode == 2
    # Typer's versions put names of options in quotes or not, and find the nearest ones or don't.
    words, seen = (set(re.findall(r"[\w-]+", text)) for text in (line, done.stderr))
    assert len(words - seen) <= 3
    assert done.stderr.startswith("hippos: error: ")
    assert done.stderr.endswith(line[line.index("(see") :] + "\n")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_no_words_at_all_show_the_help(hippos):
    done = hippos()
    assert done.returncode == 2
    assert "Commands" in done.stdout + done.stderr


def command_that_raises(error: BaseException) -> typer.Typer:
    app = typer.Typer(cls=failures.PlainErrors, pretty_exceptions_enable=False)

    @app.callback()
    def root() -> None:
        pass

    @app.command()
    def verb() -> None:
        raise error

    return app


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch):
    monkeypatch.delenv("HIPPOS_DEBUG", raising=False)


@pytest.mark.parametrize(
    ("error", "line", "exit_code"),
    [
        (CorpusError("corpus.txt holds\n  no text"), "hippos: error: corpus.txt holds no text", 1),
        (
            FileNotFoundError(2, "No such file or directory", "a.txt"),
            "hippos: error: No such file or directory: a.txt",
            1,
        ),
        (OSError("the hub\ndoes not answer"), "hippos: error: the hub does not answer", 1),
        (KeyboardInterrupt(), "hippos: stopped: interrupted", 130),
        (KeyboardInterrupt("saved; go on with --resume"), "hippos: stopped: saved; go on with --resume", 130),
    ],
)
def test_expected_errors_are_one_plain_line(error, line, exit_code):
    result = CliRunner().invoke(command_that_raises(error), ["verb"])
    assert result.exit_code == exit_code
    assert result.stderr == line + "\n"
    assert result.stdout == ""


def test_debugging_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("HIPPOS_DEBUG", "1")
    error = CorpusError("no text")
    assert CliRunner().invoke(command_that_raises(error), ["verb"]).exception is error


def test_debug_option_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("HIPPOS_DEBUG", "0")  # what the option sets is undone after the test
    arguments = ["generate", "./no-such-model", "--prompt", "a"]
    assert CliRunner().invoke(cli.app, arguments).stderr == "hippos: error: no model folder ./no-such-model\n"
    error = CliRunner().invoke(cli.app, ["--debug", *arguments]).exception
    assert isinstance(error, CheckpointError)


def test_an_unexpected_error_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", lambda: command_that_raises(RuntimeError("odd\nthing"))(["verb"]))
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert str(exit_info.value.code).startswith("hippos: error: unexpected RuntimeError: odd thing (")


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "hippos", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("hippos ")


def test_options_whose_placeholder_is_their_name_spell_the_name_out():
    """Typer 0.27 calls ``dtype: Annotated[str, Option(metavar="DTYPE")]`` --DTYPE."""
    n_options = 0
    for module in pkgutil.iter_modules(cli.__path__):
        verb = getattr(importlib.import_module(f"hippos.cli.{module.name}"), module.name, None)
        if not inspect.isfunction(verb):
            continue
        for name, hint in typing.get_type_hints(verb, include_extras=True).items():
            for option in (x for x in getattr(hint, "__metadata__", ()) if isinstance(x, OptionInfo)):
                n_options += 1
                is_named = isinstance(option.default, str)  # in Annotated the first name stands where a default may
                assert is_named or (option.metavar or "").lower() != name, f"{module.name} --{name}"
    assert n_options > 40
