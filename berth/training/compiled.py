"""torch.compile for training: one graph of the whole model, or one of each kind of layer, for micro-batches of every shape.

In: a model and how much of it to compile. Out: what a training pass calls. Sizes are symbols in the graph (``dynamic=True``) and counts are
tensors (:mod:`berth.training.step`), so that a run compiles once; a graph break is an error (``fullgraph=True``), not a slow path.

*model*: everything in one graph; gradients appear when all of the backward pass is launched, so it is for one process. *layers*: each layer
by itself, one code for all of them, so that gradients are reduced while the backward pass goes on. Evaluation runs neither: the plain model
is called, or :func:`plain` switches compiled layers off, because shapes and modes of evaluation would be compiled again.

Compiling takes a minute or so at the first step. torch keeps the results in ``TORCHINDUCTOR_CACHE_DIR``, by default in the machine's
temporary folder: on a cluster whose nodes lose that, name a folder of the node's own disk, or one shared by all (it is locked file by file).

Rejected: ``mode="reduce-overhead"`` (a private memory pool for each shape, and no say in what is captured; see
:mod:`berth.training.graphs`); marking dimensions one by one as dynamic (an error wherever torch can see that one is constant).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shape_settings

import modeling
from berth.errors import TrainingError

logger = logging.getLogger(__name__)

MODES = ("off", "layers", "model")
_LAYERS = (modeling.BertLayer, modeling.BertEmbeddings, modeling.BertPredictionTransform, modeling.BertPooler)
_LEAST_CAPABILITY = (7, 0)  # of Triton, from the NVIDIA V100 on


def effective(how: str, world_size: int) -> str:
    """``how`` (of :data:`MODES`) on ``world_size`` ranks: with several, gradients must not wait for the whole model."""
    return "layers" if how == "model" and world_size > 1 else how


def compile_model(model: nn.Module, how: str, **options: Any) -> Callable[..., Any]:
    """What a training pass calls for ``model``.

    Args:
        how: of :data:`MODES`. *layers* compiles them in place, before they are wrapped, and gives ``model`` back; *model* leaves it alone.
        options: for :func:`torch.compile`, for instance ``backend`` (torch's default: inductor).
    """
    assert how in MODES, how
    if how == "model":
        return torch.compile(model, fullgraph=True, dynamic=True, **options)
    if how == "layers":
        for layer in model.modules():
            if isinstance(layer, _LAYERS):
                layer.compile(fullgraph=True, dynamic=True, **options)
    return model


def plain() -> contextlib.AbstractContextManager[Any]:
    """Around passes that are to run as written, compiled layers or not; nothing is compiled in it."""
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def compiling(how: str) -> Iterator[None]:
    """Around every training pass of a model that is compiled as ``how`` says.

    Sizes that are equal by chance when a pass is compiled (rows picked and sequences, say) stay two sizes; torch would take them for one, and
    compile again. What goes wrong in the compiler becomes one :class:`TrainingError` that says how to go on without it.
    """
    if how == "off":
        yield
        return
    try:
        with shape_settings.patch(use_duck_shape=False):  # type: ignore[attr-defined]  # torch installs it at import
            yield
    except Exception as error:
        if not _of_the_compiler(error):
            raise
        logger.error("torch.compile failed", exc_info=error)
        raise TrainingError(
            f"--compile {how} (asked for, or chosen by --compile auto, the default): torch.compile failed ({first_line(error)}); train with "
            "--compile off, and please report it with the traceback above"
        ) from error


def _of_the_compiler(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "triton"))


def first_line(error: BaseException) -> str:
    """Type and first line of an error's message, at most 200 characters; a line that ends with a colon goes on with the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    said = lines[0]
    for line in lines[1:]:
        if not said.endswith(":"):
            break
        said += f" {line}"
    return f"{type(error).__name__}: {said}"[:200]


@functools.cache
def unsupported(device: torch.device) -> str | None:
    """Why torch.compile cannot be used on ``device``, None if it can. On CUDA a small function is compiled and compared (seconds)."""
    if device.type not in ("cpu", "cuda"):
        return f"torch.compile was not tried on {device.type}"
    compiler = _compiler(device.type)
    if compiler is None:
        return "torch.compile needs a C++ compiler (g++, or what CXX names) on a CPU, and Triton a C compiler (gcc, clang, or CC)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "torch.compile needs the header files of Python (python3-dev)"
    if device.type == "cpu":
        return None
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU (pip install triton)"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"Triton needs compute capability 7.0, this GPU has {'.'.join(map(str, capability))}"
    return probe(device)


def _compiler(kind: str) -> str | None:
    """The path of the compiler that torch (CPU) or Triton (CUDA) would call."""
    named = os.environ.get("CXX" if kind == "cpu" else "CC", "").split()[:1]  # options may follow
    names = named or (["g++"] if kind == "cpu" else ["gcc", "clang", "cc"])
    return next(filter(None, map(shutil.which, names)), None)


def probe(device: torch.device, **options: Any) -> str | None:
    """Compile forward and backward of a small function for two sizes on ``device`` and compare with eager; None if it agrees, else why not.

    ``options`` are for :func:`torch.compile`.
    """
    fast = torch.compile(_trial, fullgraph=True, dynamic=True, **options)
    try:
        for rows in (24, 40):
            data = torch.linspace(-1, 1, rows * 16, device=device).view(rows, 16)
            (ours, gradient), (expected, expected_gradient) = (_with_gradient(function, data) for function in (fast, _trial))
            if not (torch.allclose(ours, expected, atol=1e-4) and torch.allclose(gradient, expected_gradient, atol=1e-4)):
                return "torch.compile gave other numbers than eager execution in a trial"
    except Exception as error:
        return f"torch.compile failed in a trial ({first_line(error)})"
    return None


def _trial(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(nn.functional.gelu(x @ x.mT @ x), x.shape[-1:]).square().mean(0)


def _with_gradient(function: Callable[[Tensor], Tensor], data: Tensor) -> tuple[Tensor, Tensor]:
    leaf = data.clone().requires_grad_()
    result = function(leaf)
    (gradient,) = torch.autograd.grad(result[0], leaf)
    return result.detach(), gradient
