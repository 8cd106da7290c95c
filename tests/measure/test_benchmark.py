import json
import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import tersor
import tersor.measure.latency_worker as latency_worker
from tersor.core.errors import ArtifactError, InputError, TersorError
from tersor.measure.benchmark import Conditions, _notes, measure_contenders
from tersor.measure.benchmark_schema import Benchmark, parse_benchmark
from tersor.measure.benchmark_timing import comparison, outliers, timing
from tersor.measure.contender import Contender, file_spec, store_inputs
from tersor.measure.energy import Meter, find_meter
from tersor.measure.latency import mean_call
from tersor.measure.made_up import fixed_batch, made_up_inputs
from tersor.measure.onnx_cpu import checked_providers
from tersor.measure.opened import Call, Inputs, Opened
from tersor.measure.opened_module import OpenedModule, open_module

FACTS = {"source": "", "backend": "none", "precision": "as stored", "device": "cpu"}


def calls(center, seed, *, common=0.0, own=0.0, sittings=9, rounds=4, each=5):
    """Seconds [sittings, rounds, calls]: shifts of sittings, of turns that last, and noise of calls."""
    random = np.random.default_rng(seed)
    shift = np.exp(common * np.random.default_rng(seed // 2).standard_normal((sittings, 1, 1)))
    lasting = np.cumsum(own * random.standard_normal((sittings, rounds, 1)), axis=1)
    return center * shift * np.exp(lasting + 0.02 * random.standard_normal((sittings, rounds, each)))


def verdict(a, b):
    return comparison("a", "b", 1, 1, {"a": {"times": a.tolist()}, "b": {"times": b.tolist()}})


def seen(times, windows=()):
    return {"times": times.tolist(), "windows": windows, "steady": [True, False, True], "outputs": [[1, 10]]}


def test_verdicts_are_said_in_words_and_numbers():
    slow, fast = calls(2e-3, 0, common=0.1), calls(1e-3, 1, common=0.1)
    assert verdict(slow, fast).verdict == "faster" and verdict(slow, fast).sentence.startswith("faster by 2")
    assert verdict(fast, slow).sentence.startswith("slower by 2") and verdict(fast, slow).speedup.value < 0.6
    same = verdict(calls(1e-3, 2), calls(1e-3, 3))
    assert same.sentence.startswith("no difference shown (0.9") and same.speedup.low <= 1 <= same.speedup.high


def test_wide_intervals_are_too_noisy_to_tell_and_vague_ones_show_no_middle():
    wild = verdict(calls(1e-3, 4, own=0.4), calls(1e-3, 7, own=0.4))
    assert wild.verdict == "too noisy to tell" and wild.speedup.high > 1.25 * wild.speedup.low
    vague = verdict(calls(4e-3, 4, own=0.4), calls(1e-3, 7, own=0.4))
    assert vague.verdict == "faster" and vague.sentence.startswith("faster, by ") and " to " in vague.sentence


@pytest.mark.parametrize("threads", [1, 2])
def test_noise_is_said_and_one_thread_advised_only_where_there_were_more(threads):
    found = timing("m", 1, threads, seen(calls(1e-3, 4, common=0.6)), FACTS)
    (note,) = [note for note in _notes([found], []) if "noisy" in note]
    assert ("take one thread" in note) == (threads > 1)


def test_a_model_against_itself_and_against_ten_percent_more_work_in_noise_that_lasts():
    noise = dict(common=0.3, own=0.02)
    draws = range(0, 600, 2)
    same = [verdict(calls(1, n, **noise), calls(1, n + 1, **noise)).verdict for n in draws]
    more = [verdict(calls(1, n, **noise), calls(1.1, n + 1, **noise)).verdict for n in draws]
    assert same.count("no difference shown") >= 0.92 * len(same)  # 96 % are expected
    assert more.count("slower") >= 0.9 * len(more) and "faster" not in more


def test_times_are_those_of_all_calls_outliers_too():
    times = calls(1e-3, 0, sittings=3, rounds=10, each=20)
    times[1, 2, 3] = 0.05
    found = timing("m", 4, 2, seen(times), FACTS)
    assert found.mean_ms.value == pytest.approx(1e3 * times.mean())
    assert found.p50_ms.value == pytest.approx(1e3 * np.median(np.median(times.reshape(3, -1), axis=1)))
    assert found.p99_ms.value == pytest.approx(1e3 * np.median(np.quantile(times.reshape(3, -1), 0.99, axis=1)))
    assert found.percentiles_ms[0] == 1e3 * times.min() and found.percentiles_ms[100] == 50
    assert found.outliers.count == 1 and found.outliers.slowest_ms == (50,) and found.outliers.share == 1 / 600
    assert found.steady == pytest.approx(2 / 3) and found.p50_ms.n == 600 and found.throughput is None
    assert found.p50_ms.low is None, "three sittings bound no median"


def test_what_is_usual_in_a_slow_sitting_is_no_outlier():
    times = calls(1e-3, 0, sittings=2, rounds=10, each=20)
    times[1] *= 10
    assert outliers(times).count == 0


def test_the_interval_of_the_mean_covers_in_spite_of_sittings():
    random, hits = np.random.default_rng(0), 0
    for _ in range(400):
        low, high = mean_call(np.exp(0.1 * random.standard_normal((9, 1, 1))) * np.ones((9, 2, 5)))[1:]
        hits += low <= np.exp(0.1**2 / 2) <= high
    assert hits >= 0.93 * 400


def test_throughput_and_energy_are_medians_of_windows():
    windows = [{"calls": 10 + n, "seconds": 1.0, "joules": 2.0} for n in range(9)]
    found = timing("m", 4, 1, seen(calls(0.1, 0), windows), FACTS)
    assert found.throughput.value == 4 * 14 and found.throughput.conditions["seconds"] == 9
    assert found.energy.value == pytest.approx(2 / (4 * 14)) and found.energy.unit == "J/sample"
    assert 4 * 11 <= found.throughput.low < 4 * 12 and 4 * 16 < found.throughput.high <= 4 * 17
    assert timing("m", 4, 1, seen(calls(0.1, 0), [{**windows[0], "joules": None}] * 6), FACTS).energy is None


def zone(folder, name, microjoules):
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "energy_uj").write_text(f"{microjoules}\n")
    (path / "max_energy_range_uj").write_text("1000000\n")
    return path / "energy_uj"


def test_energy_is_summed_over_packages_and_counters_may_begin_anew(tmp_path):
    one, two = zone(tmp_path, "intel-rapl:0", 900_000), zone(tmp_path, "intel-rapl:1", 0)
    zone(tmp_path, "intel-rapl:0:0", 5)  # a part of the first package, counted there
    whole = zone(tmp_path, "intel-rapl:2", 0)  # the platform, in which both packages are counted
    (whole.parent / "name").write_text("psys\n")
    meter, why = find_meter(powercap=tmp_path)
    meter.start()
    one.write_text("100000")
    two.write_text("250000")
    whole.write_text("700000")
    assert why == "" and meter.joules() == pytest.approx(0.2 + 0.25, abs=1e-5)


def test_a_machine_without_meters_says_so(tmp_path):
    assert find_meter(powercap=tmp_path) == (None, "the machine shows no energy counters (RAPL)")
    zone(tmp_path, "intel-rapl:0", "nonsense")
    assert "cannot be read" in find_meter(powercap=tmp_path)[1]
    meter, why = find_meter("cuda")
    assert meter is not None or "NVML" in why
    assert find_meter("cuda:1") == (None, "NVML is read of the first card alone")
    assert find_meter("coreml") == (None, "no meter of coreml is known")


def test_each_model_is_metered_where_it_runs(monkeypatch):
    class Still(Opened):
        def call(self, batch):
            return Call(lambda: None, lambda: [[batch]])

    class Fixed(Meter):
        def __init__(self, joules):
            self.fixed = joules

        def start(self):
            pass

        def joules(self):
            return self.fixed

    monkeypatch.setattr(latency_worker, "share_threads", lambda threads: None)
    monkeypatch.setattr(
        latency_worker, "find_meter", lambda device: ({"cpu": Fixed(1.0), "cuda": Fixed(2.0)}[device], "")
    )
    models = {"a": {"kind": "still", "device": "cuda"}, "b": {"kind": "still"}}
    request = {"models": models, "batch_sizes": [1], "threads": 1, "seconds": 0.02, "window": 0.01}
    found = latency_worker.measure(request, lambda: None, {"still": lambda spec: Still})["1"]
    assert [{window["joules"] for window in found[name]["windows"]} for name in "ab"] == [{2.0}, {1.0}]


def declared(path, shape, kind=TensorProto.FLOAT):
    x, y = helper.make_tensor_value_info("x", kind, shape), helper.make_tensor_value_info("y", kind, shape)
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_inputs_are_made_up_from_what_a_file_declares(tmp_path):
    (x,) = made_up_inputs(declared(tmp_path / "a.onnx", ["n", 3, 8]))
    assert x.shape == (1, 3, 8) and x.dtype == torch.float32 and 0.5 < float(x.std()) < 1.5
    (ids,) = made_up_inputs(declared(tmp_path / "b.onnx", [2, 7], TensorProto.INT64))
    assert ids.shape == (2, 7) and ids.dtype == torch.int64 and bool((ids == 1).all())
    assert fixed_batch(tmp_path / "a.onnx") is None and fixed_batch(tmp_path / "b.onnx") == 2


@pytest.mark.parametrize(
    "shape, kind, match",
    [
        (["n", "length"], TensorProto.FLOAT, "leaves a size free"),
        (["n", 2**40], TensorProto.FLOAT, "no inputs can be made up"),
        (["n", 3], TensorProto.STRING, "no inputs can be made up"),
    ],
)
def test_inputs_that_cannot_be_made_up_ask_for_data(tmp_path, shape, kind, match):
    with pytest.raises(InputError, match=f"{match}.*--data"):
        made_up_inputs(declared(tmp_path / "a.onnx", shape, kind))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_sizes": ()}, {"threads": (0,)}, {"seconds": 0}, {"seconds": math.inf}, {"window": -1},
        {"window": math.nan}, {"starts": -1}, {"patience": 0}, {"patience": math.nan},
    ],
)  # fmt: skip
def test_conditions_that_cannot_be_are_refused(wrong):
    with pytest.raises(InputError, match="no conditions"):
        Conditions(**wrong)


def test_providers_have_short_names_and_the_cpu_comes_last():
    assert checked_providers(()) == checked_providers(("cpu",)) == ("CPUExecutionProvider",)
    with pytest.raises(InputError, match="no such execution provider.*warp.*CPUExecutionProvider"):
        checked_providers(("warp",))


def test_inputs_by_name_and_by_position_come_back_as_they_were_stored(tmp_path):
    x, mask = torch.randn(3, 4), torch.ones(3, 4, dtype=torch.int64)
    found = Inputs.read(store_inputs((x,), tmp_path, {"mask": mask})).tiled(7)
    assert np.array_equal(found.args[0], x.numpy()[[0, 1, 2, 0, 1, 2, 0]]) and found.kwargs["mask"].shape == (7, 4)


def contender(name, path, x):
    return Contender(name, file_spec(path), (x,), facts=FACTS)


def test_files_are_measured_in_every_respect(perceptron):
    small, large = perceptron("small", 64, 2), perceptron("large", 64, 60)
    x = torch.randn(2, 64)
    found = measure_contenders(
        [contender("large", large, x), contender("small", small, x)],
        Conditions(batch_sizes=(1, 4), threads=(1,), seconds=0.2, window=0.1, starts=1),
    )
    assert [(each.model, each.batch) for each in found.timings] == [
        ("large", 1),
        ("small", 1),
        ("large", 4),
        ("small", 4),
    ]
    one, other = found.models
    assert one.load_ms.value > 0 and one.first_call_ms.value > 0 and one.peak_memory_bytes.value > 0
    assert one.load_ms.low is None and one.load_ms.n == 1 and one.device_memory_bytes is None
    assert all(each.verdict == "faster" and each.speedup.value > 3 for each in found.comparisons)
    assert found.timings[3].throughput.value > 3 * found.timings[2].throughput.value
    assert found.timings[3].outputs == ((4, 64),) and found.timings[0].energy is None
    assert any(each.what == "energy" for each in found.skipped) or found.timings[0].energy is not None


def test_outputs_of_different_shapes_are_noted(perceptron, tmp_path):
    path = declared(tmp_path / "same.onnx", ["n", 8])
    model = onnx.load(path)
    model.graph.node[0].CopyFrom(helper.make_node("Flatten", ["x"], ["y"], axis=0))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "wide"
    onnx.save(model, path)
    x = torch.randn(4, 8)
    conditions = Conditions(batch_sizes=(4,), threads=(1,), seconds=0.05, window=0, starts=0)
    found = measure_contenders([contender("a", perceptron(), x), contender("b", path, x)], conditions)
    assert any("differ in shape" in note and "a [4, 8]; b [1, 32]" in note for note in found.notes)
    assert {each.what for each in found.skipped} == {"throughput and energy", "load time and peak memory"}


def test_a_benchmark_is_read_back_as_it_was_written():
    each = timing("m", 4, 2, seen(calls(1e-3, 0)), FACTS)
    written = Benchmark(
        tersor="0", inputs="none", models=(), timings=(each,), comparisons=(verdict(calls(1, 0), calls(1, 1)),)
    )
    stored = json.loads(json.dumps(written.to_json(), allow_nan=False))
    assert parse_benchmark(stored) == written and written.timing("m", 4) == each
    with pytest.raises(KeyError):
        written.timing("m", 5)
    with pytest.raises(ArtifactError, match="another version"):
        parse_benchmark({**stored, "schema": 2})
    stored["timings"][0]["batch"] = 0
    with pytest.raises(ArtifactError, match="timings.0.batch.*docs/benchmark.md"):
        parse_benchmark(stored)


def spec(folder, x, **more):
    return {
        "compiled": False,
        "dtype": None,
        "device": "cpu",
        "threads": 1,
        "inputs": store_inputs((x,), folder),
        **more,
    }


@pytest.fixture
def gradients_stay():
    on, threads = torch.is_grad_enabled(), torch.get_num_threads()
    yield
    torch.set_grad_enabled(on)
    torch.set_num_threads(threads)


def test_a_module_opened_again_has_its_weights_elsewhere_and_says_the_same(tmp_path, gradients_stay):
    module, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
    opener = open_module(spec(tmp_path, x), lambda: module, "m")
    first = opener()
    before, where = first.call(2).run(), module.weight.data_ptr()
    again = opener()
    assert again is first and module.weight.data_ptr() != where and torch.equal(again.call(2).run(), before)
    assert again.call(5).first() == [[5, 3]] and not before.requires_grad


def test_bfloat16_is_computed_in(tmp_path, gradients_stay):
    opened = open_module(spec(tmp_path, torch.randn(2, 4), dtype="bfloat16"), lambda: torch.nn.Linear(4, 3), "m")()
    assert isinstance(opened, OpenedModule) and opened.call(1).run().dtype == torch.bfloat16
    already = open_module(spec(tmp_path, torch.randn(2, 4)), lambda: torch.nn.Linear(4, 3).bfloat16(), "m")()
    assert already.call(1).run().dtype == torch.bfloat16


def test_a_module_that_refuses_its_inputs_is_named(tmp_path, gradients_stay):
    opened = open_module(spec(tmp_path, torch.randn(2, 5)), lambda: torch.nn.Linear(4, 3), "narrow")()
    with pytest.raises(InputError, match="narrow, batch 2: the model cannot be run"):
        opened.call(2).first()
    with pytest.raises(InputError, match="there is no such device"):
        open_module(spec(tmp_path, torch.randn(2, 5), device="cuda:99"), lambda: torch.nn.Linear(4, 3), "m")()


def test_compiled_models_of_one_class_are_compiled_for_every_batch_size(tmp_path, gradients_stay, monkeypatch):
    from torch._dynamo import config, reset
    from torch._dynamo.testing import CompileCounter

    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(config, "recompile_limit", config.recompile_limit)
    monkeypatch.setattr(torch, "compile", lambda module, **more: compiled(module, backend=counter, **more))
    reset()
    given = spec(tmp_path, torch.randn(2, 4), compiled=True)
    for width in (3, 5):
        opened = open_module(given, lambda width=width: torch.nn.Linear(4, width), "m")()
        for batch in range(1, 7):
            opened.call(batch).run()
    assert counter.frame_count == 12  # torch stops at eight, and runs the others eagerly
    reset()


def test_names_of_benchmarks_are_public():
    assert tersor.Conditions is Conditions and tersor.benchmark and tersor.Engines


def test_a_file_that_never_ends_is_ended(tmp_path):
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node(op, [a], [b]) for op, a, b in (("Identity", "c", "go"), ("Tanh", "h", "t"))], "body",
        [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("h", TensorProto.FLOAT, None)],
        [value("go", TensorProto.BOOL, []), value("t", TensorProto.FLOAT, None)],
    )  # fmt: skip
    constants = [
        helper.make_tensor("n", TensorProto.INT64, [], [2**62]),
        helper.make_tensor("true", TensorProto.BOOL, [], [1]),
    ]
    loop = helper.make_node("Loop", ["n", "true", "x"], ["y"], body=body)
    ends = value("x", TensorProto.FLOAT, ["n", 4]), value("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([loop], "g", [ends[0]], [ends[1]], constants)
    path = tmp_path / "endless.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    with pytest.raises(TersorError, match="no sign of life.*3 s"):
        measure_contenders([contender("endless", path, torch.randn(1, 4))], Conditions((1,), (1,), patience=3.0))
