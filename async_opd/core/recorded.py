"""The message that carries a trained response to people who look at it."""

import numpy as np
import numpy.typing as npt

from async_opd.core.message import Struct, check_array, check_rows


class RecordedTrajectory(Struct, frozen=True):
    """One trained response as the objective saw it, for people to look at. Made by the recorder of
    learner rank 0, of a few only; consumed by `telemetry.rollout_log`, which writes
    `samples.jsonl`."""

    id: str  # the rollout's
    step: int
    prompt_ids: npt.NDArray[np.int32]  # int32, the last of them where there are many
    ids: npt.NDArray[np.int32]  # int32 [T'], the first T' of the response
    prompt_tokens: int
    tokens: int  # T
    truncated: bool
    reward: float | None  # as the verifier has it; None: unknown
    numbers: dict[str, npt.NDArray[np.float32]]  # float32 [T'] by name
    kept_kv: bool = False  # updates left the KV of its context as it was
    # int32, the last of them, where the teacher read the prompt its own way; and which teacher
    teacher_prompt_ids: npt.NDArray[np.int32] | None = None
    teacher: str = ""

    def __post_init__(self) -> None:
        check_array(self.id, "prompt_ids", self.prompt_ids, np.int32, 1)
        check_array(self.id, "ids", self.ids, np.int32, 1)
        if self.teacher_prompt_ids is not None:
            check_array(self.id, "teacher_prompt_ids", self.teacher_prompt_ids, np.int32, 1)
        for name, value in self.numbers.items():
            check_array(self.id, name, value, np.float32, 1)
            check_rows(self.id, name, value, len(self.ids))
