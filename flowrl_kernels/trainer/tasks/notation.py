"""Where a response's final answer stands, and the same answer in one notation."""

from __future__ import annotations

import re

LONGEST = 500  # characters of a final answer that are read; a longer one is wrong

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BETWEEN = re.compile(
    r"(?:[\s$,;&~]|\\[,;: ]|\\?\\text\s*\{\s*(?:and|or)\s*\}|\band\b|\bor\b|[A-Za-z]\w?\s*=|\\\]|\\\[)*"
)


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, inside) of every \\boxed{...} with matching braces, by where it starts."""
    stack: list[tuple[int, int] | None] = []
    found: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        token = match.group()
        if token[0] == "\\" and token[-1] == "{" and len(token) > 2:
            stack.append((match.start(), match.end()))
        elif token == "{":
            stack.append(None)
        elif token == "}" and stack and (opened := stack.pop()) is not None:
            found.append((opened[0], match.end(), text[opened[1] : match.start()]))
    return sorted(found)


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} with matching braces; None where there is none."""
    found = boxes(text)
    return found[-1][2] if found else None


def after_marks(text: str) -> str | None:
    """What follows the last "####" on its line, as GSM8K's answers end; None where there is none."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if mark and rest.strip() else None


_STATED = re.compile(r"\banswer\s*(?:is|:|=|\*\*:?)+\s*:?\s*", re.IGNORECASE)


def final_answer(response: str) -> str | None:
    """The one place of a response that is read: the last box (or the last boxes in a row), what follows "####", what
    follows the last "answer is", or the whole of a short response. None: none of these.
    """
    found = boxes(response)
    if found:
        run = [found[-1]]
        for box in reversed(found[:-1]):
            if box[1] > run[0][0] or not _BETWEEN.fullmatch(response[box[1] : run[0][0]][:200]):
                break
            run.insert(0, box)
        return ", ".join(inside for _, _, inside in run)
    if (marked := after_marks(response)) is not None:
        return marked
    tail = response[-LONGEST:]
    stated = list(_STATED.finditer(tail))
    if stated:
        line = tail[stated[-1].end() :].strip().partition("\n")[0]
        return re.split(r"\.\s|,? because |,? since ", line)[0]
    whole = response.strip()
    return whole if len(whole) <= 200 and "\n" not in whole else None


_SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "－": "-", "＋": "+", "（": "(", "）": ")",
        "，": ",", "。": ".", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi ",
        "√": r"\sqrt ", "∞": r"\infty ", "°": r"^\circ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "≤": r"\le ",
        "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "²": "^2", "³": "^3", "∅": r"\emptyset ", "％": "%", "＝": "=",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2007": " ", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅕": r"\frac{1}{5}", "⅛": r"\frac{1}{8}",
        "’": "'", "\u200b": "", "\ufeff": "",
    }
)  # fmt: skip
_WRAPS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|bf|rm|operatorname)\s*\{([^{}]*)\}"
)
BARE = re.compile(r"(?<![\\A-Za-z])(pi|sin|cos|tan|cot|sec|csc|log|ln|exp|arcsin|arccos|arctan)(?![A-Za-z])")
ROW = "\x03"  # a matrix's row ends
OPEN, CLOSE = "\x01", "\x02"  # around what stood in \text{}


def tidy(text: str) -> str:
    """The same answer in one notation: no dollars, spacing commands, \\left, \\dfrac; \\text{} in marks of its own."""
    text = text.translate(_SIGNS).replace("\\\\", ROW).strip()
    for _ in range(4):
        before = text
        for left, right in _WRAPS:
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right) - 1:
                inside = text[len(left) : -len(right)]
                text = inside.strip() if left not in inside else text
        if (box := re.fullmatch(r"\\boxed\s*\{(.*)\}", text, re.DOTALL)) and balanced(box.group(1)):
            text = box.group(1).strip()
        text = re.sub(r"(?<!\\)[.;:,]+$", "", text).strip()
        if text == before:
            break
    text = re.sub(
        r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|biggl?|biggr|displaystyle|limits)(?![A-Za-z])\s*\.?", "", text
    )
    text = text.replace(r"\!", "").replace("{,}", ",")
    text = re.sub(r"\\[,;: ]|~|\\q?quad(?![A-Za-z])", " ", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\([lr])brace", lambda m: r"\{" if m.group(1) == "l" else r"\}", text)
    text = re.sub(r"\\(?:lparen|langle)", "(", re.sub(r"\\(?:rparen|rangle)", ")", text))
    text = text.replace(r"\infin ", r"\infty ").replace(r"\lt", "<").replace(r"\gt", ">")
    text = _TEXT.sub(lambda m: f" {OPEN}{m.group(1).strip()}{CLOSE} ", text)
    text = re.sub(r"^(?:\\approx|approximately|about)\s*", "", text.strip())
    return re.sub(r"\s+", " ", text).strip()


def balanced(text: str) -> bool:
    depth = 0
    for c in text:
        depth += {"{": 1, "}": -1}.get(c, 0)
        if depth < 0:
            return False
    return depth == 0


def plain(text: str) -> str:
    """Without the marks of \\text{}."""
    return re.sub(r"\s+", " ", text.replace(OPEN, "").replace(CLOSE, "")).strip()


def split(text: str, cut: re.Pattern[str]) -> list[str]:
    """Parts of `text` between matches of `cut` outside all brackets."""
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        match = cut.match(text, at) if depth == 0 else None
        if match and match.end() > at:
            parts.append(text[start:at].strip())
            start = at = match.end()
            continue
        if text[at] == "\\" and text[at + 1 : at + 2] in ("{", "}"):
            at += 1
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[at], 0)
        depth = max(depth, 0)
        at += 1
    return [*parts, text[start:].strip()]
