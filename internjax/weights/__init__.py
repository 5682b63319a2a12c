"""Kinds of weights and the one function that tells them apart.

The model calls `einsum(spec, x, w)` and `take(w, ids)`; whether `w` is an array, carries a LoRA
adapter or is quantized is decided in `products` and nowhere else, so the model has no branch for
either.
"""

from internjax.weights.forms import dequantize, lora_delta, num_weights, packed, plain, stands_alone
from internjax.weights.kinds import (
    PACKED,
    Fp8Weight,
    LoraWeight,
    PackedFloats,
    PackedWeight,
    QuantWeight,
    ScaledWeight,
    StackedLora,
    TurnedWeight,
    WatchedWeight,
    Weight,
)
from internjax.weights.packing import fits_kernels, pack, pack_embedding, pack_floats
from internjax.weights.products import (
    GATHERED,
    einsum,
    einsums,
    gather,
    take,
    transposed,
    wide_matmul,
)
from internjax.weights.turning import as_matrix, turned

__all__ = [
    "GATHERED",
    "PACKED",
    "Fp8Weight",
    "LoraWeight",
    "PackedFloats",
    "PackedWeight",
    "QuantWeight",
    "ScaledWeight",
    "StackedLora",
    "TurnedWeight",
    "WatchedWeight",
    "Weight",
    "as_matrix",
    "dequantize",
    "einsum",
    "einsums",
    "fits_kernels",
    "gather",
    "lora_delta",
    "num_weights",
    "pack",
    "pack_embedding",
    "pack_floats",
    "packed",
    "plain",
    "stands_alone",
    "take",
    "transposed",
    "turned",
    "wide_matmul",
]
