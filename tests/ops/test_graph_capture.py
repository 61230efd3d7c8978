"""Capturing: what rests meanwhile."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch

from hippos.ops.graph_capture import capture_into, without_collecting


def test_garbage_waits_and_is_collected_again_whatever_happens_inside():
    assert gc.isenabled()
    with contextlib.suppress(ValueError), without_collecting():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off():
    gc.disable()
    try:
        with without_collecting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_no_garbage_is_collected_from_the_capture_s_beginning_to_its_end(monkeypatch):
    seen = []

    @contextlib.contextmanager
    def graph(captured, **options):
        seen.append((captured, options, gc.isenabled()))
        yield
        seen.append(gc.isenabled())

    monkeypatch.setattr(torch.cuda, "graph", graph)
    with capture_into("a graph", pool=3):
        seen.append(gc.isenabled())
    assert seen == [("a graph", {"pool": 3}, False), False, False]
    assert gc.isenabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_that_has_become_garbage_ends_no_capture():
    x = torch.zeros(8, device="cuda")
    old = torch.cuda.CUDAGraph()
    with capture_into(old):
        x.add_(1)
    graph = torch.cuda.CUDAGraph()
    with capture_into(graph):
        x.add_(1)
        circle = [old]
        circle.append(circle)
        del old, circle
        for _ in range(10_000):  # enough to start a collection, were it on
            trash: list = []
            trash.append(trash)
    graph.replay()
    assert x.tolist() == [1.0] * 8
