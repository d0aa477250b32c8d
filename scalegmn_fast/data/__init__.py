"""Data sets of networks: the field's formats, packing, fitting INRs, canonicalisation, statistics."""

from .canonicalize import canonicalize
from .fit_inrs import FitSettings, fit_inrs
from .formats import NetworkSet, read_dws, read_network, read_nfn, read_stacked_npz
from .images import ImageSet, load_images, read_idx
from .inr import coordinates, evaluate_inrs, plot_reconstructions, psnr, reconstruct
from .packed import SPLITS, PackedDataset, write_packed
from .splits import draw_splits
from .statistics import LayerStatistics

__all__ = [
    "SPLITS",
    "FitSettings",
    "ImageSet",
    "LayerStatistics",
    "NetworkSet",
    "PackedDataset",
    "canonicalize",
    "coordinates",
    "draw_splits",
    "evaluate_inrs",
    "fit_inrs",
    "load_images",
    "plot_reconstructions",
    "psnr",
    "read_dws",
    "read_idx",
    "read_network",
    "read_nfn",
    "read_stacked_npz",
    "reconstruct",
    "write_packed",
]
