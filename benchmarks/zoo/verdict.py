"""What a model's facts amount to: done, or the first thing that is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MACS_LEFT = 0.45  # at most, at sparsity 0.5
DIFFERENCE = 1e-9  # at most, relative, in float64
EFFECT = 1e-3  # at least: where half of the channels hardly change the output, equal outputs prove nothing
ONNX_DIFFERENCE = 1e-4  # at most, relative, in float32
SECONDS = 60.0  # at most, for planning and surgery beside capture
STAGES = ("build", "plan", "apply", "measure", "verify", "reload", "train", "onnx")
OK = "ok"
Facts = Mapping[str, Any]


def verdict(facts: Facts) -> str:
    """ "ok", or why the model does not count as done. A wrong output comes before everything else."""
    if is_wrong(facts):
        return f"wrong: differs from the masked model by {facts['difference']:.2g}"
    for stage in STAGES:
        if error := facts.get(f"error_{stage}"):
            return f"{stage}: {error}"
    if facts.get("stopped"):
        return f"{facts.get('stage', 'start')}: {facts['stopped']}"
    if not facts.get("groups"):
        return "nothing to prune"
    if facts["difference"] is None:
        return "nothing was compared with the masked model"
    if facts["effect"] < EFFECT:
        return f"removing the channels changes the output by {facts['effect']:.2g} only: nothing is proved"
    if not facts["reloads"]:
        return "the loaded artifact gives other outputs"
    if not facts["trains"]:
        return "the training step gives no finite loss and gradients"
    if facts.get("onnx", 0.0) > ONNX_DIFFERENCE:
        return f"ONNX differs by {facts['onnx']:.2g}"
    if facts["macs_left"] > MACS_LEFT:
        return f"{100 * facts['macs_left']:.1f} % of the MACs left"
    if seconds(facts) > SECONDS:
        return f"{seconds(facts):.0f} s"
    return OK


def is_wrong(facts: Facts) -> bool:
    """Whether the shrunk model runs and computes something else than the masked one."""
    difference = facts.get("difference")
    return difference is not None and not difference <= DIFFERENCE


def seconds(facts: Facts) -> float:
    """Planning and surgery, without what torch.export took."""
    return facts.get("plan_s", 0.0) + facts.get("apply_s", 0.0)


def peer_verdict(facts: Facts) -> str:
    """ "ok" where the peer's model runs with at most the MACs asked for; else why not."""
    for stage in ("build", "prune", "run"):
        if error := facts.get(f"error_{stage}"):
            return f"{stage}: {error}"
    if facts.get("stopped"):
        return f"{facts.get('stage', 'start')}: {facts['stopped']}"
    if facts["macs_left"] > MACS_LEFT:
        return f"{100 * facts['macs_left']:.1f} % of the MACs left"
    return OK
