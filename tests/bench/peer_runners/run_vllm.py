"""vLLM's CPU backend, engine in process, compiled as it does by default."""

from __future__ import annotations

import os

from protocol import OnTokens, Task, serve


class Vllm:
    def __init__(self, task: Task) -> None:
        os.environ["OMP_NUM_THREADS"] = str(task.threads)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{task.threads - 1}"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import EngineArgs, LLMEngine, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._sampling, self._kind = SamplingParams, RequestOutputKind.DELTA
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=task.model,
                dtype=task.mode,
                skip_tokenizer_init=True,
                enable_prefix_caching=False,
                max_model_len=max(1024, task.max_tokens),
                max_num_seqs=task.max_requests,
                disable_log_stats=True,
            )
        )
        self._num_requests = 0

    def generate(self, prompts: list[list[int]], new_tokens: int, on_tokens: OnTokens) -> None:
        sampling = self._sampling(
            temperature=0.0,
            max_tokens=new_tokens,
            min_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=self._kind,
        )
        indices = {}
        for index, prompt in enumerate(prompts):
            request_id = str(self._num_requests)
            indices[request_id] = index
            self._engine.add_request(request_id, {"prompt_token_ids": prompt}, sampling)
            self._num_requests += 1
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                count = len(output.outputs[0].token_ids)
                if count:
                    on_tokens(indices[output.request_id], count)


if __name__ == "__main__":
    serve(Vllm)
