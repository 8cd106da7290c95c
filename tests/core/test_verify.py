import pytest
import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.edit import Cut, Slice, Write
from tersor.core.errors import VerificationError
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.core.verify import masked_reference, relative_difference, verify_edits

VECTORS = ("weight", "bias", "running_mean", "running_var")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4, 3)).double()
    for value in [*model[1].parameters(), *list(model[1].buffers())[:2]]:
        nn.init.uniform_(value.data, 0.5, 1.5)
    return model


@pytest.fixture
def task(model):
    data = [(torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2]))]
    return Task(model, data, data, data).complete()


def removal(producer, consumer):
    """Channels kept by the convolution and by the linear layer, whose inputs are four positions of each channel."""
    kept = torch.tensor(producer)
    columns = (torch.tensor(consumer)[:, None] * 4 + torch.arange(4)).flatten()
    cuts = [Cut(TensorPlace("0", name), 0, kept, "producer") for name in ("weight", "bias")]
    cuts += [Cut(TensorPlace("1", name), 0, kept, "bystander") for name in VECTORS]
    return Plan("by hand", (Slice((*cuts, Cut(TensorPlace("4", "weight"), 1, columns, "consumer"))),))


def test_a_right_removal_is_verified_to_the_last_bits(model, task):
    plan = removal([0, 2, 3], [0, 2, 3])
    assert verify_edits(model, apply(model, plan), plan, task) < 1e-12


@pytest.mark.parametrize("wrong", [[0, 2, 4], [1, 2, 3], [0, 1, 3]])
def test_a_wrong_index_is_caught_and_the_original_untouched(model, task, wrong):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = removal([0, 2, 3], wrong)
    with pytest.raises(VerificationError, match="differs from the masked one; the original is untouched"):
        verify_edits(model, apply(model, plan), plan, task)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_norm_cut_at_other_channels_is_caught(model, task):
    plan = removal([0, 2, 3], [0, 2, 3])
    (edit,) = plan.edits
    other = torch.tensor([0, 1, 3])
    cuts = [Cut(c.place, c.dim, other, c.role) if c.place == TensorPlace("1", "weight") else c for c in edit.cuts]
    wrong = Plan("by hand", (Slice(tuple(cuts)),))
    with pytest.raises(VerificationError):
        verify_edits(model, apply(model, wrong), wrong, task)


def test_a_shrunk_model_that_does_not_run_is_said_as_such(model, task):
    plan = removal([0, 2, 3], [0, 2, 3])
    (edit,) = plan.edits
    torn = Plan("by hand", (Slice(edit.cuts[:-1]),))
    with pytest.raises(
        VerificationError, match="the shrunk model does not run; the original is untouched. Got RuntimeError"
    ):
        verify_edits(model, apply(model, torn), torn, task)


def test_a_plan_that_slices_nothing_is_not_verified(model, task):
    plan = Plan("write", (Write(TensorPlace("0", "bias"), torch.zeros(5)),))
    assert verify_edits(model, apply(model, plan), plan, task) is None


def test_the_masked_reference_reads_removed_channels_with_weight_zero(model):
    reference = masked_reference(model, removal([0, 2, 3], [0, 2, 3]))
    weight = reference[4].weight.reshape(3, 5, 4)
    assert not weight[:, [1, 4]].any() and weight[:, [0, 2, 3]].all()
    assert torch.equal(reference[0].weight, model[0].weight) and model[4].weight.all()


def test_train_flags_of_both_models_are_left_alone(model, task):
    plan = removal([0, 2, 3], [0, 2, 3])
    model.train()
    shrunk = apply(model, plan)
    verify_edits(model, shrunk, plan, task)
    assert model.training and shrunk[1].training
    assert torch.equal(shrunk[1].running_mean, model[1].running_mean[[0, 2, 3]])


@pytest.mark.parametrize(
    "got, expected, difference",
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1.0, 3.0], [1.0, 4.0], 0.25),
        ([1.0], [0.0], 1.0),
        ([1.0, 2.0], [1.0], float("inf")),
        ([float("nan")], [1.0], float("inf")),
        ([1.0], [float("nan")], float("inf")),
        ([1.0], [float("inf")], float("inf")),
    ],
)
def test_the_relative_difference_is_of_the_largest_values(got, expected, difference):
    assert relative_difference(torch.tensor(got), torch.tensor(expected)) == difference


def test_a_wrong_index_among_channels_that_the_examples_leave_dead_is_caught(model, task):
    with torch.no_grad():
        model[0].weight.abs_()[[1, 3]] *= -1  # read positive inputs: always below zero
        model[0].bias.zero_()
        model[1].bias.zero_()
        model[1].running_mean.zero_()
    data = [(torch.rand(2, 2, 4, 4, dtype=torch.float64), torch.tensor([0, 1]))]
    assert not model.eval()[:3](data[0][0])[:, [1, 3]].any()
    plan = removal([0, 1], [0, 3])
    with pytest.raises(VerificationError):
        verify_edits(model, apply(model, plan), plan, Task(model, data, data, data).complete())


def test_a_plan_that_preserves_is_held_to_the_original(model, task):
    right = Plan("same", (Write(TensorPlace("0", "bias"), model[0].bias.detach()),), preserves=True)
    assert verify_edits(model, apply(model, right), right, task) == 0
    wrong = Plan("off", (Write(TensorPlace("0", "bias"), model[0].bias.detach() + 0.01),), preserves=True)
    with pytest.raises(VerificationError, match="off: the edited model differs from the original; the original is unt"):
        verify_edits(model, apply(model, wrong), wrong, task)
    assert verify_edits(model, model, Plan("nothing", preserves=True), task) is None


def test_half_precision_is_held_to_its_own_steps(model, task):
    half, inputs = model.to(torch.bfloat16), task.example_inputs[0].to(torch.bfloat16)
    task = Task(half, example_inputs=(inputs,))
    rounded = Plan("rounding", (Write(TensorPlace("0", "bias"), half[0].bias.detach() * (1 + 2**-8)),), preserves=True)
    assert 0 <= verify_edits(half, apply(half, rounded), rounded, task) < 8 * 2**-7
    wrong = Plan("off", (Write(TensorPlace("0", "bias"), half[0].bias.detach() + 1),), preserves=True)
    with pytest.raises(VerificationError):
        verify_edits(half, apply(half, wrong), wrong, task)
