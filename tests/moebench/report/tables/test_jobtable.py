"""The jobs of a sweep are a table of the axes that vary, and hashes are for who asks for them."""

import io
from typing import Any

from rich.console import Console

from moebench.report.tables.jobtable import JobTable
from moebench.workload.case import Case, Job

SHAPE: dict[str, Any] = {"n_routed_experts": 8, "n_activated_experts": 2, "dim": 256, "moe_inter_dim": 512}


def jobs(*backends: str, counts: tuple[int, ...] = (16, 128), **fields: Any) -> list[Job]:
    cases = [Case(num_tokens=count, mode=mode, **SHAPE, **fields) for count in counts for mode in ("forward", "train")]
    return [Job(case=case, backend=backend) for case in cases for backend in backends]


def printed(some: list[Job], width: int = 80, ids: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(JobTable(some, ids))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    return lines


def test_what_all_cases_share_is_above_the_table_and_the_rest_in_it() -> None:
    lines = printed(jobs("loop", "torch_mm"))
    assert lines[:2] == ["e8k2d256i512, bfloat16, uniform routing, swiglu", "backends: loop, torch_mm"]
    assert lines[2].split() == ["tokens", "mode", "jobs"]
    rows = [["16", "forward", "2"], ["16", "train", "2"], ["128", "forward", "2"], ["128", "train", "2"]]
    assert [line.split() for line in lines[4:8]] == rows, "tokens in numeric order"
    assert lines[8] == "8 jobs, 4 cases"


def test_backends_that_differ_from_case_to_case_are_a_column() -> None:
    lines = printed([*jobs("loop"), *jobs("te", "gmm", counts=(256,))])
    assert lines[1].split() == ["tokens", "mode", "backends", "jobs"]
    assert [line.split()[2:-1] for line in lines[3:9]] == [["loop"]] * 4 + [["te,", "gmm"]] * 2


def test_ids_are_there_where_they_are_asked_for() -> None:
    some = jobs("loop")
    ids = {job.case.case_id for job in some}
    assert not [line for line in printed(some, 160) if any(one in line for one in ids)]
    text = printed(some, 160, ids=True)
    assert {line.split()[-1] for line in text if line.split()[-1] in ids} == ids


def test_one_case_is_in_the_title() -> None:
    some = jobs("loop", counts=(16,))[:1]
    title = "e8k2d256i512, 16 tokens, bfloat16, forward, uniform routing, swiglu"
    assert printed(some) == [title, "backends: loop", "1 job, 1 case"], "a table of one case would say nothing more"
    assert [line.split() for line in printed(some, ids=True)][-2] == ["all", "1", some[0].case.case_id]
