#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Measures one guest on two disks in turn, on the same image: the one of BUILD_DIR/examples/nvme, and QEMU's own `-device nvme`.
#
#     tests/qemu/bench_nvme.sh BUILD_DIR [--rounds=N] [--seconds=N] [SETUP...]
#
# A SETUP is `none`, without an IOMMU in the guest, `strict` or `lazy`, with intel-iommu. Each round starts the guest once for each
# disk, with the page cache warm, and measures for N seconds (2) each kind of I/O. What is printed of N rounds (5) is the median,
# and the least and the greatest. With `strict` it also prints what the two round trips take that each command then costs. The
# environment is that of run.sh.
#
# Exit status: 0, 1 when something failed, 2 for wrong arguments, 77 when a QEMU or kernel is not to be had here.
set -eu
export LC_ALL=C

script=bench-nvme
here=$(cd "$(dirname "$0")" && pwd)
rounds=5
seconds=2
disk_size=272M
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

# measure SETUP DISK: one guest; appends `SETUP DISK NAME NUMBER` lines to $work/results.
measure() {
    local line verdict='' iommu=() arguments='' disk=() log=$logs/bench-$1-$2
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
        disk=(-drive "if=none,id=disk,format=raw,file=$work/disk" -device nvme,bus=root,drive=disk,serial=own)
    fi
    "${qemu[@]}" -machine q35,memory-backend=m -accel tcg -smp 2 -m 512M \
        -object memory-backend-memfd,id=m,size=512M,share=on -nodefaults -no-user-config -display none -action reboot=shutdown \
        -serial "file:$log.console" -chardev "pipe,id=ctl,path=$work/ctl" -serial chardev:ctl \
        "${iommu[@]}" -device pcie-root-port,id=root,chassis=1 "${disk[@]}" -kernel "$kernel" -initrd "$initramfs" \
        -append "console=ttyS0 loglevel=5 panic=-1 no_timer_check mitigations=off vfu.mode=nvme $arguments" \
        >"$log.qemu" 2>&1 3>&- 4>&- &
    qemu_pid=$!
    while [[ -z $verdict ]]; do
        IFS= read -r -t $((boot_seconds + 10 * seconds)) line <&4 || fail "the guest is silent, see $log.console"
        line=${line%$'\r'}
        case $line in
        BOOT) echo "bench $seconds" >&3 ;;
        'RESULT '*) echo "$1 $2 ${line#RESULT }" >>"$work/results" ;;
        'FAIL '* | 'GUEST FAIL'*) fail "$line, see $log.console" ;;
        'GUEST PASS '*) verdict=$line ;;
        esac
    done
    wait "$qemu_pid" || fail "QEMU left with status $?: $(head -n 3 "$log.qemu")"
    qemu_pid=
    exec 3>&- 4>&-
    [[ -z $device_pid ]] || end_device "$log.device"
}

# The table of medians, with the least and the greatest. A ratio is taken within each round first.
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
        function figure(key, scale, format,   i, list, text) {
            for (i = 1; i <= count[key]; i++) list[i] = value[key, i] / scale
            text = sprintf(format, median(list, count[key]))
            return text sprintf(" (" format " to " format ")", least, most)
        }
        {
            row = $1 " " $3
            if (!(row in seen)) { seen[row] = 1; order[++rows] = row }
            key = row " " $2
            value[key, ++count[key]] = $4
        }
        END {
            printf "%-7s %-13s %-5s %-27s %-27s %s\n", "IOMMU", "random", "", "QEMU", "vfu", "vfu / QEMU"
            for (r = 1; r <= rows; r++) {
                split(order[r], word, " ")
                large = word[2] ~ /-64k-/
                n = count[order[r] " vfu"]
                for (i = 1; i <= n; i++) ratio[i] = value[order[r] " vfu", i] / value[order[r] " qemu", i]
                # In commands of 64 KiB
                scale = large ? 1e6 / 65536 : 1
                own = figure(order[r] " qemu", scale, "%.0f"); ours = figure(order[r] " vfu", scale, "%.0f")
                m = median(ratio, n)
                printf "%-7s %-13s %-5s %-27s %-27s %.2f (%.2f to %.2f)\n", word[1], word[2], large ? "MB/s" : "IOPS", own, ours,
                    m, least, most
                for (i = 1; i <= n; i++) q[i] = value[order[r] " qemu", i]
                for (i = 1; i <= n; i++) v[i] = value[order[r] " vfu", i]
                time[order[r], "qemu"] = 1e6 / median(q, n); time[order[r], "vfu"] = 1e6 / median(v, n)
            }
            # What a strict IOMMU adds to each command; QEMU itself has to do no more for it than to translate anew.
            for (r = 1; r <= rows; r++) {
                split(order[r], word, " ")
                base = "none " word[2]
                if (word[1] != "strict" || word[2] !~ /^read-4k-/ || !(base in seen)) continue
                own = time[order[r], "qemu"] - time[base, "qemu"]; ours = time[order[r], "vfu"] - time[base, "vfu"]
                printf "strict adds to a command of %s: %.0f us with QEMU, %.0f us with vfu: %.0f us for DMA_MAP and DMA_UNMAP\n",
                    word[2], own, ours, ours - own
            }
        }' "$work/results"
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
done
