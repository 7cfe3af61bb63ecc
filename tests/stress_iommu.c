/* SPDX-License-Identifier: MIT */
/*
 * The promise of vfu_iommu.h under fire: when an unmap has returned, no access to the range is in flight and none can begin.
 *
 *     stress_iommu [unmaps]               so many unmaps, one million by default; no stale access may follow
 *     stress_iommu control SECONDS STALE  counts stale accesses, so many or for so long; the status is 1 when there were any
 *
 * Owners map and unmap slots while readers access them in every way there is. How a stale access is seen, without ever
 * mistaking a good one for it:
 *
 *   - When unmap has returned, the owner overwrites the slot's memory with POISON, which stands there until the slot is
 *     mapped again. Memory that is mapped never contains POISON: it is overwritten with CLEAN before it is mapped.
 *   - A reader that finds POISON in what it was given has read memory after its unmap: a stale read.
 *   - An owner that finds anything else than POISON in a slot before it maps it again: a stale write.
 *
 * All readers read the first area of a slot, and each of them writes an area of its own, so there is no race but a stale
 * access, and ThreadSanitizer sees those as well. stress_iommu.sh runs this as it is, under ThreadSanitizer, and with the
 * wait for the readers taken out of the header, which has to be noticed.
 *
 * test_iommu_threads.c includes this file for a short run.
 */
#define _GNU_SOURCE
#include "vfu_iommu.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    STRESS_READERS = 4,
    STRESS_OWNERS = 2,
    STRESS_SLOTS = 12,   /* of each owner */
    STRESS_UNMAPPED = 3, /* slots that an owner keeps unmapped, so that a late write has time to show */
    STRESS_PARTS = 3,    /* mappings that make up a slot, at most */
    POISON = 0xEE,
    CLEAN = 0x5A
};

enum stress_path {
    STRESS_READ,
    STRESS_WRITE,
    STRESS_FILL,
    STRESS_COPY,
    STRESS_LOAD,
    STRESS_STORE,
    STRESS_PIN,
    STRESS_LAZY_PIN,
    STRESS_PATHS
};
static const char *const stress_path_name[STRESS_PATHS] = {"read", "write", "fill", "copy", "load", "store", "pin", "lazy pin"};

typedef struct stress stress;

typedef struct stress_config {
    unsigned long unmaps;                /* stop when so many calls of unmap have removed something */
    double seconds;                      /* stop after this time */
    unsigned long stale;                 /* stop when so many stale accesses were seen */
    void (*started)(struct stress *run); /* may be NULL */
} stress_config;

typedef struct stress_result {
    unsigned long unmaps, removed, done[STRESS_PATHS], refused, stale_reads, stale_writes;
    uint64_t waits;
    double seconds;
    const char *broken; /* something else went wrong */
} stress_result;

/* [iova, iova + size): an area of `access` bytes that all readers read, then one for each to write. */
typedef struct stress_slot {
    uint64_t iova;
    size_t size, access;
    unsigned char *memory;
    bool io;    /* reached by callbacks */
    int mapped; /* the number of mappings; the owner's */
} stress_slot;

typedef struct stress_thread {
    stress *run;
    pthread_t thread;
    unsigned number;
    uint64_t luck;
    unsigned long unmaps, removed, done[STRESS_PATHS], refused;
} stress_thread;

/* A pin that stays held while it isn't used, and that an unmap may take back then. */
typedef struct stress_lazy {
    vfu_iommu_pin pin;
    _Atomic int state; /* LAZY_* */
    stress_slot *slot;
    unsigned char *memory;
} stress_lazy;
enum { LAZY_NONE, LAZY_IDLE, LAZY_BUSY };

struct stress {
    stress_config config;
    vfu_iommu *table;
    stress_slot slot[STRESS_OWNERS][STRESS_SLOTS];
    stress_thread owner[STRESS_OWNERS], reader[STRESS_READERS];
    atomic_ulong unmaps, stale_reads, stale_writes;
    _Atomic(const char *) broken;
    atomic_bool stop;
    atomic_uint victim[STRESS_OWNERS]; /* the slot that the owner unmaps next; STRESS_SLOTS: none */
    double deadline;
};

static double stress_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static uint64_t stress_random(stress_thread *t)
{
    t->luck ^= t->luck << 13;
    t->luck ^= t->luck >> 7;
    t->luck ^= t->luck << 17;
    return t->luck >> 11;
}

static int stress_io_read(void *ctx, uint64_t iova, void *dst, size_t len)
{
    memcpy(dst, (char *)((uintptr_t)ctx + (uintptr_t)iova), len);
    return 0;
}

static int stress_io_write(void *ctx, uint64_t iova, const void *src, size_t len)
{
    memcpy((char *)((uintptr_t)ctx + (uintptr_t)iova), src, len);
    return 0;
}

static const vfu_iommu_io stress_io = {.read = stress_io_read, .write = stress_io_write};

static void stress_break(stress *run, const char *what)
{
    atomic_store(&run->broken, what);
    atomic_store(&run->stop, true);
}

/* ---- owners ----------------------------------------------------------------------------------------------------------- */

static bool stress_is_all(const unsigned char *memory, size_t len, unsigned char byte)
{
    return memory[0] == byte && !memcmp(memory, memory + 1, len - 1);
}

static void stress_map(stress_thread *t, stress_slot *s)
{
    stress *run = t->run;
    if (!stress_is_all(s->memory, s->size, POISON) && atomic_fetch_add(&run->stale_writes, 1) + 1 >= run->config.stale)
        atomic_store(&run->stop, true);
    memset(s->memory, CLEAN, s->size);
    size_t at = 0, parts = 1 + stress_random(t) % STRESS_PARTS;
    for (s->mapped = 0; at < s->size; s->mapped++, parts--) {
        size_t size = parts > 1 ? 1 + stress_random(t) % (s->size - at) : s->size - at;
        vfu_iommu_mapping m = {.iova = s->iova + at, .size = size, .prot = VFU_IOMMU_READ | VFU_IOMMU_WRITE};
        m.host = s->io ? NULL : s->memory + at;
        m.io = s->io ? &stress_io : NULL;
        m.io_ctx = s->io ? (void *)((uintptr_t)s->memory - (uintptr_t)s->iova) : NULL;
        if (vfu_iommu_map(run->table, &m)) {
            stress_break(run, "a map failed");
            return;
        }
        at += size;
    }
}

/* Unmaps `count` neighbouring slots with one call, and takes their memory back at once. */
static void stress_unmap(stress_thread *t, stress_slot *s, unsigned count)
{
    stress *run = t->run;
    uint64_t size = 0;
    int mapped = 0;
    for (unsigned i = 0; i < count; i++) {
        size += s[i].size;
        mapped += s[i].mapped;
        s[i].mapped = 0;
    }
    int removed = vfu_iommu_unmap(run->table, s->iova, size);
    for (unsigned i = 0; i < count; i++)
        memset(s[i].memory, POISON, s[i].size);
    if (removed != mapped)
        stress_break(run, "an unmap removed a wrong number of mappings");
    t->unmaps++;
    t->removed += (unsigned)mapped;
    if (atomic_fetch_add(&run->unmaps, 1) + 1 >= run->config.unmaps ||
        ((t->unmaps & 63) == 0 && stress_seconds() > run->deadline))
        atomic_store(&run->stop, true);
}

/* Large slots take long to overwrite: they are chosen less often. */
static unsigned stress_choose(stress_thread *t)
{
    uint64_t dice = stress_random(t) % 100;
    return (unsigned)(dice < 40 ? stress_random(t) % 6 : dice < 80 ? 6 + stress_random(t) % 4 : 10 + stress_random(t) % 2);
}

static void *stress_owner(void *arg)
{
    stress_thread *t = arg;
    stress_slot *slots = t->run->slot[t->number];
    unsigned unmapped[STRESS_SLOTS + 1], waiting = 0;
    for (unsigned i = 0; i < STRESS_SLOTS; i++)
        stress_map(t, &slots[i]);
    while (!atomic_load_explicit(&t->run->stop, memory_order_relaxed)) {
        unsigned first = stress_choose(t), count = 1;
        if (!slots[first].mapped)
            continue;
        atomic_store(&t->run->victim[t->number], first); /* readers come to it while older ones are mapped again */
        while (waiting > STRESS_UNMAPPED) {
            stress_map(t, &slots[unmapped[0]]);
            memmove(unmapped, unmapped + 1, --waiting * sizeof(unmapped[0]));
        }
        while (first + count < STRESS_SLOTS && slots[first + count].mapped && stress_random(t) % 8 == 0)
            count++;
        for (uint64_t wait = stress_random(t) % 256; wait; wait--)
            atomic_signal_fence(memory_order_seq_cst);
        stress_unmap(t, &slots[first], count);
        atomic_store(&t->run->victim[t->number], STRESS_SLOTS);
        for (unsigned i = 0; i < count; i++)
            unmapped[waiting++] = first + i;
    }
    while (waiting && !atomic_load(&t->run->broken)) /* the last ones are looked at as well */
        stress_map(t, &slots[unmapped[--waiting]]);
    return NULL;
}

/* ---- readers ---------------------------------------------------------------------------------------------------------- */

/* A look at each cache line of what was read, and at its last byte. */
static bool stress_look(stress_thread *t, const unsigned char *bytes, size_t len)
{
    bool poisoned = bytes[len - 1] == POISON;
    for (size_t i = 0; i < len; i += 64)
        poisoned |= bytes[i] == POISON;
    if (poisoned && atomic_fetch_add(&t->run->stale_reads, 1) + 1 >= t->run->config.stale)
        atomic_store(&t->run->stop, true);
    return poisoned;
}

/* The same for a reader's buffer, which is used again. */
static void stress_look_once(stress_thread *t, unsigned char *buffer, size_t len)
{
    if (stress_look(t, buffer, len))
        memset(buffer, CLEAN, len);
}

static bool stress_let_go(vfu_iommu_pin *pin, uint64_t iova, uint64_t size)
{
    stress_lazy *lazy = pin->user;
    int idle = LAZY_IDLE;
    (void)iova, (void)size;
    return atomic_compare_exchange_strong(&lazy->state, &idle, LAZY_NONE);
}

/* Uses the pin that is held, or takes one that will be held until somebody wants it back; after that the struct is used again
 * at once. */
static int stress_use_lazy_pin(stress_thread *t, vfu_iommu_reader *reader, stress_lazy *lazy, stress_slot *s,
                               const unsigned char *source)
{
    vfu_iommu_segment segment[STRESS_PARTS];
    int idle = LAZY_IDLE;
    if (atomic_compare_exchange_strong(&lazy->state, &idle, LAZY_BUSY)) {
        stress_look(t, lazy->memory, lazy->slot->access);
        memcpy(lazy->memory + lazy->slot->access * (1 + t->number), source, lazy->slot->access);
        if (stress_random(t) % 4 == 0) {
            vfu_iommu_pin_drop(t->run->table, &lazy->pin);
            atomic_store(&lazy->state, LAZY_NONE);
        } else {
            atomic_store(&lazy->state, LAZY_IDLE);
        }
        return 0;
    }
    atomic_store(&lazy->state, LAZY_BUSY);
    lazy->pin.let_go = stress_let_go;
    lazy->pin.user = lazy;
    int count = vfu_iommu_pin_take(reader, &lazy->pin, s->iova, s->size, VFU_IOMMU_READ | VFU_IOMMU_WRITE, segment, STRESS_PARTS);
    if (count > 0) {
        lazy->slot = s;
        lazy->memory = segment[0].host; /* the slot's parts are neighbours in memory as well */
        atomic_store(&lazy->state, LAZY_IDLE);
    } else {
        atomic_store(&lazy->state, LAZY_NONE);
    }
    return count < 0 ? count : 0;
}

static int stress_use_pin(stress_thread *t, vfu_iommu_reader *reader, stress_slot *s, unsigned char *buffer, uint64_t own)
{
    vfu_iommu_segment segment[STRESS_PARTS];
    vfu_iommu_pin pin = {0};
    bool writes = stress_random(t) & 1;
    int count = vfu_iommu_pin_take(reader, &pin, writes ? own : s->iova, s->access, writes ? VFU_IOMMU_WRITE : VFU_IOMMU_READ,
                                   segment, STRESS_PARTS);
    for (int i = 0; i < count; i++) {
        if (writes)
            memcpy(segment[i].host, buffer, segment[i].len);
        else
            stress_look(t, segment[i].host, segment[i].len);
    }
    vfu_iommu_pin_drop(t->run->table, &pin);
    return count < 0 ? count : 0;
}

/* Any slot, but mostly the one that is unmapped next. */
static stress_slot *stress_any_slot(stress_thread *t)
{
    unsigned owner = (unsigned)(stress_random(t) % STRESS_OWNERS);
    unsigned victim = atomic_load_explicit(&t->run->victim[owner], memory_order_relaxed);
    return &t->run->slot[owner][victim < STRESS_SLOTS && stress_random(t) % 4 ? victim : stress_choose(t)];
}

static int stress_access(stress_thread *t, vfu_iommu_reader *reader, enum stress_path path, stress_slot *s, unsigned char *buffer,
                         const unsigned char *source)
{
    uint64_t own = s->iova + s->access * (1 + t->number), value = 0;
    int err = 0;
    switch (path) {
    case STRESS_READ:
        err = vfu_iommu_read(reader, s->iova, buffer, s->access);
        stress_look_once(t, buffer, s->access); /* after an error too: a prefix may have moved */
        break;
    case STRESS_WRITE: err = vfu_iommu_write(reader, own, source, s->access); break;
    case STRESS_FILL: err = vfu_iommu_fill(reader, own, s->access, source, 8); break;
    case STRESS_COPY: {
        stress_slot *from = stress_any_slot(t);
        size_t len = from->access < s->access ? from->access : s->access;
        err = vfu_iommu_copy(reader, own, from->iova, len);
        if (!err && !vfu_iommu_read(reader, own, buffer, len)) /* a stale read of the source has come to here */
            stress_look_once(t, buffer, len);
        break;
    }
    case STRESS_LOAD:
        err = vfu_iommu_load(reader, s->iova + 8 * (stress_random(t) % (s->access / 8)), 8, VFU_IOMMU_ACQUIRE, &value);
        stress_look(t, (unsigned char *)&value, sizeof(value));
        err = err == -ENOTSUP ? 0 : err; /* two mappings meet in the word */
        break;
    case STRESS_STORE:
        err = vfu_iommu_store(reader, own + 8 * (stress_random(t) % (s->access / 8)), 8, VFU_IOMMU_RELEASE, 0x0102030405060708);
        err = err == -ENOTSUP ? 0 : err;
        break;
    default: err = stress_use_pin(t, reader, s, buffer, own); break;
    }
    return err;
}

static void *stress_reader(void *arg)
{
    stress_thread *t = arg;
    stress *run = t->run;
    vfu_iommu_reader *reader;
    stress_lazy lazy = {.state = LAZY_NONE};
    static _Alignas(64) unsigned char buffers[STRESS_READERS][65536], sources[STRESS_READERS][65536];
    unsigned char *buffer = buffers[t->number], *source = sources[t->number];
    memset(source, 0x10 + (int)t->number, sizeof(sources[0]));
    memset(buffer, 0x10 + (int)t->number, sizeof(buffers[0]));
    if (vfu_iommu_reader_open(run->table, &reader)) {
        stress_break(run, "no reader");
        return NULL;
    }
    while (!atomic_load_explicit(&run->stop, memory_order_relaxed)) {
        enum stress_path path = (enum stress_path)(stress_random(t) % STRESS_PATHS);
        stress_slot *s = stress_any_slot(t);
        if ((path == STRESS_PIN || path == STRESS_LAZY_PIN) && s->io)
            path = STRESS_READ; /* callbacks can't be pinned */
        int err = path == STRESS_LAZY_PIN ? stress_use_lazy_pin(t, reader, &lazy, s, source)
                                          : stress_access(t, reader, path, s, buffer, source);
        if (!err)
            t->done[path]++;
        else if (err == -ENOENT)
            t->refused++;
        else
            stress_break(run, "an access failed in an unexpected way");
    }
    vfu_iommu_pin_drop(run->table, &lazy.pin);
    vfu_iommu_reader_close(reader);
    return NULL;
}

/* ---- the run ---------------------------------------------------------------------------------------------------------- */

static void stress_make_slots(stress *run)
{
    uint64_t iova = 0x40000000;
    for (unsigned o = 0; o < STRESS_OWNERS; o++) {
        for (unsigned i = 0; i < STRESS_SLOTS; i++) { /* without gaps, so that they are neighbours */
            stress_slot *s = &run->slot[o][i];
            s->access = i < 6 ? 64 : i < 10 ? 4096 : 65536;
            s->size = s->access * (1 + STRESS_READERS);
            s->iova = iova;
            s->io = i == 5 || i == 9;
            s->memory = aligned_alloc(64, s->size);
            if (!s->memory)
                abort();
            memset(s->memory, POISON, s->size);
            iova += s->size;
        }
    }
}

static stress_result stress_run(stress_config config)
{
    stress *run = calloc(1, sizeof(*run));
    stress_result result = {0};
    vfu_iommu_stats stats;
    /* Pins are short here, but their threads may have to wait for a processor: the deadline must not end an unmap. */
    vfu_iommu_desc desc = {.max_mappings = 256, .max_readers = STRESS_READERS, .pin_deadline_ms = 600000};
    if (!run || vfu_iommu_create(&run->table, &desc))
        abort();
    run->config = config;
    stress_make_slots(run);
    double start = stress_seconds();
    run->deadline = start + config.seconds;
    if (config.started)
        config.started(run);
    for (unsigned i = 0; i < STRESS_OWNERS + STRESS_READERS; i++) {
        stress_thread *t = i < STRESS_OWNERS ? &run->owner[i] : &run->reader[i - STRESS_OWNERS];
        t->run = run;
        t->number = i < STRESS_OWNERS ? i : i - STRESS_OWNERS;
        t->luck = (i + 1) * UINT64_C(0x9E3779B97F4A7C15);
        if (pthread_create(&t->thread, NULL, i < STRESS_OWNERS ? stress_owner : stress_reader, t))
            abort();
    }
    for (unsigned i = 0; i < STRESS_READERS; i++) /* first, since an owner may wait for the pin of one */
        pthread_join(run->reader[i].thread, NULL);
    for (unsigned i = 0; i < STRESS_OWNERS; i++) {
        pthread_join(run->owner[i].thread, NULL);
        result.unmaps += run->owner[i].unmaps;
        result.removed += run->owner[i].removed;
    }
    result.seconds = stress_seconds() - start;
    for (unsigned i = 0; i < STRESS_READERS; i++) {
        result.refused += run->reader[i].refused;
        for (unsigned p = 0; p < STRESS_PATHS; p++)
            result.done[p] += run->reader[i].done[p];
    }
    vfu_iommu_get_stats(run->table, &stats);
    result.waits = stats.waits;
    result.stale_reads = atomic_load(&run->stale_reads);
    result.stale_writes = atomic_load(&run->stale_writes);
    result.broken = atomic_load(&run->broken);
    if (!result.broken && (vfu_iommu_check(run->table) || stats.pins || stats.unmaps != result.removed))
        result.broken = "the table is not in order";
    vfu_iommu_destroy(run->table);
    for (unsigned o = 0; o < STRESS_OWNERS; o++)
        for (unsigned i = 0; i < STRESS_SLOTS; i++)
            free(run->slot[o][i].memory);
    free(run);
    return result;
}

#ifndef STRESS_IOMMU_INCLUDED
#include <signal.h>
#include <unistd.h>

/* For the negative control: once an access is stale, pins and hazards may be in any state, threads may wait for ever, and
 * a node that is used again under a reader's feet sends it to memory that isn't there. What was seen until then is what
 * counts. */
static stress *stress_watched;
static void stress_give_up(const char *why)
{
    char text[200];
    unsigned long reads = atomic_load(&stress_watched->stale_reads), writes = atomic_load(&stress_watched->stale_writes);
    int len = snprintf(text, sizeof(text), "unmaps %lu, %s; stale = %lu (%lu read, %lu written)\n",
                       atomic_load(&stress_watched->unmaps), why, reads + writes, reads, writes);
    if (write(STDOUT_FILENO, text, (size_t)len) != len)
        _exit(2);
    _exit(reads + writes ? 1 : 2);
}

static void stress_on_crash(int sig)
{
    (void)sig;
    stress_give_up("then an access to memory that isn't there");
}

static void *stress_watch(void *arg)
{
    stress *run = arg;
    for (;;) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        if (atomic_load(&run->stale_reads) + atomic_load(&run->stale_writes) >= run->config.stale)
            stress_give_up("then stopped");
        if (stress_seconds() > run->deadline)
            stress_give_up("then out of time");
    }
    return NULL;
}

static void stress_begin_watch(stress *run)
{
    pthread_t thread;
    stress_watched = run;
    signal(SIGSEGV, stress_on_crash);
    signal(SIGBUS, stress_on_crash);
    if (pthread_create(&thread, NULL, stress_watch, run) || pthread_detach(thread))
        abort();
}

int main(int argc, char **argv)
{
    stress_config config = {.unmaps = 1000000, .seconds = 1e9, .stale = 1};
    if (argc > 1)
        config.unmaps = strtoul(argv[1], NULL, 10);
    if (argc > 3) {
        config.unmaps = ULONG_MAX;
        config.seconds = strtod(argv[2], NULL);
        config.stale = strtoul(argv[3], NULL, 10);
        config.started = stress_begin_watch;
    }
    stress_result r = stress_run(config);
    unsigned long accesses = 0;
    printf("unmaps %lu (%lu mappings, %llu waited for an access) in %.1f s\naccesses: ", r.unmaps, r.removed,
           (unsigned long long)r.waits, r.seconds);
    for (unsigned p = 0; p < STRESS_PATHS; p++) {
        printf("%s %lu, ", stress_path_name[p], r.done[p]);
        accesses += r.done[p];
    }
    printf("refused %lu\naccesses %lu, stale = %lu (%lu read, %lu written)\n", r.refused, accesses,
           r.stale_reads + r.stale_writes, r.stale_reads, r.stale_writes);
    if (r.broken)
        fprintf(stderr, "stress_iommu: %s\n", r.broken);
    return r.stale_reads + r.stale_writes ? 1 : r.broken ? 2 : 0;
}
#endif
