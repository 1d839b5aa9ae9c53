"""Drain this machine's Ray node when AWS announces that it takes the spot machine back.

    python -m headkd_ray.cluster.spot_watch [--address HOST:6379] [--node-id ID]

``ray up`` does not do this: Ray's AWS node provider (ray/autoscaler/_private/aws/node_provider.py, Ray 2.60) knows spot
machines only as ones that it must terminate instead of stop, and learns of a machine's end when it is gone. AWS publishes the
end two minutes ahead, on the machine itself, as ``spot/instance-action`` of the metadata service. This program asks for that
every few seconds and turns it into a drain, of which Ray Train tells a run's workers. ``cluster/aws.yaml`` starts it on every
worker node.

It ends after the drain, or at once on a machine that is not a spot machine. Only what it does after the notice needs Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from headkd_ray.cluster.drain_node import add_node_options, drain, say
from headkd_ray.errors import ClusterError

ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
"""Environment variable of the AWS SDKs with the address of the metadata service."""
POLL_SECONDS = 5.0
"""Seconds between questions; AWS recommends 5."""
PATIENCE = 60.0
"""Seconds that the metadata service may take to answer for the first time, on a machine that has just started."""
TOKEN_SECONDS = 21600
"""Seconds for which a token of the metadata service is valid; the most that it allows."""
NOTICE_SECONDS = 120.0
"""Seconds from a notice to a machine's end, if the notice itself does not say when."""


@dataclass(frozen=True)
class Notice:
    """AWS's announcement that it takes this machine back."""

    action: str
    """terminate, stop or hibernate."""
    end: float
    """When, in seconds since 1970."""


class MetadataService:
    """The instance metadata service of the machine on which this process runs (version 2, which requires a token)."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.token: str | None = None
        self.opener = build_opener(ProxyHandler({}))  # it is on the machine, so no proxy reaches it

    def get(self, path: str) -> str | None:
        """Return the value at ``path`` of the machine's metadata, None if there is none. Raises OSError if nobody answers."""
        for last in (False, True):
            if self.token is None:
                lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
                self.token = self._ask(Request(f"{self.endpoint}/latest/api/token", method="PUT", headers=lifetime))
            try:
                request = Request(f"{self.endpoint}/latest/meta-data/{path}", headers={"X-aws-ec2-metadata-token": self.token})
                return self._ask(request)
            except HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401 or last:
                    raise
                self.token = None  # it has expired
        raise AssertionError("unreachable")

    def _ask(self, request: Request) -> str:
        with self.opener.open(request, timeout=POLL_SECONDS) as answer:
            text: str = answer.read().decode()
        return text


def wait_for_notice(
    service: MetadataService, tell: Callable[[str], None], poll_seconds: float = POLL_SECONDS, patience: float = PATIENCE
) -> Notice | None:
    """Return AWS's notice as soon as there is one; None if this is not a spot machine. ``tell`` takes a sentence about outages.

    Raises:
        ClusterError: the metadata service does not answer for ``patience`` seconds from the start.
    """
    started, lifecycle, quiet = time.monotonic(), None, False
    while True:
        try:
            lifecycle = lifecycle or service.get("instance-life-cycle") or "unknown"
            if lifecycle == "on-demand":
                return None
            text = service.get("spot/instance-action")
            if text is not None:
                return read_notice(text)
            quiet = False
        except OSError as error:  # urllib's errors are OSErrors
            if lifecycle is None and time.monotonic() - started > patience:
                raise ClusterError(
                    f"{service.endpoint}: no AWS metadata service answers there ({error}); this command is for spot machines "
                    f"of AWS; {ENDPOINT} names another address"
                ) from None
            if not quiet:
                tell(f"{service.endpoint} does not answer ({error}); asking again every {poll_seconds:g} s")
            quiet = True
        time.sleep(poll_seconds)


def read_notice(text: str) -> Notice:
    """Read ``spot/instance-action``. What it does not say is assumed: the machine is lost in either case."""
    try:
        said = json.loads(text)
        end = datetime.strptime(said["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc).timestamp()
        return Notice(str(said["action"]), end)
    except (ValueError, TypeError, KeyError):
        return Notice("unknown action", time.time() + NOTICE_SECONDS)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m headkd_ray.cluster.spot_watch", description=(__doc__ or "").splitlines()[0]
    )
    add_node_options(parser)
    options = parser.parse_args(arguments)
    service = MetadataService(os.environ.get(ENDPOINT) or "http://169.254.169.254")
    try:
        notice = wait_for_notice(service, say)
        if notice is None:
            say("this machine is not a spot machine: nothing to wait for")
        else:  # to the last: there is nothing else to do on this machine
            why = f"AWS takes this machine back ({notice.action})"
            drain(why, notice.end, notice.end - time.time(), options.address, options.node_id, say)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
