"""Optional sinks for scalars: TensorBoard and Weights & Biases, imported only when asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from scalegmn_fast.data.optional import require

__all__ = ["TensorBoardLogger", "WandbLogger"]


class TensorBoardLogger:
    """Writes event files under ``directory``; events after ``first_step`` of an earlier run are superseded."""

    def __init__(self, directory: str | os.PathLike, first_step: int = 0):
        require("tensorboard", "TensorBoard logging")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(os.fspath(directory), purge_step=first_step or None)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Logs to Weights & Biases with ``wandb_args`` of the configuration; a resumed run continues the same one."""

    def __init__(self, config: Mapping[str, Any], directory: str | os.PathLike, run_id: str | None = None):
        try:
            import wandb
        except ImportError as e:
            raise ModuleNotFoundError("W&B logging needs wandb: pip install wandb, or drop --wandb") from e
        arguments = {k: v for k, v in (config.get("wandb_args") or {}).items() if v is not None}
        self._run = wandb.init(config=dict(config), dir=os.fspath(directory), id=run_id, resume="allow", **arguments)
        self.run_id = str(self._run.id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
