#!/usr/bin/env bash
# The paper's experiment by its Keras preset, by the original recipe and by ours: trained, evaluated, reported, and set
# side by side in a table: quality with intervals, time, memory.
#
#     bash bench/paper.sh                     # synthetic flowers, on a CPU at reduced size, 3 seeds
#     bash bench/paper.sh --photos FOLDER     # and real photographs: trainA, trainB, testA, testB in FOLDER
#     bash bench/paper.sh --small             # toy size, in a minute, to see that it works
#
# On a GPU the recipes run as they are written, with one seed (--seeds N for more; --reduced for the small size). Other
# options: bench/paper.py --help. PYTHON=python3 chooses the interpreter. What is finished is kept in runs/paper-bench
# (--work) and not repeated: call it again after a cut. Leaves bench/results/paper-cpu (or -gpu) .json and .md,
# paper-cpu-flowers.jpg and -photos.jpg (--results FOLDER), and a report of each recipe in the work folder.

set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$ROOT/bench/paper.py" "$@"
