"""Read a sequence of any length in bounded memory: the state passes from chunk to chunk."""

import torch

from hippos import H3Config, H3ForCausalLM

torch.manual_seed(0)
config = H3Config(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, state_size=16)
model = H3ForCausalLM(config).eval()
text = torch.randint(256, (1, 4096))

cache = None
with torch.inference_mode():
    for chunk in text.split(512, dim=1):
        output = model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    at_once = model(input_ids=text, logits_to_keep=1).logits

print(f"logits after {text.shape[1]} tokens, in chunks of 512 and at once, differ by at most", end=" ")
print(f"{(output.logits - at_once).abs().max():.1e}")
