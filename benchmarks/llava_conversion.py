"""Time of the LLaVA conversion at full size against a plain loop over json and os.path.exists, in the same run.

    python benchmarks/llava_conversion.py [--records 157712] [--images 81479] [--rounds 5] [--dir DIR] [--json out.json]

Makes a file of that many records in LLaVA-Instruct's format and that many image files (empty: only their names count)
below --dir or in a temporary directory. Then both converters alternate, each in a process of its own, timed with
Python's start; figures are medians. The plain loop reads with json, calls os.path.exists for every image, writes the
same records with json and checks nothing else. Both outputs are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "qwen2vl" / "llava_instruct_2_mllm_demo_format.py"
WORDS = ("the dog sits on a bench near an old red bus while two people walk along the street and talk about how it is "
         "raining in their town today").split()
# Mean length of LLaVA-Instruct-150K: about 1.4 kB a record, between one and eleven turns of question and answer.
TURNS = (1, 1, 1, 3, 4, 5)
PLAIN = """
import json, os, sys
source, root, target = sys.argv[1:]
roles = {"human": "user", "gpt": "assistant"}
converted = []
for record in json.load(open(source)):
    images = []
    if "image" in record:
        path = root + "/" + record["image"]
        if not os.path.exists(path):
            continue
        images.append(path)
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    converted.append({"images": images, "messages": messages})
json.dump(converted, open(target, "w"), ensure_ascii=False)
"""


def make_files(directory: Path, *, records: int, images: int) -> tuple[Path, Path]:
    """Write the records and the image files; every thousandth record has no image, every 2000th a missing one."""
    rng = random.Random(0)
    root = directory / "images"
    root.mkdir()
    for number in range(images):
        (root / f"{number:012d}.jpg").touch()

    def text(words: int) -> str:
        return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."

    rows = []
    for number in range(records):
        row: dict[str, object] = {"id": f"{number:012d}"}
        turns = []
        for turn in range(rng.choice(TURNS)):
            tag = "<image>\n" if turn == 0 and number % 1000 else ""
            turns.append({"from": "human", "value": tag + text(rng.randint(6, 15))})
            turns.append({"from": "gpt", "value": text(rng.randint(30, 160))})
        if number % 1000:
            row["image"] = f"{number % images + (images if number % 2000 == 1 else 0):012d}.jpg"
        rows.append({**row, "conversations": turns})
    source = directory / "llava_instruct.json"
    source.write_text(json.dumps(rows))
    return source, root


def timed(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(directory: Path, *, records: int, images: int, rounds: int) -> dict[str, float]:
    """Median seconds of both, after a warm-up round."""
    source, root = make_files(directory, records=records, images=images)
    ours, plain = directory / "ours.json", directory / "plain.json"
    commands = {
        "ours": [sys.executable, str(SCRIPT), "--input", str(source), "--image-root", str(root), "--output", str(ours),
                 "--overwrite"],
        "plain": [sys.executable, "-c", PLAIN, str(source), str(root), str(plain)],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            ours.unlink(missing_ok=True)
            times[name].append(timed(command))
    ours.unlink(missing_ok=True)
    timed(commands["ours"])
    if json.loads(ours.read_bytes()) != json.loads(plain.read_bytes()):
        raise SystemExit("error: the two outputs differ; timing makes no sense")
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {**medians, "ratio": medians["ours"] / medians["plain"], "megabytes": source.stat().st_size / 1e6}


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--records", type=int, default=157712)
    parser.add_argument("--images", type=int, default=81479)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="an existing directory on the disk to measure")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        result = measure(Path(directory), records=options.records, images=options.images, rounds=options.rounds)
    print(f"{options.records} records, {result['megabytes']:.0f} MB of JSON, {options.images} image files")
    print(f"{'plain json + os.path.exists':32s}{result['plain']:8.2f} s")
    print(f"{'llava_instruct_2_mllm':32s}{result['ours']:8.2f} s")
    print(f"{'ratio':32s}{result['ratio']:8.2f}   (at most 0.45)")
    if options.json:
        options.json.write_text(json.dumps({**vars(options), **result}, default=str, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
