#!/usr/bin/env bash
# Everything that is said of nano: the runs, then their numbers in experiments/results, the figures
# in experiments/figures, and the READMEs' tables.
#
#     experiments/nano.sh            # a little over four hours on two cores; resumable
#     experiments/nano.sh ranks      # the claims of one part, from runs in out/nano: names below
#     experiments/nano.sh --quick    # in small, into out/nano-quick: does it all work?
#
# The place to look from: 300 steps of 32 rows at rank 8, where nothing is at its ceiling yet, and
# β2 and a warm-up that keep the seeds together. Learning rates are train.py's defaults or what the
# pilot found best, which has seeds of its own; what is reported is of rows that chose nothing.
cd "$(dirname "$0")/.."
PARTS="pilot methods ranks targets subspaces blocks single autolora forgetting"
DIR=out/nano
FLAGS="--steps 300 --batch_size 32 --grad_accum 2 --beta2 0.98 --warmup 0.2"
FLAGS="$FLAGS --eval_rows 20 --eval_every 300"
LORA="--lr 7e-3" FULL="--method full --lr 2e-3" # the pilot's
BLOCKS="--method multilora --rank 8" MULTI="--method multilora --rank 8 --lr 3e-2"
declare -A LORA_ALONE=([instruct]=5e-3 [arith]=2.5e-3 [infer]=2.5e-3 [facts]=5e-3
    [data2text]=5e-3)
declare -A MULTI_ALONE=([instruct]=2e-2 [arith]=2e-2 [infer]=1e-2 [facts]=2e-2
    [data2text]=2e-2)
FULL_ALONE=1e-3                             # on instruct
ALL_ROWS="--eval_rows 200"
AUTO="--method autolora --rank 8 --search_steps 150 $LORA"
SEEDS="0 1 2 3 4 5"
FEW="0 1 2 3"                               # of what lies far apart
MORE="6 7 8 9 10 11"                        # of what was undecided then
MOST="12 13 14 15 16 17 18 19"              # and then
PILOT="100 101 102"
MORE_PILOT="103 104 105 106 107 108 109 110 111 112 113 114 115 116 117 118 119"
if [ "${1:-}" = --quick ]; then
    shift
    DIR=out/nano-quick RESULTS=out/nano-quick/results
    FLAGS="$FLAGS --steps 8 --eval_rows 4"
    AUTO="$AUTO --search_steps 5"
    SEEDS="0 1" FEW="0 1" MORE=2 MOST=3 PILOT="100 101" MORE_PILOT=102
elif [ $# -gt 0 ]; then
    RESULTS=$DIR/results
fi
source experiments/run.sh

# The runs of a part of one seed ------------------------------------------------------------------

rates() {                                   # of the pilot, by held-out rows
    rates_of_lora_and_full $1
    for rank in 1 64; do
        sweep r$rank "5e-3 7e-3 1e-2 2e-2" $1 --rank $rank
    done
    sweep multilora "1e-2 2e-2 3e-2 4e-2" $1 $BLOCKS
    sweep multilora-n1 "1e-2 2e-2 3e-2" $1 $BLOCKS --n_blocks 1
    sweep multilora-n8 "2e-2 3e-2 4e-2 6e-2" $1 $BLOCKS --n_blocks 8
    TRAIN="python experiments/variants.py learned-s"
    sweep learned-s "5e-3 7e-3 1e-2 2e-2" $1 --rank 8
    TRAIN="python experiments/variants.py random-b"
    sweep random-b "3.5e-3 5e-3 7e-3 1e-2" $1 --rank 8
    TRAIN=
    for task in instruct arith infer facts data2text; do
        sweep r8-$task "1.2e-3 2.5e-3 5e-3 1e-2" $1 --rank 8 $(alone $task) $ALL_ROWS
        sweep multilora-$task "1e-2 2e-2 4e-2" $1 $BLOCKS $(alone $task) $ALL_ROWS
    done
    sweep full-instruct "2.5e-4 5e-4 1e-3 2e-3" $1 --method full $(alone instruct) $ALL_ROWS
}

rates_of_lora_and_full() {
    sweep r8 "5e-3 7e-3 1e-2 2e-2" $1 --rank 8
    sweep full "5e-4 1e-3 2e-3 4e-3" $1 --method full
}

sweep() {                                   # NAME "rate ..." SEED flags ...
    for lr in $2; do
        run pilot-$1-lr$lr-seed$3 "${@:4}" --lr $lr --seed $3
    done
}

methods() {
    run lora-seed$1 $LORA --rank 8 --seed $1
    run multilora-seed$1 $MULTI --seed $1
    run full-seed$1 $FULL --seed $1
}

few_ranks() {                                   # on all six
    run lora-r1-seed$1 $LORA --rank 1 --seed $1
    run lora-r64-seed$1 $LORA --rank 64 --seed $1
    run full-seed$1 $FULL --seed $1
}

subspaces() {                               # on q and v
    run lora-qv-r8-seed$1 $LORA --targets q v --rank 8 --seed $1
    run lora-qv-r64-seed$1 $LORA --targets q v --rank 64 --seed $1
}

few_targets() {                                 # of as many parameters; attention and MLP too
    run lora-qv-r8-seed$1 $LORA --targets q v --rank 8 --seed $1
    run lora-qkvo-r4-seed$1 $LORA --targets q k v o --rank 4 --seed $1
    run lora-attention-seed$1 $LORA --targets q k v o --rank 10 --seed $1
    run lora-mlp-seed$1 $LORA --targets up down --rank 8 --seed $1
    run lora-qv-r1-seed$1 $LORA --targets q v --rank 1 --seed $1
    run lora-qv-r64-seed$1 $LORA --targets q v --rank 64 --seed $1
    for target in q k v o; do
        run lora-$target-r16-seed$1 $LORA --targets $target --rank 16 --seed $1
    done
}

blocks() {                                  # each at the pilot's learning rate
    run lora-seed$1 $LORA --rank 8 --seed $1
    run multilora-seed$1 $MULTI --seed $1
    of_blocks $1
    TRAIN="python experiments/variants.py learned-s"
    run lora-learned-s-seed$1 $LORA --rank 8 --seed $1
    TRAIN="python experiments/variants.py random-b"
    run lora-random-b-seed$1 --rank 8 --lr 5e-3 --seed $1
    TRAIN=
}

of_blocks() {
    run multilora-n1-seed$1 $BLOCKS --n_blocks 1 --lr 2e-2 --seed $1
    run multilora-n8-seed$1 $BLOCKS --n_blocks 8 --lr 4e-2 --seed $1
}

alone() {                                   # one task, as many rows of it a step as in the mixture
    echo "--data $1 --batch_size 6 --grad_accum 1"
}

single() {
    run lora-seed$1 $LORA --rank 8 --seed $1
    run multilora-seed$1 $MULTI --seed $1
    for task in instruct arith infer facts data2text; do
        run lora-$task-seed$1 $(lora_alone $task 8) --seed $1
        run multilora-$task-seed$1 $(multi_alone $task) --seed $1
    done
}

fresh_single() {                            # again: others have suggested how to ask
    local seed=$((20 + $1))
    run lora-fresh-seed$1 $LORA --rank 8 --seed $seed
    run multilora-fresh-seed$1 $MULTI --seed $seed
    for task in instruct arith infer facts data2text; do
        run $task-lora-fresh-seed$1 $(lora_alone $task 8) --seed $seed
        run $task-multilora-fresh-seed$1 $(multi_alone $task) --seed $seed
    done
}

lora_alone() {                              # TASK RANK
    echo "--rank $2 $(alone $1) --lr ${LORA_ALONE[$1]}"
}

multi_alone() {
    echo "$BLOCKS $(alone $1) --lr ${MULTI_ALONE[$1]}"
}

searches() {                                # AutoLoRA; with half of its gradient
    run autolora-seed$1 $AUTO --seed $1
    run first-order-seed$1 $AUTO --hypergrad first-order --seed $1
}

null_search() {
    TRAIN="python experiments/variants.py shuffled-rows" run null-search-seed$1 $AUTO --seed $1
}

autolora() {                                # its ranks, and others
    run lora-seed$1 $LORA --rank 8 --seed $1
    searches $1
    null_search $1
    after autolora-seed$1
    for kind in uniform random shuffled chance; do
        dealt $kind $1
        run $kind-seed$1 $LORA --ranks_from $DIR/ranks/$kind-seed$1.pt --seed $1
    done
    of_fixed_scale $1
    of_the_null $1
}

dealt() {                                   # ranks of a kind, of as many parameters as AutoLoRA's
    local out=$DIR/ranks/$1-seed$2.pt
    [ -f $out ] || python experiments/ranks.py $DIR/autolora-seed$2.pt $1 $2 $out "${@:3}"
}

of_fixed_scale() {
    TRAIN="python experiments/variants.py fixed-scale"
    run fixed-found-seed$1 $LORA --ranks_from $DIR/autolora-seed$1.pt --seed $1
    run fixed-uniform-seed$1 $LORA --ranks_from $DIR/ranks/uniform-seed$1.pt --seed $1
    TRAIN=
}

of_the_null() {
    after null-search-seed$1
    dealt null $1 --from $DIR/null-search-seed$1.pt
    run null-seed$1 $LORA --ranks_from $DIR/ranks/null-seed$1.pt --seed $1
}

forgetting() {                              # on instruct, which does not overwrite all skills
    run lora-instruct-seed$1 $(lora_alone instruct 8) --seed $1
    for rank in 1 64; do
        run lora-instruct-r$rank-seed$1 $(lora_alone instruct $rank) --seed $1
    done
    run multilora-instruct-seed$1 $(multi_alone instruct) --seed $1
    run full-instruct-seed$1 --method full $(alone instruct) --lr $FULL_ALONE --seed $1
    at_rates lora "1.2e-3 2.5e-3 1e-2" $1 --rank 8
    at_rates multilora "1e-2 4e-2" $1 $BLOCKS
    at_rates full "2.5e-4 5e-4 2e-3" $1 --method full
}

at_rates() {                                # METHOD "rate ..." SEED flags ...: other ones
    for lr in $2; do
        run $1-instruct-lr$lr-seed$3 "${@:4}" $(alone instruct) --lr $lr --seed $3
    done
}

# More seeds of what was undecided ----------------------------------------------------------------

more_methods() { methods $1; }
more_subspaces() { subspaces $1; }
more_single() { single $1; }
more_forgetting() { forgetting $1; }

more_blocks() {
    run lora-seed$1 $LORA --rank 8 --seed $1
    run multilora-seed$1 $MULTI --seed $1
    of_blocks $1
}

more_autolora() {
    run lora-seed$1 $LORA --rank 8 --seed $1
    searches $1
    null_search $1
    after autolora-seed$1
    dealt uniform $1
    dealt chance $1
    run chance-seed$1 $LORA --ranks_from $DIR/ranks/chance-seed$1.pt --seed $1
    of_fixed_scale $1
    of_the_null $1
}

most_methods() { methods $1; }
most_subspaces() { subspaces $1; }
most_blocks() { more_blocks $1; }
most_single() { single $1; }

most_forgetting() {                         # lora-instruct has more seeds in single
    run lora-instruct-seed$1 $(lora_alone instruct 8) --seed $1
    run full-instruct-seed$1 --method full $(alone instruct) --lr $FULL_ALONE --seed $1
    at_rates full 5e-4 $1 --method full
}

most_autolora() {
    run lora-seed$1 $LORA --rank 8 --seed $1
    searches $1
}

# All of them -------------------------------------------------------------------------------------

parts=${*:-$PARTS}
shopt -s nullglob                           # a part alone has not all runs

of_seeds() {                                # "seed ..." PREFIX: the parts that have such runs
    for seed in $1; do
        if [[ $parts = *autolora* && $2 != few_ ]]; then searches $seed; fi     # others wait
        for part in $parts; do
            if declare -F $2$part >/dev/null; then $2$part $seed; fi
        done
    done
}

if [[ $parts = *pilot* ]]; then
    for seed in $PILOT; do rates $seed; done
    for seed in $MORE_PILOT; do rates_of_lora_and_full $seed; done
fi
of_seeds "$FEW" few_
of_seeds "$SEEDS" ""
of_seeds "$MORE" more_
of_seeds "$MOST" most_
of_seeds "$SEEDS $MORE $MOST" fresh_
finish

measured() {                                # on rows that chose nothing
    local workers=()
    for ((i = 0; i < JOBS; i++)); do
        python experiments/measure.py "$@" --share $i/$JOBS &
        workers+=($!)
    done
    for worker in "${workers[@]}"; do wait $worker; done
}

if [[ $parts = *forgetting* ]]; then
    measured $DIR/*-instruct{,-*}-seed{?,1?}.pt --skills
fi
runs=($DIR/*-seed{?,1?}.pt)
if [ ${#runs[@]} -gt 0 ]; then measured ${runs[@]}; fi
python experiments/collect.py $DIR $RESULTS/nano_runs.csv
if [[ $parts = *single* ]]; then python experiments/summed.py $DIR $RESULTS/nano_summed.csv; fi
if [[ $parts = *methods* ]]; then
    studies="spectrum amplification directions intruders"
    if [[ $parts = *autolora* ]]; then studies="$studies ranks"; fi
    report nano_methods $DIR/{full,lora,multilora,autolora}-seed{?,1?}.pt --study $studies
fi
if [[ $parts = *subspaces* ]]; then
    report nano_subspaces $DIR/lora-qv-r8-seed{?,1?}.pt $DIR/lora-qv-r64-seed{?,1?}.pt \
        --study amplification subspace directions
fi
if [[ $parts = *forgetting* ]]; then
    report nano_forgetting $DIR/*-instruct{,-*}-seed{?,1?}.pt --study intruders
    rm $RESULTS/nano_forgetting.{csv,txt}   # its intruders are enough
fi

if [ $RESULTS = experiments/results ]; then
    FIGURES=experiments/figures
    cp $DIR/nano_methods/{histogram,amplification,directions,intruders}.png $FIGURES
    cp $DIR/nano_methods/ranks-autolora-seed0.png $FIGURES
    for rank in r8 r64; do
        cp $DIR/nano_subspaces/subspace-lora-qv-$rank-seed0-lora-qv-r64-seed1.png $FIGURES
    done
    mkdir -p $DIR/shown                     # what the front page shows: train.py's defaults
    (cd $DIR/shown && rm -f out/lora.pt && env -u OMP_NUM_THREADS python ../../../train.py) |
        sed -n '/held-out  /,$p' >$RESULTS/last_screen.txt
    python experiments/figures.py
    python experiments/tables.py
else
    cp experiments/results/planted.csv $RESULTS
    for part in $parts; do python experiments/claims.py $part $RESULTS; done
fi
