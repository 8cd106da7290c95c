import json
import subprocess
import sys

import pytest

from tersor.core.errors import ArtifactError, InputError
from tersor.core.measurement import Measurement
from tersor.core.record import Record
from tersor.run.folder import RunFolder, whole_folder

FACTS = {
    "recipe": {},
    "task": {"name": "mine", "source": "mine.py"},
    "seed": 0,
    "budgets": {"max_drop": 2.0},
    "timing": {"seconds": 1.0, "threads": None},
    "notes": [],
    "command": "",
    "base_sha256": "",
    "environment": {"threads": "2"},
}


def _record(number: int) -> Record:
    return Record(
        number, f"step{number}", "a step", {}, {"accuracy": Measurement(0.5, "fraction", 0.4, 0.6, 10)}, 1, 2.0
    )


def test_records_come_back_as_they_were_written(tmp_path):
    run = RunFolder.create(tmp_path / "run", {"seed": 0})
    run.append(_record(0))
    run.append(_record(1))
    assert run.records() == [_record(0), _record(1)]


def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    run.append(_record(0))
    path = run.path / "records.jsonl"
    whole = path.read_bytes()
    for cut in (1, 20, len(whole) - 2):
        path.write_bytes(whole + whole[:cut])
        assert run.records() == [_record(0)]
    run.append(_record(1))
    assert run.records() == [_record(0), _record(1)]


def test_a_damaged_earlier_line_is_an_error(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    (run.path / "records.jsonl").write_text("{}\n")
    with pytest.raises(ArtifactError, match=r"records\.jsonl"):
        run.records()


def test_a_folder_in_use_is_refused(tmp_path):
    RunFolder.create(tmp_path / "run", {})
    with pytest.raises(InputError, match="tersor resume"):
        RunFolder.create(tmp_path / "run", {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        RunFolder.create(tmp_path / "other", {})
    with pytest.raises(InputError, match="is a file"):
        RunFolder.create(tmp_path / "other" / "thesis.txt", {})
    with pytest.raises(InputError, match="cannot be written"):
        RunFolder.create(tmp_path / "other" / "thesis.txt" / "run", {})


def test_opening_what_is_no_run_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="no such folder"):
        RunFolder.open(tmp_path / "absent")
    with pytest.raises(ArtifactError, match=r"no run\.json"):
        RunFolder.open(tmp_path)
    run = RunFolder.create(tmp_path / "run", {})
    run.description.write_text("{")
    with pytest.raises(ArtifactError, match="not JSON"):
        RunFolder.open(run.path)
    run.description.write_text(json.dumps({"schema": 99}))
    with pytest.raises(ArtifactError, match="schema 99"):
        RunFolder.open(run.path)


HOLD = """
import sys
from pathlib import Path
from tersor.run.folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_work_on_one_run(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process"), run.lock():
            pass
        process.kill()
    with run.lock():
        pass


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "model") as part:
        (part / "half").write_text("half")
        raise RuntimeError("stopped")
    assert not (tmp_path / "model").exists()
    with whole_folder(tmp_path / "model") as part:
        (part / "all").write_text("all")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["all"]


@pytest.mark.parametrize("change", [{"seed": "x"}, {"environment": {"threads": "0"}}, {"recipe": 5}, {"notes": None}])
def test_a_damaged_description_is_an_artifact_error(tmp_path, change):
    run = RunFolder.create(tmp_path / "run", FACTS)
    assert RunFolder.open(run.path) == run
    run.description.write_text(json.dumps({"schema": 1, **FACTS, **change}))
    with pytest.raises(ArtifactError, match="damaged"):
        RunFolder.open(run.path)


def test_json_nested_without_end_is_an_artifact_error(tmp_path):
    run = RunFolder.create(tmp_path / "run", FACTS)
    run.description.write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match=r"run\.json"):
        RunFolder.open(run.path)
