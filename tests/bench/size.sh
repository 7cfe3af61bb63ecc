#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: size.sh DIRECTORY
# Compiles the implementation, and the codec alone, for size, and prints what they take in a program's memory: code, constants and
# variables, without symbols and relocations. Fails when one is larger than it may be.
set -eu
dir=$1
: "${CC:=cc}"
mkdir -p "$dir"
failed=0

# measure NAME KIB OPTION...
measure() {
    name=$1 limit=$(($2 * 1024))
    shift 2
    printf '#define VFU_IMPLEMENTATION\n#include "vfu.h"\n' | $CC -std=c11 -I. -pthread -Os "$@" -x c -c -o "$dir/size.o" -
    strip --strip-unneeded "$dir/size.o"
    bytes=$(size "$dir/size.o" | awk 'NR == 2 { print $4 }')
    verdict=yes
    if [ "$bytes" -ge "$limit" ]; then
        verdict=NO failed=1
    fi
    awk -v name="$name" -v bytes="$bytes" -v limit="$limit" -v verdict="$verdict" \
        'BEGIN { printf "%-20s %6d bytes, %5.1f KiB  target: under %d KiB  %s\n", name, bytes, bytes / 1024, limit / 1024, verdict }'
}

measure 'whole implementation' 96
measure 'codec alone' 24 -DVFU_CODEC_ONLY
rm -f "$dir/size.o"
exit $failed
