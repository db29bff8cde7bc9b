"""Our engine, in process, as ``cluster bench engine`` drives it."""

from __future__ import annotations

from pathlib import Path

from protocol import OnTokens, Task, serve


class Cluster:
    def __init__(self, task: Task) -> None:
        from cluster.bench.session import Session, pool_bytes, scheduler_for
        from cluster.bench.shapes import shape_of
        from cluster.worker.config import WorkerConfig

        shape = shape_of(Path(task.model))
        kv_bytes_per_token = 8 * shape.num_layers * shape.num_kv_heads * shape.head_dim
        self._session = Session(
            Path(task.model),
            WorkerConfig(
                device="cpu",
                dtype=task.mode,
                num_threads=task.threads,
                kv_cache_bytes=pool_bytes(kv_bytes_per_token, 16, task.max_requests, task.max_tokens),
            ),
            scheduler_for(task.max_requests),
        )

    def generate(self, prompts: list[list[int]], new_tokens: int, on_tokens: OnTokens) -> None:
        self._session.run(prompts, new_tokens, on_tokens)


if __name__ == "__main__":
    serve(Cluster)
