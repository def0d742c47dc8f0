"""AIPerf, a public load generator, asks the server with images; prints its figures, and what it was refused.

    python benchmarks/serving_aiperf.py [--rates 2 10 40 --seconds 30 --out aiperf.json]

AIPerf lives in an environment of its own, which is made here if it is not there: 1.2 GB, no PyTorch. It gets questions
and images of the bundled task and the tokenizer of the bundled model from files; no model hub is asked. It reads the
server's /metrics, too. At each rate (requests a second, at random moments) it asks with streams and without. Refusals
are those that tell a client to come back (429, and 503 with one of the scheduler's reasons); every other error is a
failure. The exit code is 1 if something failed, if AIPerf did not complete, or if its counts are not the server's own:
a stream that breaks off has status 200, and is no answer.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budgetvlm.live.fresh_samples import fresh_samples
from budgetvlm.tasks import load_task
from tests.server_process import ROOT, ServerProcess

PINS = "aiperf==0.13.0", "transformers==5.24.0", "huggingface_hub==1.33.0", "tokenizers==0.23.3", "aiohttp==3.14.5"
NUM_SAMPLES = 200
TOKENIZER = "budgetvlm/reference"
NO_ROOM = {"queue_full", "too_late", "expired"}
SHOWN = (
    ("request_throughput", "avg"), ("time_to_first_token", "p50"), ("time_to_first_token", "p99"),
    ("request_latency", "p50"), ("request_latency", "p90"), ("request_latency", "p99"), ("effective_latency", "p99"),
)  # fmt: skip
COUNTED = re.compile(r'budgetvlm_http_requests_total\{.*path="/v1/chat/completions",status="(\d+)"\} (\S+)')
ANSWERS = re.compile(r'budgetvlm_answers_total\{.*finish_reason="(\w+)"\} (\S+)')
BUDGETS = re.compile(r'budgetvlm_budgets_total\{result="(\w+)"\} (\S+)')


def main() -> int:
    """Run AIPerf at each rate; print what it found."""
    args = _arguments()
    program, runs = installed(args.environment), []
    with tempfile.TemporaryDirectory() as name, ServerProcess(*args.serve_flags, "--state_dir", name) as server:
        folder = Path(name)
        write_questions(folder / "questions.jsonl", args.seed)
        plant_tokenizer(folder / "hub")
        for rate, streams in itertools.product(args.rates, (True, False)):
            run = {"rate": rate, "streams": streams, **ask(program, folder, server, args, rate, streams)}
            runs.append(run)
            print(json.dumps(run), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"pins": PINS, "seconds": args.seconds, "runs": runs}, indent=2) + "\n")
    return 0 if all(run["holds"] for run in runs) else 1


def installed(environment: Path) -> Path:
    """AIPerf's program, in an environment that is made where it is not there."""
    program = environment / "bin" / "aiperf"
    if not program.exists():
        print(f"installing {PINS[0]} in {environment}", file=sys.stderr)
        venv.create(environment, with_pip=True)
        subprocess.run([environment / "bin" / "pip", "install", "-q", *PINS], check=True)
    return program


def write_questions(file: Path, seed: int) -> None:
    """Write questions with their images, as AIPerf reads them."""
    lines = []
    for sample in fresh_samples(load_task("signs"), "test", NUM_SAMPLES, seed=seed):
        data = io.BytesIO()
        sample.load_image().save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        lines.append(json.dumps({"text": sample.question, "image": url}) + "\n")
    file.write_text("".join(lines))


def plant_tokenizer(hub: Path) -> None:
    """Lay the bundled model into a cache of the hub: when AIPerf is offline, it takes no tokenizer from a folder."""
    cache, commit = hub / "hub" / f"models--{TOKENIZER.replace('/', '--')}", "0" * 40
    for folder in ("refs", "snapshots"):
        (cache / folder).mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots" / commit).symlink_to(ROOT / "src" / "budgetvlm" / "vlm" / "reference")


def ask(
    program: Path, folder: Path, server: ServerProcess, args: argparse.Namespace, rate: float, streams: bool
) -> dict[str, Any]:
    """Figures of one run of AIPerf."""
    results = folder / f"{rate}-{streams}"
    command = [
        program, "profile", "--model", "reference", "--url", server.address, "--endpoint-type", "chat",
        "--input-file", folder / "questions.jsonl", "--custom-dataset-type", "single-turn",
        "--tokenizer", TOKENIZER, "--use-server-token-count", "--random-seed", args.seed,
        "--request-rate", rate, "--benchmark-duration", args.seconds,
        "--extra-inputs", json.dumps({"latency_budget_ms": args.budget_ms, "when_infeasible": "reject"}),
        "--no-gpu-telemetry", "--ui-type", "none", "--export-level", "summary", "--artifact-dir", results,
        *(["--streaming"] if streams else []),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)  # it is to find its own packages
    before = counted(server)
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    document = results / "profile_export_aiperf.json"
    if done.returncode or not document.exists():
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        return {"holds": False, "exit_code": done.returncode}
    return figures(json.loads(document.read_text()), counted(server) - before)


def figures(found: dict[str, Any], counts: Counter[str]) -> dict[str, Any]:
    """What AIPerf saw, and whether all is as it should be."""
    refused: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for one in found["error_summary"]:
        status, code = one["error_details"]["code"], error_code(one["error_details"]["message"])
        into = refused if status in (429, 503) and code in NO_ROOM else failed
        into[f"{status} {code}"] += one["count"]
    answered = int(found.get("request_count", {"avg": 0})["avg"])
    known = answered + refused.total() + failed.total()
    agree = counts["answers"] == answered and sum(counts[n] for n in counts if n.isdigit()) == known
    return {
        "holds": found["is_complete"] and answered > 0 and not failed and agree, "answered": answered,
        "refused": dict(refused), "failed": dict(failed), "met": counts["met"], "missed": counts["missed"],
        **{f"{name} {stat}": round(found[name][stat], 2) for name, stat in SHOWN if name in found},
    }  # fmt: skip


def error_code(message: str) -> str:
    """The code of an OpenAI error, or what else there is."""
    try:
        return str(json.loads(message)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return message[:100]


def counted(server: ServerProcess) -> Counter[str]:
    """The server's own counts: completions by status, whole answers, and budgets met and missed."""
    text = server.ask(method="GET", path="/metrics")[2]
    counts = Counter({name: int(float(n)) for name, n in COUNTED.findall(text) + BUDGETS.findall(text)})
    counts["answers"] = sum(int(float(n)) for _, n in ANSWERS.findall(text))
    return counts


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = Path(tempfile.gettempdir()) / f"budgetvlm-{PINS[0].replace('==', '-')}"
    parser.add_argument("--environment", type=Path, default=default, help="of AIPerf (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0, 10.0, 40.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each run")
    parser.add_argument("--budget_ms", type=float, default=500.0, help="of each request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the figures")
    parser.add_argument("--serve_flags", nargs=argparse.REMAINDER, default=[], help="for budgetvlm serve, at the end")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
