/* SPDX-License-Identifier: MIT */
/* All that the headers need of a C library, as short as can be. */
#include "string.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-loop-distribute-patterns") /* else gcc makes of the loop in memset a call of memset */
#endif

void *memcpy(void *restrict dst, const void *restrict src, size_t len)
{
    for (size_t i = 0; i < len; i++)
        ((char *)dst)[i] = ((const char *)src)[i];
    return dst;
}

void *memmove(void *dst, const void *src, size_t len)
{
    char *to = dst;
    const char *from = src;
    if (to <= from)
        for (size_t i = 0; i < len; i++)
            to[i] = from[i];
    else
        while (len--)
            to[len] = from[len];
    return dst;
}

void *memset(void *dst, int byte, size_t len)
{
    for (size_t i = 0; i < len; i++)
        ((unsigned char *)dst)[i] = (unsigned char)byte;
    return dst;
}

int memcmp(const void *a, const void *b, size_t len)
{
    const unsigned char *x = a, *y = b;
    for (size_t i = 0; i < len; i++)
        if (x[i] != y[i])
            return x[i] - y[i];
    return 0;
}

size_t strlen(const char *text)
{
    size_t len = 0;
    while (text[len])
        len++;
    return len;
}
