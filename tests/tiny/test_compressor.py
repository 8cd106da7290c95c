import numpy as np
import pytest

from tersor.tiny import ModelCompressor


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {
        "conv": rng.normal(0, 0.02, (8, 4, 3, 3)).astype(np.float32),
        "fc": rng.normal(0, 0.01, (30, 20)),
        "bias": rng.normal(size=21),
    }


def test_the_analysis_knows_layers_by_their_axes(weights):
    compressor = ModelCompressor()
    found = compressor.analyze_model_for_compression(weights)
    assert set(found) == {"layers", "total_params", "compressible_params", "recommendations", "compression_potential"}
    kinds = {name: (layer["type"], layer["recommended_sparsity"]) for name, layer in found["layers"].items()}
    assert kinds == {"conv": ("Conv2D", 0.6), "fc": ("Linear", 0.8), "bias": ("Other", 0.5)}
    assert found["layers"]["conv"]["shape"] == (8, 4, 3, 3) and found["layers"]["conv"]["parameters"] == 288
    assert found["total_params"] == 909 and found["compressible_params"] == 888
    assert found["compression_potential"] == pytest.approx(888 / 909)
    assert found["recommendations"] == {"conv": 0.6, "fc": 0.8, "bias": 0.5}
    near = np.abs(weights["fc"]) <= 0.1 * np.abs(weights["fc"]).mean()
    assert found["layers"]["fc"]["natural_sparsity"] == pytest.approx(near.mean() * 100)
    assert set(compressor.original_model) == set(weights)


def test_the_sensitivity_is_the_energy_that_pruning_takes(weights):
    compressor = ModelCompressor()
    compressor.analyze_model_for_compression(weights)
    energy = sorted(float(w) ** 2 for w in weights["fc"].flat)
    assert compressor.layer_sensitivities["fc"] == pytest.approx(
        {s: sum(energy[: int(600 * s)]) / sum(energy) for s in (0.5, 0.7, 0.9)}
    )


def test_a_layer_that_is_left_out_gets_seventy_percent(weights):
    compressor = ModelCompressor()
    compressed = compressor.compress_model(weights, {"fc": 0.25})
    zeros = {name: int(np.sum(layer["weights"] == 0)) for name, layer in compressed.items()}
    assert zeros == {"conv": 201, "fc": 150, "bias": 14}
    for name, layer in compressed.items():
        assert set(layer) == {"weights", "mask", "original_shape", "stats"}
        assert layer["original_shape"] == weights[name].shape and layer["weights"].dtype == weights[name].dtype
        assert np.array_equal(layer["weights"], weights[name] * (layer["mask"] == 1))
    left = 909 - 201 - 150 - 14
    assert compressor.compression_stats == {
        "total_original_params": 909, "total_remaining_params": left, "overall_sparsity": pytest.approx(1 - left / 909),
        "overall_compression": pytest.approx(909 / left),
        "layer_sparsities": {"conv": 0.7, "fc": 0.25, "bias": 0.7},
    }  # fmt: skip
    assert compressor.compressed_model is compressed


def test_without_a_mapping_each_gets_what_is_recommended(weights):
    compressor = ModelCompressor()
    compressor.compress_model(weights)
    assert compressor.compression_stats["layer_sparsities"] == {"conv": 0.6, "fc": 0.8, "bias": 0.5}


def test_the_quality_is_norm_times_what_the_error_leaves(weights):
    compressor = ModelCompressor()
    found = compressor.validate_compression_quality(
        weights, compressor.compress_model(weights, {"conv": 0.1, "fc": 0.9})
    )
    scores = []
    for name, layer in found["layer_quality"].items():
        w, new = weights[name].astype(float), compressor.compressed_model[name]["weights"].astype(float)
        error, kept = np.abs(w - new), np.linalg.norm(new) / np.linalg.norm(w)
        assert layer["mean_error"] == pytest.approx(error.mean()) and layer["max_error"] == pytest.approx(error.max())
        assert layer["norm_preservation"] == pytest.approx(kept)
        scores.append(kept * (1 - error.mean() / np.abs(w).mean()))
        assert layer["quality_score"] == pytest.approx(scores[-1])
    assert found["overall_quality"] == pytest.approx(
        {"mean_quality_score": np.mean(scores), "quality_std": np.std(scores), "min_quality": min(scores),
         "max_quality": max(scores)}
    )  # fmt: skip
    assert found["quality_score"] == pytest.approx(np.mean(scores))


@pytest.mark.parametrize("sparsity, verdict", [(0.1, "excellent"), (0.5, "acceptable"), (0.9, "poor")])
def test_the_verdict_follows_the_score(weights, sparsity, verdict, capsys):
    compressor, fc = ModelCompressor(), {"fc": weights["fc"]}
    found = compressor.validate_compression_quality(fc, compressor.compress_model(fc, {"fc": sparsity}))
    assert found["verdict"] == verdict and verdict in capsys.readouterr().out
    low, high = {"excellent": (0.8, 1), "acceptable": (0.6, 0.8), "poor": (0, 0.6)}[verdict]
    assert low <= found["quality_score"] <= high


def test_a_score_is_held_to_zero_and_one():
    found = ModelCompressor().validate_compression_quality(
        {"a": np.ones(2), "b": np.zeros(2)}, {"a": {"weights": -5 * np.ones(2)}, "b": {"weights": np.zeros(2)}}
    )
    assert found["layer_quality"]["a"]["quality_score"] == 0 and found["layer_quality"]["b"]["quality_score"] == 1


def test_bad_models_are_refused_by_name(weights):
    compressor = ModelCompressor()
    with pytest.raises(ValueError, match="fc: 1 NaN"):
        compressor.compress_model({**weights, "fc": np.array([np.nan, 1.0])})
    with pytest.raises(ValueError, match="no layers"):
        compressor.compress_model({})
    with pytest.raises(ValueError, match=r"names \['fc9'\]"):
        compressor.compress_model(weights, {"fc9": 0.5})
    with pytest.raises(ValueError, match=r"has no \['fc'\]"):
        compressor.validate_compression_quality(weights, {"conv": {}, "bias": {}})
    assert compressor.compressed_model == {}
