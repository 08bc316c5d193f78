"""What tests of compilation and graphs share; and one rank of theirs (``fast_ranks.py RANK FOLDER``, two of them): sharded_ranks' model and
sequences, packed, with compiled layers and with micro-batches on a device that pretends to record, beside the same without."""

import contextlib
import datetime
import importlib.util
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from berth.records.rows import Rows
from berth.training.backends import Choice
from berth.training.batches import to_packed
from berth.training.compiled import compiling
from berth.training.distributed import Communicator, Rank
from berth.training.graphs import Graphs
from berth.training.metrics import StepClock
from berth.training.parallel import Recipe, Replicated
from berth.training.sharded import FullySharded, Zero1

ALONE = Communicator(Rank(), torch.device("cpu"), datetime.timedelta(seconds=1))
STEPS, ACCUMULATION = 2, 3
COMPILED, GRAPHED = ("none", "zero3"), ("none", "zero1")


class Pretended:
    """A backend of Graphs that records by keeping the function. Like CUDA it runs nothing while it records."""

    def __init__(self):
        self.recorded = self.launched = self.aside_entered = self.emptied = 0
        self.inside = False

    @contextlib.contextmanager
    def aside(self):
        self.aside_entered += 1
        self.inside = True
        yield
        self.inside = False

    def all_gone(self):
        self.emptied += 1

    def record(self, run):
        self.recorded += 1

        def launch():
            self.launched += 1
            run()

        return launch


def _sharded_ranks():
    path = Path(__file__).with_name("sharded_ranks.py")
    spec = importlib.util.spec_from_file_location("sharded_ranks", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sharded_ranks"] = module  # its dataclasses look their module up there
    spec.loader.exec_module(module)
    module.CONFIG["num_hidden_layers"] = 1
    return module


def spread(ranks, here, stage, **options):
    recipe = Recipe("lamb", 0.01, 0.01, ranks.CLIP, Choice(None, None, "test"))
    clock, model = StepClock(here.device), ranks.make_model()
    if stage == "zero3":
        return FullySharded(model, here, clock, recipe, **options)
    kind = Zero1 if stage == "zero1" else Replicated
    return kind(model, here, clock, recipe, **options)


def micro_batches(ranks, here, step):
    """This rank's share of sharded_ranks' global batch, packed, and how many tokens of that are masked."""
    data = {name: value.numpy() for name, value in ranks.batch(step).items()}
    rows = Rows.zeros(ranks.SEQUENCES, ranks.LENGTH, ranks.LENGTH)
    rows.input_ids[:], rows.input_mask[:], rows.segment_ids[:] = data["input_ids"], data["attention_mask"], data["token_type_ids"]
    rows.next_sentence_labels[:] = data["next_sentence_label"]
    data["labels"][:, 0] = -100  # [CLS]: never masked
    for row, labels in enumerate(data["labels"]):
        places = (labels != -100).nonzero()[0]
        rows.masked_lm_positions[row, : len(places)], rows.masked_lm_ids[row, : len(places)] = places, labels[places]
    size = ranks.SEQUENCES // here.world_size // ACCUMULATION
    first = here.rank * ACCUMULATION
    cuts = [slice(number * size, (number + 1) * size) for number in range(first, first + ACCUMULATION)]
    made = [to_packed(rows.take(cut), max_seqlen=ranks.LENGTH).to(here.device) for cut in cuts]
    return made, int((data["labels"] != -100).sum())


def train(parallel, ranks, here, recorder=None):
    """Norms of the steps, weights after them, what evaluation saw; passes go through graphs where they stay on the rank."""
    scale = torch.full((), ranks.SCALE * here.world_size)
    counts = [torch.ones(()) for _ in range(2)]

    def passes(micro):
        with compiling(parallel.compiled):
            output = parallel.module(**micro.arguments(), mlm_denominator=counts[0], nsp_denominator=counts[1])
            parallel.backward(output.loss * scale)

    norms = []
    parallel.settle(lambda: passes(micro_batches(ranks, here, 99)[0][0]))
    for _ in range(STEPS):
        made, masked = micro_batches(ranks, here, 1)  # every shape comes again
        counts[0].fill_(masked)
        counts[1].fill_(ranks.SEQUENCES)
        for number, micro in enumerate(made, 1):
            if recorder is not None and number < ACCUMULATION:
                with parallel.unreduced():
                    recorder.run(micro, passes)
            else:
                with parallel.micro_batch(number == ACCUMULATION):
                    passes(micro)
        norms.append(parallel.update(ranks.SCALE, ranks.CLIP).norm)
    with parallel.evaluating():
        seen = ranks.evaluate(parallel)
    return {"norms": norms, "weights": parallel.model_state(), "seen": seen}


def main(rank, folder):
    torch.set_num_threads(1)
    ranks = _sharded_ranks()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    here = ranks.Ranks(rank, 2)
    found = {}
    for stage in ("none", "zero1", "zero3"):
        found[f"{stage} plain"] = train(spread(ranks, here, stage), ranks, here)
    for stage in COMPILED:
        torch._dynamo.reset()
        compiled = spread(ranks, here, stage, compiled="model", compile_options={"backend": "aot_eager"})
        assert compiled.compiled == "layers"
        with torch._dynamo.config.patch(recompile_limit=4):
            found[f"{stage} compiled"] = train(compiled, ranks, here)
    for stage in GRAPHED:
        parallel, backend = spread(ranks, here, stage, graphs=True), Pretended()
        recorder = Graphs(list(parallel.plain.parameters()), here.device, backend=backend)
        found[f"{stage} graphs"] = {**train(parallel, ranks, here, recorder), "launched": backend.launched}
    torch.save(found, Path(folder, f"found.{rank}"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
