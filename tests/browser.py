"""Headless Chromium, spoken to over its DevTools protocol: what a page says, asks for and looks like."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

VARIABLE = "HEADKD_CHROMIUM"
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SLOW = 60
"""Seconds after which a call is assumed to hang."""
MEASURE = """(() => {
  const wide = [...document.querySelectorAll("body *")].filter(each =>
    each.getBoundingClientRect().right > innerWidth + 1 && !each.closest(".scroll, pre, figure, details:not([open])"));
  return {
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    wide: wide.slice(0, 5).map(each => each.tagName + " " + each.textContent.slice(0, 40)),
    broken: [...document.images].filter(each => !each.complete || !each.naturalWidth).length,
    images: document.images.length,
    height: document.documentElement.scrollHeight,
  };
})()"""


def chromium() -> str | None:
    """Return the program that the environment variable names, or one on PATH; None if there is none."""
    return os.environ.get(VARIABLE) or next(filter(None, map(shutil.which, NAMES)), None)


START = """
import fcntl, os, sys
read, write = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(read, 3)
os.dup2(write, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""
"""Becomes the program of its arguments, which reads from descriptor 3 and writes to 4, as Chromium does."""


class Seen(NamedTuple):
    """What a page did when it was opened."""

    errors: list[str]
    """Errors and warnings in the console, and exceptions of scripts."""
    requests: list[str]
    """Addresses that it asked for, besides its own and those that it holds itself (data:)."""
    layout: dict[str, Any]
    """What ``MEASURE`` returns."""
    picture: bytes
    """The whole page, a PNG file."""


class Browser:
    """A running Chromium; ``browser`` starts one."""

    def __init__(self, write: int, read: int) -> None:
        self.write, self.read = write, read
        self.buffer, self.number, self.session = b"", 0, ""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol; events that come meanwhile are kept in ``events``."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, (method, answer)
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            part = os.read(self.read, 1 << 20)
            assert part, "the browser has ended"
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(line))

    def wait(self, method: str) -> None:
        """Wait for an event."""
        until = time.monotonic() + SLOW
        while not any(event.get("method") == method for event in self.events):
            assert time.monotonic() < until, f"no {method}"
            self.events.append(self._next())

    def open(self, page: Path, width: int = 1000, dark: bool = False) -> Seen:
        """Open a local page in a tab of its own, ``width`` CSS pixels wide, and look at it."""
        self.session, self.events = "", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=page.as_uri())
        self.wait("Page.loadEventFired")
        layout = self.call("Runtime.evaluate", expression=MEASURE, returnByValue=True)["result"]["value"]
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        self.call("Target.closeTarget", targetId=target)
        events = [(event.get("method"), event.get("params", {})) for event in self.events]
        said = [
            *(json.dumps(each["args"])[:300] for name, each in events if name == "Runtime.consoleAPICalled"),
            *(
                str(each["exceptionDetails"].get("exception", each))
                for name, each in events
                if name == "Runtime.exceptionThrown"
            ),
            *(each["entry"]["text"] for name, each in events if name == "Log.entryAdded"),
        ]
        asked = [each["request"]["url"] for name, each in events if name == "Network.requestWillBeSent"]
        outside = [url for url in asked if not url.startswith("data:") and url != page.as_uri()]
        return Seen(said, outside, layout, base64.b64decode(picture))


@contextlib.contextmanager
def browser(program: str, profile: Path) -> Iterator[Browser]:
    """Start Chromium without a window, with a ``profile`` folder of its own and without a network."""
    (their_read, write), (read, their_write) = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    offline = ["--proxy-server=127.0.0.1:9", "--disable-background-networking", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", START, str(their_read), str(their_write), program, *options, *offline],
        pass_fds=(their_read, their_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_read)
    os.close(their_write)
    try:
        yield Browser(write, read)
    finally:
        process.terminate()
        process.wait(timeout=SLOW)
        os.close(write)
        os.close(read)
