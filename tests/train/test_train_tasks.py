"""Losses and metrics against scikit-learn and SciPy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scalegmn_fast.train.tasks import Classification, Regression, kendall_tau, make_task, r2_score

ARGS = {"loss": "CrossEntropyLoss", "prediction": "auto"}


@pytest.mark.parametrize("ties", [False, True])
def test_tau_and_r2_agree_with_scipy_and_sklearn(ties):
    stats = pytest.importorskip("scipy.stats")
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=300), rng.normal(size=300)
    b += a
    if ties:
        a, b = a.round(), b.round()
    ours = kendall_tau(torch.from_numpy(a), torch.from_numpy(b), block=64)
    assert ours == pytest.approx(stats.kendalltau(a, b).correlation, abs=1e-12)
    assert r2_score(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(metrics.r2_score(a, b), abs=1e-12)


def test_constant_predictions_have_no_tau_and_rank_last():
    tau = kendall_tau(torch.arange(5.0), torch.ones(5))
    assert tau != tau
    assert Regression.rank({"tau": tau, "loss": 0.0}) < Regression.rank({"tau": -0.5, "loss": 9.0})


def test_running_sums_equal_the_metrics_of_the_whole():
    torch.manual_seed(0)
    output, labels = torch.randn(25, 4), torch.randint(4, (25,))
    task = Classification(4)
    sums = task.new_sums(torch.device("cpu"))
    for part in torch.arange(25).split(10):
        task.add(sums, task.loss(output[part], labels[part]), output[part], labels[part])
    running, whole = task.running(sums), task.metrics(output, labels)
    assert running["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert running["accuracy"] == pytest.approx(whole["accuracy"], rel=1e-12)
    confusion = torch.tensor(whole["confusion"])
    assert confusion.sum() == 25 and confusion.sum(1).tolist() == torch.bincount(labels, minlength=4).tolist()
    assert confusion.diagonal().sum().item() == round(whole["accuracy"] * 25)


@pytest.mark.parametrize(("loss", "labels", "prediction"), [
    ("MSE", [0.0, 0.5, 1.0], "sigmoid"), ("BCE", [0.0, 0.5, 1.0], "sigmoid"), ("MSE", [-3.0, 0.5, 7.0], "identity"),
])  # fmt: skip
def test_regression_prediction_follows_the_labels(loss, labels, prediction):
    labels, output = torch.tensor(labels), torch.tensor([[0.3], [-1.0], [2.0]])
    task = make_task(labels, {"loss": loss, "prediction": "auto"})
    assert task.prediction == prediction
    predicted = output[:, 0].sigmoid() if prediction == "sigmoid" else output[:, 0]
    expected = F.binary_cross_entropy(predicted, labels) if loss == "BCE" else (predicted - labels).square().mean()
    torch.testing.assert_close(task.loss(output, labels), expected)
    assert task.metrics(output, labels)["mse"] == pytest.approx((predicted - labels).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize(("labels", "args", "message"), [
    (torch.tensor([0, 1]), {"loss": "MSE"}, "use CrossEntropyLoss"),
    (torch.tensor([0.0, 1.0]), {}, "use MSE or BCE"),
    (torch.tensor([0.0, 2.0]), {"loss": "BCE"}, "outside"),
    (torch.tensor([0.0, 1.0]), {"loss": "BCE", "prediction": "identity"}, "must be sigmoid"),
    (torch.tensor([-1, 1]), {}, "from 0, got -1"),
])  # fmt: skip
def test_labels_that_do_not_fit_the_loss(labels, args, message):
    with pytest.raises(ValueError, match=message):
        make_task(labels, {**ARGS, **args})


def test_outputs_that_do_not_fit_the_labels():
    with pytest.raises(ValueError, match="5 classes .* shape \\[2, 4\\]"):
        Classification(5).check_output(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="one number per network .* shape \\[2, 4\\]"):
        Regression("MSE", "identity").check_output(torch.zeros(2, 4))
