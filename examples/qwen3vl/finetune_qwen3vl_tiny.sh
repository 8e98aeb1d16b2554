#!/bin/bash
# Train the quickstart's tiny Qwen3-VL-MoE on its handwritten digits, all parameters, on two ranks; on a CPU if the
# machine has nothing else. quickstart.sh writes the files and then starts this from the repository's root:
#     bash examples/qwen3vl/finetune_qwen3vl_tiny.sh [further flags of pretrain_transformers.py]
# Every variable here and in launch.sh can be set from outside, as in finetune_qwen3vl_30B.sh.

[ -n "$BASH_VERSION" ] || exec bash "$0" "$@" # started with sh

NPUS_PER_NODE=${NPUS_PER_NODE:-2}

MM_DATA=${MM_DATA-./examples/qwen3vl/data_tiny.json}
MM_MODEL=${MM_MODEL-./examples/qwen3vl/model_tiny.json}
FSDP2_PATH=${FSDP2_PATH:-./examples/qwen3vl/fsdp2_tiny.yaml}
LOAD_PATH=${LOAD_PATH-./quickstart_run/ckpt/dcp_path/Qwen3-VL-tiny-dcp}
SAVE_PATH=${SAVE_PATH:-./quickstart_run/save_dir}

# 32 samples per step
MBS=${MBS:-16}
SEQ_LEN=${SEQ_LEN:-256}
NUM_WORKERS=${NUM_WORKERS:-0}

# Training from scratch: a larger learning rate than for fine-tuning
TRAIN_ITERS=${TRAIN_ITERS:-300}
LR=${LR:-1.0e-3}
CLIP_GRAD=${CLIP_GRAD:-1.0}
# 0.999 averages over more than the 300 steps: the steep first ones would still count at the end
ADAM_BETA2=${ADAM_BETA2:-0.95}

SAVE_INTERVAL=${SAVE_INTERVAL:-300}
EVAL_INTERVAL=${EVAL_INTERVAL:-50}
EVAL_ITERS=${EVAL_ITERS:-10} # of 32 samples: all 297

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
