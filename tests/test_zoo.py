# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The zoo counts what ran fused, and a network that fusing breaks fails it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from benchmarking import results
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d
from user_models import ConvBNRelu

import resnet_fused
from benchmarks import fused_share, zoo
from benchmarks.__main__ import main, parse
from benchmarks.fused_share import share, surroundings


class Known(nn.Module):
    """One convolution of each kind; `plain` has no batch norm beside it."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.plain = nn.Conv2d(3, 4, 1)
        self.unit = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), norm(4), nn.ReLU(inplace=True))
        self.functional, self.functional_norm = nn.Conv2d(4, 4, 3, padding=1), norm(4)
        self.front_norm, self.behind_activation = norm(4), nn.Conv2d(4, 4, 1)
        self.unused = nn.Conv2d(4, 4, 1)
        self.apart, self.apart_norm = nn.Conv2d(4, 4, 1), norm(4)
        self.one_dimensional = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        x = F.max_pool2d(self.plain(x), 2)
        x = x + 1.5 * F.relu(self.functional_norm(self.functional(self.unit(x))))
        x = self.behind_activation(F.silu(self.front_norm(x)))
        x = self.apart_norm(self.apart(x).clamp(max=1))
        x = x * self.one_dimensional(x.mean((2, 3)).unsqueeze(1)).view(x.shape[0], -1, 1, 1)
        return {"out": x, "aux": [x.mean()]}


def image():
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
@pytest.mark.parametrize("training", [True, False])
def test_the_batch_norms_around_convolutions(norm, training):
    model = Known(norm)
    before = copy.deepcopy(model.state_dict())
    found = {name: (s.behind, s.in_front) for name, s in surroundings(model, image(), training=training).items()}
    assert found == {
        "plain": (set(), set()),
        "unit.0": ({"unit.1"}, set()),
        "functional": ({"functional_norm"}, {"unit.1"}),
        "behind_activation": (set(), {"front_norm"}),
        "apart": (set(), set()),
    }
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_of_a_module_that_was_not_fused_nothing_is(training):
    found = share(Known(), Known(), image(), training=training)
    assert len(found.convolutions) == 5 and not found.fused
    assert found.left == ["behind_activation", "functional", "unit.0"]


class Partly(nn.Module):
    """Two units, one of which tracing does not understand, and a batch norm in front of a convolution."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.known = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU())
        self.between = nn.Conv2d(4, 4, 1)
        self.front = nn.Sequential(norm(4), nn.ReLU(), nn.MaxPool2d(1), nn.Conv2d(4, 4, 1))
        self.pre = nn.Sequential(norm(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.odd, self.odd_norm = nn.Conv2d(4, 4, 1), norm(4)

    def forward(self, x):
        x = self.between(self.known(x)) + 1
        x = self.pre(self.front(x) * 2)
        return self.odd_norm(self.odd(x).float()) if x.sum() < 1e9 else x


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_what_ran_fused_is_told_from_what_did_not(norm, monkeypatch):
    eager = Partly(norm)
    fused = copy.deepcopy(eager)
    resnet_fused.fuse(fused.known)
    resnet_fused.fuse(fused.pre)
    for training in (True, False):
        with resnet_fused.engine("library"):  # the table leaves so few pixels to eager
            found = share(eager, fused, image(), training=training)
        assert found.convolutions == {"known.0", "between", "front.3", "pre.2", "odd"}
        assert found.normalised == {"known.0", "between", "pre.2", "odd"}
        # "between" is behind a unit's ReLU, as all convolutions of a head are: what counts is that unit.
        ran = {"known.0", "between", "pre.2"}
        if training and norm is FrozenBatchNorm2d:
            ran = {"known.0", "pre.2"}  # nothing of such a batch norm is in the graph, but its own convolution
        assert found.fused == ran and found.left == sorted(found.normalised - ran)
    # The report says fused, yet the context is one in which the modules run as they are.
    monkeypatch.setattr("resnet_fused.surgery.execution.fusible", lambda x: False)
    for training in (True, False):
        assert not share(eager, fused, image(), training=training).fused


def test_a_weight_that_the_graph_has_elsewhere_too_is_not_fused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x):
            return self.unit[1](F.conv2d(self.unit(x), self.unit[0].weight))

    eager = Twice()
    fused = copy.deepcopy(eager)
    resnet_fused.fuse(fused.unit)
    for training in (True, False):
        found = share(eager, fused, image(), training=training)
        assert found.normalised == {"unit.0"} and not found.fused


class Drops(nn.Module):
    """An output that isn't a tensor, and half of it dropped in training."""

    def __init__(self):
        super().__init__()
        self.block = ConvBNRelu()
        self.dropout = nn.Dropout()

    def forward(self, x):
        x = self.dropout(self.block(x))
        return [x, {"mean": x.mean()}]


class Animal(zoo.Model):
    """A model of the zoo that is made here."""

    def build(self):
        return Drops()


def test_dropout_and_outputs_in_containers():
    outcome = zoo.Job(Animal("test", "drops")).run()
    assert not outcome.faults and not outcome.resnet
    for mode in zoo.MODES:
        assert outcome.shares[mode].fused == {"block.c"}
        assert outcome.checks[mode].draws == 1 and 0 < outcome.checks[mode].worst.severity <= 1


def shifted(model):
    model.block.n.bias.data.add_(1e-3)


def raising(model):
    raise RuntimeError("no such luck")


def raising_later(model):
    def forward(x):
        raise RuntimeError("not today")

    model.block.forward = forward


@pytest.mark.parametrize(
    "wrong, fault",
    [
        (shifted, "training: output: FAILED"),
        (raising, "fusing it: RuntimeError: no such luck"),
        (raising_later, "training, counting: RuntimeError: not today"),
    ],
)
def test_a_network_that_fusing_breaks_fails_the_run(wrong, fault, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(zoo, "MODELS", [Animal("torchvision", "good"), Animal("torchvision", "bad")])
    fuse, seen = resnet_fused.fuse, []

    def breaking(model):
        seen.append(model)
        if len(seen) == 2:
            wrong(model)
        return fuse(model)

    monkeypatch.setattr(resnet_fused, "fuse", breaking)
    assert main(["--zoo", "--output", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "fault in torchvision:bad" in shown and "fault in torchvision:good" not in shown
    assert "CHECKS FAILED" in shown
    good, bad = results(tmp_path, "zoo.json")["outcomes"]
    assert not good["faults"] and any(f.startswith(fault) for f in bad["faults"])
    if wrong is shifted:
        assert bad["training"]["draws"] == bad["inference"]["draws"] == zoo.DRAWS
        assert bad["training"]["severity"] > 1 and bad["inference"]["severity"] > 1


def test_a_library_that_is_not_there_is_named(tmp_path, capsys, monkeypatch):
    absent = zoo.Model("no_such_library", "resnet18")
    monkeypatch.setattr(zoo, "MODELS", [absent, absent, Animal("torchvision", "drops")])
    assert main(["--zoo", "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "no_such_library cannot be imported, 2 models are left out" in shown
    assert [o["subject"] for o in results(tmp_path, "zoo.json")["outcomes"]] == ["torchvision:drops"]
    monkeypatch.setattr(zoo, "MODELS", [absent])
    with pytest.raises(SystemExit, match="no model of the zoo"):
        main(["--zoo", "--output", str(tmp_path)])


def test_the_choice_of_models():
    assert len(zoo.MODELS) >= 80 and len({str(m) for m in zoo.MODELS}) == len(zoo.MODELS)
    assert zoo.select("") == zoo.MODELS
    chosen = set(map(str, zoo.select("resnet50")))
    assert {"torchvision:resnet50", "timm:resnet50", "torchvision:fcn_resnet50"} <= chosen
    assert {m.package for m in zoo.select("timm:res*")} == {"timm"}
    assert [str(m) for m in zoo.select("torchvision:resnet1?")] == ["torchvision:resnet18"]
    assert parse(["--zoo"]).zoo == "" and parse([]).zoo is None and parse([]).blocks == ""
    assert parse(["--zoo"]).blocks is None and parse(["--zoo", "timm:*"]).zoo == "timm:*"


def test_batch_norms_are_settled():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4))
    nn.init.zeros_(model[1].weight)
    zoo.settle(model, image())
    assert model[1].weight.min() >= 0.5 and model[1].momentum == 0.1
    assert not model[4]._forward_pre_hooks
    normalised = model[:2].eval()(image())
    torch.testing.assert_close(normalised.mean((0, 2, 3)), model[1].bias)
    torch.testing.assert_close(normalised.std((0, 2, 3)), model[1].weight, rtol=1e-3, atol=0)
    torch.testing.assert_close(model.train()(image()).mean((0, 2, 3)), model[4].bias)


@pytest.mark.slow(reason="three models, each eager, fused and folded")
def test_models_of_the_zoo_from_the_command_line_to_the_file(tmp_path, capsys):
    chosen = "torchvision:s*"
    assert main(["--zoo", chosen, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "all models" in shown and "all checks passed" in shown
    found = {o["subject"]: o for o in results(tmp_path, "zoo.json")["outcomes"]}
    assert set(found) == {f"torchvision:{n}" for n in ("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "squeezenet1_1")}
    squeeze, shuffle = found["torchvision:squeezenet1_1"], found["torchvision:shufflenet_v2_x0_5"]
    assert squeeze["training"]["convolutions"] == 26 and squeeze["training"]["with_batch_norm"] == 0
    for mode in zoo.MODES:
        assert shuffle[mode]["convolutions"] == shuffle[mode]["with_batch_norm"] == shuffle[mode]["fused"] == 56
        assert not shuffle[mode]["left"] and shuffle[mode]["severity"] <= 1


def test_a_resnet_of_torchvision():
    (model,) = zoo.select("torchvision:resnet18")
    outcome = zoo.Job(model).run()
    assert outcome.resnet and not outcome.faults
    for mode in zoo.MODES:
        counts = outcome.shares[mode]
        assert len(counts.convolutions) == len(counts.normalised) == len(counts.fused) == 20
    rows = [line.split() for line in zoo.summary([outcome]).splitlines()]
    of_resnets = [row for row in rows if row[:3] == ["ResNets", "of", "torchvision"]]
    assert [row[3:] for row in of_resnets] == [
        ["1", mode, "20", "20", "20", "100.0", "%", "100.0", "%", "1"] for mode in zoo.MODES
    ]


def test_timm_models_are_built_without_weights():
    pytest.importorskip("timm")
    network = next(model for model in zoo.MODELS if str(model) == "timm:resnet18").build()
    assert zoo.is_resnet(network) and network.fc.out_features == 10
    assert not zoo.is_resnet(nn.Sequential(network))
    assert len(fused_share.convolution_weights(network)) == 20
