# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""examples/train.py: what it writes, and that a run that was killed and resumed ends where another one does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from scripts import environment, load
from torchvision.utils import save_image

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

TRAIN = Path(__file__).parents[1] / "examples" / "train.py"
# A few seconds: three epochs of four batches, at each of which a killed run may stop.
SMALL = ["--size", "8", "--batch", "16", "--limit", "64", "--epochs", "3"]


@pytest.fixture(scope="module")
def train():
    return load(TRAIN)


@pytest.fixture(autouse=True)
def one_thread():
    """As many as the other processes are given: not all of oneDNN's sums are the same for any number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def start(launcher, arguments):
    return subprocess.Popen(
        [sys.executable, *launcher, TRAIN, *map(str, arguments)],
        env=environment() | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that all of torchrun's processes can be killed
    )


def finish(launcher, arguments):
    output, _ = (process := start(launcher, arguments)).communicate(timeout=300)
    assert process.returncode == 0, output


def kill_after_one_epoch(launcher, arguments, output):
    process = start(launcher, arguments)
    deadline = time.monotonic() + 240
    while not (output / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (output / "checkpoint.pt").exists(), "there was nothing to resume from"
    assert not (output / "history.json").exists(), "it was over before it was killed"


def assert_same_run(one, other):
    """The same losses, accuracies, weights, averages and momenta, to the bit."""
    first, second = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, other))
    for epoch in first["history"] + second["history"]:
        del epoch["images_per_second"]
    assert first["history"] == second["history"]
    assert len(first["history"]) == 3
    for part in ("model", "averaged"):
        assert first[part].keys() == second[part].keys()
        differ = [name for name, value in first[part].items() if not torch.equal(value, second[part][name])]
        assert not differ, f"{part}: {differ}"
    momenta = [list(checkpoint["optimizer"]["state"].values()) for checkpoint in (first, second)]
    assert all(torch.equal(a["momentum_buffer"], b["momentum_buffer"]) for a, b in zip(*momenta, strict=True))


@pytest.mark.slow(reason="three runs of three epochs, one of them a process that imports torch")
def test_killed_and_resumed_is_uninterrupted(train, tmp_path):
    options = [*SMALL, "--ema", "0.9", "--accumulate", "2", "--channels-last", "--resume"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train.main([*options, "--output", str(whole)])
    kill_after_one_epoch([], [*options, "--output", killed], killed)
    train.main([*options, "--output", str(killed)])
    assert_same_run(whole, killed)


@pytest.mark.slow(reason="three runs of two processes, each of which imports torch")
def test_two_processes_killed_and_resumed(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    options = [*SMALL, "--ema", "0.9", "--accumulate", "2", "--sync-bn", "--resume"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(launcher, [*options, "--output", whole])
    kill_after_one_epoch(launcher, [*options, "--output", killed], killed)
    finish(launcher, [*options, "--output", killed])
    assert_same_run(whole, killed)
    assert json.loads((whole / "history.json").read_text())["settings"]["processes"] == 2


def test_a_folder_of_images(train, tmp_path):
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                save_image(torch.rand(3, 40, 48), folder / f"{i}.png")
    options = ["--data", str(tmp_path / "data"), "--size", "32", "--batch", "4", "--epochs", "1", "--amp", "bfloat16"]
    train.main([*options, "--output", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "history.json").read_text())
    (epoch,) = result["history"]
    assert epoch["loss"] > 0 and 0 <= epoch["accuracy"] <= 1 and epoch["images_per_second"] > 0
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow(reason="nine runs of three epochs, so that chance shows")
@pytest.mark.parametrize("amp", ["off", "bfloat16"])
def test_eager_and_fused_learn_alike(train, tmp_path, amp):
    """As far from eager as eager is from itself: in another layout, whose sums round otherwise, or by its seed."""
    curves = defaultdict(list)
    for seed in range(3):
        for name, how in (("eager", ["--eager"]), ("channels_last", ["--eager", "--channels-last"]), ("fused", [])):
            folder = tmp_path / f"{name}-{seed}"
            # Of 16x16 the last stage's input has one pixel, and PyTorch's bfloat16 wgrad of 3x3 with stride 2 on AMX
            # reads memory there that nobody wrote (torch 2.14.1, seen with MALLOC_PERTURB_=1): now and then NaN.
            options = ["--size", "18", "--rate", "0.02", "--epochs", "3", "--amp", amp, "--seed", str(seed)]
            train.main([*how, *options, "--output", str(folder)])
            history = json.loads((folder / "history.json").read_text())["history"]
            curves[name].append(torch.tensor([epoch["loss"] for epoch in history]))
    eager, relaid, fused = (torch.stack(curves[name]) for name in ("eager", "channels_last", "fused"))
    assert (fused[:, -1] < fused[:, 0] / 2).all(), fused
    apart = max((relaid - eager).abs().mean(), (eager - eager.roll(1, 0)).abs().mean())
    assert 0 < (fused - eager).abs().mean() <= apart, curves


def test_other_settings_are_refused(train, tmp_path):
    once = [*SMALL[:-1], "1", "--output", str(tmp_path)]
    train.main(once)
    with pytest.raises(SystemExit, match="--resume: .* trained with other settings: rate 0.05, now 0.1"):
        train.main([*once, "--resume", "--rate", "0.1"])


def test_too_few_images_are_refused(train, tmp_path):
    with pytest.raises(SystemExit, match="--batch, --accumulate: 8 images are too few for one step"):
        train.main(["--limit", "8", "--output", str(tmp_path)])
