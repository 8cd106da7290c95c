import lzma

import numpy as np
import pytest
import torch

from tersor.core.errors import InputError
from tersor.zoo.adult import adult, evaluation

HEAD = "|1x3 Cross validator\n"


def row(age, sex, race, rich):
    work = f"{age}, Private, 226802, 11th, 7, Never-married, Sales, Own-child, {race}, {sex}, 0, 0, 40, United-States"
    return f"{work}, {'>50K' if rich else '<=50K'}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files in which those over 40 earn over 50,000; 4300 people to train on, the test file packed, with full stops."""
    random = np.random.default_rng(0)

    def rows(count, stop=""):
        ages = random.integers(20, 61, count)
        sexes, races = random.choice(["Female", "Male"], count), random.choice(["White", "Black", "Other"], count)
        return [row(a, s, r, a > 40) + stop for a, s, r in zip(ages, sexes, races, strict=True)]

    folder = tmp_path / "adult"
    folder.mkdir()
    (folder / "adult.data").write_text("\n".join(rows(4300)) + "\n\n")
    (folder / "adult.test.xz").write_bytes(lzma.compress((HEAD + "\n".join(rows(200, "."))).encode()))
    monkeypatch.setenv("TERSOR_DATA", str(tmp_path))
    monkeypatch.setenv("TERSOR_CACHE", str(tmp_path / "cache"))
    return folder


def test_people_are_read_with_their_groups_and_the_network_learns(folder):
    data = evaluation()
    task = data.based.complete()
    assert (len(task.train.targets), len(task.validation.targets), len(task.test.targets)) == (300, 4000, 200)
    x, y = task.test.images, task.test.targets
    lines = [line for line in lzma.decompress((folder / "adult.test.xz").read_bytes()).decode().splitlines()[1:]]
    groups = data.groups((x, y), 200, "test")
    assert groups["sex"].tolist() == [line.split(", ")[9] for line in lines]
    assert groups["race"].tolist() == [line.split(", ")[8] for line in lines]
    assert y.tolist() == [int(line.endswith(">50K.")) for line in lines]
    train = torch.cat([task.train.images, task.validation.images])
    assert train[:, 0].mean().abs() < 1e-5 and train[:, 0].std() == pytest.approx(1, abs=1e-3)
    again = adult()
    for one, other in zip(task.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_files_that_are_not_there_or_not_adult_are_input_errors(folder, monkeypatch, tmp_path):
    (folder / "adult.data").write_text("39, State-gov\n")
    with pytest.raises(InputError, match="not a file of Adult.*39, State-gov"):
        adult()
    (folder / "adult.test.xz").write_bytes(b"no")
    (folder / "adult.data").write_text(row(30, "Male", "White", True))
    with pytest.raises(InputError, match="adult.test.xz: the file cannot be read"):
        adult()
    monkeypatch.setenv("TERSOR_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="Adult is not here.*TERSOR_DATA"):
        adult()
