"""How far quantization moves the logits of a model whose activations have outliers, ours against other engines'.

    python tests/bench/peer_logits.py [--python openvino=/path/to/venv/bin/python ...] [--work DIR] [--json FILE]

A few channels of every norm's weight are multiplied by 100, as the few large channels of trained models are; in the
second variant the columns of the matrices that read them are divided by 100, so that the model's function is that of
the plain one and only the activations are hard to quantize. The truth is transformers in float32 on the same
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from peer_checkpoints import convert, create_source
from safetensors.torch import load_file, save_file

from cluster.bench.shapes import Shape, shape_named
from cluster.bench.stamp import stamp
from cluster.cli.output import print_table

_RUNNER = Path(__file__).resolve().parent / "peer_runners" / "logits.py"
# Groups of 128 divide its sizes, as OpenVINO's int4 export asks.
_SIZES = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FACTOR, _CHANNELS = 100.0, (3, 140, 287, 450)
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
VARIANTS = ("plain", "outliers", "outliers undone")
# Formats that are compared with each other.
ENGINES = {
    "int8": ("cluster", "openvino", "ctranslate2"),
    "int4": ("cluster", "openvino"),
}


def create_variant(variant: str, work: Path) -> Path:
    """The checkpoint of a variant, with float32 weights."""
    shape = Shape(name=f"logits-{variant.replace(' ', '-')}", config=dict(shape_named("qwen2.5-0.5b").config) | _SIZES)
    directory = work / f"{shape.name}-float32"
    if directory.exists():
        return directory
    create_source(shape, "float32", work)
    if variant != "plain":
        tensors = load_file(directory / "model.safetensors")
        channels = list(_CHANNELS)
        for layer in range(shape.num_layers):
            for norm, readers in _READERS.items():
                tensors[f"model.layers.{layer}.{norm}.weight"][channels] *= _FACTOR
                if variant == "outliers undone":
                    for reader in readers:
                        tensors[f"model.layers.{layer}.{reader}.weight"][:, channels] /= _FACTOR
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def logits_of(engine: str, mode: str, checkpoint: Path, prompts: Path, python: str) -> np.ndarray:
    """(prompts, vocabulary), by the engine in its own environment.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    model = convert(checkpoint, engine, python, mode) if engine in ("openvino", "ctranslate2") else checkpoint
    out = checkpoint / f"{engine}-{mode}.npy"
    command = [python, str(_RUNNER), engine, str(model), mode, str(prompts), str(out)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=checkpoint, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{engine} {mode}: {done.stdout[-2000:]}")
    return np.load(out)


def errors_of(logits_NV: np.ndarray, truth_NV: np.ndarray) -> dict[str, float]:
    """Mean over the prompts of the relative error in the Euclidean norm, and the share of prompts whose likeliest token
    is the same."""
    error_N = np.linalg.norm(logits_NV - truth_NV, axis=1) / np.linalg.norm(truth_NV, axis=1)
    agreement_N = logits_NV.argmax(axis=1) == truth_NV.argmax(axis=1)
    return {"relative error": float(error_N.mean()), "same token": float(agreement_N.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", action="append", default=[], metavar="PROGRAM=PATH", help="its interpreter")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "cluster-peers")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pythons = dict(option.split("=", 1) for option in args.python)
    args.work.mkdir(parents=True, exist_ok=True)
    prompts = args.work / "logits-prompts.json"
    draw = random.Random(0)
    prompts.write_text(
        json.dumps([[draw.randrange(16, _SIZES["vocab_size"]) for _ in range(48)] for _ in range(args.prompts)])
    )

    rows: list[dict[str, Any]] = []
    for variant in VARIANTS:
        checkpoint = create_variant(variant, args.work)
        truth_NV = logits_of("transformers", "float32", checkpoint, prompts, sys.executable)
        for mode, engines in ENGINES.items():
            for engine in engines:
                python = pythons.get(engine, sys.executable)
                try:
                    errors = errors_of(logits_of(engine, mode, checkpoint, prompts, python), truth_NV)
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    continue
                rows.append({"variant": variant, "format": mode, "engine": engine} | errors)
    print_table(
        ["variant", "format", "engine", "relative error", "same token"],
        [[*list(row.values())[:3], f"{row['relative error']:.3%}", f"{row['same token']:.1%}"] for row in rows],
    )
    if args.json:
        args.json.write_text(json.dumps(stamp() | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
