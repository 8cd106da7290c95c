import math
import random
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from tersor.core.errors import ArtifactError, InputError, TersorError
from tersor.core.progress import Progress
from tersor.measure.fresh_process import Watch, run_fresh
from tersor.measure.latency import _measurements, compare_latency
from tersor.measure.latency_worker import FEWEST_SITTINGS, SITTINGS, Schedule, Sitting, Warm, warm_up
from tersor.measure.memory import peak_memory
from tersor.measure.opened import Call

X = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))


def times(center, *, sittings=SITTINGS, rounds=3, calls=10, seed=0):
    return center * (1 + 0.01 * np.random.default_rng(seed).standard_normal((sittings, rounds, calls)))


def test_latency_is_measured_against_the_first_file(perceptron):
    small, large = perceptron("small", 64, 1), perceptron("large", 64, 60)
    found = compare_latency({"large": large, "small": small}, (X,), batch_sizes=(1, 4), threads=1, seconds=0.3)
    assert set(found["large"]) == {
        f"{name}_batch_{batch}{p}"
        for batch in (1, 4)
        for name, p in (("latency_ms", ""), ("latency_ms", "_p95"), ("throughput", ""))
    }
    assert set(found["small"]) - set(found["large"]) == {"speedup_batch_1", "speedup_batch_4"}
    speedup, latency = found["small"]["speedup_batch_4"], found["small"]["latency_ms_batch_4"]
    assert speedup.value > 3 and speedup.low > 1 and speedup.unit == "×"  # 60 times the work
    assert latency.low <= latency.value <= latency.high and latency.n > 9
    assert latency.conditions["batch"] == 4 and latency.conditions["threads"] == 1
    assert latency.conditions["backend"].startswith("ONNX Runtime ")


def test_a_file_against_itself_is_about_as_fast(perceptron):
    path = perceptron("same", 128, 8)
    tries = (
        compare_latency({"a": path, "b": path}, (torch.randn(1, 128),), batch_sizes=(1,), threads=1, seconds=0.4)
        for _ in range(4)
    )
    # Each interval misses 1 at most once in twenty; that all of four do, is not chance.
    assert any(found["b"]["speedup_batch_1"].low <= 1 <= found["b"]["speedup_batch_1"].high for found in tries)


def test_speedup_is_the_ratio_of_medians_with_an_interval():
    a, b = times(2e-3, seed=1), times(1e-3, seed=2)
    found = _measurements({"8": {"base": {"times": a.tolist()}, "new": {"times": b.tolist()}}}, threads=2)["new"]
    speedup = found["speedup_batch_8"]
    assert speedup.value == pytest.approx(2, rel=0.01) and speedup.low <= 2 <= speedup.high and speedup.n == SITTINGS
    assert found["latency_ms_batch_8"].value == pytest.approx(1, rel=0.01)
    assert found["throughput_batch_8"].value == pytest.approx(8000, rel=0.01)
    assert found["latency_ms_batch_8_p95"].value == pytest.approx(1 + 1.645 * 0.01, rel=0.01)


def test_intervals_cover_in_spite_of_calls_that_resemble_each_other():
    random, hits = np.random.default_rng(0), 0
    for _ in range(300):
        shift = np.exp(0.05 * random.standard_normal((SITTINGS, 1, 1)))
        data = shift * (1 + 0.01 * random.standard_normal((SITTINGS, 2, 10)))
        latency = _measurements({"1": {"a": {"times": data.tolist()}}}, 1)["a"]["latency_ms_batch_1"]
        hits += latency.low <= 1000 <= latency.high
    assert hits >= 0.92 * 300


def test_a_drift_that_both_files_share_does_not_widen_the_speedup():
    drift = np.linspace(1, 3, SITTINGS).reshape(-1, 1, 1)
    a, b = drift * times(2e-3, seed=1), drift * times(1e-3, seed=2)
    found = _measurements({"1": {"a": {"times": a.tolist()}, "b": {"times": b.tolist()}}}, 1)["b"]["speedup_batch_1"]
    assert found.high - found.low < 0.05


def test_few_calls_leave_the_percentile_without_an_upper_end():
    found = _measurements({"1": {"a": {"times": times(0.5, sittings=6, rounds=1, calls=1).tolist()}}}, 1)["a"]
    assert found["latency_ms_batch_1_p95"].high is None and found["latency_ms_batch_1"].high is not None


@pytest.mark.parametrize("call", [20e-6, 1e-3, 0.03, 0.5, 5.0])
def test_a_schedule_keeps_to_its_seconds_or_to_the_fewest_calls(call):
    schedule = Schedule.of({"a": call, "b": call / 3}, seconds=2.0)
    per_round = sum((schedule.calls[name] + schedule.dropped[name]) * t for name, t in (("a", call), ("b", call / 3)))
    total = schedule.sittings * schedule.rounds * per_round
    fewest = schedule.sittings == FEWEST_SITTINGS and schedule.rounds == 1 and set(schedule.calls.values()) == {1}
    assert schedule.sittings in (FEWEST_SITTINGS, SITTINGS) and (total < 4.5 or fewest)
    assert total > 1.0


def test_turns_go_forth_and_back_and_calls_that_find_cold_caches_do_not_count():
    order = []
    calls = {name: Call(partial(order.append, name), list) for name in "ab"}
    seconds = Sitting(0.0, 0.0, {}).in_turns(calls, Schedule(1, 3, {"a": 2, "b": 1}, {"a": 1, "b": 0}))
    assert "".join(order) == "aaabbaaaaaab"  # its first round, the next one back, the third forth
    assert [[len(block) for block in seconds[name]] for name in "ab"] == [[2, 2, 2], [1, 1, 1]]


def test_warm_up_goes_on_until_calls_take_alike():
    falling = iter([1.0, 0.5, 0.25, 0.2, 0.199, 7.0, 7.0])
    assert warm_up(lambda calls: [next(falling)] * calls, seconds=60) == Warm(0.199, steady=True)


def test_a_warm_up_that_comes_to_no_end_says_so():
    growing = (1.1**n for n in range(7_000))
    assert not warm_up(lambda calls: [next(growing)] * calls, seconds=0.01).steady


def test_progress_is_told_in_sittings(perceptron):
    class Heard(Progress):
        def track(self, items, description, total=None):
            self.count = len(list(items))
            self.total = total
            yield from ()

    progress = Heard()
    compare_latency({"a": perceptron()}, (X[:, :8],), batch_sizes=(1, 2), threads=1, seconds=0.05, progress=progress)
    assert progress.count == progress.total == 2 * SITTINGS


def test_a_fixed_batch_dimension_is_an_input_error(perceptron):
    with pytest.raises(InputError, match="fixed batch dimension"):
        compare_latency({"a": perceptron(batch=1)}, (X[:, :8],), batch_sizes=(1, 32), seconds=0.05)


def test_a_damaged_file_is_an_artifact_error(perceptron):
    path = perceptron()
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ArtifactError, match="export it again"):
        compare_latency({"a": path}, (X[:, :8],), seconds=0.05)


def test_nothing_to_time_is_an_input_error():
    with pytest.raises(InputError, match="nothing to time"):
        compare_latency({}, (X,))


def test_a_worker_that_dies_is_an_error_with_its_last_words():
    with pytest.raises(TersorError, match="no_such_worker"):
        run_fresh("tersor.measure.no_such_worker", {})


def test_the_workers_do_not_load_torch():
    workers = "tersor.measure.latency_worker, tersor.measure.memory_worker"
    code = f"import sys, {workers}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_peak_memory_grows_with_the_weights_and_not_with_this_process(perceptron):
    ballast = np.ones(60_000_000)  # 480 MB here must not count there
    small = peak_memory(perceptron("small", 8, 1), (X[:, :8],), batch=4, threads=1)
    large = peak_memory(perceptron("large", 2048, 2), (torch.zeros(1, 2048),), batch=4, threads=1)
    assert len(ballast) and 0 < small.value < 60e6 and small.unit == "bytes" and "peak" in small.conditions["method"]
    assert 2 * 2048**2 * 4 < large.value - small.value + 8e6 < 480e6


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH came with Python 3.11")
def test_a_fresh_process_finds_modules_where_this_one_does_and_not_in_its_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "random.py").write_text("raise RuntimeError('not Python's own')")
    (tmp_path / "there").mkdir()
    worker = (
        "import random\nfrom tersor.measure.fresh_process import serve\nserve(lambda request, tick: random.__file__)\n"
    )
    (tmp_path / "there" / "works_there.py").write_text(worker)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "there"), *(each for each in sys.path if each)])
    assert run_fresh("works_there", {}) == random.__file__


def test_patience_without_an_end_is_no_alarm():
    assert Watch(None, math.inf)._timer is None
