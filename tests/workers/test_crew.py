import asyncio

import pytest

from crews import FakeWorker
from heterostep.errors import HeterostepError
from heterostep.order import Order
from heterostep.workers.crew import MOST_LOSSES, MOST_STARTS, Crew, Job


def job(number, prompt="a", with_image=False):
    return Job(str(number), lambda: Order(prompt, dense=False), with_image)


def crew_of(workers, **options):
    """A crew, and what it made: (job, bytes or None)."""
    made = []

    async def ended(job):
        made.append((job.id, job.outcome.made.video if job.outcome and job.outcome.made else None))

    return Crew(workers, ended, **options), made


def ran(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 20))


async def through(crew, jobs):
    async with crew:
        for each in jobs:
            await crew.submit(each)
        await crew.idle()


def test_jobs_are_made_once_each_over_all_workers():
    workers = [FakeWorker("1"), FakeWorker("2")]
    crew, made = crew_of(workers)
    jobs = [job(number) for number in range(9)]
    ran(through(crew, jobs))
    assert sorted(id for id, _ in made) == [each.id for each in jobs]
    assert {each.state for each in jobs} == {"done"} and all(worker.jobs for worker in workers)
    assert all(each.outcome is None for each in jobs)


def test_a_lost_worker_is_started_again_and_its_job_made_again():
    worker, told = FakeWorker(), []
    crew, made = crew_of([worker], lost=lambda job, what: told.append((job.id, what)))
    jobs = [job(1), job(2, "die once"), job(3)]
    ran(through(crew, jobs))
    assert worker.jobs == ["1", "2", "2", "3"] and worker.starts == 1
    assert told == [("2", "it is made again")] and jobs[1].losses == 1 and len(made) == 3


def test_a_job_that_ends_every_worker_is_given_up_and_the_others_are_made():
    worker = FakeWorker()
    crew, made = crew_of([worker])
    bad, good = job(1, "die"), job(2)
    ran(through(crew, [bad, good]))
    assert bad.state == "failed" and "3 workers were lost while they made it" in bad.message
    assert worker.jobs == ["1"] * MOST_LOSSES + ["2"] and good.state == "done" and made[0] == ("1", None)


def test_one_worker_that_does_not_come_back_leaves_the_work_to_the_others():
    broken, whole = FakeWorker("1"), FakeWorker("2")
    broken.broken = True
    crew, made = crew_of([broken, whole])
    jobs = [job(number) for number in range(4)]
    ran(through(crew, jobs))
    assert len(made) == 4 and {each.state for each in jobs} == {"done"} and broken.starts == MOST_STARTS
    assert crew.workers == [whole]


def test_without_workers_all_that_waits_fails():
    worker = FakeWorker()
    worker.broken = True
    crew, made = crew_of([worker])
    jobs = [job(1), job(2)]
    with pytest.raises(HeterostepError, match="no worker is left: worker 1 does not start"):
        ran(through(crew, jobs))
    assert {each.state for each in jobs} == {"failed"} and made == []
    with pytest.raises(HeterostepError, match="no worker is left"):
        asyncio.run(crew.submit(job(3)))


def test_failures_and_orders_that_are_gone_end_one_job_alone():
    crew, made = crew_of([FakeWorker()])

    def gone():
        raise HeterostepError("cannot read the image x.png")

    jobs = [job(1, "fail"), Job("2", gone), job(3)]
    ran(through(crew, jobs))
    assert [each.state for each in jobs] == ["failed", "failed", "done"]
    assert [each.message for each in jobs[:2]] == ["it failed: on purpose", "cannot read the image x.png"]


def test_waiting_and_running_jobs_are_cancelled():
    async def scene():
        worker = FakeWorker()
        crew, made = crew_of([worker])
        running, waiting, last = job(1, "wait"), job(2), job(3)
        async with crew:
            for each in (running, waiting, last):
                await crew.submit(each)
            while running.state != "running" or await worker.progress() is None:
                await asyncio.sleep(0)
            await crew.look()
            assert (running.done, running.steps) == (3, 12)
            await crew.cancel(waiting)
            await crew.cancel(running)
            assert running.state == waiting.state == "cancelled"
            await crew.idle()
        assert worker.jobs == ["1", "3"] and [id for id, _ in made] == ["3"]
        await crew.cancel(last)
        assert last.state == "done"

    ran(scene())


def test_what_cannot_be_kept_ends_the_crew():
    async def ended(job):
        raise OSError("no space left")

    jobs = [job(1), job(2)]
    with pytest.raises(OSError, match="no space left"):
        ran(through(Crew([FakeWorker()], ended), jobs))
    assert jobs[1].state == "failed"
