#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Runs Linux guests in an unmodified QEMU against BUILD_DIR/examples/dma_engine, and compares the engine's table of mappings with
# what each guest says it has mapped; one against BUILD_DIR/examples/serial, with which it talks through the guest's driver; and
# some against BUILD_DIR/examples/nvme, whose disk they use through the guest's driver.
#
#     tests/qemu/run.sh BUILD_DIR [GUEST...]
#     tests/qemu/run.sh --long BUILD_DIR [GUEST...]     ten minutes of mixed I/O on a disk: without an IOMMU, with a strict one
#
# Needs a QEMU with vfio-user-pci, a Linux kernel with VFIO modules, a static busybox and a C compiler that links statically. What
# the machine lacks is fetched on Debian from Debian's archive, with the mirror, the proxy and the keys that the machine's own apt
# is set up with; nothing is installed, everything is unpacked below BUILD_DIR/qemu and stays there for the next run.
#
#     VFU_QEMU_REQUIRED=1    what is missing is a failure, not a reason to skip
#     VFU_QEMU_DIR=DIR       where QEMU and the kernel are unpacked, instead of BUILD_DIR/qemu
#     VFU_QEMU_ENGINE=FILE   another build of the engine, for example one with sanitizers; the other devices are those beside it
#
# Exit status: 0 when everything held, 1 when not, 2 for wrong arguments, 77 when a QEMU or kernel is not to be had here.
set -eu
export LC_ALL=C

# The guests: name | mode of guest.c, or nvme for guest_nvme.c | course | memory backend | options of the program | Debian's
# kernel | QEMU's IOMMU | kernel arguments. The course has a word for each start of the guest's kernel:
#     all        it checks everything and switches itself off
#     kill       QEMU is killed while the engine copies in the guest's memory, or the guest writes to the disk; the next QEMU
#                finds the same device
#     crash      the device is killed while the guest writes to the disk; the next QEMU finds a new device, and what was flushed
#     restart    the guest restarts while the engine copies, without unmapping anything; QEMU goes on. QEMU's IOMMUs for Intel and
#                virtio reset the device before they unmap, which --verbose lets the engine's log tell; the others unmap first.
# memory-backend-ram has no file to hand over, so every DMA travels as a message. The cloud kernel has no AMD IOMMU. Between the QEMU
# of `traced` and the engine sits vfu_trace, and neither may notice.
vtd='intel-iommu,caching-mode=on,intremap=on'
on='intel_iommu=on'
amd='amd-iommu,dma-remap=on,intremap=on'
guests="
plain          | plain         | restart all  | memfd,share=on | --sandbox          | cloud-amd64 |                  |
plain-messages | plain         | kill all     | ram            |                    | cloud-amd64 |                  |
intel-iommu    | vfio          | kill all all | memfd,share=on |                    | cloud-amd64 | $vtd             | $on iommu.strict=1
intel-restart  | vfio          | restart all  | memfd,share=on | --verbose          | cloud-amd64 | $vtd             | $on iommu.strict=1
intel-lazy     | vfio          | all          | memfd,share=on |                    | cloud-amd64 | $vtd             | $on iommu.strict=0
intel-messages | vfio-messages | kill all     | ram            |                    | cloud-amd64 | $vtd             | $on iommu.strict=1
intel-no-mmap  | vfio-messages | all          | memfd,share=on | --no-mmap          | cloud-amd64 | $vtd             | $on iommu.strict=1
virtio-iommu   | vfio          | restart all  | memfd,share=on | --verbose          | cloud-amd64 | virtio-iommu-pci | iommu.strict=1
amd-iommu      | vfio          | restart all  | memfd,share=on |                    | amd64       | $amd             | iommu.strict=1
traced         | plain         | all          | memfd,share=on |                    | cloud-amd64 |                  |
serial         | serial        | all          | memfd,share=on | --sandbox          | cloud-amd64 |                  |
nvme           | nvme          | crash all    | memfd,share=on |                    | cloud-amd64 |                  |
nvme-messages  | nvme          | kill all     | ram            |                    | cloud-amd64 |                  |
nvme-intel     | nvme          | restart all  | memfd,share=on | --sandbox          | cloud-amd64 | $vtd             | $on iommu.strict=1
nvme-lazy      | nvme          | all          | memfd,share=on | --doorbells=mapped | cloud-amd64 | $vtd             | $on iommu.strict=0
nvme-virtio    | nvme          | crash all    | memfd,share=on | --block-size=4096  | cloud-amd64 | virtio-iommu-pci | iommu.strict=1
"
long_guests='nvme nvme-intel'
default_guests=$(awk -F'|' 'NF > 1 { gsub(/ /, "", $1); printf "%s ", $1 }' <<<"$guests")
guest_seconds=180
# What the guests with a disk have for mixed I/O.
mixed_seconds=3
disk_size=216M

script=check-qemu
here=$(cd "$(dirname "$0")" && pwd)

usage() {
    echo "usage: run.sh [--long] BUILD_DIR [GUEST...]" >&2
    echo "guests: $default_guests" >&2
    exit 2
}

if [[ ${1:-} = --long ]]; then
    default_guests=$long_guests
    mixed_seconds=600
    guest_seconds=$((guest_seconds + mixed_seconds))
    shift
fi
[[ $# -ge 1 && -d $1 ]] || usage
build=$(cd "$1" && pwd)
shift
store=${VFU_QEMU_DIR:-$build/qemu}
engine=${VFU_QEMU_ENGINE:-$build/examples/dma_engine}
serial=$(dirname "$engine")/serial
trace=$(dirname "$engine")/vfu_trace
nvme=$(dirname "$engine")/nvme
logs=$build/qemu/log

passed=0
failed=0
engine_pid=
trace_pid=
qemu_pid=
work=
# The last round of writes that a guest has flushed to its disk
flushed=0

clean_up() {
    [[ -z $qemu_pid ]] || kill -KILL "$qemu_pid" 2>/dev/null || :
    [[ -z $engine_pid ]] || kill -KILL "$engine_pid" 2>/dev/null || :
    [[ -z $trace_pid ]] || kill -KILL "$trace_pid" 2>/dev/null || :
    [[ -z $work ]] || rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

. "$here/common.sh"

ok() {
    passed=$((passed + 1))
    echo "ok $*"
}

wrong() {
    failed=$((failed + 1))
    echo "FAIL $*"
}

# ---- Comparing tables of mappings ----------------------------------------------------------------------------------------------

# Joins ranges that touch and have the same protection; in: `FIRST LAST PROT`, out: the same, ascending.
join_ranges() {
    local first last prot from='' to='' with=''
    while read -r first last prot; do
        # 64-bit arithmetic wraps as addresses do, which is all right for a test of equality.
        if [[ -n $from && $prot = "$with" && $((first)) -eq $((to + 1)) ]]; then
            to=$last
            continue
        fi
        [[ -z $from ]] || echo "$from $to $with"
        from=$first to=$last with=$prot
    done < <(sort)
    [[ -z $from ]] || echo "$from $to $with"
}

# Asks the engine for its table and puts it into the file $1 as `FIRST LAST PROT` lines; prints what is wrong with it, if
# anything.
engine_table() {
    local seen tries
    : >"$1"
    running "$engine_pid" || { echo "the engine is gone"; return; }
    seen=$(grep -c '^table end' "$engine_log" || :)
    kill -USR1 "$engine_pid" 2>/dev/null || :
    for ((tries = 0; tries < 250; tries++)); do
        if [[ $(grep -c '^table end' "$engine_log" || :) -gt $seen ]]; then
            awk -v out="$1" '
                /^table begin$/ { n = 0; last = ""; bad = ""; next }
                /^map 0x[0-9a-f]+ 0x[0-9a-f]+ (r-|-w|rw)$/ && length($2) == 18 && length($3) == 18 {
                    # Of the same length, so strings compare as the numbers do.
                    if ($2 > $3 || (n > 0 && $2 <= last)) bad = "it is not in ascending order at " $2
                    line[n++] = $2 " " $3 " " $4; last = $3
                }
                /^table end / { if (bad == "" && $3 != n) bad = "it has " n " lines and counts " $3 }
                END {
                    printf "" >out
                    for (i = 0; i < n; i++) print line[i] >out
                    if (bad != "") print bad
                }' "$engine_log"
            return
        fi
        sleep 0.02
    done
    echo "the engine gave none"
}

# compare_phase NAME: the files `expect` and `cover` against the engine's table.
compare_phase() {
    local problem count first last prot a b p held
    problem=$(engine_table "$work/table")
    if [[ -n $problem ]]; then
        wrong "table, phase $1: $problem"
        return
    fi
    count=$(wc -l <"$work/table")
    if [[ -s $work/cover ]]; then
        join_ranges <"$work/table" >"$work/have"
        while read -r first last prot; do
            held=
            while read -r a b p; do
                [[ $p != "$prot" || $a > $first || $b < $last ]] || held=1
            done <"$work/have"
            if [[ -n $held ]]; then
                ok "table, phase $1: $first to $last is mapped $prot"
            else
                wrong "table, phase $1: $first to $last is not mapped $prot"
                sed 's/^/# engine: /' "$work/have"
            fi
        done <"$work/cover"
        return
    fi
    join_ranges <"$work/table" >"$work/have"
    join_ranges <"$work/expect" >"$work/want"
    if cmp -s "$work/have" "$work/want"; then
        ok "table, phase $1: $count mappings, $(wc -l <"$work/want") ranges, exactly the guest's"
    else
        wrong "table, phase $1: the engine's table differs from what the guest has mapped (- guest, + engine)"
        diff -U0 "$work/want" "$work/have" | sed -n '3,$s/^/# /p' | grep -v '^# @@' | head -n 40 || :
    fi
}

# ---- Running one guest ---------------------------------------------------------------------------------------------------------

running() {
    [[ -e /proc/$1 && $(sed 's/.*) //; s/ .*//' "/proc/$1/stat" 2>/dev/null) != Z ]]
}

descriptors() {
    ls "/proc/$engine_pid/fd" 2>/dev/null | wc -l
}

# stop_within SECONDS PID: waits for a process to end by itself.
stop_within() {
    local tries
    for ((tries = 0; tries < $1 * 50; tries++)); do
        running "$2" || return 0
        sleep 0.02
    done
    return 1
}

# start_device: the engine, the disk, or the serial port with its line on descriptors 5 (to it) and 6 (from it). Sets `engine_pid`
# and `descriptors_before`.
start_device() {
    local tries
    rm -f "$work"/line.* "$work/sock" "$work/traced"
    mkfifo "$work/line.in" "$work/line.out"
    exec 5<>"$work/line.in" 6<>"$work/line.out"
    local image=()
    [[ $mode != nvme ]] || image=(--image="$work/disk")
    # shellcheck disable=SC2086  # the options are words
    "$program" --socket-path="$socket" "${image[@]}" $options <"$work/line.in" >"$work/line.out" 2>>"$engine_log" 5>&- 6>&- &
    engine_pid=$!
    for ((tries = 0; tries < 250; tries++)); do
        [[ ! -S $socket ]] || break
        running "$engine_pid" || break
        sleep 0.02
    done
    if [[ ! -S $socket ]]; then
        wrong "the $device made no socket"
        sed 's/^/# program: /' "$engine_log"
        kill -KILL "$engine_pid" 2>/dev/null || :
        engine_pid=
        return 1
    fi
    descriptors_before=$(descriptors)
    [[ $socket = "$work/sock" ]] || start_trace
}

# vfu_trace between QEMU and the device. Sets `trace_pid`.
start_trace() {
    local tries
    "$trace" --socket-path="$work/sock" --to="$socket" >"$logs/trace" 2>&1 5>&- 6>&- &
    trace_pid=$!
    for ((tries = 0; tries < 250; tries++)); do
        [[ ! -S $work/sock ]] || break
        running "$trace_pid" || break
        sleep 0.02
    done
}

# It has understood all that went through it, and answered for all of it.
end_trace() {
    local status=0 bad
    kill -TERM "$trace_pid" 2>/dev/null || :
    stop_within 10 "$trace_pid" || kill -KILL "$trace_pid" 2>/dev/null || :
    { wait "$trace_pid"; } 2>/dev/null || status=$?
    trace_pid=
    bad=$(grep -cE 'malformed|not vfio-user|nobody asked|never answered|no such command' "$logs/trace" || :)
    if [[ $status -eq 0 && $bad -eq 0 ]] && grep -q '^session 1: .* messages' "$logs/trace"; then
        ok "vfu_trace has passed on, and understood, $(sed -n 's/^session 1: .* s, \(.* messages\).*/\1/p' "$logs/trace")"
    else
        wrong "vfu_trace ended with status $status, and $bad lines of what it did not understand"
    fi
}

end_device() {
    local status=0
    if [[ $mode = serial ]]; then
        if read -r -t 0 <&6; then
            wrong "the serial port has sent more than it should: $(timeout 1 head -c 64 <&6 | od -An -c | head -n 4)"
        else
            ok "the serial port has sent nothing else"
        fi
    fi
    [[ -z $trace_pid ]] || end_trace
    kill -TERM "$engine_pid" 2>/dev/null || :
    stop_within 10 "$engine_pid" || kill -KILL "$engine_pid" 2>/dev/null || :
    { wait "$engine_pid"; } 2>/dev/null || status=$?
    engine_pid=
    exec 5>&- 6>&-
    # In its sandbox a program can't remove files: the next one replaces the socket.
    [[ $options != *--sandbox* ]] || rm "$socket" || status=1
    if [[ $status -eq 0 && ! -e $socket ]]; then
        ok "the $device ends with status 0 and removes its socket"
    else
        wrong "the $device ended with status $status$([[ ! -e $socket ]] || echo " and left its socket")"
        grep -vE '^(table|map|vfu: ->) ' "$engine_log" | head -n 40 | sed 's/^/# program: /'
    fi
}

# Unmodified QEMU with the device, the guest's second serial line on descriptors 3 (to it) and 4 (from it). Sets `qemu_pid`.
start_qemu() {
    rm -f "$work"/ctl.*
    mkfifo "$work/ctl.in" "$work/ctl.out"
    # Both ends of each pipe are opened for reading and writing, here as in QEMU, so that no open waits for the other side.
    exec 3<>"$work/ctl.in" 4<>"$work/ctl.out"
    # A guest whose kernel panics restarts as well: only the one that is to restart may.
    local reboot=shutdown processors=1
    # With two the driver makes two pairs of queues.
    [[ $mode != nvme ]] || processors=2
    [[ $course != *restart* ]] || reboot=reset
    "${qemu[@]}" -machine q35,memory-backend=m -accel tcg -smp "$processors" -m 512M \
        -object "memory-backend-${memory%%,*},id=m,size=512M$([[ $memory != *,* ]] || echo ",${memory#*,}")" \
        -nodefaults -no-user-config -display none -action "reboot=$reboot" \
        -serial "file:$console" -chardev "pipe,id=ctl,path=$work/ctl" -serial chardev:ctl \
        ${iommu:+-device "$iommu"} \
        -device pcie-root-port,id=root,chassis=1 \
        -device "{\"driver\":\"vfio-user-pci\",\"bus\":\"root\",\"socket\":{\"type\":\"unix\",\"path\":\"$work/sock\"}}" \
        -kernel "$kernel" -initrd "$initramfs" \
        -append "console=ttyS0 loglevel=5 panic=-1 no_timer_check mitigations=off hugepages=4 vfu.mode=$mode $arguments" \
        >"$qemu_log" 2>&1 3>&- 4>&- 5>&- 6>&- &
    qemu_pid=$!
}

# After the guest's last word: QEMU ends by itself, or is killed.
end_qemu() {
    local status=0 line
    # A guest that failed may not get as far as switching itself off.
    if [[ $1 = kill || $1 = crash || -z $verdict ]] || ! stop_within 20 "$qemu_pid"; then
        [[ $1 = kill || $1 = crash || -z $verdict ]] || wrong "QEMU is still there after the guest's end"
        kill -KILL "$qemu_pid" 2>/dev/null || :
    fi
    { wait "$qemu_pid"; } 2>/dev/null || status=$?
    qemu_pid=
    # What the guest had still to say.
    while IFS= read -r -t 0.1 line <&4; do
        [[ $line != FLUSHED* ]] || flushed=${line//[!0-9]/}
    done
    exec 3>&- 4>&-

    if [[ $1 != all ]]; then
        [[ $verdict = BUSY ]] || wrong "${verdict:-the guest was never busy}"
    elif [[ $verdict =~ ^GUEST\ PASS\ [0-9]+$ ]]; then
        ok "$verdict"
    else
        wrong "${verdict:-the guest said neither PASS nor FAIL}"
    fi
    if [[ $1 = all && $verdict != *PASS* || $1 != all && $verdict != BUSY ]]; then
        echo "# last words of $console:"
        tail -n 20 "$console" | sed 's/^/#   /'
    fi
    if [[ $1 = kill && $verdict = BUSY ]]; then
        ok "QEMU was killed while the $device was busy"
    elif [[ $1 = crash && $verdict = BUSY ]]; then
        # What QEMU says about the loss of its device is its own affair.
        ok "the device was killed while the guest wrote; round $flushed was flushed"
    elif [[ -s $qemu_log || $status -ne 0 ]]; then
        wrong "QEMU complained, or left with status $status"
        head -n 20 "$qemu_log" | sed 's/^/# qemu: /'
    else
        ok "QEMU left with status 0 and had nothing to say"
    fi
    local complaints='BUG:|WARNING:|Oops|nobody cared|Call Trace|DMAR:.*fault|AMD-Vi:.*(Event|timed out)'
    [[ $1 = crash ]] || complaints+='|I/O error|nvme.*(timeout|Abort|abort|not ready|removing)|EXT4-fs (error|warning)'
    if grep -aE "$complaints" "$console"; then
        wrong "the guest's kernel complained"
    else
        ok "the guest's kernel did not complain"
    fi
}

# What a client leaves behind when it goes without a word, as QEMU does; the device learns of it in its own time.
compare_left() {
    local tries
    : >"$work/expect"
    : >"$work/cover"
    : >"$work/table"
    for ((tries = 0; tries < 50; tries++)); do
        running "$engine_pid" || break
        [[ $device != engine ]] || engine_table "$work/table" >/dev/null
        [[ -s $work/table || $(descriptors) -gt $descriptors_before ]] || break
        sleep 0.1
    done
    [[ $device != engine ]] || compare_phase "after QEMU"
    if [[ $(descriptors) -eq $descriptors_before ]]; then
        ok "the $device holds $descriptors_before descriptors, as before the guest"
    else
        wrong "the $device holds $(descriptors) descriptors, $descriptors_before before the guest"
        ls -l "/proc/$engine_pid/fd" 2>/dev/null | sed 's/^/# program: /'
    fi
}

# The guest's lines, until it says GUEST or BUSY, its QEMU ends or the time is over. Sets `verdict`.
converse() {
    local line name='' started='' take_pid='' deadline=$((SECONDS + guest_seconds))
    verdict=
    : >"$work/expect"
    : >"$work/cover"
    while [[ -z $verdict ]]; do
        if ! IFS= read -r -t 1 line <&4; then
            running "$qemu_pid" || { wrong "QEMU ended before its guest did"; return; }
            [[ $SECONDS -lt $deadline ]] || { wrong "the guest took more than $guest_seconds s"; return; }
            continue
        fi
        line=${line%$'\r'}
        case $line in
        'ok '*) ok "${line#ok }" ;;
        'FAIL '*) wrong "${line#FAIL }" ;;
        BOOT)
            [[ -z $started ]] || { wrong "the guest has restarted by itself"; return; }
            started=1
            case $mode-$1 in
            nvme-all) echo "all $flushed $mixed_seconds" >&3 ;;
            nvme-*) echo "busy $flushed" >&3 ;;
            *-all) echo all >&3 ;;
            *) echo busy >&3 ;;
            esac
            ;;
        'FLUSHED '*) flushed=${line#FLUSHED } ;;
        'PHASE '*)
            name=${line#PHASE }
            : >"$work/expect"
            : >"$work/cover"
            ;;
        'EXPECT '*) echo "${line#EXPECT }" >>"$work/expect" ;;
        'COVER '*) echo "${line#COVER }" >>"$work/cover" ;;
        WAIT)
            compare_phase "$name"
            echo go >&3
            ;;
        'SAY '*) echo "${line#SAY }" >&5 ;;
        'HEAR '*)
            name=
            IFS= read -r -t 10 name <&6 || :
            if [[ $name = "${line#HEAR }" ]]; then
                ok "the guest says \"$name\""
            else
                wrong "$line: the line is $(printf %q "$name")"
            fi
            echo go >&3
            ;;
        'FEED '*)
            # shellcheck disable=SC2086  # two words
            "$work/guest" stamp ${line#FEED } >&5 &
            ;;
        'TAKE '*)
            # shellcheck disable=SC2086  # two words
            "$work/guest" stamp ${line#TAKE } >"$work/stamp"
            timeout 60 head -c "${line##* }" <&6 >"$work/taken" &
            take_pid=$!
            ;;
        TAKEN)
            wait "$take_pid" || :
            if cmp -s "$work/stamp" "$work/taken"; then
                ok "$(wc -c <"$work/taken") bytes from the guest, each the right one"
            else
                wrong "from the guest $(wc -c <"$work/taken") bytes: $(cmp "$work/stamp" "$work/taken" 2>&1 || :)"
            fi
            echo go >&3
            ;;
        GUEST* | BUSY) verdict=$line ;;
        *) echo "$line" ;;
        esac
    done
}

# Lets a busy guest restart. With --verbose the engine's log, from its last table on, says whether a reset or an unmap came first.
restart() {
    local first tries
    echo go >&3
    echo "# the guest restarts"
    [[ $options = *--verbose* ]] || return 0
    for ((tries = 0; tries < 500; tries++)); do
        first=$(tac "$engine_log" | sed '/^table end /q' | grep -oE 'DEVICE_RESET|DMA_UNMAP' | tail -n 1 || :)
        [[ -z $first ]] || break
        sleep 0.02
    done
    if [[ $first = DEVICE_RESET ]]; then
        ok "QEMU resets the device with every mapping in place"
    else
        wrong "QEMU's first request at the restart was ${first:-neither a reset nor an unmap}"
    fi
}

# The device is killed somewhere in a round of writes. It is up to the next one to have what was flushed before.
crash() {
    sleep "0.$((RANDOM % 600 + 200))"
    kill -KILL "$engine_pid" 2>/dev/null || :
    # A guest that takes a command for done whose device is gone says so now; QEMU itself may abort.
    { wait "$engine_pid"; sleep 0.5; } 2>/dev/null || :
    engine_pid=
    exec 5>&- 6>&-
}

# The file system is at the image's beginning.
check_image() {
    if ! command -v e2fsck >/dev/null; then
        echo "# no e2fsck here to check the image"
    elif e2fsck -fn "$work/disk" >"$work/e2fsck" 2>&1; then
        ok "e2fsck finds no fault with the image"
    else
        wrong "e2fsck finds faults with the image"
        sed 's/^/# e2fsck: /' "$work/e2fsck"
    fi
}

# run_guest NAME, with the columns of its row in the variables of the same names.
run_guest() {
    local step number=0 program=$engine device=engine start=$SECONDS held_before=$passed failed_before=$failed
    local console qemu_log socket=$work/sock
    [[ $1 != traced ]] || socket=$work/traced
    case $mode in
    serial) program=$serial device='serial port' ;;
    nvme) program=$nvme device=disk ;;
    esac
    flushed=0
    rm -f "$work/disk"
    [[ $mode != nvme ]] || truncate -s "$disk_size" "$work/disk"
    engine_log=$logs/$1.engine
    : >"$engine_log"
    echo
    echo "== $1: $course"
    echo "# $version, Linux $kernel_version"
    echo "# IOMMU: ${iommu:-none}, kernel arguments: ${arguments:-none}, memory: $memory, $device: ${options:-no options}"
    start_device || return 0
    qemu_pid=
    for step in $course; do
        if [[ -z $qemu_pid ]]; then
            number=$((number + 1))
            console=$logs/$1-$number.console
            qemu_log=$logs/$1-$number.qemu
            start_qemu
        fi
        converse "$step"
        if [[ $step = restart && $verdict = BUSY ]]; then
            restart
            continue
        fi
        [[ $step != crash || $verdict != BUSY ]] || crash
        end_qemu "$step"
        if [[ -z $engine_pid ]]; then
            start_device || return 0
        else
            compare_left
        fi
    done
    end_device
    [[ $mode != nvme ]] || check_image
    echo "# $1: $((passed - held_before)) passed, $((failed - failed_before)) failed, $((SECONDS - start)) s"
}

# ---- All of them ---------------------------------------------------------------------------------------------------------------

# shellcheck disable=SC2086  # the default is a list of words
[[ $# -ge 1 ]] || set -- $default_guests
for name in "$@"; do
    grep -q "^$name *|" <<<"$guests" || usage
done
[[ $(uname -m) = x86_64 ]] || skip "the guests are x86_64, this machine is $(uname -m)"
for program in "$engine" "$serial" "$nvme" "$trace"; do
    [[ -x $program ]] || { echo "$script: $program is not built" >&2; exit 1; }
done
mkdir -p "$store" "$logs"
store=$(cd "$store" && pwd)
# A UNIX socket's path is short of 108 bytes, wherever BUILD_DIR may be.
work=$(mktemp -d /tmp/vfu-qemu.XXXXXX)

find_qemu
find_busybox
compile_guest guest
compile_guest guest_nvme
version=$("${qemu[@]}" --version | head -n 1)
for name in "$@"; do
    IFS='|' read -r _ mode course memory options flavour iommu arguments <<<"$(grep "^$name *|" <<<"$guests" | sed 's/ *| */|/g')"
    find_kernel "$flavour"
    make_initramfs
    run_guest "$name"
done
echo
echo "$passed passed, $failed failed, $SECONDS s"
[[ $failed -eq 0 ]]
