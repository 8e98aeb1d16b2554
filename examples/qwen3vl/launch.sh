#!/bin/bash
# Common part of the launchers in this directory, which source it after setting what differs between models.
# Sets defaults and environment, checks that the guide's earlier steps are done, and runs torchrun.
# The launcher's own arguments are appended to the flags, and so override them.

set -o pipefail
set +eu +o posix # whatever the calling shell has exported
unset CDPATH       # with it, cd prints where it goes

stop() {
    echo "error: $1" >&2
    exit 2
}

# The variables, under --help's flags
usage_of_variables() {
    cat <<'USAGE'

variables of the launchers (VARIABLE=value bash examples/qwen3vl/finetune_...sh; defaults: docs/environment.md):
  devices      NPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT MAX_RESTARTS
  files        MM_RECIPE, or MM_DATA MM_MODEL MM_TOOL FSDP2_PATH LOAD_PATH SAVE_PATH
  parallelism  EP CP RECOMPUTE_ARGS
  batch        MBS GRAD_ACC_STEP SEQ_LEN NUM_WORKERS SEED
  length       TRAIN_ITERS or TRAIN_EPOCHS
  training     LR MIN_LR LR_WARMUP_FRACTION WEIGHT_DECAY CLIP_GRAD ADAM_BETA1 ADAM_BETA2 LOSS_ARGS
  LoRA         LORA_TARGETS LORA_R LORA_ALPHA LORA_EXPERT_R
  checkpoints  SAVE_INTERVAL EVAL_INTERVAL EVAL_ITERS LOG_INTERVAL CKPT_ARGS
USAGE
}

# Ctrl-C or another signal before torchrun has started; $1: status
# shellcheck disable=SC2329 # called by traps
quit_early() {
    # without the wait bash reports the killed process
    ((${#started[@]})) && { kill -KILL "${started[@]}" && wait "${started[@]}"; } 2>/dev/null
    echo "$NOTHING_TO_SAVE" >&2
    exit "$1"
}
NOTHING_TO_SAVE="stopped before the first step; there is nothing to save"
started=()
trap 'quit_early 130' INT
trap 'quit_early 143' TERM HUP

# Environment of an NPU. Each variable can be set from outside; docs/environment.md describes them.
setup_npu() {
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-2}  # the guide's; not read here
    export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}  # driver log into files, not the terminal
    export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}          # errors only
    export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}                      # a second thread launches operators
    export COMBINED_ENABLE=${COMBINED_ENABLE:-1}                          # merge consecutive copies
    export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}                      # bind ranks to the cores near their NPU
    export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}             # seconds to wait for the other ranks
    export NPU_ASD_ENABLE=${NPU_ASD_ENABLE:-0}                            # no silent-error detection
    export ASCEND_LAUNCH_BLOCKING=${ASCEND_LAUNCH_BLOCKING:-0}            # operators run asynchronously
    export ACLNN_CACHE_LIMIT=${ACLNN_CACHE_LIMIT:-100000}                 # cached operators
    export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}  # less fragmentation
    export MM_DEVICE_MEMORY_GB=${MM_DEVICE_MEMORY_GB-64}                  # warn of a run that is unlikely to fit
    export MULTI_STREAM_MEMORY_REUSE=${MULTI_STREAM_MEMORY_REUSE:-1}      # share freed memory between streams
}

# With a recipe (docs/recipes.md) into FLAGS: the file, and what comes from the environment. What the launchers set is
# not exported.
flags_from_environment() {
    local pair name words
    FLAGS=("$MM_RECIPE")
    for pair in "${FLAG_OF_VARIABLE[@]}"; do
        name=${pair%%:*}
        [[ $SET_OUTSIDE == *" $name "* ]] && FLAGS+=("${pair#*:}" "${!name}")
    done
    for name in LOSS_ARGS RECOMPUTE_ARGS CKPT_ARGS; do
        [[ $SET_OUTSIDE == *" $name "* ]] || continue
        read -r -d '' -a words <<<"${!name}" # returns 1 at the end
        FLAGS+=("${words[@]}")
    done
    [[ $EMPTY_OUTSIDE == *" LOAD_PATH "* ]] && FLAGS+=(gpt_args.load=null)
    [[ $EMPTY_OUTSIDE == *" CKPT_ARGS "* ]] &&
        stop "an empty CKPT_ARGS has no effect with a recipe; add gpt_args.no_save_optim=null gpt_args.no_save_rng=null"
    [[ $EMPTY_OUTSIDE == *" LORA_TARGETS "* ]] && grep -q lora_target "$MM_RECIPE" 2>/dev/null &&
        stop "an empty LORA_TARGETS has no effect with a recipe; take one without lora_args"
    [[ $SET_OUTSIDE == *" GRAD_ACC_STEP "* ]] &&
        stop "GRAD_ACC_STEP has no effect with a recipe; set global_batch_size: gpt_args.global_batch_size=SAMPLES"
}

# Process ids of the ranks on this machine that have begun training, into the array ranks
# shellcheck disable=SC2329 # called in traps
find_ranks() {
    mapfile -t ranks < <(cat "$MM_RUN_STATE"/pid.* 2>/dev/null)
    ((${#ranks[@]})) && return
    # TMPDIR was full, or its old files have been removed: the children of torchrun that handle SIGUSR1
    local children child field mask
    read -r -a children 2>/dev/null <"/proc/$torchrun/task/$torchrun/children"
    for child in "${children[@]}"; do
        while read -r field mask; do
            [[ $field == SigCgt: ]] && ((16#${mask: -3} & 0x200)) && ranks+=("$child")
        done 2>/dev/null <"/proc/$child/status"
    done
}

# Save after the current step and stop; $1: status if training has not begun, so that there is nothing to save.
# shellcheck disable=SC2329 # called by traps
ask_to_stop() {
    local rank reached=0
    find_ranks
    for rank in "${ranks[@]}"; do
        kill -USR1 "$rank" 2>/dev/null && reached=1
    done
    # without any rank: training has ended, and torchrun will, or it has not begun, or not again
    ((reached)) || [ -s "$MM_RUN_STATE/status" ] && return
    stopped_early=$1
    echo "$NOTHING_TO_SAVE" >&2
    # asked politely it would print a traceback; the ranks are in sessions of their own
    local children=()
    read -r -a children 2>/dev/null <"/proc/$torchrun/task/$torchrun/children"
    ((${#children[@]})) && kill -KILL "$torchrun" && kill -TERM "${children[@]}" 2>/dev/null && return
    kill -TERM "$torchrun"
}

# Ctrl-C: once saves, twice quits.
# shellcheck disable=SC2329 # called by a trap
interrupt() {
    if ((++interrupts == 1)); then
        ask_to_stop 130
    elif [ -s "$MM_RUN_STATE/status" ] && ((interrupts == 2)); then
        return # training has ended, and everything is saved
    else
        quit=1
        stopped_early=130
        find_ranks
        # with their process groups, since data workers notice only after seconds that their rank has gone
        kill -KILL "$torchrun" "${ranks[@]}" "${ranks[@]/#/-}" 2>/dev/null
    fi
}

# Says every 10 seconds which machines torchrun waits for, until it has started the ranks; $1: the log file.
report_waiting() {
    local of_torchrun=/proc/$torchrun/task/$torchrun/children children until
    local awaited="the other machines ($((NNODES - 1)) of NNODES=$NNODES) to join at $MASTER_ADDR:$MASTER_PORT"
    ((NODE_RANK > 0)) && awaited="the machine with NODE_RANK=0 at $MASTER_ADDR:$MASTER_PORT, or more of NNODES=$NNODES"
    [[ $MASTER_ADDR =~ ^(localhost|127\..*|::1)$ ]] &&
        awaited+=" (MASTER_ADDR=$MASTER_ADDR is this machine: another needs the address of the one with NODE_RANK=0)"
    printf -v until '%(%H:%M:%S)T' $(($(date +%s) + 900)) # torchrun's time limit
    # "read" waits without a process that would have to be killed
    while read -r -t 10 <> <(:); (($? > 128)) && kill -0 "$torchrun" 2>/dev/null; do
        if [ -r "$of_torchrun" ]; then # it may have printed a warning while it waits
            read -r children <"$of_torchrun"
            [ -n "$children" ] && return
        elif [ -s "$1" ]; then
            return
        fi
        compgen -G "$MM_RUN_STATE/pid.*" >/dev/null && return
        echo "waiting for $awaited; torchrun gives up at $until" >&2
    done
}

# Leaves out fields of the training log's lines, of some 400 characters, and shortens the others.
shorten_lines() {
    sed -u -E '/^ \[[-0-9 :]+\] iteration /{
        s/\| (consumed samples|global batch size|tokens per sample|samples per iteration|loss scale): [^|]*//g
        s/\| (data wait|target tokens\/s per device|TFLOP\/s per device): [^|]*//g
        s/\| number of (skipped|nan) iterations: +0 //g
        s/^ \[[-0-9]+ /[/
        s/iteration +([0-9]+)\/ +/iteration \1\//
        s/elapsed time per iteration \(ms\): ([0-9.]+)/\1 ms/
        s/learning rate/lr/
        s/([0-9]\.[0-9]{3})[0-9]+E/\1E/g
        s/tokens\/s per device/tokens\/s/
        s/peak memory \(GiB\): ([0-9.]+)/\1 GiB/
        s/remaining time: ([0-9:]+) \|$/\1 left/
    }'
}

# The last line after torchrun's report of a failure that no rank has explained; $1: the log file.
explain_failure() {
    local why="training failed; the report is above" next=
    grep -q '^ *exitcode *: -9 ' "$1" &&
        why="a training process was killed (SIGKILL), most often because the machine ran out of memory: see dmesg"
    grep -q '^ *exitcode *: -11 ' "$1" && why="a training process crashed (SIGSEGV)"
    # of this run, not of an earlier one
    [ "$SAVE_PATH/latest_checkpointed_iteration.txt" -nt "$MM_RUN_STATE/started" ] &&
        next="; to continue: LOAD_PATH=$SAVE_PATH"
    echo "error: $why; log: $1$next"
}

# Runs torchrun in its own session, and writes its log: Ctrl-C and signals to this process group reach the launcher only,
# which passes them to the ranks. torchrun itself would kill these after 30 seconds, saved or not. Preflight writes its
# warnings, and the ranks their process ids, the status for the launcher to exit with, and an error for it to print last
# into the directory MM_RUN_STATE.
run_torchrun() {
    mkfifo "$MM_RUN_STATE/log"
    cat "$MM_RUN_STATE/warnings" >"$1" 2>/dev/null # of preflight, which are on the terminal already
    touch "$MM_RUN_STATE/started"
    # on which --progress draws: the ranks' own output goes through a pipe
    [ -t 1 ] && tty <&1 >"$MM_RUN_STATE/terminal"
    (
        trap '' INT TERM HUP USR1
        if [[ -t 1 && -z $MM_FULL_LOG ]]; then
            tee -a -p "$1" | shorten_lines # the file has the lines as they are
        else
            exec tee -a -p "$1"
        fi
    ) <"$MM_RUN_STATE/log" &
    local tee=$! answer
    interrupts=0 stopped_early=0 quit=0
    MM_PREFLIGHT_DONE=1 setsid torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_transformers.py "${FLAGS[@]}" \
        >"$MM_RUN_STATE/log" 2>&1 &
    torchrun=$!
    started=("$torchrun")
    local waiter=
    ((NNODES > 1)) && { report_waiting "$1" & waiter=$!; }
    trap interrupt INT
    trap 'ask_to_stop 143' TERM HUP USR1
    while :; do # a trapped signal ends the wait, but not torchrun
        wait "$torchrun" 2>/dev/null
        status=$?
        kill -0 "$torchrun" 2>/dev/null || break
    done
    wait "$torchrun"
    answer=$?
    ((answer == 127)) || status=$answer # it may have ended while a signal was handled
    [ -n "$waiter" ] && kill "$waiter" 2>/dev/null
    wait "$tee"
    local reported=0 # by the ranks
    [ -s "$MM_RUN_STATE/status" ] && reported=$(<"$MM_RUN_STATE/status")
    ((reported)) && status=$reported
    if [ -s "$MM_RUN_STATE/error" ]; then
        tee -a "$1" <"$MM_RUN_STATE/error" >&2
    elif ((status && !stopped_early && !reported)); then
        explain_failure "$1" | tee -a "$1" >&2
    fi
    ((quit)) && echo "second Ctrl-C: stopped at once, without saving" | tee -a "$1" >&2
    ((stopped_early)) && status=$stopped_early
}

# A recipe file, which the first argument may name too: then the variables below act only if they are set from outside
[[ $1 == *.y?(a)ml ]] && MM_RECIPE=$1 && shift
MM_RECIPE=${MM_RECIPE-}
previous=
for word in "$@"; do
    [[ -z $MM_RECIPE && $word == *.y?(a)ml && $word != --* && ($previous != --* || $previous == *=*) ]] &&
        stop "$word comes after other words; a recipe is the first one, or MM_RECIPE"
    previous=$word
done
SET_OUTSIDE=' ' EMPTY_OUTSIDE=' ' # names of exported variables
for name in $(compgen -e); do
    [ -n "${!name}" ] && SET_OUTSIDE+="$name " || EMPTY_OUTSIDE+="$name "
done
FLAG_OF_VARIABLE=(
    TP:--tensor-model-parallel-size PP:--pipeline-model-parallel-size CP:--context-parallel-size
    EP:--expert-model-parallel-size MBS:--micro-batch-size SEQ_LEN:--seq-length TRAIN_ITERS:--train-iters
    TRAIN_EPOCHS:--train-epochs LR:--lr MIN_LR:--min-lr LR_WARMUP_FRACTION:--lr-warmup-fraction
    WEIGHT_DECAY:--weight-decay CLIP_GRAD:--clip-grad
    ADAM_BETA1:--adam-beta1 ADAM_BETA2:--adam-beta2 SEED:--seed NUM_WORKERS:--num-workers LOAD_PATH:--load
    SAVE_PATH:--save SAVE_INTERVAL:--save-interval EVAL_INTERVAL:--eval-interval EVAL_ITERS:--eval-iters
    LOG_INTERVAL:--log-interval FSDP2_PATH:--fsdp2-config-path MM_DATA:--mm-data MM_MODEL:--mm-model MM_TOOL:--mm-tool
    LORA_TARGETS:--lora-target-modules LORA_R:--lora-r LORA_ALPHA:--lora-alpha LORA_EXPERT_R:--lora-expert-r
)

# Defaults of all launchers; docs/environment.md describes the variables
NPUS_PER_NODE=${NPUS_PER_NODE:-8}
MASTER_ADDR=${MASTER_ADDR:-localhost}
NNODES=${NNODES:-1}
# on one machine a free port is taken; several machines have to agree on one
[ "$NNODES" = 1 ] || MASTER_PORT=${MASTER_PORT:-6000}
NODE_RANK=${NODE_RANK:-0}
MAX_RESTARTS=${MAX_RESTARTS:-0}
MM_TOOL=${MM_TOOL:-./mindspeed_mm/tools/tools.json}
FSDP2_PATH=${FSDP2_PATH:-./examples/qwen3vl/fsdp2_config.yaml}
SAVE_PATH=${SAVE_PATH:-save_dir}
TP=${TP:-1}
PP=${PP:-1}
CP=${CP:-1}
EP=${EP:-1}
MBS=${MBS:-1}
GRAD_ACC_STEP=${GRAD_ACC_STEP:-1}
SEQ_LEN=${SEQ_LEN:-1024}
TRAIN_ITERS=${TRAIN_ITERS:-10000}
# Passes over the data; empty: TRAIN_ITERS steps
TRAIN_EPOCHS=${TRAIN_EPOCHS-}
# LoRA (docs/lora.md); empty targets: full fine-tuning, or lora_args of the model file
LORA_TARGETS=${LORA_TARGETS-}
LORA_R=${LORA_R-}
LORA_ALPHA=${LORA_ALPHA-}
LORA_EXPERT_R=${LORA_EXPERT_R-}
if [ -n "$LORA_TARGETS" ]; then # adapters take a larger learning rate, and checkpoints of them are small
    LR=${LR:-1.0e-4}
    CKPT_ARGS=${CKPT_ARGS-}
fi
LR=${LR:-1.0e-5}
MIN_LR=${MIN_LR:-0.0}
LR_WARMUP_FRACTION=${LR_WARMUP_FRACTION:-0.1}
WEIGHT_DECAY=${WEIGHT_DECAY:-0}
CLIP_GRAD=${CLIP_GRAD:-0.0}
ADAM_BETA1=${ADAM_BETA1:-0.9}
ADAM_BETA2=${ADAM_BETA2:-0.999}
SEED=${SEED:-42}
NUM_WORKERS=${NUM_WORKERS:-8}
SAVE_INTERVAL=${SAVE_INTERVAL:-10000}
EVAL_INTERVAL=${EVAL_INTERVAL:-10000}
EVAL_ITERS=${EVAL_ITERS:-5000}
LOG_INTERVAL=${LOG_INTERVAL:-1}
# Checkpoint flags; empty: save optimizer and random state too, so that a run can be resumed exactly
CKPT_ARGS=${CKPT_ARGS-"--no-save-optim --no-save-rng"}
# Loss flags (docs/loss.md); empty: loss_cfg.loss_type in the model file
LOSS_ARGS=${LOSS_ARGS---calculate-per-token-loss}
# Recomputation flags, such as --recompute-granularity full; empty: keep all activations
RECOMPUTE_ARGS=${RECOMPUTE_ARGS-}

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[ "$(pwd -P)" = "$(cd "$REPOSITORY" && pwd -P)" ] ||
    stop "the paths of the configuration files start at the repository's root; cd $REPOSITORY first"

for degree in NPUS_PER_NODE NNODES TP PP CP EP MBS GRAD_ACC_STEP; do
    [[ ${!degree} =~ ^[1-9][0-9]{0,5}$ ]] || stop "$degree is ${!degree@Q}; it must be a whole number from 1 to 999999"
done
[[ $MAX_RESTARTS =~ ^[0-9]+$ ]] || stop "MAX_RESTARTS is ${MAX_RESTARTS@Q}; it must be a whole number, 0 or more"

# The NPU toolkit's environment
for place in ascend-toolkit cann; do
    [ -f "/usr/local/Ascend/$place/set_env.sh" ] && SET_ENV=${SET_ENV:-/usr/local/Ascend/$place/set_env.sh}
done
# shellcheck source=/dev/null
[ -f "$SET_ENV" ] && source "$SET_ENV"
if [ -e /dev/davinci_manager ] || command -v npu-smi >/dev/null; then
    setup_npu
elif [ -z "$OMP_NUM_THREADS" ]; then
    # Without an NPU the ranks may compute on the CPU: divide its cores among them.
    threads=$(($(nproc) / NPUS_PER_NODE))
    export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
    # threads that spin while they wait slow a step down thirtyfold where another program uses a core
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
fi
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# torch_npu is loaded where its errors can be reported in one line, not by every "import torch"
export TORCH_DEVICE_BACKEND_AUTOLOAD=${TORCH_DEVICE_BACKEND_AUTOLOAD:-0}

WORLD_SIZE=$((NPUS_PER_NODE * NNODES))
# preflight refuses a CP that does not divide the number of ranks, and TP or PP above 1
DP=$((CP < WORLD_SIZE ? WORLD_SIZE / CP : 1))
GBS=$((MBS * GRAD_ACC_STEP * DP))

DISTRIBUTED_ARGS=(
    --nproc_per_node "$NPUS_PER_NODE"
    --nnodes "$NNODES"
    --node_rank "$NODE_RANK"
    --master_addr "$MASTER_ADDR"
    --max_restarts "$MAX_RESTARTS"
)

# Without the recipe's flags that have no effect here (--swiglu, --vocab-size, ...)
GPT_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --context-parallel-size "$CP"
    --context-parallel-algo ulysses_cp_algo
    --expert-model-parallel-size "$EP"
    --micro-batch-size "$MBS"
    --global-batch-size "$GBS"
    --seq-length "$SEQ_LEN"
    --lr "$LR"
    --min-lr "$MIN_LR"
    --lr-decay-style cosine
    --lr-warmup-fraction "$LR_WARMUP_FRACTION"
    --weight-decay "$WEIGHT_DECAY"
    --clip-grad "$CLIP_GRAD"
    --adam-beta1 "$ADAM_BETA1"
    --adam-beta2 "$ADAM_BETA2"
    --seed "$SEED"
    --num-workers "$NUM_WORKERS"
    --use-torch-fsdp2
    --ckpt-format torch_dcp
    --fsdp2-config-path "$FSDP2_PATH"
    --optimizer-selection fused_torch_adamw
    --init-model-with-meta-device
    --log-tps
)
# Without a converted checkpoint the weights of init_from_hf_path are loaded.
[ -n "$LOAD_PATH" ] && GPT_ARGS+=(--load "$LOAD_PATH")
if [ -n "$TRAIN_EPOCHS" ]; then
    GPT_ARGS+=(--train-epochs "$TRAIN_EPOCHS")
else
    GPT_ARGS+=(--train-iters "$TRAIN_ITERS")
fi
[ -n "$LORA_TARGETS" ] && GPT_ARGS+=(--lora-target-modules "$LORA_TARGETS")
[ -n "$LORA_R" ] && GPT_ARGS+=(--lora-r "$LORA_R")
[ -n "$LORA_ALPHA" ] && GPT_ARGS+=(--lora-alpha "$LORA_ALPHA")
[ -n "$LORA_EXPERT_R" ] && GPT_ARGS+=(--lora-expert-r "$LORA_EXPERT_R")
read -r -d '' -a MODE_WORDS <<<"$LOSS_ARGS $RECOMPUTE_ARGS $CKPT_ARGS" # to the end, not of the first line

MM_ARGS=(
    --mm-data "$MM_DATA"
    --mm-model "$MM_MODEL"
    --mm-tool "$MM_TOOL"
)

OUTPUT_ARGS=(
    --log-interval "$LOG_INTERVAL"
    --save-interval "$SAVE_INTERVAL"
    --eval-interval "$EVAL_INTERVAL"
    --eval-iters "$EVAL_ITERS"
    --save "$SAVE_PATH"
)

FLAGS=("${GPT_ARGS[@]}" "${MODE_WORDS[@]}" "${MM_ARGS[@]}" "${OUTPUT_ARGS[@]}")
[ -n "$MM_RECIPE" ] && flags_from_environment
FLAGS+=(--distributed-backend nccl "$@")

command -v torchrun >/dev/null ||
    stop "torchrun is not on the PATH; activate the virtual environment, or install it: bash scripts/install.sh (step 1)"
# torchrun is in the same directory as the Python that it starts
TORCHRUN_PYTHON=$(dirname "$(command -v torchrun)")/python
[ -x "$TORCHRUN_PYTHON" ] || TORCHRUN_PYTHON=python
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
MM_RUN_STATE=$(mktemp -d 2>/dev/null) ||
    stop "TMPDIR ${TMPDIR@Q} is not a directory that can be written; set TMPDIR to one, or unset it"
export MM_RUN_STATE
trap 'rm -rf "$MM_RUN_STATE"' EXIT
# in a session of its own: Ctrl-C ends the launcher, and Python does not print where it was interrupted
setsid env WORLD_SIZE="$WORLD_SIZE" LOCAL_WORLD_SIZE="$NPUS_PER_NODE" NNODES="$NNODES" NODE_RANK="$NODE_RANK" \
    MASTER_ADDR="$MASTER_ADDR" ${MASTER_PORT:+MASTER_PORT="$MASTER_PORT"} \
    "$TORCHRUN_PYTHON" -m mindspeed_mm.training.package_check "${FLAGS[@]}" &
started=($!)
wait "${started[0]}" || exit 2
started=()
[[ " $* " == *" --help "* || " $* " == *" -h "* ]] && usage_of_variables && exit 0

MASTER_PORT=${MASTER_PORT:-$(setsid "$TORCHRUN_PYTHON" -m mindspeed_mm.training.launch_environment)} || exit 2
DISTRIBUTED_ARGS+=(--master_port "$MASTER_PORT")

logfile=logs/train_$(date +%Y%m%d_%H%M%S).log
[ -e "$logfile" ] && logfile=${logfile%.log}_$$.log # another launcher was started in the same second
mkdir -p logs
echo "log: $logfile" >&2
run_torchrun "$logfile"
exit "$status"
