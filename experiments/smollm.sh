#!/usr/bin/env bash
# The three papers on a pretrained language model: SmolLM2-135M on E2E and on the built-in mixture.
#
#     experiments/smollm.sh [--quick] [--shared FOLDER] [PART ...]
#
# The parts are sweep, subspaces, methods, targets, mixture_sweep and figures; the default is all
# of them, in this order. Two runs at a time, one thread each; an interrupted script continues
# where it stopped. --quick runs everything with tiny sizes, to see whether it works.
#
# FOLDER (../shared) contains data/e2e/{train,valid,test}.jsonl and text/novels.txt.xz. The script
# needs transformers, gguf, sacrebleu and the wheel that smollm.py names.
cd "$(dirname "$0")/.."
DIR=out/smollm JOBS=${JOBS:-2} TEXTS=200 SHARED=../shared
E2E_FLAGS="--batch_size 8 --eval_rows 16 --eval_every 50 --dtype bf16"
MIXTURE_FLAGS="--data mixture --batch_size 32 --eval_rows 20 --eval_every 100 --dtype bf16"
STEPS="--steps 150" SWEEP_STEPS="--steps 60 --eval_rows 32" MIXTURE_STEPS="--steps 100"
SEARCH="--search_steps 50"
SIX="0 1 2 3 4 5" FOUR="0 1 2 3" TEN="0 1 2 3 4 5 6 7 8 9" SWEEP_SEEDS="100"
if [ "${1:-}" = --quick ]; then
    shift
    DIR=out/smollm-quick RESULTS=out/smollm-quick TEXTS=2
    E2E_FLAGS="--batch_size 4 --eval_rows 2 --dtype bf16"
    MIXTURE_FLAGS="--data mixture --batch_size 10 --eval_rows 2 --dtype bf16"
    STEPS="--steps 1" SWEEP_STEPS="--steps 1" MIXTURE_STEPS="--steps 1" SEARCH="--search_steps 1"
    SIX="0 1" FOUR="0 1" TEN="0 1"
fi
if [ "${1:-}" = --shared ]; then
    SHARED=$2
    shift 2
fi
SMOLLM="python experiments/smollm.py"
TRAIN="$SMOLLM train" ANALYZE="$SMOLLM analyze"
source experiments/run.sh
E2E=$SHARED/data/e2e NOVELS=$DIR/novels.txt
LORA="--lr 4e-3" MULTI="--method multilora --lr 3.2e-2" FULL="--method full --lr 2e-4"
AUTO="--method autolora $SEARCH --lr 4e-3"
[ -f $NOVELS ] || xz -dc "$SHARED/text/novels.txt.xz" | tail -c 4000000 > $NOVELS

score() {                                   # score NAME PROMPTS: e2e.py on $DIR/NAME.pt, greedily
    background $DIR/$1-score.json $1-score $SMOLLM score $DIR/$1.pt --data $E2E --text $NOVELS \
        --greedy --prompts $2
}

beam() {                                    # beam NAME PROMPTS: the same by beam search
    background $DIR/$1-beam.json $1-beam $SMOLLM score $DIR/$1.pt --data $E2E --prompts $2
}

measure() {                                 # measure NAME: measure.py on $DIR/NAME.pt
    background $DIR/$1-test.json $1-test $SMOLLM measure $DIR/$1.pt --text $NOVELS
}

background() {                              # background RESULT NAME command ...
    if [ ! -f $1 ]; then
        while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
        echo "$(date +%T) $2"
        started+=("$2")
        { "${@:3}" >>$DIR/$2.log 2>&1 && touch $DIR/$2.done; } &
    fi
}

sweep() {                                   # learning rates on E2E
    FLAGS="$E2E_FLAGS $SWEEP_STEPS --data $E2E"
    for lr in 5e-4 1e-3 2e-3 4e-3 8e-3; do run sweep-lora-lr$lr --lr $lr; done
    for lr in 5e-4 1e-3 2e-3 4e-3 8e-3 1.6e-2 3.2e-2 6.4e-2; do
        run sweep-multilora-lr$lr --method multilora --lr $lr
    done
    for lr in 5e-5 1e-4 2e-4 4e-4 8e-4; do run sweep-full-lr$lr --method full --lr $lr; done
    for lr in 2e-3 4e-3; do run sweep-autolora-lr$lr $AUTO --lr $lr; done
    finish
}

subspaces() {                               # figures 3 and 4
    FLAGS="$E2E_FLAGS $STEPS --data $E2E"
    for seed in $FOUR; do
        for rank in 4 64 1; do
            run lora-qv-r$rank-seed$seed $LORA --targets q_proj v_proj --rank $rank --seed $seed
        done
    done
    finish
    for seed in $FOUR; do
        for rank in 1 4 64; do score lora-qv-r$rank-seed$seed 0; done
    done
    finish
}

methods() {                                 # rank 16 on all seven; rank 8 as AutoLoRA's control
    FLAGS="$E2E_FLAGS $STEPS --data $E2E"
    for seed in ${SEEDS:-$SIX}; do
        run lora-seed$seed $LORA --seed $seed
        run multilora-seed$seed $MULTI --seed $seed
        run full-seed$seed $FULL --seed $seed
        run autolora-seed$seed $AUTO --seed $seed
        run lora-all-r8-seed$seed $LORA --rank 8 --seed $seed
    done
    finish
    for seed in ${SEEDS:-$SIX}; do
        for method in lora multilora full autolora; do
            score $method-seed$seed $TEXTS
            beam $method-seed$seed $TEXTS
        done
        score lora-all-r8-seed$seed 0
    done
    finish
}

targets() {                                 # attention or MLP, with the same number of parameters
    FLAGS="$E2E_FLAGS $STEPS --data $E2E"
    for seed in ${SEEDS:-$FOUR}; do
        run lora-all-r1-seed$seed $LORA --rank 1 --seed $seed
        run lora-attention-seed$seed $LORA --targets {q,k,v,o}_proj --rank 33 --seed $seed
        run lora-mlp-seed$seed $LORA --targets {gate,up,down}_proj --rank 20 --seed $seed
    done
    finish
    for seed in ${SEEDS:-$FOUR}; do
        for name in all-r1 attention mlp; do score lora-$name-seed$seed 0; done
    done
    finish
}

mixture_sweep() {                           # learning rates on the mixture, on seeds of their own
    FLAGS="$MIXTURE_FLAGS $MIXTURE_STEPS"
    for seed in $SWEEP_SEEDS; do
        for lr in 2e-3 4e-3 1e-3 8e-3; do
            run sweep-mixture-lora-lr$lr-seed$seed --lr $lr --seed $seed
        done
        for lr in 1.6e-2 3.2e-2 8e-3; do
            run sweep-mixture-multilora-lr$lr-seed$seed --method multilora --lr $lr --seed $seed
        done
        for lr in 2e-4 4e-4 1e-4; do
            run sweep-mixture-full-lr$lr-seed$seed --method full --lr $lr --seed $seed
        done
        for lr in 2e-3 4e-3 8e-3; do
            run sweep-mixture-autolora-lr$lr-seed$seed $AUTO --lr $lr --seed $seed
        done
    done
    finish
}

figures() {                                 # the studies, and the tables of the page
    $SMOLLM score $DIR/lora-seed0.pt --untrained --greedy --data $E2E --text $NOVELS \
        --prompts $TEXTS
    report smollm_methods $DIR/{full,lora,multilora,autolora}-seed?.pt \
        --study spectrum amplification directions intruders ranks
    report smollm_subspaces $DIR/lora-qv-r4-seed?.pt $DIR/lora-qv-r64-seed?.pt \
        --study amplification subspace directions
    if [ $RESULTS = experiments/results ]; then
        for figure in spectrum histogram amplification directions intruders ranks-autolora-seed0; do
            cp $DIR/smollm_methods/$figure.png experiments/figures/smollm-$figure.png
        done
        for pair in r4-seed0-lora-qv-r64-seed1 r64-seed0-lora-qv-r64-seed1; do
            cp $DIR/smollm_subspaces/subspace-lora-qv-$pair.png \
                experiments/figures/smollm-subspace-$pair.png
        done
        python experiments/tables.py
    fi
}

for part in ${*:-sweep subspaces methods targets mixture_sweep figures}; do $part; done
python experiments/collect.py $DIR $RESULTS/smollm_runs.csv --samples $RESULTS/smollm_samples.json
