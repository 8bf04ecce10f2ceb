"""Reads a compiled XLA module: FLOPs, modeled time and traffic, loops counted in full.

`Compiled.cost_analysis` counts the body of a loop once. The text of the module has more:
the trip count of each loop, the estimated cost of each TPU instruction, and the
collectives. This also holds for a module compiled ahead of time for a slice that is not
there (`jax.experimental.topologies`).
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
# What reads a part of its first operand, at a place that the others give.
_SLICES = ("dynamic-slice", "gather")
_UPDATE = "dynamic-update-slice"
_FREE = (
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "parameter",
    "tuple",
    "while",
)
# What a layout says of memories other than HBM.
_MEMORIES = (("S(1)", "vmem"), ("S(5)", "host"))
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_OPCODE = re.compile(r"^(.*?[\]})]) ([a-z][\w-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a shape; `memory` is "hbm", "vmem" or "host"."""

    dtype: str
    dimensions: tuple[int, ...]
    memory: str = "hbm"

    @property
    def num_elements(self) -> int:
        return math.prod(self.dimensions)

    @property
    def num_bytes(self) -> int:
        return _BYTES.get(self.dtype, 0) * self.num_elements


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation; `arrays` are its results."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def integer(self) -> int | None:
        """The value, if the instruction is an integer constant."""
        if self.opcode == "constant" and self.arrays[0].dtype in ("s32", "u32"):
            return int(self.attributes.split(")")[0])
        return None

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found and found[1]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective, which moves arrays between chips, or between slices.

    Attributes:
      kind: one of `_COLLECTIVES`; between slices others are possible.
      arrays: its results on one chip.
      times: number of executions per run of the program.
      group: the devices of one of its groups, in the order of the program's devices;
        empty: all.
      is_async: whether other instructions run at the same time.
    """

    kind: str
    arrays: tuple[Array, ...]
    times: int
    group: tuple[int, ...] = ()
    is_async: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the results on one chip, all executions."""
        return self.times * sum(array.num_bytes for array in self.arrays)

    def received(self, num_devices: int) -> float:
        """Bytes that one chip receives, all executions, by the usual algorithms.

        Args:
          num_devices: of the program, or slices, for a collective over all of them.
        """
        size = len(self.group) or num_devices
        share = (size - 1) / size
        return self.num_bytes * {
            "all-gather": share,
            "all-reduce": 2 * share,
            "all-to-all": share,
            "collective-permute": 1.0,
            "reduce-scatter": size - 1.0,
        }.get(self.kind, 1.0)


class Module:
    """A compiled module, from `jax.stages.Compiled.as_text()`."""

    def __init__(self, text: str, branch_shares: tuple[float, ...] = (1.0, 1.0)):
        """
        Args:
          text: of the module.
          branch_shares: how often each branch of a conditional runs, the false branch
            first; the text does not contain this.
        """
        self.branch_shares = branch_shares
        self.computations: dict[str, dict[str, Instruction]] = {}
        instructions = None
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                instructions = self.computations.setdefault(header[2], {})
                if header[1]:
                    self.entry = header[2]
            elif instructions is not None and (found := _INSTRUCTION.match(line)):
                instructions[found[1]] = _instruction(found[1], found[2])

    @functools.cached_property
    def flops(self) -> int:
        """FLOPs of all matrix products, loops counted in full."""
        return sum(
            times * _product_flops(instruction, computation)
            for instruction, computation, times in self._executed(into_fusions=True)
        )

    @functools.cached_property
    def cycles(self) -> int:
        """The compiler's estimate of the cycles of a TPU core, loops counted in full.

        Asynchronous copies and collectives have no estimate and count as 0.
        """
        return sum(
            times * int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)
            for instruction, _, times in self._executed(into_fusions=False)
        )

    def roofline_seconds(self, flops_per_second: float, bytes_per_second: float):
        """Seconds if each instruction ran at the chip's peak, one after another.

        An instruction takes the time of its products or of its HBM traffic, whichever is
        longer. Collectives count as 0.
        """
        seconds = 0.0
        for instruction, computation, times in self._executed(into_fusions=False):
            seconds += times * self._seconds(
                instruction, computation, flops_per_second, bytes_per_second
            )
        return seconds

    def _seconds(self, instruction, computation, flops_per_second, bytes_per_second):
        """See `roofline_seconds`."""
        work = _product_flops(instruction, computation)
        for name in _called(instruction) if instruction.opcode == "fusion" else ():
            inside = self.computations[name]
            work += sum(_product_flops(i, inside) for i in inside.values())
        traffic = self._bytes(instruction, computation, "hbm")
        return max(work / flops_per_second, traffic / bytes_per_second)

    @functools.cached_property
    def host_bytes(self) -> int:
        """Bytes between the chip and the host's memory, loops counted in full."""
        return sum(
            times * self._bytes(instruction, computation, "host")
            for instruction, computation, times in self._executed(into_fusions=False)
        )

    def host_seconds(
        self, flops_per_second: float, bytes_per_second: float, host_bandwidth: float
    ) -> float:
        """Seconds for which the chip waits for the host's memory.

        Transfers run one after another. The instructions between the start of a transfer
        and its end hide as much of it as they take by `roofline_seconds`; kernels, whose
        work the module does not show, hide nothing.

        Args:
          flops_per_second, bytes_per_second: peaks of the chip.
          host_bandwidth: bytes per second between the chip and the host's memory.
        """
        waited, running, left = 0.0, None, {}
        for instruction, computation, times in self._executed(into_fusions=False):
            if computation is not running:
                running, left = computation, {}
            ended = instruction.operands[0] if _is_done(instruction) else None
            if moved := self._bytes(instruction, computation, "host"):
                left[instruction.name] = moved / host_bandwidth
                if not _ends_here(instruction, computation):
                    ended = instruction.name
            if ended in left:
                # Those that started before it end before it.
                for name in list(left):
                    waited += times * left.pop(name)
                    if name == ended:
                        break
            if moved:
                # What a transfer itself reads and writes in HBM hides nothing.
                continue
            hidden = self._seconds(
                instruction, computation, flops_per_second, bytes_per_second
            )
            for name in left:
                part = min(hidden, left[name])
                left[name] -= part
                hidden -= part
        return waited

    def _bytes(self, instruction: Instruction, computation, memory: str) -> int:
        """Bytes of a memory that an instruction reads and writes; of a slice, its own."""
        opcode = instruction.opcode
        kind = opcode.removesuffix("-start")
        if _is_free(instruction) or _is_done(instruction):
            return 0
        if kind in (*_COLLECTIVES, "async"):
            return 0
        if kind != opcode:
            # An asynchronous copy: the first two are source and destination, in any order.
            # Of a slice, scalars say where it is.
            arrays = [
                a for a in instruction.arrays if a.dimensions
            ] or instruction.arrays
            ends = arrays[:2]
            return min(a.num_bytes for a in ends) * sum(
                a.memory == memory for a in ends
            )
        operands = [computation[name] for name in instruction.operands]
        written = list(instruction.arrays)
        read = [operand.arrays for operand in operands]
        if opcode == "fusion":
            inside = self.computations[_called(instruction)[0]]
            read = [
                self._read_of(p, inside) or a
                for p, a in zip(_parameters(inside), read, strict=True)
            ]
            updates = [i for i in inside.values() if i.opcode == _UPDATE]
            for update in updates:
                # An update in place touches only the updated part of the buffer.
                target = update.arrays[0].dimensions
                part = inside[update.operands[1]].arrays[0]
                written = [
                    dataclasses.replace(part, memory=a.memory)
                    if a.dimensions == target
                    else a
                    for a in written
                ]
                read = [
                    tuple(a for a in arrays if a.dimensions != target)
                    for arrays in read
                ]
        elif opcode == _UPDATE:
            (part,) = operands[1].arrays
            written = [dataclasses.replace(part, memory=instruction.arrays[0].memory)]
            read = [operands[1].arrays]
        elif opcode == "slice" or opcode in _SLICES:
            (part,) = instruction.arrays
            read = [(dataclasses.replace(part, memory=operands[0].arrays[0].memory),)]
        arrays = [*written, *(a for arrays in read for a in arrays)]
        return sum(array.num_bytes for array in arrays if array.memory == memory)

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """The collectives, largest first.

        On a TPU, an asynchronous collective is several fusions: one starts it, others
        continue it beside their own work, one ends it. It is counted once.
        """
        found: dict[tuple[str | None, ...], Collective] = {}
        for instruction, _, times in self._executed(into_fusions=False):
            kind = instruction.opcode.removesuffix("-start")
            if kind in _COLLECTIVES:
                is_async = kind != instruction.opcode
                arrays = instruction.arrays
                if is_async:
                    # (operands, results, context); the largest array is the result.
                    arrays = (max(arrays, key=lambda array: array.num_bytes),)
                key = (instruction.name,)
                found[key] = _collective(instruction, kind, arrays, times, is_async)
            for name, inner in self._inside(instruction):
                if inner.opcode not in _COLLECTIVES:
                    continue
                if name.startswith("all-reduce-scatter"):
                    # Each chip keeps its part of the sum, which is the result of the
                    # fusion.
                    scatter = "reduce-scatter", instruction.arrays, times, False
                    found[(instruction.name,)] = _collective(inner, *scatter)
                else:
                    labels = (r"(channel_id=\d+)", r"(?:chain_id|name)=\"([^\"]*)\"")
                    key = tuple(inner.attribute(label) for label in labels)
                    found.setdefault(
                        key, _collective(inner, inner.opcode, inner.arrays, times, True)
                    )
        return sorted(found.values(), key=lambda collective: -collective.num_bytes)

    @functools.cached_property
    def between_slices(self) -> list[Collective]:
        """The collectives between the chips of several slices, largest first.

        The program is that of one slice, so all its other collectives stay within it. A
        transfer to the Megascale runtime is a collective with the chips at the same place
        of the other slices.
        """
        kinds = (
            (i, times, i.attribute(r'_xla_megascale_transfer_type="(\w+)"'))
            for i, _, times in self._executed(into_fusions=False)
            if i.opcode == "send"
        )
        found = [
            Collective(kind.lower().replace("_", "-"), i.arrays[:1], times)
            for i, times, kind in kinds
            if kind
        ]
        return sorted(found, key=lambda collective: -collective.num_bytes)

    def _read_of(self, operand: Instruction, computation) -> tuple[Array, ...] | None:
        """The slices of an operand that a fusion reads; None if it reads the whole.

        A fusion may read them in a fusion of its own, as those do that overlap with a
        collective.
        """
        found: list[Array] = []
        for user in computation.values():
            if operand.name not in user.operands:
                continue
            if user.opcode in _SLICES and user.operands[0] == operand.name:
                found += user.arrays
                continue
            parts = [None]
            if user.opcode == "bitcast":
                parts = [self._read_of(user, computation)]
            elif user.opcode == "fusion":
                inside = self.computations[_called(user)[0]]
                taken = (name == operand.name for name in user.operands)
                parameters = itertools.compress(_parameters(inside), taken)
                parts = [self._read_of(p, inside) for p in parameters]
            if None in parts:
                return None
            found += itertools.chain.from_iterable(parts)
        memory = operand.arrays[0].memory
        return tuple(dataclasses.replace(a, memory=memory) for a in found) or None

    def _inside(self, instruction: Instruction) -> Iterator[tuple[str, Instruction]]:
        """Yields (computation, instruction) within a fusion, nested fusions included."""
        for name in _called(instruction) if instruction.opcode == "fusion" else ():
            for inner in self.computations[name].values():
                yield name, inner
                yield from self._inside(inner)

    def executions(self, name: str) -> float:
        """Executions of the instructions, such as kernels, whose name has this prefix."""
        return sum(
            times
            for instruction, _, times in self._executed(into_fusions=False)
            if instruction.name.startswith(name)
        )

    def arrays(self) -> Iterator[Array]:
        """Every array that the program stores; arrays inside a fusion are not stored."""
        for instruction, _, _ in self._executed(into_fusions=False):
            yield from instruction.arrays

    def _executed(self, into_fusions: bool):
        """Yields (instruction, its computation, executions) from the entry down."""
        waiting = [(self.entry, 1)]
        while waiting:
            name, times = waiting.pop()
            computation = self.computations[name]
            for instruction in computation.values():
                yield instruction, computation, times
                if instruction.opcode == "while":
                    body = instruction.attribute(r"body=%([^\s,]+)")
                    trips = self._trip_count(instruction, computation)
                    waiting.append((body, times * trips))
                elif instruction.opcode == "conditional":
                    branches = _branches(instruction)
                    for branch, share in zip(branches, self.branch_shares, strict=True):
                        waiting.append((branch, times * share))
                elif instruction.opcode in ("call", "async-start") or (
                    into_fusions and instruction.opcode == "fusion"
                ):
                    for called in _called(instruction):
                        waiting.append((called, times))

    def _trip_count(self, loop: Instruction, computation) -> int:
        if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        # A counted loop compares its counter, which starts at a constant, with another.
        condition = self.computations[loop.attribute(r"condition=%([^\s,]+)")]
        limits = [i.integer for i in condition.values() if i.integer is not None]
        counters = [i for i in condition.values() if i.opcode == "get-tuple-element"]
        start = None
        if len(limits) == len(counters) == 1:
            place = int(counters[0].attribute(r"index=(\d+)"))
            start = _start(loop, place, computation)
        if start is None:
            raise ValueError(f"{loop.name}: the loop's trip count is not a constant")
        # The compiler may have unrolled the loop.
        body = self.computations[loop.attribute(r"body=%([^\s,]+)")]
        *_, root = body.values()
        step = 1
        update = body[root.operands[place]]
        if update.opcode == "add":
            steps = [body[name].integer for name in update.operands]
            step = next((n for n in steps if n is not None), 1)
        return len(range(start, limits[0], step))


def _is_free(instruction: Instruction) -> bool:
    return instruction.opcode in _FREE or "AllocateBuffer" in instruction.attributes


def _is_done(instruction: Instruction) -> bool:
    return instruction.opcode.endswith("-done")


def _ends_here(instruction: Instruction, computation) -> bool:
    """Whether the end of an asynchronous instruction is in the same computation."""
    return any(
        _is_done(i) and i.operands[0] == instruction.name for i in computation.values()
    )


def _start(loop: Instruction, place: int, computation) -> int | None:
    """The first value of a loop's counter; not 0 if the compiler peeled iterations."""
    carried = computation[loop.operands[0]]
    while carried.opcode in ("tuple", "copy", "bitcast"):
        index = place if carried.opcode == "tuple" else 0
        carried = computation[carried.operands[index]]
    return carried.integer


def _instruction(name: str, text: str) -> Instruction:
    shape, opcode, rest = _OPCODE.match(text).groups()
    arrays = tuple(
        Array(
            dtype,
            tuple(map(int, filter(None, dimensions.split(",")))),
            memory=next((m for space, m in _MEMORIES if space in layout), "hbm"),
        )
        for dtype, dimensions, layout in _ARRAY.findall(shape)
    )
    operands = tuple(re.findall(r"%([\w.-]+)", rest.split(")", 1)[0]))
    return Instruction(name, opcode, arrays, operands, rest)


def _collective(instruction, kind, arrays, times, is_async) -> Collective:
    return Collective(kind, tuple(arrays), times, _group(instruction), is_async)


def _group(instruction: Instruction) -> tuple[int, ...]:
    """The first group of devices of a collective, in any of three notations."""
    groups = instruction.attributes.partition("replica_groups=")[2]
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return tuple(map(int, listed[1].split(",")))
    if mesh := re.match(r"mesh\[([^\]]*)\] \{([^}]*)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        shape = [int(size) for size in sizes.values()]
        axes = [list(sizes).index(axis) for axis in re.findall(r"'(\w+)'", mesh[2])]
        devices = np.arange(math.prod(shape)).reshape(shape)
        within = [slice(None) if i in axes else 0 for i in range(len(shape))]
        return tuple(devices[tuple(within)].ravel().tolist())
    if iota := re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups):
        shape = [int(size) for size in iota[3].split(",")]
        devices = np.arange(math.prod(shape)).reshape(shape)
        if iota[4]:
            devices = devices.transpose([int(axis) for axis in iota[4].split(",")])
        return tuple(devices.ravel()[: int(iota[2])].tolist())
    return ()


def _parameters(computation: dict[str, Instruction]) -> list[Instruction]:
    """The parameters of a computation, in order."""
    found = (i for i in computation.values() if i.opcode == "parameter")
    return sorted(found, key=lambda i: int(i.attributes.split(")")[0]))


def _called(instruction: Instruction) -> list[str]:
    pattern = r"(?:calls|to_apply|called_computations|branch_computations)="
    names = re.search(pattern + r"\{?((?:%[^\s,}]+(?:, )?)+)", instruction.attributes)
    return re.findall(r"%([^\s,}]+)", names[1]) if names else []


def _branches(conditional: Instruction) -> list[str]:
    """The computations of a conditional; the false branch first, as with an index."""
    names = [
        conditional.attribute(rf"{kind}_computation=%([^\s,}}]+)")
        for kind in ("false", "true")
    ]
    return names if all(names) else _called(conditional)


def _product_flops(instruction: Instruction, computation) -> int:
    """FLOPs, two per multiply-add; on a TPU every product is a convolution."""
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    left, right = (computation[name].arrays[0] for name in instruction.operands)
    out = instruction.arrays[0].dimensions
    if instruction.opcode == "dot":
        axes = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        contracted = [left.dimensions[int(axis)] for axis in axes.split(",") if axis]
        return 2 * math.prod(out) * math.prod(contracted)
    left_labels, right_labels, out_labels = re.search(
        r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes
    ).groups()
    total = 2 * right.dimensions[right_labels.index("i")]
    for label, size in zip(out_labels, out, strict=True):
        if label.isdigit():
            total *= _window_positions(
                instruction,
                int(label),
                left.dimensions[left_labels.index(label)],
                right.dimensions[right_labels.index(label)],
                size,
            )
        else:
            total *= size
    return total


def _window_positions(instruction, axis, in_size, window_size, out_size) -> int:
    """Number of pairs of output and window positions that read an input element.

    Batched products are convolutions with one element per window position.
    """
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""

    def setting(name, default):
        found = re.search(rf"\b{name}=(\S+)", window)
        return found[1].split("x")[axis] if found else default

    stride = int(setting("stride", 1))
    low = int(setting("pad", "0_0").split("_")[0])
    in_step = int(setting("lhs_dilate", 1))
    window_step = int(setting("rhs_dilate", 1))
    last = (in_size - 1) * in_step
    return sum(
        0 <= (position := o * stride - low + w * window_step) <= last
        and position % in_step == 0
        for o in range(out_size)
        for w in range(window_size)
    )
