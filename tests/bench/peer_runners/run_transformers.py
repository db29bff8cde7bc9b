"""transformers' generate(): one static batch with a dynamic cache, all prompts of one length."""

from __future__ import annotations

from typing import Any

from protocol import OnTokens, Task, serve


class Transformers:
    def __init__(self, task: Task) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(task.threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(task.model, dtype=getattr(torch, task.mode)).eval()

    def generate(self, prompts: list[list[int]], new_tokens: int, on_tokens: OnTokens) -> None:
        not_done = self._torch.zeros(len(prompts), dtype=self._torch.bool)

        def note(input_ids: Any, scores: Any, **_: Any) -> Any:  # called after every step
            for index in range(len(prompts)):
                on_tokens(index, 1)
            return not_done

        ids = self._torch.tensor(prompts)
        with self._torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=[note],
            )


if __name__ == "__main__":
    serve(Transformers)
