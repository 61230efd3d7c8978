"""The end of packed documents, made without reading their offsets."""

from __future__ import annotations

from itertools import pairwise

import torch

from hippos.ops import ssm_conv
from hippos.ops.ssm_conv.autograd import ssm_conv_triton
from hippos.ops.ssm_conv.documents import finish_documents
from tests.ops.ssm_cases import PACKED, Draw, relative_error

CHUNK = 16


def _states(u, gate, modes, bounds, chunk=1):
    """The states after the last whole chunks of documents, from the definition."""
    states = []
    for left, right in pairwise(bounds):
        whole = left + (right - left) // chunk * chunk
        if whole == left:
            states.append(torch.zeros(1, *modes[0].shape, dtype=u.dtype))
        else:
            span = slice(left, whole)
            options = {"in_gate": gate[..., span], "return_state": True, "impl": "reference"}
            states.append(ssm_conv(u[..., span], *modes, **options)[1])
    return torch.cat(states)


def test_documents_end_where_the_definition_ends_them():
    random = Draw(dtype=torch.float32)
    u, gate = random.normal(1, 3, PACKED[-1]), random.normal(1, 3, PACKED[-1])
    modes = random.modes(3, 4)
    found = finish_documents(
        _states(u, gate, modes, PACKED, CHUNK), u, gate, modes[0], modes[1], torch.tensor(PACKED), CHUNK
    )
    assert relative_error(found, _states(u, gate, modes, PACKED)) < 1e-5


def test_a_mode_that_forgets_at_once_has_gradients():
    random = Draw(dtype=torch.float32)
    u = random.normal(1, 1, 20).requires_grad_()
    log_a, b, _ = (x.requires_grad_() for x in random.modes(1, 2))
    forgetful = torch.where(torch.tensor([True, False])[None, :, None], torch.tensor([-torch.inf, 0.0]), log_a)
    state = torch.zeros(2, 1, 2, 2)
    x = finish_documents(state, u, None, forgetful, b, torch.tensor([0, 16, 20]), CHUNK)
    x.square().sum().backward()
    assert torch.isfinite(x).all()
    assert all(torch.isfinite(tensor.grad).all() for tensor in (u, log_a, b))


def test_wrong_offsets_are_brought_into_range():
    random = Draw(dtype=torch.float32)
    u, modes = random.normal(1, 2, 20), random.modes(2, 3)
    for offsets in ([-7, 30], [2**31 - 1, -(2**31)], [15, 3]):
        x = finish_documents(torch.zeros(1, 2, 3, 2), u, None, modes[0], modes[1], torch.tensor(offsets), CHUNK)
        assert x.shape == (1, 2, 3, 2)


def test_packed_documents_compile_without_reading_their_offsets():
    # Without a GPU the kernels' operator runs the definition, so the code around it compiles here as it does there.
    random = Draw(dtype=torch.float32)
    u, gate = random.normal(1, 2, 40), random.normal(1, 2, 40)
    log_a, b, c = (x.requires_grad_() for x in random.modes(2, 3))
    cu_seqlens = torch.tensor([0, 7, 7, 40])

    def call(log_a, b, c):
        return ssm_conv_triton(u, log_a, b, c, None, gate, None, None, cu_seqlens, True)

    y, state = torch.compile(call, fullgraph=True, backend="aot_eager")(log_a, b, c)
    found = torch.autograd.grad(y.sum() + state.square().sum(), (log_a, b, c))
    wanted_y, wanted_state = ssm_conv(
        u, log_a, b, c, in_gate=gate, cu_seqlens=cu_seqlens, return_state=True, impl="reference"
    )
    wanted = torch.autograd.grad(wanted_y.sum() + wanted_state.square().sum(), (log_a, b, c))
    pairs = zip((y, state, *found), (wanted_y, wanted_state, *wanted), strict=True)
    assert all(relative_error(one, other) < 1e-5 for one, other in pairs)
