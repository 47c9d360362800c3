#!/usr/bin/env bash
# Reproduces a table or figure of the ROSE or the OBS-Diff paper: creates .venv, runs the sweep and generates a report.
#
#   bash scripts/reproduce.sh STUDY [--models A,B] [--seeds 0,1,2] [--small] [SETTING=VALUE…]
#
# STUDY: table2 … table7, fig1, fig4, fig5_block_size, fig5_samples, fig5_window, threshold, plus, plus_nm, plus_parts, plus_order,
#   plus_allocation, plus_permute (conf/experiment/rose_STUDY.yaml); obsdiff_table1 … obsdiff_table13, obsdiff_fig3, obsdiff_rose
#   (conf/experiment/STUDY.yaml).
# --models: choices of conf/model to use instead of the paper's models.
# --seeds: seeds of the calibration windows, the same for every method; the paper uses only 0.
# --small: run the study on SmolLM2-135M with short texts, or, for diffusion models, on the embedded pipeline that draws digits. Two
#   cores suffice, and no hub is needed. OATS takes most of the time; method=dense,sparsegpt,rose omits it.
# Repeat the command to resume an interrupted study; finished runs are reused. The report is in outputs/STUDY/report, or with
# --small in outputs/STUDY-small/report.
set -euo pipefail
study="${1:?"usage: bash scripts/reproduce.sh STUDY [--models A,B] [--seeds 0,1,2] [--small] [SETTING=VALUE…]"}"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "$study" in
  obsdiff_*) experiment="$study" extra=diffusion baseline=OBS-Diff ;;
  *) experiment="rose_$study" extra="" baseline=SparseGPT ;;
esac
if [ ! -f "conf/experiment/$experiment.yaml" ]; then
  known="$(cd conf/experiment && ls rose_*.yaml obsdiff_*.yaml | sed 's/^rose_//; s/\.yaml$//' | paste -sd' ')"
  echo "STUDY: expected one of $known, got '$study'" >&2
  exit 2
fi

settings=()
folder="outputs/$study"
small=false
while [ $# -gt 0 ]; do
  case "$1" in
    --models) settings+=("model=${2:?"--models: expected choices of conf/model, got none"}"); shift 2 ;;
    --seeds) settings+=("seed=${2:?"--seeds: expected numbers, got none"}"); shift 2 ;;
    --small) small=true; shift ;;
    *=*) settings+=("$1"); shift ;;
    *) echo "expected --models, --seeds, --small or SETTING=VALUE, got '$1'" >&2; exit 2 ;;
  esac
done

columns=sparsity
case "$study" in
  fig5_block_size) columns=engine.block_size ;;
  fig5_samples) columns=calibration.samples ;;
  fig5_window) columns=calibration.window ;;
  threshold) columns=reorder.threshold ;;
  plus_order) columns=engine.block_size ;;
  obsdiff_table6) columns=diffusion.weighting ;;
  obsdiff_table7) columns=diffusion.packages ;;
  obsdiff_table11) columns=diffusion.guidance ;;
  obsdiff_table12) columns=diffusion.steps ;;
  obsdiff_table13) columns=diffusion.scheduler ;;
  obsdiff_fig3) columns=calibration.samples ;;
esac

if $small && [ "$extra" = diffusion ]; then
  folder="outputs/$study-small"
  export HF_HUB_OFFLINE=1
  own=("model=digits-sd3" "evaluation=digits" "calibration.samples=40" "diffusion.packages=2")
  edges='"transformer_blocks.0.*","transformer_blocks.3.*"'
  case "$study" in
    obsdiff_table1) own+=("sparsity.ratio=0.3,0.4,0.5,0.6,0.7") ;;
    obsdiff_table2) own+=('pipeline.layers=["*"]') ;;
    obsdiff_table4 | obsdiff_table9) own+=("pipeline.skip=[$edges]" "sparsity.ratio=0.15,0.25,0.5") ;; # of 6 heads, 10 % and 15 % both remove one
    obsdiff_table5) own+=("pipeline.skip=[$edges]") ;;
    obsdiff_table7) own[3]="diffusion.packages=1,2,4,10" ;;
    obsdiff_table10) own=("model=small-ddpm" "calibration.samples=16" "evaluation.images.samples=8") ;; # its weights are random
    obsdiff_table11) own+=("diffusion.guidance=1.0,2.0,3.0") ;;
    obsdiff_table12) own+=("diffusion.steps=10,25,50") ;;
    obsdiff_fig3) own[2]="calibration.samples=5,10,20,40,80" ;;
  esac
  settings=("${own[@]}" "${settings[@]}")
elif $small; then
  folder="outputs/$study-small"
  export HF_HUB_OFFLINE=1
  texts=("calibration=embedded" "calibration.samples=16" "calibration.window=512")
  measured=("evaluation=embedded" "evaluation.perplexity.embedded.window=512" "evaluation.perplexity.embedded.windows=32")
  case "$study" in
    table3)
      measured[0]="evaluation=[embedded,zero_shot]"
      measured+=("evaluation.zero_shot.limit=40") ;;
    table6 | fig1 | fig4) measured=() ;;
    table7) measured=("evaluation.speed.window=512" "model.dtype=float32") ;;
    fig5_samples) texts[1]="calibration.samples=4,8,16,32" ;;
    fig5_window) texts[2]="calibration.window=128,256,512,1024" ;;
  esac
  settings=("model=smollm2-135m" "${texts[@]}" "${measured[@]}" "${settings[@]}")
fi

source scripts/_venv.sh "$extra"
status=0
.venv/bin/rose-exp -m "experiment=$experiment" "hydra.sweep.dir=$folder" "${settings[@]}" || status=$?
[ -d "$folder" ] && .venv/bin/rose-exp-report "$folder" --columns "$columns" --baseline "$baseline"
exit "$status"
