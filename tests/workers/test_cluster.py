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


def hired(device="auto", count=None):
    workers = cluster.hire(None, device, "auto", count)
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


def test_options_and_addresses_are_checked_before_ray_is_begun(monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was begun"))
    for device, gpus, message in (("cuda:1", 1, "for Ray chooses the GPUs"), ("auto", 2, "leave out --gpus-per-video")):
        with pytest.raises(HeterostepError, match=message):
            cluster.check_options(device, gpus)
    for address in ("auto", "head", "ray://127.0.0.1:1", "127.0.0.1:1", "127.0.0.1:99999", "no.such.host.invalid:1"):
        with pytest.raises(HeterostepError, match="no Ray at|host:port of a Ray cluster's head"):
            cluster.connect(address)


def test_a_worker_that_has_ended_is_lost():
    import asyncio

    worker = cluster.RayWorker("worker 1", cluster.Spec(None, "cpu", "auto", 1, 0))
    with pytest.raises(cluster.WorkerLost, match="worker 1 has ended"):
        asyncio.run(worker.progress())
