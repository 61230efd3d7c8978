"""What the Hopper programs share, written in Gluon, where layouts and shared memory are explicit.

A tile has 64 rows of 64 samples: of 64 / RUN pieces, RUN consecutive chunks each; a channel has 32 modes. The rows of
every product are shared out over four warps, its columns, with eight warps, over two warp groups. Of a chunk's place in
its run, one bit chooses between two registers of a thread, three between lanes of a warp, two between warps, in this
order: short runs pass their states from chunk to chunk without shared memory.
"""

# mypy: ignore-errors
# ruff: noqa: RET505  (Gluon types the returns of a function together unless an else keeps them apart)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.constexpr_function
def mma_layout(num_warps):
    """Of a product, (64, 64)."""
    return gl.NVMMADistributedLayout([3, 0], [4, num_warps // 4], [16, 256 // num_warps, 16])


@gluon.constexpr_function
def rows_layout(num_warps):
    """Of a tile, (64, 64), in 16-byte words of memory."""
    return gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def half_layout(num_warps):
    """Of half of a tile's rows, (4, 8, 32): warp, lane and mode, as they lie in the registers of a product."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 4], [0, 0, 8], [0, 0, 16]][: 3 if num_warps == 4 else 2],
        lane_bases=[[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[1, 0, 0], [2, 0, 0], [0, 0, 16]][: 2 if num_warps == 4 else 3],
        block_bases=[],
        shape=[4, 8, 32],
    )


@gluon.jit
def half_warp():
    """The warp of each thread's rows, (4, 1, 1)."""
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, half_layout(gl.num_warps())))
    return gl.arange(0, 4, layout=layout)[:, None, None]


@gluon.jit
def half_lane():
    """Which of eight rows of its warp each thread has, (1, 8, 1)."""
    layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, half_layout(gl.num_warps())))
    return gl.arange(0, 8, layout=layout)[None, :, None]


@gluon.jit
def half_mode():
    """The modes, (32,)."""
    return gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, half_layout(gl.num_warps()))))


@gluon.jit
def halves(tile):
    """Real and imaginary parts of a tile of states, (64, 64): rows of even steps, rows of odd steps."""
    layout: gl.constexpr = half_layout(gl.num_warps())
    re, im = gl.split(gl.reshape(tile, (4, 2, 8, 32, 2)))
    even_re, odd_re = gl.split(gl.permute(re, (0, 2, 3, 1)))
    even_im, odd_im = gl.split(gl.permute(im, (0, 2, 3, 1)))
    return (
        gl.convert_layout(even_re, layout, assert_trivial=True),
        gl.convert_layout(even_im, layout, assert_trivial=True),
        gl.convert_layout(odd_re, layout, assert_trivial=True),
        gl.convert_layout(odd_im, layout, assert_trivial=True),
    )


@gluon.jit
def whole(even_re, even_im, odd_re, odd_im):
    """Undo `halves`."""
    re = gl.permute(gl.join(even_re, odd_re), (0, 3, 1, 2))
    im = gl.permute(gl.join(even_im, odd_im), (0, 3, 1, 2))
    tile = gl.reshape(gl.join(re, im), (64, 64))
    return gl.convert_layout(tile, mma_layout(gl.num_warps()), assert_trivial=True)


@gluon.jit
def row_piece(row, RUN: gl.constexpr):
    """The piece in the tile that a row belongs to."""
    if RUN == 4:
        return (row >> 4) * 4 + (row & 3)
    elif RUN == 8:
        return (row >> 4) * 2 + (row & 1)
    else:
        return row // RUN


@gluon.jit
def row_step(row, RUN: gl.constexpr):
    """The place of a row's chunk among the RUN chunks of its piece: its bits are 3, 2, 1, 0, 4, 5 of the row."""
    step = ((row >> 3) & 1) + ((row >> 2) & 1) * 2
    if RUN >= 8:
        step += ((row >> 1) & 1) * 4
    if RUN >= 16:
        step += (row & 1) * 8 + (row % RUN) // 16 * 16
    return step


@gluon.jit
def half_piece(RUN: gl.constexpr):
    """The piece in the tile of each thread's rows, (4, 8, 1)."""
    return row_piece(half_warp() * 16 + half_lane(), RUN)
