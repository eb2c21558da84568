#!/usr/bin/env bash
# Each method's learning rate on the built-in mixture, then the default one with three seeds.
# A quarter of an hour on two cores; goes on where it stopped. Results: experiments/results/nano.json
DIR=out/nano; source "$(dirname "$0")/run.sh"
for seed in 0 1 2; do
    run "lora-seed$seed" --method lora --seed $seed
    run "full-seed$seed" --method full --seed $seed
done
for lr in 5e-3 2e-2; do run "lora-lr$lr" --method lora --lr $lr; done
for lr in 5e-4 2e-3; do run "full-lr$lr" --method full --lr $lr; done
collect experiments/results/nano.json
