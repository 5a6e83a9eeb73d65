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
