"""Drawing of one street scene with its labels, from a seed alone.

A scene is a street in perspective, placed in metres and painted back to front, with the awkward things of real labels:
thin poles, tiny distant cars and people, see-through fences, ignore regions, strong class imbalance, occlusion and
changing light.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

IGNORE = 255

# The train ids of Cityscapes.
ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN = range(10)
SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(10, 19)

# Scenes are drawn at twice their size: the image is then averaged down (anti-aliased), the label only subsampled.
_SCALE = 2
_FAR = 150.0
# Strength of the surface noise for each class, in grey levels.
_ROUGHNESS = np.full(256, 6, np.float32)
_ROUGHNESS[[ROAD, SIDEWALK, BUILDING, WALL, VEGETATION, TERRAIN, SKY]] = 9, 12, 12, 14, 26, 22, 3

# Colours are BGR.
_GLASS = (70, 58, 48)
_DARK = (34, 32, 32)
_FACADES = [(150, 185, 205), (80, 95, 150), (150, 150, 152), (170, 200, 222), (110, 160, 200), (205, 208, 210)]
_FACADES += [(85, 105, 130), (160, 145, 130), (125, 125, 180)]
_PAINTS = [(225, 225, 225), (170, 168, 165), (95, 92, 90), (38, 36, 36), (40, 40, 165), (150, 80, 35), (70, 95, 50)]
_CLOTHES = [(40, 35, 35), (120, 70, 40), (45, 45, 150), (200, 200, 205), (70, 110, 60), (40, 140, 200), (140, 90, 130)]
_SKIN = [(140, 170, 215), (90, 125, 175), (60, 80, 115)]
_GREENS = [(55, 110, 75), (45, 90, 60), (60, 125, 105), (50, 100, 50)]
_SIGNS = [((235, 235, 240), (40, 35, 190)), ((200, 110, 30), (235, 235, 235)), ((40, 200, 235), (40, 40, 40))]


class _Scene:
    """The camera, the light, and the double-size image and label of one scene while it is painted.

    World points are (x to the right, y up from the ground, z ahead) in metres; the camera stands at x = z = 0.
    In all methods, ``cls`` None paints the image only and ``colour`` None the label only.
    """

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng = rng
        self.height, self.width = size[0] * _SCALE, size[1] * _SCALE
        self.image = np.zeros((self.height, self.width, 3), np.uint8)
        self.label = np.full((self.height, self.width), IGNORE, np.uint8)
        self.shadow = np.zeros((self.height, self.width), np.uint8)
        self.focal = self.width * rng.uniform(0.7, 0.95)
        self.eye = rng.uniform(1.25, 1.7)
        self.vanishing = self.width * rng.uniform(0.38, 0.62)
        self.horizon = self.height * rng.uniform(0.40, 0.52)
        self.bend = rng.uniform(-5e-4, 5e-4)
        self.sun = int(rng.choice([-1, 1]))
        self.sunny = rng.random() < 0.55
        self.haze = (225.0, 215.0, 205.0) if self.sunny else (205.0, 203.0, 200.0)
        self.haze_depth = rng.uniform(150, 700)
        # Side -1 is left of the camera, 1 is right: where the road ends, and where the sidewalk ends.
        self.kerb = {-1: -rng.uniform(5.5, 8.5), 1: rng.uniform(3.4, 5.5)}
        self.edge = {side: self.kerb[side] + side * rng.uniform(2.0, 5.0) for side in (-1, 1)}
        start = rng.uniform(14, 60)
        self.crossing = (start, start + rng.uniform(8, 13)) if rng.random() < 0.5 else None

    def pick(self, colours: Sequence[tuple[int, int, int]], jitter: int = 12) -> np.ndarray:
        """One of the colours, a little changed: mostly in brightness, less in hue."""
        change = self.rng.integers(-jitter, jitter + 1, 4)
        return np.array(colours[self.rng.integers(len(colours))]) + change[0] + change[1:] * 0.5

    def project(self, points) -> np.ndarray:
        """World points (..., 3) to canvas pixels (..., 2)."""
        points = np.asarray(points, np.float64)
        x, y, z = points[..., 0], points[..., 1], points[..., 2]
        pixels = np.empty((*points.shape[:-1], 2))
        pixels[..., 0] = self.vanishing + self.focal * (x / z + self.bend * z)
        pixels[..., 1] = self.horizon + self.focal * (self.eye - y) / z
        return pixels

    def tone(self, colour, z: float) -> tuple[int, ...]:
        """The colour as seen through z metres of haze."""
        haze = z / (z + self.haze_depth)
        mixed = (float(c) * (1 - haze) + h * haze for c, h in zip(colour, self.haze, strict=True))
        return tuple(min(max(int(c), 0), 255) for c in mixed)

    def fill(self, polygons, cls: int | None, colour, z: float = 0.0) -> None:
        """Fill polygons given in canvas pixels, an array (n, corners, 2) or a list of (corners, 2)."""
        if isinstance(polygons, np.ndarray):
            points = list(np.rint(polygons * 8).astype(np.int32))
        else:
            points = [np.rint(np.asarray(polygon) * 8).astype(np.int32) for polygon in polygons]
        if colour is not None:
            cv2.fillPoly(self.image, points, self.tone(colour, z), cv2.LINE_8, 3)
        if cls is not None:
            cv2.fillPoly(self.label, points, cls, cv2.LINE_8, 3)

    def polygons(self, points, cls: int | None, colour) -> None:
        """Fill world polygons (n, corners, 3) with one colour."""
        points = np.asarray(points, np.float64)
        self.fill(self.project(points), cls, colour, float(points[..., 2].mean()))

    def polygon(self, points, cls: int | None, colour) -> None:
        """Fill one world polygon (corners, 3)."""
        self.polygons([points], cls, colour)

    def solid(self, points, cls: int | None, colour) -> None:
        """Fill the outline of the convex body spanned by world points (n, 3)."""
        points = np.asarray(points, np.float64)
        outline = cv2.convexHull(self.project(points).astype(np.float32))[:, 0]
        self.fill([outline], cls, colour, float(points[:, 2].min()))

    def upright(self, x: float, z: float, outline, cls: int | None, colour) -> None:
        """Fill a flat shape that faces the camera: (sideways, up) corners in metres around (x, 0, z)."""
        self.polygon([(x + across, up, z) for across, up in outline], cls, colour)

    def disc(self, x, y, z, radius, cls: int | None, colour, squash: float = 1.0, line: float = 0.0) -> None:
        """Paint a disc that faces the camera, or a ring ``line`` metres wide; ``squash`` narrows it sideways."""
        metre = self.focal / z * 8
        right = (self.vanishing + self.focal * self.bend * z) * 8 + metre * x
        centre = round(float(right)), round(float(self.horizon * 8 + metre * (self.eye - y)))
        size = radius * metre
        axes = (max(int(size * squash), 4), max(int(size), 4))
        thickness = max(1, int(line * metre / 8)) if line else -1
        if colour is not None:
            cv2.ellipse(self.image, centre, axes, 0, 0, 360, self.tone(colour, z), thickness, cv2.LINE_8, 3)
        if cls is not None:
            cv2.ellipse(self.label, centre, axes, 0, 0, 360, cls, thickness, cv2.LINE_8, 3)

    def strokes(self, x: float, z: float, lines, width: float, cls: int | None, colour) -> None:
        """Draw lines of (sideways, up) points in metres around (x, 0, z)."""
        thickness = max(1, round(width * self.focal / z))
        for line in lines:
            points = self.project([(x + across, up, z) for across, up in line])
            points = np.round(points * 8).astype(np.int32)
            if colour is not None:
                cv2.polylines(self.image, [points], False, self.tone(colour, z), thickness, cv2.LINE_8, 3)
            if cls is not None:
                cv2.polylines(self.label, [points], False, cls, thickness, cv2.LINE_8, 3)

    def strip(self, x0: float, x1: float, cls: int | None, colour, z0: float = 2.0, z1: float = _FAR) -> None:
        """Paint a strip of ground between x0 and x1 that follows the bend of the street."""
        z = 1 / np.linspace(1 / z0, 1 / z1, 14)
        ground = np.zeros_like(z)
        left, right = (np.stack((np.full_like(z, x), ground, z), axis=-1) for x in (x0, x1))
        # The haze is that of the near part: most of the pixels are there.
        self.fill([self.project(np.concatenate((left, right[::-1])))], cls, colour, 2 * z0)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Surface noise, shadows, light and camera: the image and label at their final size."""
        rng = self.rng
        height, width = self.height // _SCALE, self.width // _SCALE
        image = cv2.resize(self.image, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
        label = np.ascontiguousarray(self.label[::_SCALE, ::_SCALE])

        fine = rng.integers(-128, 128, (height, width), np.int8).astype(np.float32) / 128
        coarse = rng.integers(0, 256, (height // 6 + 1, width // 6 + 1), np.uint8)
        coarse = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR_EXACT).astype(np.float32) / 128 - 1
        image += ((0.7 * fine + 0.6 * coarse) * _ROUGHNESS[label])[..., None]

        ground = (label == ROAD) | (label == SIDEWALK) | (label == TERRAIN)
        shadow = cv2.resize(self.shadow, (width, height), interpolation=cv2.INTER_AREA) * ground
        image *= (1 - shadow.astype(np.float32) * np.float32(rng.uniform(0.35, 0.55) / 255))[..., None]

        gain = rng.uniform(0.9, 1.2) if self.sunny else rng.uniform(0.6, 1.05)
        image *= (gain * rng.uniform(0.95, 1.05, 3)).astype(np.float32)
        across = np.linspace(-1, 1, width, dtype=np.float32) ** 2
        down = np.linspace(-1, 1, height, dtype=np.float32)[:, None] ** 2
        image *= (1 - np.float32(rng.uniform(0, 0.15)) * (across + down))[..., None]
        image = np.clip(image, 0, 255).astype(np.uint8)

        if rng.random() < 0.5:
            image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.4, 0.9))
        strength = int(rng.integers(2, 9))
        noise = rng.integers(-strength, strength + 1, image.shape, np.int16)
        return np.clip(image + noise, 0, 255).astype(np.uint8), label


def _oblong(left: float, right: float, low: float, high: float) -> list[tuple[float, float]]:
    """The outline of an axis-parallel rectangle."""
    return [(left, low), (right, low), (right, high), (left, high)]


def _sky(scene: _Scene) -> None:
    """Sky with clouds, a distant skyline, and open ground up to the horizon."""
    rng, horizon = scene.rng, int(scene.horizon) + 2
    zenith = np.array((215, 165, 110)) if scene.sunny else np.array((190, 185, 178))
    zenith = zenith + rng.integers(-18, 19, 3)
    rows = np.linspace(0, 1, 32)[:, None, None]
    gradient = zenith * (1 - rows) + np.array(scene.haze) * rows
    # Bilinear and smoothed, since bicubic differs between processors.
    clouds = cv2.resize(rng.integers(0, 256, (5, 9), np.uint8), (64, 32), interpolation=cv2.INTER_LINEAR_EXACT)
    clouds = cv2.GaussianBlur(clouds, (9, 9), 2.0)
    clouds = np.clip((clouds.astype(np.float64) - rng.uniform(80, 200)) / 120, 0, 0.8)[..., None]
    sky = np.clip(gradient * (1 - clouds) + 240 * clouds, 0, 255).astype(np.uint8)
    scene.image[:horizon] = cv2.resize(sky, (scene.width, horizon), interpolation=cv2.INTER_LINEAR_EXACT)
    scene.label[:horizon] = SKY
    scene.image[horizon:] = scene.pick([(75, 125, 110), (60, 120, 85), (105, 130, 145)])
    scene.label[horizon:] = TERRAIN

    left = 0.0
    while left < scene.width:
        right = left + rng.uniform(0.02, 0.09) * scene.width
        top = scene.horizon - rng.uniform(0.01, 0.07) * scene.height
        if rng.random() < 0.6:
            scene.fill([_oblong(left, right, top, horizon + 2)], BUILDING, scene.pick(_FACADES) * 0.8, _FAR)
        else:
            t = np.linspace(0, 1, 9)
            bumps = top + (scene.horizon - top) * (4 * (t - 0.5) ** 2) * rng.uniform(0.5, 1, 9)
            crown = np.stack((left + t * (right - left), bumps), axis=-1)
            scene.fill([[(left, horizon + 2), *crown, (right, horizon + 2)]], VEGETATION, scene.pick(_GREENS), _FAR)
        left = right


def _ground(scene: _Scene) -> None:
    """Road with marks, sidewalks, grass strips, unlabelled parking bays and the crossing street."""
    rng, kerb, edge = scene.rng, scene.kerb, scene.edge
    asphalt = scene.pick([(98, 95, 94), (118, 114, 112), (84, 82, 82)], 6)
    paving = asphalt + rng.integers(25, 60) + np.array((-4, 2, 6))
    mark = np.array((225, 228, 228)) - rng.integers(0, 40)
    for side in (-1, 1):
        scene.strip(kerb[side], edge[side], SIDEWALK, paving)
        for fraction in (0.33, 0.66):
            joint = kerb[side] + fraction * (edge[side] - kerb[side])
            scene.strip(joint, joint + 0.04, None, paving * 0.85, z1=40)
        if rng.random() < 0.35:
            width = side * rng.uniform(0.8, 1.6)
            scene.strip(kerb[side], kerb[side] + width, TERRAIN, scene.pick([(70, 130, 100), (60, 115, 85)]))
    scene.strip(kerb[-1], kerb[1], ROAD, asphalt)
    for side in (-1, 1):
        scene.strip(kerb[side], kerb[side] + side * 0.18, SIDEWALK, paving + 22)
        if rng.random() < 0.18:
            z, bay = rng.uniform(6, 30), asphalt + np.array((-8, 6, 22))
            scene.strip(kerb[side] - side * 2.2, kerb[side], IGNORE, bay, z, z + rng.uniform(6, 25))
    for _ in range(rng.integers(0, 5)):
        x, z = rng.uniform(kerb[-1], kerb[1] - 2), rng.uniform(5, 25)
        scene.strip(x, x + rng.uniform(0.5, 2), None, asphalt + rng.integers(-16, 12), z, z + rng.uniform(0.5, 6))

    centre = (kerb[-1] + kerb[1]) / 2 + rng.uniform(-0.6, 0.6)
    if rng.random() < 0.25:
        scene.strip(centre - 0.07, centre + 0.07, None, mark)
    elif rng.random() < 0.85:
        for z in np.arange(rng.uniform(2, 6), 70, 7.0):
            scene.strip(centre - 0.07, centre + 0.07, None, mark, z, z + 3.5)
    if scene.crossing:
        z0, z1 = scene.crossing
        scene.polygon([(x, 0, z) for x, z in _oblong(-70, 70, z0, z1)], ROAD, asphalt)
        for left in np.arange(kerb[-1] + 0.4, kerb[1] - 0.5, 1.0):
            scene.polygon([(x, 0, z) for x, z in _oblong(left, left + 0.5, z0 - 3.5, z0 - 0.5)], None, mark)


def _facade(scene: _Scene, corner, along, length: float, height: float, colour, lit: float) -> None:
    """One face of a building: ``length`` metres from the ground point ``corner`` in the direction ``along``."""
    rng, corner, along = scene.rng, np.asarray(corner, float), np.asarray(along, float)
    up = np.array((0.0, 1.0, 0.0))

    def rectangles(a, b, width, tall):
        spots = corner + np.asarray(a).reshape(-1, 1, 1) * along + np.asarray(b).reshape(1, -1, 1) * up
        return spots.reshape(-1, 1, 3) + np.stack([a * along + b * up for a, b in _oblong(0, width, 0, tall)])

    scene.polygons(rectangles(0, 0, length, height), BUILDING, colour * lit)
    scene.polygons(rectangles(0, height - 0.45, length, 0.45), None, colour * lit * 1.12)
    if corner[2] > 110:
        return
    floor, bay = rng.uniform(2.9, 3.6), rng.uniform(2.0, 3.4)
    width, tall = bay * rng.uniform(0.4, 0.7), floor * rng.uniform(0.45, 0.62)
    columns = np.arange(0.5, length - width - 0.3, bay)
    rows = np.arange(floor + 0.9, height - tall - 0.6, floor)
    if len(columns) and len(rows):
        scene.polygons(rectangles(columns - 0.12, rows - 0.15, width + 0.24, tall + 0.27), None, colour * lit * 1.15)
        glass = scene.pick([_GLASS, (105, 92, 80), (150, 138, 122)], 10)
        scene.polygons(rectangles(columns, rows, width, tall), None, glass * (0.5 + 0.5 * lit))
    if len(columns):
        shop = rng.random() < 0.5
        if shop:
            scene.polygons(rectangles(0, floor - 0.3, length, 0.7), None, scene.pick(_PAINTS, 40) * lit)
        scene.polygons(rectangles(columns, 0.5 if shop else 1.0, bay * 0.8 if shop else width, 1.7), None, _GLASS)


def _building(scene: _Scene, side: int, z0: float, z1: float, setback: float = 0.0) -> None:
    rng = scene.rng
    x, height, colour = scene.edge[side] + side * setback, rng.uniform(6, 20), scene.pick(_FACADES, 20)
    lit = (1.08, 0.62) if scene.sunny else (0.92, 0.8)
    street_lit, front_lit = lit if side != scene.sun else lit[::-1]
    if rng.random() < 0.5:
        roof = scene.pick([(60, 70, 125), (75, 75, 80), (60, 80, 110)]) * street_lit
        ridge = x + side * 3.5
        outline = [(x, height, z0), (x, height, z1), (ridge, height + 3.5, z1), (ridge, height + 3.5, z0)]
        scene.polygon(outline, BUILDING, roof)
        scene.polygon([(x, height, z0), (ridge, height + 3.5, z0), (x + side * 7, height, z0)], BUILDING, colour * 0.8)
    _facade(scene, (x, 0, z0), (side, 0, 0), 14.0, height, colour, front_lit)
    _facade(scene, (x, 0, z0), (0, 0, 1), z1 - z0, height, colour, street_lit)


def _foliage(scene: _Scene, x: float, y: float, z: float, radius: float, colour) -> None:
    """A crown or bush of many discs, darker below and lighter above."""
    rng = scene.rng
    count = int(np.clip(radius * scene.focal / z / 3, 6, 42))
    scene.disc(x, y, z, radius * 0.72, VEGETATION, colour * 0.72)
    offsets, sizes = rng.uniform(-0.75, 0.75, (count, 2)) * radius, rng.uniform(0.16, 0.4, count) * radius
    for (across, up), size in sorted(zip(offsets.tolist(), sizes.tolist(), strict=True), key=lambda item: item[0][1]):
        if across**2 + up**2 < 0.7 * radius**2:
            light = 0.85 + 0.4 * up / radius + rng.uniform(-0.14, 0.14) + 0.12 * scene.sun * across / radius
            scene.disc(x + across, y + up, z, size, VEGETATION, colour * light)


def _tree(scene: _Scene, x: float, z: float) -> None:
    rng = scene.rng
    trunk, radius, width = rng.uniform(2.2, 4), rng.uniform(1.3, 3), rng.uniform(0.1, 0.22)
    outline = [(-width, 0), (-width * 0.7, trunk + 0.6), (width * 0.7, trunk + 0.6), (width, 0)]
    scene.upright(x, z, outline, VEGETATION, scene.pick([(52, 66, 82), (60, 64, 70)]))
    colour = scene.pick(_GREENS)
    _foliage(scene, x, trunk + radius * 0.8, z, radius, colour)
    if rng.random() < 0.6:
        _foliage(scene, x + rng.uniform(-1, 1), trunk + radius * 1.5, z, radius * 0.75, colour * 1.05)


def _barrier(scene: _Scene, side: int, z0: float, z1: float, cls: int) -> None:
    """A wall or a see-through fence along the edge of the sidewalk; the label of a fence has no holes."""
    rng, x = scene.rng, scene.edge[side]

    def quad(low, high, near=z0, far=z1):
        return [(x, low, near), (x, low, far), (x, high, far), (x, high, near)]

    if cls == WALL:
        height, colour = rng.uniform(1.2, 2.8), scene.pick([(140, 146, 150), (105, 120, 140), (120, 118, 112)])
        scene.polygon(quad(0, height), WALL, colour)
        scene.polygon(quad(height - 0.18, height), None, colour * 1.2)
        scene.polygons([quad(0, height, z, z + 0.08) for z in np.arange(z0, z1, 2.5)], None, colour * 0.8)
    else:
        height = rng.uniform(1.0, 1.9)
        colour = scene.pick([(60, 62, 60), (90, 110, 130), (70, 90, 55), (190, 190, 190)])
        scene.polygon(quad(0, height), FENCE, None)
        bars = [quad(0.05, height, z, z + 0.09) for z in np.arange(z0, z1 - 0.1, max(0.35, z0 / 90))]
        scene.polygons([quad(0.1, 0.22), quad(height - 0.2, height - 0.06)], None, colour)
        scene.polygons(bars, None, colour)


def _zone(scene: _Scene, side: int, z0: float, z1: float) -> None:
    """What stands beside the sidewalk between z0 and z1: a building, a park, or something behind a wall or fence."""
    rng = scene.rng
    kind = rng.choice(['building', 'park', 'wall', 'fence'], p=[0.64, 0.16, 0.1, 0.1])
    if kind == 'building':
        return _building(scene, side, z0, z1)
    if rng.random() < 0.35:
        _building(scene, side, z0 + 2, z1 - 1, setback=6.0)
    colour = scene.pick(_GREENS)
    for z in np.arange(z1 - 1, z0, -3.5):
        depth = side * rng.uniform(2, 9)
        if rng.random() < 0.55:
            _tree(scene, scene.edge[side] + depth, z)
        else:
            _foliage(scene, scene.edge[side] + depth, rng.uniform(0.2, 0.8), z, rng.uniform(0.8, 1.6), colour)
    if kind != 'park':
        _barrier(scene, side, z0, z1, WALL if kind == 'wall' else FENCE)


def _vehicle(scene: _Scene, cls: int, x: float, z: float, crossing: bool = False, oncoming: bool = False) -> None:
    """A car, truck, bus or tram at (x, z): its near end at z, or its side when it is ``crossing``."""
    rng = scene.rng
    width, height, length = {
        CAR: (1.8, rng.uniform(1.4, 1.7), rng.uniform(3.7, 4.7)),
        TRUCK: (2.4, rng.uniform(2.9, 3.6), rng.uniform(6, 9)),
        BUS: (2.5, 3.1, 11.0),
        TRAIN: (2.5, 3.5, 26.0),
    }[cls]
    half = width / 2

    def world(points):
        """(along, across, up) in the vehicle's own frame, along = 0 at its near (or left) end, to world points."""
        points = np.asarray(points, float)
        a, b, up = points[..., 0], points[..., 1], points[..., 2]
        return np.stack((x + a, up, z + half + b) if crossing else (x + b, up, z + a), axis=-1)

    def box(a0, a1, b, low, high, shrink=0.0, taper=1.0):
        lower = [(a, s * b, low) for a in (a0, a1) for s in (-1, 1)]
        upper = [(a, s * b * taper, high) for a in (a0 + shrink, a1 - shrink) for s in (-1, 1)]
        return world(lower + upper)

    def flank(a0, a1, low, high, b=half, lean=0.0):
        lower, upper = near * b, near * b * (1 - lean / 6)
        return world([(a0, lower, low), (a1, lower, low), (a1 - lean, upper, high), (a0 + lean, upper, high)])

    def end(b0, b1, low, high):
        return world([(0, b, up) for b, up in _oblong(b0, b1, low, high)])

    def lamps(low, high, colour):
        scene.polygons(
            [end(-half + 0.07, -half + 0.4, low, high), end(half - 0.4, half - 0.07, low, high)], None, colour
        )

    def wheels():
        radius = 0.33 if cls == CAR else 0.45
        octagon = np.array([(5, 2), (2, 5), (-2, 5), (-5, 2), (-5, -2), (-2, -5), (2, -5), (5, -2)]) * radius / 5.2
        for a in (0.19 * length, 0.8 * length):
            scene.polygon(world([(a + p, near * half, radius + q) for p, q in octagon]), cls, _DARK)
            scene.polygon(world([(a + p, near * half, radius + q) for p, q in octagon / 2]), None, (150, 150, 150))

    # The flank that can be seen is the one towards the middle of the picture.
    near = -1 if crossing or x > 0 else 1
    shade = 0.8 if near == scene.sun and scene.sunny else 0.95
    scene.polygon(world([(-0.2, -half, 0), (length, -half, 0), (length, half, 0), (-0.2, half, 0)]), None, (38, 37, 36))
    paints = {
        CAR: _PAINTS,
        TRUCK: [(215, 215, 210), (160, 110, 50), (60, 110, 190), (70, 90, 70)],
        BUS: [(45, 170, 225), (50, 50, 185), (215, 215, 215)],
        TRAIN: [(60, 150, 70), (60, 60, 200), (200, 170, 60)],
    }
    paint = scene.pick(paints[cls])
    lamp = (215, 235, 240) if oncoming else (40, 35, 185)

    if cls == CAR:
        waist = height * 0.58
        hood = 0.2 if oncoming else 0.05
        for b in (-half + 0.02, half - 0.25):
            scene.polygon(end(b, b + 0.23, 0, 0.35), cls, _DARK)
        scene.solid(box(0, length, half, 0.24, waist), cls, paint * shade * 0.85)
        cabin = (hood * length, 0.78 * length)
        scene.solid(box(*cabin, half * 0.95, waist, height, 0.55, 0.8), cls, paint * shade)
        window = flank(cabin[0] + 0.25, cabin[1] - 0.2, waist + 0.02, height - 0.1, half * 0.95, 0.5)
        scene.polygon(window, None, _GLASS)
        wheels()
        if not crossing:
            scene.polygon(end(-half, half, 0.24, waist), None, paint)
            rise = ((0, 0.85, waist), (0.5, 0.72, height - 0.1))
            glass = [(cabin[0] + a, s * half * b, up) for s in (-1, 1) for a, b, up in rise[::s]]
            scene.polygon(world(glass), None, np.array(_GLASS) * 0.9)
            scene.polygon(end(-half, half, 0.24, 0.4), None, paint * 0.6)
            lamps(0.58, 0.78, lamp)
            scene.polygon(end(-0.26, 0.26, 0.42, 0.54), None, (220, 220, 220))
        return

    scene.solid(box(0, length, half, 0.35, height), cls, paint * shade * 0.85)
    if cls == TRUCK:
        scene.polygon(flank(0, length, 0.35, 0.95), None, _DARK)
        scene.polygon(flank(length * 0.8, length, 0.9, 2.7), None, scene.pick(_PAINTS))
    else:
        panes = np.arange(0.4, length - 1.2, 1.7)
        scene.polygons([flank(a, a + 1.45, height * 0.45, height * 0.78) for a in panes], None, _GLASS)
        scene.polygon(flank(0, length, 0.35, 0.75), None, (205, 205, 205) if cls == TRAIN else paint * 0.5)
    wheels()
    if not crossing:
        scene.polygon(end(-half, half, 0.35, height), None, paint)
        scene.polygon(end(-half, half, 0.35, 0.7), None, (205, 205, 205) if cls == TRAIN else _DARK)
        if cls != TRUCK or oncoming:
            scene.polygon(end(-half * 0.85, half * 0.85, height * 0.45, height * 0.8), None, _GLASS)
        else:
            scene.polygon(end(-0.03, 0.03, 0.8, height - 0.1), None, paint * 0.6)
        lamps(0.75, 1.0, lamp)


def _person(scene: _Scene, x: float, z: float) -> None:
    rng = scene.rng
    tall = rng.uniform(1.5, 1.9) if rng.random() < 0.85 else rng.uniform(1.0, 1.3)
    stride, top, trousers = rng.uniform(0.02, 0.25), scene.pick(_CLOTHES, 25), scene.pick(_CLOTHES[:3], 20)

    def part(outline, colour):
        scene.upright(x, z, [(across * tall, up * tall) for across, up in outline], PERSON, colour)

    for foot, hip in ((-stride, 0.0), (stride, 0.1)):
        part([(foot - 0.04, 0), (foot + 0.06, 0), (hip + 0.005, 0.5), (hip - 0.09, 0.5)], trousers)
    part([(-0.1, 0.44), (0.1, 0.44), (0.13, 0.8), (0.05, 0.85), (-0.05, 0.85), (-0.13, 0.8)], top)
    swing = rng.uniform(-0.06, 0.1)
    for side in (-1, 1):
        hand = side * 0.17 + swing
        part([(side * 0.13, 0.8), (side * 0.09, 0.78), (hand - 0.02, 0.45), (hand + 0.03, 0.45)], top * 0.8)
    head = scene.pick(_SKIN)
    scene.disc(x, 0.92 * tall, z, 0.072 * tall, PERSON, head)
    scene.disc(x, 0.95 * tall, z, 0.066 * tall, PERSON, scene.pick([(30, 35, 45), (50, 70, 100), (110, 140, 160)]))


def _cycle(scene: _Scene, cls: int, x: float, z: float, ridden: bool) -> None:
    """A bicycle or motorcycle, turned by a random angle, with its rider if ``ridden``."""
    rng = scene.rng
    squash = rng.uniform(0.25, 1.0)
    heavy = cls == MOTORCYCLE
    radius, frame = 0.31 if heavy else 0.34, scene.pick(_PAINTS[3:], 30)
    facing = rng.choice([-1, 1]) * squash

    def turned(points):
        return [(facing * across, up) for across, up in points]

    for across in (-0.56, 0.56):
        centre = x + facing * across
        scene.disc(centre, radius, z, radius, cls, _DARK if heavy else None, max(squash, 0.2))
        scene.disc(centre, radius, z, radius * 0.92, None, (40, 40, 42), max(squash, 0.2), line=0.05)
    if heavy:
        body = [(-0.75, 0.75), (-0.4, 0.35), (0.25, 0.3), (0.5, 0.7), (0.42, 1.0), (0.1, 0.95), (-0.2, 0.8)]
        scene.upright(x, z, turned(body), cls, frame)
        scene.upright(x, z, [(-0.12, 0.5), (0.12, 0.5), (0.14, 0.95), (-0.14, 0.95)], cls, frame * 0.8)
    else:
        scene.upright(x, z, turned([(-0.56, 0.34), (0, 0.3), (0.4, 0.75), (-0.2, 0.8)]), cls, None)
        lines = [[(-0.56, 0.34), (-0.2, 0.75), (0.4, 0.72), (0.0, 0.3), (-0.56, 0.34)], [(0.56, 0.34), (0.4, 1.0)]]
        scene.strokes(x, z, [turned(line) for line in lines], 0.05, cls, frame)
        lines = [[(0.4, 1.0), (0.28, 1.02)], [(-0.32, 0.86), (-0.1, 0.86)]]
        scene.strokes(x, z, [turned(line) for line in lines], 0.06, cls, _DARK)
    if ridden:
        top = scene.pick(_CLOTHES, 25)
        leg = [(-0.25, 0.95), (0.0, 0.95), (0.28, 0.68), (0.1, 0.25), (-0.05, 0.25), (0.05, 0.62)]
        scene.upright(x, z, turned(leg), RIDER, scene.pick(_CLOTHES[:3]))
        chest = [(-0.3, 0.85), (0.02, 0.85), (0.3, 1.4), (0.08, 1.5)]
        scene.upright(x, z, turned(chest), RIDER, top)
        scene.upright(x, z, [(-0.18, 0.9), (0.18, 0.9), (0.2, 1.42), (-0.2, 1.42)], RIDER, top)
        scene.strokes(x, z, [turned([(0.15, 1.38), (0.4, 1.05)])], 0.1, RIDER, top * 0.8)
        scene.disc(x + facing * 0.2, 1.62, z, 0.14, RIDER, scene.pick(_PAINTS if heavy else _SKIN))
        scene.disc(x + facing * 0.18, 1.68, z, 0.13, RIDER, scene.pick(_PAINTS))


def _pole(scene: _Scene, x: float, z: float, kind: str) -> None:
    """A lamp post, or a pole with a traffic sign or traffic lights."""
    rng = scene.rng
    tall = {'lamp': rng.uniform(6, 9), 'sign': rng.uniform(2.3, 3.2), 'light': rng.uniform(3, 3.8)}[kind]
    inwards = -1 if x > 0 else 1
    colour = scene.pick([(125, 125, 122), (70, 74, 70), (150, 150, 148)])
    # At least one and at most three pixels of the final picture (at its usual height).
    metre, widest = scene.focal / z, 1.5 * _SCALE * max(scene.height / (256 * _SCALE), 1)
    half = min(max(0.07 * metre, 0.5 * _SCALE), widest) / metre
    scene.upright(x, z, _oblong(-half, half, 0, tall), POLE, colour)
    scene.upright(x, z, _oblong(0, half, 0, tall), None, colour * 0.8)
    if kind == 'lamp':
        scene.strokes(x, z, [[(0, tall), (inwards * 1.3, tall + 0.25)]], 0.08, POLE, colour)
        head = [(1.0, 0.15), (1.9, 0.3), (1.9, 0.4), (1.0, 0.3)]
        scene.upright(x, z, [(inwards * across, tall + up) for across, up in head], POLE, colour * 1.1)
    elif kind == 'sign':
        for level in range(1 + (rng.random() < 0.3)):
            size, y = rng.uniform(0.3, 0.42), tall - 0.3 - 0.85 * level
            inner, rim = _SIGNS[rng.integers(len(_SIGNS))]
            shape = rng.choice(['round', 'triangle', 'square'], p=[0.45, 0.25, 0.3])
            for r, paint in ((size, rim), (size * 0.72, inner)):
                if shape == 'round':
                    scene.disc(x, y, z, r, SIGN, paint)
                elif shape == 'triangle':
                    scene.upright(x, z, [(-r, y - 0.6 * r), (r, y - 0.6 * r), (0, y + 1.1 * r)], SIGN, paint)
                else:
                    scene.upright(x, z, _oblong(-r, r, y - r, y + r), SIGN, paint)
    else:
        spots = [(0.0, tall - 0.2)]
        if rng.random() < 0.4:
            scene.strokes(x, z, [[(0, tall), (0, 5.6), (inwards * 3, 5.8)]], 0.1, POLE, colour)
            spots.append((inwards * 2.8, 5.5))
        lit = rng.integers(3)
        for across, y in spots:
            scene.upright(x, z, _oblong(across - 0.2, across + 0.2, y - 0.55, y + 0.55), LIGHT, (38, 42, 40))
            for lamp, on in enumerate([(60, 60, 250), (50, 190, 255), (110, 230, 90)]):
                scene.disc(x + across, y + 0.34 - 0.34 * lamp, z, 0.14, None, on if lamp == lit else np.array(on) * 0.3)


def _clutter(scene: _Scene, x: float, z: float) -> None:
    """A bin, bench or box that has no class."""
    rng = scene.rng
    width, tall, colour = rng.uniform(0.25, 0.9), rng.uniform(0.7, 1.3), scene.pick(_PAINTS, 30)
    scene.upright(x, z, _oblong(-width, width, 0, tall), IGNORE, colour)
    scene.upright(x, z, _oblong(-width, width, tall - 0.15, tall), None, colour * 0.6)


def _bridge(scene: _Scene, z: float) -> None:
    low = scene.rng.uniform(5, 6)
    scene.upright(0, z, _oblong(-90, 90, low, low + 1.6), IGNORE, (120, 122, 125))
    scene.upright(0, z, _oblong(-90, 90, low, low + 0.4), None, (70, 72, 75))


def _camera_car(scene: _Scene) -> None:
    """What the label leaves out in every picture: the own bonnet and a strip along the border."""
    rng, height, width = scene.rng, scene.height, scene.width
    if rng.random() < 0.75:
        top, paint = height * (1 - rng.uniform(0.04, 0.1)), scene.pick(_PAINTS[1:], 10) * 0.6
        t = np.linspace(-0.05, 1.05, 15)
        for drop, factor in ((0.0, 1.0), (0.012, 1.3), (0.02, 0.9)):
            arc = np.stack((t * width, top + height * (drop + 0.28 * (t - 0.5) ** 2)), axis=-1)
            scene.fill([[(-9, height + 9), *arc, (width + 9, height + 9)]], IGNORE, paint * factor)
    strip = _SCALE * int(rng.integers(0, 1 + max(2, height // 170)))
    if strip:
        for part in (np.s_[:strip], np.s_[-strip:], np.s_[:, :strip], np.s_[:, -strip:]):
            scene.label[part] = IGNORE
            scene.image[part] //= 3


def _place(scene: _Scene) -> list[tuple[float, Callable[[], None]]]:
    """Decide what stands where: (depth, function that paints it) for everything above the ground."""
    rng, kerb, edge = scene.rng, scene.kerb, scene.edge
    things: list[tuple[float, Callable[[], None]]] = []

    def put(depth, painter, *args, **kwargs):
        things.append((depth, lambda: painter(scene, *args, **kwargs)))

    for side in (-1, 1):
        z = rng.uniform(3, 8)
        while z < _FAR - 30:
            end = z + rng.uniform(8, 24)
            if scene.crossing and z < scene.crossing[1] and end > scene.crossing[0]:
                if scene.crossing[0] - z > 4:
                    put(scene.crossing[0], _zone, side, z, scene.crossing[0] - 2)
                z = scene.crossing[1] + 2
                continue
            # Anything between the kerbs beside a zone is in front of it, so the zone's depth is its far end.
            put(end, _zone, side, z, end)
            if scene.sunny and side == scene.sun and rng.random() < 0.8:
                tip = edge[side] - side * rng.uniform(2, 9)
                skew = rng.uniform(-3, 4)
                spot = [(edge[side], 0, z), (edge[side], 0, end), (tip, 0, end + skew), (tip, 0, max(z + skew, 2.5))]
                cv2.fillPoly(scene.shadow, [np.round(scene.project(spot)).astype(np.int32)], 255)
            z = end + (rng.uniform(1, 4) if rng.random() < 0.3 else 0)
        if rng.random() < 0.35:
            spacing = rng.uniform(7, 14)
            for z in np.arange(rng.uniform(8, 16), 90, spacing):
                put(z, _tree, kerb[side] + side * rng.uniform(0.8, 1.3), z)
        for z in np.arange(rng.uniform(8, 20), 100, rng.uniform(11, 22)):
            kind = rng.choice(['lamp', 'sign', 'light'], p=[0.45, 0.45, 0.1])
            put(z, _pole, kerb[side] + side * rng.uniform(0.4, 0.9), z, kind)
        if scene.crossing:
            put(scene.crossing[0] - 1, _pole, kerb[side] + side * 0.6, scene.crossing[0] - 1, 'light')

        density = rng.choice([0.0, 0.25, 0.7])
        for z in np.arange(rng.uniform(7, 12), 90, 5.8):
            blocked = scene.crossing and scene.crossing[0] - 9 < z < scene.crossing[1] + 1
            if rng.random() < density and not blocked:
                put(z, _vehicle, CAR, kerb[side] - side * rng.uniform(1.0, 1.3), z, oncoming=side < 0)
        for _ in range(rng.integers(0, 6)):
            z = rng.uniform(9, 65)
            for _ in range(rng.integers(1, 4)):
                put(z, _person, rng.uniform(*sorted((kerb[side] + side * 0.4, edge[side]))), z + rng.uniform(-1, 1))
        for _ in range(rng.integers(0, 3)):
            z = rng.uniform(9, 40)
            x = kerb[side] + side * rng.uniform(0.8, 1.8)
            cls = int(rng.choice([IGNORE, BICYCLE, MOTORCYCLE], p=[0.35, 0.45, 0.2]))
            if cls == IGNORE:
                put(z, _clutter, x, z)
            else:
                put(z, _cycle, cls, x, z, False)

    lanes = {False: kerb[1] - rng.uniform(3.2, 3.6), True: kerb[-1] + rng.uniform(3.2, 3.6)}
    first = {False: rng.uniform(11, 40), True: rng.uniform(11, 40)}
    if rng.random() < 0.1:
        put(first[True], _vehicle, TRAIN, lanes[True], first[True], oncoming=True)
        first[True] += 32
    for oncoming, x in lanes.items():
        z = first[oncoming]
        while z < 130:
            cls = int(rng.choice([CAR, TRUCK, BUS], p=[0.86, 0.08, 0.06]))
            put(z, _vehicle, cls, x + rng.uniform(-0.3, 0.3), z, oncoming=oncoming)
            z += 12 + rng.uniform(4, 45)
    if scene.crossing and rng.random() < 0.5:
        z = scene.crossing[0] + rng.uniform(1, 4)
        put(z, _vehicle, int(rng.choice([CAR, TRUCK, BUS], p=[0.8, 0.1, 0.1])), rng.uniform(-12, 6), z, crossing=True)
    if rng.random() < 0.45:
        z = rng.uniform(9, 32)
        put(z, _cycle, BICYCLE if rng.random() < 0.65 else MOTORCYCLE, kerb[1] - rng.uniform(0.6, 2.6), z, True)
    if scene.crossing and rng.random() < 0.6:
        z = scene.crossing[0] - 2
        for _ in range(rng.integers(1, 5)):
            put(z, _person, rng.uniform(kerb[-1], kerb[1]), z + rng.uniform(-1, 1))
    if rng.random() < 0.04:
        z = rng.uniform(35, 80)
        put(z, _bridge, z)
    return things


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
    scene = _Scene(np.random.default_rng(seed), (int(size[0]), int(size[1])))
    _sky(scene)
    _ground(scene)
    # The order of equal depths must not depend on the sort: it is stable, so they keep the order of placing.
    for _, paint in sorted(_place(scene), key=lambda thing: -thing[0]):
        paint()
    _camera_car(scene)
    return scene.finish()
