#!/usr/bin/env bash
# Everything that needs a GPU, within nine minutes: builds csrc, runs the GPU tests, the microbenchmarks and, where they
# are there, the step and translation benchmarks. The most telling first, each part with its own limit, so that what is
# cut off is the end of the least telling.
#
#     OUT=results bash bench/gpu.sh          # PYTHON=python3 TOTAL=540
#
# Leaves in $OUT, at most eight files: summary.md (what ran, how it ended, how long it took, and all tables),
# provenance.json, ops.json, ops.md, tests.log, and whatever bench/step.py and bench/translate.py write (step.json,
# translate.json); build.log only if the build failed.

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
        for table in "$OUT/ops.md" "$WORK/step.md" "$WORK/translate.md"; do
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

tests() {
    set -o pipefail
    local workers=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8)  # most of the time goes into compiling kernels
    "$PYTHON" -m pytest tests/ops -q --maxfail=15 -p no:cacheprovider --durations=8 -W default "${workers[@]}" 2>&1 |
        tee "$OUT/tests.log"
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

export -f build verified tests microbenchmarks script
"$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
    echo "no CUDA device that this Python's torch can use: nothing to measure" >&2
    exit 2
}
ARCHS=$("$PYTHON" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))')
export OUT WORK PYTHON ARCHS
: >"$WORK/parts"

"$PYTHON" bench/provenance.py | tee "$OUT/provenance.json"
part "build of csrc" 120 bash -c build
part "every op against its reference" 40 bash -c verified
summary
part "tests of the ops" 120 bash -c tests
summary
microbenchmark_seconds=300
if [ -f bench/step.py ]; then
    microbenchmark_seconds=140
    part "training step" 150 bash -c 'script step 140'
    summary
fi
# Its own limit comes a little later, so that it ends by itself and says what it skipped.
part "microbenchmarks" $((microbenchmark_seconds + 15)) bash -c 'microbenchmarks "$0"' "$microbenchmark_seconds"
summary
if [ -f bench/translate.py ]; then
    part "translation" 60 bash -c 'script translate 50'
    summary
fi
echo "== all in $((SECONDS - START)) s; see $OUT/summary.md"
! grep -q -e failed -e stopped "$WORK/parts"
