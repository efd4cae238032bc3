#!/usr/bin/env bash
# The whole study for one encoder, every stage in turn; what is finished is skipped, so kill it and start it again at will.
#
#   bash run_all.sh                                   # tiny: offline, generated images, minutes on two CPU cores
#   bash run_all.sh vit_b16_dino                      # the paper's eight tasks at 224 pixels (a GPU is advisable)
#   bash run_all.sh timm:NAME --weights FILE --data DIR --tasks a,b,c --image-size 128 --steps 300
set -euo pipefail
cd "$(dirname "$0")"
source tests/setup.sh

encoder=tiny
if [ $# -gt 0 ] && [[ $1 != -* ]]; then encoder=$1; shift; fi

# every stage takes the shared flags; the rest go to the stage they belong to
shared=() report=() pretrain=() probe=() finetune=() merge=() disentangle=()
while [ $# -gt 0 ]; do
  case $1 in
    --pretrain-steps) pretrain+=("$1" "${2-}"); shift ;;
    --probe-steps | --probe-lr) probe+=("$1" "${2-}"); shift ;;
    --steps | --lr | --batch-size) finetune+=("$1" "${2-}"); shift ;;
    --lambdas | --lambda-max) merge+=("$1" "${2-}"); shift ;;
    --pairs | --points | --limit | --samples) disentangle+=("$1" "${2-}"); shift ;;
    --runs) shared+=("$1" "${2-}"); report+=("$1" "${2-}"); shift ;;
    *) shared+=("$1") ;;
  esac
  shift
done

if [ "$encoder" = tiny ]; then  # sized for two CPU cores; anything given on the command line comes later and wins
  finetune=(--steps 120 --batch-size 64 --lr 5e-4 ${finetune[@]+"${finetune[@]}"})
  disentangle=(--points 13 --samples 128 ${disentangle[@]+"${disentangle[@]}"})
  python pretrain.py tiny ${shared[@]+"${shared[@]}"} ${pretrain[@]+"${pretrain[@]}"}
fi
python probe.py "$encoder" ${shared[@]+"${shared[@]}"} ${probe[@]+"${probe[@]}"}
python finetune.py "$encoder" ${shared[@]+"${shared[@]}"} ${finetune[@]+"${finetune[@]}"}
python make_vectors.py "$encoder" ${shared[@]+"${shared[@]}"}
python merge_eval.py "$encoder" ${shared[@]+"${shared[@]}"} ${merge[@]+"${merge[@]}"}
python disentangle.py "$encoder" ${shared[@]+"${shared[@]}"} ${disentangle[@]+"${disentangle[@]}"}
python report.py ${report[@]+"${report[@]}"}
