"""Names, vocabulary rows and the account of what a file fills: berth.export.names, layout and match."""

import pytest
import torch

from berth.errors import CheckpointError, ConfigError
from berth.export.layout import is_padded_size, pretraining_shapes, resize_tied, resize_vocabulary, round_up
from berth.export.match import match_weights
from berth.export.names import DECODER_BIAS, DECODER_WEIGHT, WORD_EMBEDDINGS, canonical_name, canonical_names, is_nvidia

CONFIG = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
          "max_position_embeddings": 12}  # fmt: skip


def random_weights(**changes):
    generator = torch.Generator().manual_seed(0)
    shapes = pretraining_shapes({**CONFIG, **changes})
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights[DECODER_WEIGHT] = weights[WORD_EMBEDDINGS]
    weights[DECODER_BIAS] = weights["cls.predictions.bias"]
    return weights


@pytest.mark.parametrize(
    "name,expected",
    [
        ("bert.pooler.dense.weight", "bert.pooler.dense.weight"),
        ("module.bert.pooler.dense_act.bias", "bert.pooler.dense.bias"),
        ("wrapper_.bert.encoder.layer.3.intermediate.dense_act.weight", "bert.encoder.layer.3.intermediate.dense.weight"),
        ("model_.module._orig_mod.cls.predictions.transform.dense_act.bias", "cls.predictions.transform.dense.bias"),
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("bert.encoder.layer.0.output.LayerNorm.beta", "bert.encoder.layer.0.output.LayerNorm.bias"),
        ("encoder.layer.0.output.dense.bias", "bert.encoder.layer.0.output.dense.bias"),
        ("embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings.weight"),
        ("classifier.weight", "classifier.weight"),
        ("bert.embeddings.position_ids", None),
        ("Moment_1_bert.pooler.dense.weight", None),
        ("Update_Count", None),
        ("Step", None),
        ("bert.pooler.dense.weight_fp16", None),
    ],
)
def test_canonical_names(name, expected):
    assert canonical_name(name) == expected
    if expected:
        assert canonical_name(expected) == expected


def test_two_tensors_of_one_name_are_refused():
    with pytest.raises(CheckpointError, match=r"'module\.bert\.x' and 'bert\.x' are both 'bert\.x'"):
        canonical_names({"module.bert.x": 1, "bert.x": 2})


def test_nvidia_is_known_by_its_activated_layers():
    assert is_nvidia(["bert.pooler.dense_act.weight"]) and not is_nvidia(["bert.pooler.dense.weight"])


@pytest.mark.parametrize("padded,size,expected", [
    (30528, 30522, True), (30592, 30522, True), (30522, 30522, True), (30528, 30520, True),
    (30529, 30522, False), (32000, 30522, False), (30522, 30528, False), (28999, 28996, False),
])  # fmt: skip
def test_what_counts_as_padding(padded, size, expected):
    assert is_padded_size(padded, size) is expected
    assert round_up(30522, 8) == 30528 and round_up(8, 8) == 8 and round_up(7, 1) == 7


def test_added_rows_are_copies_of_row_zero_and_ties_stay():
    tensor = torch.arange(6.0).reshape(3, 2)
    assert resize_vocabulary(tensor, 5).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [0, 1]]
    assert resize_vocabulary(tensor, 2).tolist() == [[0, 1], [2, 3]]
    assert resize_vocabulary(torch.tensor([7.0, 8.0]), 3).tolist() == [7, 8, 7]
    resized = resize_tied(random_weights(), 32)
    assert resized[DECODER_WEIGHT] is resized[WORD_EMBEDDINGS] and resized[WORD_EMBEDDINGS].shape == (32, 8)


def test_a_config_without_sizes_is_refused():
    with pytest.raises(ConfigError, match="hidden_size='8', num_hidden_layers=None; each must be a whole number"):
        pretraining_shapes({key: CONFIG[key] for key in CONFIG if key != "num_hidden_layers"} | {"hidden_size": "8"})


def test_a_full_match_is_complete_and_in_the_order_of_the_model():
    weights = random_weights()
    report = match_weights(pretraining_shapes(CONFIG), dict(reversed(weights.items())))
    assert report.complete and list(report.weights) == list(weights) and len(report.matched) == len(weights)
    assert all(torch.equal(report.weights[name], tensor) for name, tensor in weights.items())
    assert str(report) == f"{len(weights)} of {len(weights)} tensors matched"


@pytest.mark.parametrize("dropped", [[DECODER_WEIGHT, DECODER_BIAS], [WORD_EMBEDDINGS], [DECODER_BIAS]])
def test_tied_tensors_may_be_stored_once(dropped):
    weights = random_weights()
    report = match_weights(pretraining_shapes(CONFIG), {k: v for k, v in weights.items() if k not in dropped})
    assert report.complete and report.unexpected == ()
    assert report.weights[DECODER_WEIGHT] is report.weights[WORD_EMBEDDINGS]


def test_untied_tensors_are_refused():
    weights = random_weights()
    weights[DECODER_WEIGHT] = weights[DECODER_WEIGHT] + 1
    with pytest.raises(CheckpointError, match="untied embeddings"):
        match_weights(pretraining_shapes(CONFIG), weights)


@pytest.mark.parametrize("here,there", [(32, 30), (30, 32), (64, 30)])
def test_padding_is_added_and_removed(here, there):
    weights = random_weights(vocab_size=there)
    report = match_weights(pretraining_shapes({**CONFIG, "vocab_size": here}), weights)
    assert report.complete and f"vocabulary of {there} rows made {here}" in str(report)
    for name in (WORD_EMBEDDINGS, DECODER_BIAS):
        common = min(here, there)
        assert torch.equal(report.weights[name][:common], weights[name][:common])
        assert all(torch.equal(row, weights[name][0]) for row in report.weights[name][common:])
    assert report.weights[DECODER_WEIGHT] is report.weights[WORD_EMBEDDINGS]


def test_another_vocabulary_or_size_is_a_mismatch():
    report = match_weights(pretraining_shapes(CONFIG), random_weights(vocab_size=33, intermediate_size=24))
    assert not report.complete and not set(report.weights) & {WORD_EMBEDDINGS, DECODER_BIAS}
    assert "bert.embeddings.word_embeddings.weight: [33, 8] in the file, [30, 8] in the model" in report.mismatched
    assert "10 of another shape" in str(report)  # 4 of the vocabulary, 3 of each layer's two


def test_missing_and_unexpected_tensors_are_named():
    weights = random_weights()
    masked_lm = pretraining_shapes(CONFIG, next_sentence=False)
    report = match_weights(masked_lm, weights)  # a model without NSP from a file with it
    assert report.complete and len(report.unexpected) == 4
    assert "4 not used: bert.pooler.dense.weight" in str(report)
    report = match_weights(pretraining_shapes(CONFIG), {name: weights[name] for name in masked_lm})
    assert not report.complete and set(report.missing) == set(weights) - set(masked_lm)
    assert "4 missing: bert.pooler.dense.weight" in str(report)
    report = match_weights(pretraining_shapes(CONFIG), {"bert.x": weights[WORD_EMBEDDINGS]})
    assert f"{len(weights)} missing" in str(report) and f"and {len(weights) - 4} more" in str(report)


def test_encoder_only_files_and_models():
    weights = random_weights()
    bare = {k.removeprefix("bert."): v for k, v in weights.items() if k.startswith("bert.")}
    report = match_weights(pretraining_shapes(CONFIG), bare)
    assert report.unexpected == () and all(name.startswith("cls.") for name in report.missing)
    report = match_weights({name: tensor.shape for name, tensor in bare.items()}, weights)
    assert report.complete and list(report.weights) == list(bare)
