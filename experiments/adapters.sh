#!/usr/bin/env bash
# Adapters that others trained: tables, numbers and figures of five of them.
#
#     experiments/adapters.sh [FOLDER]        # a minute on two cores; FOLDER is ../shared if not said
#
# FOLDER/adapters/ has, each in a folder of that name, as their public repositories have them:
#     gpt2-medium-e2e/gpt2_md_lora_e2e.pt             microsoft/LoRA, release "GPT-2"
#     roberta-base-mnli/roberta_base_lora_mnli.bin    microsoft/LoRA, release "RoBERTa-base"
#     gpt2-great, gpt2-tigrinya, gpt2-chat            yoonyerin/be-great,
#                     abrhaleyarefaine1997/gpt2-tigrinya-lora, satyamkurum/my-lora-gpt2-app (peft)
# and FOLDER/gpt2/attention.pt the released GPT-2's W_q, W_k, W_v, W_o, {"h.0.attn.q.weight": ...}.
cd "$(dirname "$0")/.."
DIR=out/adapters
source experiments/run.sh
THEIRS=${1:-../shared}/adapters

report adapters_medium $THEIRS/gpt2-medium-e2e/gpt2_md_lora_e2e.pt --alpha 32
report adapters_roberta $THEIRS/roberta-base-mnli/roberta_base_lora_mnli.bin --alpha 16
report adapters_gpt2 $THEIRS/gpt2-{great,tigrinya,chat} --base ${1:-../shared}/gpt2/attention.pt \
    --layers {0..11}                        # with --layers, every matrix is studied beside its W
python experiments/adapters.py $DIR/adapters_medium experiments/figures/adapters-medium.png
for figure in amplification directions intruders histogram; do
    cp $DIR/adapters_gpt2/$figure.png experiments/figures/adapters-$figure.png
done
