"""How the engine chooses tokens, and what it says of them."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from hippos.generate import Sampling, generate
from hippos.generate.sampling import Sampler
from tests.generate.small_models import N_NEW, written_by_transformers


def test_log_probabilities_are_the_models_own(make_model, ids):
    model, prompt = make_model(attn_layers=(1,)), ids(2, 6)
    got = generate(model, prompt, max_new_tokens=N_NEW, temperature=2.0, top_k=5, seed=1, log_probs=True)
    logits = model(got.sequences).logits[:, 5:-1].float()
    expected = logits.log_softmax(-1).gather(2, got.tokens.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(got.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert generate(model, prompt, max_new_tokens=2).log_probs is None


def test_repetition_penalty_is_that_of_transformers(make_model, ids):
    model, prompts = make_model(attn_layers=(1,)), [ids(7), ids(7)]
    for penalty in (1.3, 0.7, 5.0):
        expected = written_by_transformers(model, prompts, repetition_penalty=penalty, max_new_tokens=25)
        got = generate(model, prompts, repetition_penalty=penalty, max_new_tokens=25)
        assert torch.equal(got.tokens, expected)
    ragged = [ids(7), ids(3)]
    alone = [generate(model, [prompt], repetition_penalty=5.0, max_new_tokens=25).tokens[0] for prompt in ragged]
    together = generate(model, ragged, repetition_penalty=5.0, max_new_tokens=25).tokens
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(generator, min_p):
    logits = torch.randn(1, 40, generator=generator) * 2
    kept = LogitsProcessorList([MinPLogitsWarper(min_p)])(None, logits.clone()).isfinite()[0]
    sampler = Sampler(Sampling(temperature=1, min_p=min_p, seed=0), 40, device=torch.device("cpu"))
    drawn = {sampler(logits) for _ in range(3000)}
    assert drawn <= set(kept.nonzero().flatten().tolist())
    if min_p >= 0.05:
        assert drawn == set(kept.nonzero().flatten().tolist())


def test_penalty_alone_in_the_sampler(generator):
    logits, text = torch.randn(2, 30, generator=generator), torch.tensor([[1, 4, 4], [2, 3, 5]])
    seen = torch.zeros(2, 30, dtype=torch.bool).scatter_(1, text, True)
    expected = RepetitionPenaltyLogitsProcessor(3.0)(text, logits.clone()).argmax(-1)
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=3.0), 30, device=torch.device("cpu"), batch=2)
    assert torch.equal(sampler.choose(logits, seen), expected)


def test_same_seed_same_text_in_any_company(make_model, ids):
    model = make_model(attn_layers=(1,))
    prompts = [ids(n) for n in (5, 9, 2)]
    options = {"temperature": 1.5, "top_p": 0.9, "max_new_tokens": 20}
    together = generate(model, prompts, seed=11, **options)
    assert torch.equal(generate(model, prompts, seed=together.seed, **options).tokens, together.tokens)
    alone = generate(model, prompts[1:2], seed=11, rows=[1], **options)
    assert torch.equal(alone.tokens[0], together.tokens[1])
    assert not torch.equal(generate(model, prompts, seed=12, **options).tokens, together.tokens)
    free = generate(model, prompts, **options)
    assert torch.equal(generate(model, prompts, seed=free.seed, **options).tokens, free.tokens)


def test_draws_are_not_repeated_after_many_steps(make_model, ids):
    """Random numbers are made 256 steps ahead."""
    sampler = Sampler(Sampling(temperature=1, seed=5), 1000, device=torch.device("cpu"))
    logits = torch.zeros(1, 1000)
    drawn = [sampler(logits) for _ in range(600)]
    assert drawn[:200] != drawn[256:456]
    assert len(set(drawn)) > 400


def test_rows_beyond_the_vocabulary_are_never_written(make_model, ids):
    model = make_model(vocab_size=20, padded_vocab_size=64)
    with torch.no_grad():
        model.lm_head.weight[20:] *= 100
    prompt = ids(4, 4) % 20
    assert generate(model, prompt, max_new_tokens=40, temperature=9.0, seed=0).tokens.max() < 20
    assert generate(model, prompt, max_new_tokens=10).tokens.max() < 20
