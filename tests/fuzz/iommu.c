/* SPDX-License-Identifier: MIT */
/*
 * The vIOMMU against a model, by strings of operations: an address space of a few granules, at the bottom or at the top of the
 * 2^64, of which the model knows for each granule which mapping it belongs to. Results, faults, bytes and dirty pages must be
 * the same.
 */
#define VFU_IOMMU_IMPLEMENTATION
#include "vfu_iommu.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { GRANULE = 16, GRANULES = 64, SPACE = GRANULE * GRANULES, MAPPINGS_MAX = 24 };

#define same(got, want) check_same((long long)(got), (long long)(want), __LINE__, #got)

static void check_same(long long got, long long want, int line, const char *what)
{
    if (got == want)
        return;
    fprintf(stderr, "line %d: %s is %lld, not %lld\n", line, what, got, want);
    abort();
}

/* One mapping of the model. */
typedef struct range {
    bool used;
    unsigned first, count; /* granules */
    uint32_t prot;
    unsigned host; /* offset of its memory in pool */
} range;

static const uint8_t *at;
static size_t left;
static uint64_t base;       /* IOVA of granule 0 */
static int owner[GRANULES]; /* index into ranges; -1: not mapped */
static range ranges[GRANULES];
static bool logging, dirty[GRANULES];     /* pages of the log are granules */
static uint8_t pool[SPACE], model[SPACE]; /* the memory itself, and what it should have in it */
static uint8_t scratch[2 * SPACE];

static unsigned take(void)
{
    if (!left)
        return 0;
    left--;
    return *at++;
}

/* What an access of [offset, offset + len) says, with the first offset that fails. */
static int model_check(unsigned offset, unsigned len, uint32_t prot, unsigned *bad)
{
    for (unsigned i = offset; i < offset + len; i++) {
        int o = i < SPACE ? owner[i / GRANULE] : -1;
        *bad = i;
        if (o < 0)
            return -ENOENT;
        if ((ranges[o].prot & prot) != prot)
            return -EACCES;
    }
    return 0;
}

/* Where a byte of the address space is in pool and model. */
static unsigned host_of(unsigned offset)
{
    const range *r = &ranges[owner[offset / GRANULE]];
    return r->host + offset - r->first * GRANULE;
}

static void model_write(unsigned offset, uint8_t value)
{
    model[host_of(offset)] = value;
    dirty[offset / GRANULE] = dirty[offset / GRANULE] || logging;
}

static unsigned mapped(void)
{
    unsigned n = 0;
    for (unsigned i = 0; i < GRANULES; i++)
        n += ranges[i].used;
    return n;
}

static void do_map(vfu_iommu *t)
{
    unsigned first = take() % GRANULES, count = take() % 9, slot = 0, odd = take() % 8;
    vfu_iommu_mapping m = {.iova = base + first * GRANULE,
                           .size = (uint64_t)count * GRANULE,
                           .prot = odd == 7 ? take() % 5 : 1 + odd % 3};
    unsigned host = take() % (GRANULES - 8) * GRANULE;
    m.host = pool + host;
    int want = 0;
    bool wraps = first + count > GRANULES && base + SPACE == 0;
    if (odd == 6)
        m.size += 1;
    if (!m.size || m.size % GRANULE || wraps || m.prot - 1 > 2)
        want = -EINVAL;
    for (unsigned i = first; !want && i < first + count && i < GRANULES; i++)
        want = owner[i] >= 0 ? -EEXIST : 0;
    if (!want && first + count > GRANULES)
        return; /* beyond what the model knows */
    if (!want && mapped() == MAPPINGS_MAX)
        want = -ENOSPC;
    same(vfu_iommu_map(t, &m), want);
    if (want)
        return;
    while (ranges[slot].used)
        slot++;
    ranges[slot] = (range){true, first, count, m.prot, host};
    for (unsigned i = first; i < first + count; i++)
        owner[i] = (int)slot;
}

static void model_unmap(unsigned slot)
{
    for (unsigned i = ranges[slot].first; i < ranges[slot].first + ranges[slot].count; i++)
        owner[i] = -1;
    ranges[slot].used = false;
}

static void do_unmap(vfu_iommu *t)
{
    unsigned first = take() % GRANULES, count = take() % (GRANULES - first + 1), odd = take() % 16;
    int want = 0;
    uint64_t iova = base + first * GRANULE, size = (uint64_t)count * GRANULE;
    if (odd == 15)
        iova += 4;
    if (odd == 14) { /* everything */
        want = (int)mapped();
        same(vfu_iommu_unmap_all(t), want);
        for (unsigned i = 0; i < GRANULES; i++)
            if (ranges[i].used)
                model_unmap(i);
        return;
    }
    if (!size || odd == 15)
        want = -EINVAL;
    for (unsigned i = 0; i < GRANULES && want >= 0; i++) {
        unsigned from = ranges[i].first, to = from + ranges[i].count;
        if (!ranges[i].used || to <= first || from >= first + count)
            continue;
        want = from >= first && to <= first + count ? want + 1 : -EINVAL;
    }
    same(vfu_iommu_unmap(t, iova, size), want);
    for (unsigned i = 0; i < GRANULES && want > 0; i++)
        if (ranges[i].used && ranges[i].first >= first && ranges[i].first + ranges[i].count <= first + count)
            model_unmap(i);
}

/* The result of an access, and its fault. */
static void check_access(const vfu_iommu_reader *reader, int got, int want, unsigned bad)
{
    same(got, want);
    if (!want)
        return;
    same(vfu_iommu_last_fault(reader)->error, want);
    same(vfu_iommu_last_fault(reader)->iova, base + bad);
}

/* A number of this machine's order. */
static uint64_t number_at(const uint8_t *bytes, unsigned width)
{
    uint8_t one;
    uint16_t two;
    uint32_t four;
    uint64_t eight;
    switch (width) {
    case 1: memcpy(&one, bytes, 1); return one;
    case 2: memcpy(&two, bytes, 2); return two;
    case 4: memcpy(&four, bytes, 4); return four;
    default: memcpy(&eight, bytes, 8); return eight;
    }
}

static void do_access(vfu_iommu_reader *reader, unsigned how)
{
    unsigned offset = (take() << 8 | take()) % SPACE, len = take() % 3 ? take() : (take() << 8 | take()) % SPACE, bad = 0;
    uint64_t iova = base + offset;
    int want;
    if (offset + len > SPACE) {
        if (base + SPACE == 0) { /* around the end of all */
            same(vfu_iommu_probe(reader, iova, len, VFU_IOMMU_READ), -EINVAL);
            return;
        }
        len = SPACE - offset; /* what is behind is not mapped, but neither known */
    }
    switch (how) {
    case 0:
        want = model_check(offset, len, VFU_IOMMU_READ, &bad);
        check_access(reader, vfu_iommu_read(reader, iova, scratch, len), want, bad);
        for (unsigned i = 0; !want && i < len; i++)
            same(scratch[i], model[host_of(offset + i)]);
        break;
    case 1:
        want = model_check(offset, len, VFU_IOMMU_WRITE, &bad);
        for (unsigned i = 0; i < len; i++)
            scratch[i] = (uint8_t)(take() + i);
        check_access(reader, vfu_iommu_write(reader, iova, scratch, len), want, bad);
        for (unsigned i = 0; !want && i < len; i++)
            model_write(offset + i, scratch[i]);
        break;
    case 2: {
        uint8_t pattern[8];
        unsigned width = 1u << take() % 4;
        for (unsigned i = 0; i < 8; i++)
            pattern[i] = (uint8_t)take();
        want = model_check(offset, len, VFU_IOMMU_WRITE, &bad);
        check_access(reader, vfu_iommu_fill(reader, iova, len, pattern, width), want, bad);
        for (unsigned i = 0; !want && i < len; i++)
            model_write(offset + i, pattern[i % width]);
        break;
    }
    case 3: {
        uint32_t prot = 1 + take() % 3;
        want = model_check(offset, len, prot, &bad);
        check_access(reader, vfu_iommu_probe(reader, iova, len, prot), want, bad);
        break;
    }
    default: {
        unsigned width = 1u << take() % 4;
        uint64_t value = take() * UINT64_C(0x0101010101010101), got = 0;
        offset &= ~(width - 1);
        want = model_check(offset, width, how == 5 ? VFU_IOMMU_WRITE : VFU_IOMMU_READ, &bad);
        if (how == 5)
            check_access(reader, vfu_iommu_store(reader, base + offset, width, VFU_IOMMU_RELAXED, value), want, bad);
        else
            check_access(reader, vfu_iommu_load(reader, base + offset, width, VFU_IOMMU_ACQUIRE, &got), want, bad);
        for (unsigned i = 0; !want && how == 5 && i < width; i++)
            model_write(offset + i, (uint8_t)value);
        if (!want && how != 5)
            same(got, number_at(model + host_of(offset), width));
        break;
    }
    }
}

static void do_log(vfu_iommu *t)
{
    uint64_t words[(GRANULES + 63) / 64];
    switch (take() % 3) {
    case 0:
        same(vfu_iommu_dirty_start(t, GRANULE, NULL, 0), logging ? -EBUSY : 0);
        logging = true;
        break;
    case 1:
        same(vfu_iommu_dirty_stop(t), logging ? 0 : -EINVAL);
        logging = false;
        memset(dirty, 0, sizeof(dirty));
        break;
    default: {
        unsigned first = take() % GRANULES, count = take() % (GRANULES - first) + 1;
        int want = logging ? 0 : -EINVAL;
        same(vfu_iommu_dirty_report(t, base + first * GRANULE, (uint64_t)count * GRANULE, GRANULE, words, 1), want);
        for (unsigned i = 0; !want && i < count; i++) {
            same(words[0] >> i & 1, dirty[first + i]);
            dirty[first + i] = false;
        }
        break;
    }
    }
}

/* The whole table, as it is read. */
static void check_table(vfu_iommu *t)
{
    vfu_iommu_mapping m;
    vfu_iommu_stats stats;
    unsigned seen = 0;
    same(vfu_iommu_check(t), 0);
    for (uint64_t iova = 0; vfu_iommu_next(t, iova, &m); seen++) {
        unsigned first = (unsigned)((m.iova - base) / GRANULE);
        int o = first < GRANULES ? owner[first] : -1;
        same(o >= 0, 1);
        same(ranges[o].first, first);
        same(ranges[o].count, m.size / GRANULE);
        same(ranges[o].prot, m.prot);
        same(m.host == pool + ranges[o].host, 1);
        iova = m.iova + m.size;
        if (!iova) {
            seen++;
            break;
        }
    }
    same(seen, mapped());
    vfu_iommu_get_stats(t, &stats);
    same(stats.mappings, mapped());
    same(memcmp(pool, model, sizeof(pool)), 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    vfu_iommu *t;
    vfu_iommu_reader *readers[2];
    at = data;
    left = size;
    unsigned where = take() % 3;
    base = where == 0 ? 0 : where == 1 ? 0 - (uint64_t)SPACE : UINT64_C(1) << 40;
    vfu_iommu_desc desc = {.max_mappings = MAPPINGS_MAX, .max_readers = 2, .cache_entries = 8, .granule = GRANULE};
    memset(ranges, 0, sizeof(ranges));
    memset(dirty, 0, sizeof(dirty));
    memset(owner, 0xff, sizeof(owner));
    logging = false;
    for (unsigned i = 0; i < SPACE; i++)
        pool[i] = model[i] = (uint8_t)(i * 7);
    same(vfu_iommu_create(&t, &desc), 0);
    same(vfu_iommu_reader_open(t, &readers[0]), 0);
    same(vfu_iommu_reader_open_local(t, &readers[1]), 0);
    while (left) {
        unsigned op = take();
        vfu_iommu_reader *reader = readers[op >> 7];
        switch (op % 16) {
        case 0:
        case 1:
        case 2:
        case 3: do_map(t); break;
        case 4:
        case 5: do_unmap(t); break;
        case 6: check_table(t); break;
        case 7:
        case 8: do_log(t); break;
        default: do_access(reader, op % 16 % 6); break;
        }
    }
    check_table(t);
    vfu_iommu_reader_close(readers[0]);
    vfu_iommu_reader_close(readers[1]);
    vfu_iommu_destroy(t);
    return 0;
}
