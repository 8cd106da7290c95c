import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from sklearn.metrics import confusion_matrix, recall_score, roc_auc_score

from tersor.core.errors import InputError
from tersor.core.measurement import Measurement
from tersor.core.metric import Metric
from tersor.core.task import Task
from tersor.measure.behaviour.agreement import agreement as alike
from tersor.measure.behaviour.collect import collect
from tersor.measure.behaviour.confidence import auroc, calibration, outside
from tersor.measure.behaviour.data import EvaluationData
from tersor.measure.behaviour.gate import APPLICATIONS, Limits, gate, judge, samples_to_tell
from tersor.measure.behaviour.groups import groups
from tersor.measure.behaviour.quality import quality
from tersor.measure.runnable import Runnable
from tersor.tensor.statistics import wilson


def answers(logits):
    """A model that looks its answers up: the input is the sample's number."""
    return lambda x: logits[x[:, 0].long()]


def compared(one, other, targets, **more):
    """What two tables of logits give on the samples 0, 1, …"""
    numbers = torch.arange(len(one))[:, None].float()
    data = EvaluationData([(numbers, targets)], **more)
    return collect(Runnable("one", answers(one)), Runnable("other", answers(other)), data), data


def logits_for(classes, count):
    return torch.nn.functional.one_hot(torch.as_tensor(classes), count).float() * 4


def gated(limits, found, data):
    attributes, _ = groups(found, data)
    told = quality(found, data)
    return gate(
        limits, quality=told, agreement=Measurement(0.97, "fraction", 0.96, 0.98, 1000),
        calibration=calibration(found), attributes=attributes,
    )  # fmt: skip


RANDOM = np.random.default_rng(0)
FEW = wilson(0, 20)[1]
TARGETS = torch.from_numpy(RANDOM.integers(0, 3, 400))
ONE = torch.where(torch.from_numpy(RANDOM.random(400) < 0.9), TARGETS, (TARGETS + 1) % 3)
WORSE = torch.where(torch.from_numpy(RANDOM.random(400) < 0.2), (TARGETS + 2) % 3, ONE)


def test_the_paired_difference_by_class_and_the_confusions_are_a_naive_counts():
    found, data = compared(logits_for(ONE, 3), logits_for(WORSE, 3), TARGETS, classes=("a", "b", "c"))
    said = quality(found, data)
    drop = 100 * float(((ONE == TARGETS).float() - (WORSE == TARGETS).float()).mean())
    assert said.drop.value == pytest.approx(drop) and 0 < said.drop.low < drop < said.drop.high
    assert said.mcnemar.turned_wrong == int(((ONE == TARGETS) & (WORSE != TARGETS)).sum())
    assert said.mcnemar.turned_right == int(((ONE != TARGETS) & (WORSE == TARGETS)).sum()) and said.mcnemar.p < 1e-3
    for which, predicted in (("original", ONE), ("compressed", WORSE)):
        assert np.array_equal(said.confusion[which], confusion_matrix(TARGETS, predicted))
        recalls = [getattr(each, which).value for each in said.per_class]
        assert recalls == pytest.approx(recall_score(TARGETS, predicted, average=None))
    assert [each.name for each in said.per_class] == ["a", "b", "c"]
    changes = [abs(each.compressed - each.original) for each in said.shifts]
    assert changes == sorted(changes, reverse=True) and changes[0] > 0
    first = said.shifts[0]
    assert first.compressed == said.confusion["compressed"][first.actual][first.predicted]
    assert all(each.p_adjusted >= each.p for each in said.per_class)


def test_perplexity_and_root_mean_squared_error_are_what_they_are_called():
    logits, targets = torch.randn(20, 5, 7), torch.randint(0, 7, (20, 5))
    metric = Metric("right", lambda outputs, targets: (outputs.argmax(-1) == targets).double().mean(1))
    task = Task(torch.nn.Identity(), test=[(torch.arange(20)[:, None], targets)], metric=metric)
    data = EvaluationData(task)
    found = collect(Runnable("one", answers(logits)), Runnable("other", answers(2 * logits)), data)
    loss = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    said = quality(found, data).more["original_perplexity"]
    assert said.value == pytest.approx(float(loss.exp()), rel=1e-6) and said.low < said.value < said.high
    found = collect(Runnable("one", answers(1e9 * logits)), Runnable("other", answers(logits)), data)
    assert quality(found, data).more["original_perplexity"].value == pytest.approx(np.exp(200))
    numbers = torch.randn(30, 1)
    found, data = compared(numbers + 0.5, numbers - 2, numbers)
    said = quality(found, data)
    assert said.more["original_rmse"].value == pytest.approx(0.5, rel=1e-5)
    assert said.more["compressed_rmse"].value == pytest.approx(2, rel=1e-5) and said.mcnemar is None


@given(st.floats(-5, 5), st.floats(0, 3), st.floats(0, 3), st.floats(-5, 5))
def test_a_gate_says_pass_or_fail_only_where_the_whole_interval_does(value, below, above, limit):
    measured = Measurement(value, "x", value - below, value + above)
    mirrored = Measurement(-value, "x", -value - above, -value + below)
    status = judge(measured, limit, at_most=True)
    assert (status == "passed") == (value + above <= limit)
    assert (status == "failed") == (value - below > limit)
    assert judge(mirrored, -limit, at_most=False) == status


def test_an_end_that_is_not_known_settles_nothing():
    unknown = Measurement(0.0, "x")
    assert judge(unknown, 1.0, at_most=True) == judge(unknown, -1.0, at_most=False) == "not enough data"


def test_four_times_the_samples_halve_an_interval():
    measured = Measurement(1.0, "x", -1.0, 3.0, 1000)
    assert samples_to_tell(measured, 2.0) == samples_to_tell(measured, 0.0) == 4000
    assert samples_to_tell(measured, 2.3) == 2400  # 2367, upwards to two digits
    assert samples_to_tell(measured, 1.0) is samples_to_tell(measured, 1.0001) is None
    assert samples_to_tell(Measurement(1.0, "x", None, 3.0, 1000), 2.0) is None


def test_limits_are_passed_failed_or_left_open_by_the_data():
    found, data = compared(logits_for(ONE, 3), logits_for(WORSE, 3), TARGETS)
    assert gated(Limits(), found, data).status == "nothing asked"
    assert gated(Limits(max_drop=40), found, data).status == "passed"
    failed = gated(Limits(max_drop=2, min_agreement=0.9), found, data)
    assert failed.status == "failed" and [c.status for c in failed.checks] == ["failed", "passed"]
    said = [check.sentence for check in failed.checks]
    assert said[0].endswith("at most 2 points allowed") and said[1].endswith("at least 0.9 asked")
    drop = quality(found, data).drop.value
    untold = gated(Limits(max_drop=drop + 0.5), found, data)
    assert untold.status == "not enough data" and "samples would tell" in untold.sentence
    assert gated(Limits(max_drop=drop + 0.5, min_agreement=0.99), found, data).status == "failed"


def test_presets_stand_where_no_limit_does_and_are_explained():
    found, data = compared(logits_for(ONE, 3), logits_for(ONE, 3), TARGETS)
    for name, preset in APPLICATIONS.items():
        said = gated(Limits(application=name), found, data)
        assert said.checks[0].limit == preset.max_drop and preset.explanation in said.explanation
    assert gated(Limits(max_drop=3.5, application="safety"), found, data).checks[0].limit == 3.5
    assert [preset.max_drop for preset in APPLICATIONS.values()] == [1, 2, 5, 10, 15]


def test_limits_on_what_the_data_do_not_tell_are_input_errors():
    found, data = compared(logits_for(ONE, 3), logits_for(WORSE, 3), TARGETS)
    with pytest.raises(InputError, match="--max-group-gap.*no sensitive attribute"):
        gated(Limits(max_group_gap=2), found, data)
    with pytest.raises(InputError, match="--max-drop.*without targets"):
        gate(Limits(max_drop=1), quality=None, agreement=None, calibration=None, attributes=())
    numbers = torch.randn(30, 1)
    found, data = compared(numbers + 0.5, numbers - 2, numbers)
    with pytest.raises(InputError, match="a preset is in percentage points"):
        gated(Limits(application="safety"), found, data)


@pytest.mark.parametrize(
    "settings", [{"max_drop": -1}, {"min_agreement": 97}, {"max_group_gap": float("nan")}, {"application": "toaster"}]
)
def test_limits_that_cannot_be_are_refused(settings):
    words = r"97 % is 0\.97" if "min_agreement" in settings else "unusable limit|unknown application"
    with pytest.raises(InputError, match=words):
        Limits(**settings)


def with_groups(harmed):
    """1000 samples of two groups; the compressed model errs more on group b by ``harmed``."""
    random = np.random.default_rng(1)
    targets, names = torch.from_numpy(random.integers(0, 2, 1000)), np.array(["a", "b"], object)[np.arange(1000) % 2]
    right = torch.from_numpy(random.random(1000) < 0.9)
    hit = torch.from_numpy((random.random(1000) < harmed) & (names == "b"))
    one, other = torch.where(right, targets, 1 - targets), torch.where(right & ~hit, targets, 1 - targets)
    names[7] = None
    return (
        compared(logits_for(one, 2), logits_for(other, 2), targets, groups_of=lambda batch: {"sex": names}),
        one,
        other,
    )


def test_the_group_that_loses_more_is_found_and_gated():
    (found, data), one, other = with_groups(0.3)
    attributes, skipped = groups(found, data)
    assert not skipped and attributes[0].missing == 1
    a, b = attributes[0].groups
    assert (a.name, b.name, a.n + b.n) == ("a", "b", 999)
    assert b.excess.low > 0 and b.p_adjusted < 0.001 and a.excess.value == pytest.approx(-b.excess.value)
    rows = np.array([name == "b" for name in found.groups["sex"]])
    targets = found.targets
    lost = ((one.numpy() == targets).astype(float) - (other.numpy() == targets))[rows].mean()
    assert b.drop.value == pytest.approx(100 * lost)
    chosen = (other.numpy() == 1)[rows]
    assert b.compressed["selection"].value == pytest.approx(chosen.mean())
    assert b.compressed["true_positive"].value == pytest.approx(chosen[targets[rows] == 1].mean())
    assert attributes[0].compressed["demographic_parity"].value >= 0 and "disparate_impact" in attributes[0].original
    said = gated(Limits(max_group_gap=5), found, data)
    assert said.status == "failed" and "sex: b" in said.sentence
    gap, wider = said.checks[0].measured, stats.norm.ppf(1 - 0.05 / 2 / 2) / stats.norm.ppf(0.975)  # Bonferroni, of two
    assert (gap.value, gap.high) == (b.excess.value, b.excess.high)
    assert gap.low == pytest.approx(b.excess.value - wider * (b.excess.value - b.excess.low))
    twice = gate(Limits(max_group_gap=5), quality=None, agreement=None, calibration=None, attributes=attributes * 2)
    assert said.checks[0].measured.n == twice.checks[0].measured.n == 999  # people, however many attributes they have
    assert gated(Limits(max_group_gap=50), found, data).status == "passed"


def test_of_several_classes_without_a_favourable_one_accuracies_are_compared_and_the_rest_is_said():
    names = np.where(np.arange(400) % 3 == 0, "a", "b")
    found, data = compared(logits_for(ONE, 3), logits_for(WORSE, 3), TARGETS, groups_of=lambda batch: {"sex": names})
    (sex,), skipped = groups(found, data)
    right = [(WORSE == TARGETS).numpy()[names == name].mean() for name in "ab"]
    assert set(sex.original) == {"accuracy_gap"}
    assert sex.compressed["accuracy_gap"].value == pytest.approx(abs(right[0] - right[1]))
    assert "favourable" in skipped[0].why
    (chosen,), nothing = groups(found, dataclasses.replace(data, positive=2))
    assert not nothing and chosen.compressed["accuracy_gap"] == sex.compressed["accuracy_gap"]
    assert chosen.groups[0].original["selection"].value == pytest.approx((ONE.numpy() == 2)[names == "a"].mean())


def test_an_attribute_of_too_many_values_is_left_out_and_said():
    found, data = compared(
        logits_for(ONE, 3), logits_for(WORSE, 3), TARGETS, groups_of=lambda batch: {"age": np.arange(400) / 7}
    )
    (age,), skipped = groups(found, data)
    assert not age.groups and "400 groups, of at most 100" in skipped[0].why


def test_one_sample_settles_no_limit():
    for other, agreement in ((1, 0.0), (0, 1.0)):
        found, data = compared(logits_for([0], 3), logits_for([other], 3), torch.tensor([0]))
        said = gate(
            Limits(max_drop=1, min_agreement=0.9), quality=quality(found, data),
            agreement=alike(found)["top_1"], calibration=None, attributes=(),
        )  # fmt: skip
        assert said.checks[1].measured.value == agreement
        assert [check.status for check in said.checks] == ["not enough data"] * 2


def test_groups_that_lose_alike_are_not_said_to_differ():
    (found, data), *_ = with_groups(0.0)
    attributes, _ = groups(found, data)
    assert all(group.p_adjusted > 0.05 for group in attributes[0].groups)


def test_a_metric_to_lower_names_the_same_groups_as_its_opposite():
    one, other = TARGETS.clone(), TARGETS.clone()
    other[::20] = (other[::20] + 1) % 3
    names = np.where(np.arange(len(TARGETS)) % 20 == 1, "few", "many")  # of the few none changes
    found = []
    for better in (True, False):
        right = Metric("right", lambda o, t, better=better: ((o.argmax(1) == t) == better).double(), better)
        numbers = torch.arange(len(TARGETS))[:, None].float()
        task = Task(torch.nn.Identity(), test=[(numbers, TARGETS)], metric=right)
        data = EvaluationData(task, groups_of=lambda batch: {"sex": names})
        models = Runnable("one", answers(logits_for(one, 3))), Runnable("other", answers(logits_for(other, 3)))
        found.append(groups(collect(*models, data), data)[0][0].groups)
    for one, other in zip(*found, strict=True):
        assert (one.drop.low, one.excess.low, one.p) == pytest.approx((other.drop.low, other.excess.low, other.p))
    assert found[0][0].drop.low < 0 < found[0][0].drop.high


def test_one_group_or_none_is_said_and_nothing_is_claimed():
    for names, words in ((["a"] * 400, "one group"), ([None] * 400, "missing everywhere")):
        found, data = compared(
            logits_for(ONE, 3), logits_for(WORSE, 3), TARGETS, groups_of=lambda batch, names=names: {"sex": names}
        )
        attributes, skipped = groups(found, data)
        assert not attributes[0].groups and words in skipped[0].why


def test_calibration_is_told_of_both_and_scaling_mends_overconfidence():
    random = np.random.default_rng(2)
    logits = torch.from_numpy(random.normal(size=(2000, 4)) * 2).float()
    p = torch.softmax(logits, 1).double().numpy()
    targets = torch.from_numpy((p.cumsum(1) > random.random((2000, 1))).argmax(1))
    found, data = compared(logits, 3 * logits, targets)
    said = calibration(found)
    good, bold = said.original, said.compressed
    assert bold.measurements["ece_debiased"].low > good.measurements["ece_debiased"].high
    assert said.ece_increase.low > 0 and bold.temperature == pytest.approx(3 * good.temperature, rel=0.02)
    assert bold.scaled["ece"].value < 0.03 < bold.measurements["ece"].value
    assert bold.fitted_on == "the other fifths of the test rows"
    assert sum(bold.bins.count) == 2000
    fitted = calibration(found, validation=found)
    assert "2000 validation samples" in fitted.compressed.fitted_on
    assert fitted.compressed.measurements["nll"].value == pytest.approx(
        float(torch.nn.functional.cross_entropy(3 * logits.double(), targets))
    )


def test_auroc_of_confidence_is_scikit_learns_and_its_interval_holds_it():
    random = np.random.default_rng(3)
    inside, away = (torch.from_numpy(random.normal(size=(300, 3)) * scale).float() for scale in (2, 1))
    found, data = compared(inside, inside / 2, TARGETS[:300])
    elsewhere, _ = compared(away, away / 2, TARGETS[:300])
    said = outside(found, elsewhere)
    labels = np.r_[np.ones(300), np.zeros(300)]
    for which in ("original", "compressed"):
        scores = [getattr(each, which).scores.confidence for each in (found, elsewhere)]
        area = said[f"{which}_auroc"]
        assert area.value == pytest.approx(roc_auc_score(labels, np.concatenate(scores)))
        low, value, high = special.logit([area.low, area.value, area.high])
        assert low < value < high < np.inf and high - value == pytest.approx(value - low)
    drop = said["auroc_drop"]
    assert drop.value == pytest.approx(said["original_auroc"].value - said["compressed_auroc"].value)
    assert drop.high - drop.low < said["original_auroc"].high - said["original_auroc"].low


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [([(1, 0)], (1, 1 - FEW, 1)), ([(0, 1)], (0, 0, FEW)), ([(1, 1)], (0.5, 0.5 - FEW, 0.5 + FEW)),
     ([(1, 0), (1, 0)], (0, -FEW, FEW))],
)  # fmt: skip
def test_auroc_of_confidences_that_do_not_vary_is_still_not_known_exactly(pairs, expected):
    found = auroc([(np.full(20, inside), np.full(30, away)) for inside, away in pairs])
    assert (found.value, found.low, found.high) == pytest.approx(expected)
    assert found.conditions["interval"] == "Wilson, of none"


def test_delongs_interval_covers_what_it_should():
    random, hits = np.random.default_rng(4), 0
    truth = 0.7602  # of normals one deviation apart: Φ(1/√2)
    for _ in range(400):
        found = auroc([(random.normal(1, 1, 80), random.normal(0, 1, 60))])
        hits += found.low <= truth <= found.high
    assert hits / 400 >= 0.92


def test_an_evaluation_is_frozen_data():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Limits().max_drop = 3
