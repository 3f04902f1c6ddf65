#!/usr/bin/env bash
# A run on GKE with an image of launch/Dockerfile: with xpk, or as a JobSet.
#
#   export WORKLOAD=simmim-1 IMAGE=REGISTRY/simmim:tpu CLUSTER=my-cluster TYPE=v5litepod-64
#   launch/xpk.sh --config configs/simmim_vit_b_800ep.py --workdir DIR
#
#   export WORKLOAD=simmim-1 IMAGE=REGISTRY/simmim:cuda CLAIM=my-claim MOUNT=/runs
#   export NODES=4 GPUS_PER_NODE=8 ACCELERATOR=nvidia-h100-80gb
#   launch/xpk.sh --jobset=gpu --config configs/simmim_vit_b_800ep.py --workdir /runs/vit_b
#
#   export SLICES=1 HOSTS_PER_SLICE=16 CHIPS_PER_HOST=4 ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=8x8
#   launch/xpk.sh --jobset=tpu --config configs/simmim_vit_b_800ep.py --workdir /runs/vit_b
#
# --dry-run as the first option, or DRY_RUN=1, prints the command or the manifest without running it. DIR must be on
# storage that all pods share, such as CLAIM, a ReadWriteMany volume claim. The run restarts automatically, at most
# MAX_RESTARTS times (default: 100), but not after a user error. More variables for xpk: ZONE, PROJECT, SLICES, XPK_FLAGS
# (such as "--storage=runs --priority=high").
set -euo pipefail

usage() { sed -n '2,/^set /{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }
fail() {
    echo "ERROR[launch] $*" >&2
    exit 2
}
# The words, quoted as one line for a shell.
quoted() {
    local word quote="'" escaped="'\\''"
    for word; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
            printf '%s ' "$word"
        else
            printf "'%s' " "${word//$quote/$escaped}"
        fi
    done
}
needs() {
    local name
    for name; do [[ ${!name:-} ]] || fail "no $name - environment - export $name; --help shows an example"; done
}
has() { command -v "$1" >/dev/null || fail "no $1 - PATH - install it"; }

dry_run=${DRY_RUN:-} jobset=""
while (($#)); do
    case $1 in
        --dry-run) dry_run=1 ;;
        --jobset=gpu | --jobset=tpu) jobset=${1#*=} ;;
        --jobset | --jobset=*) fail "$1 - command line - give --jobset=gpu or --jobset=tpu" ;;
        --help | -h) usage && exit ;;
        *) break ;;
    esac
    shift
done
(($#)) || { usage >&2 && exit 2; }
needs WORKLOAD IMAGE
export MAX_RESTARTS=${MAX_RESTARTS:-100}

if [[ $jobset ]]; then
    names=(WORKLOAD IMAGE CLAIM MOUNT ACCELERATOR)
    case $jobset in
        gpu) names+=(NODES GPUS_PER_NODE) ;;
        tpu) names+=(SLICES HOSTS_PER_SLICE CHIPS_PER_HOST TOPOLOGY) ;;
    esac
    needs "${names[@]}"
    has envsubst
    has "${PYTHON:-python3}"
    # JSON is valid YAML for any words. Kubernetes replaces $(NAME) unless the dollar is doubled.
    # shellcheck disable=SC2016 # the shell must not expand this
    RUN_ARGS=$("${PYTHON:-python3}" -c \
        'import json, sys; print(json.dumps([word.replace("$(", "$$(") for word in sys.argv[1:]]))' "$@")
    export RUN_ARGS
    names+=(MAX_RESTARTS RUN_ARGS)
    manifest=$(envsubst "${names[*]/#/$}" <"$(dirname "${BASH_SOURCE[0]}")/jobset_$jobset.yaml")
    if [[ $dry_run ]]; then
        echo "$manifest"
        exit
    fi
    has kubectl
    kubectl apply -f - <<<"$manifest"
    exit
fi

needs CLUSTER TYPE
read -ra flags <<<"${XPK_FLAGS:-}"
# exec: xpk wraps the command in a shell, and SIGTERM must reach Python. xpk restarts after exit codes of 127 or more,
# such as 143, and not after a user error.
command=(
    xpk workload create "--cluster=$CLUSTER" "--workload=$WORKLOAD" "--docker-image=$IMAGE" "--tpu-type=$TYPE"
    "--num-slices=${SLICES:-1}" "--max-restarts=$MAX_RESTARTS" --termination-grace-period-seconds=180
    ${ZONE:+"--zone=$ZONE"} ${PROJECT:+"--project=$PROJECT"} ${flags[@]+"${flags[@]}"}
    "--command=exec python -m simmim_jax.main $(quoted "$@")"
)
if [[ $dry_run ]]; then
    quoted "${command[@]}" && echo
    exit
fi
has xpk
exec "${command[@]}"
