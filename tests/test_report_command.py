# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""``python -m resnet_fused``: what it says, and that a wrong kernel shows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import environment

import resnet_fused
from resnet_fused import __main__ as command
from resnet_fused import ops

CPU = torch.device("cpu")


def test_report(tmp_path):
    """In a process whose folder of the user has a name that would stand out."""
    home = tmp_path / "a-user"
    environ = environment() | {"HOME": str(home), "RESNET_FUSED_SOMETHING": str(home / "file")}
    result = subprocess.run(
        [sys.executable, "-m", "resnet_fused"], capture_output=True, text=True, env=environ, cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    text = result.stdout
    info = resnet_fused.build_info()
    expected = [f"resnet_fused {info['version']}", info["cpu_instruction_set"], f"torch {torch.__version__}"]
    expected += ["RESNET_FUSED_SOMETHING=~", "cpu, bfloat16: ok", "the check passed"]
    assert [part for part in expected if part not in text] == []
    assert "a-user" not in text


def test_a_wrong_kernel_fails(monkeypatch, capsys):
    """One that is wrong by a thousandth."""
    right = ops.bn_apply
    monkeypatch.setattr(ops, "bn_apply", lambda *a, **k: right(*a, **k) * 1.001)
    monkeypatch.setattr(command, "DTYPES", (torch.float32,))
    assert command.main() == 1
    text = capsys.readouterr().out
    assert "cpu, float32: FAILED (" in text and "output: FAILED" in text and text.endswith("THE CHECK FAILED\n")


def test_an_error_is_reported(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError(f"no such kernel in {Path.home()}")

    monkeypatch.setattr(ops, "bn_apply", broken)
    monkeypatch.setattr(command, "DTYPES", (torch.float32,))
    assert command.main() == 1
    assert "cpu, float32: FAILED, RuntimeError: no such kernel in ~" in capsys.readouterr().out


@pytest.mark.parametrize(("times", "said"), [((1.0, 30.0), True), ((1.0, 1.5), False)])
def test_a_dtype_without_instructions(monkeypatch, times, said):
    took = iter(times)
    monkeypatch.setattr(command, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(command, "seconds", lambda *_: next(took))
    lines = [line for _, line in command.self_check(CPU)]
    assert any("bfloat16: 30 times float32's time" in line for line in lines) is said


def test_the_issue_template_asks_for_it():
    root = Path(__file__).parents[1]
    for page in (".github/ISSUE_TEMPLATE/problem.md", "CONTRIBUTING.md", "README.md"):
        assert "python -m resnet_fused" in (root / page).read_text(), page
