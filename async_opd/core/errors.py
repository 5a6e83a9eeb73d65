"""One tree of named errors. Each carries one message, so each pickles and survives a trip through
Ray."""


class AsyncOpdError(Exception):
    """Root of every error this package raises on purpose. `exit_status` is what the command line
    returns."""

    exit_status = 1


def first_line(error: BaseException) -> str:
    """Shorten an error to its message's first line, and the next one where that ends by a colon; to
    its type's name where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    behind = 2 if lines[0].rstrip().endswith(":") else 1
    return " ".join(line.strip() for line in lines[:behind])


class ConfigError(AsyncOpdError):
    """A setting, or a word of the command line, is wrong. The message names it, and what is
    allowed."""

    exit_status = 2


class ClusterTooSmall(AsyncOpdError):
    """The cluster has not the GPUs that a config asks for. The message gives both, by role and by
    node."""

    exit_status = 2


class DataError(AsyncOpdError):
    """A dataset, a row, a model directory or a tokenizer cannot be used. The message names which
    and why."""

    exit_status = 2


class RunMissing(AsyncOpdError):
    """A run directory, or a file of it that a command needs, is not there or is another thing. The
    message names it."""

    exit_status = 2


class RunInUse(AsyncOpdError):
    """A run, a resume or an evaluation works in a directory. The message names it, and who works
    there since when."""

    exit_status = 2


class CheckpointError(AsyncOpdError):
    """A checkpoint is refused. The message names it, the file and what is wrong."""

    exit_status = 2


class CheckpointNotSaved(CheckpointError):
    """A checkpoint cannot be written. The message names it, the file and what the disk says."""

    exit_status = 1


class ClusterError(AsyncOpdError):
    """A cluster cannot be asked, or refuses: its address, its token, or a job it does not know. The
    message names it and what to do."""

    exit_status = 2


class LedgerError(AsyncOpdError):
    """The ledger cannot be written, or a line of it is not a record. The message names the file,
    and the line."""


class WireError(AsyncOpdError):
    """A message that crossed a process boundary breaks an invariant. The message names its id and
    the field."""


class TimedOut(AsyncOpdError):
    """A bounded wait ran out. The message names who was waited for, how long, and at which
    version."""


class ActorLost(AsyncOpdError):
    """An actor, or the engine inside it, died. The message names the role and its index."""


class SystemFailed(AsyncOpdError):
    """Ray, its object store or a disk refused a call. The message names the call and what was
    said."""


class HeadLost(AsyncOpdError):
    """Ray's head, or its part on the driver's node, died or gives no sign of life: no actor can be
    started or given up any more. The message says which, and how long it was silent."""


class CallFailed(AsyncOpdError):
    """A role that lives raised something that has no name of its own. The message names the role,
    the call and it."""


class Lethal(CallFailed):
    """A request ends whom it is asked of: it was lost with several members, the last time with
    nothing else in flight. The message names it, and how the last of them ended."""


class TooManyDropped(AsyncOpdError):
    """More groups fail, or are left out, than a run goes on with. The message says how many, by
    whose doing, and why the last one."""


class ScorerDiffers(AsyncOpdError):
    """Replicas of one model score the same tokens differently. The message names them and by how
    much."""


class OverAge(AsyncOpdError):
    """A group was cut off in flight: what it had sampled is too old to be trained. The message
    names its prompt."""


class SyncFailed(AsyncOpdError):
    """A weight update did not reach every generator. The message names the version and the
    cause."""


class ParityError(AsyncOpdError):
    """Generator and learner disagree about the log-probs of the same tokens under the same
    version."""


class StaleTrajectory(AsyncOpdError):
    """A token older than `max_lag_steps` reached the learner: the lag bound is broken, which is a
    bug."""


class Diverged(AsyncOpdError):
    """A loss or gradient is not finite. Raised on every rank before the optimizer moves."""
