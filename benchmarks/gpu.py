# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""For whoever meets a GPU: build, test, plan and race on it within minutes, the most important first (`make gpu`).

Each step is a process with a limit of time, stopped with all its children when that is over; what it printed and how
it ended are written down at once, so that whatever happens later, what was found stays. What needs the network is no
part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
MINUTES = 9.0
SHORTEST = 5.0  # seconds: what has less is not started
SLOWER = 10  # times the limits with --quick, which is for the simulator
GRACE = 3.0  # seconds to stop in
ABSENT = "absent"

# Of each kind some: the one-pass kernels, the native convolutions, a network's training, what explain counts.
TESTS = (
    *("tests/test_conv.py", "tests/test_cuda.py", "tests/test_explain.py", "-k"),
    "test_fprop or test_dgrad or test_wgrad or test_channels or same_bits or training_is_the_cpus or test_blocks",
)
FEW_TESTS = ("tests/test_conv.py", "-k", "test_padding_is_zero_behind_the_prologue or test_statistics_with_large_mean")

# Networks and whether they train, in the dtypes and under the settings of the races, which follow these plans.
PLANS = """
import torch, torchvision, resnet_fused
torch.backends.cudnn.benchmark = True
for name, training in {networks}:
    of = {{"device": "cuda", "dtype": torch.float32 if training else torch.bfloat16}}
    model = torchvision.models.get_model(name).to(**of).to(memory_format=torch.channels_last)
    resnet_fused.fuse(model)
    x = torch.randn({images}, 3, {size}, {size}, **of).to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16, enabled=training):
        resnet_fused.plan(model, x, training=training)
"""
USUAL = {
    "networks": [("resnet50", True), ("resnet50", False), ("resnet18", True), ("resnet18", False)],
    "images": 64,
    "size": 224,
}
TINY = {"networks": [("resnet50", False), ("resnet18", True)], "images": 2, "size": 32}


@dataclass(frozen=True)
class Step:
    """``limit``: seconds at most; without a command there is nothing to run here."""

    name: str
    command: list[str]
    limit: float
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a step ended.

    ``outcome``: "passed", "failed (status)", "out of time", or "absent" or another reason why it was not started.
    """

    name: str
    command: str
    outcome: str
    seconds: float


def races(folder: Path, quick: bool) -> list[Step]:
    """The benchmarks in the order of importance, each with a folder of its own for its results."""
    network = ["--networks", "resnet50"]
    chosen = (
        ("training", [*network, "--mode", "training", "--no-peers"], 90),
        ("inference", [*network, "--mode", "inference", "--no-peers"], 60),
        # By themselves: compiling takes minutes on some machines.
        ("compiled-training", [*network, "--mode", "training", "--peers", "--no-native"], 120),
        ("compiled-inference", [*network, "--mode", "inference", "--peers", "--no-native"], 60),
        ("blocks", ["--blocks", "resnet18.layer4.1" if quick else "resnet50", "--no-peers"], 60),
        ("convolutions", ["--convolutions", *(("resnet18.layer4.1",) if quick else ("resnet50", "--batch", "64"))], 90),
        ("bandwidth", ["--bandwidth", *([] if quick else ["32", "128"])], 40),
    )
    run = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--dtype", "bfloat16"]
    small = ["--quick"] if quick else []
    # Images of other sizes, as in the checks, are left to the shipped table: planning takes seconds for each kind.
    environ = cache(folder) | {"RESNET_FUSED_PLAN": "file"}
    return [
        Step(name, [*run, *what, *small, "--output", str(folder / name)], limit, environ)
        for name, what, limit in chosen
    ]


def cache(folder: Path) -> dict[str, str]:
    """Plans are a result, too, and none of the user's."""
    return {"RESNET_FUSED_CACHE": str(folder)}


def steps(folder: Path, *, build: bool, quick: bool) -> list[Step]:
    """All that is to be done, in order."""
    major, minor = torch.cuda.get_device_capability()
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    pytest += ["-m", "cuda and not slow and not further"]
    few, more = ([str(ROOT / a) if a.startswith("tests/") else a for a in args] for args in (FEW_TESTS, TESTS))
    found = []
    if build:
        arch = f"{major}.{minor}{'a' if (major, minor) == (9, 0) else ''}"
        environ = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch, "MAX_JOBS": str(os.cpu_count() or 1)}
        found.append(Step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 200, environ))
    found.append(Step("self-check", [sys.executable, "-m", "resnet_fused"], 20))
    found.append(Step("tests", [*pytest, *(few if quick else more)], 60))
    sanitizer = shutil.which("compute-sanitizer")
    checked = [sanitizer, "--error-exitcode", "1", *pytest, *few] if sanitizer else []
    found.append(Step("compute-sanitizer", checked, 30))
    plans = PLANS.format(**(TINY if quick else USUAL))
    found.append(Step("plan", [sys.executable, "-c", plans], 80, cache(folder)))
    return found + races(folder, quick)


def run(step: Step, seconds: float, log: Path) -> Ended:
    """Run a step for so many seconds at most, what it prints going to ``log`` and the terminal's last lines."""
    command = " ".join(step.command)
    if not step.command:
        return Ended(step.name, command, ABSENT, 0.0)
    if seconds < SHORTEST:
        return Ended(step.name, command, "not started: the time was over", 0.0)
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            step.command,
            cwd=None if os.environ.get("GPUSIM") else ROOT,
            env=os.environ | step.environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
            outcome = "passed" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
        except BaseException:
            stop(process)
            raise
        if outcome == "out of time":
            stop(process)
    return Ended(step.name, command, outcome, time.perf_counter() - start)


def stop(process: subprocess.Popen) -> None:
    """End it and its children."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(GRACE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def environment() -> dict[str, Any]:
    """The whole of it, asked for in a process, since the extension was perhaps not there when this one started."""
    code = (
        "import json, torch; from benchmarks import report; print(json.dumps(report.environment(torch.device('cuda'))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        return {"torch": torch.__version__, "error": result.stderr.strip().splitlines()[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def measured(folder: Path) -> dict[str, float]:
    """Images per second of ResNet-50's training by contestant, as far as it was raced."""
    rates: dict[str, float] = {}
    for race in ("compiled-training", "training"):
        for path in (folder / race).glob("*/residual.json"):
            for o in json.loads(path.read_text())["outcomes"]:
                if o["subject"] == "resnet50":
                    times = {k.removesuffix("_seconds"): v for k, v in o.items() if k.endswith("_seconds")}
                    rates |= {name: o["batch"] / t["median"] for name, t in times.items()}
    return rates


def predicted(device: str) -> dict[str, float]:
    """Images per second of ResNet-50's training by variant as benchmarks/predict.py has it; none for another card."""
    from benchmarks import predict

    for card in predict.CARDS:
        if card.name in device:
            return {name: predict.BATCH / s.total for name, s in predict.predicted(card, "resnet50").items()}
    return {}


# Which of the model's variants a contestant is.
VARIANTS = {"eager": "eager", "fused": "best mix", "native": "native"}


def summary(folder: Path, ended: Sequence[Ended], device: str) -> str:
    """What became of each step, the predicted figures beside the measured ones, and what the races printed."""
    lines = [f"# {device}", "", "| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {e.name} | {e.outcome} | {e.seconds:.0f} |" for e in ended]
    found, model = measured(folder), predicted(device)
    if found:
        lines += ["", "| training, images/s | measured | PREDICTED (benchmarks/predict.py) |", "|---|---|---|"]
        for name, rate in found.items():
            guess = model.get(VARIANTS.get(name, ""))
            lines.append(f"| {name} | {rate:.1f} | {'' if guess is None else f'{guess:.0f}'} |")
    for e in ended:
        log = folder / f"{e.name}.log"
        if log.exists():
            printed = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace")).strip()
            last = printed.splitlines()[-60:]
            lines += ["", f"## {e.name}", "", "```", *last, "```"]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for everything (default: {MINUTES:g})")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see it work")
    parser.add_argument("--build", action=argparse.BooleanOptionalAction, default=True, help="for this GPU, first")
    parser.add_argument("--only", action="append", metavar="STEP", help="only this step")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: a folder of the GPU's name in results")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes: expected more than 0, got {options.minutes:g}")
    if not torch.cuda.is_available():
        parser.error("no GPU is visible to torch")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Do all steps; return the exit status, 1 unless every one passed that could be started here."""
    options = parse(arguments)
    end = time.monotonic() + 60 * options.minutes
    device = torch.cuda.get_device_name()
    folder = options.output or RESULTS / ("gpu-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"))
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    ended: list[Ended] = []
    for step in steps(folder, build=options.build, quick=options.quick):
        if options.only and step.name not in options.only:
            continue
        print(f"{step.name}: ", end="", flush=True)
        limit = SLOWER * step.limit if options.quick else step.limit
        ended.append(run(step, min(limit, end - time.monotonic()), folder / f"{step.name}.log"))
        print(f"{ended[-1].outcome}, {ended[-1].seconds:.0f} s", flush=True)
        (folder / "steps.json").write_text(json.dumps([asdict(e) for e in ended], indent=1) + "\n")
    found = {
        "environment": environment(),
        "steps": [asdict(e) for e in ended],
        "training_images_per_second": measured(folder),
        "predicted_images_per_second": predicted(device),
    }
    (folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "steps.json").unlink(missing_ok=True)
    (folder / "summary.md").write_text(summary(folder, ended, device))
    print(f"see {folder}/summary.md")
    return 0 if all(e.outcome in ("passed", ABSENT) for e in ended) else 1


if __name__ == "__main__":
    sys.exit(main())
