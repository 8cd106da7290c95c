"""Two processes that write records until they are killed, each every record over and over: argument, the folder."""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from tersor.distill.records import Column, Shelf

COLUMNS = (Column("outputs", (5,), "float16"), Column("indices", (3,), "int32"))
SLOTS = 2_000


def content(slots):
    """What the record of each slot holds: slots, hashes of inputs, and columns that follow from the slot."""
    slots = np.asarray(slots, dtype=np.int64)
    base = torch.from_numpy(slots)[:, None]
    columns = {"outputs": (base + torch.arange(5) / 8).half(), "indices": (base * 7 + torch.arange(3)).int()}
    return slots, slots * 1_000_003 + 17, columns


if __name__ == "__main__":
    torch.set_num_threads(1)
    other = os.fork()
    records = Shelf(Path(sys.argv[1]), 10**9).create("a", COLUMNS, SLOTS)
    if other:
        print(other, flush=True)
    while True:
        for start in range(0, SLOTS, 50):
            records.write(*content(range(start, start + 50)))
