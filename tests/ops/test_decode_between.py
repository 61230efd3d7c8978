"""The program of all that lies between two mixings: on a CPU by `tma_on_cpu`, its programs in threads, or on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hippos.errors import UnsupportedError
from hippos.ops import decode
from hippos.ops.decode import N_COUNTS, Between, between_mixings, takes_between
from hippos.ops.decode.launch_between import fits_between
from hippos.ops.decode.turns import may_share_with_processes
from tests.ops.tma_on_cpu import Descriptor, run_meeting_programs

MODULE = Path(decode.__file__).parent / "kernels_between.py"
EPS, NEXT_EPS = 1e-5, 1e-3
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def draw_maps(generator, d_model, d_ff, count, *, device="cpu", dtype=torch.float32):
    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    def draw_map(n_rows, n_inputs):
        return draw(n_rows, n_inputs, scale=n_inputs**-0.5), draw(n_rows)

    n_rows = 3 * d_model // max(count, 1)
    into = [draw_map(n_rows, d_model) for _ in range(count)]
    return Between(
        draw_map(d_model, d_model), (draw(d_model), draw(d_model), EPS),
        draw_map(d_ff, d_model), draw_map(d_model, d_ff),
        (draw(d_model), draw(d_model), NEXT_EPS), [weight for weight, _ in into], [bias for _, bias in into],
    )  # fmt: skip


def run(mixed, x, maps, *, block_k, w_tiles, x_tiles, n_asked=0, ask=lambda *_: None):
    """The kernel's output, or the parts that it leaves behind the last layer; counts for the next are set to zero."""
    (batch, d_model), d_ff, count = x.shape, maps.fc1[0].shape[0], len(maps.weights_in)
    splits = d_ff // d_model
    weights = list(maps.weights_in) or [maps.fc1[0]]
    d_in = weights[0].shape[0]
    descriptors = [Descriptor(weight) for weight in weights] * (3 if len(weights) == 1 else 1)
    bias = torch.cat(maps.biases_in) if count else maps.fc1[1]
    y, parts = torch.full((batch, len(weights) * d_in), torch.nan), torch.full((2, splits, batch, d_model), torch.nan)
    u, inner = torch.full_like(x, torch.nan), torch.full((batch, d_ff), torch.nan)
    next_counts = torch.full((N_COUNTS,), 77, dtype=torch.int32)
    run_meeting_programs(
        MODULE, "between_kernel", d_ff // 64,
        Descriptor(mixed), Descriptor(u), Descriptor(inner), x, u, inner, y, parts,
        torch.zeros(N_COUNTS, dtype=torch.int32), next_counts,
        Descriptor(maps.out[0]), Descriptor(maps.fc1[0]), Descriptor(maps.fc2[0]), *descriptors,
        maps.out[1], maps.fc1[1], maps.fc2[1], bias, d_in, 2 * d_in,
        *maps.norm[:2], *maps.next_norm[:2], EPS, NEXT_EPS, batch, maps.fc1[0], n_asked,
        D=d_model, D_FF=d_ff, D_IN=d_in, COUNT=count, SPLITS=splits, BLOCK_N=64, BLOCK_K=block_k,
        W_TILES=w_tiles, X_TILES=x_tiles, ask=ask,
    )  # fmt: skip
    assert not next_counts.any()
    return y if count else parts[1].sum(0)


@pytest.mark.parametrize(("batch", "count"), [(5, 3), (16, 1), (2, 0)])
@pytest.mark.parametrize(
    "tiles",
    [
        {"block_k": 64, "w_tiles": 3, "x_tiles": 4},
        {"block_k": 64, "w_tiles": 8, "x_tiles": 2},
        {"block_k": 32, "w_tiles": 7, "x_tiles": 3},
    ],
)
def test_a_stretch_of_products(generator, batch, count, tiles):
    d_model, d_ff = 256, 1024
    maps = draw_maps(generator, d_model, d_ff, count)
    mixed, x = (torch.randn(batch, d_model, generator=generator) for _ in range(2))
    wanted_x = x.clone()
    wanted = between_mixings(mixed, wanted_x, maps, *NO_COUNTS, impl="reference")
    got = run(mixed, x, maps, **tiles)
    torch.testing.assert_close(x, wanted_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, wanted if count else wanted.sum(0), rtol=1e-4, atol=1e-4)


def test_what_the_cache_is_asked_for(generator):
    """The tiles of the MLP's first product that shared memory has no room for, once each."""
    d_model, d_ff, batch = 256, 1024, 5
    maps = draw_maps(generator, d_model, d_ff, 3, dtype=torch.float16)
    mixed, x = (torch.randn(batch, d_model, generator=generator).half() for _ in range(2))
    weight = maps.fc1[0]
    times = torch.zeros(d_ff, d_model, dtype=torch.int32)

    def ask(pointers, n_bytes):
        assert pointers.memory.data_ptr() == weight.data_ptr()
        for place, n in zip(pointers.at.tolist(), n_bytes.tensor.tolist(), strict=True):
            assert n % 16 == 0
            times.view(-1)[place : place + n // 2] += 1

    run(mixed, x, maps, block_k=64, w_tiles=2, x_tiles=2, n_asked=2, ask=ask)
    assert not times[:, :128].any()
    assert bool((times[:, 128:] == 1).all())


NO_COUNTS = (torch.zeros(N_COUNTS, dtype=torch.int32),) * 2


def test_the_definition_is_that_of_the_layers(generator):
    maps = draw_maps(generator, 64, 128, 3, dtype=torch.float64)
    mixed, x = (torch.randn(3, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    stream = x + torch.nn.functional.linear(mixed, *maps.out)
    inner = torch.nn.functional.linear(torch.nn.functional.layer_norm(stream, (64,), *maps.norm), *maps.fc1)
    stream = stream + torch.nn.functional.linear(torch.nn.functional.gelu(inner, approximate="tanh"), *maps.fc2)
    u = torch.nn.functional.layer_norm(stream, (64,), *maps.next_norm)
    wanted = torch.nn.functional.linear(u, torch.cat(list(maps.weights_in)), torch.cat(list(maps.biases_in)))
    got = between_mixings(mixed, x, maps, *NO_COUNTS, impl="reference")
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x, stream, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("d_model", "d_ff", "n_in", "fits"),
    [
        (2048, 8192, 6144, True),
        (2048, 8192, 0, True),
        (2048, 8192, 8256, False),
        (2048, 6144, 6144, False),
        (768, 3072, 2304, False),
        (128, 512, 384, False),
        (64, 256, 192, False),
    ],
)
def test_sizes_that_it_is_cut_for(d_model, d_ff, n_in, fits):
    assert fits_between(d_model, d_ff, n_in) == fits


def test_other_processes_are_expected_where_mps_is(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "none"))
    assert not may_share_with_processes()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert may_share_with_processes()


def test_refusal(generator):
    maps = draw_maps(generator, 64, 128, 3)
    x = torch.zeros(2, 64)
    assert not takes_between(x, 128, 192)
    with pytest.raises(UnsupportedError, match="inner width of 128 and 192 rows"):
        between_mixings(x, x, maps, *NO_COUNTS)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "count"), [(2, 3), (17, 1), (64, 3), (33, 0)])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=["float16", "bfloat16"])
def test_on_a_gpu(generator, batch, count, dtype):
    maps = draw_maps(generator, 2048, 8192, count, device="cuda", dtype=dtype)
    mixed, x = (torch.randn(batch, 2048, generator=generator).to("cuda", dtype) for _ in range(2))
    exact_x = x.double()
    exact = between_mixings(mixed.double(), exact_x, as_float64(maps), *NO_COUNTS, impl="reference")
    counts = torch.zeros(2, N_COUNTS, dtype=torch.int32, device="cuda")
    results = []
    for i in range(3):  # counts are used again
        stream = x.clone()
        results.append((between_mixings(mixed, stream, maps, counts[i % 2], counts[(i + 1) % 2]), stream))
    got, stream = results[0]
    if count:
        assert got.dtype == dtype
        assert distance(stream, exact_x) < TOLERANCES[dtype]
        assert distance(got, exact) < TOLERANCES[dtype]
    else:
        assert got.dtype == torch.float32
        assert distance(got.sum(0), exact.sum(0)) < TOLERANCES[dtype]
    assert all(torch.equal(again, got) and torch.equal(after, stream) for again, after in results[1:])


@pytest.mark.gpu
def test_two_streams_of_them_end(generator):
    """Programs of both could each have a part of the multiprocessors, and wait for the rest of their own for ever."""
    maps = draw_maps(generator, 2048, 8192, 3, device="cuda", dtype=torch.bfloat16)
    mixed, x = (torch.randn(64, 2048, generator=generator).to("cuda", torch.bfloat16) for _ in range(2))
    counts = torch.zeros(2, 2, N_COUNTS, dtype=torch.int32, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = [[], []]
    for i in range(200):
        for stream, own, kept in zip(streams, counts, results, strict=True):
            with torch.cuda.stream(stream):
                kept[:] = [between_mixings(mixed, x.clone(), maps, own[i % 2], own[(i + 1) % 2])]
    torch.cuda.synchronize()
    assert torch.equal(results[0][0], results[1][0])


def as_float64(maps):
    """The same maps, computed with as exactly as can be."""
    return Between(*(tuple(x.double() if isinstance(x, torch.Tensor) else x for x in part) for part in maps))


def distance(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
