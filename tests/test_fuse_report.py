# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What fuse leaves and the reason it gives, and its report."""

import contextlib
import copy
import io
import random

import pytest
import torch
import torch.nn.functional as F
from lecture import ResBlk
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from user_models import assert_same_results, sequence

import resnet_fused as rf


class Dropping(ResBlk):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        if self.training:
            out = F.dropout(out, 0.5)
        return F.relu(self.extra(x) + self.bn2(self.conv2(out)))


class Stochastic(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) + out if random.random() > -1 else out)


class Scaled(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) + 0.1 * out)


class Subtracting(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) - out)


class Leaky(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.leaky_relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) + out)


class Branching(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + x) if x.mean() > 0 else out


class Remembering(ResBlk):
    def forward(self, x):
        self.last = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) + self.last)


class Unused(ResBlk):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        self.bn2(out)
        return F.relu(self.extra(x) + self.bn2(self.conv2(out)))


class Overwriting(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x += out
        return F.relu(x)


class NoGradient(ResBlk):
    @torch.no_grad()
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) + out)


class NoAutocast(ResBlk):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(self.extra(x) + out)


class TwoInputs(ResBlk):
    def forward(self, x, skip=None):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if skip is None else skip))


class Twice(ResBlk):
    def forward(self, x):
        out = self.bn1(self.conv1(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.extra(x) + out)


class PreActivation(ResBlk):
    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        return self.extra(x) + self.conv2(F.relu(self.bn2(out)))


class Remembered(ResBlk):
    memory = "a slot for something else"


@pytest.mark.parametrize(
    ("block", "word"),
    [
        (Dropping, "dropout"),
        (Stochastic, "random"),
        (Scaled, "mul"),
        (Subtracting, "sub"),
        (Leaky, "leaky_relu"),
        (Branching, "traced"),
        (Remembering, "assigns"),
        (Unused, "used 2 times"),
        (Overwriting, "added"),
        (NoGradient, "grad mode"),
        (NoAutocast, "autocast"),
        (TwoInputs, "inputs"),
        (Twice, "more than once"),
        (PreActivation, "without a batch norm"),
        (Remembered, "memory"),
    ],
)
def test_forward_that_computes_something_else(block, word):
    model = block(4, 4)
    state = random.getstate(), torch.get_rng_state()
    report = rf.fuse(model)
    assert type(model) is block
    assert [(e.name, e.status) for e in report.entries] == [("", "left")]
    assert word in report.entries[0].reason
    assert "last" not in model.__dict__
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


def hooked(block):
    block.conv1.register_forward_hook(lambda module, args, output: None)


def parametrized(block):
    nn.utils.parametrizations.weight_norm(block.conv2)


def group_norm(block):
    block.bn2 = nn.GroupNorm(2, 4)


def synchronised(block):
    block.bn1 = nn.SyncBatchNorm(4)


def reflecting(block):
    block.conv1.padding_mode = "reflect"


def replaced_forward(block):
    block.forward = lambda x: x


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (hooked, ["conv1", "hooks"]),
        (parametrized, ["conv2", "Parametrized"]),
        (group_norm, ["bn2", "GroupNorm"]),
        (synchronised, ["bn1", "SyncBatchNorm"]),
        (reflecting, ["conv1", "reflect"]),
        (replaced_forward, ["forward", "instance"]),
    ],
)
@pytest.mark.parametrize("make", [lambda: ResBlk(4, 4), lambda: BasicBlock(4, 4)], ids=["lecture", "torchvision"])
def test_children_that_are_not_what_they_seem(make, change, words):
    block = make()
    change(block)
    original = type(block)
    report = rf.fuse(block)
    assert type(block) is original
    assert [e.status for e in report.entries] == ["left"]
    assert all(word in report.entries[0].reason for word in words)


def test_other_activation_in_a_torchvision_block():
    block = Bottleneck(16, 4)
    block.relu = nn.SiLU()
    report = rf.fuse(block)
    assert type(block) is Bottleneck
    assert "SiLU" in report.entries[0].reason


def test_fused_after_the_hook_is_gone():
    block = ResBlk(4, 8)
    handle = block.conv1.register_forward_hook(lambda module, args, output: None)
    report = rf.fuse(block)
    assert [(e.name, e.status) for e in report.entries] == [("", "left"), ("extra", "fused")]
    handle.remove()
    report = rf.fuse(block)
    assert [(e.name, e.status) for e in report.entries] == [("", "fused")]
    eager = rf.unfuse(copy.deepcopy(block))
    assert type(eager.extra) is nn.Sequential
    assert_same_results(block, eager, torch.randn(2, 4, 8, 8))


def test_sequences_that_are_left():
    report = rf.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.LeakyReLU()))
    assert [e.reason for e in report.left] == ["0: Conv2d before GroupNorm"]
    assert not rf.fuse(nn.Sequential(nn.Linear(3, 3), nn.ReLU())).entries
    partly = nn.Sequential(*sequence())
    partly[0].register_forward_hook(lambda module, args, output: None)
    (entry,) = rf.fuse(partly).entries
    assert entry.status == "fused"
    assert "0: the convolution has hooks" in entry.reason


def test_torchscript_and_fx_are_left():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    report = rf.fuse(nn.ModuleList([scripted, traced]))
    assert [(e.name, e.status) for e in report.entries] == [("0", "left"), ("1", "left")]


def test_report_is_a_table():
    model = nn.Sequential(ResBlk(4, 4), Leaky(4, 4))
    report = rf.fuse(model)
    head, titles, *rows = str(report).splitlines()
    assert head == "fused: 1, left: 1"
    assert titles.split()[:4] == ["module", "kind", "class", "status"]
    assert [row.split()[0] for row in rows] == ["0", "1"]
    column = titles.index("status")
    assert [row[column:].split()[0] for row in rows] == ["fused", "left"]
    assert "(model)" in str(rf.fuse(ResBlk(4, 4)))
    assert str(rf.fuse(nn.Linear(2, 2))).startswith("fused: 0, left: 0")


def test_verbose_prints_the_report():
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        rf.fuse(ResBlk(4, 4))
        assert not out.getvalue()
        report = rf.fuse(ResBlk(4, 4), verbose=True)
    assert out.getvalue() == f"{report}\n"
