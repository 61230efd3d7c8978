"""Which PyTorch form of the convolution runs, and with what chunk length: measured choices.

Up to 64 samples without states take one product with the filter's Toeplitz matrix (short_conv.py), what a chunk would
do without the operators that pass states. For longer ones,
forward and backward in milliseconds, float32, H 768, the filter included, on an AMD EPYC with AVX-512; chunks of 128
were never the fastest. On one core:

| M | (B, L) | FFT | chunks of 16 | of 32 | of 64 |
| --- | --- | --- | --- | --- | --- |
| 8 | (8, 128) | **22** | 23 | 30 | 56 |
| 8 | (8, 256) | 66 | 59 | **55** | 69 |
| 8 | (2, 1024) | 74 | 57 | **45** | 65 |
| 32 | (1, 512) | **38** | 43 | 59 | 105 |
| 32 | (8, 512) | **195** | 365 | 261 | 264 |
| 32 | (2, 2048) | **153** | 302 | 201 | 184 |
| 32 | (1, 4096) | 209 | 196 | **153** | 157 |
| 32 | (2, 4096) | 443 | 581 | 412 | **289** |
| 32 | (1, 8192) | 629 | 1048 | 289 | **252** |
| 128 | (1, 2048) | **278** | 593 | 504 | 644 |
| 128 | (2, 4096) | **865** | 2618 | 1450 | 1267 |

Signals of more than 2^22 samples, whose spectra are too large for memory to be used again, on two cores:

| M | (B, L) | FFT | chunks of 16 | of 32 | of 64 |
| --- | --- | --- | --- | --- | --- |
| 32 | (16, 512) | 223 | 360 | 212 | **165** |
| 32 | (8, 1024) | 241 | 385 | 219 | **188** |
| 32 | (4, 2048) | 236 | 370 | 199 | **147** |
"""

from __future__ import annotations

import torch
from torch import Tensor

from hippos.ops.arguments import compute_dtype
from hippos.ops.fft_conv.spectral import fft_conv_torch
from hippos.ops.short_conv import SHORT_LEN, short_conv
from hippos.ops.ssm_conv.chunked import Inputs, choose_chunk_len, gated, ssm_conv_chunked
from hippos.ops.ssm_conv.chunked_op import ssm_conv_chunked_op
from hippos.ops.ssm_filter.two_level import ssm_filter_torch
from hippos.ops.tracing import is_exporting

MAX_FFT_LEN = 8192
LARGE_SIGNAL = 2**22  # samples


def ssm_conv_torch(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    in_gate: Tensor | None,
    out_gate: Tensor | None,
    initial_state: Tensor | None,
    bounds: list[int] | None,
    return_state: bool,
) -> tuple[Tensor, Tensor]:
    """Arguments as in `ssm_conv`, but ``bounds``, the documents' offsets on the host; checked by the caller.

    Returns:
        y and the final states; without ``return_state`` the second is an empty tensor.
    """
    batch, _, seqlen = u.shape
    has_state = return_state or initial_state is not None or bounds is not None
    takes_product = not has_state and seqlen <= SHORT_LEN
    if takes_product or (not has_state and takes_fft(u, n_modes=log_a.shape[1])):
        dtype = compute_dtype(u)
        taps = ssm_filter_torch(log_a.to(dtype), b.to(dtype), c.to(dtype), seqlen)
        if takes_product:
            if d is not None:
                taps = torch.cat((taps[:, :1] + d.to(dtype).unsqueeze(-1), taps[:, 1:]), dim=-1)
            y = short_conv(gated(u, in_gate, dtype), taps)
            return gated(y, out_gate, dtype).to(u.dtype), u.new_empty(0)
        return fft_conv_torch(u, taps, d, in_gate, out_gate, causal=True), u.new_empty(0)
    inputs = Inputs(u, log_a, b, c, d, in_gate, out_gate, initial_state)
    chunk_len = choose_chunk_len(batch, seqlen, n_docs=1 if bounds is None else len(bounds) - 1)
    if is_exporting():
        outputs = ssm_conv_chunked(inputs, bounds, return_state=return_state, chunk_len=chunk_len)
        return outputs.y, u.new_empty(0) if outputs.state is None else outputs.state
    y, state, _, _ = ssm_conv_chunked_op(*inputs, bounds, return_state, chunk_len)
    return y, state


def takes_fft(u: Tensor, n_modes: int) -> bool:
    """Whether an FFT of the whole sequence is faster than chunks, whose cost grows with the modes."""
    seqlen = u.shape[-1]
    if u.device.type != "cpu" or not 64 < seqlen <= MAX_FFT_LEN:
        return False
    return n_modes > 64 if u.numel() > LARGE_SIGNAL else seqlen <= 2 * n_modes**2
