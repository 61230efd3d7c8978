"""The decoding step of many sequences for Hopper, in Gluon: states and keys come through a ring in shared memory.

What is on its way does not take registers then, so that more programs share a multiprocessor. Each warp has its own
channels, whose sums stay within it; keys are copied in whole rows, though, by whichever warp.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@gluon.jit
def _halves(pairs, CHANNELS: gl.constexpr, HALF: gl.constexpr):
    """Real and imaginary parts of (CHANNELS, 64) numbers that lie side by side."""
    re, im = gl.split(gl.reshape(pairs, (CHANNELS, 32, 2)))
    return gl.convert_layout(re, HALF, assert_trivial=True), gl.convert_layout(im, HALF, assert_trivial=True)


@gluon.jit(
    do_not_specialize=["batch", "taps_stride_c", "taps_stride_n"],
)
def h3_step_hopper_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, shift_ptr, diag_ptr, position_ptr,
    taps_ptr, a_ptr, b_ptr, read_ptr, d_ptr,
    token_stride_b, shift_stride_b, shift_stride_s, diag_stride_b, batch, d_model, taps_stride_c, taps_stride_n,
    CHANNELS: gl.constexpr, SEQUENCES: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """As `h3_step_kernel`, for 32 modes, 63 keys in a ring, and d_model a multiple of CHANNELS.

    A program owns CHANNELS channels of SEQUENCES sequences; STAGES - 1 of them are on their way. It may start while
    the kernel in front still runs, and reads states and parameters then already.
    """
    PAST: gl.constexpr = 63
    RUN: gl.constexpr = CHANNELS // WARPS  # channels of a warp
    STATE: gl.constexpr = gl.BlockedLayout([RUN // 2, 4], [2, 16], [WARPS, 1], [1, 0])
    HALF: gl.constexpr = gl.BlockedLayout([RUN // 2, 2], [2, 16], [WARPS, 1], [1, 0])
    # Two channels of eight slots a thread; where eight rows begin in eight different banks, nobody waits for another.
    KEYS: gl.constexpr = gl.BlockedLayout([1, 2], [64 // RUN, RUN // 2], [1, WARPS], [1, 0])
    CHUNKS: gl.constexpr = CHANNELS // 8  # of 16 bytes, of a slot's keys
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32 // CHUNKS, CHUNKS], [WARPS, 1], [1, 0])
    SWIZZLED: gl.constexpr = gl.SwizzledSharedLayout(8, 1, CHUNKS, [1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(1, STATE)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    gdc_launch_dependents()
    states = gl.allocate_shared_memory(gl.float32, [STAGES, CHANNELS, 64], SHARED)
    windows = gl.allocate_shared_memory(shift_ptr.dtype.element_ty, [STAGES, 64, CHANNELS], SWIZZLED)
    first_channel = gl.program_id(0) * CHANNELS
    first = gl.program_id(1) * SEQUENCES
    n_here = gl.minimum(batch - first, SEQUENCES)
    channels = first_channel + gl.arange(0, CHANNELS, layout=ROWS)
    slots = gl.arange(0, 64, layout=gl.SliceLayout(1, KEYS))
    wide = first_channel + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, KEYS))
    at = channels[:, None] * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, STATE))[None, :]
    diag_stride_b = diag_stride_b.to(gl.int64)
    state_ptrs = diag_ptr + first * diag_stride_b + at
    shift_ptr += first.to(gl.int64) * shift_stride_b
    # In the place behind the last slot the first one is read again, which has no tap there.
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
    across = first_channel + gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, COPY))
    window_ptrs = shift_ptr + (across[None, :] + gl.where(rows < PAST, rows, 0)[:, None] * shift_stride_s)
    for s in gl.static_range(STAGES - 1):
        if s < n_here:
            async_copy.async_copy_global_to_shared(states.index(s), state_ptrs + s * diag_stride_b)
            async_copy.async_copy_global_to_shared(windows.index(s), window_ptrs + s * shift_stride_b)
        async_copy.commit_group()
    position = gl.load(position_ptr)
    a_re, a_im = _halves(gl.load(a_ptr + at), CHANNELS, HALF)
    b_re, b_im = _halves(gl.load(b_ptr + at), CHANNELS, HALF)
    read = gl.load(read_ptr + at)
    d = gl.load(d_ptr + channels)
    newest_tap = gl.load(taps_ptr + channels * taps_stride_c + PAST * taps_stride_n)
    oldest = (position % PAST).to(gl.int32)  # its slot
    places = slots - oldest  # of a slot's key in time, oldest first
    places = gl.where(places < 0, places + PAST, places)
    tap_ptrs = taps_ptr + (wide[None, :] * taps_stride_c + places[:, None] * taps_stride_n)
    taps = gl.load(tap_ptrs, mask=(slots < PAST)[:, None], other=0.0)
    gdc_wait()
    token = first * token_stride_b + channels
    key, value, query = gl.load(k_ptr + token), gl.load(v_ptr + token), gl.load(q_ptr + token)
    for i in range(n_here):
        async_copy.wait_group(STAGES - 2)
        gl.thread_barrier()
        later = i + STAGES - 1
        if later < n_here:
            async_copy.async_copy_global_to_shared(states.index(later % STAGES), state_ptrs + later * diag_stride_b)
            async_copy.async_copy_global_to_shared(windows.index(later % STAGES), window_ptrs + later * shift_stride_b)
        async_copy.commit_group()
        following = token + gl.minimum(i + 1, n_here - 1) * token_stride_b
        next_key, next_value = gl.load(k_ptr + following), gl.load(v_ptr + following)
        next_query = gl.load(q_ptr + following)
        window = windows.index(i % STAGES).load(KEYS).to(gl.float32)
        shifted = gl.convert_layout(gl.sum(window * taps, 0), ROWS) + newest_tap * key.to(gl.float32)
        newest = shift_ptr + (i * shift_stride_b + oldest * shift_stride_s + channels)
        gl.store(newest, key.to(shift_ptr.dtype.element_ty))
        kv = shifted * value.to(gl.float32)
        x_re, x_im = _halves(states.index(i % STAGES).load(STATE), CHANNELS, HALF)
        drive = gl.convert_layout(kv, gl.SliceLayout(1, HALF), assert_trivial=True)[:, None]
        new_re = a_re * x_re - a_im * x_im + b_re * drive
        new_im = a_re * x_im + a_im * x_re + b_im * drive
        new = gl.reshape(gl.join(new_re, new_im), (CHANNELS, 64))
        new = gl.convert_layout(new, STATE, assert_trivial=True)
        gl.store(state_ptrs + i * diag_stride_b, new)
        y = query.to(gl.float32) * (gl.sum(new * read, 1) + d * kv)
        gl.store(y_ptr + ((first + i) * d_model + channels), y.to(y_ptr.dtype.element_ty))
        key, value, query = next_key, next_value, next_query
