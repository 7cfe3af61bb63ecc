#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Measures one guest on two disks in turn, on the same image: the one of BUILD_DIR/examples/nvme, and QEMU's own `-device nvme`.
#
#     tests/qemu/bench_nvme.sh BUILD_DIR [--rounds=N] [--seconds=N] [SETUP...]
#
# A SETUP is `none`, without an IOMMU in the guest, `strict` or `lazy`, with intel-iommu. Each round starts the guest once for
# each disk, with the page cache warm, and measures for N seconds (2) each kind of I/O. What is printed of N rounds (5) is the
# median, and the least and the greatest. With `strict` it also prints what the two round trips take that each command then
# costs. The environment is that of run.sh.
#
# Exit status: 0, 1 when something failed, 2 for wrong arguments, 77 when a QEMU or kernel is not to be had here.
set -eu
export LC_ALL=C

script=bench-nvme
here=$(cd "$(dirname "$0")" && pwd)
rounds=5
seconds=2
disk_size=216M
boot_seconds=60

usage() {
    echo "usage: bench_nvme.sh BUILD_DIR [--rounds=N] [--seconds=N] [none|strict|lazy]..." >&2
    exit 2
}

[[ $# -ge 1 && -d $1 ]] || usage
build=$(cd "$1" && pwd)
shift
setups=()
for word in "$@"; do
    case $word in
    --rounds=[1-9]*) rounds=${word#*=} ;;
    --seconds=[1-9]*) seconds=${word#*=} ;;
    none | strict | lazy) setups+=("$word") ;;
    *) usage ;;
    esac
done
[[ ${#setups[@]} -ge 1 ]] || setups=(none strict lazy)
[[ $rounds$seconds =~ ^[0-9]+$ ]] || usage
store=${VFU_QEMU_DIR:-$build/qemu}
nvme=$build/examples/nvme
round_trip=$build/bench/bench_round_trip
logs=$build/qemu/log

device_pid=
qemu_pid=
work=

clean_up() {
    [[ -z $qemu_pid ]] || kill -KILL "$qemu_pid" 2>/dev/null || :
    [[ -z $device_pid ]] || kill -KILL "$device_pid" 2>/dev/null || :
    [[ -z $work ]] || rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

. "$here/common.sh"

fail() {
    echo "$script: $*" >&2
    exit 1
}

# Sets `device_pid`.
start_device() {
    local tries
    rm -f "$work/sock"
    "$nvme" --socket-path="$work/sock" --image="$work/disk" >"$1" 2>&1 3>&- 4>&- &
    device_pid=$!
    for ((tries = 0; tries < 250; tries++)); do
        [[ ! -S $work/sock ]] || return 0
        sleep 0.02
    done
    fail "the device made no socket, see $1"
}

end_device() {
    kill -TERM "$device_pid"
    wait "$device_pid" || fail "the device left with status $?, see $1"
    device_pid=
}

# The processor time of QEMU and the device so far, in hundredths of a second.
processor_time() {
    local pid total=0
    for pid in "$qemu_pid" ${device_pid:+"$device_pid"}; do
        total=$((total + $(sed 's/.*) //' "/proc/$pid/stat" | awk '{ print $12 + $13 }')))
    done
    echo "$total"
}

# measure SETUP DISK [OPTION...]: one guest, whose QEMU may have more options; appends `SETUP DISK NAME NUMBER TIME` lines to
# $work/results, TIME being the microseconds of processor time for a command.
measure() {
    local line verdict='' before now iommu=() arguments='' disk=() log=$logs/bench-$1-$2
    case $1 in
    strict) arguments='intel_iommu=on iommu.strict=1' ;;
    lazy) arguments='intel_iommu=on iommu.strict=0' ;;
    esac
    [[ $1 = none ]] || iommu=(-device intel-iommu,caching-mode=on,intremap=on)
    rm -f "$work"/ctl.*
    mkfifo "$work/ctl.in" "$work/ctl.out"
    exec 3<>"$work/ctl.in" 4<>"$work/ctl.out"
    if [[ $2 = vfu ]]; then
        start_device "$log.device"
        disk=(-device "{\"driver\":\"vfio-user-pci\",\"bus\":\"root\",\"socket\":{\"type\":\"unix\",\"path\":\"$work/sock\"}}")
    else
        # As QEMU has it by default: the image in the page cache, and a pool of threads for it.
        disk=(-drive "if=none,id=disk,format=raw,file=$work/disk" -device nvme,bus=root,drive=disk,serial=own)
    fi
    "${qemu[@]}" -machine q35,memory-backend=m -accel tcg -smp 2 -m 512M \
        -object memory-backend-memfd,id=m,size=512M,share=on -nodefaults -no-user-config -display none -action reboot=shutdown \
        -serial "file:$log.console" -chardev "pipe,id=ctl,path=$work/ctl" -serial chardev:ctl \
        "${iommu[@]}" -device pcie-root-port,id=root,chassis=1 "${disk[@]}" -kernel "$kernel" -initrd "$initramfs" "${@:3}" \
        -append "console=ttyS0 loglevel=5 panic=-1 no_timer_check mitigations=off vfu.mode=nvme $arguments" \
        >"$log.qemu" 2>&1 3>&- 4>&- &
    qemu_pid=$!
    while [[ -z $verdict ]]; do
        IFS= read -r -t $((boot_seconds + 10 * seconds)) line <&4 || fail "the guest is silent, see $log.console"
        line=${line%$'\r'}
        case $line in
        BOOT)
            before=$(processor_time)
            echo "bench $seconds" >&3
            ;;
        'RESULT '*)
            now=$(processor_time)
            echo "$1 $2 ${line#RESULT } $((now - before)) $seconds" |
                awk '{ print $1, $2, $3, $4, $5 * 1e4 / ($4 * $6 + 1) }' >>"$work/results"
            before=$now
            ;;
        'FAIL '* | 'GUEST FAIL'*) fail "$line, see $log.console" ;;
        'GUEST PASS '*) verdict=$line ;;
        esac
    done
    wait "$qemu_pid" || fail "QEMU left with status $?: $(head -n 3 "$log.qemu")"
    qemu_pid=
    exec 3>&- 4>&-
    [[ -z $device_pid ]] || end_device "$log.device"
}

# The tables of medians, with the least and the greatest. A ratio is taken within each round first.
report() {
    awk '
        function median(list, n,   i, k, x) {
            for (i = 2; i <= n; i++) {
                x = list[i]
                for (k = i - 1; k >= 1 && list[k] > x; k--) list[k + 1] = list[k]
                list[k + 1] = x
            }
            least = list[1]; most = list[n]
            return n % 2 ? list[(n + 1) / 2] : (list[n / 2] + list[n / 2 + 1]) / 2
        }
        function figure(of, key, scale, format,   i, list, middle) {
            for (i = 1; i <= count[key]; i++) list[i] = value[of, key, i] * scale
            middle = median(list, count[key])
            return sprintf(format " (" format " to " format ")", middle, least, most)
        }
        function ratio(of, row,   i, list, n, middle) {
            n = count[row " vfu"]
            for (i = 1; i <= n; i++) list[i] = value[of, row " vfu", i] / (value[of, row " qemu", i] + 1e-9)
            middle = median(list, n)
            return sprintf("%.2f (%.2f to %.2f)", middle, least, most)
        }
        function each(row,   i, list, n) { # microseconds from one command to the next
            n = count[row]
            for (i = 1; i <= n; i++) list[i] = 1e6 / value["speed", row, i]
            return median(list, n)
        }
        {
            row = $1 " " $3
            if (!(row in seen)) { seen[row] = 1; order[++rows] = row }
            key = row " " $2
            value["speed", key, ++count[key]] = $4
            value["time", key, count[key]] = $5
        }
        END {
            format = "%-7s %-13s %-5s %-25s %-25s %s\n"
            printf format, "IOMMU", "random", "", "QEMU", "vfu", "vfu / QEMU"
            for (r = 1; r <= rows; r++) {
                split(order[r], word, " ")
                large = word[2] ~ /-64k-/
                scale = large ? 65536 / 1e6 : 1
                printf format, word[1], word[2], large ? "MB/s" : "IOPS", figure("speed", order[r] " qemu", scale, "%.0f"),
                    figure("speed", order[r] " vfu", scale, "%.0f"), ratio("speed", order[r])
            }
            print "\nProcessor time of a command, all of QEMU with the guest, and the device:"
            for (r = 1; r <= rows; r++) {
                split(order[r], word, " ")
                printf format, word[1], word[2], "us", figure("time", order[r] " qemu", 1, "%.1f"),
                    figure("time", order[r] " vfu", 1, "%.1f"), ratio("time", order[r])
            }
            # A strict IOMMU has its price on either disk; what the guest maps is a message to ours.
            for (r = 1; r <= rows; r++) {
                split(order[r], word, " ")
                base = "none " word[2]
                if (word[1] != "strict" || !(base in seen)) continue
                if (!told++) print "\nWhat a strict IOMMU adds to a command:"
                own = each(order[r] " qemu") - each(base " qemu"); ours = each(order[r] " vfu") - each(base " vfu")
                printf "%-7s %-13s %-5s %-25.0f %-25.0f %.0f more\n", word[1], word[2], "us", own, ours, ours - own
            }
        }' "$work/results"
}

# The round trips as QEMU sees them, from its own trace of one more guest; slower than without a trace. A round trip counts from
# the end of its sendmsg() to the arrival of the reply, and in a row to the end of the next sendmsg().
report_trace() {
    : >"$work/results"
    measure strict vfu -trace vfio_user_send_write -trace vfio_user_recv_hdr -D "$work/trace" -msg timestamp=on
    awk '
        # Shell sort: there are many.
        function print_median(name, list, n,   i, gap, k, x) {
            for (gap = int(n / 2); gap > 0; gap = int(gap / 2))
                for (i = gap + 1; i <= n; i++) {
                    x = list[i]
                    for (k = i - gap; k >= 1 && list[k] > x; k -= gap) list[k + gap] = list[k]
                    list[k + gap] = x
                }
            printf "  %-20s %6d us   (9 of 10 within %d us), %d of them\n", name, list[int((n + 1) / 2)],
                list[int((9 * n + 9) / 10)], n
        }
        {
            split($1, clock, /[:T.Z]/)
            at = ((clock[2] * 60 + clock[3]) * 60 + clock[4]) * 1000000 + clock[5]
        }
        $2 == "vfio_user_send_write" {
            sent[$4] = at
            if (answered && at - answered < 100) rows[++row_count] = at - before
            answered = 0
        }
        $2 == "vfio_user_recv_hdr" && ($7 == "0x2" || $7 == "0x3") && $5 in sent {
            if ($7 == "0x2") maps[++map_count] = at - sent[$5]
            else unmaps[++unmap_count] = at - sent[$5]
            before = sent[$5]; answered = at
            delete sent[$5]
        }
        END {
            print "As QEMU waits for them while the guest works:"
            print_median("DMA_MAP", maps, map_count)
            print_median("DMA_UNMAP", unmaps, unmap_count)
            print_median("each in a row", rows, row_count)
        }' "$work/trace"
}

[[ $(uname -m) = x86_64 ]] || skip "the guests are x86_64, this machine is $(uname -m)"
for program in "$nvme" "$round_trip"; do
    [[ -x $program ]] || fail "$program is not built"
done
mkdir -p "$store" "$logs"
store=$(cd "$store" && pwd)
# A UNIX socket's path is short of 108 bytes, wherever BUILD_DIR may be.
work=$(mktemp -d /tmp/vfu-bench.XXXXXX)

find_qemu
find_busybox
compile_guest guest
compile_guest guest_nvme
find_kernel cloud-amd64
make_initramfs
# Written and not sparse, and in the page cache for both.
head -c "$disk_size" /dev/zero >"$work/disk"

echo "# $("${qemu[@]}" --version | head -n 1), Linux $kernel_version, TCG, 2 processors, $rounds rounds of $seconds s each"
for setup in "${setups[@]}"; do
    for ((round = 0; round < rounds; round++)); do
        # Neither is always first.
        order=(qemu vfu)
        [[ $((round % 2)) -eq 0 ]] || order=(vfu qemu)
        for disk in "${order[@]}"; do
            measure "$setup" "$disk"
        done
    done
done
echo
report
for setup in "${setups[@]}"; do
    [[ $setup = strict ]] || continue
    echo
    start_device "$logs/bench-round-trip.device"
    "$round_trip" "$work/sock" || fail "the round trips could not be measured"
    end_device "$logs/bench-round-trip.device"
    report_trace
done
