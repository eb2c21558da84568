#!/usr/bin/env bash
# Real text, with the released vocabulary and with bytes. Fifty minutes on two cores; goes on where it stopped.
#   SHARED=folder with text/novels.txt.xz, data/{e2e,gsm8k,boolq,rte}/*.jsonl and tiktoken/   experiments/e2e.sh
# A small GPT-2 is pretrained on novels (small), then MultiLoRA teaches it E2E, GSM8K, BoolQ and RTE together
# (multi-small), and AutoLoRA and LoRA E2E, slots to restaurant descriptions (auto-small, lora-small). LoRA again after
# it has also read the descriptions of half of E2E, without their slots (read), with the other half to learn from
# (lora-read). And nano, byte by byte, on all of E2E (lora-nano, full-nano).
# Results: experiments/results/e2e.json
SHARED=$(realpath "${SHARED:-../shared}")
export TIKTOKEN_CACHE_DIR=${TIKTOKEN_CACHE_DIR:-$SHARED/tiktoken}
DIR=out/e2e JOBS=${JOBS:-1}; source "$(dirname "$0")/run.sh"
run small --method full --scratch --model gpt2 --n_layer 4 --n_head 4 --n_embd 192 --block_size 128 \
    --data "$SHARED/text/novels.txt.xz" --steps 500 --batch_size 16 --lr 2e-3 --eval_rows 50 --eval_every 100
finish
run multi-small --method multilora --model $DIR/small.pt --data "$SHARED"/data/{e2e,gsm8k,boolq,rte} \
    --steps 100 --batch_size 16 --eval_rows 50
run auto-small --method autolora --model $DIR/small.pt --data "$SHARED/data/e2e" --search_steps 30 --beta_lr 0.03 \
    --steps 100 --batch_size 16
run lora-small --model $DIR/small.pt --data "$SHARED/data/e2e" --steps 300 --batch_size 32
run lora-nano --data "$SHARED/data/e2e" --steps 300 --batch_size 32
run full-nano --method full --data "$SHARED/data/e2e" --steps 1500 --batch_size 16 --lr 2e-3 --eval_every 500
mkdir -p $DIR/half
cp -f "$SHARED/data/e2e/valid.jsonl" $DIR/half/
python - "$SHARED/data/e2e/train.jsonl" $DIR <<'PYTHON'
import json, sys
lines = open(sys.argv[1]).readlines()
half = len(lines) // 2
open(f"{sys.argv[2]}/descriptions.txt", "w").write("<|endoftext|>".join(json.loads(t)["completion"] for t in lines[:half]))
open(f"{sys.argv[2]}/half/train.jsonl", "w").writelines(lines[half:])
PYTHON
run read --method full --model $DIR/small.pt --data "$SHARED/text/novels.txt.xz" $DIR/descriptions.txt \
    --steps 250 --batch_size 16 --lr 2e-3 --eval_rows 50 --eval_every 100
finish
run lora-read --model $DIR/read.pt --data $DIR/half --steps 200 --batch_size 32
finish
collect experiments/results/e2e.json
