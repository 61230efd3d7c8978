"""Work replayed from CUDA graphs."""

import gc

import pytest
import torch

from hippos.bench.cases.replay import capture, copy_of_two


@pytest.mark.gpu
def test_a_replay_keeps_the_tensors_of_its_work_alive():
    target = torch.zeros(1 << 22, device="cuda")

    def made_here():
        source = torch.ones_like(target)
        return capture(lambda: target.copy_(source))

    replay = made_here()
    gc.collect()
    torch.cuda.empty_cache()
    capture(copy_of_two(target))  # returns what it can to the driver, then takes memory for itself
    torch.cuda.empty_cache()
    target.zero_()
    replay()
    torch.cuda.synchronize()
    assert bool((target == 1).all())
