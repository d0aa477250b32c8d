"""The original repositories' models, batches and datasets on our ops: `accelerate` for live models, and the rest."""

from .accelerated import AccelerationError, Part, Report, accelerate, report, restore
from .loader import loader

__all__ = ["AccelerationError", "Part", "Report", "accelerate", "loader", "report", "restore"]
