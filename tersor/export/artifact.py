"""A compressed model on disk: architecture.json (the base and its edits), model.safetensors, card.md. No pickle.

docs/artifact-format.md describes the files.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from tersor.core.apply import write
from tersor.core.edit import Attribute, Edit, Mask, Quantizer, Slice, edit_from_json, edit_to_json
from tersor.core.errors import ArtifactError, InputError, TersorError
from tersor.core.files import write_atomically
from tersor.core.place import module_at, tensor_at
from tersor.core.plan import Plan
from tersor.export.base import Base, state_entries
from tersor.export.packed_tensors import INTEGERS
from tersor.export.sparse_tensors import GAPS, PLACES
from tersor.export.weights import EDITS, Encode, Layout, from_bytes, load_into, model_tensors, to_bytes

FORMAT = "tersor-artifact"
# 2: some tensors without their zeros; 3: some as integers; 4: some of those in steps that are learnt; 5: some by gaps
VERSION, ENCODED_VERSION, INTEGER_VERSION, LEARNT_VERSION, GAPS_VERSION = VERSIONS = (1, 2, 3, 4, 5)
ARCHITECTURE, WEIGHTS, CARD = "architecture.json", "model.safetensors", "card.md"
_LARGEST_JSON = 256 * 2**20  # bytes
_TUPLE = "__tuple__"
_PLAIN = (bool, int, float, str, type(None), tuple, list, dict)


def save_artifact(
    folder: Path,
    model: nn.Module,
    *,
    original: nn.Module | Base,
    plans: Sequence[Plan],
    card: str = "",
    extra: Mapping[str, Any] | None = None,
    encode: Encode = "dense",
) -> Path:
    """Save ``model``, which is ``original`` after ``plans`` (and any training), so that ``load_artifact`` rebuilds it.

    ``original``: the model before the first plan, or ``Base.of`` it. With the model itself, the edits are first
    replayed on a copy, so that an artifact which cannot be loaded is never written. ``extra``: plain JSON values to
    keep with it. ``encode="smallest"`` leaves zeros out of the tensors, and stores weights under a quantiser as its
    integers, where that makes the file smaller: what a mask hides, and what rounding takes away, is not kept (training
    on starts from the rounded weights), and the outputs are the same. architecture.json is written last and seals the
    others. Returns ``folder``.

    Raises ArtifactError where the plans do not lead from the original to the model, or something has no plain form, and
    InputError where folder and model change places (as torch.save has them) or the encoding is unknown.
    """
    if isinstance(folder, nn.Module):
        raise InputError(
            "the folder comes first, then the model", where="save_artifact(folder, model)", got=type(folder).__name__,
            expected="the path of a folder", do='tersor.save("model", compressed, original=…, plans=…)',
        )  # fmt: skip
    folder = Path(folder)
    base = original if isinstance(original, Base) else Base.of(original)
    if encode not in get_args(Encode):
        raise InputError(
            "unknown encoding", where="save_artifact(encode=)", got=repr(encode), expected=get_args(Encode)
        )
    tensors, layout = model_tensors(model, encode)
    said = [_plan_json(plan, f"{EDITS}{number}", tensors) for number, plan in enumerate(plans)]
    if isinstance(original, nn.Module):
        _expect_rebuildable(original, said, tensors, model)
    data = to_bytes(tensors, layout)
    architecture: dict[str, Any] = {
        "format": FORMAT,
        "version": _version(layout),
        "base": base.to_json(),
        "plans": said,
        "weights": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)},
        **layout.to_json(),
        "extra": dict(extra or {}),
    }
    text = _seal(architecture)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / WEIGHTS, data)
        write_atomically(folder / CARD, (card or _default_card(base, plans, len(data))).encode())
        write_atomically(folder / ARCHITECTURE, text.encode())
    except OSError as error:
        raise ArtifactError("the artifact cannot be written", where=str(folder), got=error.strerror or error) from error
    return folder


def _version(layout: Layout) -> int:
    """The oldest that can read it."""
    if {how["kind"] for how in layout.encoded.values()} & {GAPS, PLACES}:
        return GAPS_VERSION
    integers = [how for how in layout.encoded.values() if how["kind"] == INTEGERS]
    if integers:
        return LEARNT_VERSION if any("growth" in how for how in integers) else INTEGER_VERSION
    return ENCODED_VERSION if layout.encoded else VERSION


def load_artifact(folder: Path, model: nn.Module, *, in_place: bool = False) -> nn.Module:
    """The saved model, in eval mode: a copy of ``model`` with the artifact's edits replayed and its weights loaded.

    ``model``: the original architecture, fresh or trained (its values do not count). ``in_place`` edits ``model``
    itself, which saves a copy; after an error it is then half edited.

    Raises ArtifactError where ``model`` is not the original, or a file is missing, damaged, foreign or of another
    version.
    """
    architecture, _, layout, tensors = _read(Path(folder), model)
    target = model if in_place else copy.deepcopy(model)
    _replay(target, architecture["plans"], tensors)
    load_into(target, tensors, layout)
    return target.eval()


def read_edits(folder: Path) -> tuple[Edit, ...]:
    """The edits that lead from the original to the saved model, in order. Raises ArtifactError.

    Index lists are the real ones; the values of masks, scales and writes are placeholders, since the weights hold them.
    """
    architecture, base, _, tensors = _read(Path(folder))
    largest = max([math.prod(shape) for _, _, shape in base.state] + [t.numel() for t in tensors.values()], default=0)
    return tuple(
        _edit_of(data, tensors, largest, f"edit {number} ({method})")
        for number, (method, data) in enumerate(_said_edits(architecture["plans"]))
    )


def _read(folder: Path, model: nn.Module | None = None) -> tuple[dict[str, Any], Base, Layout, dict[str, Tensor]]:
    """Everything; refused before the weights are read where ``model`` is not the original."""
    architecture = read_architecture(folder)
    base, layout = Base.from_json(architecture["base"]), Layout.from_json(architecture)
    if model is not None:
        base.expect(model)
    _expect_no_bomb(base, layout)
    return architecture, base, layout, from_bytes(_read_weights(folder, architecture["weights"]), layout)


def _expect_no_bomb(base: Base, layout: Layout) -> None:
    """Two bytes of steps stand for up to 65,535 numbers: what they unpack to is limited before they are unpacked."""
    unpacked = sum(math.prod(how["shape"]) for how in layout.encoded.values())
    most = 16 * sum(math.prod(shape) for _, _, shape in base.state) + 2**28
    if unpacked > most:
        raise ArtifactError(
            "what is encoded does not fit the original", where=ARCHITECTURE, got=f"{unpacked:,} numbers"[:60],
            expected=f"at most {most:,}", do="The artifact is damaged, or was made to fill the memory",
        )  # fmt: skip


def read_architecture(folder: Path) -> dict[str, Any]:
    """architecture.json, its format, version and checksum checked. Raises ArtifactError."""
    path = Path(folder) / ARCHITECTURE
    try:
        size = path.stat().st_size
        text = path.read_bytes() if size <= _LARGEST_JSON else b""
    except OSError as error:
        files = f"{ARCHITECTURE} and {WEIGHTS}"
        raise ArtifactError("there is no saved model", where=str(folder), got=error.strerror, expected=files) from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtifactError("this is no Tersor artifact", where=str(path), expected=f'"format": "{FORMAT}"')
    if data.get("version") not in VERSIONS:
        expected = f"{', '.join(map(str, VERSIONS[:-1]))} or {VERSIONS[-1]}"
        raise ArtifactError(
            "the artifact has another version", where=str(path), got=data.get("version"), expected=expected,
            do="Load it with the Tersor that wrote it",
        )  # fmt: skip
    given = data.pop("checksum", None)
    if given != _checksum(data):
        raise _damaged(path, "its checksum does not match")
    missing = {"base", "plans", "weights", "tied", "packed", "extra_state", "extra"} - data.keys()
    if missing:
        raise _damaged(path, f"no {', '.join(sorted(missing))}")
    return data


def _read_weights(folder: Path, said: Any) -> bytes:
    path = folder / WEIGHTS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError("the weights are not there", where=str(path), got=error.strerror) from error
    if not isinstance(said, Mapping) or hashlib.sha256(data).hexdigest() != said.get("sha256"):
        expected = said.get("bytes") if isinstance(said, Mapping) else "a hash"
        raise _damaged(path, f"{len(data)} bytes whose hash is not the one in {ARCHITECTURE} (saved: {expected} bytes)")
    return data


def _damaged(path: Path, got: str) -> ArtifactError:
    return ArtifactError(
        "the file is damaged, incomplete or was changed by hand", where=str(path), got=got[:300],
        do="Copy the artifact again, or resume the run that wrote it",
    )  # fmt: skip


def _checksum(architecture: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(architecture, sort_keys=True).encode()).hexdigest()


def _seal(architecture: Mapping[str, Any]) -> str:
    try:
        plain = json.loads(json.dumps(architecture, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtifactError("extra= has no plain form", where=ARCHITECTURE, got=error) from error
    return _dump(plain | {"checksum": _checksum(plain)})


def _dump(architecture: Mapping[str, Any]) -> str:
    """JSON with a line for each edit: short, and easy to compare."""
    plans = []
    for plan in architecture["plans"]:
        edits = ",\n".join(f"    {json.dumps(edit)}" for edit in plan["edits"])
        plans.append(f'  {{"method": {json.dumps(plan["method"])}, "edits": [\n{edits}\n  ]}}')
    lines = [f'"{key}": {json.dumps(value)}' for key, value in architecture.items() if key != "plans"]
    lines.insert(3, '"plans": [\n' + ",\n".join(plans) + "\n]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _plan_json(plan: Plan, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    edits = [_edit_json(edit, f"{key}.{number}", tensors) for number, edit in enumerate(plan.edits)]
    return {"method": plan.method, "edits": edits}


def _edit_json(edit: Edit, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    data = _with_tuples(edit_to_json(edit, key, tensors))
    try:
        json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            "an edit has no plain form", where=f"{type(edit).__name__} {data.get('module', data.get('place', ''))}",
            got=error, expected="numbers, strings, lists and dictionaries",
        ) from error  # fmt: skip
    return data


def _with_tuples(value: Any) -> Any:
    """JSON has no tuples: {"__tuple__": […]} stands for one."""
    if isinstance(value, tuple):
        return {_TUPLE: [_with_tuples(item) for item in value]}
    if isinstance(value, list):
        return [_with_tuples(item) for item in value]
    return {key: _with_tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


def _tuples_back(value: Any) -> Any:
    if isinstance(value, list):
        return [_tuples_back(item) for item in value]
    if isinstance(value, dict):
        if set(value) == {_TUPLE} and isinstance(value[_TUPLE], list):
            return tuple(_tuples_back(item) for item in value[_TUPLE])
        return {key: _tuples_back(item) for key, item in value.items()}
    return value


# What a hostile or damaged edit makes of torch and Python on its way.
_FINDINGS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,
    MemoryError,
    TersorError,
)


def _replay(model: nn.Module, plans: Any, tensors: Mapping[str, Tensor]) -> None:
    """Carry the saved edits out on ``model``, each checked before anything is allocated for it."""
    everything = [*tensors.values(), *model.parameters(), *model.buffers()]
    largest = max((tensor.numel() for tensor in everything), default=0)
    for number, (method, data) in enumerate(_said_edits(plans)):
        where = f"edit {number} ({method})"
        edit = _edit_of(data, tensors, largest, where)
        try:
            _expect_sane(model, edit)
            write(model, edit)
        except _FINDINGS as error:
            raise _cannot(error, where) from error


def _said_edits(plans: Any) -> list[tuple[str, Any]]:
    try:
        return [(str(plan["method"])[:40], edit) for plan in plans for edit in plan["edits"]]
    except (TypeError, KeyError) as error:
        raise ArtifactError("the plans cannot be read", where=ARCHITECTURE, got=repr(error)) from error


def _edit_of(said: Any, tensors: Mapping[str, Tensor], largest: int, where: str) -> Edit:
    try:
        data = _tuples_back(said)
        _expect_size(data, largest)
        return edit_from_json(data, tensors)
    except _FINDINGS as error:
        raise _cannot(error, where) from error


def _cannot(error: Exception, where: str) -> ArtifactError:
    return ArtifactError(
        "an edit cannot be replayed", where=f"{ARCHITECTURE}, {where}", got=f"{type(error).__name__}: {error}"[:300],
        do="The artifact is damaged, or was made for another model",
    )  # fmt: skip


def _expect_size(data: Any, largest: int) -> None:
    """An edit's placeholder may not be larger than the largest tensor of the original or of the weights file."""
    shape = data.get("shape", []) if isinstance(data, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape {str(shape)[:100]} is none")
    if math.prod(shape) > max(largest, 1):
        raise ValueError(f"the shape {str(shape)[:100]} is larger than any tensor of the model")


def _expect_sane(model: nn.Module, edit: Edit) -> None:
    match edit:
        case Mask():
            tensor = tensor_at(model, edit.place)
            if edit.keep.shape != tensor.shape:
                raise ValueError(f"mask {list(edit.keep.shape)} for {edit.place} {list(tensor.shape)}")
        case Quantizer():
            numbers = {type(edit.axis), type(edit.group_size)} <= {int, type(None)} and edit.group_size != 0
            if not edit.quant_min < edit.quant_max or not numbers or not edit.places:
                grid = f"axis {edit.axis!r}, group_size {edit.group_size!r}"
                raise ValueError(f"a quantiser on [{edit.quant_min}, {edit.quant_max}], {grid}")
        case Slice():
            for cut in edit.cuts:
                keep = cut.keep
                if keep.ndim != 1 or bool((keep < 0).any()) or not 0 <= cut.dim:
                    raise ValueError(f"{cut.place}: not a list of indices")
        case Attribute():
            own: Any = module_at(model, edit.module)
            for part in edit.name.split("."):
                own = vars(own)[part]
            if not isinstance(own, _PLAIN) or not isinstance(edit.value, _PLAIN) or callable(own):
                raise ValueError(f"{edit.module}.{edit.name} is no plain attribute")


def _expect_rebuildable(original: nn.Module, plans: Any, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    """The edits must lead from the original to a model with the very state that is to be saved."""
    rebuilt_model = copy.deepcopy(original)
    _replay(rebuilt_model, plans, tensors)
    rebuilt = {name: (dtype, shape) for name, dtype, shape in state_entries(rebuilt_model)}
    saved = {name: (dtype, shape) for name, dtype, shape in state_entries(model)}
    if rebuilt != saved:
        first = min(name for name in {*rebuilt, *saved} if rebuilt.get(name) != saved.get(name))
        raise ArtifactError(
            "the plans do not lead from the original to this model; nothing was saved", where=first,
            got=saved.get(first, "no such tensor"), expected=rebuilt.get(first, "no such tensor"),
            do="Pass every plan that was applied, in order; change the model through plans only (a cast is a change)",
        )  # fmt: skip


def _default_card(base: Base, plans: Sequence[Plan], size: int) -> str:
    steps = "".join(f"* {plan.method}: {len(plan.edits)} edits\n" for plan in plans)
    return (
        f"# {base.class_name}, compressed with Tersor\n\n{steps}\n{size} bytes of weights.\n\n"
        '    model = tersor.load("this folder", model=original)\n'
    )
