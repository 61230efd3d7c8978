"""Exporting is told from compiling."""

from __future__ import annotations

import pytest
import torch

from hippos.ops.tracing import is_exporting


class Probe(torch.nn.Module):
    """Adds 1 while exporting and 2 otherwise."""

    def forward(self, x):
        return x + 1 if is_exporting() else x + 2


def test_neither_eager_nor_compiled_code_is_exported():
    x = torch.zeros(2)
    assert Probe()(x)[0] == 2
    assert torch.compile(Probe(), fullgraph=True, backend="eager")(x)[0] == 2


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_knows(strict):
    x = torch.zeros(2)
    assert torch.export.export(Probe(), (x,), strict=strict).module()(x)[0] == 1
