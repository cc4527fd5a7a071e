"""The corruptions of single images, slowly and plainly, in NumPy, SciPy and Pillow.

Images are uint8 arrays ``(channels, height, width)``. Random numbers are given, and taken in the same order.
"""

import colorsys
import io
import math

import numpy as np
from PIL import Image
from scipy import ndimage, stats

CONSTANTS = {
    "gaussian_noise": [0.04, 0.06, 0.08, 0.09, 0.10],
    "shot_noise": [500, 250, 100, 75, 50],
    "impulse_noise": [0.01, 0.02, 0.03, 0.05, 0.07],
    "gaussian_blur": [0.4, 0.6, 0.7, 0.8, 1.0],
    "glass_blur": [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
    "defocus_blur": [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    "motion_blur": [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    "fog": [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
    "contrast": [0.75, 0.5, 0.4, 0.3, 0.15],
    "brightness": [0.05, 0.1, 0.15, 0.2, 0.3],
    "jpeg_compression": [80, 65, 58, 50, 40],
    "pixelate": [0.95, 0.9, 0.85, 0.75, 0.65],
    "elastic_transform": [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
}


def _reference_corrupt(image, name, severity, draws):
    """Corrupt one image by any rule but the noises, whose distributions stand below."""

    def draw(*shape):
        return draws.uniform(*shape)[0].numpy()

    constants = CONSTANTS[name][severity - 1]
    if name in ("jpeg_compression", "pixelate"):
        return _pillow(image, name, constants)
    x = _RULES[name](image / 255, constants, min(image.shape[1:]) / 32, draw)
    return np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)


def _pillow(image, name, constant):
    grey = len(image) == 1
    picture = Image.fromarray(image[0] if grey else np.ascontiguousarray(image.transpose(1, 2, 0)))
    if name == "pixelate":
        small = [max(1, int(side * constant)) for side in picture.size]
        picture = picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX)
    else:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=constant)
        picture = Image.open(file)
    corrupted = np.asarray(picture)
    return corrupted[None] if grey else corrupted.transpose(2, 0, 1)


def _gaussian(x, sigma):
    return np.stack([ndimage.gaussian_filter(channel, sigma, mode="nearest", truncate=4) for channel in x])


def _gaussian_blur(x, sigma, scale, draw):
    return _gaussian(x, sigma * scale)


def _glass_blur(x, constants, scale, draw):
    sigma, shift, iterations = constants
    sigma, shift = sigma * scale, max(1, round(shift * scale))
    x = _gaussian(x, sigma)
    _, height, width = x.shape
    offsets = np.floor(draw(iterations, height, width, 2) * 2 * shift).astype(int) - shift
    for iteration in range(iterations):
        for h in range(height - shift, shift, -1):
            for w in range(width - shift, shift, -1):
                dy, dx = offsets[iteration, h, w]
                x[:, [h, h + dy], [w, w + dx]] = x[:, [h + dy, h], [w + dx, w]]
    return _gaussian(x, sigma)


def _defocus_blur(x, constants, scale, draw):
    radius, sigma = (constant * scale for constant in constants)
    side = np.arange(-20, 21)
    disk = (side[:, None] ** 2 + side**2 <= radius**2).astype(float)
    reach = math.ceil(scale)
    window = np.exp(-(side[:, None] ** 2 + side**2) / (2 * sigma**2))[20 - reach : 21 + reach, 20 - reach : 21 + reach]
    kernel = ndimage.correlate(disk / disk.sum(), window / window.sum(), mode="constant")
    return np.stack([ndimage.correlate(channel, kernel, mode="mirror") for channel in x])


def _motion_blur(x, constants, scale, draw):
    radius, sigma = (constant * scale for constant in constants)
    angle = math.radians(-45 + 90 * draw(1)[0])
    taps = np.arange(2 * math.ceil(radius) + 1)
    weights = stats.norm.pdf(taps, scale=sigma) / stats.norm.pdf(taps, scale=sigma).sum()
    _, height, width = x.shape
    far = len(taps)
    padded = np.pad(x, [(0, 0), (far, far), (far, far)], mode="edge")
    blurred = np.zeros_like(x)
    for tap, weight in zip(taps, weights, strict=True):
        top, left = (far + math.ceil(tap * part - 0.5) for part in (math.sin(angle), math.cos(angle)))
        blurred += weight * padded[:, top : top + height, left : left + width]
    return blurred


def _fog(x, constants, scale, draw):
    density, decay = constants
    _, height, width = x.shape
    side = 2
    while side < max(height, width):
        side *= 2
    fractal = _plasma(draw(side, side) * 2 - 1, decay)[:height, :width]
    return (x + density * fractal) * x.max() / (x.max() + density)


def _plasma(draws, decay):
    side = len(draws)
    heights, step, wibble = np.zeros((side, side)), side, 100.0

    def fill(y, x, around):
        corners = [heights[(y + dy) % side, (x + dx) % side] for dy, dx in around]
        heights[y, x] = np.mean(corners) + wibble * wibble * draws[y, x]

    while step > 1:
        half = step // 2
        diagonal = [(-half, -half), (-half, half), (half, -half), (half, half)]
        straight = [(-half, 0), (half, 0), (0, -half), (0, half)]
        starts = [(y, x) for y in range(0, side, step) for x in range(0, side, step)]
        for y, x in starts:
            fill(y + half, x + half, diagonal)
        for y, x in starts:
            fill(y, x + half, straight)
            fill(y + half, x, straight)
        step, wibble = half, wibble / decay
    return (heights - heights.min()) / (heights.max() - heights.min())


def _contrast(x, factor, scale, draw):
    means = np.array([np.mean(channel) for channel in x])[:, None, None]
    return (x - means) * factor + means


def _brightness(x, amount, scale, draw):
    if len(x) == 1:
        return x + amount
    bright = np.empty_like(x)
    for place in np.ndindex(x.shape[1:]):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[(slice(None), *place)])
        bright[(slice(None), *place)] = colorsys.hsv_to_rgb(hue, saturation, min(1, value + amount))
    return bright


def _elastic_transform(x, constants, scale, draw):
    _, height, width = x.shape
    distance, sigma, jitter = (constant * min(height, width) for constant in constants)
    centre, reach = np.array([width // 2, height // 2]), max(1, min(height, width) // 3)
    points = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = points + (draw(3, 2) * 2 - 1) * jitter
    forward = np.vstack([np.linalg.solve(np.c_[points, np.ones(3)], moved).T, [0, 0, 1]])
    back = np.linalg.inv(forward)  # of (column, row, 1); SciPy wants (row, column)
    matrix, offset = back[1::-1, 1::-1], back[1::-1, 2]
    x = [ndimage.affine_transform(channel, matrix, offset, order=1, mode="mirror") for channel in x]
    noise = draw(2, height, width) * 2 - 1
    dy, dx = (ndimage.gaussian_filter(field, sigma, mode="reflect", truncate=3) * distance for field in noise)
    rows, columns = np.mgrid[:height, :width]
    return np.stack([ndimage.map_coordinates(c, [rows + dy, columns + dx], order=1, mode="reflect") for c in x])


_RULES = {
    "brightness": _brightness,
    "contrast": _contrast,
    "defocus_blur": _defocus_blur,
    "elastic_transform": _elastic_transform,
    "fog": _fog,
    "gaussian_blur": _gaussian_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
}


def _reference_distribution(level, name, severity):
    """Return the probabilities of the 256 levels that noise turns one into."""
    constant = CONSTANTS[name][severity - 1]
    shares = np.zeros(256)
    if name == "impulse_noise":
        shares[level] = 1 - constant
        shares[[0, 255]] += constant / 2
    elif name == "shot_noise":
        counts = np.arange(2000)
        results = np.round(np.minimum(counts / constant, 1) * 255).astype(int)
        np.add.at(shares, results, stats.poisson.pmf(counts, level / 255 * constant))
    else:
        below = stats.norm.cdf(np.arange(255) + 0.5, loc=level, scale=constant * 255)
        shares = np.diff(below, prepend=0, append=1)
    return shares
