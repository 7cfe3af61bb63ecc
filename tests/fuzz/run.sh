#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: run.sh BUILD-DIRECTORY MINUTES [TARGET...]
# Compiles the fuzz targets with clang, libFuzzer and sanitizers, and runs them for MINUTES in all (a fraction is fine). What a run
# has learnt stays in BUILD-DIRECTORY/fuzz/corpus for the next one; the seeds are in tests/fuzz/corpus, an input a line, in
# hexadecimal. An input that ends a target stays in BUILD-DIRECTORY/fuzz as crash-*, and `BUILD-DIRECTORY/fuzz/TARGET FILE` plays
# it again.
# Exit status: 0 when every target held, 1 when not, 77 when there is no clang with libFuzzer, but 1 if VFU_CI=1.
set -u
fuzz=$1/fuzz
minutes=$2
shift 2
: "${CLANG:=clang}"
flags="-std=c11 -O1 -g -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Itests/fuzz/stub -I. -pthread"
flags="$flags -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all ${CPPFLAGS:-}"

mkdir -p "$fuzz"
if ! printf 'int LLVMFuzzerTestOneInput(const unsigned char *p, unsigned long n) { return p[0] && n; }\n' |
    "$CLANG" -fsanitize=fuzzer -x c -o "$fuzz/probe" - 2>/dev/null; then
    echo "fuzz: no clang with libFuzzer here (Debian: clang, libclang-rt-dev)" >&2
    [ "${VFU_CI:-}" != 1 ] || exit 1
    exit 77
fi

if [ $# -eq 0 ]; then
    set -- dma_engine client json iommu
    [ ! -e examples/nvme.c ] || set -- nvme "$@"
fi

# Each example device behind the device endpoint, with the arguments that it needs.
compile() {
    case $1 in
    client | json | iommu) "$CLANG" $flags -o "$fuzz/$1" "tests/fuzz/$1.c" ;;
    *)
        arguments=
        [ "$1" != nvme ] || arguments='"--image=disk.img", "--size=1M", "--queues=2"'
        "$CLANG" $flags -DEXAMPLE="\"examples/$1.c\"" -c -o "$fuzz/$1.o" tests/fuzz/example.c &&
            "$CLANG" $flags -DFUZZ_ARGUMENTS="$arguments" -o "$fuzz/$1" tests/fuzz/device.c "$fuzz/$1.o"
        ;;
    esac
}

# plant FILE DIRECTORY: the seeds, as files. awk makes the numbers octal, which every printf knows.
plant() {
    number=0
    rm -rf "$2"
    mkdir -p "$2"
    awk 'BEGIN { digits = "0123456789abcdef" }
        { out = ""
          for (i = 1; i < length($0); i += 2) {
              byte = 16 * (index(digits, substr($0, i, 1)) - 1) + index(digits, substr($0, i + 1, 1)) - 1
              out = out sprintf("\\%03o", byte)
          }
          print out }' "$1" | while read -r octal; do
        number=$((number + 1))
        # shellcheck disable=SC2059 # the format is the input
        printf "$octal" >"$2/$number"
    done
}

case $fuzz in /*) ;; *) fuzz=$(pwd)/$fuzz ;; esac
passed=0
failed=0
seconds=$(awk "BEGIN { s = 60 * $minutes / $#; print s < 1 ? 1 : int(s) }")
for target in "$@"; do
    compile "$target" || exit 1
done
for target in "$@"; do
    mkdir -p "$fuzz/corpus/$target"
    seeds=$fuzz/seeds/$target
    case $target in
    nvme) plant tests/fuzz/corpus/dma_engine.hex "$seeds" ;; # all devices are talked to in the same way
    *) plant "tests/fuzz/corpus/$target.hex" "$seeds" ;;
    esac
    # libFuzzer needs a directory of its own for the disk that an example makes.
    if (cd "$fuzz" && ./"$target" -max_total_time="$seconds" -max_len=2048 -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix=./ "corpus/$target" "$seeds") >"$fuzz/$target.log" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        tail -n 60 "$fuzz/$target.log"
    fi
    awk -v target="$target" '/ cov: / { for (i = 1; i < NF; i++) if ($i == "cov:") cov = $(i + 1) }
        /number_of_executed_units/ { runs = $2 } /average_exec_per_sec/ { rate = $2 }
        END { printf "%-12s %9d executions, %6d a second, %5d edges\n", target ":", runs, rate, cov }' "$fuzz/$target.log"
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
