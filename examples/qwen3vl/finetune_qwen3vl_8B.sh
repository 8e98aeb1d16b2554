#!/bin/bash
# Fine-tune Qwen3-VL-8B-Instruct. Start it from the repository's root:
#     bash examples/qwen3vl/finetune_qwen3vl_8B.sh [further flags of pretrain_transformers.py]
# Parameters, gradients and optimizer state take 16 bytes per parameter: 0.14 TB over all devices.
# Every variable here and in launch.sh can be set from outside, as in finetune_qwen3vl_30B.sh.

[ -n "$BASH_VERSION" ] || exec bash "$0" "$@" # started with sh

MM_DATA=${MM_DATA-./examples/qwen3vl/data_8B.json}
MM_MODEL=${MM_MODEL-./examples/qwen3vl/model_8B.json}
LOAD_PATH=${LOAD_PATH-ckpt/dcp_path/Qwen3-VL-8B-Instruct-dcp}

source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
