#!/bin/bash
# Fine-tune Qwen3-VL-235B-A22B-Instruct. Start it from the repository's root:
#     bash examples/qwen3vl/finetune_qwen3vl_235B.sh [further flags of pretrain_transformers.py]
# Parameters, gradients and optimizer state take 16 bytes per parameter: 3.8 TB over all devices.
# Every variable here and in launch.sh can be set from outside, as in finetune_qwen3vl_30B.sh.

[ -n "$BASH_VERSION" ] || exec bash "$0" "$@" # started with sh

MM_DATA=${MM_DATA-./examples/qwen3vl/data_235B.json}
MM_MODEL=${MM_MODEL-./examples/qwen3vl/model_235B.json}
LOAD_PATH=${LOAD_PATH-ckpt/dcp_path/Qwen3-VL-235B-A22B-Instruct-dcp}

# sixteen machines; NODE_RANK and MASTER_ADDR say which is which
NNODES=${NNODES:-16}
EP=${EP:-8}
RECOMPUTE_ARGS=${RECOMPUTE_ARGS-"--recompute-granularity full"}

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
