"""Imports of packages that only some features need."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from types import ModuleType

# Packages whose name differs from the module's.
_PACKAGE = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def require(module: str, purpose: str, extra: str = "train") -> ModuleType:
    """Import ``module``, or raise ImportError that names the package, what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        package = _PACKAGE.get(package, package)
        message = f"{purpose} needs {package}: pip install {package}, or install scalegmn_fast[{extra}]"
        raise ImportError(message) from error


class _NoBar:
    """A progress bar that shows nothing."""

    def __init__(self, iterable: Iterable | None):
        self._iterable = iterable

    def __iter__(self) -> Iterator:
        return iter(self._iterable)

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int = 1) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        pass


def progress(iterable: Iterable | None = None, *, disable: bool = False, **kwargs):
    """A tqdm progress bar on stderr; with ``disable`` nothing is shown and tqdm is not needed."""
    if disable:
        return _NoBar(iterable)
    return require("tqdm", "the progress bar").tqdm(iterable, **kwargs)
