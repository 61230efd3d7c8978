"""Fixtures for the tests of the operators."""

from __future__ import annotations

import sys

import pytest

from tests.ops.ssm_cases import Draw


@pytest.fixture
def random() -> Draw:
    """Give random float64 tensors, the same for every run of a test."""
    return Draw()


@pytest.fixture
def chunk_len(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Set the chunk length, so that a short sequence has many chunks, and keep the FFT out; parametrise indirectly."""
    # The package attribute of this name is the operator, so the module is taken from where imports keep it.
    module = sys.modules["hippos.ops.ssm_conv.choice"]
    monkeypatch.setattr(module, "choose_chunk_len", lambda batch, seqlen, n_docs: request.param)
    monkeypatch.setattr(module, "takes_fft", lambda u, n_modes: False)
    return request.param
