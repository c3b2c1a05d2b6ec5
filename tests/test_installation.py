# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What importing the package says where it can't work."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resnet_fused
from resnet_fused.installation import check_torch

PACKAGE = Path(resnet_fused.__file__).parent
EXTENSION = Path(resnet_fused._C.__file__)


@pytest.fixture
def copied(tmp_path):
    """A function that imports a copy of the package in another process, and returns the end of what that wrote."""
    package = tmp_path / "resnet_fused"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "_C.*", "*.txt"))

    def run():
        environ = os.environ | {"PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", "import resnet_fused; print(resnet_fused.__file__)"]
        result = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        return (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()[-1]

    run.package = package
    return run


def test_the_copy_works(copied):
    shutil.copy(EXTENSION, copied.package)
    (copied.package / "built_against.txt").write_text(torch.__version__)
    assert copied() == str(copied.package / "__init__.py")


def test_another_torch(copied):
    (copied.package / EXTENSION.name).touch()  # not even a library: it isn't loaded
    (copied.package / "built_against.txt").write_text("2.3.1+cpu")
    message = copied()
    assert f"built against torch 2.3.1+cpu, but torch {torch.__version__} is installed" in message
    assert "pip install" in message


def test_no_torch(copied):
    broken = copied.package.parent / "torch.py"
    broken.write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    assert "resnet_fused needs torch, which is not installed" in copied()
    broken.write_text("import a_module_that_torch_lacks\n")
    assert "a_module_that_torch_lacks" in copied()


def test_no_extension(copied):
    assert "extension is not built" in copied()


def test_annotations_are_of_what_the_extension_has():
    extension = resnet_fused._C
    annotated = {node.name: node for node in ast.parse((PACKAGE / "_C.pyi").read_text()).body if hasattr(node, "name")}
    assert {*annotated} == {name for name in vars(extension) if not name.startswith("_")}
    for name, node in annotated.items():
        if isinstance(node, ast.FunctionDef):
            signature = getattr(extension, name).__doc__.partition(" -> ")[0]  # conv_tiles(arg0: str, arg1: ...)
            assert len(node.args.posonlyargs) == len(re.findall(r"arg\d+:", signature)), name


@pytest.mark.parametrize(("built", "installed"), [("2.14.1", "2.14.0+cu130"), ("2.14.0a0+git0123abc", "2.14.1")])
def test_patches_are_compatible(tmp_path, built, installed):
    (tmp_path / "built_against.txt").write_text(built + "\n")
    check_torch(installed, tmp_path / "built_against.txt")


def test_what_was_built_against_is_known(copied):
    (copied.package / EXTENSION.name).touch()
    message = copied()
    assert "built_against.txt is missing" in message and "pip install" in message


def test_minors_are_not(tmp_path):
    (tmp_path / "built_against.txt").write_text("2.1.0")
    with pytest.raises(ImportError, match=r"torch 2\.1\.0, but torch 2\.14\.1"):
        check_torch("2.14.1", tmp_path / "built_against.txt")


def test_importing_does_not_import_torch_compile():
    """Which takes 1.1 s, all the rest 1.6."""
    code = "import sys, resnet_fused; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
