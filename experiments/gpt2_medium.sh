#!/usr/bin/env bash
# The LoRA paper's run of GPT-2 medium on E2E and its studies, for one GPU with internet access. It
# has not been run at this size yet.
#
#     experiments/gpt2_medium.sh
#
# The script downloads E2E and the LoRA authors' adapter, starts the `medium` runs of runs.csv, and
# compares their time and memory with those of peft and loralib. The runs are LoRA of rank 4 on q
# and v with the hyperparameters of the paper's table 11 (the run `e2e`), rank 8 and rank 64 with
# two seeds each for figures 3 and 4, and MultiLoRA, AutoLoRA and full fine-tuning with untuned
# learning rates. Each is scored by beam search. An interrupted script continues where it stopped.
# Checkpoints are written to out/medium, numbers and tables to experiments/results, and the
# comparison with the authors' adapter to out/medium/side-by-side.
#
# TINY=1 rehearses it on a CPU in minutes, without a network: nano, a few steps, invented rows.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${TINY:-}" ]; then
    DIR=out/medium-rehearsal
    python experiments/e2e.py invent $DIR/data/e2e
    python experiments/runs.py medium --quick --shared $DIR
    python experiments/bench.py --n_layer 2 --n_embd 64 --vocab_size 500 --batch 2 32 \
        --latency 1x16 --rounds 3 --out $DIR/bench.json
    exit
fi
mkdir -p out/medium
ADAPTER=out/medium/gpt2_md_lora_e2e.pt
[ -f data/e2e/test.jsonl ] || python experiments/e2e.py get data/e2e
[ -f $ADAPTER ] || python experiments/e2e.py get $ADAPTER
python experiments/runs.py medium --jobs 1 --shared . --results experiments/results
[ -f ${ADAPTER%.pt}-test.json ] ||
    python experiments/e2e.py score $ADAPTER --alpha 32 --base gpt2-medium --data data/e2e
python analyze.py out/medium/e2e-seed0.pt $ADAPTER --alpha 32 --base gpt2-medium \
    --out out/medium/side-by-side
python experiments/bench.py --n_layer 24 --n_embd 1024 --vocab_size 50257 --batch 8 512 \
    --latency 1x128 16x256 32x512
