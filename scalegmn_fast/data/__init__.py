"""Data sets of networks: the field's formats, packing, fitting INRs, canonicalisation, statistics."""

from .canonicalize import canonicalize
from .cnn_formats import read_cnn_park, read_cnn_zoo
from .cnns import CnnSet, PackedCnns, open_packed, write_cnns
from .fit_inrs import FitSettings, fit_inrs
from .formats import NetworkSet, read_dws, read_network, read_nfn, read_stacked_npz
from .images import ImageSet, load_images, read_idx
from .inr import coordinates, evaluate_inrs, images_of, plot_reconstructions, psnr, reconstruct
from .packed import SPLITS, PackedDataset, write_packed
from .splits import draw_splits
from .statistics import LayerStatistics
from .targets import STYLES, add_targets

__all__ = [
    "SPLITS",
    "STYLES",
    "CnnSet",
    "FitSettings",
    "ImageSet",
    "LayerStatistics",
    "NetworkSet",
    "PackedCnns",
    "PackedDataset",
    "add_targets",
    "canonicalize",
    "coordinates",
    "draw_splits",
    "evaluate_inrs",
    "fit_inrs",
    "images_of",
    "load_images",
    "open_packed",
    "plot_reconstructions",
    "psnr",
    "read_cnn_park",
    "read_cnn_zoo",
    "read_dws",
    "read_idx",
    "read_network",
    "read_nfn",
    "read_stacked_npz",
    "reconstruct",
    "write_cnns",
    "write_packed",
]
