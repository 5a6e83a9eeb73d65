"""A cluster that we start ourselves is reached from this machine alone, and by who may read our
token."""

import json
import subprocess
import sys
from ipaddress import ip_address

import pytest

pytestmark = pytest.mark.ray

CODE = """
import json, psutil, ray
from async_opd.runtime.nodes import start_ray, taken_over

@ray.remote
class Member:
    def ip(self):
        return ray.util.get_node_ip_address()

start_ray()
member = Member.remote()
ips = [ray.get(member.ip.remote()), ray.util.get_node_ip_address()]
us = psutil.Process()
listening = [
    (process.name(), place.laddr.ip)
    for process in (us, *us.children(recursive=True))
    for place in process.net_connections("inet")
    if place.status == psutil.CONN_LISTEN or place.type == 2  # or of datagrams
]
taken_over().close()
print(json.dumps({"ips": ips, "listening": listening}))
"""


@pytest.mark.parametrize("left", [None, "a" * 64])
def test_only_this_machine_reaches_it_and_only_we_read_its_token(left, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    token = tmp_path / ".ray" / "auth_token"
    if left:
        token.parent.mkdir()
        token.write_text(left)
        token.chmod(0o644)
    ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    said = json.loads(ran.stdout.splitlines()[-1])
    assert {name for name, _ in said["listening"]} >= {"gcs_server", "raylet", "ray::Member"}
    for name, ip in [*said["listening"], *(("ip", ip) for ip in said["ips"])]:
        assert ip_address(ip.removeprefix("::ffff:")).is_loopback, (name, ip)
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() == left or len(token.read_text()) == 64


HANGUP = """
import os, signal, time, ray
from async_opd.runtime.nodes import dead_head, start_ray, taken_over

@ray.remote
class Member:
    def answer(self):
        return "here"

signal.signal(signal.SIGHUP, lambda number, frame: print("came"))
start_ray()
member = Member.remote()
ray.get(member.answer.remote())
os.killpg(0, signal.SIGHUP)
time.sleep(1)
print(ray.get(member.answer.remote(), timeout=10), dead_head() or "nobody died")
taken_over().close()
"""


def test_a_terminal_that_is_closed_is_for_us_alone_to_hear_of():
    ran = subprocess.run(
        [sys.executable, "-c", HANGUP], capture_output=True, text=True, start_new_session=True
    )
    assert ran.stdout.splitlines() == ["came", "here nobody died"], ran.stderr
