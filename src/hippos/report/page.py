"""A run as one HTML page: curves, numbers, configuration, a sample; readable without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hippos.errors import TrainingError
from hippos.report.svg import Line, draw_chart
from hippos.train.folder import RUN_FILE, read_summary, stored_config
from hippos.train.metrics import METRICS_FILE, read_metrics
from hippos.train.storage import resume_command
from hippos.version import __version__

__all__ = ["write_page"]

Rows = Sequence[Mapping[str, Any]]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } .facts { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.5rem 0; }
.facts div { display: flex; flex-direction: column; } .facts b { font-size: 1.4rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
.charts > :first-child { grid-column: 1 / -1; } .charts > :first-child svg { font-size: 10px; }
figure { margin: 0; } svg { width: 100%; height: auto; font-size: 14px; } svg text { fill: currentColor; }
svg .grid { stroke: var(--line); } svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg polyline { fill: none; stroke-width: 1.6; } svg .level { stroke-dasharray: 5 4; }
svg .line0 { stroke: #1f77b4; } svg .line1 { stroke: #e0700d; } svg .line2 { stroke: #2ca02c; }
svg .line3 { stroke: #d62728; } svg .line4 { stroke: #9467bd; } svg .line5 { stroke: #8c564b; }
svg circle.line1 { fill: #e0700d; }
pre { white-space: pre-wrap; background: var(--soft); padding: 1rem; border-radius: .4rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .1rem 1.5rem .1rem 0; vertical-align: top; }
td { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere; }
th { font-weight: normal; } details { margin: .5rem 0; } summary { cursor: pointer; }
"""


def write_page(run: Path, out: Path | None = None) -> Path:
    """Write a run's page.

    Args:
        run: The run's folder; it may still be running, or have been stopped.
        out: File to write; ``report.html`` in the run's folder if not given.

    Returns:
        The file.

    Raises:
        TrainingError: If the folder holds no run, or one that has measured nothing yet.
    """
    config = stored_config(run)
    rows = read_metrics(run)
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "validation_nll" in row]
    if not training:
        raise TrainingError(f"there is nothing to report yet: {run / METRICS_FILE} has no row with a loss")
    summary = read_summary(run)
    stored = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    title = escape(run.resolve().name)
    body = [
        f"<h1>{title}</h1>",
        f"<p>{escape(_state(run, training, config.optim.steps, summary))}</p>",
        _facts(training, validation, summary),
        f'<div class="charts">{"".join(_charts(training, validation, summary))}</div>',
        *_sample(summary, config.run.sample_prompt),
        "<h2>Configuration</h2>",
        *_tables(stored),
        f"<p><small>Made by hippos {escape(__version__)} with <code>hippos report</code>; the numbers are in "
        f"<code>{METRICS_FILE}</code> and <code>{RUN_FILE}</code>.</small></p>",
    ]
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
        f"</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )
    out = out or run / "report.html"
    out.write_text(page, encoding="utf-8")
    return out


def _state(run: Path, training: Rows, steps: int, summary: Mapping[str, Any] | None) -> str:
    step = training[-1]["step"]
    if summary is not None and summary["steps"] >= steps:
        return f"Finished after {steps:,} steps."
    return f"{step:,} of {steps:,} steps. To go on where it stopped: {resume_command(run)}"


def _facts(training: Rows, validation: Rows, summary: Mapping[str, Any] | None) -> str:
    last = training[-1]
    facts = {"training loss, nats per token": f"{last['loss']:.3f}", "tokens read": f"{last['tokens']:,}"}
    if validation:
        facts["validation perplexity"] = f"{validation[-1]['validation_perplexity']:.2f}"
        facts["validation bits per byte"] = f"{validation[-1]['validation_bits_per_byte']:.3f}"
    if summary is not None:
        facts["parameters"] = f"{summary['parameters']:,}"
    facts["tokens/s"] = f"{_median([row['tokens_per_s'] for row in training]):,.0f}"
    if "mfu" in last:
        facts["MFU"] = f"{_median([row['mfu'] for row in training if 'mfu' in row]):.1%}"
    if "memory_gib" in last:
        facts["peak memory, GiB"] = f"{last['memory_gib']:.1f}"
    cells = [f"<div><span>{escape(name)}</span><b>{escape(value)}</b></div>" for name, value in facts.items()]
    return f'<div class="facts">{"".join(cells)}</div>'


def _charts(training: Rows, validation: Rows, summary: Mapping[str, Any] | None) -> list[str]:
    tokens_a_step = training[-1]["tokens"] / training[-1]["step"]
    loss = [
        Line("training", [(row["tokens"], row["loss"]) for row in training]),
        Line("validation", [(row["step"] * tokens_a_step, row["validation_nll"]) for row in validation], has_dots=True),
        *_baselines(validation, summary),
    ]
    charts = [draw_chart(loss, title="Loss", x_label="tokens read", y_label="loss, nats per token")]
    others = (
        ("learning_rate", "Learning rate", "of the weight matrices"),
        ("grad_norm", "Norm of the gradient", "before clipping"),
        ("tokens_per_s", "Speed", "tokens/s"),
        ("mfu", "Model FLOP utilisation", "share of the GPU's peak"),
    )
    for key, title, caption in others:
        line = Line(title, [(row["tokens"], row[key]) for row in training if key in row])
        charts.append(draw_chart([line], title=title, x_label="tokens read", y_label=caption))
    return [f"<figure>{chart}</figure>" for chart in charts if chart]


def _baselines(validation: Rows, summary: Mapping[str, Any] | None) -> list[Line]:
    if summary is None or not validation:
        return []
    bits_a_nat = validation[-1]["validation_bits_per_byte"] / validation[-1]["validation_nll"]
    return [
        Line(name, [(0.0, scores["bits_per_byte"] / bits_a_nat)], is_level=True)
        for name, scores in summary.get("baselines", {}).items()
    ]


def _sample(summary: Mapping[str, Any] | None, prompt: str) -> list[str]:
    if summary is None or "sample" not in summary:
        return []
    text = summary["sample"]
    shown = f"<b>{escape(prompt)}</b>{escape(text[len(prompt) :])}" if text.startswith(prompt) else escape(text)
    return ["<h2>A sample</h2>", f"<pre>{shown}</pre>"]


def _tables(stored: Mapping[str, Any]) -> list[str]:
    parts = dict(stored["config"])
    parts["model, every field"] = stored.get("model", {})
    recipe = parts.pop("recipe")
    tables = [f"<p>Recipe <code>{escape(str(recipe))}</code>; any value can be changed with <code>--set</code>.</p>"]
    for name, values in parts.items():
        rows = "".join(
            f"<tr><th>{escape(key)}</th><td>{escape(json.dumps(value))}</td></tr>" for key, value in values.items()
        )
        tables.append(f"<details><summary>{escape(name)}</summary><table>{rows}</table></details>")
    return tables


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
