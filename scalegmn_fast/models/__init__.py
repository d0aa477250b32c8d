"""Models over `GraphBatch`, and the configurations that describe them."""

from .config import ScaleGMNConfig
from .published import published_config, published_names
from .scalegmn import ScaleGMN


def from_config(config) -> ScaleGMN:
    """Build a model from a configuration.

    Args:
        config: a `ScaleGMNConfig` (exact behaviour by default); or, giving the original's behaviour unless the new keys
            are set in it: a ``scalegmn_args`` dictionary, a whole configuration (dictionary or path of its YAML file),
            or the name of a published one.

    Returns:
        The model; ``load_state_dict(strict=True)`` takes the original's checkpoints.

    Raises:
        ValueError, FileNotFoundError, TypeError: see `config.resolve`.
    """
    return ScaleGMN(config)


__all__ = ["ScaleGMN", "ScaleGMNConfig", "from_config", "published_config", "published_names"]
