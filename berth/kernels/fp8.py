"""fp8: linear layers of the encoder whose three matrix products take 8-bit factors, each scaled by its own largest magnitude.

In:  a model; :func:`convert_linears` replaces the ``nn.Linear`` modules inside of its ``BertLayer`` modules.
Out: the same Parameters under the same names. Parameters, their gradients and all other layers keep their types.

Activations and weights are rounded to e4m3 (3 bits of mantissa, up to 448), gradients to e5m2 (2 bits, up to 57344), after a division by
max|x| / 448 or max|x| / 57344, computed on the device at every pass; see Micikevicius et al. 2022 (arXiv:2209.05433). What is kept for the
backward pass are the 8-bit factors. The operations are torch's own ones, so that torch.compile fuses the rounding into the neighbours.

A number that is not finite must stay so, or a step that has to be skipped would be taken: e4m3 has no infinity, and the cast to it may
saturate. Both the scale and the quotient show it: inf / inf is NaN, and all of a product has the factor inf or NaN.

Rejected: scales from earlier steps (saves one read of a tensor; one spike is clipped, and there is state to save); one scale a row
(the gradient of a weight adds over rows: its factors would have to be rounded again); 8-bit weights kept from one micro-batch to the next
(their rounding reads 8 and writes 1 byte a weight, some 2.7 GB for BERT-large, a hundredth of a pass over 16,384 tokens on an H200 on
paper; they would have to be invalidated under CUDA graphs); the vocabulary projection, pooler and classifier in 8 bits (closest to the loss).

Suffixes of tensor names: T rows, K inputs, N outputs. ``x8`` and ``w8`` are float8 tensors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import modeling

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""What the sizes of a product's factors must be multiples of, where 8-bit elements lie side by side in memory."""

LEAST_CAPABILITY = (8, 9)
_PROBE_ERROR = 0.1  # of the norm; 8-bit factors give 0.04 (e4m3 with e4m3) and 0.06 (e5m2 with e4m3)


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` as 8-bit numbers and the scale, fp32 [], that they have to be multiplied with.

    Args:
        x: [T, K], fp32 or 16 bits wide, not empty.
        dtype: :data:`E4M3` or :data:`E5M2`.

    Returns:
        Contiguous [T', K], T' being T rounded up to a multiple of 16 with rows of zeros, and the scale: the largest magnitude of ``x``
        becomes the largest number of ``dtype``. Where ``x`` holds an infinity the scale is one, where it holds a NaN the scale is NaN.
    """
    largest = torch.linalg.vector_norm(x, math.inf).float()
    # The least scale, that of zeros, keeps them zeros. It is no constant of the module: with dynamic=True torch.compile makes inputs of those.
    scale = (largest / torch.finfo(dtype).max).clamp(min=2.0**-120)
    missing = -x.shape[0] % MULTIPLE
    if torch.compiler.is_compiling() or missing:  # one compiled graph for any number of rows
        x = nn.functional.pad(x, (0, 0, 0, missing))
    return (x.float() / scale).to(dtype).contiguous(), scale


class Fp8Linear(nn.Linear):
    """``nn.Linear`` (same parameters, same names) with fp8 products.

    Takes [..., K] of any float type and gives [..., N] in bf16, rounded once, with autocast or without; the bias is rounded to bf16 as under
    autocast. Gradients: the input's are bf16 values in the type of the input; the weight's and bias' are summed in fp32. The sizes of the
    layer must be multiples of 16; rows are filled up to one with zeros, and taken away again. An empty input is computed in bf16.
    """

    @classmethod
    def sharing(cls, linear: nn.Linear) -> Fp8Linear:
        """One with the very Parameters of ``linear``, in its mode."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        made.weight, made.bias = linear.weight, linear.bias
        return made.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # on a CPU the product is made of torch operations that follow autocast
            if x.numel() == 0:
                bias = None if self.bias is None else self.bias.bfloat16()
                return nn.functional.linear(x.bfloat16(), self.weight.bfloat16(), bias)
            product_TN = _Fp8Product.apply(x.reshape(-1, self.in_features), self.weight, self.bias)
            return product_TN.view(*x.shape[:-1], self.out_features)


class _Fp8Product(torch.autograd.Function):
    """x [T, K], weight [N, K], bias [N] or None -> x @ weight.T + bias, bf16 [T, N]."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        x8_TK, x_scale = quantise(x_TK, E4M3)
        w8_NK, w_scale = quantise(weight_NK, E4M3)
        ctx.save_for_backward(x8_TK, x_scale, w8_NK, w_scale)
        ctx.x_dtype, ctx.weight_dtype = x_TK.dtype, weight_NK.dtype
        ctx.bias_dtype = None if bias_N is None else bias_N.dtype
        bias_N = None if bias_N is None else bias_N.bfloat16()
        return _product(x8_TK, x_scale, w8_NK, w_scale, torch.bfloat16, bias_N, fast=True)[: x_TK.shape[0]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x8_TK, x_scale, w8_NK, w_scale = ctx.saved_tensors
        g8_TN, g_scale = quantise(grad_TN, E5M2)
        grad_x_TK = grad_weight_NK = grad_bias_N = None
        if ctx.needs_input_grad[0]:
            grad_x_TK = _product(g8_TN, g_scale, w8_NK.t().contiguous(), w_scale, torch.bfloat16)[: grad_TN.shape[0]].to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            factors = (g8_TN.t().contiguous(), g_scale, x8_TK.t().contiguous(), x_scale)
            grad_weight_NK = _product(*factors, torch.float32).to(ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias_N = grad_TN.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x_TK, grad_weight_NK, grad_bias_N


def _product(
    a8: Tensor, a_scale: Tensor, b8: Tensor, b_scale: Tensor, dtype: torch.dtype, bias: Tensor | None = None, fast: bool = False
) -> Tensor:
    """a [I, L] @ b [J, L].T of contiguous factors -> ``dtype`` [I, J]. ``fast`` adds up in less than fp32 on Hopper: for the forward pass."""
    return torch._scaled_mm(a8, b8.t(), a_scale, b_scale, bias=bias, out_dtype=dtype, use_fast_accum=fast)


def convert_linears(model: nn.Module) -> int:
    """Put a :class:`Fp8Linear` in the place of every ``nn.Linear`` inside of a ``BertLayer`` whose sizes are multiples of 16.

    Returns how many there are now. Names and Parameters stay, so an optimizer or a state dict made before fits; call it before
    anything that wraps, compiles or hooks modules. Calling it again changes nothing.
    """
    for layer in [module for module in model.modules() if isinstance(module, modeling.BertLayer)]:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and not (child.in_features % MULTIPLE or child.out_features % MULTIPLE):
                    setattr(parent, name, Fp8Linear.sharing(child))
    return sum(isinstance(module, Fp8Linear) for module in model.modules())


def obstacle(sharding: str) -> str | None:
    """Why a model spread as ``sharding`` says (a name of ``berth.training.options.SHARDINGS``, or ``deepspeed``) cannot train in fp8."""
    if sharding in ("none", "zero1"):
        return None
    return f"fp8 rounds whole weights, and {sharding} cuts them into pieces; use --shard none or zero1, or --precision bf16"


def notice(device: torch.device) -> str | None:
    """What a user who asked for fp8 on ``device`` should hear although it works."""
    return "fp8 products are slower than bf16 on a CPU: this is for trying out what they do to a loss" if device.type == "cpu" else None


def unsupported(device: torch.device) -> str | None:
    """Why fp8 cannot be used on ``device``, or None. Runs a small layer there and compares it with fp32; draws no random numbers."""
    if not hasattr(torch, "_scaled_mm"):
        return f"torch {torch.__version__} has no fp8 product"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, fp8 needs {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
    try:
        return _probe(device)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"an fp8 product fails on {device}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"


def _probe(device: torch.device) -> str | None:
    """What a layer of 64 inputs and 48 outputs gets wrong for 40 rows on ``device``, or None."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (torch.randn(shape, generator=generator) for shape in ((40, 64), (48, 64), (48,), (40, 48)))
    found = _passes(*(value.to(device) for value in (x, weight, bias, grad)))
    wanted = (nn.functional.linear(x, weight, bias), grad @ weight, grad.t() @ x, grad.sum(0))
    for name, one, other in zip(("result", "input's gradient", "weight's gradient", "bias' gradient"), found, wanted, strict=True):
        error = ((one.float().cpu() - other).norm() / other.norm()).item()
        if not error < _PROBE_ERROR:
            return f"an fp8 product is wrong on {device}: the {name} is off by {error:.2g} of its norm"
    for value in (math.inf, math.nan):
        damaged = grad.clone()
        damaged[3, 5] = value
        if torch.isfinite(_passes(*(one.to(device) for one in (x, weight, bias, damaged)))[2]).any():
            return f"an fp8 product is wrong on {device}: a gradient of {value} becomes finite"
    return None


def _passes(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients (of input, weight and bias) of a layer."""
    leaves = [one.detach().requires_grad_() for one in (x, weight, bias)]
    with torch.enable_grad():
        result = _Fp8Product.apply(*leaves)
    return (result.detach(), *torch.autograd.grad(result, leaves, grad.to(result.dtype)))
