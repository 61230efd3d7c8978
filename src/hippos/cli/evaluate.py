"""``hippos evaluate``: how well a model predicts a text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hippos.cli.failures import at_least
from hippos.cli.quiet import quiet_transformers

if TYPE_CHECKING:
    from hippos.data import PackedTokens
    from hippos.evaluate import TextScore


def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder, training run, or name on the Hugging Face hub.")],
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="WHERE", help="Text file, folder, Hugging Face data set, or stdlib; repeatable."),
    ] = None,
    window: Annotated[int, typer.Option(metavar="N", callback=at_least(1), help="Context window in tokens.")] = 1024,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            callback=at_least(1),
            help="Tokens from one window to the next; default: WINDOW.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", callback=at_least(1), help="Windows per batch.")] = 4,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model's perplexity and bits per byte on a text.

    Every token counts once. A stride below the window gives each token at least
    WINDOW - STRIDE tokens of context, at WINDOW / STRIDE times the work.

    Example:
        hippos evaluate runs/demo --text notes.txt
        hippos evaluate runs/demo --text stdlib --window 2048 --stride 512 --json
    """
    if not text:
        raise typer.BadParameter("say on which text to measure: --text WHERE", param_hint="--text")
    if stride is not None and stride > window:
        raise typer.BadParameter(f"{stride} is more than the window of {window} tokens", param_hint="--stride")

    from hippos.data import open_corpus, pack_in_memory
    from hippos.generate import load_text_model

    quiet_transformers()
    corpus = open_corpus(text)
    opened, its_tokenizer = load_text_model(model, tokenizer=tokenizer, dtype=dtype, device=device, int8=int8)
    packed = pack_in_memory(corpus.documents(), its_tokenizer)
    score = _score(opened, packed, window, stride, batch_size)
    if as_json:
        names = ("perplexity", "bits_per_byte", "nll", "n_tokens", "n_bytes")
        typer.echo(json.dumps({name: getattr(score, name) for name in names}, indent=2))
        return
    documents = "1 document" if packed.n_documents == 1 else f"{packed.n_documents:,} documents"
    typer.echo(f"{corpus.name}: {score.n_tokens:,} tokens, {score.n_bytes:,} bytes, {documents}")
    typer.echo(f"perplexity {score.perplexity:.3f} a token, {score.bits_per_byte:.4f} bits per byte")


def _score(model: Any, packed: PackedTokens, window: int, stride: int | None, batch_size: int) -> TextScore:
    """Score the text behind a progress bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from hippos.evaluate import score_packed

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Scoring", total=packed.n_tokens - 1)

        def show(done: int) -> None:
            bar.update(task, completed=done)

        return score_packed(model, packed, window=window, stride=stride, batch_size=batch_size, on_progress=show)
