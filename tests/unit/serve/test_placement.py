"""What replicas reserve, on machines of odd sizes."""

from __future__ import annotations

import pytest

from cluster.distributed.config import ParallelConfig
from cluster.errors import ConfigError
from cluster.serve.config import ModelConfig
from cluster.serve.placement import LOCAL_GATEWAY_CPUS, Resources, place_anywhere, place_locally
from cluster.worker.config import WorkerConfig


def create_models(*replicas: int, device: str = "auto", **options: object) -> tuple[ModelConfig, ...]:
    return tuple(
        ModelConfig(path=f"m{index}", replicas=count, worker=WorkerConfig(device=device), **options)
        for index, count in enumerate(replicas)
    )


def nodes(*sizes: tuple[float, float]) -> list[Resources]:
    return [Resources(num_cpus=num_cpus, num_gpus=num_gpus) for num_cpus, num_gpus in sizes]


@pytest.mark.parametrize("cores", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("replicas", [(1,), (2,), (3, 1), (5, 7, 2)])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 3), (2, 2)])
def test_any_laptop_holds_any_number_of_replicas(cores: int, replicas: tuple[int, ...], tp: int, pp: int):
    models = create_models(*replicas, parallel=ParallelConfig(tp=tp, pp=pp))
    placements = place_locally(models, Resources(num_cpus=cores, num_gpus=0))
    bundles = [bundle for placement in placements for bundle in placement.bundles * placement.model.replicas]
    assert 0 < sum(bundle["CPU"] for bundle in bundles) <= cores - LOCAL_GATEWAY_CPUS + 1e-9
    assert all(bundle.keys() == {"CPU"} for bundle in bundles)
    for placement in placements:
        assert placement.model.worker.device == "cpu" and placement.shard.num_gpus == 0
        # Ray counts in 1e-4: what has more digits is rounded there, and its parts might not fit the whole.
        for amount in (placement.shard.num_cpus, placement.engine_cpus, *(bundle["CPU"] for bundle in bundles)):
            assert amount == round(amount, 4)


def test_a_bundle_holds_one_stage_and_the_first_one_the_engine_too():
    models = create_models(1, device="cuda", parallel=ParallelConfig(tp=4, pp=2), accelerator_type="H100")
    (placement,) = place_anywhere(models, nodes((16, 4), (16, 4)))
    assert placement.bundles == [
        {"CPU": 5, "GPU": 4, "accelerator_type:H100": 0.001},
        {"CPU": 4, "GPU": 4, "accelerator_type:H100": 0.001},
    ]
    assert (placement.engine_cpus, placement.shard) == (1, Resources(num_cpus=1, num_gpus=1))


@pytest.mark.parametrize(
    ("replicas", "sizes", "strategy"),
    [
        (1, [(8, 4)], "STRICT_PACK"),
        (1, [(8, 2), (8, 2)], "PACK"),
        (2, [(8, 4), (8, 4)], "STRICT_PACK"),
        (2, [(16, 8)], "STRICT_PACK"),
        # The second replica would wait for ever for a node that could hold it whole.
        (2, [(16, 6), (8, 2)], "PACK"),
    ],
)
def test_stages_share_a_node_where_all_replicas_can(replicas: int, sizes: list[tuple[float, float]], strategy: str):
    models = create_models(replicas, device="cuda", parallel=ParallelConfig(tp=2, pp=2))
    (placement,) = place_anywhere(models, nodes(*sizes))
    assert placement.strategy == strategy


def test_a_stage_that_no_node_can_hold_is_told():
    models = create_models(1, device="cuda", parallel=ParallelConfig(tp=4))
    with pytest.raises(ConfigError, match=r"4 shards that need 4 GPUs and 5 CPUs on one node.*raise parallel\.pp"):
        place_anywhere(models, nodes((16, 2), (16, 2)))


@pytest.mark.parametrize(("cores", "replicas", "threads"), [(8, 2, 4), (8, 3, 2), (2, 3, 1), (1, 1, 1), (7, 1, 7)])
def test_cpu_shards_share_the_cores_for_their_threads(cores: int, replicas: int, threads: int):
    machine = Resources(num_cpus=cores, num_gpus=0)
    for models in (create_models(replicas), create_models(1, parallel=ParallelConfig(tp=replicas))):
        (placement,) = place_locally(models, machine)
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
        place_anywhere(models, nodes((4, machine_gpus))),
    ):
        assert (placement.model.worker.device, placement.shard.num_gpus) == expected


def test_too_few_gpus_are_told_with_both_numbers():
    with pytest.raises(ConfigError, match="ask for 3 GPUs and Ray has 2"):
        place_locally(create_models(3), Resources(num_cpus=8, num_gpus=2))


def test_too_few_cpus_are_told_instead_of_waited_for():
    with pytest.raises(ConfigError, match="CPUs and Ray has 4"):
        place_anywhere(create_models(4), nodes((2, 0), (2, 0)))
    place_anywhere(create_models(3), nodes((2, 0), (2, 0)))


def test_a_cluster_yet_unknown_is_not_judged():
    (placement,) = place_anywhere(create_models(50, device="cuda"), None)
    assert placement.shard == Resources(num_cpus=1, num_gpus=1)
