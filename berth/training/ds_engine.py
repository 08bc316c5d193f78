"""Training through DeepSpeed's engine: its ZeRO stages 0 to 3 under berth's optimizers, precision, clipping and checkpoints.

In: the model, the recipe, and the options that :mod:`berth.training.ds_config` turns into a configuration. Out: the same step and the same
whole state as every other :class:`Parallel`, within rounding.

Written after the source of DeepSpeed 0.19: where ZeRO keeps its pieces is not a public interface, hence the narrow range of versions.
Parameters are fp32 for DeepSpeed in every precision: its fp16 and bf16 modes sum gradients in 16 bits, and some of its wrappers take an
optimizer step when they are made. Rejected: its checkpoint folders (berth's one file loads at any number of ranks and under any sharding);
its clipping (the norm would be known after the step); a parameter group a tensor (one collective and one optimizer call each: 25 times
slower).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import optimization
from berth.errors import ConfigError, TrainingError
from berth.training.distributed import Communicator
from berth.training.ds_config import Run, check_config
from berth.training.ds_layout import find_partitions
from berth.training.metrics import StepClock
from berth.training.nonfinite import nonfinite_names
from berth.training.parallel import Parallel, Recipe, Update
from berth.training.pieces import MOMENTS
from berth.training.saving import snapshot
from berth.training.sharded_lamb import ShardedLamb

if TYPE_CHECKING:
    from berth.training.options import Options

VERSIONS = ((0, 19, 8), (0, 20))
_HERE = ("params", "param_names", "fused", "foreach", "capturable")  # of a parameter group: what a checkpoint does not decide


class DeepSpeedParallel(Parallel):
    """``model`` (bare, fp32, on its device, the same weights on every rank) under DeepSpeed's engine, which is ``module``.

    Raises :class:`ConfigError` when DeepSpeed is missing, and for a configuration that :func:`check_config` refuses.
    """

    def __init__(self, model: nn.Module, communicator: Communicator, clock: StepClock, recipe: Recipe, options: Options) -> None:
        super().__init__(communicator, clock)
        self.plain = model
        config = check_config(options.deepspeed, _run(options, communicator, model))
        self.stage: int = config["zero_optimization"]["stage"]
        groups = optimization.parameter_groups(model, weight_decay=recipe.weight_decay)
        self._names = [name for group in groups for name in group["param_names"]]
        numbers = {parameter: number for number, parameter in enumerate(p for group in groups for p in group["params"])}
        self._shapes = [parameter.shape for parameter in numbers]
        # the model's state_dict by key: shape, and number of the parameter (a tied one has several keys; None for a buffer)
        self._keys = {key: (value.shape, numbers.get(value)) for key, value in model.state_dict(keep_vars=True).items()}
        self._whole = recipe.build([{**group, "params": [torch.empty_like(p, device="meta") for p in group["params"]]} for group in groups])
        self.optimizer = self._make_optimizer(recipe, groups)
        self.engine = self.module = _initialize(model, self.optimizer, config, communicator)
        self._zero = self.engine.optimizer  # at stage 0 berth's own
        self._map = find_partitions(self._zero, self.stage, list(numbers), self._shapes, communicator)
        if isinstance(self.optimizer, ShardedLamb):
            self.optimizer.set_segments(self._map.segments())

    def _make_optimizer(self, recipe: Recipe, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if recipe.optimizer == "adamw":
            return recipe.build(groups)
        # gradients are clipped before DeepSpeed calls the optimizer, which it does once for each group
        return ShardedLamb(groups, reduce=self._add_over_ranks, tensors=len(self._names), lr=recipe.learning_rate, max_grad_norm=0.0)

    # -- one step ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """See :class:`Parallel`."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """See :class:`Parallel`."""
        self.engine.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def update(self, scale: float, clip_norm: float) -> Update:
        """See :class:`Parallel`. Stages 1 to 3 of DeepSpeed leave a step out by themselves when its norm is not finite; 0 does not look."""
        gradients = [gradient for index in range(len(self._map.partitions)) for gradient in self._gradients(index)]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        value = float(self._add_over_ranks(optimization.global_norm(gradients).square()).sqrt())
        if not math.isfinite(value):
            bad = nonfinite_names(self._named_gradients(), self._add_over_ranks)
            self._leave_out()
            return Update(value, bad)
        if clip_norm and value > clip_norm:
            torch._foreach_mul_(gradients, clip_norm / value)
        self.engine.step()
        # DeepSpeed's norm is fp32: its squares can overflow where no gradient does, and then nothing has changed
        return Update(value if self.engine.was_step_applied() else math.inf, [])

    def _leave_out(self) -> None:
        if self.stage == 0:
            self.engine.zero_grad()
            return
        self.engine.step()
        if self.engine.was_step_applied():
            raise TrainingError(
                "DeepSpeed took a step with a gradient that is not finite: the parameters are spoilt, go back to a checkpoint"
            )

    def _gradients(self, index: int) -> list[Tensor]:
        """This rank's reduced gradients of a partition, end to end as long as it is (at stage 0 there may be none)."""
        if self.stage:
            return list(self._zero.averaged_gradients[index])
        gradient = self._map.partitions[index].grad
        return [] if gradient is None else [gradient]

    def _named_gradients(self) -> list[tuple[str, Tensor | None]]:
        """This rank's pieces of all gradients by name; None where there is no gradient."""
        parts = [self._gradients(index) for index in range(len(self._map.partitions))]
        joined = [torch.cat([part.reshape(-1) for part in listed]) if listed else torch.empty(0) for listed in parts]
        found = zip(self._names, self._map.pieces(joined), self._map.places, strict=True)
        return [(name, piece if parts[group] else None) for name, piece, (group, _) in found]

    def _add_over_ranks(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place; ``values`` as they are where every rank holds everything."""
        if self.stage and self.communicator.world_size > 1:
            self.clock.enter("communication")
            dist.all_reduce(values)
            self.clock.enter("optimizer")
        return values

    # -- whole state ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def model_state(self) -> dict[str, Tensor] | None:
        """See :class:`Parallel`."""
        tensors = self._map.whole(self._map.partitions)
        if tensors is None:
            return None
        buffers = snapshot(dict(self.plain.named_buffers()))
        return {key: buffers[key] if number is None else tensors[number] for key, (_, number) in self._keys.items()}

    @torch.no_grad()
    def optimizer_state(self) -> dict[str, Any] | None:
        """See :class:`Parallel`."""
        states = [self.optimizer.state.get(partition, {}) for partition in self._map.partitions]
        moments = {}
        if all(states):  # before the first step there is none
            moments = {key: self._map.whole([state[key] for state in states]) for key in MOMENTS}
        if not self.communicator.is_main:
            return None
        whole: dict[int, dict[str, Any]] = {}
        for number, (group, _) in enumerate(self._map.places) if moments else ():
            whole[number] = {"step": snapshot(states[group]["step"])} if "step" in states[group] else {}
            whole[number] |= {key: tensors[number] for key, tensors in moments.items() if tensors is not None}
        groups = [
            {key: value if key in ("params", "param_names") else group[key] for key, value in plain.items()}
            for plain, group in zip(self._whole.state_dict()["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        return {"state": whole, "param_groups": groups}

    @torch.no_grad()
    def load_model(self, state: dict[str, Tensor]) -> None:
        """See :class:`Parallel`."""
        _check_shapes({key: shape for key, (shape, _) in self._keys.items()}, state)
        if self.stage == 3:
            self._zero.checkpoint_event_prologue()  # no parameter is whole any more
        by_number = {number: state[key] for key, (_, number) in self._keys.items() if number is not None}
        self._map.take([by_number[number] for number in range(len(self._names))], self._map.partitions)
        for key, buffer in self.plain.named_buffers():
            if key in self._keys:
                buffer.copy_(state[key])
        if self.stage in (1, 2):
            self._zero.update_lp_params()
        elif self.stage == 3:
            for partition, used in zip(self._map.partitions, self._zero.fp16_partitioned_groups_flat, strict=True):
                used.data.copy_(partition.data)  # the same memory where DeepSpeed keeps one copy
            self._zero.checkpoint_event_epilogue()  # small parameters, which stay whole, are made so

    @torch.no_grad()
    def load_optimizer(self, state: dict[str, Any]) -> None:
        """See :class:`Parallel`. Group values (rates, betas, LAMB's step) come from ``state``."""
        order = [identity for group in state["param_groups"] for identity in group["params"]]
        moments = [state["state"][identity] for identity in order] if state["state"] else []
        expected = {*MOMENTS} | ({"step"} if not isinstance(self.optimizer, ShardedLamb) else set())
        for name, shape, saved in zip(self._names, self._shapes, moments, strict=False):
            if set(saved) != expected or any(saved[key].shape != shape for key in MOMENTS):
                found = {key: list(value.shape) for key, value in saved.items()}
                raise ValueError(f"the saved optimizer state of {name} is {found}; here it is {sorted(expected)} of {list(shape)}")
        self._whole.load_state_dict(state)  # in memory that does not exist; it checks groups and names
        for group, saved in zip(self.optimizer.param_groups, self._whole.param_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key not in _HERE})
        self.optimizer.state.clear()
        if not moments:
            return
        for key in MOMENTS:
            targets = [torch.zeros_like(partition, memory_format=torch.contiguous_format) for partition in self._map.partitions]
            self._map.take([saved[key] for saved in moments], targets)
            for partition, target in zip(self._map.partitions, targets, strict=True):
                self.optimizer.state[partition][key] = target
        fused = any(group.get("fused") for group in self.optimizer.param_groups)
        for (index, _), saved in zip(self._map.places, moments, strict=True) if "step" in expected else ():
            partition = self._map.partitions[index]
            self.optimizer.state[partition]["step"] = torch.tensor(float(saved["step"]), device=partition.device if fused else None)


def _run(options: Options, communicator: Communicator, model: nn.Module) -> Run:
    return Run(
        stage=options.deepspeed_zero_stage,
        micro_batch=options.micro_batch,
        accumulation=options.gradient_accumulation_steps,
        world_size=communicator.world_size,
        max_grad_norm=options.max_grad_norm,
        wire=options.reduce_dtype,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _check_shapes(expected: dict[str, torch.Size], state: dict[str, Tensor]) -> None:
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} does not belong to it" for key in state if key not in expected]
    problems += [
        f"{key} is {list(state[key].shape)}, not {list(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise RuntimeError(f"the state is not that of this model: {'; '.join(problems[:5])}{more}")


# -- DeepSpeed itself --------------------------------------------------------------------------------------------------


def import_deepspeed(device: torch.device) -> Any:
    """The module, set up for ``device``. Raises :class:`ConfigError` when it is not there, does not import, or is another version."""
    os.environ["DS_ACCELERATOR"] = device.type
    cure = "install it (pip install berth[deepspeed]), or use --shard zero1, zero2 or zero3, which needs no DeepSpeed"
    try:
        deepspeed = importlib.import_module("deepspeed")
    except Exception as error:
        raise ConfigError(f"--deepspeed: DeepSpeed cannot be imported ({type(error).__name__}: {error}); {cure}") from error
    version = tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:3] if part.isdigit())
    if not VERSIONS[0] <= version < VERSIONS[1]:
        raise ConfigError(f"--deepspeed: this is DeepSpeed {deepspeed.__version__}, berth is written for 0.19 from 0.19.8 on; {cure}")
    chosen = deepspeed.accelerator.get_accelerator().device_name()
    if chosen != device.type:
        raise ConfigError(f"--deepspeed: DeepSpeed was imported for {chosen} before, this run is on {device.type}; unset DS_ACCELERATOR")
    # it would be compiled at the first start: 23 s and a compiler, for what gloo does as well
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch says so at every call of DeepSpeed's
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    return deepspeed


def _not_of_a_skipped_step(record: logging.LogRecord) -> bool:
    """Such a step is in berth's log, with the tensors."""
    return "OVERFLOW" not in record.getMessage()


def _initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], communicator: Communicator) -> Any:
    """DeepSpeed's engine in the process group that is already there: left to itself it takes every Slurm task for rank 0 of 1."""
    device = communicator.device
    deepspeed = import_deepspeed(device)
    if not dist.is_initialized():  # one process; DeepSpeed wants a group all the same
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert (dist.get_rank(), dist.get_world_size()) == (communicator.rank, communicator.world_size)
    os.environ.setdefault("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", str(max(communicator.local_rank, 0))))
    own_logger = logging.getLogger("DeepSpeed")
    level = own_logger.level
    own_logger.addFilter(_not_of_a_skipped_step)
    own_logger.setLevel(logging.ERROR)  # it warns of every optimizer that it does not know
    try:
        place = SimpleNamespace(device_rank=device.index or 0)
        engine, *_ = deepspeed.initialize(args=place, model=model, optimizer=optimizer, config=config, dist_init_required=False)
    finally:
        own_logger.setLevel(level)
    # The engine switches a caller's autocast off unless its own is on (runtime/torch_autocast.py). Asked here, it goes on with the caller's.
    engine.torch_autocast_enabled = lambda: torch.is_autocast_enabled(device.type)
    engine.torch_autocast_dtype = lambda: torch.get_autocast_dtype(device.type)
    return engine
