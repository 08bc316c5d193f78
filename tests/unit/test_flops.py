"""Arithmetic of a step: the published sizes, torch's own count of a real forward and backward pass, and the peaks of GPUs by their names."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import modeling
from berth.flops import peak_flops, step_flops
from tests.support import ROOT, TINY, VOCAB_SIZE


@pytest.mark.parametrize(
    ("length", "masked", "encoder", "attention", "heads", "whole"),
    [(128, 20, 231.9, 4.8, 3.9, 240.6), (512, 80, 927.7, 77.3, 15.5, 1020.5)],
)
def test_a_sequence_of_bert_large(length, masked, encoder, attention, heads, whole):
    large = modeling.BertConfig.from_json_file(ROOT / "bert_configs" / "large.json")

    def giga(**numbers):
        return round(step_flops(large, **{"tokens": 0, "squares": 0, "masked": 0, "pairs": 0, **numbers}) / 1e9, 1)

    assert giga(tokens=length) == encoder and giga(squares=length**2) == attention and giga(masked=masked, pairs=1) == heads
    assert giga(tokens=length, squares=length**2, masked=masked, pairs=1) == whole


@pytest.mark.parametrize("kind", [modeling.BertForPreTraining, modeling.BertForMaskedLM])
def test_what_torch_counts(kind):
    """A model that projects every position does all that is counted; the sizes differ from each other."""
    config = modeling.BertConfig.from_dict({**TINY, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3})
    model = kind(config, dense_sequence_output=False)
    ids = torch.randint(5, VOCAB_SIZE, (3, 16))
    labels, pairs = {"labels": ids}, 0
    if kind is modeling.BertForPreTraining:
        labels, pairs = {"labels": ids, "next_sentence_label": torch.tensor([0, 1, 1])}, 3
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, **labels).loss.backward()
    assert step_flops(config, tokens=48, squares=3 * 16**2, masked=48, pairs=pairs) == counter.get_total_flops()


NAMES = [
    ("Tesla V100-SXM2-32GB", 15.7, None, None, 125.0),
    ("Tesla V100-PCIE-16GB", 14.0, None, None, 112.0),
    ("Tesla T4", 8.1, None, None, 65.0),
    ("NVIDIA A100-SXM4-80GB", 19.5, 156.0, 312.0, 312.0),
    ("NVIDIA A100 80GB PCIe", 19.5, 156.0, 312.0, 312.0),
    ("A100-PCIE-40GB", 19.5, 156.0, 312.0, 312.0),
    ("NVIDIA A10", 31.2, 62.5, 125.0, 125.0),
    ("NVIDIA L40S", 91.6, 183.0, 362.0, 362.0),
    ("NVIDIA L4", 30.3, 60.0, 121.0, 121.0),
    ("NVIDIA RTX A6000", 38.7, 77.4, 154.8, 154.8),
    ("NVIDIA H100 80GB HBM3", 67.0, 494.5, 989.5, 989.5),
    ("NVIDIA H100 PCIe", 51.0, 378.0, 756.5, 756.5),
    ("NVIDIA H100 NVL", 60.0, 417.5, 835.5, 835.5),
    ("NVIDIA H200", 67.0, 494.5, 989.5, 989.5),
    ("NVIDIA H200 NVL", 60.0, 417.5, 835.5, 835.5),
    ("NVIDIA GH200 480GB", 67.0, 494.5, 989.5, 989.5),
    ("NVIDIA B200", 75.0, 1125.0, 2250.0, 2250.0),
    ("NVIDIA GB200", 80.0, 1250.0, 2500.0, 2500.0),
    ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None, None, None, None),
    ("NVIDIA A10G", None, None, None, None),  # cut down from the A10
    ("NVIDIA H100 64GB", None, None, None, None),  # which of them is not said
    ("NVIDIA H20", None, None, None, None),
    ("AMD EPYC 7763", None, None, None, None),
]


@pytest.mark.parametrize(("name", "fp32", "tf32", "bf16", "fp16"), NAMES, ids=[row[0] for row in NAMES])
def test_peaks_by_device_name(name, fp32, tf32, bf16, fp16):
    found = {precision: peak_flops(name, precision) for precision in ("fp32", "tf32", "bf16", "fp16")}
    wanted = {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": fp16}
    assert found == {precision: None if value is None else pytest.approx(value * 1e12) for precision, value in wanted.items()}


@pytest.mark.parametrize(
    ("name", "fp8"), [("NVIDIA H200", 1979.0), ("NVIDIA L40S", 724.0), ("NVIDIA A100-SXM4-80GB", None), ("NVIDIA A40", None)]
)
def test_fp8_is_twice_as_fast_where_there_is_any(name, fp8):
    peak = peak_flops(name, "fp8")
    assert peak == (None if fp8 is None else pytest.approx(fp8 * 1e12))
