"""Graphs of micro-batches on a device that only pretends to record: it keeps the function and calls it again on the same tensors.

What CUDA itself does is tested on a GPU only (the last tests); here, that inputs are copied, shapes told apart, nothing counted twice or lost."""

import dataclasses
import types

import pytest
import torch

import modeling
import optimization
from berth.errors import TrainingError
from berth.records.reader import SampleStream, open_index
from berth.training import graphs
from berth.training.backends import choose
from berth.training.batches import BatchPlan, MicroBatch
from berth.training.graphs import WARM_UPS, BrokenRecording, Graphs, obstacle, probe, shape_key
from berth.training.metrics import StepClock
from berth.training.parallel import Recipe, Replicated
from berth.training.precision import make_precision
from berth.training.step import TrainingStep
from tests.support import TINY, VOCAB_SIZE, make_project
from tests.unit.training.fast_ranks import ALONE, Pretended

CPU = torch.device("cpu")
CONFIG = modeling.BertConfig.from_dict({**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})


def micro_batch(tokens, masked=2, seed=0):
    """A packed micro-batch of one sequence; what the model gets of it is up to the test."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (tokens,), generator=draw)
    return MicroBatch(
        ids, torch.zeros_like(ids), ids.clone(), torch.zeros(1, dtype=torch.int64), torch.arange(masked), masked,
        position_ids=torch.arange(tokens), cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32), max_seqlen=512,
    )  # fmt: skip


class Sum:
    """The smallest model: adds the ids up in a gradient, and says what ran."""

    def __init__(self):
        self.parameter = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def run(self, micro):
        self.seen.append(tuple(micro.input_ids.tolist()))
        (self.parameter * micro.input_ids.sum()).backward()

    @property
    def total(self):
        return int(self.parameter.grad)


def test_recorded_runs_add_up_like_plain_ones_and_read_the_new_inputs():
    model, backend = Sum(), Pretended()
    recorder = Graphs([model.parameter], CPU, backend=backend)
    batches = [micro_batch(8, seed=seed) for seed in range(6)]
    for number, micro in enumerate(batches, 1):
        recorder.run(micro, model.run)
        assert model.total == sum(int(batch.input_ids.sum()) for batch in batches[:number])
    assert backend.recorded == 1 and backend.launched == 6 - WARM_UPS and backend.aside_entered == WARM_UPS
    assert model.seen == [tuple(batch.input_ids.tolist()) for batch in batches], "each once: no run on anything but its micro-batch"


def test_recording_itself_leaves_no_trace():
    """What a warm-up on made-up data would leave: gradients, random state."""
    model, backend = Sum(), Pretended()
    recorder = Graphs([model.parameter], CPU, backend=backend)
    for _ in range(WARM_UPS):
        recorder.run(micro_batch(8), model.run)
    before, state, seen = model.total, torch.get_rng_state(), len(model.seen)
    launched = []
    backend.record = lambda run: launched.append("recorded") or (lambda: launched.append("launched"))
    recorder.run(micro_batch(8), model.run)
    assert launched == ["recorded", "launched"] and model.total == before and len(model.seen) == seen
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "changed",
    [
        micro_batch(9),
        micro_batch(8, masked=3),
        dataclasses.replace(micro_batch(8), max_seqlen=128),
        dataclasses.replace(micro_batch(8), attention_mask=torch.ones(8, dtype=torch.bool)),
        dataclasses.replace(micro_batch(8), labels=torch.zeros(8, dtype=torch.int32)),
    ],
)
def test_shapes_fields_and_types_make_the_key(changed):
    assert shape_key(micro_batch(8)) != shape_key(changed)
    assert shape_key(micro_batch(8, seed=1)) == shape_key(dataclasses.replace(micro_batch(8, seed=2), masked=7))


def test_the_graph_not_used_for_longest_goes():
    model, backend = Sum(), Pretended()
    recorder = Graphs([model.parameter], CPU, backend=backend, most=2)

    def use(tokens, times=1):
        for _ in range(times):
            recorder.run(micro_batch(tokens), model.run)

    for tokens in (4, 5):
        use(tokens, WARM_UPS + 1)
    use(4)
    use(6, WARM_UPS + 1)  # 5 goes
    assert len(recorder) == 2 and backend.recorded == 3
    use(4)
    use(6)
    assert backend.recorded == 3
    use(5, 2 * WARM_UPS)
    assert backend.recorded == 3, "a shape that was dropped needs twice as many runs"
    use(5)
    assert backend.recorded == 4 and len(recorder) == 2
    assert model.total == sum(sum(ids) for ids in model.seen)


def test_more_shapes_than_graphs_are_not_recorded_for_ever():
    """Twelve shapes in turn with room for four: recordings become rarer and rarer."""
    model, backend = Sum(), Pretended()
    recorder = Graphs([model.parameter], CPU, backend=backend, most=4)
    for _ in range(200):
        for tokens in range(4, 16):
            recorder.run(micro_batch(tokens), model.run)
    assert 4 < backend.recorded < 16 and len(recorder) == 4
    assert model.total == sum(sum(ids) for ids in model.seen) and len(model.seen) == 2400


def test_a_shape_that_comes_once_is_not_recorded():
    model, backend = Sum(), Pretended()
    recorder = Graphs([model.parameter], CPU, backend=backend)
    for tokens in range(3, 30):
        recorder.run(micro_batch(tokens), model.run)
    assert backend.recorded == 0 and len(model.seen) == 27


def test_a_gradient_in_new_memory_makes_graphs_void():
    model, backend = Sum(), Pretended()
    recorder = Graphs([model.parameter], CPU, backend=backend)
    for _ in range(WARM_UPS + 1):
        recorder.run(micro_batch(8), model.run)
    model.parameter.grad = torch.zeros(())
    recorder.run(micro_batch(8, seed=3), model.run)
    assert backend.recorded == 2 and model.total == int(micro_batch(8, seed=3).input_ids.sum())
    assert backend.emptied == 1, "memory of graphs that are gone is not recorded into again"


@pytest.mark.parametrize("fault", ["raises", "makes a gradient"])
def test_when_recording_fails_all_runs_as_written(fault):
    """The micro-batch under way included, once."""
    model, backend, said = Sum(), Pretended(), []

    def record(run):
        backend.recorded += 1
        if fault == "raises":
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        model.parameter.grad = torch.zeros(())
        return run

    backend.record = record
    recorder = Graphs([model.parameter], CPU, backend=backend, say=said.append)
    batches = [micro_batch(8, seed=seed) for seed in range(6)]
    for micro in batches:
        recorder.run(micro, model.run)
    assert backend.recorded == 1 and len(model.seen) == 6
    assert model.total == sum(int(batch.input_ids.sum()) for batch in batches)
    assert len(said) == 1 and "CUDA graphs are off" in said[0] and "\n" not in said[0]


def test_a_recording_that_cannot_be_ended_ends_the_run(caplog):
    """Eager execution after it would crash at the next dropout; what is said is the error that came first, and what to do."""
    model, backend, said = Sum(), Pretended(), []

    def record(run):
        raise BrokenRecording("capture is invalid") from ValueError("nonzero waits for the device")

    backend.record = record
    recorder = Graphs([model.parameter], CPU, backend=backend, say=said.append)
    for _ in range(WARM_UPS):
        recorder.run(micro_batch(8), model.run)
    with pytest.raises(TrainingError, match=r"ValueError: nonzero waits for the device\).*run without --cuda_graphs") as caught:
        recorder.run(micro_batch(8), model.run)
    assert isinstance(caught.value.__cause__, BrokenRecording) and not said and "Traceback" in caplog.text
    assert len(model.seen) == WARM_UPS, "nothing ran after it"


class Capture:
    """In place of ``torch.cuda.graph``: ``fails`` to begin or to end, or does neither."""

    def __init__(self, fails=""):
        self.fails, self.ended = fails, False

    def __call__(self, graph, **options):
        assert options["capture_error_mode"] == "thread_local"
        return self

    def __enter__(self):
        if self.fails == "begin":
            raise RuntimeError("another capture is under way")

    def __exit__(self, *_):
        self.ended = True
        if self.fails == "end":
            raise RuntimeError("capture was invalidated")


@pytest.mark.parametrize(
    ("fails", "raised", "broken", "said"),
    [
        ("", ValueError("in the model"), False, "in the model"),
        ("", torch.OutOfMemoryError("too large"), False, "too large"),
        ("end", ValueError("in the model"), True, "in the model"),
        ("end", None, True, "capture was invalidated"),
        ("begin", None, True, "another capture"),
        ("", None, False, ""),
    ],
)
def test_cuda_tells_errors_inside_of_a_recording_from_those_of_its_end(fails, raised, broken, said, monkeypatch):
    """A model's own error leaves CUDA as it was; an invalidated capture does not, and names what invalidated it."""
    capture = Capture(fails)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(graphs, "_stream", lambda device: None)
    backend = graphs.CudaBackend(torch.device("cuda", 0))

    def run():
        if raised is not None:
            raise raised

    if not said:
        assert backend.record(run) == "replay" and capture.ended
        return
    with pytest.raises(BrokenRecording if broken else type(raised), match=said) as caught:
        backend.record(run)
    assert capture.ended == (fails != "begin")
    assert not broken or str(caught.value.__cause__).startswith(said)
    first = backend._pool
    backend.all_gone()
    assert backend._pool is not first


def test_what_stands_in_the_way():
    assert "need a GPU" in obstacle("none", CPU) and "leave --cuda_graphs out" in obstacle("none", CPU)
    cuda = torch.device("cuda", 0)
    assert "zero2" in obstacle("zero2", cuda) and "zero3" in obstacle("zero3", cuda) and "deepspeed" in obstacle("deepspeed", cuda)
    assert "use --shard none or zero1" in obstacle("zero2", cuda) and "leave --deepspeed out" in obstacle("deepspeed", cuda)
    assert "--checkpoint_activations" in obstacle("none", cuda, checkpointing=True)


def test_the_trial_finds_a_device_that_does_as_it_should_and_those_that_do_not(monkeypatch):
    class Repeats(Pretended):
        """Draws the same numbers at every launch."""

        def record(self, run):
            state = torch.get_rng_state()
            return lambda: (torch.set_rng_state(state), run())

    class Stale(Pretended):
        """Launches twice."""

        def record(self, run):
            return lambda: (run(), run())

    class Refuses(Pretended):
        def record(self, run):
            raise RuntimeError("not here")

    class Breaks(Pretended):
        """Cannot end what it began, and the random state cannot be put back either."""

        def record(self, run):
            monkeypatch.setattr(torch, "set_rng_state", lambda state: 1 / 0)
            raise BrokenRecording("invalidated") from ValueError("the model's fault")

    state = torch.get_rng_state()
    seeded = []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    assert probe(CPU, Pretended()) is None and not seeded, "other devices keep their random state"
    assert "dropout" in probe(CPU, Repeats())
    assert "gradients" in probe(CPU, Stale())
    assert "not here" in probe(CPU, Refuses())
    assert torch.equal(torch.get_rng_state(), state)
    with monkeypatch.context() as monkeypatch:
        assert "ValueError: the model's fault" in probe(CPU, Breaks())
    torch.set_rng_state(state)


def build(precision="fp32", backend=None, config=CONFIG, fused=False):
    torch.manual_seed(0)
    model = modeling.BertForPreTraining(config)
    model.fused_cross_entropy = fused
    choice = choose("berth", device=CPU, optimizer="lamb", sharding="none", precision=precision)
    clock = StepClock(CPU)
    parallel = Replicated(model, ALONE, clock, Recipe("lamb", 1e-2, 0.01, 1.0, choice), graphs=backend is not None)
    recorder = None if backend is None else Graphs(list(model.parameters()), CPU, backend=backend)
    mode = make_precision(precision, "cpu", 0.0, 2.0**10, 1.0)
    schedule = optimization.make_schedule("poly", 1e-2, 0.1, 20)
    return model, TrainingStep(parallel, schedule, mode, clock, clip_norm=1.0, graphs=recorder)


@pytest.fixture
def stream(tmp_path):
    return SampleStream(open_index(make_project(tmp_path) / "records", "training"), 3, VOCAB_SIZE)


@pytest.mark.parametrize(("precision", "unpad"), [("fp32", True), ("fp32", False), ("bf16", True), ("fp16", True)])
def test_training_with_graphs_is_training_without(stream, precision, unpad):
    """Six steps of three micro-batches, bit by bit; the counts of the global batch and the loss scale change on the way."""
    backend = Pretended()
    model, ours = build(precision, backend)
    reference, plain = build(precision)
    plan = BatchPlan(24, 8, 3, 0, 1, unpad=unpad, few_shapes=True)
    for number in range(6):
        batch = plan.build(stream, 24 * (number % 2))
        for step in (ours, plain):
            if step.precision.scaler.dynamic and number == 3:
                step.precision.scaler.scale = 512.0
        one, other = (step(batch, number + 1, batch.masked + number, 24) for step in (ours, plain))
        assert [float(v) for v in (one.mlm_loss, one.nsp_loss, one.mlm_correct)] == [
            float(v) for v in (other.mlm_loss, other.nsp_loss, other.mlm_correct)
        ]
        assert one.grad_norm == other.grad_norm and not one.skipped
    assert backend.launched >= 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_passes_of_several_processes_share_one_stream(stream):
    """What is never recorded (the pass that settles DistributedDataParallel, the last micro-batch of a step) runs aside, as what is."""
    backend = Pretended()
    _, step = build(backend=backend)
    step.world_size = 2  # as far as the step knows
    passed = []
    inner = step._forward_backward
    step._forward_backward = lambda micro: (passed.append(backend.inside), inner(micro))
    settled, step.parallel.settle = [], lambda backward: settled.append(backend.inside)
    batch = BatchPlan(24, 8, 3, 0, 1, unpad=True, few_shapes=True).build(stream, 0)
    step(batch, 1, batch.masked, 24)
    assert settled == [True] and passed == [True] * 3 and not backend.inside


def test_dropout_follows_the_seed_of_the_step(stream):
    config = modeling.BertConfig.from_dict(TINY)
    backend = Pretended()
    (_, ours), (_, plain) = build(backend=backend, config=config), build(config=config)
    batch = BatchPlan(24, 8, 3, 0, 1, unpad=True, few_shapes=True).build(stream, 0)
    losses = {"ours": [], "plain": []}
    for number in range(4):
        for name, step in (("ours", ours), ("plain", plain)):
            torch.manual_seed(number)
            losses[name].append(float(step(batch, number + 1, batch.masked, 24).mlm_loss))
    assert losses["ours"] == losses["plain"] and len(set(losses["ours"])) == 4 and backend.launched


def test_marks_inside_of_a_graph_do_not_count(stream):
    """All passes are 'forward': an event recorded in a graph cannot be read."""
    backend = Pretended()
    _, step = build(backend=backend)
    marks = []
    step.clock._timeline.mark = marks.append
    batch = BatchPlan(24, 8, 3, 0, 1, unpad=True).build(stream, 0)
    step(batch, 1, batch.masked, 24)
    assert marks == ["forward"] * 3 + ["optimizer", "other"]


def test_outside_of_cuda_the_side_stream_is_no_place_of_its_own():
    before = torch.zeros(1)
    with graphs.aside(CPU):
        before += 1
    assert before == 1


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_records_and_repeats():
    device = torch.device("cuda", 0)
    assert obstacle("none", device) is None
    model = torch.nn.Linear(16, 16, device=device)
    recorder = Graphs(list(model.parameters()), device)
    reference = torch.nn.Linear(16, 16, device=device)
    reference.load_state_dict(model.state_dict())

    def passes(module):
        def run(micro):
            module(torch.nn.functional.one_hot(micro.input_ids % 16, 16).float()).square().mean().backward()

        return run

    for seed in range(8):
        micro = micro_batch(64 if seed % 2 else 32, seed=seed).to(device)
        recorder.run(micro, passes(model))
        passes(reference)(micro)
    assert len(recorder) == 2 and not recorder.failed
    assert torch.allclose(model.weight.grad, reference.weight.grad, rtol=1e-4, atol=1e-6)
