"""A receiver of Unmask's webhooks: verifies the signature, drops doubles, answers soon.

    HOOK_SECRET=whsec_... python receive_webhook.py 8765

Needs the package standardwebhooks. Put TLS before it (nginx, Caddy, your platform) where it is reached from
elsewhere.
"""

import json
import os
import sys
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

MAX_BODY = 20_000
KEEP = 10_000

verifier = Webhook(os.environ["HOOK_SECRET"])
seen: "OrderedDict[str, None]" = OrderedDict()  # keep it in your database: it must outlive a restart


class Handler(BaseHTTPRequestHandler):
    timeout = 10

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        if not 0 < length < MAX_BODY:
            self.answer(413)
            return
        body = self.rfile.read(length)
        try:
            # The bytes as they came: JSON read and written again has another signature.
            event = verifier.verify(body, dict(self.headers))
        except WebhookVerificationError:
            self.answer(401)
            return
        name = self.headers["webhook-id"]
        if name not in seen:
            handle(event)
            seen[name] = None
            if len(seen) > KEEP:
                seen.popitem(last=False)
        # Only now: an answer of 2xx means that it is yours.
        self.answer(204)

    def answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def handle(event: dict) -> None:
    """Do something quick here, like writing it into a queue; what takes long belongs behind that."""
    data = event["data"]
    summary = {"id": event["id"], "type": event["type"], "severity": event["severity"]}
    if event["type"].startswith("unmask.incident."):
        summary |= {
            name: data[name] for name in ("stream", "incident", "expected_precision", "suggested_action")
        }
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
