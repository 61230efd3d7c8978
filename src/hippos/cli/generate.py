"""``hippos generate``: continue a prompt, or every prompt of a file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hippos.cli.failures import at_least, fail
from hippos.cli.quiet import quiet_transformers

# Control characters but for tab and newline -> their pictures, such as the symbol for escape.
_VISIBLE = {**{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}, 0x7F: 0x2421}


def generate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Model folder, training run, or name on the Hugging Face hub.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="Text to continue; without it, or with -, standard input is read."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum number of new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", help="Below 1 safer, above 1 wilder, 0 greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Sample from the K most probable tokens only.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Sample from the most probable tokens whose probabilities sum to P."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Sample only tokens at least P times as probable as the most probable one."),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="R", help="Above 1: make tokens that occurred already less probable.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most probable token.")] = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Stop before this text; repeatable.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Tokenizer, a folder or a hub name, if MODEL has none.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="DTYPE", help="auto (as saved), float32, bfloat16, float16 or float64.")
    ] = "auto",
    int8: Annotated[bool, typer.Option("--int8", help="Round the weights to int8 (on a GPU: needs torchao).")] = False,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, ...")
    ] = "auto",
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt too.")] = False,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Cache size of the attention layers in tokens, prompt included; default: as needed."
        ),
    ] = None,
    batch_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Continue every line of FILE: {"prompt": "..."} or "...", with --out.'),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the answers to --batch-file go; resumes if it exists."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", callback=at_least(1), help="Prompts per batch; default: 64 on a GPU, else 8."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Continue a prompt; text is streamed to standard output.

    One newline at the end of a prompt from standard input is dropped.

    Example:
        hippos generate runs/demo --prompt "def main(" --max-new-tokens 200
        git diff | hippos generate gpt2 --greedy --stop "diff"
        hippos generate runs/demo --batch-file prompts.jsonl --out answers.jsonl
    """
    _check_files(prompt, batch_file, out, batch_size)
    temperature = _temperature(ctx, temperature, greedy)
    text = "" if batch_file is not None else _read_prompt(prompt)

    from hippos.generate import Generator, Sampling, load_text_model, stream_text

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    with _waiting("Opening the model"):
        quiet_transformers()
        opened = load_text_model(model, tokenizer=tokenizer, dtype=dtype, device=device, int8=int8)
    if batch_file is not None and out is not None:
        _answer(Generator(*opened, context=context), batch_file, out, sampling, batch_size, as_json)
        return
    stream = stream_text(*opened, text, sampling, context=context)
    if as_json:
        _drain(stream, max_new_tokens)
        typer.echo(json.dumps(stream.result.as_dict(), ensure_ascii=False, indent=2))
        return
    _show(stream, text if echo else "")


def _temperature(ctx: typer.Context, temperature: float, greedy: bool) -> float:
    if not greedy:
        return temperature
    source = ctx.get_parameter_source("temperature")
    if temperature and source is not None and source.name == "COMMANDLINE":
        raise typer.BadParameter(
            f"give either --greedy or a temperature, got {temperature:g}", param_hint="--temperature"
        )
    return 0.0


def _check_files(prompt: str | None, batch_file: Path | None, out: Path | None, batch_size: int | None) -> None:
    if batch_file is None:
        for name, value in (("--out", out), ("--batch-size", batch_size)):
            if value is not None:
                raise typer.BadParameter(f"{name} goes with --batch-file", param_hint=name)
        return
    if prompt is not None:
        raise typer.BadParameter("give either --prompt or --batch-file", param_hint="--prompt")
    if out is None:
        raise typer.BadParameter("say where the answers go: --out answers.jsonl", param_hint="--out")
    if out.exists() and batch_file.exists() and out.samefile(batch_file):
        raise typer.BadParameter("the answers cannot go into the file of the prompts", param_hint="--out")


def _answer(writer: Any, batch_file: Path, out: Path, sampling: Any, batch_size: int | None, as_json: bool) -> None:
    """Work off a file of prompts behind a progress bar; fail at the end if some of its lines are broken."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from hippos.generate import answer_file

    n_together = batch_size or (64 if writer.model.device.type == "cuda" else 8)
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Answering", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        report = answer_file(writer, batch_file, out, sampling, batch_size=n_together, on_progress=show)
    if as_json:
        typer.echo(json.dumps(asdict(report), ensure_ascii=False, indent=2))
    else:
        before = f", {report.n_before} had theirs before" if report.n_before else ""
        typer.echo(f"{report.n_answered} prompts answered, {report.n_new_tokens:,} tokens{before}; seed {report.seed}")
    for number, fault in report.broken:
        typer.echo(f"hippos: {batch_file} line {number}: {' '.join(fault.split())}", err=True)
    if report.broken:
        numbers = ", ".join(str(number) for number, _ in report.broken[:20])
        more = " and more" if len(report.broken) > 20 else ""
        count = "1 line" if len(report.broken) == 1 else f"{len(report.broken)} lines"
        fail(f"{count} of {batch_file} cannot be answered: {numbers}{more}; the others are done")


def _read_prompt(prompt: str | None) -> str:
    """The prompt from the option or from standard input."""
    if prompt not in (None, "-"):
        return str(prompt)
    if prompt is None and sys.stdin.isatty():
        raise typer.BadParameter("give --prompt TEXT, or pipe a text into standard input", param_hint="--prompt")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"standard input is not UTF-8 text: {error}", param_hint="--prompt") from error


def _show(stream: Any, start: str) -> None:
    """Write the pieces as they come; the spinner goes away with the first."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # where UTF-8 is not known, ? instead of an error
    with _waiting("Reading the prompt"):
        piece = next(stream, "")
    _write(start + piece)
    for piece in stream:
        _write(piece)
    _write("\n")


def _write(text: str) -> None:
    """Write at once; on a terminal show control characters instead of obeying them."""
    sys.stdout.write(text.translate(_VISIBLE) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _drain(stream: Any, max_new_tokens: int) -> None:
    """Read the stream to its end behind a progress bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Writing", total=max_new_tokens)
        for _ in stream:
            bar.update(task, completed=stream.n_new_tokens)


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """A spinner on standard error, if that is a terminal, while nothing can be shown yet."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"{what} ..."):
        yield
