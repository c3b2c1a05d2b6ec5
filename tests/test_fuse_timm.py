# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""fuse on the building blocks of timm: batch norms with an activation, attention, anti-aliasing, lists of inputs."""

import copy

import pytest
import torch
from thinning import slow_but
from torch import nn
from user_models import assert_same_results, fused_copy, nontrivial

import resnet_fused as rf

timm = pytest.importorskip("timm")

SMALL = {"num_classes": 4}
NETWORKS = {
    "resnet18": 20,
    "seresnet18": 20,
    "ecaresnet26t": 31,
    "skresnet18": 44,
    "resnetblur18": 20,
    "resnet18d": 22,
    "resnetv2_18": 16,  # a shortcut's convolution stands behind an activation that is used twice
    "regnety_002": 44,
    "darknet17": 16,
    "dla34": 37,
    "ese_vovnet19b_slim": 19,
    "repvgg_a0": 44,
    "efficientnet_b0": 49,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_share_of_networks(name):
    report = rf.fuse(timm.create_model(name, **SMALL))
    assert report.convolutions.training >= NETWORKS[name]
    branches = 17 if name == "repvgg_a0" else 0  # identity branches of a batch norm alone
    assert report.batch_norms.training == report.batch_norms.total - branches


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Identity, None])
@pytest.mark.parametrize("drop", [None, nn.Identity])
def test_batch_norm_with_an_activation(device, act, drop):
    layers = timm.layers.BatchNormAct2d
    eager = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        layers(8, act_layer=act or nn.ReLU, apply_act=act is not None, drop_layer=drop),
        nn.Conv2d(8, 4, 1),
    )
    eager = nontrivial(eager).to(device)
    fused, report = fused_copy(eager)
    assert report.batch_norms.training == 1
    x = torch.randn(2, 3, 9, 9, device=device)
    assert_same_results(fused, eager, x)
    for model in (eager, fused):
        model[1].act = nn.Tanh()
    assert_same_results(fused, eager, x)
    folded = rf.fold(eager.eval())
    assert type(folded[1]) is nn.Tanh
    torch.testing.assert_close(folded(x), eager(x), rtol=1e-4, atol=1e-5)


WHOLE = ("seresnet18", "dla34", "resnetv2_18")


@pytest.mark.parametrize("name", slow_but(["seresnet18"], WHOLE, "a whole network, in float64 too"))
def test_networks_compute_the_same(name):
    torch.manual_seed(0)
    eager = nontrivial(timm.create_model(name, **SMALL))
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fused = copy.deepcopy(eager)
    rf.fuse(fused)
    assert_same_results(fused, eager, torch.randn(4, 3, 96, 96))
