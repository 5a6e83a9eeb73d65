"""Somebody's servers, looked at before a run depends on them."""

from async_opd.config.schema import Config
from async_opd.core.aio import together
from async_opd.core.errors import AsyncOpdError, ConfigError
from async_opd.runtime.actor_specs import ActorSpecs, make_server_teacher


async def look_at(specs: ActorSpecs, section: str, url: str) -> None:
    """Look at the server at `url` that the scorer in `section` is to ask, as the member that asks
    it will. Raises ConfigError where it cannot serve."""
    asker = make_server_teacher(*specs.member(section, url).args)
    try:
        await asker.start()
    except ConfigError:
        raise
    except AsyncOpdError as e:
        raise ConfigError(f"{e}") from e
    finally:
        await asker.close()


async def look_at_all(config: Config, specs: ActorSpecs) -> None:
    """Look at every server of a run, side by side. Raises ConfigError."""
    await together(
        *(
            look_at(specs, section, f"{url}")
            for section, scorer in config.served.items()
            for url in scorer.members
        )
    )
