/* SPDX-License-Identifier: MIT */
/* What the fuzz targets share: an input that is used up, and a look at what a run leaves behind. Include util.h first. */
#ifndef VFU_TESTS_FUZZ_H
#define VFU_TESTS_FUZZ_H

#include <getopt.h>
#include <sanitizer/allocator_interface.h>

typedef struct input {
    const uint8_t *at;
    size_t left;
} input;

/* The next byte; zeros behind the end. */
static inline uint8_t take(input *in)
{
    if (!in->left)
        return 0;
    in->left--;
    return *in->at++;
}

static inline uint64_t take_wide(input *in)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < 8; i++)
        value = value << 8 | take(in);
    return value;
}

/* The lowest descriptor that is free, which a leak would raise, and the bytes that are allocated. */
typedef struct state {
    int fd;
    size_t bytes;
} state;

static inline state look(void)
{
    state s = {.fd = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0), .bytes = __sanitizer_get_current_allocated_bytes()};
    close(s.fd);
    return s;
}

/* Ends the program when the run has left something; the first few may allocate what stays for ever. */
static inline void compare(state before)
{
    static unsigned runs;
    state after = look();
    if (after.fd == before.fd && (after.bytes == before.bytes || runs++ < 8))
        return;
    fprintf(stderr, "left behind: descriptor %d instead of %d, %zu bytes instead of %zu\n", after.fd, before.fd, after.bytes,
            before.bytes);
    abort();
}

#endif /* VFU_TESTS_FUZZ_H */
