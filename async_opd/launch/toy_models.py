"""The `toy:` names of models and data."""

from pathlib import Path
from typing import Any

import msgspec

from async_opd import toy
from async_opd.config.schema import Config
from async_opd.config.sections import StudentConfig
from async_opd.core.run_dir import TOY_DATA
from async_opd.roles.teacher.config import ReferenceConfig, TeacherConfig
from async_opd.toy.task import write_dataset


def resolve_toy(config: Config, run_dir: Path) -> Config:
    """Replace the `toy:` names by the shipped models and by data written into the run directory."""
    replace = msgspec.structs.replace

    def resolve(name: str) -> str:
        kind, _, what = name.partition(":")
        if kind != "toy":
            return name
        if what in ("train", "heldout"):
            write_dataset(run_dir / TOY_DATA)
            return str(run_dir / TOY_DATA / f"{what}.jsonl")
        return str(toy.WEIGHTS / what)

    def resolved(section: StudentConfig | TeacherConfig | ReferenceConfig | None) -> Any:
        named = section and section.model
        return replace(section, model=resolve(named)) if section and named else section

    return replace(
        config,
        student=resolved(config.student),
        teacher=resolved(config.teacher),
        teachers={name: resolved(teacher) for name, teacher in config.teachers.items()},
        reference=resolved(config.reference),
        data=replace(
            config.data,
            path=resolve(config.data.path),
            sources={
                name: replace(source, path=resolve(source.path))
                for name, source in config.data.sources.items()
            },
        ),
        eval=config.eval and replace(config.eval, path=resolve(config.eval.path)),
    )
