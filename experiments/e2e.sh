#!/usr/bin/env bash
# Real text, with the released vocabulary and with bytes. About an hour on two cores; goes on where it stopped.
#   SHARED=folder with text/novels.txt.xz, data/{e2e,gsm8k,boolq,rte}/*.jsonl and tiktoken/   experiments/e2e.sh
# A small GPT-2 is pretrained on novels (A), then reads the descriptions of half of E2E as well, without their slots (B).
# From the other half each method teaches B, and LoRA also A, to describe a restaurant from its slots. MultiLoRA on B
# learns that together with GSM8K, BoolQ and RTE; and nano, byte by byte, all of E2E.
# Results: experiments/results/e2e.json
SHARED=$(realpath "${SHARED:-../shared}")
export TIKTOKEN_CACHE_DIR=${TIKTOKEN_CACHE_DIR:-$SHARED/tiktoken}
DIR=out/e2e JOBS=${JOBS:-1}; source "$(dirname "$0")/run.sh"
HALF=$DIR/half/e2e
mkdir -p $HALF
cp -f "$SHARED/data/e2e/valid.jsonl" $HALF/
python - "$SHARED/data/e2e/train.jsonl" $DIR $HALF <<'PYTHON'
import json, sys
source, out, half = sys.argv[1:]
lines = open(source).readlines()
n = len(lines) // 2
open(f"{out}/descriptions.txt", "w").write("<|endoftext|>".join(json.loads(t)["completion"] for t in lines[:n]))
open(f"{half}/train.jsonl", "w").writelines(lines[n:])
PYTHON
PRETRAIN="--method full --batch_size 16 --lr 2e-3 --eval_rows 50 --eval_every 100"
run A $PRETRAIN --scratch --model gpt2 --n_layer 4 --n_head 4 --n_embd 192 --block_size 128 --steps 500 \
    --data "$SHARED/text/novels.txt.xz"
finish
run B $PRETRAIN --model $DIR/A.pt --steps 250 --data "$SHARED/text/novels.txt.xz" $DIR/descriptions.txt
finish
for method in lora multilora full; do
    run $method-B --method $method --model $DIR/B.pt --data $HALF --steps 200 --batch_size 32
done
run autolora-B --method autolora --model $DIR/B.pt --data $HALF --search_steps 40 --steps 200 --batch_size 32
run lora-A --model $DIR/A.pt --data $HALF --steps 200 --batch_size 32
run four-B --method multilora --model $DIR/B.pt --data $HALF "$SHARED"/data/{gsm8k,boolq,rte} --steps 100 --batch_size 32
run lora-nano --data "$SHARED/data/e2e" --steps 300 --batch_size 32
run full-nano --method full --data "$SHARED/data/e2e" --steps 1500 --batch_size 16 --lr 2e-3 --eval_every 500
finish
collect experiments/results/e2e.json
