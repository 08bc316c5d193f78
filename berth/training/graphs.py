"""CUDA graphs: forward and backward of a micro-batch recorded once for each shape, then launched as one.

In: micro-batches on the device, and the function that adds their gradients and losses up in tensors that stay where they are. Out: the same
sums, without the host's time for a few thousand launches.

A shape's first runs are the warm-up CUDA asks for: they run as written, on the stream of the recording, with the micro-batch that is due, and
they count. So there is no run on made-up data whose traces would have to be undone, the optimizer sees real gradients only, and a shape that
comes once is not recorded at all. Recording itself computes nothing. Dropout differs from replay to replay and follows
``torch.manual_seed``: torch gives every graph its place in the device generator's sequence at each launch.

Graphs share one memory pool. That is safe in any order because nothing inside a graph outlives it: inputs, gradients and sums lie outside.
The pool is as large as the activations of the largest micro-batch, beside what passes that are not recorded need.

Only passes whose gradients stay on the rank are recorded: all on one process, all but the last micro-batch of a step on several.
Rejected: warming up on copies and putting gradients, sums and random state back (a second set of gradients); the optimizer in the graph (it
has host-side counts, and runs once a step); recording collectives (every rank would have to record at the same micro-batch).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from berth.errors import TrainingError
from berth.training.batches import MicroBatch
from berth.training.compiled import first_line

logger = logging.getLogger(__name__)

MOST_GRAPHS = 16
WARM_UPS = 2
"""Runs of a shape before it is recorded: libraries set up their workspaces, compiled kernels are built."""

Run = Callable[[MicroBatch], None]


class BrokenRecording(RuntimeError):
    """A recording that could not be begun or ended: nothing is known of generators, memory and streams. ``__cause__`` is what was raised first."""


class Backend(Protocol):
    """What is asked of a device."""

    def aside(self) -> contextlib.AbstractContextManager[Any]:
        """Around work on the stream of recordings; what comes before and after is in order with it."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record ``run``, which computes nothing now; the result launches it.

        What ``run`` raises comes out when the recording has ended; :class:`BrokenRecording` when it could not be ended.
        """

    def all_gone(self) -> None:
        """Nothing that was recorded is kept any more."""


class CudaBackend:
    """Streams and graphs of a CUDA device; one memory pool, which ends with its last graph."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def aside(self) -> contextlib.AbstractContextManager[Any]:
        """See :class:`Backend`."""
        return aside(self.device)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See :class:`Backend`."""
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()  # a copy of a weight made before would be read for ever
        failure: Exception | None = None
        try:
            # NCCL's watchdog thread asks for events meanwhile, which the default mode takes for an error
            with torch.cuda.graph(graph, pool=self._pool, stream=_stream(self.device), capture_error_mode="thread_local"):
                try:
                    run()
                except Exception as error:
                    failure = error
        except Exception as error:
            first = failure or error
            raise BrokenRecording(str(first)) from first
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # it would keep this frame, and with it the pass's tensors, until the next garbage collection
        return graph.replay

    def all_gone(self) -> None:
        """See :class:`Backend`."""
        self._pool = torch.cuda.graph_pool_handle()


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """Run on the stream of recordings, in order with the current one; nothing special where there is no CUDA.

    Backward passes add a gradient up on the stream on which its parameter was first used by what is still alive. For
    DistributedDataParallel that is the one it was made on, so it must be made in here to be recorded later.
    """
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), _stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """A graph and the tensors it reads, by name of the field."""

    inputs: dict[str, Tensor]
    launch: Callable[[], None]


class Graphs:
    """Runs micro-batches, from the third of a shape on as recorded graphs.

    Args:
        parameters: whose gradients the passes add up. They must be zeroed in place between steps; when one has another tensor for a gradient
            than at the last recording, all graphs are forgotten.
        backend: None = :class:`CudaBackend` of ``device``.
        most: graphs that are kept; the one not used for longest goes. Each time, the runs a shape needs before it is recorded double, so that
            a run with many shapes does not spend its time on recording.
        say: gets one sentence if recording fails; everything runs as written from then on.

    Where the device is left in the middle of a recording, nothing can run any more: :meth:`run` raises :class:`TrainingError`.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        device: torch.device,
        *,
        backend: Backend | None = None,
        most: int = MOST_GRAPHS,
        say: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._parameters, self._backend = list(parameters), backend or CudaBackend(device)
        self._most, self._say = most, say
        self._graphs: collections.OrderedDict[Hashable, _Recorded] = collections.OrderedDict()
        self._seen: collections.Counter[Hashable] = collections.Counter()
        self._gradients: list[Tensor | None] = []
        self._needed = WARM_UPS
        self.failed = False

    def __len__(self) -> int:
        return len(self._graphs)

    def aside(self) -> contextlib.AbstractContextManager[Any]:
        """Around passes that are never recorded, so that they run on the stream of those that are."""
        return self._backend.aside()

    def run(self, micro: MicroBatch, run: Run) -> None:
        """Do what ``run(micro)`` does. ``run`` must do the same for every micro-batch of a shape, and keep nothing it computes."""
        if self.failed:
            run(micro)
            return
        key = shape_key(micro)
        recorded = self._known(key)
        if recorded is None and self._seen[key] >= self._needed:
            recorded = self._recorded(key, micro, run)
        if recorded is None:
            self._seen[key] += 1
            with self._backend.aside():
                run(micro)
            return
        torch._foreach_copy_(list(recorded.inputs.values()), list(micro.tensors().values()))
        recorded.launch()

    def _known(self, key: Hashable) -> _Recorded | None:
        gradients = [parameter.grad for parameter in self._parameters]
        if self._graphs and any(one is not other for one, other in zip(gradients, self._gradients, strict=True)):
            self._forget()
        if key in self._graphs:
            self._graphs.move_to_end(key)
        return self._graphs.get(key)

    def _forget(self) -> None:
        self._graphs.clear()
        self._backend.all_gone()

    def _recorded(self, key: Hashable, micro: MicroBatch, run: Run) -> _Recorded | None:
        gradients = [parameter.grad for parameter in self._parameters]
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in micro.tensors().items()}
        still = dataclasses.replace(micro, **copies)
        try:
            recorded = _Recorded(still.tensors(), self._backend.record(lambda: run(still)))
            if any(parameter.grad is not gradient for parameter, gradient in zip(self._parameters, gradients, strict=True)):
                raise RuntimeError("a gradient was made anew while recording")
        except BrokenRecording as error:
            logger.error("recording a CUDA graph failed", exc_info=error)
            raise TrainingError(
                f"--cuda_graphs: recording broke off and left the GPU unusable ({first_line(error.__cause__ or error)}); run without --cuda_graphs, "
                "and please report it with the traceback above"
            ) from error
        except Exception as error:
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
            self._forget()
            self.failed = True
            self._say(f"CUDA graphs are off: recording failed ({first_line(error)})")
            return None
        self._gradients = gradients
        self._graphs[key] = recorded
        if len(self._graphs) > self._most:
            dropped, _ = self._graphs.popitem(last=False)
            self._seen[dropped] = 0
            self._needed *= 2
        return recorded


def shape_key(micro: MicroBatch) -> Hashable:
    """What must agree for two micro-batches to go through one graph: fields, shapes and types of the tensors, ``max_seqlen``."""
    return micro.max_seqlen, tuple((name, tensor.shape, tensor.dtype) for name, tensor in micro.tensors().items())


def obstacle(sharding: str, device: torch.device, *, checkpointing: bool = False) -> str | None:
    """Why micro-batches cannot be recorded, None if they can. On CUDA a small model is recorded and compared (:func:`probe`).

    Args:
        sharding: ``none``, ``zero1``, ``zero2``, ``zero3`` or ``deepspeed``.
        checkpointing: layers run again in the backward pass; they put the generator's state back, which no recording allows.
    """
    if device.type != "cuda":
        return f"CUDA graphs need a GPU, this run is on {device.type}; leave --cuda_graphs out"
    if sharding not in ("none", "zero1"):
        way_out = "leave --deepspeed out" if sharding == "deepspeed" else "use --shard none or zero1"
        return f"{sharding} communicates inside of the passes, which is not recorded; leave --cuda_graphs out, or {way_out}"
    if checkpointing:
        return (
            "--checkpoint_activations sets the random state inside of the backward pass, which cannot be recorded; leave one of the two out"
        )
    found = _probed(device)
    return None if found is None else f"{found}; leave --cuda_graphs out"


@functools.cache
def _probed(device: torch.device) -> str | None:
    return probe(device, CudaBackend(device))


def probe(device: torch.device, backend: Backend) -> str | None:
    """Record a small model and compare three launches with eager runs; None if gradients agree and dropout differs, else why not."""
    failed = "recording a CUDA graph failed in a trial ({})"
    found: str | None = None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _generator(device).manual_seed(0)  # of this device only: torch.manual_seed would reach those that fork_rng does not put back
            try:
                found = _trial(device, backend)
            except Exception as error:
                found = failed.format(first_line(error.__cause__ if isinstance(error, BrokenRecording) and error.__cause__ else error))
    except Exception as error:  # a broken recording lets nobody put the random state back
        found = found or failed.format(first_line(error))
    return found


def _generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def _trial(device: torch.device, backend: Backend) -> str | None:
    model = nn.Linear(8, 8, device=device)
    inputs, dropped = torch.zeros(64, 8, device=device), torch.zeros(64, 8, device=device)

    def passes() -> None:
        nn.functional.gelu(model(inputs)).square().mean().backward()
        dropped.copy_(nn.functional.dropout(torch.ones_like(inputs), 0.5))

    data, expected = [torch.randn(64, 8, device=device) for _ in range(3)], []
    for batch in data:
        inputs.copy_(batch)
        with backend.aside():
            passes()
    for parameter in model.parameters():
        assert parameter.grad is not None
        expected.append(parameter.grad.clone())
        parameter.grad.zero_()
    launch, masks = backend.record(passes), []
    for batch in data:
        inputs.copy_(batch)
        launch()
        masks.append(dropped.clone())
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        if not torch.allclose(parameter.grad, gradient, rtol=1e-4, atol=1e-6):
            return "a CUDA graph gave other gradients than eager execution in a trial"
    if torch.equal(masks[0], masks[1]) or torch.equal(masks[1], masks[2]):
        return "a CUDA graph repeated its dropout in a trial"
    return None
