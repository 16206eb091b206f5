"""How long the console's pages take with 1,000 participants and 500 rounds (p95 <= 300 ms).

    python benchmarks/console.py --json

Over real HTTP on loopback, with a real store that is filled by its own tables: one round names all
participants, the others twenty each. Times are of whole requests, server and socket together;
cpu_ms is what they took of a core, which another program's work beside it does not change.
"""

import argparse
import hashlib
import http.client
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from sqlalchemy import insert

# Run as a script, this file's own folder comes first.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coordinator.admission import Members
from coordinator.artifacts import Artifacts
from coordinator.config import ConsoleConfig, CoordinatorConfig
from coordinator.console.serving import Console
from coordinator.console.users import Users
from coordinator.orders import Orders
from coordinator.presence import Seen
from coordinator.research_service import ResearchService
from coordinator.revocations import Revocations
from coordinator.signing import Signer
from coordinator.store import Store, now_unix_ms
from coordinator.tables import CONTRIBUTIONS, EVENTS, PARTICIPANTS, PIVOTS, ROUNDS
from protos.config import TlsConfig
from trust.ca import create_authority
from trust.keys import new_key

PARTICIPANTS_N, ROUNDS_N, PIVOTS_N, PARTS_N = 1000, 500, 250, 20
PASSWORD = "correct horse battery"
PATH = ("SUBMITTED", "APPROVED", "COLLECTING", "FUSING", "EVALUATING", "PUBLISHED")
GOAL_MS = 300.0


def name(number: int) -> str:
    """Of a participant."""
    return f"hospital-{number:04d}"


def spec(number: int) -> dict[str, Any]:
    """Of a round; the last names everybody."""
    many = PARTICIPANTS_N if number == ROUNDS_N else PARTS_N
    return {
        "name": f"round-{number}",
        "purpose": "general",
        "pivot": f"pivot-{max(0, (number - 1) // 2)}",
        "participants": [name(at) for at in range(many)],
        "kind": "logits",
        "method": "unified",
        "training": {"steps": 250, "batch_size": 8, "seq_len": 128, "lr": 0.003},
        "seed": 0,
    }


def fill(store: Store) -> None:
    """Five hundred rounds of half an hour each; the last one collects."""
    now = now_unix_ms()
    rounds, parts, events, pivots = [], [], [], []
    for number in range(1, ROUNDS_N + 1):
        began, round_id = now - (ROUNDS_N - number) * 1_800_000, f"rnd-{number}"
        is_open, given = number == ROUNDS_N, spec(number)
        states = PATH[:3] if is_open else PATH
        rounds.append(
            {
                "number": number,
                "request_id": f"r{number}",
                "submitted_by": "ada",
                "spec_json": json.dumps(given),
                "state": states[-1],
                "created_unix_ms": began,
                "deadline_unix_ms": began + 3_600_000,
                "detail": "",
                "pivot_name": "" if is_open else f"pivot-{number}",
            }
        )
        for at, state in enumerate(states):
            events.append(event(round_id, began + at * 200_000, "state", {"state": state}))
        for step in range(5, 251, 5) if not is_open else ():
            body = {"phase": "train", "run": "unified", "step": step, "steps": 250, "loss": 3.0}
            events.append(event(round_id, began + step * 1000, "progress", body))
        for who in given["participants"]:
            digest = hashlib.sha256(f"{number}{who}".encode()).hexdigest()
            parts.append(
                {
                    "round_id": round_id,
                    "participant": who,
                    "status": "committed",
                    "attempt": 1,
                    "sha256": digest,
                    "size_bytes": 4_000_000,
                    "committed_unix_ms": began + 500_000,
                    "detail": "",
                    "report_json": "{}",
                }
            )
    scores = {"base": {"a": 3.0, "b": 3.1}, "unified": {"a": 2.0, "b": 2.2}}
    for number in range(PIVOTS_N):
        pivots.append(
            {
                "name": f"pivot-{number}",
                "parent": f"pivot-{number - 1}" if number else "",
                "round_id": f"rnd-{number}" if number else "",
                "files_json": "[]",
                "evals_json": json.dumps({"bpb": scores, "pivot": "unified"}),
                "created_unix_ms": now - (PIVOTS_N - number) * 1_800_000,
            }
        )
    people = [
        {"name": name(at), "node_id": str(at), "public_key": b"k", "joined_unix_ms": now}
        for at in range(PARTICIPANTS_N)
    ]
    with store.database.write() as db:
        for table, rows in (
            (PARTICIPANTS, people),
            (ROUNDS, rounds),
            (CONTRIBUTIONS, parts),
            (EVENTS, events),
            (PIVOTS, pivots),
        ):
            db.execute(insert(table), rows)


def event(round_id: str, at: int, kind: str, body: dict[str, Any]) -> dict[str, Any]:
    """One row of the events."""
    return {"round_id": round_id, "time_unix_ms": at, "kind": kind, "body_json": json.dumps(body)}


def attending() -> dict[str, Seen]:
    """Everybody is here."""
    return {
        name(at): Seen(
            software_version="0.1.0",
            clock_skew_ms=at - 500,
            free_disk_bytes=10**11,
            paused=at % 50 == 0,
            expert_version=3,
            expert_steps=1000,
            expert_unix_ms=now_unix_ms() - 10**6,
            working=frozenset({f"rnd-{ROUNDS_N}"}),
            seen_unix_ms=now_unix_ms() - 3000,
        )
        for at in range(PARTICIPANTS_N)
    }


def measure(url: str, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds by page."""
    host = urlsplit(url).netloc
    connection = http.client.HTTPConnection(host)
    form = {"origin": url, "content-type": "application/x-www-form-urlencoded"}
    body = urlencode({"name": "grace", "password": PASSWORD})
    connection.request("POST", "/login", body, form)
    answer = connection.getresponse()
    answer.read()
    cookie = {"cookie": answer.headers["set-cookie"].partition(";")[0]}
    found = {}
    for page in (
        "/",
        f"/rounds/rnd-{ROUNDS_N}",
        "/rounds/rnd-1",
        "/participants",
        f"/participants/{name(0)}",
        "/evals",
        "/pivots",
        "/audit",
    ):
        times, spent = [], []
        for _ in range(repeats):
            began, cpu = time.perf_counter(), time.process_time()
            connection.request("GET", page, headers=cookie)
            answer = connection.getresponse()
            size = len(answer.read())
            times.append((time.perf_counter() - began) * 1000)
            spent.append((time.process_time() - cpu) * 1000)
            if answer.status != 200:
                raise SystemExit(f"{page}: found status {answer.status}, wanted 200")
        times, spent = times[1:], spent[1:]  # the first compiles the template
        found[page] = {
            "p50_ms": round(statistics.median(times), 1),
            "p95_ms": round(statistics.quantiles(times, n=20)[-1], 1),
            "cpu_ms": round(statistics.median(spent), 1),
            "kb": round(size / 1000, 1),
        }
    return found


def main() -> int:
    """Print the table; 0 when every page keeps the goal."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        create_authority(home / "ca", "benchmark")
        new_key(home / "signer.key")
        ca = home / "ca" / "ca.pem"
        config = CoordinatorConfig(
            data_dir=home,
            console=ConsoleConfig(listen="127.0.0.1:0"),
            tls=TlsConfig(ca=ca, certificate=ca, key=ca),
        )
        Users(home).add("grace", "operator", PASSWORD)
        store, artifacts = Store.at(home / "db.sqlite"), Artifacts(home / "artifacts")
        fill(store)
        signer = Signer(store, artifacts, home / "signer.key")
        research = ResearchService(
            store, artifacts, signer, Orders(ca), auto_approve=False, attending=attending
        )
        members = Members(Revocations(store.database))
        console = Console(config, store, artifacts, research, attending, members)
        console.start()
        pages = measure(console.url, arguments.repeats)
        console.stop()
        store.close()
    worst, cpu = (max(page[key] for page in pages.values()) for key in ("p95_ms", "cpu_ms"))
    if arguments.json:
        print(
            json.dumps(
                {"pages": pages, "worst_p95_ms": worst, "worst_cpu_ms": cpu, "goal_ms": GOAL_MS}
            )
        )
    else:
        for address, page in pages.items():
            told = "  ".join(f"{key} {value:>7}" for key, value in page.items())
            print(f"{address:<32} {told}")
    return 0 if worst <= GOAL_MS else 1


if __name__ == "__main__":
    raise SystemExit(main())
