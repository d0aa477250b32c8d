"""What is learnt: classes or numbers from labels, or edits of INRs from target images; loss, running sums, metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scalegmn_fast.data import LayerStatistics, images_of, psnr
from scalegmn_fast.graph import GraphBatch

__all__ = ["Classification", "Editing", "Regression", "kendall_tau", "make_task", "r2_score", "task_of"]


def task_of(config: Mapping[str, Any], dataset, statistics: LayerStatistics | None = None):
    """The task of a validated configuration on a dataset that `model.fitted` made for it.

    Args:
        statistics: those that the dataset's batches are normalised by, or None.
    """
    if getattr(dataset, "gives_targets", False):
        return Editing(dataset, config["train_args"], statistics)
    return make_task(torch.as_tensor(dataset.labels), config["train_args"])


def make_task(labels: Tensor, train_args: Mapping[str, Any]) -> Classification | Regression:
    """Chooses the task from the labels' dtype, which must agree with ``train_args.loss``.

    int64 labels: classification (``CrossEntropyLoss``); float32 labels: regression (``MSE`` or ``BCE``).
    """
    loss = train_args["loss"]
    if labels.is_floating_point():
        if loss == "CrossEntropyLoss":
            raise ValueError(f"train_args.loss is CrossEntropyLoss but the labels are {labels.dtype}: use MSE or BCE")
        inside = bool(((labels >= 0) & (labels <= 1)).all())
        if loss == "BCE" and not inside:
            raise ValueError(
                f"train_args.loss is BCE but labels reach from {labels.min().item():g} to {labels.max().item():g}, "
                "outside [0, 1]: use MSE"
            )
        prediction = train_args["prediction"]
        if prediction == "auto":
            prediction = "sigmoid" if inside else "identity"
        if loss == "BCE" and prediction != "sigmoid":
            raise ValueError("train_args.prediction must be sigmoid (or auto) with train_args.loss BCE")
        return Regression(loss, prediction)
    if loss != "CrossEntropyLoss":
        raise ValueError(f"train_args.loss is {loss} but the labels are {labels.dtype} (classes): use CrossEntropyLoss")
    if labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"labels must be classes from 0, got {int(labels.min())}")
    return Classification(int(labels.max()) + 1 if labels.numel() else 1)


class Task:
    """What the tasks share: by default a model's output is what is learnt."""

    def output(self, model: nn.Module, graph: GraphBatch) -> Tensor:
        """What the loss takes, of a batch of networks."""
        return model(graph)


class Classification(Task):
    """Cross entropy over classes; the best epoch is the one of highest accuracy, then of lowest loss."""

    kind = "classification"
    score = "accuracy"

    @staticmethod
    def shown(score: float) -> str:
        return f"accuracy {100 * score:.2f}%"

    def __init__(self, classes: int):
        self.classes = classes

    def check_output(self, output: Tensor, key: str = "readout_args.d_out") -> None:
        """Raises ValueError unless ``output`` is [B, d_out] with a column per class; ``key`` is what sets its width."""
        if output.dim() != 2 or output.shape[1] < self.classes:
            raise ValueError(
                f"labels have {self.classes} classes but the model's output has shape {list(output.shape)}: "
                f"expected [batch, {self.classes} or more] ({key})"
            )

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output, labels)

    def new_sums(self, device: torch.device) -> dict[str, Tensor]:
        return {k: torch.zeros((), dtype=torch.float64, device=device) for k in ("loss", "correct", "count")}

    @torch.no_grad()
    def add(self, sums: dict[str, Tensor], loss: Tensor, output: Tensor, labels: Tensor) -> None:
        """Adds a batch to the running sums without a device synchronisation."""
        sums["loss"] += loss.double() * len(labels)
        sums["correct"] += (output.argmax(1) == labels).sum()
        sums["count"] += len(labels)

    def running(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        count = max(float(sums["count"]), 1.0)
        return {"loss": float(sums["loss"]) / count, "accuracy": float(sums["correct"]) / count}

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, Any]:
        """Loss, accuracy and the confusion matrix (rows: true class) of a whole split, in float64."""
        outputs = outputs.double()
        predicted = outputs.argmax(1)
        classes = outputs.shape[1]
        confusion = torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)
        return {
            "loss": F.cross_entropy(outputs, labels).item(),
            "accuracy": (predicted == labels).double().mean().item(),
            "confusion": confusion.tolist(),
        }

    @staticmethod
    def rank(metrics: Mapping[str, Any]) -> tuple[float, float]:
        """Sort key: a larger one is a better epoch."""
        return metrics["accuracy"], -metrics["loss"]


class Regression(Task):
    """MSE or BCE on one number per network; the best epoch is the one of highest Kendall's tau, then of lowest loss.

    ``prediction``: ``sigmoid`` (as the original does for accuracies in [0, 1]) or ``identity``, applied to the output.
    """

    kind = "regression"
    score = "tau"

    @staticmethod
    def shown(score: float) -> str:
        return f"tau {score:.4f}"

    def __init__(self, loss: str, prediction: str):
        self.loss_name = loss
        self.prediction = prediction

    def check_output(self, output: Tensor, key: str = "readout_args.d_out") -> None:
        """Raises ValueError unless ``output`` is [B, 1]; ``key`` is what sets its width."""
        if output.dim() != 2 or output.shape[1] != 1:
            raise ValueError(
                f"labels are one number per network but the model's output has shape {list(output.shape)}: "
                f"expected [batch, 1] ({key}: 1)"
            )

    def predict(self, output: Tensor) -> Tensor:
        return output.squeeze(-1).sigmoid() if self.prediction == "sigmoid" else output.squeeze(-1)

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        if self.loss_name == "BCE":
            return F.binary_cross_entropy_with_logits(output.squeeze(-1), labels.to(output.dtype))
        return F.mse_loss(self.predict(output), labels.to(output.dtype))

    def new_sums(self, device: torch.device) -> dict[str, Tensor]:
        return {k: torch.zeros((), dtype=torch.float64, device=device) for k in ("loss", "squared", "count")}

    @torch.no_grad()
    def add(self, sums: dict[str, Tensor], loss: Tensor, output: Tensor, labels: Tensor) -> None:
        """Adds a batch to the running sums without a device synchronisation."""
        sums["loss"] += loss.double() * len(labels)
        sums["squared"] += (self.predict(output).double() - labels.double()).square().sum()
        sums["count"] += len(labels)

    def running(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        count = max(float(sums["count"]), 1.0)
        return {"loss": float(sums["loss"]) / count, "mse": float(sums["squared"]) / count}

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, Any]:
        """Loss, MSE, R2 and Kendall's tau of a whole split, in float64, with the predictions for the plot."""
        predicted, labels = self.predict(outputs.double()), labels.double()
        return {
            "loss": self.loss(outputs.double(), labels).item(),
            "mse": F.mse_loss(predicted, labels).item(),
            "r2": r2_score(labels, predicted),
            "tau": kendall_tau(labels, predicted),
            "predicted": predicted.tolist(),
            "actual": labels.tolist(),
        }

    @staticmethod
    def rank(metrics: Mapping[str, Any]) -> tuple[float, float]:
        """Sort key: a larger one is a better epoch. An undefined tau (constant prediction) counts as -1."""
        tau = metrics["tau"]
        return -1.0 if tau != tau else tau, -metrics["loss"]


class Editing(Task):
    """Editing INRs: the model's output is added to the weights and biases, and the images that the new networks stand
    for are to be the targets. Mean squared error; the best epoch is the one of lowest loss.

    Args:
        dataset: a packed dataset `with_targets`.
        statistics: where batches are normalised by them, changes are in their units.

    Raises:
        ValueError: a loss other than MSE, or networks that do not stand for images like the targets.
    """

    kind = "editing"
    score = "psnr"

    def __init__(self, dataset, train_args: Mapping[str, Any], statistics: LayerStatistics | None = None):
        if train_args["loss"] != "MSE":
            raise ValueError(f"train_args.loss must be MSE for a model that edits networks, got {train_args['loss']}")
        _, height, width, channels = dataset.targets(slice(0, 0)).shape
        layout, d_e = list(dataset.layout), dataset.edge_dim
        if (layout[0], layout[-1], d_e) != (2, channels, 1):
            raise ValueError(
                f"{dataset.path}: its targets need INRs with 2 inputs, {channels} outputs and one number per weight, "
                f"got layout {layout} with {d_e}"
            )
        self.shape, self.metadata, self.statistics = (height, width, channels), dataset.metadata, statistics

    @staticmethod
    def shown(score: float) -> str:
        return f"PSNR {score:.2f} dB"

    def output(self, model: nn.Module, graph: GraphBatch) -> Tensor:
        """Images [B, height, width, channels] of the edited networks."""
        pairs = zip(graph.to_weights(), model(graph), strict=True)
        return self._images(*([old + change for old, change in zip(*pair, strict=True)] for pair in pairs))

    def unedited(self, graph: GraphBatch) -> Tensor:
        """Images [B, height, width, channels] of the networks as they are."""
        return self._images(*graph.to_weights())

    def _images(self, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        if self.statistics is not None:
            weights, biases = self.statistics.denormalize(weights, biases)
        return images_of(weights, biases, self.metadata, self.shape[:2])

    def check_output(self, output: Tensor, key: str) -> None:
        """Raises ValueError unless ``output`` is [B, height, width, channels] like the targets."""
        if tuple(output.shape[1:]) != self.shape:
            raise ValueError(f"the model edits images of {list(output.shape[1:])}, the targets have {list(self.shape)}")

    def loss(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(output, labels.to(output.dtype))

    def new_sums(self, device: torch.device) -> dict[str, Tensor]:
        return {k: torch.zeros((), dtype=torch.float64, device=device) for k in ("loss", "count")}

    @torch.no_grad()
    def add(self, sums: dict[str, Tensor], loss: Tensor, output: Tensor, labels: Tensor) -> None:
        """Adds a batch to the running sums without a device synchronisation."""
        sums["loss"] += loss.double() * len(labels)
        sums["count"] += len(labels)

    def running(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"loss": float(sums["loss"]) / max(float(sums["count"]), 1.0)}

    def metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, Any]:
        """Loss (mean squared error) and mean PSNR in dB of a whole split, in float64; images are not clipped."""
        loss = (outputs.double() - labels.double()).square().mean().item()
        return {"loss": loss, "psnr": psnr(outputs, labels).double().mean().item()}

    @staticmethod
    def rank(metrics: Mapping[str, Any]) -> tuple[float]:
        """Sort key: a larger one is a better epoch."""
        return (-metrics["loss"],)


def r2_score(actual: Tensor, predicted: Tensor) -> float:
    """1 - residual / total sum of squares; NaN where all labels are equal."""
    residual = (actual - predicted).square().sum()
    total = (actual - actual.mean()).square().sum()
    return (1 - residual / total).item() if total > 0 else float("nan")


def kendall_tau(a: Tensor, b: Tensor, block: int = 1024) -> float:
    """Kendall's tau-b of two vectors [n], by counting all pairs in blocks; NaN where either is constant."""
    concordance = ties_a = ties_b = 0
    n = len(a)
    for start in range(0, n, block):
        da = torch.sign(a[start : start + block, None] - a[None])
        db = torch.sign(b[start : start + block, None] - b[None])
        concordance += int((da * db).sum())
        ties_a += int((da == 0).sum())
        ties_b += int((db == 0).sum())
    pairs = n * n
    scale = ((pairs - ties_a) * (pairs - ties_b)) ** 0.5
    return concordance / scale if scale > 0 else float("nan")
