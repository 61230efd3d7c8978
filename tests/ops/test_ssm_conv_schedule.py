"""How ssm_conv's kernels cut their work: every chunk has one row, and pieces cover their sequence."""

from __future__ import annotations

import itertools

import pytest

from hippos.ops.ssm_conv.schedule import Pieces, Schedule, backward_pieces, forward_pieces, place


class TestGeometry:
    @pytest.mark.parametrize(("rows", "lanes"), [(64, 16), (128, 32), (16, 4)])
    @pytest.mark.parametrize("has_segments", [False, True])
    def test_every_chunk_has_one_row(self, rows, lanes, has_segments):
        schedule = Schedule(chunk=32, rows=rows, lanes=lanes)
        for batch, seqlen in itertools.product([1, 2, 3, 8, 100], [1, 31, 32, 33, 1000, 5000]):
            at = place(Pieces(batch, 1, seqlen), schedule, has_segments=has_segments)
            assert at.steps * at.pieces * at.segments == rows
            assert at.span == 32 * at.steps * at.segments
            assert at.n_tiles * at.span >= seqlen > (at.n_tiles - 1) * at.span
            assert at.n_groups * at.pieces >= batch > (at.n_groups - 1) * at.pieces

    def test_pieces_cover_their_sequence(self):
        schedule = Schedule(chunk=32, rows=64, lanes=16)
        for batch, n_heads, seqlen in itertools.product([1, 3, 16, 20], [1, 128, 768], [1, 128, 129, 5000, 10**6]):
            for cut in (forward_pieces, backward_pieces):
                pieces = cut(batch, n_heads, seqlen, schedule)
                assert pieces.total == batch * pieces.per_sequence
                assert pieces.per_sequence * pieces.length >= seqlen > (pieces.per_sequence - 1) * pieces.length
                at = place(pieces, schedule, has_segments=False)
                assert pieces.per_sequence == 1 or pieces.length % at.span == 0

    def test_a_long_sequence_of_few_channels_fills_a_gpu(self):
        schedule = Schedule(chunk=64, rows=64, lanes=16)
        pieces = forward_pieces(1, 128, 1 << 20, schedule)
        at = place(pieces, schedule, has_segments=False)
        assert 128 * at.n_groups >= schedule.least_programs
