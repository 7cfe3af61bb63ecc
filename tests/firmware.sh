#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: tests/firmware.sh BUILD-DIRECTORY, in the project's directory. What is made goes to BUILD-DIRECTORY/firmware.
# Records a session, builds the image of examples/firmware for a Cortex-M3 with the warnings as errors, runs it under QEMU and
# checks what it prints. Then images with a damaged record, each of which has to fail: so the checks are known to see something.
# Status 77 where the compiler or QEMU is missing, 1 if VFU_CI=1. The last line is `N passed, N failed`.
set -u
out=$1/firmware
source=examples/firmware
warn="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"
arm="-std=c11 -Os -mcpu=cortex-m3 -mthumb -ffreestanding -nostdlib -ffunction-sections -fdata-sections -I$source -I."
parts="main direct vfu string board" # and replay, which has the record
mkdir -p "$out" || exit 1

for tool in arm-none-eabi-gcc qemu-system-arm; do
    if ! command -v $tool >/dev/null 2>&1; then
        echo "firmware: no $tool here (Debian: gcc-arm-none-eabi and qemu-system-arm)" >&2
        [ "${VFU_CI:-}" = 1 ] && exit 1
        exit 77
    fi
done

passed=0
failed=0
result() { # STATUS NAME
    if [ "$1" -eq 0 ]; then
        passed=$((passed + 1))
        echo "ok    $2"
    else
        failed=$((failed + 1))
        echo "FAIL  $2"
    fi
}

# What everything else needs.
must() { # NAME COMMAND...
    name=$1
    shift
    "$@"
    status=$?
    result $status "$name"
    if [ $status -ne 0 ]; then
        echo "$passed passed, $failed failed"
        exit 1
    fi
}

# image NAME DIRECTORY-OF-RECORD: makes NAME.elf from the parts and a replay of that record.
image() {
    # shellcheck disable=SC2086 # lists, here and below
    arm-none-eabi-gcc $arm $warn -I"$2" -c -o "$out/$1.replay.o" $source/replay.c &&
        arm-none-eabi-gcc $arm -T $source/board.ld -Wl,--gc-sections -Wl,--fatal-warnings -o "$out/$1.elf" \
            "$out/$1.replay.o" $objects -lgcc
}

# The image's output and status; semihosting goes to standard error in some versions of QEMU.
run() { # NAME
    timeout -k 5 60 qemu-system-arm -M mps2-an385 -display none -serial none -monitor none \
        -semihosting-config enable=on,target=native -kernel "$out/$1.elf" >"$out/$1.log" 2>&1 </dev/null
}

record() {
    # shellcheck disable=SC2086
    ${CC:-cc} -std=c11 -O2 $warn -I. -pthread -o "$out/record" $source/record.c &&
        timeout -k 5 60 "$out/record" >"$out/session.h"
}

build() {
    objects=
    for part in $parts; do
        # shellcheck disable=SC2086
        arm-none-eabi-gcc $arm $warn -c -o "$out/$part.o" $source/$part.c || return 1
        objects="$objects $out/$part.o"
    done
    image firmware "$out"
}

says() { # NAME PATTERN
    grep -Eq "$2" "$out/firmware.log"
    result $? "$1"
}

must "a session is recorded" record
must "the image compiles without a warning and links with nothing but libgcc" build
run firmware
status=$?
cat "$out/firmware.log"
result $status "the image ends with status 0"
says "it has replayed the session" '^session: [1-9][0-9]* messages, [1-9][0-9]* DMA_MAP, [1-9].* served, [1-9][0-9]* refused$'
says "memory that was revoked is refused, at its first address" '^ *refused: ENOENT at 0x102000$'
says "memory without the permission is refused" '^ *refused: EACCES at 0x800010$'
says "a range that wraps is refused" '^ *refused: EINVAL at 0xfffffffffffffffc$'
says "it says how large it is" '^size: text [1-9][0-9]*, data [0-9]+, bss [1-9]'
says "it says how large the table is" "^size: the IOMMU's buffer [1-9][0-9]* for "
says "every check was passed" '^[1-9][0-9]* checks, 0 failed$'

# damaged NAME SED-SCRIPT MESSAGE: with the record changed like this, the image has to fail and to say so.
damaged() {
    mkdir -p "$out/$1"
    sed "$2" "$out/session.h" >"$out/$1/session.h"
    ! cmp -s "$out/session.h" "$out/$1/session.h" && image "$1" "$out/$1" && {
        run "$1"
        [ $? -eq 1 ]
    } && grep -q "^FAIL: $3\$" "$out/$1.log"
    result $? "a record with another $1 is noticed"
}
damaged errno '/<- .* DMA_.* error ENOENT/{n;s/\(.*\)0x02,/\10x0d,/;}' 'another answer than recorded'
damaged data '/<- .* DMA_READ .* count 8192 /{n;n;n;n;s/0x/0xff ^ 0x/;}' 'another answer than recorded'
damaged fault '/session_faults/{n;s/0x/1 + 0x/;}' 'another fault than recorded'
damaged size '/-> .* DMA_UNMAP /{n;s/0x28,/0x29,/;}' "a message doesn't decode"

# How large the headers are with everything in them, for people.
for part in 'codec vfu.h VFU_CODEC_ONLY VFU_IMPLEMENTATION' 'IOMMU vfu_iommu.h VFU_IOMMU_IMPLEMENTATION'; do
    # shellcheck disable=SC2086
    set -- $part
    # shellcheck disable=SC2086
    printf '#include "%s"\n' "$2" | arm-none-eabi-gcc $arm -D"$3" ${4:+-D"$4"} -x c -c -o "$out/$1.o" - &&
        echo "all of the $1: $(arm-none-eabi-size "$out/$1.o" | awk 'NR == 2 { print $1 " bytes of text, " $2 + $3 " of data" }')"
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
