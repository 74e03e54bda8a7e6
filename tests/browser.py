"""A headless Chromium, driven over the pipe of its DevTools protocol."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_PATIENCE = 240.0  # seconds


def _wire(its_in: int, its_out: int) -> None:
    os.dup2(its_in, 3)
    os.dup2(its_out, 4)


class Browser:
    """One page of a browser: opened, looked at, and asked.

    Attributes:
        complaints: Warnings and errors of the console, and exceptions, since the last page.
        fetched: Addresses that the page asked for, its own not included.
    """

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self.complaints: list[str] = []
        self.fetched: list[str] = []
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # Chromium reads commands from descriptor 3 and writes answers to 4.
        pairs = [os.pipe(), os.pipe()]
        (its_in, self._out), (self._in, its_out) = [
            [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in pair] for pair in pairs
        ]
        for pair in pairs:
            for end in pair:
                os.close(end)
        self._process = subprocess.Popen(
            [
                *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"),
                *("--disable-dev-shm-usage", "--hide-scrollbars", "about:blank"),
            ],
            preexec_fn=partial(_wire, its_in, its_out),
            pass_fds=(3, 4),
            stderr=subprocess.DEVNULL,
        )
        os.close(its_in)
        os.close(its_out)
        self._left, self._number, self._session = b"", 0, ""
        self._loaded: set[str] = set()
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._profile.cleanup()

    def show(self, path: Path, *, width: int, dark: bool = False) -> None:
        """Open a file in a window of that many CSS pixels, and wait until it is drawn."""
        self.look(width=width, dark=dark)
        self.complaints.clear()
        self.fetched.clear()
        loading = self.call("Page.navigate", url=path.resolve().as_uri())["loaderId"]
        while loading not in self._loaded:
            self._note(self._read())
        self.settle()

    def look(self, *, width: int, dark: bool) -> None:
        """Change the window's width and the theme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def settle(self) -> None:
        """Wait for the figures to follow."""
        self.ask(
            """(async () => {
                const frame = () => new Promise(requestAnimationFrame);
                await frame();
                await frame();
                await new Promise(done => setTimeout(done, 300));
                await frame();
            })()"""
        )

    def ask(self, expression: str) -> Any:
        """The value of an expression in JavaScript."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def shot(self, path: Path) -> None:
        """The whole page as PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return dict(answer["result"])
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._in], [], [], _PATIENCE)
            assert ready, "the browser does not answer"
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has ended"
            self._left += more
        line, _, self._left = self._left.partition(b"\0")
        return dict(json.loads(line))

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Page.lifecycleEvent" and params["name"] == "load":
            self._loaded.add(params["loaderId"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif event["method"] == "Runtime.consoleAPICalled":
            if params["type"] in ("error", "warning", "assert"):
                self.complaints.append(str(params["args"]))
        elif event["method"] == "Log.entryAdded":
            if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(params["entry"]["text"])
        elif event["method"] == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith("data:") and url != params["documentURL"]:
                self.fetched.append(url)
