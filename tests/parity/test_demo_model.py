"""The embedded models: what their cards say is true, here and in transformers."""

import json
import math
import sysconfig
from pathlib import Path

import pytest
import torch

from cluster import LLM, SamplingParams
from cluster.checkpoint import EMBEDDED, resolve_checkpoint
from cluster.demo.corpus import END_OF_TEXT, is_held_out
from cluster.demo.train import CONTEXT

LIMITS_MB = {"demo": 25, "demo-draft": 4}
PARAMETERS = {"demo": (5e6, 12e6), "demo-draft": (0.8e6, 1.3e6)}
HELD_OUT_BITS_PER_BYTE = {"demo": 1.6, "demo-draft": 2.2}
PROMPT = "import os\n\n\ndef read_lines(path):\n    "


def held_out_texts(limit_bytes):
    """The first held-out files of this interpreter's library that one context takes whole."""
    root, texts, size = Path(sysconfig.get_paths()["stdlib"]), [], 0
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if relative.startswith(("site-packages/", "dist-packages/")) or not is_held_out(relative):
            continue
        data = path.read_bytes()
        if 500 < len(data) < 2 * CONTEXT and data.isascii():
            texts.append(data.decode())
            size += len(data)
        if size > limit_bytes:
            break
    return texts


@pytest.mark.parametrize("name", EMBEDDED)
def test_size_and_card(name):
    directory = resolve_checkpoint(name)
    assert sum(path.stat().st_size for path in directory.iterdir()) < LIMITS_MB[name] * 1e6
    training = json.loads((directory / "training.json").read_text())
    low, high = PARAMETERS[name]
    assert low <= training["parameters"] <= high
    assert training["held_out_bits_per_byte"] <= HELD_OUT_BITS_PER_BYTE[name]
    card = (directory / "README.md").read_text()
    for figure in ("held_out_bits_per_byte", "minutes"):
        assert str(training[figure]) in card


def test_one_tokenizer_for_both():
    files = [(resolve_checkpoint(name) / "tokenizer.json").read_bytes() for name in EMBEDDED]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", EMBEDDED)
def test_held_out_bits_per_byte(name):
    """Recomputed on a sample of held-out files; the card's figure is over all of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = resolve_checkpoint(name)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    nats = num_bytes = 0
    texts = held_out_texts(limit_bytes=20_000)
    assert len(texts) >= 5
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)])
        assert tokenizer.decode(ids[0, :1]) == END_OF_TEXT
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        num_bytes += len(text)
    # Short files have little context: the sample is harder than the whole.
    assert nats / math.log(2) / num_bytes <= HELD_OUT_BITS_PER_BYTE[name] * 1.15


@pytest.mark.parametrize("name", EMBEDDED)
def test_greedy_completion_is_transformers_own(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = resolve_checkpoint(name)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(directory)(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=48, min_new_tokens=48, do_sample=False)[0, ids.shape[1] :].tolist()
    with LLM(name, device="cpu", dtype="float32", max_num_seqs=2, kv_cache_bytes=2**24) as llm:
        (result,) = llm.generate([PROMPT], SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True))
    assert result.prompt_token_ids == ids[0].tolist()
    assert result.token_ids == expected


def test_completions_look_like_python():
    """Most of what it makes of a begun function compiles."""
    prompt = "def read_lines(path):\n    with open(path"
    sampling = SamplingParams(max_tokens=64, temperature=0.6, seed=0, n=16, stop=("\n\n", "\ndef", "\nclass"))
    with LLM("demo", device="cpu", dtype="float32", max_num_seqs=16, kv_cache_bytes=2**25) as llm:
        (result,) = llm.generate([prompt], sampling)
    compiled = 0
    for output in result.outputs:
        try:
            compile(prompt + output.text + "\n", "completion", "exec")
            compiled += 1
        except SyntaxError:
            pass
    assert compiled >= 8
