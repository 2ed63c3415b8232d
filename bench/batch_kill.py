"""Kills a server in the middle of a batch, again and again, and looks at what the batch becomes.

    python bench/batch_kill.py MODEL --lines 200 --kills 5

Uploads a file of requests, creates a batch and ends the server with SIGKILL once some of its lines
are done; starts it again on the same data, and so on. The first kill comes while the file is
checked, the last one while the output is written or when it has been, the others at random moments.
Then the batch must complete with every custom_id once in its output, none failed, the counts right.

Exits with 1 where that is not so, with 2 where it could not be tried.
"""

import argparse
import json
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from cpu_peers import count
from server_lab import Json, LabError, Server, call, first_model, start_pronk, story

PATIENCE = 600
"""Seconds until a batch must have ended."""
ENDED = ("completed", "failed", "expired", "cancelled")


def input_file(model: str, lines: int, tokens: int) -> bytes:
    """Requests of several kinds and lengths."""
    draw = random.Random(lines)
    return b"".join(
        json.dumps(
            {
                "custom_id": f"line-{n}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": model,
                    "messages": [{"role": "user", "content": story(draw.randint(1, 3), str(n))}],
                    "max_completion_tokens": draw.randint(1, tokens),
                    "temperature": 0.8,
                    "seed": n,
                },
            }
        ).encode()
        + b"\n"
        for n in range(lines)
    )


def upload(url: str, data: bytes) -> str:
    """The id of a file of purpose `batch`."""
    edge = secrets.token_hex(16)
    parts = (
        f'--{edge}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="lines.jsonl"\r\n'
        "Content-Type: application/jsonl\r\n\r\n"
    )
    body = parts.encode() + data + f"\r\n--{edge}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={edge}"}
    with urlopen(Request(f"{url}/v1/files", body, headers), timeout=60) as reply:
        found: Json = json.load(reply)
    return str(found["id"])


def batch_of(server: Server, id: str) -> Json:
    found: Json = call("GET", f"{server.url}/v1/batches/{id}")
    return found


def kill_when(server: Server, id: str, done: int, draw: random.Random) -> str:
    """Kills the server a moment after so many lines are done; where the batch stood then."""
    until = time.monotonic() + PATIENCE
    while True:
        batch = batch_of(server, id)
        counts = batch["request_counts"]
        if counts["completed"] + counts["failed"] >= done or batch["status"] in ENDED:
            break
        if time.monotonic() > until:
            raise LabError(f"the batch stands at {counts} after {PATIENCE} seconds")
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 0.2))
    server.kill()
    return f"{batch['status']}, {counts['completed']} of {counts['total']} lines done"


def wait_end(server: Server, id: str) -> Json:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        batch = batch_of(server, id)
        if batch["status"] in ENDED:
            return batch
        time.sleep(0.2)
    raise LabError(f"the batch has not ended after {PATIENCE} seconds: {batch}")


def wrong(batch: Json, lines: int, output: str) -> list[str]:
    """What is not as it should be, a line each."""
    found = []
    if batch["status"] != "completed":
        found.append(f"status: {batch['status']}, errors {batch['errors']}")
    if batch["error_file_id"]:
        found.append(f"error_file_id: {batch['error_file_id']}")
    counts = {"total": lines, "completed": lines, "failed": 0}
    if batch["request_counts"] != counts:
        found.append(f"request_counts: {batch['request_counts']}")
    answers = [json.loads(line) for line in output.splitlines()]
    ids = Counter(answer["custom_id"] for answer in answers)
    wanted = {f"line-{n}" for n in range(lines)}
    if missing := sorted(wanted - set(ids)):
        found.append(f"missing: {len(missing)}, such as {missing[0]}")
    if strange := sorted(set(ids) - wanted):
        found.append(f"unknown: {strange[0]}")
    if twice := [id for id, n in ids.items() if n > 1]:
        found.append(f"twice: {len(twice)}, such as {twice[0]}")
    for answer in answers:
        response = answer["response"]
        if answer["error"] or response["status_code"] != 200 or not response["body"]["choices"]:
            found.append(f"{answer['custom_id']}: {answer}")
    used = sum(a["response"]["body"]["usage"]["total_tokens"] for a in answers if a["response"])
    if used != batch["usage"]["total_tokens"]:
        found.append(f"usage: {batch['usage']} in the batch, {used} tokens in its lines")
    return found


def torture(args: argparse.Namespace, folder: str) -> list[str]:
    def start() -> Server:
        return start_pronk(args.python, args.model, "--data-dir", folder, "--kv-disk", "0")

    draw = random.Random(args.seed)
    between = sorted(draw.sample(range(1, args.lines), max(0, args.kills - 2)))
    points = [0, *between, args.lines][: args.kills]
    server = start()
    try:
        data = input_file(first_model(server.url), args.lines, args.tokens)
        body = {
            "input_file_id": upload(server.url, data),
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        id = str(call("POST", f"{server.url}/v1/batches", body)["id"])
        for n, done in enumerate(points):
            stood = kill_when(server, id, done, draw)
            print(f"kill {n + 1}/{args.kills}: {stood}", file=sys.stderr, flush=True)
            server.close()
            server = start()
        batch = wait_end(server, id)
        output = ""
        if batch["output_file_id"]:
            address = f"{server.url}/v1/files/{batch['output_file_id']}/content"
            with urlopen(address, timeout=60) as reply:
                output = reply.read().decode()
        return wrong(batch, args.lines, output)
    finally:
        server.close()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--lines", type=count, default=200)
    parser.add_argument("--kills", type=count, default=5)
    parser.add_argument("--tokens", type=count, default=48, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--python", default=sys.executable, help="interpreter with Pronk")
    args = parser.parse_args(argv)
    if args.kills > args.lines:
        parser.error(f"--kills: {args.kills} are more than the {args.lines} lines")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        with tempfile.TemporaryDirectory(prefix="batch-kill-") as folder:
            found = torture(args, folder)
    except HTTPError as error:
        print(f"batch_kill: {error.url}: {error.code} {error.read().decode()}", file=sys.stderr)
        return 2
    except (LabError, URLError) as error:
        print(f"batch_kill: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for line in found:
        print(f"WRONG: {line}")
    if not found:
        print(f"all {args.lines} lines once, none failed, after {args.kills} kills")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
