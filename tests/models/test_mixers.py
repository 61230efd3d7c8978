"""One language model for all mixers: what the configuration takes, parameter counts, caches, generation."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from hippos.errors import ConfigError, UnsupportedError
from hippos.layers import DSS, GSS, H3, S4, S4D
from hippos.models import H3Config, H3ForCausalLM
from hippos.models.mixers import MIXERS

KINDS = {
    "h3-no-shift": {"mixer_options": {"shift": "none"}},
    "h3-frozen-shift": {"mixer_options": {"shift": "frozen"}},
    "h3-no-gates": {"mixer_options": {"has_gates": False}},
    "s4d": {"mixer": "s4d", "n_ssm": 1, "ssm_init": "diag-inv"},
    "s4d-glu": {"mixer": "s4d", "discretisation": "bilinear", "mixer_options": {"glu": True, "has_B": True}},
    "s4": {"mixer": "s4"},
    "s4-legt": {"mixer": "s4", "ssm_init": "legt", "n_ssm": 2},
    "dss": {"mixer": "dss"},
    "dss-softmax": {"mixer": "dss", "mixer_options": {"form": "softmax", "l_max": 64}},
    "gss": {"mixer": "gss"},
}
EACH = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())
WHERE = pytest.mark.parametrize("attn_layers", [(), (1,)], ids=["pure", "hybrid"])
N_NEW = 5


def make_config(**changes) -> H3Config:
    fields = {"vocab_size": 20, "padded_vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2}
    return H3Config(**{**fields, "num_attention_heads": 1, **changes})


@torch.no_grad()
def greedy(model, text, **inputs):
    """Greedy tokens by reading the whole text again for each."""
    for _ in range(N_NEW):
        text = torch.cat((text, model(text, **inputs).logits[:, -1:].argmax(-1)), 1)
    return text


class TestModels:
    @EACH
    @WHERE
    @torch.no_grad()
    def test_any_split_gives_the_same_logits(self, make_model, ids, fields, attn_layers):
        model = make_model(attn_layers=attn_layers, **fields).double()
        text = ids(2, 14)
        wanted = model(text).logits
        for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=20)):
            logits = [model(piece, past_key_values=cache).logits for piece in text.split([5, 1, 1, 7], dim=1)]
            torch.testing.assert_close(torch.cat(logits, 1), wanted, rtol=0, atol=1e-10)

    @EACH
    @WHERE
    def test_generate_gives_the_tokens_of_the_whole_text(self, make_model, ids, fields, attn_layers):
        model = make_model(attn_layers=attn_layers, **fields).double()
        prompt = ids(2, 6)
        got = model.generate(prompt, max_new_tokens=N_NEW, do_sample=False)
        assert torch.equal(got, greedy(model, prompt))

    @EACH
    def test_left_padded_prompts_give_the_tokens_they_give_alone(self, make_model, ids, fields):
        model = make_model(**fields).double()
        prompts = [ids(n) for n in (7, 3)]
        batch = torch.stack([F.pad(prompt, (7 - len(prompt), 0), value=96) for prompt in prompts])
        mask = torch.stack([F.pad(torch.ones_like(prompt), (7 - len(prompt), 0)) for prompt in prompts])
        together = model.generate(batch, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False, pad_token_id=96)
        for prompt, row in zip(prompts, together, strict=True):
            assert torch.equal(row[7:], greedy(model, prompt[None])[0, len(prompt) :])

    @EACH
    @torch.no_grad()
    def test_beams_and_selections_of_a_cache(self, make_model, ids, fields):
        model = make_model(attn_layers=(), **fields).double()
        text = ids(2, 7)
        cache = model(text[:, :6], use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([1, 2]))
        swapped = model(text[[1, 0], 6:], past_key_values=cache).logits
        torch.testing.assert_close(swapped, model(text).logits[[1, 0], -1:], rtol=0, atol=1e-10)
        with pytest.raises(ValueError, match="past_key_values holds 2 texts, got a batch of 3"):
            model(ids(3, 1), past_key_values=cache)

    @EACH
    def test_saved_and_loaded(self, make_model, ids, fields, tmp_path):
        model = make_model(**fields)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert loaded.config.to_dict()["mixer_options"] == model.config.mixer_options
        mixer, wanted = loaded.model.layers[0].mixer, model.model.layers[0].mixer
        for (name, parameter), before in zip(mixer.named_parameters(), wanted.parameters(), strict=True):
            is_ssm = name.startswith(("shift.", "diag.", "dplr."))
            assert parameter.dtype == (torch.float32 if is_ssm else torch.bfloat16), name
            assert torch.equal(parameter, before.to(parameter.dtype)), name
        assert loaded(ids(1, 4)).logits.isfinite().all()

    @EACH
    def test_every_trained_parameter_gets_a_gradient(self, make_model, ids, fields):
        model = make_model(**fields).train()
        text = ids(2, 9)
        model(text, labels=text).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name

    @pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("s4-") and name != "s4"])
    @torch.no_grad()
    def test_packed_documents_are_independent(self, make_model, ids, name):
        model = make_model(**KINDS[name]).double()
        text = ids(1, 11)
        packed = model(text, cu_seq_lens_q=torch.tensor([0, 4, 11])).logits
        alone = torch.cat([model(text[:, :4]).logits, model(text[:, 4:]).logits], dim=1)
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)

    def test_packed_documents_are_refused_by_s4(self, make_model, ids):
        model = make_model(mixer="s4")
        with pytest.raises(UnsupportedError, match=r"an S4 layer takes no packed documents"):
            model(ids(1, 11), cu_seq_lens_q=torch.tensor([0, 4, 11]))


class TestLearnedPositions:
    @pytest.mark.parametrize("attn_layers", [(0, 1, 2), (1,), ()])
    def test_generate(self, make_model, ids, attn_layers):
        model = make_model(attn_layers=attn_layers, learned_positions=12).double()
        prompt = ids(2, 6)
        got = model.generate(prompt, max_new_tokens=N_NEW, do_sample=False)
        assert torch.equal(got, greedy(model, prompt))

    @pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
    def test_padding_does_not_count(self, make_model, ids, options):
        model = make_model(attn_layers=(0, 1, 2), learned_positions=12).double()
        prompt = ids(1, 4)
        padded = F.pad(prompt, (3, 0), value=96)
        mask = F.pad(torch.ones_like(prompt), (3, 0))
        got = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=96, **options)
        assert torch.equal(got[:, 7:], greedy(model, prompt)[:, 4:])

    @torch.no_grad()
    def test_documents_count_from_0(self, make_model, ids):
        model = make_model(attn_layers=(0, 1, 2), learned_positions=7).double()
        text = ids(1, 11)
        packed = model(text, cu_seq_lens_q=torch.tensor([0, 4, 11])).logits
        alone = torch.cat([model(text[:, :4]).logits, model(text[:, 4:]).logits], dim=1)
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)

    @torch.no_grad()
    def test_positions_matter(self, make_model, ids):
        model = make_model(attn_layers=(0, 1, 2), learned_positions=12)
        text = ids(1, 1).expand(1, 5)
        logits = model(text).logits
        assert not torch.allclose(logits[:, 0], logits[:, 4], atol=1e-3)
        later = model(text, position_ids=torch.arange(3, 8)[None], use_cache=False).logits
        assert not torch.allclose(logits, later, atol=1e-3)

    def test_texts_that_are_too_long(self, make_model, ids):
        model = make_model(attn_layers=(0, 1, 2), learned_positions=6)
        with pytest.raises(ValueError, match="learned_positions 6, got a text of 7 tokens"):
            model(ids(1, 7))
        cache = model(ids(1, 5), use_cache=True).past_key_values
        model(ids(1, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="learned_positions 6, got a text of 7 tokens"):
            model(ids(1, 1), past_key_values=cache)

    def test_tools_see_the_longest_text(self):
        assert make_config(learned_positions=42).max_position_embeddings == 42
        assert not hasattr(make_config(), "max_position_embeddings")


class TestConfiguration:
    @pytest.mark.parametrize(
        ("fields", "parameters"),
        [
            pytest.param({}, 46_784, id="h3"),
            pytest.param({"mixer": "s4d", "n_ssm": 1, "ssm_init": "diag-inv"}, 24_128, id="s4d"),
            pytest.param({"attn_layers": (0, 1), "learned_positions": 42}, 27_456, id="transformer"),
        ],
    )
    def test_the_models_of_the_synthetic_languages(self, fields, parameters):
        model = H3ForCausalLM(make_config(**fields))
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters

    @pytest.mark.parametrize(
        ("fields", "layer"),
        [({}, H3), ({"mixer": "s4d"}, S4D), ({"mixer": "s4"}, S4), ({"mixer": "dss"}, DSS), ({"mixer": "gss"}, GSS)],
    )
    def test_names(self, fields, layer):
        assert type(H3ForCausalLM(make_config(**fields)).model.layers[0].mixer) is layer

    def test_defaults_are_those_of_the_layers(self):
        for name, mixer in MIXERS.items():
            config = make_config(mixer=name)
            arguments = inspect.signature(mixer.layer).parameters
            for field, argument in mixer.fields.items():
                if name != "dss" or field != "n_ssm":
                    assert getattr(config, field) == arguments[argument].default, (name, field)
            assert set(mixer.options) <= arguments.keys()

    def test_every_argument_of_a_layer_can_be_given(self):
        for name, mixer in MIXERS.items():
            given = {*mixer.fields.values(), *mixer.options, "d_model", "bidirectional", "device", "dtype"}
            assert set(inspect.signature(mixer.layer).parameters) <= given, name

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"mixer": "S4 D"}, "unknown mixer 'S4 D'; the nearest is 's4d'"),
            ({"mixer": None}, "unknown mixer None"),
            ({"mixer": "s4d", "head_dim": 2}, "mixer 's4d' has no head_dim, got 2"),
            ({"mixer": "gss", "ssm_init": "legs"}, "mixer 'gss' has no ssm_init, got 'legs'"),
            ({"mixer": "gss", "dt_min": 0.01}, "mixer 'gss' has no dt_min, got 0.01"),
            (
                {"mixer": "s4", "ssm_init": "diag-lin"},
                "ssm_init must be one of legs, fout, legt, hippo, got 'diag-lin'",
            ),
            ({"mixer": "s4", "discretisation": "zoh"}, "mixer 's4' has no discretisation, got 'zoh'"),
            ({"mixer_options": {"shft": "none"}}, "mixer 'h3' has no option 'shft'; the nearest is 'shift'"),
            ({"mixer_options": {"shift": "no"}}, "shift must be one of 'learned', 'frozen', 'none', got 'no'"),
            ({"mixer_options": ["shift"]}, "mixer_options must be a dictionary of options"),
            ({"mixer": "s4d", "mixer_options": {"bidirectional": True}}, "mixer 's4d' has no option 'bidirectional'"),
            ({"mixer": "dss", "mixer_options": {"form": "softmax"}}, "needs the length l_max"),
            ({"mixer": "gss", "mixer_options": {"n_heads": 0}}, "n_heads must be at least 2"),
            ({"learned_positions": -1}, "learned_positions must be an integer, at least 0, got -1"),
            ({"learned_positions": 4.0}, "learned_positions must be an integer, at least 0, got 4.0"),
        ],
    )
    def test_wrong_fields_are_refused(self, fields, message):
        with pytest.raises(ConfigError, match=message):
            make_config(**fields)
