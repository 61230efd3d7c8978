"""The suite of text generation on a GPU: the engine with a hybrid of 1.3B against Transformers' GPT-2 of that size."""

from __future__ import annotations

from typing import Any

from hippos.bench.cases.engine import DEFAULT, ENGINE, STATIC, EngineSize, draw_rates, prepare_engine
from hippos.bench.cases.engine_first_token import FirstTokenSize, prepare_first_token
from hippos.bench.cases.engine_steps import RoomSize, StepSize, prepare_room, prepare_step
from hippos.bench.cases.int8_steps import Int8StepSize, prepare_int8_step
from hippos.bench.harness import Case, Plan, Suite

H3 = {"preset": "1.3b"}
PURE = {"preset": "1.3b", "attn_layers": ()}
# GPT-2's table of positions must reach the last token; heads of 128 as in the hybrid.
GPT2 = {"n_embd": 2048, "n_layer": 24, "n_head": 16, "n_positions": 33024}
TINY = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "state_size": 8}
TINY_GPT2 = {
    "vocab_size": 256,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
QUICK: dict[str, Any] = {
    "h3": {**TINY, "attn_layers": (1,)},
    "gpt2": TINY_GPT2,
    "new_tokens": 4,
    "methods": (ENGINE, DEFAULT),
}
# tokens/s wanted, and times the tokens/s of GPT-2 with static cache and compiled, and with its default cache
WANTED = {512: (17000, 2.0, 20.0), 1024: (13000, 2.3, 20.0), 1536: (10500, 2.6, 20.0)}
SHORTEST = min(WANTED)
PART = 24  # of 128 tokens: GPT-2's default cache takes 73 ms a token for one text and for 64
# Rivals take up to a minute: every method has run before (prepare_engine), and few rounds are kept.
ONCE = Plan(warmup=0, rounds=1)

PROMPTS = Case(
    name="generate_prompts",
    title="128 tokens behind 64 prompts, prefill included",
    sizes=tuple(
        EngineSize(n, 64, H3, GPT2, methods=(ENGINE, STATIC), at_least={STATIC: ratio}, tokens_per_s=rate)
        for n, (rate, ratio, _) in WANTED.items()
    ),
    quick_sizes=(EngineSize(16, 2, **QUICK),),
    prepare=prepare_engine,
    axis="prompt_len",
    labels=("prompt_len",),
    draw=draw_rates,
    plan=Plan(warmup=0, rounds=3),
)

STEPS = Case(
    name="decode_step_gpu",
    title="One decode step of the engine",
    sizes=(
        StepSize("hybrid 1.3B", 64, (1536,), H3, at_most_ms=2.6),
        StepSize("hybrid 1.3B", 1, (1536,), H3, shares=(0.65, 0.75)),
        StepSize("pure 1.3B", 1, (1_000, 100_000), PURE, tolerance=0.03),
    ),
    quick_sizes=(StepSize("tiny", 2, (8, 32), TINY, tolerance=0.03), StepSize("tiny", 1, (8,), TINY, shares=(0.65,))),
    prepare=prepare_step,
    labels=("model", "batch", "positions"),
    plan=Plan(warmup=2, rounds=11),
)

INT8_STEPS = Case(
    name="decode_step_int8",
    title="One decode step of the engine, weights in bfloat16 and in int8",
    sizes=(
        Int8StepSize("hybrid 1.3B", 1, 1536, H3, at_least=1.5),
        Int8StepSize("hybrid 1.3B", 64, 1536, H3, at_least=1.0),
    ),
    quick_sizes=(Int8StepSize("tiny", 1, 8, TINY), Int8StepSize("tiny", 2, 8, TINY)),
    prepare=prepare_int8_step,
    labels=("model", "batch", "position"),
    plan=Plan(warmup=2, rounds=11),
)

ROOM = Case(
    name="largest_batch",
    title="As many texts of 8,192 tokens as fit",
    sizes=(RoomSize(8192, H3, GPT2),),
    quick_sizes=(RoomSize(64, {**TINY, "attn_layers": (1,)}, TINY_GPT2, most=8),),
    prepare=prepare_room,
    labels=("context",),
    plan=Plan(warmup=1, rounds=5),
)

# The first of the three prompts is in BATCHES: each row with the default cache takes ten seconds and more.
DEFAULT_CACHE = Case(
    name="generate_default_cache",
    title="128 tokens behind 64 prompts, GPT-2 as Transformers runs it by default",
    sizes=tuple(
        EngineSize(n, 64, H3, GPT2, methods=(ENGINE, DEFAULT), at_least={DEFAULT: ratio})
        for n, (_, _, ratio) in WANTED.items()
        if n > SHORTEST
    ),
    quick_sizes=(EngineSize(16, 2, **QUICK),),
    prepare=prepare_engine,
    axis="prompt_len",
    labels=("prompt_len",),
    draw=draw_rates,
    plan=ONCE,
)

BATCHES = Case(
    name="generate_batches",
    title="128 tokens behind prompts of 512 tokens, by their number",
    sizes=(
        EngineSize(SHORTEST, 64, H3, GPT2, methods=(ENGINE, DEFAULT), at_least={DEFAULT: WANTED[SHORTEST][2]}),
        *(EngineSize(SHORTEST, n, H3, GPT2, methods=(ENGINE, DEFAULT), rival_tokens=PART) for n in (256, 1, 8)),
    ),
    quick_sizes=tuple(EngineSize(8, n, **QUICK) for n in (2, 1)),
    prepare=prepare_engine,
    axis="batch",
    labels=("batch",),
    draw=draw_rates,
    plan=ONCE,
)

# More than four texts of 32,768 tokens would leave GPT-2's cache no room beside its activations.
LENGTHS = Case(
    name="generate_lengths",
    title="128 tokens behind 4 prompts of a length",
    sizes=tuple(
        EngineSize(n, 4, H3, GPT2, methods=(ENGINE, DEFAULT), rival_tokens=PART) for n in (512, 32768, 8192, 2048)
    ),
    quick_sizes=tuple(EngineSize(n, 2, **QUICK, rival_tokens=3) for n in (8, 16)),
    prepare=prepare_engine,
    axis="prompt_len",
    labels=("prompt_len",),
    draw=draw_rates,
    plan=ONCE,
)

FIRST_TOKEN = Case(
    name="generate_first_token",
    title="One prompt to the first token of its answer",
    sizes=tuple(FirstTokenSize(n, H3, GPT2) for n in (64, 512, 1536)),
    quick_sizes=(FirstTokenSize(16, {**TINY, "attn_layers": (1,)}, TINY_GPT2),),
    prepare=prepare_first_token,
    axis="prompt_len",
    labels=("prompt_len",),
    plan=Plan(warmup=2, rounds=11),
)

# What matters most comes first: a run that is cut off keeps what it has.
SUITE = Suite(
    name="generation",
    title="Text generation on a GPU",
    cases=(PROMPTS, STEPS, DEFAULT_CACHE, ROOM, BATCHES, LENGTHS, FIRST_TOKEN, INT8_STEPS),
    device="cuda",
)
