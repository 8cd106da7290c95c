"""Two processes on one machine: the same training as one, and what happens when one of them is killed."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("train_in_two.py")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


# On CPUs accelerate launch starts one process (and mpirun, where there is one, as many as there are hosts).
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"]


def two(command):
    """Both processes, started by ``command(port)``; their exit codes and what they wrote to standard error."""
    port = free_port()
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    running = [
        subprocess.Popen(
            list(map(str, command(port))), env={**os.environ, **together, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in running]
    return [process.returncode for process in running], errors


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What the two did whose second was killed, and the two, under accelerate launch, that went on."""
    base = tmp_path_factory.mktemp("two")
    codes, errors = two(lambda port: [sys.executable, PROGRAM, base, base / "killed", "dies"])
    assert codes == [3, -signal.SIGKILL], errors[0][-2000:]
    codes, errors = two(lambda port: [*LAUNCH, port, PROGRAM, base, base / "resumed"])
    assert codes == [0, 0], errors[0][-3000:]
    assert not (base / "killed-1").exists()
    return {name: json.loads((base / name).read_text()) for name in ("killed-0", "resumed-0", "resumed-1")}


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_others_with_a_clear_error(ended):
    told = ended["killed-0"]["error"]
    assert "epoch 2/3" in told and "another process of this training is gone" in told
    assert "start all of them again" in told


@pytest.mark.slow
def test_the_two_go_on_inside_the_epoch_and_end_as_one_process_with_the_same_global_batch(ended):
    alone = runpy.run_path(str(PROGRAM), run_name="one")["train"](16)
    first, second = ended["resumed-0"], ended["resumed-1"]
    assert first["said"] == ["going on after epoch 1/3", "going on after batch 4 of epoch 2"]
    assert {**first, "said": []} == {**second, "said": []}
    for name in ("losses", "weights", "validation"):
        assert first[name] == pytest.approx(alone[name], rel=1e-4), name
    assert alone["losses"][-1] < 0.9 * alone["losses"][0]
