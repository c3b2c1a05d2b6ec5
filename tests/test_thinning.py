# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What `make test` leaves to `make test-all`."""

import itertools
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from thinning import covering, missing

ROOT = Path(__file__).parents[1]


def test_every_value_is_covered():
    cases = [dict(zip("abc", values, strict=True)) for values in itertools.product("123", "45", "67")]
    chosen = [cases[i] for i in covering(cases)]
    assert len(chosen) == 3
    assert all({case[x] for case in chosen} == {case[x] for case in cases} for x in "abc")


def test_pairs_are_chosen_about_as_often_as_each_other():
    cases = [dict(zip("abc", values, strict=True)) for values in itertools.product("12345678", "12", "12")]
    chosen = [cases[i] for i in covering(cases)]
    assert set(Counter((case["b"], case["c"]) for case in chosen).values()) == {2}


def test_one_parameter_keeps_all_its_values():
    assert covering([{"a": str(i)} for i in range(5)]) == set(range(5))


def test_combinations_that_do_not_exist_are_not_missed():
    cases = [{"a": "1", "b": "1"}, {"a": "2", "b": "2"}, {"a": "2", "b": "1"}]
    assert covering(cases) == {0, 1}


def test_the_choice_does_not_change():
    cases = [dict(zip("abcd", values, strict=True)) for values in itertools.product("12", repeat=4)]
    assert covering(cases) == covering(list(cases))


def test_what_is_missing_is_named():
    assert missing("itertools", "torch") is None
    assert missing("torch", "no_such_module", "nor_this") == "needs no_such_module, nor_this"


SKIPS = {
    "a case that cannot run stands for none": (
        """
@pytest.mark.skip_where(reason=lambda a: "none of these" if a == 1 else None)
@pytest.mark.skip_where(reason=lambda b, a: "nor these" if (a, b) == (2, "x") else None)
@pytest.mark.parametrize("a", [1, 2, 3])
@pytest.mark.parametrize("b", ["x", "y"])
def test(a, b):
    assert a > 1
""",
        {"x-3": "PASSED", "y-2": "PASSED"},
    ),
    "a case that skips while it runs fails": (
        """
@pytest.mark.parametrize("a", [1, 2])
def test(a):
    if a == 1:
        pytest.skip("says so late")
""",
        {"1": "FAILED", "2": "PASSED"},
    ),
    "a test of one case may skip while it runs": (
        """
def test():
    pytest.skip("stands for itself alone")
""",
        {"": "SKIPPED"},
    ),
}


def test_what_is_skipped(tmp_path):
    """Which cases of some code `make test` would run, and what each came to, by its parameters."""
    for i, (code, _) in enumerate(SKIPS.values()):
        (tmp_path / f"test_{i}.py").write_text(f"import pytest\n{code}")
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", ROOT / "pyproject.toml", "-v", "--rootdir"]
    command += [tmp_path, "-p", "no:cacheprovider", "-m", "not slow and not further", tmp_path]
    environ = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PYTHONDONTWRITEBYTECODE": "1"}
    lines = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()
    found = [line.split()[:2] for line in lines if "::" in line and "%]" in line]
    for i, (what, (_, expected)) in enumerate(SKIPS.items()):
        of_it = [(name, outcome) for name, outcome in found if name.startswith(f"test_{i}.py")]
        assert {name.partition("[")[2].rstrip("]"): outcome for name, outcome in of_it} == expected, what
