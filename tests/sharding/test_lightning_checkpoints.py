"""Lightning's checkpoints: bitwise on the same ranks from every step, within rounding on others and across strategies.

A continued run ends where an uninterrupted one does, and no continued run knows of its past more than the checkpoint:
masters, schedule, LargeBatch's state and the position in the data.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharding.lightning_jobs import GLOBAL_BATCH, MICRO, STEPS, Job, Result, run_jobs
from sharding.test_lightning import TITLES, alone, assert_drifts_like_one_process
from torch import Tensor

from tests.distributed import run_ranks

# The first test waits for all that were selected to be trained: with the slow ones more than a hundred short runs.
pytestmark = pytest.mark.timeout(1800)

BF16 = (("precision", "bf16-true"),)
TO_FLOAT32 = {"": (), "bf16-true": BF16}
MIDDLE = 5
"""In the first epoch, in no particular place; the second case of each kind continues in the second epoch."""

ORDER = [("single", 1), ("", 2), ("", 4), ("", 1), ("single", 1)]
"""Who runs when: a chain's second part runs with, or after, the first."""


def source(layout: str, ranks: int, precision: str = "", full: bool = False) -> Job:
    name = f"{layout}-{ranks}-{precision}-{full}"
    return Job(layout, ranks, save=name, full=full, trainer=TO_FLOAT32[precision])


def target(start: Job, step: int, layout: str, ranks: int) -> Job:
    assert start.save
    return Job(layout, ranks, resume=(start.save, step), trainer=start.trainer)


def chain(start: Job, step: int, layout: str, ranks: int, *marks: Any) -> Any:
    after = target(start, step, layout, ranks)
    precision = dict(start.trainer).get("precision", "32-true")
    file = " (one file)" if start.full else ""
    name = f"{start.layout} on {start.ranks}{file} to {layout} on {ranks}, {precision}, step {step}"
    return pytest.param((start, after), id=name, marks=list(marks))


def same_ranks() -> list[Any]:
    """Every step; in half precision for some, so that masters are part of it."""
    found = []
    for layout, ranks, precision in [
        ("ddp", 2, ""),
        ("zero1", 2, "bf16-true"),
        ("fsdp1", 2, ""),
        ("fsdp1", 2, "bf16-true"),
        ("fsdp2", 2, ""),
        ("fsdp2", 2, "bf16-true"),
        ("tp", 2, ""),
        ("hsdp", 4, "bf16-true"),
        ("fsdp2_tp", 4, ""),
    ]:
        often = (layout, precision) in (("zero1", "bf16-true"), ("fsdp1", ""), ("fsdp2", "bf16-true"))
        for step in range(1, STEPS):
            marks = [pytest.mark.shows(TITLES[layout], "checkpoint, same ranks", "bitwise")]
            marks += [] if often else [pytest.mark.slow]
            found.append(chain(source(layout, ranks, precision), step, layout, ranks, *marks))
    return found


def other_ranks() -> list[Any]:
    found = []
    for precision, step in (("", MIDDLE), ("bf16-true", STEPS // 2 + 1)):
        for layout, ranks, full, onto, on, often in [
            ("zero1", 2, False, "ddp", 2, True),
            ("single", 1, False, "fsdp1", 2, True),
            ("single", 1, False, "fsdp2", 2, True),
            ("single", 1, False, "zero1", 2, False),
            ("ddp", 2, False, "zero1", 2, False),
            ("zero1", 2, False, "zero1", 4, False),
            ("zero1", 2, False, "single", 1, False),
            ("fsdp1", 2, False, "fsdp1", 4, False),
            ("fsdp1_hybrid", 4, False, "fsdp1", 4, False),
            ("fsdp2", 2, False, "fsdp2", 4, True),
            ("fsdp2", 2, False, "hsdp", 4, False),
            ("fsdp2", 2, False, "fsdp2_tp", 4, False),
            ("tp", 2, False, "fsdp2", 4, False),
            ("fsdp2", 2, True, "single", 1, True),
            ("fsdp2", 4, False, "fsdp2", 1, True),
            ("fsdp2_tp", 4, False, "fsdp2", 1, False),
            ("hsdp", 4, False, "fsdp2", 1, False),
        ]:
            marks = [pytest.mark.shows(TITLES.get(layout, "single process"), "checkpoint, other ranks", "exact")]
            marks += [] if often else [pytest.mark.slow]
            found.append(chain(source(layout, ranks, precision, full), step, onto, on, *marks))
    return found


class Continued:
    """The results of the selected chains."""

    def __init__(self, chains: list[tuple[Job, Job]], root: Path) -> None:
        starts = list(dict.fromkeys(start for start, _ in chains))
        ends = list(dict.fromkeys(end for _, end in chains))
        self.found: dict[Job, list[Result]] = {}
        for kind, ranks in ORDER:
            here = [job for job in [*starts, *ends] if job.ranks == ranks and (job.layout == "single") == bool(kind)]
            ready = [job for job in here if job not in self.found and self._is_ready(job)]
            if not ready:
                continue
            if kind:
                by_rank = [run_jobs(ready, str(root))]
            else:
                by_rank = run_ranks(run_jobs, ranks, ready, str(root), timeout=60 + 8 * len(ready))
            for index, job in enumerate(ready):
                self.found[job] = [results[index] for results in by_rank]

    def _is_ready(self, job: Job) -> bool:
        """Its checkpoint exists, or will be written in the same batch."""
        if job.resume is None:
            return True
        done = {done.save: done.layout for done in self.found}
        return job.resume[0] in done or job.layout != "single"


@pytest.fixture(scope="module")
def continued(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[Job, list[Result]]:
    specs: list[Any] = [getattr(item, "callspec", None) for item in request.session.items]
    chains = [spec.params["jobs"] for spec in specs if spec is not None and "jobs" in spec.params]
    return Continued(chains, tmp_path_factory.mktemp("checkpoints")).found


def whole_masters(job: Job, results: list[Result], step: int) -> dict[str, Tensor]:
    """Flat masters of whole layers; slices lie in the order of ranks."""
    ranks = {"zero1": job.ranks, "fsdp1": job.ranks, "fsdp1_hybrid": 2}.get(job.layout, 1)
    parts = [result.masters[step] for result in results[:ranks]]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name].flatten() for part in parts if name in part]) for name in names}


@pytest.mark.parametrize("jobs", same_ranks())
def test_on_the_same_ranks_a_run_continues_bitwise(jobs, continued):
    start, end = jobs
    for before, after in zip(continued[start], continued[end], strict=True):
        assert not before.failure, before.failure
        assert not after.failure, after.failure
        assert after.rates == before.rates[end.resume[1] :]
        assert after.local.keys() == before.local.keys()
        assert [name for name, value in before.local.items() if not torch.equal(value, after.local[name])] == []


@pytest.mark.slow
@pytest.mark.shows(TITLES["fsdp1_hybrid"], "checkpoint, same ranks", "refused")
@pytest.mark.parametrize(
    "jobs", [(source("fsdp1_hybrid", 4), target(source("fsdp1_hybrid", 4), MIDDLE, "fsdp1_hybrid", 4))], ids=["4 ranks"]
)
def test_hybrid_fsdp1_would_continue_with_wrong_moments_and_is_refused(jobs, continued):
    for result in continued[jobs[1]]:
        assert "ConflictError: CPUFSDPStrategy with HYBRID_SHARD: torch restores wrong" in result.failure


@pytest.mark.parametrize("jobs", other_ranks())
def test_on_other_ranks_and_under_other_strategies_it_is_the_same_training(jobs, continued):
    start, end = jobs
    step = end.resume[1]
    data_ranks = {"tp": 1, "fsdp2_tp": 2}.get(end.layout, end.ranks)
    for result in [*continued[start], *continued[end]]:
        assert not result.failure, result.failure
        assert result.optimizer_steps == result.schedule_steps == STEPS
        assert_drifts_like_one_process(end, result)
    for after in continued[end]:
        assert after.rates == pytest.approx(alone().rates[step:], rel=1e-12)
        assert after.accumulation == GLOBAL_BATCH // (MICRO * data_ranks)
    if start.trainer:
        before, after = (whole_masters(job, continued[job], step) for job in jobs)
        assert before.keys() == after.keys()
        assert len(before) == 10
        assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []
