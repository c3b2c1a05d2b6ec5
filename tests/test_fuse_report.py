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
from user_models import assert_same_results, fused_copy, nontrivial, sequence

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


class Reading(ResBlk):
    """A setting in an object of the user's own, which may change at any time."""

    def __init__(self, *channels):
        super().__init__(*channels)
        self.settings = type("Settings", (), {"last_relu": True})()

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out = self.extra(x) + out
        return F.relu(out) if self.settings.last_relu else out


class Logging(ResBlk):
    def forward(self, x):
        print("called")
        return super().forward(x)


class Checkpointing(ResBlk):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)


class Asking(ResBlk):
    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + x) if torch.is_grad_enabled() else out


class Flagging(ResBlk):
    def forward(self, x):
        x.was_here = True
        return super().forward(x)


class Swallowing(ResBlk):
    """Catches whatever tracing raises."""

    def forward(self, x):
        try:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)
        except Exception:
            return x


LEFT = [
    (Stochastic, "random"),
    (Branching, "traced"),
    (Remembering, "assigns"),
    (NoGradient, "grad mode"),
    (NoAutocast, "autocast"),
    (Reading, "settings"),
    (Logging, "print"),
    (Checkpointing, "calls torch."),
    (Asking, "is_grad_enabled"),
    (Flagging, "was_here"),
    (Swallowing, "exceptions"),
]


@pytest.mark.parametrize(("block", "word"), LEFT)
def test_forward_that_is_no_graph(block, word):
    model = block(4, 4)
    state = random.getstate(), torch.get_rng_state()
    report = rf.fuse(model)
    assert type(model) is block and "forward" not in model.__dict__
    assert [(e.name, e.status) for e in report.entries] == [("", "left")]
    assert word in report.entries[0].reason
    assert "last" not in model.__dict__
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])


TWO = "conv+bn+relu conv+bn"


@pytest.mark.parametrize(
    ("block", "runs"),
    [
        (Scaled, (TWO,)),
        (Subtracting, (TWO,)),
        (Leaky, ("conv+bn", "conv+bn +add+relu")),
        (Unused, ("conv+bn+relu", "conv+bn +add+relu")),
        (TwoInputs, (f"{TWO} +identity+relu",)),
        (Twice, ("conv+bn+relu", "conv+bn +add+relu")),
        (PreActivation, ("bn+relu conv+bn+relu conv +identity",)),
    ],
)
def test_foreign_steps_stay_the_users_own(block, runs):
    eager = nontrivial(block(4, 4))
    fused, report = fused_copy(eager)
    assert [(e.name, e.status) for e in report.entries] == [("", "fused")]
    assert report.entries[0].runs == runs
    assert_same_results(fused, eager, torch.randn(2, 4, 6, 6))


def test_overwritten_input_is_overwritten():
    model = Overwriting(4, 4).eval()
    assert rf.fuse(model).entries[0].runs == (TWO,)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        expected = Overwriting.forward(model, y := x.clone())
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(x, y)


def test_forward_that_differs_between_training_and_evaluation():
    model = Dropping(4, 4)
    report = rf.fuse(model)
    assert report.entries[0].runs == (f"{TWO} +identity+relu",)
    assert "(in training: conv+bn+relu, conv+bn +add+relu)" in report.entries[0].reason
    x = torch.randn(2, 4, 6, 6)
    results = []
    for run in (model, lambda x: Dropping.forward(model, x)):
        torch.manual_seed(0)
        results.append(run(x))
    torch.testing.assert_close(*results)
    model.eval()
    torch.testing.assert_close(model(x), Dropping.forward(model, x))


def hooked(block):
    block.conv1.register_forward_hook(lambda module, args, output: None)


def parametrized(block):
    nn.utils.parametrizations.weight_norm(block.conv2)


def group_norm(block):
    block.bn2 = nn.GroupNorm(2, 4)


def reflecting(block):
    block.conv1.padding_mode = "reflect"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (hooked, ["conv1", "hooks"]),
        (parametrized, ["conv2", "Parametrized"]),
        (group_norm, ["conv+bn+relu conv"]),
        (reflecting, ["conv1", "reflect"]),
    ],
)
@pytest.mark.parametrize("make", [lambda: ResBlk(4, 4), lambda: BasicBlock(4, 4)], ids=["lecture", "torchvision"])
def test_children_that_are_not_what_they_seem(make, change, words):
    block = make()
    change(block)
    report = rf.fuse(block)
    assert [e.status for e in report.entries] == ["fused"]  # what is left of it
    assert report.convolutions.training < 2 or report.batch_norms.training < 2
    assert all(word in report.entries[0].reason for word in words)


def test_replaced_forward():
    block = ResBlk(4, 4)
    block.forward = lambda x: x
    report = rf.fuse(block)
    assert [e.status for e in report.entries] == ["left"]
    assert "instance" in report.entries[0].reason
    x = torch.randn(1, 4, 4, 4)
    assert block(x) is x


def test_other_activation_in_a_torchvision_block():
    eager = nontrivial(Bottleneck(16, 4))
    eager.relu = nn.SiLU()
    fused, report = fused_copy(eager)
    assert report.convolutions.training == 3
    assert report.entries[0].runs == ("conv+bn", "conv+bn", "conv+bn +add")
    assert_same_results(fused, eager, torch.randn(2, 16, 6, 6))


def test_fused_after_the_hook_is_gone():
    block = ResBlk(4, 8)
    handle = block.conv1.register_forward_hook(lambda module, args, output: None)
    report = rf.fuse(block)
    assert "conv1: the convolution has hooks" in report.entries[0].reason
    handle.remove()
    report = rf.fuse(block)
    assert [e.runs for e in report.entries] == [(f"{TWO} +projection+relu",)]
    eager = rf.unfuse(copy.deepcopy(block))
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


def test_torchscript_is_left():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    report = rf.fuse(nn.ModuleList([scripted]))
    assert [(e.name, e.status) for e in report.entries] == [("0", "left")]


def test_graph_modules_are_fused():
    eager = torch.fx.symbolic_trace(nontrivial(ResBlk(4, 4)))
    fused, report = fused_copy(eager)
    assert [e.runs for e in report.entries] == [(f"{TWO} +identity+relu",)]
    assert_same_results(fused, eager, torch.randn(2, 4, 6, 6))


def test_layers_in_containers_are_reported():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
            self.norms = nn.ModuleDict({str(i): nn.BatchNorm2d(4) for i in range(2)})

        def forward(self, x):
            return [F.relu(self.norms[str(i)](conv(x))) for i, conv in enumerate(self.convs)]

    eager = nontrivial(Pyramid())
    fused, report = fused_copy(eager)
    assert [e.runs for e in report.entries] == [("conv+bn+relu", "conv+bn+relu")]
    assert report.convolutions == (2, 2, 2)
    x = torch.randn(2, 4, 6, 6)
    results = fused(x)
    assert type(results) is list
    torch.testing.assert_close(results, eager(x))


def test_report_is_a_table():
    model = nn.Sequential(ResBlk(4, 4), NoAutocast(4, 4))
    report = rf.fuse(model)
    head, titles, *rows, share = str(report).splitlines()
    assert head == "fused: 1, left: 1"
    assert share == (
        "convolutions fused: 2 of 4 (50 %) in training, 2 of 4 (50 %) in inference; "
        "batch norms: 2 of 4 (50 %) in training, 2 of 4 (50 %) in inference"
    )
    assert titles.split()[:3] == ["module", "class", "status"]
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
