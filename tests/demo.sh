#!/bin/sh
# SPDX-License-Identifier: MIT
# Usage: demo.sh DIRECTORY-OF-EXAMPLES
# Starts the example device on a temporary socket, runs the example client against it and stops the device. The status is 0 if the
# client was content and the device ended as its contract says: status 0 on SIGTERM, its socket file removed.
set -u
examples=$1
dir=$(mktemp -d) || exit 1
"$examples/dma_engine" --socket-path="$dir/engine.sock" &
engine=$!

# Nothing here takes longer than seconds; a hang ends both programs. The sleep holds no descriptor that someone else may wait for.
(
    sleep 120 >/dev/null 2>&1 &
    sleeper=$!
    trap 'kill $sleeper; exit' TERM
    wait $sleeper
    echo "demo: no end after 120 seconds" >&2
    kill -KILL $engine
) &
watchdog=$!
trap 'kill $watchdog 2>/dev/null; [ -z "$engine" ] || kill -KILL $engine 2>/dev/null; rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM

tries=0
until [ -S "$dir/engine.sock" ]; do
    tries=$((tries + 1))
    if [ $tries -gt 100 ] || ! kill -0 $engine 2>/dev/null; then
        echo "demo: the device did not open its socket" >&2
        exit 1
    fi
    sleep 0.1
done

"$examples/dma_client" --socket-path="$dir/engine.sock"
status=$?
[ $status -eq 0 ] || echo "demo: the client ended with status $status" >&2

kill -TERM $engine
wait $engine
ended=$?
engine= # its number may be another process's now
if [ $ended -ne 0 ]; then
    echo "demo: the device ended with status $ended" >&2
    status=1
fi
if [ -e "$dir/engine.sock" ]; then
    echo "demo: the device left its socket behind" >&2
    status=1
fi
exit $status
