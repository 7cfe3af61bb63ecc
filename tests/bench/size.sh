#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: size.sh DIRECTORY
# Compiles the implementation, and the codec alone, for size and without assertions, as for a release, and prints what they take
# in a program's memory: code, constants, variables and the tables for unwinding, without symbols and relocations. Fails when one is
# larger than it may be.
set -eu
dir=$1
: "${CC:=cc}"
mkdir -p "$dir"
failed=0

# bytes OPTION...: of one object
bytes() {
    printf '#define VFU_IMPLEMENTATION\n#include "vfu.h"\n' | $CC -std=c11 -I. -pthread -Os -DNDEBUG "$@" -x c -c -o "$dir/size.o" -
    strip --strip-unneeded "$dir/size.o"
    size "$dir/size.o" | awk 'NR == 2 { print $4 }'
}

# measure NAME KIB OPTION...
measure() {
    name=$1 limit=$2
    shift 2
    all=$(bytes -fasynchronous-unwind-tables "$@")
    without=$(bytes -fno-asynchronous-unwind-tables "$@")
    verdict=yes
    if [ "$all" -ge $((limit * 1024)) ]; then
        verdict=NO failed=1
    fi
    awk -v name="$name" -v all="$all" -v without="$without" -v limit="$limit" -v verdict="$verdict" 'BEGIN {
        printf "%-20s %6d bytes, %5.1f KiB, of it %4.1f KiB for unwinding  target: under %d KiB  %s\n",
               name, all, all / 1024, (all - without) / 1024, limit, verdict }'
}

measure 'whole implementation' 96
measure 'codec alone' 24 -DVFU_CODEC_ONLY
rm -f "$dir/size.o"
exit $failed
