#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: readme.sh c FILE            prints the first C block of a Markdown file, which is a whole program
#        readme.sh sh FILE DIRECTORY  writes the shell blocks to DIRECTORY/01.sh, 02.sh, ..., without their comment lines
set -eu
case $1 in
c)
    awk '/^```/ { if (on) exit; on = $0 == "```c"; next } on' "$2"
    ;;
sh)
    mkdir -p "$3"
    awk -v dir="$3" '/^```/ { on = !on && $0 == "```sh"; open = !open; if (!open) on = 0; if (on) n++; next }
                     on && !/^[ \t]*(#|$)/ { print > sprintf("%s/%02d.sh", dir, n) }' "$2"
    ;;
*)
    exit 2
    ;;
esac
