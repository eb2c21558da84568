#!/usr/bin/env bash
# Real text, with the released vocabulary and with bytes. About an hour on two cores; goes on where
# it stopped.
#
#     SHARED=../shared experiments/e2e.sh
#
# SHARED is a folder with text/novels.txt.xz, data/{e2e,gsm8k,boolq,rte}/*.jsonl and tiktoken/.
#
# A small GPT-2 is pretrained on novels (A), and then reads the descriptions of half of E2E as well,
# without their slots (B). From the other half each method teaches B, and LoRA also A, to describe a
# restaurant from its slots. MultiLoRA on B learns that together with GSM8K, BoolQ and RTE; and nano,
# byte by byte, all of E2E.
cd "$(dirname "$0")/.."
DIR=out/e2e
JOBS=${JOBS:-1}
SHARED=$(realpath "${SHARED:-../shared}")
export TIKTOKEN_CACHE_DIR=${TIKTOKEN_CACHE_DIR:-$SHARED/tiktoken}
source experiments/run.sh

START=$DIR/start HALF=$DIR/start/e2e
[ -d $START ] || python experiments/prepare.py "$SHARED/data/e2e" $START
NOVELS="$SHARED/text/novels.txt.xz"
FLAGS="--method full --batch_size 16 --lr 2e-3 --eval_rows 50 --eval_every 100"
run A --model $START/random.pt --data "$NOVELS" --steps 500
finish
run B --model $DIR/A.pt --data "$NOVELS" $START/descriptions.txt --steps 250
finish

FLAGS="--steps 200 --batch_size 32"
for method in lora multilora full; do
    run $method-B --method $method --model $DIR/B.pt --data $HALF
done
run autolora-B --method autolora --model $DIR/B.pt --data $HALF --search_steps 40
run lora-A --model $DIR/A.pt --data $HALF
run four-B --method multilora --model $DIR/B.pt --data $HALF "$SHARED"/data/{gsm8k,boolq,rte} \
    --steps 100
run lora-nano --data "$SHARED/data/e2e" --steps 300
run full-nano --method full --data "$SHARED/data/e2e" --steps 1500 --batch_size 16 --lr 2e-3 \
    --eval_every 500
finish
python experiments/collect.py $DIR $RESULTS/e2e_runs.csv --samples $RESULTS/e2e_samples.json
