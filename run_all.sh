#!/usr/bin/env bash
# The whole study for one encoder, every stage in turn; what is finished is skipped, so kill it and start it again at will.
#
#   bash run_all.sh                                   # tiny: offline, generated images, minutes on two CPU cores
#   bash run_all.sh vit_b16_dino                      # the paper's eight tasks at 224 pixels (a GPU is advisable)
#   bash run_all.sh vit_b16_dino --everything         # also recipe full (for CLIP zeroshot too) and subsets of the tasks
#   bash run_all.sh timm:NAME --weights FILE --data DIR --tasks a,b,c --image-size 128 --steps 300
set -euo pipefail
cd "$(dirname "$0")"
source tests/setup.sh

encoder=tiny
if [ $# -gt 0 ] && [[ $1 != -* ]]; then encoder=$1; shift; fi

# every stage takes the shared flags; the rest go to the stage they belong to
shared=() report=() pretrain=() probe=() finetune=() merge=() disentangle=() subsets=(--subsets 5) everything=no
while [ $# -gt 0 ]; do
  case $1 in
    --everything) everything=yes ;;
    --pretrain-steps) pretrain+=("$1" "${2-}"); shift ;;
    --probe-steps | --probe-lr) probe+=("$1" "${2-}"); shift ;;
    --steps | --lr | --batch-size) finetune+=("$1" "${2-}"); shift ;;
    --lambdas | --lambda-max) merge+=("$1" "${2-}"); shift ;;
    --subsets | --images-per-task) subsets+=("$1" "${2-}"); shift ;;
    --pairs | --points | --limit | --samples) disentangle+=("$1" "${2-}"); shift ;;
    --runs) shared+=("$1" "${2-}"); report+=("$1" "${2-}"); shift ;;
    *) shared+=("$1") ;;
  esac
  shift
done

recipes=(aligned)
if [ $everything = yes ]; then
  recipes+=(full)
  case $encoder in *clip*) recipes+=(zeroshot zeroshot-full) ;; esac
fi
if [ "$encoder" = tiny ]; then  # sized for two CPU cores; what is given on the command line comes later and wins
  finetune=(--steps 120 --batch-size 64 --lr 5e-4 ${finetune[@]+"${finetune[@]}"})
  disentangle=(--points 13 --samples 128 ${disentangle[@]+"${disentangle[@]}"})
  subsets=(--subsets 5 --images-per-task 60 "${subsets[@]:2}")
  python pretrain.py tiny ${shared[@]+"${shared[@]}"} ${pretrain[@]+"${pretrain[@]}"}
fi
python probe.py "$encoder" ${shared[@]+"${shared[@]}"} ${probe[@]+"${probe[@]}"}
for recipe in "${recipes[@]}"; do
  stage=("$encoder" --recipe "$recipe" ${shared[@]+"${shared[@]}"})
  python finetune.py "${stage[@]}" ${finetune[@]+"${finetune[@]}"}
  python make_vectors.py "${stage[@]}"
  python merge_eval.py "${stage[@]}" ${merge[@]+"${merge[@]}"}
  python disentangle.py "${stage[@]}" ${disentangle[@]+"${disentangle[@]}"}
  if [ $everything = yes ]; then python merge_eval.py "${stage[@]}" ${merge[@]+"${merge[@]}"} "${subsets[@]}"; fi
done
python report.py ${report[@]+"${report[@]}"}
