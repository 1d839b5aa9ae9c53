"""The files in cluster/ agree with each other and with their page, docs/cluster.md."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from headkd_ray.cluster import resources
from headkd_ray.errors import ClusterError
from headkd_ray.job import load_job
from tests.cluster.files import CLUSTER, DOCS, ROOT, nodes_to_come, read


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Return the file with Ray's defaults filled in, checked by Ray's schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", ["aws.yaml", "local.yaml"])
def test_ray_s_schema_takes_the_file_and_no_typo(name: str) -> None:
    config = read(name)
    prepared(config)
    for wrong in (config | {"idle_timeout_minuts": 5}, config | {"auth": {"ssh_users": "ubuntu"}}):
        with pytest.raises(jsonschema.ValidationError):
            prepared(wrong)
    if name == "aws.yaml":
        config["available_node_types"]["trainer"]["max_worker"] = 1
        with pytest.raises(jsonschema.ValidationError):
            prepared(config)


@pytest.mark.parametrize("name", ["aws.yaml", "local.yaml"])
def test_the_job_port_is_on_loopback(name: str) -> None:
    starts = [command for command in read(name)["head_start_ray_commands"] if "ray start" in command]
    assert [re.findall(r"--dashboard-host=(\S+)", command) for command in starts] == [["127.0.0.1"]]
    assert not [path.name for path in CLUSTER.iterdir() if path.is_file() and "0.0.0.0" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", ["aws.yaml", "local.yaml"])
def test_nodes_install_what_is_pinned_and_get_no_more_of_this_folder(name: str) -> None:
    config = read(name)
    sources = {Path(source) for source in config["file_mounts"].values() if not source.startswith("~")}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'readme = "README.md"' in project and 'license-files = ["LICENSE"]' in project, "an installation needs other files"
    needed = {"headkd_ray", "pyproject.toml", "requirements.lock", "setup.sh", "README.md", "LICENSE"}
    assert sources == {Path(path) for path in needed} and all((ROOT / path).exists() for path in sources)
    folders = {str(Path(target).parent) for target, source in config["file_mounts"].items() if not source.startswith("~")}
    assert folders == {"~/headkd_ray"}
    assert [command for command in config["setup_commands"] if re.search(r"cd ~/headkd_ray && .*sh setup\.sh$", command)]
    assert "--require-hashes -r requirements.lock\n" in (ROOT / "setup.sh").read_text(encoding="utf-8")


def documented() -> list[list[str]]:
    """Return the job and overrides of every train command on the page and in the cluster files."""
    page = DOCS.replace("\\\n", " ").replace("$BUCKET", "bucket")
    commands = re.findall(r"-- python -m headkd_ray\.train (.*)", page)
    *_, job = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text(encoding="utf-8"))
    return [shlex.split(command) for command in [*commands, job["spec"]["entrypoint"].split("headkd_ray.train ")[1]]]


def test_documented_jobs_load_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """They fit with the teacher on nodes of its own, too; a job that never fits is refused before any node has started."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(resources.ray, "nodes", lambda: [{"Alive": True, "Resources": {"node:__internal_head__": 1.0}}])
    (pool,) = [shlex.split(line) for line in DOCS.splitlines() if line.startswith("distill.rois=teacher ")]
    commands = documented()
    assert len(commands) == 3 and all(job == "jobs/head.yaml" for job, *_ in commands)
    for job, *overrides in commands:
        load_job(job, overrides)
    job, *overrides = commands[0]
    alone, pooled = load_job(job, overrides), load_job(job, [*overrides, *pool])
    assert pooled.teacher is not None and pooled.teacher.placement == "pool"
    with pytest.raises(ClusterError, match="the cluster has 0"):
        resources.check_resources(alone)
    monkeypatch.setenv(resources.GROWS, nodes_to_come(read("aws.yaml")))
    resources.check_resources(alone)
    resources.check_resources(pooled)
    with pytest.raises(ClusterError, match="may grow to"):
        resources.check_resources(load_job(job, [*overrides, "cluster.workers=64"]))
    whole = [*overrides, *pool, "teacher.pool.gpus=1", "teacher.pool.resources={teacher: 1}"]
    with pytest.raises(ClusterError, match=r"teacher\.pool\.actors: 8 processes"):
        resources.check_resources(load_job(job, whole))
    resources.check_resources(load_job(job, [*whole, "cluster.workers=4"]))
    monkeypatch.setenv(resources.GROWS, "[{count: 2}]")
    with pytest.raises(ClusterError, match="HEADKD_RAY_NODES"):
        resources.check_resources(alone)


def test_the_page_shows_the_policies_as_they_are() -> None:
    shown = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", DOCS, re.DOTALL)]
    assert shown == [json.loads((CLUSTER / f"iam/{name}.json").read_text()) for name in ("storage", "nodes")]
    nodes = shown[1]["Statement"]
    aws = read("aws.yaml")
    assert {"StringEquals": {"ec2:ResourceTag/ray-cluster-name": aws["cluster_name"]}} in [s.get("Condition") for s in nodes]
    profiles = {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in aws["available_node_types"].values()}
    assert profiles == {"headkd-head", "headkd-worker"}
    (passed,) = [s["Resource"] for s in nodes if s["Action"] == "iam:PassRole"]
    assert passed.endswith(":role/headkd-worker")
    image = aws["available_node_types"]["head"]["node_config"]["ImageId"].removeprefix("resolve:ssm:")
    (parameters,) = [s["Resource"] for s in nodes if s["Action"] == "ssm:GetParameters"]
    assert image.startswith(parameters.split(":parameter")[1].removesuffix("*"))


def test_everything_that_the_page_names_exists() -> None:
    links = re.findall(r"\]\((\.\./[^)]*)\)", DOCS)
    assert links and not [link for link in links if not (ROOT / "docs" / link).exists()]
    named = re.findall(r"(?<![\w/.$])(?:cluster|jobs)/[\w./]+", DOCS)
    assert not [path for path in named if not (ROOT / path.rstrip(".")).exists()]


def test_prices_are_dated_and_name_the_instances() -> None:
    text = (CLUSTER / "aws.yaml").read_text(encoding="utf-8")
    table = re.findall(r"^#   (\w+) +([a-z0-9]+\.\w+) .* (\d+\.\d\d)  ", text, re.MULTILINE)
    types = read("aws.yaml")["available_node_types"]
    assert "2026-11" in text
    assert {(row[0], row[1]) for row in table} == {
        (name.removesuffix("-spot"), kind["node_config"]["InstanceType"]) for name, kind in types.items()
    }
