import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.task import Task
from tersor.export.pretrained import save_pretrained
from tersor.prune.structured.channels import PruneChannels

TOKENS = (torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0)),)
WIDTHS = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
MODELS = {
    "llama": (
        "LlamaForCausalLM", "LlamaConfig",
        {**WIDTHS, "num_attention_heads": 4, "num_key_value_heads": 2, "use_cache": False},
    ),
    "bert": (
        "BertForSequenceClassification", "BertConfig",
        {**WIDTHS, "num_attention_heads": 4, "max_position_embeddings": 11, "num_labels": 3},
    ),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 11, "use_cache": False},
    ),
}  # fmt: skip


def pruned(transformers, name, **settings):
    kind, config, sizes = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    return PruneChannels(**settings).run(model, Task(model, example_inputs=TOKENS)).model


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_is_loaded_by_its_own_class(package, name, tmp_path):
    model = pruned(package("transformers"), name, sparsity=0.5)
    assert save_pretrained(model, tmp_path, TOKENS) == tmp_path
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(*TOKENS).logits, model(*TOKENS).logits, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_layers_that_are_unlike_are_refused_and_nothing_is_written(package, tmp_path):
    model = pruned(package("transformers"), "llama", sparsity={"model.layers.0.mlp.*": 0.5})
    with pytest.raises(InputError, match="pruned unlike.*tersor.save"):
        save_pretrained(model, tmp_path / "out", TOKENS)
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(tmp_path):
    with pytest.raises(InputError, match="not a model of transformers"):
        save_pretrained(nn.Linear(2, 2), tmp_path, TOKENS)
