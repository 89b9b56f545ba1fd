"""Which workers the machines of a cluster can have; no Ray is begun."""

import pytest

from heterostep.errors import HeterostepError

ray = pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
from heterostep.workers import cluster  # noqa: E402


@pytest.fixture
def machines(monkeypatch):
    def have(*nodes, free=None):
        rows = [{"Alive": True, "Resources": node} for node in nodes]
        monkeypatch.setattr(ray, "nodes", lambda: [*rows, {"Alive": False, "Resources": {"GPU": 9.0, "CPU": 9.0}}])
        monkeypatch.setattr(ray, "available_resources", lambda: {"GPU": free} if free else {})

    return have


def hired(device="auto", count=None, gpus=1):
    workers = cluster.hire(None, device, "auto", count, gpus)
    assert all(worker.spec.ranks == gpus for worker in workers)
    return len(workers), workers[0].spec.device, workers[0].spec.cpus, workers[0].spec.gpus


def test_one_worker_for_each_free_gpu(machines):
    machines({"GPU": 4.0, "CPU": 16.0}, {"GPU": 4.0, "CPU": 16.0}, {"CPU": 4.0}, free=8.0)
    assert hired() == (8, "cuda", 1, 1) and hired(count=3) == (3, "cuda", 1, 1)
    machines({"GPU": 4.0, "CPU": 16.0}, free=1.0)
    assert hired()[0] == 1 and hired(count=4)[0] == 4
    assert hired("cpu", 2) == (2, "cpu", 8, 0)
    with pytest.raises(HeterostepError, match="--workers 5, but Ray sees 4 GPUs"):
        hired(count=5)


def test_workers_on_the_cpu_fit_on_single_machines(machines):
    machines({"CPU": 2.0})
    assert hired() == (1, "cpu", 2, 0) and hired(count=2) == (2, "cpu", 1, 0)
    machines({"CPU": 8.0}, {"CPU": 8.0}, {})
    assert hired() == (1, "cpu", 8, 0) and hired(count=3) == (3, "cpu", 4, 0)
    with pytest.raises(HeterostepError, match="--workers 17, but Ray sees 16 CPU cores"):
        hired(count=17)
    with pytest.raises(HeterostepError, match="Ray sees no GPU"):
        hired("cuda")


def test_a_group_has_its_gpus_on_one_machine(machines):
    machines({"GPU": 4.0, "CPU": 16.0}, {"GPU": 3.0, "CPU": 16.0}, {"CPU": 4.0}, free=7.0)
    assert hired(gpus=2) == (3, "cuda", 1, 2) and hired(gpus=4) == (1, "cuda", 1, 4) and hired(gpus=3)[0] == 2
    with pytest.raises(HeterostepError, match="--workers 4, but Ray sees 3 groups of 2 GPUs"):
        hired(count=4, gpus=2)
    with pytest.raises(HeterostepError, match="--gpus-per-video 5, but no machine of Ray's has more than 4"):
        hired(gpus=5)
    # Two are in use, and might be on the machine where that costs most.
    machines({"GPU": 4.0}, {"GPU": 4.0}, free=6.0)
    assert hired(gpus=2)[0] == 2 and hired(gpus=1)[0] == 6 and hired(gpus=4)[0] == 1 and hired(gpus=2, count=4)[0] == 4
    machines({"GPU": 8.0}, free=6.0)
    assert hired(gpus=2)[0] == 3


def test_groups_on_the_cpu_are_asked_for(machines):
    machines({"CPU": 4.0})
    assert hired("cpu", gpus=2) == (1, "cpu", 4, 0) and hired("cpu", 2, gpus=2) == (2, "cpu", 2, 0)
    with pytest.raises(HeterostepError, match=r"--gpus-per-video 2, but Ray sees no GPU \(--device cpu is for a try\)"):
        hired(gpus=2)


def test_options_and_addresses_are_checked_before_ray_is_begun(monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was begun"))
    with pytest.raises(HeterostepError, match="for Ray chooses the GPUs"):
        cluster.check_options("cuda:1", 1)
    cluster.check_options("auto", 2)
    monkeypatch.setattr(cluster.os, "name", "nt")
    with pytest.raises(HeterostepError, match="leave out --gpus-per-video"):
        cluster.check_options("auto", 2)
    monkeypatch.undo()
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was begun"))
    for address in ("auto", "head", "ray://127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:99999", "no.such.host.invalid:1"):
        with pytest.raises(HeterostepError, match="no Ray at|host:port of a Ray cluster's head"):
            cluster.connect(address)


def test_a_worker_that_has_ended_is_lost():
    import asyncio

    worker = cluster.RayWorker("worker 1", cluster.Spec(None, "cpu", "auto", 1, 0))
    with pytest.raises(cluster.WorkerLost, match="worker 1 has ended"):
        asyncio.run(worker.progress())
