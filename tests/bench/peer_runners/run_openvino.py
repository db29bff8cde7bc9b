"""OpenVINO GenAI's continuous batching, in its defaults but for threads, prefix cache and the size of the pool."""

from __future__ import annotations

from protocol import OnTokens, Task, serve


class OpenVino:
    def __init__(self, task: Task) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._numpy, self._tensor, self._genai = numpy, openvino.Tensor, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = task.max_requests
        scheduler.max_num_batched_tokens = 1024  # as large as a step of ours; its own default is 256
        scheduler.num_kv_blocks = task.max_requests * (task.max_tokens // 16 + 2)
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            task.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": task.threads}
        )
        self._num_requests = 0

    def generate(self, prompts: list[list[int]], new_tokens: int, on_tokens: OnTokens) -> None:
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
        handles = []
        for prompt in prompts:
            ids = self._tensor(self._numpy.array([prompt], dtype=self._numpy.int64))
            handles.append(self._pipeline.add_request(self._num_requests, ids, config))
            self._num_requests += 1
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for index, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        on_tokens(index, len(output.generated_ids))


if __name__ == "__main__":
    serve(OpenVino)
