#!/usr/bin/env bash
# Everything the README shows of nano: the runs, then their numbers in experiments/results, figures in
# experiments/figures and the README's tables.
#
#     experiments/nano.sh            # about three hours on two cores; goes on where it stopped
#     experiments/nano.sh --quick    # the same with 20 steps a run, into out/nano-quick: does it all work?
cd "$(dirname "$0")/.."
DIR=out/nano FLAGS="--grad_accum 4"                         # parts of rows of one length: the same, sooner
AUTO="--method autolora"
if [ "${1:-}" = --quick ]; then
    DIR=out/nano-quick RESULTS=out/nano-quick FLAGS="$FLAGS --steps 20 --eval_rows 20" AUTO="$AUTO --search_steps 5"
fi
[ "${1:-}" != --quick ] || rm -rf $DIR
source experiments/run.sh
SEEDS="0 1 2"; MORE="$SEEDS 3 4"                             # more where a verdict hangs on small differences

for seed in $MORE; do                                       # the four methods, all of rank 16
    for method in lora full multilora; do run "$method-seed$seed" --method $method --seed $seed; done
    run "autolora-seed$seed" $AUTO --seed $seed
    run "autolora-beta_lr3e-2-seed$seed" $AUTO --beta_lr 3e-2 --seed $seed
done
finish
for seed in $MORE; do                                       # AutoLoRA's ranks against as many parameters elsewhere
    for found in "" -beta_lr3e-2; do
        for kind in uniform random shuffled; do
            python experiments/ranks.py "$DIR/autolora$found-seed$seed.pt" $kind $seed "$DIR/ranks-$kind$found$seed"
            run "$kind$found-seed$seed" --ranks "$DIR/ranks-$kind$found$seed" --seed $seed
        done
    done
done
for rank in 8 64 1 2 4; do                                  # LoRA's table 6: the rank; and the pair of its figure 3
    for seed in $SEEDS; do run "lora-qv-r$rank-seed$seed" --targets q v --rank $rank --seed $seed; done
done
for task in instruct arith infer; do                        # one task alone: as many steps, as many rows of it
    for method in lora multilora; do
        for seed in $SEEDS; do run "$method-$task-seed$seed" --method $method --data $task --batch_size 13 --grad_accum 1 --seed $seed; done
    done                                                    # LoRA's rate of the mixture is too high for so few rows
    for seed in $SEEDS; do run "lora-$task-lr3e-3-seed$seed" --data $task --batch_size 13 --grad_accum 1 --lr 3e-3 --seed $seed; done
done
for targets in q k v o; do                                  # LoRA's table 5: as many parameters on other targets
    for seed in $SEEDS; do run "lora-$targets-r16-seed$seed" --targets $targets --rank 16 --seed $seed; done
done
for seed in $SEEDS; do run "lora-qkvo-r4-seed$seed" --targets q k v o --rank 4 --seed $seed; done
for rank in 1 2 4 8 64; do                                  # the rank, on all targets
    for seed in $SEEDS; do run "lora-all-r$rank-seed$seed" --rank $rank --seed $seed; done
done
for n in 1 2 8; do                                          # MultiLoRA: how many blocks
    for seed in $MORE; do run "multilora-n$n-seed$seed" --method multilora --n_blocks $n --seed $seed; done
done
for seed in $MORE; do run "autolora-first-order-seed$seed" $AUTO --hypergrad first-order --seed $seed; done
for lr in 5e-3 2e-2; do run "lora-lr$lr" --method lora --lr $lr; done         # each method's learning rate
for lr in 5e-4 2e-3 4e-3; do run "full-lr$lr" --method full --lr $lr; done
for lr in 1e-2 4e-2 8e-2; do run "multilora-lr$lr" --method multilora --lr $lr; done
for lr in 5e-3 2e-2; do run "autolora-lr$lr" $AUTO --lr $lr; done
for lr in 3e-3 1e-1; do run "autolora-beta_lr$lr" $AUTO --beta_lr $lr; done
for seed in $MORE; do run "multilora-vector-seed$seed" --method multilora --scaling vector --seed $seed; done
finish
collect $RESULTS/nano.json

report nano_methods $DIR/{full,lora,multilora,autolora}-seed?.pt --study spectrum amplification directions intruders ranks
report nano_subspaces $DIR/lora-qv-r8-seed?.pt $DIR/lora-qv-r64-seed?.pt \
    --study amplification subspace directions
if [ $RESULTS = experiments/results ]; then
    cp $DIR/nano_methods/{spectrum,histogram,amplification,directions,intruders,curves,ranks-autolora-seed0}.png experiments/figures
    cp $DIR/nano_subspaces/subspace-lora-qv-{r8-seed0-lora-qv-r64-seed1,r64-seed0-lora-qv-r64-seed1}.png experiments/figures
    python experiments/figures.py
    python experiments/tables.py
fi
