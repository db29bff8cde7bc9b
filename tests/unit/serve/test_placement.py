"""What replicas reserve, on machines of odd sizes."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from cluster.serve.config import ModelConfig
from cluster.serve.placement import LOCAL_GATEWAY_CPUS, Resources, place_anywhere, place_locally
from cluster.worker.config import WorkerConfig


def create_models(*replicas: int, device: str = "auto", **options: object) -> tuple[ModelConfig, ...]:
    return tuple(
        ModelConfig(path=f"m{index}", replicas=count, worker=WorkerConfig(device=device), **options)
        for index, count in enumerate(replicas)
    )


@pytest.mark.parametrize("cores", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("replicas", [(1,), (2,), (3, 1), (5, 7, 2)])
def test_any_laptop_holds_any_number_of_replicas(cores: int, replicas: tuple[int, ...]):
    placements = place_locally(create_models(*replicas), Resources(num_cpus=cores, num_gpus=0))
    total = sum(placement.num_cpus * placement.model.replicas for placement in placements)
    assert 0 < total <= cores - LOCAL_GATEWAY_CPUS
    assert all(placement.model.worker.device == "cpu" and placement.num_gpus == 0 for placement in placements)


@pytest.mark.parametrize(("cores", "replicas", "threads"), [(8, 2, 4), (8, 3, 2), (2, 3, 1), (1, 1, 1), (7, 1, 7)])
def test_cpu_replicas_share_the_cores_for_their_threads(cores: int, replicas: int, threads: int):
    (placement,) = place_locally(create_models(replicas), Resources(num_cpus=cores, num_gpus=0))
    assert placement.model.worker.num_threads == threads


def test_threads_that_are_set_stay():
    model = ModelConfig(path="m", replicas=2, worker=WorkerConfig(num_threads=5))
    (placement,) = place_locally((model,), Resources(num_cpus=4, num_gpus=0))
    assert placement.model.worker.num_threads == 5


@pytest.mark.parametrize(
    ("device", "num_gpus", "machine_gpus", "expected"),
    [
        ("auto", None, 0, ("cpu", 0)),
        ("auto", None, 2, ("cuda", 1)),
        ("auto", 0, 2, ("cpu", 0)),
        ("auto", 0.5, 1, ("cuda", 0.5)),
        ("cpu", None, 2, ("cpu", 0)),
        ("cuda", None, 2, ("cuda", 1)),
        ("cuda", 2, 2, ("cuda", 2)),
    ],
)
def test_device_and_gpus(device: str, num_gpus: float | None, machine_gpus: int, expected: tuple[str, float]):
    models = create_models(1, device=device, num_gpus=num_gpus)
    for (placement,) in (
        place_locally(models, Resources(num_cpus=4, num_gpus=machine_gpus)),
        place_anywhere(models, Resources(num_cpus=4, num_gpus=machine_gpus)),
    ):
        assert (placement.model.worker.device, placement.num_gpus) == expected


def test_too_few_gpus_are_told_with_both_numbers():
    with pytest.raises(ConfigError, match="ask for 3 GPUs and Ray has 2"):
        place_locally(create_models(3), Resources(num_cpus=8, num_gpus=2))


def test_too_few_cpus_are_told_instead_of_waited_for():
    with pytest.raises(ConfigError, match="CPUs and Ray has 4"):
        place_anywhere(create_models(4), Resources(num_cpus=4, num_gpus=0))
    place_anywhere(create_models(3), Resources(num_cpus=4, num_gpus=0))


def test_a_cluster_yet_unknown_is_not_judged():
    (placement,) = place_anywhere(create_models(50, device="cuda"), None)
    assert (placement.num_cpus, placement.num_gpus) == (1, 1)
