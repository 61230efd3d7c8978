"""Mathematics on tensors: filters, convolutions and recurrences of SSMs. No parameters, no modules, no configuration.

Every operator checks its arguments, computes in float32 (float64 for float64 input) whatever the input's dtype, and
takes ``impl``: "reference" is the definition, "torch" is fast on any device, "triton" runs kernels on an NVIDIA GPU,
"auto" chooses.
"""

from hippos.ops.add_norm import add_norm
from hippos.ops.arguments import Impl
from hippos.ops.cross_entropy import linear_cross_entropy
from hippos.ops.discretise import discretise
from hippos.ops.embed import embed
from hippos.ops.fft_conv import fft_conv
from hippos.ops.gelu_mlp import gelu_mlp
from hippos.ops.h3_mix import H3State, h3_mix
from hippos.ops.ssm_conv import ssm_conv
from hippos.ops.ssm_filter import shift_filter, ssm_filter
from hippos.ops.ssm_filter.dplr import dplr_filter
from hippos.ops.ssm_filter.dss import dss_filter
from hippos.ops.ssm_step import h3_step, ssm_step

__all__ = [
    "H3State",
    "Impl",
    "add_norm",
    "discretise",
    "dplr_filter",
    "dss_filter",
    "embed",
    "fft_conv",
    "gelu_mlp",
    "h3_mix",
    "h3_step",
    "linear_cross_entropy",
    "shift_filter",
    "ssm_conv",
    "ssm_filter",
    "ssm_step",
]
