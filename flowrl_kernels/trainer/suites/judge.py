"""A model that grades how many approaches there are among a problem's responses, 1 to 5: the paper's protocol.

Off unless a suite names "judge". It sends prompts and responses to the address in [judge]. As the authors'
evaluation does (arXiv:2509.15207, appendix; verl's evaluation script of their release), it shows the first 300
characters of each response, asks at temperature 0 and reads one number; the rubric is theirs in our words, with its
counts of 16 as shares of the responses that are shown. One thing differs: an answer that is no number is left out and
counted, where theirs stands for 3.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flowrl_kernels.trainer.rollout.faults import Fault, again
from flowrl_kernels.trainer.rollout.http import Http
from flowrl_kernels.trainer.suites.figures import estimate
from flowrl_kernels.trainer.suites.file import Judge

AT_ONCE, RETRIES = 8, 4
# (grade, largest share of the responses that take the most common approach, how much else there is)
GRADES = (
    (1, "nearly all of them", "14 or more", "what differs is arithmetic, notation or wording"),
    (2, "most of them", "11 to 13", "one or two other approaches, each of them rare"),
    (3, "about half of them", "7 to 10", "two or three other approaches, with other set-ups or techniques"),
    (4, "less than half of them", "4 to 6", "three or four strategies, each of them well represented"),
    (5, "hardly any", "at most 3", "four or more clearly different strategies, and none that dominates"),
)


def question(problem: str, responses: Sequence[str], characters: int) -> str:
    """What the judge is asked."""
    shown = [text if not characters or len(text) <= characters else text[:characters] + "..." for text in responses]
    rubric = [
        f"{grade}: {share} ({count} of every 16) take the most common approach; {rest}."
        for grade, share, count, rest in GRADES
    ]
    return "\n".join(
        [
            f"Grade how diverse the approaches are in {len(shown)} attempts at one mathematics competition problem.",
            "Look for other methods, variables, set-ups, decompositions and techniques, small ones too.",
            "Wrong and unfinished attempts count: it is the approaches that are graded, not whether they succeed.",
            "", "Problem:", problem, "", *(f"Attempt {i}: {text}" for i, text in enumerate(shown, 1)), "",
            "Grades:", *rubric, "", "Answer with one number from 1 to 5 and nothing else.",
        ]
    )  # fmt: skip


class Asked:
    """A judge behind an OpenAI-compatible address."""

    def __init__(self, settings: Judge):
        key = Path(settings.key_file).expanduser().read_text(encoding="utf-8").strip() if settings.key_file else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.settings = settings
        self.http = Http(settings.address, settings.timeout, headers, field="judge.address")

    def grade(self, problem: str, responses: Sequence[str]) -> int | None:
        """1 to 5; None where the answer is no such number.

        Raises EngineError where the address refuses what it is asked, or stays away.
        """
        body = {
            "model": self.settings.model, "temperature": 0, "max_tokens": 5,
            "messages": [{"role": "user", "content": question(problem, responses, self.settings.characters)}],
        }  # fmt: skip

        def ask() -> str:
            return said(self.http.ask("POST", "/v1/chat/completions", body))

        found = re.fullmatch(r"\W*([1-5])(?:\s*/\s*5)?\W*", again(ask, retries=RETRIES, what=self.settings.address))
        return int(found[1]) if found else None

    def grades(self, problems: Sequence[tuple[str, Sequence[str]]]) -> list[int | None]:
        """The grade of each (problem, its responses)."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda pair: self.grade(*pair), problems))


def said(answer: Any) -> str:
    """The text of a chat completion. Raises Fault for another form."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str):
        raise Fault(f"POST /v1/chat/completions answered {str(answer)[:60]}")
    return text


def told(grades: Sequence[int | None], settings: Judge) -> dict[str, Any]:
    """What results.json says of a judge's grades."""
    known = [float(grade) for grade in grades if grade is not None]
    mean, se = estimate(known)
    return {
        "grade": mean, "grade_se": se, "problems": len(known), "unread": len(grades) - len(known),
        "model": settings.model, "address": settings.address, "characters": settings.characters, "grades": list(grades),
    }  # fmt: skip
