"""Train a small hybrid (four layers, one of them attention) to memorise a sentence, then generate from it."""

import torch

from hippos import H3Config, H3ForCausalLM
from hippos.layers import param_groups

torch.manual_seed(0)
config = H3Config(vocab_size=256, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, attn_layers=(2,))
model = H3ForCausalLM(config)

sentence = b"A hippo sleeps in the river by day, and walks ashore by night to graze. "
tokens = torch.tensor([list(sentence)])

# SSM parameters get their own learning rate and no weight decay; param_groups selects them.
optimiser = torch.optim.AdamW(param_groups(model, lr=5e-3, weight_decay=0.1))
for _ in range(60):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()
print(f"loss {loss.item():.3f} nats per byte")

model.eval()
prompt = torch.tensor([list(b"A hippo")])
output = model.generate(prompt, max_new_tokens=60, do_sample=False)
print(bytes(output[0].tolist()).decode())
