"""Draw one street scene and its labels from a seed.

A scene is a street in perspective, placed in metres and painted from far to near. It shows what makes real labels hard:
thin poles, small distant objects, see-through fences, occlusion, ignored regions, rare classes and changing light.
"""

import cv2
import numpy as np

# The train ids of Cityscapes.
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN = range(10)
SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(10, 19)
IGNORE = 255
# Strength of the surface noise of each class, in grey levels.
_TEXTURE = np.full(256, 6, np.float32)
_TEXTURE[[ROAD, SIDEWALK, BUILDING, WALL, VEGETATION, TERRAIN]] = 9, 12, 12, 14, 26, 22

# Colours are BGR.
_DARK, _GLASS, _GREY, _WHITE = (34, 32, 32), (80, 66, 52), (125, 125, 122), (225, 225, 225)
_RED, _BLUE, _YELLOW, _SKIN, _BARK = (40, 35, 190), (200, 110, 30), (45, 170, 225), (120, 155, 200), (52, 66, 82)
_GREENS = _FOREST, _OLIVE, _MOSS = (35, 80, 50), (45, 100, 75), (60, 125, 100)
_STONES = (150, 185, 205), (80, 95, 150), (150, 150, 152), (170, 200, 222), (205, 208, 210), (125, 125, 180)
_PAINTS = _WHITE, (170, 168, 165), (95, 92, 90), (38, 36, 36), (40, 40, 165), (150, 80, 35), (70, 95, 50)
_CLOTHES = (120, 70, 40), (45, 45, 150), (200, 200, 205), (70, 110, 60), (40, 140, 200), (140, 90, 130)

# Parts of a thing: outline; left, low, right and high in units of the thing's width (0 is its middle) and height; a
# colour, None for the thing's own; the class, where it is not the thing's own.
_BOX = np.array([(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
_DISC = np.array([(0.5 + x / 2, 0.5 + y / 2) for x, y in cv2.ellipse2Poly((0, 0), (999, 999), 0, 0, 360, 15) / 999])
_ENDS = [(_BOX, -0.48, 0, -0.3, 0.18, _DARK), (_BOX, 0.3, 0, 0.48, 0.18, _DARK)]
_ENDS += [(_BOX, -0.47, 0.3, -0.34, 0.38, _RED), (_BOX, 0.34, 0.3, 0.47, 0.38, _RED)]
_CAR = [(_BOX, -0.5, 0.12, 0.5, 0.6, None), (_BOX, -0.46, 0.6, 0.46, 1, None), (_BOX, -0.46, 0.64, 0.46, 0.92, _GLASS)]
_LARGE = [(_BOX, -0.5, 0.1, 0.5, 1, None), (_BOX, -0.5, 0.1, 0.5, 0.2, _DARK), *_ENDS]
_COACH = [*_LARGE, (_BOX, -0.5, 0.45, 0.5, 0.8, _GLASS)]
_CYCLE = [(_DISC, -0.5, 0, -0.05, 0.4, _DARK, BICYCLE), (_DISC, 0.05, 0, 0.5, 0.4, _DARK, BICYCLE)]
_CYCLE += [(_BOX, -0.3, 0.25, 0.3, 0.32, _RED, BICYCLE), (_BOX, 0.2, 0.2, 0.28, 0.6, _DARK, BICYCLE)]
_MOTOR = [(_DISC, -0.5, 0, -0.1, 0.6, _DARK), (_DISC, 0.1, 0, 0.5, 0.6, _DARK), (_BOX, -0.35, 0.3, 0.3, 0.9, None)]
_LEGS = [(_BOX, -0.3, 0, -0.05, 0.5, _DARK), (_BOX, 0.05, 0, 0.3, 0.5, _DARK)]
_PERSON = [*_LEGS, (_BOX, -0.45, 0.45, 0.45, 0.85, None), (_DISC, -0.25, 0.84, 0.25, 1, _SKIN)]
_RIDER = [*_CYCLE, (_BOX, -0.2, 0.2, 0.2, 0.86, None), (_DISC, -0.1, 0.84, 0.15, 1, _SKIN)]
_LAMP = [(_BOX, -0.05, 0, 0.05, 1, None), (_BOX, -0.5, 0.98, 0.5, 1, None)]
_STEM = (_BOX, -0.11, 0, 0.11, 1, _GREY, POLE)
_SIGN = [_STEM, (_DISC, -0.5, 0.72, 0.5, 1, None), (_DISC, -0.3, 0.78, 0.3, 0.94, _WHITE)]
_LIGHT = [_STEM, (_BOX, -0.5, 0.7, 0.5, 1, None), (_DISC, -0.3, 0.9, 0.3, 0.98, _RED)]
_TREE = [(_BOX, -0.04, 0, 0.04, 0.5, _BARK), (_DISC, -0.2, 0.3, 0.5, 0.8, _FOREST), (_DISC, -0.5, 0.35, 0.4, 0.9, None)]
_TREE += [(_DISC, -0.3, 0.5, 0.35, 1, _OLIVE), (_DISC, -0.45, 0.6, 0, 0.85, _MOSS)]

# What stands in the street: class, mean number on each side, least and greatest distance from the kerb (negative on the
# road), width, height and length in metres, colours, parts. A part as wide as the thing is also as long.
_THINGS = [
    (CAR, 3, -3.8, -1.1, 1.8, 1.5, 4.2, _PAINTS, [*_CAR, *_ENDS]),
    (TRUCK, 0.3, -3.4, -1.4, 2.4, 3.1, 8, (_GREY, _BLUE, _OLIVE), _LARGE),
    (BUS, 0.2, -3.4, -1.4, 2.5, 3, 11, (_YELLOW, _RED), _COACH),
    (TRAIN, 0.07, -3.6, -2.5, 2.5, 3.4, 26, (_MOSS, _WHITE), _COACH),
    (PERSON, 5, 0.4, 3, 0.5, 1.7, 0, _CLOTHES, _PERSON),
    (RIDER, 0.5, -2.5, -0.6, 1.4, 1.7, 0, _CLOTHES, _RIDER),
    (BICYCLE, 0.5, 0.4, 1.5, 1.5, 1.6, 0, _CLOTHES, _CYCLE),
    (MOTORCYCLE, 0.3, -0.8, 1.5, 1.7, 1.1, 0, _CLOTHES, _MOTOR),
    (POLE, 5, 0.4, 0.9, 1.6, 7.5, 0, (_GREY, _DARK), _LAMP),
    (SIGN, 1.5, 0.4, 0.9, 0.7, 2.7, 0, (_RED, _BLUE), _SIGN),
    (LIGHT, 1, 0.4, 0.9, 0.45, 3.6, 0, (_DARK,), _LIGHT),
    (VEGETATION, 4, 0.8, 5, 5, 7, 0, _GREENS, _TREE),
    (IGNORE, 0.4, 0.5, 2.5, 1.2, 1, 0.8, _PAINTS, [(_BOX, -0.5, 0, 0.5, 1, None)]),
]
# What lines the street: class, share of the plots, least and greatest height in metres; the windows, joints or bars:
# distance along and up, size along and up in metres, colour (None for the wall's own); colours.
_FRONTS = [
    (BUILDING, 0.66, 6, 20, (3, 3.2), (1.6, 1.7), _GLASS, _STONES),
    (WALL, 0.1, 1.2, 2.8, (2.5, 9), (0.1, 9), _GREY, _STONES),
    (FENCE, 0.12, 1, 1.9, (0.6, 0.6), (0.14, 0.5), None, _PAINTS),
    (VEGETATION, 0.12, 0.8, 4, (4, 9), (0.3, 9), _FOREST, _GREENS),
]


class _Canvas:
    """The camera, the haze, and the image and label, which are painted at twice their size.

    Points are (x to the right, y up from the ground, z ahead) in metres; the camera stands at x = z = 0.
    """

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.focal, self.eye = width * rng.uniform(0.7, 0.95), rng.uniform(1.25, 1.7)
        self.centre = width * rng.uniform(0.38, 0.62), height * rng.uniform(0.4, 0.52)
        self.haze, self.haze_depth = np.array((225, 215, 205)) * rng.uniform(0.85, 1), rng.uniform(150, 700)
        self.image, self.label = np.zeros((height, width, 3), np.uint8), np.full((height, width), SKY, np.uint8)

    def fill(self, corners, u, v, cls: int | None, colour, outline: np.ndarray = _BOX) -> None:
        """Fill parallelograms with these corners, (3,) or (n, 3), and sides u and v, or the discs in them.

        ``cls`` None leaves the label unchanged, ``colour`` None the image. Distant things are hazier.
        """
        points = np.atleast_2d(corners)[:, None] + outline @ np.array((u, v))
        z, haze = points[..., 2:], points[..., 2].min() / (points[..., 2].min() + self.haze_depth)
        pixels = (points[..., :2] - (0, self.eye)) * (self.focal, -self.focal) / z + self.centre
        polygons = list(np.rint(pixels * 8).astype(np.int32))
        if colour is not None:
            seen = np.multiply(colour, 1 - haze) + self.haze * haze
            cv2.fillPoly(self.image, polygons, seen.tolist(), cv2.LINE_8, 3)
        if cls is not None:
            cv2.fillPoly(self.label, polygons, cls, cv2.LINE_8, 3)

    def front(self, corner, along, cls: int, size, cell, mark, paint, colour) -> None:
        """Paint a face of ``size`` (length, height) from a corner in the direction ``along``, with marks on it."""
        axes, mark = np.array((along, (0, 1, 0))), np.minimum(mark, size)
        self.fill(corner, *axes * size[:, None], cls, None if cls == FENCE else colour)  # one can see through a fence
        counts = np.maximum(size // cell, 1).astype(int)
        places = np.stack(np.meshgrid(*map(np.arange, counts)), -1).reshape(-1, 2) * (size / counts)
        places += (size / counts - mark) / 2
        self.fill(corner + places @ axes, *axes * mark[:, None], cls, paint or colour)

    def thing(self, x: float, z: float, cls: int, size, length: float, parts, colour) -> None:
        """Paint a thing that faces the camera, and its flank towards the middle of the street."""
        if length:  # the shadow below it
            self.fill((x - size[0] / 2, 0, z), (size[0], 0, 0), (0, 0, length), None, _DARK)
        for outline, left, low, right, high, paint, *own in parts:
            # Two pixels at least, or the label of a far pole would fall between its samples.
            width, up = max((right - left) * size[0], z / self.focal), (0, (high - low) * size[1], 0)
            corner, paint, own = np.array((x + left * size[0], low * size[1], z)), paint or colour, (*own, cls)[0]
            if length and right - left > 0.8:
                flank = corner + np.array((width if x < 0 else 0, 0, 0))
                self.fill(flank, (0, 0, length), up, own, np.multiply(paint, 0.75))
            self.fill(corner, (width, 0, 0), up, own, paint, outline)


def _paint(rng: np.random.Generator, canvas: _Canvas) -> None:
    """Paint sky and ground, then what stands on it from far to near."""

    def pick(colours) -> list[int]:
        return (np.array(colours[rng.integers(len(colours))]) + rng.integers(-12, 13) + rng.integers(-5, 6, 3)).tolist()

    def ground(x: float, width: float, cls: int | None, colour, z: float = 0.7, length: float = 160) -> None:
        canvas.fill((x, 0, z), (width, 0, 0), (0, 0, length), cls, colour)

    height, width = canvas.label.shape
    rows = np.linspace(0, 1, height)[:, None, None]
    canvas.image[:] = np.array(pick([(215, 165, 110), (190, 185, 178)])) * (1 - rows) + canvas.haze * rows
    left, right, grey = -rng.uniform(5.5, 8.5), rng.uniform(3.4, 5.5), rng.integers(80, 120)
    ground(-500, 1000, TERRAIN, pick(_GREENS))
    ground(left, right - left, ROAD, pick([[grey] * 3]))
    for z in np.arange(rng.uniform(2, 6), 70, 7):
        ground((left + right) / 2, 0.15, None, _WHITE, z, 3.5)
    things = []
    for side, kerb in ((-1, left), (1, right)):
        edge = kerb + side * rng.uniform(2, 5)
        ground(kerb, edge - kerb, SIDEWALK, pick([[grey + rng.integers(25, 60)] * 3]))
        if rng.random() < 0.4:
            ground(kerb, side * rng.uniform(0.8, 1.6), TERRAIN, pick(_GREENS))
        z = rng.uniform(3, 8)
        while z < 140:
            cls, _, *heights, cell, mark, paint, colours = _FRONTS[rng.choice(4, p=[front[1] for front in _FRONTS])]
            length, tall, colour = rng.uniform(8, 24), rng.uniform(*heights), pick(colours)
            faces = [((side, 0, 0), 14), ((0, 0, 1), length)]
            for along, wide in faces if cls == BUILDING else faces[1:]:
                shaded = (np.array(colour) * rng.uniform(0.8, 1)).tolist()
                # What stands between the kerbs beside a plot is in front of it, so the plot's far end counts.
                face = (edge, 0, z), along, cls, np.array((wide, tall)), cell, mark, paint, shaded
                things.append((z + length, canvas.front, face))
            z += length
        for cls, mean, least, most, *size, length, colours, parts in _THINGS:
            for slot in rng.permutation(16)[: rng.poisson(mean)]:
                x, z = kerb + side * rng.uniform(least, most), 9 + 6.5 * slot + rng.uniform(0, 2)
                scaled = np.array(size) * rng.uniform(0.85, 1.15)
                things.append((z, canvas.thing, (x, z, cls, scaled, length, parts, pick(colours))))
    # The sort is stable: things at one depth keep the order of placing.
    for _, paint, arguments in sorted(things, key=lambda thing: -thing[0]):
        paint(*arguments)
    # The bonnet of the camera's car and the border of the image have no class.
    bonnet = (width // 2, height), (width, int(height * rng.uniform(0, 0.1))), 0, 0, 360
    cv2.ellipse(canvas.image, *bonnet, pick(_PAINTS), -1)
    cv2.ellipse(canvas.label, *bonnet, IGNORE, -1)
    cv2.rectangle(canvas.label, (0, 0), (width - 1, height - 1), IGNORE, 4)


def draw_scene(seed: int, size: tuple[int, int] = (256, 512)) -> tuple[np.ndarray, np.ndarray]:
    """Draw one street scene.

    Args:
        seed: Non-negative number of the scene; the same seed gives the same bytes (with the same versions of NumPy
            and OpenCV).
        size: (height, width) in pixels, at least 64 each.

    Returns:
        The image (H, W, 3) uint8 in BGR, and the label (H, W) uint8 with Cityscapes train ids 0..18, or 255 where
        the pixel has no class.

    Raises:
        ValueError: If the seed is negative or the size too small.
    """
    if seed < 0 or len(size) != 2 or min(size) < 64:
        raise ValueError(f'need a seed >= 0 and a (height, width) of at least 64, got seed {seed} and size {size}')
    rng, (height, width) = np.random.default_rng(seed), map(int, size)
    canvas = _Canvas(rng, 2 * height, 2 * width)
    _paint(rng, canvas)
    # The image is averaged down, the label subsampled.
    image = cv2.resize(canvas.image, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    label = np.ascontiguousarray(canvas.label[::2, ::2])
    # Noise of single pixels and of patches. Bilinear, since bicubic differs between processors.
    fine, coarse = (rng.integers(0, 256, (height // step, width // step), np.uint8) for step in (1, 6))
    coarse = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    image += ((fine.astype(np.float32) + coarse - 255) / 180 * _TEXTURE[label])[..., None]
    image *= (rng.uniform(0.6, 1.2) * rng.uniform(0.95, 1.05, 3)).astype(np.float32)
    image += rng.integers(-5, 6, image.shape, np.int16)
    return np.clip(image, 0, 255).astype(np.uint8), label
