# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The Python code in README.md and docs/ runs, a page's pieces one after the other, and their links lead somewhere."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def name(page):
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code(page, tmp_path):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
    assert code, f"{page.name} shows no code"
    script = tmp_path / "page.py"
    script.write_text(code)
    runpy.run_path(str(script))


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("csrc/**/*.md"), ROOT / "CONTRIBUTING.md"], ids=name)
def test_links(page):
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]
