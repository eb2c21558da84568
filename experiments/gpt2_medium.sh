#!/usr/bin/env bash
# The studies on GPT-2 medium, for one GPU with torch, numpy, tiktoken and matplotlib (and peft,
# transformers and loralib for the benchmark) and no network, in parts of at most ten minutes, each
# safe to repeat:
#
#     experiments/gpt2_medium.sh data         # the texts and tasks, into out/medium/data
#     experiments/gpt2_medium.sh pretrain     # a model of that shape, from scratch on the novels
#     experiments/gpt2_medium.sh adapt        # each method on four tasks together
#     experiments/gpt2_medium.sh analyze      # tables and figures
#     experiments/gpt2_medium.sh bench        # time and memory, against peft and loralib
#
# SHARED is a folder with text/novels.txt.xz, data/{e2e,gsm8k,boolq,rte}/*.jsonl and tiktoken/
# (default ../shared). With the network, MODEL=gpt2-medium takes OpenAI's weights in the place of
# `pretrain`. TINY=1 rehearses every part on a CPU in minutes. Results go to
# experiments/results/medium_* and bench_cuda.json.
cd "$(dirname "$0")/.."
DIR=out/medium JOBS=1 FIGURES=experiments/figures PART=p
SCRATCH="--scratch --model gpt2-medium --steps 1600 --batch_size 64 --block_size 512
    --eval_every 400 --compile"
ADAPT="--steps 400 --batch_size 16 --block_size 512 --eval_rows 32 --eval_every 400 --compile"
SEARCH="--search_steps 100"
BENCH="--n_layer 24 --n_embd 1024 --vocab_size 50257 --batch 8 512 --latency 1x128 16x256 32x512"
if [ "${TINY:-}" ]; then
    DIR=out/medium-tiny RESULTS=out/medium-tiny FIGURES=out/medium-tiny PART=1,4000p
    SCRATCH="--scratch --model tiny --steps 3 --batch_size 4 --block_size 512 --eval_rows 2"
    ADAPT="--steps 3 --batch_size 4 --eval_rows 2"
    SEARCH="--search_steps 2"
    BENCH="--n_layer 2 --n_embd 64 --vocab_size 500 --batch 2 32 --latency 1x16 --generate 8 8
        --rounds 3 --out $DIR/bench.json"
fi
source experiments/run.sh
NOVELS=$DIR/data/novels.txt.xz
MODEL=${MODEL:-$DIR/base.pt}
export TIKTOKEN_CACHE_DIR=$DIR/data/tiktoken

case "${1:-}" in
data)
    SHARED=${SHARED:-../shared}
    mkdir -p $DIR/data
    cp -rf "$SHARED"/data/{e2e,gsm8k,boolq,rte} "$SHARED/tiktoken" $DIR/data/
    chmod -R u+w $DIR/data
    xz -dc "$SHARED/text/novels.txt.xz" | sed -n $PART | xz -1 > $NOVELS
    du -sh $DIR/data ;;
pretrain)
    run base --method full $SCRATCH --data $NOVELS --lr 6e-4 --beta2 0.95 --weight_decay 0.1 ;;
adapt)
    FLAGS="--model $MODEL --data $(echo $DIR/data/{e2e,gsm8k,boolq,rte}) $ADAPT"
    run full --method full
    for seed in 0 1; do
        run lora-qv-r64-seed$seed --targets q v --rank 64 --seed $seed
    done
    run lora-qv-r8-seed0 --targets q v --rank 8
    for rank in 8 64; do
        run lora-r$rank --rank $rank
        run multilora-r$rank --method multilora --n_blocks 4 --rank $rank
    done
    run autolora --method autolora --rank 8 $SEARCH ;;
analyze)
    python experiments/collect.py $DIR $RESULTS/medium_runs.csv
    report medium_methods $DIR/{full,lora-r64,multilora-r64,autolora}.pt \
        --study spectrum amplification directions intruders ranks
    report medium_rank8 $DIR/{lora-r8,multilora-r8}.pt --study spectrum amplification
    report medium_subspaces $DIR/lora-qv-r8-seed0.pt $DIR/lora-qv-r64-seed{0,1}.pt \
        --study amplification subspace directions
    for figure in $DIR/medium_{methods,subspaces}/*.png; do
        cp $figure $FIGURES/$(basename $(dirname $figure))-$(basename $figure)
    done ;;
bench)
    python experiments/bench.py $BENCH ;;
*)
    sed -n '2,/^cd/s/^# \{0,1\}//p' "$0"
    exit 2 ;;
esac
finish
