"""Which parts of the fast path are taken: by default what works here, by name what was asked for or an error, and off where it is off."""

import dataclasses

import pytest
import torch

import modeling
from berth.errors import ConfigError
from berth.kernels import attention, cross_entropy, fp8
from berth.training import compiled, fastpath, graphs
from berth.training.fastpath import FastPath, decide
from berth.training.options import parse_options
from tests.support import make_project

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def config(tmp_path) -> modeling.BertConfig:
    make_project(tmp_path)
    return modeling.BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


@pytest.fixture
def chosen(tmp_path, config):
    def choose(*words: str, device=CPU, world=1, sharding="none", config=config) -> FastPath:
        options = parse_options(["--input_dir", "r", "--config_file", __file__, "--output_dir", str(tmp_path / "out"), *words])
        return decide(options, config, device, world, sharding)

    return choose


@pytest.fixture
def every_kernel_works(monkeypatch):
    """A GPU on which all probes pass; no probe runs."""
    monkeypatch.setattr(
        attention, "unsupported", lambda device, dtype, size: None if dtype.itemsize == 2 else "flash attention needs 16 bits"
    )
    for module in (cross_entropy, fp8, compiled):
        monkeypatch.setattr(module, "unsupported", lambda *_: None)
    monkeypatch.setattr(graphs, "obstacle", lambda sharding, device, checkpointing=False: None if sharding == "none" else sharding)


def test_on_a_cpu_batches_are_packed_and_nothing_is_compiled(chosen):
    fast = chosen()
    assert fast == FastPath(unpad=True, fused_cross_entropy=True, fast_dropout=True)
    assert any(reason.startswith("compilation off: ") for reason in fast.reasons)


def test_every_part_has_an_off_position(chosen, every_kernel_works):
    off = ("--unpad", "off", "--compile", "off", "--fused_loss", "off", "--fused_qkv", "off", "--fast_dropout", "off", "--no_copy_ahead")
    for device in (CPU, GPU):
        fast = chosen(*off, "--precision", "bf16", device=device)
        assert fast == FastPath()
        assert [reason.partition(": ")[2] for reason in fast.reasons] == [
            "--unpad off",
            "--fused_loss off",
            "--fused_qkv off",
            "--compile off",
            "--fast_dropout off",
            "--no_copy_ahead",
        ]


def test_on_a_gpu_everything_but_graphs_is_on(chosen, every_kernel_works):
    fast = chosen("--precision", "bf16", device=GPU)
    assert fast == FastPath(True, "model", False, True, True, False, 1)
    assert chosen("--precision", "bf16", "--cuda_graphs", device=GPU).cuda_graphs
    assert chosen("--precision", "bf16", device=GPU, world=2).compiled == "layers"
    assert not chosen("--compile", "layers").fast_dropout  # compiled layers draw their own
    with pytest.raises(ConfigError, match="--fast_dropout on: it is for CPUs"):
        chosen("--fast_dropout", "on", device=GPU)
    fast = chosen("--precision", "fp8", device=GPU)
    assert fast == FastPath(True, "model", False, True, False, True, 1)
    assert "fp8: 12 of 12 linear layers of the encoder" in fast.reasons and "copies ahead" in fast.reasons


def test_fp8_that_would_convert_nothing_is_refused(chosen, every_kernel_works, config):
    """Sizes that are no multiples of 16: none is an error that names them, some are counted."""
    config = dataclasses.replace(config, intermediate_size=72)
    assert "fp8: 8 of 12 linear layers of the encoder" in chosen("--precision", "fp8", device=GPU, config=config).reasons
    config = dataclasses.replace(config, hidden_size=40)
    with pytest.raises(ConfigError, match="multiples of 16.* hidden_size 40 and intermediate_size 72 .*--precision bf16"):
        chosen("--precision", "fp8", device=GPU, config=config)


@pytest.mark.parametrize(
    ("words", "sharding", "fix"),
    [
        (("--precision", "fp8", "--deepspeed"), "deepspeed", "leave --deepspeed out, or use --precision bf16"),
        (("--precision", "fp8", "--fused_qkv", "on"), "none", "--fused_qkv auto goes on without"),
        (("--fused_loss", "on", "--deepspeed"), "deepspeed", "--fused_loss auto goes on without"),
        (("--compile", "layers", "--deepspeed"), "deepspeed", "--compile auto goes on without"),
        (("--precision", "tf32", "--unpad", "on"), "none", "--unpad auto goes on without"),
    ],
)
def test_what_is_refused_comes_with_a_way_out(chosen, every_kernel_works, words, sharding, fix):
    with pytest.raises(ConfigError, match=fix):
        chosen(*words, device=GPU, world=1 if sharding == "none" else 2, sharding=sharding)


def test_fp32_on_a_gpu_is_padded_and_says_why(chosen, every_kernel_works):
    fast = chosen("--precision", "tf32", device=GPU)
    assert not fast.unpad and "packed batches off: flash attention needs 16 bits" in fast.reasons
    with pytest.raises(ConfigError, match="--unpad on: flash attention needs 16 bits"):
        chosen("--precision", "tf32", "--unpad", "on", device=GPU)


def test_deepspeed_gets_packed_batches_only(chosen, every_kernel_works):
    """Its engine gathers parameters and counts passes by the modules that are called."""
    fast = chosen("--precision", "bf16", "--deepspeed", device=GPU, world=2, sharding="deepspeed")
    assert fast == FastPath(unpad=True, copies_ahead=1)
    for words in (("--compile", "layers"), ("--fused_loss", "on"), ("--fused_qkv", "on"), ("--cuda_graphs",)):
        with pytest.raises(ConfigError, match=words[0]):
            chosen("--deepspeed", *words, device=GPU, world=2, sharding="deepspeed")


@pytest.mark.parametrize(
    ("words", "world", "message"),
    [
        (("--cuda_graphs",), 1, "--cuda_graphs: CUDA graphs need a GPU"),
        (("--compile", "model"), 2, "--compile model: with several processes .* --compile layers"),
    ],
)
def test_what_cannot_be_had_is_named(chosen, words, world, message, monkeypatch):
    monkeypatch.setattr(compiled, "unsupported", lambda device: None)
    with pytest.raises(ConfigError, match=message):
        chosen(*words, world=world)


def test_compilation_without_a_compiler_is_an_error_only_where_it_was_asked_for(chosen, monkeypatch, every_kernel_works):
    monkeypatch.setattr(compiled, "unsupported", lambda device: "no compiler is there")
    assert chosen(device=GPU, world=1).compiled == "off"
    with pytest.raises(ConfigError, match="--compile layers: no compiler is there"):
        chosen("--compile", "layers")


@pytest.mark.parametrize("sharding", ["zero2", "zero3", "deepspeed"])
def test_fp8_is_refused_where_weights_are_in_pieces(chosen, sharding):
    with pytest.raises(ConfigError, match="--precision fp8"):
        chosen("--precision", "fp8", world=2, sharding=sharding)


def test_graphs_that_would_hardly_replay_are_refused(chosen, every_kernel_works):
    """Padded batches differ in width; on several processes the last micro-batch of a step is never recorded."""
    several = ("--train_batch_size", "8", "--gradient_accumulation_steps")
    for words in (("--unpad", "off"), ("--precision", "tf32")):
        with pytest.raises(ConfigError, match=r"--cuda_graphs: padded batches .*\(--unpad\)"):
            chosen("--precision", "bf16", "--cuda_graphs", *words, device=GPU)
    with pytest.raises(ConfigError, match=r"--cuda_graphs: with several processes .*--gradient_accumulation_steps 1 .*raise it"):
        chosen("--precision", "bf16", "--cuda_graphs", *several, "1", device=GPU, world=2)
    for accumulation, world in (("1", 1), ("2", 2)):
        assert chosen("--precision", "bf16", "--cuda_graphs", *several, accumulation, device=GPU, world=world).cuda_graphs


def test_kernels_that_fall_back_are_mentioned(chosen, monkeypatch):
    monkeypatch.setattr(cross_entropy, "unsupported", lambda device, kind: "no Triton")
    assert "fused loss in plain torch: no Triton" in chosen().reasons


def test_ranks_compare_what_is_computed_and_not_why(chosen):
    fast = chosen()
    assert dataclasses.replace(fast, reasons=()).name == fast.name
    assert dataclasses.replace(fast, unpad=False).name != fast.name


def test_the_switches_reach_the_model(config):
    model = modeling.BertForPreTraining(config)
    FastPath(fused_cross_entropy=True, fused_projections=True).prepare(model)
    assert model.fused_cross_entropy
    assert all(layer.attention.self.fused_projections for layer in model.bert.encoder.layer)
    FastPath(fp8=True).prepare(model)
    assert not model.fused_cross_entropy and any(isinstance(module, fp8.Fp8Linear) for module in model.modules())


def test_attention_gets_what_the_products_give():
    kinds = {name: fastpath.attention_type(name) for name in ("fp32", "tf32", "bf16", "fp16", "fp8")}
    assert kinds == {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
