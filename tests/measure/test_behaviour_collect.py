import copy
import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.errors import ArtifactError, InputError, VerificationError
from tersor.core.metric import Metric
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.measure.behaviour.agreement import agreement, order_warning
from tersor.measure.behaviour.collect import collect, kind_of
from tersor.measure.behaviour.data import EvaluationData, Pixels
from tersor.measure.behaviour.flips import flips
from tersor.measure.behaviour.scores import are_probabilities, reduce_scores
from tersor.measure.made_up import made_up_inputs
from tersor.measure.runnable import Runnable, check_onnx, open_onnx
from tersor.quantize.cast import Cast

torch.manual_seed(0)
X, Y = torch.randn(50, 8), torch.randint(0, 6, (50,))


def net(seed=0, width=6):
    torch.manual_seed(seed)
    return nn.Linear(8, width)


def data(loader=None, **more):
    return EvaluationData(loader or DataLoader(TensorDataset(X, Y), batch_size=16), **more)


def pair(one=None, other=None):
    return Runnable("one", one or net(0)), Runnable("other", other or net(1))


def test_what_is_collected_is_what_each_model_answers_in_order():
    one, other = net(0), net(1)
    found = collect(*pair(one, other), data(), shown=3)
    logs = [F.log_softmax(model(X).double(), dim=1) for model in (one, other)]
    for answers, log in zip(found.both, logs, strict=True):
        assert answers.scores.classes.tolist() == log.argmax(1).tolist()
        assert answers.values.tolist() == (log.argmax(1) == Y).double().tolist()
        np.testing.assert_allclose(answers.scores.loss, F.nll_loss(log, Y, reduction="none").detach(), atol=1e-6)
        brier = (log.exp() - F.one_hot(Y, 6)).square().sum(1)
        np.testing.assert_allclose(answers.scores.brier, brier.detach(), atol=1e-6)
        np.testing.assert_array_equal(answers.scores.top, log.topk(5, dim=1).indices)
    kl = F.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(1)
    np.testing.assert_allclose(found.divergence, kl.detach(), atol=1e-6)
    assert found.n == 50 and found.kind == "classes" and found.sample.tolist() == list(range(50))
    lost = np.where(
        (found.original.values == 1) & (found.compressed.values == 0),
        found.original.scores.likelihood - found.compressed.scores.likelihood, -np.inf,
    )  # fmt: skip
    assert [sample for _, sample, _ in found.worst.found] == np.argsort(-lost, kind="stable")[:3].tolist()
    np.testing.assert_array_equal(found.worst.found[0][2], X[found.worst.found[0][1]])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(2, 9), st.integers(0, 10**6))
def test_rows_in_pieces_are_rows_at_once(rows, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(rows, classes, generator=generator) for _ in range(2))
    targets = torch.randint(0, classes, (rows,), generator=generator)
    whole = reduce_scores(one, other, targets, rows, (False, False))
    from tersor.measure.behaviour import scores

    kept, scores._CHUNK = scores._CHUNK, 3 * classes
    try:
        pieces = reduce_scores(one, other, targets, rows, (False, False))
    finally:
        scores._CHUNK = kept
    for name in ("classes", "top", "confidence", "loss", "brier", "logits"):
        np.testing.assert_allclose(getattr(whole.original, name), getattr(pieces.original, name), atol=1e-12)
    np.testing.assert_allclose(whole.divergence, pieces.divergence, atol=1e-12)
    assert (whole.divergence >= 0).all()


def test_ties_of_scores_go_to_the_class_that_the_metric_takes():
    equal = torch.zeros(2, 7)
    part = reduce_scores(equal, equal, None, 0, (False, False))
    assert part.original.classes.tolist() == [0, 0]
    assert all(sorted(set(row)) == sorted(row) for row in part.original.top.tolist())


def test_probabilities_are_seen_and_taken_as_such():
    model = net()
    probable = Runnable("file", nn.Sequential(model, nn.Softmax(dim=1)))
    found = collect(Runnable("one", model), probable, data())
    np.testing.assert_allclose(found.divergence, 0, atol=1e-6)
    assert any("probabilities" in note for note in found.notes)
    assert are_probabilities(torch.tensor([[0.2, 0.8]])) and not are_probabilities(torch.tensor([[0.2, 0.9]]))


def test_positions_without_a_target_do_not_count_and_hang_on_their_sample():
    outputs = torch.randn(4, 3, 6)
    targets = torch.randint(0, 6, (4, 3))
    targets[1, 2] = targets[3, :] = -100
    loader = [(torch.arange(2), targets[:2]), (torch.arange(2, 4), targets[2:])]
    model = Runnable("table", lambda x: outputs[x])
    metric_free = Task(nn.Identity(), test=loader)
    found = collect(model, Runnable("again", lambda x: outputs[x] + 1), EvaluationData(metric_free_task(metric_free)))
    assert found.kind == "tokens" and found.sample.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert found.targets.tolist() == [t for t in targets.flatten().tolist() if t != -100]
    np.testing.assert_allclose(found.divergence, 0, atol=1e-9)


def metric_free_task(task):
    from dataclasses import replace

    from tersor.core.task import Metric

    def right(outputs, targets):
        return ((outputs.argmax(-1) == targets) | (targets == -100)).float().mean(dim=1)

    return replace(task, metric=Metric("right", right))


def test_kinds_of_outputs_are_told_apart():
    assert kind_of(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)) == "classes"
    assert kind_of(torch.zeros(4, 3), None) == "classes"
    assert kind_of(torch.zeros(4, 5, 3), torch.zeros(4, 5, dtype=torch.long)) == "tokens"
    assert kind_of(torch.zeros(4, 1), torch.zeros(4, 1)) == "numbers"
    assert kind_of(torch.zeros(4, 1), None) == "numbers"


def test_numbers_give_errors_and_how_they_hang_together():
    targets = X[:, :2] * 0.5
    one, other = net(0, 2), net(1, 2)
    found = collect(*pair(one, other), data([(X[:20], targets[:20]), (X[20:], targets[20:])]))
    errors = [(model(X) - targets).detach().double() for model in (one, other)]
    np.testing.assert_allclose(found.original.error, errors[0].square().mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.difference, (errors[0] - errors[1]).square().mean(1), rtol=1e-5)
    said = agreement(found)
    cosine = float((errors[0] * errors[1]).sum() / errors[0].norm() / errors[1].norm())
    assert said["error_correlation"].value == pytest.approx(cosine, rel=1e-5)
    assert said["error_correlation"].low < cosine < said["error_correlation"].high


def test_agreement_is_what_a_naive_count_says():
    found = collect(*pair(), data())
    said = agreement(found)
    one, other = net(0)(X), net(1)(X)
    top = [set(a.tolist()) & set(b.tolist()) for a, b in zip(one.topk(5).indices, other.topk(5).indices, strict=True)]
    assert said["top_1"].value == pytest.approx(float((one.argmax(1) == other.argmax(1)).float().mean()))
    assert said["top_5"].value == pytest.approx(np.mean([len(common) / 5 for common in top]))
    wrong = [(scores.argmax(1) != Y).numpy() for scores in (one, other)]
    assert said["error_correlation"].value == pytest.approx(np.corrcoef(*wrong)[0, 1])
    from sklearn.metrics import cohen_kappa_score

    assert said["error_consistency"].value == pytest.approx(cohen_kappa_score(*wrong))
    both = wrong[0] & wrong[1]
    assert said["same_error"].value == pytest.approx((one.argmax(1) == other.argmax(1)).numpy()[both].mean())
    for name, measured in said.items():
        assert measured.low <= measured.value <= measured.high, name


def test_of_few_classes_no_best_five_are_compared():
    assert not {"top_3", "top_5"} & set(agreement(collect(*pair(net(0, 3), net(1, 3)), data([(X, Y % 3)]))))


def test_flips_are_counted_and_the_worst_are_shown():
    found = collect(*pair(), data(), shown=2)
    said = flips(found, data())
    parts = [said.measurements[n].value for n in ("turned_wrong", "turned_right", "both_right", "both_wrong")]
    assert sum(parts) == pytest.approx(1)
    worst = said.worst[0]
    assert worst.original.predicted == worst.actual != worst.compressed.predicted
    assert worst.input.kind == "numbers" and list(worst.input.numbers) == pytest.approx(X[worst.sample].tolist())
    assert said.worst[0].severity >= said.worst[1].severity > -1


def test_shown_pictures_are_drawn_as_their_pixels_were():
    import base64

    pictures = torch.rand(6, 3, 5, 7)
    mean, deviation = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    given = (pictures - torch.tensor(mean)[:, None, None]) / torch.tensor(deviation)[:, None, None]
    model = nn.Sequential(nn.Flatten(), nn.Linear(105, 3))
    known = EvaluationData([(given, torch.zeros(6, dtype=torch.long))], pixels=Pixels(mean, deviation))
    other = Runnable("other", lambda x: -model(x))
    found = collect(Runnable("one", model), other, known, shown=6)
    flip = flips(found, known).worst[0]
    drawn = np.frombuffer(base64.b64decode(flip.input.pixels), np.uint8).reshape(flip.input.shape)
    expected = (pictures[flip.sample].permute(1, 2, 0) * 255).round().numpy()
    assert np.abs(drawn - expected).max() <= 1


def test_without_targets_agreement_and_changed_answers_are_still_told():
    found = collect(*pair(), data([X[:30], X[30:]]), shown=2)
    assert found.original.values is None and found.targets is None and found.n == 50
    said = agreement(found)
    assert set(said) == {"top_1", "top_5", "divergence", "confidence_change"}
    shown = flips(found, data([X[:30], X[30:]]))
    assert set(shown.measurements) == {"changed"} and shown.worst[0].actual is None


def test_classes_in_another_order_are_suspected():
    model, order = net(), torch.tensor([3, 0, 1, 5, 2, 4])
    found = collect(Runnable("one", model), Runnable("two", lambda x: model(x)[:, order]), data())
    said = re.search(r"number the classes differently: .*\(its (\d) for (\d) …\)", order_warning(found))
    assert int(order[int(said[1])]) == int(said[2]) != int(said[1])
    assert order_warning(collect(*pair(model, net(0)), data())) is None


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_model_in_half_precision_is_given_inputs_of_its_own_type(name):
    dtype = getattr(torch, name)
    half = copy.deepcopy(net()).to(dtype)
    found = collect(Runnable("one", net()), Runnable("half", half), data())
    assert found.compressed.scores.classes.tolist() == half(X.to(dtype)).argmax(1).tolist()
    kept = Cast(name).run(net(), Task(net(), calibration=[X]), Context()).model  # computes in float32
    same = collect(Runnable("half", half), Runnable("kept", kept), data())
    np.testing.assert_allclose(same.compressed.scores.logits, kept(X).detach(), atol=1e-6)


@pytest.mark.parametrize(("rows", "classes"), [(1, 6), (2, 6), (40, 3), (60, 10), (1000, 1000)])
def test_models_that_agree_by_chance_alone_are_not_said_to_number_classes_differently(rows, classes):
    said = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        outputs = [torch.randn(rows, classes, generator=generator) for _ in range(2)]
        models = (Runnable(str(n), lambda x, n=n: outputs[n][x]) for n in range(2))
        said += order_warning(collect(*models, data([torch.arange(rows)]))) is not None
        if rows == 1000:
            break
    assert said == 0


def test_groups_are_read_with_the_samples_and_missing_ones_are_none():
    sex = np.array(["f", "m", "", None, "?"] * 10, object)
    loader = [{"x": X[s], "y": Y[s], "sex": sex[s]} for s in (slice(0, 25), slice(25, 50))]
    task = Task(net(), test=loader, inputs_of=lambda batch: ((batch["x"],), {}))
    found = collect(*pair(), EvaluationData(task, groups_of=lambda batch: {"sex": batch["sex"]}))
    assert found.groups["sex"].tolist() == ["f", "m", None, None, None] * 10


@pytest.mark.parametrize(
    "one, other, loader, error, words",
    [
        (net(0), net(1, 7), None, InputError, "differ in shape"),
        (net(0), lambda x: net(1)(x)[:3], None, InputError, "one row per sample"),
        (net(0), lambda x: net(1)(x) / 0, None, VerificationError, "not finite"),
        (net(0), net(1), [], InputError, "empty|no batch"),
        (net(0), nn.Linear(9, 6), None, InputError, "other: .*does not run"),
        (net(0), net(1), [(X, Y + 3)], InputError, "out of range"),
        (lambda x: net(0)(x).argmax(1), lambda x: net(1)(x).argmax(1), None, InputError, "a score for each class"),
        (net(0), net(1), iter([(X, Y)]), InputError, "only once"),
        (net(0), net(1), [(X, Y), (X[:0], Y[:0])], InputError, "batch 1: the batch holds no sample"),
    ],
)
def test_pairs_that_cannot_be_compared_are_input_errors(one, other, loader, error, words):
    with pytest.raises(error, match=words):
        collect(*pair(one, other), EvaluationData(loader if loader is not None else data().task))


def test_groups_of_another_length_are_refused():
    with pytest.raises(InputError, match="another number of samples"):
        collect(*pair(), data(groups_of=lambda batch: {"sex": ["f"]}))


def test_a_model_that_writes_into_its_inputs_does_not_change_what_the_other_is_given():
    class Centred(nn.Module):
        def forward(self, x):
            return net(0)(x.sub_(1.0))

    batches = [(X.clone(), Y)]
    found = collect(*pair(Centred(), Centred()), EvaluationData(batches))
    assert found.divergence.max() == 0 and torch.equal(batches[0][0], X)


def test_integers_that_are_no_indices_go_to_a_metric_of_the_users_own():
    levels = Metric(
        "error", lambda outputs, targets: (outputs.mean(1) - targets).abs(), higher_is_better=False, unit=""
    )
    task = Task(net(), test=[(X, Y + 3)], loss=lambda model, batch: model(batch[0]).sum(), metric=levels)
    found = collect(*pair(), EvaluationData(task))
    assert found.kind == "numbers"
    np.testing.assert_allclose(found.original.values, (net(0)(X).mean(1) - Y - 3).abs().detach(), rtol=1e-6)
    with pytest.raises(InputError, match="batch 1: the targets are no class indices"):
        collect(*pair(), EvaluationData(replace(task, test=[(X, Y), (X, Y + 3)])))


def texts(seed=0, width=7):
    return torch.randint(0, width, (12, 5), generator=torch.Generator().manual_seed(seed))


def test_accuracy_of_tokens_is_each_samples_share_of_positions_with_a_target():
    x, y = texts(), texts(1)
    y[:, 4], y[3, :3] = -100, -100
    models = nn.Embedding(7, 7), nn.Embedding(7, 7)
    found = collect(*pair(*models), EvaluationData([(x[:8], y[:8]), (x[8:], y[8:])]))
    for answers, model in zip(found.both, models, strict=True):
        right = model(x).argmax(-1) == y
        shares = [float(r[t != -100].double().mean()) for r, t in zip(right, y, strict=True)]
        np.testing.assert_allclose(answers.values, shares)
    assert found.notes == ()
    y[2] = -100
    with pytest.raises(InputError, match="samples without any target.*of 1 of 12"):
        collect(*pair(*models), EvaluationData([(x, y)]))


def test_targets_that_repeat_the_inputs_tokens_are_noted():
    x = texts()
    padded = torch.where(x == 3, -100, x)
    models = pair(nn.Embedding(7, 7), nn.Embedding(7, 7))
    assert "shift" in collect(*models, EvaluationData([(x[:6], x[:6]), (x[6:], padded[6:])])).notes[0]
    assert collect(*models, EvaluationData([(x[:6], x[:6].flip(1)), (x[6:], x[6:])])).notes == ()


def test_class_scores_of_positions_that_come_first_are_told_where_they_belong():
    pictures, labels = torch.rand(4, 3, 6, 6), torch.randint(0, 5, (4, 6, 6))
    models = pair(nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1))
    with pytest.raises(InputError, match=r"class scores come last.*movedim\(1, -1\)"):
        collect(*models, EvaluationData([(pictures, labels)]))
    last = Task(nn.Identity(), test=[(pictures, labels)], output_of=lambda output: output.movedim(1, -1))
    assert collect(*models, EvaluationData(last)).kind == "tokens"


def test_texts_without_any_target_are_refused():
    task = Task(
        net(), test=[(X[:, None], torch.full((50, 1), -100))], metric=Metric("zero", lambda o, t: o[:, 0, 0] * 0)
    )
    with pytest.raises(InputError, match="-100 at every position"):
        collect(*pair(), EvaluationData(task))


def test_data_from_elsewhere_that_can_be_read_only_once_are_refused_before_the_work():
    with pytest.raises(InputError, match="EvaluationData.outside: .*only once"):
        data(outside=iter([(X,)]))


def test_a_limit_cuts_both_models_alike():
    found = collect(*pair(), data(), limit=20)
    assert found.n == 20 and len(found.original.values) == len(found.compressed.scores.loss) == 20


def write(path, nodes, initializers=(), opsets=(("", 20),)):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], list(initializers))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid(*o) for o in opsets], ir_version=10), path)


def test_an_onnx_file_runs_beside_a_module(perceptron):
    file = open_onnx(perceptron(width=8, layers=1), threads=1)
    found = collect(file, Runnable("same", lambda x: file.model(x)), data())
    assert file.module is None and "ONNX Runtime" in file.backend and found.divergence.max() == 0


def test_a_file_takes_inputs_by_its_own_names(perceptron):
    file = open_onnx(perceptron(width=8, layers=1), threads=1)
    found = collect(file, file, EvaluationData([{"x": X, "y": Y}]))
    assert found.n == 50
    with pytest.raises(InputError, match="no inputs of these names"):
        collect(file, file, EvaluationData([{"z": X, "y": Y}]))


def test_a_file_with_custom_operators_is_refused_by_name(tmp_path):
    write(
        tmp_path / "m.onnx",
        [helper.make_node("Frobnicate", ["x"], ["y"], domain="acme")],
        opsets=(("", 20), ("acme", 1)),
    )
    with pytest.raises(InputError, match="acme::Frobnicate"):
        open_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "a/../../secret", ""])
def test_a_file_that_reads_outside_its_folder_is_refused(tmp_path, location):
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=location)
    write(tmp_path / "m.onnx", [helper.make_node("Add", ["x", "w"], ["y"])], [weight])
    with pytest.raises(ArtifactError, match="outside its own folder"):
        check_onnx(tmp_path / "m.onnx")


def test_weights_of_functions_and_sparse_ones_are_looked_at_too(tmp_path):
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[8], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../secret")
    hidden = [helper.make_node("Constant", [], ["w"], value=weight), helper.make_node("Add", ["a", "w"], ["b"])]
    function = helper.make_function("own", "F", ["a"], ["b"], hidden, [helper.make_opsetid("", 20)])
    write(tmp_path / "m.onnx", [helper.make_node("F", ["x"], ["y"], domain="own")], opsets=(("", 20), ("own", 1)))
    model = onnx.load(tmp_path / "m.onnx")
    model.functions.append(function)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="outside its own folder"):
        check_onnx(tmp_path / "m.onnx")
    write(tmp_path / "s.onnx", [helper.make_node("Add", ["x", "w"], ["y"])])
    model = onnx.load(tmp_path / "s.onnx")
    model.graph.sparse_initializer.add(dims=[8]).values.CopyFrom(weight)
    (tmp_path / "s.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="outside its own folder"):
        check_onnx(tmp_path / "s.onnx")


def test_a_file_that_declares_no_shape_runs(tmp_path):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    found = collect(open_onnx(tmp_path / "m.onnx", threads=1), Runnable("same", torch.relu), data())
    assert found.n == 50 and found.divergence.max() == 0
    with pytest.raises(InputError, match="no shape"):
        made_up_inputs(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 4])
def test_a_damaged_file_is_an_artifact_error(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="no ONNX file"):
        open_onnx(tmp_path / "m.onnx")


def test_a_missing_file_is_an_artifact_error(tmp_path):
    with pytest.raises(ArtifactError, match="no such ONNX file"):
        open_onnx(tmp_path / "m.onnx")
