/* SPDX-License-Identifier: MIT */
/* What the files of the image share. */
#ifndef FIRMWARE_H
#define FIRMWARE_H

#define VFU_CODEC_ONLY
#include "vfu.h"
#include "vfu_iommu.h"

/* board.c: the machine. */
void board_print(const char *text);
size_t board_stack_used(void); /* bytes, the most so far */

/* main.c: the table of mappings, the memory behind it, and telling. */
enum { MEMORY_SIZE = 32 << 10 };
extern uint8_t memory[MEMORY_SIZE]; /* stands for the guest's memory */
extern vfu_iommu *iommu;
extern vfu_iommu_reader *reader;

bool check(bool good, const char *what); /* counts, tells what is wrong, and returns good */
void print_refused(void);                /* the latest fault */
void print_hex(const char *before, uint64_t value);
void print_decimal(const char *before, uint32_t value);

/* replay.c and direct.c: what the image does. */
void replay(void);
void direct(void);

#endif
