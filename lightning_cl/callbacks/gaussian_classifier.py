"""Discriminant analysis in place of the classification layer."""

from typing import Literal

from lightning_cl.heads.class_gaussians import Covariance
from lightning_cl.heads.gaussian_head import Prior
from lightning_cl.tasks.gaussian_callback import GaussianCallback, GaussianClassifierKind


class GaussianClassifier(GaussianCallback):
    """Predict by Gaussians of the classes' features: streaming LDA (Deep SLDA, arXiv 1909.01520) or QDA.

    Training is untouched. In eval mode the classification layer's output is replaced by log densities of its input,
    with minus infinity for classes that were not seen, so the module's own validation, test and predict steps and their
    metrics use them. Before the first Gaussians are known, the layer answers for itself.

    Each task's Gaussians are taken in one pass over its training samples as an evaluation sees them, at the task's end,
    and no sample is kept. Where the backbone is frozen, as in Deep SLDA, the head after the last task is exactly that
    of all data at once, whatever the tasks were. Gaussians of past classes stay as they are when the backbone goes on
    learning; `AdaGauss` moves them after it.

    The Gaussians are part of the checkpoint, ``memory_per_class`` numbers for each class, and the head is made from
    them: ``trainer.test(ckpt_path=...)`` and `lightning_cl.load` have it.

    Args:
        head: Name of the classification layer; found by its number of outputs if ``None``.
        covariance: "shared" keeps one matrix for all classes (LDA), "full" a matrix of each class (QDA), "diagonal" the
            variances of each class only.
        shrinkage: Share of the mean variance that is added to the variances when the head is made. A covariance that
            still has no inverse gets the smallest multiple of the identity that gives it one.
        off_diagonal_shrinkage: Share of the mean covariance that is added to the others.
        correlation: Whether the head takes correlations in place of covariances.
        normalize: Whether features and means are brought to length 1; a "linear" classifier takes them as they are.
        log_determinant: Whether the head minds the determinants of the covariances.
        prior: Whether classes are equally probable, or as their "counts" are.
        temperature: What scores are divided by.
        flips: Whether the mirror image of each image is taken as one more sample.
        classifier: "bayes" takes the class of the greatest density, "nearest_mean" that of the nearest mean, "linear"
            trains a linear layer on features drawn from the Gaussians.
        refresh: Whether the head is made at the end of each "task", or also after each "epoch", with Gaussians of the
            current task's data that are not kept.
        samples_per_class: Features that a "linear" classifier draws of each class.

    Example::

        >>> GaussianClassifier(covariance="full", prior="counts").covariance
        'full'
    """

    def __init__(
        self,
        head: str | None = None,
        covariance: Covariance = "shared",
        shrinkage: float = 1e-4,
        off_diagonal_shrinkage: float = 0.0,
        correlation: bool = False,
        normalize: bool = False,
        log_determinant: bool = True,
        prior: Prior = "equal",
        temperature: float = 1.0,
        flips: bool = False,
        classifier: GaussianClassifierKind = "bayes",
        refresh: Literal["task", "epoch"] = "task",
        samples_per_class: int = 500,
    ) -> None:
        super().__init__(
            head=head,
            covariance=covariance,
            shrinkage=shrinkage,
            off_diagonal_shrinkage=off_diagonal_shrinkage,
            correlation=correlation,
            normalize=normalize,
            log_determinant=log_determinant,
            prior=prior,
            temperature=temperature,
            flips=flips,
            classifier=classifier,
            refresh=refresh,
            samples_per_class=samples_per_class,
        )
