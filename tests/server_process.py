"""The server as a process of its own, with the bundled model."""

import base64
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fake_replicas import Asking

ROOT = Path(__file__).resolve().parents[1]
STARTING_S, ENDING_S = 240.0, 40.0


def image_part(path=ROOT / "examples" / "signs.png"):
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def asked(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "read the sign in red"}]}]


class ServerProcess(Asking):
    """A server that is ready, at a free port.

    Args:
        flags: of `budgetvlm serve`. environment: variables that differ from those of this process.
    """

    host = "127.0.0.1"

    def __init__(self, *flags, **environment):
        self._errors = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        command = [sys.executable, "-m", "budgetvlm.cli", "serve", "--port", "0", "--num_threads", "1"]
        self.process = subprocess.Popen(
            [*command, *map(str, flags)], stderr=self._errors, env={**os.environ, **environment}
        )

    def __enter__(self):
        end = time.monotonic() + STARTING_S
        while not (found := [line for line in self.errors().splitlines() if line.startswith("serving ")]):
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.terminate()
                raise AssertionError(self.errors())
            time.sleep(0.05)
        self.address = found[0].rpartition(" ")[2]
        self.port = int(self.address.rpartition(":")[2])
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.terminate()
        try:
            assert self.process.wait(ENDING_S) is not None
        finally:
            self.process.kill()
            self._errors.close()

    def errors(self):
        """What it wrote to standard error."""
        return Path(self._errors.name).read_text()

    def replicas(self):
        """Numbers of the processes that hold a model."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(line) for line in found.stdout.split()]

    def kill_replica(self):
        os.kill(self.replicas()[0], signal.SIGKILL)
