"""Write the verdicts of a gate as a JUnit XML file, with one test case for each job and measure.

JUnit XML has several variants. This module writes a variant that GitLab, Jenkins and the JUnit reporters of GitHub can
read. The elements of the file are nested like this:

    testsuites
        testsuite
            properties      the settings of the gate
            testcase        the verdict on one measure of one job
                properties  the numbers of a verdict on time or on the GPU's own time
                failure     if the verdict is a failure
                skipped     if the gate could not decide, or if only the candidate has the job
"""

import math
from xml.etree import ElementTree as xml

from moebench import escapes
from moebench.verdicts.findings import Finding
from moebench.verdicts.gate import GateResult, Judged
from moebench.verdicts.verdict import Severity

SKIPPED = frozenset({Severity.UNDECIDED, Severity.NOTED})


def junit_xml(result: GateResult) -> bytes:
    """Return the content of the file. Failed verdicts are failures. Undecided and noted verdicts are skipped."""
    cases = [_test_case(job, finding) for job in result.jobs for finding in job.findings]
    severities = [finding.verdict.severity for job in result.jobs for finding in job.findings]
    counts = {
        "tests": str(len(severities)),
        "failures": str(severities.count(Severity.FAILED)),
        "errors": "0",
        "skipped": str(sum(severity in SKIPPED for severity in severities)),
    }
    root = xml.Element("testsuites", {"name": "moebench", **counts})
    suite = xml.SubElement(root, "testsuite", {"name": "moebench gate", **counts})
    _properties(suite, {"threshold": f"{result.threshold:g}", "false_alarms": f"{result.false_alarms:g}"})
    suite.extend(cases)
    xml.indent(root)
    content: bytes = xml.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _test_case(job: Judged, finding: Finding) -> xml.Element:
    case_id = job.key.case_id
    names = {"classname": escapes.xml(f"{job.backend}.{finding.measure}"), "name": escapes.xml(case_id)}
    case = xml.Element("testcase", names)
    time = {"time": job.time, "busy": job.busy}.get(finding.measure)
    if time is not None:
        numbers = {"ratio": time.ratio, "smallest_effect": time.smallest_effect}
        _properties(case, {name: f"{value:.4g}" for name, value in numbers.items() if math.isfinite(value)})
    why = {"message": escapes.xml(f"{finding.verdict.value}: {finding.reason}")}
    if finding.verdict.severity is Severity.FAILED:
        xml.SubElement(case, "failure", {**why, "type": finding.verdict.value}).text = why["message"]
    elif finding.verdict.severity in SKIPPED:
        xml.SubElement(case, "skipped", why)
    return case


def _properties(element: xml.Element, values: dict[str, str]) -> None:
    if values:
        properties = xml.SubElement(element, "properties")
        for name, value in values.items():
            xml.SubElement(properties, "property", {"name": name, "value": value})
