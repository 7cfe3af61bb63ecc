# SPDX-License-Identifier: MIT
# shellcheck shell=bash disable=SC2154
#
# For run.sh and bench_nvme.sh, which source it: QEMU, a kernel, a busybox, the guest programs and the guest's file system. They
# set `script`, their name, `here`, this directory, `work`, a directory that ends with them, and `store`, where what was fetched
# stays.

# For what is missing on this machine, not wrong in this project.
skip() {
    echo "$script: $*" >&2
    [[ ${VFU_QEMU_REQUIRED:-0} != 1 ]] || exit 1
    exit 77
}

# ---- What the machine has, or Debian -------------------------------------------------------------------------------------------

# shellcheck source=tests/unpack.sh
. "$here/../unpack.sh"

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
        missing=$(printf '%s\n' cpio insmod mke2fs mount poweroff sed sh sleep stty xzcat zcat |
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

# fits CONFIG: whether a kernel has built in what the guest needs before it has modules, and all that it needs for a disk.
fits() {
    local option
    for option in BLK_DEV_INITRD RD_GZIP DEVTMPFS SERIAL_8250_CONSOLE PCI_MSI HUGETLBFS INTEL_IOMMU AMD_IOMMU IRQ_REMAP \
        SMP AIO BLK_DEV_NVME EXT4_FS; do
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

# compile_guest NAME: a guest program, into $work.
compile_guest() {
    local flags=(-std=c11 -O2 -Wall -Wextra -pthread -static -o "$work/$1" "$here/$1.c")
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
    cp "$work/guest" "$work/guest_nvme" "$root/"
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
program=/guest
[ "$mode" != nvme ] || program=/guest_nvme
$program "$mode" </dev/ttyS1 >/dev/ttyS1 2>&1
status=$?
[ $status -le 1 ] || echo "GUEST FAIL, exit status $status" >/dev/ttyS1
$bb sleep 0.1
$bb poweroff -f
END
    chmod 755 "$root/init"
    (cd "$root" && find . | "$busybox" cpio -o -H newc 2>/dev/null | gzip -1) >"$initramfs"
}
