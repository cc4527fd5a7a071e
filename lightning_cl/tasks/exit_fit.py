"""What exits need for the time of one fit."""

from dataclasses import dataclass, field

from lightning_cl.tasks.clock import TaskClock
from lightning_cl.tasks.exit_prototypes import ExitPrototypes
from lightning_cl.tasks.exit_training import ExitTraining
from lightning_cl.tasks.module_call import ModuleCall
from lightning_cl.tasks.stream import ReplayStream


@dataclass
class ExitFit:
    """What belongs to one fit.

    Args:
        clock: Its clock.
        stream: Its tasks.

    Attributes:
        training: How the heads are trained; from the time that they are built.
        call: Calls the module on a batch; from the start of training.
        prototypes: The nearest means of the exits, where they answer.
    """

    clock: TaskClock
    stream: ReplayStream
    training: ExitTraining = field(init=False)
    call: ModuleCall | None = None
    prototypes: ExitPrototypes | None = None
