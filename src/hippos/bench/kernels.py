"""The suite of the GPU kernels, at the sizes of a 125M model: 65,536 tokens of 768 channels, and longer."""

from __future__ import annotations

from functools import partial

from hippos.bench.cases.ssm_conv_kernel import KernelSize, prepare_ssm_conv_kernel
from hippos.bench.harness import Case, Plan, Suite

SHARES = {512: 0.5, 1024: 0.6, 2048: 0.7, 8192: 0.75, 32768: 0.75, 262144: 0.75}

SSM_CONV_KERNEL = Case(
    name="ssm_conv_kernel",
    title="Gated ssm_conv beside a copy, torch.fft and attention",
    sizes=(
        *(KernelSize(65536 // seqlen, seqlen) for seqlen in (512, 1024, 2048, 8192, 32768)),
        KernelSize(1, 262144),
    ),
    quick_sizes=(KernelSize(2, 512, n_heads=64), KernelSize(1, 1000, n_heads=64)),
    prepare=partial(prepare_ssm_conv_kernel, shares=SHARES),
    axis="seqlen",
    plan=Plan(warmup=3, rounds=15),
)

SUITE = Suite(name="kernels", title="Speed of the GPU kernels", cases=(SSM_CONV_KERNEL,), device="cuda")
