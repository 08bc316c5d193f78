"""Identity of a run, its state, and seeds."""

import logging

import pytest

from berth.errors import CheckpointError, ConfigError
from berth.training.options import parse_options
from berth.training.state import RunState, check_identity, identity, step_seed


@pytest.fixture
def make(tmp_path):
    (tmp_path / "c.json").write_text("{}")

    def build(*words, config=None, world=2, data="d", vocab="v"):
        options = parse_options(["--input_dir", "d", "--config_file", str(tmp_path / "c.json"), "--output_dir", "o", *words])
        return identity(options, config or {"hidden_size": 8}, world, data, vocab)

    return build


def test_world_size_and_accumulation_are_free(make):
    one = make("--train_batch_size", "64", "--gradient_accumulation_steps", "4", world=1)
    four = make("--train_batch_size", "16", "--gradient_accumulation_steps", "2", world=4)
    check_identity(one, four, same_phase=True, force=False, file="x")


def test_differences_are_listed_together(make):
    with pytest.raises(ConfigError) as caught:
        check_identity(make(), make("--seed", "1", "--learning_rate", "1", data="e"), same_phase=True, force=False, file="ckpt_5.pt")
    text = str(caught.value)
    for words in ("ckpt_5.pt", "seed was 42, is 1", "learning_rate was 5e-05, is 1.0", "training records changed"):
        assert words in text


def test_what_an_older_berth_did_not_write_down_is_unknown(make):
    saved = make()
    with pytest.raises(ConfigError, match="reduce_dtype was fp32, is bf16"):
        check_identity(saved, make("--reduce_dtype", "bf16"), same_phase=True, force=False, file="x")
    for key in ("reduce_dtype", "loss_scale"):
        del saved[key]
    check_identity(saved, make("--reduce_dtype", "bf16"), same_phase=True, force=False, file="x")


def test_force_logs_what_it_overrides(make, caplog):
    with caplog.at_level(logging.WARNING):
        check_identity(make(), make("--seed", "1"), same_phase=True, force=True, file="x")
    assert "seed was 42, is 1" in caplog.text


def test_another_phase_may_have_another_recipe_but_not_another_vocabulary(make):
    check_identity(make(), make("--max_steps", "9", data="e"), same_phase=False, force=False, file="x")
    check_identity(make(vocab=""), make(), same_phase=True, force=False, file="x")
    with pytest.raises(ConfigError, match="vocabulary changed"):
        check_identity(make(), make(vocab="w"), same_phase=False, force=False, file="x")


def test_another_model_is_refused_even_by_force(make):
    with pytest.raises(CheckpointError, match="hidden_size was 8, is 16"):
        check_identity(make(), make(config={"hidden_size": 16}), same_phase=True, force=True, file="x")


def test_skipped_steps_consume_samples_and_no_step():
    state = RunState(phase=2, offset=100)
    state.advance(8, skipped=False)
    state.advance(8, skipped=True)
    assert (state.step, state.phase_step, state.samples, state.skipped, state.consecutive_skips) == (101, 1, 16, 1, 1)
    state.advance(8, skipped=False)
    assert state.consecutive_skips == 0


def test_seeds_differ_in_every_argument():
    seeds = {step_seed(*key) for key in [(1, 1, 0, 0), (2, 1, 0, 0), (1, 2, 0, 0), (1, 1, 1, 0), (1, 1, 0, 8)]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(1, 1, 0, 0) == step_seed(1, 1, 0, 0)
