"""The H3 layer in your own model, and its three forms: a whole sequence, chunks of it, one token at a time."""

import torch
from torch import Tensor, nn

from hippos.layers import H3


class Block(nn.Module):
    """A Transformer's residual block with H3 in place of attention."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm1, self.mixer = nn.LayerNorm(d_model), H3(d_model, d_state=16)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, L, D) to tokens (B, L, D); any length, causal, no position embedding."""
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


tokens = torch.randn(2, 300, 32)
print("output of the block:", tuple(Block(d_model=32)(tokens).shape))

layer = H3(d_model=32, d_state=16).eval()
with torch.no_grad():
    whole = layer(tokens)

    first, state = layer(tokens[:, :123], return_state=True)
    second = layer(tokens[:, 123:], initial_state=state)
    in_pieces = torch.cat([first, second], dim=1)

    state = layer.init_state(batch=2)
    one_by_one = torch.stack([layer.step(token, state) for token in tokens.unbind(dim=1)], dim=1)

print(f"in pieces:  largest difference {(in_pieces - whole).abs().max():.1e}")
print(f"one by one: largest difference {(one_by_one - whole).abs().max():.1e}")
