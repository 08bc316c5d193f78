"""One optimizer step: the same for every cut of the global batch; skips what is not finite; evaluation against a plain loop."""

import copy
import datetime
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import modeling
import optimization
from berth.records.reader import SampleStream, open_index
from berth.training import parallel as parallel_module
from berth.training.backends import choose
from berth.training.batches import BatchPlan, MicroBatch
from berth.training.distributed import Communicator, Rank
from berth.training.evaluate import HeldOut
from berth.training.metrics import StepClock
from berth.training.parallel import Recipe, Replicated
from berth.training.precision import make_precision
from berth.training.step import MaskedLmTrainingStep, TrainingStep, count_correct
from tests.support import TINY, VOCAB_SIZE, make_project

CONFIG = modeling.BertConfig.from_dict({**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
ALONE = Communicator(Rank(), torch.device("cpu"), datetime.timedelta(seconds=1))


@pytest.fixture
def stream(tmp_path):
    return SampleStream(open_index(make_project(tmp_path) / "records", "training"), 3, VOCAB_SIZE)


def build(kind=modeling.BertForPreTraining, optimizer="lamb", precision="fp32", loss_scale=0.0, clip=1.0, fused=False, **spreading):
    torch.manual_seed(0)
    model = kind(CONFIG)
    model.fused_cross_entropy = fused
    choice = choose("berth", device=torch.device("cpu"), optimizer=optimizer, sharding="none", precision=precision)
    clock = StepClock(torch.device("cpu"))
    parallel = Replicated(model, ALONE, clock, Recipe(optimizer, 1e-2, 0.01, clip, choice), **spreading)
    schedule = optimization.make_schedule("poly", 1e-2, 0.1, 20)
    mode = make_precision(precision, "cpu", loss_scale, 2.0**10, 1.0)
    step_kind = TrainingStep if kind is modeling.BertForPreTraining else MaskedLmTrainingStep
    return model, step_kind(parallel, schedule, mode, clock, clip_norm=clip)


def run(step, stream, micro, accumulation, steps=3, unpad=False, few_shapes=False):
    plan = BatchPlan(24, micro, accumulation, 0, 1, unpad=unpad, few_shapes=few_shapes)
    results = []
    for number in range(steps):
        batch = plan.build(stream, number * 24)
        results.append(step(batch, number + 1, batch.masked, 24))
    return results


@pytest.mark.parametrize(("micro", "accumulation"), [(12, 2), (8, 3), (3, 8), (1, 24)])
@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_accumulation_is_one_big_batch(stream, micro, accumulation, optimizer):
    whole_model, whole = build(optimizer=optimizer)
    cut_model, cut = build(optimizer=optimizer)
    for one, other in zip(run(whole, stream, 24, 1), run(cut, stream, micro, accumulation), strict=True):
        assert float(one.mlm_loss) == pytest.approx(float(other.mlm_loss), abs=2e-6)
        assert float(one.nsp_loss) == pytest.approx(float(other.nsp_loss), abs=2e-6)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    for (name, a), b in zip(whole_model.named_parameters(), cut_model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=3e-6), name


KINDS = [modeling.BertForPreTraining, modeling.BertForMaskedLM]


@pytest.mark.parametrize(("few_shapes", "fused", "accumulation"), [(False, False, 1), (True, False, 4), (True, True, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_batches_give_the_losses_and_weights_of_padded_ones(stream, kind, few_shapes, fused, accumulation):
    """Losses, number of right predictions, norms of three steps, and the parameters after them."""
    padded_model, padded = build(kind)
    packed_model, packed = build(kind, fused=fused)
    for model in (padded_model, packed_model):  # it predicts what is often right
        model.cls.predictions.bias.data[frequent_label(stream)] = 0.5
    ours = run(packed, stream, 24 // accumulation, accumulation, unpad=True, few_shapes=few_shapes)
    for one, other in zip(run(padded, stream, 24, 1), ours, strict=True):
        assert float(one.mlm_loss) == pytest.approx(float(other.mlm_loss), abs=3e-6)
        assert float(one.nsp_loss) == pytest.approx(float(other.nsp_loss), abs=3e-6)
        assert int(one.mlm_correct) == int(other.mlm_correct)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    assert sum(int(result.mlm_correct) for result in ours)  # there is something to count
    for (name, a), b in zip(padded_model.named_parameters(), packed_model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=5e-6), name


def frequent_label(stream):
    rows = stream.rows(0, 72)
    return int(np.bincount(rows.masked_lm_ids[rows.masked_lm_positions > 0]).argmax())


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_results_of_a_step_stay_when_the_next_one_runs(stream, ahead):
    """Sums live in the step's own memory; what it hands out does not. The number of copies ahead changes nothing."""
    _, step = build()
    step.ahead = ahead
    plan = BatchPlan(24, 8, 3, 0, 1)
    batches = [plan.build(stream, 24 * number) for number in range(2)]
    first = step(batches[0], 1, batches[0].masked, 24)
    before = [float(first.mlm_loss), float(first.nsp_loss), int(first.mlm_correct)]
    step(batches[1], 2, batches[1].masked, 24)
    assert [float(first.mlm_loss), float(first.nsp_loss), int(first.mlm_correct)] == before
    assert before == [pytest.approx(value) for value in plain_first_step(stream)]


def plain_first_step(stream):
    """Losses and right predictions of a fresh model on the first 24 samples, in one plain pass."""
    model, _ = build()
    micro = BatchPlan(24, 24, 1, 0, 1).build(stream, 0).micro_batches[0].to(torch.device("cpu"))
    with torch.no_grad():
        out = model(input_ids=micro.input_ids, attention_mask=micro.attention_mask, token_type_ids=micro.token_type_ids)
    chosen = micro.labels != -100
    logits, labels = out.prediction_logits[chosen], micro.labels[chosen]
    losses = F.cross_entropy(logits, labels), F.cross_entropy(out.seq_relationship_logits, micro.next_sentence_label)
    return [*map(float, losses), int((logits.argmax(1) == labels).sum())]


class Guarded(torch.optim.SGD):
    """An optimizer that changes nothing when the norm it is given is not finite, and counts its calls."""

    guards_nonfinite = True
    max_grad_norm = 1.0

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.taken, self.launched, self.undone = 0, [], 0

    def step(self, grad_norm):
        self.launched.append(grad_norm)
        self.taken += 1
        if torch.isfinite(grad_norm):
            super().step()

    def undo_step(self):
        self.undone += 1
        self.taken -= 1


def test_a_guarded_optimizer_is_launched_before_the_norm_is_read(stream, monkeypatch):
    """And takes its count back when the norm is not finite; others never see such a norm."""
    model, step = build()
    optimizer = step.parallel.optimizer = Guarded(model.parameters(), lr=0.1)
    order = []
    read = parallel_module.Arriving.value
    monkeypatch.setattr(parallel_module.Arriving, "value", lambda self: (order.append(len(optimizer.launched)), read(self))[1])
    good = run(step, stream, 12, 2, steps=2)
    assert order == [1, 2] and optimizer.taken == 2 and not optimizer.undone
    assert [float(norm) for norm in optimizer.launched] == [result.grad_norm for result in good]
    before = [parameter.clone() for parameter in model.parameters()]
    hook = model.bert.embeddings.LayerNorm.weight.register_hook(lambda gradient: gradient * float("nan"))
    result = run(step, stream, 12, 2, steps=1)[0]
    hook.remove()
    assert result.skipped and result.nonfinite == [("bert.embeddings.LayerNorm.weight", "nan")]
    assert (optimizer.taken, optimizer.undone) == (2, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not run(step, stream, 12, 2, steps=1)[0].skipped and optimizer.taken == 3


def test_the_gradient_is_that_of_the_plain_mean(stream):
    """Independent of our own loss: one big forward with every position projected, cross-entropy by torch."""
    model, step = build(clip=0.0)
    reference = copy.deepcopy(model)
    batch = BatchPlan(24, 4, 6, 0, 1).build(stream, 0)
    seen = {}
    step.parallel.optimizer.step = lambda **_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    step(batch, 1, batch.masked, 24)
    reference.dense_sequence_output = False
    total_mlm, total_nsp = 0.0, 0.0
    for compact in batch.micro_batches:
        micro = compact.to(torch.device("cpu"))
        out = reference(input_ids=micro.input_ids, attention_mask=micro.attention_mask, token_type_ids=micro.token_type_ids)
        total_mlm = total_mlm + F.cross_entropy(
            out.prediction_logits.flatten(0, 1), micro.labels.flatten(), ignore_index=-100, reduction="sum"
        )
        total_nsp = total_nsp + F.cross_entropy(out.seq_relationship_logits, micro.next_sentence_label, reduction="sum")
    (total_mlm / batch.masked + total_nsp / 24).backward()
    for name, parameter in reference.named_parameters():
        assert torch.allclose(seen[name], parameter.grad, atol=2e-6), name


def test_static_loss_scale_changes_nothing(stream):
    plain_model, plain = build()
    scaled_model, scaled = build(loss_scale=4096.0)
    for one, other in zip(run(plain, stream, 12, 2), run(scaled, stream, 12, 2), strict=True):
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
    for a, b in zip(plain_model.parameters(), scaled_model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_a_gradient_that_is_not_finite_skips_the_update(stream, optimizer):
    model, step = build(optimizer=optimizer, precision="fp16")
    run(step, stream, 24, 1, steps=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = copy.deepcopy(step.parallel.optimizer.state_dict())
    scale = step.precision.scaler.scale
    hook = model.bert.embeddings.LayerNorm.weight.register_hook(lambda gradient: gradient * float("inf"))
    batch = BatchPlan(24, 24, 1, 0, 1).build(stream, 0)
    result = step(batch, 2, batch.masked, 24)
    hook.remove()
    assert result.skipped and not math.isfinite(result.grad_norm)
    assert result.nonfinite == [("bert.embeddings.LayerNorm.weight", "inf")]
    assert step.precision.scaler.scale == scale / 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    now = step.parallel.optimizer.state_dict()
    assert [g.get("step") for g in now["param_groups"]] == [g.get("step") for g in state["param_groups"]]
    for key, values in now["state"].items():
        assert all(torch.equal(values[name], state["state"][key][name]) for name in ("exp_avg", "exp_avg_sq"))
    assert not step(batch, 2, batch.masked, 24).skipped


def test_adamw_clips_to_the_norm(stream):
    seen = []
    model, step = build(optimizer="adamw", clip=0.01)
    original = step.parallel.optimizer.step
    step.parallel.optimizer.step = lambda: (
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))), original()
    )  # fmt: skip
    result = run(step, stream, 24, 1, steps=1)[0]
    assert result.grad_norm > 0.1 and seen == [pytest.approx(0.01, rel=1e-5)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_close(stream, precision):
    _, exact = build()
    _, low = build(precision=precision)
    for one, other in zip(run(exact, stream, 24, 1), run(low, stream, 24, 1), strict=True):
        assert not other.skipped
        assert float(other.mlm_loss) == pytest.approx(float(one.mlm_loss), rel=0.02)
    assert all(p.dtype == torch.float32 for p in low.parallel.plain.parameters())


def test_masked_lm_alone(stream):
    model, step = build(kind=modeling.BertForMaskedLM)
    results = run(step, stream, 12, 2)
    assert all(float(result.nsp_loss) == 0 and float(result.mlm_loss) > 0 for result in results)
    assert not any("pooler" in name or "seq_relationship" in name for name in model.state_dict())


def test_a_micro_batch_without_masks_does_no_harm(stream):
    model, step = build()
    rows = stream.rows(0, 24)
    rows.masked_lm_positions[:12] = 0

    class Fixed:
        index = stream.index

        def rows(self, first, count):
            return rows

    batch = BatchPlan(24, 12, 2, 0, 1, group_by_length=False).build(Fixed(), 0)
    assert len(batch.micro_batches[0].masked_index) == 0
    result = step(batch, 1, batch.masked, 24)
    assert not result.skipped and math.isfinite(float(result.mlm_loss))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_correct_tokens_are_those_with_the_largest_logit(stream):
    model, step = build()
    batch = BatchPlan(24, 8, 3, 0, 1).build(stream, 0)
    correct = 0
    with torch.no_grad():
        for compact in batch.micro_batches:
            micro = compact.to(torch.device("cpu"))
            logits = model(input_ids=micro.input_ids, attention_mask=micro.attention_mask, token_type_ids=micro.token_type_ids)
            picked = logits.prediction_logits[micro.labels != -100]
            correct += int((picked.argmax(-1) == micro.labels[micro.labels != -100]).sum())
    assert int(step(batch, 1, batch.masked, 24).mlm_correct) == correct


@pytest.mark.parametrize("every_position", [False, True])
def test_surplus_entries_are_never_counted(every_position):
    """Packed micro-batches round the masked index up with places whose label is -100; logits are of the picked rows or of all."""
    labels = torch.tensor([-100, 4, -100, 2, -100])
    micro = types.SimpleNamespace(labels=labels, masked_index=torch.tensor([1, 3, 0, 0]))
    logits = F.one_hot(torch.tensor([0, 4, 1, 3, 0]), 5).float()
    assert int(count_correct(logits if every_position else logits[micro.masked_index], micro, picked=not every_position)) == 1


@pytest.mark.parametrize("every_position", [False, True])
def test_as_many_labels_as_positions_are_told_from_logits_of_every_position(every_position):
    """M = T, the index not in order: shapes say nothing, the caller does."""
    labels, index = torch.tensor([3, -100, 2]), torch.tensor([0, 2, 1])
    logits = F.one_hot(torch.tensor([3, 0, 2]), 5).float()
    micro = types.SimpleNamespace(labels=labels, masked_index=index)
    assert int(count_correct(logits if every_position else logits[index], micro, picked=not every_position)) == 2


@pytest.mark.parametrize("dense", [False, True])
def test_a_step_knows_whether_its_model_picks_positions(dense):
    """A packed micro-batch of 16 tokens with 16 entries in its index: hits are those of the labels."""
    model, step = build()
    model.dense_sequence_output = dense
    ids, index = torch.arange(5, 21), torch.tensor([1, 15, *[0] * 14])
    labels = torch.full((16,), -100)
    micro = MicroBatch(
        ids, torch.zeros_like(ids), labels, torch.zeros(1, dtype=torch.int64), index, 2,
        position_ids=torch.arange(16), cu_seqlens=torch.tensor([0, 16], dtype=torch.int32), max_seqlen=16,
    )  # fmt: skip
    model.eval()
    with torch.no_grad():
        best = model(**micro.arguments()).prediction_logits.argmax(-1)
    labels[[1, 15]] = best[:2] if dense else best[[1, 15]]
    step._count(None, model(**micro.arguments()).prediction_logits, micro)
    assert int(step._losses.correct) == 2


def test_a_tie_is_decided_as_argmax_does():
    labels = torch.tensor([[0, 1, 2]])
    micro = types.SimpleNamespace(labels=labels, masked_index=torch.arange(3))
    assert int(count_correct(torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.5]]), micro, picked=True)) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_against_a_plain_loop(tmp_path, kind):
    index = open_index(make_project(tmp_path) / "records", "test")
    torch.manual_seed(0)
    model = kind(CONFIG)
    held_out = HeldOut(index, VOCAB_SIZE)
    result = held_out.evaluate(model, make_precision("fp32", "cpu", 0, 1, 1), ALONE, batch_size=7)
    rows = SampleStream(index, 0, VOCAB_SIZE, shuffle=False).rows(0, 40)
    loss = correct = count = nsp = 0
    labels_seen = []
    model.eval()
    with torch.no_grad():
        for row in range(40):
            size = int(rows.input_mask[row].sum())
            out = model(
                input_ids=torch.tensor(rows.input_ids[row : row + 1, :size]).long(),
                token_type_ids=torch.tensor(rows.segment_ids[row : row + 1, :size]).long(),
            )
            logits = (out.prediction_logits if hasattr(out, "prediction_logits") else out.logits)[0]
            for position, label in zip(rows.masked_lm_positions[row], rows.masked_lm_ids[row], strict=True):
                if position:
                    loss += float(F.cross_entropy(logits[position][None], torch.tensor([int(label)])))
                    correct += int(logits[position].argmax() == label)
                    count += 1
                    labels_seen.append(int(label))
            if kind is modeling.BertForPreTraining:
                nsp += int(out.seq_relationship_logits.argmax() == rows.next_sentence_labels[row])
    assert result.masked_tokens == count and result.sequences == 40
    assert result.mlm_loss == pytest.approx(loss / count, abs=1e-5) and result.mlm_accuracy == pytest.approx(correct / count)
    assert result.nsp_accuracy == pytest.approx(nsp / 40)
    text = []  # the rows as they were before masking, without [CLS] 2 and [SEP] 3
    for row in range(40):
        tokens = rows.input_ids[row, : int(rows.input_mask[row].sum())].tolist()
        for position, label in zip(rows.masked_lm_positions[row], rows.masked_lm_ids[row], strict=True):
            if position:
                tokens[position] = int(label)
        text += [token for token in tokens if token not in (2, 3)]
    shares = np.array([text.count(token) for token in set(text)]) / len(text)
    top = max(set(text), key=text.count)
    assert held_out.baselines.unigram_entropy == pytest.approx(-(shares * np.log(shares)).sum())
    assert held_out.baselines.most_frequent_token_accuracy == pytest.approx(labels_seen.count(top) / count)
    positive = rows.next_sentence_labels.mean()
    assert held_out.baselines.most_frequent_nsp_accuracy == pytest.approx(max(positive, 1 - positive))
