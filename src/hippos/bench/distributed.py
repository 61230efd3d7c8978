"""The suite of training on two GPUs: DDP, FSDP2, and sequences that the GPUs share."""

from __future__ import annotations

from typing import Any

from hippos.bench.cases.scaling import ScalingSize, prepare_scaling
from hippos.bench.harness import Case, Plan, Suite

TINY: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
ROUNDS = Plan(warmup=0, rounds=8)  # the processes warm up by themselves
QUICK = Plan(warmup=0, rounds=2)


def _case(name: str, title: str, size: ScalingSize, quick: ScalingSize) -> Case[ScalingSize]:
    return Case(
        name=name,
        title=title,
        sizes=(size,),
        quick_sizes=(quick,),
        prepare=prepare_scaling,
        labels=("parallel", "seqlen"),
        plan=ROUNDS,
        quick_plan=QUICK,
    )


def _quick(parallel: Any, bound: float, **changes: Any) -> ScalingSize:
    return ScalingSize(parallel, TINY, seqlen=64, batch=1, bound=bound, is_compiled=False, steps=1, **changes)


SUITE = Suite(
    name="distributed",
    title="Speed of training on two GPUs",
    cases=(
        _case(
            "ddp_scaling",
            "DDP of the 125M hybrid, 32,768 tokens a GPU and step",
            ScalingSize(
                "ddp",
                {"preset": "125m"},
                seqlen=2048,
                batch=16,
                bound=1.9,
                is_compiled=False,  # its own kernels, as in `hippos train`
                is_captured=True,
                steps=16,
            ),
            _quick("ddp", 1.9),
        ),
        _case(
            "fsdp_scaling",
            "FSDP2 of the 1.3B hybrid, 32,768 tokens a GPU and step",
            ScalingSize(
                "fsdp",
                {"preset": "1.3b"},
                seqlen=2048,
                batch=16,
                bound=1.8,
                is_compiled=False,  # its own kernels, as in `hippos train`
                alternates=False,  # two such models do not fit a GPU
                steps=2,
            ),
            _quick("fsdp", 1.8, alternates=False),
        ),
        _case(
            "context_scaling",
            "Pure H3 125M: 1,048,576 tokens on two GPUs beside 524,288 on one",
            ScalingSize(
                "context",
                {"preset": "125m", "attn_layers": ()},
                seqlen=524_288,
                batch=1,
                bound=1.1,
                is_compiled=False,
                checkpoints_activations=True,
                steps=1,
            ),
            _quick("context", 1.1, checkpoints_activations=True),
        ),
    ),
    device="cuda",
)
