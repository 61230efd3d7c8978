"""``hippos train``: train a model on text, or go on with a run that stopped."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hippos.cli.quiet import quiet_transformers

if TYPE_CHECKING:
    from hippos.train import TrainConfig, TrainResult


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Recipe to start from: demo, small, pile-125m-hybrid, ...; see --recipes.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="WHERE", help="Text file, folder, Hugging Face data set, or stdlib; repeatable."),
    ] = None,
    validation: Annotated[
        list[str] | None,
        typer.Option(metavar="WHERE", help="Validation text, likewise; default: a part of --text."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Tokenizer: a folder, a hub name, or bpe:SIZE to train one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the run.", show_default="runs/RECIPE")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as steps=100; repeatable."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that DIR holds.")] = False,
    recipes: Annotated[bool, typer.Option("--recipes", help="List the recipes and exit.")] = False,
    show_config: Annotated[bool, typer.Option("--show-config", help="Print the whole configuration and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Train a language model; Ctrl-C saves a checkpoint and prints the command that resumes.

    Example:
        hippos train demo
        hippos train small --text notes/ --tokenizer bpe:4096 --set steps=2000
        hippos train openwebtext-125m-hybrid --set micro_batch_size=32
        torchrun --nproc-per-node 8 -m hippos train pile-1.3b-hybrid --set parallel=fsdp
        hippos train --resume --out runs/small
    """
    if recipes:
        _list_recipes()
        return
    if resume and out is None and recipe is None:
        raise typer.BadParameter("say which run: --out DIR", param_hint="--resume")
    run = out or Path("runs") / (recipe or "small")
    wanted = [*_source_settings(text, validation, tokenizer), *(settings or [])]
    if text and not resume:
        wanted.insert(0, "data.streaming=no")  # a recipe may stream its own corpus; --set decides about this one
    config = _config(recipe, wanted, run if resume else None, has_text=bool(text))
    if show_config:
        typer.echo(json.dumps(config.to_dict(), indent=2))
        return
    quiet_transformers()

    import hippos.train

    is_main = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one speaks for all
    progress = hippos.train.RunProgress(is_quiet=as_json or not is_main)
    result = hippos.train.train(config, run, resume=resume, overwrite=overwrite, progress=progress)
    hippos.train.leave_processes()
    if is_main:
        _end(result, as_json=as_json)
    elif result.summary is None:
        raise typer.Exit(128 + int(result.stopped_by or 0))


def _list_recipes() -> None:
    from hippos.train.recipes import ALIASES, RECIPES, describe_recipe

    width = max(map(len, RECIPES))
    for name in RECIPES:
        typer.echo(f"{name:<{width}}  {describe_recipe(name)}")
    for short, full in ALIASES.items():
        typer.echo(f"{short:<{width}}  short for {full}")


def _source_settings(text: list[str] | None, validation: list[str] | None, tokenizer: str | None) -> list[str]:
    """The options about text as settings; what lies here is named by its full path, to be found from anywhere."""

    def full(where: str) -> str:
        return str(Path(where).resolve()) if Path(where).exists() else where

    wanted = []
    for key, places in (("data.corpus", text), ("data.validation", validation)):
        if places:
            wanted.append(f"{key}={json.dumps([full(place) for place in places], ensure_ascii=False)}")
    if tokenizer:
        wanted.append(f"data.tokenizer={full(tokenizer)}")
    return wanted


def _config(recipe: str | None, settings: list[str], resumed: Path | None, *, has_text: bool) -> TrainConfig:
    """The configuration: that of the resumed run, or of the recipe, with the settings applied."""
    from hippos.errors import ConfigError
    from hippos.train import apply_settings, find_recipe, holds_run, stored_config

    if resumed is not None and (recipe is None or holds_run(resumed)):
        config = stored_config(resumed)
        if recipe not in (None, config.recipe):
            raise ConfigError(f"the run in {resumed} was started from the recipe {config.recipe!r}, not {recipe!r}")
    elif recipe is not None:
        config = find_recipe(recipe)
    elif has_text:
        config = find_recipe("small")
    else:
        raise ConfigError("nothing to train on: name a recipe (hippos train --recipes lists them) or give --text")
    return apply_settings(config, settings)


def _end(result: TrainResult, *, as_json: bool) -> None:
    """Draw the loss, report, and end with 0, or with 128 + signal where one asked for the end."""
    from hippos.cli.failures import fail
    from hippos.report import draw_loss_curve
    from hippos.train import resume_command

    if result.summary is None:
        number = int(result.stopped_by or 0)
        if as_json:
            typer.echo(json.dumps({"run": str(result.run), "step": result.step, "is_finished": False}, indent=2))
        fail(
            f"after step {result.step} of {result.config.optim.steps}, all saved. To go on: "
            f"{resume_command(result.run)}",
            exit_code=128 + number,
            label="stopped",
        )
    baselines = {name: scores["bits_per_byte"] for name, scores in result.summary.get("baselines", {}).items()}
    figure = draw_loss_curve(result.run, baselines=baselines)
    if as_json:
        report = {"run": str(result.run), "is_finished": True, "figure": str(figure), **result.summary}
        typer.echo(json.dumps(report, indent=2))
        return
    _print_summary(result, result.summary, baselines)
    typer.echo(f"\nLoss: {figure}")
    prompt = result.config.run.sample_prompt or "The"
    typer.echo("Try next:")
    typer.echo(f"  hippos report {shlex.quote(str(result.run))}")
    typer.echo(f"  hippos generate {shlex.quote(str(result.run))} --prompt {shlex.quote(prompt)}")
    typer.echo(f"  {resume_command(result.run)} --set steps={2 * result.config.optim.steps}")


def _print_summary(result: TrainResult, summary: dict[str, Any], baselines: dict[str, float]) -> None:
    score = summary["validation"]
    typer.echo(f"\n{summary['parameters']:,} parameters, {summary['steps']:,} steps, {summary['tokens']:,} tokens read")
    typer.echo(f"Validation perplexity {score['perplexity']:.2f} a token. Bits per byte:")
    for name, value in {**baselines, "this model": score["bits_per_byte"]}.items():
        typer.echo(f"  {name:<12} {value:.3f}")
    if baselines:
        typer.echo("(unigrams and trigrams over the same tokens, Kneser-Ney, counted on the whole training text)")
    if "sample" in summary:
        typer.echo("\nA sample:\n")
        typer.echo("\n".join(f"  {line}" for line in summary["sample"].splitlines()))
