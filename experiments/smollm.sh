#!/usr/bin/env bash
# The three papers on a language model and real text: SmolLM2-135M on E2E, and on five tasks.
#
#     experiments/smollm.sh [--quick] [FOLDER]    # five hours on two cores, two runs at a time; goes
#                                                 # on where it stopped; --quick: all of it in small
#
# FOLDER (../shared if not said) has data/{e2e,cola,wic,rte,copa}/*.jsonl and text/novels.txt.xz.
# Needs transformers, gguf, sacrebleu and the wheel that smollm.py names.
cd "$(dirname "$0")/.."
DIR=out/smollm JOBS=2 TEXTS=200
COMMON="--batch_size 8 --eval_rows 16 --eval_every 50 --dtype bf16"
STEPS="--steps 150" SHORT="--steps 60 --eval_rows 32" SEARCH="--search_steps 50"
MIXED="--steps 100 --grad_accum 2 --eval_rows 50 --eval_every 100"  # parts of one length: sooner
if [ "${1:-}" = --quick ]; then
    shift
    DIR=out/smollm-quick RESULTS=out/smollm-quick TEXTS=2
    COMMON="--batch_size 4 --eval_rows 2 --dtype bf16"
    STEPS="--steps 1" SHORT="--steps 1" SEARCH="--search_steps 1"
    MIXED="--grad_accum 2"
fi
SMOLLM="python experiments/smollm.py"
TRAIN="$SMOLLM train" ANALYZE="$SMOLLM analyze"
source experiments/run.sh
SHARED=${1:-../shared}
E2E=$SHARED/data/e2e NOVELS=$DIR/novels.txt
LORA="--lr 4e-3" MULTI="--method multilora --lr 3.2e-2" FULL="--method full --lr 2e-4"  # the sweep's
AUTO="--method autolora $SEARCH --lr 4e-3"
$SMOLLM check $E2E
[ -f $NOVELS ] || xz -dc "$SHARED/text/novels.txt.xz" | tail -c 4000000 > $NOVELS

score() {                                   # as `run`, for score.py: score NAME PROMPTS
    if [ ! -f $DIR/$1-score.json ]; then
        while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
        echo "$(date +%T) scores of $1"
        started+=("$1-score")
        { $SMOLLM score $DIR/$1.pt --data $E2E --text $NOVELS --prompts $2 \
            >>$DIR/$1-score.log 2>&1 && touch $DIR/$1-score.done; } &
    fi
}

FLAGS="$COMMON $SHORT --data $E2E"          # learning rates
for lr in 5e-4 1e-3 2e-3 4e-3 8e-3; do run sweep-lora-lr$lr --lr $lr; done
for lr in 5e-4 1e-3 2e-3 4e-3 8e-3 1.6e-2 3.2e-2 6.4e-2; do
    run sweep-multilora-lr$lr --method multilora --lr $lr
done
for lr in 5e-5 1e-4 2e-4 4e-4 8e-4; do run sweep-full-lr$lr --method full --lr $lr; done
for lr in 2e-3 4e-3; do run sweep-autolora-lr$lr $AUTO --lr $lr; done
finish
FLAGS="$COMMON $STEPS --data $E2E"          # the methods, rank 16 on all seven
for seed in 0 1 2; do
    run lora-seed$seed $LORA --seed $seed
    run multilora-seed$seed $MULTI --seed $seed
    run full-seed$seed $FULL --seed $seed
    run autolora-seed$seed $AUTO --seed $seed
done
finish
for seed in 0 1 2; do                       # BLEU, and what was forgotten
    for method in lora multilora full autolora; do score $method-seed$seed $TEXTS; done
done
FIVE=$(echo $SHARED/data/{e2e,cola,wic,rte,copa})
FLAGS="$COMMON $STEPS $MIXED --batch_size 10 --data $FIVE"
for seed in 0 1 2; do                       # a mixture
    run lora-mixture-seed$seed $LORA --seed $seed
    run multilora-mixture-seed$seed $MULTI --seed $seed
done
FLAGS="$COMMON $STEPS --data $E2E"
for seed in 0 1; do                         # LoRA's rank; attention or MLP, of as many parameters
    for rank in 1 4 16 64; do
        run lora-qv-r$rank-seed$seed $LORA --targets q_proj v_proj --rank $rank --seed $seed
    done
    run lora-all-r1-seed$seed $LORA --rank 1 --seed $seed
    run lora-attention-seed$seed $LORA --targets {q,k,v,o}_proj --rank 33 --seed $seed
    run lora-mlp-seed$seed $LORA --targets {gate,up,down}_proj --rank 20 --seed $seed
done
finish
for seed in 0 1; do
    for name in qv-r1 qv-r4 qv-r16 qv-r64 all-r1 attention mlp; do score lora-$name-seed$seed 0; done
done
finish
$SMOLLM score $DIR/lora-seed0.pt --untrained --data $E2E --text $NOVELS --prompts $TEXTS
python experiments/collect.py $DIR $RESULTS/smollm_runs.csv --samples $RESULTS/smollm_samples.json

report smollm_methods $DIR/{full,lora,multilora,autolora}-seed?.pt \
    --study spectrum amplification directions intruders ranks
report smollm_subspaces $DIR/lora-qv-r4-seed?.pt $DIR/lora-qv-r64-seed?.pt \
    --study amplification subspace directions
if [ $RESULTS = experiments/results ]; then
    FIGURES=experiments/figures
    for figure in spectrum histogram amplification directions intruders ranks-autolora-seed0; do
        cp $DIR/smollm_methods/$figure.png $FIGURES/smollm-$figure.png
    done
    for pair in r4-seed0-lora-qv-r64-seed1 r64-seed0-lora-qv-r64-seed1; do
        cp $DIR/smollm_subspaces/subspace-lora-qv-$pair.png $FIGURES/smollm-subspace-$pair.png
    done
    python experiments/tables.py
fi
