"""The closed union of edits: what a plan may do to a model. Edits are data; only ``apply`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tersor.core.errors import ArtifactError
from tersor.core.place import ActivationPlace, Place, TensorPlace
from tersor.core.widened import HALVES


@dataclass(frozen=True, eq=False)
class Mask:
    """Hold positions of a tensor at zero. ``keep``: bool, the tensor's shape; False positions are zero from now on.

    Stands on the model as a parametrization, so zeros survive training. ``merge`` keeps earlier masks in force too;
    without it the new mask replaces them.
    """

    place: TensorPlace
    keep: Tensor
    merge: bool = True


@dataclass(frozen=True, eq=False)
class Write:
    """Replace a tensor's values (same shape), or give a missing parameter (a bias that is None) a value."""

    place: TensorPlace
    value: Tensor


@dataclass(frozen=True, eq=False)
class Quantizer:
    """Fake quantisation of a weight or an activation, on the integers ``quant_min`` … ``quant_max``.

    ``scale`` and ``zero_point``: shape [] per tensor, [channels] along ``axis``, or with ``group_size`` [rows, groups]:
    the weight is then rows along ``axis``, flattened, and each run of ``group_size`` numbers has its own. x̂ =
    (clamp(round(x / scale) + zero_point) − zero_point) · scale. ``places`` share one quantiser (one scale).
    On a weight that has one already it takes that one's place. ``learn``: the scale is trained. ``reads``, of a weight:
    the quantised activation that it is multiplied with; the bias beside the weight is then rounded to steps of scale ·
    scale, on which integer kernels add it. ``dynamic``, of activations: scale and zero point are those of each tensor
    that passes, not the ones here.
    """

    places: tuple[Place, ...]
    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    axis: int | None = None
    learn: bool = True
    group_size: int | None = None
    reads: ActivationPlace | None = None
    dynamic: bool = False


@dataclass(frozen=True, eq=False)
class Precision:
    """Store a parameter as ``dtype`` (float16 or bfloat16), tied ones with it; who reads it gets the type it had."""

    place: TensorPlace
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Cut:
    """Keep the indices ``keep`` (int64, increasing) of dimension ``dim`` of a tensor.

    ``role``: a *consumer* reads the removed channels (a convolution's input dimension), a *producer* makes them,
    a *bystander* belongs to them (a norm's scale). Verification masks the consumers.
    """

    place: TensorPlace
    dim: int
    keep: Tensor
    role: Literal["producer", "consumer", "bystander"]


@dataclass(frozen=True, eq=False)
class Slice:
    """Really remove indices: every coupled (tensor, dimension) at once."""

    cuts: tuple[Cut, ...]


@dataclass(frozen=True, eq=False)
class Swap:
    """Put another module at ``module``, built by a registered ``constructor`` from plain ``arguments``.

    ``Children``: a Sequential of those children of the module there that ``names`` names, as they are.
    """

    module: str
    constructor: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Attribute:
    """Set a plain attribute of a module (``out_channels``, ``groups``, ``num_heads`` …)."""

    module: str
    name: str
    value: Any


Edit = Mask | Write | Quantizer | Precision | Slice | Swap | Attribute
STRUCTURAL = (Mask, Write, Quantizer, Precision, Slice, Swap, Attribute)


def _place_to_json(place: Place) -> list[Any]:
    if isinstance(place, TensorPlace):
        return [place.module, place.tensor]
    return [place.module, place.operator, place.ordinal]


def _place_from_json(data: list[Any]) -> Place:
    return TensorPlace(*data) if len(data) == 2 else ActivationPlace(*data)


def _activation_from_json(data: list[Any]) -> ActivationPlace:
    place = _place_from_json(data)
    if not isinstance(place, ActivationPlace) or [type(value) for value in data] != [str, str, int]:
        raise ValueError(f"{data} is no place of an activation")
    return place


def edit_to_json(edit: Edit, key: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The edit as JSON; index lists go into ``tensors`` under names that start with ``key``.

    Values that the saved weights hold anyway (what Write wrote, scales, masks) are kept as shapes only: an edit read
    back rebuilds the structure, and the weights are loaded over it.
    """
    match edit:
        case Mask():
            place = _place_to_json(edit.place)
            return {"kind": "Mask", "place": place, "shape": list(edit.keep.shape), "merge": edit.merge}
        case Write():
            kind = {"shape": list(edit.value.shape), "dtype": _name(edit.value.dtype)}
            return {"kind": "Write", "place": _place_to_json(edit.place), **kind}
        case Quantizer():
            return {
                "kind": "Quantizer",
                "places": [_place_to_json(place) for place in edit.places],
                "shape": list(edit.scale.shape),
                "quant_min": edit.quant_min,
                "quant_max": edit.quant_max,
                "axis": edit.axis,
                "learn": edit.learn,
                "group_size": edit.group_size,
                "reads": None if edit.reads is None else _place_to_json(edit.reads),
                "dynamic": edit.dynamic,
            }
        case Precision():
            return {"kind": "Precision", "place": _place_to_json(edit.place), "dtype": _name(edit.dtype)}
        case Slice():
            cuts = []
            shared: dict[int, str] = {}  # cuts of one group share their index tensor: store it once
            for number, cut in enumerate(edit.cuts):
                name = shared.setdefault(id(cut.keep), f"{key}.{number}")
                tensors[name] = cut.keep.to(torch.int32)
                cuts.append([_place_to_json(cut.place), cut.dim, name, cut.role])
            return {"kind": "Slice", "cuts": cuts}
        case Swap():
            arguments = dict(edit.arguments)
            return {"kind": "Swap", "module": edit.module, "constructor": edit.constructor, "arguments": arguments}
        case Attribute():
            return {"kind": "Attribute", "module": edit.module, "name": edit.name, "value": edit.value}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def edit_from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    """The inverse of ``edit_to_json``, values being placeholders until the weights are loaded."""
    try:
        return _read_edit(data, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ArtifactError(
            "an edit cannot be read", where="architecture.json", got=f"{error!r} in {str(data)[:200]}"
        ) from error


def _read_edit(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    match data["kind"]:
        case "Mask":
            place = TensorPlace(*data["place"])
            return Mask(place, torch.ones(data["shape"], dtype=torch.bool), data["merge"])
        case "Write":
            return Write(TensorPlace(*data["place"]), torch.zeros(data["shape"], dtype=getattr(torch, data["dtype"])))
        case "Quantizer":
            return Quantizer(
                tuple(_place_from_json(place) for place in data["places"]),
                torch.ones(data["shape"]),
                torch.zeros(data["shape"], dtype=torch.int32),
                int(data["quant_min"]),
                int(data["quant_max"]),
                data["axis"],
                bool(data["learn"]),
                data.get("group_size"),  # artifacts of before groups do not say
                None if data.get("reads") is None else _activation_from_json(data["reads"]),
                bool(data.get("dynamic", False)),
            )
        case "Precision":
            return Precision(TensorPlace(*data["place"]), {_name(half): half for half in HALVES}[data["dtype"]])
        case "Slice":
            shared = {name: tensors[name].to(torch.int64) for name in {cut[2] for cut in data["cuts"]}}
            cuts = data["cuts"]
            return Slice(tuple(Cut(TensorPlace(*p), int(dim), shared[name], role) for p, dim, name, role in cuts))
        case "Swap":
            return Swap(data["module"], data["constructor"], dict(data["arguments"]))
        case "Attribute":
            return Attribute(data["module"], data["name"], data["value"])
        case kind:
            raise ValueError(f"unknown kind of edit {kind!r}")
