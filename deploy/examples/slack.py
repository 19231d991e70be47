"""A sink of type `command` that posts alerts to a Slack-compatible incoming webhook (Slack, Mattermost, ...).

    sinks:
      chat:
        type: command
        argv: [python3, /opt/unmask/slack.py]
        env: [SLACK_URL]

Reads one event from standard input and posts one message to the address in SLACK_URL. Ends with 0 if it was
taken, 75 if nobody answers (tried again later), 1 if it was refused. Needs nothing but Python.
"""

import json
import os
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 8
BUSY = {408, 429, 502, 503, 504}
SENT, REFUSED, AWAY = 0, 1, 75
ICONS = {"low": ":large_blue_circle:", "medium": ":large_orange_circle:", "high": ":red_circle:"}


def main() -> int:
    event = json.load(sys.stdin)
    body = json.dumps({"text": text(event)}).encode()
    request = urllib.request.Request(
        os.environ["SLACK_URL"], body, {"Content-Type": "application/json"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            return SENT
    except urllib.error.HTTPError as error:
        print(f"answered {error.code}", file=sys.stderr)
        return AWAY if error.code in BUSY else REFUSED
    except OSError as error:
        print(f"not reached: {error}", file=sys.stderr)
        return AWAY


def text(event: dict) -> str:
    """Return the message of an event: what happened, where, how sure, and where to look it up."""
    data, kind, icon = event["data"], event["type"], ICONS[event["severity"]]
    if kind.startswith("unmask.incident."):
        return incident(data, icon)
    if kind.startswith("unmask.feed."):
        why = data.get("sentence") or data["code"]
        return f"{icon} {escaped(data['stream'])} is {data['event']}: {escaped(why)}"
    return f"{icon} {escaped(data['sentence'])}"


def incident(data: dict, icon: str) -> str:
    where = f"{escaped(data['stream'])}, incident `{escaped(data['incident'])}`"
    if data["event"] == "retracted":
        return f"WITHDRAWN: {where}: {escaped(data['reason'])}"
    sure = data.get("expected_precision")
    right = "" if sure is None else f", right with a chance of {sure:.0%}"
    what = f"a face looks manipulated ({data['event']}{right})"
    return f"{icon} {where}: {what}; suggested: {data['suggested_action']}"


def escaped(words: str) -> str:
    """Return words in which nothing is markup, nobody is called and nothing is linked."""
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


if __name__ == "__main__":
    sys.exit(main())
