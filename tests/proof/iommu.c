/* SPDX-License-Identifier: MIT */
/*
 * Proofs of vfu_iommu.h, in one thread: first the tree, then what callers use.
 *
 * The nodes of a tree are numbered from left to right, from 1, so that a tree in order is one that has 1, 2, 3, ... That is no
 * loss: nothing looks at a node's number, but for 0.
 *
 * The functions that change a tree look at no address, they are told the way. Their proofs take each shape and each way in turn.
 * The functions that look for something change nothing. Their proofs leave the shape and all addresses open, and prove that the
 * ways are those. map and unmap put the two together.
 */
#include "proof.h"

/* One thread: an atomic access is an access. */
#include <stdatomic.h>
#undef atomic_init
#undef atomic_load
#undef atomic_load_explicit
#undef atomic_store
#undef atomic_store_explicit
#undef atomic_fetch_add
#undef atomic_fetch_sub
#define atomic_init(at, value)                  ((void)(*(at) = (value)))
#define atomic_load(at)                         (*(at))
#define atomic_load_explicit(at, order)         (*(at))
#define atomic_store(at, value)                 ((void)(*(at) = (value)))
#define atomic_store_explicit(at, value, order) ((void)(*(at) = (value)))
#define atomic_fetch_add(at, more)              ((void)(*(at) += (more)))
#define atomic_fetch_sub(at, less)              ((void)(*(at) -= (less)))

/* A lock must not be taken twice nor be given up twice. */
#include <pthread.h>
static int lock(const pthread_mutex_t *mutex);
static int unlock(const pthread_mutex_t *mutex);
#define pthread_mutex_lock(mutex)    lock(mutex)
#define pthread_mutex_trylock(mutex) lock(mutex)
#define pthread_mutex_unlock(mutex)  unlock(mutex)

#define VFU_STATIC
#define VFU_IOMMU_IMPLEMENTATION
#include "vfu_iommu.h"

#ifndef NODES
#define NODES 3 /* most nodes of a tree at first; up to 7 */
#endif
#define LEVELS (NODES < 4 ? 3 : 4) /* most levels of a tree that has a node more */

static vfux_node nodes[NODES + 2];
static vfux_hint hints[2];
static vfu_iommu_reader reader;
static vfu_iommu table = {.nodes = nodes, .node_count = NODES + 2, .hints = hints, .readers = &reader, .reader_count = 1};

static bool is_locked, is_fault_locked;

static int lock(const pthread_mutex_t *mutex)
{
    bool *is = mutex == &table.lock ? &is_locked : &is_fault_locked;
    PROVE(!*is);
    *is = true;
    return 0;
}

static int unlock(const pthread_mutex_t *mutex)
{
    bool *is = mutex == &table.lock ? &is_locked : &is_fault_locked;
    PROVE(*is);
    *is = false;
    return 0;
}

/* ---- shapes ------------------------------------------------------------------------------------------------------------- */

/* Of a number of nodes: how many balanced trees there are, and how high those are that are parts of a tree. */
static const unsigned shapes[] = {1, 1, 2, 1, 4, 6, 4, 17}, heights[] = {0, 1, 2, 2, 3, 3, 3};

/* Links `count` nodes from `first` on as balanced tree number `shape` and returns its root. */
static uint32_t plant(unsigned first, unsigned count, unsigned shape)
{
    for (unsigned left = 0; left < count; left++) {
        unsigned right = count - 1 - left, ways = shapes[left] * shapes[right], root = first + left;
        if (heights[left] > heights[right] + 1 || heights[right] > heights[left] + 1)
            continue;
        if (shape < ways) {
            nodes[root].left = plant(first, left, shape % shapes[left]);
            nodes[root].right = plant(root + 1, right, shape / shapes[left]);
            nodes[root].height = (uint8_t)(1 + (heights[left] > heights[right] ? heights[left] : heights[right]));
            return root;
        }
        shape -= ways;
    }
    return 0;
}

/* For each shape of up to NODES nodes. What has been done with one after the other has been done with all: no choice is left
 * open, which would cost more. */
#define EACH_SHAPE(count, shape) \
    for (unsigned count = 0; count <= NODES; count++) \
        for (unsigned shape = 0; shape < shapes[count]; shape++)

/* Makes the way to the gap behind the first `gap` nodes (node 0), or to the node that follows it. */
static void make_way(vfux_path *way, unsigned gap, uint32_t node)
{
    way->depth = 0;
    way->links[0] = &table.root;
    for (uint32_t i = table.root; i != node; i = *way->links[way->depth])
        way->links[++way->depth] = gap < i ? &nodes[i].left : &nodes[i].right;
}

/* Nodes from left to right. */
typedef struct sequence {
    unsigned count;
    uint32_t node[NODES + 1];
} sequence;

/* Proves that subtree i has no more than so many levels, that it is balanced and that its heights are right; adds its nodes to
 * the sequence and returns its height. */
static unsigned walk(uint32_t i, unsigned levels, sequence *s)
{
    PROVE(levels || !i);
    if (!levels || !i)
        return 0;
    unsigned left = walk(nodes[i].left, levels - 1, s);
    PROVE(s->count <= NODES);
    s->node[s->count++] = i;
    unsigned right = walk(nodes[i].right, levels - 1, s);
    PROVE(left <= right + 1 && right <= left + 1);
    PROVE(nodes[i].height == 1 + (left > right ? left : right));
    return nodes[i].height;
}

/* vfux_tree_insert(): a node that is added in a gap is there afterwards, the others are as they were, and the tree is balanced.
 * Every tree of up to NODES nodes, every gap. */
void insert(void)
{
    EACH_SHAPE(count, shape) {
        for (unsigned gap = 0; gap <= count; gap++) {
            uint32_t added = count + 1;
            vfux_path way;
            sequence s = {0};
            table.root = plant(1, count, shape);
            make_way(&way, gap, 0);
            vfux_tree_insert(&table, &way, added);
            walk(table.root, LEVELS, &s);
            PROVE(s.count == count + 1);
            for (unsigned i = 0; i <= count; i++)
                PROVE(s.node[i] == (i < gap ? i + 1 : i == gap ? added : i));
        }
    }
}

/* vfux_tree_remove(): all but the node that goes are as they were, and the tree is balanced. Every tree of up to NODES nodes,
 * every node. */
void take_out(void)
{
    EACH_SHAPE(count, shape) {
        for (uint32_t gone = 1; gone <= count; gone++) {
            vfux_path way;
            sequence s = {0};
            table.root = plant(1, count, shape);
            make_way(&way, gone - 1, gone);
            vfux_tree_remove(&table, &way);
            walk(table.root, LEVELS, &s);
            PROVE(s.count == count - 1);
            for (unsigned i = 0; i + 1 < count; i++)
                PROVE(s.node[i] == (i + 1 < gone ? i + 1 : i + 2));
        }
    }
}

/* ---- addresses ---------------------------------------------------------------------------------------------------------- */

/* The linear model: mapping i, from 1, in ascending order, is [first[i], last[i]]. */
static uint64_t first[NODES + 2], last[NODES + 2];

/* Makes any tree of up to NODES nodes, with any addresses, and returns how many it has. */
static unsigned any_tree(void)
{
    unsigned size = NODES + 1;
    EACH_SHAPE(count, shape)
        if (nondet_bool()) {
            table.root = plant(1, count, shape);
            size = count;
        }
    ASSUME(size <= NODES);
    for (unsigned i = 1; i <= NODES && i <= size; i++) {
        first[i] = nondet_u64();
        last[i] = nondet_u64();
        ASSUME(first[i] <= last[i] && (i == 1 || last[i - 1] < first[i]));
        nodes[i].iova = first[i];
        nodes[i].last = last[i];
        nodes[i].state = VFUX_LIVE;
    }
    return size;
}

/* How many mappings begin at or below an address: the number of the last that does. */
static unsigned begun(unsigned count, uint64_t x)
{
    unsigned n = 0;
    for (unsigned i = 1; i <= NODES && i <= count; i++)
        n += first[i] <= x;
    return n;
}

/* The mapping that has an address, or 0. */
static uint32_t owner(unsigned count, uint64_t x)
{
    unsigned i = begun(count, x);
    return i && x <= last[i] ? i : 0;
}

/* The first mapping that has an address of [from, to], or 0. */
static uint32_t first_of(unsigned count, uint64_t from, uint64_t to)
{
    uint32_t found = 0;
    for (unsigned i = NODES; i; i--)
        found = i <= count && first[i] <= to && last[i] >= from ? i : found;
    return found;
}

/* vfux_floor(): any tree of up to NODES nodes, any address. */
void find_floor(void)
{
    unsigned count = any_tree();
    uint64_t x = nondet_u64();
    PROVE(vfux_floor(&table, x) == begun(count, x));
}

/* vfux_first_in() and vfux_from(): any tree of up to NODES nodes, any range. */
void find_first(void)
{
    unsigned count = any_tree();
    uint64_t from = nondet_u64(), to = nondet_u64();
    PROVE(vfux_first_in(&table, from, to) == (from <= to ? first_of(count, from, to) : 0));
}

/* vfux_next_in(): any tree of up to NODES nodes, from any of them, up to any address. */
void find_next(void)
{
    unsigned count = any_tree();
    uint32_t i = nondet_u32();
    uint64_t to = nondet_u64();
    ASSUME(1 <= i && i <= count);
    PROVE(vfux_next_in(&table, i, to) == (i < count && first[i + 1] <= to ? i + 1 : 0));
}

/* vfux_walk(), the walk of readers: any tree of up to NODES nodes, any address. While nothing changes its answer is certain. */
void find_walk(void)
{
    unsigned count = any_tree();
    uint64_t x = nondet_u64();
    bool certain;
    PROVE(vfux_walk(&table, x, &certain) == owner(count, x));
    PROVE(certain);
}

static bool is_same_way(const vfux_path *a, const vfux_path *b)
{
    bool same = a->depth == b->depth;
    for (unsigned d = 0; d <= LEVELS; d++)
        same = same && (d > b->depth || a->links[d] == b->links[d]);
    return same;
}

/* vfux_find_place(): any tree of up to NODES nodes, any range. It says whether a mapping is there, and if not, finds the way to
 * the gap, from which insert() goes on. */
void find_place(void)
{
    unsigned count = any_tree();
    uint64_t from = nondet_u64(), to = nondet_u64();
    ASSUME(from <= to);
    vfux_path path, way;
    bool is_free = !first_of(count, from, to);
    PROVE(vfux_find_place(&table, from, to, &path) == is_free);
    if (is_free) {
        make_way(&way, begun(count, from), 0);
        PROVE(is_same_way(&path, &way));
    }
}

/* vfux_find_node(): any tree of up to NODES nodes, the way to any of them, from which take_out() goes on. */
void find_node(void)
{
    unsigned count = any_tree();
    uint32_t i = nondet_u32();
    ASSUME(1 <= i && i <= count);
    vfux_path path, way;
    make_way(&way, i - 1, i);
    vfux_find_node(&table, i, &path);
    PROVE(is_same_way(&path, &way));
}

/* ---- what callers use --------------------------------------------------------------------------------------------------- */

static const vfu_iommu_io some_io;
static char some_memory[1];

static int some_guard(void *ctx, void (*body)(void *arg), void *arg, const void **bad)
{
    (void)ctx, (void)body, (void)arg, (void)bad;
    return 0;
}

/* Ranges, alignment and what is a mapping, for all arguments, against arithmetic that can't overflow. */
void arguments(void)
{
    typedef unsigned __int128 wide;
    unsigned shift = (unsigned)up_to(63);
    table.desc.granule = UINT64_C(1) << shift;
    table.desc.guard = nondet_bool() ? some_guard : NULL;
    vfu_iommu_mapping m = {.iova = nondet_u64(), .size = nondet_u64(), .prot = nondet_u32(), .flags = nondet_u32()};
    m.host = nondet_bool() ? some_memory : NULL;
    m.io = nondet_bool() ? &some_io : NULL;
    wide end = (wide)m.iova + m.size, host_end = (wide)(uintptr_t)m.host + m.size, top = (wide)1 << 64;
    bool range = m.size && end <= top, aligned = m.iova >> shift << shift == m.iova && m.size >> shift << shift == m.size;
    bool memory = m.host ? !m.io && host_end <= top : m.io != NULL;
    bool guard = !m.flags || (m.flags == VFU_IOMMU_GUARDED && m.host && table.desc.guard);
    PROVE(vfux_is_range(m.iova, m.size) == range);
    PROVE(vfux_is_unaligned(&table, m.iova, m.size) == !aligned);
    PROVE(vfux_is_mapping(&table, &m) == (range && aligned && memory && guard && 1 <= m.prot && m.prot <= 3));
    uint64_t x = nondet_u64();
    nodes[1].iova = m.iova;
    nodes[1].last = m.iova + (m.size - 1);
    PROVE(!range || vfux_covers(&nodes[1], x) == (x >= m.iova && x < end));
}

/* vfu_iommu_probe(), which every access asks first: any table of up to NODES mappings, any addresses, permissions and hints. The
 * first address of the range without a mapping, or without the permission, is the fault. */
void probe(void)
{
    unsigned count = any_tree();
    for (uint32_t i = 1; i <= NODES; i++)
        nodes[i].prot = nondet_u8();
    nodes[0].iova = nodes[0].last = UINT64_MAX;
    hints[0].node = (uint32_t)up_to(NODES);
    reader.iommu = &table;
    reader.local = nondet_bool();
    uint64_t iova = nondet_u64(), size = nondet_u64(), end = iova + (size - 1), at = iova;
    uint32_t prot = nondet_u32();
    int expected = size && end < iova ? -EINVAL : 0;
    bool over = !size || expected;
    for (uint32_t i = 1; i <= NODES && i <= count && (over || first[i] <= at); i++) {
        if (over || last[i] < at)
            continue;
        if ((nodes[i].prot & prot) != prot)
            expected = -EACCES;
        over = expected || last[i] >= end;
        at = over ? at : last[i] + 1;
    }
    expected = over ? expected : -ENOENT;
    PROVE(vfu_iommu_probe(&reader, iova, size, prot) == expected);
    PROVE(reader.fault.error == expected && (!expected || reader.fault.iova == at));
    PROVE(!reader.hazard[0] && !is_locked && !is_fault_locked);
}

/* The address space in equal parts: each mapping has WIDTH of them, with a free one before it and behind the last, so that a
 * range of parts can lie in every way to the mappings, and reach both ends of the space. */
#ifndef WIDTH
#define WIDTH 1
#endif
enum { PARTS = 8 };
#define PART (UINT64_MAX / PARTS + 1)

/* For each range of parts. */
#define EACH_RANGE(from, to) \
    for (unsigned from = 0; from < PARTS; from++) \
        for (unsigned to = from; to < PARTS; to++)

static unsigned removed_count;
static uint64_t removed[NODES];

static void on_removed(void *ctx, const vfu_iommu_mapping *mapping)
{
    (void)ctx;
    PROVE(!is_locked && removed_count < NODES);
    removed[removed_count++] = mapping->iova;
}

/* Makes a table of `count` mappings in a tree of that shape. `reuse`: the next node to be used was used before. */
static void make_table(unsigned count, unsigned shape, bool reuse)
{
    table.root = plant(1, count, shape);
    for (uint32_t i = 1; i <= NODES + 1; i++) {
        nodes[i].iova = first[i] = ((i - 1) * (WIDTH + 1) + 1) * PART;
        nodes[i].last = last[i] = i * (WIDTH + 1) * PART - 1;
        nodes[i].base = some_memory;
        nodes[i].prot = nodes[i].direct = VFU_IOMMU_READ;
        nodes[i].state = i <= count ? VFUX_LIVE : VFUX_FREE;
        nodes[i].next = 0;
    }
    nodes[0].iova = nodes[0].last = UINT64_MAX;
    hints[0].node = 0;
    table.hint_max = 1;
    table.free_list = reuse ? count + 1 : 0;
    table.fresh = count + 1 + reuse;
    table.mappings = table.maps = count;
    table.unmaps = 0;
    table.bytes = count * WIDTH * PART;
    table.desc.granule = PART;
    table.desc.removed = on_removed;
    removed_count = 0;
}

/* Proves that the table has just the mappings of the model. */
static void check_table(unsigned count)
{
    sequence s = {0};
    uint64_t bytes = 0;
    walk(table.root, LEVELS, &s);
    PROVE(s.count == count && table.mappings == count && table.maps - table.unmaps == count);
    for (unsigned i = 1; i <= count; i++) {
        vfux_node *n = &nodes[s.node[i - 1]];
        PROVE(n->iova == first[i] && n->last == last[i] && vfux_is_live(n));
        bytes += last[i] - first[i] + 1;
    }
    PROVE(table.bytes == bytes && table.version % 2 == 0 && !is_locked);
}

/* vfu_iommu_map(): every table of up to NODES mappings of WIDTH parts each, every range of parts. */
void map(void)
{
    EACH_SHAPE(count, shape) {
        EACH_RANGE(from, to) {
            make_table(count, shape, to % 2);
            uint64_t begin = from * PART, end = to * PART + (PART - 1);
            vfu_iommu_mapping m = {.iova = begin, .size = end - begin + 1, .prot = VFU_IOMMU_READ, .host = some_memory};
            int expected = !m.size ? -EINVAL : first_of(count, begin, end) ? -EEXIST : 0;
            unsigned i = count + 1;
            for (; !expected && i > 1 && first[i - 1] > begin; i--) {
                first[i] = first[i - 1];
                last[i] = last[i - 1];
            }
            if (!expected) {
                first[i] = begin;
                last[i] = end;
            }
            PROVE(vfu_iommu_map(&table, &m) == expected);
            check_table(expected ? count : count + 1);
        }
    }
}

/* vfu_iommu_unmap() and, for the whole, vfu_iommu_unmap_all(): every table of up to NODES mappings of WIDTH parts each, every
 * range of parts, with and without a hint that names the first mapping of the range. The mappings of the range are gone, and
 * `removed` was told so of each once; the others are there; and all are if one would be split. */
void unmap(void)
{
    EACH_SHAPE(count, shape) {
        EACH_RANGE(from, to) {
            for (unsigned hinted = 0; hinted < 2; hinted++) {
                uint64_t begin = from * PART, end = to * PART + (PART - 1), gone_iova[NODES];
                unsigned gone = 0, left = 0;
                bool split = false;
                make_table(count, shape, false);
                hints[0].node = hinted ? first_of(count, begin, end) : 0;
                for (unsigned i = 1; i <= count; i++)
                    split = split || (first[i] <= end && last[i] >= begin && (first[i] < begin || last[i] > end));
                for (unsigned i = 1; i <= count; i++) {
                    if (!split && first[i] >= begin && last[i] <= end) {
                        gone_iova[gone++] = first[i];
                    } else {
                        first[++left] = first[i];
                        last[left] = last[i];
                    }
                }
                int expected = split ? -EINVAL : (int)gone;
                bool all = to - from == PARTS - 1;
                PROVE((all ? vfu_iommu_unmap_all(&table) : vfu_iommu_unmap(&table, begin, end - begin + 1)) == expected);
                PROVE(removed_count == gone);
                for (unsigned i = 0; i < gone; i++)
                    PROVE(removed[i] == gone_iova[i]);
                check_table(left);
            }
        }
    }
}
