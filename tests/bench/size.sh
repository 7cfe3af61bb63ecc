#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: size.sh DIRECTORY
# Compiles the implementation, and the codec alone, for size, and prints what they take in a program's memory: code, constants and
# variables, without symbols and relocations. The tables for unwinding, which debuggers and C++ want and no C program needs, are told
# apart. Fails when one is larger than it may be.
set -eu
dir=$1
: "${CC:=cc}"
mkdir -p "$dir"
failed=0

# bytes OPTION...: of one object
bytes() {
    printf '#define VFU_IMPLEMENTATION\n#include "vfu.h"\n' | $CC -std=c11 -I. -pthread -Os "$@" -x c -c -o "$dir/size.o" -
    strip --strip-unneeded "$dir/size.o"
    size "$dir/size.o" | awk 'NR == 2 { print $4 }'
}

# measure NAME KIB OPTION...
measure() {
    name=$1 limit=$2
    shift 2
    without=$(bytes -fno-asynchronous-unwind-tables "$@")
    with=$(bytes -fasynchronous-unwind-tables "$@")
    verdict=yes
    if [ "$without" -ge $((limit * 1024)) ]; then
        verdict=NO failed=1
    fi
    awk -v name="$name" -v without="$without" -v tables=$((with - without)) -v limit="$limit" -v verdict="$verdict" 'BEGIN {
        printf "%-20s %6d bytes, %5.1f KiB  target: under %d KiB  %s  (and %.1f KiB for unwinding)\n",
               name, without, without / 1024, limit, verdict, tables / 1024 }'
}

measure 'whole implementation' 96
measure 'codec alone' 24 -DVFU_CODEC_ONLY
rm -f "$dir/size.o"
exit $failed
