"""One checkpoint for every engine: random weights written once, and converted for those with a format of their own.

Everything is kept in a work directory and found there by the next run.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from cluster.bench.shapes import Shape, WeightDtype, write_checkpoint

_RUNNERS = Path(__file__).resolve().parent / "peer_runners"
_SEED = 0


def create_source(shape: Shape, dtype: WeightDtype, work: Path) -> Path:
    """The checkpoint in Hugging Face's layout, with a tokenizer for converters that ask for one."""
    directory = work / f"{shape.name}-{dtype}"
    if not (directory / "tokenizer.json").exists():
        write_checkpoint(shape, directory, dtype=dtype, seed=_SEED)
        _write_tokenizer(shape, directory)
    return directory


def convert(source: Path, converter: str, python: str, weights: str) -> Path:
    """``source`` in another engine's format.

    Args:
        converter: openvino or ctranslate2.
        python: interpreter of that engine's environment.
        weights: format of the weights, by the converter's name.

    Raises:
        RuntimeError: the converter failed; the message ends with its output.
    """
    directory = source.with_name(f"{source.name}-{converter}-{weights}")
    done = directory / "converted"
    if not done.exists():
        command = [python, str(_RUNNERS / f"convert_{converter}.py"), str(source), str(directory), weights]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{converter} could not convert {source}:\n{result.stdout[-2000:]}")
        done.touch()
    return directory


def _write_tokenizer(shape: Shape, directory: Path) -> None:
    """A word per token id; no text is ever made of them."""
    names = [f"t{token_id}" for token_id in range(shape.vocab_size)]
    special = {"bos_token": shape.config["bos_token_id"], "eos_token": shape.config["eos_token_id"]}
    names[special["bos_token"]] = "<s>"
    names[special["eos_token"]] = "<|endoftext|>"  # transformers adds this one to Qwen2's vocabularies that lack it
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": names[0]}
    config |= {name: names[token_id] for name, token_id in special.items()}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
