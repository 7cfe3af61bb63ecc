#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: tests/compile/run.sh DIRECTORY, in the project's directory. What is compiled goes to DIRECTORY.
# Compiles the headers as users do: each compiler, standard and option that they support, alone and together, in C and in C++,
# with the warnings as errors. One line per case; the compiler's words where one fails. A case whose tool isn't there is skipped,
# which counts as a failure when VFU_CI=1. The last line is `N passed, N failed`.
set -u
mkdir -p "$1"
out=$(cd "$1" && pwd)
top=$(pwd)
here=$top/tests/compile
rm -rf "$out" && mkdir "$out" || exit 1
warn="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"
headers="vfu.h vfu_iommu.h"
jobs=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
trap 'exit 1' HUP INT TERM

# ---- the pool: cases run in the background, as many at a time as there are processors, and are reported in order ----

passed=0
failed=0
skipped=0
number=0
running=0
queue= # words "number:pid", the oldest first

# start NAME COMMAND...: the case passes when the command, run in a directory of its own, succeeds; 77 skips it.
start() {
    [ $running -lt "$jobs" ] || report
    number=$((number + 1))
    mkdir "$out/$number"
    echo "$1" >"$out/$number/name"
    shift
    (cd "$out/$number" && "$@") >"$out/$number/log" 2>&1 </dev/null &
    queue="$queue$number:$! "
    running=$((running + 1))
}

report() {
    oldest=${queue%% *}
    queue=${queue#* }
    running=$((running - 1))
    wait "${oldest#*:}"
    status=$?
    place=$out/${oldest%%:*}
    title=$(cat "$place/name")
    if [ $status -eq 0 ]; then
        passed=$((passed + 1))
        echo "ok    $title"
    elif [ $status -eq 77 ]; then
        skipped=$((skipped + 1))
        echo "skip  $title: $(cat "$place/log")"
    else
        failed=$((failed + 1))
        echo "FAIL  $title"
        sed 's/^/      | /' "$place/log" | head -n 40
    fi
}

# Waits for every case so far; what they made can be used then.
finish() {
    while [ $running -gt 0 ]; do
        report
    done
}

# ---- helpers for cases ----

need() {
    for tool; do
        if ! command -v "$tool" >/dev/null 2>&1; then
            echo "no $tool"
            exit 77
        fi
    done
}

# Whether a compiler makes programs with these options at all.
need_option() {
    need "$1"
    echo '#include <stdio.h>' >probe.c
    echo 'int main(void) { return puts("") < 0; }' >>probe.c
    if ! "$@" -o probe probe.c >/dev/null 2>&1; then
        echo "$* makes no programs here"
        exit 77
    fi
}

# file NAME LINE...: a C file of these lines.
file() {
    path=$1
    shift
    printf '%s\n' "$@" >"$path"
}

# Each line of the input is a name that should not be there.
none() {
    awk -v what="$1" '{ print what ": " $0; n++ } END { exit n > 0 }'
}

# The functions that the headers declare for the linker, by the compiler's own account.
declared() {
    gcc -std=c11 -I"$top" -fsyntax-only -aux-info protos "$1" || exit 1
    sed -n 's/^.*:NC \*\/ extern [^(]*[ *]\(vfu_[a-z0-9_]*\) (.*/\1/p' protos | sort -u
}

exported() {
    nm -g --defined-only "$1" | awk 'NF == 3 { print $3 }' | sort -u
}

# ---- cases ----

declarations() { # COMPILER STANDARD EXTENSION HEADER
    need "$1"
    file x."$3" "#include \"$4\""
    # shellcheck disable=SC2086 # $warn is a list, here and below
    "$1" -std="$2" $warn -I"$top" -c -o x.o x."$3"
}

implementation() { # COMPILER STANDARD OPTIMISATION HEADER MACRO [OPTION...]
    compiler=$1 standard=$2 level=$3 header=$4 macro=$5
    shift 5
    need_option "$compiler" "$@"
    file x.c "#define $macro" "#include \"$header\""
    # shellcheck disable=SC2086
    "$compiler" -std="$standard" "$level" $warn -I"$top" "$@" -c -o x.o x.c
}

extern_c() {
    for header in $headers; do
        grep -q 'extern "C" {' "$top/$header" || { echo "$header: no extern \"C\""; return 1; }
    done
}

# The object may call nothing but five functions of <string.h>, and where 64-bit division is not an instruction the compiler's own
# routines for it, which come with the compiler. The source includes nothing but the compiler's own headers and a <string.h> with
# just these five.
freestanding() { # COMPILER HEADER MACROS [OPTION...]
    compiler=$1 header=$2 macros=$3
    shift 3
    need_option "$compiler" "$@"
    need nm
    : >x.c
    for macro in $macros; do
        echo "#define $macro" >>x.c
    done
    echo "#include \"$header\"" >>x.c
    case $compiler in
    *clang*) own="-isystem $(clang -print-resource-dir)/include" ;;
    *) own="-isystem $("$compiler" -print-file-name=include) -isystem $("$compiler" -print-file-name=include-fixed)" ;;
    esac
    # Options that distributions switch on and that want a libc: stack protector, position independence.
    # shellcheck disable=SC2086
    "$compiler" -std=c11 $warn -ffreestanding -nostdlib -nostdinc $own -fno-stack-protector -fno-pic -I"$top" \
        -idirafter "$here/freestanding" "$@" -c -o x.o x.c || return 1
    may='memcpy|memmove|memset|memcmp|strlen'
    case " $* " in
    *' -m32 '*) may="$may|__udivdi3|__umoddi3|__udivmoddi4" ;;
    esac
    nm -u x.o | awk '{ print $NF }' | grep -vxE "$may" | none "calls"
}

prefix() { # OBJECT
    need nm
    [ -n "$(exported "$1")" ] || { echo "nothing is exported"; return 1; }
    exported "$1" | grep -v '^vfu_' | none "exported without the prefix"
}

static() { # COMPILER HEADER MACRO
    need "$1" nm
    file x.c "#define VFU_STATIC" "#define $3" "#include \"$2\"" "int main(void);" "int main(void)" "{" "    return 0;" "}"
    # shellcheck disable=SC2086
    "$1" -std=c11 -O2 $warn -I"$top" -pthread -o x x.c || return 1
    # shellcheck disable=SC2086
    "$1" -std=c11 -O2 $warn -I"$top" -c -o x.o x.c || return 1
    exported x.o | grep -v '^main$' | none "exported in spite of VFU_STATIC"
}

# What is declared is defined, and what is exported is declared.
complete() { # OBJECT HEADER
    need gcc nm
    file x.c "#include \"$2\""
    declared x.c >declarations
    exported "$1" >defined
    [ -s declarations ] || { echo "no declarations found"; return 1; }
    comm -23 declarations defined | none "declared, not defined" && comm -13 declarations defined | none "exported, not declared"
}

# Compiles, links and runs a program of one file that has main from program.h.
runs() { # LINE... -- COMPILER [OPTION...]
    : >x.c
    while [ "$1" != -- ]; do
        echo "$1" >>x.c
        shift
    done
    shift
    need_option "$@"
    echo '#include "program.h"' >>x.c
    printf '%s\n' 'int main(void)' '{' '    return program();' '}' >>x.c
    # shellcheck disable=SC2086
    "$@" -std=c11 -O2 $warn -I"$top" -I"$here" -pthread -o x x.c && ./x
}

two_files() { # COMPILER: one file of a program has the implementation, the other includes the headers and uses them
    need "$1"
    file a.c '#define VFU_IMPLEMENTATION' '#include "vfu.h"' '#include "vfu_iommu.h"'
    file b.c '#include "vfu_iommu.h"' '#include "vfu.h"' '#include "program.h"' 'int main(void)' '{' '    return program();' '}'
    # shellcheck disable=SC2086
    "$1" -std=c11 -O2 $warn -I"$top" -I"$here" -pthread -o x a.c b.c && ./x
}

# Every function by its address, so that each is declared, has C linkage and is found by the linker.
cxx() { # COMPILER OBJECT
    need "$1" nm
    {
        echo '#include "vfu.h"'
        echo '#include "vfu_iommu.h"'
        echo '#include "program.h"'
        echo 'using function = void (*)();'
        echo 'static const function functions[] = {'
        nm -g --defined-only "$2" | sed -n 's/^.* T \(vfu_.*\)$/    reinterpret_cast<function>(\&\1),/p'
        echo '};'
        echo 'int main()'
        echo '{'
        echo '    for (function f : functions)'
        echo '        if (f == nullptr)'
        echo '            return 2;'
        echo '    return program();'
        echo '}'
    } >x.cpp
    # shellcheck disable=SC2086
    "$1" -std=c++17 -O2 $warn -I"$top" -I"$here" -pthread -o x x.cpp "$2" && ./x
}

# The names that libvfio-user.h takes, before and after ours, declared and implemented; the real header where it is installed.
beside() { # COMPILER STANDARD EXTENSION LINE...
    compiler=$1 standard=$2 extension=$3
    shift 3
    need "$compiler"
    file x."$extension" "$@"
    # shellcheck disable=SC2086
    "$compiler" -std="$standard" $warn -I"$top" -I"$here" -c -o x.o x."$extension"
}

# As its first lines say: compiled alone, with these options and no others.
example() { # SOURCE COMPILER [OPTION...]
    source=$1
    shift
    need_option "$@"
    # shellcheck disable=SC2086
    "$@" -std=c11 -O2 $warn -I"$top" -pthread -o x "$source"
}

# The program in the README, as it stands there; it is given a socket's path, opens it and stays.
readme() { # COMPILER
    need "$1"
    sh "$here/readme.sh" c "$top/README.md" >x.c
    [ -s x.c ] || { echo "README.md has no C block"; return 1; }
    # shellcheck disable=SC2086
    "$1" -std=c11 -O2 $warn -I"$top" -pthread -o x x.c || return 1
    # shellcheck disable=SC2086
    "$1" -std=c11 -O2 $warn -I"$top" -pthread -o greet "$here/greet.c" || return 1
    sockets=$(mktemp -d) || return 1 # a socket's path is short
    ./x "$sockets/s" &
    device=$!
    ./greet "$sockets/s"
    status=$?
    kill -KILL $device 2>/dev/null
    wait $device
    rm -rf "$sockets"
    return $status
}

# pkg-config finds what `make install` has put somewhere, a program builds with it, and `make uninstall` leaves no file behind.
installs() {
    need make pkg-config cc
    make -s -C "$top" install BUILD="$out/$number.build" DESTDIR="$PWD/root" PREFIX=/opt/vfu || return 1
    PKG_CONFIG_PATH=$PWD/root/opt/vfu/share/pkgconfig
    PKG_CONFIG_SYSROOT_DIR=$PWD/root
    export PKG_CONFIG_PATH PKG_CONFIG_SYSROOT_DIR
    version=$(pkg-config --modversion vfu) || return 1
    file x.c '#define VFU_IMPLEMENTATION' '#include <vfu.h>' '#include "program.h"' 'int main(void)' '{' \
        "    return strcmp(VFU_VERSION, \"$version\") != 0 || program();" '}'
    # shellcheck disable=SC2046
    cc -std=c11 -O2 -I"$here" $(pkg-config --cflags vfu) -o x x.c $(pkg-config --libs vfu) && ./x || return 1
    make -s -C "$top" uninstall DESTDIR="$PWD/root" PREFIX=/opt/vfu || return 1
    find root -type f | none "left behind"
}

# ---- the table ----

start 'extern "C" in each header' extern_c
for header in $headers; do
    for standard in c11 c17; do
        start "declarations of $header, gcc -std=$standard" declarations gcc $standard c "$header"
        start "declarations of $header, clang -std=$standard" declarations clang $standard c "$header"
    done
    start "declarations of $header, g++ -std=c++17" declarations g++ c++17 cpp "$header"
    start "declarations of $header, clang++ -std=c++17" declarations clang++ c++17 cpp "$header"
done

for compiler in gcc clang; do
    for standard in c11 c17; do
        for level in -O0 -O2 -O3 -Os; do
            start "implementation, $compiler -std=$standard $level" \
                implementation $compiler $standard $level vfu.h VFU_IMPLEMENTATION
            start "vIOMMU alone, $compiler -std=$standard $level" \
                implementation $compiler $standard $level vfu_iommu.h VFU_IOMMU_IMPLEMENTATION
        done
    done
    start "implementation, $compiler -m32" implementation $compiler c11 -O2 vfu.h VFU_IMPLEMENTATION -m32
    start "implementation, $compiler -DNDEBUG" implementation $compiler c11 -O2 vfu.h VFU_IMPLEMENTATION -DNDEBUG
    start "vIOMMU alone, $compiler -m32" implementation $compiler c11 -O2 vfu_iommu.h VFU_IOMMU_IMPLEMENTATION -m32
    start "VFU_STATIC, $compiler" static $compiler vfu.h VFU_IMPLEMENTATION
    start "VFU_STATIC, vIOMMU alone, $compiler" static $compiler vfu_iommu.h VFU_IOMMU_IMPLEMENTATION
    for level in -O0 -O2 -Os; do
        for width in -m64 -m32; do
            start "codec alone, freestanding, $compiler $level $width" \
                freestanding $compiler vfu.h 'VFU_CODEC_ONLY VFU_IMPLEMENTATION' $level $width
            start "vIOMMU alone, freestanding, $compiler $level $width" \
                freestanding $compiler vfu_iommu.h VFU_IOMMU_IMPLEMENTATION $level $width
        done
    done
done
start "implementation, musl-gcc" implementation musl-gcc c11 -O2 vfu.h VFU_IMPLEMENTATION
start "vIOMMU alone, musl-gcc" implementation musl-gcc c11 -O2 vfu_iommu.h VFU_IOMMU_IMPLEMENTATION

start "both headers in one file, gcc" runs '#define VFU_IMPLEMENTATION' '#include "vfu.h"' '#include "vfu_iommu.h"' -- gcc
start "both headers in one file, the other order, gcc" \
    runs '#define VFU_IMPLEMENTATION' '#include "vfu_iommu.h"' '#include "vfu.h"' -- gcc
start "each header twice, gcc" runs '#define VFU_IMPLEMENTATION' '#include "vfu.h"' '#include "vfu_iommu.h"' '#include "vfu.h"' \
    '#include "vfu_iommu.h"' -- gcc
start "both implementation macros, gcc" \
    runs '#define VFU_IMPLEMENTATION' '#define VFU_IOMMU_IMPLEMENTATION' '#include "vfu_iommu.h"' '#include "vfu.h"' -- gcc
start "declarations first, then the implementation, gcc" \
    runs '#define _GNU_SOURCE' '#include "vfu.h"' '#define VFU_IMPLEMENTATION' '#include "vfu.h"' -- gcc
start "vIOMMU alone, gcc" runs '#define VFU_IOMMU_IMPLEMENTATION' '#include "vfu_iommu.h"' -- gcc
start "vIOMMU alone, gcc -m32" runs '#define VFU_IOMMU_IMPLEMENTATION' '#include "vfu_iommu.h"' -- gcc -m32
start "vIOMMU alone, musl-gcc" runs '#define VFU_IOMMU_IMPLEMENTATION' '#include "vfu_iommu.h"' -- musl-gcc -static
for compiler in gcc clang "gcc -m32" "clang -m32" "musl-gcc -static"; do
    # shellcheck disable=SC2086 # a compiler with an option
    start "a program, $compiler" runs '#define VFU_IMPLEMENTATION' '#include "vfu.h"' -- $compiler
done
start "two files of one program, gcc" two_files gcc
start "two files of one program, clang" two_files clang
for order in "before" "after"; do
    case $order in
    before) set -- '#include "libvfio_user.h"' '#include "vfu.h"' '#include "vfu_iommu.h"' ;;
    after) set -- '#include "vfu.h"' '#include "vfu_iommu.h"' '#include "libvfio_user.h"' ;;
    esac
    start "libvfio-user.h $order ours, gcc" beside gcc c11 c "$@"
    start "libvfio-user.h $order ours, g++" beside g++ c++17 cpp "$@"
    start "libvfio-user.h $order ours, with the implementation, gcc" beside gcc c11 c '#define VFU_IMPLEMENTATION' "$@"
done

for source in "$top"/examples/*.c; do
    name=examples/${source##*/}
    for compiler in gcc clang "gcc -m32" "musl-gcc -static"; do
        # shellcheck disable=SC2086
        start "$name, $compiler" example "$source" $compiler
    done
done
start "the README's device, gcc" readme gcc
start "the README's device, clang" readme clang
start "install, pkg-config, uninstall" installs

# These look at objects, each at its own.
object() { # NAME HEADER MACRO
    file "$out/$1.c" "#define $3" "#include \"$2\""
    ${CC:-cc} -std=c11 -O1 -I"$top" -c -o "$out/$1.o" "$out/$1.c"
}
finish
object both vfu.h VFU_IMPLEMENTATION
object iommu vfu_iommu.h VFU_IOMMU_IMPLEMENTATION
start "exported names" prefix "$out/both.o"
start "exported names of the vIOMMU" prefix "$out/iommu.o"
start "declared and defined functions" complete "$out/both.o" vfu.h
start "declared and defined functions of the vIOMMU" complete "$out/iommu.o" vfu_iommu.h
start "a C++17 program, g++" cxx g++ "$out/both.o"
start "a C++17 program, clang++" cxx clang++ "$out/both.o"
finish

if [ $skipped -gt 0 ]; then
    echo "$skipped skipped"
    if [ "${VFU_CI:-}" = 1 ]; then
        failed=$((failed + skipped))
    fi
fi
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
