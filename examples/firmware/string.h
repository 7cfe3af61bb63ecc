/* SPDX-License-Identifier: MIT */
/* All that the headers need of a C library; string.c has it. A firmware with a C library uses that one's. */
#ifndef FIRMWARE_STRING_H
#define FIRMWARE_STRING_H
#include <stddef.h>
void *memcpy(void *restrict dst, const void *restrict src, size_t len);
void *memmove(void *dst, const void *src, size_t len);
void *memset(void *dst, int byte, size_t len);
int memcmp(const void *a, const void *b, size_t len);
size_t strlen(const char *text);
#endif
