"""Decode steps of the engine on a GPU with weights in half precision and in int8."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hippos.bench.cases.engine_models import (
    ModelFields,
    checked_error,
    engine_error,
    give_back_memory,
    language_model,
)
from hippos.bench.cases.engine_steps import STEP, replayed_step
from hippos.bench.cases.language_models import MAX_ERRORS
from hippos.bench.harness import Context, Finding, Goal, Method, Workload
from hippos.generate import quantise_int8

INT8 = "int8"


@dataclass(frozen=True)
class Int8StepSize:
    """One decode step by weights of two kinds.

    Args:
        model: Its name in tables.
        batch: Texts.
        position: Tokens read before.
        h3: Fields of `H3Config`.
        dtype: Dtype of the other model's weights.
        at_least: How many times as fast a step must be with int8 weights.
    """

    model: str
    batch: int
    position: int
    h3: ModelFields = field(hash=False)
    dtype: str = "bfloat16"
    at_least: float | None = None


def prepare_int8_step(size: Int8StepSize, context: Context) -> Workload:
    """Build a model, capture the engine's decode step, quantise a copy and capture that one's; then measure both.

    Without torchao, where it is needed, the first one alone is measured, and a note says so.

    Args:
        size: The model and the texts.
        context: Where it runs.

    Returns:
        The workload, with the bytes that each model's weights take of the device's memory.
    """
    give_back_memory()
    errors = {size.dtype: checked_error(size.h3, size.dtype, context)}
    model = language_model("h3", size.h3, size.dtype, context)
    methods: dict[str, Method] = {size.dtype: replayed_step(model, size.batch, size.position, context)}
    n_bytes = {size.dtype: _n_bytes(model)}
    notes = {"step": "replays of the engine's CUDA graph: embedding, layers, logits and greedy choice"}
    goals: tuple[Goal, ...] = ()
    if context.device.type == "cpu" or importlib.util.find_spec("torchao") is not None:
        before = _allocated(context)
        quantised = deepcopy(model)
        quantise_int8(quantised)
        give_back_memory()
        n_bytes[INT8] = _n_bytes(quantised) if before is None else (_allocated(context) or 0) - before
        errors[INT8] = engine_error(quantised, context, prompt_len=min(size.position, 64))
        methods[INT8] = replayed_step(quantised, size.batch, size.position, context)
        goals = _goals(size)
    else:
        notes[INT8] = "not measured: torchao is not installed"
    findings = [Finding(f"memory of the weights, {name}", n / 2**20, "MiB") for name, n in n_bytes.items()]
    return Workload(
        methods=methods,
        check=lambda: errors,
        max_error=2 * MAX_ERRORS[size.dtype],
        baseline=size.dtype,
        work_per_call={STEP: size.batch},
        goals=goals,
        findings=lambda samples: findings,
        notes=notes,
    )


def _goals(size: Int8StepSize) -> tuple[Goal, ...]:
    if size.at_least is None:
        return ()
    text = f"a step with int8 weights is at least {size.at_least:g} times as fast as in {size.dtype}"
    return (Goal(text, slow=(size.dtype, STEP), fast=(INT8, STEP), at_least=size.at_least),)


def _n_bytes(model: nn.Module) -> int:
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _allocated(context: Context) -> int | None:
    return torch.cuda.memory_allocated(context.device) if context.device.type == "cuda" else None
