#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: deps.sh [firmware]
# Installs what the tests need, with the system's package manager. Prints each command that it runs; leaves alone what is there.
# The needed packages suffice for `make check`; a further one that can't be had only makes some cases of it print "skip".
# With `firmware` also the large ones that `make check-firmware` needs: a compiler and a QEMU for Arm.
set -eu

as_root() {
    if [ "$(id -u)" -ne 0 ]; then
        set -- sudo "$@"
    fi
    echo "+ $*"
    "$@"
}

pc=false
case $(uname -m) in
x86_64 | amd64) pc=true ;;
esac

# For each package manager: the packages, whether one is installed, how to install some.
if command -v apt-get >/dev/null 2>&1; then
    needed="gcc g++ libc6-dev make check pkg-config clang"
    further="libclang-rt-dev musl-tools busybox-static pciutils"
    firmware="gcc-arm-none-eabi qemu-system-arm"
    if $pc; then further="$further gcc-multilib"; fi
    installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q ' installed$'; }
    # Package lists may be old, or absent in a container; an update that fails need not matter.
    refresh() { as_root apt-get update || true; }
    install() { as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"; }
elif command -v dnf >/dev/null 2>&1; then
    needed="gcc gcc-c++ libasan libubsan libtsan make check-devel pkgconf-pkg-config clang diffutils"
    further="compiler-rt musl-gcc busybox pciutils"
    firmware="arm-none-eabi-gcc-cs qemu-system-arm"
    if $pc; then further="$further glibc-devel.i686 libgcc.i686"; fi
    installed() { rpm -q "$1" >/dev/null 2>&1; }
    refresh() { :; }
    install() { as_root dnf install -y "$@"; }
elif command -v apk >/dev/null 2>&1; then
    needed="gcc g++ musl-dev linux-headers make check-dev pkgconf clang compiler-rt"
    further="bash busybox-static pciutils"
    firmware="gcc-arm-none-eabi qemu-system-arm"
    installed() { apk info -e "$1" >/dev/null 2>&1; }
    refresh() { :; }
    install() { as_root apk add "$@"; }
elif command -v pacman >/dev/null 2>&1; then
    needed="gcc make check pkgconf clang compiler-rt diffutils"
    further="musl busybox pciutils"
    firmware="arm-none-eabi-gcc qemu-system-arm"
    if $pc; then further="$further lib32-glibc lib32-gcc-libs"; fi
    installed() { pacman -Q "$1" >/dev/null 2>&1; }
    refresh() { :; }
    install() { as_root pacman -Sy --needed --noconfirm "$@"; }
elif command -v zypper >/dev/null 2>&1; then
    needed="gcc gcc-c++ make check-devel pkg-config clang diffutils"
    further="musl-devel busybox-static pciutils"
    firmware="cross-arm-none-eabi-gcc qemu-arm"
    if $pc; then further="$further gcc-32bit glibc-devel-32bit"; fi
    installed() { rpm -q --whatprovides "$1" >/dev/null 2>&1; }
    refresh() { :; }
    install() { as_root zypper --non-interactive install "$@"; }
else
    echo "deps: no apt-get, dnf, apk, pacman or zypper here." >&2
    echo "deps: the tests need a C and a C++ compiler, clang, make, pkg-config and Check (https://libcheck.github.io/check/)" >&2
    exit 1
fi

if [ "${1:-}" = firmware ]; then
    further="$further $firmware"
fi

# The packages of a list that are not installed.
missing() {
    for package; do
        if ! installed "$package"; then
            printf '%s ' "$package"
        fi
    done
}

# shellcheck disable=SC2086 # lists of words
{
    needed=$(missing $needed)
    further=$(missing $further)
    if [ -z "$needed$further" ]; then
        echo "deps: everything is there"
        exit 0
    fi
    refresh
    if [ -n "$needed" ]; then
        install $needed
    fi
    # One unknown name makes a package manager refuse the whole list, so a failure is followed by one attempt each.
    if [ -n "$further" ] && ! install $further; then
        for package in $further; do
            install "$package" || echo "deps: no $package: some tests will be skipped" >&2
        done
    fi
}
