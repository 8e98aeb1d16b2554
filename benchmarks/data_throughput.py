"""Samples per second and core of the training loader at the recipe's settings, and the cores that a device needs.

    python benchmarks/data_throughput.py [--seconds 20] [--workers 0 1 2] [--output throughput.json]

Writes real images (scikit-image's and scikit-learn's samples, cropped and resized to COCO's 640x480) as JPEGs of
quality 90 into a temporary directory, with conversations of LLaVA's length. Then it times the training loader, from
memory-mapped tokens and JPEG files to packed batches in this process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, features

from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.schema import validate_config
from mindspeed_mm.data import ChatDataset, build_datasets, build_train_loader
from mindspeed_mm.models.qwen3_vl.config import Qwen3VLConfig
from mindspeed_mm.models.qwen3_vl.spec import SPEC

TINY_MODEL = Path(__file__).parents[1] / "examples/qwen3vl/quickstart/make_tiny_model.py"
PROCESSOR = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "merge_size": 2,
             "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
             "rescale_factor": 1 / 255}  # the published model's
DEVICE_TOKENS_PER_SECOND = 20_000  # of one H200, text and image tokens
QUESTION, ANSWER = "What is on the table next to the window? ", "There is a cup of coffee and a book beside it. "


def photographs() -> list[Image.Image]:
    """The sample photographs of scikit-learn and, if installed, scikit-image, in colour."""
    from sklearn.datasets import load_sample_images

    arrays = list(load_sample_images().images)
    try:
        import skimage
    except ImportError:
        pass
    else:
        for path in sorted(Path(skimage.__file__).parent.glob("data/*")):
            if path.suffix in (".png", ".jpg", ".jpeg"):
                image = Image.open(path)
                if image.mode == "RGB" and min(image.size) >= 200:
                    arrays.append(np.asarray(image))
    return [Image.fromarray(array) for array in arrays]


def write_data(root: Path, samples: int) -> DataConfig:
    """Write images, conversations, tokenizer and configuration below ``root``."""
    subprocess.run([sys.executable, str(TINY_MODEL), "--output", str(root / "checkpoint")], check=True)
    (root / "checkpoint/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (root / "images").mkdir()
    photos = photographs()
    print(f"{samples} JPEG files of 640x480 from {len(photos)} photographs")
    generator = np.random.RandomState(0)
    records = []
    for index in range(samples):
        image = photos[index % len(photos)]
        width = generator.randint(image.width * 3 // 4, image.width + 1)  # a random crop, so that all files differ
        height = min(image.height, width * 3 // 4)
        left, top = generator.randint(image.width - width + 1), generator.randint(image.height - height + 1)
        crop = image.crop((left, top, left + width, top + height)).resize((640, 480), Image.Resampling.LANCZOS)
        crop.save(root / f"images/{index:05d}.jpg", quality=90)
        answer = ANSWER * generator.randint(1, 6)
        records.append({
            "images": [f"images/{index:05d}.jpg"],
            "messages": [{"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": answer}],
        })
    (root / "data.json").write_text(json.dumps(records))
    return validate_config(
        {
            "dataset_param": {
                "preprocess_parameters": {
                    "model_name_or_path": str(root / "checkpoint"), "image_max_pixels": 262144, "image_min_pixels": 1024
                },
                "basic_parameters": {
                    "dataset_dir": str(root), "dataset": str(root / "data.json"), "cache_dir": str(root / "cache"),
                    "packing": True,
                },
            },
            "dataloader_param": {"pin_memory": False},
        },
        DataConfig,
        source="data.json",
    )


def measure(
    config: DataConfig,
    dataset: ChatDataset,
    model_config: Qwen3VLConfig,
    *,
    seq_length: int,
    workers: int,
    seconds: float,
) -> dict[str, float]:
    """Run the training loader for ``seconds``; samples per second of wall time and of CPU time."""
    loader = build_train_loader(
        dataset,
        config,
        spec=SPEC,
        model_config=model_config,
        seq_length=seq_length,
        micro_batch_size=1,
        global_batch_size=1,
        dp_rank=0,
        dp_size=1,
        seed=1,
        num_workers=workers,
    )
    next(loader)  # starts the workers
    for _ in range(4 * workers):  # skip the batches that they decoded before the clock started
        next(loader)
    samples = tokens = 0
    started, busy = time.perf_counter(), cpu_seconds()
    while time.perf_counter() - started < seconds:
        step = next(loader)
        samples += sum(len(batch.sample_ids) for batch in step.batches)
        tokens += step.tokens
    wall, busy = time.perf_counter() - started, cpu_seconds() - busy
    loader.close()
    return {
        "workers": workers, "samples": samples, "tokens_per_sample": tokens / samples, "samples_per_s": samples / wall,
        "samples_per_s_and_core": samples / busy,
    }


def cpu_seconds() -> float:
    """CPU time of this process and its workers, which other programs hardly affect."""
    ticks = 0
    for process in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # user and system
    return ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400, help="JPEG files to make")
    parser.add_argument("--seconds", type=float, default=20.0, help="duration of each measurement")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="worker processes; 0: this process")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens of a packed micro-batch")
    parser.add_argument("--tokens-per-sample", type=int, default=480,
                        help="tokens of a sample in the planned data (benchmarks/data_packing.py's mix has 480)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        config = write_data(root, options.samples)
        model_config = Qwen3VLConfig.from_pretrained(root / "checkpoint")
        media = SPEC.read_media_settings(config, model_config)
        dataset, _ = build_datasets(config, spec=SPEC, media=media, seq_length=options.seq_length, seed=1)
        rows = []
        print(f"{'workers':>7} {'samples/s':>10} {'per core':>9} {'cores for a device':>19}")
        for workers in options.workers:
            row = measure(config, dataset, model_config, seq_length=options.seq_length, workers=workers,
                          seconds=options.seconds)
            needed = DEVICE_TOKENS_PER_SECOND / options.tokens_per_sample
            row["cores_for_a_device"] = needed / row["samples_per_s_and_core"]
            rows.append(row)
            print(f"{workers:7} {row['samples_per_s']:10.1f} {row['samples_per_s_and_core']:9.1f} "
                  f"{row['cores_for_a_device']:19.2f}", flush=True)
    print(f"a device at {DEVICE_TOKENS_PER_SECOND} tokens/s takes {needed:.1f} samples/s of "
          f"{options.tokens_per_sample} tokens; {os.cpu_count()} cores here ({platform.processor() or 'unknown'}), "
          f"libjpeg-turbo {features.check_feature('libjpeg_turbo')}")
    if options.output:
        options.output.write_text(json.dumps({"cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
