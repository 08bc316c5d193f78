"""The network on its own: counts, initialisation, the masked-row head, normalisation, checkpointing, config errors."""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import modeling
from modeling import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel, count_parameters, flops_per_sequence

REPO = Path(modeling.__file__).parent
SIZES = {
    "vocab_size": 1200,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
BATCH, LENGTH = 6, 20


def _config(**changes) -> BertConfig:
    values = SIZES | {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 32,
        "initializer_range": 0.1,
    }
    return BertConfig(**(values | changes))


def _model(cls=BertForPreTraining, seed: int = 0, **changes):
    torch.manual_seed(seed)
    return cls(_config(**changes))


def _batch(batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(1, SIZES["vocab_size"], (batch, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (batch,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    picked = (torch.rand(batch, length, generator=generator) < 0.25) & mask
    return {
        "input_ids": input_ids * mask,
        "attention_mask": mask.long(),
        "token_type_ids": (torch.arange(length) > 7).long().expand(batch, -1).contiguous(),
        "labels": torch.where(picked, input_ids, -100),
        "next_sentence_label": torch.randint(0, 2, (batch,), generator=generator),
    }


def _gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def _assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# --------------------------------------------------------------------------------------------------------- sizes, names


@pytest.mark.parametrize(("name", "count"), [("large", 336_232_258), ("base", 110_111_042)])
def test_parameter_counts_at_the_padded_vocabulary(name, count):
    config = BertConfig.from_json_file(REPO / f"bert_configs/{name}.json").padded()
    assert config.vocab_size == 30528
    with torch.device("meta"):
        assert count_parameters(BertForPreTraining(config)) == count


@pytest.mark.parametrize(
    ("name", "layers", "hidden", "heads", "inner", "vocab", "dropout"),
    [
        ("tiny", 4, 192, 3, 768, 8000, 0.0),
        ("small", 4, 512, 8, 2048, 30522, 0.1),
        ("base", 12, 768, 12, 3072, 30522, 0.1),
        ("large", 24, 1024, 16, 4096, 30522, 0.1),
    ],
)
def test_shipped_configs(name, layers, hidden, heads, inner, vocab, dropout):
    config = BertConfig.from_json_file(REPO / f"bert_configs/{name}.json")
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, hidden, heads)
    assert (config.intermediate_size, config.vocab_size, config.hidden_act) == (inner, vocab, "gelu")
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (dropout, dropout)
    assert (config.max_position_embeddings, config.type_vocab_size, config.initializer_range) == (512, 2, 0.02)


def test_flops_reproduce_the_published_counts():
    config = BertConfig.from_json_file(REPO / "bert_configs/large.json").padded()
    assert flops_per_sequence(config, 128, 20) / 1e9 == pytest.approx(240.6, abs=0.05)
    assert flops_per_sequence(config, 512, 80) / 1e9 == pytest.approx(1020.5, abs=0.05)


def test_flops_count_what_torch_counts():
    """The formula against the matrix products torch runs, with every position computed and no pooler in it."""
    from torch.utils.flop_counter import FlopCounterMode

    model = _model(BertForMaskedLM)
    model.dense_sequence_output = False
    batch = _batch()
    del batch["next_sentence_label"]
    counter = FlopCounterMode(display=False)
    with counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(**batch).loss.backward()
    assert counter.get_total_flops() == BATCH * flops_per_sequence(model.config, LENGTH, LENGTH)


def test_importing_modeling_needs_torch_and_the_standard_library_only():
    tree = ast.parse(Path(modeling.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    tops = {name.partition(".")[0] for name in names}
    assert "torch" in tops
    assert tops - {"torch"} <= set(sys.stdlib_module_names)


def test_a_copy_of_the_file_alone_trains_on_padded_batches(tmp_path):
    shutil.copy(modeling.__file__, tmp_path / "modeling.py")
    program = (
        "import torch, modeling\n"
        f"model = modeling.BertForPreTraining(modeling.BertConfig(**{SIZES!r}))\n"
        "ids = torch.ones(2, 6, dtype=torch.long)\n"
        "model(ids, ids, labels=ids, next_sentence_label=ids[:, 0]).loss.backward()\n"
    )
    subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{program}"], cwd=tmp_path, check=True)


# ------------------------------------------------------------------------------------------------------- initialisation


def test_initialisation_is_the_papers():
    model = _model(hidden_size=128, intermediate_size=256, initializer_range=0.02)
    checked = 0
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            assert torch.all(parameter == (1.0 if name.endswith("weight") else 0.0)), name
        elif name.endswith("bias"):
            assert torch.all(parameter == 0.0), name
        else:
            # five standard errors of the mean and of the standard deviation of n normal numbers
            n = parameter.numel()
            assert abs(parameter.mean().item()) < 5 * 0.02 / n**0.5, name
            assert abs(parameter.std().item() / 0.02 - 1) < 5 / (2 * n) ** 0.5, name
            checked += 1
    assert checked == 3 * 6 + 3 + 3  # six matrices a layer, three tables, pooler, transform and next-sentence


def test_the_padding_row_starts_like_any_other_and_takes_no_gradient_from_lookups():
    model = _model(BertModel)
    assert model.embeddings.word_embeddings.weight[0].std() > 0.05
    model(torch.zeros(2, 4, dtype=torch.long)).last_hidden_state.pow(2).sum().backward()
    assert torch.all(model.embeddings.word_embeddings.weight.grad == 0)


def test_same_seed_same_weights_other_seed_other_weights():
    one, same, other = (_model(seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["bert.pooler.dense.weight"], other["bert.pooler.dense.weight"])


# ----------------------------------------------------------------------------------------------------------------- ties


def _assert_tied(model) -> None:
    head = model.cls.predictions
    assert head.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert head.decoder.bias is head.bias


@pytest.mark.parametrize("cls", [BertForPreTraining, BertForMaskedLM])
def test_the_tie_survives_loading_moving_copying_and_leaving_the_meta_device(cls):
    model = _model(cls)
    _assert_tied(model)
    state = {key: value.clone() + 1 for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    _assert_tied(model)
    model.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    _assert_tied(model)
    assert torch.equal(model.cls.predictions.decoder.weight, state["cls.predictions.decoder.weight"])
    _assert_tied(model.to(torch.float64))
    clone = copy.deepcopy(model)
    _assert_tied(clone)
    assert clone.cls.predictions.bias is not model.cls.predictions.bias
    clone.load_state_dict(model.state_dict(), assign=True)  # the copied hooks act on the copy
    _assert_tied(clone)
    with torch.device("meta"):
        empty = cls(_config())
    _assert_tied(empty.to_empty(device="cpu"))
    assert count_parameters(empty) == count_parameters(_model(cls))


def test_a_model_can_be_pickled_with_its_ties():
    model = pickle.loads(pickle.dumps(_model(hidden_act="gelu_new")))
    model.load_state_dict(_model(hidden_act="gelu_new").state_dict(), assign=True)
    _assert_tied(model)


def test_the_tie_survives_inside_a_wrapper():
    wrapper = torch.nn.Sequential()
    with torch.device("meta"):
        wrapper.add_module("model", BertForPreTraining(_config()))
    wrapper.to_empty(device="cpu")
    _assert_tied(wrapper.model)
    state = {f"model.{key}": value for key, value in _model().state_dict().items()}
    del state["model.cls.predictions.decoder.bias"], state["model.cls.predictions.decoder.weight"]
    wrapper.load_state_dict(state, strict=True)
    words = state["model.bert.embeddings.word_embeddings.weight"]
    assert torch.equal(wrapper.model.cls.predictions.decoder.weight, words)


def test_a_state_dict_with_an_untied_decoder_is_refused():
    model = _model()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["cls.predictions.decoder.weight"][5] += 1
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder\.weight and bert\.embeddings.*differ"):
        model.load_state_dict(state)


def test_a_missing_source_of_a_tie_is_a_missing_key():
    model = _model()
    state = model.state_dict()
    del state["cls.predictions.bias"], state["cls.predictions.decoder.bias"]
    with pytest.raises(RuntimeError, match=r"cls\.predictions\.bias"):
        model.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------- masked rows


@pytest.mark.parametrize("cls", [BertForPreTraining, BertForMaskedLM])
def test_projecting_masked_rows_equals_projecting_all(cls):
    batch = _batch()
    if cls is BertForMaskedLM:
        del batch["next_sentence_label"]
    gathered, full = _model(cls), _model(cls)
    full.dense_sequence_output = False
    got, wanted = gathered(**batch), full(**batch)
    logits = "prediction_logits" if cls is BertForPreTraining else "logits"
    masked = batch["labels"] != -100
    assert getattr(wanted, logits).shape == (BATCH, LENGTH, SIZES["vocab_size"])
    assert getattr(got, logits).shape == (masked.sum(), SIZES["vocab_size"])
    torch.testing.assert_close(getattr(got, logits), getattr(wanted, logits)[masked])
    torch.testing.assert_close(got.loss, wanted.loss)
    got.loss.backward()
    wanted.loss.backward()
    _assert_same(_gradients(gathered), _gradients(full))


def test_masked_index_replaces_nonzero_and_may_be_padded():
    batch = _batch()
    index = (batch["labels"].reshape(-1) != -100).nonzero().squeeze(1)
    unlabelled = (batch["labels"].reshape(-1) == -100).nonzero()[0]
    padded = torch.cat([index, unlabelled.expand(9)])
    results = []
    for masked_index in (None, index, padded):
        model = _model()
        out = model(**batch, masked_index=masked_index)
        out.loss.backward()
        results.append((out, _gradients(model)))
    assert torch.equal(results[1][0].prediction_logits, results[0][0].prediction_logits)
    for out, gradients in results[1:]:
        torch.testing.assert_close(out.loss, results[0][0].loss)
        _assert_same(gradients, results[0][1])
    assert len(results[2][0].prediction_logits) == len(index) + 9


def test_with_masked_index_a_step_is_one_graph():
    """No part of the step waits for the device: torch.compile refuses to trace through such a place."""
    model, batch = _model(), _batch()
    index = (batch["labels"].reshape(-1) != -100).nonzero().squeeze(1)
    wanted = model(**batch).loss
    wanted.backward()
    gradients = _gradients(model)
    model.zero_grad()
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch, masked_index=index).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted)
    _assert_same(_gradients(model), gradients)


# ---------------------------------------------------------------------------------------------------- packed batches


def _packed(batch: dict[str, torch.Tensor], fillers: int = 0, surplus: int = 0) -> dict[str, object]:
    """The real tokens of a padded batch end to end, then ``fillers`` tokens as sequences of one, and two empty sequences."""
    lengths = batch["attention_mask"].sum(1)
    real = batch["attention_mask"].bool()
    ends = torch.cat([torch.zeros(1), lengths.cumsum(0), lengths.sum() + torch.arange(1, fillers + 1)])
    bounds = torch.cat([ends, ends[-1:].expand(2)]).int()
    places = torch.arange(real.shape[1]).expand(real.shape)
    values = {"input_ids": batch["input_ids"], "token_type_ids": batch["token_type_ids"], "position_ids": places}
    flat = {name: F.pad(value[real], (0, fillers)) for name, value in values.items()}
    labels = F.pad(batch["labels"][real], (0, fillers), value=-100)
    index = (labels != -100).nonzero().squeeze(1)
    unlabelled = (labels == -100).nonzero()[0]
    pairs = F.pad(batch["next_sentence_label"], (0, fillers + 2), value=-100)
    return flat | {
        "labels": labels,
        "masked_index": torch.cat([index, unlabelled.expand(surplus)]),
        "next_sentence_label": pairs,
        "cu_seqlens": bounds,
        "max_seqlen": real.shape[1],
    }


@pytest.mark.parametrize("cls", [BertForPreTraining, BertForMaskedLM])
@pytest.mark.parametrize("fused_loss", [False, True])
@pytest.mark.parametrize("fused_projections", [False, True])
@pytest.mark.parametrize(("fillers", "surplus"), [(0, 0), (3, 5)])
def test_a_packed_batch_equals_the_padded_one(cls, fused_loss, fused_projections, fillers, surplus):
    """Losses, logits and gradients; filler tokens and surplus rows change nothing."""
    batch = _batch()
    if cls is BertForMaskedLM:
        batch.pop("next_sentence_label")
    padded = _model(cls)
    wanted = padded(**batch)
    wanted.loss.backward()
    packed = _packed(batch | {"next_sentence_label": torch.zeros(BATCH).long()} | batch, fillers, surplus)
    if cls is BertForMaskedLM:
        packed.pop("next_sentence_label")
    model = _model(cls)
    model.fused_cross_entropy = fused_loss
    model.set_fused_projections(fused_projections)
    got = model(**packed)
    got.loss.backward()
    torch.testing.assert_close(got.loss, wanted.loss)
    _assert_same(_gradients(model), _gradients(padded), atol=2e-6)
    logits = wanted.prediction_logits if cls is BertForPreTraining else wanted.logits
    count = (batch["labels"] != -100).sum()
    if fused_loss:
        assert got.mlm_correct == (logits.argmax(-1) == batch["labels"][batch["labels"] != -100]).sum()
        assert (got.prediction_logits if cls is BertForPreTraining else got.logits) is None
    else:
        torch.testing.assert_close(
            (got.prediction_logits if cls is BertForPreTraining else got.logits)[:count], logits, rtol=1e-5, atol=1e-5
        )


def test_a_packed_batch_needs_no_masked_index_and_gives_whole_outputs():
    batch = _batch()
    packed = _packed(batch, fillers=2)
    index = packed.pop("masked_index")
    model = _model()
    torch.testing.assert_close(model(**packed).loss, model(**packed, masked_index=index).loss)
    hidden, pooled = model.bert(
        *(packed[name] for name in ("input_ids",)),
        **{name: packed[name] for name in ("token_type_ids", "position_ids", "cu_seqlens", "max_seqlen")},
    )
    full, first = model.bert(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(hidden[: int(real.sum())], full[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled[:BATCH], first, rtol=1e-5, atol=1e-5)


def test_packed_batches_of_any_shape_are_one_graph():
    """With every switch on, forward and backward of all sizes come from one trace: nothing is compiled again between steps."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = _model()
    model.fused_cross_entropy = True
    model.set_fused_projections()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for seed in range(5):
        packed = _packed(_batch(seed=seed), fillers=seed + 1, surplus=9 - seed)
        packed |= {"mlm_denominator": torch.tensor(20.0 + seed), "nsp_denominator": torch.tensor(6.0)}
        model.zero_grad()
        wanted = model(**packed).loss
        wanted.backward()
        gradients = _gradients(model)
        model.zero_grad()
        loss = compiled(**packed).loss
        loss.backward()
        torch.testing.assert_close(loss, wanted)
        _assert_same(_gradients(model), gradients)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_activation_checkpointing_of_packed_batches_repeats_the_dropout():
    batch = _packed(_batch(), fillers=2)
    results = []
    for enabled in (False, True):
        model = _model(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
        model.set_activation_checkpointing(enabled)
        torch.manual_seed(5)
        model(**batch).loss.backward()
        results.append(_gradients(model))
    _assert_same(*results)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.ones(2, 3).long()}, "must be \\[tokens\\]"),
        ({"position_ids": None}, "needs position_ids and max_seqlen"),
        ({"max_seqlen": None}, "needs position_ids and max_seqlen"),
        ({"attention_mask": torch.ones(5)}, "goes without attention_mask"),
        ({"max_seqlen": 33}, "max_position_embeddings is 32"),
    ],
)
def test_what_does_not_go_with_a_packed_batch_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        _model()(**(_packed(_batch()) | changes))


def test_masked_index_without_labels_picks_positions_to_predict():
    model, batch = _model(BertForMaskedLM).eval(), _batch()
    index = torch.tensor([3, LENGTH + 1, 5 * LENGTH])
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        everything = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, masked_index=index).logits, everything.flatten(0, 1)[index])


def test_rows_of_the_encoder_equal_the_same_rows_of_the_full_output():
    batch, rows = _batch(), torch.tensor([7, 0, 3 * LENGTH, 3 * LENGTH + 1])
    for pooling in (True, False):
        torch.manual_seed(0)
        model = BertModel(_config(), add_pooling_layer=pooling)
        full = model(batch["input_ids"], batch["attention_mask"])
        some = model(batch["input_ids"], batch["attention_mask"], rows=rows)
        torch.testing.assert_close(some.last_hidden_state, full.last_hidden_state.flatten(0, 1)[rows])
        if pooling:
            torch.testing.assert_close(some.pooler_output, full.pooler_output)
        else:
            assert some.pooler_output is None


def test_no_masked_token_gives_zero_loss_with_a_graph():
    for dense in (True, False):
        model, batch = _model(), _batch()
        model.dense_sequence_output = dense
        batch["labels"] = torch.full_like(batch["labels"], -100)
        out = model(**batch)
        assert out.mlm_loss.item() == 0.0
        torch.testing.assert_close(out.loss, out.nsp_loss)
        out.loss.backward()
        gradients = _gradients(model)  # every parameter has one: DDP does not wait for an unused head
        assert all(torch.isfinite(g).all() for g in gradients.values())
        assert torch.all(gradients["cls.predictions.transform.dense.weight"] == 0)
        assert gradients["cls.seq_relationship.weight"].abs().max() > 0


def test_losses_exist_for_the_labels_given():
    model, batch = _model(), _batch()
    both = model(**batch)
    torch.testing.assert_close(both.loss, both.mlm_loss + both.nsp_loss)
    nsp = batch.pop("next_sentence_label")
    mlm_only = model(**batch)
    assert mlm_only.nsp_loss is None
    torch.testing.assert_close(mlm_only.loss, both.mlm_loss)
    del batch["labels"]
    assert model(**batch).loss is None
    nsp_only = model(**batch, next_sentence_label=nsp)
    assert nsp_only.mlm_loss is None
    torch.testing.assert_close(nsp_only.loss, both.nsp_loss)
    assert nsp_only.prediction_logits.shape == (BATCH, LENGTH, SIZES["vocab_size"])


# ----------------------------------------------------------------------------------------------------------------- loss


def _reference(logits, labels):
    return F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [0, 1, 64, 150])
def test_row_wise_cross_entropy_equals_torchs(dtype, rows):
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, 2000, generator=generator) * 4).to(dtype)
    labels = torch.randint(0, 2000, (rows,), generator=generator)
    labels[::7] = -100
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, wanted = modeling.VocabularyCrossEntropy.apply(ours, labels), _reference(theirs, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted)
    (loss / 13).backward()
    (wanted / 13).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.all(ours.grad[::7] == 0)


def test_row_wise_cross_entropy_passes_a_numerical_gradient_check():
    logits = torch.randn(70, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    labels = torch.arange(70) % 5
    labels[3] = -100
    assert torch.autograd.gradcheck(modeling.VocabularyCrossEntropy.apply, (logits.requires_grad_(), labels))


def test_cutting_a_batch_gives_the_same_summed_loss_and_gradients():
    batch = _batch(batch=7)
    masked, sequences = (batch["labels"] != -100).sum(), 7
    per_sequence = (batch["labels"] != -100).sum(dim=1)
    assert len(per_sequence.unique()) > 2  # otherwise a mean of means would pass as well
    whole = _model()
    out = whole(**batch)
    out.loss.backward()
    pieces = _model()
    losses = []
    for piece in (slice(0, 1), slice(1, 4), slice(4, 7)):
        part = pieces(**{k: v[piece] for k, v in batch.items()}, mlm_denominator=masked, nsp_denominator=sequences)
        part.loss.backward()
        losses.append((part.mlm_loss.detach(), part.nsp_loss.detach()))
    torch.testing.assert_close(sum(mlm for mlm, _ in losses), out.mlm_loss.detach())
    torch.testing.assert_close(sum(nsp for _, nsp in losses), out.nsp_loss.detach())
    _assert_same(_gradients(pieces), _gradients(whole))


def test_losses_are_fp32_under_autocast_and_near_the_fp32_result():
    model, batch = _model(), _batch()
    exact = model(**batch)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**batch)
    assert out.prediction_logits.dtype == torch.bfloat16
    assert out.mlm_loss.dtype == out.nsp_loss.dtype == out.loss.dtype == torch.float32
    counted = batch["labels"][batch["labels"] != -100]
    torch.testing.assert_close(out.mlm_loss, _reference(out.prediction_logits, counted) / len(counted))
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    assert out.loss.item() != exact.loss.item()


def test_losses_of_a_bf16_model_are_fp32():
    batch = _batch()
    out = _model().to(torch.bfloat16)(**batch)
    assert out.seq_relationship_logits.dtype == torch.bfloat16
    assert out.mlm_loss.dtype == out.nsp_loss.dtype == torch.float32
    nsp = _reference(out.seq_relationship_logits, batch["next_sentence_label"]) / BATCH
    torch.testing.assert_close(out.nsp_loss, nsp)


# ------------------------------------------------------------------------------------------------------------ attention


def test_what_is_behind_the_mask_has_no_influence():
    model, batch = _model(BertModel).eval(), _batch()
    mask = batch["attention_mask"]
    other = torch.where(mask.bool(), batch["input_ids"], 77)
    with torch.no_grad():
        one = model(batch["input_ids"], mask).last_hidden_state
        two = model(other, mask).last_hidden_state
        unmasked = model(other).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(one[real], two[real])
    assert (two[real] - unmasked[real]).abs().max() > 1e-3


def test_a_mask_a_position_packs_two_sequences_in_one_row():
    model = _model(BertModel).eval()
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(1, 1200, (1, n), generator=generator) for n in (5, 8))
    packed = torch.cat([first, second, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    owner = torch.tensor([0] * 5 + [1] * 8 + [2] * 3)
    position_ids = torch.tensor([[*range(5), *range(8), *range(3)]])
    mask = ((owner[:, None] == owner) & (owner < 2))[None]  # the last three attend to nothing
    with torch.no_grad():
        out = model(packed, mask, position_ids=position_ids).last_hidden_state
        torch.testing.assert_close(out[:, :5], model(first).last_hidden_state)
        torch.testing.assert_close(out[:, 5:13], model(second).last_hidden_state)
    assert torch.isfinite(out).all()


def test_a_row_that_may_attend_to_nothing_attends_to_everything():
    """On the mask itself: some attention kernels (not those of a CPU) give NaN for a row that is False throughout."""
    mask = modeling._broadcast_mask(torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[[[True, True, False]]], [[[True, True, True]]]]
    mask = modeling._broadcast_mask(torch.tensor([[[1, 0], [0, 0]]]))
    assert mask.tolist() == [[[[True, False], [True, True]]]]
    assert modeling._broadcast_mask(None) is None


def test_a_sequence_of_padding_alone_stays_finite():
    model, batch = _model(), _batch()
    batch["attention_mask"][2] = 0
    batch["labels"][2] = -100
    out = model(**batch)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(g).all() for g in _gradients(model).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.ones(4, dtype=torch.long)}, r"\[4\].*\[batch, sequence\]"),
        ({"input_ids": torch.ones(2, 33, dtype=torch.long)}, "33 positions.*max_position_embeddings is 32"),
        (
            {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 1, 1, 4)},
            r"\[2, 1, 1, 4\]",
        ),
    ],
)
def test_wrong_shapes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        _model(BertModel)(**arguments)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("gelu_pytorch_tanh", lambda x: modeling.ACTIVATIONS["gelu_tanh"](x)),
        ("gelu_new", lambda x: modeling.ACTIVATIONS["gelu_tanh"](x)),
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
        ("swish", lambda x: x / (1 + torch.exp(-x))),
        ("tanh", lambda x: 2 / (1 + torch.exp(-2 * x)) - 1),
    ],
)
def test_activations(name, reference):
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(modeling.ACTIVATIONS[name](x), reference(x))


# --------------------------------------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("batch", "length"), [(6, 20), (3, 11), (5, 5)])
def test_activation_checkpointing_changes_no_gradient(batch, length, dropout, autocast):
    results = []
    for enabled in (False, True):
        model = _model(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        model.set_activation_checkpointing(enabled)
        calls = []
        model.bert.encoder.layer[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(11)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**_batch(batch, length)).loss
        loss.backward()
        results.append((loss.detach(), _gradients(model), len(calls)))
    assert [calls for *_, calls in results] == [1, 2]
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


def test_activation_checkpointing_can_be_switched_off():
    model = _model()
    model.set_activation_checkpointing(True)
    model.set_activation_checkpointing(False)
    assert model.bert.encoder.activation_checkpointing is False


def test_activation_checkpointing_under_ddp(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch without torch.distributed")
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, wrapped = _model(), _model()
        wrapped.set_activation_checkpointing(True)
        parallel = torch.nn.parallel.DistributedDataParallel(wrapped)
        batch = _batch()
        plain(**batch).loss.backward()
        parallel(**batch).loss.backward()
        _assert_same(_gradients(wrapped), _gradients(plain))
    finally:
        torch.distributed.destroy_process_group()


def test_dropout_acts_in_training_only():
    model, batch = _model(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2), _batch()
    assert model(**batch).loss.item() != model(**batch).loss.item()
    model.eval()
    assert model(**batch).loss.item() == model(**batch).loss.item()


# --------------------------------------------------------------------------------------------------------------- config


def test_padded_rounds_the_vocabulary_up_in_a_copy():
    config = _config(vocab_size=30522)
    assert (config.padded().vocab_size, config.padded(64).vocab_size, config.vocab_size) == (30528, 30528, 30522)
    assert config.padded(1) == config
    assert config.padded().padded() == config.padded()
    with pytest.raises(ValueError, match="multiple=0"):
        config.padded(0)


def test_every_problem_of_a_config_is_listed_at_once():
    values = {
        "vocab_size": 0,
        "hidden_size": 100,
        "num_attention_heads": 12,
        "intermediate_size": "3072",
        "hidden_act": "mish",
        "hidden_dropout_prob": 1.0,
        "layer_norm_eps": 0,
    }
    with pytest.raises(ValueError) as caught:
        BertConfig.from_dict(values)
    message = str(caught.value)
    for expected in (
        "7 problem(s)",
        "num_hidden_layers is missing",
        "vocab_size=0: must be an integer of at least 1",
        "hidden_size=100: must be divisible by num_attention_heads=12",
        "intermediate_size='3072': must be an integer",
        "hidden_act='mish': must be one of gelu, gelu_tanh",
        "hidden_dropout_prob=1.0: must be a number in [0, 1)",
        "layer_norm_eps=0: must be a finite number above 0",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2.0),
        ("type_vocab_size", 0),
        ("attention_probs_dropout_prob", -0.1),
        ("attention_probs_dropout_prob", float("nan")),
        ("attention_probs_dropout_prob", None),
        ("classifier_dropout", "0.1"),
        ("initializer_range", float("inf")),
        ("pad_token_id", 1200),
        ("hidden_act", ["gelu"]),
        ("problem_type", "ranking"),
        ("num_labels", 0),
    ],
)
def test_a_wrong_value_is_named_by_both_ways_to_make_a_config(key, value):
    with pytest.raises(ValueError, match=f"{key}=.*must be"):
        BertConfig(**(SIZES | {key: value}))
    with pytest.raises(ValueError, match=f"{key}=.*must be"):
        BertConfig.from_dict(SIZES | {key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "roberta"),
        ("is_decoder", True),
        ("position_embedding_type", "relative_key"),
        ("tie_word_embeddings", False),
    ],
)
def test_a_config_of_another_network_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{key}=.*nothing else is implemented"):
        BertConfig.from_dict(SIZES | {key: value})


def test_a_misspelt_key_is_refused_and_a_foreign_one_kept():
    with pytest.raises(ValueError, match=r"hidden_droput_prob=0\.0: unknown key, did you mean hidden_dropout_prob"):
        BertConfig.from_dict(SIZES | {"hidden_droput_prob": 0.0})
    foreign = {"architectures": ["BertForMaskedLM"], "transformers_version": "4.48.0", "eos_token_id": None}
    config = BertConfig.from_dict(SIZES | foreign)
    assert config == BertConfig(**SIZES)
    assert config.to_dict().items() >= foreign.items()
    assert BertConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()


def test_the_keys_of_published_configs_are_not_taken_for_misspellings():
    """Keys seen in the config files of Google, NVIDIA and Hugging Face checkpoints beside those of the network."""
    names = """_name_or_path attn_implementation bos_token_id chunk_size_feed_forward decoder_start_token_id
        directionality dtype embedding_size gradient_checkpointing is_encoder_decoder output_all_encoded_layers
        output_attentions output_hidden_states pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
        pooler_size_per_head pooler_type return_dict sep_token_id torch_dtype transformers_version use_cache"""
    extra = dict.fromkeys(names.split(), 0)
    assert dict(BertConfig.from_dict(SIZES | extra).extra) == extra


def test_label_names_set_the_number_of_labels_and_are_dropped_when_it_changes():
    names = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    config = BertConfig.from_dict(SIZES | names)
    assert config.num_labels == 3
    assert config.to_dict()["id2label"] == names["id2label"]
    assert "id2label" not in dataclasses.replace(config, num_labels=4).to_dict()


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _config().vocab_size = 5


@pytest.mark.parametrize("text", ['{"vocab_size": 1,}', "[1, 2]", '{"vocab_size": 8}'])
def test_a_bad_file_is_named(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.json: "):
        BertConfig.from_json_file(path)


# ---------------------------------------------------------------------------------------------------------- other heads


def test_question_answering_needs_two_columns():
    with pytest.raises(ValueError, match="num_labels=3"):
        modeling.BertForQuestionAnswering(_config(num_labels=3))


def test_question_answering_with_every_answer_cut_off_gives_zero():
    model, batch = _model(modeling.BertForQuestionAnswering), _batch()
    beyond = torch.full((BATCH,), LENGTH)
    loss = model(batch["input_ids"], start_positions=beyond, end_positions=beyond).loss
    loss.backward()
    assert loss.item() == 0.0


def test_regression_refuses_labels_of_another_shape():
    model, batch = _model(modeling.BertForSequenceClassification, num_labels=1), _batch()
    with pytest.raises(ValueError, match=r"\[3\].*regression needs \[6, 1\]"):
        model(batch["input_ids"], labels=torch.zeros(3))


def test_classifier_dropout_defaults_to_hidden_dropout():
    for name in ("BertForSequenceClassification", "BertForTokenClassification"):
        cls = getattr(modeling, name)
        assert cls(_config(hidden_dropout_prob=0.25)).dropout.p == 0.25
        assert cls(_config(hidden_dropout_prob=0.25, classifier_dropout=0.0)).dropout.p == 0.0
