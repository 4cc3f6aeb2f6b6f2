"""TLS with certificates of `unionfs certs create`: real curl, our client, and those who must not get in."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_harness import Daemon, made, unionfs

FILES = ["ca.pem", "cert.pem", "key.pem", "server-cert.pem", "server-key.pem"]


@pytest.fixture(scope="session")
def certs(workspace: Path) -> Path:
    directory = workspace / f"certs-{os.urandom(4).hex()}"
    unionfs("certs", "create", directory, "--host", "127.0.0.1", "--host", "localhost")
    return directory


@pytest.fixture(scope="session")
def tls(workspace: Path, certs: Path) -> Iterator[Daemon]:
    with made(workspace) as daemon:
        daemon.start(
            *("--tlsverify", "--tlscacert", certs / "ca.pem"),
            *("--tlscert", certs / "server-cert.pem", "--tlskey", certs / "server-key.pem"),
            hosts=(daemon.host, "tcp://127.0.0.1:0"),
        )
        yield daemon


def url(tls: Daemon) -> str:
    where: str = tls.curl("/info").json["listening"][1]
    return where.replace("tcp://", "https://")


def test_the_five_files(certs: Path) -> None:
    assert sorted(os.listdir(certs)) == FILES
    assert stat.S_IMODE(certs.stat().st_mode) == 0o700
    for name in FILES:
        assert stat.S_IMODE((certs / name).stat().st_mode) == (0o600 if "key" in name else 0o644)
    for name, purpose in (("server-cert.pem", "sslserver"), ("cert.pem", "sslclient")):
        words = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", certs / "ca.pem", certs / name]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
    shown = subprocess.run(
        ["openssl", "x509", "-in", certs / "server-cert.pem", "-noout", "-ext", "subjectAltName"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert "IP Address:127.0.0.1, DNS:localhost" in shown


def test_files_that_are_there_stay(certs: Path, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("mine")
    refused = unionfs("certs", "create", tmp_path, check=False)
    assert refused.returncode == 1
    assert f"{tmp_path} has key.pem already" in refused.stderr
    assert os.listdir(tmp_path) == ["key.pem"]
    assert (tmp_path / "key.pem").read_text() == "mine"
    unionfs("certs", "create", tmp_path, "--force")
    assert sorted(os.listdir(tmp_path)) == FILES


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["make", "x"], "unknown verb 'make'"),
        (["create"], "missing argument"),
        (["create", "x", "--days", "0"], "--days 0: must be a number of days"),
        (["create", "x", "--days", "99999999"], "no such date"),
        (["create", "x", "--host", "größe.example"], "neither an address nor a name"),
    ],
)
def test_bad_certs_command_lines(tmp_path: Path, argv: list[str], said: str) -> None:
    done = unionfs("certs", *[str(tmp_path / word) if word == "x" else word for word in argv], check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert os.listdir(tmp_path) == []


def test_curl_and_client_with_certificates(tls: Daemon, certs: Path) -> None:
    words = ("--cacert", certs / "ca.pem", "--cert", certs / "cert.pem", "--key", certs / "key.pem")
    assert tls.curl("/version", *words, url=url(tls)).status == 200
    assert "without TLS" not in tls.log
    assert "(TLS, client certificates)" in tls.log
    host = url(tls).replace("https://", "tcp://")
    assert "Storage Driver: " in unionfs("-H", host, "--tlsverify", "info", UNIONFS_CERT_PATH=str(certs)).stdout
    shown = unionfs("info", UNIONFS_HOST=host, UNIONFS_TLS_VERIFY="1", UNIONFS_CERT_PATH=str(certs)).stdout
    assert "Storage Driver: " in shown
    named = ("--tlscacert", certs / "ca.pem", "--tlscert", certs / "cert.pem", "--tlskey", certs / "key.pem")
    assert "Storage Driver: " in unionfs("-H", host, "--tlsverify", *named, "info").stdout


def test_nothing_without_a_certificate_of_the_ca(tls: Daemon, certs: Path, workspace: Path) -> None:
    foreign = workspace / f"foreign-{os.urandom(4).hex()}"
    unionfs("certs", "create", foreign, "--host", "127.0.0.1")
    ca = ("--cacert", certs / "ca.pem")
    for kind, pair in (
        ("none", ()),
        ("of another CA", ("--cert", foreign / "cert.pem", "--key", foreign / "key.pem")),
        ("the daemon's own", ("--cert", certs / "server-cert.pem", "--key", certs / "server-key.pem")),
    ):
        words = ["curl", "-sS", "--max-time", "60", *map(str, (*ca, *pair)), f"{url(tls)}/version"]
        done = subprocess.run(words, capture_output=True, timeout=90)
        assert done.returncode not in (0, 28), kind
        assert done.stdout == b"", kind
    plain = url(tls).replace("https://", "http://")
    done = subprocess.run(["curl", "-sS", "--max-time", "60", f"{plain}/version"], capture_output=True, timeout=90)
    assert done.returncode != 0
    assert done.stdout == b""
    shutil.rmtree(foreign)


def test_client_refuses_a_daemon_of_another_ca(tls: Daemon, tmp_path: Path) -> None:
    unionfs("certs", "create", tmp_path / "other", "--host", "127.0.0.1")
    host = url(tls).replace("https://", "tcp://")
    done = unionfs("-H", host, "--tlsverify", "info", check=False, UNIONFS_CERT_PATH=str(tmp_path / "other"))
    assert done.returncode == 6
    assert f"{host}: TLS: CERTIFICATE_VERIFY_FAILED" in done.stderr
    absent = unionfs("-H", host, "--tlsverify", "info", check=False, UNIONFS_CERT_PATH=str(tmp_path / "absent"))
    assert "TLS files" in absent.stderr
    assert "No such file or directory" in absent.stderr


def test_old_protocols_are_refused(tls: Daemon, certs: Path) -> None:
    words = ["curl", "-sS", "--tls-max", "1.1", "--ciphers", "ALL:@SECLEVEL=0"]
    for name, file in (("cacert", "ca.pem"), ("cert", "cert.pem"), ("key", "key.pem")):
        words += [f"--{name}", str(certs / file)]
    done = subprocess.run([*words, f"{url(tls)}/version"], capture_output=True, timeout=90)
    assert done.returncode == 35


def test_files_that_are_no_certificates(daemon: Daemon, certs: Path) -> None:
    junk = daemon.base / "junk.pem"
    junk.write_text("junk")
    names = ("--tlsverify", "--tlscacert", certs / "ca.pem", "--tlskey", certs / "server-key.pem", "--tlscert")
    for file in (junk, daemon.base / "absent.pem"):
        _, said = daemon.refuses(*names, file, hosts=("tcp://127.0.0.1:0",))
        assert "TLS files" in said
        assert str(file) in said
