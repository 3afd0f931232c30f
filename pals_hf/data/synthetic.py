"""The built-in data set: small street scenes, generated from a seed within seconds.

The scenes have eight classes with a long tail (poles and persons are rare), textures that overlap between classes,
occlusion, camera noise and an unlabelled frame. A network can learn them and overfit on them without any download.
They are not a benchmark.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("sky", "building", "road", "sidewalk", "vegetation", "car", "person", "pole")
SKY, BUILDING, ROAD, SIDEWALK, VEGETATION, CAR, PERSON, POLE = range(len(CLASSES))
VOID = 255
SIZE = (96, 128)
NUM_IMAGES = {"train": 200, "validation": 50}
_FRAME = 2  # width of the unlabelled border in pixels


def generate_split(split: str) -> list[tuple[str, Image.Image, Image.Image]]:
    """Generate the scenes of `train` or `validation` as (id, RGB image, mask of class indices, 255 for unlabelled)."""
    return [
        (f"{split}-{index:04d}", *generate_scene((0, list(NUM_IMAGES).index(split), index)))
        for index in range(NUM_IMAGES[split])
    ]


def generate_scene(seed: tuple[int, ...]) -> tuple[Image.Image, Image.Image]:
    """Generate an RGB image of `SIZE` and its mask, which depend only on the seed."""
    scene = _Scene(np.random.default_rng(seed))
    scene.paint_background()
    for paint in (scene.paint_tree, scene.paint_pole):
        for _ in range(scene.rng.integers(0, 4)):
            paint()
    # Distant objects first, so that near objects cover them.
    for depth in np.sort(scene.rng.random(scene.rng.integers(1, 5))):
        scene.paint_car(depth)
    for depth in np.sort(scene.rng.random(scene.rng.integers(0, 4))):
        scene.paint_person(depth)
    return scene.photograph(), scene.label()


class _Scene:
    """An image and its mask, painted with the same shapes."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.height, self.width = SIZE
        self.image = Image.new("RGB", (self.width, self.height))
        self.mask = Image.new("L", (self.width, self.height))
        self._image, self._mask = ImageDraw.Draw(self.image), ImageDraw.Draw(self.mask)
        self.horizon = int(self.height * rng.uniform(0.35, 0.55))
        self.vanishing = self.width * rng.uniform(0.35, 0.65)

    def paint(self, shape: str, coordinates: list, label: int, color: tuple[int, int, int]) -> None:
        getattr(self._image, shape)(coordinates, fill=color)
        getattr(self._mask, shape)(coordinates, fill=label)

    def color(self, base: tuple[int, int, int], spread: float) -> tuple[int, int, int]:
        return tuple(int(value) for value in np.clip(np.array(base) + self.rng.normal(0, spread, 3), 0, 255))

    def grey(self, low: int, high: int) -> tuple[int, int, int]:
        return self.color((self.rng.integers(low, high),) * 3, 8)

    def paint_background(self) -> None:
        bottom = self.height
        self.paint("rectangle", [0, 0, self.width, self.horizon], SKY, self.color((150, 175, 205), 30))
        self.paint("rectangle", [0, self.horizon, self.width, bottom], SIDEWALK, self.grey(95, 165))
        left, right = self.width * self.rng.uniform(-0.2, 0.2), self.width * self.rng.uniform(0.8, 1.2)
        lane = [
            (left, bottom),
            (self.vanishing - 4, self.horizon),
            (self.vanishing + 4, self.horizon),
            (right, bottom),
        ]
        self.paint("polygon", lane, ROAD, self.grey(70, 130))
        x = -self.rng.integers(0, 10)
        while x < self.width:
            width = self.rng.integers(14, 40)
            if self.rng.random() < 0.8:
                self.paint_building(x, width)
            x += width
        middle = [(self.vanishing, self.horizon), ((left + right) / 2, bottom)]
        if self.rng.random() < 0.6:  # lane markings look different, but belong to the road
            self.paint("line", middle, ROAD, (205, 205, 200))

    def paint_building(self, x: int, width: int) -> None:
        top = self.horizon - self.rng.integers(8, self.horizon - 2)
        base = self.horizon + self.rng.integers(0, 6)
        self.paint("rectangle", [x, top, x + width, base], BUILDING, self.color((140, 120, 110), 35))
        window = self.color((110, 125, 145), 30)
        for wx in range(x + 3, x + width - 3, 6):
            for wy in range(top + 3, base - 4, 7):
                self.paint("rectangle", [wx, wy, wx + 2, wy + 3], BUILDING, window)

    def paint_tree(self) -> None:
        x, radius = self.rng.uniform(0, self.width), self.rng.uniform(5, 13)
        y = self.horizon - self.rng.uniform(-2, 10)
        self.paint("line", [(x, y), (x, self.horizon + 6)], VEGETATION, self.color((85, 70, 50), 10))
        for _ in range(5):
            cx, cy = x + self.rng.normal(0, radius / 2), y + self.rng.normal(0, radius / 3)
            size = radius * self.rng.uniform(0.4, 0.8)
            box = [cx - size, cy - size, cx + size, cy + size]
            self.paint("ellipse", box, VEGETATION, self.color((75, 105, 65), 22))

    def paint_pole(self) -> None:
        x, base = self.rng.uniform(0, self.width), self.horizon + self.rng.uniform(3, 18)
        top = self.rng.uniform(2, self.horizon * 0.6)
        self.paint("rectangle", [x, top, x + self.rng.integers(3, 6), base], POLE, self.grey(60, 150))

    def paint_car(self, depth: float) -> None:
        y = self.horizon + 4 + depth * (self.height - self.horizon - 8)
        height, width = 5 + 16 * depth, 8 + 26 * depth
        x = self.vanishing + self.rng.normal(0, 0.12 + 0.2 * depth) * self.width
        body = self.color(self.rng.integers(20, 235, 3), 5)
        glass = self.grey(50, 110)
        self.paint("rectangle", [x - width / 2, y - height * 0.6, x + width / 2, y], CAR, body)
        self.paint("rectangle", [x - width * 0.32, y - height, x + width * 0.32, y - height * 0.55], CAR, glass)
        for side in (-0.3, 0.3):
            wheel = x + side * width
            box = [wheel - height * 0.15, y - height * 0.2, wheel + height * 0.15, y + height * 0.12]
            self.paint("ellipse", box, CAR, (25, 25, 28))

    def paint_person(self, depth: float) -> None:
        y = self.horizon + 6 + depth * (self.height - self.horizon - 10)
        height = 14 + 22 * depth
        side = self.rng.choice([-1, 1])
        x = self.vanishing + side * self.rng.uniform(0.12, 0.2 + 0.25 * depth) * self.width
        width, head = height * 0.16, height * 0.12
        self.paint("rectangle", [x - width, y - height * 0.5, x + width, y], PERSON, self.color((60, 60, 80), 25))
        coat = self.color(self.rng.integers(30, 220, 3), 5)
        self.paint("ellipse", [x - width * 1.3, y - height * 0.85, x + width * 1.3, y - height * 0.4], PERSON, coat)
        self.paint(
            "ellipse", [x - head, y - height, x + head, y - height * 0.78], PERSON, self.color((190, 150, 125), 20)
        )

    def photograph(self) -> Image.Image:
        """Return the image with texture, uneven light, blur and sensor noise."""
        shape = (self.height, self.width, 1)
        pixels = np.asarray(self.image, dtype=np.float64)
        pixels += self.rng.normal(0, 1, shape) * 14
        pixels *= np.linspace(*self.rng.uniform(0.65, 1.2, 2), self.width)[None, :, None]
        blurred = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
        pixels = np.asarray(blurred, dtype=np.float64) + self.rng.normal(0, 9, (self.height, self.width, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    def label(self) -> Image.Image:
        """Return the mask, with an unlabelled frame."""
        mask = np.full((self.height, self.width), VOID, dtype=np.uint8)
        inside = (slice(_FRAME, -_FRAME), slice(_FRAME, -_FRAME))
        mask[inside] = np.asarray(self.mask)[inside]
        return Image.fromarray(mask)
