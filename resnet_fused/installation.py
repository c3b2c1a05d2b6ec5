# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Imported first: whether the torch that is installed can load the extension, asked before it is loaded.

Loaded by another minor version of torch than it was compiled against, an extension lacks symbols or, worse, disagrees
about the layout of what they share.
"""

from __future__ import annotations

from importlib.machinery import PathFinder
from pathlib import Path

FOLDER = Path(__file__).parent
BUILT_AGAINST = "built_against.txt"  # beside the extension: torch's version, then, with CUDA kernels, what they are for
HOW_TO_BUILD = "in the folder of its sources: pip install --no-build-isolation --no-deps --force-reinstall ."


def check_torch(installed: str, built_against: Path) -> None:
    """Raises ImportError unless the extension beside ``built_against``, which setup.py wrote, is for this torch."""
    if not built_against.exists():
        raise ImportError(
            f"{built_against} is missing, which says what torch resnet_fused's extension was built against. Build it "
            f"again, {HOW_TO_BUILD}"
        )
    built = built_against.read_text().splitlines()[0]
    if _minor(built) != _minor(installed):
        raise ImportError(
            f"resnet_fused was built against torch {built}, but torch {installed} is installed. Build it again, "
            f"{HOW_TO_BUILD} Or install torch {_minor(built)}."
        )


def cuda_archs() -> str | None:
    """What the CUDA kernels were built for, as in TORCH_CUDA_ARCH_LIST; None without them."""
    path = FOLDER / BUILT_AGAINST
    lines = path.read_text().splitlines() if path.exists() else []
    return lines[1] if len(lines) > 1 else None


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        f"resnet_fused needs torch, which is not installed. Install it, then build resnet_fused {HOW_TO_BUILD}",
        name="torch",
    ) from None
if PathFinder.find_spec("resnet_fused._C", [str(FOLDER)]) is None:  # of this Python
    raise ImportError(f"resnet_fused's extension is not built in {FOLDER}. Build it, {HOW_TO_BUILD}")
check_torch(torch.__version__, FOLDER / BUILT_AGAINST)
