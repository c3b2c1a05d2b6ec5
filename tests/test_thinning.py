# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What `make test` leaves to `make test-all`."""

import itertools
from collections import Counter

from thinning import covering


def test_every_pair_of_values_is_covered():
    cases = [dict(zip("abc", values, strict=True)) for values in itertools.product("123", "45", "67")]
    chosen = [cases[i] for i in covering(cases)]
    assert len(chosen) < len(cases)
    for x, y in itertools.combinations("abc", 2):
        assert {(case[x], case[y]) for case in chosen} == {(case[x], case[y]) for case in cases}


def test_each_value_alone():
    cases = [dict(zip("ab", values, strict=True)) for values in itertools.product("123", "45")]
    chosen = [cases[i] for i in covering(cases, together=1)]
    assert len(chosen) == 3
    assert {case["a"] for case in chosen} == set("123") and {case["b"] for case in chosen} == set("45")


def test_pairs_are_chosen_about_as_often_as_each_other():
    cases = [dict(zip("abc", values, strict=True)) for values in itertools.product("12345678", "12", "12")]
    chosen = [cases[i] for i in covering(cases)]
    assert set(Counter((case["b"], case["c"]) for case in chosen).values()) == {4}


def test_one_parameter_keeps_all_its_values():
    assert covering([{"a": str(i)} for i in range(5)]) == set(range(5))


def test_combinations_that_do_not_exist_are_not_missed():
    cases = [{"a": "1", "b": "1"}, {"a": "2", "b": "2"}, {"a": "2", "b": "1"}]
    assert covering(cases) == {0, 1, 2}


def test_the_choice_does_not_change():
    cases = [dict(zip("abcd", values, strict=True)) for values in itertools.product("12", repeat=4)]
    assert covering(cases) == covering(list(cases))
