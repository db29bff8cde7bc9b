"""Next-token logits of an engine, for comparison with those of float32. Run by the interpreter of its environment:

    python logits.py ENGINE MODEL MODE PROMPTS.json LOGITS.npy

Prompts are lists of token ids; the logits after each prompt's last token are stored as float32 (prompts, vocabulary).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Prompts = list[list[int]]


def openvino(model: str, mode: str, prompts: Prompts) -> list[np.ndarray]:
    """The exported model on the CPU plugin that continuous batching uses too, keys and values in its state."""
    import openvino as ov

    request = ov.Core().compile_model(f"{model}/openvino_model.xml", "CPU").create_infer_request()
    rows = []
    for prompt in prompts:
        request.reset_state()
        result = request.infer(
            {
                "input_ids": np.array([prompt], dtype=np.int64),
                "attention_mask": np.ones((1, len(prompt)), dtype=np.int64),
                "position_ids": np.arange(len(prompt), dtype=np.int64)[None],
                "beam_idx": np.zeros(1, dtype=np.int32),
            }
        )
        rows.append(result["logits"][0, -1])
    return rows


def ctranslate2(model: str, mode: str, prompts: Prompts) -> list[np.ndarray]:
    import ctranslate2

    generator = ctranslate2.Generator(model, "cpu", compute_type=mode)
    return [np.array(generator.forward_batch([prompt]))[0, -1] for prompt in prompts]


def transformers(model: str, mode: str, prompts: Prompts) -> list[np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, mode)).eval()
    with torch.inference_mode():
        return [loaded(torch.tensor([prompt])).logits[0, -1].numpy() for prompt in prompts]


def cluster(model: str, mode: str, prompts: Prompts) -> list[np.ndarray]:
    """Our engine; its logits are taken on their way to the sampler."""
    from cluster.bench.session import EngineSettings, Session
    from cluster.models.decoder import DecoderForCausalLM

    compute_logits, rows = DecoderForCausalLM.compute_logits, []

    def note_logits(self: DecoderForCausalLM, hidden_SD: Any) -> Any:
        logits_SV = compute_logits(self, hidden_SD)
        rows.extend(logits_SV.float().numpy().copy())
        return logits_SV

    with Session(EngineSettings(checkpoint=model, weights=mode, num_threads=1, max_num_seqs=1)) as session:
        DecoderForCausalLM.compute_logits = note_logits
        for prompt in prompts:
            session.run([prompt], 1)
    return rows


ENGINES: dict[str, Callable[[str, str, Prompts], list[np.ndarray]]] = {
    "openvino": openvino,
    "ctranslate2": ctranslate2,
    "transformers": transformers,
    "cluster": cluster,
}


def main() -> None:
    engine, model, mode, prompts, out = sys.argv[1:]
    rows = ENGINES[engine](model, mode, json.loads(Path(prompts).read_text()))
    np.save(out, np.stack(rows).astype(np.float32))


if __name__ == "__main__":
    main()
