#!/usr/bin/env bash
# The canonical runs on one GPU, in bfloat16 (--amp=off: not), from a bare machine with torch,
# torchvision, OpenCV and TensorBoard:
#
#     benchmarks/speedrun.sh DATA [flags for every run]
#
# Stop it whenever you like: started again, it goes on where it was. Each run that is finished puts
# its row into results/speedrun.{json,md}: accuracy, seconds to 40 % top-1, seconds an epoch.
# Start all over: delete logs/speedrun.
set -euo pipefail

data=$(realpath "${1:?usage: benchmarks/speedrun.sh DATA [flags]}")
shift
cd "$(dirname "$0")/../code"
python=${PYTHON:-python3}
mkdir -p ../logs/speedrun

run() {  # name, its flags..., the flags for every run
    local output=../logs/speedrun/$1.txt name=$1 folder resume=()
    shift
    touch "$output"
    folder=$(sed -n 's/^Logs and checkpoints: //p' "$output" | tail -n 1)
    if [ -n "$folder" ] && [ -e "$folder/models/checkpoint.pth.tar" ]; then
        resume=("--resume=$folder/models/checkpoint.pth.tar")
    fi
    echo "== $name"
    "$python" main.py "$data" --cache=device --amp=bf16 --print-freq=100 "$@" \
        ${resume[@]+"${resume[@]}"} 2>&1 | tee -i -a "$output"  # -i: Ctrl-C is for main.py
    folder=$(sed -n 's/^Logs and checkpoints: //p' "$output" | tail -n 1)
    "$python" ../benchmarks/speedrun_row.py "$name" "$folder"
}

run simplenet --epochs=60 "$@"
run custom_conv --epochs=10 --use-custom-conv "$@"
run vit --epochs=90 --wd=0.05 --lr=0.01 --use-vit "$@"
run adversarial --epochs=60 --pgd=True "$@"
if "$python" main.py --help | grep -q -- --use-scene-net; then
    run scene_net --epochs=60 --use-scene-net "$@"
fi
