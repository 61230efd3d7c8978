"""How a batch of sequences, or a sequence of packed documents, is cut into chunks of equal length."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from hippos.ops.arguments import compute_dtype


class Chunks:
    """Chunks of T samples as rows of a matrix for each channel; no row spans two sequences or documents.

    The rows of a sequence follow each other, sequence after sequence; what its last row lacks is filled with zeros.
    An empty document has one row of zeros.

    Attributes:
        chunk_len: T, samples of a row.
        n_rows: All rows: B ceil(L / T), or at most L / T + n_docs.
        n_sequences: B, or n_docs.
        starts: Index of the first row of each sequence or document, for the axis of the rows.
        lasts: Index of the last row of each.
        tail_lens: Samples in the last row of each, shape (n_sequences,), or one number for all.
        links: 1 where a row continues the row before it, 0 where a document starts, shape (n_rows,), for packed
            documents only.
    """

    def __init__(self, batch: int, seqlen: int, chunk_len: int, bounds: list[int] | None, like: Tensor) -> None:
        """Plan the rows of ``batch`` sequences of ``seqlen`` samples, or of documents at ``bounds``, for ``like``."""
        self.batch, self.seqlen, self.chunk_len = batch, seqlen, chunk_len
        self.starts: slice | Tensor
        self.lasts: slice | Tensor
        self.tail_lens: int | Tensor
        self.links: Tensor | None = None
        self._slots: Tensor | None = None  # place of each sample among all places of the rows
        self._samples: Tensor | None = None  # sample at each place, L where there is none
        self.n_sequences = batch if bounds is None else len(bounds) - 1
        self.n_rows = count_rows(batch, seqlen, chunk_len, bounds)
        self._n_rows_each = self.n_rows // batch if batch else 1
        if bounds is None:
            self.starts = slice(0, None, self._n_rows_each)
            self.lasts = slice(self._n_rows_each - 1, None, self._n_rows_each)
            self.tail_lens = seqlen - (self._n_rows_each - 1) * chunk_len
        else:
            self._pack(bounds, like)

    def _pack(self, bounds: list[int], like: Tensor) -> None:
        device = like.device
        offsets = torch.tensor(bounds)
        lengths = offsets.diff()
        n_rows = (-(-lengths // self.chunk_len)).clamp(min=1)
        lasts = n_rows.cumsum(0) - 1
        starts = lasts - n_rows + 1
        slots = torch.arange(self.seqlen) + (starts * self.chunk_len - offsets[:-1]).repeat_interleave(lengths)
        samples = torch.full((self.n_rows * self.chunk_len,), self.seqlen)
        samples[slots] = torch.arange(self.seqlen)
        links = torch.ones(self.n_rows, dtype=compute_dtype(like))
        links[starts] = 0
        self.starts, self.lasts, self.links = starts.to(device), lasts.to(device), links.to(device)
        self.tail_lens = (lengths - (n_rows - 1) * self.chunk_len).to(device)
        self._slots, self._samples = slots.to(device), samples.to(device)

    @property
    def has_links(self) -> bool:
        """Whether some sequence or document has a second row, so that states pass from row to row."""
        return self.n_rows > self.n_sequences

    def grid(self, rows: Tensor) -> Tensor:
        """View rows (H, n_rows, ...) as (H, B, rows of a sequence, ...)."""
        return torch.unflatten(rows, 1, (self.batch, self._n_rows_each))

    def cut(self, signal: Tensor) -> Tensor:
        """Cut a signal (B, H, L) into rows (H, n_rows, T)."""
        if self._samples is not None:
            padded = F.pad(signal[0], (0, 1))
            return padded.index_select(-1, self._samples).view(-1, self.n_rows, self.chunk_len)
        missing = self._n_rows_each * self.chunk_len - self.seqlen
        padded = F.pad(signal, (0, missing)) if missing else signal
        return padded.transpose(0, 1).reshape(signal.shape[1], self.n_rows, self.chunk_len)

    def join(self, rows: Tensor) -> Tensor:
        """Join rows (H, n_rows, T) to a contiguous signal (B, H, L); what fills up the last rows is ignored."""
        if self._slots is not None:
            return rows.reshape(rows.shape[0], -1).index_select(-1, self._slots).unsqueeze(0)
        return self.grid(rows).transpose(0, 1).flatten(2)[..., : self.seqlen].contiguous()

    def shift_down(self, rows: Tensor, first: Tensor | None) -> Tensor:
        """Give each row what the row before it has; the first of each sequence gets ``first``, or zeros.

        Takes (H, n_rows, X) and (H, n_sequences, X).
        """
        if isinstance(self.starts, slice):
            before = self.grid(rows)[:, :, :-1]  # (H, B, C - 1, X)
            first = torch.zeros_like(rows[:, self.starts]) if first is None else first
            return torch.cat((first.unsqueeze(2), before), dim=2).flatten(1, 2)
        before = F.pad(rows[:, :-1], (0, 0, 1, 0)) * self._links_column
        return before if first is None else before.index_add(1, self.starts, first)

    def shift_up(self, grads: Tensor) -> tuple[Tensor, Tensor]:
        """The adjoint of `shift_down`: gradients of its rows (H, n_rows, X), and of ``first`` (H, n_sequences, X)."""
        d_first = grads[:, self.starts]
        if self.links is None:
            after = self.grid(grads)[:, :, 1:]
            return torch.cat((after, torch.zeros_like(d_first).unsqueeze(2)), dim=2).flatten(1, 2), d_first
        return F.pad((grads * self._links_column)[:, 1:], (0, 0, 0, 1)), d_first

    @property
    def _links_column(self) -> Tensor:
        return self.links.unsqueeze(-1) if self.links is not None else torch.ones(())

    def align_right(self, last_rows: Tensor) -> Tensor:
        """Move the samples of each last row (H, n_sequences, T) to the row's end, what filled it up to the front."""
        return self._roll(last_rows, self.chunk_len - self.tail_lens)

    def align_left(self, last_rows: Tensor) -> Tensor:
        """Undo `align_right`."""
        return self._roll(last_rows, self.tail_lens - self.chunk_len)

    def _roll(self, last_rows: Tensor, shifts: int | Tensor) -> Tensor:
        if not isinstance(shifts, Tensor):
            return last_rows.roll(shifts, -1)
        places = torch.arange(self.chunk_len, device=shifts.device) - shifts.unsqueeze(-1)
        return last_rows.take_along_dim(places.remainder(self.chunk_len).unsqueeze(0), dim=-1)


def count_rows(batch: int, seqlen: int, chunk_len: int, bounds: list[int] | None) -> int:
    """The number of rows that `Chunks` makes, without making any tensor."""
    if bounds is None:
        return batch * -(-seqlen // chunk_len)
    return sum(max(1, -(-(right - left) // chunk_len)) for left, right in pairwise(bounds))
