"""The backward program of packed documents for Hopper, run on a CPU by `gluon_on_cpu`, against the definition."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hippos.ops import ssm_conv
from hippos.ops.h3_mix import chunked
from tests.ops.gluon_on_cpu import run_program
from tests.ops.ssm_cases import Draw, relative_error
from tests.ops.test_ssm_conv_hopper import CHUNK, MODES, ROUNDING, operators

FOLDER = Path(chunked.__file__).parent
MODULES = (
    *(f"../ssm_conv/kernels{name}" for name in ("", "_operators", "_hopper", "_hopper_scan", "_hopper_operators")),
    "kernels_hopper_rows",
)
PIECES, STEPS = 16, 4


def rows_of(bounds: list[int]) -> list[tuple[int, int, int]]:
    """Chunk, first and past the last sample of every row, empty ones too, as `place_rows_kernel` writes them."""
    rows, n_docs = [], len(bounds) - 1
    for document, (begin, end) in enumerate(pairwise(bounds)):
        rows += [(0, 0, 0)] * (document + begin // CHUNK - len(rows))
        rows += [
            (chunk, begin - chunk * CHUNK, end - chunk * CHUNK) for chunk in range(begin // CHUNK, -(-end // CHUNK))
        ]
    n_rows = -(-(bounds[-1] // CHUNK + n_docs) // 64) * 64
    return rows + [(0, 0, 0)] * (n_rows - len(rows))


def begins(row: tuple[int, int, int]) -> bool:
    return row[1] >= 0


def kept(x: torch.Tensor, row: tuple[int, int, int]) -> torch.Tensor:
    """The samples of a row, (CHUNK,), zero where they are not its document's."""
    chunk, first, last = row
    column = torch.arange(CHUNK)
    return torch.where((column >= first) & (column < last), x[chunk * CHUNK : (chunk + 1) * CHUNK], 0.0)


@pytest.mark.parametrize(
    "lengths", [(4096,), (64, 100, 1, 27, 500, 20, 12, 0, 1000, 68), (7,) * 100 + (4,), (3000, 1, 63, 8), (64,) * 20]
)
def test_backward(lengths):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    seqlen, rows, random = bounds[-1], rows_of(bounds), Draw(seed=0)
    q, key, v, dout = (random.normal(1, 1, seqlen, dtype=torch.bfloat16) for _ in range(4))
    log_a, b, c = random.modes(1, MODES, dtype=torch.float32)
    d = random.normal(1, dtype=torch.float32)
    taps, into, outof, decay = operators(*(x.double() for x in (log_a, b, c, d)))
    a = torch.view_as_complex(decay[0].contiguous())
    readers = torch.view_as_complex(into[0].contiguous()), torch.view_as_complex(outof[0].contiguous())
    x, dy = (v * 1.0).double()[0, 0] * key.double()[0, 0], dout.double()[0, 0] * q.double()[0, 0]

    # The states before every four rows, and the adjoint states after each piece.
    piece_rows = len(rows) // PIECES
    saved, later = torch.zeros(len(rows) // STEPS, MODES, 2), torch.zeros(PIECES, 2, MODES)
    state = torch.zeros(MODES, dtype=torch.complex128)
    for index, row in enumerate(rows):
        state = state * (not begins(row))
        if index % STEPS == 0:
            saved[index // STEPS] = torch.view_as_real(state)
        state = a * state + (kept(x, row).to(torch.complex128) @ readers[0])
    state = torch.zeros(MODES, dtype=torch.complex128)
    for index, row in reversed(list(enumerate(rows))):
        if index % piece_rows == piece_rows - 1:
            later[index // piece_rows] = torch.stack((state.real, state.imag))
        state = (a.conj() * state + (kept(dy, row).to(torch.complex128) @ readers[1])) * (not begins(row))

    places = torch.tensor([(chunk << 32) | ((max(first, -(1 << 14)) + (1 << 14)) << 16) | min(last, 1 << 14)
                           for chunk, first, last in rows])  # fmt: skip
    bits = torch.tensor([begins(row) for row in rows], dtype=torch.int32).view(-1, 16)
    resets = (bits << torch.arange(16, dtype=torch.int32)).sum(1, dtype=torch.int32)
    gradients = [torch.full_like(dout, torch.nan) for _ in range(3)]
    shapes = ((CHUNK, CHUNK), (CHUNK, MODES, 2), (CHUNK, MODES, 2), (MODES, 2))
    partial = [torch.empty(1, *shape) for shape in shapes]
    halved = [x.bfloat16().contiguous() for x in (taps, into, outof)]
    run_program(
        FOLDER, MODULES, "h3_mix_rows_bwd_hopper_kernel", 1,
        q, key, v, dout, *gradients, *halved, decay.float().contiguous(), places, resets, saved.bfloat16(), later,
        *partial, *([seqlen] * 4), 1, piece_rows, piece_rows // STEPS, n_warps=8,
    )  # fmt: skip

    exact = [x.double().requires_grad_() for x in (q, key, v, log_a, b, c, d)]
    query, keys, values, *parameters = exact
    options = {"in_gate": keys, "out_gate": query, "cu_seqlens": torch.tensor(bounds), "impl": "torch"}
    wanted = torch.autograd.grad(ssm_conv(values, *parameters, **options), exact, dout.double())
    made = operators(*parameters)
    lag = torch.arange(CHUNK) - torch.arange(CHUNK).unsqueeze(1)
    toeplitz = torch.where(lag >= 0, made[0][:, lag.clamp(min=0)], 0.0)
    loss = sum((x * gradient.double()).sum() for x, gradient in zip((toeplitz, *made[1:]), partial, strict=True))
    found = (*gradients, *torch.autograd.grad(loss, parameters))
    for name, got, want in zip(("q", "key", "v", "log_a", "b", "c"), found, wanted, strict=False):
        assert relative_error(got, want) < 3 * ROUNDING[torch.bfloat16], name
