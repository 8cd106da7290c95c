"""Put biases back on the grid on which integer kernels add them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tersor.core.edit import Write
from tersor.core.errors import InputError
from tersor.core.integer_bias import rounded_bias
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.quantize.standing import weight_quantizers


@dataclass(frozen=True)
class RoundBiases(Method):
    """Round each bias of a quantised model to b̂ = round(b / (s_x · s_w)) · s_x · s_w, as integer kernels will.

    s_x and s_w: the scales of what the layer reads and of its weight. ``Quantize`` does so itself; training, and what
    corrects biases, moves them (or the scales) off. The last step before an export: PyTorch then computes what the file
    computes. Jacob et al. 2018 (arXiv 1712.05877), section 2.4.
    """

    def plan(self, model: nn.Module, task: Task) -> Plan:
        """One Write for each bias that an integer kernel adds. Raises InputError where the model is not quantised."""
        places = [place for place, _ in weight_quantizers(model)]
        if not places:
            raise InputError("no weight is quantised", where="RoundBiases", do="Put it after Quantize()")
        edits, lines = [], []
        for place in places:
            rounded = rounded_bias(model, place.module)
            if rounded is None:
                continue
            moved = float((rounded - model.get_submodule(place.module).get_parameter("bias").detach()).abs().max())
            edits.append(Write(TensorPlace(place.module, "bias"), rounded))
            lines.append((f"{place.module}.bias", f"moved by {moved:.3g} at most"))
        return Plan("RoundBiases", tuple(edits), (), tuple(lines))
