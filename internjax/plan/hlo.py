"""Reads XLA's scheduled, partitioned HLO text: what each device computes, sends and waits for.

`read` gives the program as a tree of steps in the order of the schedule, loops with their trip
counts. Knows no link, no clock and no model: `estimate` puts times on the steps.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

# Bytes of an element; 4-bit types are packed two a byte.
ELEMENT_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f4e2m1fn": 0.5, "s8": 1, "u8": 1, "s16": 2}
ELEMENT_BYTES |= {"u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}
ELEMENT_BYTES |= {"f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1, "f8e8m0fnu": 1}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
COLLECTIVES += ("ragged-all-to-all", "collective-broadcast")
# What moves no memory of its own.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
FREE |= {"partition-id", "replica-id", "opt-barrier", "domain"}


@dataclass(frozen=True)
class Compute:
    """Work of one device between two communications: matmul FLOPs and bytes of memory moved."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    parts: tuple[tuple[float, float], ...] = ()  # (flops, bytes) of each kernel, for a roofline


@dataclass(frozen=True)
class Collective:
    """One communication of a device.

    Fields:
      kind: as XLA calls it; axes: the mesh axes that the group spans, joined by "+".
      size: devices in the group; per_node: how many of them share a node.
      payload_bytes: of the whole value: what an all-reduce or reduce-scatter takes in, what an
        all-gather gives out, what an all-to-all or permute sends, per device.
      key: name of the wait that ends it; "" when it holds up the program (synchronous).
    """

    kind: str
    axes: str
    size: int
    per_node: int
    payload_bytes: float
    key: str = ""

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends, as rings do it (arXiv:2104.06272 counts the same)."""
        share = (self.size - 1) / self.size
        return self.payload_bytes * {
            "all-reduce": 2 * share,
            "collective-permute": 1.0,
        }.get(self.kind, share)


@dataclass(frozen=True)
class Wait:
    """The place in the schedule where a collective must have ended."""

    key: str


@dataclass(frozen=True)
class Loop:
    """Steps that run `trips` times."""

    trips: int
    body: tuple["Step", ...]


type Step = Compute | Collective | Wait | Loop


@dataclass(frozen=True)
class Program:
    """A device's program; `warnings` say what could not be read exactly."""

    steps: tuple[Step, ...]
    warnings: tuple[str, ...] = ()

    def walk(self, steps: tuple[Step, ...] | None = None, times: int = 1) -> Iterator:
        """Yields (times, step) of every compute and collective, loops unrolled by count."""
        for step in self.steps if steps is None else steps:
            if isinstance(step, Loop):
                yield from self.walk(step.body, times * step.trips)
            elif not isinstance(step, Wait):
                yield times, step

    @property
    def flops(self) -> float:
        """Matmul FLOPs of a device."""
        return sum(n * step.flops for n, step in self.walk() if isinstance(step, Compute))

    def collectives(self) -> dict[tuple[str, str], dict[str, float]]:
        """Sums up by (kind, mesh axes): count, payload_bytes, wire_bytes, async share of bytes."""
        table: dict = {}
        for times, step in self.walk():
            if isinstance(step, Collective):
                row = table.setdefault((step.kind, step.axes), dict.fromkeys(_COLUMNS, 0.0))
                row["count"] += times
                row["payload_bytes"] += times * step.payload_bytes
                row["wire_bytes"] += times * step.wire_bytes
                row["async_bytes"] += times * step.wire_bytes * bool(step.key)
        return table


_COLUMNS = ("count", "payload_bytes", "wire_bytes", "async_bytes")


@dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes, without metadata


@dataclass
class Computation:
    """Instructions in schedule order, and the same by name."""

    name: str
    lines: list[Instruction] = field(default_factory=list)
    by_name: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """What the computation gives back: XLA prints it last."""
        return self.lines[-1]

    def operand(self, line: Instruction, index: int) -> Instruction | None:
        return self.by_name.get(line.operands[index]) if index < len(line.operands) else None

    def operand_bytes(self, line: Instruction) -> float:
        return sum(type_bytes(self.by_name[o].type) for o in line.operands if o in self.by_name)


def read(text: str, mesh_shape: Mapping[str, int], gpus_per_node: int = 8) -> Program:
    """Reads the text of a compiled module.

    Args:
      mesh_shape: mesh axis -> size, outermost first; devices are numbered in that order and
        nodes are filled one after the other.
    """
    computations, entry = parse(text)
    reader = _Reader(computations, mesh_shape, gpus_per_node)
    steps = tuple(reader.steps(entry))
    if again := len(re.findall(r"\.remat\d* = ", text)):
        reader.warnings.append(f"XLA recomputes {again} operations itself, to save memory")
    return Program(steps, tuple(dict.fromkeys(reader.warnings)))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Splits a module into computations; returns them with the name of the entry."""
    computations: dict[str, Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations.setdefault(head[2], Computation(head[2]))
            entry = head[2] if head[1] else entry
        elif current is not None and line.startswith("  "):
            instruction = parse_instruction(line.strip())
            if instruction:
                current.lines.append(instruction)
                current.by_name[instruction.name] = instruction
    if not entry:
        raise ValueError("this is no HLO module: it has no ENTRY computation.")
    return computations, entry


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")


def parse_instruction(line: str) -> Instruction | None:
    """Reads `name = type opcode(operands), attributes`; None for anything else."""
    line = _COMMENT.sub("", line)  # XLA counts long lists of operands: /*index=5*/
    found = _NAME.match(line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _balanced(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _balanced(rest, opening)
    inside = rest[opening + 1 : closing - 1]
    # Operands may be written with their types: only the last word of each is its name.
    operands = tuple(part.split(" ")[-1].lstrip("%") for part in _split(inside) if part)
    attributes = re.sub(r", metadata=\{[^}]*\}", "", rest[closing:])
    return Instruction(found[1], kind, rest[:opening], operands, attributes)


def _balanced(text: str, start: int) -> int:
    """Returns the place after the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"a bracket is not closed in {text[start : start + 80]!r}.")


def _split(inside: str) -> list[str]:
    """Splits operands at the commas outside brackets."""
    if "(" not in inside and "[" not in inside:
        return [part.strip() for part in inside.split(",")]
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(inside):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(inside[start:place].strip())
            start = place + 1
    return [*parts, inside[start:].strip()]


_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")


def shapes(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """Lists (element type, dims) of an array or tuple type."""
    return [
        (element, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d))
        for element, dims in _SHAPE.findall(kind)
        if element in ELEMENT_BYTES
    ]


def type_bytes(kind: str) -> float:
    """Counts the bytes of an array or tuple type."""
    return sum(ELEMENT_BYTES[element] * math.prod(dims) for element, dims in shapes(kind))


class _Reader:
    """One module being read: its computations, its mesh, and what was odd in it."""

    def __init__(self, computations: dict[str, Computation], mesh_shape, gpus_per_node: int):
        self.computations = computations
        self.mesh_shape = dict(mesh_shape)
        self.gpus_per_node = gpus_per_node
        self.warnings: list[str] = []

    def steps(self, name: str) -> list[Step]:
        """Turns a computation into steps; neighbouring kernels become one `Compute`."""
        computation, found, kernels = self.computations[name], [], []

        def flush() -> None:
            if kernels:
                flops, moved = (sum(column) for column in zip(*kernels, strict=True))
                found.append(Compute(flops, moved, tuple(kernels)))
                kernels.clear()

        for line in computation.lines:
            step = self.step(computation, line)
            if isinstance(step, tuple):
                kernels.append(step)
            elif step is not None:
                flush()
                found += step if isinstance(step, list) else [step]
        flush()
        return found

    def step(self, computation: Computation, line: Instruction):
        """Returns a step, a list of steps, (flops, bytes) of a kernel, or None for nothing."""
        op, base = line.opcode, re.sub(r"-start$", "", line.opcode)
        if op == "while":
            body = tuple(self.steps(self._called(line, "body")))
            return Loop(self._trips(line), body)
        if op == "call":
            return self.steps(self._called(line, "to_apply"))
        if op == "conditional":
            return self._dearest(line)
        if base in COLLECTIVES:
            return self._collective(computation, line, base)
        if op == "async-start":
            inner = self.computations[self._called(line, "calls")]
            wrapped = [i for i in inner.lines if i.opcode in COLLECTIVES]
            if not wrapped:  # kernels on another stream: counted where they start
                return self.steps(inner.name)
            return self._collective(inner, wrapped[0], wrapped[0].opcode, started=line)
        if op.endswith("-done"):
            return Wait(line.operands[0])
        if op in ("send", "recv"):
            self.warnings.append(f"{op} is not counted: {line.name}")
            return None
        if op in FREE or op.endswith("-update"):
            return None
        return self.kernel(computation, line)

    def _called(self, line: Instruction, attribute: str) -> str:
        return re.search(rf"\b(?:{attribute})=%?([\w.\-]+)", line.rest)[1]

    def _trips(self, line: Instruction) -> int:
        found = re.search(r'known_trip_count":\{"n":"?(\d+)', line.rest)
        if found is None:
            self.warnings.append(f"loop {line.name} has no known trip count: counted once")
        return int(found[1]) if found else 1

    def _dearest(self, line: Instruction) -> list[Step]:
        """Takes the branch with the most FLOPs, then bytes: devices differ, the slowest counts."""
        names = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
        both = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line.rest)
        branches = [n.strip().lstrip("%") for n in names[1].split(",")] if names else both
        programs = [Program(tuple(self.steps(name))) for name in branches]

        def cost(program: Program) -> tuple[float, float]:
            sent = sum(row["wire_bytes"] for row in program.collectives().values())
            return program.flops, sent

        return list(max(programs, key=cost).steps)

    def _collective(self, computation, line, kind: str, started=None) -> Collective:
        start = started or line
        group = first_group(line.rest, self.mesh_shape)
        size = len(group)
        payload = computation.operand_bytes(line)
        if kind == "ragged-all-to-all":  # the other operands are the output buffer and offsets
            payload = type_bytes(computation.operand(line, 0).type)
        if kind == "all-gather":
            payload *= size
        asynchronous = start.opcode.endswith("-start") and '"is_sync":true' not in start.rest
        nodes = len(set(group // self.gpus_per_node))
        if kind == "collective-permute":  # a chain: each device sends to one other
            axes, size, per_node = self._permute(line)
        else:
            axes, per_node = axes_of(group, self.mesh_shape), -(-size // nodes)
        key = start.name if asynchronous else ""
        return Collective(kind, axes, size, per_node, payload, key)

    def _permute(self, line: Instruction) -> tuple[str, int, int]:
        """Axes along which pairs differ; 2 devices a node if no pair leaves its node, else 1."""
        pairs = source_target_pairs(line.rest)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        if not len(pairs):
            return "", 1, 1
        shape = tuple(self.mesh_shape.values())
        there = np.stack(np.unravel_index(pairs, shape))  # [axes, pairs, 2]
        moved = (there[..., 0] != there[..., 1]).any(axis=1)
        axes = "+".join(n for n, m in zip(self.mesh_shape, moved, strict=True) if m)
        crosses = (pairs[:, 0] // self.gpus_per_node != pairs[:, 1] // self.gpus_per_node).any()
        return axes, 2, 1 if crosses else 2

    def kernel(self, computation: Computation, line: Instruction) -> tuple[float, float]:
        """Counts the matmul FLOPs of one kernel and the bytes that it reads and writes."""
        flops = self._flops(computation, line)
        if line.opcode in ("fusion", "fusion-start"):
            return flops, self._fusion_bytes(line)
        if line.opcode == "dynamic-slice":
            return flops, 2 * type_bytes(line.type)
        if line.opcode == "dynamic-update-slice":
            return flops, 2 * type_bytes(computation.operand(line, 1).type)
        moved = computation.operand_bytes(line) + type_bytes(line.type)
        if line.opcode == "custom-call" and line.type.startswith("("):  # a library's workspace
            moved -= sum(type_bytes(f"s8[{n}]") for n in re.findall(r"s8\[(\d+)\]", line.type))
        return flops, moved

    def _flops(self, computation: Computation, line: Instruction) -> float:
        if line.opcode == "dot":
            return dot_flops(computation, line)
        if line.opcode == "custom-call":
            return custom_call_flops(computation, line)
        if line.opcode in ("fusion", "fusion-start"):
            inner = self.computations[self._called(line, "calls")]
            return sum(self._flops(inner, i) for i in inner.lines)
        return 0.0

    def _fusion_bytes(self, line: Instruction) -> float:
        """Counts operands and result, but only the slices of what is read or written in slices."""
        inner = self.computations[self._called(line, "calls")]
        users: dict[str, list[Instruction]] = {}
        for i in inner.lines:
            for operand in i.operands:
                users.setdefault(operand, []).append(i)
        total = 0.0
        for i in inner.lines:
            if i.opcode == "parameter":
                total += sum(
                    _touched(inner, i, user, users) for user in users.get(i.name, [])[:1]
                ) or type_bytes(i.type)
        written = type_bytes(inner.root.type)
        for i in inner.lines:
            if i.opcode == "dynamic-update-slice":  # only the slice of the buffer is written
                written += type_bytes(inner.operand(i, 1).type) - type_bytes(i.type)
        return total + max(written, 0.0)


def _touched(inner: Computation, parameter: Instruction, user: Instruction, users: dict) -> float:
    """Bytes of a parameter that its only user reads; 0 means: all of it."""
    if len(users[parameter.name]) > 1 or user.operands[0] != parameter.name:
        return 0.0
    if user.opcode == "bitcast" and user.name in users:
        return _touched(inner, user, users[user.name][0], users)
    if user.opcode == "dynamic-slice":
        return type_bytes(user.type)
    if user.opcode == "dynamic-update-slice":
        return type_bytes(inner.operand(user, 1).type)  # the rest stays where it is
    return 0.0


def dot_flops(computation: Computation, line: Instruction) -> float:
    """Counts 2 * outputs * contracted of a `dot`."""
    left = shapes(computation.operand(line, 0).type)[0][1]
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)[1]
    contracted = math.prod(left[int(d)] for d in dims.split(",") if d)
    return 2.0 * contracted * math.prod(shapes(line.type)[0][1])


def custom_call_flops(computation: Computation, line: Instruction) -> float:
    """Counts the FLOPs of library calls: cuBLAS matmuls and cuDNN's fused attention."""
    target = re.search(r'custom_call_target="([^"]*)"', line.rest)
    target = target[1] if target else ""
    if "cublas" in target:
        left = shapes(computation.operand(line, 0).type)[0][1]
        dims = re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', line.rest)[1]
        contracted = math.prod(left[int(d.strip('"'))] for d in dims.split(",") if d)
        return 2.0 * contracted * math.prod(shapes(line.type)[0][1])
    if "fmha" in target:
        # [B, T, N, H] in any order: scores and mix are 4 * B * N * T * T * H, causal half of it;
        # backward is 2.5 times that (five matmuls for two).
        dims = shapes(computation.operand(line, 0).type)[0][1]
        length = max(dims[1:3])
        forward = 4.0 * math.prod(dims) * length
        causal = 0.5 if "CAUSAL" in line.rest else 1.0
        return forward * causal * (2.5 if "Backward" in target else 1.0)
    return 0.0


def first_group(rest: str, mesh_shape: Mapping[str, int]) -> np.ndarray:
    """Returns the device numbers of the first replica group, in any of XLA's three spellings."""
    found = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if found:
        ids = np.arange(int(found[1]) * int(found[2])).reshape(_ints(found[3]))
        ids = ids.transpose(_ints(found[4])) if found[4] else ids
        return ids.reshape(int(found[1]), int(found[2]))[0]
    found = re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", rest)
    if found:
        if found[2].strip():
            raise ValueError(f"device order {found[2].strip()!r} of a replica group is not known.")
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        used = set(re.findall(r"'(\w+)'", found[3]))
        return group_of("+".join(used), sizes)
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    if found:
        return np.array(_ints(found[1]))
    return np.arange(math.prod(mesh_shape.values()))  # empty groups: all devices


def source_target_pairs(rest: str) -> np.ndarray:
    """Returns [pairs, 2] device numbers of a permute."""
    listed = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
    found = re.findall(r"\{(\d+),(\d+)\}", listed[1]) if listed else []
    return np.array(found, dtype=int).reshape(-1, 2)


def group_of(axes: str, mesh_shape: Mapping[str, int]) -> np.ndarray:
    """Returns the device numbers of the first group along some axes, joined by "+"."""
    used = set(axes.split("+"))
    ids = np.arange(math.prod(mesh_shape.values())).reshape(list(mesh_shape.values()))
    return ids[tuple(slice(None) if name in used else 0 for name in mesh_shape)].ravel()


def axes_of(group: np.ndarray, mesh_shape: Mapping[str, int]) -> str:
    """Names the mesh axes that a group spans; a group that is not a whole block of axes gets "?".

    A group of one device spans nothing: "".
    """
    sizes = tuple(mesh_shape.values())
    places = np.stack(np.unravel_index(group, sizes))
    spanned = [name for name, row in zip(mesh_shape, places, strict=True) if len(set(row)) > 1]
    whole = math.prod(mesh_shape[name] for name in spanned) == len(group)
    return "+".join(spanned) + ("" if whole else "?")


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]
