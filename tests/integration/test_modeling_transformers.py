"""modeling.py against the installed ``transformers``: same names, same numbers, gradients of every parameter included.

fp32, tiny sizes, dropout 0 unless a test says otherwise. The vocabulary is wide enough for the row-wise cross-entropy.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import modeling

VOCAB, HIDDEN, LAYERS, HEADS, INNER, LENGTH = 1031, 32, 3, 4, 64, 24
LABELS = {
    "BertForSequenceClassification": 3,
    "BertForTokenClassification": 5,
}
HEAD_NAMES = [
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
]
TOLERANCE = 1e-5


def _config_values(hidden_act: str = "gelu", **changes):
    values = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "hidden_act": hidden_act,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 40,
        "initializer_range": 0.1,  # far from uniform outputs, so that a wrong order of rows shows
    }
    return values | changes


def _pair(name: str, **changes):
    """The two models with the weights of ``transformers``' one, all of them random (biases and LayerNorm too)."""
    values = _config_values(**({"num_labels": LABELS[name]} if name in LABELS else {}) | changes)
    torch.manual_seed(7)
    theirs = getattr(transformers, name)(transformers.BertConfig(**values))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = getattr(modeling, name)(modeling.BertConfig.from_dict(values))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def _batch(batch: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(1, VOCAB, (batch, LENGTH), generator=generator)
    lengths = torch.tensor([LENGTH, 9, 17, 3, 20])[:batch]
    attention_mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    token_type_ids = (torch.arange(LENGTH) >= lengths[:, None] // 2).long() * attention_mask
    return {
        "input_ids": input_ids * attention_mask,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
    }


def _mlm_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    picked = torch.rand(batch["input_ids"].shape, generator=generator) < 0.3
    return torch.where(picked & batch["attention_mask"].bool(), batch["input_ids"], -100)


def _labels_for(name: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if name == "BertForPreTraining":
        return {"labels": _mlm_labels(batch), "next_sentence_label": torch.tensor([0, 1, 1, 0, 1])}
    if name == "BertForMaskedLM":
        return {"labels": _mlm_labels(batch)}
    if name == "BertForQuestionAnswering":
        start, end = torch.tensor([1, 4, LENGTH + 3, 0, 11]), torch.tensor([3, -2, 9, LENGTH, 12])
        return {"start_positions": start, "end_positions": end}
    if name == "BertForSequenceClassification":
        return {"labels": torch.tensor([2, 0, 1, 1, 2])}
    if name == "BertForTokenClassification":
        return {"labels": torch.where(batch["attention_mask"].bool(), batch["input_ids"] % 5, -100)}
    return {}


def _close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text: f"{what}: {text}")


def _compare_gradients(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    wanted = dict(theirs.named_parameters())
    got = dict(ours.named_parameters())
    assert got.keys() == wanted.keys()
    for name, parameter in wanted.items():
        if parameter.grad is None:
            assert got[name].grad is None, name
        else:
            _close(got[name].grad, parameter.grad, f"gradient of {name}")


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_state_dict_names_and_shapes_are_those_of_transformers(name):
    ours, theirs = _pair(name)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert [k for k, _ in ours.named_buffers()] == []


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_weights_load_strictly_in_both_directions(name):
    ours, theirs = _pair(name)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for key, value in ours.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], value), key


@pytest.mark.parametrize("name", HEAD_NAMES)
@pytest.mark.parametrize("inputs", ["ids", "mask", "mask+types", "mask+types+positions"])
def test_outputs_without_labels_agree(name, inputs):
    ours, theirs = _pair(name)
    batch = _batch()
    kept = {"ids": 1, "mask": 2}.get(inputs, 3)
    batch = dict(list(batch.items())[:kept])
    if "positions" in inputs:
        batch["position_ids"] = torch.arange(LENGTH).flip(0).expand(5, -1) + 2
    ours.eval(), theirs.eval()
    with torch.no_grad():
        got, wanted = ours(**batch), theirs(**batch)
    compared = 0
    for field in wanted.keys():  # noqa: SIM118 - a ModelOutput
        _close(getattr(got, field), wanted[field], field)
        compared += 1
    assert compared >= 1
    assert getattr(got, "loss", None) is None


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", HEAD_NAMES[1:])
def test_losses_and_every_gradient_agree(name, mode, hidden_act):
    ours, theirs = _pair(name, hidden_act=hidden_act)
    batch = _batch()
    labels = _labels_for(name, batch)
    ours.train(mode == "train"), theirs.train(mode == "train")
    got, wanted = ours(**batch, **labels), theirs(**batch, **labels)
    _close(got.loss, wanted.loss, "loss")
    if name in ("BertForPreTraining", "BertForMaskedLM"):
        full = wanted.prediction_logits if name == "BertForPreTraining" else wanted.logits
        picked = got.prediction_logits if name == "BertForPreTraining" else got.logits
        _close(picked, full[labels["labels"] != -100], "logits of the masked positions")
    got.loss.backward()
    wanted.loss.backward()
    _compare_gradients(ours, theirs)


def test_gradients_agree_with_every_position_projected():
    ours, theirs = _pair("BertForPreTraining")
    ours.dense_sequence_output = False
    batch = _batch()
    labels = _labels_for("BertForPreTraining", batch)
    got, wanted = ours(**batch, **labels), theirs(**batch, **labels)
    _close(got.prediction_logits, wanted.prediction_logits, "prediction_logits")
    got.loss.backward()
    wanted.loss.backward()
    _compare_gradients(ours, theirs)


def test_the_two_gelus_differ_so_the_parameter_above_means_something():
    batch = _batch()
    erf, _ = _pair("BertForMaskedLM", hidden_act="gelu")
    tanh, _ = _pair("BertForMaskedLM", hidden_act="gelu_pytorch_tanh")
    tanh.load_state_dict(erf.state_dict())
    with torch.no_grad():
        assert (erf.eval()(**batch).logits - tanh.eval()(**batch).logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (1, None, torch.tensor([0.3, -1.0, 2.0, 0.0, 5.0])),
        (1, "regression", torch.tensor([[0.3], [-1.0], [2.0], [0.0], [5.0]])),
        (2, "regression", torch.tensor([[0.3, 1], [-1.0, 1], [2.0, 0], [0.0, 1], [5.0, 2]])),
        (4, None, torch.tensor([3, 0, 1, 2, 3])),
        (4, None, torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0], [1, 0, 0, 0]])),
        (2, "multi_label_classification", torch.tensor([[1.0, 0], [0, 0], [1, 1], [0, 1], [1, 0]])),
        (2, "single_label_classification", torch.tensor([1, 0, 1, 1, 0])),
    ],
)
def test_sequence_classification_chooses_the_loss_of_transformers(num_labels, problem_type, labels):
    ours, theirs = _pair("BertForSequenceClassification", num_labels=num_labels, problem_type=problem_type)
    batch = _batch()
    got, wanted = ours(**batch, labels=labels), theirs(**batch, labels=labels)
    _close(got.loss, wanted.loss, "loss")
    got.loss.backward()
    wanted.loss.backward()
    _compare_gradients(ours, theirs)


def test_a_config_written_by_transformers_comes_back_unchanged(tmp_path):
    theirs = transformers.BertConfig(**_config_values(num_labels=7, hidden_act="gelu_new"))
    theirs.save_pretrained(tmp_path)
    ours = modeling.BertConfig.from_json_file(tmp_path / "config.json")
    assert (ours.num_labels, ours.hidden_act, ours.layer_norm_eps) == (7, "gelu_new", 1e-12)
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.json").write_text(ours.to_json_string(), encoding="utf-8")
    restored = transformers.BertConfig.from_pretrained(again).to_dict()
    assert restored == theirs.to_dict() | {"architectures": restored["architectures"]}
    assert json.loads(ours.to_json_string())["model_type"] == "bert"


def test_a_checkpoint_saved_by_transformers_loads_without_its_tied_keys(tmp_path):
    from safetensors.torch import load_file

    ours, theirs = _pair("BertForPreTraining")
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "cls.predictions.decoder.weight" not in state
    fresh = modeling.BertForPreTraining(ours.config)
    fresh.load_state_dict(state, strict=True)
    batch = _batch()
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**batch).prediction_logits, ours.eval()(**batch).prediction_logits)
