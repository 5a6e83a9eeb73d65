"""What teachers of tests are built with."""

from typing import Any

from async_opd.core.role_settings import ScorerSettings


def scorer_settings(size: int, **others: Any) -> ScorerSettings:
    """Settings of a teacher for short sequences, with `others` in place of the usual ones."""
    usual = dict(
        name="teacher 0",
        temperature=1.0,
        longest=64,
        eos_ids=(1,),
        max_new_tokens=8,
    )
    return ScorerSettings(**dict(vocabulary=((0, size),)) | usual | others)
