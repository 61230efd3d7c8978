from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from hippos import H3Config, H3ForCausalLM
from hippos.errors import StateError, UnsupportedError
from hippos.generate import Generator, Sampling, generate, load_state, save_state

N_NEW = 8
NOTHING = torch.zeros(2, 0, dtype=torch.long)
SHAPES = [
    pytest.param({}, id="pure"),
    pytest.param({"attn_layers": (1,)}, id="hybrid"),
    pytest.param({"mixer": "s4d"}, id="s4d"),
    pytest.param({"head_dim": 4}, id="head_dim-4"),
]


def make_model(seed: int = 0, *, dtype: torch.dtype = torch.float64, **changes) -> H3ForCausalLM:
    config = H3Config(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        state_size=8,
        initializer_range=0.2,
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return H3ForCausalLM(config).eval().to(dtype)


@pytest.fixture
def prompt(generator):
    return torch.randint(97, (2, 9), generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_going_on_from_a_file_equals_the_uninterrupted_run(prompt, shape, tmp_path):
    model = make_model(**shape)
    whole = generate(model, prompt, max_new_tokens=2 * N_NEW, temperature=0.9, repetition_penalty=1.5, seed=1)
    greedy = generate(model, prompt, max_new_tokens=2 * N_NEW)
    first = generate(model, prompt, max_new_tokens=N_NEW, keep_state=True)
    save_state(first.state, tmp_path / "text.safetensors")
    loaded = load_state(tmp_path / "text.safetensors", make_model(**shape))
    second = generate(loaded.model, NOTHING, max_new_tokens=N_NEW, state=loaded)
    assert torch.equal(torch.cat((first.tokens, second.tokens), 1), greedy.tokens)
    save_state(Generator(model).read(prompt), tmp_path / "prompt.safetensors")
    again = load_state(tmp_path / "prompt.safetensors", model)
    options = {"max_new_tokens": 2 * N_NEW, "temperature": 0.9, "repetition_penalty": 1.5, "seed": 1}
    assert torch.equal(generate(model, NOTHING, state=again, **options).tokens, whole.tokens)


def test_a_file_has_the_mode_of_any_other_file_and_leaves_nothing_beside_it(prompt, tmp_path):
    (tmp_path / "usual").touch()
    save_state(Generator(make_model()).read(prompt), tmp_path / "state.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"usual", "state.safetensors"}
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    with pytest.raises(FileNotFoundError):
        save_state(Generator(make_model()).read(prompt), tmp_path / "missing" / "state.safetensors")


def test_a_state_in_the_middle_of_its_ring_is_saved_in_order(prompt, tmp_path):
    model = make_model()
    writer = Generator(model)
    stream = writer.stream(prompt, Sampling(max_new_tokens=6, temperature=0))
    tokens = torch.tensor([step.tokens for step in stream]).T
    state = stream._steps.decoder.state  # five of the six tokens have been read
    assert int(state.ring) == 5
    save_state(state, tmp_path / "state")
    expected = writer.read(torch.cat((prompt, tokens[:, :5]), 1))
    loaded = load_state(tmp_path / "state", model)
    for (name, got), (_, wanted) in zip(loaded.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, msg=name)
    assert int(state.ring) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_does_not_depend_on_the_text(dtype, tmp_path):
    model = make_model(dtype=dtype)
    sizes = set()
    for n_tokens in (1, 30, 400):
        save_state(Generator(model).read([[5] * n_tokens]), tmp_path / "state")
        sizes.add((tmp_path / "state").stat().st_size)
    assert len(sizes) == 1


def test_another_model_is_refused(prompt, tmp_path):
    path = tmp_path / "state"
    model = make_model(attn_layers=(1,))
    save_state(Generator(model).read(prompt), path)
    others = [
        make_model(1, attn_layers=(1,)),
        make_model(),
        make_model(attn_layers=(1,), dtype=torch.float32),
        make_model(attn_layers=(1,), rotary_dim=4),
    ]
    for other in others:
        with pytest.raises(StateError, match="another model"):
            load_state(path, other)
    with torch.no_grad():
        model.model.layers[0].mixer.diag.log_dt[3] += 1e-3
    with pytest.raises(StateError, match="other weights"):
        load_state(path, model)


@pytest.mark.parametrize("place", [4, 60, -1, 0.5])
def test_damage_is_found(prompt, place, tmp_path):
    path = tmp_path / "state"
    model = make_model()
    save_state(Generator(model).read(prompt), path)
    content = bytearray(path.read_bytes())
    content[int(len(content) * place) if isinstance(place, float) else place] ^= 0x41
    path.write_bytes(content)
    with pytest.raises(StateError, match=r"state is (damaged|no state file)"):
        load_state(path, model)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(StateError, match="state is damaged"):
        load_state(path, model)


def test_foreign_and_missing_files_are_refused(random_gpt2, prompt, tmp_path):
    model = make_model()
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError, match="no state file"):
        load_state(path, model)
    path.write_bytes(b"")
    with pytest.raises(StateError, match="state is damaged, or no state file"):
        load_state(path, model)
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(StateError, match="no state file of hippos"):
        load_state(path, model)
    with pytest.raises(UnsupportedError, match="H3 models, got a GPT2LMHeadModel"):
        load_state(path, random_gpt2)


def test_a_failed_write_leaves_the_file_before(prompt, tmp_path, monkeypatch):
    path = tmp_path / "state"
    model = make_model()
    state = Generator(model).read(prompt)
    save_state(state, path)
    before = path.read_bytes()

    def fail(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_state(state, path)
    assert path.read_bytes() == before
    assert [child.name for child in tmp_path.iterdir()] == ["state"]
