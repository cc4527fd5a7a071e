"""Distillation of features through a projector that is trained with the network."""

from lightning_cl.arguments import check_number
from lightning_cl.tasks.feature_regulariser import FeatureRegulariser, Reduction


class ProjectedDistillation(FeatureRegulariser):
    r"""Let a small network find the last task's features in those that are trained (AdaGauss, arXiv 2409.18265).

    To the module's loss comes, from the second task on, ``weight`` times the squared difference of
    :math:`\phi(F_t(x))` and :math:`F_{t-1}(x)`, where :math:`F` are the features, the input of the classification
    layer, and :math:`\phi` is a projector that begins anew with each task: features may move, as long as what was in
    them can be found again. It is a part of `AdaGauss`, for use with other methods.

    The projector is trained by the module's first optimizer, with its learning rate and schedule, and is no part of the
    module. The teacher is a copy of weights and buffers, called in eval mode.

    Args:
        weight: Weight of the term.
        expansion: How many times wider than the features the projector's hidden layer is.
        reduction: Whether a sample's squared differences are averaged over the features ("mean", as the authors' code
            does, to which their weights belong) or summed up ("sum", as the paper's formula says).
        task_classes_only: Whether the module's own loss sees the logits of the current task's classes alone, or, where
            past samples are replayed, those of all classes seen so far.
        head: Name of the classification layer; found by its number of outputs if ``None``.

    Attributes:
        teacher: Weights and buffers of the last task's end, by name; ``None`` before.

    Raises:
        TypeError: If a number is none.
        ValueError: If one is out of its range.

    Example::

        >>> ProjectedDistillation(weight=10, expansion=4).reduction
        'mean'
    """

    def __init__(
        self,
        weight: float = 10.0,
        expansion: int = 32,
        reduction: Reduction = "mean",
        task_classes_only: bool = True,
        head: str | None = None,
    ) -> None:
        check_number("weight", weight, 0)
        super().__init__(
            distillation=weight,
            expansion=expansion,
            reduction=reduction,
            task_classes_only=task_classes_only,
            head=head,
        )
