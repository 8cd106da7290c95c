"""The teacher's answers on disk: each view of each sample is asked for once."""

from __future__ import annotations

import errno
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tersor.core.check_fields import check_fields
from tersor.core.errors import InputError
from tersor.core.keyed import Keyed, KeyedLoader
from tersor.core.progress import Progress
from tersor.core.row_hash import row_hash
from tersor.core.task import Arguments, Task
from tersor.distill.records import Column, Records, Shelf
from tersor.distill.stored_answer import decode, distance, encode, storable
from tersor.train.checkpoint import fingerprint
from tersor.train.replay import replayed
from tersor.train.teacher import Answer, Answers, Ask, device_of_inputs

VERSION = 1
TOLERANCE = {False: 2**-8, True: 2**-4}  # of a stored answer beside one computed again: fp16 and, autocast, bfloat16


@dataclass(frozen=True)
class TeacherCache:
    """Keeps what the teacher says to each (sample, view) in ``folder``; ``on(task)`` gives the task that uses it.

    Args:
        folder: where; several trainings and processes may share it, at the same time too.
        views: how many versions of each sample augmentation makes: epoch e gives view e modulo ``views``. The teacher
            runs in the first ``views`` epochs, and no more.
        top_k: of the logits (last axis) only so many of the largest are kept, with the mass of the rest; None: all.
        budget_bytes: what the folder may take. Records that nobody uses go first; then samples go without.
        refresh: this fraction of batches is computed although it is there, and compared; the very first one always.
        seed: of the augmentation.

    A record is believed where its checksum holds and the hash of the teacher's input is the batch's: data or transforms
    that changed, torn writes and damage are computed anew. Another teacher has other records (a hash of its weights and
    of what it prints); where a batch that is compared differs from what is stored, by more than fp16 explains, all
    records of that teacher count as empty. A disk that is full, or a folder that cannot be written, is said once, and
    training goes on.

    Raises InputError for settings out of range.
    """

    folder: str
    views: int = 4
    top_k: int | None = None
    budget_bytes: int = 4 * 2**30
    refresh: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, smallest in (("views", 1), ("budget_bytes", 1), ("top_k", 1)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError("too small", where=f"TeacherCache.{name}", got=value, expected=f"{smallest} or more")
        if not 0 <= self.refresh <= 1:
            raise InputError("no fraction", where="TeacherCache.refresh", got=self.refresh, expected="0 … 1")

    def on(self, task: Task, progress: Progress | None = None) -> Task:
        """The task with a train loader whose views come again and whose batches bring the teacher's answers.

        Raises InputError where the task has no teacher or no training data, and where the loader cannot be replayed.
        """
        if task.reference is None:
            raise InputError("there is no teacher", where="task.reference", got="None", do="Pass task.complete()")
        if task.train is None:
            raise InputError("there is no training data", where="task.train", got="None", expected="a loader")
        loader = task.train if isinstance(task.train, KeyedLoader) else replayed(task.train, self.views, self.seed)
        whole = loader.shared(0, 1)
        whole.answers = CachedAnswers(self, task.reference, whole, progress or Progress())
        return replace(task, train=whole)


@dataclass
class _Counts:
    """Rows: answered from disk, computed, computed although they were there; written, not believed. And seconds."""

    hits: int = 0
    computed: int = 0
    checked: int = 0
    written: int = 0
    refused: int = 0
    asking: float = 0.0
    looking: float = 0.0


class CachedAnswers(Answers):
    """The answers that ``settings.folder`` holds of one teacher to the views of one loader's samples."""

    def __init__(self, settings: TeacherCache, teacher: nn.Module, loader: KeyedLoader, progress: Progress):
        self.settings, self.progress, self.counts = settings, progress, _Counts()
        self._teacher, self._samples, self._views = teacher, loader.samples, loader.views
        self._shelf = Shelf(Path(settings.folder), settings.budget_bytes)
        self._identity: str | None = None
        self._open: dict[str, Records] = {}
        self._unproven: set[str] = set()
        self._said: list[str] = []
        self._off = False
        self._batches = 0

    def answer(self, keyed: Keyed, inputs: Arguments, layers: tuple[str, ...], ask: Ask) -> Answer:
        begun = time.perf_counter()
        batch = _Batch(keyed, inputs, self._samples)
        key, autocast = self._key(layers, batch.device), torch.is_autocast_enabled(batch.device.type)
        records = self._records(key)
        if records is None:
            return self._computed(key, batch, np.arange(len(batch)), ask)
        found, others, stored = records.read(batch.slots, batch.hashes)
        self.counts.refused += others
        self.counts.looking += time.perf_counter() - begun
        if not found.any():
            return self._computed(key, batch, np.arange(len(batch)), ask)
        if self._due(key):
            return self._compared(key, batch, found, stored, ask, TOLERANCE[autocast])
        if not found.all():
            return self._completed(key, batch, found, stored, ask)
        self.counts.hits += len(batch)
        return decode(stored, batch.device)

    def _computed(self, key: str, batch: _Batch, keep: NDArray[np.int64], ask: Ask) -> Answer:
        """What the teacher says, as it would be read again, so that a training is the same with a warm cache."""
        answer, columns = self._ask(ask, batch.inputs, len(batch))
        self._keep(key, batch, keep, columns)
        return decode(columns, batch.device) if bool(storable(columns).all()) else answer

    def _compared(
        self, key: str, batch: _Batch, found: NDArray[np.bool_], stored: Mapping[str, Tensor], ask: Ask, most: float
    ) -> Answer:
        """What the teacher says; where that is not what is stored, everything stored is forgotten."""
        answer, columns = self._ask(ask, batch.inputs, len(batch))
        by = distance(stored, {name: value[torch.from_numpy(found)] for name, value in columns.items()})
        if by > most:
            self._say(f"what is stored differs from what the teacher says now (relative {by:.2g}): it is made anew")
            self._renew(key)
        self.counts.checked += int(found.sum())
        self._keep(key, batch, np.arange(len(batch)), columns)
        return decode(columns, batch.device) if bool(storable(columns).all()) else answer

    def _completed(
        self, key: str, batch: _Batch, found: NDArray[np.bool_], stored: Mapping[str, Tensor], ask: Ask
    ) -> Answer:
        """What is stored, and what the teacher says to the rest."""
        missing = np.nonzero(~found)[0]
        _, columns = self._ask(ask, batch.rows(missing), len(missing))
        self._keep(key, batch, missing, columns)
        if not self._open[key].fits(columns) or not bool(storable(columns).all()):
            return self._computed(key, batch, np.zeros(0, dtype=np.int64), ask)
        self.counts.hits += int(found.sum())
        order = torch.from_numpy(np.argsort(np.concatenate([np.nonzero(found)[0], missing])))
        return decode({name: torch.cat([stored[name], columns[name]])[order] for name in stored}, batch.device)

    def _ask(self, ask: Ask, inputs: Arguments, count: int) -> tuple[Answer, dict[str, Tensor]]:
        begun = time.perf_counter()
        answer = ask(inputs)
        columns = encode(answer, self.settings.top_k)  # on the CPU, so that it is done when this is
        self.counts.asking += time.perf_counter() - begun
        self.counts.computed += count
        return answer, columns

    def _due(self, key: str) -> bool:
        """Whether this batch is one that is compared: the first of records found on disk, and one in 1 / refresh."""
        self._batches += 1
        if key in self._unproven:
            self._unproven.remove(key)
            return True
        return int(self._batches * self.settings.refresh) > int((self._batches - 1) * self.settings.refresh)

    # Files ------------------------------------------------------------------------------------------------------------

    def _key(self, layers: tuple[str, ...], device: torch.device) -> str:
        if self._identity is None:
            self._identity = fingerprint({"teacher": str(self._teacher)}, self.settings.seed, self._teacher)
        dtype = str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else ""
        facts = [VERSION, self._identity, self._samples, sorted(layers), self.settings.top_k, dtype]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]

    def _records(self, key: str) -> Records | None:
        if key not in self._open and not self._off:
            try:
                found = self._shelf.find(key, self._views * self._samples)
            except OSError as error:
                self._without(error)
                return None
            if found is not None:
                self._unproven.add(key)
                self._opened(key, found)
        return self._open.get(key)

    def _opened(self, key: str, records: Records) -> None:
        self._open[key] = records
        wanted = self._views * self._samples
        if not records.writable:
            self._say("the folder is read-only: what it holds is used, nothing is added")
        elif records.slots < wanted:
            self._say(
                f"{self.settings.budget_bytes:,} bytes hold {records.slots:,} of {wanted:,} answers of {records.size} "
                "bytes: the others are computed each time"
            )

    def _keep(self, key: str, batch: _Batch, rows: NDArray[np.int64], columns: Mapping[str, Tensor]) -> None:
        """Write ``columns``, which are of these rows, or of the whole batch."""
        if self._off or not len(rows):
            return
        if len(next(iter(columns.values()))) != len(rows):
            columns = {name: value[torch.from_numpy(rows)] for name, value in columns.items()}
        good = storable(columns).numpy()
        if not good.all():
            self._say("answers beyond the range of fp16 (65,504) are not kept")
            rows, columns = rows[good], {name: value[torch.from_numpy(good)] for name, value in columns.items()}
        try:
            if key not in self._open:
                schema = tuple(Column.of(name, value) for name, value in columns.items())
                self._opened(key, self._shelf.create(key, schema, self._views * self._samples))
            records = self._open[key]
            if not records.writable:
                return
            if not records.fits(columns):
                self._say("answers of other shapes are not kept: give batches of one length (pad to a fixed one)")
                return
            self.counts.written += records.write(batch.slots[rows], batch.hashes[rows], columns)
        except OSError as error:
            self._without(error)

    def _renew(self, key: str) -> None:
        try:
            self._open[key] = self._shelf.renew(self._open[key])
        except OSError as error:
            del self._open[key]
            self._without(error)

    def _without(self, error: OSError) -> None:
        """Nothing more is written; what is open is still read."""
        self._off = True
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "its disk is full" if full else f"it cannot be used ({error.strerror or error})"
        self._say(f"{why}: going on without keeping answers. Make room, or name another folder")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.append(text)
            self.progress.say(f"teacher cache {self.settings.folder}: {text}")

    # What the run says ------------------------------------------------------------------------------------------------

    def facts(self) -> Mapping[str, Any]:
        counts = self.counts
        each = counts.asking / counts.computed if counts.computed else 0.0
        return {
            "hits": counts.hits,
            "computed": counts.computed,
            "checked": counts.checked,
            "written": counts.written,
            "refused": counts.refused,
            "bytes": sum(records.bytes for records in self._open.values()),
            "seconds_saved": round(counts.hits * each - counts.looking, 3),
            "notes": list(self._said),
        }

    def sentence(self) -> str:
        facts = self.facts()
        asked = facts["hits"] + facts["computed"]
        return (
            f"teacher cache: {facts['hits']:,} of {asked:,} from disk, {facts['checked']:,} computed to compare, "
            f"{facts['refused']:,} not believed; {facts['bytes']:,} bytes, {facts['seconds_saved']:.1f} s saved"
        )


class _Batch:
    """A batch as the cache sees it: its slots, and the hashes of what the teacher is given. [batch]"""

    def __init__(self, keyed: Keyed, inputs: Arguments, samples: int):
        self.inputs, self._count = inputs, len(keyed.samples)
        self.slots: NDArray[np.int64] = keyed.view * samples + keyed.samples.numpy()
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        self.device = device_of_inputs(inputs)
        self.hashes: NDArray[np.int64] = np.zeros(self._count, dtype=np.int64)
        with np.errstate(over="ignore"):
            for number, tensor in enumerate(tensors):
                rows = tensor if self._one_each(tensor) else tensor[None]
                self.hashes = self.hashes * np.int64(31) + row_hash(rows, _seed(number, rows)).numpy()

    def __len__(self) -> int:
        return self._count

    def _one_each(self, tensor: Tensor) -> bool:
        return tensor.ndim > 0 and len(tensor) == self._count

    def rows(self, chosen: NDArray[np.int64]) -> Arguments:
        """The inputs of these rows alone."""
        index = torch.from_numpy(chosen).to(self.device)
        args, kwargs = tree_map(
            lambda leaf: leaf[index.to(leaf.device)] if isinstance(leaf, Tensor) and self._one_each(leaf) else leaf,
            (tuple(self.inputs[0]), dict(self.inputs[1])),
        )
        return args, kwargs


def _seed(number: int, rows: Tensor) -> int:
    """Of a tensor's hash: its place among the inputs, its type and its shape without the batch."""
    text = f"{number} {rows.dtype} {list(rows.shape[1:])}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
