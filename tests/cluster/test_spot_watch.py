"""AWS's notice that it takes a spot machine back is found on a metadata service that behaves like AWS's, over real HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from metadata_server import MetadataServer

from headkd_ray.cluster.spot_watch import ENDPOINT, MetadataService, Notice, main, read_notice, wait_for_notice
from headkd_ray.errors import ClusterError


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with MetadataServer() as server:
        yield server


def test_a_notice_is_found_through_expired_tokens_and_outages(server: MetadataServer) -> None:
    told: list[str] = []
    server.answers = [None, "expired", None, "outage", "outage", None, server.notice("terminate", "2026-11-28T05:00:00Z")]
    assert wait_for_notice(MetadataService(server.url), told.append, poll_seconds=0) == Notice("terminate", 1795842000.0)
    assert len([token for token in server.tokens if token]) == 2, "a token is used until it expires"
    assert len(told) == 1 and f"{server.url} does not answer (HTTP Error 503" in told[0], "an outage is told once"


def test_a_machine_on_demand_is_not_watched(
    server: MetadataServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.lifecycle = "on-demand"
    monkeypatch.setenv(ENDPOINT, server.url)
    assert main([]) == 0
    assert capsys.readouterr().out.endswith("this machine is not a spot machine: nothing to wait for\n")


def test_a_machine_outside_aws_is_told(server: MetadataServer) -> None:
    service = MetadataService(server.url)
    server.answers = ["outage"] * 99
    server.lifecycle = None
    with pytest.raises(ClusterError, match=f"{server.url}: no AWS metadata service answers there .*{ENDPOINT} names another"):
        wait_for_notice(service, lambda text: None, poll_seconds=0.01, patience=0.05)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"action": "stop", "time": "soon"}'])
def test_a_notice_that_cannot_be_read_is_still_one(text: str) -> None:
    assert 110 < read_notice(text).end - time.time() <= 120
