#!/usr/bin/env python
"""Estimate the memory and time of the PALS loss on one device by a formula, and measure them beside it.

    python examples/estimate_cost.py --crop_size 1024 2048 --num_labels 19
    python examples/estimate_cost.py --crop_size 1024 2048 --num_labels 19 --measure

With B images a device, N positions of the classifier's grid, M keys, D features, C classes and U label pixels an
image, in float32:

    aggregation        (8 * B * min(N, 4096) * D + 2.5 * 4BNC) bytes + 5 MB    4 B N M D / a + B N C / e seconds
    loss with q given  (2 * 4BNC + 6 BU) bytes                                 B U C / l seconds
    together           the larger of the first, and the second with another 4BNC for q; the sum of the times

Images count per device: more devices train on more images in the same time. `--measure` takes the rates a, e and l
from small cases and compares the formula with the case that was asked for.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from benchmark_loss import extra_megabytes, time_side_by_side, untimed, warm_up

from pals_hf import PALSLoss
from pals_hf.functional import Affinity, stride_of_keys

PARTS = ("aggregation", "loss with q given", "together")
QUERIES_AT_ONCE = 4096  # on a CPU


@dataclass(frozen=True)
class Case:
    """The input of the loss on one device."""

    crop_size: tuple[int, int]
    num_labels: int
    images: int
    output_stride: int = 4
    features: int = 256
    keys: int = Affinity().keys

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(math.ceil(side / self.output_stride) for side in self.crop_size)

    @property
    def blocks(self) -> int:
        """The number of keys that the grid is pooled to."""
        stride = stride_of_keys(self.grid, self.keys)
        return math.prod(math.ceil(side / stride) for side in self.grid)

    def megabytes(self) -> dict[str, float]:
        """Return the memory by the formula, in the order of PARTS."""
        positions = math.prod(self.grid)
        maps = 4e-6 * self.images * positions * self.num_labels
        queries = 4e-6 * self.images * min(positions, QUERIES_AT_ONCE) * max(self.features, self.num_labels)
        pixels = 6e-6 * self.images * math.prod(self.crop_size)
        aggregation, loss = 2 * queries + 2.5 * maps + 5, 2 * maps + pixels
        return dict(zip(PARTS, (aggregation, loss, max(aggregation, loss + maps)), strict=True))

    def work(self) -> tuple[float, float, float]:
        """Return the work that is divided by the rates a, e and l."""
        positions = math.prod(self.grid)
        attention = 4 * self.images * positions * self.blocks * max(self.features, self.num_labels)
        maps, pixels = (self.images * math.prod(size) * self.num_labels for size in (self.grid, self.crop_size))
        return attention, maps, pixels

    def seconds(self, rates: list[float]) -> dict[str, float]:
        """Return the times by the formula, in the order of PARTS."""
        attention, maps, pixels = (work / rate for work, rate in zip(self.work(), rates, strict=True))
        return dict(zip(PARTS, (attention + maps, pixels, attention + maps + pixels), strict=True))

    def calls(self, device: str) -> dict[str, Callable[[], None]]:
        logits = torch.randn(self.images, self.num_labels, *self.grid, device=device, requires_grad=True)
        features = torch.randn(self.images, self.features, *self.grid, device=device)
        labels = torch.randint(0, self.num_labels, (self.images, *self.crop_size), device=device)
        q = torch.randn_like(logits).softmax(dim=1).detach()
        loss = PALSLoss(affinity=Affinity(keys=self.keys))
        calls = (
            lambda: loss.aggregate(logits, features, labels),
            lambda: loss(logits, labels, aggregated=q).backward(),
            lambda: loss(logits, labels, features).backward(),
        )
        return {name: lambda call=call: untimed(call()) for name, call in zip(PARTS, calls, strict=True)}


def measured_rates(device: str, rounds: int) -> list[float]:
    """Measure a with all pairs of positions of a small image, and e and l with few keys for many positions."""
    aggregation, loss, _ = PARTS
    small, large = Case((256, 256), 19, 1, keys=65536), Case((512, 512), 19, 2, keys=4)
    attention = small.work()[0] / time_side_by_side(small.calls(device), device, rounds)[aggregation]
    clocked = time_side_by_side(large.calls(device), device, rounds)
    _, maps, pixels = large.work()
    return [attention, maps / clocked[aggregation], pixels / clocked[loss]]


def measured_megabytes(case: Case, part: str, args: argparse.Namespace) -> float:
    """Measure the peak memory in a process of its own."""
    task = json.dumps({"case": asdict(case), "part": part})
    command = [sys.executable, __file__, "--worker", task, "--device", args.device, "--threads", str(args.threads)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"measuring {part} failed:\n{result.stderr[-2000:]}")
    return float(result.stdout.split()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop_size", type=int, nargs=2, default=(1024, 2048), metavar=("H", "W"))
    parser.add_argument("--num_labels", type=int, default=19)
    parser.add_argument("--images", type=int, default=1, help="on a device: per_device_train_batch_size")
    parser.add_argument(
        "--output_stride", type=int, default=4, help="pixels between two positions of the classifier's grid"
    )
    parser.add_argument("--features", type=int, default=256, help="channels of the classifier's input")
    parser.add_argument("--keys", type=int, default=Affinity().keys, help="number of keys that are compared with")
    parser.add_argument("--measure", action="store_true", help="also measure")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.worker:
        task = json.loads(args.worker)
        warm_up(args.device)
        print(extra_megabytes(Case(**task["case"]).calls(args.device)[task["part"]], args.device))
        return
    names = ("crop_size", "num_labels", "images", "output_stride", "features", "keys")
    case = Case(**{name: getattr(args, name) for name in names})
    print(
        f"{case.images} x {case.crop_size[0]}x{case.crop_size[1]}, C = {case.num_labels}, D = {case.features}: ",
        end="",
    )
    print(f"{math.prod(case.grid)} positions are compared with {case.blocks} keys")
    expected = case.megabytes()
    if not args.measure:
        for part in PARTS:
            print(f"{part:19}{expected[part]:8.0f} MB")
        return
    rates = measured_rates(args.device, args.rounds)
    print("a = {:.3g}, e = {:.3g}, l = {:.3g} a second".format(*rates))
    predicted = case.seconds(rates)
    found = time_side_by_side(case.calls(args.device), args.device, args.rounds)
    print(f"{'':19}{'formula':>12}{'measured':>12}{'ratio':>7}{'formula':>12}{'measured':>12}{'ratio':>7}")
    for part in PARTS:
        peak = measured_megabytes(case, part, args)
        print(
            f"{part:19}{expected[part]:9.0f} MB{peak:9.0f} MB{expected[part] / peak:7.2f}"
            f"{predicted[part]:10.3f} s{found[part]:10.3f} s{predicted[part] / found[part]:7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
