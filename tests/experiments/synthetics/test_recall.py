from __future__ import annotations

import pytest
import torch

from hippos.experiments.synthetics.recall import recall_weights
from hippos.layers import H3


@pytest.mark.parametrize("shift", ["learned", "none"])
def test_weights_are_what_values_add_to_outputs(shift, generator):
    torch.manual_seed(0)
    layer = H3(4, d_state=6, shift=shift).double()
    u = torch.randn(1, 7, 4, generator=generator, dtype=torch.float64)
    inner = {}
    layer.out_proj.register_forward_pre_hook(lambda module, inputs: inner.update(o=inputs[0]))

    def outputs(change: torch.Tensor) -> torch.Tensor:
        handle = layer.v_proj.register_forward_hook(lambda module, inputs, v: v + change)
        layer(u)
        handle.remove()
        return inner["o"][0]  # (L, D)

    jacobian = torch.autograd.functional.jacobian(outputs, torch.zeros(1, 7, 4, dtype=torch.float64))[:, :, 0]
    by_channel = torch.stack([jacobian[:, channel, :, channel] for channel in range(4)])  # (D, t, s)
    v = layer.v_proj(u)[0].T  # (D, s)
    expected = torch.einsum("dts,ds,ed->ets", by_channel, v, layer.out_proj.weight).norm(dim=0)
    torch.testing.assert_close(recall_weights(layer, u)[0], expected, rtol=1e-9, atol=1e-12)


def test_layers_without_such_weights_are_refused():
    with pytest.raises(ValueError, match="head_dim 1, got head_dim 2"):
        recall_weights(H3(4, head_dim=2), torch.zeros(1, 3, 4))
