"""Runs all selected cases of one number of ranks in one set of processes, and hands each test its outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sharding import claims_table
from sharding.lightning_jobs import Job, Result, run_jobs
from sharding.runs import Case, Outcome, run_cases

from tests.distributed import run_ranks

SECONDS_PER_CASE = 6.0
PASSED = pytest.StashKey[set[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sharding-table", help="write the table of layout x feature into this page (see claims_table.py)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "shows(layout, feature, verdict): what a passing test proves, for the table in docs/sharding.md"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.when == "call" and report.passed:
        item.session.config.stash.setdefault(PASSED, set()).add(item.nodeid)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--sharding-table")
    if path is None:
        return
    marked = [(item, mark) for item in session.items for mark in item.iter_markers("shows")]
    if not session.config.getoption("collectonly"):
        failed = {item.nodeid for item, _ in marked} - session.config.stash.get(PASSED, set())
        if failed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
    claims_table.write(Path(path), [mark.args for _, mark in marked])


class Outcomes:
    """The outcomes of the session's cases by case and rank; all of a number of ranks run when the first is due."""

    def __init__(self, cases: list[Case]) -> None:
        self._cases = list(dict.fromkeys(cases))
        self._found: dict[Case, list[Outcome]] = {}

    def of(self, case: Case) -> list[Outcome]:
        """What each rank saw; a failure of the case is raised here."""
        if case not in self._found:
            together = [other for other in self._cases if other.ranks == case.ranks]
            timeout = 60 + SECONDS_PER_CASE * len(together)
            by_rank = run_ranks(run_cases, case.ranks, together, timeout=timeout)
            for index, other in enumerate(together):
                self._found[other] = [Outcome(**results[index]) for results in by_rank]
        return self._found[case]


class Fits:
    """Likewise the trainings by Lightning."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = list(dict.fromkeys(jobs))
        self._found: dict[Job, list[Result]] = {}

    def of(self, job: Job) -> list[Result]:
        """What each rank reported."""
        if job not in self._found:
            together = [other for other in self._jobs if other.ranks == job.ranks]
            timeout = 60 + SECONDS_PER_CASE * len(together)
            by_rank = run_ranks(run_jobs, job.ranks, together, timeout=timeout)
            for index, other in enumerate(together):
                self._found[other] = [results[index] for results in by_rank]
        return self._found[job]


def selected(session: pytest.Session, kind: type) -> list[Any]:
    """The parameters of that kind in the tests that will run; tests elsewhere have parameters of the same name."""
    specs: list[Any] = [getattr(item, "callspec", None) for item in session.items]
    return [value for spec in specs if spec is not None for value in spec.params.values() if isinstance(value, kind)]


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    return Outcomes(selected(request.session, Case))


@pytest.fixture(scope="session")
def fits(request: pytest.FixtureRequest) -> Fits:
    return Fits(selected(request.session, Job))
