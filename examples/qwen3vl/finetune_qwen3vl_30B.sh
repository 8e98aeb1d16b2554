#!/bin/bash
# Fine-tune Qwen3-VL-30B-A3B-Instruct. Start it from the repository's root:
#     bash examples/qwen3vl/finetune_qwen3vl_30B.sh [further flags of pretrain_transformers.py]
#
# Set any of these variables below (EP=8), or from outside:
#     NPUS_PER_NODE=16 GRAD_ACC_STEP=2 bash examples/qwen3vl/finetune_qwen3vl_30B.sh
# launch.sh has their defaults, docs/environment.md describes them.
#     devices      NPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT MAX_RESTARTS
#     files        MM_DATA MM_MODEL MM_TOOL FSDP2_PATH LOAD_PATH SAVE_PATH
#     parallelism  EP CP RECOMPUTE_ARGS
#     batch        MBS GRAD_ACC_STEP SEQ_LEN NUM_WORKERS SEED
#     length       TRAIN_ITERS or TRAIN_EPOCHS
#     training     LR MIN_LR LR_WARMUP_FRACTION WEIGHT_DECAY CLIP_GRAD ADAM_BETA1 ADAM_BETA2 LOSS_ARGS
#     LoRA         LORA_TARGETS LORA_R LORA_ALPHA LORA_EXPERT_R
#     checkpoints  SAVE_INTERVAL EVAL_INTERVAL EVAL_ITERS LOG_INTERVAL CKPT_ARGS

[ -n "$BASH_VERSION" ] || exec bash "$0" "$@" # started with sh

MM_DATA=${MM_DATA-./examples/qwen3vl/data_30B.json}
MM_MODEL=${MM_MODEL-./examples/qwen3vl/model_30B.json}
# The directory that mm-convert wrote (step 2 of the guide), or SAVE_PATH to continue a run
LOAD_PATH=${LOAD_PATH-ckpt/dcp_path/Qwen3-VL-30B-A3B-Instruct-dcp}

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
