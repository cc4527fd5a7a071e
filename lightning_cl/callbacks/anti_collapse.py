"""Features that do not collapse into fewer dimensions than there are."""

from lightning_cl.arguments import check_number
from lightning_cl.tasks.feature_regulariser import FeatureRegulariser


class AntiCollapse(FeatureRegulariser):
    """Add the anti-collapse loss of the features to the module's loss (AdaGauss, arXiv 2409.18265).

    It is a part of `AdaGauss`, for use with other methods: covariances of classes keep their full rank, so that a
    Gaussian head can tell them apart. Features are the input of the classification layer. Under DDP their covariance
    is that of the whole batch, over all ranks. A rest of an epoch that has no more samples than features goes without.

    Args:
        weight: Weight of the term.
        bound: Spread beyond which a feature gains nothing (the paper's beta).
        task_classes_only: Whether the module's own loss sees the logits of the current task's classes alone, or, where
            past samples are replayed, those of all classes seen so far.
        head: Name of the classification layer; found by its number of outputs if ``None``.

    Raises:
        TypeError: If a number is none.
        ValueError: If one is out of its range.

    Example::

        >>> AntiCollapse(weight=0.5).bound
        1.0
    """

    def __init__(
        self, weight: float = 1.0, bound: float = 1.0, task_classes_only: bool = False, head: str | None = None
    ) -> None:
        check_number("weight", weight, 0)
        super().__init__(anti_collapse=weight, bound=bound, task_classes_only=task_classes_only, head=head)
        self.weight = weight
