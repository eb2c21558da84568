# Sourced by the other scripts, which set DIR, and TRAIN and ANALYZE where those are other commands.
#
#     run NAME flags ...        makes $DIR/NAME.pt with train.py $FLAGS, in the background, unless an
#                               earlier call did or does
#     after NAME                waits for one run that was started
#     finish                    waits for all runs, and exits where one has failed
#     report NAME CKPT ...      keeps what analyze.py prints in $RESULTS/NAME.txt, and its numbers in
#                               $RESULTS/NAME*.csv
#
# $JOBS runs at a time share the cores. A run's output is in $DIR/NAME.log. A run that was stopped
# goes on from its last checkpoint at the next call; $DIR/NAME.done marks one that has ended, and
# $DIR/NAME.flags says by which flags it was begun: under others it is not taken for the same run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CORES=$(getconf _NPROCESSORS_ONLN)
JOBS=${JOBS:-$CORES}
export OMP_NUM_THREADS=$((CORES > JOBS ? CORES / JOBS : 1))
RESULTS=${RESULTS:-experiments/results}
mkdir -p "$DIR" "$RESULTS"
started=()
trap 'kill $(jobs -rp) 2>/dev/null || true; wait' EXIT

run() {
    local out="$DIR/$1.pt" flags="${TRAIN:-} ${FLAGS:-} ${*:2}"
    if [ -s "$out" ] && [ -f "$DIR/$1.flags" ] && [ "$(<"$DIR/$1.flags")" != "$flags" ]; then
        echo "$out was begun with other flags, $(<"$DIR/$1.flags"): move it away" >&2
        exit 1
    fi
    echo "$flags" >"$DIR/$1.flags"
    if [ -f "$DIR/$1.done" ] || [[ " ${started[*]} " = *" $1 "* ]]; then return; fi
    while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
    echo "$(date +%T) $1"
    started+=("$1")
    if [ -s "$out" ]; then
        train "$1" --resume "$out" &
    else
        rm -f "$out"
        train "$1" ${FLAGS:-} "${@:2}" --out "$out" &
    fi
}

train() {
    ${TRAIN:-python train.py} "${@:2}" >>"$DIR/$1.log" 2>&1 &
    trap "kill $!" TERM
    wait $!
    touch "$DIR/$1.done"
}

after() {
    while [ ! -f "$DIR/$1.done" ] && [ -n "$(jobs -rp)" ]; do wait -n || true; done
    ended "$1"
}

finish() {
    wait
    for name in "${started[@]}"; do ended "$name"; done
    started=()
}

ended() {
    if [ ! -f "$DIR/$1.done" ]; then
        echo "$1 has failed: see $DIR/$1.log" >&2
        exit 1
    fi
}

report() {
    ${ANALYZE:-python analyze.py} "${@:2}" --out "$DIR/$1" | grep -v "^figures and" | tee "$RESULTS/$1.txt"
    python experiments/results.py flatten "$DIR/$1" "$RESULTS/$1"
}
