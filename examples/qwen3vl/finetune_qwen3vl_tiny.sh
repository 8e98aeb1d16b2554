#!/bin/bash
# Train the quickstart's tiny Qwen3-VL-MoE on its handwritten digits, all parameters, in two processes; on a CPU if that
# is what there is. quickstart.sh makes the files and then starts this from the repository's root:
#     bash examples/qwen3vl/finetune_qwen3vl_tiny.sh [further flags of pretrain_transformers.py]
# Every variable below can be set from outside.

# Machines and processes
NPUS_PER_NODE=${NPUS_PER_NODE:-2}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}

# Files
MM_DATA=${MM_DATA:-./examples/qwen3vl/data_tiny.json}
MM_MODEL=${MM_MODEL:-./examples/qwen3vl/model_tiny.json}
MM_TOOL=${MM_TOOL:-./mindspeed_mm/tools/tools.json}
FSDP2_PATH=${FSDP2_PATH:-./examples/qwen3vl/fsdp2_tiny.yaml}
LOAD_PATH=${LOAD_PATH-./quickstart_run/ckpt/dcp_path/Qwen3-VL-tiny-dcp}
SAVE_PATH=${SAVE_PATH:-./quickstart_run/save_dir}

# Parallel layout and batch: 32 samples per step
TP=${TP:-1}
PP=${PP:-1}
CP=${CP:-1}
EP=${EP:-1}
MBS=${MBS:-16}
GRAD_ACC_STEP=${GRAD_ACC_STEP:-1}
SEQ_LEN=${SEQ_LEN:-256}

# Training from scratch: a larger learning rate than the 30B recipe's
TRAIN_ITERS=${TRAIN_ITERS:-300}
LR=${LR:-1.0e-3}
MIN_LR=${MIN_LR:-0.0}
LR_WARMUP_FRACTION=${LR_WARMUP_FRACTION:-0.1}
WEIGHT_DECAY=${WEIGHT_DECAY:-0}
CLIP_GRAD=${CLIP_GRAD:-1.0}
# 300 iterations are too few for the usual 0.999: it would remember the first, steep ones to the end
ADAM_BETA2=${ADAM_BETA2:-0.95}
SEED=${SEED:-42}
NUM_WORKERS=${NUM_WORKERS:-0}

# Checkpoints and log, in steps
SAVE_INTERVAL=${SAVE_INTERVAL:-300}
EVAL_INTERVAL=${EVAL_INTERVAL:-300}
EVAL_ITERS=${EVAL_ITERS:-1}
LOG_INTERVAL=${LOG_INTERVAL:-1}
CKPT_ARGS=${CKPT_ARGS-"--no-load-optim --no-load-rng --no-save-optim --no-save-rng"}

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
