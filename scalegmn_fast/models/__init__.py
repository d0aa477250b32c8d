"""Models over `GraphBatch`, and the configurations that describe them."""

from collections.abc import Mapping

from torch import nn

from . import neural_graphs
from .config import ScaleGMNConfig, load
from .neural_graphs import (
    DynamicRelationalTransformer,
    GNNForClassification,
    GNNForGeneralization,
    GNNParams,
    RelationalTransformer,
    RelationalTransformerParams,
)
from .neural_graphs_config import model_arguments
from .published import published_config, published_names
from .published_neural_graphs import neural_graphs_config, neural_graphs_names
from .scalegmn import ScaleGMN


def from_config(config) -> nn.Module:
    """Build a model from a configuration.

    Args:
        config: for ScaleGMN a `ScaleGMNConfig` (exact behaviour by default); or, giving the original's behaviour unless
            the new keys are set in it: a ``scalegmn_args`` dictionary, a whole configuration (dictionary or path of its
            YAML file), or the name of a published one. For Neural Graphs the original's constructor dictionary, known
            by its ``_target_``, the path of its YAML file with everything resolved, or one of `neural_graphs_names`.

    Returns:
        The model; ``load_state_dict(strict=True)`` takes the original's checkpoints.

    Raises:
        ValueError, FileNotFoundError, TypeError: see `config.resolve` and `neural_graphs_config.model_arguments`.
    """
    if isinstance(config, ScaleGMNConfig):
        return ScaleGMN(config)
    if isinstance(config, str) and config in neural_graphs_names():
        found = neural_graphs_config(config)
    else:
        found = load(config)
    if isinstance(found.get("model"), Mapping):
        found = found["model"]
    if "_target_" not in found:
        return ScaleGMN(config)
    name, arguments = model_arguments(found)
    return getattr(neural_graphs, name)(**arguments)


__all__ = [
    "DynamicRelationalTransformer",
    "GNNForClassification",
    "GNNForGeneralization",
    "GNNParams",
    "RelationalTransformer",
    "RelationalTransformerParams",
    "ScaleGMN",
    "ScaleGMNConfig",
    "from_config",
    "neural_graphs_config",
    "neural_graphs_names",
    "published_config",
    "published_names",
]
