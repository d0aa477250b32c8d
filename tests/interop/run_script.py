"""Runs a training script with one line put in: python run_script.py SCRIPT AFTER LINE ARGUMENTS ...

LINE goes behind the line of the script that holds AFTER (an empty LINE: the script as it is). What the script tells
wandb goes to ``logged.jsonl``, a line per call. Packages that the originals import and that reach for the network
(wandb, torchvision), or need not be there (cv2, nfn), are replaced by a few lines with what the scripts use of them.
"""

import importlib.util
import json
import logging
import sys
import types
from pathlib import Path

import numpy as np
import torch

from bench.original_neural_graphs import keep_old_names


def module(name, **contents):
    """A module of this name in the place of any other."""
    made = types.ModuleType(name)
    made.__path__ = []
    vars(made).update(contents)
    sys.modules[name] = made
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, made)
    return made


def numbers(log):
    """The entries of a log that are numbers."""
    return {key: float(v) for key, v in log.items() if np.ndim(getattr(v, "detach", lambda v=v: v)()) == 0 and _is(v)}


def _is(value):
    return isinstance(value, int | float | np.number) or (torch.is_tensor(value) and value.numel() == 1)


class Compose:
    def __init__(self, steps):
        self.steps = steps

    def __call__(self, value):
        for step in self.steps:
            value = step(value)
        return value


class ToTensor:
    def __call__(self, image):
        return torch.from_numpy(image).float().div(255).reshape(1, *image.shape[:2])


class Images:
    """In the place of MNIST: an image of bytes for every number."""

    def __init__(self, *args, **options):
        pass

    def __getitem__(self, index):
        return np.random.default_rng(index).integers(0, 256, (28, 28), np.uint8), 0


def dilate(image, kernel, iterations=1):
    padded = torch.nn.functional.max_pool2d(torch.from_numpy(image)[None, None].float(), kernel.shape[0], 1, 1)
    return padded[0, 0].numpy().astype(np.uint8)


def stand_ins(log_to):
    def log(entries, step=None):
        with log_to.open("a") as file:
            file.write(json.dumps(numbers(entries)) + "\n")

    run = types.SimpleNamespace(path="entity/project/run")
    module("wandb", init=lambda **options: run, log=log, run=run, Image=str, Settings=dict)
    module("wandb.plot", confusion_matrix=lambda **options: None)
    module("torchvision")
    module("torchvision.datasets", MNIST=Images, FashionMNIST=Images, CIFAR10=Images)
    module("torchvision.utils", save_image=None)
    module("torchvision.transforms", Compose=Compose, ToTensor=ToTensor, Lambda=lambda call: call, Normalize=Images)
    if importlib.util.find_spec("cv2") is None:
        module("cv2", dilate=dilate)
    if importlib.util.find_spec("nfn") is None:
        module("nfn")
        module("nfn.common", WeightSpaceFeatures=tuple, state_dict_to_tensors=None)


def main():
    script, after, line, *arguments = sys.argv[1:]
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    stand_ins(Path("logged.jsonl"))
    keep_old_names()
    found = []
    for text in Path(script).read_text().splitlines(keepends=True):
        found.append(text)
        if line and after in text:
            found.append(text[: len(text) - len(text.lstrip())] + line + "\n")
            line = ""
    if line:
        raise SystemExit(f"AFTER must be in {script}, got {after!r}")
    sys.argv = [script, *arguments]
    namespace = sys.modules["__main__"].__dict__
    namespace["__file__"] = script
    exec(compile("".join(found), script, "exec"), namespace)


main()
