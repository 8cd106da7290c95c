import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("distil_in_two.py")


def flat(value):
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in flat(value[key])]
    return [number for item in value for number in flat(item)] if isinstance(value, list) else [value]


@pytest.mark.slow
def test_two_processes_distil_as_one_with_the_same_global_batch():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    running = [
        subprocess.Popen(
            [sys.executable, PROGRAM], env={**os.environ, **together, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    alone = runpy.run_path(str(PROGRAM), run_name="one")["train"](16)
    outputs = [process.communicate(timeout=200) for process in running]
    assert all(process.returncode == 0 for process in running), outputs[0][1][-2000:]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    assert flat(first) == pytest.approx(flat(alone), rel=1e-4)
    assert alone["hints"]["losses"][-1] < alone["hints"]["losses"][0]
