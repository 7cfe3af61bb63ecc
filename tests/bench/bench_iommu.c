/* SPDX-License-Identifier: MIT */
/*
 * What validation costs: vfu_iommu.h beside a plain memcpy of the same bytes, in the same run, with the same stream of
 * addresses.
 *
 *     make bench-iommu                 or: make bench-iommu ROUNDS=3
 *
 * The floor is memcpy() from host pointers that were looked up beforehand and wait in an array; ours walks an array of the
 * same length with IOVAs, so that both sides pay the same for their stream of addresses. memcpy is called through a
 * volatile pointer, so that it is a call with a length of run time, as it is on our side. "local" is a reader of the thread
 * that unmaps, "plain" is any other (vfu_iommu_reader_open_local, vfu_iommu_reader_open). "array" is memcpy from a pointer
 * that is found in a plain array, by page: the least that any lookup costs here, which validates nothing. Each figure is
 * the median of the rounds, with the least and the greatest; a ratio or difference is taken within each round first. The
 * sides take turns at going first, and each goes on in the stream where the other left it, so that seldom used memory is
 * equally cold for all. What one thread does is measured in its own processor time, so that a busy machine disturbs it
 * less.
 *
 * Mappings are adjacent and were made in random order. Their memory is one arena, which larger tables use several times over.
 */
#define _GNU_SOURCE
#include "figures.h"
#include "vfu_iommu.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    STREAM = 1 << 19, /* addresses; each round goes on where the last one ended */
    LOOKUPS = 100000, /* in a round */
    SMALL = 100000,
    LARGE = 20000,
    PAIRS = 20000,
    HOT = 64,            /* mappings that get 95 % of the accesses */
    BUSY_UNMAPS = 10000, /* or for so many seconds: a machine that is busy itself lets the threads take turns */
    BUSY_SECONDS = 10,
    PAGE = 4096
};

static int rounds = 7;
#define ARENA ((size_t)256 << 20)
#define BASE  UINT64_C(0x100000000)

static void fail(const char *what)
{
    fprintf(stderr, "bench_iommu: %s failed\n", what);
    exit(1);
}

/* ---- time and numbers ------------------------------------------------------------------------------------------------- */

static double own_ns(void) { return read_clock(CLOCK_THREAD_CPUTIME_ID); } /* of this thread; takes some 100 ns to read */

static uint64_t luck = 88172645463325252u;
static uint64_t random64(void)
{
    luck ^= luck << 13;
    luck ^= luck >> 7;
    luck ^= luck << 17;
    return luck;
}
static uint64_t below(uint64_t n) { return (random64() >> 8) % n; }

/* ---- the table -------------------------------------------------------------------------------------------------------- */

enum kind { LOCAL, PLAIN, KINDS, ARRAY = KINDS, SIDES };

static vfu_iommu *table;
static vfu_iommu_reader *readers[KINDS];
static char *arena;

typedef struct place {
    uint64_t iova, size;
    char *host;
} place;

static place *places;
static uint32_t mappings;
static char **array; /* for mappings of 4 KiB, which are adjacent: their memory; else NULL */

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

/* ---- streams of addresses --------------------------------------------------------------------------------------------- */

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

static _Alignas(PAGE) char buffer[PAGE];
static void *(*volatile floor_copy)(void *dst, const void *src, size_t len) = memcpy;
static volatile uint64_t sink;

static double time_floor(size_t at, size_t count, size_t len)
{
    double start = own_ns();
    for (size_t i = 0; i < count; i++)
        floor_copy(buffer, stream_host[(at + i) % STREAM], len);
    return (own_ns() - start) / (double)count;
}

static double time_array(size_t at, size_t count, size_t len)
{
    double start = own_ns();
    for (size_t i = 0; i < count; i++) {
        uint64_t offset = stream_iova[(at + i) % STREAM] - BASE;
        floor_copy(buffer, array[offset / PAGE] + offset % PAGE, len);
    }
    return (own_ns() - start) / (double)count;
}

static double time_read(int kind, size_t at, size_t count, size_t len)
{
    int err = 0;
    double start = own_ns();
    for (size_t i = 0; i < count; i++)
        err |= vfu_iommu_read(readers[kind], stream_iova[(at + i) % STREAM], buffer, len);
    double took = (own_ns() - start) / (double)count;
    if (err)
        fail("read");
    return took;
}

static double time_lookup(int kind, size_t at, size_t count)
{
    int err = 0;
    double start = own_ns();
    for (size_t i = 0; i < count; i++)
        err |= vfu_iommu_probe(readers[kind], stream_iova[(at + i) % STREAM], 1, VFU_IOMMU_READ);
    double took = (own_ns() - start) / (double)count;
    if (err)
        fail("probe");
    return took;
}

static double time_stream(size_t at, size_t count)
{
    uint64_t sum = 0;
    double start = own_ns();
    for (size_t i = 0; i < count; i++) {
        sum += stream_iova[(at + i) % STREAM];
        __asm__ volatile("" : "+r"(sum)); /* one by one */
    }
    sink = sum;
    return (own_ns() - start) / (double)count;
}

/* A load whose address is what the load before it found, spread at random over this many bytes of the arena. */
static double time_chain(size_t bytes)
{
    size_t lines = bytes / 64 < STREAM ? bytes / 64 : STREAM, stride = bytes / lines;
    for (size_t i = 0; i < lines; i++)
        stream_iova[i] = i;
    for (size_t i = lines - 1; i; i--) { /* Sattolo's shuffle: one cycle */
        size_t j = (size_t)below(i);
        uint64_t swap = stream_iova[i];
        stream_iova[i] = stream_iova[j];
        stream_iova[j] = swap;
    }
    for (size_t i = 0; i < lines; i++) {
        char *next = arena + stream_iova[i] * stride;
        memcpy(arena + i * stride, &next, sizeof(next));
    }
    char *at = arena;
    double start = 0;
    for (size_t i = 0; i < lines + LOOKUPS; i++) {
        if (i == lines) /* all were visited once */
            start = own_ns();
        memcpy(&at, at, sizeof(at));
    }
    double took = (own_ns() - start) / LOOKUPS;
    sink = (uintptr_t)at;
    return took;
}

typedef struct access_figures {
    figure floor, more[SIDES], ratio[SIDES];
} access_figures;

static void measure_access(access_figures *f, size_t len, size_t count)
{
    for (int kind = 0; kind < KINDS; kind++)
        time_read(kind, stream_at + STREAM / 2, count, len); /* warm up, with other addresses */
    for (int r = 0; r < rounds; r++) {
        double ns[SIDES + 1];
        for (int i = 0; i <= SIDES; i++, stream_at += count) {
            int side = (i + r) % (SIDES + 1);
            if (side < KINDS)
                ns[side] = time_read(side, stream_at, count, len);
            else if (side == ARRAY && array)
                ns[side] = time_array(stream_at, count, len);
            else
                ns[side] = time_floor(stream_at, count, len);
        }
        f->floor.round[r] = ns[SIDES];
        for (int side = 0; side < SIDES; side++) {
            f->more[side].round[r] = ns[side] - ns[SIDES];
            f->ratio[side].round[r] = ns[side] / ns[SIDES];
        }
    }
    settle(&f->floor, rounds);
    for (int side = 0; side < SIDES; side++) {
        settle(&f->more[side], rounds);
        settle(&f->ratio[side], rounds);
    }
}

static void measure_lookup(figure *f)
{
    time_lookup(PLAIN, stream_at, STREAM); /* every address was used before, as it is when a guest has run for a while */
    for (int kind = 0; kind < KINDS; kind++) {
        time_lookup(kind, stream_at, LOOKUPS);
        for (int r = 0; r < rounds; r++, stream_at += LOOKUPS)
            f[kind].round[r] = time_lookup(kind, stream_at, LOOKUPS);
        settle(&f[kind], rounds);
    }
}

/* ---- updates ---------------------------------------------------------------------------------------------------------- */

/* Takes out a random mapping and puts it back. */
static void measure_pairs(figure *f)
{
    for (int r = 0; r < rounds; r++) {
        static uint32_t which[PAIRS];
        for (int i = 0; i < PAIRS; i++)
            which[i] = (uint32_t)below(mappings);
        double start = own_ns();
        for (int i = 0; i < PAIRS; i++) {
            unmap_place(&places[which[i]]);
            map_place(&places[which[i]]);
        }
        f->round[r] = (own_ns() - start) / PAIRS;
    }
    settle(f, rounds);
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

static place *_Atomic busy_place; /* what the other thread reads */
static atomic_ulong busy_turn;    /* odd: it reads, until it is refused; even: it doesn't */
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
    for (unsigned long turn = 0; !atomic_load_explicit(&busy_stop, memory_order_relaxed);) {
        unsigned long now = atomic_load(&busy_turn);
        if (now == turn || now % 2 == 0)
            continue;
        turn = now;
        place *p = atomic_load(&busy_place);
        while (turn == atomic_load_explicit(&busy_turn, memory_order_relaxed) && !vfu_iommu_read(own, p->iova, bytes, PAGE))
            atomic_fetch_add_explicit(&busy_reads, 1, memory_order_relaxed);
    }
    vfu_iommu_reader_close(own);
    return NULL;
}

typedef struct busy_figures {
    double p50, p99, met_p50, met_share; /* ns; of those that met an access in flight; share of those */
} busy_figures;

static busy_figures measure_busy_unmap(void)
{
    static double all[BUSY_UNMAPS], met[BUSY_UNMAPS];
    double cost = clock_cost();
    unsigned long count = 0, waits = 0;
    pthread_t thread;
    vfu_iommu_stats stats;
    atomic_store(&busy_turn, 0);
    atomic_store(&busy_stop, false);
    if (pthread_create(&thread, NULL, stay_busy, NULL))
        fail("pthread_create");
    vfu_iommu_get_stats(table, &stats);
    uint64_t waits_before = stats.waits;
    double end = now_ns() + BUSY_SECONDS * 1e9;
    for (; count < BUSY_UNMAPS && (!count || now_ns() < end); count++) {
        place *p = &places[below(mappings)];
        unsigned long reads = atomic_load(&busy_reads);
        atomic_store(&busy_place, p);
        atomic_fetch_add(&busy_turn, 1);
        while (atomic_load_explicit(&busy_reads, memory_order_relaxed) < reads + 3) {
        }
        for (uint64_t spin = below(200); spin; spin--)
            __asm__ volatile("");
        double start = now_ns();
        unmap_place(p);
        all[count] = now_ns() - start - cost;
        vfu_iommu_get_stats(table, &stats);
        if (stats.waits != waits_before)
            met[waits++] = all[count];
        waits_before = stats.waits;
        atomic_fetch_add(&busy_turn, 1);
        map_place(p);
    }
    atomic_store(&busy_stop, true);
    pthread_join(thread, NULL);
    qsort(all, count, sizeof(all[0]), compare);
    qsort(met, waits, sizeof(met[0]), compare);
    return (busy_figures){
        .p50 = all[count / 2],
        .p99 = all[count * 99 / 100],
        .met_p50 = waits ? met[waits / 2] : 0,
        .met_share = (double)waits / (double)count,
    };
}

/* ---- memory ----------------------------------------------------------------------------------------------------------- */

/* The memory of a table comes from here, so that it can be asked which pages of it are really there. */
static char *table_memory;
static size_t table_memory_size;

static void *take(void *ctx, size_t size)
{
    (void)ctx;
    table_memory_size = size;
    table_memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (table_memory == MAP_FAILED)
        fail("mmap");
    madvise(table_memory, size, MADV_NOHUGEPAGE); /* a huge page would count as a whole */
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

typedef struct memory_figures {
    size_t empty; /* bytes */
    double each;  /* bytes more for each mapping */
} memory_figures;

static memory_figures measure_memory(void)
{
    vfu_iommu_desc desc = {.max_mappings = mappings, .alloc = {.alloc = take, .release = give}};
    if (vfu_iommu_create(&table, &desc))
        fail("create");
    memory_figures f = {.empty = resident()};
    for (uint32_t i = 0; i < mappings; i++)
        map_place(&places[i]);
    f.each = (double)(resident() - f.empty) / mappings;
    vfu_iommu_destroy(table);
    return f;
}

/* ---- the tables that are printed -------------------------------------------------------------------------------------- */

typedef struct row {
    uint32_t count;
    bool mixed;
    figure lookup[2][KINDS], pair; /* uniform, hot */
    access_figures small[2], large[2];
    busy_figures busy;
    memory_figures memory;
} row;

enum { ROWS = 8 };
static row rows[ROWS];

static void measure_row(row *r)
{
    vfu_iommu_desc desc = {.max_mappings = r->count};
    make_places(r->count, r->mixed);
    r->memory = measure_memory();
    if (vfu_iommu_create(&table, &desc) || vfu_iommu_reader_open_local(table, &readers[LOCAL]) ||
        vfu_iommu_reader_open(table, &readers[PLAIN]))
        fail("create");
    array = r->mixed ? NULL : malloc(mappings * sizeof(*array));
    if (!r->mixed && !array)
        fail("malloc");
    for (uint32_t i = 0; i < mappings; i++) {
        map_place(&places[i]);
        if (array)
            array[(places[i].iova - BASE) / PAGE] = places[i].host;
    }
    for (int hot = 0; hot < 2; hot++) {
        make_stream(hot, 64);
        measure_lookup(r->lookup[hot]);
        measure_access(&r->small[hot], 64, SMALL);
        make_stream(hot, PAGE);
        time_lookup(PLAIN, stream_at, STREAM);
        measure_access(&r->large[hot], PAGE, LARGE);
    }
    measure_pairs(&r->pair);
    vfu_iommu_reader_close(readers[LOCAL]); /* from here on unmaps meet plain readers */
    r->busy = measure_busy_unmap();
    if (vfu_iommu_check(table))
        fail("check");
    vfu_iommu_reader_close(readers[PLAIN]);
    vfu_iommu_destroy(table);
    free(array);
    free(places);
}

static const char *number(uint32_t n)
{
    static char text[16];
    if (n >= 1000000)
        snprintf(text, sizeof(text), "%u,%03u,%03u", n / 1000000, n / 1000 % 1000, n % 1000);
    else if (n >= 1000)
        snprintf(text, sizeof(text), "%u,%03u", n / 1000, n % 1000);
    else
        snprintf(text, sizeof(text), "%u", n);
    return text;
}

static void print_case(const row *r, int hot)
{
    printf("%9s  %-5s  %-7s", number(r->count), r->mixed ? "mixed" : "4 KiB", hot < 0 ? "" : hot ? "hot" : "uniform");
}

/* One line for each kind of table and stream. */
static void print_access_table(const char *title, const char *heads, int which)
{
    printf("\n%s\n mappings  size   stream  %s\n", title, heads);
    for (int i = 0; i < ROWS; i++) {
        for (int hot = 1; hot >= 0; hot--) {
            print_case(&rows[i], hot);
            if (which == 0) {
                print_figure(&rows[i].lookup[hot][LOCAL], 1);
                print_figure(&rows[i].lookup[hot][PLAIN], 1);
            } else if (which == 1) {
                print_figure(&rows[i].small[hot].floor, 1);
                print_figure(&rows[i].small[hot].more[LOCAL], 1);
                print_figure(&rows[i].small[hot].more[PLAIN], 1);
                if (!rows[i].mixed)
                    print_figure(&rows[i].small[hot].more[ARRAY], 1);
            } else {
                print_figure(&rows[i].large[hot].floor, 0);
                print_figure(&rows[i].large[hot].ratio[LOCAL], 2);
                print_figure(&rows[i].large[hot].ratio[PLAIN], 2);
                if (!rows[i].mixed)
                    print_figure(&rows[i].large[hot].ratio[ARRAY], 2);
            }
            putchar('\n');
        }
    }
}

static void print_updates(void)
{
    printf(
        "\nUpdates, ns, and memory. Busy: another thread reads 4 KiB of the mapping until it is removed; p50 and p99 of all "
        "unmaps,\n"
        "p50 of those that met an access in flight, and their share.\n"
        " mappings  size            | map + unmap            | unmap while busy: p50, p99, in flight     | bytes per mapping\n");
    for (int i = 0; i < ROWS; i++) {
        const row *r = &rows[i];
        print_case(r, -1);
        print_figure(&r->pair, 0);
        printf(" |%8.0f %9.0f %9.0f  of %3.0f %% ", r->busy.p50, r->busy.p99, r->busy.met_p50, r->busy.met_share * 100);
        if (r->count >= 1000)
            printf(" |%8.1f\n", r->memory.each);
        else
            printf(" |       -\n"); /* all in the first page */
    }
}

static void print_targets(void)
{
    static const char *const kind_name[KINDS] = {"local", "plain"};
    const row *few = &rows[0], *thousand = &rows[2], *many = &rows[4], *million = &rows[6];
    char text[80];
    printf("\nTargets (mappings of 4 KiB):\n");
    for (int kind = 0; kind < KINDS; kind++) {
        const char *name = kind_name[kind];
        snprintf(text, sizeof(text), "4 KiB access, hot, 65,536, %s: times memcpy", name);
        target(text, many->large[1].ratio[kind].median, 1.15, "x");
        snprintf(text, sizeof(text), "64 B access, hot, 65,536, %s: more than memcpy", name);
        target(text, many->small[1].more[kind].median, 5, "ns");
        snprintf(text, sizeof(text), "4 KiB access, uniform, 65,536, %s: times memcpy", name);
        target(text, many->large[0].ratio[kind].median, 1.6, "x");
        snprintf(text, sizeof(text), "lookup, hit in the translation cache (10), %s", name);
        target(text, few->lookup[0][kind].median, 7, "ns");
        snprintf(text, sizeof(text), "lookup, uniform, 1,000, %s", name);
        target(text, thousand->lookup[0][kind].median, 45, "ns");
        snprintf(text, sizeof(text), "lookup, uniform, 65,536, %s", name);
        target(text, many->lookup[0][kind].median, 200, "ns");
    }
    target("map + unmap, 1,000", thousand->pair.median, 250, "ns");
    target("map + unmap, 65,536", many->pair.median, 700, "ns");
    target("map + unmap, 1,000,000", million->pair.median, 2200, "ns");
    target("unmap with a 4 KiB access in flight, 10: p50", few->busy.met_p50, 500, "ns");
    target("unmap with a 4 KiB access in flight, 1,000: p50", thousand->busy.met_p50, 500, "ns");
    target("unmap with a 4 KiB access in flight, 65,536: p50", many->busy.met_p50, 500, "ns");
    target("memory for each mapping, 65,536", many->memory.each, 96, "B");
    target("memory for each mapping, 1,000,000", million->memory.each, 96, "B");
}

int main(int argc, char **argv)
{
    static const uint32_t counts[ROWS / 2] = {10, 1000, 65536, 1000000};
    if (argc > 1)
        rounds = atoi(argv[1]);
    if (rounds < 1 || rounds > ROUNDS_MAX)
        fail("the number of rounds");
    double start = now_ns();
    arena = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    stream_iova = malloc(STREAM * sizeof(*stream_iova));
    stream_host = malloc(STREAM * sizeof(*stream_host));
    if (arena == MAP_FAILED || !stream_iova || !stream_host)
        fail("memory");
    memset(arena, 1, ARENA);
    for (int i = 0; i < ROWS; i++) {
        if (isatty(STDERR_FILENO))
            fprintf(stderr, "%smeasuring %d of %d%s", i ? "\r" : "", i + 1, ROWS, i + 1 < ROWS ? "" : "\n");
        rows[i].count = counts[i / 2];
        rows[i].mixed = i % 2;
        measure_row(&rows[i]);
    }
    printf("Median of %d rounds, least..greatest, ns. mixed: 4 KiB to 2 MiB. hot: 95 %% of the accesses to %d mappings.\n",
           rounds, HOT);
    print_access_table("Lookup: may one byte be read?", "| local                  | plain", 0);
    print_access_table("64 B: memcpy, and how much more a validated read takes",
                       "| memcpy                 | local: +               | plain: +               | array: +", 1);
    print_access_table("4 KiB: memcpy, and how many times that a validated read takes",
                       "| memcpy                 | local: x               | plain: x               | array: x", 2);
    print_updates();
    figure stream;
    for (int r = 0; r < rounds; r++)
        stream.round[r] = time_stream((size_t)r * SMALL, SMALL);
    settle(&stream, rounds);
    printf("\nReading the stream of addresses is %.1f ns of each access, on both sides; looking up the floor's pointers "
           "beforehand is not\n"
           "counted. An empty table of 65,536 with 16 readers takes %zu KiB.\n",
           stream.median, rows[4].memory.empty / 1024);
    static const size_t spread[] = {1, 6, 256}; /* MiB: the hints of 65,536 mappings, with their nodes, and their memory */
    printf("One load that depends on the one before takes");
    for (size_t i = 0; i < sizeof(spread) / sizeof(spread[0]); i++) {
        figure chain;
        for (int r = 0; r < rounds; r++)
            chain.round[r] = time_chain(spread[i] << 20);
        settle(&chain, rounds);
        printf("%s %.0f ns (%.0f..%.0f) within %zu MiB", i ? "," : "", chain.median, chain.least, chain.greatest, spread[i]);
    }
    printf(".\nThe table and its hints are memory that memcpy doesn't need: 5 %% of the hot accesses find them cold, as they "
           "find an\n"
           "array: hot, 65,536, its copies take %.2f times as long for 4 KiB, and %.1f ns more for 64 B.\n",
           rows[4].large[1].ratio[ARRAY].median, rows[4].small[1].more[ARRAY].median);
    print_targets();
    printf("\n%.0f s\n", (now_ns() - start) / 1e9);
    return 0;
}
