"""Weights that were trained here once, kept under the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from tersor.core.files import write_atomically
from tersor.core.progress import Progress


def cache_path(folder: Path, name: str, model: nn.Module, recipe: dict[str, Any]) -> Path:
    """Where weights of this architecture, trained by this recipe (seed, fold, schedule …), are kept."""
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    said = json.dumps([shapes, recipe], sort_keys=True)
    return folder / f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.safetensors"


def trained_once(model: nn.Module, path: Path, train: Callable[[], None], progress: Progress) -> None:
    """Load the weights at ``path`` into ``model``; where they are missing or damaged, ``train`` it and keep them."""
    if path.is_file():
        try:
            model.load_state_dict(load(path.read_bytes()))
            model.eval()
            return
        except (SafetensorError, RuntimeError, OSError) as error:
            progress.say(f"note: the kept weights in {path} cannot be read ({_first_line(error)}); training again")
    train()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({key: value.contiguous() for key, value in model.state_dict().items()}))
    except OSError as error:
        progress.say(f"note: the trained weights cannot be kept in {path} ({error.strerror or error})")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(":") if str(error).strip() else type(error).__name__
