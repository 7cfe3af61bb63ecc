/* SPDX-License-Identifier: MIT */
/*
 * What the proofs share. They are programs for CBMC: whatever nothing has set, a variable or a byte of memory, has any value, and a
 * proof holds for all of them. run.sh says how each is started and up to which bound.
 *
 * Sizes of memory are constants wherever that can be arranged, which keeps a proof small: a proof for all lengths up to a bound
 * takes each length in turn (EACH).
 */
#ifndef PROOF_H
#define PROOF_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* CBMC doesn't understand how glibc declares this one, which is in the same file as what is proved and out of its reach. */
#include <setjmp.h>
#undef sigsetjmp
#define sigsetjmp(env, mask) ((void)(env), (void)(mask), 0)

/* What is proved, and for what. */
#define PROVE(condition)  __CPROVER_assert(condition, #condition)
#define ASSUME(condition) __CPROVER_assume(condition)

/* A caller's mistake: the library must never come to one here. */
#define VFU_ASSERT(condition) __CPROVER_assert(condition, "VFU_ASSERT: " #condition)

/* For i, which has one value of 0 to max, any: does what follows with i as a constant. */
#define EACH(i, max) \
    for (size_t i = 0, i##_chosen = up_to(max); i <= (max); i++) \
        if (i == i##_chosen)

/* Any value: functions without a body. */
bool nondet_bool(void);
uint8_t nondet_u8(void);
uint16_t nondet_u16(void);
uint32_t nondet_u32(void);
uint64_t nondet_u64(void);
size_t nondet_size(void);

/* Any number up to and with max. */
static inline size_t up_to(size_t max)
{
    size_t n = nondet_size();
    ASSUME(n <= max);
    return n;
}

/* Memory of exactly len bytes with any contents: whoever touches a byte beside it is found out. */
static inline void *any_memory(size_t len)
{
    void *memory = malloc(len);
    ASSUME(memory != NULL);
    return memory;
}

#endif
