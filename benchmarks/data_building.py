"""Time to validate, build and reopen a data set of LLaVA-Instruct-150K's size.

    python benchmarks/data_building.py [--records 157712] [--images 81479] [--processes 4] [--dir DIR] [--json out.json]

Makes records of that file's turns and lengths and as many JPEG files (hard links to 200 photographs of COCO's sizes,
since building reads only their headers), and converts them with the guide's step 3. Then it times, each in a process of
its own and from its start: the launcher's preflight check; --processes concurrent requests of the data set, of which
one builds it; another that finds it built; and one that also packs it. CPU time includes the tokenizing worker
processes; peak memory is that of the largest process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.data_packing import IMAGE_SIZES
from benchmarks.data_throughput import PROCESSOR, TINY_MODEL, photographs
from benchmarks.llava_conversion import SCRIPT, make_files
from mindspeed_mm.config.data_config import DataConfig
from mindspeed_mm.config.schema import validate_config

_SOURCES = 200


def write_inputs(root: Path, *, records: int, images: int, workers: int) -> None:
    """Write a checkpoint's small files, images, converted records and the data file below ``root``."""
    subprocess.run([sys.executable, str(TINY_MODEL), "--output", str(root / "checkpoint")], check=True)
    (root / "checkpoint/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    source, image_dir = make_files(root, records=records, images=images)
    photos = photographs()
    (root / "sources").mkdir()
    for number in range(_SOURCES):
        height, width, _ = IMAGE_SIZES[number % len(IMAGE_SIZES)]
        photos[number % len(photos)].resize((width, height)).save(root / f"sources/{number}.jpg", quality=80)
    for number in range(images):
        path = image_dir / f"{number:012d}.jpg"
        path.unlink()
        os.link(root / f"sources/{number % _SOURCES}.jpg", path)
    subprocess.run([sys.executable, str(SCRIPT), "--input", str(source), "--image-root", str(image_dir),
                    "--output", str(root / "data.json")], check=True)
    (root / "config.json").write_text(json.dumps({
        "dataset_param": {
            "preprocess_parameters": {"model_name_or_path": str(root / "checkpoint")},
            "basic_parameters": {"dataset_dir": str(root), "dataset": str(root / "data.json"), "packing": True,
                                 "cache_dir": str(root / "cache"), "preprocessing_num_workers": workers},
        },
    }))


def work(root: Path, task: str) -> dict[str, Any]:
    """Run one task in this process; returns its report."""
    config = validate_config(json.loads((root / "config.json").read_text()), DataConfig, source="config.json")
    from mindspeed_mm.models.spec import spec_of

    spec = spec_of(root / "checkpoint")
    if task == "check":
        from mindspeed_mm.data import validate_data

        return {"records": validate_data(config, spec)}
    from mindspeed_mm.data import build_datasets, build_train_loader

    model_config = spec.read_config(root / "checkpoint")
    media = spec.read_media_settings(config, model_config)
    dataset, _ = build_datasets(config, spec=spec, media=media, seq_length=1024, seed=42)
    if task == "pack":
        loader = build_train_loader(dataset, config, spec=spec, model_config=model_config, seq_length=1024,
                                    micro_batch_size=4, global_batch_size=32, dp_rank=0, dp_size=8, seed=42)
        return {"summary": loader.summary}
    return {"samples": len(dataset)}


def timed(root: Path, task: str, *, processes: int = 1) -> list[dict[str, Any]]:
    """Run a task in ``processes`` concurrent processes; their reports, with wall seconds since the start."""
    started = time.perf_counter()
    running = [
        subprocess.Popen([sys.executable, __file__, "--work", str(root), task], stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    reports = []
    for process in running:
        output = process.communicate()[0]
        if process.returncode:
            raise SystemExit(f"error: {task} ended with status {process.returncode}")
        reports.append({**json.loads(output.splitlines()[-1]), "seconds": time.perf_counter() - started})
    return reports


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=157712)
    parser.add_argument("--images", type=int, default=81479)
    parser.add_argument("--processes", type=int, default=4, help="concurrent requests of the data set")
    parser.add_argument("--workers", type=int, default=16, help="preprocessing_num_workers")
    parser.add_argument("--dir", type=Path, help="an existing directory on the disk to measure")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", nargs=2, metavar=("DIR", "TASK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        report = work(Path(options.work[0]), options.work[1])
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        report["cpu"] = sum(one.ru_utime + one.ru_stime for one in used)
        print(json.dumps({**report, "gb": max(one.ru_maxrss for one in used) / 2**20}))
        return 0
    with tempfile.TemporaryDirectory(dir=options.dir) as place:
        root = Path(place)
        write_inputs(root, records=options.records, images=options.images, workers=options.workers)
        results = {
            "check before training": timed(root, "check"),
            f"build, {options.processes} processes at once": timed(root, "build", processes=options.processes),
            "open the built data set": timed(root, "build"),
            "open and pack": timed(root, "pack"),
        }
        size = sum(path.stat().st_size for path in (root / "cache").rglob("*") if path.is_file()) / 1e6
    print(f"{options.records} records, {options.images} images, {os.cpu_count()} cores, cache {size:.0f} MB")
    for name, reports in results.items():
        print(f"{name:32s}{max(report['seconds'] for report in reports):8.1f} s"
              f"{sum(report['cpu'] for report in reports):8.1f} s CPU time"
              f"{max(report['gb'] for report in reports):8.2f} GB")
    if options.json:
        about = {"records": options.records, "images": options.images, "cores": os.cpu_count(), "cache_mb": size}
        options.json.write_text(json.dumps({"about": about, "results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
