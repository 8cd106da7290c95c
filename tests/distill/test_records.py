import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor.core.row_hash import row_hash
from tersor.distill.records import Shelf

SCRIPT = Path(__file__).with_name("record_writers.py")
COLUMNS, SLOTS, content = (runpy.run_path(str(SCRIPT))[name] for name in ("COLUMNS", "SLOTS", "content"))


def found_is_right(records, slots):
    slots, inputs, expected = content(slots)
    found, others, columns = records.read(slots, inputs)
    chosen = torch.from_numpy(found)
    assert all(torch.equal(columns[name], value[chosen]) for name, value in expected.items())
    return found, others


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "cache", budget=1_000_000)


def test_what_is_written_is_read_again_also_by_who_opens_it_later(shelf):
    records = shelf.create("a", COLUMNS, 100)
    assert not found_is_right(records, range(100))[0].any()
    assert records.write(*content([3, 99, 40])) == 3
    for reader in (records, shelf.find("a", 100)):
        found, others = found_is_right(reader, range(100))
        assert np.nonzero(found)[0].tolist() == [3, 40, 99] and others == 0


def test_an_answer_to_another_input_is_not_found(shelf):
    records = shelf.create("a", COLUMNS, 10)
    slots, inputs, columns = content([1, 2])
    records.write(slots, inputs, columns)
    found, others, _ = records.read(slots, inputs + np.array([0, 1]))
    assert found.tolist() == [True, False] and others == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 7))
def test_one_damaged_bit_anywhere_costs_that_record_alone(tmp_path_factory, position, bit):
    shelf = Shelf(tmp_path_factory.mktemp("cache"), 1_000_000)
    records = shelf.create("a", COLUMNS, 10)
    records.write(*content(range(10)))
    path = records.folder / "records.bin"
    data = bytearray(path.read_bytes())
    position %= len(data)
    data[position] ^= 1 << bit
    with open(path, "r+b") as file:
        file.write(data)
    found, others = found_is_right(records, range(10))
    assert not found[position // records.size] and found.sum() == 9 and others == 1


def test_a_record_in_another_s_slot_is_not_found(shelf):
    records = shelf.create("a", COLUMNS, 4)
    records.write(*content([0]))
    with open(records.folder / "records.bin", "r+b") as file:
        record = file.read(records.size)
        file.seek(2 * records.size)
        file.write(record)
    _, inputs, _ = content([0])
    assert not records.read(np.array([2]), inputs)[0].any()


def test_renewed_records_are_all_empty_and_stay_so_for_the_next_process(shelf):
    old = shelf.create("a", COLUMNS, 10)
    old.write(*content(range(10)))
    new = shelf.renew(old)
    for reader in (new, shelf.find("a", 10)):
        assert not found_is_right(reader, range(10))[0].any()
    new.write(*content([5]))
    assert found_is_right(shelf.find("a", 10), range(10))[0].sum() == 1


@pytest.mark.parametrize("damage", [b"", b"{", b'{"body": 1, "sha256": "0"}', b"[]"])
def test_a_damaged_schema_is_none_and_is_written_anew(shelf, damage):
    records = shelf.create("a", COLUMNS, 10)
    records.write(*content([1]))
    (records.folder / "schema.json").write_bytes(damage)
    assert shelf.find("a", 10) is None
    again = shelf.create("a", COLUMNS, 10)
    assert not found_is_right(again, range(10))[0].any()


@pytest.mark.parametrize("name", ["records.bin", ".lock", "schema.json"])
def test_a_missing_file_costs_the_records_and_nothing_else(shelf, name):
    records = shelf.create("a", COLUMNS, 10)
    records.write(*content([1]))
    records.close()
    (records.folder / name).unlink()
    assert shelf.find("a", 10) is None
    shelf.create("a", COLUMNS, 10).write(*content([2]))
    assert found_is_right(shelf.find("a", 10), [2])[0].all()


def test_what_a_kill_left_half_removed_is_removed_later(tmp_path, monkeypatch):
    shelf = Shelf(tmp_path, budget=20_000)
    shelf.create("first", COLUMNS, 400).close()

    def killed(folder):
        (folder / ".lock").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        shelf.create("first", COLUMNS, 400).write(*content(range(400)))
        patched.setattr("tersor.distill.records.shutil.rmtree", killed)
        shelf.create("second", COLUMNS, 400)
    assert not list((tmp_path / "first").iterdir())  # nothing that takes room and that nobody knows of


def test_more_slots_may_be_asked_for_later(shelf):
    records = shelf.create("a", COLUMNS, 10)
    records.write(*content([9]))
    more = shelf.find("a", 50)
    more.write(*content([49]))
    assert np.nonzero(found_is_right(more, range(50))[0])[0].tolist() == [9, 49]
    assert found_is_right(records, range(50))[0].sum() == 1  # beyond its slots it finds nothing, and does not fail


def test_the_budget_bounds_the_slots_and_old_records_make_room_unless_they_are_used(tmp_path):
    size = 16 + 16 + 16
    shelf = Shelf(tmp_path, budget=20_000)
    first = shelf.create("first", COLUMNS, 10_000)
    assert first.slots == 20_000 // size and first.write(*content([0, first.slots - 1, first.slots])) == 2
    second = shelf.create("second", COLUMNS, 10_000)
    assert (tmp_path / "first").is_dir() and second.slots < first.slots
    first.close()
    second.close()
    third = shelf.create("third", COLUMNS, 10_000)
    assert third.slots == 20_000 // size
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["third"]


def test_two_writers_that_are_killed_leave_only_right_records(tmp_path):
    first = subprocess.Popen([sys.executable, str(SCRIPT), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    second = int(first.stdout.readline())
    try:
        records = None
        while records is None or found_is_right(records, range(SLOTS))[0].sum() < SLOTS // 2:
            records = Shelf(tmp_path, 10**9).find("a", SLOTS)
    finally:
        for process in (second, first.pid):
            os.kill(process, signal.SIGKILL)
        first.wait()
        first.stdout.close()
    assert found_is_right(Shelf(tmp_path, 10**9).find("a", SLOTS), range(SLOTS))[0].sum() >= SLOTS // 2


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64]),
    st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**20),
)  # fmt: skip
def test_a_row_s_hash_depends_on_its_bits_alone(dtype, rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2, (rows + 1, width), generator=generator).to(dtype)
    whole = row_hash(values, seed)
    assert torch.equal(whole[1:], row_hash(values[1:], seed))
    assert torch.equal(whole, row_hash(values.reshape(rows + 1, width, 1), seed))
    changed = values.clone()
    changed[0, seed % width] = 3 if dtype != torch.bool else ~changed[0, seed % width]
    assert row_hash(changed, seed)[0] != whole[0] and torch.equal(row_hash(changed, seed)[1:], whole[1:])
    for i in range(rows):
        assert (whole[i] == whole[i + 1]) == torch.equal(values[i], values[i + 1])


def test_a_row_s_hash_is_the_same_for_ever():
    assert row_hash(torch.tensor([[1.0, -2.0, 3.5], [0.0, 0.0, 0.0]])).tolist() == [-6715465361705140224, 0]
