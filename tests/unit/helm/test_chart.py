"""What the chart renders, one behaviour per test. Needs a renderer (see conftest.py); skips without one."""

import base64
import copy
import json
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

REPO = Path(__file__).resolve().parents[3]
CRD_SCHEMA = REPO.parent / "shared" / "kuberay" / "rayservice-v1.schema.json"


def pods_of(ray_service):
    """Pod templates by group name, the head's under "head"."""
    cluster = ray_service["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


def container_of(pod):
    (container,) = pod["spec"]["containers"]
    return container


def serve_config_of(ray_service):
    return yaml.safe_load(ray_service["spec"]["serveConfigV2"])


@pytest.fixture
def ray_service(render):
    return render()["RayService"]


@pytest.fixture
def pods(ray_service):
    return pods_of(ray_service)


@pytest.fixture(scope="session")
def crd_validator():
    """Checks an object against KubeRay's own definition of a RayService."""
    if not CRD_SCHEMA.is_file():
        pytest.skip("KubeRay's schema of a RayService is not beside the checkout")
    return jsonschema.Draft7Validator(json.loads(CRD_SCHEMA.read_text()))


def test_the_ray_service_is_what_kuberay_defines(ray_service, crd_validator):
    assert (ray_service["apiVersion"], ray_service["kind"]) == ("ray.io/v1", "RayService")
    assert [error.message for error in crd_validator.iter_errors(ray_service)] == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda spec: spec.update(serveConfig="v1"),
        lambda spec: spec["rayClusterConfig"].pop("headGroupSpec"),
        lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].pop("groupName"),
        lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"].update(container=[]),
        lambda spec: spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
    ],
    ids=["unknown field", "no head", "group without name", "misspelt pod field", "number for a string"],
)
def test_a_broken_ray_service_fails_that_check(ray_service, crd_validator, damage):
    broken = copy.deepcopy(ray_service)
    damage(broken["spec"])
    assert not crd_validator.is_valid(broken)


def test_the_configuration_tree_arrives_verbatim(render):
    tree = {
        "models": [
            {"path": "org/model: 'a' \"b\" {{ .c }} <&>", "name": "first", "worker": {"kv_cache_bytes": 2**40 + 1}},
            {"path": "/models/ü", "engine": {"scheduler": {"max_num_batched_tokens": 1_048_576}}},
        ],
        "gateway": {"host": "::", "port": 50051, "http_port": 0, "default_deadline_s": 0.5, "insecure": False},
        "ray": {"address": "auto", "object_store_bytes": 200_000_000},
        "logging": {"level": "error", "format": "text"},
    }
    (application,) = serve_config_of(render({"cluster": tree})["RayService"])["applications"]
    assert application["args"] == {"config": tree}
    assert type(application["args"]["config"]["models"][0]["worker"]["kv_cache_bytes"]) is int


def test_serve_takes_the_configuration(ray_service):
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(serve_config_of(ray_service))
    assert [application.import_path for application in config.applications] == ["cluster.serve.app:build"]
    assert config.proxy_location == "Disabled"


def test_gpus_are_requested_and_limited(render, values):
    (group,) = values["workerGroups"]
    group["gpus"] = 4
    pods = pods_of(render(values)["RayService"])
    resources = container_of(pods["gpu"])["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == 4


def test_only_worker_groups_take_gpus(pods):
    with_gpus = [name for name, pod in pods.items() if "nvidia.com/gpu" in container_of(pod)["resources"]["limits"]]
    assert with_gpus == ["gpu"]


def test_a_group_without_gpus_asks_for_none(render, values):
    values["workerGroups"].append({**values["workerGroups"][0], "name": "cpu", "gpus": 0, "replicas": 3})
    ray_service = render(values)["RayService"]
    assert set(container_of(pods_of(ray_service)["cpu"])["resources"]["limits"]) == {"cpu", "memory"}
    group = ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"][-1]
    assert (group["groupName"], group["replicas"], group["minReplicas"], group["maxReplicas"]) == ("cpu", 3, 3, 3)


@pytest.mark.parametrize("group", ["head", "gateway"])
def test_resources_come_from_values(render, values, group):
    values[group]["resources"] = {"requests": {"cpu": "3", "memory": "5Gi"}, "limits": {"cpu": "7", "memory": "9Gi"}}
    assert container_of(pods_of(render(values)["RayService"])[group])["resources"] == values[group]["resources"]


def test_groups_are_placed_by_values(render, values):
    tolerations = [{"key": "spot", "operator": "Exists"}]
    for group in (values["head"], values["gateway"], values["workerGroups"][0]):
        group.update(nodeSelector={"pool": "inference"}, tolerations=tolerations)
    for pod in pods_of(render(values)["RayService"]).values():
        assert pod["spec"]["nodeSelector"] == {"pool": "inference"}
        assert pod["spec"]["tolerations"] == tolerations


def test_the_service_leads_to_the_gateways_port(render):
    objects = render()
    service = objects["Service"]["spec"]
    container_ports = container_of(pods_of(objects["RayService"])["gateway"])["ports"]
    assert service["type"] == "ClusterIP"
    assert [port["port"] for port in service["ports"]] == [50051, 8000]
    assert [port["targetPort"] for port in service["ports"]] == [port["name"] for port in container_ports]
    assert [port["containerPort"] for port in container_ports] == [50051, 8000]


def test_without_http_there_is_no_port_for_it(render, values):
    values["cluster"]["gateway"]["http_port"] = None
    objects = render(values)
    assert len(objects["Service"]["spec"]["ports"]) == 1
    assert len(container_of(pods_of(objects["RayService"])["gateway"])["ports"]) == 1


def test_the_service_selects_the_gateways_pods_alone(render):
    objects = render()
    selector = objects["Service"]["spec"]["selector"].items()
    pods = pods_of(objects["RayService"])
    assert [name for name, pod in pods.items() if selector <= pod["metadata"]["labels"].items()] == ["gateway"]


def test_another_port_is_used_everywhere(render, values):
    values["cluster"]["gateway"]["port"] = 6000
    objects = render(values)
    container = container_of(pods_of(objects["RayService"])["gateway"])
    assert objects["Service"]["spec"]["ports"][0]["port"] == 6000
    assert container["ports"][0]["containerPort"] == container["readinessProbe"]["grpc"]["port"] == 6000


def test_the_gateway_runs_in_its_own_group(ray_service):
    groups = ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (application,) = serve_config_of(ray_service)["applications"]
    (gateway,) = application["deployments"]
    ((resource, amount),) = gateway["ray_actor_options"]["resources"].items()
    offered = [group["groupName"] for group in groups if int(group.get("resources", {}).get(resource, 0)) >= amount]
    assert offered == ["gateway"]


def test_there_is_a_pod_for_each_gateway(render, values):
    values["cluster"]["gateway"]["replicas"] = 3
    spec = render(values)["RayService"]["spec"]["rayClusterConfig"]
    (gateway,) = [group for group in spec["workerGroupSpecs"] if group["groupName"] == "gateway"]
    assert gateway["replicas"] == gateway["minReplicas"] == gateway["maxReplicas"] == 3


def test_nothing_of_ours_runs_on_the_head(ray_service):
    assert ray_service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_every_group_states_its_probes(pods):
    for name, pod in pods.items():
        container = container_of(pod)
        assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}, name
        assert container["readinessProbe"], name
    assert container_of(pods["gateway"])["readinessProbe"]["grpc"] == {"port": 50051}


def test_pods_are_restricted(pods):
    for name, pod in pods.items():
        spec, container = pod["spec"], container_of(pod)
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }, name


def test_shared_memory_is_a_volume_of_the_stated_size(render, values):
    values["shmSize"] = "3Gi"
    for pod in pods_of(render(values)["RayService"]).values():
        (mount,) = (mount for mount in container_of(pod)["volumeMounts"] if mount["mountPath"] == "/dev/shm")
        (volume,) = (volume for volume in pod["spec"]["volumes"] if volume["name"] == mount["name"])
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "3Gi"}


def test_rays_token_is_on_and_lies_in_a_secret(render):
    objects = render()
    options = objects["RayService"]["spec"]["rayClusterConfig"]["authOptions"]
    secret = objects["Secret"]
    assert options == {"mode": "token", "secretName": secret["metadata"]["name"]}
    assert len(base64.b64decode(secret["data"]["auth_token"])) >= 32


def test_an_existing_secret_replaces_the_charts_own(render):
    objects = render({"auth": {"existingSecret": "ours"}})
    assert objects["RayService"]["spec"]["rayClusterConfig"]["authOptions"]["secretName"] == "ours"
    assert "Secret" not in objects


def test_every_pod_runs_the_image_of_the_values(render):
    values = {"image": {"repository": "registry.example/llm", "tag": "7"}, "imagePullSecrets": [{"name": "pull"}]}
    for pod in pods_of(render(values)["RayService"]).values():
        assert container_of(pod)["image"] == "registry.example/llm:7"
        assert pod["spec"]["imagePullSecrets"] == [{"name": "pull"}]


def test_environment_and_volumes_reach_every_pod(render, crd_validator):
    values = {
        "env": [{"name": "HF_HOME", "value": "/models"}],
        "envFrom": [{"secretRef": {"name": "hub"}}],
        "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    }
    ray_service = render(values)["RayService"]
    assert crd_validator.is_valid(ray_service)
    for pod in pods_of(ray_service).values():
        container = container_of(pod)
        assert values["env"][0] in container["env"]
        assert container["envFrom"] == values["envFrom"]
        assert values["volumes"][0] in pod["spec"]["volumes"]
        assert values["volumeMounts"][0] in container["volumeMounts"]


def test_every_pod_has_what_actors_need(pods):
    from cluster.serve.local_ray import ACTOR_ENVIRONMENT

    for name, pod in pods.items():
        env = {variable["name"]: variable.get("value") for variable in container_of(pod)["env"]}
        assert ACTOR_ENVIRONMENT.items() <= env.items(), name


def test_versions_are_those_of_the_package(ray_service):
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((REPO / "helm" / "Chart.yaml").read_text())
    assert chart["appVersion"] == project["version"]
    assert f"ray[serve]=={ray_service['spec']['rayClusterConfig']['rayVersion']}" in project["dependencies"]


def test_the_notes_tell_the_first_call(helm_template):
    # helm shows notes at installation only; the stand-in renders them when asked.
    try:
        notes = helm_template("--show-only", "templates/NOTES.txt")
    except AssertionError as missing:
        if "could not find template" in str(missing):
            pytest.skip("this renderer shows no notes")
        raise
    assert "port-forward service/release-gateway 50051:50051" in notes
    assert "cluster generate" in notes and "get secret release-ray-token" in notes


def test_the_application_builds_from_what_is_rendered(ray_service):
    """As Serve does it: import the builder, hand it the arguments, look up the deployments that are overridden."""
    from ray._common.utils import import_attr
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve._private.build_app import build_app

    (application,) = serve_config_of(ray_service)["applications"]
    builder = import_attr(application["import_path"])
    built = build_app(call_user_app_builder_with_args_if_necessary(builder, application["args"]), name="cluster")
    overridden = {deployment["name"] for deployment in application["deployments"]}
    assert overridden <= {deployment.name for deployment in built.deployments}
