"""The suite for a plain CPU: the convolution, the decode step over position, and generation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from hippos.bench.cases.decode_step import DecodeSize, draw_positions, prepare_decode_step
from hippos.bench.cases.generation import GenerationSize, draw_rates, prepare_generation
from hippos.bench.cases.ssm_conv import ConvSize, prepare_ssm_conv
from hippos.bench.harness import Case, Plan, Suite

TINY = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "state_size": 8}
# GPT-2's table of 1,024 positions ends with the prompt; it grows as far as the text does.
GPT2 = {"GPT-2 124M": ("gpt2", {"n_positions": 1088})}
HYBRID = {"H3 hybrid 125M": ("h3", {"preset": "125m"})}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
TINY_GPT2 = {"GPT-2 tiny": ("gpt2", {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, **NO_TOKENS})}

SSM_CONV = Case(
    name="ssm_conv",
    title="ssm_conv against the same convolution by torch.fft",
    sizes=(
        ConvSize(batch=16, seqlen=512),
        ConvSize(batch=8, seqlen=1024),
        ConvSize(batch=4, seqlen=2048),
        ConvSize(batch=2, seqlen=4096),
        ConvSize(batch=1, seqlen=8192),
    ),
    quick_sizes=(
        ConvSize(batch=2, seqlen=96, n_heads=8, n_modes=4),
        ConvSize(batch=1, seqlen=257, n_heads=8, n_modes=4),
    ),
    prepare=partial(prepare_ssm_conv, goals={512: 1.0, 1024: 1.0, 2048: 1.0, 4096: 1.0, 8192: 2.0}),
    axis="seqlen",
    plan=Plan(warmup=2, rounds=11),
)

DECODE_STEP = Case(
    name="decode_step",
    title="One decode step over position",
    sizes=(
        DecodeSize("pure H3 125M", {"preset": "125m", "attn_layers": ()}, (100, 10_000), is_flat=True),
        DecodeSize("H3 hybrid 125M", {"preset": "125m"}, (100, 2_500, 5_000, 10_000)),
    ),
    quick_sizes=(
        DecodeSize("pure H3 tiny", TINY, (4, 40), is_flat=True),
        DecodeSize("H3 hybrid tiny", {**TINY, "attn_layers": (1,)}, (4, 40)),
    ),
    prepare=prepare_decode_step,
    labels=("model",),
    draw=draw_positions,
    plan=Plan(warmup=5, rounds=41),
)

GENERATION = Case(
    name="generation",
    title="Writing behind a prompt: generate with an H3 hybrid and with GPT-2",
    sizes=(
        GenerationSize(1024, 64, {**GPT2, **HYBRID}, baseline="GPT-2 124M"),
        GenerationSize(1024, 64, {**GPT2, **HYBRID}, baseline="GPT-2 124M", dtype="bfloat16"),
    ),
    quick_sizes=(
        GenerationSize(16, 4, {**TINY_GPT2, "H3 hybrid tiny": ("h3", {**TINY, "attn_layers": (1,)})}, "GPT-2 tiny"),
    ),
    prepare=prepare_generation,
    labels=("prompt_len", "dtype"),
    draw=draw_rates,
    plan=Plan(warmup=1, rounds=7),
)

GENERATION_INT8 = Case(
    name="generation_int8",
    title="Writing behind a prompt: an H3 hybrid with int8 weights and GPT-2",
    sizes=tuple(replace(size, is_int8=True, tokens_at_least=2.0) for size in GENERATION.sizes),
    quick_sizes=tuple(replace(size, is_int8=True) for size in GENERATION.quick_sizes),
    prepare=prepare_generation,
    labels=("prompt_len", "dtype"),
    draw=draw_rates,
    plan=Plan(warmup=1, rounds=7),
)

# As many times as fast as GPT-2, whose attention compares each token with all before it: at 32,768 tokens that is most
# of the minutes that the case takes, so each model reads once.
LONG_PROMPTS = {8192: 1.5, 32768: 3.0}

LONG_PROMPT = Case(
    name="long_prompt",
    title="Reading a long prompt",
    sizes=tuple(
        GenerationSize(
            n_tokens,
            4,
            {"GPT-2 124M": ("gpt2", {"n_positions": n_tokens + 4}), **HYBRID},
            baseline="GPT-2 124M",
            prompt_at_least=at_least,
        )
        for n_tokens, at_least in LONG_PROMPTS.items()
    ),
    quick_sizes=tuple(replace(size, prompt_at_least=1.0) for size in GENERATION.quick_sizes),
    prepare=prepare_generation,
    labels=("prompt_len",),
    plan=Plan(warmup=0, rounds=1),
)

SUITE = Suite(
    name="cpu",
    title="Speed on the cores of a CPU",
    cases=(SSM_CONV, DECODE_STEP, GENERATION, GENERATION_INT8, LONG_PROMPT),
)
