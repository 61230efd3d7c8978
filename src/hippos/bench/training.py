"""The suite of training on a GPU: a step of the 125M hybrid beside GPT-2's, and how much of the GPU the 1.3B uses."""

from __future__ import annotations

from typing import Any

from hippos.bench.cases.training_step import StepSize, prepare_training_step
from hippos.bench.harness import Case, Plan, Suite

HYBRID, GPT2 = "H3 hybrid 125M", "GPT-2 124M"
FRUGAL = f"{HYBRID}, norms and GELUs made again"
LARGE = "H3 hybrid 1.3B"
PARTS_SEQLENS = (1024, 8192)
FRUGAL_SEQLENS = (8192,)
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Attention that never makes a mask: the same kernel in both models.
RIVAL = {**NO_DROPOUT, "attn_implementation": "sdpa_causal"}
TINY: dict[str, Any] = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_GPT2 = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
TINY_H3 = ("h3", {**TINY, "attn_layers": (1,), "state_size": 4})


def _size(seqlen: int, goal: float) -> StepSize:
    models: dict[str, tuple[str, dict[str, Any]]] = {
        HYBRID: ("h3", {"preset": "125m"}),
        GPT2: ("gpt2", {**RIVAL, "n_positions": seqlen}),
    }
    goals = {HYBRID: goal}
    if seqlen in FRUGAL_SEQLENS:
        models[FRUGAL], goals[FRUGAL] = models[HYBRID], goal
    return StepSize(
        seqlen,
        models,
        GPT2,
        goals=goals,
        compiled=(GPT2,),
        frugal=(FRUGAL,),
        has_parts=seqlen in PARTS_SEQLENS,
    )


TRAINING_STEP = Case(
    name="training_step",
    title="A training step of 32,768 tokens: the 125M hybrid by its own kernels and GPT-2 compiled, both captured",
    sizes=tuple(_size(seqlen, goal) for seqlen, goal in ((1024, 1.05), (2048, 1.15), (8192, 1.5), (32768, 2.4))),
    quick_sizes=(
        StepSize(
            32,
            {HYBRID: TINY_H3, FRUGAL: TINY_H3, GPT2: ("gpt2", {**TINY_GPT2, **RIVAL, "n_positions": 160})},
            GPT2,
            n_tokens=256,
            frugal=(FRUGAL,),
        ),
    ),
    prepare=prepare_training_step,
    labels=("seqlen",),
    plan=Plan(warmup=1, rounds=5),
)

UTILISATION = Case(
    name="training_utilisation",
    title="How much of the GPU a step of the 1.3B hybrid uses; norms and GELUs are made again, products are not",
    sizes=(StepSize(2048, {LARGE: ("h3", {"preset": "1.3b"})}, frugal=(LARGE,), has_parts=False),),
    quick_sizes=(
        StepSize(
            32,
            {"H3 hybrid tiny": TINY_H3},
            n_tokens=64,
            has_parts=False,
        ),
    ),
    prepare=prepare_training_step,
    labels=("seqlen",),
    plan=Plan(warmup=1, rounds=5),
)

SUITE = Suite(name="training", title="Speed of training on a GPU", cases=(TRAINING_STEP, UTILISATION), device="cuda")
