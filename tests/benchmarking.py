# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What the tests of the benchmarks share; imported before `benchmarks`, which it puts on the path."""

import json
import sys
from pathlib import Path

import torch

# Appended, so that the package is still imported from where it is installed.
sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import report  # noqa: E402

CPU = torch.device("cpu")


def results(folder, name, device=CPU):
    """What a run with ``--output folder`` wrote to the file of that name."""
    return json.loads((folder / report.slug(report.device_name(device)) / name).read_text())
