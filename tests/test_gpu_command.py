# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""``make gpu``: every step's outcome is kept, whatever becomes of it. ``make gpu-simulated`` runs the steps."""

import json
import sys
import time

import pytest
import torch

from benchmarks import gpu, predict
from benchmarks.gpu import Step


def python(name, code, limit=60.0):
    return Step(name, [sys.executable, "-c", code], limit)


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(gpu, "environment", lambda: {"torch": "2.14"})


def test_outcomes(card, monkeypatch, tmp_path):
    """Of steps that pass, fail, take too long with a child of their own, and come after that."""
    waits = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    listed = [python("good", "print('so it is')"), python("bad", "raise SystemExit(3)"), python("long", waits, 1.5)]
    record = {"subject": "resnet50", "batch": 64, "eager_seconds": {"median": 0.5}, "fused_seconds": {"median": 0.25}}
    listed.append(Step("nowhere", [], 30.0))
    monkeypatch.setattr(gpu, "SHORTEST", 1.0)
    monkeypatch.setattr(gpu, "steps", lambda folder, **_: [*listed, python("last", "")])
    with_compiled = record | {"eager_seconds": {"median": 0.6}, "compiled_seconds": {"median": 1.0}}
    found = {"training": [record | {"subject": "resnet18"}, record], "compiled-training": [with_compiled]}
    for race, outcomes in found.items():
        path = tmp_path / race / "a100" / "residual.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"outcomes": outcomes}))
    start = time.perf_counter()
    assert gpu.main(["--output", str(tmp_path)]) == 1
    assert time.perf_counter() - start < 60
    found = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = {step["name"]: step["outcome"] for step in found["steps"]}
    assert outcomes == {
        "good": "passed",
        "bad": "failed (3)",
        "long": "out of time",
        "nowhere": "absent",
        "last": "passed",
    }
    assert found["training_images_per_second"] == {"compiled": 64.0, "eager": 128.0, "fused": 256.0}
    eager = predict.BATCH / predict.predicted(predict.CARDS[0], "resnet50")["eager"].total
    assert found["predicted_images_per_second"]["eager"] == pytest.approx(eager)
    text = (tmp_path / "summary.md").read_text()
    assert "so it is" in text and f"| eager | 128.0 | {eager:.0f} |" in text and "| long | out of time |" in text


def test_time_is_over(card, tmp_path):
    """Nothing is started, and that is what is recorded."""
    assert gpu.main(["--output", str(tmp_path), "--minutes", "0.001"]) == 1
    steps = [s for s in json.loads((tmp_path / "gpu.json").read_text())["steps"] if s["outcome"] != "absent"]
    assert [s["name"] for s in steps[:3]] == ["build", "self-check", "tests"] and steps[-1]["name"] == "bandwidth"
    assert {s["outcome"] for s in steps} == {"not started: the time was over"}


def test_limits_leave_room(card, monkeypatch, tmp_path):
    """The two races that matter most get all of their time even if every step before them takes all of its own."""
    listed = gpu.steps(tmp_path, build=True, quick=False)
    names = [s.name for s in listed]
    first = ["build", "self-check", "tests", "compute-sanitizer", "plan", "training", "inference"]
    assert names == [*first, "compiled-training", "compiled-inference", "blocks", "convolutions", "bandwidth"]
    assert sum(s.limit for s in listed[: len(first)]) <= 60 * gpu.MINUTES


def test_nothing_is_absent_but_the_sanitizer(card, monkeypatch, tmp_path):
    """Which does not make the whole fail."""
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert [s.name for s in gpu.steps(tmp_path, build=True, quick=False) if not s.command] == ["compute-sanitizer"]
    assert gpu.main(["--output", str(tmp_path), "--only", "compute-sanitizer"]) == 0


def test_bad_arguments(card, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--minutes", "0"])
    assert "--minutes: expected more than 0, got 0" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no GPU is visible" in capsys.readouterr().err
