import socket

import pytest

from async_opd.core.errors import ConfigError
from async_opd.runtime import nodes


def test_an_address_where_something_listens_that_is_no_ray_is_refused_in_time(monkeypatch):
    """`ray.init` would ask it for ever."""
    monkeypatch.setattr(nodes, "ASK_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ConfigError, match=f"{address}.: no answer of a Ray head in 0.5 s"):
            nodes.refuse_silent()
