#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: portable.sh BUILD-DIRECTORY [MACHINE...]
# Runs the tests where bugs hide: as programs of other machines, which are i386 by itself and s390x (big-endian), arm64 and armhf
# under qemu-user; as `lto` (-O3 -flto); under `valgrind`; and with the examples against musl (`musl`). Compilers for other machines,
# QEMU, valgrind and Check are fetched on Debian with the machine's own apt; nothing is installed, everything is unpacked below
# BUILD-DIRECTORY/portable and stays there. What an emulator can't do is left out, and that is said (left_out).
#
#     VFU_PORTABLE_TESTS="test_dev ..."   only these; else all
#     VFU_PORTABLE_DIR=DIR                where all is unpacked, instead of BUILD-DIRECTORY/portable
#
# Exit status: 0 when every test passed, 1 when not, 77 when what is needed can't be had here, but 1 if VFU_CI=1.
set -u
build=$1/portable
shift
[ $# -gt 0 ] || set -- lto musl valgrind i386 s390x arm64 armhf
mkdir -p "$build"
build=$(cd "$build" && pwd)
store=${VFU_PORTABLE_DIR:-$build}
export LC_ALL=C

skip() {
    echo "check-portable: $*" >&2
    [ "${VFU_CI:-}" != 1 ] || exit 1
    exit 77
}

packages() {
    apt-get -c "$store/apt/apt.conf" -qq "$@"
}

apt_ready() {
    [ ! -e "$store/apt/ready" ] || return 0
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null && [ "$(dpkg --print-architecture)" = amd64 ] ||
        skip "the compilers come from Debian's archive, for a PC with Debian or a relative"
    mkdir -p "$store/apt/state/lists/partial" "$store/apt/cache/archives/partial"
    : >"$store/apt/status"
    cat >"$store/apt/apt.conf" <<END
Dir::State "$store/apt/state";
Dir::State::status "$store/apt/status";
Dir::Cache "$store/apt/cache";
APT::Architecture "amd64";
APT::Architectures { "amd64"; "i386"; "s390x"; "arm64"; "armhf"; };
APT::Install-Recommends "false";
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "3";
END
    echo "# reading the package lists"
    # Not every archive has every machine: what is missing shows when it is fetched.
    packages update >/dev/null 2>&1 || :
    touch "$store/apt/ready"
}

# fetch DIRECTORY PACKAGE...: unpacks packages and all that they need.
fetch() {
    directory=$1
    shift
    [ ! -d "$directory" ] || return 0
    apt_ready
    echo "# fetching $*"
    packages clean
    packages -y --download-only install "$@" >/dev/null || skip "$* can't be fetched"
    rm -rf "$directory.new"
    mkdir -p "$directory.new"
    for package in "$store"/apt/cache/archives/*.deb; do
        dpkg-deb -x "$package" "$directory.new" || skip "$package can't be unpacked"
    done
    packages clean
    mv "$directory.new" "$directory"
}

# fetch_check MACHINE: Check for that machine, without what it needs to run: programs are linked statically.
fetch_check() {
    [ ! -d "$store/check-$1" ] || return 0
    apt_ready
    rm -rf "$store/check.new"
    mkdir -p "$store/check.new"
    (cd "$store/check.new" && packages download "check:$1" "libsubunit-dev:$1" >/dev/null 2>&1 &&
        for package in *.deb; do dpkg-deb -x "$package" . && rm "$package" || exit 1; done) || skip "Check can't be fetched for $1"
    mv "$store/check.new" "$store/check-$1"
}

# set_machine MACHINE: how to compile for it and how to run that.
set_machine() {
    triple=
    lib=
    static=-static
    examples_cc=
    emulated=
    options=-O1
    case $1 in
    lto) cc=gcc && options='-O3 -flto=auto' && run= && static= && return ;;
    valgrind)
        cc=gcc && static= && run=valgrind && emulated=valgrind
        if ! command -v valgrind >/dev/null; then
            fetch "$store/valgrind" valgrind
            run="env VALGRIND_LIB=$store/valgrind/usr/libexec/valgrind $store/valgrind/usr/bin/valgrind"
        fi
        run="$run -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite"
        return
        ;;
    musl)
        command -v musl-gcc >/dev/null || skip "no musl-gcc"
        cc=gcc && run= && static= && examples_cc='musl-gcc -static'
        return
        ;;
    i386) triple=i386-linux-gnu && cc='gcc -m32' && run= && static= ;;
    s390x) triple=s390x-linux-gnu && run=qemu-s390x-static ;;
    arm64) triple=aarch64-linux-gnu && run=qemu-aarch64-static ;;
    armhf) triple=arm-linux-gnueabihf && run=qemu-arm-static && options='-O1 -D_FILE_OFFSET_BITS=64' ;; # large files, too
    *) echo "portable.sh: no such machine: $1" >&2 && exit 2 ;;
    esac
    fetch_check "$1"
    if [ -n "$run" ]; then
        emulated=qemu
        fetch "$store/cc-$1" "gcc-$triple" "libc6-dev-$1-cross"
        fetch "$store/qemu" qemu-user-static
        cc=$store/cc-$1/usr/bin/$triple-gcc
        lib=$store/cc-$1/usr/lib/x86_64-linux-gnu
        run=$store/qemu/usr/bin/$run
    fi
}

# The compiler finds the libraries of its own tree; the program doesn't need them.
compile() {
    # shellcheck disable=SC2086 # words on purpose
    LD_LIBRARY_PATH=$lib $cc -std=c11 $options -g -Wall -Wextra ${WERROR:-} -I. -pthread $static ${CPPFLAGS:-} "$@"
}

# A program of another machine, as one that can be executed here.
wrap() {
    printf '#!/bin/sh\nexec %s %s "$@"\n' "$run" "$2" >"$1"
    chmod +x "$1"
}

# What is left out for a machine, a line each: TEST: why, or CASE of TEST: why, which the test itself does by $VFU_EMULATED.
left_out() {
    case $1 in
    s390x | arm64 | armhf)
        echo "test_nvme: QEMU has no preadv2() and pwritev2() for the disk's image"
        echo "test_double_fetch: likewise"
        echo "greedy_client of test_faults: likewise"
        echo "test_sandbox: the filter would have to allow what QEMU itself needs"
        ;;
    valgrind)
        echo "test_sandbox: the filter would have to allow what valgrind itself needs"
        echo "test_siege: valgrind's own memory and descriptors are counted with the engine's"
        for test in engine migration nvme serial tools; do
            echo "test_$test: it gives the example less time than valgrind takes for all of it"
        done
        echo "a row of test_client_hostile (more descriptors than the process may open): valgrind doesn't pass the limit on"
        echo "no_system_call of test_iommu_iterate: valgrind makes some of its own"
        ;;
    esac
    case $1 in
    s390x)
        echo "test_engine: its driver is written for little-endian machines"
        echo "test_tools: likewise"
        echo "test_transcripts: it plays what little-endian machines have sent"
        ;;
    esac
}

# Emulated programs are slow.
export CK_TIMEOUT_MULTIPLIER=${CK_TIMEOUT_MULTIPLIER:-10}
programs='test_double_fetch|test_engine|test_lspci|test_migration|test_nvme.*|test_sandbox|test_serial|test_siege|test_tools'
passed=0
failed=0
for machine in "$@"; do
    set_machine "$machine"
    to=$build/$machine
    mkdir -p "$to/bin/examples" "$to/tests" "$to/examples"
    all=$(cd tests && printf '%s\n' test_*.c | sed 's/\.c$//')
    for test in $(left_out "$machine" | sed -n 's/^\(test_[a-z_]*\):.*/\1/p'); do
        all=$(printf '%s\n' "$all" | grep -vx "$test")
    done
    [ "$machine" != musl ] || all=$(printf '%s\n' "$all" | grep -xE "$programs")
    tests=${VFU_PORTABLE_TESTS:-$all}
    check=$store/check-$machine/usr
    libs="$check/lib/${triple:-}/libcheck.a $check/lib/${triple:-}/libsubunit.a -lrt -lm"
    [ -d "$check" ] || libs=$(pkg-config --libs check)
    tests_cc=$cc
    cc=${examples_cc:-$cc}
    for source in examples/*.c; do
        example=$(basename "$source" .c)
        compile "$source" -o "$to/bin/examples/$example" || exit 1
        wrap "$to/examples/$example" "$to/bin/examples/$example"
    done
    cc=$tests_cc
    compile -c tests/impl.c -o "$to/bin/impl.o" || exit 1
    for test in $tests; do
        impl=$to/bin/impl.o
        ! grep -qE '^ *# *define +VFU_(IOMMU_)?IMPLEMENTATION' "tests/$test.c" || impl=
        # shellcheck disable=SC2086
        compile ${triple:+-I$check/include} "tests/$test.c" $impl -o "$to/bin/$test" $libs || exit 1
        wrap "$to/tests/$test" "$to/bin/$test"
    done
    echo "# $machine"
    left_out "$machine" | sed 's/^/# left out: /'
    unset VFU_EMULATED
    [ -z "$emulated" ] || export VFU_EMULATED="$emulated"
    # shellcheck disable=SC2086
    sh tests/run.sh "$to" $tests >"$to/log"
    cat "$to/log"
    passed=$((passed + $(tail -n 1 "$to/log" | cut -d' ' -f1)))
    failed=$((failed + $(tail -n 1 "$to/log" | cut -d' ' -f3)))
done
echo "all machines: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
