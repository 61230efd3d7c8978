"""The README's table of speed, made from the newest results of the suite "kernels".

python benchmarks/speed_table.py            # print it
python benchmarks/speed_table.py --write    # put it into the README
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GPU = "nvidia-h100-80gb-hbm3"
SEQLENS = (512, 2048, 8192, 32768)
BEGIN, END = "<!-- benchmarks/speed_table.py -->\n\n", "\n<!-- end -->"

# (case, method, text of the row); a text alone is a heading.
ROWS: tuple[str | tuple[str, str, str], ...] = (
    "*gated causal convolution, forward / with backward*",
    ("ssm_conv_kernel", "copy", "a copy of its tensors"),
    (
        "ssm_conv_kernel",
        "ssm_conv",
        "[`ssm_conv`](docs/math/flashconv.md), state passing, from the SSM's parameters",
    ),
    ("fft_conv", "fft_conv", "[`fft_conv`](docs/math/fft_conv.md), block FFT, any filter"),
    ("ssm_conv_kernel", "torch.fft", "the same by `torch.fft`"),
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
    newest = max(results.glob(f"{case}_{GPU}_*.json"), key=lambda path: path.stem[-8:])
    (size,) = (size for size in json.loads(newest.read_text())["sizes"] if size["size"]["seqlen"] == seqlen)
    median_s = {row["measure"]: row["median_s"] for row in size["rows"] if row["method"] == method}
    measures = [measure for measure in ("forward", "forward + backward") if measure in median_s]
    return " / ".join(_milliseconds(median_s[measure] * 1e3) for measure in measures)


def _milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def in_place(readme: str, table: str) -> str:
    """The README with this table between its two marks."""
    return re.sub(f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: table, readme, flags=re.DOTALL)


if __name__ == "__main__":
    made = speed_table(ROOT / "benchmarks/results")
    if sys.argv[1:] == ["--write"]:
        path = ROOT / "README.md"
        path.write_text(in_place(path.read_text(encoding="utf-8"), made), encoding="utf-8")
    else:
        print(made, end="")
