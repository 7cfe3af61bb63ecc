/* SPDX-License-Identifier: MIT */
/*
 * What validation costs: vfu_iommu.h beside a plain memcpy of the same bytes, in the same run, with the same stream of addresses.
 *
 *     make bench-iommu
 *
 * The floor is memcpy() from host pointers that were looked up beforehand and wait in an array. Ours walks an array of the same length
 * with IOVAs, so that both sides pay the same for their stream ("stream" below). Each figure is the median of ROUNDS rounds, with
 * the least and the greatest; a ratio or difference is taken within each round first. The sides take turns at going first.
 *
 * Mappings are adjacent and were made in random order. Their memory is one arena, which larger tables use several times over.
 */
#define _GNU_SOURCE
#include "vfu_iommu.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    ROUNDS = 9,
    STREAM = 1 << 20,   /* addresses; each round goes on where the last one ended */
    LOOKUPS = 100000,   /* in a round */
    SMALL = 100000,
    LARGE = 20000,
    PAIRS = 20000,
    HOT = 64,           /* mappings that get 95 % of the accesses */
    BUSY_UNMAPS = 20000,
    PAGE = 4096
};
#define ARENA ((size_t)256 << 20)
#define BASE UINT64_C(0x100000000)

static void fail(const char *what)
{
    fprintf(stderr, "bench_iommu: %s failed\n", what);
    exit(1);
}

/* ---- time and numbers ------------------------------------------------------------------------------------------------------ */

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static uint64_t luck = 88172645463325252u;
static uint64_t random64(void)
{
    luck ^= luck << 13;
    luck ^= luck >> 7;
    luck ^= luck << 17;
    return luck;
}
static uint64_t below(uint64_t n) { return (random64() >> 8) % n; }

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct figure {
    double round[ROUNDS], median, least, greatest;
} figure;

static void settle(figure *f)
{
    double sorted[ROUNDS];
    memcpy(sorted, f->round, sizeof(sorted));
    qsort(sorted, ROUNDS, sizeof(sorted[0]), compare);
    f->least = sorted[0];
    f->median = sorted[ROUNDS / 2];
    f->greatest = sorted[ROUNDS - 1];
}

/* ---- the table ------------------------------------------------------------------------------------------------------------- */

static vfu_iommu *table;
static vfu_iommu_reader *reader;
static char *arena;

/* Memory of the table comes from here, so that it can be asked which pages of it are really there. */
static char *table_memory;
static size_t table_memory_size;

static void *take(void *ctx, size_t size)
{
    (void)ctx;
    table_memory_size = size;
    table_memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (table_memory == MAP_FAILED)
        fail("mmap");
    madvise(table_memory, size, MADV_NOHUGEPAGE); /* a huge page would count as resident as a whole */
    return table_memory;
}

static void give(void *ctx, void *memory, size_t size)
{
    (void)ctx;
    munmap(memory, size);
}

static size_t resident(void)
{
    size_t pages = (table_memory_size + PAGE - 1) / PAGE, count = 0;
    unsigned char *there = malloc(pages);
    if (!there || mincore(table_memory, table_memory_size, there))
        fail("mincore");
    for (size_t i = 0; i < pages; i++)
        count += there[i] & 1;
    free(there);
    return count * PAGE;
}

typedef struct place {
    uint64_t iova, size;
    char *host;
} place;

static place *places;
static uint32_t mappings;

static void map_place(const place *p)
{
    vfu_iommu_mapping m = {.iova = p->iova, .size = p->size, .prot = VFU_IOMMU_READ | VFU_IOMMU_WRITE, .host = p->host};
    if (vfu_iommu_map(table, &m))
        fail("map");
}

static void unmap_place(const place *p)
{
    if (vfu_iommu_unmap(table, p->iova, p->size) != 1)
        fail("unmap");
}

/* count mappings of 4 KiB, or of 4 KiB to 2 MiB, each power of two as often as the others. */
static void make_places(uint32_t count, bool mixed)
{
    uint64_t iova = BASE;
    mappings = count;
    places = malloc(count * sizeof(*places));
    if (!places)
        fail("malloc");
    for (uint32_t i = 0; i < count; i++) {
        uint64_t size = mixed ? (uint64_t)PAGE << below(10) : PAGE;
        size_t offset = mixed ? (size_t)below((ARENA - size) / PAGE + 1) * PAGE : (size_t)i * PAGE % ARENA;
        places[i] = (place){iova, size, arena + offset};
        iova += size;
    }
    for (uint32_t i = count - 1; i; i--) { /* the order in which they are mapped */
        uint32_t j = (uint32_t)below(i + 1);
        place swap = places[i];
        places[i] = places[j];
        places[j] = swap;
    }
}

/* ---- streams of addresses --------------------------------------------------------------------------------------------------- */

static uint64_t *stream_iova; /* where ours finds its addresses */
static char **stream_host;    /* where memcpy finds the same */
static size_t stream_at;

static void make_stream(bool hot, size_t len)
{
    uint32_t favourite[HOT];
    for (int i = 0; i < HOT; i++)
        favourite[i] = (uint32_t)below(mappings);
    for (size_t i = 0; i < STREAM; i++) {
        place *p = &places[hot && below(100) < 95 ? favourite[below(HOT)] : below(mappings)];
        uint64_t offset = below(p->size / len) * len;
        stream_iova[i] = p->iova + offset;
        stream_host[i] = p->host + offset;
    }
    stream_at = 0;
}

static char buffer[PAGE];
static volatile size_t run_time_length; /* so that neither side knows the length when it is compiled */
static volatile uint64_t sink;

static double time_floor(size_t at, size_t count, size_t len)
{
    double start = now_ns();
    for (size_t i = 0; i < count; i++)
        memcpy(buffer, stream_host[(at + i) % STREAM], len);
    return (now_ns() - start) / (double)count;
}

static double time_ours(size_t at, size_t count, size_t len)
{
    int err = 0;
    double start = now_ns();
    for (size_t i = 0; i < count; i++)
        err |= vfu_iommu_read(reader, stream_iova[(at + i) % STREAM], buffer, len);
    double took = (now_ns() - start) / (double)count;
    if (err)
        fail("read");
    return took;
}

static double time_lookup(size_t at, size_t count)
{
    int err = 0;
    double start = now_ns();
    for (size_t i = 0; i < count; i++)
        err |= vfu_iommu_probe(reader, stream_iova[(at + i) % STREAM], 1, VFU_IOMMU_READ);
    double took = (now_ns() - start) / (double)count;
    if (err)
        fail("probe");
    return took;
}

static double time_stream(size_t at, size_t count)
{
    uint64_t sum = 0;
    double start = now_ns();
    for (size_t i = 0; i < count; i++) {
        sum += stream_iova[(at + i) % STREAM];
        __asm__ volatile("" : "+r"(sum)); /* one by one */
    }
    sink = sum;
    return (now_ns() - start) / (double)count;
}

typedef struct access_figures {
    figure floor, ours, more, ratio;
} access_figures;

static void measure_access(access_figures *f, size_t len, size_t count)
{
    run_time_length = len;
    len = run_time_length;
    time_ours(stream_at + STREAM / 2, count, len); /* warm up elsewhere */
    for (int r = 0; r < ROUNDS; r++, stream_at += count) {
        bool first = r % 2;
        if (first)
            f->ours.round[r] = time_ours(stream_at, count, len);
        f->floor.round[r] = time_floor(stream_at, count, len);
        if (!first)
            f->ours.round[r] = time_ours(stream_at, count, len);
        f->more.round[r] = f->ours.round[r] - f->floor.round[r];
        f->ratio.round[r] = f->ours.round[r] / f->floor.round[r];
    }
    settle(&f->floor);
    settle(&f->ours);
    settle(&f->more);
    settle(&f->ratio);
}

/* ---- updates ---------------------------------------------------------------------------------------------------------------- */

/* Takes out a random mapping and puts it back. */
static void measure_pairs(figure *f)
{
    for (int r = 0; r < ROUNDS; r++) {
        static uint32_t which[PAIRS];
        for (int i = 0; i < PAIRS; i++)
            which[i] = (uint32_t)below(mappings);
        double start = now_ns();
        for (int i = 0; i < PAIRS; i++) {
            unmap_place(&places[which[i]]);
            map_place(&places[which[i]]);
        }
        f->round[r] = (now_ns() - start) / PAIRS;
    }
    settle(f);
}

static double clock_cost(void)
{
    static double gap[10001];
    for (int i = 0; i < 10001; i++) {
        double start = now_ns();
        gap[i] = now_ns() - start;
    }
    qsort(gap, 10001, sizeof(gap[0]), compare);
    return gap[5000];
}

static place *_Atomic busy_place; /* what the other thread reads, NULL: nothing */
static atomic_ulong busy_reads;
static atomic_bool busy_stop;

/* Reads 4 KiB again and again, until it is refused: the unmap meets an access in flight more often than not. */
static void *stay_busy(void *arg)
{
    vfu_iommu_reader *own;
    static char bytes[PAGE];
    (void)arg;
    if (vfu_iommu_reader_open(table, &own))
        fail("reader_open");
    while (!atomic_load_explicit(&busy_stop, memory_order_relaxed)) {
        place *p = atomic_load(&busy_place);
        while (p && p == atomic_load_explicit(&busy_place, memory_order_relaxed) && !vfu_iommu_read(own, p->iova, bytes, PAGE))
            atomic_fetch_add_explicit(&busy_reads, 1, memory_order_relaxed);
    }
    vfu_iommu_reader_close(own);
    return NULL;
}

typedef struct busy_figures {
    double p50, p99, waited_p50, waited_share; /* ns; of those that found an access in flight; share of those */
} busy_figures;

static busy_figures measure_busy_unmap(void)
{
    static double all[BUSY_UNMAPS], waited[BUSY_UNMAPS];
    double cost = clock_cost();
    unsigned long count = 0, waits = 0;
    atomic_store(&busy_place, NULL);
    pthread_t thread;
    vfu_iommu_stats stats;
    atomic_store(&busy_stop, false);
    if (pthread_create(&thread, NULL, stay_busy, NULL))
        fail("pthread_create");
    vfu_iommu_get_stats(table, &stats);
    uint64_t waits_before = stats.waits;
    for (; count < BUSY_UNMAPS; count++) {
        place *p = &places[below(mappings)];
        unsigned long reads = atomic_load(&busy_reads);
        atomic_store(&busy_place, p);
        while (atomic_load_explicit(&busy_reads, memory_order_relaxed) < reads + 3) {
        }
        for (uint64_t spin = below(200); spin; spin--)
            __asm__ volatile("");
        double start = now_ns();
        unmap_place(p);
        all[count] = now_ns() - start - cost;
        vfu_iommu_get_stats(table, &stats);
        if (stats.waits != waits_before)
            waited[waits++] = all[count];
        waits_before = stats.waits;
        atomic_store(&busy_place, NULL);
        map_place(p);
    }
    atomic_store(&busy_stop, true);
    pthread_join(thread, NULL);
    qsort(all, count, sizeof(all[0]), compare);
    qsort(waited, waits, sizeof(waited[0]), compare);
    return (busy_figures){.p50 = all[count / 2],
                          .p99 = all[count * 99 / 100],
                          .waited_p50 = waits ? waited[waits / 2] : 0,
                          .waited_share = (double)waits / (double)count};
}

/* ---- the tables that are printed -------------------------------------------------------------------------------------------- */

typedef struct row {
    uint32_t count;
    bool mixed;
    figure lookup[2], pair; /* uniform, hot */
    access_figures small[2], large[2];
    busy_figures busy;
    double bytes_each;
    size_t bytes_empty;
} row;

static row rows[8];

static const char *number(double n, char text[32])
{
    unsigned long v = (unsigned long)n;
    if (v >= 1000000)
        snprintf(text, 32, "%lu,%03lu,%03lu", v / 1000000, v / 1000 % 1000, v % 1000);
    else if (v >= 1000)
        snprintf(text, 32, "%lu,%03lu", v / 1000, v % 1000);
    else
        snprintf(text, 32, "%lu", v);
    return text;
}

static void measure_row(row *r)
{
    vfu_iommu_desc desc = {.max_mappings = r->count, .alloc = {.alloc = take, .release = give}};
    if (vfu_iommu_create(&table, &desc) || vfu_iommu_reader_open(table, &reader))
        fail("create");
    r->bytes_empty = resident();
    make_places(r->count, r->mixed);
    for (uint32_t i = 0; i < mappings; i++)
        map_place(&places[i]);
    for (int hot = 0; hot < 2; hot++) {
        make_stream(hot, 64);
        time_lookup(STREAM / 2, STREAM / 2);
        for (int n = 0; n < ROUNDS; n++, stream_at += LOOKUPS)
            r->lookup[hot].round[n] = time_lookup(stream_at, LOOKUPS);
        settle(&r->lookup[hot]);
        measure_access(&r->small[hot], 64, SMALL);
        make_stream(hot, PAGE);
        measure_access(&r->large[hot], PAGE, LARGE);
    }
    measure_pairs(&r->pair);
    r->bytes_each = (double)(resident() - r->bytes_empty) / r->count;
    r->busy = measure_busy_unmap();
    if (vfu_iommu_check(table))
        fail("check");
    vfu_iommu_reader_close(reader);
    vfu_iommu_destroy(table);
    free(places);
}

static void print_access_row(const row *r, int hot)
{
    char text[32];
    const access_figures *s = &r->small[hot], *l = &r->large[hot];
    printf("%9s %-5s %-7s |%6.1f %6.1f..%-6.1f|%6.1f %6.1f %6.1f %5.1f..%-5.1f|%6.0f %6.0f  %5.2f %5.2f..%-5.2f\n",
           number(r->count, text), r->mixed ? "mixed" : "4 KiB", hot ? "hot" : "uniform", r->lookup[hot].median, r->lookup[hot].least,
           r->lookup[hot].greatest, s->floor.median, s->ours.median, s->more.median, s->more.least, s->more.greatest, l->floor.median,
           l->ours.median, l->ratio.median, l->ratio.least, l->ratio.greatest);
}

static void print_update_row(const row *r)
{
    char text[32];
    printf("%9s %-5s |%8.0f %6.0f..%-6.0f|%8.0f %7.0f %9.0f %5.0f %% |", number(r->count, text), r->mixed ? "mixed" : "4 KiB",
           r->pair.median, r->pair.least, r->pair.greatest, r->busy.p50, r->busy.p99, r->busy.waited_p50, r->busy.waited_share * 100);
    if (r->count >= 1000)
        printf("%7.1f\n", r->bytes_each);
    else
        printf("%7s\n", "-"); /* less than a page of memory */
}

static void target(const char *what, double is, double at_most, const char *unit)
{
    printf("  %-58s %8.2f <= %-7.2f %-4s %s\n", what, is, at_most, unit, is <= at_most ? "yes" : "NO");
}

int main(void)
{
    static const uint32_t counts[4] = {10, 1000, 65536, 1000000};
    double start = now_ns();
    arena = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stream_iova = malloc(STREAM * sizeof(*stream_iova));
    stream_host = malloc(STREAM * sizeof(*stream_host));
    if (arena == MAP_FAILED || !stream_iova || !stream_host)
        fail("memory");
    memset(arena, 1, ARENA);
    for (unsigned i = 0; i < 8; i++) {
        rows[i].count = counts[i / 2];
        rows[i].mixed = i % 2;
        measure_row(&rows[i]);
        fprintf(stderr, "%s%s", i ? "." : "measuring ", i == 7 ? "\n" : "");
    }

    printf("\nAccess, ns: median of %d rounds, least..greatest. hot: 95 %% to %d mappings.\n", ROUNDS, HOT);
    printf("%24s|%-21s|%-32s|%s\n", "", "lookup of 1 byte", "64 B: memcpy, ours, and more by", "4 KiB: memcpy, ours, ratio");
    for (unsigned i = 0; i < 8; i++)
        for (int hot = 1; hot >= 0; hot--)
            print_access_row(&rows[i], hot);

    printf("\nUpdates, ns, and memory. Busy: another thread reads 4 KiB of the mapping that is removed; p50, p99, p50 of those unmaps\n"
           "that had to wait for an access, and their share.\n");
    printf("%16s|%-24s|%-34s |%s\n", "", "map + unmap", "unmap while busy", "bytes per mapping");
    for (unsigned i = 0; i < 8; i++)
        print_update_row(&rows[i]);

    figure stream;
    for (int r = 0; r < ROUNDS; r++)
        stream.round[r] = time_stream((size_t)r * SMALL, SMALL);
    settle(&stream);
    printf("\nThe stream of addresses costs %.1f ns of each access, on both sides. An empty table takes %zu KiB (16 readers).\n"
           "The floor's pointers were looked up before: 8 bytes for each address of the stream.\n", stream.median,
           rows[4].bytes_empty / 1024);

    const row *few = &rows[0], *thousand = &rows[2], *many = &rows[4], *million = &rows[6];
    printf("\nTargets (4 KiB mappings):\n");
    target("4 KiB access, hot, 65,536: times memcpy", many->large[1].ratio.median, 1.15, "x");
    target("64 B access, hot, 65,536: more than memcpy", many->small[1].more.median, 5, "ns");
    target("4 KiB access, uniform, 65,536: times memcpy", many->large[0].ratio.median, 1.6, "x");
    target("64 B access, uniform, 65,536: times memcpy", many->small[0].ratio.median, 1.6, "x");
    target("lookup that hits the translation cache (10 mappings)", few->lookup[0].median, 7, "ns");
    target("lookup, uniform, 1,000", thousand->lookup[0].median, 45, "ns");
    target("lookup, uniform, 65,536", many->lookup[0].median, 200, "ns");
    target("map + unmap, 1,000", thousand->pair.median, 250, "ns");
    target("map + unmap, 65,536", many->pair.median, 700, "ns");
    target("map + unmap, 1,000,000", million->pair.median, 2200, "ns");
    target("unmap with a 4 KiB access in flight, 65,536: p50", many->busy.waited_p50, 500, "ns");
    target("memory for each mapping, 65,536", many->bytes_each, 96, "B");
    target("memory for each mapping, 1,000,000", million->bytes_each, 96, "B");
    printf("\n%.0f s\n", (now_ns() - start) / 1e9);
    return 0;
}
