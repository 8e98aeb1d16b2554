#!/bin/bash
# Fine-tune Qwen3-VL-30B-A3B-Instruct. Start it from the repository's root:
#     bash examples/qwen3vl/finetune_qwen3vl_30B.sh [further flags of pretrain_transformers.py]
# Every variable below can be set from outside:
#     NPUS_PER_NODE=16 GRAD_ACC_STEP=2 bash examples/qwen3vl/finetune_qwen3vl_30B.sh

# Machines and processes: one process per device
NPUS_PER_NODE=${NPUS_PER_NODE:-8}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}

# Files. LOAD_PATH is the directory that mm-convert wrote (step 2 of the guide), or SAVE_PATH to continue a run.
MM_DATA=${MM_DATA:-./examples/qwen3vl/data_30B.json}
MM_MODEL=${MM_MODEL:-./examples/qwen3vl/model_30B.json}
MM_TOOL=${MM_TOOL:-./mindspeed_mm/tools/tools.json}
FSDP2_PATH=${FSDP2_PATH:-./examples/qwen3vl/fsdp2_config.yaml}
LOAD_PATH=${LOAD_PATH-ckpt/dcp_path/Qwen3-VL-30B-A3B-Instruct-dcp}
SAVE_PATH=${SAVE_PATH:-save_dir}

# Parallel layout and batch: samples per step = MBS x GRAD_ACC_STEP x data-parallel size
TP=${TP:-1}
PP=${PP:-1}
CP=${CP:-1}
EP=${EP:-1}
MBS=${MBS:-1}
GRAD_ACC_STEP=${GRAD_ACC_STEP:-1}
SEQ_LEN=${SEQ_LEN:-1024}

# Training
TRAIN_ITERS=${TRAIN_ITERS:-10000}
LR=${LR:-1.0e-5}
MIN_LR=${MIN_LR:-0.0}
LR_WARMUP_FRACTION=${LR_WARMUP_FRACTION:-0.1}
WEIGHT_DECAY=${WEIGHT_DECAY:-0}
CLIP_GRAD=${CLIP_GRAD:-0.0}
SEED=${SEED:-42}
NUM_WORKERS=${NUM_WORKERS:-8}

# Checkpoints and log, in steps. CKPT_ARGS= (empty) also saves and loads optimizer and random state, so that a run
# can be continued exactly.
SAVE_INTERVAL=${SAVE_INTERVAL:-10000}
EVAL_INTERVAL=${EVAL_INTERVAL:-10000}
EVAL_ITERS=${EVAL_ITERS:-5000}
LOG_INTERVAL=${LOG_INTERVAL:-1}
CKPT_ARGS=${CKPT_ARGS-"--no-load-optim --no-load-rng --no-save-optim --no-save-rng"}

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
