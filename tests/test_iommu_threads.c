/* SPDX-License-Identifier: MIT */
/*
 * vfu_iommu.h with many threads: the stress of the promise (stress_iommu.c) in a short run, and what else must hold while
 * others map, unmap, write and report. Everything here is free of races of its own, and is also run under ThreadSanitizer.
 */
#define STRESS_IOMMU_INCLUDED
#include "stress_iommu.c"

#include <check.h>

#define RW (VFU_IOMMU_READ | VFU_IOMMU_WRITE)

static vfu_iommu *table;
static atomic_bool stop;
static atomic_uint wrong; /* what threads found; they can't fail a test themselves */
static char cell[64];

static uint64_t next_luck(uint64_t *luck)
{
    *luck ^= *luck << 13;
    *luck ^= *luck >> 7;
    *luck ^= *luck << 17;
    return *luck >> 11;
}

static void begin(const vfu_iommu_desc *desc)
{
    atomic_store(&stop, false);
    atomic_store(&wrong, 0);
    ck_assert_int_eq(vfu_iommu_create(&table, desc), 0);
}

static void end(void)
{
    ck_assert_uint_eq(atomic_load(&wrong), 0);
    ck_assert_int_eq(vfu_iommu_check(table), 0);
    vfu_iommu_destroy(table);
}

static pthread_t start(void *(*body)(void *), uintptr_t number)
{
    pthread_t thread;
    ck_assert_int_eq(pthread_create(&thread, NULL, body, (void *)number), 0);
    return thread;
}

static int map_bytes(uint64_t iova, uint64_t size, void *host)
{
    vfu_iommu_mapping m = {.iova = iova, .size = size, .prot = RW, .host = host};
    return vfu_iommu_map(table, &m);
}

/* ---- the promise ------------------------------------------------------------------------------------------------------ */

START_TEST(no_stale_access)
{
    stress_result r = stress_run((stress_config){.unmaps = ULONG_MAX, .seconds = 1.2, .stale = 1});
    ck_assert_msg(!r.broken, "%s", r.broken);
    ck_assert_uint_eq(r.stale_reads, 0);
    ck_assert_uint_eq(r.stale_writes, 0);
    ck_assert_uint_gt(r.unmaps, 10);
    unsigned long accesses = 0;
    for (int path = 0; path < STRESS_PATHS; path++)
        accesses += r.done[path];
    ck_assert_uint_gt(accesses, 10);
}
END_TEST

/* ---- what waits for an access in flight -------------------------------------------------------------------------------- */

enum { FROM = 0x10000, TO = 0x20000 };
static atomic_bool arrived, may_go_on, op_returned;

/* Keeps an access in flight, with its hazards published, until may_go_on. */
static int stopping_guard(void *ctx, void (*body)(void *), void *arg, const void **bad)
{
    (void)ctx, (void)bad;
    atomic_store(&arrived, true);
    while (!atomic_load(&may_go_on))
        sched_yield();
    body(arg);
    return 0;
}

static int read_from(vfu_iommu_reader *r)
{
    char bytes[64];
    return vfu_iommu_read(r, FROM, bytes, sizeof(bytes));
}
static int write_to(vfu_iommu_reader *r) { return vfu_iommu_write(r, TO, cell, sizeof(cell)); }
static int copy_over(vfu_iommu_reader *r) { return vfu_iommu_copy(r, TO, FROM, 64); }

static int unmap_from(void) { return vfu_iommu_unmap(table, FROM, 4096) - 1; }
static int unmap_to(void) { return vfu_iommu_unmap(table, TO, 4096) - 1; }
static int unmap_all(void) { return vfu_iommu_unmap_all(table) - 2; }
static int start_log(void) { return vfu_iommu_dirty_start(table, 4096, NULL, 0); }
static int stop_log(void) { return vfu_iommu_dirty_stop(table); }

static const struct waiting_case {
    const char *name;
    int (*access)(vfu_iommu_reader *reader);
    int (*op)(void); /* 0: right */
    bool logging;
} waiting_cases[] = {
    {"unmap of what is read", read_from, unmap_from, false},
    {"unmap of what is written", write_to, unmap_to, false},
    {"unmap of a copy's source", copy_over, unmap_from, false},
    {"unmap of a copy's destination", copy_over, unmap_to, false},
    {"unmap of all during a copy", copy_over, unmap_all, false},
    {"start of the dirty log during a write", write_to, start_log, false},
    {"start of the dirty log during a copy", copy_over, start_log, false},
    {"stop of the dirty log during a write", write_to, stop_log, true},
};

static void *access_and_stop(void *arg)
{
    const struct waiting_case *c = &waiting_cases[(uintptr_t)arg];
    vfu_iommu_reader *reader;
    if (vfu_iommu_reader_open(table, &reader) || c->access(reader))
        atomic_fetch_add(&wrong, 1);
    vfu_iommu_reader_close(reader);
    return NULL;
}

static void *operate(void *arg)
{
    if (waiting_cases[(uintptr_t)arg].op())
        atomic_fetch_add(&wrong, 1);
    atomic_store(&op_returned, true);
    return NULL;
}

START_TEST(waits_for_an_access_in_flight)
{
    const struct waiting_case *c = &waiting_cases[_i];
    static char from[4096], to[4096];
    begin(&(vfu_iommu_desc){.guard = stopping_guard});
    atomic_store(&arrived, false);
    atomic_store(&may_go_on, false);
    atomic_store(&op_returned, false);
    for (int i = 0; i < 2; i++) {
        vfu_iommu_mapping m = {
            .iova = i ? TO : FROM, .size = 4096, .prot = RW, .flags = VFU_IOMMU_GUARDED, .host = i ? to : from};
        ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
    }
    if (c->logging)
        ck_assert_int_eq(start_log(), 0);
    pthread_t access = start(access_and_stop, (uintptr_t)_i);
    while (!atomic_load(&arrived))
        sched_yield();
    pthread_t op = start(operate, (uintptr_t)_i);
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    ck_assert_msg(!atomic_load(&op_returned), "%s: has not waited", c->name);
    atomic_store(&may_go_on, true);
    pthread_join(access, NULL);
    pthread_join(op, NULL);
    end();
}
END_TEST

/* ---- no false fault --------------------------------------------------------------------------------------------------- */

enum { GROWING = 20000, STABLE = 512 };
static atomic_uint grown;

/* Whatever was mapped before the access began is found, although the tree turns under the walk. The count is read relaxed,
 * so that ThreadSanitizer sees whether the table itself orders a new mapping before the walk that finds it. */
static void *probe_what_has_grown(void *arg)
{
    uint64_t luck = (uintptr_t)arg + 1;
    vfu_iommu_reader *reader;
    if (vfu_iommu_reader_open(table, &reader))
        abort();
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        unsigned n = atomic_load_explicit(&grown, memory_order_relaxed), back = (unsigned)next_luck(&luck);
        if (n && vfu_iommu_probe(reader, (uint64_t)(back & 1 ? n - 1 : back % n) * 64, 64, RW))
            atomic_fetch_add(&wrong, 1);
        if (back % 64 == 0 && vfu_iommu_probe(reader, GROWING * 64 + back % 4096, 1, RW) != -ENOENT)
            atomic_fetch_add(&wrong, 1);
    }
    vfu_iommu_reader_close(reader);
    return NULL;
}

START_TEST(growing_table)
{
    pthread_t thread[2];
    begin(&(vfu_iommu_desc){.cache_entries = 64});
    atomic_store(&grown, 0);
    for (uintptr_t i = 0; i < 2; i++)
        thread[i] = start(probe_what_has_grown, i);
    for (unsigned n = 0; n < GROWING; n++) {
        ck_assert_int_eq(map_bytes((uint64_t)n * 64, 64, cell), 0);
        atomic_store_explicit(&grown, n + 1, memory_order_relaxed);
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 2; i++)
        pthread_join(thread[i], NULL);
    end();
}
END_TEST

static void *probe_what_is_stable(void *arg)
{
    uint64_t luck = (uintptr_t)arg + 1;
    vfu_iommu_reader *reader;
    char bytes[64];
    if (vfu_iommu_reader_open(table, &reader))
        abort();
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        uint64_t n = next_luck(&luck) % STABLE;
        int err =
            next_luck(&luck) % 2 ? vfu_iommu_read(reader, n * 4096, bytes, 64) : vfu_iommu_probe(reader, n * 4096 + 63, 1, RW);
        if (err)
            atomic_fetch_add(&wrong, 1);
    }
    vfu_iommu_reader_close(reader);
    return NULL;
}

START_TEST(stable_mappings_among_others)
{
    pthread_t thread[2];
    uint64_t luck = 99;
    begin(&(vfu_iommu_desc){.cache_entries = 16});
    for (uint64_t n = 0; n < STABLE; n++)
        ck_assert_int_eq(map_bytes(n * 4096, 64, cell), 0);
    for (uintptr_t i = 0; i < 2; i++)
        thread[i] = start(probe_what_is_stable, i);
    double until = stress_seconds() + 0.3;
    while (stress_seconds() < until) {
        for (int i = 0; i < 100; i++) { /* between the stable ones, in the same pages of the translation cache */
            uint64_t iova = next_luck(&luck) % STABLE * 4096 + 64 + next_luck(&luck) % 32 * 64;
            if (map_bytes(iova, 64, cell) && vfu_iommu_unmap(table, iova, 64) != 1)
                ck_abort_msg("neither mapped nor unmapped");
        }
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 2; i++)
        pthread_join(thread[i], NULL);
    end();
}
END_TEST

/* The second page of a mapping is still known to the translation cache by a node that is free now, with the same addresses. */
START_TEST(mapped_anew_in_another_node)
{
    static char pages[8192];
    char bytes[64];
    vfu_iommu_reader *reader;
    begin(NULL);
    ck_assert_int_eq(vfu_iommu_reader_open(table, &reader), 0);
    ck_assert_int_eq(map_bytes(0, sizeof(pages), pages), 0);
    ck_assert_int_eq(vfu_iommu_read(reader, 4096, bytes, sizeof(bytes)), 0);
    ck_assert_int_eq(map_bytes(1 << 20, 64, cell), 0);
    ck_assert_int_eq(vfu_iommu_unmap(table, 0, sizeof(pages)), 1);
    ck_assert_int_eq(vfu_iommu_unmap(table, 1 << 20, 64), 1);
    ck_assert_int_eq(map_bytes(0, sizeof(pages), pages), 0);
    ck_assert_int_eq(vfu_iommu_read(reader, 4096, bytes, sizeof(bytes)), 0);
    ck_assert_int_eq(vfu_iommu_probe(reader, 4096, 64, RW), 0);
    vfu_iommu_reader_close(reader);
    end();
}
END_TEST

/* One node is all there is: it is readable at one address, then writable at another, and never anything between. */
static void *probe_the_only_node(void *arg)
{
    vfu_iommu_reader *reader;
    (void)arg;
    if (vfu_iommu_reader_open(table, &reader))
        abort();
    while (!atomic_load_explicit(&stop, memory_order_relaxed))
        if (!vfu_iommu_probe(reader, 0x1000, 64, VFU_IOMMU_WRITE) || !vfu_iommu_probe(reader, 0x2000, 64, VFU_IOMMU_READ))
            atomic_fetch_add(&wrong, 1);
    vfu_iommu_reader_close(reader);
    return NULL;
}

START_TEST(one_node_in_two_places)
{
    begin(&(vfu_iommu_desc){.max_mappings = 1, .cache_entries = 1});
    pthread_t thread = start(probe_the_only_node, 0);
    for (double until = stress_seconds() + 0.5; stress_seconds() < until;) {
        for (uint64_t i = 0; i < 100; i++) {
            uint64_t iova = i % 2 ? 0x1000 : 0x2000;
            vfu_iommu_mapping m = {.iova = iova, .size = 64, .prot = i % 2 ? VFU_IOMMU_READ : VFU_IOMMU_WRITE, .host = cell};
            if (vfu_iommu_map(table, &m) || vfu_iommu_unmap(table, iova, 64) != 1)
                ck_abort_msg("map and unmap");
        }
    }
    atomic_store(&stop, true);
    pthread_join(thread, NULL);
    end();
}
END_TEST

/* ---- many unmaps at once ---------------------------------------------------------------------------------------------- */

enum { CONTENDED = 32 };
static atomic_ulong removed_calls, removed_returned;

static void count_removed(void *ctx, const vfu_iommu_mapping *m)
{
    (void)ctx, (void)m;
    atomic_fetch_add(&removed_calls, 1);
}

static void *unmap_anything(void *arg)
{
    uint64_t luck = (uintptr_t)arg + 1;
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        uint64_t first = next_luck(&luck) % CONTENDED, count = 1 + next_luck(&luck) % 4;
        int removed = next_luck(&luck) % 64 ? vfu_iommu_unmap(table, first * 64, count * 64) : vfu_iommu_unmap_all(table);
        if (removed < 0)
            atomic_fetch_add(&wrong, 1);
        else
            atomic_fetch_add(&removed_returned, (unsigned)removed);
    }
    return NULL;
}

/* Opens and closes its reader all the time: unmaps wait for readers that come and go. */
static void *read_and_leave(void *arg)
{
    uint64_t luck = (uintptr_t)arg + 1;
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        vfu_iommu_reader *reader;
        char bytes[64];
        if (vfu_iommu_reader_open(table, &reader))
            atomic_fetch_add(&wrong, 1);
        else
            vfu_iommu_read(reader, next_luck(&luck) % CONTENDED * 64, bytes, 64);
        vfu_iommu_reader_close(reader);
    }
    return NULL;
}

/* Every mapping is removed by exactly one of the unmaps that wanted it. */
START_TEST(unmaps_of_the_same_ranges)
{
    pthread_t thread[4];
    uint64_t luck = 7;
    vfu_iommu_stats stats;
    atomic_store(&removed_calls, 0);
    atomic_store(&removed_returned, 0);
    begin(&(vfu_iommu_desc){.removed = count_removed, .max_readers = 2});
    for (uintptr_t i = 0; i < 4; i++)
        thread[i] = start(i < 2 ? unmap_anything : read_and_leave, i);
    double until = stress_seconds() + 0.3;
    unsigned long mapped = 0;
    while (stress_seconds() < until)
        for (int i = 0; i < 100; i++)
            mapped += map_bytes(next_luck(&luck) % CONTENDED * 64, 64, cell) == 0;
    atomic_store(&stop, true);
    for (int i = 0; i < 4; i++)
        pthread_join(thread[i], NULL);
    vfu_iommu_get_stats(table, &stats);
    ck_assert_uint_gt(mapped, 0);
    ck_assert_uint_eq(stats.maps, mapped);
    ck_assert_uint_eq(stats.unmaps, atomic_load(&removed_returned));
    ck_assert_uint_eq(atomic_load(&removed_calls), atomic_load(&removed_returned));
    ck_assert_uint_eq(stats.mappings, mapped - atomic_load(&removed_returned));
    end();
    ck_assert_uint_eq(atomic_load(&removed_calls), mapped); /* destroy gave back the rest */
}
END_TEST

/* ---- order of atomic accesses ----------------------------------------------------------------------------------------- */

enum { LETTERS = 3000 };
static _Alignas(64) unsigned char ring[192]; /* flag, data, answer */

/* A ring of one place, as a driver and a device have it: data, then the flag with RELEASE; the flag with ACQUIRE, then
 * data. */
static void *answer_letters(void *arg)
{
    vfu_iommu_reader *reader;
    (void)arg;
    if (vfu_iommu_reader_open(table, &reader))
        abort();
    for (uint64_t n = 1, seen; n <= LETTERS; n++) {
        uint64_t data[4] = {0};
        do {
            if (vfu_iommu_load(reader, 0, 8, VFU_IOMMU_ACQUIRE, &seen))
                abort();
            if (seen != n)
                sched_yield();
        } while (seen != n);
        if (vfu_iommu_read(reader, 64, data, sizeof(data)) || data[0] != n || data[3] != ~n)
            atomic_fetch_add(&wrong, 1);
        if (vfu_iommu_store(reader, 128, 4, VFU_IOMMU_RELEASE, n))
            abort();
    }
    vfu_iommu_reader_close(reader);
    return NULL;
}

START_TEST(release_and_acquire)
{
    vfu_iommu_reader *reader;
    begin(NULL);
    ck_assert_int_eq(map_bytes(0, sizeof(ring), ring), 0);
    ck_assert_int_eq(vfu_iommu_reader_open(table, &reader), 0);
    pthread_t thread = start(answer_letters, 0);
    for (uint64_t n = 1, answer; n <= LETTERS; n++) {
        uint64_t data[4] = {n, 0, 0, ~n};
        ck_assert_int_eq(vfu_iommu_write(reader, 64, data, sizeof(data)), 0);
        ck_assert_int_eq(vfu_iommu_store(reader, 0, 8, VFU_IOMMU_RELEASE, n), 0);
        do {
            if (vfu_iommu_load(reader, 128, 4, VFU_IOMMU_ACQUIRE, &answer))
                ck_abort();
            if (answer != n)
                sched_yield();
        } while (answer != n);
    }
    pthread_join(thread, NULL);
    vfu_iommu_reader_close(reader);
    end();
}
END_TEST

/* ---- the dirty log while threads write -------------------------------------------------------------------------------- */

enum { WRITERS = 2, LOG_PAGES = 2048, LOG_PAGE = 64, ROUNDS = 20, BURST = 4000 };
static _Alignas(64) uint64_t logged_memory[LOG_PAGES][LOG_PAGE / 8];
static uint64_t replica[LOG_PAGES];
static atomic_uint writers_busy;
static pthread_barrier_t round_barrier;

/* Counts up in random pages of its own. */
static void *write_pages(void *arg)
{
    uint64_t luck = (uintptr_t)arg + 1, value = 0;
    vfu_iommu_reader *reader;
    if (vfu_iommu_reader_open(table, &reader))
        abort();
    for (int round = 0; round < ROUNDS; round++) {
        pthread_barrier_wait(&round_barrier);
        for (int i = 0; i < BURST; i++) {
            uint64_t page = next_luck(&luck) % (LOG_PAGES / WRITERS) * WRITERS + (uintptr_t)arg;
            int err = vfu_iommu_store(reader, page * LOG_PAGE, 8, VFU_IOMMU_RELAXED, ++value);
            if (err && (err != -ENOENT || page % 512 < 480)) /* some pages come and go */
                atomic_fetch_add(&wrong, 1);
        }
        atomic_fetch_sub(&writers_busy, 1);
        pthread_barrier_wait(&round_barrier);
    }
    vfu_iommu_reader_close(reader);
    return NULL;
}

/* Copies the pages that are reported, straight from memory: some are not mapped any more. */
static void replicate(void)
{
    uint64_t bitmap[LOG_PAGES / 64];
    ck_assert_int_eq(vfu_iommu_dirty_report(table, 0, LOG_PAGES * LOG_PAGE, LOG_PAGE, bitmap, LOG_PAGES / 64), 0);
    for (unsigned page = 0; page < LOG_PAGES; page++)
        if (bitmap[page / 64] >> page % 64 & 1)
            replica[page] = __atomic_load_n(&logged_memory[page][0], __ATOMIC_RELAXED);
}

START_TEST(no_dirty_page_is_lost)
{
    pthread_t thread[WRITERS];
    memset(logged_memory, 0, sizeof(logged_memory));
    memset(replica, 0, sizeof(replica));
    begin(&(vfu_iommu_desc){.max_readers = WRITERS});
    for (uint64_t page = 0; page < LOG_PAGES; page += 32)
        ck_assert_int_eq(map_bytes(page * LOG_PAGE, 32 * LOG_PAGE, logged_memory[page]), 0);
    ck_assert_int_eq(pthread_barrier_init(&round_barrier, NULL, WRITERS + 1), 0);
    for (uintptr_t i = 0; i < WRITERS; i++)
        thread[i] = start(write_pages, i);
    for (int round = 0; round < ROUNDS; round++) {
        if (round % 5 == 0) /* a log that starts is complete from its first moment */
            ck_assert_int_eq(vfu_iommu_dirty_start(table, LOG_PAGE, NULL, 0), 0);
        atomic_store(&writers_busy, WRITERS);
        pthread_barrier_wait(&round_barrier);
        while (atomic_load(&writers_busy)) {
            replicate();
            for (uint64_t page = 480; page < LOG_PAGES; page += 512) {
                ck_assert_int_eq(vfu_iommu_unmap(table, page * LOG_PAGE, 32 * LOG_PAGE), 1);
                ck_assert_int_eq(map_bytes(page * LOG_PAGE, 32 * LOG_PAGE, logged_memory[page]), 0);
            }
        }
        pthread_barrier_wait(&round_barrier);
        replicate();
        for (unsigned page = 0; page < LOG_PAGES; page++)
            if (replica[page] != logged_memory[page][0])
                ck_abort_msg("round %d: page %u was written and not reported", round, page);
        if (round % 5 == 4)
            ck_assert_int_eq(vfu_iommu_dirty_stop(table), 0);
    }
    for (int i = 0; i < WRITERS; i++)
        pthread_join(thread[i], NULL);
    pthread_barrier_destroy(&round_barrier);
    end();
}
END_TEST

/* ---- a local reader among other threads ------------------------------------------------------------------------------- */

enum { LOCAL_SLOTS = 8, LOCAL_SLOT = 4096, LOCAL_ROUNDS = 3000 };
static _Alignas(
    64) unsigned char local_memory[LOCAL_SLOTS][LOCAL_SLOT]; /* first half: all read; second: the local reader writes */
static atomic_bool local_wanted[LOCAL_SLOTS];                /* unmapped, and clean again: the mapper may have it */
static atomic_uint local_reads;

static void *map_what_is_wanted(void *arg)
{
    (void)arg;
    while (!atomic_load(&stop)) {
        for (unsigned i = 0; i < LOCAL_SLOTS; i++) {
            if (!atomic_load(&local_wanted[i]))
                continue;
            if (map_bytes(i * LOCAL_SLOT, LOCAL_SLOT, local_memory[i]))
                atomic_fetch_add(&wrong, 1);
            atomic_store(&local_wanted[i], false);
        }
    }
    return NULL;
}

static bool local_is_poisoned(const unsigned char *bytes, size_t len) { return memchr(bytes, POISON, len) != NULL; }

static void *read_slots(void *arg)
{
    uint64_t luck = (uintptr_t)arg + 1;
    unsigned char bytes[LOCAL_SLOT / 2];
    vfu_iommu_reader *reader;
    if (vfu_iommu_reader_open(table, &reader))
        abort();
    while (!atomic_load(&stop)) {
        if (vfu_iommu_read(reader, next_luck(&luck) % LOCAL_SLOTS * LOCAL_SLOT, bytes, sizeof(bytes)))
            continue;
        atomic_fetch_add(&local_reads, 1);
        if (local_is_poisoned(bytes, sizeof(bytes)))
            atomic_fetch_add(&wrong, 1);
    }
    vfu_iommu_reader_close(reader);
    return NULL;
}

/* The thread that unmaps reads and writes as well, without a hazard; others read with one, and one maps. */
START_TEST(local_reader_among_others)
{
    pthread_t thread[3];
    uint64_t luck = 5;
    unsigned char bytes[LOCAL_SLOT / 2];
    vfu_iommu_reader *reader;
    begin(NULL);
    ck_assert_int_eq(vfu_iommu_reader_open_local(table, &reader), 0);
    memset(local_memory, CLEAN, sizeof(local_memory));
    for (unsigned i = 0; i < LOCAL_SLOTS; i++)
        atomic_store(&local_wanted[i], true);
    for (uintptr_t i = 0; i < 3; i++)
        thread[i] = start(i ? read_slots : map_what_is_wanted, i);
    for (int round = 0; round < LOCAL_ROUNDS; round++) {
        uint64_t slot = next_luck(&luck) % LOCAL_SLOTS, iova = slot * LOCAL_SLOT;
        unsigned char *second = local_memory[slot] + LOCAL_SLOT / 2;
        int err = vfu_iommu_read(reader, iova, bytes, sizeof(bytes));
        if (!err) {
            ck_assert(!local_is_poisoned(bytes, sizeof(bytes)));
            ck_assert_int_eq(vfu_iommu_copy(reader, iova + LOCAL_SLOT / 2, iova, 100), 0); /* nobody else unmaps */
            ck_assert_int_eq(vfu_iommu_write(reader, iova + LOCAL_SLOT / 2, &slot, sizeof(slot)), 0);
            ck_assert(!memcmp(second, &slot, sizeof(slot)));
        }
        if (atomic_load(&local_wanted[slot]))
            continue; /* not mapped again yet */
        ck_assert_int_eq(vfu_iommu_unmap(table, iova, LOCAL_SLOT), 1);
        memset(local_memory[slot], POISON, LOCAL_SLOT);
        ck_assert_int_eq(vfu_iommu_read(reader, iova, bytes, 1), -ENOENT);
        sched_yield();
        memset(local_memory[slot], CLEAN, LOCAL_SLOT);
        atomic_store(&local_wanted[slot], true);
    }
    while (!atomic_load(&local_reads))
        sched_yield();
    atomic_store(&stop, true);
    for (int i = 0; i < 3; i++)
        pthread_join(thread[i], NULL);
    vfu_iommu_reader_close(reader);
    end();
}
END_TEST

enum { FAR_MAPPINGS = 1500 };

static void *map_far_away(void *arg)
{
    (void)arg;
    for (uint64_t i = 1; i <= FAR_MAPPINGS; i++)
        if (map_bytes(i << 32, 64, cell))
            atomic_fetch_add(&wrong, 1);
    atomic_store(&stop, true);
    return NULL;
}

/* Mappings that another thread adds make the dirty log grow under a local reader that writes. */
START_TEST(local_reader_and_a_growing_log)
{
    uint64_t bitmap, luck = 3;
    vfu_iommu_reader *reader;
    for (int round = 0; round < 5; round++) {
        begin(NULL);
        ck_assert_int_eq(vfu_iommu_reader_open_local(table, &reader), 0);
        ck_assert_int_eq(map_bytes(0, sizeof(local_memory), local_memory), 0);
        ck_assert_int_eq(vfu_iommu_dirty_start(table, LOCAL_SLOT, NULL, 0), 0);
        pthread_t thread = start(map_far_away, 0);
        do {
            uint64_t slot = next_luck(&luck) % LOCAL_SLOTS;
            for (int i = 0; i < 2000; i++)
                if (vfu_iommu_write(reader, slot * LOCAL_SLOT, &luck, sizeof(luck)))
                    ck_abort_msg("write");
            ck_assert_int_eq(vfu_iommu_dirty_report(table, 0, sizeof(local_memory), LOCAL_SLOT, &bitmap, 1), 0);
            ck_assert_uint_eq(bitmap, UINT64_C(1) << slot);
        } while (!atomic_load(&stop));
        pthread_join(thread, NULL);
        ck_assert_int_eq(vfu_iommu_dirty_stop(table), 0);
        vfu_iommu_reader_close(reader);
        end();
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("iommu threads");
    TCase *tc = tcase_create("threads");
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, no_stale_access);
    tcase_add_loop_test(tc, waits_for_an_access_in_flight, 0, sizeof(waiting_cases) / sizeof(waiting_cases[0]));
    tcase_add_test(tc, growing_table);
    tcase_add_test(tc, stable_mappings_among_others);
    tcase_add_test(tc, mapped_anew_in_another_node);
    tcase_add_test(tc, one_node_in_two_places);
    tcase_add_test(tc, unmaps_of_the_same_ranges);
    tcase_add_test(tc, release_and_acquire);
    tcase_add_test(tc, no_dirty_page_is_lost);
    tcase_add_test(tc, local_reader_among_others);
    tcase_add_test(tc, local_reader_and_a_growing_log);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
