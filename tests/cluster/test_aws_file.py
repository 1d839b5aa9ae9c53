"""Ray's bootstrap, node provider, scheduler and launcher accept cluster/aws.yaml, against a moto server."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.files import BIN, CLUSTER, ROOT, TEACHER, TRAIN_WORKER, check_announced, fits, nodes_to_come, read
from tests.s3 import moto_server, nobody

pytestmark = pytest.mark.slow  # a moto server, and Ray's autoscaler against it

TYPES = {"trainer-spot": "trainer", "trainer": "trainer", "teacher-spot": "teacher", "teacher": "teacher", "data-spot": "data"}
"""Worker type -> its purpose."""


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a moto server and yield an environment in which boto3 takes it for AWS and knows no user."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        **{name: value for name, value in nobody().items() if not name.startswith("RAY_")},
        **{"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"},
    }
    with moto_server(home, environment) as url:
        yield {**environment, "AWS_ENDPOINT_URL": url}


@pytest.fixture(scope="module")
def account(moto: dict[str, str]) -> Iterator[Callable[[str], Any]]:
    """Yield a function from a service to its boto3 client; the account has the roles that the page says to create."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in moto.items():
            if name.startswith("AWS_") or name in ("HOME", "NO_PROXY"):
                patch.setenv(name, value)
        import boto3
        from ray.autoscaler._private.aws import utils

        def client(service: str) -> Any:
            return boto3.client(service, region_name="us-east-1")

        client("s3").create_bucket(Bucket="pictures")
        iam = client("iam")
        for role in ("headkd-head", "headkd-worker"):
            iam.create_role(RoleName=role, AssumeRolePolicyDocument=(CLUSTER / "iam/trust.json").read_text())
            storage = (CLUSTER / "iam/storage.json").read_text().replace("BUCKET", "pictures")
            iam.put_role_policy(RoleName=role, PolicyName="storage", PolicyDocument=storage)
            iam.create_instance_profile(InstanceProfileName=role)
            iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
        nodes = (CLUSTER / "iam/nodes.json").read_text()
        iam.put_role_policy(RoleName="headkd-head", PolicyName="nodes", PolicyDocument=nodes)
        yield client
        for cache in (utils.resource_cache, utils.client_cache):  # they would outlive the server
            cache.cache_clear()


@pytest.fixture(scope="module")
def aws(account: Callable[[str], Any]) -> dict[str, Any]:
    """Return aws.yaml as ``ray up`` prepares it: instance types looked up; key, subnet and security group created."""
    from ray.autoscaler._private.commands import _bootstrap_config

    return _bootstrap_config(read("aws.yaml"), no_config_cache=True)


def test_aws_types(aws: dict[str, Any]) -> None:
    types = aws["available_node_types"]
    assert set(types) == {"head", *TYPES} and aws["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0} and types["head"]["max_workers"] == 0
    assert 0 < aws["idle_timeout_minutes"] <= 30 and aws["provider"]["cache_stopped_nodes"] is False
    assert aws["max_workers"] <= sum(types[name]["max_workers"] for name in TYPES)
    for name, pool in TYPES.items():
        node, has = types[name]["node_config"], types[name]["resources"]
        spot = name.endswith("-spot")
        assert types[name]["min_workers"] == 0
        assert types[name]["labels"] == {"pool": pool, "market": "spot" if spot else "on-demand"}
        assert ("InstanceMarketOptions" in node) is spot
        assert types[name].get("priority", 0) > types.get(pool, {}).get("priority", 0) or not spot or pool not in types
        assert fits(TRAIN_WORKER, has) is (pool == "trainer"), "a train worker on another node would take it from the teacher"
        assert fits(TEACHER, has) is (pool == "teacher")
        assert has["CPU"] > 1
    for market in ("", "-spot"):
        assert types[f"teacher{market}"]["resources"]["GPU"] < types[f"trainer{market}"]["resources"]["GPU"]


def test_aws_closes_everything_but_ssh(aws: dict[str, Any], account: Callable[[str], Any]) -> None:
    (group,) = {name for kind in aws["available_node_types"].values() for name in kind["node_config"]["SecurityGroupIds"]}
    (found,) = account("ec2").describe_security_groups(GroupIds=[group])["SecurityGroups"]
    outside = [rule for rule in found["IpPermissions"] if rule["IpRanges"] or rule.get("Ipv6Ranges")]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in outside] == [("tcp", 22, 22)]
    inside = [rule for rule in found["IpPermissions"] if rule not in outside]
    assert [[pair["GroupId"] for pair in rule["UserIdGroupPairs"]] for rule in inside] == [[group]]


def test_ray_s_node_provider_creates_tags_lists_and_terminates(aws: dict[str, Any], account: Callable[[str], Any]) -> None:
    from ray.autoscaler import tags
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(aws["provider"], aws["cluster_name"])
    ec2 = account("ec2")
    made: dict[str, str] = {}
    for name, kind in aws["available_node_types"].items():
        role = tags.NODE_KIND_HEAD if name == "head" else tags.NODE_KIND_WORKER
        label = {
            tags.TAG_RAY_NODE_KIND: role,
            tags.TAG_RAY_USER_NODE_TYPE: name,
            tags.TAG_RAY_NODE_NAME: f"ray-headkd-{role}",
            tags.TAG_RAY_NODE_STATUS: tags.STATUS_UNINITIALIZED,
            tags.TAG_RAY_LAUNCH_CONFIG: "hash",
        }
        (made[name],) = provider.create_node(kind["node_config"], label, 1)
        (instance,) = ec2.describe_instances(InstanceIds=[made[name]])["Reservations"][0]["Instances"]
        node = read("aws.yaml")["available_node_types"][name]["node_config"]
        assert instance["InstanceType"] == node["InstanceType"] and instance["ImageId"] == node["ImageId"]
        assert (instance.get("InstanceLifecycle") == "spot") is name.endswith("-spot")
        profile = "headkd-head" if name == "head" else "headkd-worker"
        assert instance["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{profile}")
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        (disk,) = instance["BlockDeviceMappings"]
        (volume,) = ec2.describe_volumes(VolumeIds=[disk["Ebs"]["VolumeId"]])["Volumes"]
        assert disk["DeviceName"] == "/dev/sda1" and disk["Ebs"]["DeleteOnTermination"]
        assert (volume["Size"], volume["VolumeType"]) == (200, "gp3")
        listed = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
        assert listed["Name"] == f"ray-headkd-{role}" and listed[tags.TAG_RAY_CLUSTER_NAME] == "headkd"

    assert sorted(provider.non_terminated_nodes({})) == sorted(made.values())
    assert provider.non_terminated_nodes({tags.TAG_RAY_USER_NODE_TYPE: "teacher"}) == [made["teacher"]]
    assert len(provider.non_terminated_nodes({tags.TAG_RAY_NODE_KIND: tags.NODE_KIND_WORKER})) == len(TYPES)
    assert provider.is_running(made["trainer"]) and provider.internal_ip(made["trainer"])

    provider.set_node_tags(made["trainer"], {tags.TAG_RAY_NODE_STATUS: tags.STATUS_UP_TO_DATE})
    fresh = AWSNodeProvider(aws["provider"], aws["cluster_name"])
    fresh.non_terminated_nodes({})
    assert fresh.node_tags(made["trainer"])[tags.TAG_RAY_NODE_STATUS] == tags.STATUS_UP_TO_DATE

    provider.terminate_node(made["data-spot"])
    provider.terminate_nodes([made[name] for name in made if name != "data-spot"])
    assert fresh.non_terminated_nodes({}) == []
    states = [i["State"]["Name"] for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
    assert set(states) == {"terminated"}, "stopped machines cost"


def plan(
    aws: dict[str, Any],
    gang: list[dict[str, float]] | None = None,
    single: list[dict[str, float]] | None = None,
    without: str = "",
) -> dict[str, int]:
    """Return the nodes that Ray's autoscaler launches for a placement group and for tasks.

    ``without`` is a type that AWS has just refused.
    """
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest

    config = AutoscalingConfig(aws, skip_content_hash=True)
    make = ResourceRequestUtil.make
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([make(each) for each in single or []]),
        gang_resource_requests=[GangResourceRequest(requests=[make(each) for each in gang])] if gang else [],
        recoverable_resource_availabilities={without: 0.0} if without else {},
    )
    reply = ResourceDemandScheduler(None).schedule(request)
    if reply.infeasible_gang_resource_requests or reply.infeasible_resource_requests:
        return {"never": 1}
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def test_the_autoscaler_starts_from_nothing_on_spot_and_falls_back(aws: dict[str, Any]) -> None:
    assert plan(aws) == {}
    assert plan(aws, gang=[TRAIN_WORKER] * 8) == {"trainer-spot": 2}
    assert plan(aws, gang=[TRAIN_WORKER] * 8, without="trainer-spot") == {"trainer": 2}
    assert plan(aws, gang=[TRAIN_WORKER] * 64) == {"never": 1}
    assert plan(aws, single=[TEACHER] * 4) == {"teacher-spot": 4}
    assert plan(aws, single=[TEACHER] * 4, without="teacher-spot") == {"teacher": 4}
    assert plan(aws, single=[{"CPU": 1}] * 32) == {"data-spot": 2}, "tasks without a GPU need none"


def test_the_head_knows_what_the_cluster_can_grow_to(aws: dict[str, Any]) -> None:
    check_announced(nodes_to_come(aws), aws["available_node_types"])


RECORD = """#!/bin/sh
printf '%s\\n' "$(basename "$0") $*" >> '{log}'
"""


def test_ray_up_and_down_as_written(
    moto: dict[str, str], aws: dict[str, Any], account: Callable[[str], Any], tmp_path: Path
) -> None:
    """The page's commands run from the checkout: the head is launched and gets files and commands; ssh only records them."""
    log = tmp_path / "log"
    for name in ("ssh", "rsync"):
        (tmp_path / name).write_text(RECORD.format(log=log))
        (tmp_path / name).chmod(0o755)
    environment = {**moto, "PATH": f"{tmp_path}:{moto['PATH']}", "TMPDIR": str(tmp_path)}

    def ray(*command: str) -> str:
        done = subprocess.run(
            [str(BIN / "ray"), *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def running() -> list[dict[str, Any]]:
        query = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
        return [i for r in account("ec2").describe_instances(Filters=query)["Reservations"] for i in r["Instances"]]

    ray("up", "--yes", "--no-config-cache", "cluster/aws.yaml")
    (head,) = running()
    assert head["InstanceType"] == "m7i.xlarge" and head.get("InstanceLifecycle") is None, "workers come with jobs"
    lines = log.read_text().splitlines()
    assert all(f"ubuntu@{head['PublicIpAddress']}" in line for line in lines)
    for source in ("headkd_ray/", "requirements.lock", "setup.sh", "pyproject.toml", "README.md", "LICENSE"):
        assert [line for line in lines if line.startswith("rsync ") and f" {source} ubuntu@" in line], source
    assert all("--exclude **/__pycache__" in line for line in lines if line.startswith("rsync "))
    commands = "\n".join(lines)
    assert -1 < commands.index("sh setup.sh") < commands.index("ray start --head")
    assert "--dashboard-host=127.0.0.1" in commands

    log.unlink()
    ray("down", "--yes", "cluster/aws.yaml")
    assert running() == [] and "ray stop" in log.read_text()
