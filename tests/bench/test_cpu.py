from __future__ import annotations

import torch

from hippos.bench.cpu import GPT2, SUITE
from hippos.bench.harness import run_suite


def test_the_quick_suite_runs_whole():
    result = run_suite(SUITE, is_quick=True, threads=1)
    assert [case.name for case in result.cases] == [
        "ssm_conv",
        "decode_step",
        "generation",
        "generation_int8",
        "long_prompt",
    ]
    rows = [row for case in result.cases for size in case.sizes for row in size.rows]
    assert all(sample > 0 for row in rows for sample in row.samples_s)
    assert all(row.error is not None and row.error < 1e-4 for row in rows if row.method == "ssm_conv")
    assert not any(size.goals for case in result.cases for size in case.sizes)


def test_the_tables_hold_the_sizes_that_are_promised():
    conv, decode, generation, int8, prompt = SUITE.cases
    assert [size.seqlen for size in conv.sizes] == [512, 1024, 2048, 4096, 8192]
    assert all(size.batch * size.seqlen == 8192 for size in conv.sizes)
    assert {(size.n_heads, size.n_modes, size.dtype) for size in conv.sizes} == {(768, 32, "float32")}
    pure, hybrid = decode.sizes
    assert pure.positions == (100, 10_000)
    assert pure.is_flat
    assert not hybrid.is_flat
    assert [(size.prompt_len, size.dtype) for size in generation.sizes] == [(1024, "float32"), (1024, "bfloat16")]
    assert {size.tokens_at_least for size in generation.sizes} == {1.2}
    assert [(size.prompt_len, size.dtype) for size in int8.sizes] == [(1024, "float32"), (1024, "bfloat16")]
    assert all(size.is_int8 and size.tokens_at_least == 2.0 for size in int8.sizes)
    assert {size.prompt_len: size.prompt_at_least for size in prompt.sizes} == {8192: 1.5, 32768: 3.0}
    n_positions = GPT2["GPT-2 124M"][1]["n_positions"]
    assert all(size.prompt_len + size.new_tokens <= n_positions for size in generation.sizes)


def test_the_models_are_of_the_promised_sizes():
    from transformers import GPT2Config, GPT2LMHeadModel

    from hippos.models import H3Config, H3ForCausalLM

    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config())
        h3 = H3ForCausalLM(H3Config.from_preset("125m"))
    assert sum(p.numel() for p in gpt2.parameters()) == 124_439_808
    assert sum(p.numel() for p in h3.parameters()) == 126_387_456
