"""What values.schema.json lets through. Needs no renderer."""

import importlib.util
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

REPO = Path(__file__).resolve().parents[3]
CHART = REPO / "helm"


@pytest.fixture(scope="module")
def schema():
    return json.loads((CHART / "values.schema.json").read_text())


@pytest.fixture
def errors_of(schema):
    """``errors_of(values)``: paths and messages of what the schema refuses."""
    validator = jsonschema.Draft7Validator(schema)

    def errors_of(values):
        return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(values)]

    return errors_of


def test_the_schema_is_one(schema):
    jsonschema.Draft7Validator.check_schema(schema)


def test_the_schema_is_what_the_dataclasses_generate(schema):
    spec = importlib.util.spec_from_file_location("generate_schema", CHART / "generate_schema.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert schema == json.loads(json.dumps(generator.values_schema())), "run helm/generate_schema.py"


def test_the_default_values_pass(errors_of, values):
    assert errors_of(values) == []


def put(values, path, value):
    """Sets what a dotted ``path`` names; numbers are places in lists."""
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in parents:
        values = values[key]
    values[last] = value


@pytest.mark.parametrize(
    "path",
    [
        "replicas",
        "image.registry",
        "head.resources.claims",
        "workerGroups.0.gpu",
        "cluster.model",
        "cluster.gateway.prot",
        "cluster.models.0.gpus",
        "cluster.models.0.worker.dtypes",
    ],
)
def test_an_unknown_value_is_refused_and_named(errors_of, values, path):
    put(values, path, 1)
    (error,) = errors_of(values)
    where, _, name = path.rpartition(".")
    assert error.startswith(f"{where}: ") and f"{name!r}" in error


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("workerGroups.0.gpus", -1),
        ("workerGroups.0.name", "gateway"),
        ("workerGroups.0.name", "Not A Label"),
        ("workerGroups.0.resources", {"requests": {}}),
        ("cluster.gateway.port", "50051"),
        ("cluster.models.0.worker.device", "tpu"),
        ("cluster.models.0", {"name": "no path"}),
        ("shmSize", "much"),
    ],
)
def test_a_wrong_value_is_refused(errors_of, values, path, value):
    put(values, path, value)
    assert errors_of(values)


def test_every_value_is_described(values):
    blocks = (CHART / "values.yaml").read_text().split("\n\n")
    described = [block for block in blocks if "# -- " in block]
    assert [key for key in values if not any(f"\n{key}:" in f"\n{block}" for block in described)] == []


def test_the_charts_tree_is_a_valid_configuration(values, tmp_path):
    from cluster.config import load_config

    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(values["cluster"]))
    assert load_config(file).gateway.port == 50051
