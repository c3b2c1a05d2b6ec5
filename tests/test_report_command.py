# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""``python -m resnet_fused``: what it says, and that a wrong kernel shows."""

import platform
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


@pytest.mark.parametrize("there", [True, False])
def test_a_dtype_without_instructions(monkeypatch, there):
    took = iter((1.0, 30.0))
    monkeypatch.setattr(command, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(command, "seconds", lambda *_: next(took))
    monkeypatch.setattr(command, "multiplies", lambda dtype: there or dtype == torch.float32)
    text = "\n".join(line for _, line in command.self_check(CPU))
    assert text.count("no instructions for it") == (0 if there else 1)
    assert ("bfloat16: this processor has no instructions for it, and takes 30.0 times as long" in text) is not there


def test_what_a_processor_multiplies():
    """oneDNN is asked in a process that it is told to be on an older processor."""
    code = "import torch; from resnet_fused.__main__ import DTYPES, multiplies; print(*map(multiplies, DTYPES))"
    environ = environment() | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
    if platform.machine() != "x86_64":
        pytest.skip("x86-64's instruction sets")
    assert result.stdout.split() == ["True", "False", "False"]


def test_the_issue_template_asks_for_it():
    root = Path(__file__).parents[1]
    for page in (".github/ISSUE_TEMPLATE/problem.md", "CONTRIBUTING.md", "README.md"):
        assert "python -m resnet_fused" in (root / page).read_text(), page
