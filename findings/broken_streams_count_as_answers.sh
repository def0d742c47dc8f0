#!/usr/bin/env bash
# An expert would say: a server that fails while it streams has sent status 200 already, so it says so in the stream, as
# `data: {"error": ...}`. OpenAI's client raises that; a load generator for OpenAI servers counts the request as failed.
#
# What happens (aiperf 0.13.0, openai 3.57.0): AIPerf counts it as an answer. A server of which every request dies after
# its first word gets an error rate of 0, a request throughput, and latencies, those of its halves. It looks for
# the error in the event's *name*, and an event without one is never looked into: one line `event: error` before the
# same data makes every request a failure, and the run ends with an exit code of 1. A stream that just ends, without a
# finish_reason and without [DONE], is an answer for AIPerf as well, and for OpenAI's client: iterating ends without an
# error.
#
# For users of this project: under load and after the death of a replica, what a load generator calls answered may hold
# halves. The server names its error events (serving/completions.py), and no stream of it ends without a finish_reason
# or an error. benchmarks/serving_aiperf.py holds AIPerf's count of answers against the server's own count of whole ones.
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
for name in aiperf==0.13.0 openai==3.57.0; do
  python3 -m venv "$dir/${name%%=*}"
  "$dir/${name%%=*}/bin/pip" install -q "$name"
done
"$dir/aiperf/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
cat > "$dir/server.py" <<'PY'
"""An OpenAI server on loopback; the model's name says how its streams end. Tells its port on standard output."""
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ERROR = 'data: {"error": {"message": "it died", "type": "server_error", "param": null, "code": "died"}}\n\n'


class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def piece(self, text):
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

    def chunk(self, finish=None, **delta):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        about = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        self.piece("data: " + json.dumps({**about, "choices": [choice]}) + "\n\n")

    def do_POST(self):
        model = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.chunk(role="assistant", content="one ")
        if model == "whole":
            self.chunk(content="two")
            self.chunk(finish="stop")
        if model in ("error", "named-error"):
            self.piece(("event: error\n" if model == "named-error" else "") + ERROR)
        if model != "cut":
            self.piece("data: [DONE]\n\n")
        self.piece("")


server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
print(server.server_address[1], flush=True)
server.serve_forever()
PY
cat > "$dir/tokenizer.py" <<'PY'
"""A tokenizer of words in a cache of the hub, so that nothing is downloaded."""
import sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

cache, commit = Path(sys.argv[1], "hub", "models--a--b"), "0" * 40
words = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(cache / "snapshots" / commit)
(cache / "refs").mkdir()
(cache / "refs" / "main").write_text(commit)
PY
"$dir/aiperf/bin/python" "$dir/tokenizer.py" "$dir/hf" > "$dir/log" 2>&1
python3 "$dir/server.py" > "$dir/port" & server=$!
trap 'kill $server; rm -rf "$dir"' EXIT
until [ -s "$dir/port" ]; do sleep 0.1; done
url="http://127.0.0.1:$(cat "$dir/port")"
for i in 1 2 3 4; do echo '{"text": "what"}'; done > "$dir/questions.jsonl"
for model in whole error named-error cut; do
  code=0
  (cd "$dir" && HF_HOME="$dir/hf" HF_HUB_OFFLINE=1 aiperf/bin/aiperf profile --model "$model" --url "$url" \
    --endpoint-type chat --streaming --input-file questions.jsonl --custom-dataset-type single-turn --tokenizer a/b \
    --concurrency 1 --request-count 4 --no-server-metrics --no-gpu-telemetry --ui-type none \
    --artifact-dir "$dir/$model") > "$dir/$model.log" 2>&1 || code=$?
  echo "$code" > "$dir/$model.code"
done
"$dir/openai/bin/python" - "$dir" "$url" <<'PY'
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import openai

folder, client = Path(sys.argv[1]), openai.OpenAI(base_url=sys.argv[2] + "/v1", api_key="none", max_retries=0)
print("aiperf 0.13.0, openai", version("openai"))
print("expected: only the whole stream is an answer, for both. Seen:")


def by_client(model):
    """What OpenAI's client makes of a stream."""
    try:
        list(client.chat.completions.create(model=model, messages=[{"role": "user", "content": "what"}], stream=True))
    except openai.APIError:
        return "raises"
    return "ends quietly"


def by_aiperf(model):
    """Answers and failures by AIPerf's log, and its exit code."""
    found = re.findall(r"Processed (\d+) valid requests and (\d+) errors", (folder / f"{model}.log").read_text())
    return *map(int, found[-1]), int((folder / f"{model}.code").read_text())


seen = {model: (by_client(model), *by_aiperf(model)) for model in ("whole", "error", "named-error", "cut")}
for model, (client_says, answers, failures, code) in seen.items():
    print(f"  {model:12} openai {client_says:13} aiperf: {answers} answers, {failures} failures, exit code {code}")
latency = {
    model: json.loads((folder / model / "profile_export_aiperf.json").read_text())["request_latency"]["avg"]
    for model in ("whole", "error")
}
print("  mean latency by AIPerf, ms:", {model: round(ms, 2) for model, ms in latency.items()})
holds = seen == {
    "whole": ("ends quietly", 4, 0, 0), "error": ("raises", 4, 0, 0), "named-error": ("raises", 0, 4, 1),
    "cut": ("ends quietly", 4, 0, 0),
}
print("as described" if holds else "CHANGED")
sys.exit(not holds)
PY
