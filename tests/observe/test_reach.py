import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.place import ActivationPlace
from tersor.graph.trace import trace
from tersor.observe.reach import unreachable


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.calls = 0

    def forward(self, x):
        y = self.relu(self.conv(x))
        y += x
        if not torch.compiler.is_exporting():
            y = y + 0 * x  # an addition that the graph does not have
        a, b = torch.split(F.relu6(self.relu(y)), 2, dim=1)
        return torch.concat([b, a], dim=1)


def test_places_with_one_call_of_the_right_shape_are_borne_out_and_others_are_not():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(2, 1, 5, 5)
    graph = trace(model, (x,))
    shapes = {call.place: call.shape for call in graph.calls} | {ActivationPlace("", "input"): tuple(x.shape)}
    missed = unreachable(model, graph, shapes, (x,))
    reasons = {str(place): reason for place, reason in missed.items()}
    assert set(reasons) == {
        place for place in map(str, shapes) if "add" in place or "split" in place or "getitem" in place
    }
    assert "1 add calls in the graph, 2 at run time" in reasons["<model>:add[0]"]


def test_a_wrong_shape_is_not_borne_out():
    model, x = nn.Sequential(nn.Linear(4, 2), nn.ReLU()), torch.randn(3, 4)
    missed = unreachable(model, trace(model, (x,)), {ActivationPlace("1", "relu"): (3, 5)}, (x,))
    assert "shape (3, 5) in the graph, (3, 2) at run time" in missed[ActivationPlace("1", "relu")]
