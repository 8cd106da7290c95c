"""tersor sensitivity: what is measured is what is written, shown and exits."""

import json
import re

import pytest
import torch
from torch import nn

import tersor
from tersor.cli.main import main
from tersor.core.errors import ArtifactError, InputError
from tersor.jobs import bit_sensitivity as bit_job
from tersor.measure.sensitivity import Probe
from tersor.prune.sparse.prune import Prune
from tersor.report.format import tight
from tersor.report.sensitivity import render, sensitivity_plot, sensitivity_table, verdict

TASK = """
import torch, tersor
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
x = torch.randn(80, 8)
y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
data = lambda: DataLoader(TensorDataset(x, y), batch_size=40)
def task():
    net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
    return tersor.Task(net, data(), data(), data())
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small_task.py"
    path.write_text(TASK)
    return path


def test_the_command_writes_the_page_and_the_numbers_and_prints_the_table(file, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        main(["sensitivity", str(file), "-o", str(out), "--overall", "80%", "--sparsity", "0.5", "--sparsity", "90%"])
        == 0
    )
    shown = capsys.readouterr().out
    data = json.loads((out / "sensitivity.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["sensitivity.html", "sensitivity.json"]
    assert [layer["place"] for layer in data["layers"]] == ["0.weight", "2.weight"] and data["samples"] == 80
    assert [point["asked"] for point in data["layers"][0]["points"]] == [0.5, 0.9]
    zeros = sum(data["together"]["sparsity"][layer["place"]] * layer["parameters"] for layer in data["layers"])
    assert round(zeros) == int(0.8 * (192 + 72) + 1e-9) and "together" in shown and "within" in shown
    assert main(["sensitivity", str(file), "-o", str(out), "--pattern", "1:24", "--max-drop", "100%"]) == 0
    assert "skipped 0.weight: 8 inputs are no multiple of 24" in " ".join(capsys.readouterr().out.split())
    assert main(["sensitivity", str(file), "-o", str(out), "--json", "--seconds", "100"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "sensitivity.json").read_text()) and printed["together"] is None


def test_the_page_holds_every_layer_and_needs_no_network(file, tmp_path):
    done = tersor.sensitivity(file, overall=0.7, probe=Probe((0.5, 0.8)))
    page = render(done.data)
    assert "http" not in page.replace("http://www.w3.org", "") and page.count("<svg") == 1
    header, rows = sensitivity_table(done.data)
    assert header == ["layer", "numbers", "50 %", "80 %", "within", "together"]
    for row in rows:
        assert all(f">{cell}</t" in page for cell in row)
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", sensitivity_plot(done.data).svg)
    assert {"0", "2", "50 %", "80 %"} <= set(texts)
    assert not (tmp_path / "sensitivity.json").exists(), "nothing is written that was not asked for"


def test_names_in_the_page_are_escaped_and_nothing_measured_is_no_plot(file):
    done = tersor.sensitivity(file, probe=Probe((0.5,)))
    data = json.loads(json.dumps(done.data).replace("2.weight", "<b>2</b>.weight"))
    assert "&lt;b&gt;2&lt;/b&gt;" in render(data) and "<b>2" not in render(data)
    assert sensitivity_plot({**data, "layers": []}) is None and "How much" in render({**data, "layers": []})


def judged(sparsities, max_drop=1.0):
    layers = [{"place": f"{name}.weight"} for name in sparsities]
    within = {"sparsity": {f"{name}.weight": value for name, value in sparsities.items()}}
    return verdict({"layers": layers, "within": within, "max_drop": max_drop, "metric": {"unit": "fraction"}})


def test_the_verdict_names_the_layers_that_bear_most_and_least(file):
    said = judged({"a": 0.0, "b": 0.95, "c": 0.9499, "d": 0.5})
    assert said == "b and c bear most (95 % zeros) and a least (0 % zeros) within 1 point, each pruned alone."
    many = judged({**{f"m{n}": 0.9 for n in range(5)}, "z": 0.5}, 2.0)
    assert many.startswith("m0, m1, m2 and 2 more bear most (90 % zeros) and z least") and "2 points" in many
    assert judged({"a": 0.5, "b": 0.5}) == "All 2 layers bear 50 % zeros within 1 point, each pruned alone."
    assert judged({}) == "How much each layer bears: nothing was measured."
    layers = [{"place": "a.weight"}, {"place": "b.weight"}]
    bits = {"layers": layers, "within": {"bits": {"a": None, "b": 3}}, "max_drop": 1, "metric": {"unit": "fraction"}}
    assert verdict(bits) == "b bears most (3 bits) and a least (float alone) within 1 point, each quantised alone."
    done = tersor.sensitivity(file, probe=Probe((0.5, 0.8)))
    page = render(done.data)
    assert f"<h1>{tight(verdict(done.data))}</h1>" in page and page.index("<h1>") < page.index("<h2") < page.index(
        "<svg"
    )


def test_threads_go_to_torch_and_to_the_kernels_that_are_timed(file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    real = bit_job.layer_latency
    monkeypatch.setattr(
        bit_job, "layer_latency", lambda *given, threads: (seen.append(threads), real(*given, threads=threads))[1]
    )
    options = ["--threads", "1", "--bits", "8", "--max-latency", "10ms", "--quiet"]
    assert main(["sensitivity", str(file), "-o", str(tmp_path / "out"), *options]) == 0
    assert seen[0] == 1 and seen[-1] == 1 and len(seen) >= 2


def test_the_fractions_go_straight_into_prune(file):
    done = tersor.sensitivity(file, overall=0.6, probe=Probe((0.5, 0.8)))
    batches = [(torch.randn(4, 8), torch.zeros(4).long())]
    task = tersor.Task(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3)), batches, batches, batches)
    model = Prune(done.together.sparsity).run(task.model, task.complete()).model
    assert sum(int((model[n].weight == 0).sum()) for n in (0, 2)) == int(0.6 * 264 + 1e-9)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--sparsity", "1.5"], "Probe.sparsities"), (["--sparsity", "100%"], "Probe.sparsities"),
        (["--sparsity", "nan"], "--sparsity: not a share"), (["--overall", "0.99"], "more zeros are asked for"),
        (["--pattern", "odd"], "unknown pattern"), (["--max-drop", "much"], "not a value"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence_and_exit_code_two(file, tmp_path, capsys, options, match):
    assert main(["sensitivity", str(file), "-o", str(tmp_path / "out"), *options]) == 2
    assert re.search(match, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):  # before the task is even looked for
        tersor.sensitivity("gone.py", tmp_path / "taken" / "inside", probe=Probe((0.5,)))


def test_with_bits_the_command_tells_widths_and_layers_that_stay_float(file, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--bits", "8", "--bits", "2", "--max-size", "500", "--max-drop", "0.01%"]
    assert main(["sensitivity", str(file), "-o", str(out), *options]) == 0
    shown = capsys.readouterr().out
    data = json.loads((out / "sensitivity.json").read_text())
    assert [[point["bits"] for point in layer["points"]] for layer in data["layers"]] == [[8, 2], [8, 2]]
    assert data["together"]["size_bytes"] <= 500 and set(data["together"]["bits"]) == {"0", "2"}
    header, rows = sensitivity_table(data)
    assert header == ["layer", "numbers", "8 bits", "2 bits", "within", "together"]
    page = (out / "sensitivity.html").read_text()
    assert all(f">{cell}</t" in page for row in rows for cell in row) and "one layer quantised" in page
    kept = [layer for layer, bits in data["within"]["bits"].items() if bits is None]
    assert all(f"{layer} stays float: at 8 bits the metric falls by" in shown for layer in kept)
    assert f"{data['together']['size_bytes']} B of weights and scales" in " ".join(shown.split())


def test_options_of_the_other_kind_are_refused(file, tmp_path, capsys):
    for options in (["--bits", "8", "--overall", "0.5"], ["--max-size", "1KB"]):
        assert main(["sensitivity", str(file), "-o", str(tmp_path / "out"), *options]) == 2
        assert "says nothing here" in capsys.readouterr().err
    assert main(["sensitivity", str(file), "-o", str(tmp_path / "out"), "--bits", "9"]) == 2
    assert "BitProbe.bits" in capsys.readouterr().err


def test_a_latency_budget_is_met_by_what_the_layers_take(file, capsys):
    done = tersor.bit_sensitivity(file, probe=tersor.BitProbe((8, 4)), max_latency=1000.0)
    assert done.together.bits == {"0": None, "2": None}, "there is time for float"
    times = done.data["milliseconds"]
    assert times.keys() == {"0", "2"} and done.together.cost == pytest.approx(sum(row[0] for row in times.values()))
    with pytest.raises(InputError, match="the budget cannot be met"):
        tersor.bit_sensitivity(file, probe=tersor.BitProbe((8,)), max_latency=1e-9)
    with pytest.raises(InputError, match="give one budget"):
        tersor.bit_sensitivity(file, max_latency=1.0, max_size=1.0)
