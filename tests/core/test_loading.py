import pytest
from torch.utils.data import DataLoader, Dataset

from tersor.core.errors import InputError, TrainingError
from tersor.core.loading import batches_of


class Images(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 5:
            raise self.error
        return index


def test_batches_come_as_they_are_and_none_is_drawn_in_vain():
    drawn = []

    class Loader:
        def __iter__(self):
            for number in range(5):
                drawn.append(number)
                yield number

    batches = batches_of(Loader(), "task.train")
    assert drawn == [] and [next(batches), next(batches)] == [0, 1]
    assert drawn == [0, 1] and list(batches_of([], "task.train")) == []


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [FileNotFoundError("image 17.png"), KeyError("image 17.png")], ids=["file", "key"])
def test_a_datasets_error_names_split_batch_type_and_message(error, workers):
    read = []
    with pytest.raises(InputError, match="the loader fails") as caught:
        read.extend(batches_of(DataLoader(Images(error), 2, num_workers=workers), "task.validation"))
    assert caught.value.where == "task.validation, batch 2"
    assert caught.value.got.startswith(type(error).__name__) and "image 17.png" in caught.value.got
    assert len(caught.value.got) < 100 and type(caught.value.__cause__) is type(error)


def test_a_loader_that_fails_before_its_first_batch_is_named():
    class Broken:
        def __iter__(self):
            raise OSError("no disk")

    with pytest.raises(InputError, match="task.test, batch 0: the loader fails. Got OSError: no disk"):
        next(batches_of(Broken(), "task.test"))


def test_errors_of_tersors_own_and_the_keyboard_pass_unchanged():
    for error in (TrainingError("mine"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught:
            list(batches_of(DataLoader(Images(error), 2), "task.train"))
        assert caught.value is error


def test_what_is_done_with_a_batch_is_not_the_loaders_error():
    with pytest.raises(ZeroDivisionError):
        for number in batches_of([1, 0], "task.train"):
            1 / number
