"""Addresses of servers: what is wrong with one, and what messages show of it."""

import re
from ipaddress import ip_address
from urllib.parse import urlsplit

PORTS = {"http": 80, "https": 443}  # where none is named


def flaw(url: str) -> str:
    """Say what is wrong with the address of a server; "" where nothing is."""
    if re.search(r"[\s\x00-\x1f\x7f\\]", url):
        return "it holds white space, or what is no part of an address"
    form = "it must be http://HOST:PORT or https://HOST:PORT"
    try:
        parts, port = urlsplit(url), urlsplit(url).port
        (parts.hostname or "").encode("idna")
    except ValueError:  # whose message may show a password
        return f"{form}, with a name or an address as HOST and a PORT below 65536"
    if parts.scheme not in PORTS or not parts.hostname or port == 0:
        return form
    if parts.username is not None or parts.password is not None:
        return "it must hold no user and no password; key_env names the variable that holds a key"
    if parts.query or parts.fragment:
        return "it must hold nothing behind a ? or #; key_env names the variable that holds a key"
    return ""


def normal(url: str) -> str:
    """Write the address of a server in the one way that it has here: without its scheme's own port,
    a slash at the end, or the `/v1` that clients of such servers are given."""
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = parts.port if parts.port != PORTS[parts.scheme] else None
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{path}"


def shown_url(url: str) -> str:
    """Write what a message may show of an address: not what stands before an @, nor behind a ? or
    #, where somebody may have put a secret."""
    bare = re.split("[?#]", url)[0]
    scheme, slashes, rest = bare.rpartition("://")
    return repr(f"{scheme}{slashes}{rest.rpartition('@')[2]}")


def is_open(url: str) -> bool:
    """Tell whether what is sent to `url` can be read on its way: not encrypted, and not to this
    machine itself."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return False
    try:
        return not ip_address(parts.hostname or "").is_loopback
    except ValueError:  # a name
        return True
