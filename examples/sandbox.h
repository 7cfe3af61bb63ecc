/* SPDX-License-Identifier: MIT */
/*
 * sandbox.h - what is left to a device that serves: its descriptors, its memory, its clock
 *
 * sandbox_enter() leaves the process, with all its threads, the system calls that a device needs once it serves, and refuses
 * all others with EPERM, for good. It can't open files, make sockets, start programs, threads or processes, signal or trace
 * others, map executable memory, or become another user. A call that is refused does nothing else, and the device lives on; a
 * call by the conventions of another machine (32-bit calls of a 64-bit program) ends it with SIGSYS.
 *
 * What it still has is what it holds: the socket, and memory and eventfds that clients passed. So a socket file stays when the
 * device ends (the next one replaces it), and diagnostics still go to standard error.
 *
 * Linux 4.14 on x86, x86-64, Arm and 64-bit Arm; elsewhere -ENOSYS.
 */
#ifndef VFU_EXAMPLES_SANDBOX_H
#define VFU_EXAMPLES_SANDBOX_H

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* From linux/audit.h, linux/filter.h and linux/seccomp.h, which a C library alone doesn't bring. */
#if defined(__x86_64__) && !defined(__ILP32__)
#define SANDBOX_ARCH UINT32_C(0xc000003e)
#elif defined(__i386__)
#define SANDBOX_ARCH UINT32_C(0x40000003)
#elif defined(__aarch64__) && !defined(__AARCH64EB__)
#define SANDBOX_ARCH UINT32_C(0xc00000b7)
#elif defined(__arm__) && !defined(__ARMEB__)
#define SANDBOX_ARCH UINT32_C(0x40000028)
#endif

enum {
    SANDBOX_LOAD = 0x20, /* a 32-bit word of the call's description: its number, the machine, and six arguments of 64 bits each */
    SANDBOX_AT_CALL = 0,
    SANDBOX_AT_ARCH = 4,
    SANDBOX_AT_ARGUMENTS = 16,
    SANDBOX_IF_EQUAL = 0x15, /* goes on, or skips some steps */
    SANDBOX_IF_FROM = 0x35,
    SANDBOX_AND = 0x54,
    SANDBOX_RETURN = 0x06
};
#define SANDBOX_ALLOW  UINT32_C(0x7fff0000)
#define SANDBOX_REFUSE (UINT32_C(0x00050000) | EPERM)
#define SANDBOX_END    UINT32_C(0x80000000)

typedef struct sandbox_step {
    uint16_t code;
    uint8_t if_so, if_not; /* steps to skip */
    uint32_t value;
} sandbox_step;

/* Allowed whatever their arguments are. */
static const uint32_t sandbox_calls[] = {
#define SANDBOX_CALL(name) __NR_##name,
    /* what was opened before */
    SANDBOX_CALL(read) SANDBOX_CALL(write) SANDBOX_CALL(readv) SANDBOX_CALL(writev) SANDBOX_CALL(pread64) SANDBOX_CALL(pwrite64)
        SANDBOX_CALL(preadv) SANDBOX_CALL(pwritev) SANDBOX_CALL(close) SANDBOX_CALL(lseek) SANDBOX_CALL(fsync)
            SANDBOX_CALL(fdatasync) SANDBOX_CALL(fallocate) SANDBOX_CALL(fstatfs) SANDBOX_CALL(ppoll)
#ifdef __NR_preadv2
                SANDBOX_CALL(preadv2) SANDBOX_CALL(pwritev2)
#endif
#ifdef __NR_poll
                    SANDBOX_CALL(poll)
#endif
#ifdef __NR__llseek
                        SANDBOX_CALL(_llseek) SANDBOX_CALL(fstatfs64)
#endif
#ifdef __NR_fstat
                            SANDBOX_CALL(fstat)
#endif
#ifdef __NR_fstat64
                                SANDBOX_CALL(fstat64)
#endif
    /* clients, and what they send */
    SANDBOX_CALL(recvmsg) SANDBOX_CALL(sendmsg)
#ifdef __NR_accept4
        SANDBOX_CALL(accept4) SANDBOX_CALL(setsockopt)
#endif
    /* memory, but none that can be executed: see below for mmap and mprotect */
    SANDBOX_CALL(munmap) SANDBOX_CALL(mremap) SANDBOX_CALL(madvise) SANDBOX_CALL(brk)
    /* threads that are there, even if they have just started, and signals to ourselves */
    SANDBOX_CALL(gettid) SANDBOX_CALL(sched_getaffinity) SANDBOX_CALL(futex) SANDBOX_CALL(sched_yield)
        SANDBOX_CALL(set_robust_list) SANDBOX_CALL(exit) SANDBOX_CALL(exit_group) SANDBOX_CALL(rt_sigaction)
            SANDBOX_CALL(rt_sigprocmask) SANDBOX_CALL(rt_sigreturn) SANDBOX_CALL(sigaltstack) SANDBOX_CALL(restart_syscall)
#ifdef __NR_sigreturn
                SANDBOX_CALL(sigreturn)
#endif
#ifdef __NR_rseq
                    SANDBOX_CALL(rseq)
#endif
    /* time and chance */
    SANDBOX_CALL(clock_gettime) SANDBOX_CALL(clock_nanosleep) SANDBOX_CALL(nanosleep) SANDBOX_CALL(gettimeofday)
        SANDBOX_CALL(getrandom)
#ifdef __NR_clock_gettime64
            SANDBOX_CALL(clock_gettime64) SANDBOX_CALL(clock_nanosleep_time64) SANDBOX_CALL(ppoll_time64)
                SANDBOX_CALL(futex_time64)
#endif
#undef SANDBOX_CALL
};

/* Allowed when an argument, of which the lower 32 bits count, has one of some values; or, with mask, none or all of its bits. */
typedef struct sandbox_rule {
    uint32_t call;
    uint8_t argument; /* from 0 on */
    uint32_t mask;    /* 0: the argument is one of values */
    uint32_t values[8];
    uint8_t count;
} sandbox_rule;

static const sandbox_rule sandbox_rules[] = {
#ifdef __NR_mmap2
    {__NR_mmap2, 2, PROT_EXEC, {0}, 1},
#else
    {__NR_mmap, 2, PROT_EXEC, {0}, 1},
#endif
    {__NR_mprotect, 2, PROT_EXEC, {0}, 1},
#ifdef __NR_fcntl64
    {__NR_fcntl64, 1, 0, {F_GETFL, F_SETFL, F_GETFD, F_SETFD, F_DUPFD_CLOEXEC, 1034 /* F_GET_SEALS */}, 6},
#endif
    {__NR_fcntl, 1, 0, {F_GETFL, F_SETFL, F_GETFD, F_SETFD, F_DUPFD_CLOEXEC, 1034}, 6},
#ifdef __NR_socketcall
    {__NR_socketcall, 0, 0, {14 /* setsockopt */, 16 /* sendmsg */, 17 /* recvmsg */, 18 /* accept4 */}, 4},
#endif
    /* the terminal of serial, as it was */
    {__NR_ioctl, 1, 0, {0x5401 /* TCGETS */, 0x5402 /* TCSETS */}, 2},
/* how some C libraries spell fstat() */
#ifdef __NR_newfstatat
    {__NR_newfstatat, 3, 0x1000 /* AT_EMPTY_PATH */, {0x1000}, 1},
#endif
#ifdef __NR_fstatat64
    {__NR_fstatat64, 3, 0x1000, {0x1000}, 1},
#endif
#ifdef __NR_statx
    {__NR_statx, 2, 0x1000, {0x1000}, 1},
#endif
};

enum { SANDBOX_STEPS = 256 };

typedef struct sandbox_program {
    unsigned short len;
    sandbox_step *steps;
} sandbox_program;

static inline void sandbox_add(sandbox_program *p, uint16_t code, uint32_t value, uint8_t if_so, uint8_t if_not)
{
    if (p->len < SANDBOX_STEPS)
        p->steps[p->len++] = (sandbox_step){code, if_so, if_not, value};
}

/* 0, or a negative errno: nothing has changed then, but that no program that is executed gains privileges. */
static inline int sandbox_enter(void)
{
#if defined(SANDBOX_ARCH) && defined(__NR_seccomp)
    sandbox_step steps[SANDBOX_STEPS];
    sandbox_program p = {0, steps};
    sandbox_add(&p, SANDBOX_LOAD, SANDBOX_AT_ARCH, 0, 0);
    sandbox_add(&p, SANDBOX_IF_EQUAL, SANDBOX_ARCH, 1, 0);
    sandbox_add(&p, SANDBOX_RETURN, SANDBOX_END, 0, 0);
    sandbox_add(&p, SANDBOX_LOAD, SANDBOX_AT_CALL, 0, 0);
#ifdef __x86_64__ /* the numbers of x32, which is the same machine */
    sandbox_add(&p, SANDBOX_IF_FROM, 0x40000000, 0, 1);
    sandbox_add(&p, SANDBOX_RETURN, SANDBOX_END, 0, 0);
#endif
    for (size_t i = 0; i < sizeof(sandbox_calls) / sizeof(sandbox_calls[0]); i++) {
        sandbox_add(&p, SANDBOX_IF_EQUAL, sandbox_calls[i], 0, 1);
        sandbox_add(&p, SANDBOX_RETURN, SANDBOX_ALLOW, 0, 0);
    }
    for (size_t i = 0; i < sizeof(sandbox_rules) / sizeof(sandbox_rules[0]); i++) {
        const sandbox_rule *rule = &sandbox_rules[i];
        sandbox_add(&p, SANDBOX_IF_EQUAL, rule->call, 0, (uint8_t)(1 + (rule->mask != 0) + 2 * rule->count + 1));
        sandbox_add(&p, SANDBOX_LOAD, SANDBOX_AT_ARGUMENTS + rule->argument * 8u, 0, 0); /* the lower half: little-endian */
        if (rule->mask)
            sandbox_add(&p, SANDBOX_AND, rule->mask, 0, 0);
        for (unsigned v = 0; v < rule->count; v++) {
            sandbox_add(&p, SANDBOX_IF_EQUAL, rule->values[v], 0, 1);
            sandbox_add(&p, SANDBOX_RETURN, SANDBOX_ALLOW, 0, 0);
        }
        sandbox_add(&p, SANDBOX_RETURN, SANDBOX_REFUSE, 0, 0);
    }
    sandbox_add(&p, SANDBOX_RETURN, SANDBOX_REFUSE, 0, 0);
    if (p.len == SANDBOX_STEPS)
        return -E2BIG; /* perhaps it is cut */
    if (prctl(PR_SET_NO_NEW_PRIVS, 1L, 0L, 0L, 0L) < 0)
        return -errno;
    /* A filter (1) for all threads (1). More than 0: a thread that has a filter of its own. */
    long other = syscall(__NR_seccomp, 1L, 1L, &p);
    return other < 0 ? -errno : other > 0 ? -EBUSY : 0;
#else
    (void)sandbox_calls, (void)sandbox_rules, (void)sandbox_add;
    return -ENOSYS;
#endif
}

#endif /* VFU_EXAMPLES_SANDBOX_H */
