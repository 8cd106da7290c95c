"""Curves for TensorBoard, where it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """Writes the scalars of each epoch to ``folder``; silent where there is no folder or no TensorBoard.

    ``done``: epochs written before; later ones, from a run that was killed, are dropped from the display.
    """

    def __init__(self, folder: Path | None, done: int):
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def write(self, entry: Mapping[str, Any], metric: str) -> None:
        """One epoch's entry of the history."""
        if self._writer is None:
            return
        for name, key in (("train/loss", "loss"), (f"validation/{metric}", "validation"), ("train/lr", "lr")):
            self._writer.add_scalar(name, entry[key], entry["epoch"])
        for name, value in entry.get("noted", {}).items():
            self._writer.add_scalar(f"train/{name}", value, entry["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """No more epochs."""
        if self._writer is not None:
            self._writer.close()
