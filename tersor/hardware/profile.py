"""What a device offers, as data: memory, compute, bandwidth, integers, sparsity, each figure with its source."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tersor.core.errors import InputError
from tersor.core.place import nearest_names

Kind = Literal[
    "phone", "microcontroller", "single-board computer", "laptop", "server CPU", "NVIDIA GPU", "NPU", "this machine"
]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Basis = Literal["specification", "derived", "measured", "assumed"]
When = Literal["always", "float", "int8", "depthwise", "attention", "memory-bound", "small layers", "many weights"]
FLOATS: tuple[Precision, ...] = ("fp16", "bf16", "fp32")  # the first that a device has is its fastest
LARGEST_FILE = 100_000  # bytes; the profiles that come along have 2,000


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_yes_for_a_number(cls, data: Any) -> Any:
        listed = (
            [value if isinstance(value, (list, tuple)) else [value] for value in data.values()]
            if isinstance(data, Mapping)
            else []
        )
        if any(isinstance(value, bool) for values in listed for value in values):
            raise ValueError("numbers and words; yes, no, true and false are neither here")
        return data


class Figure(_Part):
    """A number with where it comes from.

    ``basis``: from a specification, derived from one (cores × clock × operations per cycle), measured, or assumed.
    """

    value: float = Field(gt=1e-6, lt=1e24)
    basis: Basis
    source: str = Field(min_length=8)


class Near(_Part):
    """A smaller, faster memory: what fits into it as a whole is read from there. ``memory``: its bytes."""

    memory: Figure
    bandwidth: Figure


class Sparsity(_Part):
    """Which zeros make products faster: ``pattern`` "none" or n of m such as "2:4"; ``speedup`` of such a product."""

    pattern: str = Field(pattern=r"^(none|[1-9]\d?:[1-9]\d?)$")
    speedup: Figure | None = None
    source: str = Field(min_length=8)

    @model_validator(mode="after")
    def _both(self) -> Sparsity:
        if (self.pattern == "none") != (self.speedup is None):
            raise ValueError("speedup belongs to a pattern, and to every pattern")
        if self.pattern != "none" and int(self.pattern.split(":")[0]) >= int(self.pattern.split(":")[1]):
            raise ValueError("a pattern n:m keeps n of m values, fewer than all")
        return self


class Alignment(_Part):
    """Counts of channels that kernels like are multiples of this."""

    multiple_of: int = Field(ge=1)
    source: str = Field(min_length=8)


class Caution(_Part):
    """What commonly goes wrong on such a device. ``when``: with which models."""

    when: When = "always"
    what: str = Field(min_length=8)


class Profile(_Part):
    """A device. Figures in bytes, operations (two per multiply-accumulate) and bytes per second.

    ``memory``: what weights and activations share; with ``storage``, weights lie there instead and are read from it.
    ``compute``: precision → operations per second, of all cores. ``weight_bits``: widths that its runtimes store
    weights in beside floats; ``activation_bits``: those of integer products.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,40}$")
    aliases: tuple[str, ...] = ()
    title: str = Field(min_length=3)
    kind: Kind
    memory: Figure
    storage: Figure | None = None
    bandwidth: Figure
    near: Near | None = None
    compute: Mapping[Precision, Figure] = Field(min_length=1)
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    integers: str = Field(min_length=8, description="Where the integer types come from")
    sparsity: Sparsity
    alignment: Alignment
    cautions: tuple[Caution, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _near_is_nearer(self) -> Profile:
        if self.near is not None and self.near.bandwidth.value <= self.bandwidth.value:
            raise ValueError("near memory is faster than memory")
        if self.near is not None and self.near.memory.value >= self.memory.value:
            raise ValueError("near memory is smaller than memory")
        return self

    @model_validator(mode="after")
    def _integers_agree(self) -> Profile:
        if any(not 1 <= bits <= 16 for bits in (*self.weight_bits, *self.activation_bits)):
            raise ValueError("integers have 1 to 16 bits")
        if ("int8" in self.compute) != (8 in self.activation_bits):
            raise ValueError("int8 stands both under compute and in activation_bits, or in neither")
        return self

    @property
    def floating(self) -> Precision | None:
        """The float type of its fastest products; None where it has integers alone."""
        known = [name for name in FLOATS if name in self.compute]
        return max(known, key=lambda name: self.compute[name].value, default=None)


@cache
def _shipped() -> tuple[Profile, ...]:
    folder = files("tersor.hardware") / "profiles"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".yaml")]
    return tuple(_parsed(entry.read_text(), entry.name) for entry in sorted(found, key=lambda entry: entry.name))


def profiles() -> tuple[Profile, ...]:
    """The profiles that come along, by name."""
    return _shipped()


def read_profile(source: str | Path | Mapping[str, Any]) -> Profile:
    """A shipped profile by its name or an alias, a YAML file of your own, or its data.

    Raises InputError that names what is wrong in the file, or which profiles there are.
    """
    if isinstance(source, Mapping):
        return _checked(dict(source), "profile")
    name = str(source)
    for profile in profiles():
        if name in (profile.name, *profile.aliases):
            return profile
    if name.lower().endswith((".yaml", ".yml")) or Path(name).is_file():
        return _parsed(_text(Path(name)), name)
    known = ", ".join(profile.name for profile in profiles())
    names = ["this", *(each for profile in profiles() for each in (profile.name, *profile.aliases))]
    raise InputError(
        "no such profile", where="--on", got=repr(name), expected=f"this, a YAML file, or one of {known}",
        do=f"{nearest_names(name.lower(), names)}. tersor profiles lists them; one printed is where to start your own",
    )  # fmt: skip


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError, as is a null byte in a path
        raise InputError("the profile cannot be read", where=str(path), got=error) from error
    if len(text) > LARGEST_FILE:
        raise InputError("too large for a profile", where=str(path), expected=f"at most {LARGEST_FILE} characters")
    return text


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _parsed(text: str, where: str) -> Profile:
    try:
        data = _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a ValueError: dates such as 2020-99-99
        raise InputError("not YAML", where=where, got=" ".join(str(error).split())[:160]) from error
    if not isinstance(data, dict):
        raise InputError("not a profile", where=where, got=type(data).__name__, expected="a mapping: name, kind, …")
    return _checked(data, where)


def _checked(data: dict[str, Any], where: str) -> Profile:
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"]))
        raise InputError(
            "the profile cannot be used", where=f"{where}, {at}" if at else where,
            got="nothing" if first["type"] == "missing" else reprlib.repr(first.get("input"))[:80],
            expected=_expected(first["type"], first["msg"], at),
            do=f"{error.error_count()} in all; tersor profiles phone prints one that is right",
        ) from error  # fmt: skip


def _expected(kind: str, message: str, at: str) -> str:
    if kind == "missing":
        return "a value: the field is required"
    if kind == "extra_forbidden":
        parts = (Profile, Figure, Near, Sparsity, Alignment, Caution)
        known = dict.fromkeys(name for part in parts for name in part.model_fields)
        return f"no field of this name. {nearest_names(at.rpartition('.')[2], known)}"
    return message.removeprefix("Value error, ")


def to_yaml(profile: Profile) -> str:
    """The profile as YAML, to start your own from."""
    data = profile.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110)


def find_profiles(text: str) -> Iterable[str]:
    """ "phone,iot" → its names; raises InputError where there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError("no profile", where="--on", got=repr(text), expected="names with commas between, or this")
    return dict.fromkeys(names)
