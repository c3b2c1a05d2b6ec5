# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Loads gpusim's plugin into PyTorch as soon as a process imports it."""

import os
import sys


def _chain():
    """Run the sitecustomize that this one hides, if there is one."""
    import importlib.machinery
    import importlib.util
    here = os.path.dirname(os.path.abspath(__file__))
    path = [p for p in sys.path if os.path.abspath(p or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec and spec.loader and spec.origin != __file__:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


if os.environ.get("GPUSIM") == "1":
    import gpusim_hook
    gpusim_hook.install()

try:
    _chain()
except Exception as error:  # a broken sitecustomize must not keep Python from starting
    print("gpusim: the other sitecustomize failed:", error, file=sys.stderr)
