#!/bin/bash
# Fine-tune Qwen3-VL-30B-A3B-Instruct with LoRA (docs/lora.md). Start it from the repository's root:
#     bash examples/qwen3vl/finetune_lora_qwen3vl_30B.sh [further flags of pretrain_transformers.py]
# Data, model and FSDP2 files, and all variables, are those of finetune_qwen3vl_30B.sh; the defaults below differ.
# For another size, set LORA_TARGETS for its launcher: LORA_TARGETS="attention mlp" bash .../finetune_qwen3vl_8B.sh
#
# Eight devices of 64 GB have room for long samples. One of 80 GB holds the base alone: NPUS_PER_NODE=1 recomputes
# activations. To resume, set LOAD_PATH to SAVE_PATH; checkpoints record where the base is.

[ -n "$BASH_VERSION" ] || exec bash "$0" "$@" # started with sh

# Words or names of modules (docs/lora.md); empty: lora_args of the model file
LORA_TARGETS=${LORA_TARGETS-attention experts}
if [ -n "$LORA_TARGETS" ]; then
    LORA_R=${LORA_R-16}
    LORA_ALPHA=${LORA_ALPHA-32}
fi
LR=${LR:-1.0e-4}
CKPT_ARGS=${CKPT_ARGS-} # adapters, optimizer and random state: 10 GB at rank 16, for an exact resume
SAVE_PATH=${SAVE_PATH:-save_dir_lora}
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}
if [ "${NPUS_PER_NODE:-8}:${NNODES:-1}" = 1:1 ]; then
    RECOMPUTE_ARGS=${RECOMPUTE_ARGS---recompute-granularity full}
fi

source "$(dirname "${BASH_SOURCE[0]}")/finetune_qwen3vl_30B.sh"
