"""Fill of packs and balance of a step's cost over the ranks, on length distributions like LLaVA's.

    python benchmarks/data_packing.py [--samples 157712] [--output packing.json]

The lengths are random. Conversations: 58,000 dialogues, 23,000 descriptions and 77,000 reasoning answers, as published
with LLaVA-Instruct-150K, with lengths in the proportions of its three files (126, 21 and 80 MB), so that answers have
185 tokens on average, as the guide's recipe logs. Images have COCO's common sizes, resized by the recipe's limits.

The table also has an upper bound of the fill. At most two samples longer than a third of the budget share a pack;
pairing the longest with the shortest, where both fit, needs the fewest packs. And no pack is more than full.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from mindspeed_mm.data.images import resized_size
from mindspeed_mm.data.packing import Costs, Packs, assign_packs, pack, worst_over_mean
from mindspeed_mm.interfaces.media import MediaSettings, PixelNorm

SETTINGS = MediaSettings(65536, 262144, 16, 2, 2, PixelNorm((0.5,) * 3, (0.5,) * 3, 1 / 255))
# height, width, share: the common sizes of COCO's photographs
IMAGE_SIZES = ((480, 640, 0.36), (640, 480, 0.12), (427, 640, 0.20), (640, 427, 0.09), (426, 640, 0.06),
               (640, 640, 0.04), (375, 500, 0.06), (500, 375, 0.03), (360, 640, 0.04))
# share, median and spread (of the logarithm) of the text tokens of dialogues, descriptions, reasoning, template tokens
# included except the two around an image
KINDS = ((58, 320, 0.30), (23, 150, 0.22), (77, 200, 0.22))
IMAGE_MARKER_TOKENS = 2
# share of text-only samples
MIXES = {"llava-instruct-150k": 0.0, "with 6% text only": 0.06, "with 30% text only": 0.30}
STEPS = 40


def draw(samples: int, *, text_only: float, limit: int, seed: int) -> Costs:
    """Token and patch counts of ``samples`` samples of a mix."""
    generator = np.random.RandomState(seed)
    share, median, spread_ = (np.array(column) for column in zip(*KINDS, strict=True))
    kind = generator.choice(len(KINDS), samples, p=share / share.sum())
    text = np.exp(np.log(median[kind]) + spread_[kind] * generator.standard_normal(samples)).astype(np.int64)
    sizes = [resized_size(height, width, SETTINGS) for height, width, _ in IMAGE_SIZES]
    patches = np.array([height * width // SETTINGS.patch_size**2 for height, width in sizes])
    weights = np.array([weight for _, _, weight in IMAGE_SIZES])
    vision = patches[generator.choice(len(IMAGE_SIZES), samples, p=weights / weights.sum())]
    vision = np.where(generator.random_sample(samples) < text_only, 0, vision)
    text = text + vision // SETTINGS.merge_size**2 + IMAGE_MARKER_TOKENS * (vision > 0)
    return Costs(np.minimum(text, limit), vision)


def least_packs(lengths: np.ndarray, budget: int) -> int:
    """Lower bound of the number of packs; see the module's docstring."""
    large = np.sort(lengths[3 * lengths > budget])
    packs, first, last = 0, 0, len(large) - 1
    while first <= last:
        if first < last and large[first] + large[last] <= budget:
            first += 1
        last -= 1
        packs += 1
    return max(packs, -(-int(lengths.sum()) // budget))


def balance(packs: Packs, samples: Costs, *, ranks: int, packs_per_rank: int, seed: int) -> dict[str, float]:
    """Most loaded rank over the mean, in text and vision cost: mean and maximum over steps of random packs."""
    order = np.random.RandomState(seed).permutation(len(packs))
    size = ranks * packs_per_rank
    count = min(STEPS, len(packs) // size)
    ratios = []
    started = time.process_time()
    for step in range(count):
        chosen = [packs.members[place] for place in order[step * size : (step + 1) * size]]
        rows = assign_packs(chosen, samples, budget=packs.budget, ranks=ranks)
        flat = [[sample for members in row for sample in members] for row in rows]
        ratios.append([worst_over_mean([cost[row].sum() for row in flat]) for cost in (samples.text, samples.vision)])
    seconds = (time.process_time() - started) / max(1, count)
    text, vision = np.array(ratios).T
    return {
        "steps": count, "text_mean": text.mean(), "text_worst": text.max(), "vision_mean": vision.mean(),
        "vision_worst": vision.max(), "ms_per_step": 1000 * seconds,
    }


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=157712, help="size of the simulated data set")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="tokens of a pack")
    parser.add_argument("--seq-length", type=int, default=1024, help="maximum tokens of a sample")
    parser.add_argument("--tokens-per-rank", type=int, default=16384, help="tokens of a rank in a step")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows = []
    print(f"{'mix':22} {'budget':>6} {'fill':>7} {'bound':>7} {'s':>5} {'ranks':>5} {'packs':>5}  most loaded rank "
          "over the mean, mean and maximum over steps: text | vision", flush=True)
    for mix, text_only in MIXES.items():
        for budget in options.budgets:
            costs = draw(options.samples, text_only=text_only, limit=options.seq_length, seed=1)
            bound = float(costs.text.sum()) / (least_packs(costs.text, budget) * budget)
            started = time.process_time()
            packs = pack(costs, budget=budget, seed=42)
            seconds = time.process_time() - started
            per_rank = max(1, options.tokens_per_rank // budget)
            for ranks in (8, 64):
                result = balance(packs, costs, ranks=ranks, packs_per_rank=per_rank, seed=7)
                rows.append({"mix": mix, "budget": budget, "samples": options.samples, "packs": len(packs),
                             "fill": packs.fill, "bound": bound, "pack_seconds": seconds, "ranks": ranks,
                             "packs_per_rank": per_rank, **result})
                row = rows[-1]
                print(f"{mix:22} {budget:6} {packs.fill:7.2%} {bound:7.2%} {seconds:5.1f} {ranks:5} "
                      f"{row['packs_per_rank']:5}  {row['text_mean']:.4f} {row['text_worst']:.4f} | "
                      f"{row['vision_mean']:.4f} {row['vision_worst']:.4f}   {row['ms_per_step']:.1f} ms", flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
