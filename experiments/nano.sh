#!/usr/bin/env bash
# Everything that is said of nano: the runs, then their numbers in experiments/results, the figures
# in experiments/figures, and the READMEs' tables.
#
#     experiments/nano.sh            # about three hours on two cores; goes on where it stopped
#     experiments/nano.sh --quick    # in small, into out/nano-quick: does it all work?
cd "$(dirname "$0")/.."
DIR=out/nano
FLAGS="--grad_accum 4"                      # parts of rows of one length: the same, sooner
AUTO="--method autolora"
if [ "${1:-}" = --quick ]; then
    DIR=out/nano-quick RESULTS=out/nano-quick
    FLAGS="$FLAGS --steps 20 --eval_rows 20"
    AUTO="$AUTO --search_steps 5"
    rm -rf $DIR
fi
source experiments/run.sh
SEEDS="0 1 2"
MORE="0 1 2 3 4"                            # where a verdict hangs on small differences

for seed in $MORE; do                       # the four methods, all of rank 16
    for method in lora full multilora; do
        run $method-seed$seed --method $method --seed $seed
    done
    run autolora-seed$seed $AUTO --seed $seed
    run autolora-beta_lr3e-2-seed$seed $AUTO --beta_lr 3e-2 --seed $seed
done
finish
for seed in $MORE; do                       # AutoLoRA's ranks, and as many parameters elsewhere
    for rate in "" -beta_lr3e-2; do
        for kind in uniform random shuffled; do
            ranks=$DIR/ranks/$kind$rate-seed$seed.pt
            python experiments/ranks.py $DIR/autolora$rate-seed$seed.pt $kind $seed $ranks
            run $kind$rate-seed$seed --ranks $ranks --seed $seed
        done
    done
done
for rank in 8 64 1 2 4; do                  # LoRA's table 6: the rank; and its figure 3: 8 and 64
    for seed in $SEEDS; do
        run lora-qv-r$rank-seed$seed --targets q v --rank $rank --seed $seed
    done
done
for task in instruct arith infer; do        # one task alone: as many steps and rows of it
    ALONE="--data $task --batch_size 13 --grad_accum 1"
    for seed in $SEEDS; do
        run lora-$task-seed$seed $ALONE --seed $seed
        run multilora-$task-seed$seed --method multilora $ALONE --seed $seed
        run lora-$task-lr3e-3-seed$seed $ALONE --lr 3e-3 --seed $seed
    done
done
for seed in $SEEDS; do                      # LoRA's table 5: as many parameters on other targets
    for target in q k v o; do
        run lora-$target-r16-seed$seed --targets $target --rank 16 --seed $seed
    done
    run lora-qkvo-r4-seed$seed --targets q k v o --rank 4 --seed $seed
done
for rank in 1 2 4 8 64; do                  # the rank, on all targets
    for seed in $SEEDS; do
        run lora-all-r$rank-seed$seed --rank $rank --seed $seed
    done
done
for seed in $MORE; do                       # MultiLoRA's blocks and s; AutoLoRA's second term
    for n in 1 2 8; do
        run multilora-n$n-seed$seed --method multilora --n_blocks $n --seed $seed
    done
    run multilora-vector-seed$seed --method multilora --scaling vector --seed $seed
    run autolora-first-order-seed$seed $AUTO --hypergrad first-order --seed $seed
done
for lr in 5e-3 2e-2; do                     # learning rates
    run lora-lr$lr --lr $lr
    run autolora-lr$lr $AUTO --lr $lr
done
for lr in 5e-4 2e-3 4e-3; do run full-lr$lr --method full --lr $lr; done
for lr in 1e-2 4e-2 8e-2; do run multilora-lr$lr --method multilora --lr $lr; done
for lr in 3e-3 1e-1; do run autolora-beta_lr$lr $AUTO --beta_lr $lr; done
finish
python experiments/collect.py $DIR $RESULTS/nano_runs.csv

report nano_methods $DIR/{full,lora,multilora,autolora}-seed?.pt \
    --study spectrum amplification directions intruders ranks
report nano_subspaces $DIR/lora-qv-r8-seed?.pt $DIR/lora-qv-r64-seed?.pt \
    --study amplification subspace directions
if [ $RESULTS = experiments/results ]; then
    FIGURES=experiments/figures
    cp $DIR/nano_methods/{spectrum,histogram,amplification,directions,intruders,curves}.png $FIGURES
    cp $DIR/nano_methods/ranks-autolora-seed0.png $FIGURES
    for rank in r8 r64; do
        cp $DIR/nano_subspaces/subspace-lora-qv-$rank-seed0-lora-qv-r64-seed1.png $FIGURES
    done
    python experiments/figures.py
    python experiments/tables.py
fi
