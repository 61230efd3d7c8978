"""The README's table and figure of speed, made from the newest results of one GPU.

python benchmarks/speed_table.py            # print the table
python benchmarks/speed_table.py --write    # put it into the README, and draw docs/images/speed.svg
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GPU = "nvidia-h100-80gb-hbm3"
SEQLENS = (512, 2048, 8192, 32768)
CUT_OFF = {"h3_layer": "h3_layer_short_h100"}  # newer runs that did not reach every length
BEGIN, END = "<!-- benchmarks/speed_table.py -->\n\n", "\n<!-- end -->"

# (case, method, text of the row); a text alone is a heading.
ROWS: tuple[str | tuple[str, str, str], ...] = (
    "*gated causal convolution, forward / with backward*",
    ("ssm_conv_kernel", "copy", "copy of its tensors"),
    (
        "ssm_conv_kernel",
        "ssm_conv",
        "[`ssm_conv`](docs/math/flashconv.md), state passing, from the SSM's parameters",
    ),
    ("fft_conv", "fft_conv", "[`fft_conv`](docs/math/fft_conv.md), block FFT, any filter"),
    ("ssm_conv_kernel", "torch.fft", "the same with `torch.fft`"),
    ("ssm_conv_kernel", "SDPA", "attention of the same tokens (SDPA), 12 heads of 64, forward"),
    "*a whole layer with its projections, forward / with backward*",
    ("h3_layer", "H3 layer", "[`H3`](docs/math/h3_mix.md)"),
    ("h3_layer", "attention layer", "attention"),
)


def speed_table(results: Path) -> str:
    """The table in Markdown: medians in milliseconds, forward and, where it was timed, with the backward pass.

    Args:
        results: The folder ``benchmarks/results``.

    Returns:
        The lines of the table, each with its newline.
    """
    lines = ["| | L " + " | ".join(f"{seqlen:,}" for seqlen in SEQLENS) + " |", "|" + "---|" * (1 + len(SEQLENS))]
    for row in ROWS:
        if isinstance(row, str):
            lines.append(f"| {row} |" + " |" * len(SEQLENS))
        else:
            case, method, text = row
            lines.append(
                f"| {text} | " + " | ".join(_times(results, case, method, seqlen) for seqlen in SEQLENS) + " |"
            )
    return "\n".join(lines) + "\n"


def _times(results: Path, case: str, method: str, seqlen: int) -> str:
    (size,) = (size for size in _newest(results, case)["sizes"] if size["size"]["seqlen"] == seqlen)
    median_s = {row["measure"]: row["median_s"] for row in size["rows"] if row["method"] == method}
    measures = [measure for measure in ("forward", "forward + backward") if measure in median_s]
    return " / ".join(_milliseconds(median_s[measure] * 1e3) for measure in measures)


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _newest_file(results: Path, name: str) -> Path:
    return max(results.glob(f"{name}_*.json"), key=lambda path: path.stem[-8:])


def _newest_files(results: Path, case: str) -> list[Path]:
    """A case's whole run, and the newer one that was cut off, where there is one."""
    names = [f"{case}_{GPU}", *([CUT_OFF[case]] if case in CUT_OFF else [])]
    return [_newest_file(results, name) for name in names]


def _newest(results: Path, case: str) -> dict[str, Any]:
    """The newest result, each sequence length from the newest run that reached it."""
    content, *newer = (json.loads(file.read_text()) for file in _newest_files(results, case))
    for run in newer:
        found = {size["size"]["seqlen"]: size for size in run["sizes"]}
        content["sizes"] = [found.get(size["size"].get("seqlen"), size) for size in content["sizes"]]
    whole: dict[str, Any] = content
    return whole


def origin(results: Path) -> str:
    """What the figure is made of: each result's name and the beginning of its SHA-256; the picture holds it too."""
    files = [file for case in DRAWN for file in _newest_files(results, case)]
    return ", ".join(f"{file.stem} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}" for file in files)


def _points(result: dict[str, Any], axis: str, method: str, measure: str) -> dict[int, float]:
    """Size -> median seconds of a method, over the sizes that have it."""
    found = {
        size["size"][axis]: row["median_s"]
        for size in result["sizes"]
        for row in size["rows"]
        if (row["method"], row["measure"]) == (method, measure)
    }
    return dict(sorted(found.items()))


DRAWN = ("h3_layer", "training_step", "generate_prompts", "generate_default_cache", "generate_batches")
OURS, THEIRS, OLD = "#0f766e", "#b45309", "#a8a29e"


def speed_figure(results: Path, path: Path) -> None:
    """Draw what one GPU measured of a layer, of training and of writing, each beside a Transformer's.

    Args:
        results: The folder ``benchmarks/results``.
        path: Where the picture goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layer, training, writing, default, batches = (_newest(results, case) for case in DRAWN)
    batches["sizes"] = [size for size in batches["sizes"] if size["size"]["batch"] == 64]
    both, step, text = "forward + backward", "step", "prompt and all tokens"
    slow = {
        **_points(batches, "prompt_len", "GPT-2, default cache", text),
        **_points(default, "prompt_len", "GPT-2, default cache", text),
    }
    with pyplot.rc_context({"svg.hashsalt": "hippos", "font.size": 10, "axes.titlesize": 10.5}):
        figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
        left.set_title("One layer, forward and backward,\n65,536 tokens, width 768")
        left.set_ylabel("ms")
        for name, method, colour in (("attention", "attention layer", THEIRS), ("H3", "H3 layer", OURS)):
            points = _points(layer, "seqlen", method, both)
            _line(left, name, {seqlen: points[seqlen] * 1e3 for seqlen in points if seqlen <= 32768}, colour)
        middle.set_title("Training 125M,\n32,768 tokens per step")
        middle.set_ylabel("thousand tokens/s")
        for name, method, colour in (("GPT-2, compiled", "GPT-2 124M", THEIRS), ("hybrid H3", "H3 hybrid 125M", OURS)):
            points = _points(training, "seqlen", method, step)
            _line(middle, name, {seqlen: 32.768 / points[seqlen] for seqlen in points}, colour)
        right.set_title("Generation 1.3B, 128 tokens after each\nof 64 prompts, prefill included")
        right.set_ylabel("thousand tokens/s")
        rows = (
            ("hybrid H3", _points(writing, "prompt_len", "H3, engine", text), OURS),
            (
                "GPT-2, compiled",
                _points(writing, "prompt_len", "GPT-2, static cache + compile", text),
                THEIRS,
            ),
            ("GPT-2, default cache", dict(sorted(slow.items())), OLD),
        )
        for name, points, colour in rows:
            _line(right, name, {prompt: 8.192 / points[prompt] for prompt in points}, colour)
        for axes, axis in ((left, "sequence length"), (middle, "sequence length"), (right, "prompt length")):
            axes.set_xlabel(axis)
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.25)
        figure.savefig(path, metadata={"Date": None, "Description": origin(results)})
        pyplot.close(figure)


def _line(axes: Any, name: str, points: dict[int, float], colour: str) -> None:
    """A line with its name at its end: left or above where it rises, below where it falls, but not below the axis."""
    sizes, values = list(points), list(points.values())
    axes.set_xscale("log", base=2)
    axes.plot(sizes, values, "o-", color=colour, linewidth=2, markersize=4)
    axes.set_xticks(sizes, [f"{size // 1024}K" if size % 1024 == 0 else f"{size}" for size in sizes])
    axes.xaxis.minorticks_off()
    if values[-1] > 2 * values[0]:
        place, offset, align = -1, (-8, -3), "right"
    elif values[-1] > values[0]:
        place, offset, align = -1, (0, 8), "right"
    elif values[-1] > 3:
        place, offset, align = -1, (0, -16), "right"
    else:
        place, offset, align = 0, (0, 8), "left"
    axes.annotate(
        name, (sizes[place], values[place]), xytext=offset, textcoords="offset points", color=colour, ha=align
    )


def in_place(readme: str, table: str) -> str:
    """The README with this table between its two marks."""
    return re.sub(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: table, readme, flags=re.DOTALL)


if __name__ == "__main__":
    made = speed_table(ROOT / "benchmarks/results")
    if sys.argv[1:] == ["--write"]:
        path = ROOT / "README.md"
        path.write_text(in_place(path.read_text(encoding="utf-8"), made), encoding="utf-8")
        speed_figure(ROOT / "benchmarks/results", ROOT / "docs/images/speed.svg")
    else:
        print(made, end="")
