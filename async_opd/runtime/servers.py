"""Somebody's servers, looked at before a run depends on them."""

from async_opd.config.schema import Config
from async_opd.core.aio import together
from async_opd.runtime.actor_specs import ActorSpecs


async def look_at(specs: ActorSpecs, section: str, url: str) -> None:
    """Look at the server at `url` that the scorer in `section` is to ask. Raises ConfigError where
    it cannot serve."""
    from async_opd.roles.teacher.server.served import look, refuse

    settings, scorer, needs, _, key, within_s = specs.member(section, url).args
    secret = key.value if key else None
    served = await look(url, secret, scorer.model, timeout_s=within_s, section=section)
    refuse(served, settings, needs)


async def look_at_all(config: Config, specs: ActorSpecs) -> None:
    """Look at every server of a run, side by side. Raises ConfigError."""
    await together(
        *(
            look_at(specs, section, f"{url}")
            for section, scorer in config.served.items()
            for url in scorer.members
        )
    )
