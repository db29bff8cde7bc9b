"""CTranslate2's generator: one static batch, all prompts of one length, so nothing of it is padding."""

from __future__ import annotations

import json
import os
from pathlib import Path

from protocol import OnTokens, Task, serve


class CTranslate2:
    def __init__(self, task: Task) -> None:
        os.environ["OMP_NUM_THREADS"] = str(task.threads)
        import ctranslate2

        self._generator = ctranslate2.Generator(
            task.model, "cpu", compute_type=task.mode, inter_threads=1, intra_threads=task.threads
        )
        self._tokens = json.loads(Path(task.model, "vocabulary.json").read_text())

    def generate(self, prompts: list[list[int]], new_tokens: int, on_tokens: OnTokens) -> None:
        self._generator.generate_batch(
            [[self._tokens[token_id] for token_id in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            end_token=[],
            include_prompt_in_result=False,
            callback=lambda step: on_tokens(step.batch_id, 1),
        )


if __name__ == "__main__":
    serve(CTranslate2)
