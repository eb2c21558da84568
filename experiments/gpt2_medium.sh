#!/usr/bin/env bash
# The LoRA paper's run of GPT-2 medium on E2E, and its studies, for one GPU. It has not been run at
# this size yet.
#
#     experiments/gpt2_medium.sh [--offline] [PART ...]
#
# The parts are
#
#     data         download E2E and the adapter that the LoRA authors trained
#     paper        LoRA of rank 4 on q and v, with the settings of the paper's table 11
#     subspaces    rank 8 and rank 64 with two seeds each, for the paper's figures 3 and 4
#     methods      full fine-tuning, MultiLoRA and AutoLoRA
#     score        BLEU and the other scores of every run, by beam search
#     analyze      tables and figures
#     bench        time and memory, compared with peft and loralib
#
# and the default is all of them, in this order. An interrupted script continues where it stopped.
# Checkpoints go to out/medium; tables go to experiments/results/medium_*.txt and bench_cuda.json,
# figures to experiments/figures/medium_*. STEPS=5258 (one epoch instead of five) shortens every run
# of a new out/medium. The learning rates of full fine-tuning, MultiLoRA and AutoLoRA are not tuned.
#
# TINY=1 rehearses every part on a CPU in minutes, without a network, with a random model of two
# layers and invented data; everything goes to out/medium-tiny.
#
# --offline needs no network, either: part `pretrain`, after `data`, pretrains a model of GPT-2
# medium's shape on a text in place of the released weights. The folder SHARED (default ../shared)
# contains text/novels.txt.xz, data/e2e/*.jsonl and GPT-2's vocabulary in tiktoken/. Results are
# called medium_offline_*.
set -euo pipefail
cd "$(dirname "$0")/.."
OFFLINE= STUDY=medium PARTS="data paper subspaces methods score analyze bench"
if [ "${1:-}" = --offline ]; then
    shift
    OFFLINE=1 STUDY=medium_offline PARTS="data pretrain paper subspaces methods score analyze bench"
fi
DIR=out/$STUDY RESULTS=experiments/results FIGURES=experiments/figures MODEL=gpt2-medium
STEPS=${STEPS:-26290} SEARCH_STEPS=2000 EVALUATION="--eval_rows 400 --eval_every 1000" SCORE=
PRETRAINING="--model gpt2-medium --steps 1600 --batch_size 64 --block_size 512 --eval_every 400"
LINES_OF_TEXT=p
BENCH="--n_layer 24 --n_embd 1024 --vocab_size 50257 --batch 8 512 --latency 1x128 16x256 32x512"
if [ "${TINY:-}" ]; then
    DIR=out/$STUDY-tiny RESULTS=$DIR/results FIGURES=$DIR/figures MODEL=$DIR/data/base.pt
    STEPS=3 SEARCH_STEPS=2 EVALUATION="--eval_rows 2 --eval_every 2" SCORE="--prompts 3"
    PRETRAINING="--model tiny --steps 3 --batch_size 4 --block_size 512 --eval_rows 2"
    LINES_OF_TEXT=1,4000p
    BENCH="--n_layer 2 --n_embd 64 --vocab_size 500 --batch 2 32 --latency 1x16
        --rounds 3 --out $DIR/results/bench.json"
fi
E2E=$DIR/data/e2e ADAPTER=$DIR/data/gpt2_md_lora_e2e.pt TEXT=$DIR/data/novels.txt.xz
if [ $OFFLINE ]; then
    SHARED=${SHARED:-../shared}
    E2E=$SHARED/data/e2e MODEL=$DIR/base.pt
    export TIKTOKEN_CACHE_DIR=$SHARED/tiktoken
fi
mkdir -p $DIR/data $RESULTS $FIGURES
FLAGS="--model $MODEL --data $E2E --steps $STEPS --batch_size 8 --warmup 0.019
    --label_smoothing 0.1 --dropout 0.1 $EVALUATION"
LORA="--targets q v --alpha 32 --lr 2e-4"
RUNS="e2e lora-r8-seed0 lora-r8-seed1 lora-r64-seed0 lora-r64-seed1 multilora autolora full"

run() {                                     # run NAME FLAGS: make, or complete, $DIR/NAME.pt
    local checkpoint=$DIR/$1.pt
    if [ -f $DIR/$1.done ]; then return; fi
    echo "$(date +%T) $1"
    if [ -s $checkpoint ]; then
        python train.py --resume $checkpoint
    else
        rm -f $checkpoint
        python train.py "${@:2}" --out $checkpoint
    fi
    touch $DIR/$1.done
}

report() {                                  # report NAME CHECKPOINTS: analyze.py's tables, figures
    python analyze.py "${@:2}" --out $DIR/$1 | tee $RESULTS/$1.txt
    for figure in $DIR/$1/*.png; do cp $figure $FIGURES/$1-$(basename $figure); done
}

data() {
    if [ $OFFLINE ]; then
        xz -dc $SHARED/text/novels.txt.xz | sed -n $LINES_OF_TEXT | xz -1 >$TEXT
    elif [ "${TINY:-}" ]; then
        python experiments/rehearsal.py $DIR/data
        python experiments/e2e.py get $E2E --from $DIR/data
    else
        [ -f $E2E/test.jsonl ] || python experiments/e2e.py get $E2E
        [ -f $ADAPTER ] || python experiments/e2e.py get $ADAPTER
    fi
}

pretrain() {
    run base --method full --scratch $PRETRAINING --data $TEXT --lr 6e-4 --beta2 0.95 \
        --weight_decay 0.1
}

paper() {
    run e2e $FLAGS $LORA --rank 4
}

subspaces() {
    for seed in 0 1; do
        run lora-r8-seed$seed $FLAGS $LORA --rank 8 --seed $seed
        run lora-r64-seed$seed $FLAGS $LORA --rank 64 --seed $seed
    done
}

methods() {                                 # of rank 8, like lora-r8
    run multilora $FLAGS --method multilora --targets q v --rank 8 --n_blocks 4 --lr 4e-4
    run autolora $FLAGS --method autolora $LORA --rank 8 --search_steps $SEARCH_STEPS
    run full ${FLAGS/--dropout 0.1/} --method full --lr 5e-5    # --dropout is that of adapters
}

score() {
    for name in $RUNS; do
        if [ -f $DIR/$name.done ] && [ ! -f $DIR/$name-beam.json ]; then
            python experiments/e2e.py score $DIR/$name.pt --data $E2E $SCORE
        fi
    done
    if [ ! $OFFLINE ] && [ ! -f ${ADAPTER%.pt}-beam.json ]; then
        python experiments/e2e.py score $ADAPTER --alpha 32 --base $MODEL --data $E2E $SCORE
    fi
}

analyze() {
    if [ ! $OFFLINE ]; then
        report ${STUDY}_paper $DIR/e2e.pt $ADAPTER --alpha 32 --base $MODEL
    fi
    report ${STUDY}_subspaces $DIR/lora-r8-seed?.pt $DIR/lora-r64-seed?.pt \
        --study amplification subspace directions
    report ${STUDY}_methods $DIR/{full,lora-r8-seed0,multilora,autolora}.pt \
        --study spectrum amplification directions intruders ranks
}

bench() {
    python experiments/bench.py $BENCH
}

for part in ${*:-$PARTS}; do
    if [[ " $PARTS " != *" $part "* ]]; then
        sed -n '2,/^cd/s/^# \{0,1\}//p' "$0"
        exit 2
    fi
    $part
done
