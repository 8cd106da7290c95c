"""Sensitivity of layers against pruning by hand, and budgets against a linear program."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.core.place import ByName
from tersor.core.task import Task
from tersor.measure.layer_budgets import least_loss, within_tolerance
from tersor.measure.sensitivity import LayerCurve, Point, Probe, Sensitivity, sensitivity
from tersor.prune.sparse.patterns import NM
from tersor.prune.sparse.prune import Prune
from tersor.tensor.masks import keep_largest


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def task_of(model, count=4):
    generator = torch.Generator().manual_seed(2)
    batches = []
    for size in [20] * (count - 1) + [7]:
        x = torch.randn(size, 6, generator=generator)
        batches.append((x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long()))
    return Task(model, batches, batches, batches, calibration=batches).complete()


def test_each_point_is_the_model_with_one_layer_pruned_by_hand():
    model = network()
    task = task_of(model)
    before = copy.deepcopy(model.state_dict())
    found = sensitivity(model, task, Probe((0.5, 0.9)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x, y = (torch.cat(parts) for parts in zip(*task.validation, strict=True))
    assert found.samples == 67 and found.loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()))
    assert [curve.place for curve in found.layers] == ["0.weight", "2.weight", "4.weight"] and not found.left_out
    for curve, path in zip(found.layers, ("0", "2", "4"), strict=True):
        for point, sparsity in zip(curve.points, (0.5, 0.9), strict=True):
            pruned = copy.deepcopy(model)
            weight = pruned.get_submodule(path).weight.data
            zeros = int(sparsity * weight.numel() + 1e-9)
            weight *= keep_largest(weight.abs(), zeros)
            assert point.asked == sparsity
            assert (point.zeros, point.sparsity, curve.parameters) == (zeros, zeros / weight.numel(), weight.numel())
            assert point.loss == pytest.approx(float(F.cross_entropy(pruned(x), y).detach()), rel=1e-5)
            assert point.metric == pytest.approx(float((pruned(x).argmax(1) == y).double().mean()))


def test_time_bounds_the_work_and_what_is_left_out_is_counted():
    model = network()
    found = sensitivity(model, task_of(model), Probe((0.5, 0.9), seconds=1e-9))
    assert found.left_out == 5 and [len(curve.points) for curve in found.layers] == [1]
    assert sensitivity(model, task_of(model), Probe((0.5,), samples=25)).samples == 40, "whole batches"


def test_a_pattern_with_a_sparsity_of_its_own_gives_one_point_and_skips_what_does_not_fit():
    model = network()
    found = sensitivity(model, task_of(model), Probe(prune=Prune(pattern=NM(), where=ByName("[024]"))))
    assert {curve.place: [point.sparsity for point in curve.points] for curve in found.layers} == {
        "2.weight": [0.5], "4.weight": [0.5],
    }  # fmt: skip
    assert any(skip.place == "0.weight" and "6 = 1 × 4 + 2" in skip.reason for skip in found.skips)
    with pytest.raises(InputError, match=r"no layer can be pruned.*0.weight: 6 inputs are no multiple of 4"):
        sensitivity(model, task_of(model), Probe(prune=Prune(pattern=NM(), where=ByName("0"))))


def test_a_loss_that_overflows_is_infinite_and_null_in_json():
    model = network()
    task = task_of(model)
    with torch.no_grad():
        model[0].weight[0, 0] = 3e38
        model[0].weight[0, 1] = -3e38
    found = sensitivity(model, task, Probe((0.5,)))
    text = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert text["layers"][0]["place"] == "0.weight" and len(text["skips"]) == 1
    overflown = Sensitivity(1.0, 0.9, True, 9, (LayerCurve("a", 10, (Point(0.5, 0.5, 5, math.inf, math.nan),)),))
    point = overflown.to_json()["layers"][0]["points"][0]
    assert point == {"asked": 0.5, "sparsity": 0.5, "zeros": 5, "loss": None, "metric": None}
    assert within_tolerance(overflown, loss=9).sparsity == {"a": 0.0} == within_tolerance(overflown, drop=1).sparsity
    with pytest.raises(InputError, match="at most 0"):
        least_loss(overflown, 0.5)


def curves(*layers):
    """(size, [(zeros, increase of the loss)]) for each layer; the metric falls by a tenth of the increase."""
    found = []
    for n, (size, points) in enumerate(layers):
        made = tuple(Point(zeros / size, zeros / size, zeros, 1 + rise, 0.9 - rise / 10) for zeros, rise in points)
        found.append(LayerCurve(f"layer{n}", size, made))
    return Sensitivity(1.0, 0.9, True, 100, tuple(found))


def test_a_tolerance_takes_the_largest_sparsity_before_it_is_crossed():
    found = curves((100, [(50, 0.1), (70, 0.4), (90, 0.2)]), (100, [(50, 0.9), (70, 1.0)]), (200, [(100, -0.1)]))
    assert within_tolerance(found, loss=0.3).sparsity == {"layer0": 0.5, "layer1": 0.0, "layer2": 0.5}
    budgets = within_tolerance(found, drop=0.05)
    assert budgets.sparsity == {"layer0": 0.9, "layer1": 0.0, "layer2": 0.5}
    assert budgets.overall == 190 / 400 and budgets.loss_increase == pytest.approx(0.4)
    with pytest.raises(InputError, match="one of the two"):
        within_tolerance(found)


rising = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 2)), min_size=1, max_size=5)


@given(st.lists(rising, min_size=1, max_size=5), st.floats(0, 0.99))
@settings(max_examples=60, deadline=None)
def test_the_fractions_have_the_exact_zeros_and_the_least_loss_of_a_linear_program(layers, share):
    shapes = []
    for steps in layers:
        zeros, rises = np.cumsum([zeros for zeros, _ in steps]), np.cumsum([rise for _, rise in steps])
        shapes.append((int(zeros[-1]) + 3, list(zip(zeros.tolist(), rises.tolist(), strict=True))))
    found = curves(*shapes)
    size, reach = sum(n for n, _ in shapes), sum(points[-1][0] for _, points in shapes)
    sparsity = share * reach / size
    budgets = least_loss(found, sparsity)
    goal = int(sparsity * size + 1e-9)
    zeros = [budgets.sparsity[curve.place] * curve.parameters for curve in found.layers]
    assert sum(round(many) for many in zeros) == goal and budgets.overall == goal / size
    # Each layer is a mixture of its points, (0, 0) among them: the best mixture is that of a linear program.
    all_points = [[(0, 0.0), *points] for _, points in shapes]
    cost = [rise for points in all_points for _, rise in points]
    many = [zeros for points in all_points for zeros, _ in points]
    ones = np.zeros((len(all_points), len(cost)))
    start = 0
    for row, points in enumerate(all_points):
        ones[row, start : start + len(points)] = 1
        start += len(points)
    best = linprog(cost, A_ub=[[-z for z in many]], b_ub=[-goal], A_eq=ones, b_eq=np.ones(len(ones)), bounds=(0, 1))
    assert budgets.loss_increase == pytest.approx(best.fun, abs=1e-6)


def test_the_fractions_can_be_given_to_prune_and_more_than_was_tried_is_refused():
    model = network()
    task = task_of(model)
    found = sensitivity(model, task)
    budgets = least_loss(found, 0.7)
    result = Prune(budgets.sparsity).run(model, task)
    zeros = sum(int((layer.weight == 0).sum()) for layer in (result.model[0], result.model[2], result.model[4]))
    assert zeros == int(0.7 * (96 + 128 + 24) + 1e-9)
    with pytest.raises(InputError, match="more zeros are asked for than were tried"):
        least_loss(found, 0.99)
    with pytest.raises(InputError, match="not a fraction"):
        least_loss(found, 1.0)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"seconds": 0}, {"sparsities": ()}, {"sparsities": (0.5, 1.0)}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=f"Probe.{next(iter(wrong))}"):
        Probe(**wrong)
