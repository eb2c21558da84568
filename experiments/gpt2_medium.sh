#!/usr/bin/env bash
# The studies on GPT-2 medium, for one GPU with torch, numpy, tiktoken and matplotlib (and peft, transformers and
# loralib for the benchmark) and no network, in parts of at most ten minutes, each safe to repeat:
#
#     experiments/gpt2_medium.sh data         # anywhere: text to tokens, and the tasks, into out/medium/data
#     experiments/gpt2_medium.sh pretrain     # a model of GPT-2 medium's shape, from scratch on the novels
#     experiments/gpt2_medium.sh adapt        # full fine-tuning, LoRA, MultiLoRA and AutoLoRA on four tasks together
#     experiments/gpt2_medium.sh analyze      # tables and figures
#     experiments/gpt2_medium.sh bench        # time and memory, against peft and loralib
#
# SHARED is a folder with text/novels.txt.xz, data/{e2e,gsm8k,boolq,rte}/*.jsonl and tiktoken/ (default ../shared).
# With the network, MODEL=gpt2-medium takes OpenAI's weights in the place of `pretrain`. TINY=1 rehearses every part
# on a CPU in minutes. Results: experiments/results/medium_*.json, bench_cuda.json
cd "$(dirname "$0")/.."
DIR=out/medium FLAGS="--compile" JOBS=1
PRETRAIN="--n_layer 24 --steps 1600 --batch_size 64 --block_size 512 --eval_every 400"
ADAPT="--steps 400 --batch_size 16 --block_size 512 --eval_rows 32 --eval_every 400"
SEARCH="--search_steps 100" SIZE="--n_layer 24 --n_embd 1024 --vocab_size 50257 --batch 8 512 --latency 1x128 16x256 32x512"
if [ "${TINY:-}" ]; then
    DIR=out/medium-tiny RESULTS=out/medium-tiny FLAGS="" SEARCH="--search_steps 2"
    PRETRAIN="--n_layer 2 --n_embd 64 --n_head 2 --steps 3 --batch_size 4 --block_size 512 --eval_rows 2"
    ADAPT="--steps 3 --batch_size 4 --eval_rows 2"
    SIZE="--n_layer 2 --n_embd 64 --vocab_size 500 --batch 2 32 --latency 1x16 --generate 8 8 --rounds 3 --out $DIR/bench.json"
fi
source experiments/run.sh
export TIKTOKEN_CACHE_DIR=$DIR/data/tiktoken
MODEL=${MODEL:-$DIR/base.pt}
TASKS=$(echo $DIR/data/{e2e,gsm8k,boolq,rte})

case "${1:-}" in
data)
    mkdir -p $DIR/data
    cp -rf "${SHARED:=../shared}"/data/{e2e,gsm8k,boolq,rte} "$SHARED/tiktoken" $DIR/data/
    chmod -R u+w $DIR/data
    [ -f $DIR/data/novels.npy ] || python - "$SHARED/text/novels.txt.xz" $DIR/data/novels.npy "${TINY:-}" <<'PYTHON'
import lzma, sys
import numpy as np
import data
with lzma.open(sys.argv[1], "rt", encoding="utf-8") as f:
    text = f.read(200_000) if sys.argv[3] else f.read()
tok = data.tokenizer(50257)
np.save(sys.argv[2], np.concatenate([np.array(tok.encode_ordinary(part) + [tok.eot_token], np.uint16) for part in text.split(data.EOT)]))
PYTHON
    du -sh $DIR/data ;;
pretrain)
    run base --method full --scratch --model gpt2-medium --data $DIR/data/novels.npy $PRETRAIN \
        --lr 6e-4 --beta2 0.95 --weight_decay 0.1 --half ;;
adapt)
    FLAGS="$FLAGS --model $MODEL --data $TASKS $ADAPT"
    run full --method full
    for seed in 0 1; do run lora-qv-r64-seed$seed --targets q v --rank 64 --seed $seed; done
    run lora-qv-r8-seed0 --targets q v --rank 8
    for rank in 8 64; do
        run lora-r$rank --rank $rank
        run multilora-r$rank --method multilora --n_blocks 4 --rank $rank
    done
    run autolora --method autolora --max_rank 8 $SEARCH ;;
analyze)
    collect $RESULTS/medium.json
    report medium_methods $DIR/{full,lora-r64,multilora-r64,autolora}.pt --study spectrum amplification directions intruders ranks
    report medium_rank8 $DIR/{lora-r8,multilora-r8}.pt --study spectrum amplification
    report medium_subspaces $DIR/lora-qv-r8-seed0.pt $DIR/lora-qv-r64-seed0.pt $DIR/lora-qv-r64-seed1.pt \
        --study amplification subspace directions
    for study in medium_methods medium_subspaces; do
        for f in $DIR/$study/*.png; do cp "$f" "$([ "${TINY:-}" ] && echo $DIR || echo experiments/figures)/$study-$(basename "$f")"; done
    done ;;
bench)
    python experiments/bench.py $SIZE ;;
*)
    sed -n '2,/^cd/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
finish
