"""The suite of the GPU kernels, at the sizes of a 125M model: 65,536 tokens of 768 channels, and longer."""

from __future__ import annotations

from functools import partial

from hippos.bench.cases.fft_conv import FftSize, prepare_fft_conv
from hippos.bench.cases.h3_mix import MixSize, prepare_h3_layer, prepare_h3_mix, prepare_h3_mix_form
from hippos.bench.cases.h3_mix_step import StepSize, prepare_h3_step
from hippos.bench.cases.ssm_conv_kernel import KernelGoals, KernelSize, prepare_ssm_conv_growth, prepare_ssm_conv_kernel
from hippos.bench.cases.ssm_filter import FilterSize, prepare_ssm_filter
from hippos.bench.harness import Case, Plan, Suite

# On one H100.
CONV_GOALS = KernelGoals(
    shares={512: 0.5, 1024: 0.6, 2048: 0.7, 8192: 0.75, 32768: 0.75, 262144: 0.75},
    both_ms={512: 0.95, 1024: 0.85, 2048: 0.75, 8192: 0.70, 32768: 0.70, 262144: 2.8 / 4},
    copy_ms=0.136,
)

SMALL_GOALS = KernelGoals(shares={1 << 20: 0.4}, both_ms={}, copy_ms=0.136)

SSM_CONV_KERNEL = Case(
    name="ssm_conv_kernel",
    title="Gated ssm_conv beside a copy, torch.fft and attention",
    sizes=(
        *(KernelSize(65536 // seqlen, seqlen) for seqlen in (512, 1024, 2048, 8192, 32768)),
        KernelSize(1, 262144),
    ),
    quick_sizes=(KernelSize(2, 512, n_heads=64), KernelSize(1, 1000, n_heads=64)),
    prepare=partial(prepare_ssm_conv_kernel, goals=CONV_GOALS),
    axis="seqlen",
    plan=Plan(warmup=3, rounds=15),
)

SSM_CONV_SMALL = Case(
    name="ssm_conv_small",
    title="Gated ssm_conv where there is little to share out: one sequence, few channels",
    sizes=(KernelSize(1, 2048), KernelSize(1, 1 << 20, n_heads=128)),
    quick_sizes=(KernelSize(1, 2048, n_heads=64),),
    prepare=partial(prepare_ssm_conv_kernel, goals=SMALL_GOALS),
    labels=("seqlen", "n_heads"),
    plan=Plan(warmup=3, rounds=15),
)

SSM_CONV_GROWTH = Case(
    name="ssm_conv_growth",
    title="Gated ssm_conv of 1,048,576 tokens, however long the sequences are",
    sizes=tuple(KernelSize((1 << 20) // seqlen, seqlen) for seqlen in (2048, 8192, 32768, 131072, 524288, 1 << 20)),
    quick_sizes=(KernelSize(4, 512, n_heads=64), KernelSize(1, 2048, n_heads=64)),
    prepare=prepare_ssm_conv_growth,
    axis="seqlen",
    plan=Plan(warmup=1, rounds=5),
)

# Most milliseconds on one H100, where a copy of two of the tensors takes COPY_MS.
H3_MIX_MS = {512: 0.32, 1024: 0.28, 2048: 0.25, 8192: 0.24, 32768: 0.24, 262144: 0.96 / 4}
H3_LAYER_MS = {512: 3.0, 1024: 2.9, 2048: 2.9, 8192: 2.8, 32768: 2.8, 262144: 11.2 / 4}
COPY_MS = 0.136
MIX_SIZES = (
    *(MixSize(65536 // seqlen, seqlen) for seqlen in (512, 1024, 2048, 8192, 32768)),
    MixSize(1, 262144),
)
QUICK_MIX_SIZES = (MixSize(2, 512, d_model=64), MixSize(1, 1000, d_model=64))

H3_MIX = Case(
    name="h3_mix",
    title="The mixing of an H3 layer beside a copy",
    sizes=MIX_SIZES,
    quick_sizes=QUICK_MIX_SIZES,
    prepare=partial(prepare_h3_mix, goals_ms=H3_MIX_MS, copy_ms=COPY_MS),
    axis="seqlen",
    plan=Plan(warmup=3, rounds=15),
)

H3_MIX_FORMS = Case(
    name="h3_mix_forms",
    title="The mixing of packed documents, and of heads of several channels",
    sizes=(
        *(MixSize(1, 65536, doc_len=doc_len) for doc_len in (500, 1000, 4096, 8000)),
        *(MixSize(32, 2048, head_dim=head_dim) for head_dim in (2, 4, 8)),
        MixSize(8, 2048, head_dim=16),
        MixSize(2, 2048, head_dim=64),
        MixSize(1, 16384, doc_len=1000, head_dim=8),
    ),
    quick_sizes=(MixSize(1, 1000, d_model=64, doc_len=300), MixSize(2, 200, d_model=64, head_dim=4)),
    prepare=partial(prepare_h3_mix_form, most_of_whole=2.0),
    labels=("seqlen", "doc_len", "head_dim"),
    plan=Plan(warmup=2, rounds=7),
)

H3_LAYER = Case(
    name="h3_layer",
    title="The H3 layer with its projections beside attention",
    sizes=MIX_SIZES,
    quick_sizes=QUICK_MIX_SIZES,
    prepare=partial(prepare_h3_layer, goals_ms=H3_LAYER_MS, copy_ms=COPY_MS),
    axis="seqlen",
    plan=Plan(warmup=3, rounds=15),
)

H3_STEP = Case(
    name="h3_step",
    title="One token through the mixings of 24 layers",
    sizes=tuple(StepSize(batch) for batch in (1, 8, 64)),
    quick_sizes=(StepSize(2, d_model=64, n_layers=2),),
    prepare=prepare_h3_step,
    axis="batch",
    plan=Plan(warmup=3, rounds=15),
)

# FlashFFTConv's times in float16, its faster dtype, on one H100: forward, forward with backward.
FFT_CONV_MS = {
    512: (0.507, 2.173),
    1024: (0.573, 2.795),
    2048: (0.730, 2.775),
    4096: (1.259, 3.965),
    8192: (1.887, 6.735),
    32768: (4.008, 11.654),
}

FFT_CONV = Case(
    name="fft_conv",
    title="Gated fft_conv beside a copy and torch.fft",
    sizes=tuple(FftSize(65536 // seqlen, seqlen) for seqlen in (512, 1024, 2048, 4096, 8192, 32768)),
    quick_sizes=(FftSize(2, 512, n_heads=64), FftSize(1, 1000, n_heads=64)),
    prepare=partial(prepare_fft_conv, goals_ms=FFT_CONV_MS, copy_ms=COPY_MS),
    axis="seqlen",
    plan=Plan(warmup=3, rounds=15),
)

SSM_FILTER = Case(
    name="ssm_filter",
    title="Filters from SSM parameters",
    sizes=tuple(FilterSize(filter_len) for filter_len in (1024, 8192)),
    quick_sizes=(FilterSize(500, n_heads=8),),
    prepare=prepare_ssm_filter,
    axis="filter_len",
    plan=Plan(warmup=2, rounds=10),
)

SUITE = Suite(
    name="kernels",
    title="Speed of the GPU kernels",
    cases=(
        SSM_CONV_KERNEL,
        SSM_CONV_SMALL,
        SSM_CONV_GROWTH,
        H3_MIX,
        H3_MIX_FORMS,
        H3_LAYER,
        H3_STEP,
        FFT_CONV,
        SSM_FILTER,
    ),
    device="cuda",
)
