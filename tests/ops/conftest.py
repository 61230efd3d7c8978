"""Fixtures for the tests of the operators."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.ops.ssm_cases import Draw


@pytest.fixture(scope="session", autouse=True)
def _backward_passes_know_the_gpu() -> None:
    """Let autograd's thread use the GPU once: cuBLAS warns where it is the first, and a warning is an error here."""
    if torch.cuda.is_available():
        torch.ones(1, device="cuda", requires_grad=True).mul(2).sum().backward()


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
