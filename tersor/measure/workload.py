"""What one pass of a model computes and moves: operations in their order, the buffers between them, the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

FLOAT_BITS = 32.0


@dataclass(frozen=True)
class Operation:
    """One step as a runtime runs it: a product with what is fused to it, or any other operator.

    ``macs`` and element counts are of the whole batch. ``weights``: tensor → elements that the step reads of it.
    ``scratch``: elements that live during the step alone. ``compute``: "float" or "int8", as the model stands.
    """

    layer: str
    operator: str
    macs: int
    weights: Mapping[str, int]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    scratch: int = 0
    compute: str = "float"


@dataclass(frozen=True)
class LayerCost:
    """A layer's share of a pass: multiply-accumulates and bytes moved, all of its operations together.

    ``weight_bytes``: weights read; ``activation_bytes``: what is read and written between operations.
    """

    path: str
    operator: str
    macs: int
    weight_bytes: float
    activation_bytes: float
    compute: str = "float"

    @property
    def bytes(self) -> float:
        """Everything that moves."""
        return self.weight_bytes + self.activation_bytes

    @property
    def intensity(self) -> float:
        """Operations (two per multiply-accumulate) for each byte moved."""
        return 2 * self.macs / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Workload:
    """A pass over ``batch`` samples. ``values``: buffer → elements; ``weights``: tensor → elements.

    ``bits``: of a buffer's or a weight's element where it has not 32. ``given``, ``taken``: the buffers of the model's
    inputs and outputs. ``notes``: what could not be counted.
    """

    name: str
    batch: int
    operations: tuple[Operation, ...]
    values: Mapping[str, int]
    weights: Mapping[str, int]
    bits: Mapping[str, float]
    given: tuple[str, ...]
    taken: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def bytes_of(self, name: str, elements: int | None = None) -> float:
        """Bytes of a buffer or a weight, or of so many of its elements."""
        count = elements if elements is not None else self.values.get(name, self.weights.get(name, 0))
        return count * self.bits.get(name, FLOAT_BITS) / 8

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole batch."""
        return sum(operation.macs for operation in self.operations)

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights, tied ones once."""
        return sum(self.bytes_of(name) for name in self.weights)

    @property
    def compute(self) -> str:
        """ "int8" where most products are in integers, else "float"."""
        integer = sum(operation.macs for operation in self.operations if operation.compute == "int8")
        return "int8" if 2 * integer > self.macs else "float"

    def activation_peak(self) -> float:
        """Most bytes of buffers that are alive at once, those of the operation that runs included.

        A buffer lives from the operation that writes it to the last that reads it; inputs from the beginning, outputs
        to the end. Buffers that an elementwise operation may overwrite are one. What an allocator wastes, and the
        scratch of kernels, are not in it.
        """
        last = {name: -1 for name in self.given}
        for number, operation in enumerate(self.operations):
            last |= dict.fromkeys((*operation.reads, *operation.writes), number)
        last |= dict.fromkeys(self.taken, len(self.operations))
        dying: dict[int, set[str]] = {}
        for name, number in last.items():
            dying.setdefault(number, set()).add(name)
        live = set(self.given)
        total = peak = sum(map(self.bytes_of, live))
        for number, operation in enumerate(self.operations):
            for name in set(operation.writes) - live:
                live.add(name)
                total += self.bytes_of(name)
            peak = max(peak, total + self._scratch(operation))
            for name in dying.get(number, set()) & live:
                live.discard(name)
                total -= self.bytes_of(name)
        return peak

    def layers(self) -> tuple[LayerCost, ...]:
        """A row for each layer in the order of its first operation."""
        found: dict[str, LayerCost] = {}
        for operation in self.operations:
            read = sum(self.bytes_of(name, elements) for name, elements in operation.weights.items())
            moved = sum(map(self.bytes_of, (*operation.reads, *operation.writes))) + 4 * self._scratch(operation)
            before = found.get(operation.layer)
            row = LayerCost(
                operation.layer, operation.operator, operation.macs, read, moved, operation.compute
            )  # fmt: skip
            if before is not None:
                named = before if before.macs >= operation.macs else row
                row = LayerCost(
                    operation.layer, named.operator, before.macs + row.macs, before.weight_bytes + read,
                    before.activation_bytes + moved, named.compute,
                )  # fmt: skip
            found[operation.layer] = row
        return tuple(found.values())

    def stored_in(self, weight_bits: float, activation_bits: float, compute: str) -> Workload:
        """The same pass with weights and buffers of at most so many bits, and products computed in ``compute``."""
        limits = {**dict.fromkeys(self.values, activation_bits), **dict.fromkeys(self.weights, weight_bits)}
        bits = {name: min(limit, self.bits.get(name, FLOAT_BITS)) for name, limit in limits.items()}
        operations = tuple(
            replace(operation, compute=compute if operation.macs else operation.compute)
            for operation in self.operations
        )
        return replace(self, bits=bits, operations=operations)

    def narrowed(self, keep: float) -> Workload:
        """The same pass with a share ``keep`` of all channels, counted roughly.

        Products and their weights shrink to its square (those of depthwise layers to itself), buffers to itself;
        inputs and outputs stay.
        """
        ends = {*self.given, *self.taken}
        deep = {name for op in self.operations if op.operator.startswith("depthwise") for name in op.weights}
        values = {name: count if name in ends else round(keep * count) for name, count in self.values.items()}
        weights = {name: round(keep ** (1 if name in deep else 2) * n) for name, n in self.weights.items()}
        operations = tuple(
            replace(
                op, macs=round(keep ** (1 if op.operator.startswith("depthwise") else 2) * op.macs),
                weights={name: round(keep ** (1 if name in deep else 2) * n) for name, n in op.weights.items()},
                scratch=round(keep * op.scratch),
            )
            for op in self.operations
        )  # fmt: skip
        return replace(self, operations=operations, values=values, weights=weights)

    def _scratch(self, operation: Operation) -> float:
        widths = [self.bits.get(name, FLOAT_BITS) for name in operation.writes]
        return operation.scratch * max(widths, default=FLOAT_BITS) / 8


@dataclass(eq=False)
class Builder:
    """Puts a workload together, call by call: views share a buffer, elementwise operators join what they follow.

    ``readers``: how many operations read each value; a value that the model gives counts as one more.
    """

    readers: Mapping[str, int]
    sizes: dict[str, int] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)
    _buffer: dict[str, str] = field(default_factory=dict)
    _shared: dict[str, int] = field(default_factory=dict)  # buffer → reads that are still to come
    _maker: dict[str, int] = field(default_factory=dict)  # buffer → the operation that wrote it last

    def give(self, value: str, elements: int, bits: float) -> None:
        """A buffer of its own for ``value``."""
        self.sizes[value], self._buffer[value] = elements, value
        self._shared[value] = self.readers.get(value, 0)
        if bits != FLOAT_BITS:
            self.bits[value] = bits

    def alias(self, value: str, source: str, bits: float | None = None) -> None:
        """``value`` is a view of ``source``; with ``bits``, it is how the buffer is really stored."""
        buffer = self._buffer[source]
        self._buffer[value] = buffer
        self._shared[buffer] += self.readers.get(value, 0) - 1
        if bits is not None:
            self.bits[buffer] = min(bits, self.bits.get(buffer, FLOAT_BITS))

    def knows(self, value: str) -> bool:
        """Whether the value has a buffer."""
        return value in self._buffer

    def buffers(self, values: Iterable[str]) -> tuple[str, ...]:
        """The buffers of values, each once."""
        return tuple(dict.fromkeys(self._buffer[value] for value in values if value in self._buffer))

    def run(self, operation: Operation, results: Mapping[str, tuple[int, float]]) -> None:
        """Append an operation whose ``reads`` are values; ``results``: value → elements and bits."""
        buffers = self.buffers(operation.reads)
        for value, (elements, bits) in results.items():
            self.give(value, elements, bits)
            self._maker[value] = len(self.operations)
        self.operations.append(replace(operation, reads=buffers, writes=tuple(results)))
        self._read(operation.reads)

    def elementwise(self, operation: Operation, value: str, elements: int, bits: float) -> None:
        """Append an elementwise operation: into the product that it follows, else in place where its input dies."""
        own = [name for name in self.buffers(operation.reads) if self.sizes[name] == elements]
        dying = [name for name in own if self._shared[name] == sum(self._buffer[v] == name for v in operation.reads)]
        made = max(dying, key=lambda name: self._maker.get(name, -1), default=None)
        if made is None:
            self.run(operation, {value: (elements, bits)})
            return
        maker = self._maker.get(made)
        others = tuple(name for name in self.buffers(operation.reads) if name != made)
        ready = maker is not None and all(self._maker.get(name, -1) <= maker for name in others)
        if maker is not None and ready and self.operations[maker].macs:
            before = self.operations[maker]
            self.operations[maker] = replace(
                before, reads=tuple(dict.fromkeys((*before.reads, *others))),
                weights={**before.weights, **operation.weights},
            )  # fmt: skip
        else:
            self._maker[made] = len(self.operations)
            self.operations.append(replace(operation, reads=(made, *others), writes=(made,)))
        self._read(operation.reads)
        self._buffer[value] = made
        self._shared[made] = self.readers.get(value, 0)

    def _read(self, values: Sequence[str]) -> None:
        for value in values:
            if value in self._buffer:
                self._shared[self._buffer[value]] -= 1

    def workload(
        self, name: str, batch: int, weights: Mapping[str, int], given: Iterable[str], taken: Iterable[str],
        notes: tuple[str, ...] = (),
    ) -> Workload:  # fmt: skip
        """What was put together."""
        return Workload(
            name, batch, tuple(self.operations), dict(self.sizes), dict(weights), dict(self.bits),
            self.buffers(given), self.buffers(taken), notes,
        )  # fmt: skip
