"""Predicts how long a compiled kernel takes, from its code: nothing here is measured.

The loop around its matrix products is read from PTX. In one turn of it the warpgroups of an SM
need the tensor cores, the units for special functions and issue slots; the slowest of these, or one
warpgroup's own way through the turn where no other fills its waits, is the length of a turn.
"""

import re
from dataclasses import dataclass

from internjax.plan.kernels import KernelReport
from internjax.plan.topology import Gpu

BF16_FLOPS = 4096  # of an SM in a cycle: 989.4 TFLOP/s at 132 SMs and 1.83 GHz (H100 data sheet)
SPECIAL_CYCLES = 8  # of a warp's instruction: 16 results a cycle and SM (CUDA C guide, 9.0)
WAIT_CYCLES = 200  # of a turn: barriers, start of wgmma, shuffles; assumed
SUSTAINED = 0.8  # of the peak, that large products keep at the power limit; assumed
HBM_SHARE = 0.92  # of the data sheet's bandwidth that a long stream can reach; assumed
HBM_SECONDS = 700e-9  # from a request to its bytes; assumed
RESERVED_SMEM = 1024  # of each block (CUDA C guide, 9.0)
WARPS_OF_GROUP, GROUP = 4, 128

_LABEL = re.compile(r"^(\$L__BB\w+):")
_JUMP = re.compile(r"^(@!?%p\d+ )?bra(?:\.uni)?\s+(\$L__BB\w+);")
_WGMMA = re.compile(r"wgmma\.mma_async\S*\.m64n(\d+)k(\d+)\.\w+\.(\w+)\.")
_SPECIAL = re.compile(r"^(?:ex2|lg2|sin|cos|tanh|rcp|rsqrt|sqrt)\.")
_LOAD = re.compile(r"\bld\.(?:weak\.|relaxed\.)?global\S*?(?:\.v(\d))?\.[bufs](\d+)\s")
_CODE = re.compile(r"^(?:@!?%p\d+ )?[a-z][a-z0-9_]*\.[\w.:]+\s")
_FREE = re.compile(r"^(?:mov|cvta)\.")  # of the text only: registers are renamed


@dataclass(frozen=True)
class Turn:
    """One turn of the loop around the matrix products, of one warpgroup.

    Fields:
      flops: of its matrix products; tensor_cycles: that they take of an SM's tensor cores.
      instructions, special: that a warp issues; of these, on the unit for special functions.
    """

    flops: float
    tensor_cycles: float
    instructions: int
    special: int


@dataclass(frozen=True)
class Prediction:
    """What the code can do on one GPU.

    Fields:
      blocks_per_sm: that fit at one time.
      tensor_share: of the peak, while the loop runs; None without matrix products.
      hbm_share: of the data sheet's bandwidth, from the bytes under way at one time.
      limit: what a turn of the loop waits for.
    """

    blocks_per_sm: int
    tensor_share: float | None
    hbm_share: float
    limit: str


def predict(kernel: KernelReport, gpu: Gpu) -> Prediction:
    """Reads a kernel."""
    blocks = blocks_per_sm(kernel, gpu)
    # Half of what it is copied to is under way while the other half is worked on.
    under_way = blocks * max(kernel.smem_bytes, kernel.threads * loaded_bytes(kernel)) / 2
    needed = gpu.hbm_bandwidth / gpu.sm_count * HBM_SECONDS
    hbm_share = HBM_SHARE * min(1.0, under_way / needed)
    turn = turn_of(kernel.ptx)
    if turn is None:
        return Prediction(blocks, None, hbm_share, "memory")
    groups = blocks * (kernel.threads // GROUP - bool(kernel.exchanged))
    alone = turn.tensor_cycles + max(turn.instructions, turn.special * SPECIAL_CYCLES) + WAIT_CYCLES
    needs = {  # the tensor cores come first where others need as long
        "tensor cores": groups * turn.tensor_cycles,
        "special functions": groups * turn.special * SPECIAL_CYCLES,
        "issue": float(groups * turn.instructions),
        "one warpgroup's way": alone,
    }
    limit = max(needs, key=needs.__getitem__)
    share = groups * turn.tensor_cycles / needs[limit]
    return Prediction(blocks, share, hbm_share, limit)


def blocks_per_sm(kernel: KernelReport, gpu: Gpu) -> int:
    """How many blocks an SM holds: shared memory, registers in eights, threads, 32 at most."""
    registers = -(-kernel.registers // 8) * 8 * kernel.threads
    return min(
        gpu.smem_per_sm // (kernel.smem_bytes + RESERVED_SMEM),
        65536 // registers,
        2048 // kernel.threads,
        32,
    )


def loaded_bytes(kernel: KernelReport) -> int:
    """Bytes that a thread loads to registers in one pass of the code, at most what they hold."""
    found = _LOAD.findall(kernel.ptx)
    loaded = sum(int(vector or 1) * int(bits) // 8 for vector, bits in found)
    return max(16, min(loaded, 4 * kernel.registers))


def turn_of(ptx: str) -> Turn | None:
    """Finds the innermost loop with most matrix products; None where there is none."""
    lines = [line.strip() for line in ptx.splitlines()]
    labels = {found[1]: i for i, line in enumerate(lines) if (found := _LABEL.match(line))}
    spans = []
    for i, line in enumerate(lines):
        jump = _JUMP.match(line)
        if jump and labels.get(jump[2], i) < i:
            spans.append((labels[jump[2]], i))
    spans = [span for span in spans if any(map(_WGMMA.search, lines[slice(*span)]))]
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    turns = [_count(_always(lines[first : last + 1])) for first, last in inner]
    return max(turns, key=lambda turn: turn.flops, default=None)


def _always(lines: list[str]) -> list[str]:
    """Leaves out what is jumped over in most turns: a branch that ends where its jump goes to."""
    kept, skip_to = [], None
    for line in lines:
        jump, label = _JUMP.match(line), _LABEL.match(line)
        if skip_to and ((label and label[1] == skip_to) or (jump and jump[2] == skip_to)):
            skip_to = None
        elif skip_to is None:
            kept.append(line)
            if jump and jump[1]:
                skip_to = jump[2]
    whole = sum(bool(_WGMMA.search(line)) for line in lines)
    return kept if sum(bool(_WGMMA.search(line)) for line in kept) == whole else lines


def _count(lines: list[str]) -> Turn:
    flops = cycles = 0.0
    code = [line for line in lines if _CODE.match(line) and not _FREE.match(line)]
    for line in lines:
        for columns, depth, kind in _WGMMA.findall(line):
            one = 2.0 * 64 * int(columns) * int(depth)
            flops += one
            cycles += one / (BF16_FLOPS * (1 if kind in ("bf16", "f16") else 2))
    return Turn(flops, cycles, len(code), sum(bool(_SPECIAL.match(line)) for line in code))
