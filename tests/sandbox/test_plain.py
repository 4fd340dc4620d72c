import math
from collections import Counter, deque, namedtuple
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl_kernels.trainer.sandbox.plain import MAX_DEPTH, decode, encode, frame

keys = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary())
values = st.recursive(
    st.one_of(keys, st.decimals(allow_nan=False), st.fractions(), st.complex_numbers(allow_nan=False)),
    lambda inner: st.one_of(
        st.lists(inner),
        st.tuples(inner, inner),
        st.sets(keys),
        st.dictionaries(keys, inner),
        st.lists(inner).map(deque),
    ),
    max_leaves=20,
)


@settings(max_examples=30, deadline=None)
@given(values)
def test_plain_values_cross_and_stay_what_they_are(value):
    import json

    back = decode(json.loads(frame(encode(value))[4:]))
    assert back == value
    assert repr(back) == repr(value) or isinstance(value, set | dict | list | tuple | deque)
    assert type(back) is type(value)


def test_kinds_that_compare_equal_are_told_apart():
    for value in (
        True,
        1,
        1.0,
        (1,),
        [1],
        {1},
        frozenset({1}),
        range(1),
        bytearray(b"1"),
        10**400,
        Decimal(1),
        Fraction(1),
    ):
        back = decode(encode(value))
        assert back == value
        assert type(back) is type(value)
    assert math.isnan(decode(encode(math.nan)))
    assert math.copysign(1, decode(encode(-0.0))) == -1


def test_subclasses_cross_as_what_they_are_made_of():
    class Yes(str):
        def __eq__(self, other):
            return True

        __hash__ = str.__hash__

    back = decode(encode([Yes("a"), Counter("aab"), namedtuple("P", "x")(1)]))
    assert back == ["a", {"a": 2, "b": 1}, (1,)]
    assert [type(v) for v in back] == [str, dict, tuple]
    assert back[0] != "b"


def test_anything_else_is_refused_or_handed_over():
    with pytest.raises(TypeError, match="only plain values can be passed, not a function"):
        encode([1, test_depth_is_bounded])
    assert encode([object], lambda value: {"object": 3}) == [{"object": 3}]
    assert decode([{"object": 3}], {3: "x"}.get) == ["x"]


@pytest.mark.parametrize("data", [{"object": 1}, {"a": 1}, {}, {"int": "1", "x": 2}, {"set": [[1]]}, {"int": "zz"}])
def test_data_of_no_kind_is_refused(data):
    with pytest.raises((ValueError, TypeError)):
        decode(data)


def test_depth_is_bounded():
    cycle = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="deeper"):
        encode(cycle)
    deep = []
    for _ in range(5 * MAX_DEPTH):
        deep = [deep]
    with pytest.raises(ValueError, match="deeply"):
        decode(deep)
