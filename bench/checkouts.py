"""The originals on a command line: a checkout of each, and its published configurations."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Repository:
    """An original implementation.

    Attributes:
        option: of the command line, which takes a checkout.
        place: where that is from; file: one that every checkout has; needs: its packages, by the module they install.
        names: published configurations, in the order of the tables; own_batch: the batch size that one comes with.
        batch: sizes measured by default.
    """

    option: str
    place: str
    file: str
    names: Sequence[str]
    own_batch: Callable[[str], int]
    batch: Sequence[str]
    needs: Mapping[str, str] = field(default_factory=dict)

    def add_option(self, parser: argparse.ArgumentParser, name: str, *, required: bool) -> None:
        """Its option, whose value becomes the arguments' attribute ``name``."""
        parser.add_argument(self.option, required=required, dest=name, metavar="CHECKOUT", help=f"of {self.place}")

    def check(self, parser: argparse.ArgumentParser, root: str) -> None:
        """End with a message that names the option where the original cannot be imported from ``root``."""
        if not (Path(root) / self.file).is_file():
            parser.error(
                f"argument {self.option}: expected a checkout of {self.place}, got {root!r}, where no {self.file} is"
            )
        missing = [package for module, package in self.needs.items() if importlib.util.find_spec(module) is None]
        if missing:
            parser.error(f"argument {self.option}: the original needs {', '.join(missing)}, which cannot be imported")
