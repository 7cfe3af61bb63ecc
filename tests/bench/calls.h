/* SPDX-License-Identifier: MIT */
/*
 * Counts the system calls of a child process, by number, as a debugger sees them: nothing that the process does goes by uncounted,
 * and nothing is compiled into it for that.
 */
#ifndef VFU_TESTS_BENCH_CALLS_H
#define VFU_TESTS_BENCH_CALLS_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>

enum { CALLS_MAX = 512 };

/* Only the thread that has attached to a process may control it, and it waits most of the time: hence one of its own. */
typedef struct tracer {
    pid_t pid;
    pthread_t thread;
    atomic_int state; /* 0: not attached yet; 1: attached; -1: could not */
    atomic_bool counting, end;
    unsigned long count[CALLS_MAX];
} tracer;

static void *trace(void *arg)
{
    tracer *t = arg;
    int status;
    if (ptrace(PTRACE_SEIZE, t->pid, NULL, (void *)PTRACE_O_TRACESYSGOOD) < 0 ||
        ptrace(PTRACE_INTERRUPT, t->pid, NULL, NULL) < 0 || waitpid(t->pid, &status, __WALL) < 0) {
        atomic_store(&t->state, -1);
        return NULL;
    }
    while (WIFSTOPPED(status) && !atomic_load(&t->end)) {
        struct __ptrace_syscall_info info;
        int number = WSTOPSIG(status), deliver = 0;
        if (number == (SIGTRAP | 0x80)) {
            if (ptrace(PTRACE_GET_SYSCALL_INFO, t->pid, (void *)sizeof(info), &info) > 0 &&
                info.op == PTRACE_SYSCALL_INFO_ENTRY && info.entry.nr < CALLS_MAX && atomic_load(&t->counting))
                t->count[info.entry.nr]++;
        } else if (number != SIGTRAP) {
            deliver = number;
        }
        if (ptrace(PTRACE_SYSCALL, t->pid, NULL, (void *)(intptr_t)deliver) < 0)
            break;
        atomic_store(&t->state, 1);
        if (waitpid(t->pid, &status, __WALL) < 0)
            break;
    }
    ptrace(PTRACE_DETACH, t->pid, NULL, NULL);
    return NULL;
}

/* Attaches to a child that waits. False: that is not allowed here. */
static bool trace_start(tracer *t, pid_t pid)
{
    memset(t, 0, sizeof(*t));
    t->pid = pid;
    if (pthread_create(&t->thread, NULL, trace, t))
        return false;
    while (!atomic_load(&t->state))
        sched_yield();
    if (atomic_load(&t->state) > 0)
        return true;
    pthread_join(t->thread, NULL);
    return false;
}

/* The child has to make one more call after t->end was set. */
static void trace_end(tracer *t) { pthread_join(t->thread, NULL); }

static unsigned long trace_sum(const tracer *t)
{
    unsigned long sum = 0;
    for (int i = 0; i < CALLS_MAX; i++)
        sum += t->count[i];
    return sum;
}

/* The names of those that a device makes. */
static const char *call_name(int number)
{
    switch (number) {
    case SYS_recvmsg: return "recvmsg";
    case SYS_sendmsg: return "sendmsg";
    case SYS_recvfrom: return "recvfrom";
    case SYS_sendto: return "sendto";
#ifdef SYS_poll
    case SYS_poll: return "poll";
#endif
    case SYS_ppoll: return "ppoll";
    case SYS_fstat: return "fstat";
#ifdef SYS_newfstatat
    case SYS_newfstatat: return "fstatat";
#endif
    case SYS_fcntl: return "fcntl";
    case SYS_close: return "close";
    case SYS_mmap: return "mmap";
    case SYS_munmap: return "munmap";
    case SYS_read: return "read";
    case SYS_write: return "write";
    case SYS_futex: return "futex";
    case SYS_restart_syscall: return "restart_syscall";
    default: return "other";
    }
}

#endif /* VFU_TESTS_BENCH_CALLS_H */
