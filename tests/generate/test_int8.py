from __future__ import annotations

import gc
import importlib.util
import weakref
from copy import deepcopy

import pytest
import torch
from torch import nn

from hippos import H3Config, H3ForCausalLM
from hippos.errors import UnsupportedError
from hippos.generate import Generator, Sampling, generate, load_state, load_text_model, quantise_int8, save_state
from hippos.generate import int8 as int8_module
from hippos.generate.fused_step import FusedStep
from hippos.generate.h3_decoder import H3Decoder
from hippos.generate.int8_linear import MOST_ROWS, Int8Embedding, Int8Linear, rounded_to_int8
from hippos.generate.state import GenerationState

HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not HAS_TORCHAO, reason="needs torchao")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Quantise on the CPU as elsewhere, with rounding of our own for torchao's, and multiply by unpacked weights."""
    monkeypatch.setattr("hippos.generate.int8.HAS_PRODUCT", False)
    monkeypatch.setattr("hippos.generate.int8_linear.HAS_PRODUCT", False)
    monkeypatch.setattr(int8_module, "require_int8", lambda device: None)
    monkeypatch.setattr(int8_module, "_by_torchao", rounded_to_int8)


def make_model(*, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes) -> H3ForCausalLM:
    fields = {
        "vocab_size": 199,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "state_size": 16,
        "attn_layers": (1,),
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return H3ForCausalLM(H3Config(**{**fields, **changes})).eval().to(device, dtype)


def n_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.skipif(HAS_TORCHAO, reason="torchao is installed")
def test_elsewhere_than_on_a_cpu_torchao_is_asked_for_by_name(random_h3):
    model = deepcopy(random_h3).to("meta")
    with pytest.raises(UnsupportedError, match=r"int8 weights on meta need torchao, .* pip install torchao"):
        quantise_int8(model)
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(UnsupportedError, match="pip install torchao"):
        load_text_model("there is no such model", device="meta", int8=True)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_tied_embedding_shares_the_weight_and_the_old_ones_are_gone():
    model = make_model(dtype=torch.bfloat16)
    exact = deepcopy(model)
    old = [weakref.ref(linear.weight) for linear in model.modules() if isinstance(linear, nn.Linear | nn.Embedding)]
    quantise_int8(model)
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)
    head, embedding = model.lm_head, model.model.embed_tokens
    assert (type(head), type(embedding)) == (Int8Linear, Int8Embedding)
    assert embedding.weight_int8 is head.weight_int8
    assert n_bytes(model) < 0.6 * n_bytes(exact)
    assert model.dtype == torch.bfloat16
    ids = torch.randint(199, (2, 70), generator=torch.Generator().manual_seed(0))
    assert torch.equal(embedding(ids), embedding.weight[ids])
    with torch.no_grad():
        assert 1e-3 < distance(model(ids).logits, exact(ids).logits) < 0.1


@pytest.mark.usefixtures("as_on_a_gpu")
def test_scales_keep_their_precision_when_the_model_changes_its_own():
    model = make_model(dtype=torch.bfloat16)
    quantise_int8(model)
    scale = model.lm_head.scale.clone()
    model.half()
    assert torch.equal(model.lm_head.scale, scale)
    assert torch.equal(model.model.embed_tokens.scale, scale)
    assert model.model.embed_tokens(torch.tensor([3])).dtype == model.lm_head.weight.dtype == torch.float16
    model.double()
    assert torch.equal(model.lm_head.weight, model.lm_head.weight_int8.double() * scale.double().unsqueeze(1))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_embedding_of_its_own_stays():
    model = make_model(tie_word_embeddings=False)
    weight = model.model.embed_tokens.weight
    quantise_int8(model)
    assert model.model.embed_tokens.weight is weight
    assert type(model.lm_head) is Int8Linear


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("shape", [{}, {"head_dim": 4}, {"attn_layers": (0, 2), "rotary_dim": 8}, {"mixer": "s4d"}])
def test_prompts_are_read_as_on_a_gpu(shape):
    model = make_model(dtype=torch.float64, **shape)
    quantise_int8(model)
    ids = torch.randint(199, (2, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits[:, -1]
    for is_fused in (False, True):
        decoder = H3Decoder(model, GenerationState.empty(model, 2, context=40))
        decoder._reads_fused = is_fused
        decoder.read([row[:-1] for row in ids])
        decoder.advance(ids[:, -1])
        torch.testing.assert_close(decoder.logits(), wanted, rtol=1e-9, atol=1e-9)


@needs_torchao
def test_torchao_rounds_and_changes_nothing_else(monkeypatch):
    monkeypatch.setattr("hippos.generate.int8.HAS_PRODUCT", False)
    monkeypatch.setattr(int8_module, "_WEIGHTS_AT_ONCE", 50 * 128)  # not all rows of a weight
    model = make_model(dtype=torch.bfloat16)
    weights = {name: linear.weight for name, linear in model.named_modules() if isinstance(linear, nn.Linear)}
    precision = torch.get_float32_matmul_precision()
    quantise_int8(model)
    assert torch.get_float32_matmul_precision() == precision
    for name, weight in weights.items():
        linear = model.get_submodule(name)
        assert linear.scale.shape == (len(weight),)
        assert linear.scale.dtype == torch.float32
        step = weight.detach().float().abs().amax(1) / 127.5
        torch.testing.assert_close(linear.scale, step, rtol=1e-2, atol=0)
        error = (linear.int8_weight.unpacked(torch.float64) - weight.detach().double()).abs()
        assert bool((error <= 0.51 * linear.scale.unsqueeze(1) * (1 + 1e-6)).all())
    refs = [weakref.ref(weight) for weight in weights.values()]
    weights.clear()
    del weight
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


@pytest.mark.parametrize(
    ("dtype", "shape", "reason"),
    [
        (torch.float32, (64, 64), "it needs .* or float16, got float32; open the model with dtype='bfloat16'$"),
        (torch.bfloat16, (64, 100), "it needs widths that are multiples of 64, .* got 100$"),
    ],
)
def test_what_a_gpu_could_not_multiply_is_refused_by_name(monkeypatch, dtype, shape, reason):
    monkeypatch.setattr("hippos.ops.decode.int8_weight.why_not_device", lambda device: None)
    monkeypatch.setattr("hippos.ops.decode.int8_weight.is_interpreted", lambda: False)
    weight = torch.empty(shape, dtype=dtype, device="meta")
    with pytest.raises(UnsupportedError, match=f"layers.0.mlp.fc1 cannot have int8 weights on cuda: {reason}"):
        int8_module._require_kernels("layers.0.mlp.fc1", weight, torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n_tokens", [1, MOST_ROWS, MOST_ROWS + 1])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_map_is_as_exact_as_eight_bits_allow(generator, dtype, n_tokens, has_bias):
    linear = nn.Linear(96, 40, bias=has_bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.normal_(generator=generator)
        linear.weight[3] = 0
    linear = linear.to(dtype)
    u = torch.randn(2, n_tokens, 96, generator=generator).to(dtype)[:1]
    got, wanted = Int8Linear(linear)(u), linear.double()(u.double())
    assert got.shape == wanted.shape
    assert got.dtype == dtype
    channels_first = u.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(Int8Linear(linear.to(dtype))(channels_first), got)
    error = (got.double() - wanted).norm() / wanted.norm()
    # A step is the largest of 96 weights over 127: about a hundredth of a weight's size, evenly rounded.
    assert 1e-3 < error < 1.3e-2
    unit = torch.eye(96, dtype=dtype)[:n_tokens]
    assert torch.equal(Int8Linear(linear.to(dtype))(unit)[:, 3], unit.new_zeros(n_tokens)) or has_bias


def test_int8_weights_write_nearly_the_same(random_h3, tmp_path):
    model = deepcopy(random_h3).float()
    exact = deepcopy(model)
    quantise_int8(model)
    ids = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, wanted = model(ids).logits, exact(ids).logits
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.05
    assert type(model.model.layers[0].mlp.fc1) is Int8Linear
    assert type(model.lm_head) is Int8Linear
    assert torch.equal(model.model.embed_tokens.weight, exact.model.embed_tokens.weight)
    assert model.model.layers[0].mixer.diag.log_dt.dtype == torch.float32
    whole = generate(model, ids, max_new_tokens=6)
    save_state(Generator(model).read(ids), tmp_path / "state")
    state = load_state(tmp_path / "state", model)
    assert torch.equal(generate(model, ids[:, :0], state=state, max_new_tokens=6).tokens, whole.tokens)


@pytest.mark.parametrize("n_tokens", [1, 3, MOST_ROWS, MOST_ROWS + 1])
def test_short_prompts(random_h3, n_tokens):
    model = deepcopy(random_h3).float()
    quantise_int8(model)
    ids = torch.randint(320, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    wanted = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generate(model, ids, max_new_tokens=3).sequences, wanted)


def test_saving_what_could_not_be_opened_is_refused(random_h3, tmp_path):
    model = deepcopy(random_h3).float()
    quantise_int8(model)
    for one in (model, deepcopy(model)):
        with pytest.raises(UnsupportedError, match=r"cannot be saved.* save it before it is quantised"):
            one.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    with pytest.raises(UnsupportedError, match="has int8 weights already"):
        quantise_int8(model)


def test_a_model_without_linear_maps_is_refused():
    model = nn.Embedding(4, 4)
    model.device = torch.device("cpu")
    with pytest.raises(UnsupportedError, match="Embedding has no linear maps"):
        quantise_int8(model)


@pytest.mark.gpu
@needs_torchao
@pytest.mark.parametrize(
    ("batch", "dtype"),
    [(1, torch.bfloat16), (1, torch.float16), (5, torch.bfloat16), (64, torch.float16), (65, torch.bfloat16)],
)
@pytest.mark.parametrize("shape", [{}, {"attn_layers": (0, 2), "rotary_dim": 8}, {"mixer": "s4d"}, {"vocab_size": 517}])
@torch.no_grad()
def test_steps_on_a_gpu_are_those_of_the_unpacked_weights(shape, batch, dtype):
    model = make_model(dtype=dtype, device="cuda", **shape)
    quantise_int8(model)
    exact = make_model(dtype=torch.float64, device="cuda", **shape)
    for name, linear in model.named_modules():
        if isinstance(linear, Int8Linear):
            exact.get_submodule(name).weight.copy_(linear.int8_weight.unpacked(torch.float64))
    plain = deepcopy(exact).to(dtype)
    assert FusedStep.fits(model)
    ids = torch.randint(199, (batch, 20), generator=torch.Generator().manual_seed(1)).cuda()
    wanted = exact(ids).logits[:, -1]
    decoder = H3Decoder(model, GenerationState.empty(model, batch, context=40))
    decoder.read(list(ids[:, :10]))
    for token in ids[:, 10:].unbind(1):
        decoder.advance(token)
    assert distance(decoder.logits(), wanted) < 1.5 * distance(plain(ids).logits[:, -1], wanted) + 2e-3


@pytest.mark.gpu
@needs_torchao
@pytest.mark.parametrize("shape", [{}, {"head_dim": 4}])
def test_a_captured_step_on_a_gpu_writes_what_steps_write(shape):
    model = make_model(dtype=torch.bfloat16, device="cuda", **shape)
    quantise_int8(model)
    ids = torch.randint(199, (3, 9), generator=torch.Generator().manual_seed(1)).cuda()
    sampling = Sampling(max_new_tokens=12, temperature=0)
    expected = Generator(model, cuda_graph=False).generate(ids, sampling).sequences
    writer = Generator(model)
    assert writer.cuda_graph
    for _ in range(2):
        assert torch.equal(writer.generate(ids, sampling).sequences, expected)


@pytest.mark.gpu
@needs_torchao
def test_memory_on_a_gpu_falls_by_what_the_weights_lose(monkeypatch):
    monkeypatch.setattr(int8_module, "_WEIGHTS_AT_ONCE", 2**18)
    sizes = {"hidden_size": 1024, "vocab_size": 4096, "num_attention_heads": 8}
    before = torch.cuda.memory_allocated()
    model = make_model(dtype=torch.bfloat16, device="cuda", **sizes)
    whole = torch.cuda.memory_allocated() - before
    quantise_int8(model)
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 0.52 * whole
    moved = make_model(dtype=torch.bfloat16, **sizes)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    quantise_int8(moved, device=torch.device("cuda"))
    assert {tensor.device.type for tensor in (*moved.parameters(), *moved.buffers())} == {"cuda"}
    assert torch.cuda.max_memory_allocated() - held < 0.8 * whole
    ids = torch.randint(199, (2, 9), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad():
        assert torch.equal(moved(ids).logits, model(ids).logits)


@pytest.mark.gpu
@needs_torchao
def test_float32_on_a_gpu_is_refused_and_nothing_is_changed():
    model = make_model(device="cuda")
    with pytest.raises(UnsupportedError, match=r"mixer.q_proj cannot have int8 .* in bfloat16 or float16, got float32"):
        quantise_int8(model)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
