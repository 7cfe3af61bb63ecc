#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: coverage.sh BUILD-DIRECTORY
# Adds up what the programs of a build with --coverage have executed of the two headers, prints how much that is, and each line that
# was not, with its reason from tests/coverage.txt; with VERBOSE=1 also the lines of which a branch was never taken. Fails below 95 %
# of the lines or 90 % of the branches of a header, when a line that was not executed isn't in that list, and when the list has a line
# that is executed, or gone. Two instances of a line in one function are one for the list.
#
# A branch is each way out of a condition, as the compiler made it without optimisation; assertions are compiled away. A header is
# compiled into many programs: a branch is taken if one of them has taken it. Where a test replaces system calls by macros, the
# lines with these calls have other branches, which count for that line only.
set -u
build=$1
: "${GCOV:=gcov}"
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

find "$build" -name '*.gcda' | sort >"$work/list"
# The plain implementation comes first: it says which branches there are.
{ grep '/impl\.gcda$' "$work/list"; grep -v '/impl\.gcda$' "$work/list"; } | while read -r data; do
    "$GCOV" -b -c -t "$data" 2>/dev/null
    echo
done >"$work/gcov"

awk -v list=tests/coverage.txt '
    function end_line(   i) {
        if (!line)
            return
        if (!(line in ways)) {
            ways[line] = n
            for (i = 0; i < n; i++)
                taken[line, i] = 0
        }
        if (ways[line] == n)
            for (i = 0; i < n; i++)
                taken[line, i] += way[i]
        line = ""
    }
    /^function / {
        end_line()
        called = $2
        next
    }
    # "     12*:  345:source": # and = stand for never, - for no code
    /^ *[0-9#=-]+\*?: *[0-9]+:/ {
        end_line()
        split($0, part, ":")
        count = part[1]
        number = part[2] + 0
        if (number == 0) {
            if (part[3] == "Source")
                file = part[4] ~ /(^|\/)vfu(_iommu)?\.h$/ ? part[4] : ""
            sub(/.*\//, "", file)
            next
        }
        if (file == "" || count ~ /-/)
            next
        gsub(/[ *]/, "", count)
        line = file ":" number
        n = 0
        hits[line] += count ~ /[#=]/ ? 0 : count
        text[line] = substr($0, index($0, part[2] ":") + length(part[2]) + 1)
        gsub(/^ +| +$/, "", text[line])
        text[line] = called ": " text[line]
        next
    }
    /^branch / && line {
        way[n++] = $3 == "taken" ? $4 : 0
    }
    END {
        end_line()
        while ((getline entry < list) > 0) {
            if (entry ~ /^(#|$)/ )
                continue
            at = index(entry, " -- ")
            key = substr(entry, 1, at - 1)
            if (sub(/^[?]/, "", key))
                chance[key] = 1
            known[key] = substr(entry, at + 4)
        }
        for (l in hits) {
            split(l, where, ":")
            f = where[1]
            lines[f]++
            have = 1
            run[f] += hits[l] > 0
            seen[f ": " text[l]]
            missing = ""
            if (!hits[l])
                missing = "line"
            for (i = 0; i < ways[l]; i++) {
                branches[f]++
                done[f] += taken[l, i] > 0
                if (hits[l] && !taken[l, i])
                    missing = "branch"
            }
            if (missing == "")
                continue
            key = f ": " text[l]
            if (missing == "line") {
                listed[key] = key in known
                printf "never executed: %s: %s -- %s\n", l, text[l], key in known ? known[key] : "NO REASON IS GIVEN"
                unexplained += !(key in known)
            }
            if (ENVIRON["VERBOSE"])
                printf "%s %s %s\n", missing, l, text[l]
        }
        for (key in known)
            if (!listed[key] && !(key in chance && key in seen)) {
                print "out of date: " key " is executed, or gone" > "/dev/stderr"
                stale++
            }
        for (f in lines) {
            printf "%-12s %5d of %5d lines (%.1f %%), %5d of %5d branches (%.1f %%)\n", f ":", run[f], lines[f], 100 * run[f] / lines[f],
                done[f], branches[f], 100 * done[f] / branches[f]
            low += run[f] < 0.95 * lines[f] || done[f] < 0.90 * branches[f]
        }
        if (unexplained)
            print unexplained " lines are never executed, for no reason in " list > "/dev/stderr"
        exit low || stale || unexplained || !have
    }' "$work/gcov"
