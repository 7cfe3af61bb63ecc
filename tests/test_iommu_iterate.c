/* SPDX-License-Identifier: MIT */
/*
 * Sections "life cycle", "iterate" and "check" of vfu_iommu.h: how a table is made, from the allocator or in the caller's
 * buffer; what it tells about itself; that it notices when it is damaged; and what it doesn't do: allocate, call the system,
 * touch errno.
 *
 * Brings the implementation itself, to be able to damage a table.
 */
#define _GNU_SOURCE
#define VFU_IOMMU_IMPLEMENTATION
#include "vfu_iommu.h"

#include <check.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/seccomp.h>

#define RW (VFU_IOMMU_READ | VFU_IOMMU_WRITE)
enum { PAGE = 4096 };

static vfu_iommu *table;
static vfu_iommu_reader *reader;
static char memory[64];

/* ---- an allocator that counts ----------------------------------------------------------------------------------------- */

static struct {
    unsigned calls, releases;
    size_t size; /* of the last call */
    bool fails;
} heap;

static void *heap_alloc(void *ctx, size_t size)
{
    ck_assert_ptr_eq(ctx, &heap);
    heap.calls++;
    heap.size = size;
    return heap.fails ? NULL : malloc(size);
}

static void heap_release(void *ctx, void *block, size_t size)
{
    ck_assert_ptr_eq(ctx, &heap);
    ck_assert_uint_eq(size, heap.size);
    heap.releases++;
    free(block);
}

static const vfu_alloc counting = {.ctx = &heap, .alloc = heap_alloc, .release = heap_release};

static int map_bytes(uint64_t iova, uint64_t size)
{
    vfu_iommu_mapping m = {.iova = iova, .size = size, .prot = RW, .host = memory};
    return vfu_iommu_map(table, &m);
}

/* ---- life cycle ------------------------------------------------------------------------------------------------------- */

static int guard(void *ctx, void (*body)(void *arg), void *arg, const void **bad)
{
    (void)ctx, (void)bad;
    body(arg);
    return 0;
}

static const struct desc_case {
    const char *name;
    vfu_iommu_desc desc;
    bool good;
} desc_cases[] = {
    {"all defaults", {.max_mappings = 0}, true},
    {"one of each",
     {.max_mappings = 1, .max_readers = 1, .cache_entries = 1, .granule = 1, .dirty_limit = 1, .pin_deadline_ms = 1},
     true},
    {"most mappings", {.max_mappings = UINT32_MAX / 2}, SIZE_MAX > UINT32_MAX}, /* too many for 32-bit addresses */
    {"too many mappings", {.max_mappings = UINT32_C(1) << 31}, false},
    {"most readers", {.max_readers = 4096}, true},
    {"too many readers", {.max_readers = 4097}, false},
    {"large cache", {.cache_entries = 1 << 20}, true},
    {"a cache that is no power of two", {.cache_entries = 1000}, false},
    {"granule of a page", {.granule = 4096}, true},
    {"largest granule", {.granule = UINT64_C(1) << 63}, true},
    {"a granule that is no power of two", {.granule = 4097}, false},
    {"only alloc", {.alloc = {.alloc = heap_alloc}}, false},
    {"only release", {.alloc = {.release = heap_release}}, false},
};

/* What is asked of the allocator is the footprint; when it gives nothing there is no table. */
START_TEST(descriptors)
{
    const struct desc_case *c = &desc_cases[_i];
    vfu_iommu_desc desc = c->desc;
    table = (vfu_iommu *)(void *)memory;
    ck_assert_msg(!vfu_iommu_footprint(&desc) == !c->good, "%s", c->name);
    if (c->good)
        desc.alloc = counting;
    heap.fails = true;
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), c->good ? -ENOMEM : -EINVAL);
    ck_assert_ptr_null(table);
    ck_assert_uint_eq(heap.calls, c->good);
    if (c->good)
        ck_assert_uint_eq(heap.size, vfu_iommu_footprint(&desc));
    heap.fails = false;
    if (!c->good || heap.size > (size_t)1 << 30)
        return;
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    ck_assert_int_eq(vfu_iommu_check(table), 0);
    ck_assert_uint_eq(heap.calls, 2);
    vfu_iommu_destroy(table);
    ck_assert_uint_eq(heap.releases, 1);
}
END_TEST

START_TEST(defaults)
{
    vfu_iommu_reader *readers[17];
    ck_assert_uint_eq(vfu_iommu_footprint(NULL),
                      vfu_iommu_footprint(
                          &(vfu_iommu_desc){.max_mappings = 65535, .max_readers = 16, .cache_entries = 131072, .granule = 1}));
    ck_assert_int_eq(vfu_iommu_create(&table, NULL), 0);
    for (int i = 0; i < 16; i++)
        ck_assert_int_eq(vfu_iommu_reader_open(table, &readers[i]), 0);
    ck_assert_int_eq(vfu_iommu_reader_open(table, &readers[16]), -ENOSPC);
    ck_assert_ptr_null(readers[16]);
    for (unsigned i = 0; i < 65535; i++)
        if (map_bytes(i, 1))
            ck_abort_msg("mapping %u", i);
    ck_assert_int_eq(map_bytes(65535, 1), -ENOSPC);
    ck_assert_int_eq(vfu_iommu_check(table), 0);
    for (int i = 0; i < 16; i++)
        vfu_iommu_reader_close(readers[i]);
    vfu_iommu_destroy(table);
    vfu_iommu_destroy(NULL);
    vfu_iommu_reader_close(NULL);
}
END_TEST

/* A reader that is closed makes room for another, which starts without a fault; what was counted stays counted. */
START_TEST(readers_come_and_go)
{
    vfu_iommu_desc desc = {.max_readers = 3};
    vfu_iommu_reader *r[4];
    vfu_iommu_stats stats;
    char byte;
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    ck_assert_int_eq(map_bytes(0x1000, 16), 0);
    for (unsigned round = 0; round < 10; round++) {
        for (int i = 0; i < 3; i++) {
            ck_assert_int_eq(i == 1 ? vfu_iommu_reader_open_local(table, &r[i]) : vfu_iommu_reader_open(table, &r[i]), 0);
            ck_assert_int_eq(vfu_iommu_last_fault(r[i])->error, 0);
            ck_assert_int_eq(vfu_iommu_read(r[i], 0x1000, &byte, 1), 0);
            ck_assert_int_eq(vfu_iommu_read(r[i], 0x2000 + (unsigned)i, &byte, 1), -ENOENT);
        }
        for (unsigned i = 0; i < 3; i++) /* each has its own */
            ck_assert_uint_eq(vfu_iommu_last_fault(r[i])->iova, 0x2000 + i);
        ck_assert_int_eq(vfu_iommu_reader_open(table, &r[3]), -ENOSPC);
        ck_assert_int_eq(vfu_iommu_reader_open_local(table, &r[3]), -ENOSPC);
        vfu_iommu_reader_close(r[1]);
        ck_assert_int_eq(vfu_iommu_reader_open(table, &r[1]), 0);
        ck_assert_int_eq(vfu_iommu_last_fault(r[1])->error, 0);
        for (int i = 0; i < 3; i++)
            vfu_iommu_reader_close(r[i]);
        vfu_iommu_get_stats(table, &stats);
        ck_assert_uint_eq(stats.faults, 3 * (round + 1));
    }
    vfu_iommu_destroy(table);
}
END_TEST

/* ---- the caller's buffer ---------------------------------------------------------------------------------------------- */

static void *never_alloc(void *ctx, size_t size)
{
    (void)ctx;
    ck_abort_msg("allocated %zu bytes", size);
    return NULL;
}

static void never_release(void *ctx, void *block, size_t size)
{
    (void)ctx, (void)block;
    ck_abort_msg("released %zu bytes", size);
}

static const uint32_t buffer_mappings[] = {1, 2, 3, 10, 100, 255, 256, 257, 511, 512, 513, 1000, 1023, 1024, 1025, 2000, 5000};

/* A buffer of exactly the footprint, at any alignment, has room for everything, and nothing is touched around it. */
START_TEST(fixed_buffer)
{
    enum { MARGIN = 128 };
    vfu_iommu_desc desc = {.max_mappings = buffer_mappings[_i], .max_readers = 2, .cache_entries = 16};
    size_t size = vfu_iommu_footprint(&desc);
    unsigned char *block = malloc(size + 2 * MARGIN + 64);
    char byte = 0;
    ck_assert_uint_gt(size, (sizeof(void *) > 4 ? 64 : 48) * (size_t)desc.max_mappings);
    desc.alloc = (vfu_alloc){.alloc = never_alloc, .release = never_release};
    for (size_t shift = 0; shift < 64; shift += desc.max_mappings < 300 ? 1 : 21) {
        memset(block, 0xA7, size + 2 * MARGIN + 64); /* it need not be clear */
        desc.buffer = block + MARGIN + shift;
        desc.buffer_size = size - 1;
        ck_assert_int_eq(vfu_iommu_create(&table, &desc), -ENOMEM);
        ck_assert_ptr_null(table);
        desc.buffer_size = size;
        ck_assert_uint_eq(vfu_iommu_footprint(&desc), size);
        ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
        for (int round = 0; round < 2; round++) {
            vfu_iommu_reader *readers[2];
            for (int i = 0; i < 2; i++)
                ck_assert_int_eq(vfu_iommu_reader_open(table, &readers[i]), 0);
            for (uint32_t i = 0; i < desc.max_mappings; i++)
                if (map_bytes(i * 64, 64))
                    ck_abort_msg("mapping %u of %u", i, desc.max_mappings);
            ck_assert_int_eq(map_bytes(desc.max_mappings * 64, 64), -ENOSPC);
            for (uint32_t i = 0; i < desc.max_mappings; i++)
                if (vfu_iommu_read(readers[i & 1], i * 64 + 5, &byte, 1) || vfu_iommu_write(readers[1], i * 64 + 63, &byte, 1))
                    ck_abort_msg("access %u of %u", i, desc.max_mappings);
            ck_assert_int_eq(vfu_iommu_check(table), 0);
            ck_assert_int_eq(vfu_iommu_unmap_all(table), (int)desc.max_mappings);
            for (int i = 0; i < 2; i++)
                vfu_iommu_reader_close(readers[i]);
        }
        vfu_iommu_destroy(table);
        for (size_t i = 0; i < MARGIN; i++)
            if (block[i + shift] != 0xA7 || block[MARGIN + shift + size + i] != 0xA7)
                ck_abort_msg("touched %zu bytes beside the buffer", i);
    }
    free(block);
}
END_TEST

/* One allocation when the table is made and none after it, whatever is done. */
START_TEST(allocates_once)
{
    vfu_iommu_desc desc = {.max_mappings = 3000, .alloc = counting};
    char bytes[64];
    uint64_t value;
    vfu_iommu_pin pin = {0};
    vfu_iommu_segment segment[2];
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    ck_assert_int_eq(vfu_iommu_reader_open(table, &reader), 0);
    for (unsigned i = 0; i < 3000; i++)
        ck_assert_int_eq(map_bytes(i * 128, 64), 0);
    for (unsigned i = 0; i < 3000; i++) {
        uint64_t iova = i * 128;
        if (vfu_iommu_write(reader, iova, bytes, 64) || vfu_iommu_read(reader, iova, bytes, 64) ||
            vfu_iommu_copy(reader, iova, iova + 16, 48) || vfu_iommu_fill(reader, iova, 64, "x", 1) ||
            vfu_iommu_store(reader, iova, 8, VFU_IOMMU_RELEASE, 1) ||
            vfu_iommu_load(reader, iova, 8, VFU_IOMMU_ACQUIRE, &value) ||
            vfu_iommu_pin_take(reader, &pin, iova, 64, RW, segment, 2) != 1)
            ck_abort_msg("access %u", i);
        vfu_iommu_pin_drop(table, &pin);
    }
    ck_assert_int_eq(vfu_iommu_read(reader, 100, bytes, 1), -ENOENT);
    ck_assert_int_eq(vfu_iommu_unmap_all(table), 3000);
    vfu_iommu_reader_close(reader);
    ck_assert_uint_eq(heap.calls, 1);
    ck_assert_uint_eq(heap.releases, 0);
    vfu_iommu_destroy(table);
    ck_assert_uint_eq(heap.releases, 1);
}
END_TEST

/* ---- iterate ---------------------------------------------------------------------------------------------------------- */

START_TEST(next_from_anywhere)
{
    static const uint64_t starts[] = {0, 0x1000, 0x2000, 0x5000, UINT64_C(1) << 40, (uint64_t)0 - 0x1000};
    static const struct {
        uint64_t from;
        int found; /* index, -1: none */
    } cases[] = {{0, 0},
                 {0xfff, 0},
                 {0x1000, 1},
                 {0x1fff, 1},
                 {0x2000, 2},
                 {0x2fff, 2},
                 {0x3000, 3},
                 {0x4fff, 3},
                 {0x5fff, 3},
                 {0x6000, 4},
                 {UINT64_C(1) << 39, 4},
                 {(UINT64_C(1) << 40) + 0xfff, 4},
                 {(UINT64_C(1) << 40) + 0x1000, 5},
                 {UINT64_MAX - 0x1000, 5},
                 {UINT64_MAX, 5}};
    vfu_iommu_mapping m = {.iova = 77};
    ck_assert_int_eq(vfu_iommu_create(&table, NULL), 0);
    ck_assert_int_eq(vfu_iommu_next(table, 0, &m), 0);
    ck_assert_int_eq(vfu_iommu_next(table, UINT64_MAX, &m), 0);
    ck_assert_uint_eq(m.iova, 77);
    for (int i = 5; i >= 0; i--)
        ck_assert_int_eq(map_bytes(starts[i], 0x1000), 0);
    for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        ck_assert_int_eq(vfu_iommu_next(table, cases[i].from, &m), cases[i].found >= 0);
        ck_assert_uint_eq(m.iova, starts[cases[i].found]);
    }
    unsigned count = 0;
    for (uint64_t at = 0; vfu_iommu_next(table, at, &m); count++) { /* as the comment says */
        ck_assert_uint_eq(m.iova, starts[count]);
        at = m.iova + m.size;
        if (!at) {
            count++;
            break;
        }
    }
    ck_assert_uint_eq(count, 6);
    ck_assert_int_eq(vfu_iommu_unmap(table, starts[5], 0x1000), 1);
    ck_assert_int_eq(vfu_iommu_next(table, (UINT64_C(1) << 40) + 0x1000, &m), 0);
    vfu_iommu_destroy(table);
}
END_TEST

START_TEST(statistics)
{
    vfu_iommu_stats s;
    char byte;
    ck_assert_int_eq(vfu_iommu_create(&table, NULL), 0);
    ck_assert_int_eq(vfu_iommu_reader_open(table, &reader), 0);
    vfu_iommu_get_stats(table, &s);
    ck_assert(!s.mappings && !s.bytes && !s.maps && !s.unmaps && !s.walks && !s.faults && !s.waits && !s.pins && !s.dirty_size);
    ck_assert_int_eq(map_bytes(0, 100), 0);
    ck_assert_int_eq(map_bytes(100, 28), 0);
    ck_assert_int_eq(map_bytes(0, 1), -EEXIST);
    ck_assert_int_eq(vfu_iommu_unmap(table, 0, 100), 1);
    ck_assert_int_eq(vfu_iommu_unmap(table, 0, 100), 0);
    ck_assert_int_eq(vfu_iommu_read(reader, 0, &byte, 1), -ENOENT);
    for (int i = 0; i < 10; i++)
        ck_assert_int_eq(vfu_iommu_read(reader, 100, &byte, 1), 0);
    vfu_iommu_get_stats(table, &s);
    ck_assert_uint_eq(s.mappings, 1);
    ck_assert_uint_eq(s.bytes, 28);
    ck_assert_uint_eq(s.maps, 2);
    ck_assert_uint_eq(s.unmaps, 1);
    ck_assert_uint_eq(s.faults, 1);
    ck_assert_uint_ge(s.walks, 1); /* for the first reads of each address, not for the others */
    ck_assert_uint_le(s.walks, 5);
    ck_assert_uint_eq(s.waits, 0);
    vfu_iommu_mapping m = {.iova = 1000, .size = UINT64_MAX - 1000, .prot = RW, .io = &(vfu_iommu_io){.read = NULL}};
    ck_assert_int_eq(vfu_iommu_map(table, &m), 0);
    vfu_iommu_get_stats(table, &s);
    ck_assert_uint_eq(s.bytes, 28 + (UINT64_MAX - 1000));
    vfu_iommu_reader_close(reader);
    vfu_iommu_destroy(table);
}
END_TEST

/* ---- check ------------------------------------------------------------------------------------------------------------ */

/* Each damages a table of 20 mappings of 16 bytes at every 32nd address. */
static vfux_node *root(void) { return &table->nodes[vfux_get(&table->root)]; }
static vfux_node *left(vfux_node *n) { return &table->nodes[vfux_get(&n->left)]; }

static void wrong_height(void) { left(root())->height++; }
static void wrong_root_height(void) { root()->height--; }
static void overlap(void) { vfux_address_set(&left(root())->last, vfux_iova(root())); }
static void swapped(void)
{
    uint32_t a = vfux_get(&root()->left);
    vfux_set(&root()->left, vfux_get(&root()->right));
    vfux_set(&root()->right, a);
}
static void lost_subtree(void) { vfux_set(&root()->left, 0); }
static void empty_root(void) { vfux_set(&table->root, 0); }
static void cycle(void) { vfux_set(&left(left(root()))->left, vfux_get(&table->root)); }
static void far_link(void) { vfux_set(&left(root())->left, table->fresh + 7); }
static void wild_root(void) { vfux_set(&table->root, UINT32_MAX / 2); }
static void wild_link(void) { vfux_set(&left(root())->right, UINT32_MAX / 2); }
static void wild_free(void) { table->free_list = UINT32_MAX / 2; }
static void wrong_count(void) { table->mappings++; }
static void too_few(void) { table->mappings -= 2; }
static void wrong_bytes(void) { table->bytes -= 16; }
static void wrong_maps(void) { table->maps++; }
static void backwards(void) { vfux_address_set(&root()->last, vfux_iova(root()) - 1); }
static void moved(void) { vfux_address_set(&left(root())->iova, vfux_iova(left(root())) + 1); }
static void free_in_the_tree(void) { table->free_list = vfux_get(&table->root); }
static void free_cycle(void) { table->nodes[table->free_list].next = table->free_list; }

static const struct {
    const char *name;
    void (*damage)(void);
} damages[] = {
    {"a height", wrong_height},
    {"the root's height", wrong_root_height},
    {"two mappings overlap", overlap},
    {"left and right are swapped", swapped},
    {"a subtree is lost", lost_subtree},
    {"everything is lost", empty_root},
    {"a cycle", cycle},
    {"a link out of what was ever used", far_link},
    {"a root out of the table", wild_root},
    {"a link out of the table", wild_link},
    {"a list of free ones out of the table", wild_free},
    {"the number of mappings", wrong_count},
    {"more mappings than are counted", too_few},
    {"the number of bytes", wrong_bytes},
    {"the number of maps", wrong_maps},
    {"a mapping ends before it begins", backwards},
    {"a mapping that is not aligned", moved},
    {"a live mapping is in the list of free ones", free_in_the_tree},
    {"a cycle in the list of free ones", free_cycle},
};

START_TEST(check_sees_damage)
{
    vfu_iommu_desc desc = {.granule = 16, .max_mappings = 64};
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    for (unsigned i = 0; i < 24; i++)
        ck_assert_int_eq(map_bytes(i * 32, 16), 0);
    ck_assert_int_eq(vfu_iommu_unmap(table, 20 * 32, 4 * 32), 4); /* some nodes are free */
    ck_assert_int_eq(vfu_iommu_check(table), 0);
    damages[_i].damage();
    ck_assert_msg(vfu_iommu_check(table) == -EBADMSG, "%s", damages[_i].name);
}
END_TEST

/* ---- what it doesn't do ----------------------------------------------------------------------------------------------- */

/* errno belongs to the caller, also when a call fails. */
START_TEST(errno_is_never_touched)
{
    char bytes[2] = {0};
    uint64_t value;
    vfu_iommu_pin pin = {0};
    vfu_iommu_segment segment;
    vfu_iommu_desc desc = {.max_mappings = 1, .max_readers = 1, .pin_deadline_ms = 2, .guard = guard};
    errno = 12345;
    ck_assert_int_eq(vfu_iommu_create(&table, &(vfu_iommu_desc){.granule = 3}), -EINVAL);
    ck_assert_int_eq(vfu_iommu_create(&table, &desc), 0);
    ck_assert_int_eq(vfu_iommu_reader_open(table, &reader), 0);
    ck_assert_int_eq(map_bytes(0, 16), 0);
    ck_assert_int_eq(map_bytes(0, 16), -EEXIST);
    ck_assert_int_eq(map_bytes(16, 16), -ENOSPC);
    ck_assert_int_eq(vfu_iommu_read(reader, 32, bytes, 1), -ENOENT);
    ck_assert_int_eq(vfu_iommu_write(reader, UINT64_MAX, bytes, 2), -EINVAL);
    ck_assert_int_eq(vfu_iommu_load(reader, 0, 3, 0, &value), -EINVAL);
    ck_assert_int_eq(vfu_iommu_pin_take(reader, &pin, 0, 16, RW, &segment, 1), 1);
    ck_assert_int_eq(vfu_iommu_unmap(table, 0, 16), -EBUSY);
    vfu_iommu_pin_drop(table, &pin);
    ck_assert_int_eq(vfu_iommu_dirty_start(table, 4096, NULL, 0), 0);
    ck_assert_int_eq(vfu_iommu_dirty_start(table, 4096, NULL, 0), -EBUSY);
    ck_assert_int_eq(vfu_iommu_dirty_stop(table), 0);
    ck_assert_int_eq(vfu_iommu_unmap(table, 0, 16), 1);
    vfu_iommu_reader_close(reader);
    vfu_iommu_destroy(table);
    ck_assert_int_eq(errno, 12345);
}
END_TEST

/* Mapping, unmapping and accessing make no system call: under strict seccomp any but read, write and exit would kill.
 * (Neither would the clock that a pin reads be a system call, but seccomp forbids it as well.) */
START_TEST(no_system_call)
{
    const char *emulator = getenv("VFU_EMULATED");
    if (emulator && !strcmp(emulator, "valgrind")) /* it makes some of its own */
        return;
    pid_t child = fork();
    ck_assert_int_ge(child, 0);
    if (!child) {
        static char buffer[4096];
        vfu_iommu_desc desc = {.max_mappings = 2000};
        bool good = !vfu_iommu_create(&table, &desc) && !vfu_iommu_reader_open(table, &reader);
        for (unsigned i = 0; i < 2000; i++) /* all memory of the table is there */
            good = good && !map_bytes(i * 64, 64);
        good = good && vfu_iommu_unmap_all(table) == 2000;
        if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT))
            _exit(77);
        for (unsigned i = 0; i < 2000; i++)
            good = good && !map_bytes(i * 64, 64);
        for (unsigned i = 0; i < 2000 && good; i++) {
            uint64_t iova = i * 64, value;
            good = !vfu_iommu_read(reader, iova, buffer, 64) && !vfu_iommu_write(reader, iova, buffer, 64) &&
                   !vfu_iommu_copy(reader, iova, iova, 32) && !vfu_iommu_fill(reader, iova, 64, "x", 1) &&
                   !vfu_iommu_load(reader, iova, 8, 0, &value) && vfu_iommu_read(reader, 2000 * 64, buffer, 1) == -ENOENT &&
                   vfu_iommu_unmap(table, iova, 64) == 1 && !map_bytes(iova, 64);
        }
        good = good && vfu_iommu_unmap_all(table) == 2000;
        syscall(SYS_exit, good ? 0 : 1); /* exit_group is not among the permitted */
    }
    int status;
    ck_assert_int_eq(waitpid(child, &status, 0), child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
        return; /* a machine without seccomp, or one that has it on already */
    ck_assert_msg(!WIFSIGNALED(status), "a system call was made");
    ck_assert_int_eq(WEXITSTATUS(status), 0);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("iommu iterate");
    TCase *tc = tcase_create("iterate");
    tcase_set_timeout(tc, 60);
    tcase_add_loop_test(tc, descriptors, 0, sizeof(desc_cases) / sizeof(desc_cases[0]));
    tcase_add_test(tc, defaults);
    tcase_add_test(tc, readers_come_and_go);
    tcase_add_loop_test(tc, fixed_buffer, 0, sizeof(buffer_mappings) / sizeof(buffer_mappings[0]));
    tcase_add_test(tc, allocates_once);
    tcase_add_test(tc, next_from_anywhere);
    tcase_add_test(tc, statistics);
    tcase_add_loop_test(tc, check_sees_damage, 0, sizeof(damages) / sizeof(damages[0]));
    tcase_add_test(tc, errno_is_never_touched);
    tcase_add_test(tc, no_system_call);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
