"""The rules of graph propagation, one file per kind of operator. Importing this package registers them."""

from tersor.graph.rules import (  # noqa: F401
    attention,
    convolution,
    creation,
    elementwise,
    embedding,
    join,
    linear,
    normalization,
    pooling,
    recurrent,
    reduction,
    reshape,
    split,
)
from tersor.graph.rules.registry import RULES, follow, rule

__all__ = ["RULES", "follow", "rule"]
