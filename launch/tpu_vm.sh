#!/usr/bin/env bash
# A run on a Cloud TPU VM, or on all hosts of a slice, with gcloud. The hosts find each other automatically.
#
#   export TPU=my-tpu ZONE=us-central2-b TYPE=v4-32 VERSION=tpu-ubuntu2204-base
#   launch/tpu_vm.sh create
#   launch/tpu_vm.sh setup
#   launch/tpu_vm.sh run --config configs/simmim_vit_b_800ep.py --workdir DIR
#   launch/tpu_vm.sh status | logs | stop | delete
#
# `run` starts or resumes a run, which continues after the ssh connection ends. After a preemption: delete, create, setup,
# run. `stop` sends SIGTERM to all hosts and waits until they have saved. All hosts must see DIR, and it must outlive them:
# SETUP_COMMAND, the last command of `setup` on each host, can mount it. --dry-run before the verb, or DRY_RUN=1, prints
# the commands without running them. More variables: PROJECT, SPOT=1, WORKER (whose log; default: 0), JAX ("jax[tpu]").
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

dry_run=${DRY_RUN:-}
if [[ ${1:-} == --dry-run ]]; then dry_run=1 && shift; fi
case ${1:-} in
    "") usage >&2 && exit 2 ;;
    --help | -h) usage && exit ;;
esac
verb=$1
shift
[[ ${TPU:-} ]] || fail "no TPU - environment - export TPU=NAME"
[[ ${ZONE:-} ]] || fail "no ZONE - environment - export ZONE, such as us-central2-b"
where=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})

execute() {
    if [[ $dry_run ]]; then
        quoted "$@" && echo
        return
    fi
    command -v "$1" >/dev/null || fail "no $1 - PATH - install it, or use --dry-run"
    "$@"
}
tpu_vm() { execute gcloud compute tpus tpu-vm "$1" "$TPU" "${where[@]}" "${@:2}"; }
on_all() { tpu_vm ssh --worker=all "--command=$1"; }

# Commands that run on a host, in ~/simmim_jax.
alive="pgrep -F run.pid -f simmim_jax.main >/dev/null 2>&1"
report="if $alive; then echo \"\$(hostname): running, process \$(cat run.pid)\"; else \
echo \"\$(hostname): ended with code \$(cat run.code 2>/dev/null || echo unknown)\"; fi; tail -n 1 run.log"

case $verb in
    create)
        [[ ${TYPE:-} ]] || fail "no TYPE - environment - export TYPE, such as v4-32"
        [[ ${VERSION:-} ]] || fail "no VERSION - environment - export VERSION, such as tpu-ubuntu2204-base"
        tpu_vm create "--accelerator-type=$TYPE" "--version=$VERSION" ${SPOT:+--spot}
        ;;
    setup)
        root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
        archive=$(mktemp -d)/simmim_jax.tar.gz
        trap 'rm -rf "$(dirname "$archive")"' EXIT
        # Includes uncommitted files, except those that git ignores.
        if [[ ! $dry_run ]]; then
            git -C "$root" ls-files -z --cached --others --exclude-standard -- simmim_jax configs requirements.txt |
                tar -C "$root" -czf "$archive" --null -T - || fail "cannot pack the repository - $root - see above"
        fi
        execute gcloud compute tpus tpu-vm scp "$archive" "$TPU:simmim_jax.tar.gz" "${where[@]}" --worker=all
        # Python 3.10 of the hosts is too old.
        on_all "set -e; mkdir -p ~/simmim_jax; cd ~/simmim_jax; rm -rf simmim_jax configs; tar -xzf ../simmim_jax.tar.gz; \
uv=~/.local/bin/uv; [ -x \$uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh; \
[ -x .venv/bin/python ] || \$uv venv --python 3.12 .venv; \
\$uv pip install --python .venv/bin/python -r requirements.txt $(quoted "${JAX:-jax[tpu]}"); ${SETUP_COMMAND:-true}"
        ;;
    run)
        (($#)) || fail "no command line of the run - command line - give --config and --workdir after run"
        on_all "cd ~/simmim_jax || exit 2; if $alive; then echo \"\$(hostname): is already running\" >&2; exit 1; fi; \
rm -f run.pid run.code; \
setsid nohup bash -c '\"\$@\" & echo \$! >run.pid; wait \$!; echo \$? >run.code' \
bash .venv/bin/python -m simmim_jax.main $(quoted "$@")</dev/null >>run.log 2>&1 & \
until [ -s ~/simmim_jax/run.pid ]; do sleep 0.1; done; echo \"\$(hostname): started\""
        ;;
    status)
        tpu_vm describe "--format=value(state)"
        on_all "cd ~/simmim_jax || exit 2; $report"
        ;;
    logs) tpu_vm ssh "--worker=${WORKER:-0}" "--command=tail -n 100 -F ~/simmim_jax/run.log" ;;
    stop)
        on_all "cd ~/simmim_jax || exit 2; if $alive; then kill -TERM \$(cat run.pid); \
for _ in \$(seq 300); do $alive || break; sleep 1; done; fi; $report"
        ;;
    delete) tpu_vm delete --quiet ;;
    *) fail "unknown verb '$verb' - command line - choose one of create, delete, logs, run, setup, status, stop" ;;
esac
