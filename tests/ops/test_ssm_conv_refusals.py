"""What ssm_conv refuses, and in which words."""

from __future__ import annotations

import pytest
import torch

from hippos.errors import UnsupportedError
from hippos.ops import ssm_conv
from tests.ops.ssm_conv_cases import call, make_inputs


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"u": torch.zeros(2, 3)}, ValueError, r"u must have shape \(B, H, L\).*got \(2, 3\)"),
            ({"u": torch.zeros(2, 3, 0)}, ValueError, r"at least one channel and one time step, got shape \(2, 3, 0\)"),
            ({"u": torch.zeros(2, 3, 5, dtype=torch.int64)}, TypeError, "u must have one of the dtypes.*got int64"),
            ({"u": torch.zeros(2, 3, 5, dtype=torch.complex64)}, TypeError, "got complex64"),
            ({"u": [1.0]}, TypeError, "u must be a tensor.*got list"),
            ({"u": torch.zeros(2, 3, 5, device="meta")}, ValueError, "log_a must be on meta.*got cpu"),
            ({"log_a": torch.zeros(4, 4, 2)}, ValueError, r"log_a must have shape \(H, M, 2\) = \(3, any, 2\)"),
            ({"log_a": torch.zeros(3, 0, 2)}, ValueError, "at least one channel and one mode"),
            ({"log_a": torch.zeros(3, 4, 2, dtype=torch.bfloat16)}, TypeError, "float32, float64, got bfloat16"),
            ({"b": torch.zeros(3, 5, 2)}, ValueError, r"b must have shape \(H, M, 2\) = \(3, 4, 2\), got \(3, 5, 2\)"),
            ({"c": torch.zeros(3, 4, dtype=torch.complex64)}, TypeError, "c must have one of the dtypes"),
            ({"d": torch.zeros(4)}, ValueError, r"d must have shape \(H\) = \(3\), got \(4,\)"),
            ({"in_gate": torch.zeros(2, 3, 6)}, ValueError, "in_gate must have shape"),
            ({"out_gate": torch.zeros(2, 3, 5, dtype=torch.bool)}, TypeError, "out_gate must have one of the dtypes"),
            ({"initial_state": torch.zeros(1, 3, 4, 2)}, ValueError, r"\(B, H, M, 2\) = \(2, 3, 4, 2\), got \(1,"),
            ({"initial_state": torch.zeros(2, 3, 4, 2).half()}, TypeError, "initial_state.*got float16"),
        ],
    )
    def test_tensors(self, random, change, error, message):
        with pytest.raises(error, match=message):
            call(make_inputs(random, 2, 5, dtype=torch.float32)._replace(**change))

    @pytest.mark.parametrize(
        ("cu_seqlens", "error", "message"),
        [
            (torch.tensor([0.0, 5.0]), TypeError, "cu_seqlens must have one of the dtypes int32, int64"),
            (torch.tensor([[0, 5]]), ValueError, r"cu_seqlens must have shape \(n_docs \+ 1\)"),
            (torch.tensor([0]), ValueError, "at least 2|>= 2 entries, got 1"),
            (torch.tensor([1, 5]), ValueError, "from 0 to L = 5, got 1 to 5"),
            (torch.tensor([0, 4]), ValueError, "from 0 to L = 5, got 0 to 4"),
            (torch.tensor([0, 3, 2, 5]), ValueError, "must not decrease, got 2 after 3"),
        ],
    )
    def test_documents(self, random, cu_seqlens, error, message):
        u, *modes = make_inputs(random, 1, 5)[:4]
        with pytest.raises(error, match=message):
            ssm_conv(u, *modes, cu_seqlens=cu_seqlens)

    def test_documents_in_a_batch(self, random):
        u, *modes = make_inputs(random, 2, 5)[:4]
        with pytest.raises(ValueError, match="B must be 1, got B = 2"):
            ssm_conv(u, *modes, cu_seqlens=torch.tensor([0, 5]))

    def test_states_count_documents(self, random):
        u, *modes = make_inputs(random, 1, 5)[:4]
        with pytest.raises(ValueError, match=r"\(n_docs, H, M, 2\) = \(2, 3, 4, 2\), got \(1, 3, 4, 2\)"):
            ssm_conv(u, *modes, initial_state=torch.zeros(1, 3, 4, 2), cu_seqlens=torch.tensor([0, 2, 5]))

    def test_implementations(self, random):
        u, *modes = make_inputs(random, 2, 5)[:4]
        with pytest.raises(ValueError, match="impl must be one of auto, reference, torch, triton, got 'cuda'"):
            ssm_conv(u, *modes, impl="cuda")
        with pytest.raises(UnsupportedError):
            ssm_conv(u, *modes, impl="triton")
