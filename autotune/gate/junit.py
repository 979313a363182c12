"""A gate as JUnit XML, which continuous integrations show: one test case a recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from autotune.gate.outcome import REPORTED, Outcome
from autotune.gate.table import lines

# What XML 1.0 can hold: everything else becomes U+FFFD (section 2.2 of the recommendation).
ILLEGAL = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
FAILURES = (6, 7)  # exit codes of what was held and lost; the others are errors: it could not be held


def junit(outcomes: Sequence[Outcome]) -> str:
    """The whole document. A recipe that was only reported is skipped: it is no pass."""
    suites = Element("testsuites")
    counts = {
        "tests": len(outcomes),
        "failures": sum(outcome.exit_code in FAILURES for outcome in outcomes),
        "errors": sum(outcome.exit_code not in (0, *FAILURES) for outcome in outcomes),
        "skipped": sum(outcome.verdict == REPORTED for outcome in outcomes),
    }
    wall = sum(outcome.wall_s for outcome in outcomes)
    suite = SubElement(suites, "testsuite", name="autotune gate", time=f"{wall:.3f}")
    for key, count in counts.items():
        suite.set(key, str(count))
    for outcome in outcomes:
        attributes = {"name": legal(outcome.recipe), "classname": f"autotune.gate.{outcome.mode}"}
        case = SubElement(suite, "testcase", attributes, time=f"{outcome.wall_s:.3f}", file=legal(outcome.recipe))
        first = legal(outcome.message.split("\n")[0])
        if outcome.verdict == REPORTED:
            SubElement(case, "skipped", message=first)
        elif outcome.exit_code:
            kind = "failure" if outcome.exit_code in FAILURES else "error"
            below = SubElement(case, kind, message=first, type=f"{outcome.verdict} (exit code {outcome.exit_code})")
            below.text = legal(outcome.message)
        SubElement(case, "system-out").text = legal("\n".join(lines(outcome)))
    indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(suites, encoding="unicode") + "\n"


def legal(text: str) -> str:
    """The text without what XML cannot hold; escaping is the serializer's."""
    return ILLEGAL.sub("\ufffd", text)
