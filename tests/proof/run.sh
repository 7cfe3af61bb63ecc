#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
#
# Proves with CBMC that parts of the headers are right for all inputs up to a bound, and that CBMC refutes the same of copies that
# are broken on purpose.
#
#     tests/proof/run.sh BUILD_DIR [PROOF...]
#
# PROOF is a name or a shell pattern of names; without one all are run. Needs CBMC 6 and a C compiler to preprocess with. A CBMC
# that the machine lacks is fetched on Debian, see tests/unpack.sh, and unpacked below BUILD_DIR/proof.
#
#     VFU_PROOF_REQUIRED=1     a CBMC that can't be had is a failure, not a reason to skip; so does VFU_CI=1
#     VFU_PROOF_DIR=DIR        where CBMC is unpacked, instead of BUILD_DIR/proof
#     VFU_PROOF_JOBS=N         proofs at a time; default: the number of processors
#
# Each proof has a line: whether it holds (or, for a broken copy, is refuted), its name, its bound, how many properties were
# checked, and the processor time. Always checked besides what the proofs state: bounds, pointers, signed overflow, pointer
# overflow, shifts, divisions, and that no loop goes on where the proof stops unrolling it.
#
# Exit status: 0 when everything held, 1 when not, 2 for wrong arguments, 77 when there is no CBMC here.
set -eu
export LC_ALL=C

# What is proved by itself, and replaced by that in the proof of the whole
parts='--replace vfux_json_string:any_string --replace vfux_json_scalar:any_scalar --replace vfux_json_lookup:any_lookup'

# name | file | function | options for CBMC, or --replace CALLED:INSTEAD | bound
proofs="
header        | codec.c   | header        | --unwind 7                                     | whole headers, every command and flag
unknown       | codec.c   | unknown       | --unwind 7                                     | whole headers of unknown commands, framing
misframed     | codec.c   | misframed     | -DLONGEST=0x100000 --unwind 3 | up to 1 MiB that the header does not count right
entries       | codec.c   | entries       | -DTAIL=48 --unwind 50                          | arrays of up to 48 bytes, any index
chain         | codec.c   | chain         | -DTAIL=16 --unwind 18 --unwindset chain_of.0:4 | capability chains of up to 16 bytes
chain-made    | codec.c   | chain_made    | --unwind 3                                     | a type, 0 to 2 areas
features      | codec.c   | features      | -DTAIL=34 --unwind 36                          | payloads of up to 34 bytes
features-made | codec.c   | features_made | --unwind 3                                     | up to 1 range
json-string   | json.c    | string        | -DLENGTH=8 --unwind 10                         | any text of 8 bytes, any place in it
json-number   | json.c    | number        | -DLENGTH=22 --unwind 24                        | any text of 22 bytes, any place in it
json-digits   | json.c    | digits        | -DLENGTH=5 --unwind 7                          | any text of 5 bytes, any place in it
json-scalar   | json.c    | scalar        | -DLENGTH=6 --unwind 10                         | any text of 6 bytes, any place in it
json-lookup   | json.c    | lookup        | -DLENGTH=1 --unwind 30                         | any name in any open containers
json-document | json.c    | document      | -DLENGTH=3 --unwind 5 $parts                   | any 3 bytes and what is open before them
pci-bars      | pci.c     | bars          | --unwind 9                                     | any six BARs and ROM
pci-walk      | pci.c     | walk          | --unwind 9                                     | any list of up to 4 capabilities
pci-store     | pci.c     | store         | --unwind 258                                   | any space of 256 bytes, any byte anywhere
framing-more  | framing.c | receive_step  | -DCAPACITY=20 --unwind 22                      | any state, buffer of 20, any number of bytes
framing-take  | framing.c | take_step     | --unwind 36                                    | any state, buffer of 34, messages of up to 18
"
# Two proofs for each command: its name and number, the bytes of the fixed part of its payload; the most bytes behind those to decode;
# the fewest (but none) and the most to encode; options for CBMC.
commands='
VERSION            |  1 |  4 |  4 |  0 |  4 |
DMA_MAP            |  2 | 32 |  1 |  0 |  0 |
DMA_UNMAP          |  3 | 24 | 17 | 16 | 17 |
GET_INFO           |  4 | 16 |  1 |  0 |  0 |
GET_REGION_INFO    |  5 | 32 |  8 |  8 |  8 | --unwindset vfux_cap_check.0:4
GET_REGION_IO_FDS  |  6 | 16 | 41 | 40 | 41 |
GET_IRQ_INFO       |  7 | 16 |  1 |  0 |  0 |
SET_IRQS           |  8 | 20 |  4 |  0 |  4 |
REGION_READ        |  9 | 16 |  4 |  0 |  4 |
REGION_WRITE       | 10 | 16 |  4 |  0 |  4 |
DMA_READ           | 11 | 16 |  5 |  0 |  5 |
DMA_WRITE          | 12 | 16 |  5 |  0 |  5 |
DEVICE_RESET       | 13 |  0 |  4 |  0 |  0 |
REGION_WRITE_MULTI | 15 |  8 | 25 | 24 | 24 |
FEATURE            | 16 |  8 |  4 |  0 |  4 |
MIG_DATA_READ      | 17 |  8 |  4 |  0 |  4 |
MIG_DATA_WRITE     | 18 |  8 |  4 |  0 |  4 |
'
while IFS='|' read -r name cmd fixed behind fewest most options; do
    [[ -n $name ]] || continue
    name=${name%% *}
    define="-DCMD=$((cmd)) -DFIXED=$((fixed))"
    proofs+="decode-$name | codec.c | decode | $define -DTAIL=$((behind)) --unwind $((fixed + behind + 2)) $options |"
    proofs+=" messages of 16 to $((16 + fixed + behind)) bytes"$'\n'
    proofs+="encode-$name | codec.c | encode | $define -DTAIL=$((most)) -DFIRST=$((fewest)) --unwind $((most + 6)) $options |"
    tail="$((fewest)) to $((most))"
    [[ $((fewest)) -eq 0 ]] || tail="0 or $tail"
    proofs+=" all fields, $tail bytes behind them"$'\n'
done <<<"$commands"

# The vIOMMU. With the most nodes no memory is checked: the same with fewer does that.
shapes='--unwind 9 --unwindset any_tree.0:18,any_tree.1:18'
proofs+="
iommu-insert     | iommu.c | insert     | -DNODES=7 --unwind 18 --no-standard-checks     | trees of up to 7 nodes, order and balance
iommu-remove     | iommu.c | take_out   | -DNODES=7 --unwind 18 --no-standard-checks     | trees of up to 7 nodes, order and balance
iommu-insert-4   | iommu.c | insert     | -DNODES=4 --unwind 7                           | trees of up to 4 nodes
iommu-remove-4   | iommu.c | take_out   | -DNODES=4 --unwind 7                           | trees of up to 4 nodes
iommu-find-place | iommu.c | find_place | -DNODES=7 $shapes                              | trees of up to 7 nodes, any range
iommu-find-node  | iommu.c | find_node  | -DNODES=7 $shapes                              | trees of up to 7 nodes, any addresses
iommu-find-floor | iommu.c | find_floor | -DNODES=7 $shapes                              | trees of up to 7 nodes, any address
iommu-find-first | iommu.c | find_first | -DNODES=7 $shapes                              | trees of up to 7 nodes, any range
iommu-find-next  | iommu.c | find_next  | -DNODES=7 $shapes                              | trees of up to 7 nodes, any range
iommu-find-walk  | iommu.c | find_walk  | -DNODES=7 $shapes                              | trees of up to 7 nodes, any address
iommu-arguments  | iommu.c | arguments  | --unwind 3                                     | all arguments
iommu-probe      | iommu.c | probe      | -DNODES=2 --unwind 4 --unwindset vfux_hold.0:1 | up to 2 mappings, any range, any hints
iommu-map        | iommu.c | map        | -DNODES=3 --unwind 9                           | up to 3 mappings, ranges of eighths of 2^64
iommu-unmap      | iommu.c | unmap      | -DNODES=2 -DWIDTH=2 --unwind 9                 | up to 2 mappings, ranges of eighths of 2^64
"

# Copies that are broken by one line: name | the proof that must fail | sed expression | the property that must fail
broken='
broken-decode   | decode-SET_IRQS | s/^        if (in->n - size < w.count) {$/        if (in->n - size + 1 < w.count) {/ | decode_bytes
broken-encode   | encode-GET_INFO | s/m->u.device_info.num_irqs};/m->u.device_info.num_regions};/ | prove_same
broken-features | features-made   | s/^    if (cap < size /    if (cap + 1 < size / | features_made
broken-framing  | framing-take    | s/^    if (size > conn->rx_end - at)$/    if (size > conn->rx_end - at + 1)/ | take_step
broken-json     | json-string     | s/{ return j->at < j->end; }/{ return j->at <= j->end; }/ | pointer_dereference
broken-depth    | json-document   | s/^    if (j->depth == VFU_CAPS_DEPTH_MAX) {/    if (j->depth > VFU_CAPS_DEPTH_MAX) {/ | prove_parser.assertion
broken-bars     | pci-bars        | s/(!wide && bar->size > UINT32_C(1) << 31)/(!wide \&\& bar->size > UINT64_C(1) << 32)/ | bars.assertion
broken-walk     | pci-walk        | s/pci->config\[at\] != id/pci->config[at] == id/ | walk.assertion
broken-pci      | pci-store       | s/((old & ~pci->writable\[at\])/((old \& pci->clearable[at])/ | store_at.assertion
broken-rotate    | iommu-insert-4   | s/^    vfux_measure(t, a);$// | walk.assertion
broken-successor | iommu-remove-4   | s/vfux_set(links\[depth\], vfux_get(&s->right))/vfux_set(links[depth], vfux_get(\&s->left))/ | take_out.assertion
broken-overlap   | iommu-find-place | s/if (!left && first <= vfux_last(n))/if (!left \&\& first < vfux_last(n))/ | find_place.assertion
broken-floor     | iommu-find-floor | s/bool right = vfux_iova(&t->nodes\[i\]) <= iova;/bool right = vfux_iova(\&t->nodes[i]) < iova;/ | find_floor.assertion
broken-range     | iommu-arguments  | s/return len && len - 1 <= UINT64_MAX - iova;/return len \&\& len <= UINT64_MAX - iova;/ | arguments.assertion
broken-scan      | iommu-probe      | s/^        if ((view.prot & prot) != prot)$/        if (!(view.prot \& prot))/ | probe.assertion
broken-unmap     | iommu-unmap      | s/if (vfux_iova(n) < first .. vfux_last(n) > last)$/if (vfux_iova(n) < first)/ | unmap.assertion
'

time_limit=300                    # seconds of processor time
memory_limit=$((4 * 1024 * 1024)) # KiB

here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..

[[ $# -ge 1 ]] || { echo "usage: run.sh BUILD_DIR [PROOF...]" >&2; exit 2; }
mkdir -p "$1/proof"
build=$(cd "$1/proof" && pwd)
shift
store=${VFU_PROOF_DIR:-$build}

skip() {
    echo "prove: $*" >&2
    [[ ${VFU_PROOF_REQUIRED:-${VFU_CI:-0}} != 1 ]] || exit 1
    exit 77
}

# shellcheck source=tests/unpack.sh
. "$here/../unpack.sh"

# Finds CBMC: from then on `tool NAME ARGUMENT...` runs a program of it.
find_cbmc() {
    loader=() programs=
    if [[ $(cbmc --version 2>/dev/null || :) = 6.* ]]; then
        return
    fi
    local tree=$store/cbmc lib=$store/cbmc/usr/lib/x86_64-linux-gnu
    if [[ ! -d $tree ]]; then
        debian_setup
        echo "# fetching CBMC from trixie"
        # With the C and C++ libraries that it was built with; its further packages are compilers.
        (cd "$store/apt" && debian_apt apt-get -qq download cbmc minisat libc6 libgcc-s1 libstdc++6 zlib1g) ||
            skip "CBMC could not be fetched"
        unpack "$tree" "$store"/apt/*.deb
        rm "$store"/apt/*.deb
    fi
    loader=("$lib/ld-linux-x86-64.so.2" --library-path "$lib:$tree/usr/lib") programs=$tree/usr/bin/
    [[ $(tool cbmc --version 2>/dev/null || :) = 6.* ]] || skip "the CBMC in $tree doesn't run"
}

tool() { "${loader[@]}" "$programs$1" "${@:2}"; }

# prove NAME HEADERS FILE FUNCTION OPTIONS...
prove() {
    local name=$1 headers=$2 source=$here/$3 function=$4 program=$build/log/$1.goto options=(--pointer-overflow-check) defines=()
    local replaced=()
    shift 4
    while [[ $# -gt 0 ]]; do
        case $1 in
        -D*) defines+=("$1") ;;
        --replace) replaced+=(--replace-calls "$2") && shift ;;
        --no-standard-checks) options[0]=$1 ;;
        *) options+=("$1") ;;
        esac
        shift
    done
    ulimit -v "$memory_limit"
    ulimit -t "$time_limit"
    if [[ ${#replaced[@]} -gt 0 ]]; then
        tool goto-cc "$source" -I "$headers" -I "$here" "${defines[@]}" --function "$function" -o "$program" || return
        tool goto-instrument "${replaced[@]}" "$program" "$program" || return
        source=$program defines=()
    fi
    tool cbmc "$source" -I "$headers" -I "$here" "${defines[@]}" --function "$function" --unwinding-assertions --object-bits 14 \
        --max-field-sensitivity-array-size 512 --unwindset strlen.0:32,vfux_name.0:20 --drop-unused-functions --slice-formula \
        --verbosity 6 "${options[@]}"
}

# The same, with what CBMC says and the processor time in files.
timed() {
    local TIMEFORMAT=%U
    { time prove "$@" >"$build/log/$1" 2>&1 </dev/null; } 2>"$build/log/$1.time"
}

# report VERDICT NAME BOUND
report() {
    local properties
    properties=$(sed -n 's/^\*\* [0-9]* of \([0-9]*\) failed.*/\1/p' "$build/log/$2")
    printf '%-8s %-26s %-50s %5s properties %6.1f s\n' "$1" "$2" "$3" "${properties:--}" "$(tail -n 1 "$build/log/$2.time")"
}

# One proof, with its status as result.
run_proof() {
    local name=$1 file=$2 function=$3 options=$4 bound=$5 status=0
    # shellcheck disable=SC2086 # words on purpose
    timed "$name" "$root" "$file" "$function" $options || status=$?
    case $status in
    0) report proved "$name" "$bound" ;;
    10)
        report REFUTED "$name" "$bound"
        grep ': FAILURE' "$build/log/$name"
        ;;
    *)
        report FAILED "$name" "$bound"
        tail -n 3 "$build/log/$name"
        ;;
    esac
    return $status
}

# One broken copy: good is if that very property fails.
run_broken() {
    local name=$1 proof=$2 expression=$3 property=$4 file=$5 function=$6 options=$7 status=0 header changed=
    rm -rf "$build/broken/$name"
    mkdir -p "$build/broken/$name"
    for header in vfu.h vfu_iommu.h; do
        sed "$expression" "$root/$header" >"$build/broken/$name/$header"
        cmp -s "$root/$header" "$build/broken/$name/$header" || changed=1
    done
    if [[ -z $changed ]]; then
        echo "FAILED   $name: its expression changes nothing"
        return 1
    fi
    # shellcheck disable=SC2086 # words on purpose
    timed "$name" "$build/broken/$name" "$file" "$function" $options || status=$?
    if [[ $status -eq 10 ]] && grep "^\[.*: FAILURE" "$build/log/$name" | grep -q "$property"; then
        report refuted "$name" "$proof with an error must fail"
        return 0
    fi
    report FAILED "$name" "$proof with an error must fail: status $status"
    return 1
}

trim() { sed 's/^ *//; s/ *$//' <<<"$1"; }

wanted() {
    local pattern
    [[ ${#patterns[@]} -gt 0 ]] || return 0
    for pattern in "${patterns[@]}"; do
        # shellcheck disable=SC2053 # a pattern
        [[ $1 != $pattern ]] || return 0
    done
    return 1
}

# Waits for one of the proofs that run.
reap() {
    local status=0
    wait -n || status=$?
    running=$((running - 1))
    if [[ $status -eq 0 ]]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
    fi
}

patterns=("$@")
find_cbmc
rm -rf "$build/log"
mkdir -p "$build/log"
jobs=${VFU_PROOF_JOBS:-$(nproc)}
passed=0
failed=0
running=0
while IFS='|' read -r name file function options bound; do
    name=$(trim "$name")
    if [[ -z $name ]] || ! wanted "$name"; then
        continue
    fi
    [[ $running -lt $jobs ]] || reap
    run_proof "$name" "$(trim "$file")" "$(trim "$function")" "$(trim "$options")" "$(trim "$bound")" &
    running=$((running + 1))
done <<<"$proofs"
while IFS='|' read -r name proof expression property; do
    name=$(trim "$name") proof=$(trim "$proof")
    if [[ -z $name ]] || ! wanted "$name"; then
        continue
    fi
    IFS='|' read -r _ file function options _ <<<"$(grep "^$proof  *|" <<<"$proofs")"
    [[ $running -lt $jobs ]] || reap
    run_broken "$name" "$proof" "$(trim "$expression")" "$(trim "$property")" "$(trim "$file")" "$(trim "$function")" \
        "$(trim "$options")" &
    running=$((running + 1))
done <<<"$broken"
while [[ $running -gt 0 ]]; do
    reap
done
[[ $((passed + failed)) -gt 0 ]] || { echo "no proof of that name" >&2; exit 2; }
echo "$passed passed, $failed failed, $SECONDS s"
[[ $failed -eq 0 ]]
