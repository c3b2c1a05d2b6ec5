# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The main job: fused against eager on real photographs. The exit status is 1 if a numerical check fails."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import (
    bandwidth,
    blocks,
    bottleneck,
    compare,
    convolutions,
    depth,
    layers,
    networks,
    overhead,
    predict,
    report,
    small,
    zoo,
)
from benchmarks.cases import CUDA_BATCH, DTYPES, MODES, Outcome, Settings, dtypes_of
from benchmarks.timing import Race
from resnet_fused import ops

RESULTS = Path(__file__).parent / "results"
BATCH = 8  # images, on a CPU where nothing is chosen: blocks and networks are done in minutes

Found = TypeVar("Found", Outcome, bandwidth.Outcome, convolutions.Outcome, small.Outcome, zoo.Outcome)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Fused against eager PyTorch on real photographs: numerical checks, interleaved timing, memory. "
        "Without a choice: the blocks of ResNet-18 and ResNet-50, then both networks; on a GPU the bandwidth, too. "
        "`python -m benchmarks compare A.json B.json` holds two files of results against each other.",
    )
    choice = parser.add_argument_group("what to run")
    pattern: dict[str, Any] = {"nargs": "?", "const": "", "metavar": "PART"}
    choice.add_argument(
        "--blocks",
        **pattern,
        help="blocks whose name contains PART, such as resnet50.layer1; also resnext50_32x4d, mobilenet_v2",
    )
    choice.add_argument("--networks", **pattern, help="networks whose name contains PART, such as resnet50")
    choice.add_argument("--small", action="store_true", help="small and unusual work, eager against fused, on the CPU")
    choice.add_argument("--profile", **pattern, help="where the time of such networks goes, fused, on the CPU")
    choice.add_argument("--overhead", action="store_true", help="what a call of a block costs besides its kernels")
    choice.add_argument("--depth", action="store_true", help="the revolution of depth: AlexNet to ResNet-152")
    choice.add_argument("--bottleneck", action="store_true", help="a bottleneck against a plain 3x3 convolution")
    choice.add_argument(
        "--zoo", **pattern, help="what of torchvision's and timm's networks runs fused; PART: resnet50, 'timm:dla*'"
    )
    sizes: dict[str, Any] = {"nargs": "*", "type": float, "metavar": "MB"}
    choice.add_argument("--bandwidth", **sizes, help="the kernels against a copy, on activations of so many MB")
    choice.add_argument("--convolutions", **pattern, help="native convolutions against the library's")
    choice.add_argument(
        "--predict", action="store_true", help="print a model of training on GPUs that aren't here, and run nothing"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--mode", choices=MODES, action="append", help="only this mode")
    how.add_argument("--dtype", choices=list(DTYPES), action="append", help="only this dtype; float16 on GPUs")
    usual = f"of blocks {blocks.BATCH}, of networks {networks.BATCH}, or {BATCH} without a choice"
    usual += f"; on a GPU {CUDA_BATCH}, of convolutions {' and '.join(map(str, convolutions.BATCHES))}"
    how.add_argument("--batch", type=int, metavar="N", help=f"images per step (default: {usual})")
    how.add_argument("--size", type=int, default=224, metavar="PIXELS", help="height and width (default: 224)")
    how.add_argument("--repeats", type=int, metavar="N", help="rounds per case (default: 3 of processes, else by time)")
    usual = f"{blocks.SECONDS:g}, of each process of a network {networks.SECONDS:g}"
    how.add_argument("--seconds", type=float, metavar="S", help=f"of timing, per case (default: of a block {usual})")
    how.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        help="whether others take part: torch.compile; in inference of networks on the CPU also ONNX Runtime and "
        "OpenVINO (default: on a GPU)",
    )
    how.add_argument(
        "--native",
        action=argparse.BooleanOptionalAction,
        help="whether fused with native convolutions takes part (default: on a GPU, where there are any)",
    )
    how.add_argument("--plan", action="store_true", help="of blocks: plan each first, see docs/planning.md")
    how.add_argument("--quick", action="store_true", help="2 images of 64 pixels, 2 rounds: to see it work")
    how.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    how.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    options = parser.parse_args(arguments)
    device = options.device
    if options.predict and (arguments or sys.argv[1:]) != ["--predict"]:
        parser.error("--predict: stands alone")
    options.dtype = tuple(options.dtype or dtypes_of(device))
    for dtype in options.dtype:
        if dtype not in dtypes_of(device):
            parser.error(f"--dtype {dtype}: not measured on {device}")
    if options.peers is None:
        options.peers = device.type == "cuda"
    not_native = ops.native_device_reason(device)
    if options.native is None:
        options.native = device.type == "cuda" and not_native is None
    if options.native and not_native:
        parser.error(f"--native: {not_native}")
    if options.convolutions is not None and not_native:
        parser.error(f"--convolutions: {not_native}")
    on_cpu = {
        "--small": options.small,
        "--overhead": options.overhead,
        "--profile": options.profile is not None,
        "--zoo": options.zoo is not None,
    }
    for name, asked in on_cpu.items():
        if asked and device.type != "cpu":
            parser.error(f"{name}: on the CPU only")
    chosen = (options.blocks, options.networks, options.bandwidth, options.convolutions, options.profile, options.zoo)
    flags = (options.depth, options.bottleneck, options.small, options.overhead)
    if not any(flags) and all(choice is None for choice in chosen):
        options.blocks = options.networks = ""
        if device.type == "cpu" and not options.quick:
            options.batch = options.batch or BATCH
        if device.type == "cuda" and ops.has_kernels(device):
            options.bandwidth = []
    if options.bandwidth is not None and not ops.has_kernels(device):
        parser.error(f"--bandwidth: this build of resnet_fused has no kernels for {device}")
    return options


def execute(jobs: Iterable, total: int, describe: Callable[[Found], str]) -> list[Found]:
    """Run all jobs, one line of progress each."""
    outcomes = []
    for index, job in enumerate(jobs, 1):
        print(f"[{index:{len(str(total))}}/{total}] {job.case}: ", end="", flush=True)
        start = time.perf_counter()
        outcome = job.run()
        outcomes.append(outcome)
        elapsed = time.perf_counter() - start
        disturbed = ", disturbed" if not isinstance(outcome, zoo.Outcome) and outcome.race.disturbed else ""
        print(f"{describe(outcome)}{disturbed}  ({elapsed:.1f} s)", flush=True)
    return outcomes


def run_blocks_and_networks(settings: Settings, part: str | None, network: str | None, folder: Path) -> list[Outcome]:
    chosen, names = blocks.select(part), networks.select(network)
    found = execute(
        chain(blocks.jobs(chosen, settings), networks.jobs(names, settings)),
        settings.cases_per_subject * (sum(map(len, chosen.values())) + len(names)),
        report.progress,
    )
    if not found:
        raise SystemExit("no block or network has such a name")
    print("", report.outcome_table(found), "", report.summary(found), "", sep="\n")
    report.write_json(folder / "residual.json", settings.device, [report.as_record(outcome) for outcome in found])
    report.plot_speed(found, folder / "speed.png", settings.device)
    report.plot_kept(found, folder / "kept.png")
    return found


def run_depth(settings: Settings, folder: Path) -> list[Outcome]:
    found = execute(depth.jobs(settings), settings.cases_per_subject * len(depth.LAYERS), report.progress)
    print("", depth.table(found), "", sep="\n")
    report.write_json(folder / "depth.json", settings.device, depth.records(found))
    depth.plot(found, folder / "depth.png")
    return found


def run_small(settings: Settings, folder: Path) -> list[small.Outcome]:
    found = execute(small.jobs(settings), len(small.select(settings)), small.progress)
    print("", small.table(found), "", sep="\n")
    report.write_json(folder / "small.json", settings.device, small.records(found))
    return found


def run_overhead(settings: Settings, folder: Path) -> None:
    found = list(overhead.measure(20 if settings.quick else 1000))
    print("", overhead.table(found), "", sep="\n")
    report.write_json(folder / "overhead.json", settings.device, overhead.records(found))


def run_profile(settings: Settings, part: str, folder: Path) -> None:
    found = []
    for profile in layers.profiles(networks.select(part), settings):
        print("", layers.table(profile), sep="\n", flush=True)
        found.append(layers.record(profile))
    if not found:
        raise SystemExit("no network has such a name")
    print()
    report.write_json(folder / "layers.json", settings.device, found)


def run_zoo(pattern: str, settings: Settings, folder: Path) -> list[zoo.Outcome]:
    chosen, missing = zoo.select(pattern), zoo.missing_libraries()
    for library, reason in missing.items():
        left = sum(model.package == library for model in chosen)
        print(f"{library} cannot be imported, {left} models are left out: {reason}")
    chosen = [model for model in chosen if model.package not in missing]
    if not chosen:
        raise SystemExit("no model of the zoo that can be imported has such a name")
    found = execute(map(zoo.Job, chosen), len(chosen), zoo.progress)
    print("", zoo.table(found), "", zoo.summary(found), "", sep="\n")
    report.write_json(folder / "zoo.json", settings.device, zoo.records(found))
    return found


def run_bottleneck(settings: Settings, folder: Path) -> list[Outcome]:
    found = execute(bottleneck.jobs(settings), settings.cases_per_subject * 2, report.progress)
    print("", bottleneck.table(found, settings.size), "", sep="\n")
    report.write_json(folder / "bottleneck.json", settings.device, bottleneck.records(found, settings.size))
    bottleneck.plot(found, folder / "bottleneck.png")
    return found


def run_bandwidth(settings: Settings, megabytes: Sequence[float], folder: Path) -> list[bandwidth.Outcome]:
    sizes = bandwidth.sizes(settings, megabytes)
    total = len(settings.dtypes) * len(sizes) * len(bandwidth.KERNELS)
    found = execute(bandwidth.jobs(settings, sizes), total, bandwidth.progress)
    print("", bandwidth.table(found), "", sep="\n")
    report.write_json(folder / "bandwidth.json", settings.device, bandwidth.records(found))
    bandwidth.plot(found, folder / "bandwidth.png", settings.device)
    return found


def run_convolutions(settings: Settings, part: str, folder: Path) -> list[convolutions.Outcome]:
    chosen, dtypes, left = convolutions.native_only(convolutions.select(part, settings.size), settings)
    for name, reason in left.items():
        print(f"not native: {name}: {reason}")
    total = len(chosen) * len(dtypes) * convolutions.cases_per_shape(settings)
    if not total:
        raise SystemExit("no native convolution has such a name and dtype")
    found = execute(convolutions.jobs(chosen, dtypes, settings), total, convolutions.progress)
    print("", convolutions.table(found), "", convolutions.summary(found), "", sep="\n")
    report.write_json(folder / "convolutions.json", settings.device, convolutions.records(found))
    convolutions.plot(found, folder / "convolutions.png", settings.device)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["compare"]:
        return compare.main(given[1:])
    options = parse(arguments)
    if options.predict:  # alone, so that nothing measured stands beside it
        print(predict.report())
        return 0
    quick = options.quick
    settings = Settings(
        options.device,
        modes=tuple(options.mode or MODES),
        dtypes=options.dtype,
        size=64 if quick else options.size,
        batch=options.batch or (2 if quick else None),
        rounds=options.repeats or (2 if quick else None),
        seconds=options.seconds,
        peers=options.peers,
        native=options.native,
        plan=options.plan,
        quick=quick,
    )
    if settings.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as training scripts do, for all contestants
    folder = options.output / report.slug(report.device_name(settings.device))
    start = time.perf_counter()

    outcomes: list[Outcome] = []
    if options.depth:
        outcomes += run_depth(settings, folder)
    if options.bottleneck:
        outcomes += run_bottleneck(settings, folder)
    if options.blocks is not None or options.networks is not None:
        outcomes += run_blocks_and_networks(settings, options.blocks, options.networks, folder)
    checked: list[Outcome | convolutions.Outcome] = list(outcomes)
    if options.convolutions is not None:
        checked += run_convolutions(settings, options.convolutions, folder)
    few = run_small(settings, folder) if options.small else []
    races: list[Race] = [outcome.race for outcome in (*checked, *few)]
    if options.overhead:
        run_overhead(settings, folder)
    if options.profile is not None:
        run_profile(settings, options.profile, folder)
    animals = [] if options.zoo is None else run_zoo(options.zoo, settings, folder)
    if options.bandwidth is not None:
        races += [outcome.race for outcome in run_bandwidth(settings, options.bandwidth, folder)]

    for absence in report.absences([*outcomes, *few]):
        print(f"missing from the race: {absence}")
    for outcome in checked:
        for failure in outcome.check.failures:
            print(f"outside the tolerance policy: {outcome.case}: {failure}")
    faulty = [outcome for outcome in animals if outcome.faults]
    for animal in faulty:
        print(f"fault in {animal.case}, {len(animal.faults)}: {textwrap.shorten(animal.faults[0], 300)}")
    disturbed = sum(race.disturbed for race in races)
    if disturbed:
        print(f"other processes were busy during {disturbed} of {len(races)} cases: don't trust those times")
    passed = not faulty and all(outcome.check.passed for outcome in checked)
    verdict = "" if not checked and not animals else "all checks passed; " if passed else "CHECKS FAILED; "
    print(f"{verdict}{time.perf_counter() - start:.0f} s; see {folder}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
