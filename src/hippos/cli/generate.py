"""``hippos generate``: continue a prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from hippos.cli.quiet import quiet_transformers

# Control characters but for tab and newline -> their pictures, such as the symbol for escape.
_VISIBLE = {**{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}, 0x7F: 0x2421}


def generate(
    model: Annotated[str, typer.Argument(help="Model folder, training run, or name on the Hugging Face hub.")],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue; - or none reads standard input."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="T", help="Below 1 safer, above 1 wilder, 0 greedy.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Draw from the K most probable tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Draw from the most probable tokens that sum to P only.")
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most probable token.")] = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed writes the same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be given again.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Folder or hub name of the tokenizer, if MODEL has none.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="auto (as saved), float32, bfloat16, float16 or float64.")
    ] = "auto",
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before the text.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
) -> None:
    """Continue a prompt; the text appears as it is written.

    One newline at the end of a prompt from standard input is dropped.

    Example:
        hippos generate runs/demo --prompt "def main(" --max-new-tokens 200
        git diff | hippos generate gpt2 --greedy --stop "diff"
    """
    _check_dtype(dtype)
    text = _read_prompt(prompt)

    from hippos.generate import Sampling, load_text_model, stream_text

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    with _waiting("Opening the model"):
        quiet_transformers()
        opened = load_text_model(model, tokenizer=tokenizer, dtype=dtype, device=device)
    stream = stream_text(*opened, text, sampling)
    if as_json:
        _drain(stream, max_new_tokens)
        typer.echo(json.dumps(stream.result.as_dict(), ensure_ascii=False, indent=2))
        return
    _show(stream, text if echo else "")


def _check_dtype(dtype: str) -> None:
    names = ("auto", "float32", "bfloat16", "float16", "float64")
    if dtype not in names:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(names)}", param_hint="--dtype")


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
