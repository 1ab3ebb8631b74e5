#!/usr/bin/env bash
# Everything that needs a GPU, within nine minutes: builds csrc, checks the ops and the training step as a CUDA graph,
# measures training, translation and the ops, and, where time is left, begins the paper's training. The most telling
# first, each part with its own limit, so that what is cut off is the end of the least telling.
#
#     OUT=results bash bench/gpu.sh          # PYTHON=python3 TOTAL=540
#     PAPER=1 OUT=results bash bench/gpu.sh  # only the paper's whole training: 500 + 500 pictures, 50 epochs, timed
#
# bench/paper.sh trains all three recipes of configs/paper and measures what they learn.
#
# Leaves in $OUT, at most ten files: summary.md (what ran, how it ended, how long it took, and all tables),
# provenance.json, overhead.json, step.json, translate.json, photo.json, ops.json, ops.md, tests.log; build.log only if
# the build failed.

set -u
cd "$(dirname "$0")/.."
ROOT=$PWD
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu}
TOTAL=${TOTAL:-540}
START=$SECONDS
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Checks of this run are made here and now, whatever an earlier one has kept.
export CYCLEGAN_FAST_CACHE="$WORK/cache"
unset TRITON_INTERPRET

left() { echo $((TOTAL - (SECONDS - START))); }

# part NAME LIMIT COMMAND...: run for at most LIMIT seconds, or for what is left of the whole if that is less.
part() {
    local name=$1 limit=$2 begin=$SECONDS code
    shift 2
    if [ "$(left)" -lt 10 ]; then
        echo "| $name | not run: out of time | |" >>"$WORK/parts"
        return 1
    fi
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@"
    code=$?
    case $code in
        0) state=done ;;
        124 | 137) state="stopped at its limit of $limit s" ;;
        *) state="failed with status $code" ;;
    esac
    echo "| $name | $state | $((SECONDS - begin)) s |" >>"$WORK/parts"
    echo "== $name: $state after $((SECONDS - begin)) s"
    return $code
}

# Rewritten after every part, so that a run that is cut short has it too.
summary() {
    {
        echo "# GPU run"
        echo
        echo "| part | how it ended | time |"
        echo "|---|---|---|"
        cat "$WORK/parts"
        echo
        [ -s "$OUT/tests.log" ] && { echo '```'; tail -n 25 "$OUT/tests.log"; echo '```'; echo; }
        [ -s "$WORK/verified" ] && { echo '```'; cat "$WORK/verified"; echo '```'; echo; }
        [ -s "$WORK/paper" ] && { echo '```'; cat "$WORK/paper"; echo '```'; echo; }
        for table in "$WORK"/{step,model,translate,photo,overhead}.md "$OUT/ops.md"; do
            [ -s "$table" ] && { cat "$table"; echo; }
        done
    } >"$OUT/summary.md"
}

# Not `make native`: that sets up an environment of its own, from the network.
build() {
    if [ ! -f setup.py ] || ! grep -q build_ext setup.py; then
        echo "csrc has nothing to build here: going on without the native operations"
        return 0
    fi
    CYCLEGAN_FAST_NATIVE=1 CYCLEGAN_FAST_CUDA=1 CYCLEGAN_FAST_CUDA_ARCHS="$ARCHS" \
        "$PYTHON" setup.py --quiet build_ext --inplace >"$OUT/build.log" 2>&1
    local code=$?
    [ $code -eq 0 ] && rm -f "$OUT/build.log" && return 0
    echo "the native operations could not be built: going on without them"
    tail -n 20 "$OUT/build.log"
    return $code
}

verified() {
    "$PYTHON" - <<'PY' | tee "$WORK/verified"
import torch
import cyclegan_fast.ops.crop_flip, cyclegan_fast.ops.image_pool, cyclegan_fast.ops.instance_norm
import cyclegan_fast.ops.reflect_conv
from cyclegan_fast.ops import _native
from cyclegan_fast.ops._verify import report

print(f"native: {_native.why_not() or 'CPU'}; {_native.why_not(cuda=True) or 'CUDA'}")
rows = report()
for row in rows:
    state = {True: "ok", False: "WRONG", None: "-"}[row.ok]
    print(f"{state:<6} {row.op:<16} {row.impl:<10} {row.device}: {row.detail}")
raise SystemExit(any(row.ok is False for row in rows))
PY
    return "${PIPESTATUS[0]}"
}

# tests PATH...: appends to tests.log.
tests() {
    set -o pipefail
    local workers=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8)  # most of the time goes into compiling kernels
    "$PYTHON" -m pytest "$@" -q --maxfail=15 -p no:cacheprovider --durations=8 -W default "${workers[@]}" 2>&1 |
        tee -a "$OUT/tests.log"
}

microbenchmarks() {
    "$PYTHON" -m pytest bench -q -p no:cacheprovider -W default --results "$OUT" --name ops --budget "$1" \
        --benchmark-columns=median,iqr,rounds "${@:2}" >"$WORK/bench.log" 2>&1
    local code=$?
    tail -n 3 "$WORK/bench.log"
    return $code
}

script() {
    "$PYTHON" "bench/$1.py" --out "$OUT/$1.json" --markdown "$WORK/$1.md" --seconds "$2"
}

# The paper's data set is not here: as many synthetic pictures of its size stand in for it. Its recipe, but in the
# device's own precision and as a CUDA graph. What was reached is read from the run if it is cut short.
paper_pictures() {
    "$PYTHON" -m cyclegan_fast data synth "$WORK/flowers" --train 500 --test 8 --size 256
}

paper_training() {
    local begin=$SECONDS code
    "$PYTHON" train.py --config configs/paper/keras.yaml "data.root=$WORK/flowers" data.limit_test=8 \
        "out=$WORK/runs" name=paper training.precision=auto training.mode=graph checkpoint.every_minutes=0 \
        checkpoint.every_epochs=10 monitor.images_every=10 monitor.log_every=250 monitor.progress=false
    code=$?
    {
        echo "The paper's training, 500 + 500 pictures of 256x256, 50 epochs: status $code after $((SECONDS - begin)) s"
        tail -n 2 "$WORK/runs/paper/scalars.jsonl"
    } >"$WORK/paper" 2>&1
    return $code
}

export -f build verified tests microbenchmarks script paper_pictures paper_training
"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
    echo "no CUDA device that this Python's torch can use: nothing to measure" >&2
    exit 2
}
ARCHS=$("$PYTHON" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))')
export OUT WORK PYTHON ARCHS
: >"$WORK/parts"

"$PYTHON" bench/provenance.py | tee "$OUT/provenance.json"
part "build of csrc" 100 bash -c build
part "every op against its reference" 40 bash -c verified
part "matrix and copy rates" 20 "$PYTHON" -m cyclegan_fast doctor --measure cuda
summary
rm -f "$OUT/tests.log"
if [ "${PAPER:-0}" = 1 ]; then
    part "synthetic pictures" 200 bash -c paper_pictures && part "the paper's training" 600 bash -c paper_training
else
    part "cost of a call" 25 "$PYTHON" bench/overhead.py --out "$OUT/overhead.json" --markdown "$WORK/overhead.md"
    # A training step recorded as a graph must equal the eager one, or its figures are worth nothing.
    part "graph parity" 60 bash -c 'tests tests/training/test_graph.py tests/models/test_fused.py'
    summary
    part "training step" 240 bash -c 'script step 225'
    [ -s "$OUT/step.json" ] && part "cost model" 20 "$PYTHON" bench/model.py --measured "$OUT/step.json" \
        --markdown "$WORK/model.md"
    summary
    part "translation" 60 bash -c 'script translate 50'
    summary
    # A 12-megapixel photograph from array to array, whole and in bands.
    part "photographs" 60 bash -c 'script photo 50'
    summary
    part "tests of the ops" 90 bash -c 'tests tests/ops'
    summary
    # Its own limit comes a little later, so that it ends by itself and says what it skipped.
    part "microbenchmarks" 115 bash -c 'microbenchmarks 100'
    summary
    if [ "$(left)" -gt 150 ]; then
        part "synthetic pictures" 60 bash -c paper_pictures && part "the paper's training" 600 bash -c paper_training
    fi
fi
summary
echo "== all in $((SECONDS - START)) s; see $OUT/summary.md"
! grep -q -e failed -e stopped "$WORK/parts"
