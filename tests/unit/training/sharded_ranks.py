"""One rank of test_sharded.py, which starts four: ``sharded_ranks.py RANK FOLDER``. They form worlds of 2, 3 and 4 one after another, run
every case of :data:`CASES` in them, and leave the results in FOLDER.

The model is a BERT whose sizes no world divides, with the tied embedding, and with tensors of 2 rows (fewer than some worlds have ranks)."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

import modeling
from berth.training import pieces
from berth.training.backends import Choice
from berth.training.metrics import StepClock
from berth.training.parallel import Recipe, Replicated
from berth.training.sharded import FullySharded, Zero1

CONFIG = {
    "vocab_size": 37, "hidden_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 14,
    "max_position_embeddings": 8, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3,
}  # fmt: skip
SEQUENCES, LENGTH, STEPS, SAVED_AT = 12, 8, 5, 3
CLIP, SCALE = 0.5, 4.0
LEARNING_RATE = {"lamb": 0.01, "adamw": 0.002}
"""AdamW divides by |gradient| + 1e-6, so rounding of tiny gradients shows: one float32 process of another cut is off by 3e-6 at 0.01."""
STAGES = ("none", "zero1", "zero2", "zero3")
POISONED = "bert.encoder.layer.1.output.dense.weight"


class Case(NamedTuple):
    """A run of :data:`STEPS` steps."""

    stage: str
    optimizer: str
    accumulation: int
    wire: str = "fp32"


CASES = {
    2: [Case(stage, optimizer, 3 if optimizer == "lamb" else 1) for stage in STAGES for optimizer in ("lamb", "adamw")]
    + [Case(stage, "lamb", 3, wire) for stage in ("none", "zero1", "zero3") for wire in ("fp16", "bf16")]
    + [Case("zero2", "lamb", 3, "bf16")],
    3: [Case(stage, optimizer, 1) for stage in STAGES[1:] for optimizer in ("lamb", "adamw")],
    4: [Case(stage, optimizer, 3 if optimizer == "lamb" else 1) for stage in STAGES[1:] for optimizer in ("lamb", "adamw")],
}
CONTINUED = {3: {"zero1": "zero2", "zero2": "zero3", "zero3": "zero1"}, 4: {"zero1": "zero3", "zero2": "zero1", "zero3": "zero2"}}
"""By world and stage: the stage of whose checkpoint, written in the world before, the run goes on with."""


@dataclass
class Ranks:
    """What the ways of spreading use of a Communicator."""

    rank: int
    world_size: int
    device = torch.device("cpu")

    @property
    def is_main(self):
        return self.rank == 0


def make_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return modeling.BertForPreTraining(modeling.BertConfig.from_dict(CONFIG)).to(dtype)


def batch(step):
    """The global batch: ids, mask, segments, labels (6 to 20 % of the positions count), and next-sentence labels."""
    draw = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(5, CONFIG["vocab_size"], (SEQUENCES, LENGTH), generator=draw)
    lengths = torch.randint(4, LENGTH + 1, (SEQUENCES, 1), generator=draw)
    mask = (torch.arange(LENGTH) < lengths).long()
    chosen = (torch.rand(SEQUENCES, LENGTH, generator=draw) < 0.3) & (mask == 1)
    chosen[0, 1] = True
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "token_type_ids": (torch.arange(LENGTH) >= lengths // 2).long() * mask,
        "labels": torch.where(chosen, ids, -100),
        "next_sentence_label": torch.randint(0, 2, (SEQUENCES,), generator=draw),
    }


def spread(case, ranks, model):
    recipe = Recipe(case.optimizer, LEARNING_RATE[case.optimizer], 0.01, CLIP, Choice(None, None, "test"))
    clock = StepClock(ranks.device)
    if case.stage == "none" or ranks.world_size == 1:
        return Replicated(model, ranks, clock, recipe, case.wire)
    if case.stage == "zero1":
        return Zero1(model, ranks, clock, recipe, case.wire)
    return FullySharded(model, ranks, clock, recipe, case.wire, stage=int(case.stage[-1]))


def passes(parallel, ranks, step, accumulation, factor=1.0):
    """Forward and backward over this rank's share of the step's batch."""
    data = batch(step)
    masked = int((data["labels"] != -100).sum())
    rows = SEQUENCES // ranks.world_size // accumulation
    for micro in range(accumulation):
        begin = (ranks.rank * accumulation + micro) * rows
        share = {name: value[begin : begin + rows] for name, value in data.items()}
        with parallel.micro_batch(micro == accumulation - 1):
            loss = parallel.module(**share, mlm_denominator=masked, nsp_denominator=SEQUENCES).loss
            parallel.backward(loss * (SCALE * ranks.world_size * factor))


def train(parallel, ranks, steps, accumulation):
    """The gradient norms of the steps."""
    norms = []
    for step in steps:
        passes(parallel, ranks, step, accumulation)
        norms.append(parallel.update(SCALE, CLIP).norm)
    return norms


def evaluate(parallel, step=77):
    """A forward pass between steps; it may leave a sharded model gathered."""
    parallel.module.eval()
    with torch.no_grad():
        loss = parallel.module(**batch(step)).loss.item()
    parallel.module.train()
    return loss


def state_of(parallel):
    return {"model": parallel.model_state(), "optimizer": parallel.optimizer_state()}


def start(case, ranks, seed=0):
    parallel = spread(case, ranks, make_model(seed))
    parallel.settle(lambda: passes(parallel, ranks, 99, 1))
    return parallel


def load(parallel, state):
    evaluate(parallel)
    parallel.load_model(state["model"])
    parallel.load_optimizer(state["optimizer"])


def run_case(case, ranks, folder):
    """Train, save on the way, go on from what was saved; one with the weights of another seed takes it and goes on, too."""
    parallel = start(case, ranks)
    norms = train(parallel, ranks, range(1, SAVED_AT + 1), case.accumulation)
    saved, seen = state_of(parallel), evaluate(parallel)
    norms += train(parallel, ranks, range(SAVED_AT + 1, STEPS + 1), case.accumulation)
    end = state_of(parallel)
    result = {"norms": norms, "saved": saved, "end": end}
    path = folder / "-".join(map(str, (ranks.world_size, *case)))
    if ranks.is_main:
        torch.save(saved, f"{path}.ckpt")
    dist.barrier()
    if case.wire == "fp32":
        again = start(case, ranks, seed=1)
        load(again, torch.load(f"{path}.ckpt", mmap=True))
        result["seen"] = (seen, evaluate(again))
        train(again, ranks, range(SAVED_AT + 1, STEPS + 1), case.accumulation)
        result["again"] = state_of(again)
        if case.optimizer == "lamb":
            result["bad"] = bad_steps(again, ranks)
            result["after_bad"] = state_of(again)
    torch.save(result, f"{path}.{ranks.rank}")


def bad_steps(parallel, ranks):
    """Names found after a step whose loss is NaN on the last rank, and after one of whose reduced gradients one element is infinite."""
    passes(parallel, ranks, 1, 1, math.nan if ranks.rank == ranks.world_size - 1 else 1.0)
    found = [parallel.update(SCALE, CLIP)]
    passes(parallel, ranks, 1, 1)
    gradient = next(parameter for name, parameter in parallel.plain.named_parameters() if name == POISONED).grad
    local = getattr(gradient, "_local_tensor", gradient)
    if local is gradient or ranks.rank == 1:  # whole on all ranks, or a piece of one
        local[0, 0] = math.inf
    return [*found, parallel.update(SCALE, CLIP)]


def go_on(case, other, before, ranks, folder):
    """The rest of the run of a checkpoint that another stage in another world wrote."""
    parallel = start(case, ranks, seed=1)
    saved = torch.load(
        folder / ("-".join(map(str, (before, *case._replace(stage=other, accumulation=accumulation_of(before, case))))) + ".ckpt")
    )
    load(parallel, saved)
    train(parallel, ranks, range(SAVED_AT + 1, STEPS + 1), case.accumulation)
    end = state_of(parallel)
    if ranks.is_main:
        torch.save(end, folder / ("-".join(map(str, (ranks.world_size, *case))) + ".continued"))


def accumulation_of(world, case):
    return next(other.accumulation for other in CASES[world] if (other.optimizer, other.wire) == (case.optimizer, case.wire))


def other_passes(ranks, folder):
    """Norms of two steps by stage: with layers that run again in the backward pass, and under autocast."""
    norms = {"checkpointing": {}, "autocast": {}}
    for stage in STAGES:
        case = Case(stage, "lamb", 3)
        model = make_model()
        model.set_activation_checkpointing()
        norms["checkpointing"][stage] = train(spread(case, ranks, model), ranks, range(1, 3), 3)
        parallel = spread(case, ranks, make_model())
        with torch.autocast("cpu", torch.bfloat16):
            passes(parallel, ranks, 1, 3)
        norms["autocast"][stage] = parallel.update(SCALE, CLIP).norm
    torch.save(norms, folder / f"passes.{ranks.rank}")


def refusals(ranks, folder):
    """What happens with states that do not fit, and with the two ways to give a tied tensor."""
    found = {}
    for stage in ("zero1", "zero2", "zero3"):
        parallel = spread(Case(stage, "lamb", 1), ranks, make_model())
        train(parallel, ranks, [1], 1)
        whole = [state_of(parallel)]
        dist.broadcast_object_list(whole)
        model, optimizer = whole[0]["model"], whole[0]["optimizer"]
        name, tied, copy = "bert.encoder.layer.0.output.dense.weight", "cls.predictions.decoder.weight", torch.Tensor.clone
        number = optimizer["param_groups"][0]["param_names"].index(name)
        moments = {**optimizer["state"], number: {key: value[:-1] for key, value in optimizer["state"][number].items()}}
        adam = {index: {"step": torch.tensor(1.0), **entry} for index, entry in optimizer["state"].items()}
        trials = {
            "tied once": (parallel.load_model, {key: value for key, value in model.items() if key != tied}),
            "tied, two copies": (parallel.load_model, {**model, tied: copy(model[tied])}),
            "missing": (parallel.load_model, {key: value for key, value in model.items() if key != name}),
            "shape": (parallel.load_model, {**model, name: model[name][:-1]}),
            "moment": (parallel.load_optimizer, {**optimizer, "state": moments}),
            "other optimizer": (parallel.load_optimizer, {**optimizer, "state": adam}),
            "groups": (parallel.load_optimizer, {**optimizer, "param_groups": optimizer["param_groups"][:1]}),
        }
        found[stage] = {trial: outcome(*call) for trial, call in trials.items()}
    torch.save(found, folder / f"refused.{ranks.rank}")


def outcome(call, state):
    try:
        call(state)
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "taken"


def main(rank, folder):
    torch.set_num_threads(1)
    pieces.BLOCK_ELEMENTS = 200  # many blocks, and a width that divides nothing
    for world, cases in CASES.items():
        if rank >= world:
            continue
        dist.init_process_group("gloo", init_method=f"file://{folder}/store-{world}", rank=rank, world_size=world)
        ranks = Ranks(rank, world)
        for case in cases:
            run_case(case, ranks, folder)
            if case.stage in CONTINUED.get(world, {}):
                go_on(case, CONTINUED[world][case.stage], world - 1, ranks, folder)
        if world == 2:
            other_passes(ranks, folder)
            refusals(ranks, folder)
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
