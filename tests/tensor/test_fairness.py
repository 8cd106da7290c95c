import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from tersor.tensor.fairness import fairness, group_losses, group_rates
from tersor.tensor.statistics import holm, paired_difference, wilson


def people(seed=0, n=900):
    random = np.random.default_rng(seed)
    groups = random.choice(["a", "b", "c"], n, p=[0.5, 0.3, 0.2])
    actual = random.integers(0, 2, n)
    right = random.random(n) < np.select([groups == "a", groups == "b"], [0.9, 0.8], 0.7)
    return np.where(right, actual, 1 - actual), actual, groups


def test_rates_of_groups_are_scikit_learns():
    predicted, actual, groups = people()
    for rates in group_rates(predicted, actual, groups):
        p, y = predicted[groups == rates.group], actual[groups == rates.group]
        (tn, fp), (fn, tp) = confusion_matrix(y, p)
        assert rates.n == len(y) and rates.accuracy.value == pytest.approx(accuracy_score(y, p))
        assert rates.true_positive.value == pytest.approx(recall_score(y, p))
        assert rates.false_positive.value == pytest.approx(1 - recall_score(y, p, pos_label=0))
        assert rates.selection.value == pytest.approx(p.mean())
        assert rates.false_positive[1:] == wilson(int(fp), int(fp + tn))
        assert rates.true_positive[1:] == wilson(int(tp), int(tp + fn))


def test_gaps_are_the_naive_ones():
    predicted, actual, groups = people()
    found = fairness(predicted, actual, groups)

    def rates(rows, values):
        each = [values[rows & (groups == g)].mean() for g in "abc"]
        return max(each) - min(each), min(each) / max(each)

    everyone = np.ones(len(actual), bool)
    assert found.demographic_parity.value == pytest.approx(rates(everyone, predicted)[0])
    assert found.disparate_impact.value == pytest.approx(rates(everyone, predicted)[1])
    assert found.accuracy_gap.value == pytest.approx(rates(everyone, predicted == actual)[0])
    odds = max(rates(actual == 1, predicted)[0], rates(actual == 0, predicted)[0])
    assert found.equalised_odds.value == pytest.approx(odds)
    assert found.accuracy_gap.low > 0.05 and found.missing == 0  # 0.2 in truth


def test_rows_without_a_group_are_left_out_and_counted():
    predicted, actual, groups = people(n=60)
    with_gaps = [*groups, None, math.nan, ""]
    longer = (np.append(predicted, [1, 1, 1]), np.append(actual, [0, 0, 0]))
    found, plain = fairness(*longer, with_gaps), fairness(predicted, actual, groups)
    assert found.missing == 3 and found.groups == plain.groups


def test_a_group_without_positives_has_no_true_positive_rate_and_no_equalised_odds():
    found = fairness([1, 0, 1, 0], [0, 0, 1, 0], ["a", "a", "b", "b"])
    assert found.groups[0].true_positive is None and found.groups[0].false_positive.value == 0.5
    assert found.equalised_odds is None and found.groups[1].true_positive.value == 1


def test_nobody_selected_has_no_disparate_impact():
    found = fairness([0] * 4, [0, 1, 0, 1], ["a", "a", "b", "b"])
    assert found.disparate_impact is None and found.demographic_parity.value == 0
    assert found.demographic_parity.high > 0.3  # two of each say next to nothing


@pytest.mark.parametrize(
    ("predicted", "actual", "groups", "message"),
    [([1, 0], [1, 0], ["a", "a"], "at least two"), ([1, 2], [1, 0], ["a", "b"], "positive one"),
     ([1, 0], [1, 0], [None, ""], "no row"), ([1, 0], [1], ["a", "b"], "one length")],
)  # fmt: skip
def test_what_has_no_groups_to_compare_is_refused(predicted, actual, groups, message):
    with pytest.raises(ValueError, match=message):
        fairness(predicted, actual, groups)


def losing(seed, sizes, losses):
    """Both models right or not, one more sample in a hundred of each group gained; each group loses its own share."""
    random = np.random.default_rng(seed)
    groups = np.repeat([f"g{i}" for i in range(len(sizes))], sizes)
    original = (random.random(len(groups)) < 0.9).astype(float)
    lost = random.random(len(groups)) < np.repeat(losses, sizes)
    gained = random.random(len(groups)) < 0.01
    return original, np.where(lost, 0.0, np.where(gained, 1.0, original)), groups


def test_the_group_that_loses_more_is_named_after_correction():
    original, compressed, groups = losing(0, [600, 600, 600, 200], [0.02, 0.02, 0.02, 0.15])
    found = group_losses(original, compressed, groups)
    assert [loss.group for loss in found if loss.p_adjusted < 0.05 and loss.excess.low > 0] == ["g3"]
    assert [loss.p_adjusted for loss in found] == pytest.approx(holm([loss.p for loss in found]))
    here = groups == "g3"
    assert found[3].drop == paired_difference(original[here], compressed[here]) and found[3].n == 200
    elsewhere = paired_difference(original[~here], compressed[~here]).value
    assert found[3].excess.value == pytest.approx(found[3].drop.value - elsewhere)


def test_groups_that_lose_alike_are_seldom_named():
    named = sum(
        any(loss.p_adjusted < 0.05 for loss in group_losses(*losing(seed, [200, 200, 150], [0.05] * 3)))
        for seed in range(40)
    )
    assert named <= 5  # 2 expected of 40


def test_p_is_the_level_at_which_the_interval_touches_zero():
    found = group_losses(*losing(3, [300, 300], [0.02, 0.06]))
    for loss in found:
        assert (loss.p < 0.05) == (loss.excess.low > 0 or loss.excess.high < 0)
    assert found[0].p == pytest.approx(found[1].p)  # two groups: one's excess is the other's with its sign changed


def test_groups_without_any_loss_have_p_one():
    right = np.ones(20)
    found = group_losses(right, right, ["a", "b"] * 10)
    assert [loss.p for loss in found] == [1, 1] and found[0].excess.low < 0 < found[0].excess.high


def test_losses_of_real_values_and_of_one_member_are_compared_too():
    random = np.random.default_rng(0)
    original = random.normal(size=101)
    compressed = original - random.gamma(2, 0.1, 101)
    found = group_losses(original, compressed, ["a"] * 60 + ["b"] * 40 + ["c"])
    assert found[2].drop.high == math.inf and found[2].p == 1 and 0 < found[0].drop.low < found[0].drop.high
