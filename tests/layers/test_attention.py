"""CausalSelfAttention and its rotary embedding against sums written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hippos.layers import CausalSelfAttention
from hippos.layers.rotary import apply_rotary, rotary_angles


def make_attention(seed: int = 0, d_model: int = 12, n_heads: int = 3, **options) -> CausalSelfAttention:
    torch.manual_seed(seed)
    return CausalSelfAttention(d_model, n_heads, dtype=torch.float64, **options)


@pytest.fixture
def u(generator) -> Tensor:
    return torch.randn(2, 7, 12, generator=generator, dtype=torch.float64)


def attend_written_out(layer: CausalSelfAttention, u: Tensor) -> Tensor:
    """One query at a time; rows of qkv_proj are (q | k | v), each (head, coordinate)."""
    width, n_heads = layer.d_model, layer.n_heads
    head_dim = width // n_heads
    qkv = u @ layer.qkv_proj.weight.T + layer.qkv_proj.bias
    heads = torch.zeros_like(u)
    for row in range(u.shape[0]):
        for head in range(n_heads):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            q, k, v = (qkv[row, :, part * width : (part + 1) * width][:, columns] for part in range(3))
            for t in range(u.shape[1]):
                weights = torch.softmax(k[: t + 1] @ q[t] / math.sqrt(head_dim), dim=0)
                heads[row, t, columns] = weights @ v[: t + 1]
    return heads @ layer.out_proj.weight.T + layer.out_proj.bias


class TestCausalSelfAttention:
    def test_against_the_definition(self, u):
        layer = make_attention()
        with torch.no_grad():
            torch.testing.assert_close(layer(u), attend_written_out(layer, u))

    def test_causality(self, u, generator):
        layer = make_attention(rotary_dim=4)
        changed = u.clone()
        changed[:, 4:] = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
        y, y_changed = layer(u), layer(changed)
        torch.testing.assert_close(y[:, :4], y_changed[:, :4])
        assert not torch.allclose(y[:, 4:], y_changed[:, 4:])

    def test_learned_positions_are_added_to_the_tokens(self, u):
        layer, plain = make_attention(learned_positions=9), make_attention()
        plain.load_state_dict(layer.state_dict(), strict=False)
        places = layer.embed_positions.weight
        torch.testing.assert_close(layer(u), plain(u + places[:7]))
        torch.testing.assert_close(layer(u, position_ids=torch.arange(7) + 2), plain(u + places[2:]))
        layer(u).square().sum().backward()
        assert (places.grad[:7] != 0).any(1).all()
        assert (places.grad[7:] == 0).all()
        with pytest.raises(ValueError, match="u has 10 tokens, learned are 9 positions"):
            layer(torch.zeros(1, 10, 12, dtype=torch.float64))

    def test_rotary_sees_only_differences_of_positions(self, u):
        layer = make_attention(rotary_dim=4)
        positions = torch.arange(7)
        y = layer(u)
        assert torch.equal(y, layer(u, position_ids=positions))
        torch.testing.assert_close(y, layer(u, position_ids=(positions + 100).expand(2, 7)))
        assert not torch.allclose(y, layer(u, position_ids=2 * positions[None]))
        assert not torch.allclose(y, make_attention()(u))

    def test_rows_may_have_their_own_positions(self, u):
        layer = make_attention(rotary_dim=2)
        positions = torch.stack([torch.arange(7), torch.tensor([0, 0, 1, 2, 5, 9, 11])])
        y = layer(u, position_ids=positions)
        for row in range(2):
            torch.testing.assert_close(y[row : row + 1], layer(u[row : row + 1], position_ids=positions[row]))

    def test_the_model_can_plug_in_its_own_attention(self, u):
        layer = make_attention(rotary_dim=2)
        kept = {}

        def attend(q, k, v):
            """A cache: the first four tokens are kept, the others attend to all."""
            if kept:
                k, v = torch.cat((kept["k"], k), dim=2), torch.cat((kept["v"], v), dim=2)
                mask = torch.ones(3, 7, dtype=torch.bool).tril(diagonal=4)
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            kept.update(k=k, v=v)
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        first = layer(u[:, :4], position_ids=torch.arange(4), attend=attend)
        second = layer(u[:, 4:], position_ids=torch.arange(4, 7), attend=attend)
        assert kept["k"].shape == (2, 3, 4, 4)
        torch.testing.assert_close(torch.cat((first, second), dim=1), layer(u))

    def test_dropout_acts_in_training_only(self, u):
        layer = make_attention(dropout=0.5)
        assert not torch.equal(layer(u), layer(u))
        layer.eval()
        assert torch.equal(layer(u), layer(u))
        torch.testing.assert_close(layer(u), make_attention()(u))

    def test_state_dict(self):
        assert {name: tuple(value.shape) for name, value in make_attention(rotary_dim=4).state_dict().items()} == {
            "qkv_proj.weight": (36, 12),
            "qkv_proj.bias": (36,),
            "out_proj.weight": (12, 12),
            "out_proj.bias": (12,),
        }

    def test_compiles_into_one_graph(self, u):
        layer = make_attention(rotary_dim=4)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(u), layer(u))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_heads": 5}, "n_heads 5 must divide d_model 12"),
            ({"n_heads": 0}, "n_heads 0 must divide"),
            ({"learned_positions": -1}, "learned_positions must be at least 0, got -1"),
            ({"rotary_dim": 3}, "rotary_dim must be even and between 0 and the head width 4, got 3"),
            ({"rotary_dim": 6}, "between 0 and the head width 4, got 6"),
            ({"rotary_base": 0.0}, "rotary_base must be positive, got 0.0"),
            ({"dropout": 1.0}, "dropout must be at least 0 and less than 1, got 1.0"),
        ],
    )
    def test_wrong_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            make_attention(**options)

    @pytest.mark.parametrize("shape", [(2, 7, 11), (7, 12)])
    def test_wrong_shapes(self, shape):
        with pytest.raises(ValueError, match=r"u must have shape \(B, L, D\) with D = 12, got"):
            make_attention()(torch.zeros(shape, dtype=torch.float64))

    def test_no_token(self):
        with pytest.raises(ValueError, match=r"at least one token, got shape \(2, 0, 12\)"):
            make_attention()(torch.zeros(2, 0, 12, dtype=torch.float64))

    def test_wrong_dtype(self):
        with pytest.raises(TypeError, match=r"dtype of the projections, torch.float64, got torch.float32"):
            make_attention()(torch.zeros(2, 7, 12))

    def test_wrong_positions(self, u):
        with pytest.raises(ValueError, match=r"position_ids must have shape \(2, 7\), .* got \(2, 6\)"):
            make_attention(rotary_dim=2)(u, position_ids=torch.zeros(2, 6, dtype=torch.int64))


class TestRotary:
    def test_against_complex_rotation(self, generator):
        x = torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)
        positions = torch.tensor([0, 1, 2, 10, 1000])
        turned = apply_rotary(x, rotary_angles(positions, 6, 10000.0, x.dtype))
        frequencies = (1 / 10000.0 ** (torch.arange(3) / 3)).double()
        wanted = torch.complex(x[..., :3], x[..., 3:6]) * torch.exp(1j * positions.double()[:, None] * frequencies)
        torch.testing.assert_close(turned[..., :3], wanted.real, rtol=0, atol=1e-4)  # frequencies rounded to float32
        torch.testing.assert_close(turned[..., 3:6], wanted.imag, rtol=0, atol=1e-4)
        assert torch.equal(turned[..., 6:], x[..., 6:])
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_keeps_float32_angles(self, generator, dtype):
        x = torch.randn(1, 1, 2, 4, generator=generator).to(dtype)
        positions = torch.tensor([4096, 4097])
        angles = rotary_angles(positions, 4, 10000.0, dtype)
        assert angles.dtype == torch.float32
        turned = apply_rotary(x, angles)
        assert turned.dtype == dtype
        torch.testing.assert_close(turned, apply_rotary(x.float(), angles).to(dtype))
        assert not torch.equal(angles[0], angles[1])
