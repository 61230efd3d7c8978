"""What a reader waits for first: one prompt read, and the first token of the answer on the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hippos.bench.cases.engine_models import ModelFields, checked_error, give_back_memory, language_model
from hippos.bench.cases.language_models import MAX_ERRORS
from hippos.bench.harness import Clock, Context, Method, Workload, timed
from hippos.generate import Generator, Sampling

ENGINE, KERNELS, RIVAL = "H3, engine", "H3, kernels of the prompt alone", "GPT-2, one call of the model"
FIRST = "prompt to first token"


@dataclass(frozen=True)
class FirstTokenSize:
    """One prompt.

    Args:
        prompt_len: Its tokens.
        h3: Fields of `H3Config`.
        gpt2: Fields of ``GPT2Config``, of the same size.
        dtype: Dtype of the weights.
    """

    prompt_len: int
    h3: ModelFields = field(hash=False)
    gpt2: ModelFields = field(hash=False)
    dtype: str = "bfloat16"


def prepare_first_token(size: FirstTokenSize, context: Context) -> Workload:
    """Build the models with random weights, and read random prompts of one length until their graph is there.

    Args:
        size: The prompt.
        context: Where it runs.

    Returns:
        The workload: the engine from token ids to a token on the host, the kernels that it launches for the prompt, and
        one call of the other model with the choice of its token.
    """
    give_back_memory()
    error = checked_error(size.h3, size.dtype, context, prompt_len=size.prompt_len)
    h3 = language_model("h3", size.h3, size.dtype, context)
    prompt = torch.randint(
        h3.config.vocab_size, (1, size.prompt_len), generator=context.generator(), device=context.device
    )
    writer = Generator(h3, context=size.prompt_len + 1)
    sampling = Sampling(max_new_tokens=1, temperature=0)

    def write() -> None:
        next(writer.stream(prompt, sampling, eos_token_id=()))

    for _ in range(2):
        write()
    methods: dict[str, Method] = {ENGINE: timed(write, measure=FIRST)}
    if writer.cuda_graph:
        methods[KERNELS] = _replayed(writer)
    rival = language_model("gpt2", size.gpt2, size.dtype, context)
    methods[RIVAL] = timed(lambda: _first_token(rival, prompt), measure=FIRST)
    return Workload(
        methods=methods,
        check=lambda: {ENGINE: error},
        max_error=2 * MAX_ERRORS[size.dtype],
        baseline=RIVAL,
        notes={"settings": "one prompt, greedy, random weights; the length has come before, and its graph is captured"},
    )


def _replayed(writer: Generator, calls: int = 5) -> Method:
    (graph,) = (graph._graph for graph in writer._prompts._graphs.values())  # type: ignore[union-attr]

    def sample(clock: Clock) -> dict[str, float]:
        start = clock.start()
        for _ in range(calls):
            graph.replay()
        return {FIRST: clock.seconds(start, clock.mark()) / calls}

    return sample


@torch.no_grad()
def _first_token(model: Any, prompt: Tensor) -> int:
    return int(model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
