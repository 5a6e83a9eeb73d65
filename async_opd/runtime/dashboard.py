"""The way to a cluster: the URL of its dashboard, and the token that it asks for."""

import ipaddress
import json
import os
import socket
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from async_opd.core.errors import ClusterError
from async_opd.core.printing import say

DEFAULT = "http://127.0.0.1:8265"
ANSWER_S = 10.0  # within which a dashboard answers
LONGEST = 4096  # bytes of how it says who its users are
HOW_TO_GET_A_TOKEN = (
    "`ray get-auth-token` on its head node prints the one it asks for: put it into RAY_AUTH_TOKEN,"
    " or ~/.ray/auth_token"
)
TUNNEL = (
    "a tunnel (ssh -L 8265:localhost:8265 HEAD, or kubectl port-forward) and --address"
    " http://127.0.0.1:8265"
)


def dashboard_url(address: str | None) -> str:
    """Choose the URL of the dashboard: `address`, else that of Ray's environment variables, or of
    this machine. An address of Ray's own protocol is refused: nothing bounds the wait for its
    answer."""
    named = {"--address": address} | {
        name: os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    }
    name, chosen = next(((name, text) for name, text in named.items() if text), ("", DEFAULT))
    try:
        url = urlsplit(chosen)
        right = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:  # a port that is no number, or half an IPv6 address
        url, right = urlsplit(""), False
    if any(mark in chosen for mark in "@?#"):
        # what may be secret, and messages name the address
        raise ClusterError(f"{name}: must be a URL without a user, a ? and a #, as {DEFAULT} is")
    if not right:
        raise ClusterError(
            f"{name} = {chosen!r}: must be the URL of a Ray dashboard, such as --address {DEFAULT}"
        )
    return chosen.rstrip("/")


def token_for(address: str) -> str | None:
    """Find the token for the cluster at `address`, if it asks for one. Whoever reaches a dashboard
    runs what he likes on its cluster, and whoever reads a token reaches it: so one that is not
    local must ask for it, and get it unread."""
    url = urlsplit(address)
    hosts = _resolved(address, url.hostname or "")
    local = all(ip.is_loopback for ip in hosts)
    if url.scheme == "http" and not all(ip.is_private for ip in hosts):
        raise ClusterError(
            f"{address}: http would send the token in clear through the open net: use https, or"
            f" {TUNNEL}"
        )
    if _authentication(address) != "token":
        if local:
            return None
        raise ClusterError(
            f"{address}: the cluster has no token authentication, so anyone can run code on it: set"
            " RAY_AUTH_MODE=token and one RAY_AUTH_TOKEN on all of its nodes before `ray start`"
        )
    token = _token()
    if token is None:
        raise ClusterError(
            f"{address}: asks for a token, and there is none here; {HOW_TO_GET_A_TOKEN}"
        )
    if url.scheme == "http" and not local:
        say(
            f"warning: {address} gets the token in clear; unless you trust this network, use https"
            f" or {TUNNEL}",
            sys.stderr,
        )
    return token


def _resolved(address: str, host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Look up the IP addresses of `host`."""
    try:
        sockets = [info[4] for info in socket.getaddrinfo(host, None)]
    except OSError as e:
        raise ClusterError(f"{address}: {host} is unknown here: {e.strerror}") from e
    return [ipaddress.ip_address(str(ip).partition("%")[0]) for ip, *_ in sockets]


def _authentication(address: str) -> str:
    """Ask how the cluster knows its users: "token" or "disabled"."""
    try:
        with urlopen(f"{address}/api/authentication_mode", timeout=ANSWER_S) as answer:
            return json.loads(answer.read(LONGEST))["authentication_mode"]
    except HTTPError as e:
        e.close()
        raise ClusterError(
            f"{address}: answers {e.code} {e.reason}, as no Ray dashboard of 2.60 does"
        ) from e
    except OSError as e:
        raise ClusterError(
            f"{address}: no Ray dashboard answers within {ANSWER_S:g} s:"
            f" {getattr(e, 'reason', None) or e}; is it up (`ray start --head` starts one here),"
            " and its port forwarded?"
        ) from e
    except (HTTPException, ValueError, KeyError, TypeError) as e:
        raise ClusterError(f"{address}: answers, but not as a Ray dashboard does") from e


def _token() -> str | None:
    """Read the token where Ray itself looks for it, whatever RAY_AUTH_MODE says: the cluster has
    asked for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None
