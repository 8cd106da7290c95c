"""What pruning is in production, with a source for each statement. Looked up in 2026."""

from __future__ import annotations

import textwrap

from tersor.tiny.tables import show

TEXT_WIDTH = 41  # so that the tables fit 80 columns

SYSTEMS: dict[str, dict[str, str]] = {
    "torch.nn.utils.prune": {
        "what": "multiplies each weight by a mask in every forward pass; by magnitude, at random, or whole channels",
        "gain": "none by itself: weights and masks stay dense, in memory, in the file and in time",
        "source": "PyTorch documentation, torch.nn.utils.prune; Pruning Tutorial",
    },
    "torch.sparse 2:4": {
        "what": "torch.sparse.to_sparse_semi_structured stores 2:4 weights compressed and multiplies by cuSPARSELt or "
        "CUTLASS",
        "gain": "on NVIDIA GPUs of compute capability 8.0 and later, for fp16, bf16 and int8",
        "source": "PyTorch tutorial, (beta) Accelerating BERT with semi-structured (2:4) sparsity",
    },
    "NVIDIA tensor cores": {
        "what": "since Ampere (2020), skip the zeros of weights of which two in every four are zero (2:4)",
        "gain": "at peak up to twice the multiplications a second; scattered zeros gain nothing",
        "source": "Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv 2104.08378",
    },
    "TensorRT": {
        "what": "with the builder flag SPARSE_WEIGHTS, looks at the weights and may take sparse kernels",
        "gain": "for weights that are 2:4",
        "source": "TensorRT documentation, BuilderFlag.SPARSE_WEIGHTS",
    },
    "ONNX Runtime": {
        "what": "reads sparse initialisers of an ONNX file and makes them dense when it loads it",
        "gain": "a smaller file; the usual kernels multiply the zeros",
        "source": "microsoft/onnxruntime pull request 5540, Support for Sparse Initializers",
    },
    "TensorFlow, XNNPACK": {
        "what": "prune_low_magnitude trains with masks; PruneForLatencyOnXNNPack prunes 1x1 convolutions only",
        "gain": "XNNPACK's CPU kernels skip zeros of 1x1 convolutions; elsewhere a smaller zipped file",
        "source": "TensorFlow Model Optimization guide, Pruning for on-device inference with XNNPACK",
    },
    "OpenVINO": {
        "what": "sparse_weights_decompression_rate: matrix weights with more zeros than that are packed in memory",
        "gain": "on CPUs, int8 transformers: less memory traffic; they are unpacked before multiplying",
        "source": "OpenVINO documentation, Intel CPU specific properties",
    },
    "Core ML": {
        "what": "coremltools stores pruned weights as the non-zero values and a bit mask",
        "gain": "a smaller file; post-training compressed weights are computed with as floats",
        "source": "coremltools documentation, prune_weights and optimize.coreml overview",
    },
    "DeepSparse": {
        "what": "a CPU runtime for unstructured sparsity",
        "gain": "none to be had any more: development ended on 2 June 2025",
        "source": "neuralmagic/deepsparse, End of Life Announcement",
    },
    "tersor.tiny": {
        "what": "magnitude, filters, neurons, low rank, int8, distillation, in NumPy",
        "gain": "real ones where arrays get smaller or SciPy's compressed rows are multiplied; measured, never assumed",
        "source": "this package",
    },
}

APPLICATIONS: tuple[dict[str, str], ...] = (
    {
        "domain": "Image classification", "model": "AlexNet, VGG-16",
        "strategy": "magnitude pruning and retraining, by turns",
        "outcome": "61 to 6.7 million and 138 to 10.3 million weights without loss of accuracy",
        "source": "Han et al. 2015, arXiv 1506.02626",
    },
    {
        "domain": "Model files", "model": "AlexNet, VGG-16",
        "strategy": "pruning, shared weights, Huffman coding",
        "outcome": "240 to 6.9 MB and 552 to 11.3 MB without loss of accuracy",
        "source": "Han et al. 2016, Deep Compression, arXiv 1510.00149",
    },
    {
        "domain": "Speech synthesis on phones", "model": "WaveRNN",
        "strategy": "block-sparse recurrent weights",
        "outcome": "samples in real time on a mobile CPU",
        "source": "Kalchbrenner et al. 2018, arXiv 1802.08435",
    },
    {
        "domain": "Vision on phones", "model": "MobileNet, EfficientNet",
        "strategy": "unstructured 1x1 convolutions with sparse kernels",
        "outcome": "1.3 to 2.4 times faster than their dense equivalents on a Snapdragon 835",
        "source": "Elsen et al. 2020, Fast Sparse ConvNets, arXiv 1911.09723",
    },
    {
        "domain": "Language understanding", "model": "DistilBERT",
        "strategy": "distillation into half the layers",
        "outcome": "40 % smaller, 60 % faster, 97 % of BERT's score on GLUE",
        "source": "Sanh et al. 2019, arXiv 1910.01108",
    },
    {
        "domain": "Large language models", "model": "OPT-175B, BLOOM-176B",
        "strategy": "SparseGPT: 50 to 60 % unstructured, no retraining",
        "outcome": "in under 4.5 hours on one GPU, perplexity hardly higher",
        "source": "Frantar and Alistarh 2023, arXiv 2301.00774",
    },
    {
        "domain": "Families of language models", "model": "Minitron 8B and 4B from 15B",
        "strategy": "structured pruning, then distillation",
        "outcome": "up to 40 times fewer training tokens than from scratch",
        "source": "Muralidharan et al. 2024, arXiv 2407.14679",
    },
)  # fmt: skip


def compare_with_production_pruning() -> dict[str, dict[str, str]]:
    """What each production system does with zeros: name → what, gain, source. Prints it.

    What changed: the classic's table named no source and returned nothing (it had PyTorch export "ONNX with sparse
    ops"); each statement here has its source, as of 2026.
    """
    show(
        "What production systems do with zeros (2026)",
        ("system", "", ""),
        [row for name, system in SYSTEMS.items() for row in _rows(name, system)],
        ["A zero saves time only where hardware or kernel skips its pattern; smaller arrays save everywhere."],
    )
    return {name: dict(system) for name, system in SYSTEMS.items()}


def demonstrate_pruning_applications() -> list[dict[str, str]]:
    """Where compression made something possible: domain, model, strategy, outcome, source of each. Prints it.

    What changed: the classic named products that never said how they were compressed; these are published results.
    """
    show(
        "Published results",
        ("where", "", ""),
        [row for each in APPLICATIONS for row in _rows(each["domain"], dict(list(each.items())[1:]))],
    )
    return [dict(each) for each in APPLICATIONS]


def _rows(name: str, facts: dict[str, str]) -> list[tuple[str, str, str]]:
    """A row for each line of each fact, the name in the first, the label in each fact's first."""
    lines = [
        (label if i == 0 else "", line)
        for label, text in facts.items()
        for i, line in enumerate(textwrap.wrap(text, TEXT_WIDTH))
    ]
    return [(name if i == 0 else "", label, line) for i, (label, line) in enumerate(lines)]
