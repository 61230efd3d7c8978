"""Packed documents under Transformers' names: each is read as if it were alone."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

SHAPES = [
    pytest.param({"attn_layers": ()}, id="pure"),
    pytest.param({"attn_layers": (1,)}, id="hybrid"),
    pytest.param({"attn_layers": (0, 2), "rotary_dim": 4}, id="rotary"),
    pytest.param({"attn_layers": (1,), "head_dim": 4}, id="head_dim-4"),
]
LENGTHS = (9, 1, 1, 14, 3)
SAID_BY = {
    "position_ids": {"return_position_ids": True},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "all": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    "positions from 2": {"position_ids_start": 2},
}


@pytest.fixture
def documents(ids):
    return [ids(n) for n in LENGTHS]


def collate(documents, **options):
    features = [{"input_ids": document.tolist()} for document in documents]
    try:
        collator = DataCollatorWithFlattening(return_tensors="pt", **options)
    except TypeError:
        pytest.skip(f"this Transformers' collator does not know {', '.join(options)}")
    return {key: value for key, value in collator(features).items() if not isinstance(value, list)}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("said_by", SAID_BY)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_are_those_of_the_documents_alone(
    make_model, documents, shape, said_by, implementation
):
    model = make_model(**shape).double()
    model.set_attn_implementation(implementation)
    batch = collate(documents, **SAID_BY[said_by])
    out = model(**batch)
    out.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    logits, total = [], 0.0
    for document in documents:
        alone = model(document[None], labels=document[None], num_items_in_batch=sum(LENGTHS) - len(LENGTHS))
        logits.append(alone.logits[0])
        if len(document) > 1:
            alone.loss.backward()
            total += alone.loss
    torch.testing.assert_close(out.logits[0], torch.cat(logits), rtol=0, atol=1e-10)
    torch.testing.assert_close(out.loss, total, rtol=0, atol=1e-10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("by", ["position_ids", "seq_idx"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_several_rows_each_packed(make_model, ids, shape, by):
    model = make_model(**shape).double()
    text = ids(3, 12)
    lengths = [(5, 7), (12,), (1, 1, 10)]
    if by == "position_ids":
        rows = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    else:
        rows = [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    logits = model(text, **{by: torch.stack(rows)}).logits
    for i, row in enumerate(lengths):
        alone = [model(piece[None]).logits[0] for piece in text[i].split(row)]
        torch.testing.assert_close(logits[i], torch.cat(alone), rtol=0, atol=1e-10)


@pytest.mark.parametrize("said_by", ["position_ids", "seq_idx", "cu_seq_lens"])
def test_the_first_token_of_a_document_is_never_a_target(make_model, documents, said_by):
    model = make_model()
    batch = collate(documents, **SAID_BY[said_by])
    wanted = model(**batch).loss
    batch["labels"] = batch["input_ids"]  # as packers without the collator give it
    torch.testing.assert_close(model(**batch).loss, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_document_is_no_packing(make_model, ids, shape):
    model = make_model(**shape)
    text = ids(2, 6)
    wanted = model(text)
    out = model(text, position_ids=torch.arange(6)[None])
    assert torch.equal(out.logits, wanted.logits)
    assert out.past_key_values is not None


def test_an_unpadded_mask_beside_packing_is_no_mask(make_model, documents):
    model = make_model()
    batch = collate(documents)
    wanted = model(**batch)
    out = model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    torch.testing.assert_close(out.logits, wanted.logits, rtol=0, atol=0)
    torch.testing.assert_close(out.loss, wanted.loss, rtol=0, atol=0)


def test_packing_gives_no_cache(make_model, documents):
    model = make_model()
    batch = collate(documents)
    assert model(**batch).past_key_values is None
    with pytest.raises(ValueError, match="no one state to go on from"):
        model(**batch, use_cache=True)


def test_packing_goes_neither_with_padding_nor_with_a_cache(make_model, documents):
    model = make_model()
    batch = collate(documents, **SAID_BY["seq_idx"])
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="neither padding nor past_key_values"):
        model(**batch, attention_mask=mask)
    with pytest.raises(ValueError, match="neither padding nor past_key_values"):
        model(**batch, past_key_values=DynamicCache())


def test_contradicting_bounds_are_refused(make_model, ids):
    model, text = make_model(), ids(1, 6)
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="position_ids begin a document at token 2"):
        model(text, cu_seq_lens_q=bounds, position_ids=torch.tensor([[0, 1, 0, 1, 0, 1]]))
    with pytest.raises(ValueError, match="seq_idx begin a document at token 2"):
        model(text, cu_seq_lens_q=bounds, seq_idx=torch.tensor([[0, 0, 1, 1, 2, 2]]))
    with pytest.raises(ValueError, match="position_ids begin a document at token 4"):
        model(text, seq_idx=torch.tensor([[0, 0, 1, 1, 1, 1]]), position_ids=torch.tensor([[0, 1, 0, 1, 0, 1]]))


def test_positions_that_run_on_are_no_contradiction(make_model, ids):
    model, text = make_model(rotary_dim=4).double(), ids(1, 6)
    bounds = torch.tensor([0, 4, 6])
    wanted = model(text, cu_seq_lens_q=bounds).logits
    got = model(text, cu_seq_lens_q=bounds, position_ids=torch.arange(6)[None]).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_ids": torch.zeros(2, 5)}, r"position_ids must have shape \(2, 6\) or \(1, 6\), got \(2, 5\)"),
        ({"seq_idx": torch.zeros(6)}, r"seq_idx must have shape \(2, 6\) or \(1, 6\), got \(6,\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "cu_seq_lens_q must have shape .* the batch one row, got .* 2 rows"),
    ],
)
def test_wrong_shapes_are_refused(make_model, ids, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model()(ids(2, 6), **arguments)


@pytest.mark.parametrize("bounds", [[0, 5], [1, 6], [0, 4, 2, 6], [0, 9], [0]])
def test_bounds_that_are_none_are_refused(make_model, ids, bounds):
    with pytest.raises(ValueError, match="cu_seq_lens_q must go up from 0 to the 6 tokens"):
        make_model()(ids(1, 6), cu_seq_lens_q=torch.tensor(bounds))
