/* SPDX-License-Identifier: MIT */
/* In the place of Check, whose assertions work in its own tests alone: the same words, and the end of the program when one is
 * wrong. */
#ifndef VFU_TESTS_FUZZ_CHECK_H
#define VFU_TESTS_FUZZ_CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define ck_fail(text) \
    do { \
        fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, text); \
        abort(); \
    } while (0)
#define ck_assert(e) \
    do { \
        if (!(e)) \
            ck_fail(#e); \
    } while (0)
#define ck_assert_msg(e, ...)     ck_assert(e)
#define ck_assert_int_eq(a, b)    ck_assert((a) == (b))
#define ck_assert_int_ge(a, b)    ck_assert((a) >= (b))
#define ck_assert_uint_eq(a, b)   ck_assert((a) == (b))
#define ck_assert_uint_ge(a, b)   ck_assert((a) >= (b))
#define ck_assert_uint_gt(a, b)   ck_assert((a) > (b))
#define ck_assert_uint_le(a, b)   ck_assert((a) <= (b))
#define ck_assert_uint_lt(a, b)   ck_assert((a) < (b))
#define ck_assert_ptr_nonnull(p)  ck_assert((p) != NULL)
#define ck_assert_mem_eq(a, b, n) ck_assert(memcmp(a, b, n) == 0)

/* No suites here; util.h has a function for them. */
typedef struct Suite Suite;
typedef struct SRunner SRunner;
enum { CK_ENV };
#define srunner_create(suite)        ((void)(suite), (SRunner *)NULL)
#define srunner_run_all(runner, how) ((void)(runner))
#define srunner_ntests_failed(r)     ((void)(r), 0)
#define srunner_free(runner)         ((void)(runner))

#endif /* VFU_TESTS_FUZZ_CHECK_H */
