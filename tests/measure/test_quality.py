import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.errors import InputError, VerificationError
from tersor.core.progress import Progress
from tersor.core.task import Metric, Task
from tersor.measure.quality import agreement, evaluate, paired_drop, quality
from tersor.measure.session import OnnxRunnable
from tersor.tensor.statistics import wilson

torch.manual_seed(0)
X = torch.randn(50, 8)
Y = torch.randint(0, 8, (50,))
LOADER = DataLoader(TensorDataset(X, Y), batch_size=16)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.9))


def task(**changes):
    return Task(**{"model": net(), "train": LOADER, "validation": LOADER, "test": LOADER, **changes}).complete()


def regression(model):
    loader = [(X[:30], X[:30, :1]), (X[30:], X[30:, :1])]
    return Task(model, loader, loader, loader).complete()


def test_evaluate_gives_each_samples_value_and_class():
    model = net()
    evaluation = evaluate(model, task())
    predicted = model.eval()(X).argmax(1)
    assert evaluation.n == 50 and evaluation.values.dtype == np.float64
    assert evaluation.predictions.tolist() == predicted.tolist()
    assert evaluation.values.tolist() == (predicted == Y).double().tolist()


def test_evaluate_leaves_the_model_in_training():
    model = net()
    evaluate(model, task())
    assert all(module.training for module in model.modules())


def test_evaluate_runs_an_onnx_file_like_a_model(perceptron):
    path = perceptron(width=8, layers=1)
    runnable = OnnxRunnable(path, threads=1)
    evaluation = evaluate(runnable, task())
    assert evaluation.predictions.tolist() == runnable(X).argmax(1).tolist()


@pytest.mark.parametrize("limit", [1, 16, 20, 50, 1000])
def test_evaluate_stops_at_the_limit(limit):
    full, part = evaluate(net(), task()), evaluate(net(), task(), limit=limit)
    assert part.n == min(limit, 50) and part.values.tolist() == full.values.tolist()[:limit]


def test_evaluate_tells_its_progress():
    class Heard(Progress):
        def track(self, items, description, total=None):
            self.heard = description, total
            yield from items

    progress = Heard()
    evaluate(net(), task(), "validation", progress)
    assert progress.heard == ("evaluate validation", 4)


def test_an_empty_loader_is_an_input_error():
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(net(), task(test=[]))


def test_outputs_that_are_not_finite_are_named_by_batch_and_sample():
    x = X.clone()
    x[21, 0] = float("nan")
    with pytest.raises(VerificationError, match=r"task.test, batch 1: .*sample 5"):
        evaluate(net(), task(test=DataLoader(TensorDataset(x, Y), batch_size=16)))


def test_a_target_out_of_range_in_a_late_batch_is_named():
    y = Y.clone()
    y[49] = 8
    with pytest.raises(InputError, match=r"task.test, batch 3: .*target 8 of sample 1"):
        evaluate(net(), task(test=DataLoader(TensorDataset(X, y), batch_size=16)))


def test_an_output_without_a_row_per_sample_is_an_input_error():
    with pytest.raises(InputError, match="one row per sample"):
        evaluate(lambda x: x.sum(), task())


def test_a_metric_of_a_strange_shape_is_an_input_error():
    with pytest.raises(InputError, match="one value per sample"):
        evaluate(net(), task(metric=Metric("mine", lambda outputs, targets: outputs)))


def test_a_task_that_is_not_completed_is_an_input_error():
    with pytest.raises(InputError, match="complete"):
        evaluate(net(), Task(net(), LOADER))


def test_accuracy_has_wilsons_interval():
    evaluation = evaluate(net(), task())
    found = quality(evaluation, task())
    assert (found.low, found.high) == wilson(int(evaluation.values.sum()), 50)
    assert (found.unit, found.n, found.conditions["split"]) == ("fraction", 50, "test")


def test_another_metric_has_a_bootstrap_interval():
    model = nn.Linear(8, 1)
    evaluation = evaluate(model, regression(model))
    found = quality(evaluation, regression(model))
    assert found.low < found.value < found.high and found.unit == "squared units"
    assert evaluation.predictions is None


def test_agreement_counts_equal_classes():
    a, b = evaluate(net(0), task()), evaluate(net(1), task())
    found = agreement(a, b)
    same = int((a.predictions == b.predictions).sum())
    assert found.value == same / 50 and (found.low, found.high) == wilson(same, 50)
    assert agreement(a, a).value == 1


def test_agreement_of_a_regression_is_refused():
    model = nn.Linear(8, 1)
    evaluation = evaluate(model, regression(model))
    with pytest.raises(InputError, match="classes"):
        agreement(evaluation, evaluation)


def test_paired_drop_is_positive_percentage_points_where_accuracy_fell():
    right, wrong = (lambda x: nn.functional.one_hot(Y[: len(x)], 8).float(), lambda x: torch.ones(len(x), 8))
    one = task(test=[(X, Y)])
    found = paired_drop(evaluate(right, one), evaluate(wrong, one), one)
    assert found.value == pytest.approx(100 * float((Y != 0).double().mean()))
    assert found.unit == "percentage points" and 0 < found.low < found.value < found.high


def test_paired_drop_is_positive_where_an_error_rose():
    good, bad = nn.Linear(8, 1), nn.Linear(8, 1)
    one = regression(good)
    with torch.no_grad():
        good.weight.copy_(torch.eye(1, 8))
        good.bias.zero_()
        bad.bias.fill_(5.0)
    found = paired_drop(evaluate(good, one), evaluate(bad, one), one)
    assert found.value > 10 and found.unit == "squared units" and found.low > 0


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(1)], ids=["global", "own"])
def test_a_shuffling_test_loader_is_paired_by_its_seed(generator):
    loader = DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True, generator=generator)
    shuffling = task(test=loader)
    assert evaluate(net(), shuffling).values.tolist() == evaluate(net(), shuffling).values.tolist()
    assert paired_drop(evaluate(net(), shuffling), evaluate(net(), shuffling), shuffling).value == 0


def test_a_loader_that_changes_its_order_cannot_be_paired():
    class Moving:
        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            yield X.roll(self.passes, 0), Y.roll(self.passes, 0)

    moving = task(test=Moving())
    with pytest.raises(InputError, match="shuffle=False"):
        paired_drop(evaluate(net(), moving), evaluate(net(), moving), moving)


def test_what_the_loader_or_targets_of_raises_is_named_with_its_batch():
    class Vanishing:
        def __iter__(self):
            yield X, Y
            raise FileNotFoundError("image 17.png")

    with pytest.raises(InputError, match="task.test, batch 1: the loader fails. Got FileNotFoundError: image 17.png"):
        evaluate(net(), task(test=Vanishing()))
    picky = task(test=[{"x": X}], targets_of=lambda batch: batch[1])
    with pytest.raises(InputError, match="task.test, batch 0: the model does not run on this batch. Got KeyError: 1"):
        evaluate(net(), picky)


def test_evaluations_of_different_samples_cannot_be_paired():
    with pytest.raises(InputError, match="50 samples of test and 20 of test"):
        paired_drop(evaluate(net(), task()), evaluate(net(), task(), limit=20), task())
