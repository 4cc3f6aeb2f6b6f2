"""The REST API over the unix socket: layers, mounts, events, metrics, OpenAPI, and what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from daemon_harness import Daemon, mounts_below, tar_of, unionfs, wait_until


def test_version_with_and_without_the_version(running: Daemon) -> None:
    plain, versioned = running.curl("/version"), running.curl("/v1/version")
    assert plain.status == versioned.status == 200
    assert plain.json == versioned.json
    assert plain.json["api_version"] == "v1"
    refused = running.curl("/v2/version")
    assert (refused.status, refused.message) == (404, "API version v2: this daemon speaks v1")


def test_layer_from_nothing_to_nothing(running: Daemon) -> None:
    running.layer("base", {"etc/issue": b"one\n", "etc/gone": b"x"})
    made = running.post("/layers", {"id": "work", "parent": "base", "labels": {"who": "me"}})
    assert made.status == 201
    assert (made.json["kind"], made.json["parent"], made.json["labels"]) == ("active", "base", {"who": "me"})
    assert [layer["id"] for layer in running.curl("/layers").json] == ["base", "work"]

    mount = running.post("/layers/work/mount").json
    tree = Path(mount["path"])
    assert mount["references"] == 1
    assert (tree / "etc/issue").read_bytes() == b"one\n"
    (tree / "etc/issue").write_bytes(b"two\n")
    (tree / "etc/gone").unlink()
    assert running.curl("/mounts").json == [mount]
    assert running.curl("/layers/work", "-X", "DELETE").status == 409
    assert running.curl("/layers/work/mount", "-X", "DELETE").status == 204
    assert running.curl("/mounts").json == []

    assert running.curl("/layers/work/changes").json == [
        {"path": "/etc", "kind": 0},
        {"path": "/etc/gone", "kind": 2},
        {"path": "/etc/issue", "kind": 0},
    ]
    with tarfile.open(fileobj=io.BytesIO(running.curl("/layers/work/diff").body)) as tar:
        assert sorted(member.name for member in tar) == ["etc", "etc/.wh.gone", "etc/issue"]
    assert running.curl("/layers/work/usage").json["inodes"] > 0
    assert running.curl("/layers/work/metadata").json["UpperDir"].startswith(str(running.root))
    relabelled = running.post("/layers/work", {"labels": {"who": "", "what": "that"}}, "PATCH")
    assert relabelled.json["labels"] == {"what": "that"}
    assert running.post("/layers/work/commit", {"new_id": "new"}).json["kind"] == "committed"
    assert running.curl("/layers/base", "-X", "DELETE").status == 409
    for id in ("new", "base"):
        assert running.curl(f"/layers/{id}", "-X", "DELETE").status == 204
    assert running.curl("/layers").json == []
    assert running.post("/cleanup").json == []
    assert running.post("/fsck").json == []


def test_references_are_counted(running: Daemon) -> None:
    running.layer("base", {"f": b"x"})
    running.post("/layers", {"id": "work", "parent": "base"})
    assert [running.post("/layers/work/mount").json["references"] for _ in range(3)] == [1, 2, 3]
    running.curl("/layers/work/mount", "-X", "DELETE")
    assert running.curl("/mounts").json[0]["references"] == 2
    assert running.curl("/layers/work/mount?all=true", "-X", "DELETE").status == 204
    assert running.curl("/mounts").json == []
    wait_until("the mount is gone", lambda: not mounts_below(running.root))


@pytest.mark.parametrize(
    ("path", "method", "body", "status"),
    [
        ("/layers", "POST", {"id": "../../etc"}, 400),
        ("/layers", "POST", {"id": ""}, 400),
        ("/layers", "POST", {"id": "a" * 129}, 400),
        ("/layers", "POST", {"id": "a\n"}, 400),
        ("/layers", "POST", {"id": 7}, 400),
        ("/layers", "POST", {"id": "a", "parent": "/etc"}, 400),
        ("/layers", "POST", {"id": "a", "parent": "absent"}, 404),
        ("/layers", "POST", {"id": "a", "kind": "committed"}, 400),
        ("/layers", "POST", {"id": "a", "kind": "view"}, 400),
        ("/layers", "POST", {"id": "a", "unknown": 1}, 400),
        ("/layers", "POST", {"id": "a", "labels": {"x": 1}}, 400),
        ("/layers", "POST", {"id": "a", "labels": {str(n): "" for n in range(300)}}, 400),
        ("/layers", "POST", [], 400),
        ("/layers", "PUT", {}, 405),
        ("/layers/absent", "GET", None, 404),
        ("/layers/absent/mount", "POST", None, 404),
        ("/layers/absent/diff", "GET", None, 404),
        ("/layers/absent/changes", "GET", None, 404),
        ("/layers/../../etc/passwd", "GET", None, 404),
        ("/layers/..", "GET", None, 400),
        ("/layers/%2e%2e%2fetc", "GET", None, 404),
        ("/layers/%00", "GET", None, 400),
        ("/layers/-a", "DELETE", None, 400),
        ("/nothing", "GET", None, 404),
    ],
)
def test_refused_in_one_line(rest: Daemon, path: str, method: str, body: Any, status: int) -> None:
    answer = rest.post(path, body, method)
    assert answer.status == status, answer.body
    assert answer.message
    assert "\n" not in answer.message
    assert rest.curl("/layers").json == []


def test_bodies_are_limited(rest: Daemon) -> None:
    big = b'{"id": "' + b"a" * (2 << 20) + b'"}'
    kind = ("-X", "POST", "-H", "Content-Type: application/json")
    assert rest.curl("/layers", *kind, "-H", "Expect:", "--data-binary", "@-", data=big).status == 413
    chunked = rest.curl("/layers", *kind, "-H", "Transfer-Encoding: chunked", "-H", "Expect:", "-T", "-", data=big)
    assert chunked.status == 413
    assert rest.curl("/layers", *kind, "--data-binary", "@-", data=b"{not json").status == 400
    long = rest.curl("/layers", *(word for name in "abcd" for word in ("-H", f"X-{name}: {'a' * 20_000}")))
    assert long.status in (400, 431)
    assert rest.curl("/version").status == 200


def test_web_pages_are_not_answered(rest: Daemon) -> None:
    for header in ("Origin: http://evil.example", "Sec-Fetch-Site: cross-site"):
        assert rest.curl("/layers", "-X", "POST", "-H", header, "-d", '{"id":"a"}').status == 403
    assert rest.curl("/layers").json == []


def test_a_tar_stays_in_its_layer(rest: Daemon) -> None:
    target = rest.base / "outside"
    for number, name in enumerate(("../../../outside", str(target))):
        rest.post("/layers", {"id": f"tar{number}"})
        answer = rest.put_tar(f"/layers/tar{number}/content", tar_of({name: b"x"}))
        assert not target.exists()
        assert answer.status in (200, 400), answer.body
        rest.curl(f"/layers/tar{number}", "-X", "DELETE")
    rest.post("/layers", {"id": "junk"})
    junk = rest.put_tar("/layers/junk/content", b"this is no tar" * 1000)
    assert junk.status == 400, junk.body
    rest.curl("/layers/junk", "-X", "DELETE")


def test_events_are_streamed(running: Daemon) -> None:
    words = ["curl", "-sSN", "--max-time", "60", "--unix-socket", running.socket, "http://localhost/events?since=0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        running.layer("base", {"f": b"x"})
        seen = [json.loads(follower.stdout.readline()) for _ in range(3)]
        assert [(event["action"], event["id"]) for event in seen] == [
            ("create", "base-key"),
            ("apply", "base-key"),
            ("commit", "base-key"),
        ]
        assert seen[2]["attributes"] == {"as": "base"}
        running.stop()  # ends the stream as well
        assert follower.wait(60) == 0


def test_events_of_the_past_end(running: Daemon) -> None:
    running.layer("base", {"f": b"x"})
    past = running.curl("/events?since=1&until=0").body
    assert past == b""
    until = time.time() + 3600
    with subprocess.Popen(
        ["curl", "-sSN", "--unix-socket", running.socket, f"http://localhost/events?since=1&until={until}"],
        stdout=subprocess.PIPE,
    ) as follower:
        assert follower.stdout is not None
        assert [json.loads(follower.stdout.readline())["action"] for _ in range(2)] == ["apply", "commit"]
        follower.kill()
    soon = running.curl(f"/events?since=1&until={time.time() + 0.5}").body  # ends by itself
    assert [json.loads(line)["action"] for line in soon.splitlines()] == ["apply", "commit"]


def test_metrics(running: Daemon) -> None:
    running.layer("base", {"f": b"x"})
    running.post("/layers", {"id": "work", "parent": "base"})
    running.post("/layers/work/mount")
    running.curl("/layers/absent", "-X", "DELETE")
    text = running.curl("/metrics").body.decode()
    for line in (
        'unionfs_layers{kind="committed"} 1.0',
        'unionfs_layers{kind="active"} 1.0',
        "unionfs_mounts 1.0",
        "unionfs_mount_references 1.0",
        'unionfs_store_seconds_count{operation="create"} 2.0',
        'unionfs_store_failures_total{operation="remove",status="404"} 1.0',
        'unionfs_http_requests_total{method="POST",status="201"} 2.0',
    ):
        assert f"\n{line}\n" in text, line
    assert "\nprocess_resident_memory_bytes " in text


def test_openapi_describes_every_route(rest: Daemon) -> None:
    spec = rest.curl("/openapi.json").json
    assert spec["openapi"].startswith("3.")
    assert {"/version", "/info", "/layers", "/layers/{id}/mount", "/mounts", "/events", "/metrics"} <= set(
        spec["paths"]
    )
    taken = spec["paths"]["/layers/{id}/content"]["put"]["requestBody"]["content"]
    assert list(taken) == ["application/x-tar"]
    for path, methods in spec["paths"].items():
        for method, route in methods.items():
            assert route["summary"] and "default" in route["responses"], (method, path)


def test_names_that_are_not_utf8(running: Daemon) -> None:
    running.layer("base", {"f": b"x"})
    running.post("/layers", {"id": "work", "parent": "base"})
    tree = running.post("/layers/work/mount").json["path"]
    Path(f"{tree}/\udcff").write_bytes(b"x")
    running.curl("/layers/work/mount", "-X", "DELETE")
    assert {"path": "/\udcff", "kind": 1} in running.curl("/layers/work/changes").json


def test_info_and_version_for_people(running: Daemon) -> None:
    running.layer("base", {"f": b"x"})
    lines = unionfs("-H", running.host, "info").stdout.splitlines()
    assert lines[0] == "Storage Driver: overlay"
    assert any(line.startswith(" Backing Filesystem: ") for line in lines)
    assert any(line.startswith(" Supports d_type: ") for line in lines)
    assert "Layers: 1" in lines
    assert json.loads(unionfs("info", "--json", UNIONFS_HOST=running.host).stdout)["layers"] == 1
    assert "Server:" in unionfs(f"--host={running.host}", "version").stdout
    absent = unionfs("-H", f"unix://{running.base}/absent", "version", check=False)
    assert absent.returncode == 1
    assert "Client:" in absent.stdout
    assert absent.stderr.startswith("unionfs: no daemon answers on unix://")
