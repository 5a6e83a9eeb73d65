"""The whole run in one typed tree: the sections of its roles composed, and what follows from
them."""

from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from async_opd.config.sections import (
    EvalConfig,
    RunConfig,
    StudentConfig,
    SyncConfig,
    TimeoutConfig,
)
from async_opd.config.teacher_rules import Engines, teacher_section
from async_opd.objectives import Objective, all_objectives
from async_opd.roles.learner.config import LearnerConfig
from async_opd.roles.rollout.config import DataConfig, RolloutConfig
from async_opd.roles.teacher.config import (
    ReferenceConfig,
    ScorerConfig,
    TeacherConfig,
    TeacherSamplingConfig,
)
from async_opd.roles.verifier.config import VerifyConfig

if TYPE_CHECKING:
    AnyObjective = Objective
else:  # a union that is known once the folder of objectives has been looked through
    AnyObjective = reduce(or_, all_objectives().values())


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run. `objective` is one of the tagged types in `async_opd.objectives`."""

    run: RunConfig
    student: StudentConfig
    data: DataConfig
    rollout: RolloutConfig
    learner: LearnerConfig
    objective: AnyObjective
    teacher: TeacherConfig | None = None  # one, or several of which each row names its own
    teachers: dict[str, TeacherConfig] = {}
    # absent: the student before its first step, where the objective needs one; with student.lora
    # it is the base in the learner, else a pool of its own
    reference: ReferenceConfig | None = None
    verify: VerifyConfig = msgspec.field(default_factory=VerifyConfig)
    sync: SyncConfig = msgspec.field(default_factory=SyncConfig)
    timeout: TimeoutConfig = msgspec.field(default_factory=TimeoutConfig)
    eval: EvalConfig | None = None
    teacher_sampling: TeacherSamplingConfig | None = None

    @property
    def groups_per_step(self) -> int:
        """Prompts a step."""
        return self.learner.trajectories_per_step // self.rollout.samples_per_prompt

    @property
    def outstanding_steps(self) -> float:
        """The groups that may be outstanding, in steps' worth."""
        return self.run.max_outstanding_steps or self.run.max_lag_steps + 1

    @property
    def named_teachers(self) -> dict[str, TeacherConfig]:
        """Every teacher by the name a prompt has for it; one alone has the name ""."""
        return self.teachers if self.teacher is None else {"": self.teacher}

    @property
    def inputs(self) -> dict[str, str]:
        """Models, data and templates it reads, by the keys that name them."""
        return (
            {"student.model": self.student.model}
            | {key: data.path for key, data in self.data.sets.items()}
            | {f"{section}.model": model for section, model in self.models.items()}
            | self.template_files
            | ({"eval.path": self.eval.path} if self.eval else {})
        )

    @property
    def template_files(self) -> dict[str, str]:
        """Files of the templates by which teachers read, by the keys that name them."""
        files = {teacher_section(n): t.template_file for n, t in self.named_teachers.items()}
        return {f"{section}.chat_template": file for section, file in files.items() if file}

    @property
    def relative_inputs(self) -> dict[str, str]:
        """Inputs that are here by a relative path; the rest is made by the run, of a hub, or
        another machine's."""
        return {
            key: name
            for key, name in self.inputs.items()
            if not Path(name).is_absolute() and Path(name).exists()
        }

    @property
    def models(self) -> dict[str, str]:
        """Models by their sections: the student's, and those that score rollouts; the reference
        only where it is needed."""
        named = self.reference and self.reference.model
        reference = {"reference": named or self.student.model}
        return (
            {"student": self.student.model}
            | {teacher_section(name): t.model for name, t in self.named_teachers.items()}
            | (reference if self.objective.needs().reference else {})
        )

    @property
    def on_transformers(self) -> dict[str, str]:
        """Those of `models` that run on transformers: the student, which learns there, its frozen
        base, and scorers of that backend."""
        elsewhere = {
            section
            for section, scorer in self.scorers.items()
            if scorer.backend in ("vllm", "server")
        }
        return {
            section: model for section, model in self.models.items() if section not in elsewhere
        }

    @property
    def served(self) -> dict[str, ScorerConfig]:
        """Those of `scorers` that somebody else's servers are: they hold no model here."""
        return {
            section: scorer
            for section, scorer in self.scorers.items()
            if scorer.backend == "server"
        }

    @property
    def measured_against(self) -> ReferenceConfig:
        """[reference], or what is meant where it is absent."""
        backend = "learner" if self.student.lora else "transformers"
        return self.reference or ReferenceConfig(backend=backend)

    @property
    def scorers(self) -> dict[str, ScorerConfig]:
        """Sections of what scores rollouts, each with its `model`."""
        scorers: dict[str, ScorerConfig] = {
            teacher_section(name): teacher for name, teacher in self.named_teachers.items()
        }
        if model := self.models.get("reference"):
            scorers["reference"] = msgspec.structs.replace(self.measured_against, model=model)
        return scorers

    @property
    def in_learner(self) -> dict[str, ScorerConfig]:
        """Those of `scorers` that are the student's base, in the learner's ranks."""
        return {name: each for name, each in self.scorers.items() if each.backend == "learner"}

    @property
    def engines(self) -> list[Engines]:
        """Pools of what holds a model here, the learner apart, with what scores in it."""
        rollout, sampling = self.rollout, self.teacher_sampling
        pools = [
            Engines("generator", "rollout", rollout.generators, "rollout.generators", rollout),
            *(
                Engines(section, section, scorer.replicas, f"{section}.replicas", scorer)
                for section, scorer in self.scorers.items()
                if section not in self.in_learner and section not in self.served
            ),
        ]
        if sampling and self.teacher:
            pools.append(
                Engines(
                    "teacher-generator",
                    "teacher",
                    sampling.generators,
                    "teacher_sampling.generators",
                    self.teacher,
                )
            )
        return pools
