#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: run.sh BUILD-DIRECTORY TEST...
# Runs the tests of one build, one after the other: BUILD-DIRECTORY/tests/TEST is a program with Check, tests/TEST a script, whose
# status counts as one test. Prints the counts of each, its whole output where something failed, and in the end the line
# `N passed, N failed`. The examples of the same build are in $VFU_EXAMPLES.
set -u
build=$1
shift
VFU_EXAMPLES=$(cd "$build" && pwd)/examples
: "${CK_DEFAULT_TIMEOUT:=60}"
case ${build##*/} in
asan) : "${CK_TIMEOUT_MULTIPLIER:=3}" ;;
tsan) : "${CK_TIMEOUT_MULTIPLIER:=5}" ;;
*) : "${CK_TIMEOUT_MULTIPLIER:=1}" ;;
esac
: "${ASAN_OPTIONS:=detect_stack_use_after_return=1}"
: "${UBSAN_OPTIONS:=print_stacktrace=1}"
: "${TSAN_OPTIONS:=halt_on_error=1 second_deadlock_stack=1}"
export VFU_EXAMPLES CK_DEFAULT_TIMEOUT CK_TIMEOUT_MULTIPLIER ASAN_OPTIONS UBSAN_OPTIONS TSAN_OPTIONS

# The sanitizers' shadow memory collides with the address randomisation of recent kernels.
fixed=
case ${build##*/} in
asan | tsan)
    if setarch "$(uname -m)" -R true 2>/dev/null; then
        fixed="setarch $(uname -m) -R"
    fi
    ;;
esac
# Check stops a test that hangs; this is for a program that hangs outside of a test.
limit=
if command -v timeout >/dev/null 2>&1; then
    limit="timeout 1200"
fi

log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
trap 'exit 1' HUP INT TERM
passed=0
failed=0
for test in "$@"; do
    case $test in
    *.sh) command="sh tests/$test $VFU_EXAMPLES" ;;
    *) command="$build/tests/$test" ;;
    esac
    # shellcheck disable=SC2086 # words on purpose
    $fixed $limit $command >"$log" 2>&1 </dev/null
    status=$?
    # A program may run several suites: one summary each, "100%: Checks: 3, Failures: 0, Errors: 0".
    counts=$(awk '/^[0-9]+%: Checks: [0-9]+, Failures: [0-9]+, Errors: [0-9]+$/ { checks += $3; bad += $5 + $7 }
                  END { print checks + 0, bad + 0 }' "$log")
    checks=${counts% *}
    bad=${counts#* }
    case $test in
    *.sh)
        checks=1
        [ $status -eq 0 ] || bad=1
        ;;
    esac
    why=
    if [ "$checks" -eq 0 ]; then
        why="no test ran, status $status"
        checks=1
        bad=1
    elif [ $status -ne 0 ] && [ "$bad" -eq 0 ]; then
        why="status $status"
        checks=$((checks + 1))
        bad=1
    elif [ $status -eq 0 ] && [ "$bad" -ne 0 ]; then
        why="failures, but status 0"
    fi
    if [ "$bad" -ne 0 ]; then
        cat "$log"
    fi
    printf '%-24s %4d checks, %d failed%s\n' "$test:" "$checks" "$bad" "${why:+ ($why)}"
    passed=$((passed + checks - bad))
    failed=$((failed + bad))
done
echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
