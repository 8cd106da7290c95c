import pytest
import torch

from tersor.zoo.residual import Block, ResidualNet


@pytest.mark.parametrize("stride, size", [(1, 8), (2, 28)])
def test_the_built_in_networks_have_over_half_a_million_parameters_and_give_logits(stride, size):
    torch.manual_seed(0)
    model = ResidualNet((32, 64, 128), 2, in_channels=1, classes=10, stem_stride=stride)
    assert sum(parameter.numel() for parameter in model.parameters()) >= 500_000
    assert model(torch.randn(3, 1, size, size)).shape == (3, 10)


def test_a_block_adds_its_input_and_projects_it_where_the_shape_changes():
    torch.manual_seed(0)
    same, other = Block(4, 4).eval(), Block(4, 6, stride=2).eval()
    torch.nn.init.zeros_(same.bn2.weight)
    x = torch.rand(2, 4, 8, 8)
    assert torch.equal(same(x), x)
    torch.nn.init.zeros_(other.bn2.weight)
    assert torch.equal(other(x), other.down(x).relu()) and other(x).shape == (2, 6, 4, 4)
