"""The devices that a replica may be put on, and the memory that they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DeviceKind = Literal["cpu", "cuda"]

_MIB = 2**20
_UNSEEN_MIB = 640  # nvidia-smi counts them and CUDA does not give them: 480 MiB on an RTX 4090, 616 on an H200
_NVIDIA_SMI_MIB = {
    "l4": 23_034,
    "a10g": 23_028,
    "rtx-4090": 24_564,
    "rtx-5090": 32_607,
    "a100-40g": 40_960,
    "l40s": 46_068,
    "a100-80g": 81_920,
    "h100": 81_559,
    "h200": 143_771,
    "b200": 183_359,
}
DEVICE_BYTES = {name: (total - _UNSEEN_MIB) * _MIB for name, total in _NVIDIA_SMI_MIB.items()}
"""Of GPUs, by Ray's names of accelerator types in small letters."""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What there is to choose from.

    Attributes:
        nodes: bytes of each device of each node. A CPU node has one number, which its shards share.
        utilization: share of a GPU that weights, activations and KV cache may take together; CPUs give all.
    """

    kind: DeviceKind
    nodes: tuple[tuple[int, ...], ...]
    utilization: float = 0.9

    @property
    def num_devices(self) -> int:
        return sum(map(len, self.nodes))

    def usable(self, device_bytes: int, reserve_bytes: int) -> int:
        """Bytes of one device for weights, activations and KV cache together."""
        if self.kind == "cpu":
            return device_bytes
        return min(int(self.utilization * device_bytes), device_bytes - reserve_bytes)

    def stages(self, tp_size: int, pp_size: int) -> tuple[int, ...]:
        """Bytes of the smallest device of each stage, largest stage first; empty: they do not find room.

        The shards of a stage are on one node.
        """
        if self.kind == "cpu":
            machines = sorted((node[0] for node in self.nodes), reverse=True)
            counts = [len(range(i, pp_size, len(machines))) for i in range(len(machines))]
            return tuple(
                size // (tp_size * count) for size, count in zip(machines, counts, strict=True) for _ in range(count)
            )
        places: list[int] = []
        for node in self.nodes:
            ordered = sorted(node, reverse=True)
            places += [ordered[end - 1] for end in range(tp_size, len(ordered) + 1, tp_size)]
        return tuple(sorted(places, reverse=True)[:pp_size]) if len(places) >= pp_size else ()
