#!/usr/bin/env bash
# The whole study for one encoder, every stage in turn; what is finished is skipped, so kill it and start it again at will.
#
#   bash run_all.sh                                   # tiny: offline, generated images, minutes on two CPU cores
#   bash run_all.sh vit_b16_dino                      # the paper's eight tasks at 224 pixels (a GPU is advisable)
#   bash run_all.sh vit_b16_dino --everything         # also recipe full (for CLIP zeroshot too) and subsets of the tasks
#   bash run_all.sh vit_b16_dino --attention          # also recipes attention*, linearized, and the tests of arXiv:2407.07089
#   bash run_all.sh timm:NAME --weights FILE --data DIR --tasks a,b,c --image-size 128 --steps 300
set -euo pipefail
cd "$(dirname "$0")"

if [ "${1-}" = --help ] || [ "${1-}" = -h ]; then sed -n '2,/^set /{/^#/p}' run_all.sh; exit; fi
encoder=tiny
if [ $# -gt 0 ] && [[ $1 != -* ]]; then encoder=$1; shift; fi

# every stage takes the shared flags; the rest go to the stage they belong to
words=()
for word in "$@"; do
  if [[ $word == --*=* ]]; then words+=("${word%%=*}" "${word#*=}"); else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}
shared=() report=() pretrain=() probe=() finetune=() merge=() disentangle=() subsets=() aligned=() everything=no attention=no metric=prediction
while [ $# -gt 0 ]; do
  case $1 in
    --everything | --attention | --overwrite) ;;
    *) if [ $# -lt 2 ]; then echo "run_all.sh: $1 needs a value" >&2; exit 2; fi ;;
  esac
  case $1 in
    --everything) everything=yes; shift; continue ;;
    --attention) attention=yes; shift; continue ;;
    --overwrite) shared+=("$1"); shift; continue ;;
    --pretrain-steps) pretrain+=("$1" "$2") ;;
    --probe-steps | --probe-lr) probe+=("$1" "$2") ;;
    --steps | --lr | --batch-size | --save-minutes) finetune+=("$1" "$2") ;;
    --lambdas | --lambda-max) merge+=("$1" "$2") ;;
    --subsets | --images-per-task) subsets+=("$1" "$2") ;;
    --pairs | --points | --limit | --samples) disentangle+=("$1" "$2") ;;
    --runs) shared+=("$1" "$2"); report+=("$1" "$2") ;;
    *) shared+=("$1" "$2") ;;
  esac
  shift 2
done

source tests/setup.sh
recipes=(aligned)
if [ $everything = yes ]; then
  recipes+=(full)
  case $encoder in open_clip:* | vit_*_clip_*) recipes+=(zeroshot zeroshot-full) ;; esac
  subsets=(--subsets 5 ${subsets[@]+"${subsets[@]}"})
fi
if [ $attention = yes ]; then recipes+=(attention attention-bias attention-mlp attention-mlp-bias linearized) metric=both; fi
if [ "$encoder" = tiny ]; then  # sized for two CPU cores; what is given on the command line comes later and wins
  finetune=(--steps 120 --batch-size 64 ${finetune[@]+"${finetune[@]}"})
  aligned=(--lr 5e-4)  # saves the default study a search; the other recipes make theirs
  disentangle=(--points 13 --samples 128 ${disentangle[@]+"${disentangle[@]}"})
  if [ ${#subsets[@]} -gt 0 ]; then subsets=(--images-per-task 60 "${subsets[@]}"); fi
  python pretrain.py tiny ${shared[@]+"${shared[@]}"} ${pretrain[@]+"${pretrain[@]}"}
fi
python probe.py "$encoder" ${shared[@]+"${shared[@]}"} ${probe[@]+"${probe[@]}"}
for recipe in "${recipes[@]}"; do
  stage=("$encoder" --recipe "$recipe" ${shared[@]+"${shared[@]}"})
  given=(); if [ "$recipe" = aligned ]; then given=(${aligned[@]+"${aligned[@]}"}); fi
  python finetune.py "${stage[@]}" ${given[@]+"${given[@]}"} ${finetune[@]+"${finetune[@]}"}
  python make_vectors.py "${stage[@]}"
  python merge_eval.py "${stage[@]}" ${merge[@]+"${merge[@]}"}
  python disentangle.py "${stage[@]}" ${disentangle[@]+"${disentangle[@]}"} --metric $metric
  if [ $attention = yes ] && [ "$recipe" != linearized ]; then python posthoc.py "${stage[@]}"; fi
  if [ ${#subsets[@]} -gt 0 ]; then python merge_eval.py "${stage[@]}" ${merge[@]+"${merge[@]}"} "${subsets[@]}"; fi
done
python report.py ${report[@]+"${report[@]}"}
