"""How much arithmetic a training step asks for, and how much a GPU could do at most: the two halves of MFU.

In: sizes of a model and of a batch; the name of a GPU. Out: floating-point operations (a multiplication and an addition are two), and
operations a second. Only what the model asks for is counted, whatever the program does: real tokens and no padding, no forward pass that
is run again to save memory, and the last layer at all tokens although berth finishes it at those alone that a loss reads.
"""

from __future__ import annotations

import re
from typing import Protocol


class Sizes(Protocol):
    """What is counted with; :class:`modeling.BertConfig` has it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...


def step_flops(sizes: Sizes, *, tokens: int, squares: int, masked: int, pairs: int) -> float:
    """Operations of forward and backward over some sequences of ``L`` tokens each.

    Args:
        tokens: sum of ``L``.
        squares: sum of ``L`` squared.
        masked: masked tokens, the only ones the vocabulary is projected for.
        pairs: sequences with a next-sentence label; 0 for ``--objective mlm``, whose model has no pooler.

    Products of matrices only, counted in multiply-adds, with H hidden, I intermediate, V vocabulary size:

    * a token and layer: query, key, value and output ``4 H H``, feed-forward ``2 H I``;
    * a sequence and layer: scores and their product with the values, each ``L L H`` over all heads;
    * a masked token: transformation ``H H``, projection ``H V``;
    * a sentence pair: pooler ``H H``, classifier ``2 H``.

    A multiply-add is two operations. Backward makes two products of the same size for each of forward, one for the gradient of the input and
    one for that of the weight (or of the other factor), hence the factor 3.
    """
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    encoder = sizes.num_hidden_layers * (tokens * (4 * hidden * hidden + 2 * hidden * inner) + squares * 2 * hidden)
    heads = masked * hidden * (hidden + sizes.vocab_size) + pairs * hidden * (hidden + 2)
    return 3.0 * 2.0 * (encoder + heads)


# TFLOP/s from NVIDIA's data sheets, dense (half of what is printed "with sparsity"), at boost clock: fp32 outside tensor cores, tf32, 16 bits.
# bf16 and fp16 are equally fast from Ampere on; before it there is neither tf32 nor bf16. fp8, from Ada on, is
# twice as fast. Keys: words of CUDA's device names,
# the first line whose words are all there counts. Parts cut from a GPU (MIG) and models not listed have no entry: no MFU is better than a wrong one.
_AMPERE, _ADA = 8.0, 8.9
_PEAKS: tuple[tuple[str, float, float, float, float], ...] = (
    # words, compute capability, fp32, tf32, 16 bits
    ("V100 SXM2", 7, 15.7, 0.0, 125.0),
    ("V100 SXM3", 7, 15.7, 0.0, 125.0),
    ("V100 PCIE", 7, 14.0, 0.0, 112.0),
    ("T4", 7, 8.1, 0.0, 65.0),
    ("A100", 8, 19.5, 156.0, 312.0),
    ("A30", 8, 10.3, 82.0, 165.0),
    ("A40", 8, 37.4, 74.8, 149.7),
    ("A10", 8, 31.2, 62.5, 125.0),
    ("A6000", 8, 38.7, 77.4, 154.8),
    ("L40S", 8.9, 91.6, 183.0, 362.0),
    ("L4", 8.9, 30.3, 60.0, 121.0),
    ("H100 NVL", 9, 60.0, 417.5, 835.5),
    ("H100 PCIE", 9, 51.0, 378.0, 756.5),
    ("H100 HBM3", 9, 67.0, 494.5, 989.5),  # SXM
    ("H200 NVL", 9, 60.0, 417.5, 835.5),
    ("H200", 9, 67.0, 494.5, 989.5),
    ("GH200", 9, 67.0, 494.5, 989.5),
    ("B200", 10, 75.0, 1125.0, 2250.0),
    ("GB200", 10, 80.0, 1250.0, 2500.0),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Most operations a second of one GPU in a precision (``fp32``, ``tf32``, ``bf16``, ``fp16``, ``fp8``), dense; ``None`` when it is not known.

    ``device_name`` is what ``torch.cuda.get_device_name`` says, as "NVIDIA A100-SXM4-80GB" or "NVIDIA H100 PCIe".
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    if "MIG" in words:
        return None
    for key, capability, fp32, tf32, half in _PEAKS:
        if words.issuperset(key.split()):
            bf16 = half if capability >= _AMPERE else 0.0
            fp8 = 2 * half if capability >= _ADA else 0.0
            return {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": half, "fp8": fp8}[precision] * 1e12 or None
    return None
