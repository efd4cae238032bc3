#!/usr/bin/env bash
# The whole study for one encoder, every stage in turn. What is finished is skipped: kill it, start it again.
#
#   bash run_all.sh                             # tiny: offline, generated images, minutes on two CPU cores
#   bash run_all.sh tiny-mae                    # the same encoder pre-trained otherwise; tiny-dino, tiny-clip
#   bash run_all.sh tiny-paper                  # the paper's eight in small, --everything: hours
#   bash run_all.sh vit_b16_dino                # the paper's eight tasks at 224 pixels (a GPU is advisable)
#   bash run_all.sh vit_b16_dino --everything   # also full (of CLIP zeroshot too), and subsets of the tasks
#   bash run_all.sh vit_b16_dino --attention    # also attention*, linearized, the tests of arXiv:2407.07089
#   bash run_all.sh timm:NAME --weights FILE --data DIR --tasks a,b,c --image-size 128 --steps 300
set -eo pipefail
caller=$PWD
cd "$(dirname "$0")"
here=$PWD
refuse() { echo "run_all.sh: $1 (bash run_all.sh --help shows examples)" >&2; exit 2; }

if [ "${1-}" = --help ] || [ "${1-}" = -h ]; then sed -n '2,/^set /{/^#/p}' run_all.sh; exit; fi
encoder=tiny everything=no attention=no
if [ $# -gt 0 ] && [[ $1 != -* ]]; then encoder=$1; shift; fi
if [ "$encoder" = tiny-paper ]; then                       # in the order of its Table 1
  for each in tiny-few tiny tiny-mae tiny-dino tiny-clip-few tiny-clip tiny-large tiny-clip-large; do
    (cd "$caller" && bash "$here/run_all.sh" $each --everything "$@")
  done
  exit
fi
case $encoder in                                           # what is pre-trained here, and by which script
  tiny | tiny-few | tiny-large) scheme=pretrain ;;
  tiny-mae) scheme=pretrain_mae ;;
  tiny-dino) scheme=pretrain_dino ;;
  tiny-clip | tiny-clip-few | tiny-clip-large) scheme=pretrain_contrastive ;;
  *) scheme= ;;
esac
pretrain=()
case $encoder in tiny*-few) pretrain=(--pictures 2400) ;; tiny*-large) pretrain=(--large) ;; esac

# the flags of each stage
shared=() studied=() probe=() finetune=() against=() search=() merge=() disentangle=() subsets=() report=()
while [ $# -gt 0 ]; do
  if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
  case $1 in
    --everything) everything=yes; shift; continue ;;
    --attention) attention=yes; shift; continue ;;
    --overwrite) shared+=("$1"); shift; continue ;;
    --runs) report+=("$1" "${2-}"); stages=shared ;;
    --tasks | --data) stages=studied ;;                    # the study's, not the pictures of a pre-training
    --weights | --image-size | --prompts | --device | --dtype | --compile | --seed) stages=shared ;;
    --pretrain-steps | --checkpoints | --pictures)
      [ "$scheme" ] || refuse "$1: $encoder comes trained"
      stages=pretrain ;;
    --probe-steps | --probe-lr) stages=probe ;;
    --steps | --lr | --batch-size | --micro-batch | --save-minutes) stages=finetune ;;
    --probe) stages=against ;;
    --lambdas | --lambda-max) stages=search ;;
    --search | --error) stages=merge ;;
    --pairs | --points | --limit | --samples) stages=disentangle ;;
    --per-size | --images-per-task) stages=subsets ;;
    *) refuse "unknown flag $1" ;;
  esac
  [ $# -ge 2 ] || refuse "$1 needs a value"
  eval "$stages+=(\"\$1\" \"\$2\")"; shift 2
done
if [ $everything = no ] && [ ${#subsets[@]} -gt 0 ]; then refuse "${subsets[0]} goes with --everything"; fi

source tests/setup.sh
has_text() {
  if [ "$scheme" ]; then [ $scheme = pretrain_contrastive ]; return; fi
  local code="import sys; from lib.encoders import text_tower; sys.exit(not text_tower(sys.argv[1]))"
  python -c "$code" "$encoder"
}
names=(aligned)
if [ $everything = yes ]; then
  names+=(full)
  if has_text; then names+=(zeroshot zeroshot-full); fi
fi
if [ $attention = yes ]; then
  names+=(attention attention-bias attention-mlp attention-mlp-bias linearized); disentangle+=(--metric both)
fi
cd "$caller"                                               # whose folders relative paths mean
commands=()
stage() { commands+=(-- "$here/$1.py" "${@:2}"); }
if [ "$scheme" ]; then stage $scheme "$encoder" "${shared[@]}" "${pretrain[@]}"; fi
shared+=("${studied[@]}")
stage probe "$encoder" "${shared[@]}" "${probe[@]}"
for name in "${names[@]}"; do
  of=("$encoder" --name "$name" "${shared[@]}")
  case $name in full | zeroshot*) heads=() ;; *) heads=("${against[@]}") ;; esac
  stage finetune "${of[@]}" "${finetune[@]}" "${heads[@]}"
  stage make_vectors "${of[@]}"
  stage merge_eval "${of[@]}" "${search[@]}" "${merge[@]}"
  stage disentangle "${of[@]}" "${disentangle[@]}"
  if [ $attention = yes ] && [ "$name" != linearized ]; then stage posthoc "${of[@]}"; fi
  if [ $everything = yes ]; then stage subsets "${of[@]}" "${search[@]}" "${subsets[@]}"; fi
done
stage report "${report[@]}"
exec python "$here/lib/together.py" "${commands[@]}"
