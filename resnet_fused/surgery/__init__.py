# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Switching an existing model to fused execution. The user's forward stays the program; runs inside it are fused.

``recording`` executes a forward symbolically, on ``symbols``, with ``guards`` on what that depended on and what its
``code`` looks up; ``runs`` finds in the graph what ``execution`` computes in one call; ``program`` puts both together,
and ``forward`` puts it on a module, ``layout`` included. ``layers`` and ``context`` say what is plain. ``switch`` and
``folding`` have the public functions, ``report`` what they tell.
"""

from resnet_fused.surgery.folding import fold
from resnet_fused.surgery.report import Entry, FuseReport, Share
from resnet_fused.surgery.switch import fuse, set_memory, unfuse

__all__ = ["Entry", "FuseReport", "Share", "fold", "fuse", "set_memory", "unfuse"]
