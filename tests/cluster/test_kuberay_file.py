"""cluster/kuberay.yaml has only fields of KubeRay's CRDs, and Ray's autoscaler reads its groups as intended."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from headkd_ray.cluster import drain_node, resources
from headkd_ray.job import load_job
from tests.cluster.files import CLUSTER, DOCS, ROOT, TEACHER, TRAIN_WORKER, check_announced, fits, pre_stop_hooks


@pytest.fixture
def kuberay() -> dict[str, dict[str, Any]]:
    documents = list(yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text(encoding="utf-8")))
    assert [document["kind"] for document in documents] == ["ServiceAccount", "RayCluster", "RayJob"]
    return {document["kind"]: document for document in documents}


def test_kuberay_s_crds_take_the_file_and_no_typo(kuberay: dict[str, dict[str, Any]]) -> None:
    fields = json.loads(Path(__file__).with_name("kuberay_fields.json").read_text(encoding="utf-8"))

    def check(kind: str, spec: dict[str, Any]) -> None:
        jsonschema.validate(spec, {**fields, "$ref": f"#/$defs/{kind}"})

    assert "v1.7.0" in fields["source"] and "v1.7.0" in (CLUSTER / "kuberay.yaml").read_text()
    for kind in ("RayCluster", "RayJob"):
        assert kuberay[kind]["apiVersion"] == "ray.io/v1"
        check(kind, kuberay[kind]["spec"])
        with pytest.raises(jsonschema.ValidationError):
            check(kind, kuberay[kind]["spec"] | {"rayVersions": "2.60.0"})
    wrong: list[Callable[[dict[str, Any]], Any]] = [
        lambda spec: spec["workerGroupSpecs"][0].update(maxReplica=2),
        lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="2"),
        lambda spec: spec["workerGroupSpecs"][0].pop("groupName"),
        lambda spec: spec["authOptions"].update(mode="password"),
        lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0].update(images="x"),
        lambda spec: spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"].update(limit={}),
    ]
    for change in wrong:
        spec = copy.deepcopy(kuberay["RayCluster"]["spec"])
        change(spec)
        with pytest.raises(jsonschema.ValidationError):
            check("RayCluster", spec)


def test_the_job_that_resumes_by_itself_has_the_same_cluster(kuberay: dict[str, dict[str, Any]]) -> None:
    """KubeRay tries it again in a new cluster; it would delete one that the job selects."""
    account, job = yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text(encoding="utf-8"))
    fields = json.loads(Path(__file__).with_name("kuberay_fields.json").read_text(encoding="utf-8"))
    jsonschema.validate(job["spec"], {**fields, "$ref": "#/$defs/RayJob"})
    assert job["spec"]["backoffLimit"] > 0 and job["spec"]["shutdownAfterJobFinishes"]
    assert account == kuberay["ServiceAccount"] and job["spec"]["rayClusterSpec"] == kuberay["RayCluster"]["spec"]
    selecting = kuberay["RayJob"]["spec"]
    assert {key: job["spec"][key] for key in ("runtimeEnvYAML", "entrypoint")} == {
        key: selecting[key] for key in ("runtimeEnvYAML", "entrypoint")
    }
    assert "backoffLimit" not in selecting


def test_ray_s_autoscaler_reads_the_groups(kuberay: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own function for reading a RayCluster sees what each pod requests of Kubernetes, and the job fits."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = kuberay["RayCluster"]
    config = _derive_autoscaling_config_from_ray_cr({**cluster, "metadata": {**cluster["metadata"], "namespace": "default"}})
    types = config["available_node_types"]
    assert set(types) == {"headgroup", "trainer", "teacher", "data"} and types["headgroup"]["resources"]["CPU"] == 0
    for name in ("trainer", "teacher", "data"):
        assert types[name]["min_workers"] == 0 and types[name]["labels"] == {"pool": name}
        assert fits(TRAIN_WORKER, types[name]["resources"]) is (name == "trainer")
        assert fits(TEACHER, types[name]["resources"]) is (name == "teacher")
    for group in cluster["spec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        has = types[group["groupName"]]["resources"]
        assert (int(limits["cpu"]), int(limits.get("nvidia.com/gpu", 0))) == (has["CPU"], has.get("GPU", 0))
    (head,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    (nodes,) = [entry["value"] for entry in head["env"] if entry["name"] == resources.GROWS]
    check_announced(nodes, types)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(resources.ray, "nodes", lambda: [])
    monkeypatch.setenv(resources.GROWS, nodes)
    _, job, *overrides = shlex.split(kuberay["RayJob"]["spec"]["entrypoint"].removeprefix("python -m "))
    resources.check_resources(load_job(job, overrides))


def test_a_worker_pod_drains_its_node_before_it_ends(
    kuberay: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``test_faults.py`` runs the hook under a training. Where no Ray runs any more, it ends at once, and the pod with it."""
    (hook,) = {tuple(pre_stop) for pre_stop in pre_stop_hooks()}
    assert hook[:3] == ("python", "-m", drain_node.__name__)
    for group in kuberay["RayCluster"]["spec"]["workerGroupSpecs"]:
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= float(hook[hook.index("--seconds") + 1]) + 10
    monkeypatch.setattr(drain_node, "PATIENCE", 0)
    assert drain_node.main([*hook[3:], "--address", "127.0.0.1:1"]) == 2
    assert "error: the Ray node cannot be drained: no Ray cluster answers at 127.0.0.1:1 (" in capsys.readouterr().err


def test_kuberay_s_parts_fit_together(kuberay: dict[str, dict[str, Any]]) -> None:
    cluster, job, account = kuberay["RayCluster"], kuberay["RayJob"], kuberay["ServiceAccount"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert job["spec"]["entrypoint"].startswith("python -m headkd_ray.train jobs/head.yaml ")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    assert {pod["serviceAccountName"] for pod in pods} == {account["metadata"]["name"]}
    dockerfile = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    (image,) = {container["image"] for pod in pods for container in pod["containers"]}
    assert f"-t {image} " in dockerfile and f"-t {image} " in DOCS
    (folder,) = re.findall(r"^WORKDIR (.*)$", dockerfile, re.MULTILINE)
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"working_dir": folder}
    copied = {path for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE) for path in line.split()}
    assert {"setup.sh", "requirements.lock", "headkd_ray", "jobs"} <= copied
    assert all((ROOT / path).exists() for path in copied)
    (installed,) = re.findall(r"^ray(?:\[.*\])?==(\S+)", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    assert cluster["spec"]["rayVersion"] == installed
    assert cluster["spec"]["authOptions"] == {"mode": "token"}, "the port cannot be on loopback here"
    assert cluster["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
