# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What the tests of the benchmarks share."""

import json

import torch

from benchmarks import report

CPU = torch.device("cpu")


def results(folder, name, device=CPU):
    """What a run with ``--output folder`` wrote to the file of that name."""
    return json.loads((folder / report.slug(report.device_name(device)) / name).read_text())
