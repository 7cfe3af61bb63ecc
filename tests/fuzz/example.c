/* SPDX-License-Identifier: MIT */
/*
 * An example device as a function: its main() is example_main(), and where it would serve, it plays the fuzzer's input instead.
 * EXAMPLE is the file.
 */
#define VFU_IMPLEMENTATION
#include "vfu.h"

#include <getopt.h>

int fuzz_create(vfu_dev **out, const vfu_dev_desc *desc);
int fuzz_play(vfu_dev *dev);
int example_main(int argc, char **argv);

#define vfu_dev_create fuzz_create
#define vfu_dev_run    fuzz_play
#define main           example_main
#include EXAMPLE
