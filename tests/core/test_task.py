from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.errors import InputError
from tersor.core.metric import ACCURACY, MEAN_SQUARED_ERROR
from tersor.core.task import Metric, Task, first_batch


def loader(targets=None):
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(12, 4), torch.arange(12) % 3 if targets is None else targets), 4)


@pytest.fixture
def model():
    torch.manual_seed(1)
    return nn.Linear(4, 3)


X, MASK, Y = torch.ones(2, 4), torch.zeros(2, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "batch, args, kwargs",
    [
        ((X, Y), (X,), {}),
        ([X, Y], (X,), {}),
        ((X, MASK, Y), (X, MASK), {}),
        (((X, MASK), Y), (X, MASK), {}),
        ({"input_ids": X, "attention_mask": MASK, "labels": Y}, (), {"input_ids": X, "attention_mask": MASK}),
        (OrderedDict(pixels=X, y=Y), (), {"pixels": X}),
    ],
)
def test_inputs_and_targets_are_found_in_every_usual_batch(model, batch, args, kwargs):
    task = Task(model)
    found_args, found_kwargs = task.inputs(batch)
    assert [a is b for a, b in zip(found_args, args, strict=True)] == [True] * len(args)
    assert found_kwargs.keys() == kwargs.keys() and all(found_kwargs[key] is kwargs[key] for key in kwargs)
    assert task.targets(batch) is Y


@pytest.mark.parametrize(
    "batch, says",
    [
        (X, "Got Tensor"),
        ((X,), "Got tuple of 1"),
        ({"pixels": X}, r"dict with keys \['pixels'\]"),
        (None, "Got NoneType"),
    ],
)
def test_a_strange_batch_is_an_error_that_says_what_it_is(model, batch, says):
    with pytest.raises(InputError, match=says):
        Task(model).targets(batch)


def test_custom_batches_are_read_by_the_users_functions(model):
    batch = SimpleNamespace(left=X, right=Y)
    task = Task(model, inputs_of=lambda b: ((b.left,), {}), targets_of=lambda b: b.right)
    assert torch.equal(task.outputs(model, batch), model(X)) and task.targets(batch) is Y


@pytest.mark.parametrize(
    "result",
    [X, SimpleNamespace(logits=X), {"logits": X, "loss": Y}, (X, Y), [X]],
    ids=["tensor", "object", "dict", "tuple", "list"],
)
def test_the_output_tensor_is_found_in_what_models_return(model, result):
    assert Task(model).output(result) is X


@pytest.mark.parametrize("result", [None, {"scores": X}, (), ("a",), SimpleNamespace(logits=None)])
def test_an_output_without_a_known_tensor_is_an_error(model, result):
    with pytest.raises(InputError, match="task.output_of: .* Pass output_of="):
        Task(model).output(result)


def test_output_of_comes_first(model):
    assert Task(model, output_of=lambda result: result["scores"]).output({"scores": X, "logits": MASK}) is X


def test_the_loss_is_cross_entropy_for_integers_also_over_sequences(model):
    outputs, targets = torch.randn(2, 5, 3), torch.randint(3, (2, 5))
    expected = -outputs.log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert torch.allclose(Task(model).loss_of(lambda x: outputs, (X, targets)), expected)
    assert torch.allclose(Task(model).loss_of(model, (X, Y)), F.cross_entropy(model(X), Y))


def test_the_loss_is_the_squared_error_for_floats_whatever_the_trailing_ones(model):
    targets = torch.randn(2)
    loss = Task(model).loss_of(lambda x: torch.ones(2, 1), (X, targets))
    assert torch.allclose(loss, ((1 - targets) ** 2).mean())


def test_the_users_loss_comes_first(model):
    assert Task(model, loss=lambda model, batch: torch.tensor(7.0)).loss_of(model, (X, Y)) == 7


def test_metrics_have_one_value_per_sample():
    outputs = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert ACCURACY.per_sample(outputs, torch.tensor([1, 1])).tolist() == [1.0, 0.0]
    values = MEAN_SQUARED_ERROR.per_sample(outputs, torch.tensor([[1.0, 0.0], [3.0, 1.0]]))
    assert values.tolist() == [2.0, 0.5] and not MEAN_SQUARED_ERROR.higher_is_better


class TestComplete:
    def test_what_is_missing_is_derived_and_said(self, model):
        data = loader()
        task = Task(model, data, data, data).complete()
        assert task.calibration is data and task.metric is ACCURACY
        assert torch.equal(task.example_inputs[0], data.dataset.tensors[0][:2])
        assert [text.split()[0] for text in task.derived] == ["calibration", "example", "the"]
        assert task.reference is not model and not task.reference.training
        assert torch.equal(task.reference.weight, model.weight) and not task.reference.weight.requires_grad

    def test_what_is_given_is_kept_and_nothing_is_said(self, model):
        data, other, metric = (
            loader(),
            nn.Linear(4, 3).eval().requires_grad_(False),
            Metric("mine", lambda o, t: o[:, 0]),
        )
        given = Task(model, data, data, data, data, metric=metric, example_inputs=(X,), reference=other)
        task = given.complete()
        assert (task.metric, task.reference, task.derived) == (metric, other, ())
        assert task.example_inputs[0] is X

    def test_float_targets_are_judged_by_the_squared_error(self, model):
        data = loader(torch.randn(12))
        assert Task(model, data, data, data).complete().metric is MEAN_SQUARED_ERROR

    @pytest.mark.parametrize("batch", [X, (X,), [X], (X, Y)])
    def test_calibration_alone_is_enough_for_what_only_calibrates(self, model, batch):
        task = Task(model, calibration=[batch, batch]).complete(needs=())
        assert torch.equal(task.example_inputs[0], X[:2]) and task.metric is None
        assert torch.equal(task.outputs(task.model, batch), task.model(X))
        for needs, missing in (("train",), "no training data"), (("validation",), "no validation data"):
            with pytest.raises(InputError, match=missing):
                Task(model, calibration=[batch]).complete(needs=needs)
        with pytest.raises(InputError, match="no data to calibrate on"):
            Task(model).complete(needs=())

    def test_completing_twice_changes_nothing(self, model):
        data = loader()
        once = Task(model, data, data, data).complete()
        twice = once.complete()
        assert twice.derived == once.derived and twice.reference is once.reference

    @pytest.mark.parametrize("same", [True, False])
    def test_the_users_modules_stay_as_they_are(self, model, same):
        data, reference = loader(), model if same else nn.Linear(4, 3)
        task = Task(model.train(), data, data, data, reference=reference.train()).complete()
        assert model.training and reference.training
        assert model.weight.requires_grad and reference.weight.requires_grad
        assert torch.equal(task.reference.weight, reference.weight) and not task.reference.training

    def test_the_random_state_is_not_disturbed(self, model):
        data = DataLoader(TensorDataset(torch.randn(8, 4), torch.arange(8) % 3), 4, shuffle=True)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        Task(model, data, data, data).complete()
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("missing", ["train", "validation", "test"])
    def test_data_that_cannot_be_derived_is_demanded(self, model, missing):
        data = {name: loader() for name in ("train", "validation", "test") if name != missing}
        with pytest.raises(InputError, match=f"the task has no {'training' if missing == 'train' else missing} data"):
            Task(model, **data).complete()

    def test_an_empty_loader_is_an_error(self, model):
        with pytest.raises(InputError, match="task.train: the loader is empty"):
            Task(model, [], loader(), loader()).complete()

    @pytest.mark.parametrize(
        "wrong, where, says",
        [
            ({"model": 3}, "task.model", "no torch.nn.Module. Got int 3"),
            ({"train": 5}, "task.train", "cannot be iterated over. Got int 5"),
            ({"test": iter([(X, Y)])}, "task.test", "read only once. Got list_iterator"),
            ({"train": [(X, [0, 1])]}, "task.train, batch 0", "targets are no tensor. Got list"),
            ({"train": [(None, Y)]}, "task.train, batch 0", "the inputs hold no tensor. Got {'input 0': 'NoneType'}"),
            ({"train": [(X, None, Y)]}, "task.example_inputs", "NoneType"),
            ({"metric": "accuracy"}, "task.metric", "no Metric. Got str 'accuracy'"),
            ({"reference": "x"}, "task.reference", "no torch.nn.Module. Got str 'x'"),
            ({"loss": "mse"}, "task.loss", "loss cannot be called. Got str 'mse'"),
            ({"inputs_of": 1}, "task.inputs_of", "cannot be called"),
            ({"example_inputs": X}, "task.example_inputs", "must be a tuple of tensors. Got Tensor"),
            ({"example_inputs": [X]}, "task.example_inputs", "Got ['Tensor']"),
            ({"targets_of": lambda batch: {}["y"]}, "task.train, batch 0", "targets_of fails. Got KeyError: 'y'"),
        ],
        ids=lambda value: None if isinstance(value, str) else next(iter(value)),
    )
    def test_what_is_of_a_wrong_type_is_named(self, model, wrong, where, says):
        given = {"model": model, "train": loader(), "validation": loader(), "test": loader(), **wrong}
        with pytest.raises(InputError) as caught:
            Task(**given).complete()
        assert caught.value.where == where and says in str(caught.value)

    def test_a_loader_that_raises_is_named(self, model):
        class Broken:
            def __iter__(self):
                raise KeyError("label")

        with pytest.raises(InputError, match="task.train, batch 0: the loader fails. Got KeyError: 'label'"):
            Task(model, Broken(), loader(), loader()).complete()

    def test_keyword_batches_need_example_inputs(self, model):
        data = [{"x": X, "labels": Y}]
        with pytest.raises(InputError, match=r"batches of keyword arguments. Got \['x'\]"):
            Task(model, data, data, data).complete()
        assert Task(model, data, data, data, example_inputs=(X,)).complete().example_inputs == (X,)


class TestFactory:
    def test_the_factory_builds_the_model_once_where_none_is_given(self):
        built = []

        def build():
            built.append(nn.Linear(4, 3))
            return built[-1]

        data = loader()
        task = Task(factory=build, train=data, validation=data, test=data)
        assert task.model is built[0] and task.complete().model is built[0] and len(built) == 1

    def test_of_both_the_model_is_taken(self, model):
        assert Task(model, factory=lambda: nn.Linear(1, 1)).model is model

    def test_neither_is_an_error(self):
        with pytest.raises(
            InputError, match=r"the task has no model. .* expected Task\(model=…\) or Task\(factory=…\)"
        ):
            Task(train=loader())

    def test_a_factory_that_fails_or_gives_no_module_is_an_error(self):
        with pytest.raises(InputError, match="task.factory: the factory fails. Got KeyError: 'weights'"):
            Task(factory=lambda: {}["weights"])
        data = loader()
        with pytest.raises(InputError, match="no torch.nn.Module. Got int 3"):
            Task(None, data, data, data, factory=lambda: 3).complete()


def test_the_first_batch_is_taken_without_drawing_from_the_random_state():
    data = DataLoader(TensorDataset(torch.arange(8)), 2, shuffle=True)
    torch.manual_seed(0)
    taken = first_batch(data, "train")
    assert torch.equal(taken[0], next(iter(data))[0])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, tokens, mask=None, weights=None):
        return self.fc(tokens if mask is None else tokens - 2 * mask)


def test_a_dict_whose_keys_are_the_first_arguments_of_the_forward_is_positional():
    task = Task(TwoInputs())
    assert task.inputs({"mask": MASK, "tokens": X, "labels": Y}) == ((X, MASK), {})
    (args, kwargs) = task.inputs({"tokens": X, "weights": MASK, "labels": Y})
    assert args == () and list(kwargs) == ["tokens", "weights"]


class OtherOrder(TwoInputs):
    def forward(self, mask, tokens, scale=1.0):
        return super().forward(tokens, mask) * scale


class OtherNames(TwoInputs):
    def forward(self, a, b):
        return super().forward(a, b)


class ByKeyword(TwoInputs):
    def forward(self, *args, **named):
        return super().forward(*args, **named)


class KeywordOnly(TwoInputs):
    def forward(self, tokens, *, mask):
        return super().forward(tokens, mask)


@pytest.mark.parametrize("kind", [OtherOrder, OtherNames, ByKeyword, KeywordOnly])
def test_a_dict_reaches_another_model_s_arguments_by_their_names(kind):
    student, other = TwoInputs(), kind()
    other.load_state_dict(student.state_dict())
    tokens, mask = torch.randn(2, 4), torch.tensor([[1.0, 0, 1, 0]]).expand(2, 4)
    batch = {"mask": mask, "tokens": tokens, "labels": Y}
    task = Task(student)
    assert torch.equal(task.outputs(other, batch), student(tokens, mask))
    assert torch.equal(task.outputs(lambda *inputs: student(*inputs), batch), student(tokens, mask))
    if kind is not OtherNames:
        assert torch.equal(Task(other).outputs(other, batch), student(tokens, mask))


def test_a_task_of_dict_batches_is_completed():
    batches = [{"mask": torch.ones(3, 4), "tokens": torch.randn(3, 4), "labels": torch.tensor([0, 1, 2])}]
    task = Task(TwoInputs(), train=batches, validation=batches, test=batches).complete()
    assert task.metric is ACCURACY
    assert [tuple(value.shape) for value in task.example_inputs] == [(2, 4), (2, 4)]
    assert torch.equal(task.example_inputs[0], batches[0]["tokens"][:2])


def test_completing_a_complete_task_reads_nothing_and_gives_it_back(model):
    task = Task(model, train=loader(), validation=loader(), test=loader()).complete()
    assert task.complete() is task and task.complete(needs=()) is task and task.ready() is task


def test_what_is_ready_is_complete_as_far_as_the_data_go(model):
    bare = Task(model)
    assert bare.ready() is bare  # what needs no data runs without
    calibrated = Task(model, calibration=[torch.randn(4, 4)]).ready()
    assert len(calibrated.example_inputs[0]) == 2 and calibrated.metric is None and calibrated.reference is not model
    assert Task(model, train=loader(), validation=loader()).ready().metric is ACCURACY

    class Named(nn.Module):
        def forward(self, **inputs):
            return inputs["x"]

    assert Task(Named(), train=[{"x": X, "labels": Y}]).ready().example_inputs is None


@pytest.mark.parametrize(
    "ask, said",
    [
        (lambda task: task.demand_example(), "no example inputs"),
        (lambda task: task.demand_metric(), "no metric"),
        (lambda task: task.demand_loader("train"), r"no training data.*Task\(train=DataLoader\)"),
        (lambda task: task.demand_loader("validation"), "no validation data"),
    ],
)
def test_what_a_task_lacks_is_named_with_what_to_do(model, ask, said):
    with pytest.raises(InputError, match=rf"task 'mine': the task has {said}.*Pass task.complete\(\)"):
        ask(Task(model, name="mine"))
