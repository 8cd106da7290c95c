from functools import partial

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.distill.scaling import scaled, scaled_config
from tersor.distill.students import drop_layers
from tersor.zoo.residual import ResidualNet


class Stacked(nn.Module):
    def __init__(self, blocks=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(blocks))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("how", "numbers"), [({}, [0, 2, 4]), ({"every": 3}, [0, 3]), ({"every": 9}, [0]), ({"keep": (4, 1)}, [1, 4])]
)
def test_each_kth_layer_stays_with_its_weights(how, numbers):
    torch.manual_seed(0)
    teacher = Stacked().train()
    student = drop_layers(teacher, (X,), **how)
    assert len(teacher.blocks) == 5 and student.training and len(student.blocks) == len(numbers)
    by_hand = teacher.stem(X)
    for number in numbers:
        by_hand = by_hand + teacher.blocks[number](by_hand)
    assert torch.equal(student(X), teacher.head(by_hand))
    student.blocks[0][0].weight.data.zero_()
    assert bool(teacher.blocks[numbers[0]][0].weight.any())


def test_a_residual_network_keeps_the_blocks_that_change_the_width():
    torch.manual_seed(0)
    teacher = ResidualNet(widths=(4, 8), blocks=3, in_channels=1, classes=5)
    student = drop_layers(teacher, (torch.randn(2, 1, 8, 8),))
    kept = [sum(p.numel() for p in block.parameters()) for block in student.layers]
    theirs = [sum(p.numel() for p in block.parameters()) for block in teacher.layers]
    assert kept == [theirs[number] for number in (0, 2, 3, 5)] and theirs[3] != theirs[2] != theirs[5]
    assert not any(module._forward_hooks for module in teacher.modules())
    with pytest.raises(InputError, match="the student does not run without these layers"):
        drop_layers(teacher, (torch.randn(2, 1, 8, 8),), keep=(1, 2, 4))


@pytest.mark.parametrize(
    ("model", "how", "words"),
    [
        (Stacked(), {"every": 1}, "nothing is dropped"),
        (Stacked(), {"keep": (0, 5)}, "so many layers are not there.*from 0 to 4"),
        (Stacked(), {"keep": ()}, "so many layers"),
        (Stacked(), {"keep": (1, 1)}, "so many layers"),
        (Stacked(), {"layers": "block"}, "no stack of layers is meant.*Nearest names: blocks"),
        (nn.Linear(4, 3), {}, "the model has no stack of layers"),
    ],
)
def test_what_cannot_be_dropped_is_an_error(model, how, words):
    with pytest.raises(InputError, match=words):
        drop_layers(model, (X,), **how)


SMALL = dict(vocab_size=30, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def bert(transformers):
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32, vocab_size=30
    )
    return transformers.BertForSequenceClassification(config), 16


def gpt2(transformers):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=4, n_head=4, **SMALL)), 16


def qwen2(transformers):
    config = transformers.Qwen2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32, **SMALL
    )
    return transformers.Qwen2ForCausalLM(config), 16


@pytest.mark.parametrize("make", [bert, gpt2, qwen2])
def test_a_model_of_transformers_is_one_with_fewer_layers_that_its_class_loads(make, package, tmp_path):
    torch.manual_seed(0)
    teacher = make(package("transformers"))[0].eval()
    tokens = (torch.randint(3, 30, (2, 7)),)
    student = drop_layers(teacher, tokens, every=2)
    assert student.config.num_hidden_layers == 2 and teacher.config.num_hidden_layers == 4
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in teacher.parameters())
    stack = next(name for name, m in student.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    for number, layer in enumerate(student.get_submodule(stack)):
        theirs = dict(teacher.get_submodule(stack)[2 * number].named_parameters())
        assert all(torch.equal(value, theirs[name]) for name, value in layer.named_parameters())
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(again(*tokens).logits, student(*tokens).logits, atol=1e-6)


@pytest.mark.parametrize("make", [bert, gpt2, qwen2])
def test_a_configuration_is_scaled_and_builds_a_model_that_runs(make, package):
    teacher, hidden = make(package("transformers"))
    config = scaled_config(teacher.config, width=0.5, depth=0.5)
    assert config.hidden_size == hidden // 2 and config.num_attention_heads == 2 and config.num_hidden_layers == 2
    student = type(teacher)(config).eval()
    assert student(torch.randint(3, 30, (2, 7))).logits.shape[0] == 2
    assert teacher.config.num_hidden_layers == 4 and teacher.config.hidden_size == hidden
    assert scaled_config(teacher.config).to_dict() == teacher.config.to_dict()


def test_encoder_and_decoder_become_shorter_together_or_apart(package):
    transformers = package("transformers")
    config = transformers.T5Config(
        d_model=16, d_kv=4, d_ff=32, num_layers=4, num_decoder_layers=4, num_heads=4, decoder_start_token_id=0, **SMALL
    )
    teacher = transformers.T5ForConditionalGeneration(config).eval()
    tokens = torch.randint(3, 30, (2, 5))
    inputs = (tokens, None, tokens)
    both = drop_layers(teacher, inputs)
    assert (both.config.num_layers, both.config.num_decoder_layers) == (2, 2)
    decoder = drop_layers(teacher, inputs, layers="decoder.block", keep=(0, 3))
    assert (decoder.config.num_layers, decoder.config.num_decoder_layers) == (4, 2)
    small = scaled_config(config, width=0.5, depth=0.5)
    assert (small.d_model, small.num_heads, small.d_kv, small.d_ff) == (8, 2, 4, 16)
    assert (small.num_layers, small.num_decoder_layers) == (2, 2)


def test_a_factory_s_arguments_are_scaled():
    factory = partial(ResidualNet, widths=(8, 16), blocks=4, in_channels=1, classes=5)
    small = scaled(factory, width=0.4, depth=0.5, widths=["widths"], depths=["blocks"], multiple=2)
    assert small.keywords == {"widths": (4, 6), "blocks": 2, "in_channels": 1, "classes": 5}
    assert small()(torch.randn(2, 1, 8, 8)).shape == (2, 5)

    def plain(width=10, depth=3):
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))

    assert len(scaled(plain, depth=0.1, depths=["depth"])()) == 1


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"width": 0.0, "widths": ["widths"]}, "scaled.width: must be positive"),
        ({"depth": float("inf"), "depths": ["blocks"]}, "scaled.depth: must be positive"),
        ({"width": 0.5}, "nothing is scaled"),
        ({"width": 0.5, "widths": ["width"]}, "no such argument. Got width. Nearest: widths"),
        ({"width": 0.5, "widths": ["missing_value"]}, "no such argument"),
        ({"width": 0.5, "widths": ["classes"], "depths": ["in_channels"]}, None),
        ({"width": 0.5, "widths": ["name"]}, "holds no sizes"),
    ],
)
def test_arguments_that_cannot_be_scaled_are_errors(how, words):
    def factory(widths=(8, 16), blocks=2, in_channels=1, classes=6, name="net"):
        return ResidualNet(widths=widths, blocks=blocks, in_channels=in_channels, classes=classes)

    if words is None:
        assert scaled(factory, **how).keywords == {"classes": 3, "in_channels": 1}
        return
    with pytest.raises(InputError, match=words):
        scaled(factory, **how)


def test_a_scaled_factory_that_fails_is_an_error():
    def factory(channels=8):
        return nn.Conv2d(8, channels, 3, groups=8)

    with pytest.raises(InputError, match="the scaled factory fails.*channels"):
        scaled(factory, 0.5, widths=["channels"])


def test_a_configuration_of_unknown_fields_is_an_error(package):
    config = package("transformers").ResNetConfig()
    with pytest.raises(InputError, match="no field that is known to be a hidden size and a number of heads"):
        scaled_config(config, width=0.5)


class Stage(nn.Module):
    def __init__(self, before, after, blocks):
        super().__init__()
        self.down = nn.Conv2d(before, after, 2, 2)
        self.blocks = nn.Sequential(*(nn.Conv2d(after, after, 3, padding=1) for _ in range(blocks)))

    def forward(self, x):
        return self.blocks(self.down(x))


def test_of_stages_that_each_change_the_shape_the_blocks_inside_are_dropped():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Sequential(Stage(1, 2, 2), Stage(2, 4, 5)), nn.Flatten(), nn.Linear(16, 3))
    images = (torch.randn(2, 1, 8, 8),)
    student = drop_layers(teacher, images)
    assert [len(stage.blocks) for stage in student[0]] == [1, 3]
    assert torch.equal(student[0][1].blocks[1].weight, teacher[0][1].blocks[2].weight)
    assert [len(stage.blocks) for stage in drop_layers(teacher, images, layers="0.1.blocks")[0]] == [2, 3]
    with pytest.raises(InputError, match=r"nothing is dropped. Got 0: 2 layers; expected"):
        drop_layers(teacher, images, layers="0")


def test_a_model_of_transformers_has_fewer_blocks_in_its_stages(package):
    transformers = package("transformers")
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=[8, 12, 16], depths=[2, 3, 1], num_stages=3)
    teacher = transformers.ConvNextForImageClassification(config).eval()
    student = drop_layers(teacher, (torch.randn(1, 3, 32, 32),))
    assert student.config.depths == [1, 2, 1] and teacher.config.depths == [2, 3, 1]
