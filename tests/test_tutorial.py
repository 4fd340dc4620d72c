"""The tutorial's blocks run one after the other and print what stands under them."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def same(printed, shown):
    """Word for word; numbers as they are rounded in the page, one in the last place apart at most."""
    if NUMBER.sub("#", printed) != NUMBER.sub("#", shown):
        return False
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown))
    last = [10.0 ** -len(b.partition(".")[2]) if "." in b else 0.0 for b in NUMBER.findall(shown)]
    return all(abs(float(a) - float(b)) <= 1.001 * unit for (a, b), unit in zip(pairs, last))


def test_a_number_that_is_off_and_a_word_that_is_missing_are_seen():
    assert same("[1.0, -0.2501] True\n", "[1.0, -0.2500] True\n")
    assert not same("[1.0, -0.2510] True\n", "[1.0, -0.2500] True\n")
    assert not same("[1.0, 0.2500] True\n", "[1.0, -0.2500] True\n")
    assert not same("10 1.0\n", "11 1.0\n")
    assert not same("[1.0, -0.25] False\n", "[1.0, -0.25] True\n")
    assert not same("1.0\n", "1.0\n1.0\n")


def test_every_block_of_the_tutorial_prints_what_stands_under_it(capsys):
    blocks = BLOCK.findall(PAGE.read_text())
    kinds = [kind for kind, _ in blocks]
    assert kinds == ["python", "text"] * (len(blocks) // 2), "a block without its output, or the other way round"
    assert len(blocks) >= 16
    names = {}
    for (_, code), (_, shown) in zip(blocks[::2], blocks[1::2]):
        exec(compile(code, PAGE.name, "exec"), names)
        printed = capsys.readouterr().out
        if not same(printed, shown):
            pytest.fail(f"{PAGE.name} prints\n{printed}where it shows\n{shown}after\n{code}")
