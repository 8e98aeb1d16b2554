"""The quickstart's tiny model on Hugging Face's Trainer, as a minimal script; for benchmarks.startup.

    torchrun --standalone --nproc_per_node 1 -m benchmarks.startup_peer MODEL_DIR RECORDS.json SCRATCH_DIR DEVICE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def print_milestone(milestone: str) -> None:
    """Print a line that benchmarks.startup looks for."""
    print(f"milestone: {milestone}", flush=True)


def main() -> None:
    """One optimizer step of 12 samples."""
    model_directory, records_file, scratch, device = sys.argv[1:]
    import torch
    from PIL import Image
    from transformers import (
        AutoTokenizer,
        Qwen2VLImageProcessor,
        Qwen3VLMoeForConditionalGeneration,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    arguments = TrainingArguments(
        scratch, max_steps=1, per_device_train_batch_size=12, logging_steps=1, save_strategy="no", report_to=[],
        remove_unused_columns=False, use_cpu=device == "cpu", optim="adamw_torch_fused",
    )
    print_milestone("processes")
    model = Qwen3VLMoeForConditionalGeneration.from_pretrained(model_directory, dtype=torch.float32)
    print_milestone("model")
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    processor = Qwen2VLImageProcessor.from_pretrained(model_directory)
    records = json.loads(Path(records_file).read_text(encoding="utf-8"))

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [Image.open(path) for record in batch for path in record["images"]]
        made = processor(images=images, return_tensors="pt")
        counts = iter((made["image_grid_thw"].prod(dim=1) // processor.merge_size**2).tolist())
        texts = []
        for record in batch:
            text = tokenizer.apply_chat_template(record["messages"], tokenize=False)
            texts.append(text.replace(
                "<image>", f"<|vision_start|>{'<|image_pad|>' * next(counts)}<|vision_end|>"))
        ids = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
        kinds = (ids["input_ids"] == model.config.image_token_id).int()
        return {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], "labels": labels,
                "mm_token_type_ids": kinds, "pixel_values": made["pixel_values"],
                "image_grid_thw": made["image_grid_thw"]}

    class Milestone(TrainerCallback):
        """Prints the milestone after the first step."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Called by the Trainer."""
            print_milestone("first step")

    trainer = Trainer(model=model, args=arguments, data_collator=collate, train_dataset=records,
                      callbacks=[Milestone()])
    print_milestone("data")
    trainer.train()


if __name__ == "__main__":
    main()
