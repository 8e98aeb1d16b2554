#!/usr/bin/env bash
# The whole recipe at small scale: installs what is missing, takes a tiny Qwen3-VL-MoE and 1,797 images of handwritten
# digits through the guide's five steps, exports the result and evaluates it with plain transformers. With --lora most of
# the training is LoRA, over a base that full training has begun.
set -uo pipefail
exec </dev/null # no command may wait for input
CALLER_DIR=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
# shellcheck source=../../scripts/environment.sh
source scripts/environment.sh

STEPS=8
REQUIRED_ACCURACY=94 # percent of the held-out images
ITERATIONS=300
BASE_ITERATIONS=60 # of them in full, with --lora
EXAMPLE=examples/qwen3vl

usage() {
    cat <<'USAGE'
usage: bash examples/qwen3vl/quickstart.sh [options]

  --out DIR        run directory (default: quickstart_run in the repository); a second run replaces the first's files
  --lora           train all parameters for 60 iterations only, then LoRA adapters, and evaluate these with PEFT
  --fresh          empty the run directory first, the cache of prepared data included
  --device DEVICE  auto, npu, cuda or cpu (default: auto)
  --skip-install   take the active environment as it is
  --help           print this

Environment: the variables of finetune_qwen3vl_tiny.sh (NPUS_PER_NODE, MASTER_PORT, LR, LORA_R, SEED, ...).
USAGE
}

fail() {
    printf 'error: %s\n' "$2" >&2
    exit "$1"
}

parse_options() {
    OUT=./quickstart_run FRESH=0 DEVICE=auto INSTALL=1 LORA=0
    while (($#)); do
        case $1 in
            --out | --device) [[ $# -ge 2 && -n $2 && $2 != --* ]] || fail 2 "$1 needs a value; see --help" ;;&
            --out)
                OUT=$2
                [[ $OUT == /* ]] || OUT=$CALLER_DIR/$OUT
                ;;
            --device) DEVICE=$2 ;;
            --fresh) FRESH=1 ;;
            --lora) LORA=1 ;;
            --skip-install) INSTALL=0 ;;
            -h | --help) usage && exit 0 ;;
            *) fail 2 "unknown option $1; see --help" ;;
        esac
        case $1 in
            --out | --device) shift 2 ;;
            *) shift ;;
        esac
    done
    [[ $DEVICE =~ ^(auto|npu|cuda|cpu)$ ]] || fail 2 "--device is $DEVICE; choose auto, npu, cuda or cpu"
    [[ $OUT != *,* ]] || fail 2 "--out is $OUT; its name must hold no comma, which separates data files"
}

# Locks the run directory. Only an empty one, or one that an earlier quickstart has marked, is ever written to.
claim_run_directory() {
    local mark=$OUT/.quickstart
    if [[ -e $OUT && ! -e $mark ]] && [[ ! -d $OUT || -n $(ls -A "$OUT") ]]; then
        fail 2 "--out $OUT exists and is not a quickstart's run directory; name another one"
    fi
    { mkdir -p "$OUT" && exec 9>>"$mark"; } || fail 2 "--out $OUT cannot be written; name another directory"
    if command -v flock >/dev/null && ! flock --nonblock 9; then
        fail 2 "--out $OUT is in use by a quickstart that is still running; wait for it or name another directory"
    fi
    local made=(train.log predictions.json loss.png samples.png data_tiny.json model_tiny.json ckpt save_dir export)
    ((!FRESH)) || made+=(data)
    (cd "$OUT" && rm -rf -- "${made[@]}") || fail 1 "the earlier run's files in $OUT cannot be removed"
}

# step TITLE COMMAND...: runs one step; stops the quickstart if it fails.
step() {
    local started=$SECONDS title=$1 status=0
    shift
    ((++STEP))
    printf '\n[%d/%d] %s\n' "$STEP" "$STEPS" "$title"
    "$@" || status=$?
    ((!INTERRUPTED)) || fail 130 "interrupted in step $STEP of $STEPS: $title"
    ((status == 0)) || fail "$status" "step $STEP of $STEPS failed after $((SECONDS - started)) s: $title"
    printf '      done in %d s, %d s in all\n' $((SECONDS - started)) $((SECONDS - RUN_STARTED))
}

install_missing() {
    bash scripts/install.sh --arch "$(machine_arch)" --device "$DEVICE"
}

# Before minutes are spent: does the device that --device names compute? In a subshell, as the launcher does it again.
check_device() (
    for set_env in "${ASCEND_ROOT:-/usr/local/Ascend}"/{ascend-toolkit,cann}/set_env.sh; do
        # shellcheck disable=SC1090 # set_env.sh of the machine's CANN, if any
        [[ $DEVICE != npu || ! -f $set_env ]] || source "$set_env" >/dev/null 2>&1 || true
    done
    python -m mindspeed_mm.backend.device_check "$DEVICE"
)

make_model() {
    python "$EXAMPLE/quickstart/make_tiny_model.py" --output "$HF_DIR" &&
        mm-convert Qwen3VLConverter hf_to_dcp --hf_dir "$HF_DIR" --dcp_dir "$OUT/ckpt/dcp_path/Qwen3-VL-tiny-dcp"
}

make_data() {
    python "$EXAMPLE/quickstart/make_digits.py" --output "$OUT/data" &&
        python examples/qwen2vl/llava_instruct_2_mllm_demo_format.py --overwrite \
            --input "$OUT/data/digits_train.json" --image-root "$OUT/data/images" \
            --output "$OUT/data/mllm_format_digits_train.json"
}

# Two ranks with 16 samples each, or one with 32 if there is a single accelerator.
choose_ranks() {
    local accelerators=0
    [[ $DEVICE == cpu ]] || accelerators=$(python -c '
import torch
print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)') || return
    if ((accelerators == 1)); then
        export NPUS_PER_NODE=${NPUS_PER_NODE:-1} MBS=${MBS:-32}
    fi
    # fused kernels of accelerators need bf16
    ((accelerators == 0)) || export FSDP2_PATH=${FSDP2_PATH:-./$EXAMPLE/fsdp2_config.yaml}
}

# Copies a training log, with every 25th iteration only and its line shortened.
condense_log() {
    local line
    while IFS= read -r line; do
        if [[ $line =~ iteration\ +([0-9]+)/\ *([0-9]+) ]]; then
            if ((BASH_REMATCH[1] % 25 == 0 || BASH_REMATCH[1] == 1)); then
                printf '  iteration %3d of %d' "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}"
                [[ $line =~ \|\ loss:\ ([^ ]+) ]] && printf ', loss %.4f' "${BASH_REMATCH[1]}"
                [[ $line =~ iteration\ \(ms\):\ ([0-9]+) ]] && printf ', %d ms' "${BASH_REMATCH[1]}"
                printf '\n'
            fi
        else
            printf '%s\n' "$line"
        fi
    done
}

# train ITERATIONS LOAD_PATH SAVE_PATH LOG
train() {
    MM_DATA=$OUT/data_tiny.json MM_MODEL=$OUT/model_tiny.json TRAIN_ITERS=$1 LOAD_PATH=$2 SAVE_PATH=$3 \
        SAVE_INTERVAL=$1 bash "$EXAMPLE/finetune_qwen3vl_tiny.sh" --device "$DEVICE" 2>&1 |
        (trap '' INT && tee "$4" | condense_log)
}

finetune() {
    choose_ranks && train "$ITERATIONS" "$OUT/ckpt/dcp_path/Qwen3-VL-tiny-dcp" "$OUT/save_dir" "$OUT/train.log"
}

# With its own learning rate; LR and the LoRA variables of the caller are for the adapters
train_base() {
    choose_ranks || return
    LR='' LORA_TARGETS='' LORA_R='' LORA_ALPHA='' LORA_EXPERT_R='' \
        train "$BASE_ITERATIONS" "$OUT/ckpt/dcp_path/Qwen3-VL-tiny-dcp" "$OUT/ckpt/base" "$OUT/ckpt/base.log"
}

finetune_lora() {
    export LORA_TARGETS=${LORA_TARGETS:-all} LORA_R=${LORA_R:-16} LORA_ALPHA=${LORA_ALPHA:-32} LR=${LR:-4.0e-3}
    train $((ITERATIONS - BASE_ITERATIONS)) '' "$OUT/save_dir" "$OUT/train.log"
}

# export_model SAVE_PATH ITERATION DIR
export_model() {
    local checkpoint
    printf -v checkpoint '%s/iter_%07d' "$1" "$2"
    mm-convert Qwen3VLConverter dcp_to_hf --load_dir "$checkpoint" --save_dir "$3" --model_assets_dir "$HF_DIR"
}

# The base, which the configuration files then name
export_base() {
    export_model "$OUT/ckpt/base" "$BASE_ITERATIONS" "$BASE_DIR" &&
        python "$EXAMPLE/quickstart/configure.py" --run-dir "$OUT" --model-dir "$BASE_DIR"
}

# evaluate MODEL PREDICTIONS [options of inference_demo.py]
evaluate() {
    python "$EXAMPLE/inference_demo.py" --model "$1" --data "$OUT/data/digits_heldout.json" \
        --image-root "$OUT/data/images" --output "$2" --batch 99 --max-new-tokens 16 "${@:3}"
}

evaluate_adapters() {
    evaluate "$BASE_DIR" "$OUT/ckpt/base_predictions.json" &&
        evaluate "$BASE_DIR" "$OUT/predictions.json" --adapter "$ADAPTER"
}

draw() {
    python "$EXAMPLE/quickstart/plot.py" --metrics "$OUT/save_dir/metrics.jsonl" --loss-png "$OUT/loss.png" \
        --predictions "$OUT/predictions.json" --samples-png "$OUT/samples.png"
}

# accuracy PREDICTIONS: sets the numbers right and total, and the text share
accuracy() {
    read -r right total < <(python -c '
import json, sys
result = json.load(open(sys.argv[1], encoding="utf-8"))
print(result["right"], result["total"])' "$1") || fail 1 "$1 cannot be read"
    local tenths=$(((right * 2000 + total) / (2 * total))) # of a percent, rounded
    share="$right of $total images ($((tenths / 10)).$((tenths % 10))%)"
}

report() {
    local right total share trained=$OUT/export
    printf '\n'
    if ((LORA)); then
        accuracy "$OUT/ckpt/base_predictions.json"
        printf 'without adapters:  %s\n' "$share"
        trained="$ADAPTER (adapters of $BASE_DIR)"
    fi
    accuracy "$OUT/predictions.json"
    printf 'held-out accuracy: %s\n' "$share"
    printf 'run report:        %s\nloss curve:        %s\nsample sheet:      %s\ntrained model:     %s\n' \
        "$OUT/save_dir/report.html" "$OUT/loss.png" "$OUT/samples.png" "$trained"
    printf 'time:              %d s' $((SECONDS - RUN_STARTED))
    ((!INSTALL)) || printf ', %d s of it after the installation' $((SECONDS - INSTALLED))
    printf '\n'
    ((right * 100 >= REQUIRED_ACCURACY * total)) ||
        fail 1 "the accuracy is below $REQUIRED_ACCURACY%: something is wrong with this installation"
}

main() {
    parse_options "$@"
    claim_run_directory
    HF_DIR=$OUT/ckpt/hf_path/Qwen3-VL-tiny
    BASE_DIR=$HF_DIR-base
    printf -v ADAPTER '%s/save_dir/iter_%07d/adapter' "$OUT" $((ITERATIONS - BASE_ITERATIONS))
    ((!LORA)) || ((STEPS++))
    STEP=0 RUN_STARTED=$SECONDS INTERRUPTED=0
    trap 'INTERRUPTED=1' INT # once the step has ended: training may save first
    # all files are local: no downloads
    export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    export PYTHONUNBUFFERED=1 HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1

    if ((INSTALL)); then
        step "Environment (step 1 of the guide)" install_missing
        PATH=$(cd "$(environment_dir "")" && pwd)/bin:$PATH
        export PATH
    else
        ((STEPS--))
    fi
    INSTALLED=$SECONDS
    check_device || exit 2
    step "Weights and conversion (step 2)" make_model
    step "Data and conversion (step 3)" make_data
    step "Configuration (step 4)" python "$EXAMPLE/quickstart/configure.py" --run-dir "$OUT"
    if ((LORA)); then
        step "Full training of the base, $BASE_ITERATIONS iterations" train_base
        step "Export of the base to Hugging Face format" export_base
        step "LoRA fine-tuning, $((ITERATIONS - BASE_ITERATIONS)) iterations (step 5)" finetune_lora
        step "Evaluation on the held-out images with transformers and PEFT" evaluate_adapters
    else
        step "Fine-tuning, $ITERATIONS iterations (step 5)" finetune
        step "Export to Hugging Face format" export_model "$OUT/save_dir" "$ITERATIONS" "$OUT/export"
        step "Evaluation on the held-out images with plain transformers" evaluate "$OUT/export" "$OUT/predictions.json"
    fi
    step "Loss curve and sample sheet" draw
    report
}

main "$@"
