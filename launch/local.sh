#!/usr/bin/env bash
# Start a run on this machine. Give the same command again to resume.
#
#   launch/local.sh --config configs/digits_vit_tiny.py --workdir runs/digits
#   launch/local.sh --processes=2 --devices-per-process=4 --config configs/digits_vit_tiny.py --workdir runs/digits
#
# Options of this script come first. Everything from the first other argument on is passed to the run:
#   --processes=N            N processes, connected through a free loopback port; process I uses GPU I
#   --devices-per-process=M  M simulated CPU devices per process, for tests
#   --dry-run                print the commands without starting anything; same as DRY_RUN=1
# Without --processes, one process uses all devices of the machine. PYTHON is the interpreter (default: python).
set -euo pipefail

usage() { sed -n '2,/^set /{s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; }
fail() {
    echo "ERROR[launch] $*" >&2
    exit 2
}

python=${PYTHON:-python} processes="" devices="" dry_run=${DRY_RUN:-}
while (($#)); do
    case $1 in
        --processes=*) processes=${1#*=} ;;
        --devices-per-process=*) devices=${1#*=} ;;
        --dry-run) dry_run=1 ;;
        --help | -h) usage && exit ;;
        *) break ;;
    esac
    shift
done
(($#)) || { usage >&2 && exit 2; }
[[ $processes =~ ^([1-9][0-9]*)?$ ]] || fail "--processes=$processes - command line - give a number of at least 1"
[[ $devices =~ ^([1-9][0-9]*)?$ ]] || fail "--devices-per-process=$devices - command line - give a number of at least 1"
command -v "$python" >/dev/null || fail "no $python - PATH - activate the environment, or set PYTHON"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
environment=("PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}")
if [[ $devices ]]; then
    environment+=("JAX_PLATFORMS=cpu" "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
fi
run=("$python" -m simmim_jax.main "$@")

if ((${processes:-1} == 1)); then
    if [[ $dry_run ]]; then
        printf '%q ' env "${environment[@]}" "${run[@]}" && echo
        exit
    fi
    exec env "${environment[@]}" "${run[@]}"
fi

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT
pids=() printers=() status=0 patience="" stopped=""
forward() {
    local pid
    for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null || true; done
}
trap 'stopped=1 && forward TERM' TERM HUP
trap 'stopped=1 && forward INT' INT

# Job control gives each process its own group: Ctrl-C in the terminal reaches only this script, which forwards it once.
# A second signal would end the run before it has saved.
[[ $dry_run ]] || set -m
for ((i = 0; i < processes; i++)); do
    if [[ $stopped ]]; then break; fi
    command=(env "${environment[@]}")
    [[ $devices ]] || command+=("JAX_LOCAL_DEVICE_IDS=$i")
    command+=("${run[@]}" "--coordinator=127.0.0.1:$port" "--processes=$processes" "--process=$i")
    if [[ $dry_run ]]; then
        printf '%q ' "${command[@]}" && echo
        continue
    fi
    mkfifo "$pipes/$i"
    sed -u "s/^/[$i] /" <"$pipes/$i" &
    printers+=($!)
    "${command[@]}" </dev/null >"$pipes/$i" 2>&1 &
    pids+=($!)
done
[[ $dry_run ]] && exit
set +m

while ((${#pids[@]})); do
    running=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            running+=("$pid")
            continue
        fi
        code=0
        wait "$pid" || code=$?
        ((status)) || status=$code
        # After a failure, kill the others in 150 s: they would wait for the failed process for minutes. After a signal,
        # let them finish saving.
        if ((code != 0 && code != 130 && code != 143)); then patience=${patience:-$((SECONDS + 150))}; fi
    done
    pids=(${running[@]+"${running[@]}"})
    if [[ $patience ]] && ((SECONDS > patience && ${#pids[@]})); then forward KILL; fi
    sleep 0.2
done
wait "${printers[@]}" || true
exit "$status"
