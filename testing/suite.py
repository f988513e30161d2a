"""Suites: lists of checks for one thing, run by pytest, or without it by ``outcomes``.

A suite is a class whose attributes say what is tested; a third party's test file subclasses it::

    class TestMyBackend(BackendSuite):
        backend = "mybackend"
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from deltaloom.graph.op import Draw
from deltaloom.testing.draw import CaseDraw, SeededDraw
from deltaloom.testing.requirements import FEATURES, Requirements

Status = Literal["passed", "failed", "skipped", "unclaimed"]
Run = Callable[[Draw], bool | None]
S = TypeVar("S", bound="Suite")

LENIENT = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example]
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
"""All but the explaining of which draws matter, which takes longer than it tells."""
LINES, DRAWS = 12, 16
"""Lines and drawn numbers of a falsifying example in reports."""


@dataclass(frozen=True)
class Check:
    """One property of ``subject`` ("op relu2", "backend numba"). ``run`` draws a case and raises ``AssertionError`` where it does
    not hold; False: the case says nothing, and another one is drawn. ``feature`` must be claimed for it, and ``present`` says
    whether the subject has it. A check that is not ``drawn`` runs once."""

    subject: str
    name: str
    run: Run
    feature: str = ""
    present: bool = True
    drawn: bool = True

    @property
    def title(self) -> str:
        """``op relu2: torch``, which names the check in reports and in limitations."""
        return f"{self.subject}: {self.name}"


@dataclass(frozen=True)
class Outcome:
    """What became of a check: ``text`` is the reason of a skip, or the failure with its falsifying example."""

    subject: str
    check: str
    status: Status
    text: str = ""
    seconds: float = 0.0


class Suite:
    """Checks of one thing; see the subclasses for the attributes. ``requirements`` are its claims."""

    requirements: ClassVar[Requirements] = Requirements()

    @classmethod
    def of(cls: type[S], **attributes: Any) -> S:
        """A suite with these attributes, for callers that write no class."""
        made: S = type(cls.__name__, (cls,), attributes)()
        return made

    def subject(self) -> str:
        """What is tested: "op relu2", "backend numba"."""
        return type(self).__name__

    def checks(self) -> Iterator[Check]:
        """Every check, claimed or not."""
        raise NotImplementedError(f"{type(self).__name__} lists no checks")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One case for each check (a hook of pytest)."""
        metafunc.parametrize("check", cases([self]))

    def test_conformance(self, check: Check) -> None:
        """A case: see ``pytest_generate_tests``."""
        attempt(check)


def cases(suites: Iterable[Suite]) -> list[Any]:
    """The checks of ``suites`` as pytest parameters; what is not claimed, or limited, is skipped with its reason. A check that
    several suites have is one."""
    found: dict[str, Any] = {}
    for suite in suites:
        for check in suite.checks():
            status, text = _verdict(suite.requirements, check)
            marks = [pytest.mark.skip(reason=text)] if status in ("skipped", "unclaimed") else []
            ready = check if status != "failed" else _failing(check, text)
            name = check.title.replace(": ", "-").replace(" ", "-")
            found.setdefault(check.title, pytest.param(ready, id=name, marks=marks))
    return list(found.values())


def outcomes(suites: Iterable[Suite], *, examples: int | None = None) -> Iterator[Outcome]:
    """Run the checks of ``suites`` one after another; ``examples``: cases a check (None: the Hypothesis profile's).
    A suite that cannot even list its checks is one failure."""
    seen: set[str] = set()
    for suite in suites:
        try:
            for check in suite.checks():
                if check.title not in seen:
                    seen.add(check.title)
                    yield outcome(check, suite.requirements, examples)
        except (Exception, SystemExit) as error:
            yield Outcome(suite.subject(), "can be tested", "failed", describe(error))


def outcome(check: Check, requirements: Requirements, examples: int | None = None) -> Outcome:
    """What becomes of one check."""
    status, text = _verdict(requirements, check)
    start = time.perf_counter()
    if status == "passed":
        try:
            attempt(check, examples)
        except (Exception, SystemExit) as error:  # whatever a plugin's code raises is a failure of its check
            status, text = "failed", describe(error)
    return Outcome(check.subject, check.name, status, text, time.perf_counter() - start)


def attempt(check: Check, examples: int | None = None) -> None:
    """Run a check on generated cases; raises what it raises, for the smallest case that Hypothesis finds."""
    if not check.drawn:
        check.run(SeededDraw(0))
        return
    chosen: dict[str, Any] = {} if examples is None else {"max_examples": examples, "database": None}

    def one(data: st.DataObject) -> None:
        assume(check.run(CaseDraw(data)) is not False)

    one.__name__ = "_" + re.sub(r"\W", "_", check.title)  # the key under which Hypothesis keeps failing examples
    quiet = settings(deadline=None, report_multiple_bugs=False, suppress_health_check=LENIENT, phases=PHASES, **chosen)
    try:
        quiet(given(data=st.data())(one))()
    except Unsatisfiable:
        raise AssertionError(f"{check.title}: none of the generated cases is accepted, so nothing was tested") from None


def describe(error: BaseException) -> str:
    """A failure in a few lines: what is wrong, where, and what Hypothesis drew for the falsifying example."""
    kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
    said = str(error).strip() or "an assertion without a text"
    notes = [line for note in getattr(error, "__notes__", ()) for line in note.splitlines()]
    lines = [f"{kind}{said}", *([_place(error)] if kind else []), *(line for line in notes if _tells(line))]
    text = "\n".join(lines).splitlines()
    shown = text[:LINES] + ([f"… {len(text) - LINES} lines more"] if len(text) > LINES else [])
    draws = [line.partition(": ")[2].partition("  #")[0] for line in notes if line.startswith("Draw ")]
    return "\n".join([*shown, *([f"drawn: {', '.join(draws[:DRAWS])}{', …' if len(draws) > DRAWS else ''}"] if draws else [])])


def _tells(line: str) -> bool:
    """Whether a line of a note says something of the case; Hypothesis's own lines say how to run it again."""
    own = ("Draw ", "Falsifying", "You can", "Explanation", "These lines", "@reproduce", "test(", "_", "data=", ")")
    return bool(line.strip()) and not line.strip().startswith(own)


def _place(error: BaseException) -> str:
    """``file.py:12 in function``, where the error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    code = trace.tb_frame.f_code
    return f"at {'/'.join(code.co_filename.split('/')[-2:])}:{trace.tb_lineno} in {code.co_name}"


def _verdict(requirements: Requirements, check: Check) -> tuple[Status, str]:
    verdict = requirements.verdict(check.title, check.feature, check.present)
    if verdict == "limited":
        return "skipped", requirements.limitation(check.title)
    if verdict == "unclaimed":
        return "unclaimed", f"'{check.feature}' is not claimed ({FEATURES[check.feature]})"
    if verdict == "missing":
        return "failed", f"{check.subject} claims '{check.feature}' and does not have it ({FEATURES[check.feature]})"
    return "passed", ""


def _failing(check: Check, text: str) -> Check:
    def fail(draw: Draw) -> None:
        raise AssertionError(text)

    return Check(check.subject, check.name, fail, drawn=False)
