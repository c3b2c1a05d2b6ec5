# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Scripts that are no part of a package: imported, or run with the package that is under test."""

import importlib.util
import os
from pathlib import Path

import resnet_fused


def load(path):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment():
    """Of a process that imports the package from where it is here, and the simulator where that runs."""
    paths = [str(Path(resnet_fused.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
