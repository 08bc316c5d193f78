"""The Triton LAMB against optimization.Lamb and float64: run by Triton's interpreter on the CPU, and compiled for a GPU that is not there.

The interpreter is switched on by an environment variable that Triton reads when it is imported, so this file is also a script: the tests run it
in a process of its own, once, and look at what it measured.
"""

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import optimization

REPO = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install triton")

SHAPES = ((1,), (3,), (4,), (127,), (128,), (129,), (0,), (8, 66))


# -- what the script measures --------------------------------------------------------------------------------------------------


def make(kind, dtype=torch.float32, **options):
    """Decayed and plain tensors of SHAPES; the second of each group is zero, the third is not aligned to 16 bytes."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for decay in (0.01, 0.0):
        tensors = []
        for index, shape in enumerate(SHAPES):
            values = torch.randn(shape, generator=generator) * (0.0 if index == 1 else 0.5)
            if index == 2:
                values = torch.cat([torch.zeros(1), values])[1:]
            tensors.append(nn.Parameter(values.to(dtype) if dtype != torch.float32 else values))
        groups.append({"params": tensors, "weight_decay": decay})
    return kind(groups, **{"lr": 0.02, **options})


def tensors_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def set_gradients(optimizer, step, change=lambda index, gradient: gradient):
    """New tensors each step; the norm is above the limit of 1 in every second one. One tensor has no gradient at step 1."""
    generator = torch.Generator().manual_seed(100 + step)
    for index, parameter in enumerate(tensors_of(optimizer)):
        gradient = torch.randn(parameter.shape, generator=generator) * (1e-3 if step % 2 else 1.0)
        parameter.grad = None if (step, index) == (1, 4) else change(index, gradient).to(parameter.dtype)


def everything(optimizer):
    """Copies of parameters and moments."""
    tensors = tensors_of(optimizer)
    moments = [optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq") for p in tensors if optimizer.state.get(p)]
    return [tensor.detach().clone() for tensor in [*tensors, *moments]]


def difference(left, right):
    """Largest of all values of two optimizers; infinite where one has moments the other lacks."""
    pairs = list(zip(everything(left), everything(right), strict=True))
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


def train(optimizer, steps, **options):
    for step in steps:
        set_gradients(optimizer, step)
        optimizer.step(**options)
    return optimizer


def measure_formula(TritonLamb, options):
    ours, exact = make(TritonLamb, **options), make(optimization.Lamb, torch.float64, **options)
    worst, untouched, norms = 0.0, True, 0.0
    for step in range(3):
        for optimizer in (ours, exact):
            set_gradients(optimizer, step)
        kept = [None if p.grad is None else p.grad.clone() for p in tensors_of(ours)]
        for optimizer in (ours, exact):
            optimizer.step(grad_scale=torch.tensor(4.0) if step == 2 else None)
        worst = max(worst, difference(ours, exact))
        untouched &= all(g is None or torch.equal(p.grad, g) for p, g in zip(tensors_of(ours), kept, strict=True))
        norms = max(norms, abs(float(ours.grad_norm) / float(exact.grad_norm) - 1))
    steps = [group["step"] for group in ours.param_groups] == [group["step"] for group in exact.param_groups] == [3, 3]
    return {"worst": worst, "untouched": untouched, "norms": norms, "steps": steps}


def measure_guard(TritonLamb):
    """A step whose norm is not finite, between two good ones."""
    found = {}
    for name, known in (("given nan", math.nan), ("given inf", math.inf), ("computed", None)):
        ours, never = train(make(TritonLamb), [0]), train(make(TritonLamb), [0])
        before, norm = everything(ours), float(ours.grad_norm)
        set_gradients(ours, 2)
        if known is None:
            tensors_of(ours)[-1].grad[0, 0] = math.nan
        assert ours.step(grad_norm=None if known is None else torch.tensor(known, dtype=torch.float64)) is None
        assert not math.isfinite(float(ours.grad_norm))
        unchanged = all(torch.equal(a, b) for a, b in zip(everything(ours), before, strict=True))
        ours.undo_step()
        counts = [group["step"] for group in ours.param_groups] == [1, 1] and float(ours.grad_norm) == norm
        found[name] = [unchanged, counts, difference(train(ours, [3]), train(never, [3]))]
    return found


def measure_state(TritonLamb):
    """Two steps with one, two with the other, through a saved state; and a deep copy."""
    found = {}
    straight = train(make(optimization.Lamb), range(4))
    for name, kinds in (("to berth", (TritonLamb, optimization.Lamb)), ("from berth", (optimization.Lamb, TritonLamb))):
        first, second = train(make(kinds[0]), range(2)), make(kinds[1])
        saved = copy.deepcopy(first.state_dict())
        moments = saved["state"][len(SHAPES) - 1]
        moments["exp_avg"] = moments["exp_avg"].t().contiguous().t()  # the same values, laid out by columns
        second.load_state_dict(saved)
        for target, source in zip(tensors_of(second), tensors_of(first), strict=True):
            target.data.copy_(source.data)
        found[name] = difference(train(second, range(2, 4)), straight)
    ours = train(make(TritonLamb), range(2))
    found["keys"] = ours.state_dict()["param_groups"] == train(make(optimization.Lamb), range(2)).state_dict()["param_groups"]
    found["copy"] = difference(train(copy.deepcopy(ours), range(2, 4)), train(ours, range(2, 4)))
    found["repeat"] = difference(train(make(TritonLamb), range(4)), ours)
    return found


def measure_gradients(TritonLamb):
    """Gradients of another type or layout, and tables that are used again where nothing has moved."""

    def other(index, gradient):
        if gradient.dim() == 2 and gradient.shape[0] == 8:
            return gradient.t().contiguous().t()
        return gradient.to(torch.bfloat16).float() if index == 5 else gradient

    ours, exact = make(TritonLamb), make(optimization.Lamb, torch.float64)
    for optimizer in (ours, exact):
        set_gradients(optimizer, 0, other)
    bfloat = tensors_of(ours)[5]
    bfloat.grad_dtype = None
    bfloat.grad = bfloat.grad.to(torch.bfloat16)
    for optimizer in (ours, exact):
        optimizer.step()
    worst = difference(ours, exact)
    repeated = make(TritonLamb)
    train(repeated, [0])
    tables = [launch.table for launches in repeated._launches.values() for launch in launches]
    blocks = [launch.blocks for launches in repeated._launches.values() for launch in launches]
    repeated.step()
    same = all(a is launch.table for a, launch in zip(tables, [x for y in repeated._launches.values() for x in y], strict=True))
    keep = [p.grad for p in tensors_of(repeated)]
    train(repeated, [2])
    again = [x for y in repeated._launches.values() for x in y]
    moved = all(a is not launch.table for a, launch in zip(tables, again, strict=True))
    layout = all(a is launch.blocks for a, launch in zip(blocks, again, strict=True))
    vectors = sorted(launch.vector for launch in again)
    del keep
    return {"worst": worst, "same": same, "moved": moved, "layout": layout, "vectors": vectors}


def measure_refusals(TritonLamb):
    said = []
    for parameter in (torch.ones(3).half(), torch.ones(3, 4).t(), torch.ones(3, dtype=torch.float64)):
        try:
            TritonLamb([nn.Parameter(parameter)])
        except ValueError as error:
            said.append(str(error))
    empty, closure = TritonLamb([nn.Parameter(torch.ones(3))]), TritonLamb([nn.Parameter(torch.zeros(0))])
    tensors_of(closure)[0].grad = torch.zeros(0)
    empty.step()
    overflow = make(TritonLamb)
    set_gradients(overflow, 0)
    overflow.step(found_inf=torch.tensor(1.0))
    still = empty.param_groups[0]["step"] == overflow.param_groups[0]["step"] == 0 and not overflow.state
    return {"said": said, "still": still, "closure": closure.step(lambda: 7)}


OPTIONS = {
    "defaults": {},
    "nvlamb, no correction": {"use_nvlamb": True, "bias_correction": False},
    "l2, no averaging": {"adam_w_mode": False, "grad_averaging": False},
    "never clipped, other betas and eps": {"max_grad_norm": 0, "betas": (0.8, 0.95), "eps": 1e-3},
}


def measure_everything():
    from berth.kernels import lamb

    lamb._BLOCK, lamb._SUMS_BLOCK = 128, 2  # several blocks a tensor, and several rounds of adding up
    return {
        "formula": {name: measure_formula(lamb.TritonLamb, options) for name, options in OPTIONS.items()},
        "guard": measure_guard(lamb.TritonLamb),
        "state": measure_state(lamb.TritonLamb),
        "gradients": measure_gradients(lamb.TritonLamb),
        "refusals": measure_refusals(lamb.TritonLamb),
    }


def compile_for_hopper():
    """Memory instructions in the PTX of the kernels as BERT's tensors use them: sm_90, which needs no GPU to be compiled for."""
    import re
    from collections import Counter

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compiled

    from berth.kernels import lamb

    pointers = {"table": "*i64", "blocks": "*i32", "control": "*fp32", "sums": "*fp32", "starts": "*i32", "ratios": "*fp32"}

    def vectors(word):
        """Operation and space, of vectors the bytes, too: how they are cut and cached differs between versions."""
        parts = re.match(r"(\w+\.\w+).*?(?:\.v(\d)\.[a-z](\d+))?$", word)
        return word if parts is None else parts[1] + (f" {int(parts[2]) * int(parts[3]) // 8}" if parts[2] else "")

    def instructions(kernel, constants):
        types = {name: "constexpr" if name in constants else pointers.get(name, "fp32") for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in pointers}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
        ptx = compiled(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": lamb._WARPS}).asm["ptx"]
        return Counter(vectors(word) for word in re.findall(r"(?:ld|st)\.(?:global|local)[\w:.]*|atom", ptx))

    shape = {"VECTOR": 4, "BLOCK": lamb._BLOCK}
    return {
        "trust": instructions(lamb._advance, {**shape, "TRUST": True}),
        "plain": instructions(lamb._advance, {**shape, "TRUST": False}),
        "apply": instructions(lamb._apply, shape),
        "single": instructions(lamb._advance, {**shape, "TRUST": True, "VECTOR": 1}),
        "ratios": instructions(lamb._ratios, {"BLOCK": lamb._SUMS_BLOCK}),
    }


# -- the tests -----------------------------------------------------------------------------------------------------------------


def run_this_file(what, interpreted, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(cache)}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(Path(__file__).resolve()), what]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return run_this_file("measure", interpreted=True, cache=tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", list(OPTIONS))
def test_three_steps_equal_float64(measured, name):
    """Parameters, moments and the norm; clipped and not, unscaled, odd and unaligned sizes, a tensor without gradient; gradients untouched."""
    found = measured["formula"][name]
    assert found["worst"] <= 2e-6 and found["norms"] <= 1e-6
    assert found["untouched"] and found["steps"]


@pytest.mark.parametrize("name", ["given nan", "given inf", "computed"])
def test_a_norm_that_is_not_finite_changes_nothing(measured, name):
    """Bitwise, and after undo_step() the run goes on as if the step had never been."""
    assert measured["guard"][name] == [True, True, 0.0]


def test_states_move_to_and_from_berths_lamb(measured):
    found = measured["state"]
    assert found["to berth"] <= 2e-6 and found["from berth"] <= 2e-6
    assert found["keys"] and found["copy"] == 0.0 and found["repeat"] == 0.0


def test_gradients_of_any_type_and_tables_only_when_needed(measured):
    """A table of addresses is made anew when gradients have moved, the layout is kept; both kinds of launches occur."""
    found = measured["gradients"]
    assert found["worst"] <= 2e-6
    assert found["same"] and found["moved"] and found["layout"] and found["vectors"] == [1, 1, 4, 4]


def test_what_it_does_not_take_and_steps_that_do_nothing(measured):
    found = measured["refusals"]
    assert len(found["said"]) == 3 and all("needs contiguous float32 parameters" in line for line in found["said"])
    assert found["still"] and found["closure"] == 7


def test_compiled_for_a_gpu_memory_is_read_16_bytes_at_a_time(tmp_path):
    """Whatever Triton makes of it: vectors where four elements are promised to be aligned and none elsewhere, arrays in the proportions the
    module's docstring counts bytes with (reads to writes 4 : 2, 4 : 3, 3 : 1), nothing spills, nothing is atomic."""
    found = run_this_file("compile", interpreted=False, cache=tmp_path)
    for kernel, (reads, writes) in {"trust": (4, 2), "plain": (4, 3), "apply": (3, 1)}.items():
        loads, stores = (found[kernel].get(f"{which}.global 16", 0) for which in ("ld", "st"))
        assert loads and loads * writes == stores * reads, (kernel, found[kernel])
    assert not any(" " in instruction for instruction in found["single"])
    assert not any(name.startswith(("ld.local", "st.local", "atom")) for counts in found.values() for name in counts)


def test_the_guard_is_declared():
    """What training asks before it launches a step whose norm it has not read."""
    from berth.kernels.lamb import TritonLamb

    assert TritonLamb.guards_nonfinite is True and optimization.Lamb.guards_nonfinite is False


if __name__ == "__main__":
    print(json.dumps({"measure": measure_everything, "compile": compile_for_hopper}[sys.argv[1]]()))
