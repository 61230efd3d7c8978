from __future__ import annotations

import pytest
import torch

from hippos.errors import CheckpointError, ConfigError
from hippos.generate.sampling import Sampler, Sampling

CPU = torch.device("cpu")


def draw(sampling: Sampling, logits: torch.Tensor, n_draws: int, *, n_tokens: int | None = None) -> list[int]:
    sampler = Sampler(sampling, n_tokens or logits.shape[1], device=CPU)
    return [sampler(logits) for _ in range(n_draws)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0 .greedy. or a positive number, got -0.1"),
        ({"temperature": float("nan")}, "got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "got 1.5"),
        ({"seed": -1}, "seed must be from 0"),
        ({"stop": ("a", "")}, "at least one character"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)


def test_temperature_zero_is_greedy():
    logits = torch.tensor([[0.0, 3.0, 2.9]])
    assert draw(Sampling(temperature=0), logits, 5) == [1] * 5


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    n_draws = 4000
    drawn = torch.tensor(draw(Sampling(temperature=0.5, seed=3), logits, n_draws))
    shares = torch.bincount(drawn, minlength=4) / n_draws
    expected = torch.softmax(logits[0] / 0.5, dim=0)
    assert (shares - expected).abs().max() < 4 * (0.25 / n_draws) ** 0.5


def test_top_k_and_top_p_cut():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.3, 0.1]]))
    assert set(draw(Sampling(temperature=1, top_k=2, seed=0), logits, 200)) == {1, 2}
    assert set(draw(Sampling(temperature=1, top_p=0.6, seed=0), logits, 200)) == {1, 2}
    assert set(draw(Sampling(temperature=1, top_p=0.4, seed=0), logits, 50)) == {1}
    assert set(draw(Sampling(temperature=1, seed=0), logits, 200)) == {0, 1, 2, 3}


def test_same_seed_same_draws_whatever_else_draws():
    logits = torch.zeros(1, 50)
    torch.manual_seed(1)
    first = draw(Sampling(seed=7), logits, 20)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert draw(Sampling(seed=7), logits, 20) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(Sampling(seed=8), logits, 20) != first


def test_without_a_seed_each_sampler_draws_its_own_and_tells_it():
    logits = torch.zeros(1, 1000)
    sampler = Sampler(Sampling(), 1000, device=CPU)
    drawn = [sampler(logits) for _ in range(10)]
    assert sampler.seed != Sampler(Sampling(), 1000, device=CPU).seed
    assert draw(Sampling(seed=sampler.seed), logits, 10) == drawn


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_the_tokenizer_lacks_are_never_chosen(temperature):
    logits = torch.tensor([[0.0, 0.0, 50.0]])
    assert set(draw(Sampling(temperature=temperature, seed=0), logits, 50, n_tokens=2)) <= {0, 1}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(bad):
    with pytest.raises(CheckpointError, match="not finite"):
        draw(Sampling(temperature=0), torch.tensor([[0.0, bad]]), 1)
