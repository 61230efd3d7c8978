"""The forward program's tiles: as many chunks of a sequence as a thread holds, then sequences, then segments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hippos.ops.h3_mix.schedule import MOST_STEPS, mix_pieces, mix_schedule, place_mix
from hippos.ops.ssm_conv.schedule import Pieces, Schedule
from tests.ops.ssm_cases import leaves, relative_error
from tests.ops.test_h3_mix_triton import Inputs, call, interpreter, make_inputs

CPU = torch.device("cpu")
HOPPER = Schedule(chunk=64, rows=64, lanes=16, max_registers=168)


@pytest.mark.parametrize(
    ("batch", "seqlen", "placed"),
    [
        (128, 64, (1, 64, 1)),
        (128, 512, (4, 16, 1)),
        (32, 2048, (16, 4, 1)),
        (3, 1000, (16, 4, 1)),
        (2, 32768, (16, 2, 2)),
        (1, 262144, (16, 1, 4)),
        (1, 1025, (16, 2, 2)),
        (1, 100, (2, 32, 1)),
    ],
)
def test_places(batch, seqlen, placed):
    at = place_mix(Pieces(batch, 1, seqlen), HOPPER)
    assert (at.steps, at.pieces, at.segments) == placed
    assert at.steps * at.pieces * at.segments == HOPPER.rows
    assert at.span == at.steps * at.segments * HOPPER.chunk
    assert (at.n_tiles - 1) * at.span < seqlen <= at.n_tiles * at.span
    assert (at.n_groups - 1) * at.pieces < batch <= at.n_groups * at.pieces


def test_pieces_of_cut_sequences_are_full_tiles():
    schedule = replace(HOPPER, least_programs=264)
    pieces = mix_pieces(1, 2, 1 << 20, schedule)
    assert pieces.is_cut
    assert pieces.length % place_mix(pieces, schedule).span == 0


@interpreter
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize(("batch", "seqlen"), [(1, 600), (2, 515), (3, 300), (9, 40)])
def test_steps_and_segments(rows, batch, seqlen):
    from hippos.ops.h3_mix.launch import h3_mix_fwd
    from hippos.ops.h3_mix.layout import MixInputs

    inputs = make_inputs(batch, 1, seqlen, 8, 3, torch.float32)
    initial = inputs.initial.contiguous()
    schedule = replace(mix_schedule(torch.float32, 3, CPU), rows=rows, least_programs=1)
    at = place_mix(mix_pieces(batch, 1, seqlen, schedule), schedule)
    most = min(MOST_STEPS, rows // 2)
    assert at.steps == (most if seqlen > 16 * most // 2 else 4)
    tensors = MixInputs(*inputs[:10], initial)
    y, state, _ = h3_mix_fwd(tensors, wants_state=True, saves_states=True, schedule=schedule)
    whole = seqlen // 16 * 16
    exact = Inputs(*leaves(*inputs, dtype=torch.float64))
    wanted, last = call(exact._replace(**{name: getattr(exact, name)[..., :whole] for name in "qkv"}), "reference")
    assert relative_error(y[..., :whole], wanted.detach()) < 4e-6
    assert relative_error(state, last.diag.detach()) < 4e-6
