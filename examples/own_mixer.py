"""Your own mixer in a language model: a moving average of each channel, built from hippos' operators."""

import math
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hippos import H3Config, H3ForCausalLM
from hippos.models import register_mixer
from hippos.ops import ssm_conv, ssm_step


class MovingAverage(nn.Module):
    """``x[t] = a x[t - 1] + (1 - a) u[t]`` with one ``a`` per channel, then a gated projection."""

    def __init__(self, d_model: int, *, longest: float = 1000.0) -> None:
        super().__init__()
        self.log_span = nn.Parameter(torch.linspace(0, math.log(longest), d_model))  # memory of each channel, in tokens
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def operators(self) -> tuple[Tensor, Tensor, Tensor]:
        """log_a, b and c of an SSM with one real mode: pairs (D, 1, 2). Modes count twice, hence the half."""
        log_a = -torch.exp(-self.log_span.float())  # recurrences stay float32 in a half-precision model
        pairs = [torch.stack((part, torch.zeros_like(part)), -1) for part in (log_a, -torch.expm1(log_a) / 2)]
        return pairs[0].unsqueeze(1), pairs[1].unsqueeze(1), torch.ones_like(pairs[0]).unsqueeze(1)

    def forward(self, u, *, initial_state=None, return_state=False, cu_seqlens=None, mask=None):
        """Map tokens (B, L, D) to tokens; states are (B, D, 1, 2)."""
        x = u if mask is None else u.masked_fill((mask == 0).unsqueeze(-1), 0)
        states = {"initial_state": initial_state, "return_state": return_state, "cu_seqlens": cu_seqlens}
        mixed = ssm_conv(x.transpose(1, 2), *self.operators(), **states)
        y, *state = mixed if return_state else (mixed,)
        out = F.glu(self.out_proj(y.transpose(1, 2)), dim=-1)
        return (out, *state) if return_state else out

    @torch.no_grad()
    def step(self, u: Tensor, state: Tensor) -> Tensor:
        """Map one token, (B, 1, D), and update the state in place."""
        return F.glu(self.out_proj(ssm_step(u.squeeze(1), state, *self.operators())), dim=-1).view_as(u)

    def init_state(self, batch: int) -> Tensor:
        """The state before the first token."""
        return torch.zeros(batch, len(self.log_span), 1, 2, device=self.log_span.device)


register_mixer("moving_average", MovingAverage, options=("longest",))

torch.manual_seed(0)
small = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "attn_layers": (2,)}
model = H3ForCausalLM(H3Config(**small, mixer="moving_average", mixer_options={"longest": 100.0})).eval()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder)

prompt = torch.randint(256, (2, 9))
generated = again.generate(prompt, max_new_tokens=5, do_sample=False)
whole = model(generated).logits[:, 8:-1].argmax(-1)  # predictions of a single forward pass
print("token by token and in one pass: the same", torch.equal(generated[:, 9:], whole))
