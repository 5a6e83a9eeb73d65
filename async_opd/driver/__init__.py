"""THE asyncio process of a run. It moves prompts, metadata and references; tokens never come here.

    prompts -> Admission --+--> Producer --------> generator --+--> teacher ----+--> TrajectoryQueue
                  ^        |                                   +--> reference --+          |
                  |        |                                   +--> verifier ---+          |
                  |        +--> TeacherSampling -> teacher's generator -> verifier ------->+
                  |                                                                        |
                  +-- slots -- WeightPublisher <- SelfTeachers <- learner's step <---------+

Who waits for whom, and what unblocks it:

- `Admission` for a free slot: a publication gives back those of the step that it publishes, a final
  drop its own.
- `Producer`, a task for each prompt, for a generator, then for its scorers and the verifier
  together; `TeacherSampling` likewise for its own generator, then for the verifier. For a scorer
  that lives in the learner nobody waits: it is asked in the step that trains the group, and what
  it cannot score, the step's result tells.
- `ReplicaPool.ask` for somebody who may be asked. Unblocked by a new member, or by none being left;
  by the end of the while for which one that refuses is left alone; by an answer to what is asked
  for alone. What is lost or refused is asked of another.
- `TrainLoop` for a step's groups (`TrajectoryQueue.put`), for the learner, for self-teachers that
  take its weights over, and for the generators that take them (`WeightPublisher.publish`).
- A new generator for the weights' lock: it joins between two updates. A new teacher for its
  answer to the probe (`ScorerProbe`), which the others give beside their work.
- `HeldOut`, beside training, for the same generators: nobody waits for it; the end of the run cuts
  it off, and measures once more.

`Outcomes` hears what becomes of each group, and ends a run of which too few are left.

A call is `ReplicaPool.ask` -> `Replica.call` -> `runtime.actors` -> the role's method. Whatever is
out, and however it ends, the replica counts it.
"""
