from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hippos.data.synthetic import IGNORED, AssociativeRecall
from hippos.experiments.synthetics import MIXERS, ModelSize
from hippos.experiments.synthetics.models import model_config
from hippos.experiments.synthetics.stack import ModelStack

TASK = AssociativeRecall(vocab_size=10, input_seqlen=6)
SIZE = ModelSize(d_model=8, d_state=4, embedding_dropout=0.0, attention_dropout=0.0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_stacked_models_compute_what_each_computes_alone(mixer, generator):
    stack = ModelStack(model_config(mixer, TASK, SIZE), (0, 1), torch.device("cpu"))
    ids = torch.randint(TASK.vocab_size, (2, 3, TASK.seqlen), generator=generator)
    targets = torch.randint(TASK.vocab_size, (2, 3, TASK.seqlen), generator=generator)
    weights = torch.tensor([0.5, 0.5, 0.0])
    stack.train(True)
    losses = stack.losses(ids, targets, weights)
    losses.sum().backward()
    for seed in range(2):
        model = stack.one(seed).train()
        logits = model(input_ids=ids[seed, :2]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets[seed, :2].flatten())
        loss.backward()
        torch.testing.assert_close(losses[seed], loss, rtol=1e-5, atol=1e-6)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(stack.parameters[name].grad[seed], parameter.grad, rtol=1e-3, atol=1e-6)


def test_seeds_differ_and_are_reproducible():
    config = model_config("h3", TASK, SIZE)
    state = torch.get_rng_state()
    one, two = (ModelStack(config, seeds, torch.device("cpu")).parameters for seeds in ((0, 1), (1, 0)))
    assert torch.equal(torch.get_rng_state(), state)
    weight = "model.layers.0.mixer.q_proj.weight"
    assert torch.equal(one[weight], two[weight].flip(0))
    assert not torch.equal(one[weight][0], one[weight][1])


def test_accuracy_counts_what_is_scored():
    stack = ModelStack(model_config("attention", TASK, SIZE), (0, 1), torch.device("cpu"))
    ids = torch.zeros(4, TASK.seqlen, dtype=torch.int64)
    answers = torch.stack([stack.one(seed)(input_ids=ids[:1]).logits[0, -1].argmax() for seed in range(2)])
    targets = torch.full_like(ids, IGNORED)
    targets[:, -1] = answers[0]
    targets[3, -1] = (answers[0] + 1) % TASK.vocab_size
    expected = [0.75, 0.75 if answers[1] == answers[0] else float((targets[:, -1] == answers[1]).float().mean())]
    assert stack.accuracies(ids, targets).tolist() == expected


def test_dynamics_are_those_of_the_ssms():
    stack = ModelStack(model_config("h3", TASK, SIZE), (0,), torch.device("cpu"))
    ends = {name.split("mixer.")[1] for name in stack.dynamics()}
    assert ends == {"diag.log_dt", "diag.A_real", "diag.A_imag", "diag.B", "shift.B"}
