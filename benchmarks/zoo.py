# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The zoo: networks of torchvision and timm as they come, how much of each runs fused, and whether it is right.

Everything is float32 on the CPU, without pretrained weights, and narrow where a constructor allows it: what counts is
how the networks are written.
"""

from __future__ import annotations

import copy
import fnmatch
import importlib
import operator
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

import resnet_fused
from benchmarks import report
from benchmarks.fused_share import Share, is_norm, share, tensors_of
from resnet_fused import engine, testing
from resnet_fused.surgery.layers import frozen_batch_norm

# In the last stage 36 values per channel: few of them amplify rounding without bound, in eager as well.
BATCH = 4  # images
SIZE = 96  # pixels
DRAWS = 10  # inputs, at most; with 5, flips of ReLUs alone failed one network of 147, in the reference engine as well
MODES = ("training", "inference")


@dataclass(frozen=True)
class Model:
    """A network of a library: a registered name, or below torchvision.models a function's path with dots in it.

    ``part``: the child that is looked at, instead of the whole; large linear layers take time and say nothing here.
    """

    package: str
    name: str
    arguments: dict[str, object] = field(default_factory=dict)
    part: str = ""

    def __str__(self) -> str:
        return f"{self.package}:{self.name}"

    def build(self) -> nn.Module:
        library = importlib.import_module(self.package)
        if self.package == "timm":
            network = library.create_model(self.name, **self.arguments)
        elif "." in self.name:
            network = operator.attrgetter(self.name)(library.models)(**self.arguments)
        else:
            network = library.models.get_model(self.name, weights=None, **self.arguments)
        return network.get_submodule(self.part)


def models_of(library: str, names: str, part: str = "", **arguments: object) -> list[Model]:
    """The models of these names, which blanks separate."""
    return [Model(library, name, {"num_classes": 10, **arguments}, part) for name in names.split()]


TORCHVISION = [
    *models_of(
        "torchvision",
        "resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d resnext101_64x4d "
        "wide_resnet50_2 wide_resnet101_2 regnet_x_400mf regnet_x_800mf regnet_y_400mf regnet_y_800mf "
        "densenet121 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 "
        "shufflenet_v2_x0_5 shufflenet_v2_x1_0 efficientnet_b0 efficientnet_v2_s squeezenet1_1",
    ),
    *models_of("torchvision", "alexnet vgg11 vgg11_bn", part="features"),
    *models_of("torchvision", "googlenet", init_weights=False),
    # The auxiliary head takes images of 299 pixels at least.
    *models_of("torchvision", "inception_v3", init_weights=False, aux_logits=False),
    *models_of("torchvision", "fcn_resnet50 deeplabv3_resnet50 lraspp_mobilenet_v3_large", weights_backbone=None),
    *models_of("torchvision", "quantized_resnet18", quantize=False),
    Model(
        "torchvision", "detection.backbone_utils.resnet_fpn_backbone", {"backbone_name": "resnet50", "weights": None}
    ),
]
TIMM = [
    *models_of(
        "timm",
        "resnet10t resnet18 resnet18d resnet26 resnet26d resnet26t resnet34 resnet34d resnet50 resnet50c resnet50d "
        "resnet50s resnet50t resnet101 resnet152 resnext50_32x4d resnext50d_32x4d wide_resnet50_2 "
        "seresnet18 seresnet50 seresnext26d_32x4d seresnext50_32x4d ecaresnet26t ecaresnet50d ecaresnetlight "
        "ecaresnext26t_32x4d resnetaa34d resnetaa50 resnetaa50d resnetblur18 resnetblur50 resnetblur50d resnetrs50 "
        "skresnet18 skresnet50 skresnext50_32x4d res2net50_14w_8s res2net50_26w_4s res2net50d res2next50 "
        "resnest14d resnest26d resnest50d_4s2x40d senet154",
        channels=(64, 64, 64, 64),
    ),
    *models_of(
        "timm",
        "resnetv2_18 resnetv2_50 resnetv2_50d legacy_seresnet18 legacy_seresnext26_32x4d tresnet_m "
        "regnetx_002 regnety_002 regnetz_005 regnetv_040 gernet_s repvgg_a0 mobileone_s0 resnext26ts gcresnet33ts "
        "dla34 dla46_c dla46x_c dla60_res2net darknet17 cspresnet50 cspresnext50 cspdarknet53 cs3darknet_s "
        "vovnet39a ese_vovnet19b_slim ese_vovnet19b_dw eca_vovnet39b densenet121 densenetblur121d dpn48b dpn68 "
        "hrnet_w18_small inception_v3 inception_v4 inception_resnet_v2 xception41 xception41p legacy_xception "
        "selecsls42 hgnet_tiny hgnetv2_b0 efficientnet_b0 tf_efficientnet_b0 efficientnet_lite0 efficientnet_es "
        "efficientnetv2_rw_t mobilenetv1_100 mobilenetv2_050 mobilenetv3_small_050 mobilenetv3_large_100 "
        "mobilenetv4_conv_small lcnet_050 fbnetc_100 hardcorenas_a mnasnet_small spnasnet_100 semnasnet_075 "
        "tinynet_e mixnet_s ghostnet_050 ghostnetv2_100 repghostnet_050 rexnet_100 repvit_m0_9 cspnext_tiny "
        "fasternet_t0 starnet_s050",
    ),
]
MODELS = [*TORCHVISION, *TIMM]


def missing_libraries() -> dict[str, str]:
    """The libraries that cannot be imported, each with the reason."""
    found = {}
    for library in dict.fromkeys(model.package for model in MODELS):
        try:
            importlib.import_module(library)
        except ImportError as error:
            found[library] = str(error)
    return found


def select(pattern: str) -> list[Model]:
    """The models whose name, such as timm:resnet50, contains ``pattern`` or matches it as a file name would."""
    return [m for m in MODELS if pattern in str(m) or fnmatch.fnmatchcase(str(m), pattern)]


def is_resnet(network: nn.Module) -> bool:
    """Whether it is of the class that torchvision or timm calls ResNet."""
    classes = [(cls.__module__, cls.__name__) for cls in type(network).__mro__]
    return any((f"{library}.models.resnet", "ResNet") in classes for library in ("torchvision", "timm"))


class Single(nn.Module):
    """``network`` with all its outputs in one tensor, which is what the tolerance policy compares."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        outputs = list(tensors_of(self.network(x)))
        return outputs[0] if len(outputs) == 1 else torch.cat([t.flatten() for t in outputs])


def draw(index: int) -> Tensor:
    """An input: white noise, of which all pixels differ."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)


def deterministic(network: nn.Module) -> None:
    """Drop nothing, so that all copies see the same network."""
    module: Any
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or type(module).__name__ == "StochasticDepth":
            module.p = 0.0
        elif hasattr(module, "drop_prob"):
            module.drop_prob = 0.0


def settle(network: nn.Module, x: Tensor) -> None:
    """Batch norms as after some training: weights that a mix-up would show, the statistics of ``x``.

    Fresh ones have weights of one, or of zero at the end of a branch, which hides all that is in it. In inference
    activations of a deep network would grow or vanish.
    """

    def take_statistics(module: Any, arguments: tuple[Tensor]) -> None:
        module.running_mean.copy_(arguments[0].mean((0, 2, 3)))
        module.running_var.copy_(arguments[0].var((0, 2, 3)))

    generator = torch.Generator().manual_seed(1)
    momenta, handles = {}, []
    module: Any
    for module in network.modules():
        if not is_norm(module):
            continue
        for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5)):
            if tensor is not None:
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
        if frozen_batch_norm(module):
            handles.append(module.register_forward_pre_hook(take_statistics))
        else:
            momenta[module], module.momentum = module.momentum, 1.0
    with torch.no_grad():
        network.train()(x)
    for module, momentum in momenta.items():
        module.momentum = momentum
    for handle in handles:
        handle.remove()


@dataclass(frozen=True)
class Check:
    """The tolerance policy's verdict in one mode."""

    worst: testing.Comparison  # of all tensors, each in the draw that suits it best
    draws: int
    failures: list[str]

    def __str__(self) -> str:
        return f"{self.worst.severity:.2f}{' FAILED' if self.failures else ''}"


@dataclass(frozen=True)
class Outcome:
    """What was found: per mode the share and the check, and what is wrong altogether."""

    case: Model
    resnet: bool
    shares: dict[str, Share]
    checks: dict[str, Check]
    exception: str = ""

    @property
    def faults(self) -> list[str]:
        found = [f"{mode}: {failure}" for mode, check in self.checks.items() for failure in check.failures]
        return [self.exception, *found] if self.exception else found


def check(eager: nn.Module, fused: nn.Module, *, training: bool) -> Check:
    """Compare the networks, in training with all gradients.

    Every tensor has to be within the policy in one of ``DRAWS`` inputs. Where an activation in front of a ReLU is
    zero but for rounding, eager and fused may see it on different sides of zero, by chance; what is wrong is wrong on
    every input.
    """
    best: dict[str, testing.Comparison] = {}
    eager, fused = (Single(network).train(training) for network in (eager, fused))
    for index in range(DRAWS):
        x = draw(index)
        reference = testing.observe_reference(eager, x, gradients=training)
        found, seen = (testing.observe(network, x, gradients=training) for network in (fused, eager))
        wanted = {name: t for name, t in seen.items() if name not in best or not best[name].passed}
        for c in testing.compare_observations(found, wanted, reference, precision=x.dtype):
            if c.name not in best or c.severity < best[c.name].severity:
                best[c.name] = c
        failures = [str(c) for c in best.values() if not c.passed]
        if not failures:
            break
    return Check(max(best.values(), key=lambda c: c.severity), index + 1, failures)


@dataclass(frozen=True)
class Job:
    """A model to be looked at."""

    case: Model

    def run(self) -> Outcome:
        """Count and compare; an exception is a result as well."""
        torch.manual_seed(0)
        resnet, shares, checks, stage = False, {}, {}, "building it"
        try:
            eager = self.case.build()
            resnet = is_resnet(eager)
            deterministic(eager)
            x = draw(0)
            stage = "running it eager"
            settle(eager, x)
            stage = "fusing it"
            fused = copy.deepcopy(eager)
            resnet_fused.fuse(fused)
            for mode in MODES:
                training = mode == "training"
                stage = f"{mode}, counting"
                with engine("library"):  # which leaves no block to eager for being small
                    shares[mode] = share(eager, fused, x, training=training)
                stage = f"{mode}, comparing"
                checks[mode] = check(eager, fused, training=training)
        except Exception as error:
            return Outcome(self.case, resnet, shares, checks, f"{stage}: {type(error).__name__}: {error}")
        return Outcome(self.case, resnet, shares, checks)


def percentage(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""


def progress(outcome: Outcome) -> str:
    """What the line of progress says of the outcome."""
    if outcome.exception:
        return textwrap.shorten(outcome.exception, 200)
    found = []
    for mode, counts in outcome.shares.items():
        found.append(f"{mode} {len(counts.fused)} of {len(counts.normalised)}, error {outcome.checks[mode]}")
    return "; ".join(found)


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per model; the error is the worst one over what the policy allows."""
    rows = []
    for o in outcomes:
        cells: list[str] = []
        for mode in MODES:
            counts = o.shares.get(mode)
            cells.append(percentage(len(counts.fused), len(counts.normalised)) if counts else "")
            cells.append(str(o.checks.get(mode, "raised")))
        counts = o.shares.get(MODES[0])
        sizes = [str(len(counts.convolutions)), str(len(counts.normalised))] if counts else ["", ""]
        rows.append((str(o.case), *sizes, *cells))
    columns = [column for mode in MODES for column in (f"fused, {mode}", "error")]
    return report.table(("", "convolutions", "with batch norm", *columns), rows)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Totals over all models and over ResNets."""
    groups = {
        "all models": list(outcomes),
        **{
            f"ResNets of {library}": [o for o in outcomes if o.resnet and o.case.package == library]
            for library in ("torchvision", "timm")
        },
    }
    rows = []
    for name, group in groups.items():
        for mode in MODES:
            shares = [o.shares[mode] for o in group if mode in o.shares]
            run, normalised, fused = (
                sum(len(getattr(share, part)) for share in shares) for part in ("convolutions", "normalised", "fused")
            )
            of = (percentage(fused, run), percentage(fused, normalised))
            complete = sum(not share.left for share in shares)
            rows.append((name, str(len(group)), mode, str(run), str(normalised), str(fused), *of, str(complete)))
    header = ("", "models", "mode", "convolutions", "with batch norm", "fused", "of all", "of those", "complete models")
    return report.table(header, rows)


def records(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """The outcomes as JSON; severity: the worst error over what the policy allows."""
    versions = {library: metadata.version(library) for library in {o.case.package for o in outcomes}}
    found = []
    for o in outcomes:
        record: dict[str, Any] = {
            "subject": str(o.case),
            "version": versions[o.case.package],
            "arguments": o.case.arguments,
            "batch": BATCH,
            "pixels": SIZE,
            "part": o.case.part,
            "resnet": o.resnet,
            "faults": o.faults,
        }
        for mode, counts in o.shares.items():
            record[mode] = {
                "convolutions": len(counts.convolutions),
                "with_batch_norm": len(counts.normalised),
                "fused": len(counts.fused),
                "left": counts.left,
            }
            if mode in o.checks:
                verdict = o.checks[mode]
                record[mode] |= {
                    "severity": verdict.worst.severity,
                    "worst": str(verdict.worst),
                    "draws": verdict.draws,
                }
        found.append(record)
    return found
