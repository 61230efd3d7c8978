"""Loss, initialisation, gradient checkpointing, dropout, LoRA, resizing the vocabulary, Trainer."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from hippos.errors import UnsupportedError
from hippos.layers import param_groups
from hippos.models import H3Config, H3ForCausalLM

SHAPES = [
    pytest.param({"attn_layers": ()}, id="pure"),
    pytest.param({"attn_layers": (1,), "rotary_dim": 4}, id="hybrid"),
    pytest.param({"attn_layers": (1,), "head_dim": 4}, id="head_dim-4"),
]


def gradients(model):
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def enable_checkpointing(model, use_reentrant):
    options = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def test_loss_is_the_mean_over_tokens_that_count(make_model, ids):
    model = make_model()
    text = ids(3, 8)
    labels = text.clone()
    labels[1] = -100
    labels[2, 5:] = -100
    out = model(text, labels=labels)
    log_p = out.logits.log_softmax(-1)[:, :-1].gather(-1, text[:, 1:, None])[..., 0]
    counts = labels[:, 1:] != -100
    torch.testing.assert_close(out.loss, -log_p[counts].mean())
    summed = model(text, labels=labels, num_items_in_batch=torch.tensor(4)).loss
    torch.testing.assert_close(summed, -log_p[counts].sum() / 4)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(text, labels=labels, shift_labels=shifted).loss, out.loss)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_tokens", [1, 7, 100])
def test_chunked_loss_is_the_loss(make_model, ids, shape, chunk_tokens):
    model = make_model(padded_vocab_size=104, **shape).double().train()
    text = ids(3, 9)
    labels = text.clone()
    labels[1, 4:] = -100
    whole = model(text, labels=labels)
    whole.loss.backward()
    wanted = gradients(model)
    model.config.loss_chunk_tokens = chunk_tokens
    out = model(text, labels=labels)
    assert out.logits is None
    torch.testing.assert_close(out.loss, whole.loss, rtol=1e-13, atol=0)
    out.loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-12)
    assert model(text).logits.shape == (3, 9, 97)
    assert model(text, labels=labels, loss_chunk_tokens=0).logits.shape == (3, 9, 97)


def test_chunked_loss_knows_documents_shifts_and_counts(make_model, ids):
    model = make_model(attn_layers=(1,)).double()
    text = ids(1, 12)
    shifted = ids(1, 12)
    for arguments in (
        {"cu_seq_lens_q": torch.tensor([0, 5, 12])},
        {"shift_labels": shifted},
        {"num_items_in_batch": torch.tensor(7)},
        {"num_items_in_batch": 7, "position_ids": torch.tensor([[*range(4), *range(8)]])},
        {"return_dict": False},
    ):
        whole = model(text, labels=text, **arguments)[0]
        torch.testing.assert_close(model(text, labels=text, loss_chunk_tokens=5, **arguments)[0], whole)


def test_chunked_loss_of_a_replaced_head_is_refused(make_model, ids):
    model = make_model(loss_chunk_tokens=4)
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    with pytest.raises(UnsupportedError, match="loss_chunk_tokens needs the model's own loss_function"):
        model(ids(1, 4), labels=ids(1, 4))


def test_logits_to_keep(make_model, ids):
    model = make_model()
    text = ids(2, 6)
    logits = model(text).logits
    assert logits.shape == (2, 6, 97)
    for kept, wanted in [(1, logits[:, -1:]), (3, logits[:, -3:]), (torch.tensor([0, 4]), logits[:, [0, 4]])]:
        torch.testing.assert_close(model(text, logits_to_keep=kept).logits, wanted, rtol=1e-5, atol=1e-5)


def test_logits_are_a_view_of_the_padded_product(make_model, ids):
    logits = make_model(padded_vocab_size=128)(ids(1, 4)).logits
    assert logits.shape == (1, 4, 97)
    assert logits.untyped_storage().nbytes() == 4 * 128 * 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(make_model, ids, shape, use_reentrant):
    model = make_model(**shape).double().train()
    text = ids(2, 9)
    model(text, labels=text).loss.backward()
    wanted = gradients(model)
    enable_checkpointing(model, use_reentrant)
    if use_reentrant:
        model.enable_input_require_grads()
    model(text, labels=text).loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=0, atol=1e-12)


def test_a_cache_with_gradient_checkpointing_is_refused(make_model, ids):
    model = make_model().train()
    enable_checkpointing(model, use_reentrant=False)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(ids(1, 4), use_cache=True)
    assert model(ids(1, 4)).past_key_values is None


@pytest.mark.parametrize("name", ["embedding_dropout", "residual_dropout", "attention_dropout"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropout_acts_in_training_only(make_model, ids, name, implementation):
    model = make_model(**{name: 0.5})
    model.set_attn_implementation(implementation)
    text = ids(1, 9)
    assert torch.equal(model(text).logits, model(text).logits)
    model.train()
    assert not torch.equal(model(text).logits, model(text).logits)


def test_a_tiny_model_overfits(ids):
    torch.manual_seed(0)
    config = H3Config(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, attn_layers=(1,))
    model = H3ForCausalLM(config).train()
    text = ids(2, 24)
    optimiser = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1))
    first = model(text, labels=text).loss.item()
    for _ in range(80):
        optimiser.zero_grad()
        loss = model(text, labels=text).loss
        loss.backward()
        optimiser.step()
    assert abs(first - math.log(97)) < 0.3
    assert loss < 0.1
    model.eval()
    written = model.generate(text[:, :4], max_new_tokens=20, do_sample=False)
    assert torch.equal(written, text)


@pytest.fixture(scope="module")
def fresh_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
    return H3ForCausalLM(H3Config(**sizes, attn_layers=(3,)))


class TestInitialisation:
    """As the reference initialises, quirk for quirk (see H3Config.rescale_mixer_out_proj)."""

    @pytest.fixture
    def model(self, fresh_model):
        return fresh_model

    def test_embedding_and_linear_weights(self, model):
        for weight in (model.model.embed_tokens.weight, model.model.layers[0].mixer.q_proj.weight):
            assert abs(weight.std() - 0.02) < 1e-3
            assert abs(weight.mean()) < 1e-3
        assert model.model.embed_tokens.weight[500:].std() > 0.015  # the rows that pad are drawn like the others

    def test_last_products_are_scaled_by_depth(self, model):
        scaled = 0.02 / math.sqrt(2 * 8)
        for layer in model.model.layers:
            assert abs(layer.mlp.fc2.weight.std() - scaled) < 3e-4
        assert abs(model.model.layers[3].mixer.out_proj.weight.std() - scaled) < 3e-4
        assert abs(model.model.layers[0].mixer.out_proj.weight.std() - 0.02) < 1e-3

    def test_the_mixers_may_be_scaled_too(self, make_model):
        model = make_model(rescale_mixer_out_proj=True, hidden_size=128, initializer_range=0.02)
        assert abs(model.model.layers[0].mixer.out_proj.weight.std() - 0.02 / math.sqrt(6)) < 6e-4

    def test_biases_and_norms(self, model):
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                assert not parameter.any(), name
            if "norm" in name and name.endswith(".weight"):
                assert bool((parameter == 1).all()), name

    def test_ssm(self, model):
        mixer = model.model.layers[0].mixer
        assert math.log(1e-3) <= mixer.diag.log_dt.min() < mixer.diag.log_dt.max() <= math.log(1e-1)
        assert torch.equal(mixer.shift.B, F.one_hot(torch.tensor(0), 64).float().expand(128, 64))
        assert abs(mixer.diag.C.square().sum(-1).mean() - 1) < 0.1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "k_proj", "v_proj", "out_proj", "qkv_proj"]])
def test_lora(make_model, ids, targets):
    text = ids(2, 9)
    model = make_model()
    before = model(text).logits
    torch.manual_seed(0)  # PEFT draws its matrices
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    torch.testing.assert_close(tuned(text).logits, before)  # LoRA starts at nothing
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(trained, lr=0.5)
    first = tuned(text, labels=text).loss
    for _ in range(5):
        optimiser.zero_grad()
        tuned(text, labels=text).loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimiser.step()
    assert tuned(text, labels=text).loss < first - 0.1
    wanted = tuned.eval()(text).logits
    prompt = text[:1, :4]
    continued = tuned.generate(input_ids=prompt, max_new_tokens=5, do_sample=False)
    assert continued.shape == (1, 9)
    merged = tuned.merge_and_unload()
    assert type(merged) is H3ForCausalLM
    torch.testing.assert_close(merged(text).logits, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "multiple", "rows"), [(110, None, 110), (110, 64, 128), (50, None, 50), (97, 8, 104)]
)
@pytest.mark.parametrize("tied", [True, False])
def test_resizing_the_vocabulary(make_model, ids, tokens, multiple, rows, tied):
    model = make_model(tie_word_embeddings=tied)
    with torch.no_grad():
        model.model.embed_tokens.weight[97:] = 1e3  # rows that pad: nothing of them may survive
    text = ids(1, 6, vocab_size=50)
    before = model(text).logits[..., :50]
    embedding = model.resize_token_embeddings(tokens, pad_to_multiple_of=multiple)
    assert embedding is model.get_input_embeddings()
    assert embedding.weight.shape == model.lm_head.weight.shape == (rows, 32)
    assert (model.lm_head.weight is embedding.weight) == tied
    assert (model.config.vocab_size, model.config.padded_vocab_size) == (tokens, rows)
    assert model.lm_head.out_features == rows
    logits = model(text).logits
    assert logits.shape[-1] == tokens
    torch.testing.assert_close(logits[..., :50], before)
    assert embedding.weight[:tokens].abs().max() < 10


def test_a_resized_model_is_saved_and_loaded(make_model, ids, tmp_path):
    model = make_model()
    model.resize_token_embeddings(101, pad_to_multiple_of=16)
    model.save_pretrained(tmp_path)
    loaded = H3ForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.vocab_size, loaded.config.padded_vocab_size) == (101, 112)
    text = ids(1, 6)
    torch.testing.assert_close(loaded(text).logits, model(text).logits)


def test_resizing_by_nothing(make_model):
    model = make_model()
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.config.padded_vocab_size == 104


_MEASURE = """
import resource, sys, torch
from hippos import H3Config, H3ForCausalLM
torch.manual_seed(0)
config = H3Config(vocab_size=20000, hidden_size=32, num_hidden_layers=1, state_size=4)
model, text = H3ForCausalLM(config).train(), torch.randint(20000, (1, 4096))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model(text, labels=text, loss_chunk_tokens=int(sys.argv[1])).loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_chunked_loss_never_holds_the_logits_whole():
    grown_kib = {
        chunk: int(subprocess.run([sys.executable, "-c", _MEASURE, chunk], capture_output=True, check=True).stdout)
        for chunk in ("0", "256")
    }
    logits_kib = 4096 * 20000 * 4 / 1024
    assert grown_kib["0"] > 2 * logits_kib
    assert grown_kib["256"] < 0.5 * logits_kib
