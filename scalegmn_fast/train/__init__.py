"""Training: the trainer, configurations, checkpoints and plots."""

from .checkpoint import load_checkpoint
from .config import load_config, validate_config
from .cuda_graph import GraphedStep
from .model import build_model
from .optim import WarmupLRScheduler
from .step import TrainingStep
from .trainer import NonFiniteLossError, Trainer, evaluate_split, seed_everything

__all__ = [
    "GraphedStep",
    "NonFiniteLossError",
    "Trainer",
    "TrainingStep",
    "WarmupLRScheduler",
    "build_model",
    "evaluate_split",
    "load_checkpoint",
    "load_config",
    "seed_everything",
    "validate_config",
]
