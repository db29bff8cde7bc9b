"""``cluster plan`` as a person runs it."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cluster.cli.main import app


def plan(*args):
    return CliRunner().invoke(app, ["plan", *args])


def as_json(*args):
    result = plan(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_one_shape_on_one_kind_of_device():
    result = plan("--shape", "llama-3.1-70b", "--device-memory", "141GB")
    assert result.exit_code == 0
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert lines[0] == "llama-3.1-70b: 70.55 billion parameters, bfloat16 weights, bfloat16 KV cache"
    assert lines[1].startswith("tp 2 x pp 1, on 2 of 8 devices; KV cache for ")
    header, stage = lines[3], lines[4]
    assert header.split()[:4] == ["STAGE", "LAYERS", "DEVICE", "USABLE"]
    assert stage.split()[:8] == ["1", "0-79", "141.0", "GB", "126.9", "GB", "70.6", "GB"]
    [alone] = [line for line in lines if line.startswith("tp 1 x pp 1")]
    assert alone.endswith("126.9 GB of its 141.0 GB are usable: 17.2 GB are missing")
    assert "CUDA context" in lines[-1]


def test_a_checkpoints_configuration_is_all_that_is_read(tmp_path):
    keys = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
    }
    (tmp_path / "config.json").write_text(json.dumps(keys))
    result = plan(str(tmp_path), "--device", "h100")
    assert result.exit_code == 0
    assert "30.53 billion parameters" in result.stdout
    assert "tp 1 x pp 1" in result.stdout
    assert "through transformers' code, in one shard: arithmetic alone" in result.stdout
    (tmp_path / "config.json").write_text("{")
    broken = plan(str(tmp_path), "--device", "h100")
    assert broken.exit_code == 1
    [line] = broken.stderr.splitlines()
    assert "config.json cannot be read as JSON" in line


def test_options_reach_the_arithmetic():
    base = ("--shape", "llama-3.1-8b", "--device-memory", "24GB")
    one = as_json(*base)
    assert (one["tp_size"], one["pp_size"], one["workload"]["context"]) == (1, 1, 8192)
    assert one["formats"] == {
        "device": "cuda",
        "dtype": "bfloat16",
        "weights": "bfloat16",
        "kv_cache_dtype": "bfloat16",
    }
    assert as_json(*base, "--dtype", "int4")["stages"][0]["weight_bytes"] < one["stages"][0]["weight_bytes"] / 2.5
    wide = as_json(*base, "--kv-cache-dtype", "float32")
    assert wide["stages"][0]["kv_token_bytes"] == 2 * one["stages"][0]["kv_token_bytes"]
    long = as_json(*base, "--context", "32768", "--batch", "3")
    assert long["tp_size"] > 1 and long["contexts"] >= 3
    assert as_json(*base, "--dtype", "float32", "--devices", "6", "--devices-per-node", "1")["pp_size"] > 1
    assert as_json(*base, "--utilization", "0.5", "--context", "1024")["tp_size"] == 2


def test_a_cpu_has_one_machines_memory():
    found = as_json("demo", "--device", "cpu")
    assert found["formats"]["device"] == "cpu"
    [[size]] = found["devices"]["nodes"]
    assert size == found["stages"][0]["usable_bytes"]
    small = as_json("--shape", "llama-3.1-8b", "--device", "cpu", "--device-memory", "14GiB", "--devices", "3")
    assert (small["tp_size"], small["pp_size"]) == (1, 2)


def test_all_says_which_models_fit_which_devices():
    result = plan("--all")
    assert result.exit_code == 0
    header, *rows = [line.split() for line in result.stdout.splitlines() if line][:13]
    assert header == ["MODEL", "PARAMETERS", "WEIGHTS", *["24.0", "GB", "32.0", "GB", "80.0", "GB", "141.0", "GB"]]
    groups = {(row[0], row[3]): " ".join(row[4:]) for row in rows}
    assert len(groups) == 12
    assert groups["llama-2-7b", "bfloat16"].startswith("1 x 1, ")
    assert groups["llama-3.1-70b", "int8"].count(" x 1,") == 3  # 32 GB takes three stages
    assert "The smallest group of at most 8 devices" in result.stdout


def test_all_as_json_has_every_question_and_why_there_is_no_answer():
    rows = as_json("--shape", "llama-3.1-70b", "--shape", "demo", "--dtype", "bfloat16", "--devices", "2")
    assert [(row["model"], row["plan"] is None) for row in rows] == [
        *[("llama-3.1-70b", missing) for missing in (True, True, True, False)],
        *[("demo", False)] * 4,
    ]
    assert "are missing" in rows[0]["problem"] and rows[3]["problem"] is None
    assert rows[3]["plan"]["tp_size"] == 2


def test_what_does_not_fit_is_one_line_with_the_numbers():
    result = plan("--shape", "llama-3.1-70b", "--device", "l4", "--devices", "4")
    assert result.exit_code == 1
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: no group of 4 devices on 1 node holds the model; nearest is tp 4 x pp 1: ")
    assert "are missing. What would help: " in line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "one of MODEL"),
        (["demo", "--all"], "one of MODEL"),
        (["demo", "--device", "h100", "--device-memory", "80GB"], "one of --device"),
        (["demo", "--device", "abacus"], "l4"),
        (["demo", "--device-memory", "80"], None),
        (["demo", "--device-memory", "80 sheep"], "--device-memory"),
        (["demo", "--context", "0"], "--context"),
    ],
)
def test_wrong_usage_is_2(args, said):
    result = plan(*args)
    assert result.exit_code == (2 if said else 1)
    assert said is None or said in result.output


def test_neither_torch_nor_ray_is_imported():
    program = """
import sys
from cluster.cli.main import app
try:
    app(["plan", "--all"])
except SystemExit as end:
    assert not end.code, end.code
heavy = sys.modules.keys() & {"torch", "ray", "transformers", "numpy", "tokenizers", "grpc"}
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
