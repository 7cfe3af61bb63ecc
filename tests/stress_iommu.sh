#!/bin/sh
# SPDX-License-Identifier: MIT
# stress_iommu.sh BUILD_DIR [UNMAPS]: the stress of the vIOMMU (stress_iommu.c), three times:
#   as it is:             UNMAPS (default 1000000) unmaps, not one stale access
#   negative control:     from a copy of the header without the wait for the readers; it must show stale accesses
#   ThreadSanitizer:      a fiftieth of the unmaps, no report, no suppressions
# CC, CLANG and CFLAGS as for make. ThreadSanitizer is clang's if there is one: gcc's doesn't look into memset() of few bytes.
set -eu
build=${1:?usage: stress_iommu.sh BUILD_DIR [UNMAPS]}
unmaps=${2:-1000000}
root=$(cd "$(dirname "$0")/.." && pwd)
cc=${CC:-cc}
tsan_cc=${CLANG:-clang}
command -v "$tsan_cc" >/dev/null 2>&1 || tsan_cc=$cc
# The sanitizer's shadow memory collides with the address randomisation of recent kernels.
fixed=
if setarch "$(uname -m)" -R true 2>/dev/null; then
    fixed="setarch $(uname -m) -R"
fi
mkdir -p "$build/stress/control"
cd "$build/stress"

fail() { echo "stress_iommu.sh: $*" >&2; exit 1; }

printf '#define VFU_IOMMU_IMPLEMENTATION\n#include "vfu_iommu.h"\n' >impl.c

# make NAME HEADER_DIR FLAGS...
make_one() {
    name=$1 dir=$2
    shift 2
    # shellcheck disable=SC2086
    $cc -std=c11 ${CFLAGS:--O2 -g} "$@" -I"$dir" -pthread -o "$name" "$root/tests/stress_iommu.c" impl.c || fail "can't build $name"
}

echo "== $unmaps unmaps"
make_one stress "$root"
./stress "$unmaps" || fail "stale accesses"

# The control takes out the one line in which an unmap waits for the readers. If that line has changed, this must be looked at.
echo "== negative control: without the wait for the readers"
sed 's/^\( *\)t->waits += vfux_wait_for_dead(t);.*$/\1(void)vfux_wait_for_dead;/' "$root/vfu_iommu.h" >control/vfu_iommu.h
changed=$(diff "$root/vfu_iommu.h" control/vfu_iommu.h | grep -c '^>') || true
[ "$changed" = 1 ] || fail "the control changed $changed lines of vfu_iommu.h instead of 1: the pattern in this script is out of date"
make_one control/stress "$PWD/control"
status=0
./control/stress control 240 10 || status=$?
[ "$status" = 1 ] || fail "the control showed no stale access (status $status): this stress would not notice a fault"

echo "== ThreadSanitizer"
cc=$tsan_cc
make_one stress_tsan "$root" -fsanitize=thread
env -u TSAN_OPTIONS $fixed ./stress_tsan $((unmaps / 50)) || fail "ThreadSanitizer"
echo "== all as it should be"
echo "3 passed, 0 failed"
