"""From a path to the weights that lie there, and whether the result may be written to another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tersor.core.errors import InputError
from tersor.files.npz import NpzFile
from tersor.files.safetensors import SafetensorsFile
from tersor.files.shards import INDEX, ShardedFile
from tersor.files.weights import WeightsFile

PACKED = "tersor.packed."  # metadata under PACKED + name: how that tensor is stored as integers
KINDS = "NAME.safetensors, NAME.npz, NAME.safetensors.index.json, or a folder with one index or one safetensors file"


PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl")  # never opened: unpickling runs whatever lies in them


def from_pickle(path: str | Path) -> str:
    """How to get from a pickled checkpoint, by its name, to weights that are read here; "" for any other name."""
    if Path(path).suffix.lower() not in PICKLED:
        return ""
    return (
        "Pickled files are not opened. Write the weights out once, in Python, and take that file: "
        'safetensors.torch.save_file(model.state_dict(), "model.safetensors")'
    )


def is_weights(path: str | Path) -> bool:
    """Whether a path looks like weights, by its name or because it is a folder that has some."""
    path = Path(path)
    return path.name.endswith((".safetensors", ".npz", INDEX)) or (path.is_dir() and bool(_inside(path)))


def open_weights(path: str | Path) -> WeightsFile:
    """The weights at ``path``: safetensors, .npz, a sharded checkpoint's index, or a folder that holds such.

    Only headers are read. Raises InputError for what is missing, damaged, or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        found = _inside(path)
        if len(found) != 1:
            names = ", ".join(each.name for each in found[:5]) or "none"
            raise InputError("not one file of weights in the folder", where=str(path), got=names, expected=KINDS)
        path = found[0]
    if not path.is_file():
        raise InputError("no such file", where=str(path), expected=KINDS)
    try:
        if path.name.endswith(INDEX):
            return ShardedFile(path)
        if path.suffix == ".safetensors":
            return SafetensorsFile(path)
        if path.suffix == ".npz":
            return NpzFile(path)
    except OSError as error:
        raise InputError("the file cannot be read", where=str(path), got=error.strerror or error) from error
    raise InputError("not a file of weights by its name", where=str(path), expected=KINDS, do=from_pickle(path))


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{INDEX}")) or sorted(folder.glob("*.safetensors"))


def expect_destination(source: WeightsFile, out: Path) -> None:
    """Raises InputError where ``out`` is what is read, has another kind of name, or lies in no folder."""
    sharded = isinstance(source, ShardedFile)
    read = [source.path, *(shard.path for shard in source.shards)] if isinstance(source, ShardedFile) else [source.path]
    taken = {path.resolve() for path in [*read, source.path.parent, *source.path.resolve().parents]}
    if out.resolve() in taken or (out.exists() and any(out.samefile(path) for path in read)):
        raise InputError(
            "the output would overwrite the input, which is never changed", where=str(out), do="Choose another path"
        )
    if not sharded and out.suffix != source.path.suffix:
        raise InputError("the output is of the input's kind", where=str(out), expected=f"NAME{source.path.suffix}")
    if sharded and out.name.endswith((".json", ".safetensors")):
        raise InputError("the output of a sharded checkpoint is a folder", where=str(out), expected="a folder's name")
    if out.is_dir() and not sharded:
        raise InputError("the output is a folder", where=str(out), expected=f"NAME{source.path.suffix}")
    if not out.absolute().parent.is_dir():
        raise InputError("the output's folder does not exist", where=str(out.absolute().parent), do="Make it first")


def expect_plain(file: WeightsFile) -> None:
    """Raises InputError where tensors of the file are stored as integers already: their scales are no weights."""
    packed = [name.removeprefix(PACKED) for name in file.metadata if name.startswith(PACKED)]
    if packed:
        raise InputError(
            "the file is quantised already", where=str(file.path), got=f"{len(packed)} tensors, such as {packed[0]}",
            do="Take the file that it was made from, or write its numbers out first (tersor dequantize)",
        )  # fmt: skip


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """What the system has against a file that is written becomes an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError("the file cannot be written", where=str(out), got=error.strerror or error) from error
