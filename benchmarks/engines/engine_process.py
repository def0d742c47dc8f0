"""A vLLM of one's own: started on a free port of the loopback interface, ended with its block."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType

HOST = "127.0.0.1"
STARTING_S, ENDING_S = 600.0, 30.0
FLAGS = (
    "--enforce-eager", "--dtype", "float32", "--max-model-len", "4096", "--max-num-seqs", "8",
    "--limit-mm-per-prompt", '{"image": 1}', "--enable-prompt-tokens-details", "--enable-per-request-metrics",
)  # fmt: skip
STEERED = ("--trust-request-mm-kwargs",)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": HOST,
    "GLOO_SOCKET_IFNAME": "lo", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


class EngineProcess:
    """An engine that is ready.

    Args:
        program: the `vllm` of an environment that `environment.sh` made.
        model: directory of the served model.
        log: file for all that the engine says.
        flags: of `vllm serve`, beside `FLAGS`.
        threads: of the engine's arithmetic.
    """

    def __init__(self, program: Path, model: Path, log: Path, *flags: str, threads: int = 1) -> None:
        self.port, self.log = free_port(), log
        self.name = model.name
        self.address = f"http://{HOST}:{self.port}"
        self.url = f"{self.address}/v1"
        command = [program, "serve", model, "--served-model-name", self.name, "--host", HOST, "--port", self.port]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with log.open("w") as told:
            self.process = subprocess.Popen(
                [*map(str, command), *FLAGS, *flags], stdout=told, stderr=subprocess.STDOUT, start_new_session=True,
                env={**environment, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip

    def __enter__(self) -> EngineProcess:
        end = time.monotonic() + STARTING_S
        try:
            while not self.is_healthy():
                if self.process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"the engine did not start; the end of {self.log}:\n{self.log_end()}")
                time.sleep(0.5)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def is_healthy(self) -> bool:
        """Tell whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def metric(self, name: str) -> float:
        """Return the sum of one of its metrics, for example "vllm:num_requests_running"."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))

    def log_end(self, lines: int = 30) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End it with all its processes, politely first."""
        for sent, wait_s in ((signal.SIGTERM, ENDING_S), (signal.SIGKILL, ENDING_S)):
            try:
                os.killpg(self.process.pid, sent)
                self.process.wait(wait_s)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def main() -> int:
    """Run an engine until it is interrupted; the arguments are program, model, log and further flags."""
    program, model, log, *flags = sys.argv[1:]
    with EngineProcess(Path(program), Path(model), Path(log), *flags) as engine:
        print(json.dumps({"url": engine.url, "model": engine.name, "pid": engine.process.pid}), flush=True)
        try:
            engine.process.wait()
        except KeyboardInterrupt:
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
