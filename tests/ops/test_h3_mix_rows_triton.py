"""Packed documents that start from no state, which h3_mix's kernels read as rows: wherever documents begin and end.

As in test_h3_mix_triton.py, some tests need ``TRITON_INTERPRET=1``, others a GPU.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.library import opcheck

from hippos.ops import h3_mix
from hippos.ops.h3_mix.autograd import h3_mix_kernel_op, h3_mix_triton
from hippos.ops.h3_mix.schedule import row_schedule
from hippos.ops.ssm_conv.schedule import count_row_tiles
from tests.ops.ssm_cases import leaves, relative_error
from tests.ops.test_h3_mix_triton import (
    INTERPRETED,
    Inputs,
    assert_accurate,
    call,
    interpreter,
    make_inputs,
    no_waiting,
    on_gpu,
    run,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # advice of the compiler
]


def bounds_of(*lengths: int) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def place(offsets: list[int], seqlen: int, device: str = "cpu"):
    """Every row that holds samples, as (first sample, past the last, document, begins it, ends it)."""
    from hippos.ops.ssm_conv.launch_rows import place_rows

    schedule = row_schedule(torch.float32, 4, torch.device(device))
    rows = place_rows(torch.tensor(offsets, dtype=torch.int32, device=device), seqlen, schedule)
    assert len(rows.places) == count_row_tiles(len(offsets) - 1, seqlen, schedule) * schedule.rows
    words = rows.places.cpu()
    start, first, last = (words >> 32) * schedule.chunk, (words >> 16 & 0xFFFF) - (1 << 14), words & 0x7FFF
    begins = rows.resets.cpu().unsqueeze(-1) >> torch.arange(16) & 1
    columns = (start + first.clamp(0), start + last.clamp(max=schedule.chunk), rows.owners.cpu())
    flags = (begins.flatten() == 1, words & 0x8000 != 0)
    assert int(start.min()) >= 0
    assert int(start.max()) < seqlen
    assert (start % schedule.chunk == 0).all()
    return [row for row in zip(*(x.tolist() for x in (*columns, *flags)), strict=True) if row[0] < row[1]]


@interpreter
class TestRows:
    @pytest.mark.parametrize(
        "lengths", [(1,), (16,), (17,), (3, 4, 2, 7, 30), (32, 16, 64), (0, 0, 5, 0, 40, 0), (15, 1, 1, 200), (1,) * 40]
    )
    def test_cover_every_document_once(self, lengths):
        offsets = bounds_of(*lengths)
        chunk = row_schedule(torch.float32, 4, torch.device("cpu")).chunk
        wanted = []
        for document, (begin, end) in enumerate(itertools.pairwise(offsets)):
            edges = [begin, *range((begin // chunk + 1) * chunk, end, chunk), end]
            for left, right in itertools.pairwise(edges):
                if left < right:
                    wanted.append((left, right, document, left == begin, right == end))
        assert place(offsets, offsets[-1]) == wanted

    @pytest.mark.parametrize("offsets", [[0, 90, 20, 50], [-5, 70, 1000], [40, 30, 20, 10], [0, 2**31 - 1, -(2**31)]])
    def test_bad_offsets_stay_in_the_sequence(self, offsets):
        assert all(0 <= row[0] < row[1] <= 60 for row in place(offsets, 60))


@interpreter
class TestInterpreted:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(
        ("lengths", "n_taps"),
        [((33,), 8), ((5, 0, 16, 11, 1, 67, 16, 64, 20), 8), ((64, 64), 40), ((1,) * 20, 4), ((300, 7), 1)],
    )
    def test_outputs_and_gradients(self, lengths, n_taps, dtype):
        bounds = bounds_of(*lengths)
        inputs = make_inputs(1, 2, bounds[-1], n_taps, 4, dtype, has_state=False)
        wanted = run(inputs, "reference", dtype=torch.float64, bounds=bounds)
        assert_accurate(run(inputs, "triton", bounds=bounds), wanted, dtype)

    @pytest.mark.parametrize("lengths", [(333,), (5, 0, 16, 11, 1, 67, 16, 64, 20, 90), (3,) * 70])
    def test_adjoint_states_between_pieces(self, lengths):
        from hippos.ops.h3_mix.kernels_rows_backward import rows_adjoint_kernel
        from hippos.ops.ssm_conv.launch_operators import make_chunk_operators
        from hippos.ops.ssm_conv.launch_rows import place_rows
        from hippos.ops.ssm_conv.schedule import backward_schedule

        bounds, pieces, n_modes = bounds_of(*lengths), 4, 5
        seqlen = bounds[-1] // 16 * 16  # of whole chunks
        bounds = [min(bound, seqlen) for bound in bounds]
        inputs = make_inputs(1, 2, seqlen, 4, n_modes, torch.float32, has_state=False)
        q, dout, log_a, b, c, d = inputs.q, inputs.v, inputs.log_a, inputs.b, inputs.c, inputs.d
        schedule = backward_schedule(torch.float32, n_modes, q.device)
        operators = make_chunk_operators(log_a, b, c, d, schedule)
        rows = place_rows(torch.tensor(bounds, dtype=torch.int32), seqlen, schedule)
        piece_rows = len(rows.places) // pieces
        later = torch.full((pieces, 2, 2, 16), torch.nan)
        rows_adjoint_kernel[(2,)](
            q, dout, operators.outof, log_a, operators.decay, rows.places, rows.resets, later,
            q.stride(1), dout.stride(1), 2, n_modes, seqlen, piece_rows, CHUNK=16, MODES=16, STEPS=4, PIECES=pieces,
        )  # fmt: skip
        # One row after another, from the last.
        a = torch.exp(torch.view_as_complex(log_a.double()))
        reader = 2 * torch.view_as_complex(c.double()) * a  # times a**j: what the state adds to sample j
        powers = (reader.unsqueeze(-1) * a.unsqueeze(-1) ** torch.arange(16)).conj()  # (H, M, CHUNK)
        state = torch.zeros(2, n_modes, dtype=torch.complex128)
        for row in reversed(range(len(rows.places))):
            if row % piece_rows == piece_rows - 1:
                found = torch.complex(*later[row // piece_rows, ..., :n_modes].double().unbind(1))
                torch.testing.assert_close(found, state, rtol=1e-4, atol=1e-4)
            word, begins = int(rows.places[row]), int(rows.resets[row // 16]) >> (row % 16) & 1
            start, first, last = (word >> 32) * 16, (word >> 16 & 0xFFFF) - (1 << 14), word & 0x7FFF
            column = torch.arange(16)
            inside = (column >= first) & (column < last)
            dy = torch.where(inside, (q * dout)[0, :, start : start + 16].double(), 0.0)
            state = (a.conj() ** 16 * state + (powers @ dy.unsqueeze(-1).to(a.dtype)).squeeze(-1)) * (1 - begins)

    def test_nothing_leaks_between_documents(self):
        """What would be infinite times zero in a product over both documents."""
        bounds = [0, 21, 50]
        inputs = make_inputs(1, 2, 50, 8, 4, torch.float32, has_state=False)
        for x in inputs[:3]:
            x[..., :21] = torch.inf
        y, state = call(inputs, "triton", bounds=bounds)
        alone, last = call(inputs._replace(**{name: getattr(inputs, name)[..., 21:] for name in "qkv"}), "triton")
        assert relative_error(y[..., 21:], alone) < 1e-5
        assert relative_error(state.diag[1], last.diag[0]) < 1e-5


@pytest.mark.skipif(INTERPRETED, reason="opcheck's tracing does not run Triton's interpreter")
class TestOperator:
    def test_opcheck(self):
        inputs, offsets = make_inputs(1, 2, 20, 4, 3, torch.float32, has_state=False), torch.tensor([0, 5, 5, 20])
        opcheck(h3_mix_kernel_op, (*leaves(*inputs), offsets, True, True))

    def test_without_kernels(self):
        bounds = [0, 5, 5, 48, 64]
        inputs = Inputs(*leaves(*make_inputs(1, 2, 64, 4, 3, torch.float32, has_state=False)))
        y, state = h3_mix_triton(*inputs[:9], 1, None, torch.tensor(bounds), True)
        (y.square().sum() + state.diag.sum()).backward()
        exact = Inputs(*leaves(*inputs))
        wanted, last = call(exact, "reference", bounds=bounds)
        (wanted.square().sum() + last.diag.sum()).backward()
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state.diag, last.diag, rtol=1e-4, atol=1e-4)
        for got, want in zip(inputs[:9], exact[:9], strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-3)


class TestOnGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @pytest.mark.parametrize(
        "lengths", [(500, 64, 1, 63, 65, 0, 1000, 3000), (4096,), (100, 8001, 91), (64, 3, 0, 189) * 32, (7,) * 300]
    )
    def test_outputs_and_gradients(self, lengths, dtype):
        bounds = bounds_of(*lengths)
        inputs = make_inputs(1, 3, bounds[-1], 64, 32, dtype, has_state=False)
        wanted = run(inputs, "torch", dtype=torch.float64, bounds=bounds)
        found = run(inputs.to("cuda"), "triton", bounds=bounds)
        assert_accurate(found, wanted, dtype)
        again = run(inputs.to("cuda"), "triton", bounds=bounds)
        assert all(torch.equal(found[name], again[name]) for name in found)

    @pytest.mark.parametrize(("n_taps", "n_modes"), [(1, 1), (4, 17), (128, 64)])
    def test_sizes(self, n_taps, n_modes):
        bounds = bounds_of(300, 211, 2, 700)
        inputs = make_inputs(1, 2, bounds[-1], n_taps, n_modes, torch.bfloat16, has_state=False)
        wanted = run(inputs, "torch", dtype=torch.float64, bounds=bounds)
        assert_accurate(run(inputs.to("cuda"), "triton", bounds=bounds), wanted, torch.bfloat16)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_every_channel(self, dtype):
        """The whole and each channel: at most 2.0 and 2.5 times the error of rounding once."""
        bounds = bounds_of(700, 31, 2000, 5000, 461)
        inputs = make_inputs(1, 64, bounds[-1], 64, 32, dtype, has_state=False)
        wanted, _ = call(Inputs(*leaves(*inputs, dtype=torch.float64)), "torch", bounds=bounds)
        found = call(inputs.to("cuda"), "triton", bounds=bounds)[0].cpu().double()
        wanted = wanted.detach()
        plain = max(relative_error(wanted.to(dtype).double(), wanted), 1e-6 if dtype == torch.float32 else 0.0)
        errors = (found - wanted).norm(dim=(0, 2)) / wanted.norm(dim=(0, 2))
        assert relative_error(found, wanted) <= 2 * plain
        assert float(errors.max()) <= 2.5 * plain

    def test_compiled_and_without_waiting(self, monkeypatch):
        monkeypatch.setenv("HIPPOS_DEBUG", "0")
        inputs = Inputs(*leaves(*make_inputs(1, 3, 1000, 64, 32, torch.bfloat16, has_state=False).to("cuda")))
        offsets = torch.tensor([0, 700, 1000], dtype=torch.int32, device="cuda")

        def mix(*x):
            return h3_mix(*x[:9], return_state=True, cu_seqlens=offsets)

        wanted, last = call(inputs, "triton", bounds=[0, 700, 1000])
        with no_waiting():
            y, state = mix(*inputs)
            torch.autograd.grad(y, inputs[:9], y.detach())
        assert torch.equal(y, wanted)
        y, state = torch.compile(mix, fullgraph=True)(*inputs)
        assert torch.equal(y, wanted)
        assert relative_error(state.diag, last.diag) < 1e-5

    def test_bad_offsets_stay_in_bounds(self, monkeypatch):
        monkeypatch.setenv("HIPPOS_DEBUG", "0")
        inputs = Inputs(*leaves(*make_inputs(1, 2, 1000, 64, 32, torch.bfloat16, has_state=False).to("cuda")))
        for bounds in ([0, 5000, 1000], [-7, 300, 200, 1000], [10, 2**31 - 1, -(2**31), 1000]):
            y, state = call(inputs, "triton", bounds=bounds)
            torch.autograd.grad((y.sum() + state.diag.sum()), inputs[:9])
        torch.cuda.synchronize()

    def test_forward_needs_no_tensor_beside_its_output(self):
        inputs = make_inputs(1, 256, 32768, 64, 32, torch.bfloat16, has_state=False).to("cuda")
        bounds = bounds_of(*[1000] * 32, 768)
        call(inputs, "triton", return_state=False, bounds=bounds)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = call(inputs, "triton", return_state=False, bounds=bounds)
        extra = torch.cuda.max_memory_allocated() - before - y.nbytes
        assert extra <= 0.1 * 4 * y.nbytes + 256 * 32 * 1024
