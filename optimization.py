"""LAMB, AdamW and the learning-rate schedules of BERT pretraining. Needs torch and the standard library only.

::

    groups = parameter_groups(model, weight_decay=0.01)
    optimizer = Lamb(groups, lr=6e-3)
    schedule = make_schedule("poly", base_lr=6e-3, warmup=0.2843, total_steps=7038)
    for t in range(1, 7039):            # t counts the steps that were *taken*; a skipped step repeats its t
        loss.backward()
        schedule.apply(optimizer, t)
        optimizer.step(grad_scale=scale, found_inf=overflow)

The ways :class:`Lamb` differs from the paper (You et al. 2019, arXiv:1904.00962) are those of apex's ``FusedLAMB``,
with which the published BERT recipes were made: the gradient is clipped to a global norm before it enters the moments, a
group has one step count, the trust ratio has no clamp, and tensors without weight decay (bias, LayerNorm) take the
plain rate.

On a CPU the moments and the direction of a block of elements are computed by torch's fused Adam kernel while the block is in the
cache (:func:`_fused_direction`); the other ways to compute the same are a loop over tensors and batched ``torch._foreach_*`` kernels.

Rejected: ``torch.linalg.vector_norm`` of a whole tensor on the CPU (0.2 % too small on a BERT-large embedding, see
:func:`_cpu_norm`); a clamp on the trust ratio (DeepSpeed's variant: another recipe); storing the update in the gradient
buffer (apex: the update loses bits in half precision).
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

NO_DECAY = ("bias", "gamma", "beta", "LayerNorm")
"""A parameter whose name contains one of these is not decayed (and, in LAMB, has no trust ratio)."""

_CHUNK_ELEMENTS = 1 << 26
"""Elements updated at once by the foreach path: bounds its two temporary copies to 256 MiB each in float32."""

_BLOCK_ELEMENTS, _BLOCK_ELEMENTS_PER_THREAD = 1 << 20, 1 << 17
"""Elements the fused path takes at once: six float32 arrays of them pass through the cache, and every thread needs its share. A step over
BERT-large takes 282 ms with 2^20, 345 with 2^18 (calls cost more than they compute), 365 with 2^21 (it no longer fits), 562 in the loop
(two threads, 2026-11-21)."""

_NORM_ROW = 512
"""Length of the rows whose norms are taken in float32 on the CPU before they are added up in float64."""


# ---------------------------------------------------------------------------------------------------------------------
# Parameter groups
# ---------------------------------------------------------------------------------------------------------------------


def parameter_groups(
    model_or_named_parameters: nn.Module | Iterable[tuple[str, Tensor]], weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Two optimizer groups, always in this order: decayed, not decayed (:data:`NO_DECAY`, by substring of the name).

    Each group is ``{"params": [tensor, ...], "param_names": [str, ...], "weight_decay": float}`` in the order of
    ``named_parameters()``; names are plain strings: they survive ``state_dict`` and ``torch.load(weights_only=True)``.
    Tied parameters are taken once (under their first name), parameters that need no gradient are left out, and the
    wrappers' prefixes ``module.`` and ``_orig_mod.`` are removed from names. BERT-large: 150 tensors decayed, 248 not.

    Raises ``ValueError`` when nothing is trainable or ``weight_decay`` is negative.
    """
    _check("weight_decay", weight_decay, weight_decay >= 0, "a finite number >= 0")
    named = model_or_named_parameters
    if isinstance(named, nn.Module):
        named = named.named_parameters()
    decayed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, parameter in named:
        if id(parameter) in seen or not parameter.requires_grad:
            continue
        seen.add(id(parameter))
        name = name.replace("_orig_mod.", "").removeprefix("module.")
        (plain if any(part in name for part in NO_DECAY) else decayed)[name] = parameter
    if not seen:
        raise ValueError("parameter_groups: no parameter requires a gradient")
    return [
        {"params": list(decayed.values()), "param_names": list(decayed), "weight_decay": float(weight_decay)},
        {"params": list(plain.values()), "param_names": list(plain), "weight_decay": 0.0},
    ]


def adamw(
    params: Iterable[Any],
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """``torch.optim.AdamW`` over the groups of :func:`parameter_groups` (a group's own ``weight_decay`` wins).

    ``fused=None`` takes torch's fused kernels when every parameter is on a CUDA device. Unlike :class:`Lamb` it neither
    clips nor unscales: the caller does both before ``step()``. eps is 1e-6 as in BERT, not torch's 1e-8.
    """
    _check_adam(lr, betas, eps, weight_decay)
    groups = list(params)
    if fused is None:
        tensors = [t for group in groups for t in (group["params"] if isinstance(group, dict) else [group])]
        fused = bool(tensors) and all(t.is_cuda for t in tensors)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the step count of bias correction (:class:`Lamb` and AdamW), the moments stay as they are.

    ``set_step(optimizer, 0)`` on loaded moments is how the published recipe begins phase 2.
    """
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = int(step)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(float(step))


def place_steps(optimizer: torch.optim.Optimizer) -> None:
    """Move step counts that are tensors to where AdamW's kernels want them: a fused one beside its parameter, else the CPU.

    ``load_state_dict`` decides by the *saved* group's ``fused``, which is another machine's when a CPU checkpoint goes on on a GPU.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device if group.get("fused") else "cpu", torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# LAMB
# ---------------------------------------------------------------------------------------------------------------------


class Lamb(torch.optim.Optimizer):
    r"""LAMB with the semantics of apex ``FusedLAMB``.

    For every step, with :math:`G` the 2-norm of all (unscaled) gradients of all groups together::

        c = G / max_grad_norm  if G > max_grad_norm else 1
        s = g / c                                   (+ wd * p  if not adam_w_mode)
        m = b1 * m + b3 * s                         b3 = 1 - b1 if grad_averaging else 1
        v = b2 * v + (1 - b2) * s^2
        u = (m / c1) / (sqrt(v / c2) + eps)         (+ wd * p  if adam_w_mode);  c_i = 1 - b_i^step with bias_correction
        r = |p| / |u|  if (wd != 0 or use_nvlamb) and |p| != 0 and |u| != 0  else 1
        p = p - lr * r * u

    Norms are per tensor. The mathematics is float32 whatever the parameters' type (float64 for float64 parameters);
    half-precision parameters are computed in float32 and rounded once when written, so without a float32 master copy
    small updates are lost: prefer float32 parameters with autocast. Moments ``exp_avg`` and ``exp_avg_sq`` are float32.
    ``step`` is an ``int`` of the group that counts the steps taken (every group counts each of them, as in apex).

    Per group: ``lr betas eps weight_decay bias_correction grad_averaging step``. For the whole optimizer (not in its
    ``state_dict``): ``max_grad_norm`` (0, ``None`` or infinity switch clipping off), ``adam_w_mode``, ``use_nvlamb``,
    ``foreach``, ``fused``. ``foreach=None`` takes the batched ``torch._foreach_*`` path for tensors on CUDA, tensor by tensor elsewhere
    (the faster way on a CPU: it stays in the cache). There, ``fused=None`` takes torch's fused kernel where it can (float32, contiguous,
    ``grad_averaging``; :func:`fused_problem` has nothing to say) and the plain loop where not, ``False`` the plain loop, ``True`` raises
    ``RuntimeError`` for what it cannot compute. Fused and loop agree within rounding (about 1e-7 relative), not bitwise; either repeats
    itself bitwise. The fused path keeps one scratch tensor as large as the largest one with a trust ratio.

    ``step()`` leaves gradients untouched and skips parameters without one (if none has one, it does nothing). It does
    not look for NaN itself: the caller says so through ``found_inf``.
    """

    guards_nonfinite: ClassVar[bool] = False
    """Whether :meth:`step` by itself changes no tensor when ``grad_norm`` is not finite (then there is ``undo_step()`` for the counts)."""

    _scratch: Tensor | None = None

    grad_norm: Tensor | None
    """Unscaled 2-norm of all gradients before clipping, of the last step taken (float64 ``[]``); ``None`` before it."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = 1.0,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        adam_w_mode: bool = True,
        use_nvlamb: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        limit = math.inf if max_grad_norm is None or max_grad_norm == 0 else max_grad_norm
        if isinstance(limit, bool) or not limit > 0:
            raise ValueError(f"max_grad_norm must be > 0, or 0, None or inf for no clipping; got {max_grad_norm!r}")
        if foreach and fused:
            raise ValueError("foreach and fused are two ways to compute the same: at most one of them can be True")
        self.max_grad_norm = float(limit)
        self.adam_w_mode = adam_w_mode
        self.use_nvlamb = use_nvlamb
        self.foreach = foreach
        self.fused = fused
        self.grad_norm = None
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "bias_correction": bias_correction,
                "grad_averaging": grad_averaging,
            },
        )

    def __getstate__(self) -> dict[str, Any]:
        own = ("max_grad_norm", "adam_w_mode", "use_nvlamb", "foreach", "fused", "grad_norm")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; checks the group's values (``ValueError``) and starts its ``step`` at 0."""
        merged = {**self.defaults, **param_group}
        _check_adam(merged["lr"], merged["betas"], merged["eps"], merged["weight_decay"])
        param_group.setdefault("step", 0)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for index, parameter in enumerate(group["params"]):
            if not parameter.is_floating_point():
                raise ValueError(f"Lamb needs floating-point parameters; {_name(group, index)} is {parameter.dtype}")

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grad_scale: float | Tensor | None = None,
        found_inf: bool | Tensor | None = None,
        grad_norm: float | Tensor | None = None,
    ) -> Any:
        """Take one step; returns what ``closure`` returned (``None`` without one).

        ``grad_scale``: gradients are divided by it (loss scaling). ``found_inf``: when true nothing at all changes, the
        step counts included (reading a GPU tensor here waits for it). ``grad_norm``: the *unscaled* norm of all
        gradients, when the caller knows it already; it is then not computed.
        Raises ``RuntimeError`` for a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if found_inf is not None and bool(found_inf):
            return loss
        work = [(group, self._pairs(group)) for group in self.param_groups]
        all_gradients = [gradient for _, pairs in work for _, gradient in pairs]
        if not all_gradients:
            return loss
        divisor = self._divisor(all_gradients, grad_scale, grad_norm)
        for number, (group, pairs) in enumerate(work):
            group["step"] += 1
            self._update(number, Rule.of(group, self.adam_w_mode, self.use_nvlamb), pairs, divisor)
        return loss

    def _update(self, number: int, rule: Rule, pairs: list[tuple[Tensor, Tensor]], divisor: Tensor) -> None:
        """Update the parameters of group ``number`` that have gradients; ``divisor`` is what :meth:`_divisor` gave."""
        batched, single = self._split_by_path(pairs)
        for parameter, gradient in single:
            first, second = self._moments(parameter)
            if not self._fuses(rule, parameter, gradient, first, second):
                _update_tensor(rule, parameter, gradient, first, second, divisor)
            elif rule.trust_ratio:
                _update_fused(rule, parameter, gradient, first, second, divisor, *self._rooms(parameter))
            else:
                _update_adam(rule, parameter, gradient, first, second, divisor, self._rooms(parameter)[1])
        for chunk in chunks(batched):
            parameters, gradients = [p for p, _ in chunk], [g for _, g in chunk]
            firsts, seconds = ([self._moments(p)[which] for p in parameters] for which in (0, 1))
            _update_chunk(rule, parameters, gradients, firsts, seconds, divisor)

    def _pairs(self, group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """The group's (parameter, gradient) pairs, parameters without a gradient left out."""
        pairs = []
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                raise RuntimeError(f"Lamb does not take sparse gradients; {_name(group, index)} has one")
            pairs.append((parameter, parameter.grad))
        return pairs

    def _split_by_path(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Any], list[Any]]:
        """Pairs for the foreach path and pairs to be computed tensor by tensor."""
        if self.foreach is not None or self.fused:
            return (pairs, []) if self.foreach else ([], pairs)
        return [pair for pair in pairs if pair[0].is_cuda], [pair for pair in pairs if not pair[0].is_cuda]

    def _fuses(self, rule: Rule, *tensors: Tensor) -> bool:
        """Whether a parameter is updated by the fused kernel; ``tensors``: itself, its gradient and its moments."""
        if self.fused is False:
            return False
        problem = _fused_obstacle(rule, tensors) or fused_problem()
        if problem and self.fused:
            raise RuntimeError(f"Lamb(fused=True) {problem}; fused=None takes the plain loop for such tensors")
        return problem is None

    def _rooms(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """Room for the update direction of ``parameter``, of its shape, and for a block of its gradient; float32, kept from step to step
        (fresh memory costs page faults)."""
        block, elements = min(_block_elements(), parameter.numel()), parameter.numel()
        if self._scratch is None or self._scratch.numel() < elements + block:
            self._scratch = torch.empty(elements + block, dtype=torch.float32, device="cpu")
        return self._scratch[:elements].view_as(parameter), self._scratch[elements : elements + block]

    def _moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        if not state:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter, dtype=_math_dtype(parameter), memory_format=torch.preserve_format)
        return state["exp_avg"], state["exp_avg_sq"]

    def _divisor(self, gradients: list[Tensor], grad_scale: Any, grad_norm: Any) -> Tensor:
        """What every gradient is divided by: loss scale times clip factor (float64 ``[]``). Sets ``self.grad_norm``."""
        device = gradients[0].device
        scale = scalar(1.0 if grad_scale is None else grad_scale, device)
        total = global_norm(gradients) / scale if grad_norm is None else scalar(grad_norm, device)
        self.grad_norm = total
        return scale * torch.where(total > self.max_grad_norm, total / self.max_grad_norm, torch.ones_like(total))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a ``state_dict``: bitwise, moments stay float32 even when parameters are not, nothing is shared with it.

        The state of apex's ``FusedLAMB`` over the same groups loads too. Group values in it (rates included) replace
        the current ones. ``ValueError`` names what does not fit: number or size of groups, parameter names (where both
        sides have them), the shape of a moment, the state of another optimizer. Nothing has changed then.
        """
        saved_groups = state_dict["param_groups"]
        sizes, saved_sizes = ([len(g["params"]) for g in groups] for groups in (self.param_groups, saved_groups))
        for number, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=False)):
            _check_same_names(number, group.get("param_names"), saved.get("param_names"))
        if sizes != saved_sizes:
            raise ValueError(f"parameter groups of {sizes} tensors do not match the saved groups of {saved_sizes}")
        saved_ids = [identity for saved in saved_groups for identity in saved["params"]]
        named = [(p, _name(group, i)) for group in self.param_groups for i, p in enumerate(group["params"])]
        targets = dict(zip(saved_ids, named, strict=True))
        restored: dict[Tensor, dict[str, Tensor]] = {}
        for identity, moments in state_dict["state"].items():
            if identity not in targets:
                raise ValueError(f"optimizer state {identity!r} belongs to none of the saved parameter groups")
            parameter, name = targets[identity]
            restored[parameter] = _restored_moments(name, parameter, moments)
        # torch casts state to the type of the parameter and shares storage with the input; it gets the groups only.
        super().load_state_dict({**state_dict, "state": {}})
        self.defaults.pop("differentiable", None)  # torch adds it here: a resumed run's groups would have a key more
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0))
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self.state.update(restored)


@dataclass(frozen=True)
class Rule:
    """The numbers of one group's update at one step."""

    lr: float
    beta1: float
    beta2: float
    beta3: float  # weight of the gradient in the first moment
    step: float  # of bias correction, counted from 1; infinite without it
    correction1: float
    correction2_root: float
    eps: float
    gradient_decay: float  # weight decay added to the gradient (L2) ...
    update_decay: float  # ... or to the update (decoupled); one of them is 0
    trust_ratio: bool

    @classmethod
    def of(cls, group: dict[str, Any], adam_w_mode: bool, use_nvlamb: bool) -> Rule:
        beta1, beta2 = group["betas"]
        step, decay = float(group["step"]) if group["bias_correction"] else math.inf, group["weight_decay"]
        return cls(
            lr=float(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            beta3=1.0 - beta1 if group["grad_averaging"] else 1.0,
            step=step,
            correction1=1.0 - beta1**step,
            correction2_root=math.sqrt(1.0 - beta2**step),
            eps=group["eps"],
            gradient_decay=0.0 if adam_w_mode else decay,
            update_decay=decay if adam_w_mode else 0.0,
            trust_ratio=use_nvlamb or decay != 0,
        )


def direction(
    rule: Rule, weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, divisor: Tensor, fused: bool = False
) -> Tensor:  # fmt: skip
    """One tensor's update direction ``u`` (new, of the moments' type); its moments are advanced in place.

    ``weight`` is of the moments' type; ``divisor`` (``[]``) divides the gradient before anything else; ``fused`` as
    :meth:`Lamb._fuses` says. The rest of the update is a trust ratio and :func:`apply_updates`: apart, because the norms of a tensor that
    is spread over processes must be added up in between.
    """
    if fused:
        update = torch.empty_like(weight)
        room = torch.empty(min(_block_elements(), weight.numel()), dtype=torch.float32, device="cpu")
        for _ in _fused_direction(rule, weight, gradient, first, second, divisor, update, room):
            pass
        return update
    scratch = gradient.to(first.dtype) / divisor.to(weight.device, first.dtype)
    if rule.gradient_decay:
        scratch.add_(weight, alpha=rule.gradient_decay)
    first.mul_(rule.beta1).add_(scratch, alpha=rule.beta3)
    second.mul_(rule.beta2).addcmul_(scratch, scratch, value=1.0 - rule.beta2)
    torch.sqrt(second, out=scratch).div_(rule.correction2_root).add_(rule.eps)
    update = torch.div(first, scratch, out=scratch).div_(rule.correction1)
    if rule.update_decay:
        update.add_(weight, alpha=rule.update_decay)
    return update


def directions(
    rule: Rule, weights: list[Tensor], gradients: list[Tensor], firsts: list[Tensor], seconds: list[Tensor], divisor: Tensor
) -> list[Tensor]:  # fmt: skip
    """:func:`direction` of a list of tensors of one device and type, in a few batched kernels that do not wait for the GPU."""
    dtype, device = firsts[0].dtype, firsts[0].device
    scaled = torch._foreach_div([g.to(dtype) for g in gradients], divisor.to(device, dtype))
    if rule.gradient_decay:
        torch._foreach_add_(scaled, weights, alpha=rule.gradient_decay)
    torch._foreach_mul_(firsts, rule.beta1)
    torch._foreach_add_(firsts, scaled, alpha=rule.beta3)
    torch._foreach_mul_(seconds, rule.beta2)
    torch._foreach_addcmul_(seconds, scaled, scaled, value=1.0 - rule.beta2)
    del scaled
    denominators = torch._foreach_sqrt(seconds)
    torch._foreach_div_(denominators, rule.correction2_root)
    torch._foreach_add_(denominators, rule.eps)
    updates = torch._foreach_div(firsts, denominators)
    torch._foreach_div_(updates, rule.correction1)
    if rule.update_decay:
        torch._foreach_add_(updates, weights, alpha=rule.update_decay)
    return list(updates)


def apply_updates(rule: Rule, parameters: list[Tensor], weights: list[Tensor], updates: list[Tensor]) -> None:
    """Take the step; tensors of one type. ``weights``: the parameters, half-precision ones in the type of ``updates`` (rounded here, once)."""
    torch._foreach_add_(weights, updates, alpha=-rule.lr)
    if parameters[0].dtype != weights[0].dtype:
        torch._foreach_copy_(parameters, weights)


def _update_tensor(rule: Rule, parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, divisor: Tensor) -> None:
    """One tensor's update, in place on ``parameter`` and its moments."""
    weight = parameter.to(first.dtype)  # the parameter itself unless it is half precision
    update = direction(rule, weight, gradient, first, second, divisor)
    if rule.trust_ratio:
        update.mul_(trust_ratios(norms([weight]), norms([update]))[0])
    apply_updates(rule, [parameter], [weight], [update])


def _update_fused(
    rule: Rule, parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, divisor: Tensor, scratch: Tensor, room: Tensor
) -> None:  # fmt: skip
    """The same in two passes over memory, the first leaves the direction in ``scratch``; what :func:`_fused_obstacle` lets pass. ``room``:
    for a block of the divided gradient."""
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    blocks = []
    for pair in _fused_direction(rule, parameter, gradient, first, second, divisor, scratch, room):
        blocks.append(pair)
        for found, block in zip(rows, pair, strict=True):
            found.append(_row_norms(block))
    weight_norm, update_norm = (torch.linalg.vector_norm(torch.cat(found).double()).to(scratch.dtype) for found in rows)
    factor = -rule.lr * float(trust_ratios([weight_norm], [update_norm])[0])
    for weight_block, update_block in blocks:  # each by the thread that has it in its cache
        weight_block.add_(update_block, alpha=factor)


def _update_adam(rule: Rule, parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, divisor: Tensor, room: Tensor) -> None:
    """The same in one pass: without trust ratio (hence without decay) LAMB is Adam."""
    blocks = [t.detach().view(-1).split(_block_elements()) for t in (parameter, gradient, first, second)]
    quotient, step = _Quotient(divisor, room), torch.tensor(rule.step, dtype=torch.float32, device="cpu")
    for weight_block, gradient_block, first_block, second_block in zip(*blocks, strict=True):
        _fused_adam(rule, weight_block, quotient.of(gradient_block), first_block, second_block, step, rule.lr)


def _fused_direction(
    rule: Rule, weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, divisor: Tensor, update: Tensor, room: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Write the direction into ``update`` and advance the moments, a block in the cache after the other; gives each block of ``weight`` and
    ``update`` (flat) when it is done, for whoever wants its norms while it is there.

    Adam's kernel with the rate -1, on weights that are ``wd * p``, leaves ``wd * p + (m / c1) / (sqrt(v) / sqrt(c2) + eps)`` in them. It
    changes a gradient in place when told to divide it, so that is done before, in ``room``.
    """
    blocks = [t.detach().view(-1).split(_block_elements()) for t in (weight, gradient, first, second, update)]
    quotient, step = _Quotient(divisor, room), torch.tensor(rule.step, dtype=torch.float32, device="cpu")
    for weight_block, gradient_block, first_block, second_block, update_block in zip(*blocks, strict=True):
        scaled = quotient.of(gradient_block)
        if rule.gradient_decay:
            scaled = torch.add(scaled, weight_block, alpha=rule.gradient_decay)
        torch.mul(weight_block, rule.update_decay, out=update_block)
        _fused_adam(rule, update_block, scaled, first_block, second_block, step, -1.0)
        yield weight_block, update_block


class _Quotient:
    """Blocks of a gradient divided by ``divisor`` (``[]``), in ``room``; themselves where it is 1."""

    def __init__(self, divisor: Tensor, room: Tensor) -> None:
        self._divisor = divisor.to("cpu", torch.float32)
        self._room = None if self._divisor == 1 else room

    def of(self, block: Tensor) -> Tensor:
        return block if self._room is None else torch.div(block, self._divisor, out=self._room[: block.numel()])


def _fused_adam(rule: Rule, weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: Tensor, lr: float) -> None:
    """``m`` and ``v`` advance, ``weight -= lr * (m / c1) / (sqrt(v) / sqrt(c2) + eps)``: one native kernel (not in torch's documentation)."""
    torch._fused_adamw_(
        [weight], [gradient], [first], [second], [], [step], lr=lr, beta1=rule.beta1, beta2=rule.beta2, weight_decay=0.0, eps=rule.eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip


def _block_elements() -> int:
    return max(_BLOCK_ELEMENTS, torch.get_num_threads() * _BLOCK_ELEMENTS_PER_THREAD)


def _fused_obstacle(rule: Rule, tensors: Sequence[Tensor]) -> str | None:
    """What about a parameter, its gradient and its moments the fused kernel cannot compute."""
    if rule.beta3 != 1.0 - rule.beta1:
        return "needs grad_averaging"
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            return "needs contiguous float32 tensors on the CPU"
    return None


@functools.cache
def fused_problem() -> str | None:
    """Why this torch's fused CPU kernel is not used: it is absent, or a small trial differs from the plain formula. ``None`` where it works."""
    if not hasattr(torch, "_fused_adamw_"):
        return "needs torch._fused_adamw_, which this torch does not have"
    ramp = torch.arange(1200, dtype=torch.float32, device="cpu")
    weight, gradient, divisor = (ramp * 1.3).sin(), (ramp * 0.7).cos(), torch.tensor(1.7, device="cpu")
    group = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.02, "grad_averaging": True, "step": 3}
    for corrected in (True, False):
        rule = Rule.of({**group, "bias_correction": corrected}, adam_w_mode=True, use_nvlamb=False)
        results = []
        for fused in (True, False):
            kept, first, second = gradient.clone(), (ramp * 0.3).sin() * 0.1, (ramp * 0.9).cos().square()
            try:
                update = direction(rule, weight, kept, first, second, divisor, fused)
            except (RuntimeError, TypeError) as error:
                return f"needs torch._fused_adamw_ as in torch 2.13; here it fails: {str(error).splitlines()[0]}"
            results.append(torch.cat([update, first, second, kept]))
        difference = float((results[0] - results[1]).abs().max())
        if not difference <= 1e-5 * float(results[1].abs().max()):
            return f"needs a torch._fused_adamw_ that computes Adam; this torch's differs from the formula by {difference:.1e}"
    return None


def _update_chunk(
    rule: Rule, parameters: list[Tensor], gradients: list[Tensor], firsts: list[Tensor], seconds: list[Tensor], divisor: Tensor
) -> None:  # fmt: skip
    """The same for a list of tensors of one device and type, batched."""
    weights = [p.to(firsts[0].dtype) for p in parameters]
    updates = directions(rule, weights, gradients, firsts, seconds, divisor)
    if rule.trust_ratio:
        torch._foreach_mul_(updates, trust_ratios(norms(weights), norms(updates)))
    apply_updates(rule, parameters, weights, updates)


def trust_ratios(weight_norms: list[Tensor], update_norms: list[Tensor]) -> tuple[Tensor, ...]:
    """N ratios (``[]`` each) |p| / |u|, 1 where either is zero."""
    weight, update = torch.stack(weight_norms), torch.stack(update_norms)
    return torch.where((weight != 0) & (update != 0), weight / update, torch.ones_like(weight)).unbind()


def chunks(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Lists of pairs of one device and type, of at most :data:`_CHUNK_ELEMENTS` elements (or one larger tensor)."""
    kinds: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for pair in pairs:
        kinds.setdefault((pair[0].device, pair[0].dtype), []).append(pair)
    for same_kind in kinds.values():
        chunk: list[tuple[Tensor, Tensor]] = []
        elements = 0
        for pair in same_kind:
            if chunk and elements + pair[0].numel() > _CHUNK_ELEMENTS:
                yield chunk
                chunk, elements = [], 0
            chunk.append(pair)
            elements += pair[0].numel()
        yield chunk


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """2-norm of all ``tensors`` together, float64 ``[]``, on the device of the first; 0 on the CPU when there is none.

    Exact to about 1e-9 on the CPU, where ``torch.nn.utils.get_total_norm`` is 0.2 % low on a large embedding.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack([norm.to(tensors[0].device) for norm in norms(tensors)]).double())


def scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """``value`` as float64 ``[]`` on ``device``; a number is written there by a kernel, since a copy would wait for all that is queued."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64).reshape(())
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _math_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """2-norms ``[]`` (float32; float64 for float64 tensors) in input order, each on the device of its tensor."""
    found: list[Any] = [None] * len(tensors)
    on_gpu: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.is_cuda:
            on_gpu.setdefault((tensor.device, tensor.dtype), []).append(index)
        else:
            found[index] = _cpu_norm(tensor)
    for (_, dtype), indices in on_gpu.items():
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        together = torch._foreach_norm([tensors[i] for i in indices], 2, dtype=wide)
        for index, norm in zip(indices, together, strict=True):
            found[index] = norm
    return found


def _cpu_norm(tensor: Tensor) -> Tensor:
    """Norms of short rows in float32, then their norm in float64.

    Over the 31 million elements of a BERT-large embedding: relative error 2e-10 in 1.8 ms, against 2e-3 in 3.4 ms for
    ``vector_norm`` of the whole tensor and 4e-13 in 70 ms for it in float64 (torch 2.13, two cores, 2026-11-21).
    """
    dtype = _math_dtype(tensor)
    return torch.linalg.vector_norm(_row_norms(tensor.reshape(-1).to(dtype)).double()).to(dtype)


def _row_norms(flat: Tensor) -> Tensor:
    """Norms of the rows of :data:`_NORM_ROW` elements, then that of what is left over, if anything is."""
    whole = flat.numel() // _NORM_ROW * _NORM_ROW
    if whole == flat.numel():
        return torch.linalg.vector_norm(flat.view(-1, _NORM_ROW), dim=1)
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, _NORM_ROW), dim=1)
    return torch.cat([rows, torch.linalg.vector_norm(flat[whole:]).reshape(1)])


def _name(group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    return f"parameter {names[index]!r}" if names else f"parameter number {index} of its group"


def _check_same_names(number: int, current: list[str] | None, saved: list[str] | None) -> None:
    if current is None or saved is None or list(current) == list(saved):
        return
    missing = [name for name in current if name not in set(saved)]
    extra = [name for name in saved if name not in set(current)]
    raise ValueError(
        f"parameter group {number} differs from the saved one: {len(current)} parameters here, {len(saved)} saved; "
        f"not saved: {missing[:3]}; saved only: {extra[:3]}" + ("" if missing or extra else "; same names, other order")
    )


def _restored_moments(name: str, parameter: Tensor, saved: dict[str, Any]) -> dict[str, Tensor]:
    if set(saved) != {"exp_avg", "exp_avg_sq"}:
        raise ValueError(f"the saved state of {name} has {sorted(saved)} (LAMB's: exp_avg, exp_avg_sq): another optimizer wrote it")
    for key, value in saved.items():
        if value.shape != parameter.shape:
            raise ValueError(f"saved {key} of {name} has shape {list(value.shape)}, not {list(parameter.shape)}")
    return {key: value.to(device=parameter.device, dtype=_math_dtype(parameter), copy=True) for key, value in saved.items()}


def _check(name: str, value: Any, good: bool, rule: str) -> None:
    if isinstance(value, bool) or not good or not math.isfinite(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _check_adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    _check("lr", lr, lr >= 0, "a finite number >= 0")
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    for index, beta in enumerate(betas):
        _check(f"betas[{index}]", beta, 0 <= beta < 1, "in [0, 1)")
    _check("eps", eps, eps >= 0, "a finite number >= 0")
    _check("weight_decay", weight_decay, weight_decay >= 0, "a finite number >= 0")


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule(ABC):
    """Learning rate as a pure function of the optimizer step ``t`` = 1 .. ``total_steps``, in Python floats.

    ``warmup`` is a fraction of ``total_steps``; below it the rate rises linearly from 0 (``base_lr * p / warmup`` with
    ``p = t / total_steps``), from it on the subclass decides. ``t`` counts steps taken, so a skipped step does not
    advance the schedule. Construction checks the values (``ValueError``).
    """

    base_lr: float
    warmup: float
    total_steps: int

    def __post_init__(self) -> None:
        _check("base_lr", self.base_lr, self.base_lr >= 0, "a finite number >= 0")
        _check("warmup", self.warmup, 0 <= self.warmup <= 1, "a fraction of the steps in [0, 1]")
        if isinstance(self.total_steps, bool) or not isinstance(self.total_steps, int) or self.total_steps < 1:
            raise ValueError(f"total_steps must be a whole number >= 1, got {self.total_steps!r}")

    def lr(self, step: int) -> float:
        """Rate of optimizer step ``step`` (the first is 1). ``ValueError`` outside 1 .. ``total_steps``."""
        if not 1 <= step <= self.total_steps:
            raise ValueError(f"optimizer step {step} is outside the schedule's 1..{self.total_steps} steps")
        progress = step / self.total_steps
        if progress < self.warmup:
            return self._rise(progress / self.warmup)
        return self._after(step, progress)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rate of ``step`` in all groups (times a group's own ``lr_scale``, if it has one) and return it."""
        rate = self.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        return rate

    def _rise(self, part: float) -> float:
        """Rate at ``part`` in (0, 1) of the warm-up."""
        return self.base_lr * part

    @abstractmethod
    def _after(self, step: int, progress: float) -> float:
        """Rate at and after the end of warm-up; ``progress`` in (0, 1]."""

    def _remaining(self, progress: float) -> float:
        """What is left of the time after warm-up: 1 at its end, 0 at the last step."""
        return (1.0 - progress) / (1.0 - self.warmup) if self.warmup < 1 else 0.0


@dataclass(frozen=True)
class PolyWarmUp(Schedule):
    """``base_lr * (1 - p)**degree``: the schedule of the published recipes (degree 0.5).

    The decay starts from step 0, not from the end of warm-up, so the rate drops by the factor ``(1 - warmup)**degree``
    there (-15.4 % for 0.2843); the last step has rate 0. Both belong to the recipe.
    """

    degree: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("degree", self.degree, self.degree > 0, "a finite number > 0")

    def _after(self, step: int, progress: float) -> float:
        return self.base_lr * (1.0 - progress) ** self.degree


@dataclass(frozen=True)
class LinearWarmUp(Schedule):
    """``base_lr * (1 - p) / (1 - warmup)``: from ``base_lr`` at the end of warm-up to 0 at the last step."""

    def _after(self, step: int, progress: float) -> float:
        return self.base_lr * self._remaining(progress)


@dataclass(frozen=True)
class CosineWarmUp(Schedule):
    """Half a cosine wave from ``base_lr`` at the end of warm-up to 0 at the last step."""

    def _after(self, step: int, progress: float) -> float:
        return self.base_lr * 0.5 * (1.0 - math.cos(math.pi * self._remaining(progress)))


@dataclass(frozen=True)
class ConstantWarmUp(Schedule):
    """``base_lr`` after warm-up."""

    def _after(self, step: int, progress: float) -> float:
        return self.base_lr


@dataclass(frozen=True)
class ExponentialWarmUp(Schedule):
    """``base_lr * (p / warmup)**warmup_degree`` first, then ``base_lr * decay_rate**((t - warmup * T) / decay_steps)``.

    ``lr_offset`` is added to both. The defaults are DeepSpeed's BERT recipe (its ``EE`` schedule: phase 1 offset 1e-3,
    phase 2 decay_steps 150 and offset 0); AzureML's is warmup_degree 1, decay_rate 0.99, decay_steps 1000.
    """

    warmup_degree: float = 2.0
    decay_rate: float = 0.9
    decay_steps: float = 250.0
    lr_offset: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("warmup_degree", self.warmup_degree, self.warmup_degree > 0, "a finite number > 0")
        _check("decay_rate", self.decay_rate, 0 < self.decay_rate <= 1, "in (0, 1]")
        _check("decay_steps", self.decay_steps, self.decay_steps > 0, "a finite number > 0")
        _check("lr_offset", self.lr_offset, self.lr_offset >= 0, "a finite number >= 0")

    def _rise(self, part: float) -> float:
        return self.base_lr * part**self.warmup_degree + self.lr_offset

    def _after(self, step: int, progress: float) -> float:
        steps_after = step - self.warmup * self.total_steps
        return self.base_lr * self.decay_rate ** (steps_after / self.decay_steps) + self.lr_offset


SCHEDULES: dict[str, type[Schedule]] = {
    "poly": PolyWarmUp,
    "linear": LinearWarmUp,
    "cosine": CosineWarmUp,
    "constant": ConstantWarmUp,
    "exponential": ExponentialWarmUp,
}
"""Schedule classes by the name used on the command line."""


def make_schedule(name: str, base_lr: float, warmup: float, total_steps: int, **options: float) -> Schedule:
    """The schedule called ``name`` (:data:`SCHEDULES`); ``options`` are the extra fields of its class.

    ``ValueError`` lists the valid names, or the valid options of that schedule.
    """
    if name not in SCHEDULES:
        raise ValueError(f"no learning-rate schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    kind = SCHEDULES[name]
    valid = [field.name for field in fields(kind) if field.name not in ("base_lr", "warmup", "total_steps")]
    unknown = sorted(set(options) - set(valid))
    if unknown:
        raise ValueError(f"schedule {name!r} has no option {', '.join(unknown)}; it takes {', '.join(valid) if valid else 'none'}")
    return kind(base_lr, warmup, total_steps, **options)
