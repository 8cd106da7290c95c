"""Small configurations of transformers architectures: several layers, four or more heads, built without a download."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.catalogue import Entry, pixels, tokens
from benchmarks.zoo.schemas import declare

declare()  # transformers imports torchvision where it is installed

import transformers  # noqa: E402

VOCABULARY = 211
CLASSES = 10

# What most encoders and decoders call their sizes.
_WIDTHS = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 144, "max_position_embeddings": 37,
}  # fmt: skip
_ENCODER = {**_WIDTHS, "num_labels": CLASSES, "pad_token_id": 0}
_DECODER = {**_WIDTHS, "num_attention_heads": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "use_cache": False}  # fmt: skip
_GROUPED = {**_DECODER, "num_key_value_heads": 4}  # two query heads to a key-value head
_T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 144, "num_layers": 3, "num_heads": 4,
       "feed_forward_proj": "gated-gelu", "use_cache": False}  # fmt: skip
_VISION = {"num_labels": CLASSES, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
           "intermediate_size": 144, "image_size": 48, "patch_size": 8}  # fmt: skip

# name -> (model class, configuration class, configuration, number of attention masks)
_TEXT: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _ENCODER, 1),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _ENCODER, 1),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**_ENCODER, "embedding_size": 32}, 1),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**_ENCODER, "embedding_size": 32}, 1),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", _ENCODER, 1),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification", "DebertaV2Config",
        {**_ENCODER, "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm",
         "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}, 1,
    ),
    "distilbert": (
        "DistilBertForSequenceClassification", "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 144,
         "max_position_embeddings": 37, "num_labels": CLASSES, "pad_token_id": 0}, 1,
    ),
    "t5_encoder": ("T5ForTokenClassification", "T5Config", {**_T5, "num_labels": CLASSES}, 1),
    "gpt2": (
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 37, "use_cache": False}, 0,
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _DECODER, 0),
    "bloom": (
        "BloomForCausalLM", "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 3, "n_head": 4, "use_cache": False}, 0,
    ),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        {**_DECODER, "ffn_dim": 144, "word_embed_proj_dim": 64}, 0,
    ),
    "falcon": (
        "FalconForCausalLM", "FalconConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8,
         "new_decoder_architecture": True, "num_kv_heads": 4, "use_cache": False}, 0,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED, 0),
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED, 0),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED, 0),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 16}, 0),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_GROUPED, "head_dim": 16}, 0),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}, 0,
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", _DECODER, 0),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED, 0),
}  # fmt: skip
# name -> (model class, configuration class, configuration, pixels)
_IMAGES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", _VISION, 48),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**_VISION, "mlp_ratio": 2}, 48),
    "swin": (
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [4, 8], "window_size": 4,
         "num_labels": CLASSES}, 64,
    ),
    "convnext": (
        "ConvNextForImageClassification", "ConvNextConfig",
        {"depths": [2, 2, 2, 2], "hidden_sizes": [16, 32, 48, 64], "num_labels": CLASSES}, 64,
    ),
    "resnet": (
        "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 64, 128, 256], "depths": [2, 2, 2, 2], "num_labels": CLASSES}, 64,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation", "SegformerConfig",
        {"depths": [2, 2, 2, 2], "hidden_sizes": [16, 32, 64, 128], "num_attention_heads": [1, 2, 4, 8],
         "decoder_hidden_size": 64, "num_labels": CLASSES}, 64,
    ),
    "mobilevit": (
        "MobileViTForImageClassification", "MobileViTConfig",
        {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [16, 16, 24, 32, 48, 64, 128],
         "num_labels": CLASSES}, 64,
    ),
}  # fmt: skip
_AUDIO = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 144,
    "conv_dim": (32, 32, 32), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "vocab_size": 31, "num_labels": CLASSES,
    "apply_spec_augment": False, "classifier_proj_size": 32,
}  # fmt: skip


def transformers_entries() -> list[Entry]:
    """Text, images, audio and time series."""
    entries = [
        Entry("transformers", name, partial(_build, model, config, sizes), tokens(VOCABULARY, masks=masks), note=model)
        for name, (model, config, sizes, masks) in _TEXT.items()
    ]  # fmt: skip
    entries += [
        Entry("transformers", name, partial(_build, model, config, sizes), pixels(size), note=model)
        for name, (model, config, sizes, size) in _IMAGES.items()
    ]
    entries += [
        Entry("transformers", "t5", partial(_build, "T5ForConditionalGeneration", "T5Config", _T5), _sequence_pairs,
              output_of=attrgetter("logits"), note="T5ForConditionalGeneration, the task's output being its logits"),
        Entry("transformers", "wav2vec2", partial(_build, "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config",
              _AUDIO), _series(3, 1601), note="Wav2Vec2ForSequenceClassification"),
        Entry("transformers", "patchtst", partial(_build, "PatchTSTForClassification", "PatchTSTConfig", _PATCHES),
              _series(3, 64, 5), output_of=_prediction_logits, note="PatchTSTForClassification"),
    ]  # fmt: skip
    return entries


_PATCHES = {
    "num_input_channels": 5, "context_length": 64, "patch_length": 8, "patch_stride": 8, "num_hidden_layers": 3,
    "d_model": 64, "num_attention_heads": 4, "ffn_dim": 144, "num_targets": CLASSES, "use_cls_token": True,
}  # fmt: skip


def _build(model: str, config: str, sizes: dict[str, Any]) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**sizes))


def _series(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        return (torch.randn(*shape, generator=torch.Generator().manual_seed(7)),)

    return make


def _sequence_pairs() -> tuple[Tensor, ...]:
    """Token numbers [3, 13] of the encoder, their mask, and token numbers [3, 11] of the decoder."""
    return (*tokens(VOCABULARY, masks=1)(), *tokens(VOCABULARY, length=11)())


def _prediction_logits(result: Any) -> Tensor:
    return result.prediction_logits
