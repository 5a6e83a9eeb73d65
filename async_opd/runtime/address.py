"""The address of the cluster that RAY_ADDRESS names."""

import os
import re
import socket

from async_opd.core.errors import ConfigError


def refuse_unreachable() -> None:
    """Raise ConfigError where nobody listens at RAY_ADDRESS: Ray tries for three minutes, then ends
    the process."""
    address = os.environ.get("RAY_ADDRESS", "")
    if place := re.fullmatch(r"(?:\w+://)?(.+):(\d+)", address):
        try:
            socket.create_connection((place[1], int(place[2])), timeout=10).close()
        except OSError as e:
            raise ConfigError(f"RAY_ADDRESS = {address!r}: no cluster answers there: {e}") from e
