import numpy as np
import pytest

from tersor.tiny import (
    Conv2D,
    Flatten,
    Linear,
    ReLU,
    Sequential,
    analyze_deployment_scenarios,
    benchmark_sparse_inference_speedup,
    compare_with_production_pruning,
    demonstrate_pruning_applications,
    evaluate,
    profile_compression_memory,
)
from tersor.tiny.deployment import operations

MB = 1024 * 1024


def test_sizes_are_those_of_a_real_encoding():
    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(size=(64, 100)).astype(np.float32), "b": rng.normal(size=(50, 40))}
    found = profile_compression_memory(weights, {"a": 0.9, "b": 0.0})
    kept = np.sort(np.argsort(-np.abs(weights["a"]).ravel(), kind="stable")[:640])
    assert np.diff(kept, prepend=-1).max() < 256, "no gap is too long for a byte"
    steps = 640 * (4 + 1) + 1  # a value and the step to it each, and the step to the end
    rows, bitmap = 640 * (4 + 1) + 65 * 2, 640 * 4 + 6400 // 8
    assert steps < rows < bitmap and found["compressed_size_mb"] == pytest.approx((steps + 2000 * 8) / MB)
    assert found["original_size_mb"] == pytest.approx((6400 * 4 + 2000 * 8) / MB)
    assert found["original_params"] == 8400 and found["compressed_params"] == 2640
    assert found["compression_ratio"] == pytest.approx(8400 / 2640)
    assert found["size_reduction"] == pytest.approx(found["original_size_mb"] / found["compressed_size_mb"])
    assert found["size_reduction"] < found["compression_ratio"]


def test_the_example_is_the_courses():
    found = profile_compression_memory()
    assert found["original_params"] == 4_573_184 and found["original_size_mb"] == pytest.approx(4_573_184 * 4 / MB)
    assert 4 < found["size_reduction"] < found["compression_ratio"] < 5


def test_the_classic_table_says_which_fits_which(capsys):
    found = {each["name"]: each for each in analyze_deployment_scenarios()}
    limits = {name: (each["memory_limit_mb"], each["compute_limit_gflops"]) for name, each in found.items()}
    assert limits == {
        "Mobile Phone": (100, 10),
        "IoT Device": (20, 1),
        "Edge Server": (1000, 100),
        "Wearable": (10, 0.5),
    }
    best = {name: each["best_option"] for name, each in found.items()}
    assert best == {"Mobile Phone": "90% Sparse", "IoT Device": None, "Edge Server": "Dense Model", "Wearable": None}
    assert list(found["Mobile Phone"]["fits"].values()) == ["neither", "too slow", "too slow", "fits"]
    assert found["IoT Device"]["fits"]["90% Sparse"] == "too slow"
    assert "none fits" in capsys.readouterr().out


def test_configurations_may_be_passed_in():
    small, large = (
        {"name": n, "size_mb": s, "gflops": 0.1, "accuracy": a} for n, s, a in (("s", 5, 80), ("l", 50, 90))
    )
    found = analyze_deployment_scenarios(configurations=[small, large])
    assert [each["best_option"] for each in found] == ["l", "s", "l", "s"]
    only = [{"name": "mine", "memory_limit_mb": 10, "compute_limit_gflops": 0.01}]
    assert analyze_deployment_scenarios(configurations=[large], scenarios=only)[0]["fits"] == {"l": "neither"}


def test_configurations_of_a_model_are_measured(trained, digits, capsys):
    _, held_out = digits
    device = [{"name": "chip", "memory_limit_mb": 0.02, "compute_limit_gflops": 1}]
    found = analyze_deployment_scenarios(trained, held_out, scenarios=device)[0]
    assert found["fits"] == {
        "Dense Model": "too large",
        "50% Sparse": "fits",
        "70% Sparse": "fits",
        "90% Sparse": "fits",
    }
    assert found["best_option"] == "50% Sparse" and f"{evaluate(trained, held_out):.1f} %" in capsys.readouterr().out
    with pytest.raises(ValueError, match="data"):
        analyze_deployment_scenarios(trained)


def test_operations_are_multiplications_by_what_is_not_zero():
    model = Sequential(Conv2D(2, 3, 3, padding=1), ReLU(), Flatten(), Linear(3 * 5 * 4, 7))
    assert operations(model, np.ones((9, 2, 5, 4))) == 2 * 3 * 9 * 20 + 60 * 7
    model.layers[0].weight.data[0] = 0
    assert operations(model, np.ones((9, 2, 5, 4))) == 2 * 2 * 9 * 20 + 60 * 7


def test_the_speed_of_sparse_products_is_measured():
    found = benchmark_sparse_inference_speedup([(40, 30, 0.5), (30, 20, 0.9)], batch_size=2, iterations=2)
    assert [(each["in_features"], each["out_features"], each["sparsity"]) for each in found] == [
        (40, 30, 0.5),
        (30, 20, 0.9),
    ]
    assert [each["theoretical_speedup"] for each in found] == pytest.approx([2, 10])
    assert all(each["actual_speedup"] > 0 for each in found)


def test_every_fact_has_its_source_and_fits_the_terminal(capsys):
    systems, applications = compare_with_production_pruning(), demonstrate_pruning_applications()
    assert {"torch.nn.utils.prune", "ONNX Runtime", "NVIDIA tensor cores", "TensorRT"} <= set(systems)
    assert all(system["source"] and system["what"] and system["gain"] for system in systems.values())
    assert all("arXiv" in each["source"] for each in applications)
    assert max(len(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("*")) <= 80
