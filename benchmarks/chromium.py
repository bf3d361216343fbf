"""Headless Chromium, driven over its DevTools pipe: opens a page and evaluates JavaScript in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium:
    """One browser with one page.

    Args:
        profile: folder for its files.
        size: of the window, in pixels.
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (1280, 900)):
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        command = [PATH, *flags, f"--window-size={size[0]},{size[1]}", "about:blank"]
        redirected = f'exec "$0" "$@" 3<&{there} 4>&{back}'  # the two descriptors that Chromium reads and writes
        self._process = subprocess.Popen(
            ["bash", "-c", redirected, *command], pass_fds=(there, back), stderr=subprocess.DEVNULL
        )
        os.close(there)
        os.close(back)
        self._number, self._buffer, self._session = 0, b"", None
        (page,) = (t for t in self._call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def open(self, page: Path, fragment: str = "") -> None:
        """Open a page of rollouts, and wait until its rows are listed."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=f"file://{page.resolve()}#{fragment}")
        self.wait_for("document.body?.dataset.ready === 'yes'")

    def wait_for(self, condition: str, seconds: float = 60) -> None:
        """Wait until an expression is true.

        Raises:
            TimeoutError: it is not, within this time.
        """
        until = time.monotonic() + seconds
        while self.evaluate(condition) is not True:
            if time.monotonic() > until:
                raise TimeoutError(f"{condition} is not true after {seconds} s")
            time.sleep(0.01)

    def evaluate(self, expression: str) -> Any:
        """The JSON value of an expression, awaited; None where it fails as the page is not there yet."""
        found = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return found.get("result", {}).get("value")

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                if not (part := os.read(self._read, 2**20)):
                    raise ConnectionError("Chromium has ended")
                self._buffer += part
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                return answer.get("result", {})
