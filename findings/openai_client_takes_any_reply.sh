#!/usr/bin/env bash
# Guess: the client's replies are typed pydantic models, so a reply of another shape is an exception.
# Seen: replies are built without validation. An error body sent with status 200 (as gateways do) is a ChatCompletion
#   whose choices are None, an unknown finish_reason and a list as content pass, and a logprob above 0 passes.
# Matters: "no exception, hence a judgement" is wrong; a judge must check each field that it reads.
# 2026-11-27, Python 3.11: openai 3.52.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
venv=${FINDINGS_VENV:-$work/venv}
python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  openai==3.52.0
cd "$work"
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -W ignore - <<'EOF'
import json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
import openai


class Reply(BaseHTTPRequestHandler):
    body = {}

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        data = json.dumps(Reply.body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


server = HTTPServer(("127.0.0.1", 0), Reply)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0)

def ask(body):
    Reply.body = body
    return client.chat.completions.create(model="m", messages=[{"role": "user", "content": "q"}], logprobs=True)

token = {"token": "80", "logprob": 0.5, "bytes": None, "top_logprobs": []}
odd = ask({"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [
    {"index": 0, "finish_reason": "sensitive", "message": {"role": "assistant", "content": ["80"]},
     "logprobs": {"content": [token]}}]}).choices[0]
failed = ask({"error": {"message": "overloaded", "code": 503}})
print("versions: openai", openai.__version__)
print("source: openai/_models.py, BaseModel.construct; openai/_response.py")
print("expected: an exception for both replies")
print("seen: error body:", type(failed).__name__, "with choices", failed.choices)
logprob = odd.logprobs.content[0].logprob
print("seen: finish_reason", repr(odd.finish_reason), "content", odd.message.content, "logprob", logprob)
assert failed.choices is None and odd.finish_reason == "sensitive" and odd.message.content == ["80"]
assert logprob == 0.5
EOF
