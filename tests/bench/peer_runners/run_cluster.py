"""Our engine, in process, as ``cluster bench engine`` drives it."""

from __future__ import annotations

from protocol import OnTokens, Task, serve


class Cluster:
    def __init__(self, task: Task) -> None:
        from cluster.bench.session import EngineSettings, Session

        self._session = Session(
            EngineSettings(
                checkpoint=task.model, weights=task.mode, num_threads=task.threads, max_num_seqs=task.max_requests
            )
        )

    def generate(self, prompts: list[list[int]], new_tokens: int, on_tokens: OnTokens) -> None:
        self._session.run(prompts, new_tokens, on_tokens)


if __name__ == "__main__":
    serve(Cluster)
