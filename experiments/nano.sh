#!/usr/bin/env bash
# Everything that is said of nano: the runs, then their numbers in experiments/results, the figures
# in experiments/figures, and the READMEs' tables.
#
#     experiments/nano.sh            # two hours and a half on two cores; goes on where it stopped
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
MULTI="--method multilora --rank 8 --lr 3e-2"
LORA_ALONE=2.5e-3 MULTI_ALONE=2e-2            # learning rates on one task
SHORTS="150 175 190" SHORT=190              # steps of full fine-tuning to LoRA's loss
AUTO="--method autolora --rank 8 --search_steps 150 $LORA"
SEEDS="0 1 2 3 4 5"
FEW="0 1 2 3"                               # of what lies far apart
MORE="6 7 8 9 10 11"                        # of what was undecided then
PILOT="100 101 102"
if [ "${1:-}" = --quick ]; then
    shift
    DIR=out/nano-quick RESULTS=out/nano-quick/results
    FLAGS="$FLAGS --steps 8 --eval_rows 4"
    AUTO="$AUTO --search_steps 5" SHORTS=8 SHORT=8
    SEEDS="0 1" FEW="0 1" MORE="2 3" PILOT="100 101"
elif [ $# -gt 0 ]; then
    RESULTS=$DIR/results
fi
source experiments/run.sh

# The runs of a part of one seed ------------------------------------------------------------------

pilot() {                                   # learning rates, by held-out rows
    for lr in 5e-3 7e-3 1e-2 2e-2; do
        for rank in 8 1 64; do
            run pilot-r$rank-lr$lr-seed$1 --rank $rank --lr $lr --seed $1
        done
    done
    for lr in 5e-4 1e-3 2e-3 4e-3; do
        run pilot-full-lr$lr-seed$1 --method full --lr $lr --seed $1
    done
    for lr in 1e-2 2e-2 3e-2 4e-2; do
        run pilot-multilora-lr$lr-seed$1 --method multilora --rank 8 --lr $lr --seed $1
    done
    for n in 1 8; do
        for lr in 2e-2 3e-2; do
            run pilot-multilora-n$n-lr$lr-seed$1 --method multilora --rank 8 --n_blocks $n \
                --lr $lr --seed $1
        done
    done
    for task in instruct arith infer; do
        for lr in 1.2e-3 2.5e-3 5e-3 1e-2; do
            run pilot-r8-$task-lr$lr-seed$1 --rank 8 $(alone $task) --lr $lr --seed $1
        done
        for lr in 1e-2 2e-2 4e-2; do
            run pilot-multilora-$task-lr$lr-seed$1 --method multilora --rank 8 $(alone $task) \
                --lr $lr --seed $1
        done
    done
    for steps in $SHORTS; do                # full fine-tuning as good as LoRA
        run pilot-full-steps$steps-seed$1 $FULL --steps $steps --seed $1
    done
}

alone() {                                   # one task, as many rows of it a step as in the mixture
    echo "--data $1 --batch_size 6 --grad_accum 1"
}

methods() {
    run lora-seed$1 $LORA --rank 8 --seed $1
    run multilora-seed$1 $MULTI --seed $1
    run full-seed$1 $FULL --seed $1
}

ranks() {                                   # on all six
    run lora-r1-seed$1 $LORA --rank 1 --seed $1
    run lora-r64-seed$1 $LORA --rank 64 --seed $1
    run full-seed$1 $FULL --seed $1
}

subspaces() {                               # on q and v
    run lora-qv-r8-seed$1 $LORA --targets q v --rank 8 --seed $1
    run lora-qv-r64-seed$1 $LORA --targets q v --rank 64 --seed $1
}

targets() {                                 # of as many parameters; attention and MLP too
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

blocks() {
    run lora-seed$1 $LORA --rank 8 --seed $1
    run multilora-seed$1 $MULTI --seed $1
    for n in 1 8; do run multilora-n$n-seed$1 $MULTI --n_blocks $n --seed $1; done
    for kind in learned-s random-b; do TRAIN="python experiments/variants.py $kind" \
        run lora-$kind-seed$1 $LORA --rank 8 --seed $1; done
}

single() {
    methods $1
    for task in instruct arith infer facts data2text; do of_one_task $task $1; done
}

of_one_task() {
    run lora-$1-seed$2 --rank 8 $(alone $1) --lr $LORA_ALONE --seed $2
    run multilora-$1-seed$2 $MULTI $(alone $1) --lr $MULTI_ALONE --seed $2
}

searches() {                                # AutoLoRA; with half of its gradient; of a null
    run autolora-seed$1 $AUTO --seed $1
    run first-order-seed$1 $AUTO --hypergrad first-order --seed $1
    TRAIN="python experiments/variants.py shuffled-rows" run null-search-seed$1 $AUTO --seed $1
}

autolora() {                                # its ranks, and others
    run lora-seed$1 $LORA --rank 8 --seed $1
    searches $1
    after autolora-seed$1
    for kind in uniform random shuffled chance; do
        dealt $kind $1
        run $kind-seed$1 $LORA --ranks $DIR/ranks/$kind-seed$1.pt --seed $1
    done
    of_fixed_scale $1
}

dealt() {                                   # ranks of a kind, after those of AutoLoRA
    local out=$DIR/ranks/$1-seed$2.pt
    [ -f $out ] || python experiments/ranks.py $DIR/autolora-seed$2.pt $1 $2 $out
}

of_fixed_scale() {
    TRAIN="python experiments/variants.py fixed-scale"
    run fixed-found-seed$1 $LORA --ranks $DIR/autolora-seed$1.pt --seed $1
    run fixed-uniform-seed$1 $LORA --ranks $DIR/ranks/uniform-seed$1.pt --seed $1
    TRAIN=
}

forgetting() {                              # and full fine-tuning that is as good as LoRA
    methods $1
    run full-short-seed$1 $FULL --steps $SHORT --seed $1
}

# More seeds of what was undecided ----------------------------------------------------------------

more_methods() {
    methods $1
}

more_subspaces() {
    subspaces $1
}

more_blocks() {
    run lora-seed$1 $LORA --rank 8 --seed $1
    run multilora-seed$1 $MULTI --seed $1
    for n in 1 8; do run multilora-n$n-seed$1 $MULTI --n_blocks $n --seed $1; done
}

more_single() {
    run lora-seed$1 $LORA --rank 8 --seed $1
    run multilora-seed$1 $MULTI --seed $1
    for task in instruct arith infer; do of_one_task $task $1; done
}

more_autolora() {
    run lora-seed$1 $LORA --rank 8 --seed $1
    searches $1
    after autolora-seed$1
    dealt uniform $1
    of_fixed_scale $1
}

more_forgetting() {
    forgetting $1
}

# All of them -------------------------------------------------------------------------------------

parts=${*:-$PARTS}
shopt -s nullglob                           # a part alone has not all runs
if [[ $parts = *pilot* ]]; then
    for seed in $PILOT; do pilot $seed; done
fi
for seed in $FEW; do
    if [[ $parts = *targets* ]]; then targets $seed; fi
    if [[ $parts = *ranks* || $parts = *forgetting* ]]; then ranks $seed; fi
done
for seed in $SEEDS; do
    if [[ $parts = *autolora* ]]; then searches $seed; fi           # others wait for them
    for part in $parts; do
        case $part in pilot | ranks | targets) ;; *) $part $seed ;; esac
    done
done
for seed in $MORE; do
    if [[ $parts = *autolora* ]]; then searches $seed; fi
    for part in $parts; do
        case $part in pilot | ranks | targets) ;; *) more_$part $seed ;; esac
    done
done
finish

measured() {                                # on rows that chose nothing
    local workers=()
    for ((i = 0; i < JOBS; i++)); do
        python experiments/measure.py "$@" --share $i/$JOBS &
        workers+=($!)
    done
    for worker in "${workers[@]}"; do wait $worker; done
}

runs=($DIR/*-seed{?,1?}.pt)
if [[ $parts = *forgetting* ]]; then
    measured $DIR/{lora,lora-r1,lora-r64,multilora,full-short,full}-seed{?,1?}.pt --skills
fi
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
    report nano_forgetting $DIR/{lora,lora-r1,lora-r64,multilora,full-short,full}-seed{?,1?}.pt \
        --study intruders
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
