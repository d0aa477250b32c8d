"""The published ScaleGMN models against the naive whole-model oracle, `reference.scalegmn`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

import scalegmn_fast

from .. import testing
from ..graph import GraphBatch
from ..models import from_config, published_config
from ..models.config import resolve
from ..reference.scalegmn import scalegmn
from .models import BATCH, FACTOR, QUICK_WIDTH, UNITS, ModelCase, in_layers, numbered, trainable


class ScaleGMNCase(ModelCase):
    """A published ScaleGMN configuration."""

    def __init__(self, name: str, quick: bool, seed: int):
        self.config = model_arguments(name, QUICK_WIDTH if quick else None)
        layout, symmetry = self.config["layer_layout"], self.config["symmetry"]
        generator = torch.Generator().manual_seed(seed)
        d_e = self.config["graph_init"]["d_in_e"]
        self.input_value = 1.0 if d_e == 1 else 0.0
        drawn = testing.random_network(layout, BATCH, d_e=d_e, generator=generator, dtype=torch.float32)
        self.networks = numbered(*drawn)
        self.mask = testing.random_sign_mask(layout, BATCH, generator=generator)
        self.element = testing.random_group_element(
            layout, symmetry, batch=BATCH, sign_mask=self.mask, generator=generator
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # published models that are not exactly equivariant say so
            torch.manual_seed(seed)
            self.model = from_config(self.config).eval()
            self.exact_model = from_config(exact_variant(self.config)).eval()
        for model in (self.model, self.exact_model):
            testing.randomize_parameters(model, generator=generator, spread=0.02)
        self.own_equivariance: dict[tuple[str, torch.dtype], float] = {}
        self.solve()

    def graph(self, networks: Mapping[str, Tensor]) -> GraphBatch:
        weights, biases = in_layers(networks)
        mask = self.mask.to(weights[0].device)
        return GraphBatch.from_weights(weights, biases, input_value=self.input_value, sign_mask=mask)

    def oracle(self, dtype: torch.dtype) -> dict[str, Tensor]:
        parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in trainable(self.model).items()}
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.model.state_dict().items()}
        networks = self.placed("cpu", dtype)
        out = scalegmn(
            self.config,
            {**state, **parameters},
            *in_layers(networks),
            input_value=self.input_value,
            sign_mask=self.mask,
        )
        return self.results(out, {**networks, **parameters})

    def equivariance(self, backend: str, device: str, dtype: torch.dtype) -> tuple[float, float]:
        """Error of the exact variant under a random group element, and a bound from the oracle's own."""
        model = deepcopy(self.exact_model).to(device, dtype)
        weights, biases = in_layers(self.placed(device, dtype))
        element = testing.GroupElement(
            tuple(p.to(device) for p in self.element.permutations),
            tuple(s.to(device, dtype) for s in self.element.scales),
        )
        mask = self.mask.to(device)
        with scalegmn_fast.backend(backend):
            error = testing.equivariance_error(
                model, weights, biases, element, sign_mask=mask, input_value=self.input_value
            )
        if (device, dtype) not in self.own_equivariance:
            state, config = model.state_dict(), exact_variant(self.config)

            def oracle(w: Sequence[Tensor], b: Sequence[Tensor], flags: Tensor | None) -> Any:
                return scalegmn(config, state, w, b, input_value=self.input_value, sign_mask=flags)

            own = testing.equivariance_error(oracle, weights, biases, element, sign_mask=mask)
            self.own_equivariance[device, dtype] = own
        eps = torch.finfo(dtype).eps
        return error, max(FACTOR * self.own_equivariance[device, dtype], UNITS * eps)


def model_arguments(name: str, width: int | None = None) -> dict[str, Any]:
    """The complete arguments of a published model, at another hidden width where one is given."""
    config = published_config(name)
    if width is not None:
        config["scalegmn_args"]["d_hid"] = width
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return resolve(config)


def exact_variant(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model with ``canonical_eps`` 0 and, for bidirectional scale and hetero, backward edges that are exactly
    equivariant."""
    changed = {**config, "canonical_eps": 0.0}
    inexact = config.get("bidirectional_edges", "original") == "original"
    if inexact and config["direction"] == "bidirectional" and config["symmetry"] in ("scale", "hetero"):
        changed["bidirectional_edges"] = "carried"
    return changed
