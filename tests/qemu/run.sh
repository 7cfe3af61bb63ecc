#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Runs Linux guests in an unmodified QEMU against BUILD_DIR/examples/dma_engine, and compares the engine's table of mappings with
# what each guest says it has mapped; and one against BUILD_DIR/examples/serial, with which it talks through the guest's driver.
#
#     tests/qemu/run.sh BUILD_DIR [GUEST...]
#
# Needs a QEMU with vfio-user-pci, a Linux kernel with VFIO modules, a static busybox and a C compiler that links statically. What
# the machine lacks is fetched on Debian from Debian's archive, with the mirror, the proxy and the keys that the machine's own apt
# is set up with; nothing is installed, everything is unpacked below BUILD_DIR/qemu and stays there for the next run.
#
#     VFU_QEMU_REQUIRED=1    what is missing is a failure, not a reason to skip
#     VFU_QEMU_DIR=DIR       where QEMU and the kernel are unpacked, instead of BUILD_DIR/qemu
#     VFU_QEMU_ENGINE=FILE   another build of the engine, for example one with sanitizers; the serial port is the one beside it
#
# Exit status: 0 when everything held, 1 when not, 2 for wrong arguments, 77 when a QEMU or kernel is not to be had here.
set -eu
export LC_ALL=C

# The guests: name | mode of guest.c | course | memory backend | options of the program | Debian's kernel | QEMU's IOMMU | kernel
# arguments. The course has a word for each start of the guest's kernel:
#     all        it checks everything and switches itself off
#     kill       QEMU is killed while the engine copies in the guest's memory; the next QEMU finds the same engine
#     restart    the guest restarts while the engine copies, without unmapping anything; QEMU goes on. QEMU's IOMMUs for Intel and
#                virtio reset the device before they unmap, which --verbose lets the engine's log tell; the others unmap first.
# memory-backend-ram has no file to hand over, so every DMA travels as a message. The cloud kernel has no AMD IOMMU.
vtd='intel-iommu,caching-mode=on,intremap=on'
on='intel_iommu=on'
amd='amd-iommu,dma-remap=on,intremap=on'
guests="
plain          | plain         | restart all  | memfd,share=on |           | cloud-amd64 |                  |
plain-messages | plain         | kill all     | ram            |           | cloud-amd64 |                  |
intel-iommu    | vfio          | kill all all | memfd,share=on |           | cloud-amd64 | $vtd             | $on iommu.strict=1
intel-restart  | vfio          | restart all  | memfd,share=on | --verbose | cloud-amd64 | $vtd             | $on iommu.strict=1
intel-lazy     | vfio          | all          | memfd,share=on |           | cloud-amd64 | $vtd             | $on iommu.strict=0
intel-messages | vfio-messages | kill all     | ram            |           | cloud-amd64 | $vtd             | $on iommu.strict=1
intel-no-mmap  | vfio-messages | all          | memfd,share=on | --no-mmap | cloud-amd64 | $vtd             | $on iommu.strict=1
virtio-iommu   | vfio          | restart all  | memfd,share=on | --verbose | cloud-amd64 | virtio-iommu-pci | iommu.strict=1
amd-iommu      | vfio          | restart all  | memfd,share=on |           | amd64       | $amd             | iommu.strict=1
serial         | serial        | all          | memfd,share=on |           | cloud-amd64 |                  |
"
default_guests=$(awk -F'|' 'NF > 1 { gsub(/ /, "", $1); printf "%s ", $1 }' <<<"$guests")
guest_seconds=120

here=$(cd "$(dirname "$0")" && pwd)

usage() {
    echo "usage: run.sh BUILD_DIR [GUEST...]" >&2
    echo "guests: $default_guests" >&2
    exit 2
}

[[ $# -ge 1 && -d $1 ]] || usage
build=$(cd "$1" && pwd)
shift
store=${VFU_QEMU_DIR:-$build/qemu}
engine=${VFU_QEMU_ENGINE:-$build/examples/dma_engine}
serial=$(dirname "$engine")/serial
logs=$build/qemu/log

passed=0
failed=0
engine_pid=
qemu_pid=
debian_ready=
work=

clean_up() {
    [[ -z $qemu_pid ]] || kill -KILL "$qemu_pid" 2>/dev/null || :
    [[ -z $engine_pid ]] || kill -KILL "$engine_pid" 2>/dev/null || :
    [[ -z $work ]] || rm -rf "$work"
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# For what is missing on this machine, not wrong in this project.
skip() {
    echo "check-qemu: $*" >&2
    [[ ${VFU_QEMU_REQUIRED:-0} != 1 ]] || exit 1
    exit 77
}

ok() {
    passed=$((passed + 1))
    echo "ok $*"
}

wrong() {
    failed=$((failed + 1))
    echo "FAIL $*"
}

# ---- What the machine has, or Debian -------------------------------------------------------------------------------------------

# Prints `URI<tab>SUITE<tab>COMPONENTS<tab>OPTIONS` for each archive that the machine's apt knows, options in the one-line style.
apt_sources() {
    local file
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
        [[ -r $file ]] || continue
        sed -n 's/#.*//; s/^[[:space:]]*deb[[:space:]][[:space:]]*//p' "$file" | awk '
            {
                options = ""
                if (sub(/^\[/, "")) {
                    options = $0; sub(/\].*/, "", options)
                    sub(/^[^]]*\][ \t]*/, "")
                }
                components = ""
                for (i = 3; i <= NF; i++) components = components " " $i
                print $1 "\t" $2 "\t" components " \t" options
            }'
    done
    for file in /etc/apt/sources.list.d/*.sources; do
        [[ -r $file ]] || continue
        awk '
            function flush(   u, s, i, k, options) {
                if (value["types"] ~ /(^| )deb( |$)/ && value["enabled"] !~ /^ *no/) {
                    # A key inside the stanza is no file name: apt then looks among the keys it trusts.
                    if (value["signed-by"] ~ /^ *\/[^ ]*$/) { options = value["signed-by"]; sub(/^ */, "signed-by=", options) }
                    if (value["trusted"] ~ /yes/) options = options " trusted=yes"
                    split(value["uris"], u, " "); split(value["suites"], s, " ")
                    for (i = 1; i in u; i++) for (k = 1; k in s; k++)
                        print u[i] "\t" s[k] "\t " value["components"] " \t" options
                }
                split("", value)
            }
            /^#/ { next }
            /^[ \t]*$/ { flush(); next }
            /^[ \t]/ { value[name] = value[name] " " $0; next }
            { name = tolower($0); sub(/:.*/, "", name); text = $0; sub(/^[^:]*:[ \t]*/, "", text); value[name] = text }
            END { flush() }' "$file"
    done
}

# apt with a package database of its own, in which nothing is installed: no root, no lock and no trace on the machine.
debian_apt() {
    local tool=$1
    shift
    "$tool" -c "$store/apt/apt.conf" "$@"
}

debian_setup() {
    [[ -z $debian_ready ]] || return 0
    local release='' codename='' source uri options
    if [[ -r /etc/os-release ]]; then
        release=$(. /etc/os-release && echo "${ID:-}")
        codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    fi
    [[ $release = debian ]] && command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null ||
        skip "not found here, and only a Debian machine can fetch it"

    # Debian's own archive is the one that carries the machine's release in a component main.
    source=$(apt_sources | awk -F'\t' -v codename="$codename" '$2 == codename && $3 ~ / main / { print; exit }')
    [[ -n $source ]] ||
        source=$(apt_sources | awk -F'\t' '$2 !~ /security/ && $3 ~ / main / && $1 ~ /debian\/?$/ { print; exit }')
    [[ -n $source ]] || skip "no Debian archive in this machine's apt sources"
    uri=$(cut -f1 <<<"$source")
    options=$(cut -f4 <<<"$source")

    rm -rf "$store/apt"
    mkdir -p "$store/apt/state/lists/partial" "$store/apt/cache/archives/partial"
    : >"$store/apt/status"
    cat >"$store/apt/sources.list" <<END
deb [$options arch=amd64] $uri trixie main
deb [$options arch=amd64] $uri trixie-backports main
END
    # The machine's own hooks are for its own package database.
    cat >"$store/apt/apt.conf" <<END
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
Dir::State "$store/apt/state";
Dir::State::status "$store/apt/status";
Dir::Cache "$store/apt/cache";
Dir::Etc::sourcelist "$store/apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Default-Release "trixie";
APT::Install-Recommends "false";
APT::Sandbox::User "";
APT::Update::Error-Mode "any";
Acquire::Languages "none";
Acquire::Retries "3";
END
    echo "# reading the package lists of Debian trixie and trixie-backports"
    debian_apt apt-get -qq update || skip "the package lists could not be fetched"
    debian_ready=1
}

# unpack DIRECTORY DEB...: all or nothing.
unpack() {
    local directory=$1 package
    shift
    rm -rf "$directory" "$directory.new"
    mkdir -p "$directory.new"
    for package in "$@"; do
        dpkg-deb -x "$package" "$directory.new"
    done
    mv "$directory.new" "$directory"
}

# Asked about this device alone: the list of all devices loads every module, also those of another QEMU on the machine, and dies.
has_device() {
    "$@" -device vfio-user-pci,help 2>/dev/null | grep '^vfio-user-pci options' >/dev/null
}

# Sets `qemu`, the command to run.
find_qemu() {
    qemu=(qemu-system-x86_64)
    if command -v "${qemu[0]}" >/dev/null && has_device "${qemu[@]}"; then
        return
    fi
    local root=$store/root lib=$store/root/usr/lib/x86_64-linux-gnu
    if [[ ! -d $root ]]; then
        debian_setup
        echo "# fetching QEMU from trixie-backports"
        debian_apt apt-get -qq -y --download-only -t trixie-backports install qemu-system-x86 ||
            skip "QEMU could not be fetched"
        unpack "$root" "$store"/apt/cache/archives/*.deb
        debian_apt apt-get clean
    fi
    # The tree brings its own C library, so it runs on any release.
    export QEMU_MODULE_DIR=$lib/qemu
    qemu=("$lib/ld-linux-x86-64.so.2" --library-path "$lib:$root/usr/lib" "$root/usr/bin/qemu-system-x86_64"
        -L "$root/usr/share/qemu" -L "$root/usr/share/seabios")
    has_device "${qemu[@]}" || skip "the QEMU in $root has no vfio-user-pci"
}

find_busybox() {
    local missing
    busybox=$(command -v busybox || :)
    # A dynamic program names its interpreter; the guest has no libraries.
    if [[ -n $busybox ]] && ! grep -q '/ld-\(linux\|musl\)' "$busybox"; then
        missing=$(printf '%s\n' cpio insmod mount poweroff sed sh sleep stty xzcat zcat |
            grep -vxFf <("$busybox" --list 2>/dev/null) || :)
        [[ -n $missing ]] || return 0
    fi
    busybox=$store/busybox/usr/bin/busybox
    if [[ ! -x $busybox ]]; then
        debian_setup
        (cd "$store/apt" && debian_apt apt-get -qq download busybox-static) || skip "busybox could not be fetched"
        unpack "$store/busybox" "$store"/apt/busybox-static_*.deb
        rm "$store"/apt/busybox-static_*.deb
    fi
}

# fits CONFIG: whether a kernel has built in what the guest needs before it has modules.
fits() {
    local option
    for option in BLK_DEV_INITRD RD_GZIP DEVTMPFS SERIAL_8250_CONSOLE PCI_MSI HUGETLBFS INTEL_IOMMU AMD_IOMMU IRQ_REMAP; do
        grep -q "^CONFIG_$option=y" "$1" || return 1
    done
    grep -q '^CONFIG_VFIO_PCI=[ym]' "$1" && ! grep -q '^# CONFIG_VFIO_CONTAINER is not set' "$1"
}

# find_kernel FLAVOUR: the machine's own or Debian's linux-image-FLAVOUR. Sets `kernel`, its `modules` (a directory) and
# `kernel_version`.
find_kernel() {
    local config package directory=$store/linux-image-$1
    for config in /boot/config-* /lib/modules/*/config; do
        [[ -r $config ]] && fits "$config" || continue
        kernel_version=${config#/boot/config-}
        [[ $config = /boot/* ]] || kernel_version=$(basename "$(dirname "$config")")
        modules=/lib/modules/$kernel_version
        for kernel in "/boot/vmlinuz-$kernel_version" "$modules/vmlinuz"; do
            [[ ! -r $kernel || ! -d $modules/kernel ]] || return 0
        done
    done
    if [[ ! -d $directory ]]; then
        debian_setup
        echo "# fetching linux-image-$1 from trixie"
        package=$(debian_apt apt-cache depends "linux-image-$1" | awk '$1 == "Depends:" { print $2; exit }')
        [[ -n $package ]] || skip "Debian trixie has no linux-image-$1"
        (cd "$store/apt" && debian_apt apt-get -qq download "$package") || skip "the kernel could not be fetched"
        unpack "$directory" "$store"/apt/linux-image-*.deb
        rm "$store"/apt/linux-image-*.deb
    fi
    kernel=$(echo "$directory"/boot/vmlinuz-*)
    kernel_version=${kernel##*/vmlinuz-}
    modules=$directory/usr/lib/modules/$kernel_version
}

# ---- The guest's file system ---------------------------------------------------------------------------------------------------

compile_guest() {
    local flags=(-std=c11 -O2 -Wall -Wextra -static -o "$work/guest" "$here/guest.c")
    if command -v musl-gcc >/dev/null &&
        musl-gcc -idirafter /usr/include -idirafter "/usr/include/$(uname -m)-linux-gnu" "${flags[@]}"; then
        return
    fi
    command -v gcc >/dev/null || skip "neither musl-gcc nor gcc to compile the guest program"
    gcc "${flags[@]}" || skip "the guest program can't be linked statically here"
}

# Copies the modules that the guest loads, in the order of loading; what a kernel has built in or never had is left out.
copy_modules() {
    local name file number=10
    for name in virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio-iommu \
        irqbypass iommufd_driver iommufd vfio vfio_virqfd vfio_iommu_type1 vfio-pci-core vfio-pci; do
        file=$(find "$modules/kernel" -name "$name.ko*" -o -name "${name//-/_}.ko*" | head -n 1)
        number=$((number + 1))
        case $file in
        '') ;;
        *.xz) "$busybox" xzcat "$file" >"$1/$number-$name.ko" ;;
        *.gz) "$busybox" zcat "$file" >"$1/$number-$name.ko" ;;
        *.zst) zstd -qdc "$file" >"$1/$number-$name.ko" || skip "no zstd to unpack $file" ;;
        *) cp "$file" "$1/$number-$name.ko" ;;
        esac
    done
}

# Sets `initramfs`, made once for each kernel. The kernel's messages go to the first serial line, the second is the guest
# program's.
make_initramfs() {
    local root=$work/$kernel_version
    initramfs=$root.gz
    [[ ! -e $initramfs ]] || return 0
    mkdir -p "$root/bin" "$root/dev" "$root/proc" "$root/sys" "$root/modules"
    cp "$busybox" "$root/bin/busybox"
    cp "$work/guest" "$root/guest"
    copy_modules "$root/modules"
    cat >"$root/init" <<'END'
#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t devtmpfs none /dev
$bb mount -t proc none /proc
$bb mount -t sysfs none /sys
for file in /modules/*; do
    case $file in
    # A guest without interrupt remapping would be refused VFIO otherwise; this guest has nobody to protect.
    *vfio_iommu_type1*) $bb insmod "$file" allow_unsafe_interrupts=1 ;;
    *) $bb insmod "$file" ;;
    esac
done
mode=$($bb sed -n 's/.*vfu\.mode=\([a-z-]*\).*/\1/p' /proc/cmdline)
# Raw before the first byte, or the line would echo the host's answers back to it.
$bb stty -F /dev/ttyS1 raw -echo
/guest "$mode" </dev/ttyS1 >/dev/ttyS1 2>&1
status=$?
[ $status -le 1 ] || echo "GUEST FAIL, exit status $status" >/dev/ttyS1
$bb sleep 0.1
$bb poweroff -f
END
    chmod 755 "$root/init"
    (cd "$root" && find . | "$busybox" cpio -o -H newc 2>/dev/null | gzip -1) >"$initramfs"
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

# start_device NAME: the engine, or the serial port with its line on descriptors 5 (to it) and 6 (from it). Sets `engine_pid`,
# `engine_log`, and `descriptors_before`.
start_device() {
    local tries
    engine_log=$logs/$1.engine
    rm -f "$work"/line.* "$work/sock"
    mkfifo "$work/line.in" "$work/line.out"
    exec 5<>"$work/line.in" 6<>"$work/line.out"
    # shellcheck disable=SC2086  # the options are words
    "$program" --socket-path="$work/sock" $options <"$work/line.in" >"$work/line.out" 2>"$engine_log" 5>&- 6>&- &
    engine_pid=$!
    for ((tries = 0; tries < 250; tries++)); do
        [[ ! -S $work/sock ]] || break
        running "$engine_pid" || break
        sleep 0.02
    done
    if [[ ! -S $work/sock ]]; then
        wrong "the $device made no socket"
        sed 's/^/# program: /' "$engine_log"
        kill -KILL "$engine_pid" 2>/dev/null || :
        engine_pid=
        return 1
    fi
    descriptors_before=$(descriptors)
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
    kill -TERM "$engine_pid" 2>/dev/null || :
    stop_within 10 "$engine_pid" || kill -KILL "$engine_pid" 2>/dev/null || :
    { wait "$engine_pid"; } 2>/dev/null || status=$?
    engine_pid=
    exec 5>&- 6>&-
    if [[ $status -eq 0 && ! -e $work/sock ]]; then
        ok "the $device ends with status 0 and removes its socket"
    else
        wrong "the $device ended with status $status$([[ ! -e $work/sock ]] || echo " and left its socket")"
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
    local reboot=shutdown
    [[ $course != *restart* ]] || reboot=reset
    "${qemu[@]}" -machine q35,memory-backend=m -accel tcg -smp 1 -m 512M \
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
    local status=0
    # A guest that failed may not get as far as switching itself off.
    if [[ $1 = kill || -z $verdict ]] || ! stop_within 20 "$qemu_pid"; then
        [[ $1 = kill || -z $verdict ]] || wrong "QEMU is still there after the guest's end"
        kill -KILL "$qemu_pid" 2>/dev/null || :
    fi
    { wait "$qemu_pid"; } 2>/dev/null || status=$?
    qemu_pid=
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
        ok "QEMU was killed while the engine copied"
    elif [[ -s $qemu_log || $status -ne 0 ]]; then
        wrong "QEMU complained, or left with status $status"
        head -n 20 "$qemu_log" | sed 's/^/# qemu: /'
    else
        ok "QEMU left with status 0 and had nothing to say"
    fi
    if grep -aE 'BUG:|WARNING:|Oops|nobody cared|Call Trace|DMAR:.*fault|AMD-Vi:.*(Event|timed out)' "$console"; then
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
        [[ $mode = serial ]] || engine_table "$work/table" >/dev/null
        [[ -s $work/table || $(descriptors) -gt $descriptors_before ]] || break
        sleep 0.1
    done
    [[ $mode = serial ]] || compare_phase "after QEMU"
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
            if [[ $1 = all ]]; then echo all >&3; else echo busy >&3; fi
            ;;
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

# run_guest NAME, with the columns of its row in the variables of the same names.
run_guest() {
    local step number=0 program=$engine device=engine start=$SECONDS held_before=$passed failed_before=$failed
    local console qemu_log
    [[ $mode != serial ]] || { program=$serial; device='serial port'; }
    echo
    echo "== $1: $course"
    echo "# $version, Linux $kernel_version"
    echo "# IOMMU: ${iommu:-none}, kernel arguments: ${arguments:-none}, memory: $memory, $device: ${options:-no options}"
    start_device "$1" || return 0
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
        end_qemu "$step"
        compare_left
    done
    end_device
    echo "# $1: $((passed - held_before)) passed, $((failed - failed_before)) failed, $((SECONDS - start)) s"
}

# ---- All of them ---------------------------------------------------------------------------------------------------------------

# shellcheck disable=SC2086  # the default is a list of words
[[ $# -ge 1 ]] || set -- $default_guests
for name in "$@"; do
    grep -q "^$name *|" <<<"$guests" || usage
done
[[ $(uname -m) = x86_64 ]] || skip "the guests are x86_64, this machine is $(uname -m)"
for program in "$engine" "$serial"; do
    [[ -x $program ]] || { echo "check-qemu: $program is not built" >&2; exit 1; }
done
mkdir -p "$store" "$logs"
store=$(cd "$store" && pwd)
# A UNIX socket's path is short of 108 bytes, wherever BUILD_DIR may be.
work=$(mktemp -d /tmp/vfu-qemu.XXXXXX)

find_qemu
find_busybox
compile_guest
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
