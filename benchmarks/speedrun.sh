#!/usr/bin/env bash
# The main networks on one GPU, in bfloat16 (--amp=off: float32):
#
#     benchmarks/speedrun.sh DATA [flags for every run]
#
# It can be interrupted: started again, it resumes. Each finished run gets a row in
# results/speedrun.{json,md}: accuracy, seconds to 40 % top-1, seconds per epoch.
# To start over, delete logs/speedrun.

set -euo pipefail

case ${1:---help} in -h | --help)
    sed -n '2,/^$/s/^#\( \|$\)//p' "$0"
    exit ;;
esac
data=$(realpath "$1")
shift
cd "$(dirname "$0")/../code"
python=${PYTHON:-python3}
mkdir -p ../logs/speedrun

run_folder() {  # of the output in $1: the newest run that it names
    sed -n 's/^Logs and checkpoints: //p' "$1" | tail -n 1
}

run() {  # name, its flags..., the flags for every run
    local output=../logs/speedrun/$1.txt name=$1 folder resume=()
    shift
    touch "$output"
    folder=$(run_folder "$output")
    if [ -n "$folder" ] && [ -e "$folder/models/checkpoint.pth.tar" ]; then
        resume=("--resume=$folder")
    fi
    echo "== $name"
    "$python" main.py "$data" --cache=device --amp=bf16 --print-freq=100 "$@" \
        ${resume[@]+"${resume[@]}"} 2>&1 | tee -i -a "$output"  # -i: Ctrl-C is for main.py
    "$python" ../benchmarks/speedrun_row.py "$name" "$(run_folder "$output")"
}

run simplenet --epochs=60 "$@"
run custom_conv --epochs=10 --use-custom-conv "$@"
run vit --epochs=90 --wd=0.05 --lr=0.01 --use-vit "$@"
run adversarial --epochs=60 --pgd=True "$@"
run scene_net --epochs=60 --use-scene-net "$@"
