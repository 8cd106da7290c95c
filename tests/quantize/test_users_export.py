"""A quantised model under a user's own torch.export and torch.onnx.export: the steps in force are in the graph."""

import copy

import pytest
import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.errors import InputError
from tersor.core.task import Task
from tersor.quantize.quantize import Quantize
from tersor.quantize.schemes import Int


def learnt():
    """A quantised perceptron whose steps have moved since they were calibrated, in eval mode all the while."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [(torch.randn(64, 6), torch.arange(64) % 4)]
    plan = Quantize().plan(model, Task(model, data, data, data).complete())
    fresh = apply(model, plan).eval()
    moved = copy.deepcopy(fresh)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name.endswith("log_growth"):
                parameter.add_(0.7)
    return fresh, moved, torch.randn(50, 6)


def close(got, expected, model, share=0.05):
    step = model[2].tersor_taps.taps["linear_0"].scale.detach()
    difference = (got - expected).abs().detach()
    return bool(difference.max() <= 1.01 * step and (difference > 0.01 * step).float().mean() < share)


@pytest.mark.parametrize("loaded", [False, True])
def test_the_exported_program_computes_with_the_learnt_steps(loaded):
    fresh, moved, x = learnt()
    if loaded:
        fresh.load_state_dict(moved.state_dict())
    else:
        assert not close(fresh(x), moved(x), moved)  # else this test could not fail
    model = fresh if loaded else moved
    program = torch.export.export(model, (x,), strict=False)
    assert close(program.module()(x), moved(x), moved)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("quantize_per_tensor" in name for name in targets) == 6
    assert sum("quantize_per_channel" in name for name in targets) == 4


def test_the_users_own_onnx_file_computes_with_the_learnt_steps_in_integers(deploy):
    _, moved, x = learnt()
    deployed = deploy(moved, x)
    assert close(deployed(x), moved(x), moved)
    assert deployed.histogram["QGemm"] == 2 and not {"Exp", "Gemm", "FusedGemm"} & set(deployed.histogram)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_float_types_are_exported_around_the_pair(dtype):
    _, moved, x = learnt()
    tap = next(iter(moved.tersor_taps.taps.values()))
    program = torch.export.export(nn.Sequential(tap), (x.to(dtype),), strict=False)
    got = program.module()(x.to(dtype))
    assert got.dtype == dtype and (got - tap(x.to(dtype))).abs().max() <= 1.01 * tap.scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_that_does_not_compute_in_float32_is_refused_before_training(dtype):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype).eval()
    data = [(torch.randn(8, 6, dtype=dtype), torch.arange(8) % 4)]
    with pytest.raises(InputError, match=r"does not compute in float32.*model.float\(\)"):
        Quantize().plan(model, Task(model, data, data, data).complete())


@pytest.mark.parametrize(
    "weights",
    [Int(4, "per_tensor"), Int(4), Int(8, "per_tensor"), Int(8, symmetric=False), Int(3, "per_tensor", False)],
    ids=str,
)
def test_every_weight_scheme_that_is_accepted_runs_in_integers(weights, deploy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [(torch.randn(64, 6), torch.arange(64) % 4)]
    quantised = Quantize(weights=weights).run(model, Task(model, data, data, data).complete()).model.eval()
    deployed = deploy(quantised, data[0][0])
    x = torch.randn(50, 6)
    assert close(deployed(x), quantised(x), quantised, share=0.25) and deployed.histogram["QGemm"] == 2
