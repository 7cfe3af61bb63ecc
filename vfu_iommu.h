/* SPDX-License-Identifier: MIT */
/*
 * vfu_iommu.h - an IOMMU in user space: a table of the current mappings, through which every DMA is validated
 *
 * WHAT IT IS
 *
 * A device model that runs in a process of its own is told by its client which ranges of I/O virtual addresses (IOVAs) it may
 * access, and is told again when a range is taken away. This header keeps that table and is the only way to the memory
 * behind it:
 *
 *     When vfu_iommu_unmap() has returned success, no access to the range is in flight and none can begin, on any thread,
 *     whichever way it came: read, write, copy, fill, load, store, or a segment handed out under a pin.
 *
 * It knows no sockets, files or messages. A mapping is memory at a host pointer, or memory that a pair of callbacks reaches.
 *
 * HOW TO INCLUDE IT
 *
 *     #define VFU_IOMMU_IMPLEMENTATION      // in exactly one C file of the program
 *     #include "vfu_iommu.h"
 *
 * In that file include it before any system header, or compile it with -D_GNU_SOURCE. Everywhere else include it plainly. The
 * declarations compile as C11, C17 and C++17; the implementation is C11 and needs the C library of Linux alone. vfu.h
 * includes this header, and VFU_IMPLEMENTATION brings its implementation with it. Compiled with -ffreestanding it needs memcpy,
 * memmove and memset and nothing else; then there is one thread and no clock (see FREESTANDING).
 *
 *     macro                          must be the same in all files   effect
 *     VFU_IOMMU_IMPLEMENTATION       no, in one file                 emits the implementation
 *     VFU_STATIC                     no                              makes every function static to that file
 *     VFU_API                        yes                             what stands in front of each function's declaration
 *     VFU_ASSERT(condition)          no                              what happens on a caller's mistake; default: assert()
 *
 * None of them changes the layout of a type.
 *
 * QUICK START
 *
 *     vfu_iommu *iommu;
 *     vfu_iommu_reader *reader;
 *     vfu_iommu_create(&iommu, NULL);                              // NULL: every default
 *     vfu_iommu_reader_open(iommu, &reader);                       // one for each thread that does DMA
 *
 *     vfu_iommu_mapping m = { .iova = 0x100000, .size = 4096, .prot = VFU_IOMMU_READ | VFU_IOMMU_WRITE, .host = page };
 *     vfu_iommu_map(iommu, &m);
 *     vfu_iommu_write(reader, 0x100010, "hello", 5);               // 0
 *     vfu_iommu_read(reader, 0x100fff, buffer, 2);                 // -ENOENT: the second byte has no mapping; nothing was read
 *     vfu_iommu_last_fault(reader)->iova;                          // 0x101000
 *     vfu_iommu_unmap(iommu, 0x100000, 4096);                      // 1: one mapping removed, page is ours alone again
 *
 * CONTENTS (the same words in the declarations, the implementation and the tests)
 *
 *     types         mappings, faults, the descriptor
 *     life cycle    create, destroy, readers
 *     map           map, unmap
 *     access        probe, read, write, copy, fill, atomic load and store
 *     pin           segments for zero-copy access
 *     dirty log     which pages were written
 *     iterate       the table, statistics and the fault log
 *     check         the invariants
 *
 * RETURNS
 *
 * 0 or a count, or a negative errno; errno is never touched. A function that fails has changed nothing unless it says
 * otherwise.
 *
 *     -EINVAL   an argument is wrong: empty or wrapping range, not a multiple of the granule, a mapping would be split
 *     -ENOENT   no mapping there                    -EACCES   mapped, but without the permission
 *     -EEXIST   a mapping is there already          -ENOSPC   a limit of the descriptor is reached
 *     -EFAULT   the memory behind a mapping is gone -ENOMEM   the allocator gave nothing
 *     -EBUSY    pins are held                       -ENOTSUP  not possible for this kind of memory or on this machine
 *
 * THREADS
 *
 * Functions that take a vfu_iommu may be called from any thread at any time between create and destroy. Functions that take a
 * vfu_iommu_reader may be called by one thread at a time per reader. Callbacks say what they may call.
 *
 * FREESTANDING
 *
 * Needs atomic instructions on 32 bits (Arm: ARMv7-M and later; elsewhere supply the compiler's __atomic functions).
 * Give `buffer` and `buffer_size` in the descriptor (vfu_iommu_footprint() says how much) and nothing is ever allocated. Under
 * -ffreestanding that is the only way, one thread may use the table, and an unmap that meets pins asks for them to be let go
 * and fails with -EBUSY when one is kept.
 *
 * HOW IT WORKS: THE MEMORY-ORDER ARGUMENT
 *
 * Mappings are nodes of an AVL tree, in an array that lives as long as the table: a node that is removed is used again for
 * another mapping but is never anything else than a node. `state` of a node says whether its mapping is live, and counts the
 * mappings that it was used for.
 *
 *     reader                                         unmap
 *     R1  hazard = node          (seq_cst store)     U1  state = dead            (seq_cst store)
 *     R2  live = state           (seq_cst load)      U2  read each hazard        (seq_cst load), wait while it names the node
 *     R3  if live: check bounds, permission; copy    U3  take the node out of the tree, use it again, return
 *     R4  hazard = none          (release store)
 *
 * Two interleavings would let a stale access through, and both are excluded:
 *
 *  1. R2 reads live although U2 has not seen the hazard. R1, R2, U1, U2 are in one total order that agrees with each thread's
 *     program order. R2 reading live puts R2 before U1; then R1 < R2 < U1 < U2 and U2 reads the hazard. So either the reader
 *     sees that the mapping is dead, or the unmap sees that the reader is at work.
 *  2. The copy of R3 moves past the end of the unmap. U2 stops waiting when it reads what R4, or a later store of the same
 *     reader, has written; all of these are releases and U2 acquires, so all of R3 happens before U3.
 *
 * The translation cache and the walk through the tree without the lock are therefore only hints: whatever node they name,
 * stale, used again or wrong, R1 to R3 decide with that node's own state, bounds and permission. A miss is not believed
 * either. It becomes a fault when there is proof that at one moment of the call nothing was mapped there: the node that has
 * the address is dead and still in the tree, or a walk found none while the tree's version stayed the same; else the lock is
 * taken to see. What is asked without touching the memory (probe, and the check of a whole range before its first byte
 * moves) takes a node's fields as one when its state was the same before and after.
 *
 * A local reader skips R1 and R4: U1 to U3 are the same thread's, so none of them comes between R2 and the end of R3. (While a
 * dirty log runs it doesn't skip them: another thread that maps may rebuild the log's index, and waits for the hazards then.)
 *
 * Locks: the table has one, and it is never taken while a hazard is published, so an unmap may wait for hazards under it. The
 * fault log has another, under which nothing else happens.
 * Hazards are held for at most VFU_IOMMU_PIECE bytes of copying. Whatever takes longer (callbacks, pins) counts itself in the
 * node instead, and an unmap waits for these counts without the lock.
 */
#if (defined(VFU_IOMMU_IMPLEMENTATION) || defined(VFU_IMPLEMENTATION)) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* clocks and mutexes under -std=c11; takes effect when this header comes first */
#endif

#ifndef VFU_IOMMU_H
#define VFU_IOMMU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef VFU_API
#ifdef VFU_STATIC
#define VFU_API static __attribute__((unused))
#else
#define VFU_API extern
#endif
#endif

#if !__STDC_HOSTED__ /* no <errno.h>: Linux's numbers */
#ifndef ENOENT
#define ENOENT 2
#endif
#ifndef E2BIG
#define E2BIG 7
#endif
#ifndef EAGAIN
#define EAGAIN 11
#endif
#ifndef ENOMEM
#define ENOMEM 12
#endif
#ifndef EACCES
#define EACCES 13
#endif
#ifndef EFAULT
#define EFAULT 14
#endif
#ifndef EBUSY
#define EBUSY 16
#endif
#ifndef EEXIST
#define EEXIST 17
#endif
#ifndef EINVAL
#define EINVAL 22
#endif
#ifndef ENOSPC
#define ENOSPC 28
#endif
#ifndef EBADMSG
#define EBADMSG 74
#endif
#ifndef EOPNOTSUPP
#define EOPNOTSUPP 95
#endif
#ifndef ENOTSUP
#define ENOTSUP EOPNOTSUPP
#endif
#endif

/* ==== types ============================================================================================================== */

/* Permissions of a mapping, and what an access needs: DMA reads from memory, DMA writes to memory. */
#define VFU_IOMMU_READ  1u
#define VFU_IOMMU_WRITE 2u

/* Mapping flag: the memory behind `host` can disappear (a file that somebody can truncate). Every access goes through the
 * guard of the descriptor, and the mapping can't be pinned. */
#define VFU_IOMMU_GUARDED 1u

/* Bytes that are copied at a time while an unmap may have to wait. */
#define VFU_IOMMU_PIECE 65536u

/* Order of an atomic access. */
#define VFU_IOMMU_RELAXED 0
#define VFU_IOMMU_ACQUIRE 1 /* load: later accesses come after it */
#define VFU_IOMMU_RELEASE 2 /* store: earlier accesses come before it */

typedef struct vfu_iommu vfu_iommu;               /* the table */
typedef struct vfu_iommu_reader vfu_iommu_reader; /* one thread's way to the memory */

/* Where memory comes from. All zero: malloc and free of libc. `alloc` returns `size` bytes aligned as malloc does, or NULL;
 * `release` gets back what alloc gave, with its size. Both are called under the table's lock and must not call the table. */
typedef struct vfu_alloc {
    void *ctx;
    void *(*alloc)(void *ctx, size_t size);
    void (*release)(void *ctx, void *memory, size_t size);
} vfu_alloc;

/* Memory that can't be pointed at. `read` and `write` move len > 0 bytes, which lie inside one mapping, and return 0 or a
 * negative errno, which becomes the access's. They run without any lock of the table, on the thread that does the access; the
 * mapping stays until they return. `let_go` (may be NULL) is called once by an unmap that has to wait for them, without a lock:
 * make calls that are under way on [iova, iova + size) return soon. */
typedef struct vfu_iommu_io {
    int (*read)(void *ctx, uint64_t iova, void *dst, size_t len);
    int (*write)(void *ctx, uint64_t iova, const void *src, size_t len);
    void (*let_go)(void *ctx, uint64_t iova, uint64_t size);
} vfu_iommu_io;

/* One mapping: [iova, iova + size) is memory at host, or memory behind io. */
typedef struct vfu_iommu_mapping {
    uint64_t iova;          /* first address; a multiple of the granule */
    uint64_t size;          /* bytes, > 0, a multiple of the granule; the range may end at 2^64 */
    uint32_t prot;          /* VFU_IOMMU_READ, VFU_IOMMU_WRITE or both */
    uint32_t flags;         /* 0 or VFU_IOMMU_GUARDED */
    void *host;             /* where iova is in this process; borrowed until the mapping is removed; NULL with io */
    const vfu_iommu_io *io; /* NULL with host; borrowed until the mapping is removed */
    void *io_ctx;           /* first argument of io's functions */
    void *user;             /* the caller's; comes back in `removed` and when the table is read */
} vfu_iommu_mapping;

/* A refused or failed access. */
typedef struct vfu_iommu_fault {
    uint64_t iova; /* first address that failed; with -EINVAL, where the request began */
    uint32_t prot; /* what the access needed there */
    int error;     /* negative errno; 0: no fault so far */
} vfu_iommu_fault;

/* What an unmap waits for, when the deadline has passed. */
typedef struct vfu_iommu_stuck {
    vfu_iommu_mapping mapping; /* the first mapping of the range that is held */
    uint32_t pins;             /* how many pins and callbacks hold it */
    uint64_t waited_ms;        /* how long the unmap has waited */
    uint64_t held_ms;          /* how long the oldest pin has been held; 0 when only callbacks hold it */
} vfu_iommu_stuck;

/* How to make a table. Zero means the default that stands at the field. */
typedef struct vfu_iommu_desc {
    uint32_t max_mappings;  /* 0: 65535; at most 2^31 - 1. 80 to 96 bytes each, taken from the system when first used */
    uint32_t max_readers;   /* 0: 16; at most 4096 */
    uint32_t cache_entries; /* 0: two for each mapping, at least 1024. A power of two; 8 bytes each, in use as mappings come */
    uint64_t granule;       /* 0: 1. Addresses and sizes of mappings and unmaps are multiples of this power of two */
    uint64_t dirty_limit;   /* 0: 64 MiB. Bytes that the dirty log may take; while its index grows there are two for a moment */

    vfu_alloc alloc;    /* copied */
    void *buffer;       /* where everything but the dirty log lives, instead of alloc; borrowed until destroy */
    size_t buffer_size; /* bytes, vfu_iommu_footprint() or more */

    void *ctx; /* first argument of the callbacks below */

    /* A mapping is gone and no access to it is in flight: what was borrowed for it may be released. Called by the thread that
     * unmaps or destroys, without a lock; must not unmap. */
    void (*removed)(void *ctx, const vfu_iommu_mapping *mapping);

    /* An unmap has waited pin_deadline_ms (0: 2000) for pins or callbacks. Return 0: wait as long again. Return a negative
     * errno: the unmap fails with it, and the table is as it was. NULL: it fails with -EBUSY. Called without a lock. */
    uint32_t pin_deadline_ms;
    int (*stuck)(void *ctx, const vfu_iommu_stuck *stuck);

    /* Runs body(arg), which touches guarded memory. Returns 0, or -EFAULT when the memory was gone, with the address that
     * could not be touched in *bad. Called while a hazard is published: must not call the table and must not wait. */
    int (*guard)(void *ctx, void (*body)(void *arg), void *arg, const void **bad);
} vfu_iommu_desc;

/* ==== life cycle ========================================================================================================= */

/* Bytes that `buffer` must have for this descriptor (NULL: all defaults). 0: the descriptor is wrong. */
VFU_API size_t vfu_iommu_footprint(const vfu_iommu_desc *desc);

/* Makes an empty table; desc (NULL: all defaults) is copied. One allocation, the only one but for the dirty log.
 * 0; -EINVAL: a field is out of its range; -ENOMEM: no memory, or the buffer is too small. */
VFU_API int vfu_iommu_create(vfu_iommu **out, const vfu_iommu_desc *desc);

/* Ends it: `removed` is called for what is still mapped. No reader, pin or other call may be in use. NULL is fine. */
VFU_API void vfu_iommu_destroy(vfu_iommu *iommu);

/* Opens a reader for one thread. 0; -ENOSPC: max_readers are open. */
VFU_API int vfu_iommu_reader_open(vfu_iommu *iommu, vfu_iommu_reader **out);

/* The same for the thread that does all unmaps and starts and stops the dirty log, if it is just one: it can't unmap in the
 * midst of its own access, so its accesses announce nothing and save a memory fence (6 to 8 ns on some machines, less than 1
 * on others). Other threads may have plain readers and map, but must not unmap, start or stop the log, or destroy. */
VFU_API int vfu_iommu_reader_open_local(vfu_iommu *iommu, vfu_iommu_reader **out);

/* Closes it. Pins that were taken with it stay. NULL is fine. */
VFU_API void vfu_iommu_reader_close(vfu_iommu_reader *reader);

/* The most recent fault of this reader; its error is 0 before the first. Borrowed until the reader's next use. */
VFU_API const vfu_iommu_fault *vfu_iommu_last_fault(const vfu_iommu_reader *reader);

/* ==== map ================================================================================================================ */

/* Adds a mapping, which is copied. 0; -EINVAL: empty, wrapping, unaligned, no or unknown permission, neither or both of host
 * and io, guarded without a guard; -EEXIST: a byte of it is mapped already; -ENOSPC: max_mappings, or dirty_limit while a log
 * runs; -ENOMEM: the dirty log needs memory and there is none. */
VFU_API int vfu_iommu_map(vfu_iommu *iommu, const vfu_iommu_mapping *mapping);

/* Removes every mapping that lies wholly inside [iova, iova + size) and returns how many there were, 0 included: the semantics
 * of VFIO's type1v2. On return no access to the range is in flight. Waits for accesses of other threads, and up to the
 * deadline for pins; a thread must not unmap what it has pinned itself, unless that pin has a let_go that agrees.
 * -EINVAL: empty, wrapping or unaligned, or a mapping would be split; -EBUSY or what `stuck` returned: pins are held, and the
 * mappings are still there. */
VFU_API int vfu_iommu_unmap(vfu_iommu *iommu, uint64_t iova, uint64_t size);

/* The same for all 2^64 addresses. */
VFU_API int vfu_iommu_unmap_all(vfu_iommu *iommu);

/* ==== access =============================================================================================================
 *
 * Ranges may span any number of adjacent mappings. The whole range is checked in ascending order before a byte moves; if any
 * byte is not mapped (-ENOENT) or lacks the permission (-EACCES), nothing moves, and the first such address is the fault. What
 * only shows while bytes move (-EFAULT, or a callback's error; or a mapping that another thread removes meanwhile) may leave a
 * prefix moved. A range that wraps past 2^64 is -EINVAL; an empty range is allowed and does nothing. Never allocates. The lock
 * is only taken for a fault, for memory behind callbacks and when a mapping is being removed at the same moment. */

/* Would an access that needs prot succeed now? 0 or the error, with the fault noted. */
VFU_API int vfu_iommu_probe(vfu_iommu_reader *reader, uint64_t iova, uint64_t len, uint32_t prot);

/* Copies len bytes from the IOVA to dst. */
VFU_API int vfu_iommu_read(vfu_iommu_reader *reader, uint64_t iova, void *dst, size_t len);

/* Copies len bytes from src to the IOVA. */
VFU_API int vfu_iommu_write(vfu_iommu_reader *reader, uint64_t iova, const void *src, size_t len);

/* Copies len bytes from one IOVA to another; the source is checked first. Ranges that overlap behave as memmove. */
VFU_API int vfu_iommu_copy(vfu_iommu_reader *reader, uint64_t dst, uint64_t src, uint64_t len);

/* Fills len bytes with a pattern of 1, 2, 4 or 8 bytes, which starts anew at iova. -EINVAL for other pattern lengths. */
VFU_API int vfu_iommu_fill(vfu_iommu_reader *reader, uint64_t iova, uint64_t len, const void *pattern, size_t pattern_len);

/* One access of 1, 2, 4 or 8 bytes, naturally aligned, that no other thread sees in part; for rings and doorbells. The value
 * is in the host's byte order. order: VFU_IOMMU_RELAXED, or ACQUIRE for load and RELEASE for store. Memory behind callbacks is
 * reached in one call of its callback. -EINVAL: width, alignment or order; -ENOTSUP: 8 bytes where the machine can't, or
 * bytes of more than one mapping. */
VFU_API int vfu_iommu_load(vfu_iommu_reader *reader, uint64_t iova, unsigned width, int order, uint64_t *value);
VFU_API int vfu_iommu_store(vfu_iommu_reader *reader, uint64_t iova, unsigned width, int order, uint64_t value);

/* ==== pin ================================================================================================================
 *
 * A pin gives host pointers for work in place. While it is held, the mappings under it stay: an unmap of their range waits,
 * up to its deadline, and an unmap of any other range doesn't. Take one for work that is bounded, and drop it soon. */

typedef struct vfu_iommu_segment {
    uint64_t iova;
    void *host;
    size_t len; /* bytes, > 0 */
} vfu_iommu_segment;

typedef struct vfu_iommu_pin {
    /* Set these two before taking; NULL is fine. let_go is called once, by an unmap that needs the range [iova, iova + size) of
     * which the pin holds a part, with the table's lock held: it must not call the table. Return true: this work is over, no
     * pointer of the pin will be used again, and the table drops it; the struct is the holder's again at once. Return false: it
     * will be dropped soon. */
    bool (*let_go)(struct vfu_iommu_pin *pin, uint64_t iova, uint64_t size);
    void *user;

    /* private */
    vfu_iommu *iommu; /* NULL when not held */
    struct vfu_iommu_pin *next, *prev;
    uint64_t iova, last, since_ms;
    uint32_t prot;
    bool asked;
} vfu_iommu_pin;

/* Pins [iova, iova + len) for prot, and gives it as segments, one for each mapping. The pin is the caller's and must stay
 * where it is until dropped. Pages of a pin for writing count as dirty as long as it is held. Returns the number of segments;
 * -EINVAL: empty or wrapping; -ENOENT, -EACCES; -E2BIG: more than max segments; -ENOTSUP: callbacks or guarded memory. */
VFU_API int vfu_iommu_pin_take(vfu_iommu_reader *reader, vfu_iommu_pin *pin, uint64_t iova, uint64_t len, uint32_t prot,
                               vfu_iommu_segment *segments, unsigned max);

/* Drops it; its pointers are dead. From any thread. A pin that is not held (any more) is fine. */
VFU_API void vfu_iommu_pin_drop(vfu_iommu *iommu, vfu_iommu_pin *pin);

/* ==== dirty log ==========================================================================================================
 *
 * While it runs, each page of the logged ranges that is written through this table is noted, mapped and unmapped pages alike,
 * until a report fetches it. A page is noted after its bytes were written, so a report that misses it leaves it to the next. */

typedef struct vfu_iommu_range {
    uint64_t iova;
    uint64_t size; /* bytes, > 0; may end at 2^64 */
} vfu_iommu_range;

/* Starts it. page_size: any power of two. ranges: in any order, overlaps allowed, copied; count 0: everything.
 * 0; -EINVAL: page_size, or an empty or wrapping range; -EBUSY: it runs already; -ENOMEM; -ENOSPC: dirty_limit. */
VFU_API int vfu_iommu_dirty_start(vfu_iommu *iommu, uint64_t page_size, const vfu_iommu_range *ranges, size_t count);

/* Stops it and forgets what was noted. 0, or -EINVAL: it doesn't run. */
VFU_API int vfu_iommu_dirty_stop(vfu_iommu *iommu);

/* Fetches and clears what was noted in [iova, iova + size). Bit k of the bitmap (bit k % 64 of word k / 64) stands for
 * [iova + k * page_size, + page_size); page_size is any power of two, finer or coarser than the log's. The words are written
 * whole. A noted page that is only partly inside the range is reported and kept. 0; -EINVAL: not running, empty or wrapping
 * range, page_size, or fewer words than the range has pages. */
VFU_API int vfu_iommu_dirty_report(vfu_iommu *iommu, uint64_t iova, uint64_t size, uint64_t page_size, uint64_t *bitmap,
                                   size_t words);

/* Notes a write that went around this table (by message). Pages that were never mapped while the log runs are left out; nothing
 * happens when none runs. */
VFU_API void vfu_iommu_dirty_mark(vfu_iommu *iommu, uint64_t iova, uint64_t size);

/* ==== iterate ============================================================================================================ */

typedef struct vfu_iommu_stats {
    uint64_t mappings;   /* now */
    uint64_t bytes;      /* mapped now, modulo 2^64 */
    uint64_t maps;       /* mappings ever added */
    uint64_t unmaps;     /* mappings ever removed */
    uint64_t walks;      /* accesses that missed the translation cache */
    uint64_t faults;     /* accesses refused or failed */
    uint64_t waits;      /* unmaps that found an access in flight */
    uint64_t pins;       /* held now */
    uint64_t dirty_size; /* bytes of memory that the dirty log takes now */
} vfu_iommu_stats;

/* Copies out the first mapping that ends at or above iova, and returns 1; 0: there is none. To see them all, start at 0 and
 * go on at iova + size of what was given, until that is 0 or nothing is found. */
VFU_API int vfu_iommu_next(vfu_iommu *iommu, uint64_t iova, vfu_iommu_mapping *out);

/* Copies out the counters. Those of readers are exact when the readers rest. */
VFU_API void vfu_iommu_get_stats(vfu_iommu *iommu, vfu_iommu_stats *out);

/* Copies out up to max of the most recent faults, the newest first, and returns how many. 64 are kept. */
VFU_API unsigned vfu_iommu_get_faults(vfu_iommu *iommu, vfu_iommu_fault *out, unsigned max);

/* ==== check ============================================================================================================== */

/* Verifies order, disjointness, balance and counts of the whole table. 0, or -EBADMSG: memory was corrupted. */
VFU_API int vfu_iommu_check(vfu_iommu *iommu);

#ifdef __cplusplus
}
#endif
#endif /* VFU_IOMMU_H */

/* ========================================================================================================================= */
/* ==== implementation ===================================================================================================== */
/* ========================================================================================================================= */

#if (defined(VFU_IOMMU_IMPLEMENTATION) || defined(VFU_IMPLEMENTATION)) && !defined(VFUX_IOMMU_IMPLEMENTED)
#define VFUX_IOMMU_IMPLEMENTED

#include <stdatomic.h>
#include <string.h>

#if __STDC_HOSTED__
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>
#ifndef VFU_ASSERT
#include <assert.h>
#define VFU_ASSERT(condition) assert(condition)
#endif
#else
#ifndef VFU_ASSERT
#define VFU_ASSERT(condition) ((void)0)
#endif
#endif

/* ---- types -------------------------------------------------------------------------------------------------------------- */

enum {
    VFUX_LINE = 64,                             /* bytes of a cache line */
    VFUX_DEPTH = 48,                            /* an AVL tree of 2^32 nodes is at most 46 high */
    VFUX_HAZARDS = 2,                           /* a copy is at work on two mappings */
    VFUX_FAULTS = 64,                           /* the fault log */
    VFUX_BOUNCE = __STDC_HOSTED__ ? 4096 : 256, /* bytes on the stack for a copy that callbacks take part in */
    VFUX_PATTERN = 512,                         /* a pattern, repeated */
    VFUX_LEAF_SHIFT = 9,                        /* a leaf of the dirty log has 2^9 pages */
    VFUX_LEAF_WORDS = 16,
    VFUX_PAGE_SHIFT = 12, /* addresses of one such page share a hint */
    VFUX_HINTS = 1024     /* hints in use at the start */
};

/* An address of a node, which readers look at while it may change. On 32-bit machines, few of which have an atomic access of 64
 * bits, it is two halves: a hint may be torn, and the addresses of a node that is held and live are still. */
#if UINTPTR_MAX > UINT32_MAX
typedef _Atomic uint64_t vfux_address;
#else
typedef struct vfux_address {
    _Atomic uint32_t low, high;
} vfux_address;
#endif

static uint64_t vfux_address_load(vfux_address *a, memory_order order)
{
#if UINTPTR_MAX > UINT32_MAX
    return atomic_load_explicit(a, order);
#else
    uint64_t high = atomic_load_explicit(&a->high, order);
    return high << 32 | atomic_load_explicit(&a->low, order);
#endif
}

static void vfux_address_set(vfux_address *a, uint64_t value)
{
#if UINTPTR_MAX > UINT32_MAX
    atomic_store_explicit(a, value, memory_order_release);
#else
    atomic_store_explicit(&a->low, (uint32_t)value, memory_order_release);
    atomic_store_explicit(&a->high, (uint32_t)(value >> 32), memory_order_release);
#endif
}

/* A mapping in the tree. Readers look at every field without the lock, under the rules of HOW IT WORKS:
 *   iova, last, left, right   at any time, as a hint
 *   iova, last, prot          as they were at one moment, when the state was the same before and after (vfux_peek)
 *   all but next and height   while they hold the node and it is live
 *
 *      0       8       16      24     32     40      44     48     52      56     60
 *      | iova  | last  | base  | io   | user | state | pins | left | right | next | height prot flags direct |   (64-bit) */
typedef struct vfux_node {
    vfux_address iova;
    vfux_address last; /* inclusive, so that a mapping may end at 2^64 */
    void *base;        /* host, or io's context */
    const vfu_iommu_io *io;
    void *user;
    _Atomic uint32_t state; /* one of the states, and above it how often the node was used */
    _Atomic uint32_t pins;  /* pins and callbacks that keep the node */
    _Atomic uint32_t left, right;
    uint32_t next; /* list of free, or of removed, nodes */
    uint8_t height;
    _Atomic uint8_t prot;
    uint8_t flags;
    uint8_t direct; /* what of prot a plain memcpy may use: all, or nothing of memory behind callbacks or the guard */
} vfux_node;

/* The states of a node, the low bits of its `state`, in the order in which it goes through them. */
enum {
    VFUX_FREE,    /* on the free list, or between list and tree */
    VFUX_LIVE,    /* readers may use it */
    VFUX_LEAVING, /* in the tree still, but readers may not begin to use it; may become live again */
    VFUX_STATES = 4
};

/* An entry of the translation cache: which node has an address, and, so that it can be fetched while the node is looked at,
 * the low bits of the page number of the host memory. Only a hint: the rules of HOW IT WORKS decide. */
typedef struct vfux_hint {
    _Atomic uint32_t node, host_page;
} vfux_hint;

/* Each reader has cache lines of its own. The owner writes all of it; others read the hazards and counters. */
struct vfu_iommu_reader {
    _Alignas(VFUX_LINE) _Atomic uint32_t hazard[VFUX_HAZARDS]; /* index of the node that is being accessed, 0: none */
    vfu_iommu *iommu;
    vfu_iommu_fault fault;
    atomic_ulong walks, faults;
    bool local; /* of the thread that unmaps: announces no hazards */
    bool open;
};

/* 2^9 pages of the dirty log. Never moves while the log runs. */
typedef struct vfux_leaf {
    uint64_t key; /* first address >> (page_shift + VFUX_LEAF_SHIFT) */
    _Atomic uint32_t bits[VFUX_LEAF_WORDS];
} vfux_leaf;

typedef struct vfux_span {
    uint64_t first, last;
} vfux_span;

/* Open-addressing hash table of leaves; `slots` follows it in memory. Writers search it while one that holds the lock adds. */
typedef struct vfux_leaves {
    size_t mask; /* number of slots - 1 */
    _Atomic(vfux_leaf *) *slots;
} vfux_leaves;

typedef struct vfux_log {
    unsigned page_shift;
    size_t range_count, range_capacity;
    vfu_iommu_range *ranges; /* ascending and disjoint; size 0 stands for 2^64 */
    size_t leaf_count;
    uint64_t bytes; /* taken from the allocator */
    _Atomic(vfux_leaves *) leaves;
} vfux_log;

/* What readers look at stands on cache lines of its own, apart from what each map and unmap, and each fault, writes. */
struct vfu_iommu {
    _Atomic uint32_t root;
    _Atomic uint32_t hint_mask; /* number of hints in use - 1 */
    vfux_hint *hints;           /* the translation cache of all readers, by hash of the address */
    _Atomic uintptr_t host_top; /* the bits above host_page, of some hint */
    vfux_node *nodes;
    _Atomic(vfux_log *) log; /* NULL: no dirty log runs */
    vfu_iommu_reader *readers;
    uint32_t node_count; /* including node 0, which stands for none and is never live */
    uint32_t hint_max;
    vfu_iommu_desc desc; /* with the defaults filled in */
    void *memory;        /* what alloc gave, NULL: the caller's buffer */
    size_t memory_size;

    _Alignas(VFUX_LINE) _Atomic uint32_t version; /* odd while the links of the tree change */
    uint32_t free_list;                           /* nodes that were used before */
    uint32_t fresh;                               /* the first node that was never used; memory above is untouched */
    uint32_t reader_count;                        /* highest reader ever opened + 1 */
    vfu_iommu_pin *pins;
    uint64_t mappings, bytes, maps, unmaps, waits;
    unsigned long closed_walks, closed_faults; /* of readers that are closed */
#if __STDC_HOSTED__
    pthread_mutex_t lock;
#endif

    _Alignas(VFUX_LINE) uint64_t fault_count;
    vfu_iommu_fault fault_log[VFUX_FAULTS];
#if __STDC_HOSTED__
    pthread_mutex_t fault_lock; /* of these two */
#endif
};

#if __STDC_HOSTED__
static void vfux_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

/* The lock is held for less than a microsecond as a rule: sleeping would make its holder pay a system call to end that. */
static void vfux_lock(vfu_iommu *t)
{
    for (unsigned i = 0; i < 800; i++) {
        if (i % 4 == 0 && pthread_mutex_trylock(&t->lock) == 0)
            return;
        vfux_relax();
    }
    pthread_mutex_lock(&t->lock);
}

static void vfux_unlock(vfu_iommu *t) { pthread_mutex_unlock(&t->lock); }
static void vfux_fault_lock(vfu_iommu *t) { pthread_mutex_lock(&t->fault_lock); }
static void vfux_fault_unlock(vfu_iommu *t) { pthread_mutex_unlock(&t->fault_lock); }
#else
static void vfux_lock(vfu_iommu *t) { (void)t; }
static void vfux_unlock(vfu_iommu *t) { (void)t; }
static void vfux_fault_lock(vfu_iommu *t) { (void)t; }
static void vfux_fault_unlock(vfu_iommu *t) { (void)t; }
#endif

static uint64_t vfux_clock_ms(void)
{
#if __STDC_HOSTED__
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
#else
    return 0;
#endif
}

/* Waits a little for another thread: first by spinning (a pause instruction takes longer than most accesses), then by giving
 * up the processor, then by sleeping. */
static void vfux_pause(unsigned round)
{
#if __STDC_HOSTED__
    if (round < 128) {
        if (round >= 64)
            vfux_relax();
    } else if (round < 4096) {
        sched_yield();
    } else {
        nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
    }
#else
    (void)round;
#endif
}

/* Has a cache line fetched that is to be written: one transfer where a read and then a write are two. */
static inline void vfux_want(const void *line)
{
#if defined(__x86_64__)
    __asm__ volatile("prefetchw %0" : : "m"(*(const char *)line)); /* __builtin_prefetch needs an option for it */
#else
    __builtin_prefetch(line, 1);
#endif
}

static uint64_t vfux_min(uint64_t a, uint64_t b) { return a < b ? a : b; }
static uint64_t vfux_max(uint64_t a, uint64_t b) { return a > b ? a : b; }

static unsigned vfux_log2(uint64_t power)
{
    unsigned n = 0;
    while (power >>= 1)
        n++;
    return n;
}

static bool vfux_is_power_of_two(uint64_t n) { return n && !(n & (n - 1)); }

/* Links are followed without the lock: whoever finds a node through one must see it initialised. */
static uint32_t vfux_get(_Atomic uint32_t *link) { return atomic_load_explicit(link, memory_order_acquire); }
static void vfux_set(_Atomic uint32_t *link, uint32_t value) { atomic_store_explicit(link, value, memory_order_release); }
static uint64_t vfux_iova(vfux_node *n) { return vfux_address_load(&n->iova, memory_order_relaxed); }
static uint64_t vfux_last(vfux_node *n) { return vfux_address_load(&n->last, memory_order_relaxed); }

static bool vfux_covers(vfux_node *n, uint64_t iova)
{
    uint64_t first = vfux_iova(n);
    return iova - first <= vfux_last(n) - first; /* below `first` the left side wraps to more than any size */
}

static bool vfux_is_state(vfux_node *n, uint32_t state) { return atomic_load(&n->state) % VFUX_STATES == state; }
static bool vfux_is_live(vfux_node *n) { return vfux_is_state(n, VFUX_LIVE); }

/* What a node was at one moment. */
typedef struct vfux_view {
    uint64_t first, last;
    uint32_t state, prot;
} vfux_view;

/* Looks at a node that is not held. False: it doesn't have iova, or has just changed. The rest is one mapping's if the state
 * is the same before and after: each of these fields is stored, with release, after the state that ends what was there
 * before. */
static inline bool vfux_peek(vfux_node *n, uint64_t iova, vfux_view *v)
{
    uint32_t state = atomic_load(&n->state);
    v->first = vfux_address_load(&n->iova, memory_order_acquire);
    v->last = vfux_address_load(&n->last, memory_order_acquire);
    v->prot = atomic_load_explicit(&n->prot, memory_order_acquire);
    v->state = state % VFUX_STATES;
    return iova - v->first <= v->last - v->first && atomic_load(&n->state) == state;
}

/* Steps the state of a node. The caller has the lock. */
static void vfux_step(vfux_node *n, uint32_t steps)
{
    vfux_set(&n->state, atomic_load_explicit(&n->state, memory_order_relaxed) + steps);
}

/* Does [iova, iova + len) end at or before 2^64, and is it not empty? */
static bool vfux_is_range(uint64_t iova, uint64_t len) { return len && len - 1 <= UINT64_MAX - iova; }

/* ---- the tree: AVL, disjoint mappings in the order of their addresses; the caller has the lock -------------------------- */

/* Says that the links begin to change, or are as they should be again. */
static void vfux_tree_change(vfu_iommu *t) { vfux_set(&t->version, atomic_load_explicit(&t->version, memory_order_relaxed) + 1); }

static unsigned vfux_height(vfu_iommu *t, uint32_t i) { return i ? t->nodes[i].height : 0; }

static void vfux_measure(vfu_iommu *t, uint32_t i)
{
    unsigned left = vfux_height(t, vfux_get(&t->nodes[i].left)), right = vfux_height(t, vfux_get(&t->nodes[i].right));
    t->nodes[i].height = (uint8_t)(1 + (left > right ? left : right));
}

/* Puts the left (or right) child above the node that `link` points to. Order is kept: a(b(x,y),z) becomes b(x,a(y,z)). */
static void vfux_rotate(vfu_iommu *t, _Atomic uint32_t *link, bool left_child)
{
    uint32_t a = vfux_get(link);
    _Atomic uint32_t *down = left_child ? &t->nodes[a].left : &t->nodes[a].right;
    uint32_t b = vfux_get(down);
    _Atomic uint32_t *inner = left_child ? &t->nodes[b].right : &t->nodes[b].left;
    vfux_set(down, vfux_get(inner));
    vfux_set(inner, a);
    vfux_set(link, b);
    vfux_measure(t, a);
    vfux_measure(t, b);
}

/* Restores |height(left) - height(right)| <= 1 at `link`, whose subtrees obey it and differ by at most 2. Returns whether the
 * height at `link` has changed, that is whether the node above has to be looked at. */
static bool vfux_rebalance(vfu_iommu *t, _Atomic uint32_t *link)
{
    uint32_t i = vfux_get(link);
    unsigned before = t->nodes[i].height;
    unsigned left = vfux_height(t, vfux_get(&t->nodes[i].left)), right = vfux_height(t, vfux_get(&t->nodes[i].right));
    if (left > right + 1 || right > left + 1) {
        bool is_left = left > right;
        _Atomic uint32_t *child = is_left ? &t->nodes[i].left : &t->nodes[i].right;
        vfux_node *c = &t->nodes[vfux_get(child)];
        unsigned outer = vfux_height(t, vfux_get(is_left ? &c->left : &c->right));
        unsigned inner = vfux_height(t, vfux_get(is_left ? &c->right : &c->left));
        if (inner > outer)
            vfux_rotate(t, child, !is_left);
        vfux_rotate(t, link, is_left);
    } else {
        vfux_measure(t, i);
    }
    return t->nodes[vfux_get(link)].height != before;
}

/* The links from the root to a place in the tree; the last one is the place itself. */
typedef struct vfux_path {
    _Atomic uint32_t *links[VFUX_DEPTH + 1];
    unsigned depth; /* index of the last */
} vfux_path;

/* Finds where a mapping of [first, last] belongs. False: a mapping is there. */
static bool vfux_find_place(vfu_iommu *t, uint64_t first, uint64_t last, vfux_path *path)
{
    path->depth = 0;
    path->links[0] = &t->root;
    for (uint32_t i; (i = vfux_get(path->links[path->depth])) != 0;) {
        vfux_node *n = &t->nodes[i];
        bool left = last < vfux_iova(n);
        if (!left && first <= vfux_last(n))
            return false;
        path->links[++path->depth] = left ? &n->left : &n->right;
    }
    return true;
}

static void vfux_tree_insert(vfu_iommu *t, vfux_path *path, uint32_t added)
{
    vfux_set(&t->nodes[added].left, 0);
    vfux_set(&t->nodes[added].right, 0);
    t->nodes[added].height = 1;
    vfux_set(path->links[path->depth], added);
    while (path->depth && vfux_rebalance(t, path->links[--path->depth])) {
    }
}

/* Finds the way to a node that is in the tree. */
static void vfux_find_node(vfu_iommu *t, uint32_t node, vfux_path *path)
{
    uint64_t iova = vfux_iova(&t->nodes[node]);
    path->depth = 0;
    path->links[0] = &t->root;
    for (uint32_t i; (i = vfux_get(path->links[path->depth])) != node;)
        path->links[++path->depth] = iova < vfux_iova(&t->nodes[i]) ? &t->nodes[i].left : &t->nodes[i].right;
}

/* Takes out the node that the path leads to. */
static void vfux_tree_remove(vfu_iommu *t, vfux_path *path)
{
    _Atomic uint32_t **links = path->links, *at = links[path->depth];
    vfux_node *n = &t->nodes[vfux_get(at)];
    unsigned depth = path->depth, place = depth;
    if (!vfux_get(&n->left) || !vfux_get(&n->right)) {
        vfux_set(at, vfux_get(&n->left) | vfux_get(&n->right)); /* at most one is not 0 */
    } else {
        /* The successor, the leftmost node of the right subtree, takes the place of the node that goes. */
        links[++depth] = &n->right;
        for (uint32_t i; (i = vfux_get(&t->nodes[vfux_get(links[depth])].left)) != 0;) {
            _Atomic uint32_t *left = &t->nodes[vfux_get(links[depth])].left;
            links[++depth] = left;
        }
        uint32_t successor = vfux_get(links[depth]);
        vfux_node *s = &t->nodes[successor];
        vfux_set(links[depth], vfux_get(&s->right));
        vfux_set(&s->left, vfux_get(&n->left));
        vfux_set(&s->right, vfux_get(&n->right));
        s->height = n->height;
        vfux_set(at, successor);
        links[place + 1] = &s->right; /* that link was in the node that goes */
    }
    while (depth && vfux_rebalance(t, links[--depth])) {
    }
}

/* The mapping with the greatest iova <= `iova`, or 0. */
static uint32_t vfux_floor(vfu_iommu *t, uint64_t iova)
{
    uint32_t found = 0;
    for (uint32_t i = vfux_get(&t->root); i;) {
        bool right = vfux_iova(&t->nodes[i]) <= iova;
        found = right ? i : found;
        i = vfux_get(right ? &t->nodes[i].right : &t->nodes[i].left);
    }
    return found;
}

/* The first mapping that ends at or above `iova`, or 0. */
static uint32_t vfux_from(vfu_iommu *t, uint64_t iova)
{
    uint32_t found = 0;
    for (uint32_t i = vfux_get(&t->root); i;) {
        bool left = vfux_last(&t->nodes[i]) >= iova;
        found = left ? i : found;
        i = vfux_get(left ? &t->nodes[i].left : &t->nodes[i].right);
    }
    return found;
}

/* The first mapping of [iova, last] or 0; with last below iova (the range before has ended at 2^64) there is none. */
static uint32_t vfux_first_in(vfu_iommu *t, uint64_t iova, uint64_t last)
{
    uint32_t i = iova <= last ? vfux_from(t, iova) : 0;
    return i && vfux_iova(&t->nodes[i]) <= last ? i : 0;
}

/* The mapping of [.., last] that follows i, or 0. */
static uint32_t vfux_next_in(vfu_iommu *t, uint32_t i, uint64_t last)
{
    uint64_t end = vfux_last(&t->nodes[i]);
    return end < last ? vfux_first_in(t, end + 1, last) : 0;
}

static void vfux_describe(vfux_node *n, vfu_iommu_mapping *out)
{
    *out = (vfu_iommu_mapping){
        .iova = vfux_iova(n),
        .size = vfux_last(n) - vfux_iova(n) + 1,
        .prot = n->prot,
        .flags = n->flags,
        .host = n->io ? NULL : n->base,
        .io = n->io,
        .io_ctx = n->io ? n->base : NULL,
        .user = n->user,
    };
}

/* ---- waiting for readers; the caller has the lock ----------------------------------------------------------------------- */

/* U2 of HOW IT WORKS, for every dead node at once. Returns whether there was anything to wait for. */
static bool vfux_wait_for_dead(vfu_iommu *t)
{
    bool waited = false;
    for (uint32_t r = 0; r < t->reader_count; r++) {
        for (unsigned h = 0; h < VFUX_HAZARDS; h++) {
            for (unsigned round = 0;; round++) {
                uint32_t i = atomic_load(&t->readers[r].hazard[h]);
                if (!i || vfux_is_live(&t->nodes[i]))
                    break;
                waited = true;
                vfux_pause(round);
            }
        }
    }
    return waited;
}

/* Waits until every access that is in flight now has ended, whatever it is at. */
static void vfux_wait_for_all(vfu_iommu *t)
{
    for (uint32_t r = 0; r < t->reader_count; r++) {
        for (unsigned h = 0; h < VFUX_HAZARDS; h++) {
            uint32_t i = atomic_load(&t->readers[r].hazard[h]);
            for (unsigned round = 0; i && atomic_load(&t->readers[r].hazard[h]) == i; round++)
                vfux_pause(round);
        }
    }
}

/* ==== life cycle ========================================================================================================= */

/* Fills in the defaults. False: a field is out of its range. */
static bool vfux_complete(vfu_iommu_desc *d, const vfu_iommu_desc *given)
{
    *d = given ? *given : (vfu_iommu_desc){0};
    if (!d->max_mappings)
        d->max_mappings = 65535;
    if (!d->max_readers)
        d->max_readers = 16;
    if (!d->cache_entries)
        for (d->cache_entries = VFUX_HINTS; d->cache_entries / 2 < d->max_mappings && d->cache_entries < UINT32_C(1) << 31;)
            d->cache_entries *= 2;
    if (!d->granule)
        d->granule = 1;
    if (!d->dirty_limit)
        d->dirty_limit = UINT64_C(64) << 20;
    if (!d->pin_deadline_ms)
        d->pin_deadline_ms = 2000;
#if __STDC_HOSTED__
    bool memory = true;
#else
    bool memory = d->buffer != NULL;
#endif
    return memory && d->max_mappings < UINT32_C(1) << 31 && d->max_readers <= 4096 && vfux_is_power_of_two(d->cache_entries) &&
           vfux_is_power_of_two(d->granule) && !d->alloc.alloc == !d->alloc.release;
}

static size_t vfux_round_line(size_t n) { return (n + VFUX_LINE - 1) & ~(size_t)(VFUX_LINE - 1); }

/* Where the parts are: table | readers | nodes | hints, each on its own cache lines, and a line to align the whole. */
typedef struct vfux_layout {
    size_t readers, nodes, hints, size;
} vfux_layout;

/* False: more than size_t. */
static bool vfux_lay_out(const vfu_iommu_desc *d, vfux_layout *l)
{
    uint64_t at = vfux_round_line(sizeof(vfu_iommu));
    l->readers = (size_t)at;
    at += (uint64_t)d->max_readers * sizeof(vfu_iommu_reader);
    l->nodes = (size_t)at;
    at += ((uint64_t)d->max_mappings + 1) * sizeof(vfux_node);
    l->hints = (size_t)at;
    at += (uint64_t)d->cache_entries * sizeof(vfux_hint) + VFUX_LINE;
    l->size = (size_t)at;
    return at <= SIZE_MAX;
}

VFU_API size_t vfu_iommu_footprint(const vfu_iommu_desc *desc)
{
    vfu_iommu_desc d = desc ? *desc : (vfu_iommu_desc){0};
    vfux_layout layout;
    if (!d.buffer)
        d.buffer = &d; /* its size is what is asked for */
    return vfux_complete(&d, &d) && vfux_lay_out(&d, &layout) ? layout.size : 0;
}

static void *vfux_alloc(vfu_iommu_desc *d, size_t size)
{
    if (d->alloc.alloc)
        return d->alloc.alloc(d->alloc.ctx, size);
#if __STDC_HOSTED__
    return malloc(size);
#else
    return NULL;
#endif
}

static void vfux_release(vfu_iommu_desc *d, void *memory, size_t size)
{
    if (d->alloc.release) {
        if (memory)
            d->alloc.release(d->alloc.ctx, memory, size);
        return;
    }
#if __STDC_HOSTED__
    free(memory);
#endif
}

/* Takes hints [count, more) into use. Their memory is cleared, and so taken from the system, only now. Addresses get other
 * places: what was noted there is no worse than any hint. */
static void vfux_use_hints(vfu_iommu *t, uint32_t count, uint32_t more)
{
    for (uint32_t i = count; i < more; i++) {
        atomic_init(&t->hints[i].node, 0);
        atomic_init(&t->hints[i].host_page, 0);
    }
    vfux_set(&t->hint_mask, more - 1);
}

VFU_API int vfu_iommu_create(vfu_iommu **out, const vfu_iommu_desc *desc)
{
    vfu_iommu_desc d;
    vfux_layout layout;
    *out = NULL;
    if (!vfux_complete(&d, desc) || !vfux_lay_out(&d, &layout))
        return -EINVAL;
    if (d.buffer && d.buffer_size < layout.size)
        return -ENOMEM;
    void *memory = d.buffer ? NULL : vfux_alloc(&d, layout.size);
    if (!d.buffer && !memory)
        return -ENOMEM;
    uintptr_t start = (uintptr_t)(d.buffer ? d.buffer : memory);
    char *base = (char *)(d.buffer ? d.buffer : memory) + (vfux_round_line(start) - start);
    vfu_iommu *t = (vfu_iommu *)(void *)base;
    memset(base, 0, layout.nodes + sizeof(vfux_node)); /* the other nodes stay untouched until they are used */
    t->desc = d;
    t->memory = memory;
    t->memory_size = layout.size;
    t->nodes = (vfux_node *)(void *)(base + layout.nodes);
    t->hints = (vfux_hint *)(void *)(base + layout.hints);
    t->hint_max = d.cache_entries;
    t->node_count = d.max_mappings + 1;
    t->fresh = 1;
    vfux_address_set(&t->nodes[0].iova, UINT64_MAX); /* so that a hint of 0 is one that nothing believes */
    vfux_address_set(&t->nodes[0].last, UINT64_MAX);
    t->readers = (vfu_iommu_reader *)(void *)(base + layout.readers);
    for (uint32_t r = 0; r < d.max_readers; r++)
        t->readers[r].iommu = t;
    vfux_use_hints(t, 0, d.cache_entries < VFUX_HINTS ? d.cache_entries : VFUX_HINTS);
#if __STDC_HOSTED__
    pthread_mutex_init(&t->lock, NULL); /* can't fail for a plain mutex on Linux */
    pthread_mutex_init(&t->fault_lock, NULL);
#endif
    *out = t;
    return 0;
}

static void vfux_log_free(vfu_iommu *t, vfux_log *log);

VFU_API void vfu_iommu_destroy(vfu_iommu *t)
{
    if (!t)
        return;
    VFU_ASSERT(!t->pins);
    vfux_log *log = atomic_load(&t->log);
    if (log)
        vfux_log_free(t, log);
    for (uint32_t i = vfux_from(t, 0); i && t->desc.removed; i = vfux_next_in(t, i, UINT64_MAX)) {
        vfu_iommu_mapping mapping;
        vfux_describe(&t->nodes[i], &mapping);
        t->desc.removed(t->desc.ctx, &mapping);
    }
#if __STDC_HOSTED__
    pthread_mutex_destroy(&t->lock);
    pthread_mutex_destroy(&t->fault_lock);
#endif
    if (t->memory) {
        vfu_iommu_desc d = t->desc;
        vfux_release(&d, t->memory, t->memory_size);
    }
}

static int vfux_reader_open(vfu_iommu *t, vfu_iommu_reader **out, bool local)
{
    int err = -ENOSPC;
    *out = NULL;
    vfux_lock(t);
    for (uint32_t r = 0; r < t->desc.max_readers && err; r++) {
        vfu_iommu_reader *reader = &t->readers[r];
        if (reader->open)
            continue;
        reader->open = true;
        reader->local = local;
        reader->fault = (vfu_iommu_fault){0};
        if (t->reader_count <= r)
            t->reader_count = r + 1;
        *out = reader;
        err = 0;
    }
    vfux_unlock(t);
    return err;
}

VFU_API int vfu_iommu_reader_open(vfu_iommu *t, vfu_iommu_reader **out) { return vfux_reader_open(t, out, false); }
VFU_API int vfu_iommu_reader_open_local(vfu_iommu *t, vfu_iommu_reader **out) { return vfux_reader_open(t, out, true); }

static inline bool vfux_is_idle(vfu_iommu_reader *r) { return !atomic_load(&r->hazard[0]) && !atomic_load(&r->hazard[1]); }

VFU_API void vfu_iommu_reader_close(vfu_iommu_reader *r)
{
    if (!r)
        return;
    vfu_iommu *t = r->iommu;
    vfux_lock(t);
    VFU_ASSERT(r->open && vfux_is_idle(r));
    r->open = false;
    t->closed_walks += atomic_exchange(&r->walks, 0);
    t->closed_faults += atomic_exchange(&r->faults, 0);
    vfux_unlock(t);
}

VFU_API const vfu_iommu_fault *vfu_iommu_last_fault(const vfu_iommu_reader *r) { return &r->fault; }

/* ==== map ================================================================================================================ */

static int vfux_log_cover(vfu_iommu *t, vfux_log *log, uint64_t first, uint64_t last);

static bool vfux_is_unaligned(vfu_iommu *t, uint64_t iova, uint64_t size) { return (iova | size) & (t->desc.granule - 1); }

static bool vfux_is_mapping(vfu_iommu *t, const vfu_iommu_mapping *m)
{
    return vfux_is_range(m->iova, m->size) && !vfux_is_unaligned(t, m->iova, m->size) && m->prot &&
           !(m->prot & ~(VFU_IOMMU_READ | VFU_IOMMU_WRITE)) && !(m->flags & ~VFU_IOMMU_GUARDED) && !m->host != !m->io &&
           (!m->host || m->size - 1 <= UINTPTR_MAX - (uintptr_t)m->host) && (!m->io || !(m->flags & VFU_IOMMU_GUARDED)) &&
           (!(m->flags & VFU_IOMMU_GUARDED) || t->desc.guard);
}

/* The place of an address in the translation cache. Neighbours don't collide. */
static inline vfux_hint *vfux_hint_of(vfu_iommu *t, uint64_t iova)
{
    uint64_t page = iova >> VFUX_PAGE_SHIFT;
    return &t->hints[(uint32_t)(page ^ page >> 10 ^ page >> 20) & vfux_get(&t->hint_mask)];
}

/* Notes that node i, which stays what it is meanwhile, has iova. What is noted already isn't stored again: that would take it
 * from the caches of other processors. */
static void vfux_note(vfu_iommu *t, vfux_hint *hint, uint32_t i, uint64_t iova)
{
    vfux_node *n = &t->nodes[i];
    uintptr_t host = n->direct ? (uintptr_t)n->base + (uintptr_t)(iova - vfux_iova(n)) : 0;
    uintptr_t top = host & ~(((uintptr_t)UINT32_MAX << VFUX_PAGE_SHIFT) | ((1u << VFUX_PAGE_SHIFT) - 1));
    uint32_t page = (uint32_t)(host >> VFUX_PAGE_SHIFT);
    if (vfux_get(&hint->node) == i && atomic_load_explicit(&hint->host_page, memory_order_relaxed) == page)
        return;
    atomic_store_explicit(&hint->host_page, page, memory_order_relaxed);
    if (host && top != atomic_load_explicit(&t->host_top, memory_order_relaxed))
        atomic_store_explicit(&t->host_top, top, memory_order_relaxed);
    vfux_set(&hint->node, i);
}

/* Has the memory fetched that the translation cache names for iova, of no consequence when it is wrong: a cache miss there
 * takes its time beside the one on the node. */
static inline void vfux_fetch(vfu_iommu *t, vfux_hint *hint, uint64_t iova)
{
    uintptr_t page = atomic_load_explicit(&hint->host_page, memory_order_relaxed);
    uintptr_t top = atomic_load_explicit(&t->host_top, memory_order_relaxed);
    __builtin_prefetch((const void *)((top | page << VFUX_PAGE_SHIFT) + (uintptr_t)(iova & ((1u << VFUX_PAGE_SHIFT) - 1))));
}

static uint32_t vfux_node_take(vfu_iommu *t)
{
    uint32_t i = t->free_list;
    if (i) {
        t->free_list = t->nodes[i].next;
    } else if (t->fresh < t->node_count) {
        i = t->fresh++;
        memset(&t->nodes[i], 0, sizeof(vfux_node));
    }
    return i;
}

static void vfux_node_give(vfu_iommu *t, uint32_t i)
{
    t->nodes[i].next = t->free_list;
    t->free_list = i;
}

VFU_API int vfu_iommu_map(vfu_iommu *t, const vfu_iommu_mapping *m)
{
    if (!vfux_is_mapping(t, m))
        return -EINVAL;
    uint64_t last = m->iova + (m->size - 1);
    int err = 0;
    uint32_t i = 0;
    vfux_path path;
    vfux_lock(t);
    vfux_log *log = atomic_load_explicit(&t->log, memory_order_relaxed);
    if (!vfux_find_place(t, m->iova, last, &path))
        err = -EEXIST;
    else if (log)
        err = vfux_log_cover(t, log, m->iova, last);
    if (!err && !(i = vfux_node_take(t)))
        err = -ENOSPC;
    if (!err) {
        vfux_node *n = &t->nodes[i];
        vfux_address_set(&n->iova, m->iova);
        vfux_address_set(&n->last, last);
        n->base = m->io ? m->io_ctx : m->host;
        n->io = m->io;
        n->user = m->user;
        atomic_store_explicit(&n->prot, (uint8_t)m->prot, memory_order_release);
        n->flags = (uint8_t)m->flags;
        n->direct = m->io || m->flags & VFU_IOMMU_GUARDED ? 0 : (uint8_t)m->prot;
        vfux_tree_change(t);
        vfux_tree_insert(t, &path, i);
        vfux_tree_change(t);
        vfux_step(n, VFUX_LIVE - VFUX_FREE); /* from here on readers believe what they find */
        t->mappings++;
        t->maps++;
        t->bytes += m->size;
        uint32_t hints = vfux_get(&t->hint_mask) + 1; /* two for each mapping */
        if (t->mappings > hints / 2 && hints < t->hint_max)
            vfux_use_hints(t, hints, hints * 2);
        vfux_note(t, vfux_hint_of(t, m->iova), i, m->iova);
    }
    vfux_unlock(t);
    return err;
}

static void vfux_pin_ask(vfu_iommu *t, uint64_t first, uint64_t last);
static void vfux_pin_ask_again(vfu_iommu *t, uint64_t first, uint64_t last);
static uint64_t vfux_pin_oldest_ms(vfu_iommu *t, uint64_t first, uint64_t last, uint64_t now);

/* Chains the mappings of [first, last] through `next`, which a mapping in the tree doesn't use otherwise, and gives the first.
 * -EINVAL: one would be split; -EAGAIN: another thread is removing one. */
static int vfux_collect(vfu_iommu *t, uint64_t first, uint64_t last, uint32_t *head)
{
    uint32_t *link = head, hint = vfux_get(&vfux_hint_of(t, first)->node);
    vfux_node *h = &t->nodes[hint];
    if (vfux_is_live(h) && vfux_iova(h) == first && vfux_last(h) == last) { /* just this one, as most often */
        h->next = 0;
        *head = hint;
        return 0;
    }
    for (uint32_t i = vfux_first_in(t, first, last); i; i = vfux_next_in(t, i, last)) {
        vfux_node *n = &t->nodes[i];
        if (vfux_iova(n) < first || vfux_last(n) > last)
            return -EINVAL;
        if (!vfux_is_live(n))
            return -EAGAIN;
        *link = i;
        link = &n->next;
    }
    *link = 0;
    return 0;
}

/* Waits, with the lock given up, until no pin and no callback holds the chained dead mappings. None can be added: a pin is
 * counted under a hazard, and those have been waited for. 0; 1 if the lock was given up; or the errno with which the unmap
 * fails. */
static int vfux_wait_for_pins(vfu_iommu *t, uint32_t head)
{
    uint64_t began = 0, deadline = 0;
    uint32_t asked = 0; /* the mapping whose callbacks know that it is waited for */
    unsigned round = 0;
    int waited = 0;
    for (uint32_t i = head; i;) {
        vfux_node *n = &t->nodes[i];
        if (atomic_load(&n->pins))
            vfux_pin_ask(t, vfux_iova(n), vfux_last(n));
        if (!atomic_load(&n->pins)) {
            i = n->next;
            continue;
        }
        uint64_t now = vfux_clock_ms();
        if (!deadline) {
            began = now;
            deadline = now + t->desc.pin_deadline_ms;
        }
        vfu_iommu_stuck stuck = {.pins = atomic_load(&n->pins), .waited_ms = now - began};
        stuck.held_ms = vfux_pin_oldest_ms(t, vfux_iova(n), vfux_last(n), now);
        vfux_describe(n, &stuck.mapping);
        int err = 0;
        vfux_unlock(t);
        if (asked != i && stuck.mapping.io && stuck.mapping.io->let_go)
            stuck.mapping.io->let_go(stuck.mapping.io_ctx, stuck.mapping.iova, stuck.mapping.size);
        asked = i;
        if (!__STDC_HOSTED__ || now >= deadline) {
            err = t->desc.stuck ? t->desc.stuck(t->desc.ctx, &stuck) : -EBUSY;
            deadline = now + t->desc.pin_deadline_ms;
        }
        vfux_pause(round++);
        waited = 1;
        vfux_lock(t);
        if (err && atomic_load(&n->pins))
            return err;
    }
    return waited;
}

static int vfux_unmap(vfu_iommu *t, uint64_t first, uint64_t last)
{
    vfux_path path;
    uint32_t head;
    int err, count = 0;
    vfux_want(&t->nodes[vfux_get(&vfux_hint_of(t, first)->node)]); /* a reader may have it; arrives while the lock is taken */
    vfux_lock(t);
    for (unsigned round = 0; (err = vfux_collect(t, first, last, &head)) == -EAGAIN; round++) {
        vfux_unlock(t);
        vfux_pause(round);
        vfux_lock(t);
    }
    if (err || !head) {
        vfux_unlock(t);
        return err;
    }
    for (uint32_t i = head; i; i = t->nodes[i].next)
        atomic_fetch_add(&t->nodes[i].state, VFUX_LEAVING - VFUX_LIVE); /* U1 of HOW IT WORKS */
    vfux_find_node(t, head, &path); /* needed below: a reader that is at work comes to its end meanwhile */
    t->waits += vfux_wait_for_dead(t);
    err = vfux_wait_for_pins(t, head);
    if (err < 0) {
        for (uint32_t i = head; i; i = t->nodes[i].next)
            vfux_step(&t->nodes[i], (uint32_t)VFUX_LIVE - VFUX_LEAVING);
        vfux_pin_ask_again(t, first, last);
        vfux_unlock(t);
        return err;
    }
    bool found = !err; /* the way to the first one is still what it was */
    vfux_tree_change(t);
    for (uint32_t i = head; i; i = t->nodes[i].next, count++, found = false) {
        if (!found)
            vfux_find_node(t, i, &path);
        vfux_tree_remove(t, &path);
        vfux_step(&t->nodes[i], VFUX_STATES - VFUX_LEAVING); /* free */
        t->bytes -= vfux_last(&t->nodes[i]) - vfux_iova(&t->nodes[i]) + 1;
    }
    vfux_tree_change(t);
    t->mappings -= (uint64_t)count;
    t->unmaps += (uint64_t)count;
    if (t->desc.removed) { /* the nodes are only ours now: what they borrowed is given back before they are used again */
        vfux_unlock(t);
        for (uint32_t i = head; i; i = t->nodes[i].next) {
            vfu_iommu_mapping mapping;
            vfux_describe(&t->nodes[i], &mapping);
            t->desc.removed(t->desc.ctx, &mapping);
        }
        vfux_lock(t);
    }
    for (uint32_t i = head, next; i; i = next) {
        next = t->nodes[i].next;
        vfux_node_give(t, i);
    }
    vfux_unlock(t);
    return count;
}

VFU_API int vfu_iommu_unmap(vfu_iommu *t, uint64_t iova, uint64_t size)
{
    if (!vfux_is_range(iova, size) || vfux_is_unaligned(t, iova, size))
        return -EINVAL;
    return vfux_unmap(t, iova, iova + (size - 1));
}

VFU_API int vfu_iommu_unmap_all(vfu_iommu *t) { return vfux_unmap(t, 0, UINT64_MAX); }

/* ==== access ============================================================================================================= */

static void vfux_log_mark(vfux_log *log, uint64_t first, uint64_t last);

/* R1 of HOW IT WORKS. */
static inline void vfux_publish(vfu_iommu_reader *r, unsigned slot, uint32_t i)
{
    if (!r->local || atomic_load_explicit(&r->iommu->log, memory_order_relaxed))
        atomic_store(&r->hazard[slot], i);
}

/* R4. */
static inline void vfux_let(vfu_iommu_reader *r, unsigned slot)
{
    atomic_store_explicit(&r->hazard[slot], 0, memory_order_release);
}

/* R1 and R2, and the bounds of R3. */
static inline bool vfux_take(vfu_iommu_reader *r, unsigned slot, uint32_t i, uint64_t iova)
{
    vfux_node *n = &r->iommu->nodes[i];
    vfux_publish(r, slot, i);
    if (vfux_is_live(n) && vfux_covers(n, iova))
        return true;
    vfux_let(r, slot);
    return false;
}

/* Counts for the statistics: only the reader's thread writes. */
static void vfux_count(atomic_ulong *counter)
{
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1, memory_order_relaxed);
}

/* Walks the tree without the lock, while it may change: the answer is a hint, and a bounded number of steps finds one or 0.
 * With *certain a 0 is more: at one moment there was none. The links and addresses are read with acquire and stored with
 * release, so whoever sees a change sees the version that announced it. */
static uint32_t vfux_walk(vfu_iommu *t, uint64_t iova, bool *certain)
{
    uint32_t version = vfux_get(&t->version), i = vfux_get(&t->root), found = 0;
    for (unsigned step = 0; i && step < VFUX_DEPTH; step++) {
        vfux_node *n = &t->nodes[i];
        bool right = vfux_address_load(&n->iova, memory_order_acquire) <= iova;
        found = right ? i : found;
        i = vfux_get(right ? &n->right : &n->left);
    }
    bool covers = found && iova <= vfux_address_load(&t->nodes[found].last, memory_order_acquire);
    *certain = !(version & 1) && vfux_get(&t->version) == version;
    return covers ? found : 0;
}

/* Holds the mapping of iova if the translation cache knows it. NULL: a closer look is needed. */
static inline vfux_node *vfux_hold_hint(vfu_iommu_reader *r, unsigned slot, uint64_t iova)
{
    uint32_t i = vfux_get(&vfux_hint_of(r->iommu, iova)->node);
    return vfux_take(r, slot, i, iova) ? &r->iommu->nodes[i] : NULL;
}

/* Is node i, which has iova as it seems, about to be taken out of the tree? Then nothing else has iova at this moment. */
static bool vfux_is_leaving(vfu_iommu *t, uint32_t i, uint64_t iova)
{
    vfux_view view;
    return vfux_peek(&t->nodes[i], iova, &view) && view.state == VFUX_LEAVING;
}

/* Holds the mapping of iova after a walk, which is noted in the translation cache. With NULL, *none: at one moment of the call
 * no mapping had iova. */
static vfux_node *vfux_hold_walk(vfu_iommu_reader *r, unsigned slot, uint64_t iova, bool *none)
{
    vfu_iommu *t = r->iommu;
    vfux_count(&r->walks);
    uint32_t i = vfux_walk(t, iova, none);
    if (!i)
        return NULL;
    if (vfux_take(r, slot, i, iova)) {
        vfux_note(t, vfux_hint_of(t, iova), i, iova);
        return &t->nodes[i];
    }
    *none = vfux_is_leaving(t, i, iova);
    return NULL;
}

/* Holds the mapping of iova. No hazard may be held. NULL: there was none at some moment of the call. An unmap that is under
 * way is not disturbed at its lock unless that can't be told otherwise. */
static vfux_node *vfux_hold(vfu_iommu_reader *r, unsigned slot, uint64_t iova)
{
    vfu_iommu *t = r->iommu;
    vfux_node *n = vfux_hold_hint(r, slot, iova);
    if (n || vfux_is_leaving(t, vfux_get(&vfux_hint_of(t, iova)->node), iova))
        return n;
    bool none;
    n = vfux_hold_walk(r, slot, iova, &none);
    while (!n && !none) {
        vfux_lock(t);
        uint32_t i = vfux_floor(t, iova);
        none = !i || !vfux_covers(&t->nodes[i], iova) || !vfux_is_live(&t->nodes[i]);
        vfux_unlock(t);
        if (!none && vfux_take(r, slot, i, iova)) /* else it was removed just now, and perhaps mapped anew */
            n = &t->nodes[i];
    }
    return n;
}

/* Notes a fault and returns its error. No hazard may be held. */
static int vfux_fault(vfu_iommu_reader *r, uint64_t iova, uint32_t prot, int error)
{
    vfu_iommu *t = r->iommu;
    r->fault = (vfu_iommu_fault){.iova = iova, .prot = prot, .error = error};
    vfux_count(&r->faults);
    vfux_fault_lock(t);
    t->fault_log[t->fault_count++ % VFUX_FAULTS] = r->fault;
    vfux_fault_unlock(t);
    return error;
}

/* Is every byte of [iova, iova + len), which doesn't wrap, mapped with prot? 0, or the error, with the address in *at. */
static int vfux_scan(vfu_iommu_reader *r, uint64_t iova, uint64_t len, uint32_t prot, uint64_t *at)
{
    vfu_iommu *t = r->iommu;
    for (uint64_t last = iova + (len - 1);;) {
        vfux_view view;
        *at = iova;
        bool known = vfux_peek(&t->nodes[vfux_get(&vfux_hint_of(t, iova)->node)], iova, &view);
        if (known && view.state == VFUX_LEAVING) /* as in vfux_is_leaving, without a hazard for which the unmap would wait */
            return -ENOENT;
        if (!known || view.state != VFUX_LIVE) {
            vfux_node *n = vfux_hold(r, 0, iova);
            if (!n)
                return -ENOENT;
            view.last = vfux_last(n);
            view.prot = n->prot;
            vfux_let(r, 0);
        }
        if ((view.prot & prot) != prot)
            return -EACCES;
        if (view.last >= last)
            return 0;
        iova = view.last + 1;
    }
}

VFU_API int vfu_iommu_probe(vfu_iommu_reader *r, uint64_t iova, uint64_t len, uint32_t prot)
{
    uint64_t at = iova;
    if (!len)
        return 0;
    int err = vfux_is_range(iova, len) ? vfux_scan(r, iova, len, prot, &at) : -EINVAL;
    return err ? vfux_fault(r, at, prot, err) : 0;
}

/* What is to be done with the bytes of a range. */
typedef struct vfux_job {
    uint32_t prot;
    char *in;         /* read: where the bytes go */
    const char *out;  /* write: where they come from */
    size_t phase_len; /* fill: `out` is a pattern of this length, repeated to VFUX_PATTERN + phase_len bytes; else 0 */
} vfux_job;

typedef struct vfux_move {
    char *dst;
    const char *src;
    size_t len;
} vfux_move;

static void vfux_move_body(void *arg)
{
    vfux_move *move = arg;
    memmove(move->dst, move->src, move->len);
}

/* Moves bytes, one or both ends of which are memory of a mapping. 0, or -EFAULT with the address that was gone. */
static int vfux_do_move(vfu_iommu *t, bool guarded, void *dst, const void *src, size_t len, const void **bad)
{
    if (!guarded) {
        memmove(dst, src, len);
        return 0;
    }
    vfux_move move = {dst, src, len};
    *bad = NULL;
    return t->desc.guard(t->desc.ctx, vfux_move_body, &move, bad);
}

static char *vfux_host(vfux_node *n, uint64_t iova) { return (char *)n->base + (size_t)(iova - vfux_iova(n)); }

static void vfux_touch_body(void *arg) { (void)*(const volatile char *)arg; }

/* The first address of [iova, iova + len), which is guarded memory at host, that is gone; `bad` is one that could not be
 * touched, NULL if the guard could not say. memmove() may have begun at the end, so the pages below are tried; all of them if
 * `bad` is outside, since some machines give the start of its page and some emulators anything. */
static uint64_t vfux_locate(vfu_iommu *t, uint64_t iova, char *host, size_t len, const void *bad)
{
    uintptr_t offset = (uintptr_t)vfux_min(bad ? (uintptr_t)bad - (uintptr_t)host : UINTPTR_MAX, len - 1);
    size_t page = 0, next;
    const void *ignored;
    while ((next = page + (4096 - ((uintptr_t)host + page) % 4096)) <= offset) {
        if (t->desc.guard(t->desc.ctx, vfux_touch_body, host + page, &ignored))
            return iova + page;
        page = next;
    }
    return iova + page;
}

/* Does the job for `len` bytes at host memory; `done` bytes of it were done before. */
static int vfux_job_host(vfu_iommu *t, vfux_node *n, const vfux_job *job, uint64_t iova, size_t len, uint64_t done, uint64_t *at)
{
    char *host = vfux_host(n, iova);
    bool guarded = n->flags & VFU_IOMMU_GUARDED;
    const void *bad;
    int err = 0;
    if (job->in) {
        err = vfux_do_move(t, guarded, job->in + done, host, len, &bad);
    } else if (!job->phase_len) {
        err = vfux_do_move(t, guarded, host, job->out + done, len, &bad);
    } else {
        const char *pattern = job->out + (done & (job->phase_len - 1));
        for (size_t part, to = 0; to < len && !err; to += part) {
            part = len - to < VFUX_PATTERN ? len - to : VFUX_PATTERN; /* a multiple of the pattern's length, but for the last */
            err = vfux_do_move(t, guarded, host + to, pattern, part, &bad);
        }
    }
    if (err)
        *at = vfux_locate(t, iova, host, len, bad);
    return err;
}

/* Does the job for up to len bytes through the callbacks of n, which counts as pinned meanwhile; takes over the hazard.
 * Returns how many bytes, or the error. */
static int64_t vfux_job_io(vfu_iommu_reader *r, vfux_node *n, const vfux_job *job, uint64_t iova, size_t len, uint64_t done)
{
    int err;
    atomic_fetch_add(&n->pins, 1);
    vfux_let(r, 0);
    if (job->in) {
        err = n->io->read ? n->io->read(n->base, iova, job->in + done, len) : -ENOTSUP;
    } else {
        const char *from = job->phase_len ? job->out + (done & (job->phase_len - 1)) : job->out + done;
        if (job->phase_len && len > VFUX_PATTERN)
            len = VFUX_PATTERN;
        err = n->io->write ? n->io->write(n->base, iova, from, len) : -ENOTSUP;
        if (!err)
            vfu_iommu_dirty_mark(r->iommu, iova, len);
    }
    atomic_fetch_sub(&n->pins, 1);
    VFU_ASSERT(err <= 0);
    return err ? err : (int64_t)len;
}

/* Notes a write in the dirty log, if one runs. The caller holds the mapping. */
static inline void vfux_written(vfu_iommu *t, uint64_t iova, size_t len)
{
    vfux_log *log = atomic_load(&t->log);
    if (log)
        vfux_log_mark(log, iova, iova + (len - 1));
}

/* Does a job on a range that was checked: any number of mappings, of any kind. 0, or the error with where it happened. */
static int vfux_run_job(vfu_iommu_reader *r, uint64_t iova, uint64_t len, const vfux_job *job, uint64_t *at)
{
    int err = 0;
    for (uint64_t done = 0; !err && done < len;) {
        uint64_t here = iova + done;
        vfux_node *n = vfux_hold(r, 0, here);
        *at = here;
        if (!n) {
            err = -ENOENT;
        } else if ((n->prot & job->prot) != job->prot) {
            vfux_let(r, 0);
            err = -EACCES;
        } else {
            size_t part = (size_t)vfux_min(vfux_min(len - done, VFU_IOMMU_PIECE), vfux_last(n) - here + 1);
            if (n->io) {
                int64_t moved = vfux_job_io(r, n, job, here, part, done);
                err = moved < 0 ? (int)moved : 0;
                done += moved < 0 ? 0 : (uint64_t)moved;
                continue;
            }
            err = vfux_job_host(r->iommu, n, job, here, part, done, at);
            if (!job->in)
                vfux_written(r->iommu, here, part); /* after an error too: a prefix may have moved */
            vfux_let(r, 0);
            done += part;
        }
    }
    return err;
}

/* The general form of read, write and fill. */
static int vfux_do_job(vfu_iommu_reader *r, uint64_t iova, uint64_t len, const vfux_job *job)
{
    uint64_t at = iova;
    if (!len)
        return 0;
    int err = vfux_is_range(iova, len) ? vfux_scan(r, iova, len, job->prot, &at) : -EINVAL;
    if (!err)
        err = vfux_run_job(r, iova, len, job, &at);
    return err ? vfux_fault(r, at, job->prot, err) : 0;
}

/* Holds the mapping of iova in slot 0 and gives its host memory, if the translation cache knows the mapping, it has all of
 * [iova, iova + len), and a plain copy of one piece will do. NULL: the general form must look. What every access goes through:
 * nothing is read twice. */
static inline __attribute__((always_inline)) char *vfux_hold_direct(vfu_iommu_reader *r, uint64_t iova, size_t len, uint32_t prot)
{
    vfu_iommu *t = r->iommu;
    vfux_hint *hint = vfux_hint_of(t, iova);
    vfux_fetch(t, hint, iova);
    uint32_t i = vfux_get(&hint->node);
    vfux_node *n = &t->nodes[i];
    vfux_publish(r, 0, i);
    if (vfux_is_live(n)) {
        uint64_t first = vfux_iova(n), at = iova - first, above = vfux_last(n) - first;
        if (at <= above && len - 1 <= above - at && len - 1 < VFU_IOMMU_PIECE && n->direct & prot) /* not with len 0 */
            return (char *)n->base + (size_t)at;
    }
    vfux_let(r, 0);
    return NULL;
}

VFU_API int vfu_iommu_read(vfu_iommu_reader *r, uint64_t iova, void *dst, size_t len)
{
    const char *host = vfux_hold_direct(r, iova, len, VFU_IOMMU_READ);
    if (!host)
        return vfux_do_job(r, iova, len, &(vfux_job){.prot = VFU_IOMMU_READ, .in = dst});
    memcpy(dst, host, len);
    vfux_let(r, 0);
    return 0;
}

VFU_API int vfu_iommu_write(vfu_iommu_reader *r, uint64_t iova, const void *src, size_t len)
{
    char *host = vfux_hold_direct(r, iova, len, VFU_IOMMU_WRITE);
    if (!host)
        return vfux_do_job(r, iova, len, &(vfux_job){.prot = VFU_IOMMU_WRITE, .out = src});
    memcpy(host, src, len);
    vfux_written(r->iommu, iova, len);
    vfux_let(r, 0);
    return 0;
}

VFU_API int vfu_iommu_fill(vfu_iommu_reader *r, uint64_t iova, uint64_t len, const void *pattern, size_t pattern_len)
{
    char repeated[VFUX_PATTERN + 8];
    if (pattern_len > 8 || !vfux_is_power_of_two(pattern_len))
        return vfux_fault(r, iova, VFU_IOMMU_WRITE, -EINVAL);
    for (size_t i = 0; i < sizeof(repeated); i++)
        repeated[i] = ((const char *)pattern)[i % pattern_len];
    return vfux_do_job(r, iova, len, &(vfux_job){.prot = VFU_IOMMU_WRITE, .out = repeated, .phase_len = pattern_len});
}

/* Two ranges, and what of them is still to be copied. */
typedef struct vfux_copy {
    uint64_t dst, src, left;
    bool backwards; /* the destination overlaps the end of the source: start at the end, as memmove does */
} vfux_copy;

/* The next stretch of one side, which starts (or, backwards, ends) in mapping n, is at most this long. */
static uint64_t vfux_stretch(const vfux_copy *c, vfux_node *n, uint64_t iova)
{
    uint64_t more = c->backwards ? iova - vfux_iova(n) : vfux_last(n) - iova;
    return vfux_min(more, VFU_IOMMU_PIECE - 1) + 1;
}

/* Copies the next piece while both mappings are held. 0, or the error with where it happened and what was needed there. */
static int vfux_copy_piece(vfu_iommu_reader *r, vfux_copy *c, uint64_t *at, uint32_t *prot)
{
    uint64_t s = c->backwards ? c->src + (c->left - 1) : c->src, d = c->backwards ? c->dst + (c->left - 1) : c->dst;
    vfux_node *from, *to;
    for (;;) {
        *at = s;
        *prot = VFU_IOMMU_READ;
        from = vfux_hold(r, 0, s);
        if (!from)
            return -ENOENT;
        bool none;
        if ((to = vfux_hold_hint(r, 1, d)) != NULL || (to = vfux_hold_walk(r, 1, d, &none)) != NULL)
            break;
        vfux_let(r, 0); /* the lock is needed for a closer look, and no hazard may be held then */
        *at = d;
        *prot = VFU_IOMMU_WRITE;
        to = vfux_hold(r, 1, d);
        if (!to)
            return -ENOENT;
        vfux_let(r, 1);
    }
    uint64_t n = vfux_min(vfux_min(c->left, vfux_stretch(c, from, s)), vfux_stretch(c, to, d));
    bool io = from->io || to->io, readable = from->prot & VFU_IOMMU_READ, writable = to->prot & VFU_IOMMU_WRITE;
    if (io)
        n = vfux_min(n, VFUX_BOUNCE);
    s -= c->backwards ? n - 1 : 0;
    d -= c->backwards ? n - 1 : 0;
    int err = 0;
    if (!io && readable && writable) {
        const void *ignored;
        bool guarded = (from->flags | to->flags) & VFU_IOMMU_GUARDED;
        err = vfux_do_move(r->iommu, guarded, vfux_host(to, d), vfux_host(from, s), (size_t)n, &ignored);
        vfux_written(r->iommu, d, (size_t)n);
    }
    vfux_let(r, 1);
    vfux_let(r, 0);
    if (!err && !(readable && writable)) { /* it had both when it was checked: mapped anew by another thread */
        *at = readable ? d : s;
        *prot = readable ? VFU_IOMMU_WRITE : VFU_IOMMU_READ;
        err = -EACCES;
    }
    if (!err && io) {
        char bounce[VFUX_BOUNCE];
        *prot = VFU_IOMMU_READ;
        err = vfux_run_job(r, s, n, &(vfux_job){.prot = VFU_IOMMU_READ, .in = bounce}, at);
        if (!err) {
            *prot = VFU_IOMMU_WRITE;
            err = vfux_run_job(r, d, n, &(vfux_job){.prot = VFU_IOMMU_WRITE, .out = bounce}, at);
        }
    }
    c->left -= n;
    c->src += c->backwards ? 0 : n;
    c->dst += c->backwards ? 0 : n;
    return err;
}

/* Finds the first address of the range whose memory is gone, by touching each page. False: none is. */
static bool vfux_find_gone(vfu_iommu_reader *r, uint64_t iova, uint64_t len, uint64_t *at)
{
    bool found = false;
    vfux_node *n;
    for (uint64_t done = 0; done < len && !found && (n = vfux_hold(r, 0, iova + done));) {
        size_t part = (size_t)vfux_min(vfux_min(len - done, VFU_IOMMU_PIECE), vfux_last(n) - (iova + done) + 1);
        char *host = n->flags & VFU_IOMMU_GUARDED ? vfux_host(n, iova + done) : NULL;
        const void *ignored;
        for (size_t page = 0; host && page < part && !found; page += 4096 - ((uintptr_t)host + page) % 4096) {
            found = r->iommu->desc.guard(r->iommu->desc.ctx, vfux_touch_body, host + page, &ignored) != 0;
            *at = found ? iova + done + page : *at;
        }
        vfux_let(r, 0);
        done += part;
    }
    return found;
}

VFU_API int vfu_iommu_copy(vfu_iommu_reader *r, uint64_t dst, uint64_t src, uint64_t len)
{
    vfux_copy c = {.dst = dst, .src = src, .left = len, .backwards = dst > src && dst - src < len};
    uint64_t at = vfux_is_range(src, len) ? dst : src;
    uint32_t prot = vfux_is_range(src, len) ? VFU_IOMMU_WRITE : VFU_IOMMU_READ;
    if (!len)
        return 0;
    int err = vfux_is_range(src, len) && vfux_is_range(dst, len) ? 0 : -EINVAL;
    if (!err)
        err = vfux_scan(r, src, len, prot = VFU_IOMMU_READ, &at);
    if (!err)
        err = vfux_scan(r, dst, len, prot = VFU_IOMMU_WRITE, &at);
    while (!err && c.left)
        err = vfux_copy_piece(r, &c, &at, &prot);
    if (err == -EFAULT) /* whichever way the copy went: the first page that is gone */
        prot = vfux_find_gone(r, src, len, &at) || !vfux_find_gone(r, dst, len, &at) ? VFU_IOMMU_READ : VFU_IOMMU_WRITE;
    return err ? vfux_fault(r, at, prot, err) : 0;
}

typedef struct vfux_word {
    void *host;
    unsigned width;
    bool store, ordered;
    uint64_t value;
} vfux_word;

#define VFUX_TOUCH(word, type, order_in, order_out) \
    do { \
        _Atomic(type) *at = (word)->host; \
        if ((word)->store) \
            atomic_store_explicit(at, (type)(word)->value, (word)->ordered ? (order_out) : memory_order_relaxed); \
        else \
            (word)->value = atomic_load_explicit(at, (word)->ordered ? (order_in) : memory_order_relaxed); \
    } while (0)

static void vfux_word_body(void *arg)
{
    vfux_word *word = arg;
    switch (word->width) {
    case 1: VFUX_TOUCH(word, uint8_t, memory_order_acquire, memory_order_release); break;
    case 2: VFUX_TOUCH(word, uint16_t, memory_order_acquire, memory_order_release); break;
    case 4: VFUX_TOUCH(word, uint32_t, memory_order_acquire, memory_order_release); break;
#if ATOMIC_LLONG_LOCK_FREE == 2
    case 8: VFUX_TOUCH(word, uint64_t, memory_order_acquire, memory_order_release); break;
#endif
    }
}
#undef VFUX_TOUCH

/* The word as bytes, for memory behind callbacks. */
static int vfux_word_io(vfu_iommu_reader *r, uint64_t iova, vfux_word *word, uint32_t prot)
{
    uint8_t u8 = (uint8_t)word->value;
    uint16_t u16 = (uint16_t)word->value;
    uint32_t u32 = (uint32_t)word->value;
    void *narrow = word->width == 1 ? (void *)&u8 : word->width == 2 ? (void *)&u16 : (void *)&u32;
    void *bytes = word->width == 8 ? &word->value : narrow;
    vfux_job job = {.prot = prot};
    if (word->store)
        job.out = bytes;
    else
        job.in = bytes;
    int err = vfux_do_job(r, iova, word->width, &job);
    if (!err && !word->store && word->width < 8)
        word->value = word->width == 1 ? u8 : word->width == 2 ? u16 : u32;
    return err;
}

static int vfux_do_word(vfu_iommu_reader *r, uint64_t iova, vfux_word *word)
{
    uint32_t prot = word->store ? VFU_IOMMU_WRITE : VFU_IOMMU_READ;
    uint64_t at = iova;
    if (word->width > 8 || !vfux_is_power_of_two(word->width) || iova & (word->width - 1))
        return vfux_fault(r, at, prot, -EINVAL);
    if (word->width == 8 && ATOMIC_LLONG_LOCK_FREE != 2)
        return vfux_fault(r, at, prot, -ENOTSUP);
    vfux_node *n = vfux_hold(r, 0, iova);
    if (!n)
        return vfux_fault(r, at, prot, -ENOENT);
    bool io = n->io, split = word->width - 1 > vfux_last(n) - iova;
    bool allowed = n->prot & prot, guarded = n->flags & VFU_IOMMU_GUARDED;
    int err = 0;
    if (!io && !split && allowed) {
        const void *bad = NULL;
        word->host = vfux_host(n, iova);
        if ((uintptr_t)word->host & (word->width - 1))
            err = -EINVAL;
        else if (guarded)
            err = r->iommu->desc.guard(r->iommu->desc.ctx, vfux_word_body, word, &bad);
        else
            vfux_word_body(word);
        if (word->store && !err)
            vfux_written(r->iommu, iova, word->width);
    }
    vfux_let(r, 0);
    if (!err && !allowed)
        err = -EACCES;
    else if (!err && split && !(err = vfux_scan(r, iova, word->width, prot, &at)))
        return vfux_fault(r, iova, prot, -ENOTSUP); /* no single access reaches two mappings */
    else if (!err && io)
        return vfux_word_io(r, iova, word, prot);
    return err ? vfux_fault(r, at, prot, err) : 0;
}

VFU_API int vfu_iommu_load(vfu_iommu_reader *r, uint64_t iova, unsigned width, int order, uint64_t *value)
{
    vfux_word word = {.width = width, .ordered = order == VFU_IOMMU_ACQUIRE};
    if (order != VFU_IOMMU_RELAXED && order != VFU_IOMMU_ACQUIRE)
        return vfux_fault(r, iova, VFU_IOMMU_READ, -EINVAL);
    int err = vfux_do_word(r, iova, &word);
    if (!err)
        *value = word.value;
    return err;
}

VFU_API int vfu_iommu_store(vfu_iommu_reader *r, uint64_t iova, unsigned width, int order, uint64_t value)
{
    vfux_word word = {.width = width, .store = true, .ordered = order == VFU_IOMMU_RELEASE, .value = value};
    if (order != VFU_IOMMU_RELAXED && order != VFU_IOMMU_RELEASE)
        return vfux_fault(r, iova, VFU_IOMMU_WRITE, -EINVAL);
    return vfux_do_word(r, iova, &word);
}

/* ==== pin ================================================================================================================ */

/* Takes back one count of every mapping of [first, last]. They are in the tree: a mapping that is counted can't leave it. */
static void vfux_pin_uncount(vfu_iommu *t, uint64_t first, uint64_t last)
{
    for (uint32_t i = vfux_first_in(t, first, last); i; i = vfux_next_in(t, i, last))
        atomic_fetch_sub(&t->nodes[i].pins, 1);
}

static void vfux_pin_link(vfu_iommu *t, vfu_iommu_pin *pin)
{
    pin->iommu = t;
    pin->prev = NULL;
    pin->next = t->pins;
    if (t->pins)
        t->pins->prev = pin;
    t->pins = pin;
}

static void vfux_pin_unlink(vfu_iommu *t, vfu_iommu_pin *pin)
{
    if (pin->prev)
        pin->prev->next = pin->next;
    else
        t->pins = pin->next;
    if (pin->next)
        pin->next->prev = pin->prev;
    pin->iommu = NULL;
}

/* A pin of [first, last], which is in no list any more, is over. */
static void vfux_pin_release(vfu_iommu *t, uint64_t first, uint64_t last, uint32_t prot)
{
    vfux_log *log = atomic_load_explicit(&t->log, memory_order_relaxed);
    if (log && (prot & VFU_IOMMU_WRITE))
        vfux_log_mark(log, first, last);
    vfux_pin_uncount(t, first, last);
}

static bool vfux_pin_overlaps(const vfu_iommu_pin *pin, uint64_t first, uint64_t last)
{
    return pin->iova <= last && pin->last >= first;
}

/* Asks the holders of pins on [first, last], each once, to let go. */
static void vfux_pin_ask(vfu_iommu *t, uint64_t first, uint64_t last)
{
    for (vfu_iommu_pin *pin = t->pins, *next; pin; pin = next) {
        next = pin->next;
        if (pin->asked || !vfux_pin_overlaps(pin, first, last))
            continue;
        pin->asked = true;
        if (!pin->let_go)
            continue;
        /* When it agrees the pin is its holder's again, to be used or freed at once: nothing here touches it any more. */
        uint64_t pin_first = pin->iova, pin_last = pin->last;
        uint32_t prot = pin->prot;
        vfux_pin_unlink(t, pin);
        if (pin->let_go(pin, first, last - first + 1))
            vfux_pin_release(t, pin_first, pin_last, prot);
        else
            vfux_pin_link(t, pin);
    }
}

static void vfux_pin_ask_again(vfu_iommu *t, uint64_t first, uint64_t last)
{
    for (vfu_iommu_pin *pin = t->pins; pin; pin = pin->next)
        if (vfux_pin_overlaps(pin, first, last))
            pin->asked = false;
}

static uint64_t vfux_pin_oldest_ms(vfu_iommu *t, uint64_t first, uint64_t last, uint64_t now)
{
    uint64_t oldest = 0;
    for (vfu_iommu_pin *pin = t->pins; pin; pin = pin->next)
        if (vfux_pin_overlaps(pin, first, last))
            oldest = vfux_max(oldest, now - pin->since_ms);
    return oldest;
}

VFU_API int vfu_iommu_pin_take(vfu_iommu_reader *r, vfu_iommu_pin *pin, uint64_t iova, uint64_t len, uint32_t prot,
                               vfu_iommu_segment *segments, unsigned max)
{
    vfu_iommu *t = r->iommu;
    uint64_t last = iova + (len - 1), at = iova;
    unsigned count = 0;
    pin->iommu = NULL;
    int err = vfux_is_range(iova, len) && prot ? 0 : -EINVAL;
    while (!err) {
        vfux_node *n = vfux_hold(r, 0, at);
        if (!n) {
            err = -ENOENT;
            break;
        }
        uint64_t end = vfux_min(vfux_last(n), last);
        if ((n->prot & prot) != prot)
            err = -EACCES;
        else if (n->io || (n->flags & VFU_IOMMU_GUARDED))
            err = -ENOTSUP;
        else if (count >= max)
            err = -E2BIG;
        if (!err) {
            segments[count++] = (vfu_iommu_segment){.iova = at, .host = vfux_host(n, at), .len = (size_t)(end - at + 1)};
            atomic_fetch_add(&n->pins, 1);
        }
        vfux_let(r, 0);
        if (!err && end == last)
            break;
        at = err ? at : end + 1;
    }
    vfux_lock(t);
    if (err && count)
        vfux_pin_uncount(t, iova, at - 1);
    if (!err) {
        pin->iova = iova;
        pin->last = last;
        pin->prot = prot;
        pin->since_ms = vfux_clock_ms();
        pin->asked = false;
        vfux_pin_link(t, pin);
    }
    vfux_unlock(t);
    return err ? vfux_fault(r, at, prot, err) : (int)count;
}

VFU_API void vfu_iommu_pin_drop(vfu_iommu *t, vfu_iommu_pin *pin)
{
    vfux_lock(t);
    if (pin->iommu) {
        vfux_pin_unlink(t, pin);
        vfux_pin_release(t, pin->iova, pin->last, pin->prot);
    }
    vfux_unlock(t);
}

/* ==== dirty log ========================================================================================================== */

static uint64_t vfux_leaf_key(const vfux_log *log, uint64_t iova)
{
    unsigned shift = log->page_shift + VFUX_LEAF_SHIFT;
    return shift < 64 ? iova >> shift : 0;
}

static size_t vfux_leaf_hash(uint64_t key) { return (size_t)(key * UINT64_C(0x9E3779B97F4A7C15) >> 24); }

static vfux_leaf *vfux_leaf_find(vfux_log *log, uint64_t key)
{
    vfux_leaves *leaves = atomic_load_explicit(&log->leaves, memory_order_acquire);
    for (size_t h = vfux_leaf_hash(key);; h++) { /* ends: a quarter of the slots is empty */
        vfux_leaf *leaf = atomic_load_explicit(&leaves->slots[h & leaves->mask], memory_order_acquire);
        if (!leaf || leaf->key == key)
            return leaf;
    }
}

static void vfux_leaf_put(vfux_leaves *leaves, vfux_leaf *leaf)
{
    size_t h = vfux_leaf_hash(leaf->key);
    while (atomic_load_explicit(&leaves->slots[h & leaves->mask], memory_order_relaxed))
        h++;
    atomic_store_explicit(&leaves->slots[h & leaves->mask], leaf, memory_order_release);
}

static size_t vfux_leaves_size(size_t slots) { return sizeof(vfux_leaves) + slots * sizeof(_Atomic(vfux_leaf *)); }

static vfux_leaves *vfux_leaves_make(vfu_iommu *t, vfux_log *log, size_t slots)
{
    size_t size = vfux_leaves_size(slots);
    vfux_leaves *leaves = vfux_alloc(&t->desc, size);
    if (!leaves)
        return NULL;
    memset((void *)leaves, 0, size);
    leaves->mask = slots - 1;
    leaves->slots = (_Atomic(vfux_leaf *) *)(void *)(leaves + 1);
    log->bytes += size;
    return leaves;
}

static void vfux_leaves_free(vfu_iommu *t, vfux_log *log, vfux_leaves *leaves)
{
    size_t size = vfux_leaves_size(leaves->mask + 1);
    log->bytes -= size;
    vfux_release(&t->desc, (void *)leaves, size);
}

static bool vfux_log_is_full(vfu_iommu *t, const vfux_log *log, uint64_t more) { return log->bytes + more > t->desc.dirty_limit; }

static bool vfux_leaf_is_clean(vfux_leaf *leaf)
{
    uint32_t any = 0;
    for (unsigned w = 0; w < VFUX_LEAF_WORDS; w++)
        any |= atomic_load(&leaf->bits[w]);
    return !any;
}

/* Moves the leaves to a table of `slots`. Leaves that are clean and that neither a mapping reaches nor `keep` are dropped:
 * nobody can be writing to them. The old table is freed when no writer can be searching it. */
static int vfux_leaves_rebuild(vfu_iommu *t, vfux_log *log, size_t slots, const vfux_span *keep)
{
    vfux_leaves *old = atomic_load(&log->leaves), *leaves = vfux_leaves_make(t, log, slots);
    if (!leaves)
        return -ENOMEM;
    vfux_leaf *dropped = NULL;
    for (size_t h = 0; h <= old->mask; h++) {
        vfux_leaf *leaf = atomic_load(&old->slots[h]);
        unsigned shift = log->page_shift + VFUX_LEAF_SHIFT;
        if (!leaf)
            continue;
        uint64_t first = shift < 64 ? leaf->key << shift : 0;
        uint64_t last = shift < 64 ? first | ((UINT64_C(1) << shift) - 1) : UINT64_MAX;
        if ((first <= keep->last && last >= keep->first) || !vfux_leaf_is_clean(leaf) || vfux_first_in(t, first, last)) {
            vfux_leaf_put(leaves, leaf);
        } else { /* chained through its bits, which are all zero and stay unread */
            memcpy((void *)leaf->bits, &dropped, sizeof(dropped));
            dropped = leaf;
        }
    }
    atomic_store(&log->leaves, leaves);
    vfux_wait_for_all(t);
    while (dropped) {
        vfux_leaf *leaf = dropped;
        memcpy(&dropped, (void *)leaf->bits, sizeof(dropped));
        vfux_release(&t->desc, leaf, sizeof(*leaf));
        log->bytes -= sizeof(*leaf);
        log->leaf_count--;
    }
    vfux_leaves_free(t, log, old);
    return 0;
}

/* Adds the leaf with this key, for a mapping of `span`. When the limit or the table is full, leaves of the past are dropped. */
static int vfux_leaf_add(vfu_iommu *t, vfux_log *log, uint64_t key, const vfux_span *span)
{
    if (vfux_leaf_find(log, key))
        return 0;
    size_t slots = atomic_load(&log->leaves)->mask + 1;
    int err = 0;
    if (vfux_log_is_full(t, log, sizeof(vfux_leaf)) || (log->leaf_count + 1) * 4 > slots * 3)
        err = vfux_leaves_rebuild(t, log, slots, span);
    if (!err && (log->leaf_count + 1) * 4 > slots * 3)
        err = vfux_log_is_full(t, log, vfux_leaves_size(slots)) ? -ENOSPC : vfux_leaves_rebuild(t, log, slots * 2, span);
    if (!err && vfux_log_is_full(t, log, sizeof(vfux_leaf)))
        err = -ENOSPC;
    vfux_leaf *leaf = err ? NULL : vfux_alloc(&t->desc, sizeof(*leaf));
    if (!leaf)
        return err ? err : -ENOMEM;
    memset((void *)leaf, 0, sizeof(*leaf));
    leaf->key = key;
    log->bytes += sizeof(*leaf);
    log->leaf_count++;
    vfux_leaf_put(atomic_load(&log->leaves), leaf);
    return 0;
}

static uint64_t vfux_range_last(const vfu_iommu_range *range) { return range->iova + (range->size - 1); }

/* Makes sure that every page of [first, last] that is logged has its leaf. */
static int vfux_log_cover(vfu_iommu *t, vfux_log *log, uint64_t first, uint64_t last)
{
    vfux_span span = {first, last};
    int err = 0;
    for (size_t i = 0; i < log->range_count && !err; i++) {
        uint64_t from = vfux_max(first, log->ranges[i].iova), to = vfux_min(last, vfux_range_last(&log->ranges[i]));
        if (from > to)
            continue;
        uint64_t key = vfux_leaf_key(log, from), end = vfux_leaf_key(log, to);
        if (end - key > t->desc.dirty_limit >> 6) /* a leaf has more than 2^6 bytes: not even worth trying */
            return -ENOSPC;
        while (!(err = vfux_leaf_add(t, log, key, &span)) && key != end)
            key++;
    }
    return err;
}

/* Sets the bits of the pages of [first, last] that are in this leaf. Release: whoever fetches a bit sees the bytes that it
 * stands for. */
static void vfux_leaf_mark(const vfux_log *log, vfux_leaf *leaf, uint64_t first, uint64_t last)
{
    uint64_t low = leaf->key << VFUX_LEAF_SHIFT, high = low | ((1u << VFUX_LEAF_SHIFT) - 1);
    uint64_t page = vfux_max(first >> log->page_shift, low), end = vfux_min(last >> log->page_shift, high);
    for (uint64_t stop; page <= end; page = stop + 1) { /* pages are less than 2^64 - 1, or there is just page 0 */
        stop = vfux_min(end, page | 31);
        uint32_t count = (uint32_t)(stop - page + 1);
        uint32_t mask = (count == 32 ? UINT32_MAX : (UINT32_C(1) << count) - 1) << (page & 31);
        atomic_fetch_or_explicit(&leaf->bits[(page - low) / 32], mask, memory_order_release);
        if (stop == end)
            break;
    }
}

/* The same for every leaf that there is. A page without one is in no logged range, or was never mapped. */
static void vfux_log_mark(vfux_log *log, uint64_t first, uint64_t last)
{
    uint64_t key = vfux_leaf_key(log, first), end = vfux_leaf_key(log, last);
    vfux_leaves *leaves = atomic_load_explicit(&log->leaves, memory_order_acquire);
    if (end - key <= leaves->mask) {
        for (; key <= end; key++) {
            vfux_leaf *leaf = vfux_leaf_find(log, key);
            if (leaf)
                vfux_leaf_mark(log, leaf, first, last);
        }
        return;
    }
    for (size_t h = 0; h <= leaves->mask; h++) {
        vfux_leaf *leaf = atomic_load_explicit(&leaves->slots[h], memory_order_acquire);
        if (leaf && leaf->key >= key && leaf->key <= end)
            vfux_leaf_mark(log, leaf, first, last);
    }
}

static void vfux_log_free(vfu_iommu *t, vfux_log *log)
{
    vfux_leaves *leaves = atomic_load(&log->leaves);
    for (size_t h = 0; leaves && h <= leaves->mask; h++) {
        vfux_leaf *leaf = atomic_load(&leaves->slots[h]);
        if (leaf)
            vfux_release(&t->desc, (void *)leaf, sizeof(*leaf));
    }
    if (leaves)
        vfux_leaves_free(t, log, leaves);
    vfux_release(&t->desc, log->ranges, log->range_capacity * sizeof(*log->ranges));
    vfux_release(&t->desc, log, sizeof(*log));
}

/* Sorts the ranges and joins those that overlap or touch, in place. Returns how many are left. */
static size_t vfux_ranges_join(vfu_iommu_range *ranges, size_t count)
{
    for (size_t gap = count / 2; gap; gap /= 2) { /* Shell sort: no recursion, no more memory */
        for (size_t i = gap; i < count; i++) {
            vfu_iommu_range moving = ranges[i];
            size_t to = i;
            for (; to >= gap && ranges[to - gap].iova > moving.iova; to -= gap)
                ranges[to] = ranges[to - gap];
            ranges[to] = moving;
        }
    }
    size_t kept = 0;
    for (size_t i = 1; i < count; i++) {
        uint64_t last = vfux_range_last(&ranges[kept]);
        if (last == UINT64_MAX || ranges[i].iova <= last + 1)
            ranges[kept].size = vfux_max(last, vfux_range_last(&ranges[i])) - ranges[kept].iova + 1;
        else
            ranges[++kept] = ranges[i];
    }
    return kept + 1;
}

VFU_API int vfu_iommu_dirty_start(vfu_iommu *t, uint64_t page_size, const vfu_iommu_range *ranges, size_t count)
{
    if (!vfux_is_power_of_two(page_size) || count > SIZE_MAX / sizeof(*ranges))
        return -EINVAL;
    for (size_t i = 0; i < count; i++)
        if (!vfux_is_range(ranges[i].iova, ranges[i].size))
            return -EINVAL;
#if !__STDC_HOSTED__
    if (!t->desc.alloc.alloc)
        return -ENOMEM;
#endif
    vfux_lock(t);
    vfux_log *log = NULL;
    int err = atomic_load(&t->log) ? -EBUSY : 0;
    if (!err && !(log = vfux_alloc(&t->desc, sizeof(*log))))
        err = -ENOMEM;
    if (!err) {
        memset((void *)log, 0, sizeof(*log));
        log->page_shift = vfux_log2(page_size);
        log->range_capacity = count ? count : 1;
        log->bytes = sizeof(*log) + log->range_capacity * sizeof(*ranges);
        log->ranges = vfux_alloc(&t->desc, log->range_capacity * sizeof(*ranges));
        vfux_leaves *leaves = vfux_leaves_make(t, log, 64);
        atomic_store(&log->leaves, leaves);
        err = !log->ranges || !leaves ? -ENOMEM : vfux_log_is_full(t, log, 0) ? -ENOSPC : 0;
    }
    if (!err) {
        if (count)
            memcpy(log->ranges, ranges, count * sizeof(*ranges));
        else
            log->ranges[0] = (vfu_iommu_range){0}; /* size 0: its last is 2^64 - 1 */
        log->range_count = vfux_ranges_join(log->ranges, log->range_capacity);
        for (uint32_t i = vfux_from(t, 0); i && !err; i = vfux_next_in(t, i, UINT64_MAX))
            err = vfux_log_cover(t, log, vfux_iova(&t->nodes[i]), vfux_last(&t->nodes[i]));
    }
    if (!err) {
        atomic_store(&t->log, log);
        vfux_wait_for_all(t); /* a write that did not see the log is over before this returns */
    } else if (log) {
        vfux_log_free(t, log);
    }
    vfux_unlock(t);
    return err;
}

VFU_API int vfu_iommu_dirty_stop(vfu_iommu *t)
{
    vfux_lock(t);
    vfux_log *log = atomic_load(&t->log);
    if (log) {
        atomic_store(&t->log, NULL);
        vfux_wait_for_all(t);
        vfux_log_free(t, log);
    }
    vfux_unlock(t);
    return log ? 0 : -EINVAL;
}

VFU_API void vfu_iommu_dirty_mark(vfu_iommu *t, uint64_t iova, uint64_t size)
{
    if (!vfux_is_range(iova, size))
        return;
    vfux_lock(t);
    vfux_log *log = atomic_load_explicit(&t->log, memory_order_relaxed);
    if (log)
        vfux_log_mark(log, iova, iova + (size - 1));
    vfux_unlock(t);
}

/* A report in the making. */
typedef struct vfux_report {
    vfux_log *log;
    uint64_t first, last;
    unsigned page_shift;
    uint64_t *bitmap;
} vfux_report;

/* Sets the bits of [first, last], as far as it is in the report's range and logged. */
static void vfux_report_add(const vfux_report *r, uint64_t first, uint64_t last)
{
    for (size_t i = 0; i < r->log->range_count; i++) {
        uint64_t from = vfux_max(vfux_max(first, r->first), r->log->ranges[i].iova);
        uint64_t to = vfux_min(vfux_min(last, r->last), vfux_range_last(&r->log->ranges[i]));
        if (from > to)
            continue;
        uint64_t page = (from - r->first) >> r->page_shift, end = (to - r->first) >> r->page_shift;
        for (; page <= end; page++)
            r->bitmap[page / 64] |= UINT64_C(1) << page % 64;
    }
}

static void vfux_report_leaf(const vfux_report *r, vfux_leaf *leaf)
{
    const vfux_log *log = r->log;
    uint64_t low = log->ranges[0].iova, high = vfux_range_last(&log->ranges[log->range_count - 1]);
    for (unsigned w = 0; w < VFUX_LEAF_WORDS; w++) {
        uint32_t set = atomic_load_explicit(&leaf->bits[w], memory_order_relaxed), whole = 0;
        for (unsigned b = 0; b < 32 && set >> b; b++) {
            uint64_t first = ((leaf->key << VFUX_LEAF_SHIFT) + w * 32 + b) << log->page_shift;
            uint64_t last = first | ((UINT64_C(1) << log->page_shift) - 1);
            if (vfux_max(first, low) >= r->first && vfux_min(last, high) <= r->last)
                whole |= UINT32_C(1) << b;
        }
        if (!set)
            continue;
        /* Acquire, before anything is reported: the bytes that were noted are visible to whoever sees the report. */
        atomic_fetch_and_explicit(&leaf->bits[w], ~(set & whole), memory_order_acq_rel);
        for (unsigned b = 0; b < 32; b++) {
            uint64_t first = ((leaf->key << VFUX_LEAF_SHIFT) + w * 32 + b) << log->page_shift;
            if (set >> b & 1)
                vfux_report_add(r, first, first | ((UINT64_C(1) << log->page_shift) - 1));
        }
    }
}

VFU_API int vfu_iommu_dirty_report(vfu_iommu *t, uint64_t iova, uint64_t size, uint64_t page_size, uint64_t *bitmap, size_t words)
{
    if (!vfux_is_range(iova, size) || !vfux_is_power_of_two(page_size))
        return -EINVAL;
    vfux_report report = {.first = iova, .last = iova + (size - 1), .page_shift = vfux_log2(page_size), .bitmap = bitmap};
    uint64_t needed = ((size - 1) >> report.page_shift) / 64 + 1;
    if (needed > words)
        return -EINVAL;
    vfux_lock(t);
    vfux_log *log = report.log = atomic_load(&t->log);
    if (log) {
        memset(bitmap, 0, (size_t)needed * sizeof(*bitmap));
        vfux_leaves *leaves = atomic_load(&log->leaves);
        uint64_t key = vfux_leaf_key(log, report.first), end = vfux_leaf_key(log, report.last);
        if (end - key < leaves->mask) {
            for (; key <= end; key++) {
                vfux_leaf *leaf = vfux_leaf_find(log, key);
                if (leaf)
                    vfux_report_leaf(&report, leaf);
            }
        } else {
            for (size_t h = 0; h <= leaves->mask; h++) {
                vfux_leaf *leaf = atomic_load(&leaves->slots[h]);
                if (leaf && leaf->key >= key && leaf->key <= end)
                    vfux_report_leaf(&report, leaf);
            }
        }
        uint64_t page_mask = (UINT64_C(1) << log->page_shift) - 1;
        for (vfu_iommu_pin *pin = t->pins; pin; pin = pin->next)
            if (pin->prot & VFU_IOMMU_WRITE)
                vfux_report_add(&report, pin->iova & ~page_mask, pin->last | page_mask);
    }
    vfux_unlock(t);
    return log ? 0 : -EINVAL;
}

/* ==== iterate ============================================================================================================ */

VFU_API int vfu_iommu_next(vfu_iommu *t, uint64_t iova, vfu_iommu_mapping *out)
{
    vfux_lock(t);
    uint32_t i = vfux_from(t, iova);
    if (i)
        vfux_describe(&t->nodes[i], out);
    vfux_unlock(t);
    return i != 0;
}

VFU_API void vfu_iommu_get_stats(vfu_iommu *t, vfu_iommu_stats *out)
{
    vfux_lock(t);
    vfux_log *log = atomic_load(&t->log);
    *out = (vfu_iommu_stats){
        .mappings = t->mappings,
        .bytes = t->bytes,
        .maps = t->maps,
        .unmaps = t->unmaps,
        .walks = t->closed_walks,
        .faults = t->closed_faults,
        .waits = t->waits,
        .dirty_size = log ? log->bytes : 0,
    };
    for (uint32_t r = 0; r < t->reader_count; r++) {
        out->walks += atomic_load_explicit(&t->readers[r].walks, memory_order_relaxed);
        out->faults += atomic_load_explicit(&t->readers[r].faults, memory_order_relaxed);
    }
    for (vfu_iommu_pin *pin = t->pins; pin; pin = pin->next)
        out->pins++;
    vfux_unlock(t);
}

VFU_API unsigned vfu_iommu_get_faults(vfu_iommu *t, vfu_iommu_fault *out, unsigned max)
{
    vfux_fault_lock(t);
    unsigned count = (unsigned)vfux_min(vfux_min(t->fault_count, VFUX_FAULTS), max);
    for (unsigned i = 0; i < count; i++)
        out[i] = t->fault_log[(t->fault_count - 1 - i) % VFUX_FAULTS];
    vfux_fault_unlock(t);
    return count;
}

/* ==== check ============================================================================================================== */

/* A subtree: all of it between two neighbours, heights right, balanced. Counts nodes and bytes. */
static bool vfux_check_subtree(vfu_iommu *t, uint32_t i, unsigned depth, uint64_t *count, uint64_t *bytes)
{
    if (!i)
        return true;
    if (i >= t->fresh || depth >= VFUX_DEPTH || *count > t->mappings)
        return false;
    vfux_node *n = &t->nodes[i];
    uint32_t left = vfux_get(&n->left), right = vfux_get(&n->right);
    if (left >= t->fresh || right >= t->fresh)
        return false;
    unsigned lh = vfux_height(t, left), rh = vfux_height(t, right);
    ++*count;
    *bytes += vfux_last(n) - vfux_iova(n) + 1;
    return !vfux_is_state(n, VFUX_FREE) && vfux_iova(n) <= vfux_last(n) && n->height == 1 + (lh > rh ? lh : rh) && lh <= rh + 1 &&
           rh <= lh + 1 && vfux_check_subtree(t, left, depth + 1, count, bytes) &&
           vfux_check_subtree(t, right, depth + 1, count, bytes);
}

VFU_API int vfu_iommu_check(vfu_iommu *t)
{
    vfux_lock(t);
    uint64_t count = 0, bytes = 0, in_order = 0, unused = 0;
    bool good = vfux_check_subtree(t, vfux_get(&t->root), 0, &count, &bytes) && count == t->mappings && bytes == t->bytes;
    for (uint32_t i = good ? vfux_from(t, 0) : 0; i && in_order <= count; in_order++) {
        uint32_t next = vfux_next_in(t, i, UINT64_MAX);
        good = good && (!next || vfux_iova(&t->nodes[next]) > vfux_last(&t->nodes[i]));
        good = good && !vfux_is_unaligned(t, vfux_iova(&t->nodes[i]), 0);
        i = next;
    }
    for (uint32_t i = t->free_list; good && i && unused <= t->node_count; unused++) {
        good = i < t->fresh && vfux_is_state(&t->nodes[i], VFUX_FREE) && !atomic_load(&t->nodes[i].pins);
        i = good ? t->nodes[i].next : 0;
    }
    good = good && in_order == count && count + unused + 1 <= t->fresh && t->maps - t->unmaps == t->mappings;
    vfux_unlock(t);
    return good ? 0 : -EBADMSG;
}

#endif /* VFU_IOMMU_IMPLEMENTATION */

/*
 * MIT License
 *
 * Copyright (c) 2026 The vfu authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
 * files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
 * modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the
 * Software is furnished to do so, subject to the following conditions:
 *
 * The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
 * Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
 * WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
 * COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
 * ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 */
