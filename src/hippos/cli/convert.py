"""``hippos convert``: from a released checkpoint to a model folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from hippos.cli.failures import at_least


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Checkpoint file, folder that holds one, or hub name: danfu09/H3-125M, -355M, -1.3B, -2.7B.",
            metavar="SOURCE",
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.", metavar="OUT")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="Released size: 125m, 355m, 1.3b, 2.7b or 2.7b-rotary. Implied by a hub name.", metavar="NAME"
        ),
    ] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option(help="Attention heads.", metavar="N", callback=at_least(1))
    ] = None,
    rotary_dim: Annotated[
        int | None,
        typer.Option(help="Rotary dimensions per attention head, 0 for none.", metavar="N", callback=at_least(0)),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help="Vocabulary size; further rows of the embedding are padding.", metavar="N", callback=at_least(1)
        ),
    ] = None,
    head_layout: Annotated[
        str | None,
        typer.Option(
            help="Order of the H3 output channels in the file, if its heads are wider than 1.", metavar="hd|dh"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float16, bfloat16, float32 or float64 for the large weights (SSM parameters stay float32); "
            "by default as in the file.",
            metavar="NAME",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer to save with the model: a folder or a hub name.", metavar="FOLDER|NAME"),
    ] = None,
    file: Annotated[
        str | None, typer.Option(help="File to convert, if the folder or repository holds several.", metavar="NAME")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object about what was written.")] = False,
) -> None:
    """Turn a released H3 checkpoint into a folder that AutoModelForCausalLM.from_pretrained opens.

    No code from the checkpoint is run. What its shapes do not determine, an option must; a preset implies all of it.

    Example:
        hippos convert danfu09/H3-125M h3-125m --tokenizer gpt2
        hippos convert model.pt my-h3 --num-attention-heads 12 --rotary-dim 0
    """
    import json

    from hippos.models.released import Unsaid, convert_released

    unsaid = Unsaid(preset, num_attention_heads, rotary_dim, vocab_size, head_layout)
    with _progress() as progress:
        done = convert_released(
            source, out, unsaid, file=file, dtype=dtype, tokenizer=tokenizer, progress=progress
        ).as_dict()
    typer.echo(json.dumps(done, indent=2) if as_json else _summary(done))


def _summary(done: dict[str, Any]) -> str:
    attn_layers = ", ".join(map(str, done["attn_layers"]))
    lines = [
        f"{done['out']}: {done['n_parameters']:,} parameters, {done['n_bytes'] / 1e6:,.1f} MB of {done['dtype']}, "
        f"{done['num_hidden_layers']} layers of width {done['hidden_size']} "
        f"({'attention at ' + attn_layers if attn_layers else 'no attention'}), {done['vocab_size']:,} tokens"
    ]
    if done["dropped"]:
        lines.append(f"not part of the model, left out: {', '.join(done['dropped'])}")
    if not done["tokenizer"]:
        lines.append("no tokenizer was saved (give one with --tokenizer; the released weights use that of gpt2)")
    return "\n".join(lines)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error, which leaves standard output to the result."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show
