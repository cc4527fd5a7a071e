"""Common corruptions of images, in five severities.

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (2019,
arXiv 1903.12261), with the constants that the authors published for 32x32 images (CIFAR-C).

For images of another size, everything that is a length grows or shrinks with ``min(height, width) / 32``: the sigmas of
the Gaussian blur, the glass blur and the elastic transform, the radius and the sigma of the defocus and motion blurs,
the shift of the glass blur, the displacement and the jitter of the elastic transform. The pixelation, which is given as
a share of the size, and the fog, whose coarsest structure is as large as the image, follow by themselves. Noise,
contrast, brightness and the JPEG quality do not depend on the size. A blur that shrinks to a fraction of a pixel is
none: the Gaussian and the defocus blur leave images of 8x8 as they are.
"""

from lightning_cl.corruptions.batch import CORRUPTIONS, check_corruption, corrupt

__all__ = ["CORRUPTIONS", "check_corruption", "corrupt"]
