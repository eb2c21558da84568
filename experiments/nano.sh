#!/usr/bin/env bash
# Each method's learning rate on the built-in mixture, then the default one with three seeds; and AutoLoRA's ranks
# against others of as many parameters. Three quarters of an hour on two cores; goes on where it stopped. Results:
# experiments/results/nano.json
DIR=out/nano; source "$(dirname "$0")/run.sh"
for seed in 0 1 2; do
    for method in lora full multilora autolora; do run "$method-seed$seed" --method $method --seed $seed; done
done
for lr in 5e-3 2e-2; do run "lora-lr$lr" --method lora --lr $lr; done
for lr in 5e-4 2e-3; do run "full-lr$lr" --method full --lr $lr; done
for lr in 5e-3 1e-2 4e-2 8e-2; do run "multilora-lr$lr" --method multilora --lr $lr; done
for lr in 5e-3 2e-2; do run "autolora-lr$lr" --method autolora --lr $lr; done
run multilora-vector --method multilora --scaling vector
for beta_lr in 0.01 0.1; do run "autolora-beta_lr$beta_lr" --method autolora --beta_lr $beta_lr; done
for seed in 0 1 2; do
    for kind in uniform random; do
        python experiments/ranks.py "$DIR/autolora-seed$seed.pt" $kind $seed "$DIR/ranks-$kind$seed"
        run "$kind-seed$seed" --ranks "$DIR/ranks-$kind$seed" --seed $seed
    done
done
collect experiments/results/nano.json
