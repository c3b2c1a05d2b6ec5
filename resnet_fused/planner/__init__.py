# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Which engine each convolution of a block runs on: measured on the machine at hand, proven there, remembered.

``keys`` says what is planned, ``scratch`` makes such a block of random tensors, ``proof`` checks candidates on it,
``measure`` times them, ``search`` chooses one, ``entry`` is what was found, ``store`` remembers it, ``decide`` answers
each call, ``command`` is what users see as ``resnet_fused.plan``.
"""
