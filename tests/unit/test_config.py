"""One tree: what is wrong is named with its path, and what is right comes back whole."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from cluster.config import effective_config, json_schema, load_config, parse_config
from cluster.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[2] / "deploy" / "configs").glob("*.yaml"))
DEMO = {"path": "demo"}


def model(**changes):
    return {"models": [DEMO | changes]}


def test_defaults_and_names():
    config = parse_config({"models": [DEMO, {"path": "organisation/Model-7B", "replicas": 2}]})
    assert [m.name for m in config.models] == ["demo", "Model-7B"]
    assert config.models[1].replicas == 2
    assert config.gateway.port == 50051


def test_the_effective_tree_parses_to_the_same_configuration():
    config = parse_config(model(worker={"kv_cache_bytes": "1.5GiB"}))
    assert config.models[0].worker.kv_cache_bytes == 3 * 2**29
    assert parse_config(effective_config(config)) == config


@pytest.mark.parametrize(
    ("tree", "field", "message"),
    [
        ({}, "models", "is required"),
        ({"models": []}, "models", "no model is configured"),
        ({"models": {"path": "demo"}}, "models", "should be a list"),
        (model(replica=2), "models.0.replica", "did you mean 'replicas'"),
        (model(engine={"scheduler": {"max_num_seq": 1}}), "models.0.engine.scheduler.max_num_seq", "max_num_seqs"),
        (model() | {"gateway": {"colour": "red"}}, "gateway.colour", "known here: host, port"),
        (model(replicas=0), "models.0.replicas", "must be at least 1"),
        (model(replicas="two"), "models.0.replicas", "valid integer"),
        (model(path="."), "models.0.name", "no last part"),
        (model(path=""), "models.0.path", "must be"),
        (model(worker={"dtype": "int3"}), "models.0.worker.dtype", "'float32'"),
        (model(worker={"block_size": 0}), "models.0.worker.block_size", "must be at least 1"),
        (model(worker={"gpu_memory_utilization": 1.5}), "models.0.worker.gpu_memory_utilization", "must be in"),
        (model(worker={"kv_cache_bytes": "2 parsecs"}), "models.0.worker.kv_cache_bytes", "is no size"),
        (
            model(engine={"scheduler": {"max_num_seqs": 64, "max_num_batched_tokens": 63}}),
            "models.0.engine.scheduler.max_num_batched_tokens",
            "at least max_num_seqs, 64",
        ),
        (model() | {"gateway": {"port": 65536}}, "gateway.port", "must be in"),
        (model(parallel={"tp": 0}), "models.0.parallel.tp", "must be at least 1, or auto"),
        (model(parallel={"pp": "two"}), "models.0.parallel.pp", "must be a whole number or auto, not 'two'"),
        (model(parallel={"tpp": 2}), "models.0.parallel.tpp", "did you mean 'tp'"),
        (model(parallel="all"), "models.0.parallel", "not 'all'"),
        ({"models": [DEMO, DEMO]}, "models.1.name", "two models are called 'demo'"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(tree, field, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(tree)
    assert caught.value.field == field


def test_every_problem_is_listed():
    with pytest.raises(ConfigError) as caught:
        parse_config(model(replicas="two", colour="red") | {"gatewey": {}, "ray": {"object_store_bytes": "big"}})
    paths = ("models.0.replicas", "models.0.colour", "gatewey", "ray.object_store_bytes")
    assert all(f"{path}: " in str(caught.value) for path in paths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:\n  - [", "line 2"),
        ("- a list", "must be a mapping"),
        ("", "must be a mapping"),
        ("models: !!python/object:os.system {}", "python/object"),
        ("models: [{path: demo, replica: 2}]", r"models\.0\.replica: unknown key"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"(?s)c\.yaml.*{message}"):
        load_config(file)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("1KiB", 1024), ("2GB", 2 * 10**9), (" 0.5 MiB ", 2**19), ("7B", 7)]
)
def test_sizes(text, size):
    config = parse_config(model() | {"ray": {"object_store_bytes": text}})
    assert config.ray.object_store_bytes == size
    jsonschema.validate(model() | {"ray": {"object_store_bytes": text}}, json_schema())


@pytest.mark.parametrize(
    ("parallel", "sizes"), [("auto", ("auto", "auto")), ({"tp": 2}, (2, 1)), ({"tp": "auto", "pp": 4}, ("auto", 4))]
)
def test_parallel_is_a_section_or_one_word(parallel, sizes):
    tree = model(parallel=parallel)
    jsonschema.validate(tree, json_schema())
    config = parse_config(tree)
    assert (config.models[0].parallel.tp, config.models[0].parallel.pp) == sizes
    assert parse_config(effective_config(config)) == config


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda path: path.name)
def test_examples_load_and_fit_the_schema(file):
    load_config(file)
    jsonschema.validate(yaml.safe_load(file.read_text()), json_schema())


def test_there_are_examples_for_a_laptop_one_gpu_and_a_cluster():
    assert {path.name for path in EXAMPLES} == {"laptop.yaml", "single-gpu.yaml", "cluster.yaml"}


def test_the_schema_describes_every_field_and_refuses_unknown_ones():
    schema = json_schema()
    for node in (schema, *schema["$defs"].values()):
        assert node["additionalProperties"] is False
        assert all(value["description"] for value in node["properties"].values())
    with pytest.raises(jsonschema.ValidationError, match="colour"):
        jsonschema.validate(model(colour="red"), schema)
