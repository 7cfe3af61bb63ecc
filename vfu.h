/* SPDX-License-Identifier: MIT */
/*
 * vfu.h - the vfio-user protocol: PCI devices in processes of their own
 *
 * WHAT IT IS
 *
 * With this header a C program becomes a PCI device that QEMU, or any other vfio-user client, uses over a UNIX socket; or it
 * becomes such a client. The device says what it is in a descriptor and implements a few callbacks. The library does the rest:
 * protocol, descriptor passing, configuration space, interrupts, and the guest's memory, every access to which is validated by
 * the IOMMU of vfu_iommu.h.
 *
 * It implements the vfio-user protocol 0.0 as QEMU documents it in docs/interop/vfio-user.rst ("the specification" below).
 *
 * HOW TO INCLUDE IT
 *
 *     #define VFU_IMPLEMENTATION            // in exactly one C file of the program
 *     #include "vfu.h"
 *
 * In that file include it before any system header, or compile it with -D_GNU_SOURCE. Everywhere else include it plainly.
 * vfu_iommu.h has to be beside it; its implementation comes along. The declarations compile as C11, C17 and C++17; the
 * implementation is C11 and needs the C library of Linux alone (with -pthread where that is no part of it).
 *
 *     macro                   must be the same in all files   effect
 *     VFU_IMPLEMENTATION      no, in one file                 emits the implementation
 *     VFU_STATIC              no                              makes every function static to that file
 *     VFU_CODEC_ONLY          no                              wire, capabilities and codec alone: no sockets, no IOMMU, nothing
 *                                                             of libc but memcpy, memmove, memset, memcmp and strlen. Errors
 *                                                             are Linux's numbers: include no other system's <errno.h> before
 *     VFU_API                 yes                             what stands in front of each function's declaration
 *     VFU_ASSERT(condition)   no                              what happens on a caller's mistake; default: assert(). A peer can
 *                                                             never reach one
 *
 * None of them changes the layout of a type.
 *
 * QUICK START: a device with one 4 KiB register BAR
 *
 *     static int read_bar(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len) { ... return 0; }
 *
 *     vfu_dev_desc desc = {
 *         .pci = {.vendor = 0x1234, .device = 0x0001, .class_code = 0xff0000, .bar = {{.size = 4096}}},
 *         .callbacks = {.region_read = read_bar},
 *     };
 *     vfu_dev *dev;
 *     if (vfu_dev_create(&dev, &desc) == 0 && vfu_dev_listen(dev, "/tmp/device.sock") == 0)
 *         vfu_dev_run(dev);
 *     vfu_dev_destroy(dev);
 *
 * CONTENTS (the same words in the declarations, the implementation and the tests)
 *
 *     wire           numbers, flags and structs of the protocol
 *     capabilities   the JSON of VERSION
 *     codec          from bytes to checked messages and back
 *     transport      frames and descriptors over a socket
 *     PCI            configuration space
 *     device         the server's end
 *     client         the client's end
 *
 * Data flows one way: transport -> codec -> endpoint -> callbacks, and a section uses only sections above it.
 *
 * RETURNS
 *
 * 0 or a count, or a negative errno; errno is never touched. -EINVAL is a caller's mistake, -EBADMSG a broken peer. A function
 * that fails has changed nothing unless it says otherwise.
 *
 * OWNERSHIP, IN FOUR WORDS
 *
 * borrows: uses it during the call (or as long as is said), leaves it alone otherwise. takes: owns it from now on, also when
 * the call fails. gives: the caller owns it from now on. copies: keeps nothing of what was passed.
 *
 * THREADS
 *
 * Functions of the codec are pure. Everything else belongs to one thread at a time per object, unless it says otherwise.
 * Objects share nothing: many devices and clients fit in one thread or in many. Once memory that can shrink is mapped, a
 * handler for SIGBUS is installed in the process; it passes on what isn't ours.
 */
#if defined(VFU_IMPLEMENTATION) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sockets and clocks under -std=c11; takes effect when this header comes first */
#endif

#ifndef VFU_CODEC_ONLY
#include "vfu_iommu.h"
#endif

#ifndef VFU_H
#define VFU_H

#include <limits.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VFU_VERSION "0.1.0"

#ifndef VFU_API
#ifdef VFU_STATIC
#define VFU_API static __attribute__((unused))
#else
#define VFU_API extern
#endif
#endif

/*
 * ==== wire =================================================================================================================
 *
 * The bytes of the protocol: numbers, flags, and one struct for each payload. Every struct has exactly the layout of the
 * specification on every machine: explicit widths, explicit padding, no packed attribute, no flexible array, no bit-field;
 * sizes and offsets are asserted below. All fields are in the byte order of the host (specification, "Protocol
 * Specification").
 *
 * Nothing on a socket is aligned, so a wire struct is never pointed into a buffer: memcpy to and from it, or let the codec
 * section do that. Offsets in the comments count from the end of the 16-byte header, as in the specification. C->S is client to
 * server.
 *
 * argsz means something else in almost every message, hence it is said on each field:
 *   - in most requests it is the largest reply payload that the client can take, and says nothing about the request's own size;
 *   - in DMA_MAP and SET_IRQS it is the size of the request's own payload, since their replies have none;
 *   - in a reply it is the size that the whole payload needs. A reply that would be larger than the request's argsz is cut to its
 *     fixed part and announces the size; the client asks again. Real clients and servers set it carelessly, so nothing here
 *     relies on it to bound a read: the size field of the header does that.
 */

#ifdef __cplusplus
#define VFUX_STATIC_ASSERT(condition, text) static_assert(condition, text)
#else
#define VFUX_STATIC_ASSERT(condition, text) _Static_assert(condition, text)
#endif
#define VFUX_WIRE_SIZE(type, bytes)      VFUX_STATIC_ASSERT(sizeof(type) == (bytes), #type " has the wrong size")
#define VFUX_WIRE_AT(type, field, bytes) VFUX_STATIC_ASSERT(offsetof(type, field) == (bytes), #type "." #field " is misplaced")

/*
 * Commands, named as in the specification; comments leave DEVICE_ away. 14 was DIRTY_PAGES in drafts of the protocol; the
 * specification has no such command and neither has the codec.
 */
typedef enum vfu_cmd {
    VFU_CMD_VERSION = 1,                  /* C->S */
    VFU_CMD_DMA_MAP = 2,                  /* C->S */
    VFU_CMD_DMA_UNMAP = 3,                /* C->S */
    VFU_CMD_DEVICE_GET_INFO = 4,          /* C->S */
    VFU_CMD_DEVICE_GET_REGION_INFO = 5,   /* C->S */
    VFU_CMD_DEVICE_GET_REGION_IO_FDS = 6, /* C->S */
    VFU_CMD_DEVICE_GET_IRQ_INFO = 7,      /* C->S */
    VFU_CMD_DEVICE_SET_IRQS = 8,          /* C->S */
    VFU_CMD_REGION_READ = 9,              /* C->S */
    VFU_CMD_REGION_WRITE = 10,            /* C->S */
    VFU_CMD_DMA_READ = 11,                /* S->C */
    VFU_CMD_DMA_WRITE = 12,               /* S->C */
    VFU_CMD_DEVICE_RESET = 13,            /* C->S */
    VFU_CMD_REGION_WRITE_MULTI = 15,      /* C->S */
    VFU_CMD_DEVICE_FEATURE = 16,          /* C->S */
    VFU_CMD_MIG_DATA_READ = 17,           /* C->S */
    VFU_CMD_MIG_DATA_WRITE = 18           /* C->S */
} vfu_cmd;

/* Header flags. Bits 0 to 3 are a number, the type: 0 is a command, 1 a reply, everything else is undefined. */
#define VFU_HDR_TYPE_MASK 0x0fu
#define VFU_HDR_COMMAND   0x00u
#define VFU_HDR_REPLY     0x01u
#define VFU_HDR_NO_REPLY  0x10u /* in a command: must not be answered, not even with an error */
#define VFU_HDR_ERROR     0x20u /* in a reply: the command failed, nothing follows the header */
#define VFU_HDR_SIZE      16u

/* DMA_MAP flags. Drafts of the protocol had bit 2 for "mappable"; today the presence of a descriptor says so. */
#define VFU_DMA_READABLE  0x1u
#define VFU_DMA_WRITEABLE 0x2u

/* DMA_UNMAP flags, as in linux/vfio.h; the specification's text names none. */
#define VFU_DMA_UNMAP_GET_DIRTY_BITMAP 0x1u /* older peers: a bitmap follows the struct, see vfu_wire_dma_unmap */
#define VFU_DMA_UNMAP_ALL              0x2u /* QEMU, with address and size 0, for a section of 2^64 bytes */

/* GET_INFO flags */
#define VFU_DEVICE_INFO_RESET 0x1u
#define VFU_DEVICE_INFO_PCI   0x2u

/* GET_REGION_INFO flags */
#define VFU_REGION_INFO_READ  0x1u
#define VFU_REGION_INFO_WRITE 0x2u
#define VFU_REGION_INFO_MMAP  0x4u /* exactly one descriptor travels with the reply */
#define VFU_REGION_INFO_CAPS  0x8u /* a capability chain starts at cap_offset */

/* Region capability identities */
#define VFU_REGION_CAP_SPARSE_MMAP 1u
#define VFU_REGION_CAP_TYPE        2u

/* Kinds of sub-region in GET_REGION_IO_FDS. libvfio-user knows a third one, 2, a shadow ioeventfd, that is not specified. */
#define VFU_IO_FD_IOEVENTFD  0u
#define VFU_IO_FD_IOREGIONFD 1u

/* GET_IRQ_INFO flags */
#define VFU_IRQ_INFO_EVENTFD    0x1u
#define VFU_IRQ_INFO_MASKABLE   0x2u
#define VFU_IRQ_INFO_AUTOMASKED 0x4u
#define VFU_IRQ_INFO_NORESIZE   0x8u

/* SET_IRQS flags: one of the DATA bits with one of the ACTION bits */
#define VFU_IRQ_SET_DATA_NONE      0x01u
#define VFU_IRQ_SET_DATA_BOOL      0x02u
#define VFU_IRQ_SET_DATA_EVENTFD   0x04u
#define VFU_IRQ_SET_ACTION_MASK    0x08u
#define VFU_IRQ_SET_ACTION_UNMASK  0x10u
#define VFU_IRQ_SET_ACTION_TRIGGER 0x20u
#define VFU_IRQ_SET_DATA_BITS      0x07u
#define VFU_IRQ_SET_ACTION_BITS    0x38u

/* FEATURE: the low 16 bits of flags are an index, the rest says what to do with it */
#define VFU_FEATURE_INDEX_MASK 0x0000ffffu
#define VFU_FEATURE_GET        0x00010000u
#define VFU_FEATURE_SET        0x00020000u
#define VFU_FEATURE_PROBE      0x00040000u

typedef enum vfu_feature_index {
    VFU_FEATURE_MIGRATION = 1,     /* vfu_wire_feature_migration */
    VFU_FEATURE_MIG_STATE = 2,     /* vfu_wire_feature_mig_state */
    VFU_FEATURE_LOGGING_START = 6, /* vfu_wire_feature_log_control and its ranges */
    VFU_FEATURE_LOGGING_STOP = 7,  /* no payload */
    VFU_FEATURE_LOGGING_REPORT = 8 /* vfu_wire_feature_log_report, in the reply followed by the bitmap */
} vfu_feature_index;

/* vfu_wire_feature_migration.flags */
#define VFU_MIG_STOP_COPY 0x1u
#define VFU_MIG_P2P       0x2u
#define VFU_MIG_PRE_COPY  0x4u

typedef enum vfu_mig_state {
    VFU_MIG_STATE_ERROR = 0,
    VFU_MIG_STATE_STOP = 1,
    VFU_MIG_STATE_RUNNING = 2,
    VFU_MIG_STATE_STOP_COPY = 3,
    VFU_MIG_STATE_RESUMING = 4,
    VFU_MIG_STATE_RUNNING_P2P = 5, /* not used in vfio-user */
    VFU_MIG_STATE_PRE_COPY = 6,
    VFU_MIG_STATE_PRE_COPY_P2P = 7 /* not used in vfio-user */
} vfu_mig_state;

/* Region indexes of a PCI device; a device's own regions start at VFU_PCI_NUM_REGIONS. */
typedef enum vfu_pci_region {
    VFU_PCI_REGION_BAR0 = 0,
    VFU_PCI_REGION_BAR1 = 1,
    VFU_PCI_REGION_BAR2 = 2,
    VFU_PCI_REGION_BAR3 = 3,
    VFU_PCI_REGION_BAR4 = 4,
    VFU_PCI_REGION_BAR5 = 5,
    VFU_PCI_REGION_ROM = 6,
    VFU_PCI_REGION_CONFIG = 7,
    VFU_PCI_REGION_VGA = 8,
    VFU_PCI_NUM_REGIONS = 9
} vfu_pci_region;

/* Interrupt indexes of a PCI device */
typedef enum vfu_pci_irq {
    VFU_PCI_IRQ_INTX = 0,
    VFU_PCI_IRQ_MSI = 1,
    VFU_PCI_IRQ_MSIX = 2,
    VFU_PCI_IRQ_ERR = 3,
    VFU_PCI_IRQ_REQ = 4,
    VFU_PCI_NUM_IRQS = 5
} vfu_pci_irq;

/* In front of every message, both directions (specification, "Header"). The only offsets that count from the message's
 * start. */
typedef struct vfu_wire_header {
    uint16_t id;    /* 0: the sender's own number, echoed in the reply. Not unique: SPDK's client always sends 0, and Cloud
                          Hypervisor repeats GET_REGION_INFO with the same one. */
    uint16_t cmd;   /* 2: vfu_cmd, the same in the reply */
    uint32_t size;  /* 4: of the whole message, these 16 bytes included */
    uint32_t flags; /* 8: VFU_HDR_* */
    uint32_t error; /* 12: a Linux errno value in an error reply, possibly 0 even there; reserved in a command */
} vfu_wire_header;
VFUX_WIRE_SIZE(vfu_wire_header, 16);
VFUX_WIRE_AT(vfu_wire_header, cmd, 2);
VFUX_WIRE_AT(vfu_wire_header, size, 4);
VFUX_WIRE_AT(vfu_wire_header, flags, 8);
VFUX_WIRE_AT(vfu_wire_header, error, 12);

/*
 * VERSION, C->S and its reply; the first message of a connection. Version data follows at 4: JSON text (capabilities section)
 * with its terminating NUL, or nothing (SPDK's client). QEMU breaks when the reply is larger than its request: keep the whole
 * reply at or below 200 bytes. Cloud Hypervisor needs JSON with a "capabilities" object. With twin_socket the reply carries one
 * socket.
 */
typedef struct vfu_wire_version {
    uint16_t major; /* 0: 0 today; the reply must repeat it */
    uint16_t minor; /* 2: in the reply at most what was proposed. QEMU proposes 0 and refuses more. */
} vfu_wire_version;
VFUX_WIRE_SIZE(vfu_wire_version, 4);
VFUX_WIRE_AT(vfu_wire_version, minor, 2);

/*
 * DMA_MAP, C->S. The reply has no payload. One descriptor travels along if the server may mmap() the memory, none if only
 * DMA_READ and DMA_WRITE reach it (QEMU: ROMs, RAM without share=on). QEMU sends one descriptor with every map, mostly of one
 * and the same file.
 */
typedef struct vfu_wire_dma_map {
    uint32_t argsz;   /* 0: size of this struct, 32 */
    uint32_t flags;   /* 4: VFU_DMA_READABLE, VFU_DMA_WRITEABLE */
    uint64_t offset;  /* 8: into the descriptor's file; 0 without one */
    uint64_t address; /* 16: IOVA; QEMU's mappings may end exactly at 2^64 */
    uint64_t size;    /* 24: in bytes */
} vfu_wire_dma_map;
VFUX_WIRE_SIZE(vfu_wire_dma_map, 32);
VFUX_WIRE_AT(vfu_wire_dma_map, flags, 4);
VFUX_WIRE_AT(vfu_wire_dma_map, offset, 8);
VFUX_WIRE_AT(vfu_wire_dma_map, address, 16);
VFUX_WIRE_AT(vfu_wire_dma_map, size, 24);

/*
 * DMA_UNMAP, C->S; the reply repeats the struct (Cloud Hypervisor reads 40 bytes, header included, whatever happens). No
 * descriptor, though SPDK's client attaches one. With a guest vIOMMU QEMU unmaps large ranges that cover many mappings or none.
 * Older peers: with VFU_DMA_UNMAP_GET_DIRTY_BITMAP two 64-bit words follow, page size and bitmap size, and in the reply the
 * bitmap.
 */
typedef struct vfu_wire_dma_unmap {
    uint32_t argsz;   /* 0: request: largest reply payload; reply: size of the reply payload */
    uint32_t flags;   /* 4: VFU_DMA_UNMAP_* */
    uint64_t address; /* 8: IOVA */
    uint64_t size;    /* 16: in bytes */
} vfu_wire_dma_unmap;
VFUX_WIRE_SIZE(vfu_wire_dma_unmap, 24);
VFUX_WIRE_AT(vfu_wire_dma_unmap, flags, 4);
VFUX_WIRE_AT(vfu_wire_dma_unmap, address, 8);
VFUX_WIRE_AT(vfu_wire_dma_unmap, size, 16);

/* GET_INFO, C->S and its reply. No descriptors. linux/vfio.h appends a cap_offset that vfio-user doesn't have. */
typedef struct vfu_wire_device_info {
    uint32_t argsz;       /* 0: request: largest reply payload; reply: 16 */
    uint32_t flags;       /* 4: reply: VFU_DEVICE_INFO_*. Cloud Hypervisor reads RESET the wrong way round. */
    uint32_t num_regions; /* 8: reply. QEMU takes 8 to 100, libvfio-user's sample client exactly 9. */
    uint32_t num_irqs;    /* 12: reply: number of interrupt indexes. QEMU takes at most 50 and asks for ERR and REQ. */
} vfu_wire_device_info;
VFUX_WIRE_SIZE(vfu_wire_device_info, 16);
VFUX_WIRE_AT(vfu_wire_device_info, flags, 4);
VFUX_WIRE_AT(vfu_wire_device_info, num_regions, 8);
VFUX_WIRE_AT(vfu_wire_device_info, num_irqs, 12);

/*
 * GET_REGION_INFO, C->S and its reply; capabilities follow in the reply. One descriptor travels with a reply that has
 * VFU_REGION_INFO_MMAP and isn't cut; Cloud Hypervisor wants both in one sendmsg. QEMU asks with argsz 32 first, then with what
 * the reply announced; a cut reply must not have VFU_REGION_INFO_CAPS, since QEMU refuses a cap_offset of 0 with it. SPDK's
 * client sends argsz bytes of request, mostly uninitialised: only argsz and index of a request mean anything.
 */
typedef struct vfu_wire_region_info {
    uint32_t argsz;      /* 0: request: largest reply payload; reply: 32 and the size of the capabilities */
    uint32_t flags;      /* 4: reply: VFU_REGION_INFO_* */
    uint32_t index;      /* 8: which region, vfu_pci_region */
    uint32_t cap_offset; /* 12: reply: first capability, from the start of this struct; 0 is none */
    uint64_t size;       /* 16: reply: in bytes */
    uint64_t offset;     /* 24: reply: where the region begins in the descriptor's file, base for sparse areas too */
} vfu_wire_region_info;
VFUX_WIRE_SIZE(vfu_wire_region_info, 32);
VFUX_WIRE_AT(vfu_wire_region_info, flags, 4);
VFUX_WIRE_AT(vfu_wire_region_info, index, 8);
VFUX_WIRE_AT(vfu_wire_region_info, cap_offset, 12);
VFUX_WIRE_AT(vfu_wire_region_info, size, 16);
VFUX_WIRE_AT(vfu_wire_region_info, offset, 24);

/* In front of each region capability. libvfio-user's sample client fails on identities that it doesn't know. */
typedef struct vfu_wire_cap_header {
    uint16_t id;      /* 0: VFU_REGION_CAP_* */
    uint16_t version; /* 2: of the capability, 1 */
    uint32_t next;    /* 4: next capability, from the start of the region info struct; 0 ends the chain */
} vfu_wire_cap_header;
VFUX_WIRE_SIZE(vfu_wire_cap_header, 8);
VFUX_WIRE_AT(vfu_wire_cap_header, version, 2);
VFUX_WIRE_AT(vfu_wire_cap_header, next, 4);

/* Sparse mmap capability; nr_areas times vfu_wire_sparse_area follow. Only these parts of the region can be mapped. */
typedef struct vfu_wire_cap_sparse_mmap {
    vfu_wire_cap_header header; /* 0 */
    uint32_t nr_areas;          /* 8 */
    uint32_t reserved;          /* 12 */
} vfu_wire_cap_sparse_mmap;
VFUX_WIRE_SIZE(vfu_wire_cap_sparse_mmap, 16);
VFUX_WIRE_AT(vfu_wire_cap_sparse_mmap, nr_areas, 8);

typedef struct vfu_wire_sparse_area {
    uint64_t offset; /* 0: into the region; the file offset is this and vfu_wire_region_info.offset */
    uint64_t size;   /* 8: in bytes */
} vfu_wire_sparse_area;
VFUX_WIRE_SIZE(vfu_wire_sparse_area, 16);
VFUX_WIRE_AT(vfu_wire_sparse_area, size, 8);

/* Type capability of a region with an index of VFU_PCI_NUM_REGIONS or more */
typedef struct vfu_wire_cap_type {
    vfu_wire_cap_header header; /* 0 */
    uint32_t type;              /* 8 */
    uint32_t subtype;           /* 12 */
} vfu_wire_cap_type;
VFUX_WIRE_SIZE(vfu_wire_cap_type, 16);
VFUX_WIRE_AT(vfu_wire_cap_type, type, 8);
VFUX_WIRE_AT(vfu_wire_cap_type, subtype, 12);

/*
 * GET_REGION_IO_FDS, C->S and its reply; in the reply count sub-regions of equal size follow. At least one descriptor travels
 * with a reply that isn't cut; several sub-regions may share one. libvfio-user refuses a request with a flags or count other
 * than 0. The size of an entry is what is left of the payload divided by count. (The text divides argsz - 32, which counts the
 * header twice.)
 */
typedef struct vfu_wire_region_io_fds {
    uint32_t argsz; /* 0: request: largest reply payload; reply: 16 and the size of all sub-regions */
    uint32_t flags; /* 4: 0 */
    uint32_t index; /* 8: which region */
    uint32_t count; /* 12: request: 0; reply: number of sub-regions, also in a reply that is cut */
} vfu_wire_region_io_fds;
VFUX_WIRE_SIZE(vfu_wire_region_io_fds, 16);
VFUX_WIRE_AT(vfu_wire_region_io_fds, flags, 4);
VFUX_WIRE_AT(vfu_wire_region_io_fds, index, 8);
VFUX_WIRE_AT(vfu_wire_region_io_fds, count, 12);

/* One sub-region, ioeventfd or ioregionfd: the two layouts differ in the meaning of the last word only. */
typedef struct vfu_wire_sub_region {
    uint64_t offset;   /* 0: into the region */
    uint64_t size;     /* 8: in bytes; 0 if the width of an access doesn't matter */
    uint32_t fd_index; /* 16: into the message's descriptors */
    uint32_t type;     /* 20: VFU_IO_FD_* */
    uint32_t flags;    /* 24: KVM_IOEVENTFD_FLAG_* or KVM_IOREGION_* */
    uint32_t padding;  /* 28 */
    uint64_t data;     /* 32: ioeventfd: datamatch; ioregionfd: user_data */
} vfu_wire_sub_region;
VFUX_WIRE_SIZE(vfu_wire_sub_region, 40);
VFUX_WIRE_AT(vfu_wire_sub_region, size, 8);
VFUX_WIRE_AT(vfu_wire_sub_region, fd_index, 16);
VFUX_WIRE_AT(vfu_wire_sub_region, type, 20);
VFUX_WIRE_AT(vfu_wire_sub_region, flags, 24);
VFUX_WIRE_AT(vfu_wire_sub_region, data, 32);

/* GET_IRQ_INFO, C->S and its reply. No descriptors. */
typedef struct vfu_wire_irq_info {
    uint32_t argsz; /* 0: request: largest reply payload; reply: 16 */
    uint32_t flags; /* 4: reply: VFU_IRQ_INFO_* */
    uint32_t index; /* 8: which kind of interrupt, vfu_pci_irq */
    uint32_t count; /* 12: reply: number of interrupts of that kind */
} vfu_wire_irq_info;
VFUX_WIRE_SIZE(vfu_wire_irq_info, 16);
VFUX_WIRE_AT(vfu_wire_irq_info, flags, 4);
VFUX_WIRE_AT(vfu_wire_irq_info, index, 8);
VFUX_WIRE_AT(vfu_wire_irq_info, count, 12);

/*
 * SET_IRQS, C->S; 20 bytes, and with DATA_BOOL count bytes follow. The reply has no payload. With DATA_EVENTFD count
 * descriptors travel along, or none, which de-assigns [start, start + count). QEMU splits by the server's max_msg_fds, Cloud
 * Hypervisor sends 16 whatever was negotiated.
 */
typedef struct vfu_wire_irq_set {
    uint32_t argsz; /* 0: size of this request's payload */
    uint32_t flags; /* 4: one VFU_IRQ_SET_DATA_* and one VFU_IRQ_SET_ACTION_* */
    uint32_t index; /* 8: which kind of interrupt */
    uint32_t start; /* 12: first interrupt of that kind */
    uint32_t count; /* 16: number; 0 with start 0, DATA_NONE and ACTION_TRIGGER switches the kind off */
} vfu_wire_irq_set;
VFUX_WIRE_SIZE(vfu_wire_irq_set, 20);
VFUX_WIRE_AT(vfu_wire_irq_set, flags, 4);
VFUX_WIRE_AT(vfu_wire_irq_set, index, 8);
VFUX_WIRE_AT(vfu_wire_irq_set, start, 12);
VFUX_WIRE_AT(vfu_wire_irq_set, count, 16);

/*
 * REGION_READ and REGION_WRITE, C->S and their replies. The data follows in a write's request and in a read's reply. No
 * descriptors. Cloud Hypervisor doesn't look at the error flag and waits for a full reply: an error reply to it hangs it.
 */
typedef struct vfu_wire_region_access {
    uint64_t offset; /* 0: into the region */
    uint32_t region; /* 8: which region */
    uint32_t count;  /* 12: bytes of data, at most the peer's max_data_xfer_size */
} vfu_wire_region_access;
VFUX_WIRE_SIZE(vfu_wire_region_access, 16);
VFUX_WIRE_AT(vfu_wire_region_access, region, 8);
VFUX_WIRE_AT(vfu_wire_region_access, count, 12);

/*
 * DMA_READ and DMA_WRITE, S->C and their replies. The data follows in a write's request and in a read's reply. No descriptors.
 * A write's reply is 12 bytes in the text (a 32-bit count), 16 with libvfio-user, none with QEMU.
 * QEMU 10.1 and 10.2 have a 32-bit count throughout and put or look for the data at 12; see VFU_DMA_LAYOUT_QEMU10.
 */
typedef struct vfu_wire_dma_access {
    uint64_t address; /* 0: IOVA */
    uint64_t count;   /* 8: bytes of data, at most the peer's max_data_xfer_size */
} vfu_wire_dma_access;
VFUX_WIRE_SIZE(vfu_wire_dma_access, 16);
VFUX_WIRE_AT(vfu_wire_dma_access, count, 8);

/* REGION_WRITE_MULTI, C->S, and its reply, where count is the number of writes done. In the request the writes follow. */
typedef struct vfu_wire_write_multi {
    uint64_t count; /* 0: number of writes */
} vfu_wire_write_multi;
VFUX_WIRE_SIZE(vfu_wire_write_multi, 8);

/* One write in REGION_WRITE_MULTI */
typedef struct vfu_wire_write_one {
    uint64_t offset; /* 0: into the region */
    uint32_t region; /* 8: which region */
    uint32_t count;  /* 12: bytes of data that count, 8 at most */
    uint8_t data[8]; /* 16: always 8 bytes on the wire */
} vfu_wire_write_one;
VFUX_WIRE_SIZE(vfu_wire_write_one, 24);
VFUX_WIRE_AT(vfu_wire_write_one, region, 8);
VFUX_WIRE_AT(vfu_wire_write_one, count, 12);
VFUX_WIRE_AT(vfu_wire_write_one, data, 16);

/* FEATURE, C->S and its reply; the feature's own payload, one of the next structs, follows in SET requests and in replies. */
typedef struct vfu_wire_feature {
    uint32_t argsz; /* 0: request: largest reply payload; reply: size of the reply payload, 8 and the feature's own */
    uint32_t flags; /* 4: vfu_feature_index and VFU_FEATURE_GET, _SET, _PROBE */
} vfu_wire_feature;
VFUX_WIRE_SIZE(vfu_wire_feature, 8);
VFUX_WIRE_AT(vfu_wire_feature, flags, 4);

/* VFU_FEATURE_MIGRATION: reply of GET. Offsets of the feature payloads count from their own start, byte 8 of the payload. */
typedef struct vfu_wire_feature_migration {
    uint64_t flags; /* 0: VFU_MIG_*, at least VFU_MIG_STOP_COPY */
} vfu_wire_feature_migration;
VFUX_WIRE_SIZE(vfu_wire_feature_migration, 8);

/* VFU_FEATURE_MIG_STATE: request of SET, reply of GET and SET */
typedef struct vfu_wire_feature_mig_state {
    uint32_t state;  /* 0: vfu_mig_state */
    int32_t data_fd; /* 4: unused in vfio-user; migration data travels in MIG_DATA_READ and MIG_DATA_WRITE */
} vfu_wire_feature_mig_state;
VFUX_WIRE_SIZE(vfu_wire_feature_mig_state, 8);
VFUX_WIRE_AT(vfu_wire_feature_mig_state, data_fd, 4);

/* VFU_FEATURE_LOGGING_START: request and reply of SET; num_ranges ranges follow, where linux/vfio.h has a pointer. */
typedef struct vfu_wire_feature_log_control {
    uint64_t page_size;  /* 0: request: wanted; reply: chosen */
    uint32_t num_ranges; /* 8: 0 logs every write */
    uint32_t reserved;   /* 12 */
} vfu_wire_feature_log_control;
VFUX_WIRE_SIZE(vfu_wire_feature_log_control, 16);
VFUX_WIRE_AT(vfu_wire_feature_log_control, num_ranges, 8);

typedef struct vfu_wire_feature_log_range {
    uint64_t iova;   /* 0 */
    uint64_t length; /* 8: in bytes */
} vfu_wire_feature_log_range;
VFUX_WIRE_SIZE(vfu_wire_feature_log_range, 16);
VFUX_WIRE_AT(vfu_wire_feature_log_range, length, 8);

/* VFU_FEATURE_LOGGING_REPORT: request and reply of GET; in the reply the bitmap follows, 64-bit words, one bit per page. */
typedef struct vfu_wire_feature_log_report {
    uint64_t iova;      /* 0 */
    uint64_t length;    /* 8: in bytes */
    uint64_t page_size; /* 16: of the bitmap, a power of two, independent of the one at LOGGING_START */
} vfu_wire_feature_log_report;
VFUX_WIRE_SIZE(vfu_wire_feature_log_report, 24);
VFUX_WIRE_AT(vfu_wire_feature_log_report, length, 8);
VFUX_WIRE_AT(vfu_wire_feature_log_report, page_size, 16);

/* MIG_DATA_READ, C->S and its reply, and MIG_DATA_WRITE, C->S; the data follows in a write's request and in a read's reply. */
typedef struct vfu_wire_mig_data {
    uint32_t argsz; /* 0: read request: largest reply payload; read reply, write request: size of this payload with its data */
    uint32_t size;  /* 4: bytes of data; less in a read's reply than asked for means that there is no more */
} vfu_wire_mig_data;
VFUX_WIRE_SIZE(vfu_wire_mig_data, 8);
VFUX_WIRE_AT(vfu_wire_mig_data, size, 4);

/*
 * Names for people, static strings, never NULL: "DMA_MAP", "ENOENT"; "?" for what has none. error may have either sign. The
 * names of errors are Linux', whose values travel in the header. Any thread.
 */
VFU_API const char *vfu_cmd_name(uint16_t cmd);
VFU_API const char *vfu_errno_name(int error);

/*
 * ==== capabilities =========================================================================================================
 *
 * The JSON of a VERSION message, both ways: parsed by a small bounded parser that allocates nothing and doesn't recurse,
 * written compactly. Pure functions, any thread.
 */

#define VFU_CAPS_JSON_MAX  4096u /* longest text that is parsed, in bytes; longer ones are -EMSGSIZE */
#define VFU_CAPS_DEPTH_MAX 16u   /* deepest nesting that is parsed, in unknown values too; deeper ones are -EBADMSG */

/* Bits of vfu_caps.present */
#define VFU_CAPS_MAX_MSG_FDS        0x01u
#define VFU_CAPS_MAX_DATA_XFER_SIZE 0x02u
#define VFU_CAPS_MAX_DMA_MAPS       0x04u
#define VFU_CAPS_PGSIZES            0x08u
#define VFU_CAPS_TWIN_SOCKET        0x10u
#define VFU_CAPS_WRITE_MULTIPLE     0x20u
#define VFU_CAPS_MIGRATION          0x40u

typedef struct vfu_caps {
    uint32_t present;            /* which of the fields below the text contained, or shall contain; the others hold defaults */
    uint32_t max_msg_fds;        /* descriptors that the sender takes in one message; default 1 */
    uint64_t max_data_xfer_size; /* data bytes in one message; default 1048576. A peer can say 0: check before dividing. */
    uint32_t max_dma_maps;       /* default 65535 */
    bool write_multiple;         /* REGION_WRITE_MULTI is understood; default false */
    bool twin_socket;            /* twin_socket.supported; default false */
    bool migration;              /* there is a "migration" object: not in the specification, but Cloud Hypervisor has it */
    int32_t twin_fd_index;       /* twin_socket.fd_index, into the message's descriptors; -1, the default, if absent */
    uint64_t pgsizes;            /* page sizes or'ed together; default 4096 */
    uint64_t migration_pgsize;   /* migration.pgsize; default 4096. Cloud Hypervisor needs it wherever "migration" is. */
} vfu_caps;

/* Fills *caps with what the specification says about a peer that says nothing: present is 0. */
VFU_API void vfu_caps_defaults(vfu_caps *caps);

/*
 * Reads the version data of a VERSION message. A NUL ends the text, or len does. No text (json NULL, len 0, or a NUL first)
 * means defaults. Strict JSON (RFC 8259) in valid UTF-8, whose top is an object. Unknown names are skipped, whatever their
 * value; if a name occurs twice the last one counts. On failure *out holds the defaults.
 *   -EBADMSG   not JSON, not UTF-8, or nested deeper than VFU_CAPS_DEPTH_MAX
 *   -EINVAL    JSON, but a known name has a value of another type, or a number that isn't a non-negative integer in plain digits
 *              within the field's range. (4096.0 and 1e6 are no such integers.)
 *   -EMSGSIZE  longer than VFU_CAPS_JSON_MAX
 */
VFU_API int vfu_caps_parse(const char *json, size_t len, vfu_caps *out);

/*
 * Writes the fields in caps->present, in the order of their bits, as {"capabilities":{...}} without spaces and with a
 * terminating NUL. fd_index is written if it isn't negative. Returns the length with the NUL, which is what a VERSION
 * message carries, or -EMSGSIZE if cap is too small (the longest possible text has VFU_CAPS_WRITE_MAX bytes), -EINVAL for
 * unknown bits in present.
 */
VFU_API int vfu_caps_write(const vfu_caps *caps, char *out, size_t cap);
#define VFU_CAPS_WRITE_MAX 266u

/*
 * ==== codec ================================================================================================================
 *
 * From bytes to a checked struct and back, for every message in both directions:
 *
 *     vfu_msg_size    how many bytes the message has that starts here          (framing)
 *     vfu_msg_decode  those bytes, checked, as a vfu_msg
 *     vfu_msg_encode  a vfu_msg as bytes
 *     vfu_msg_render  a vfu_msg as a line of text
 *
 * Pure functions: no allocation, no I/O, no state, any thread. Decoding borrows: views in a vfu_msg point into the caller's
 * bytes and live as long as those. Each fixed field is copied out once and checked in its copy. The bytes of a view are looked
 * at while decoding (capability chains, coalesced writes) and again by the accessors, which check again: no bound is ever taken
 * from an earlier look.
 *
 * A decoded message is safe to use, not sensible: offsets, addresses, indexes and flags are whatever the peer said.
 */

/*
 * How DMA_READ replies and DMA_WRITE requests are laid out on a connection. QEMU 10.1 and 10.2 put the data right behind a
 * 32-bit count, four bytes too early, and pad the message to its proper length. A DMA_READ reply of that kind shows by its
 * count, unless its first four bytes of data are 0; then it can't be told from a reply by the book whose data ends in four
 * bytes of 0. To learn the layout: a reply with at most 4 bytes of data is never ambiguous, and one with 4 that aren't all 0
 * proves it. On big-endian machines such a client takes a request by the book for an empty one, which nothing shows: a device
 * there has to be told the layout.
 */
typedef enum vfu_dma_layout {
    VFU_DMA_LAYOUT_AUTO = 0,  /* DMA_READ replies that can be read in two ways with different results are refused */
    VFU_DMA_LAYOUT_SPEC = 1,  /* by the book: 64-bit count, data at 16 of the payload */
    VFU_DMA_LAYOUT_QEMU10 = 2 /* 32-bit count, data at 12 */
} vfu_dma_layout;

/*
 * One message, command or reply. Which member of u counts follows from cmd; a reply with VFU_HDR_ERROR has none. Set unused
 * fields to 0 (vfu_msg m = {0}, or vfu_msg_init). Views are borrowed; data may be NULL if data_len is 0.
 *
 * argsz is carried as it is, in both directions; the wire structs say what to put there.
 */
typedef struct vfu_msg {
    uint16_t id;    /* header: echoed in the reply */
    uint16_t cmd;   /* header: vfu_cmd */
    uint32_t flags; /* header: VFU_HDR_* */
    uint32_t error; /* header: positive Linux errno value of an error reply */
    union {
        struct { /* VERSION, both directions */
            uint16_t major;
            uint16_t minor;
            const char *json;  /* NULL if there is none; not NUL-terminated as far as the receiver may assume */
            uint32_t json_len; /* without the NUL; the encoder adds it */
        } version;
        struct { /* DMA_MAP command */
            uint32_t argsz;
            uint32_t flags;
            uint64_t offset;
            uint64_t address;
            uint64_t size;
        } dma_map;
        struct { /* DMA_UNMAP, both directions */
            uint32_t argsz;
            uint32_t flags;
            uint64_t address;
            uint64_t size;
            const uint8_t *data; /* with VFU_DMA_UNMAP_GET_DIRTY_BITMAP only: page size, bitmap size, in a reply the bitmap */
            uint32_t data_len;   /* 0 or at least 16 */
        } dma_unmap;
        struct { /* GET_INFO, both directions */
            uint32_t argsz;
            uint32_t flags;
            uint32_t num_regions;
            uint32_t num_irqs;
        } device_info;
        struct { /* GET_REGION_INFO, both directions */
            uint32_t argsz;
            uint32_t flags;
            uint32_t index;
            uint32_t cap_offset;
            uint64_t size;
            uint64_t offset;
            const uint8_t *data; /* reply with VFU_REGION_INFO_CAPS: what follows the 32 bytes; use vfu_msg_next_cap */
            uint32_t data_len;
            bool truncated; /* decoded reply: argsz announces more than came; ask again, unless that was the argsz asked with */
        } region_info;
        struct { /* GET_REGION_IO_FDS, both directions */
            uint32_t argsz;
            uint32_t flags;
            uint32_t index;
            uint32_t count;
            const uint8_t *data; /* reply: count entries of stride bytes, or nothing if truncated; use vfu_msg_sub_region */
            uint32_t data_len;
            uint32_t stride; /* decoded reply: size of an entry, at least 40; 0 without entries. Not encoded: data_len / count. */
            bool truncated;  /* decoded reply: count entries exist but didn't fit; ask again as above */
        } region_io_fds;
        struct { /* GET_IRQ_INFO, both directions */
            uint32_t argsz;
            uint32_t flags;
            uint32_t index;
            uint32_t count;
        } irq_info;
        struct { /* SET_IRQS command */
            uint32_t argsz;
            uint32_t flags; /* decoded: exactly one DATA and one ACTION bit, and no other */
            uint32_t index;
            uint32_t start;
            uint32_t count;      /* decoded: start + count doesn't wrap */
            const uint8_t *data; /* DATA_BOOL only: count bytes */
            uint32_t data_len;
        } irq_set;
        struct { /* REGION_READ and REGION_WRITE, both directions */
            uint64_t offset;
            uint32_t region;
            uint32_t count;
            const uint8_t *data; /* write command and read reply: count bytes; nothing otherwise */
            uint32_t data_len;
        } region;
        struct { /* DMA_READ and DMA_WRITE, both directions */
            uint64_t address;
            uint64_t count;
            const uint8_t *data; /* write command and read reply: count bytes; nothing otherwise */
            uint32_t data_len;
            uint32_t ack_len; /* write reply: size of the payload, 0 (QEMU; address and count are 0 then), 12 or 16 */
            bool legacy;      /* write command, read reply: VFU_DMA_LAYOUT_QEMU10 */
            bool proven;      /* read reply decoded with LAYOUT_AUTO: only this layout fits, so the connection has it */
        } dma;
        struct {                 /* REGION_WRITE_MULTI, both directions */
            uint64_t count;      /* reply: writes done */
            const uint8_t *data; /* command: count entries of 24 bytes; use vfu_msg_write_one */
            uint32_t data_len;
        } write_multi;
        struct { /* FEATURE, both directions */
            uint32_t argsz;
            uint32_t flags;
            const uint8_t *data; /* the feature's own payload; use vfu_feature_* */
            uint32_t data_len;
        } feature;
        struct { /* MIG_DATA_READ, both directions, and MIG_DATA_WRITE command */
            uint32_t argsz;
            uint32_t size;
            const uint8_t *data; /* write command and read reply: size bytes; nothing otherwise */
            uint32_t data_len;
        } mig_data;
    } u;
} vfu_msg;

static inline bool vfu_msg_is_reply(const vfu_msg *msg) { return (msg->flags & VFU_HDR_TYPE_MASK) == VFU_HDR_REPLY; }

/* A reply that says that the command failed; msg->error says why, or is 0. */
static inline bool vfu_msg_is_error(const vfu_msg *msg) { return vfu_msg_is_reply(msg) && (msg->flags & VFU_HDR_ERROR) != 0; }

/* A command that must be answered. False for a command with NO_REPLY and for every reply. */
static inline bool vfu_msg_wants_reply(const vfu_msg *msg)
{
    return (msg->flags & VFU_HDR_TYPE_MASK) == VFU_HDR_COMMAND && (msg->flags & VFU_HDR_NO_REPLY) == 0;
}

/* Makes *msg an empty command. */
VFU_API void vfu_msg_init(vfu_msg *msg, uint16_t id, uint16_t cmd);

/*
 * Makes *reply the reply to *command, with its id and cmd and an empty payload. error is 0, or an errno value of either sign:
 * then it is a header-only error reply. reply may be command.
 */
VFU_API void vfu_msg_init_reply(vfu_msg *reply, const vfu_msg *command, int error);

/*
 * Framing. From at least 16 bytes of a stream: the size of the message that starts there, header included, to *size. max is the
 * largest size that the caller accepts. Nothing but the size field is looked at.
 *   -EAGAIN   fewer than 16 bytes: come back with more
 *   -EBADMSG  the size is below 16 or above max: the stream has lost its place for good
 */
VFU_API int vfu_msg_size(const void *bytes, size_t len, uint32_t max, uint32_t *size);

/*
 * Checks the message in bytes and fills *out; views in it point into bytes, which *out borrows. len is the size of the
 * message as vfu_msg_size said. Whether it is a command or a reply is taken from its flags.
 *
 * Accepted beyond the letter, because peers do it or nothing depends on it: any argsz; bytes behind the fixed part of GET_INFO,
 * GET_REGION_INFO, GET_REGION_IO_FDS and GET_IRQ_INFO (ignored); bytes behind what SET_IRQS needs (ignored); a payload in an
 * error reply, and in a reply that has none (ignored); GET_REGION_INFO and GET_REGION_IO_FDS replies that are cut; version data
 * without its NUL, or with several; any value of the reserved header flags; NO_REPLY and ERROR where they mean nothing.
 *
 *   -EBADMSG  fewer than 16 bytes (*out is zeroed), the size field isn't len, or the type is neither command nor reply. A peer
 *             that does this has no idea of the protocol: close.
 *   -ENOSYS   no such command. Answer with an error and go on.
 *   -EINVAL   the payload is too short, too long, or contradicts itself. Answer with an error and go on.
 * If len is at least 16 the header's fields are set whatever is returned, so that the error can be answered; u is zeroed then.
 */
VFU_API int vfu_msg_decode(const void *bytes, size_t len, vfu_msg *out);

/* The same for a connection whose DMA layout is known. vfu_msg_decode is this with VFU_DMA_LAYOUT_AUTO. */
VFU_API int vfu_msg_decode_dma(const void *bytes, size_t len, vfu_dma_layout layout, vfu_msg *out);

/*
 * Writes a whole message, header and data. Returns its size. out may not overlap the views in msg. Unknown header flags, and
 * the error field of a message that is no error reply, are written as they are; an error reply is 16 bytes whatever u holds.
 *   -EMSGSIZE  cap is too small, or the size doesn't fit 32 bits (or an int): nothing usable is in out
 *   -EINVAL    msg contradicts itself (count isn't data_len, data where none belongs, ack_len not 0, 12 or 16, ...), or is of no
 *              known type or command; an error reply may be to any command
 * Whatever was decoded can be encoded, and decodes to the same again; the bytes are the same unless some were ignored.
 */
VFU_API int vfu_msg_encode(const vfu_msg *msg, void *out, size_t cap);

/*
 * The same without the data, for sendmsg with an iovec: writes header and fixed part, with a size field that counts the
 * data_len bytes that the caller sends itself right behind it. data isn't looked at and may be NULL. Returns the number of
 * bytes written, at most VFU_MSG_HEAD_MAX except for VERSION, which has no tail: its text is written like vfu_msg_encode
 * does. Errors as above; also -EINVAL for a legacy DMA message with less than 4 bytes of data, which needs padding behind
 * them.
 */
VFU_API int vfu_msg_encode_head(const vfu_msg *msg, void *out, size_t cap);
#define VFU_MSG_HEAD_MAX 48u

/*
 * Entries of arrays. Each copies entry i to *out and returns 0, or -EINVAL if there is no such entry or msg is of another kind.
 * vfu_msg_write_one also refuses an entry with a count above 8; a decoded message has none.
 */
VFU_API int vfu_msg_write_one(const vfu_msg *msg, uint64_t i, vfu_wire_write_one *out);
VFU_API int vfu_msg_sub_region(const vfu_msg *msg, uint32_t i, vfu_wire_sub_region *out);

/* A capability in a GET_REGION_INFO reply. Start from zero: vfu_region_cap cap = {0}; while (vfu_msg_next_cap(&m, &cap)) ... */
typedef struct vfu_region_cap {
    uint16_t id;         /* VFU_REGION_CAP_* or unknown */
    uint16_t version;    /* 1 */
    const uint8_t *data; /* what follows the capability's 8-byte header */
    uint32_t data_len;   /* all of it that can belong to the capability: up to the next one, or to the end of the payload */
    uint32_t next;       /* private: where the iteration goes on; 0 at its start */
} vfu_region_cap;

/*
 * Steps to the next capability; false at the end of the chain (at once if there is none, or msg is no such reply). The chain
 * of a decoded message ends properly; in a truncated one it stops before the first capability that isn't all there.
 */
VFU_API bool vfu_msg_next_cap(const vfu_msg *msg, vfu_region_cap *cap);

/* Number of areas of a sparse mmap capability, and area i. -EINVAL if it is none, is too short, or has no area i. */
VFU_API int vfu_region_cap_areas(const vfu_region_cap *cap, uint32_t *count);
VFU_API int vfu_region_cap_area(const vfu_region_cap *cap, uint32_t i, vfu_wire_sparse_area *out);

/* Copies a type capability (header.next is 0 in the copy); -EINVAL if it is none. */
VFU_API int vfu_region_cap_type(const vfu_region_cap *cap, vfu_wire_cap_type *out);

/*
 * Completes a GET_REGION_INFO reply with capabilities: a type if type isn't NULL (its header is ignored), and sparse areas if
 * count isn't 0. Writes them to buf and sets argsz, cap_offset, VFU_REGION_INFO_CAPS, data and data_len; the reply borrows buf.
 * argsz is the one of the request: if it doesn't leave room, the reply is cut as QEMU wants it (32 bytes, no CAPS flag,
 * cap_offset 0, argsz says what is needed) and truncated is set: leave the descriptor away then. Returns 0, -EMSGSIZE if cap
 * (at least 16 * (count + 1) and 16 more with a type) is too small, -EINVAL if *reply isn't a GET_REGION_INFO reply or argsz
 * is below 32.
 */
VFU_API int vfu_msg_set_region_caps(vfu_msg *reply, uint32_t argsz, const vfu_wire_cap_type *type,
                                    const vfu_wire_sparse_area *areas, uint32_t count, void *buf, size_t cap);

/*
 * Payloads of FEATURE. Readers take a FEATURE message, command or reply, check that it is of that feature and long enough, and
 * copy; -EINVAL if not. log_control covers LOGGING_START and checks that all its ranges are there; log_range copies range i of
 * it. log_report gives the bitmap as a view (bytes, unaligned; in a command of length 0); its length is what came: compare it
 * with what the range needs.
 */
VFU_API int vfu_feature_migration(const vfu_msg *msg, vfu_wire_feature_migration *out);
VFU_API int vfu_feature_mig_state(const vfu_msg *msg, vfu_wire_feature_mig_state *out);
VFU_API int vfu_feature_log_control(const vfu_msg *msg, vfu_wire_feature_log_control *out);
VFU_API int vfu_feature_log_range(const vfu_msg *msg, uint32_t i, vfu_wire_feature_log_range *out);
VFU_API int vfu_feature_log_report(const vfu_msg *msg, vfu_wire_feature_log_report *out, const uint8_t **bitmap,
                                   uint32_t *bitmap_len);

/*
 * Writers: make buf the payload of *msg, a FEATURE message, which borrows it: data, data_len and argsz (8 and the payload) are
 * set, flags are the caller's. In a command, which says with argsz how much reply it takes, set argsz afterwards if that is
 * more. -EMSGSIZE if cap is too small, -EINVAL if *msg isn't a FEATURE message of that feature. log_control writes num_ranges
 * ranges; log_report writes the 24 bytes and bitmap_len bytes of bitmap, which may already stand at buf + 24.
 */
VFU_API int vfu_feature_set_migration(vfu_msg *msg, const vfu_wire_feature_migration *in, void *buf, size_t cap);
VFU_API int vfu_feature_set_mig_state(vfu_msg *msg, const vfu_wire_feature_mig_state *in, void *buf, size_t cap);
VFU_API int vfu_feature_set_log_control(vfu_msg *msg, const vfu_wire_feature_log_control *in,
                                        const vfu_wire_feature_log_range *ranges, void *buf, size_t cap);
VFU_API int vfu_feature_set_log_report(vfu_msg *msg, const vfu_wire_feature_log_report *in, const void *bitmap,
                                       uint32_t bitmap_len, void *buf, size_t cap);

/*
 * One line for people, without a newline: -> for a command, <- for a reply, the id, the command, then its fields:
 *     -> 0x0012 DMA_MAP iova 0x1000 size 0x1000 rw offset 0x0
 *     <- 0x0012 DMA_MAP error EEXIST
 * Text from the peer is printed with control characters replaced. Like snprintf: returns the length of the whole line,
 * writes at most cap bytes with the terminating NUL (nothing if cap is 0). Lines are for reading, and may change between
 * versions.
 */
VFU_API int vfu_msg_render(const vfu_msg *msg, char *out, size_t cap);

#ifndef VFU_CODEC_ONLY

/*
 * ==== transport ============================================================================================================
 *
 * A connection turns a stream of bytes and descriptors into messages, and messages into the stream. It never blocks, and never
 * holds more than two messages of the largest size and their descriptors.
 *
 * Descriptors belong to the message in which they arrived: Linux ends a recvmsg() behind the bytes that descriptors came
 * with, so they are those of the message that has the last byte received. They are close-on-exec, and closed if nobody takes
 * them.
 */

/* Where lines for people go. All zero: warnings to standard error. */
typedef enum vfu_level {
    VFU_LEVEL_DEFAULT = 0,
    VFU_LEVEL_ERROR = 1,
    VFU_LEVEL_WARNING = 2,
    VFU_LEVEL_INFO = 3,
    VFU_LEVEL_TRACE = 4
} vfu_level;

typedef struct vfu_logger {
    void *ctx;
    void (*write)(void *ctx, vfu_level level, const char *line); /* no newline at its end; NULL: standard error */
    vfu_level level;                                             /* lines above it are left away; 0: VFU_LEVEL_WARNING */
} vfu_logger;

enum {
    VFU_FDS_MAX = 16,        /* descriptors in one message that can be negotiated; QEMU takes no more */
    VFU_FDS_RECEIVABLE = 253 /* descriptors that Linux passes in one sendmsg() */
};

/* Pieces of one message that are sent together. */
typedef struct vfu_slice {
    const void *data;
    size_t len;
} vfu_slice;

/*
 * How bytes and descriptors travel. Both functions must not block.
 *   receive: puts up to len bytes at buf and returns how many; 0: the peer has closed; -EAGAIN: nothing there now; else a
 *            negative errno. Up to VFU_FDS_RECEIVABLE descriptors go to fds, their number to *fd_count, also when it fails.
 *   send:    takes a prefix of the slices and returns its length, at least 1 byte; -EAGAIN, or another negative errno. The
 *            descriptors, which it borrows, go with the first byte.
 */
typedef struct vfu_io {
    void *ctx;
    int64_t (*receive)(void *ctx, void *buf, size_t len, int *fds, unsigned *fd_count);
    int64_t (*send)(void *ctx, const vfu_slice *slices, unsigned count, const int *fds, unsigned fd_count);
} vfu_io;

typedef struct vfu_conn vfu_conn;

typedef struct vfu_conn_desc {
    int fd;           /* a connected socket, taken; used if io is NULL. Made non-blocking. */
    const vfu_io *io; /* instead of fd; copied */
    uint32_t max_msg; /* bytes of the largest message that is received; 0: VFU_MSG_MAX_DEFAULT */
    uint32_t max_fds; /* descriptors of one message that are accepted; 0: VFU_FDS_MAX */
    vfu_alloc alloc;  /* copied */
} vfu_conn_desc;

/* Room for the default max_data_xfer_size of 1 MiB and what stands before the data. */
#define VFU_MSG_MAX_DEFAULT ((UINT32_C(1) << 20) + 4096)

/* A received message. The bytes are borrowed until the next call on the connection. */
typedef struct vfu_frame {
    const uint8_t *bytes;
    uint32_t len;
    unsigned fd_count;    /* descriptors that came with it */
    int fds[VFU_FDS_MAX]; /* owned by the frame: take one by overwriting it with -1 */
    unsigned fds_refused; /* descriptors above max_fds; they are closed already */
} vfu_frame;

/* Makes a connection. Takes desc->fd, also on failure. 0, -EINVAL, -ENOMEM, or what fcntl() says. */
VFU_API int vfu_conn_create(vfu_conn **out, const vfu_conn_desc *desc);

/* Closes it, with every descriptor that nobody took. NULL is fine. */
VFU_API void vfu_conn_destroy(vfu_conn *conn);

/* The socket, for poll(); -1 with an io of the caller's. */
VFU_API int vfu_conn_fd(const vfu_conn *conn);

/*
 * Receives once: one recvmsg(), as many bytes as there are and as fit. Returns how many; -EAGAIN: nothing there now; -EPIPE:
 * the peer has closed; -ENOBUFS: a whole message waits in the buffer, take it first; -EBADMSG: descriptors were lost on the
 * way; or what recvmsg() says. After any error but -EAGAIN and -ENOBUFS the connection is of no more use.
 */
VFU_API int vfu_conn_receive(vfu_conn *conn);

/*
 * Takes the next message out of the buffer, without a system call. Closes what is left of the descriptors of *frame, which must
 * be the one of the last call (or all zero at first). 1: there is one; 0: none is complete; -EBADMSG: the size field is
 * below 16 or above max_msg, and the stream has no more messages.
 */
VFU_API int vfu_conn_next(vfu_conn *conn, vfu_frame *frame);

/*
 * Sends one message, given as header and fixed part (head) and its data, which may be NULL; descriptors are borrowed. What the
 * socket doesn't take now is copied and sent by vfu_conn_flush. 0; -EAGAIN: an earlier message of that size still waits, and
 * nothing was sent; -EMSGSIZE: larger than this connection can ever queue; or what sendmsg() says: the connection is of no more
 * use.
 */
VFU_API int vfu_conn_send(vfu_conn *conn, const void *head, size_t head_len, const void *data, size_t data_len, const int *fds,
                          unsigned fd_count);

/* Sends what waits. 0: all is sent; -EAGAIN: some still waits; or what sendmsg() says. */
VFU_API int vfu_conn_flush(vfu_conn *conn);

/* Is anything waiting to be sent? */
VFU_API bool vfu_conn_is_waiting(const vfu_conn *conn);

/*
 * UNIX sockets, close-on-exec. Each gives a descriptor, or a negative errno.
 *   listen   binds and listens. A socket file that nobody listens on any more is replaced; -EADDRINUSE: somebody does, or the
 *            path is no socket. The file has the permissions that umask leaves.
 *   accept   the next client, non-blocking; -EAGAIN: nobody waits.
 *   connect  blocks until the server has accepted into its backlog.
 */
VFU_API int vfu_sock_listen(const char *path);
VFU_API int vfu_sock_accept(int listener);
VFU_API int vfu_sock_connect(const char *path);

/*
 * ==== PCI ==================================================================================================================
 *
 * A configuration space, built from a descriptor: type 0 header, base address registers, a list of capabilities. Reads and
 * writes of any size and alignment have the effect of the byte accesses that they consist of. Pure state: no I/O.
 */

typedef enum vfu_bar_kind { VFU_BAR_MEM32 = 0, VFU_BAR_MEM64 = 1, VFU_BAR_IO = 2 } vfu_bar_kind;

typedef struct vfu_bar_desc {
    uint64_t size;     /* bytes, a power of two; at least 16 (I/O: 4); 0: no such BAR */
    vfu_bar_kind kind; /* a 64-bit BAR takes the next number too, whose size must be 0 */
    bool prefetchable;
} vfu_bar_desc;

typedef struct vfu_pci_vendor_cap {
    const void *data; /* what follows the capability's header; read-only for the client; borrowed while building */
    uint8_t len;      /* bytes */
    uint16_t id;      /* extended ones: the vendor's number for it */
    uint8_t version;  /* likewise, at most 15 */
} vfu_pci_vendor_cap;

typedef struct vfu_pci_desc {
    uint16_t vendor, device;
    uint16_t subsystem_vendor, subsystem;
    uint32_t class_code; /* 0xccsspp: base class, subclass, programming interface */
    uint8_t revision;
    uint8_t interrupt_pin; /* 0: none, 1: INTA */
    vfu_bar_desc bar[6];
    uint32_t rom_size; /* expansion ROM, bytes, a power of two >= 2048; 0: none */
    bool pm;           /* power management capability: D0 and D3hot, no soft reset */
    bool express;      /* PCI Express endpoint capability; the configuration space has 4096 bytes then, else 256 */
    bool flr;          /* function-level reset, needs express */
    struct {
        uint16_t vectors; /* 0: no MSI-X capability; at most 2048 */
        uint8_t table_bar, pba_bar;
        uint32_t table_offset, pba_offset; /* bytes, multiples of 8, inside the BARs */
    } msix;
    struct {
        uint8_t vectors; /* 0: no MSI capability; 1, 2, 4, 8, 16 or 32 */
        bool mask;       /* per-vector masking */
    } msi;
    const vfu_pci_vendor_cap *vendor_caps; /* borrowed while building */
    unsigned vendor_cap_count;
    uint64_t serial_number;                         /* extended capability, needs express; 0: none */
    bool aer;                                       /* advanced error reporting, likewise */
    const vfu_pci_vendor_cap *extended_vendor_caps; /* vendor-specific extended capabilities, likewise; borrowed while building */
    unsigned extended_vendor_cap_count;
} vfu_pci_desc;

/* What a write has changed, or asked for. */
#define VFU_PCI_CHANGED_COMMAND 0x01u
#define VFU_PCI_CHANGED_BAR     0x02u
#define VFU_PCI_CHANGED_MSIX    0x04u
#define VFU_PCI_CHANGED_POWER   0x08u
#define VFU_PCI_ASKED_FLR       0x10u
#define VFU_PCI_CHANGED_MSI     0x20u

/* The bits of the command and status registers that the library or a device cares about */
#define VFU_PCI_COMMAND_IO           0x0001u
#define VFU_PCI_COMMAND_MEMORY       0x0002u
#define VFU_PCI_COMMAND_MASTER       0x0004u
#define VFU_PCI_COMMAND_INTX_DISABLE 0x0400u
#define VFU_PCI_STATUS_INTX          0x0008u

typedef struct vfu_pci {
    /* private */
    uint32_t size; /* bytes of the configuration space */
    uint16_t pm_at, msi_at, msix_at, express_at;
    bool flr, msi_mask;
    uint8_t config[4096];
    uint8_t initial[4096];   /* what a reset restores */
    uint8_t writable[4096];  /* bits that a write changes */
    uint8_t clearable[4096]; /* bits that a write of one clears */
} vfu_pci;

/* Builds the space. 0; -EINVAL: a size or offset is impossible, or the capabilities don't fit. */
VFU_API int vfu_pci_build(vfu_pci *pci, const vfu_pci_desc *desc);

/* Reads or writes [offset, offset + len), which must lie inside. The write returns VFU_PCI_CHANGED_* and VFU_PCI_ASKED_FLR. */
VFU_API void vfu_pci_read(const vfu_pci *pci, uint32_t offset, void *buf, uint32_t len);
VFU_API unsigned vfu_pci_write(vfu_pci *pci, uint32_t offset, const void *buf, uint32_t len);

/* Everything as after a reset. */
VFU_API void vfu_pci_reset(vfu_pci *pci);

/* The client is gone: command register, interrupt status, MSI enable, MSI-X enable and function mask are cleared, the rest
 * stays. */
VFU_API void vfu_pci_disconnect(vfu_pci *pci);

VFU_API uint16_t vfu_pci_command(const vfu_pci *pci);
VFU_API bool vfu_pci_msix_enabled(const vfu_pci *pci);
VFU_API bool vfu_pci_msix_masked(const vfu_pci *pci); /* the function mask */
VFU_API bool vfu_pci_msi_enabled(const vfu_pci *pci);

/* Power state, 0 for D0 or 3 for D3hot. */
VFU_API unsigned vfu_pci_power(const vfu_pci *pci);

/* The interrupt bit of the status register. */
VFU_API void vfu_pci_set_intx_status(vfu_pci *pci, bool level);

/* Offset of the first capability, or extended capability, with this identity; 0: there is none. */
VFU_API uint8_t vfu_pci_capability(const vfu_pci *pci, uint8_t id);
VFU_API uint16_t vfu_pci_extended_capability(const vfu_pci *pci, uint16_t id);

/*
 * ==== device ===============================================================================================================
 *
 * The server's end: one device, one client at a time.
 *
 *      create --- listen, or attach ----> waiting <--------------------------------------------+
 *                                           | a client connects                                |
 *                                           v                                                  |
 *                                        greeting   VERSION has to come within 10 seconds      |
 *                                           |                                                  |
 *                                           v       callbacks: connected                       |
 *                                        serving    region_read, region_write, reset, work ... |
 *                                           |                                                  |
 *                                           v       callbacks: disconnected                    |
 *                                        the client leaves, or breaks the protocol ------------+
 *
 * When a client leaves, whatever was asked of it is cancelled, its mappings, descriptors and interrupts are dropped; the
 * device's own state stays (specification, "Client Disconnection").
 *
 * All functions, and all callbacks, belong to the thread that polls, but for vfu_dev_raise, vfu_dev_complete, vfu_dev_iommu
 * with readers of it, and vfu_dev_stop.
 *
 * Requests are answered in the order in which they came, those that came together with one system call. A callback that can't
 * answer at once takes a ticket, returns VFU_PENDING, and some thread completes the ticket later; until then, the client's
 * further commands wait. DMA goes on meanwhile.
 */

typedef struct vfu_dev vfu_dev;

/* What a callback returns when its answer comes later. */
#define VFU_PENDING 1

/* Why a device is reset. */
typedef enum vfu_reset_kind { VFU_RESET_BY_CLIENT = 0, VFU_RESET_BY_FUNCTION = 1 } vfu_reset_kind;

/*
 * What a device does. Every one may be NULL. ctx is the descriptor's. A callback that returns a negative errno fails the
 * request with that error. The library has checked all bounds before.
 */
typedef struct vfu_dev_callbacks {
    /* The client reads or writes [offset, offset + len) of a region, len > 0. Return 0, a negative errno or VFU_PENDING; buf
     * is dead then, and the data of a read comes with vfu_dev_complete. NULL: reads as zero, ignores writes. Not called for
     * the configuration space, nor for the MSI-X table and PBA. */
    int (*region_read)(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len);
    int (*region_write)(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len);

    /* Back to the initial state. The configuration space, the MSI-X table and the migration state are reset already,
     * transfers are forgotten (their `done` isn't called); mappings and interrupts stay. It may wait for threads of the device:
     * until it returns, their accesses to memory that only messages reach fail. */
    void (*reset)(void *ctx, vfu_reset_kind kind);

    /* Before the client writes the configuration space: return a negative errno to refuse it. And after it was written;
     * changed is VFU_PCI_CHANGED_*. */
    int (*config_writing)(void *ctx, uint32_t offset, const void *buf, uint32_t len);
    void (*config_written)(void *ctx, unsigned changed);

    /* After VERSION; and when that client has gone: mappings and interrupts are dropped when it returns, tickets and
     * transfers are forgotten already, and it may wait for threads as reset may. */
    void (*connected)(void *ctx);
    void (*disconnected)(void *ctx);

    /* Work that isn't the answer to a request, asked for with vfu_dev_want_work. Called by poll after the replies were sent,
     * without a request under way; so it may use memory that only messages reach. Not called in migration states in which the
     * device is stopped. True: call again soon. */
    bool (*work)(void *ctx);

    /* A mapping was added; and one was removed, when no access to it is in flight any more. */
    void (*dma_mapped)(void *ctx, const vfu_iommu_mapping *mapping);
    void (*dma_unmapped)(void *ctx, const vfu_iommu_mapping *mapping);
} vfu_dev_callbacks;

/*
 * Live migration (specification, "VFIO_USER_DEVICE_FEATURE"). The library keeps the state machine and takes it along legal
 * arcs only, by the shortest path; the device follows each arc.
 */
typedef struct vfu_migration {
    bool pre_copy; /* PRE_COPY is supported: data can be read while the device runs */

    /* Goes from one state to the next, one arc of the specification. In STOP, STOP_COPY and RESUMING the device changes
     * neither its own state nor the client's memory. RESUMING -> STOP checks and takes what was written. Return 0; a
     * negative errno: the device stays in `from`; -ENOTRECOVERABLE: it is in no valid state any more, and ERROR until it is
     * reset; or VFU_PENDING. NULL: no migration. */
    int (*change)(void *ctx, vfu_mig_state from, vfu_mig_state to);

    /* Gives up to len > 0 bytes of the device's state and returns how many; fewer: there is no more for now. In PRE_COPY and
     * STOP_COPY. */
    int64_t (*read)(void *ctx, void *buf, size_t len);

    /* Takes len > 0 bytes. In RESUMING. Return 0 or a negative errno. */
    int (*write)(void *ctx, const void *buf, size_t len);
} vfu_migration;

/* A part of a region whose writes, or accesses, a client may hand to a descriptor (KVM's ioeventfd and ioregionfd). */
typedef struct vfu_io_fd {
    uint32_t region;
    uint32_t type;         /* VFU_IO_FD_* */
    uint64_t offset, size; /* bytes; size 0: any width */
    int fd;                /* borrowed until the device is destroyed; may be that of others */
    uint32_t flags;        /* KVM's, for the type */
    uint64_t data;         /* datamatch or user_data */
} vfu_io_fd;

/* What of a region a client may map. The areas are multiples of its page size. */
typedef struct vfu_region_share {
    int fd;                            /* borrowed until the device is destroyed */
    uint64_t offset;                   /* of the region's byte 0 in fd, a multiple of the page size */
    const vfu_wire_sparse_area *areas; /* copied; NULL: the whole region */
    uint32_t area_count;
} vfu_region_share;

/* A region of the device's own, from index VFU_PCI_NUM_REGIONS on. */
typedef struct vfu_extra_region {
    uint64_t size;          /* bytes */
    uint32_t type, subtype; /* of the type capability: VFIO_REGION_TYPE_* of linux/vfio.h */
    bool read_only;
    const vfu_region_share *share; /* NULL: every access is a message */
} vfu_extra_region;

/*
 * What is done for clients that differ from the specification, or that need more of it. All off is right for QEMU.
 *
 *     no_mmap             never map a client's memory, every DMA is a message: for a device that isn't to be trusted
 *     map_exactly         map just the pages of each DMA_MAP, and unmap them with it, instead of each file once: a stray pointer
 *                         of the device meets nothing that is not mapped now. Costs an mmap() and a munmap() per mapping
 *     complete_accesses   region accesses that fail read all ones or are ignored, and are not answered with an error (but for
 *                         those above max_data_xfer_size): Cloud Hypervisor's client waits for ever for the rest of an error
 *                         reply
 *     msix_masks          the MSI-X table's masks and the function mask hold interrupts back, and the PBA shows them: for
 *                         simulators. QEMU and other clients of VFIO keep the table to themselves, and what they write must
 *                         have no effect
 *     exact_unmap         DMA_UNMAP must name exactly one mapping, else -ENOENT, as the specification's text has it, instead of
 *                         the kernel's semantics, which QEMU needs when a guest has an IOMMU
 */
typedef struct vfu_policy {
    bool no_mmap, map_exactly, complete_accesses, msix_masks, exact_unmap;
} vfu_policy;

typedef struct vfu_dev_desc {
    vfu_pci_desc pci;                 /* regions 0 to 5 are its BARs, 6 its ROM, 7 its configuration space */
    const vfu_region_share *share[6]; /* for each BAR; NULL: every access is a message */

    const vfu_extra_region *extra_regions; /* copied, as are shares and their areas */
    uint32_t extra_region_count;           /* at most 64 */
    const vfu_io_fd *io_fds;               /* copied */
    uint32_t io_fd_count;

    void *ctx; /* first argument of the callbacks */
    vfu_dev_callbacks callbacks;
    vfu_migration migration;

    uint32_t max_data_xfer_size; /* bytes that one message may carry; 0: 1 MiB; at most 16 MiB */
    uint32_t max_dma_maps;       /* 0: 65535 */
    uint32_t max_readers;        /* threads that do DMA, besides the one that polls; 0: 15 */
    uint32_t greeting_ms;        /* a client that has not sent VERSION by then is dropped; 0: 10000 */
    uint32_t dma_timeout_ms;     /* a DMA message that isn't answered by then fails with -ETIMEDOUT; 0: no limit */
    uint32_t busy_us;            /* vfu_dev_run: how long to look for messages again and again before sleeping; 0: not at all */
    bool twin_socket;            /* DMA messages on a socket of their own, if the client can */
    vfu_dma_layout dma_layout;   /* of DMA messages; 0: it is found out, for which a few more bytes may be read */
    vfu_policy policy;

    vfu_alloc alloc;   /* copied */
    vfu_logger logger; /* copied */
} vfu_dev_desc;

/* Makes a device that nobody can reach yet. Copies *desc. 0, -EINVAL, -ENOMEM. */
VFU_API int vfu_dev_create(vfu_dev **out, const vfu_dev_desc *desc);

/* Ends it: the client is dropped, a socket file that listen made is removed. NULL is fine. */
VFU_API void vfu_dev_destroy(vfu_dev *dev);

/* Drops the client, if there is one, as if it had left. Not from a callback. For a device with threads, which have to be at rest
 * before it is destroyed: when this returns, none waits for the answer to a message. */
VFU_API void vfu_dev_disconnect(vfu_dev *dev);

/* Where clients come from: a path to make, or a socket that listens or is connected already, which is taken, also on failure.
 * 0, -EBUSY: there is one already, or what vfu_sock_listen says; -ENOTSOCK. */
VFU_API int vfu_dev_listen(vfu_dev *dev, const char *path);
VFU_API int vfu_dev_attach(vfu_dev *dev, int fd);

/*
 * Loops. Either `run`, which returns 0 after vfu_dev_stop, -ENOTCONN when a connected socket that was attached is at its
 * end, or what poll() says. Or the caller's own: wait with poll() for what vfu_dev_fds asks, at most vfu_dev_timeout
 * milliseconds (-1: no limit), then call vfu_dev_poll, which handles what is there and never blocks. It returns 0, or
 * -ENOTCONN when there is no client and none can come.
 */
typedef struct vfu_pollfd {
    int fd;
    short events; /* POLLIN, POLLOUT */
} vfu_pollfd;
#define VFU_DEV_FDS 4

VFU_API int vfu_dev_run(vfu_dev *dev);
VFU_API int vfu_dev_poll(vfu_dev *dev);
VFU_API unsigned vfu_dev_fds(vfu_dev *dev, vfu_pollfd fds[VFU_DEV_FDS]);
VFU_API int vfu_dev_timeout(vfu_dev *dev);

/* Makes run return, within a few milliseconds, and ends the wait of a loop of the caller's own. Any thread, and signal
 * handlers. */
VFU_API void vfu_dev_stop(vfu_dev *dev);

/* Asks for the work callback. */
VFU_API void vfu_dev_want_work(vfu_dev *dev);

/*
 * Answers that come later. In a callback that may return VFU_PENDING, vfu_dev_ticket gives the request's ticket.
 * vfu_dev_complete answers it, from any thread, also before the callback has returned: result is 0 or a negative errno, and
 * data, copied, the len bytes that were read (NULL for others). 0; -ECANCELED: the client has gone, or has no such request;
 * -EINVAL: data of another length than was asked for.
 */
VFU_API uint64_t vfu_dev_ticket(vfu_dev *dev);
VFU_API int vfu_dev_complete(vfu_dev *dev, uint64_t ticket, int result, const void *data, size_t len);

/* Where migration stands; VFU_MIG_STATE_RUNNING for a device that has none. */
VFU_API vfu_mig_state vfu_dev_migration_state(const vfu_dev *dev);

/* The device's configuration space, to look at. */
VFU_API const vfu_pci *vfu_dev_pci(vfu_dev *dev);

/*
 * Interrupts. raise signals interrupt `vector` of an IRQ index other than INTx: one write(), any thread. 0; -ENOENT: the
 * client has assigned no eventfd; -EINVAL: no such interrupt. An eventfd that is blocking when it is assigned is polled before
 * each write. (One that the client makes blocking later, and fills up itself, holds the raising thread until it is read: the
 * two share the open file. A process that serves clients who don't trust each other gives each a process, or a thread, of
 * its own.) set_intx sets the level of the INTx line: it is signalled when it rises, and again when the client unmasks it
 * and it is still up.
 */
VFU_API int vfu_dev_raise(vfu_dev *dev, uint32_t index, uint32_t vector);
VFU_API void vfu_dev_set_intx(vfu_dev *dev, bool level);

/*
 * The client's memory. vfu_dev_iommu is the table; threads of the device open readers of it. vfu_dev_reader is the one of
 * the thread that polls. With memory that only messages reach, a reader of another thread waits for the client's answer;
 * that of the thread that polls gets -EDEADLK, since it is the one that would receive the answer, and since clients don't
 * answer while they wait for a reply themselves. It has vfu_dev_dma, which takes memory of every kind.
 */
VFU_API vfu_iommu *vfu_dev_iommu(vfu_dev *dev);
VFU_API vfu_iommu_reader *vfu_dev_reader(vfu_dev *dev);

/* A transfer between the client's memory and a buffer. The struct and the buffer are the caller's and stay where they are until
 * done is called. Fill in the first part, the rest zero. */
typedef struct vfu_dma {
    uint64_t iova;
    void *buf;
    size_t len;                                    /* bytes */
    bool to_client;                                /* true: buf to iova (DMA_WRITE); false: iova to buf (DMA_READ) */
    void (*done)(struct vfu_dma *dma, int result); /* by the thread that polls; 0 or as below */
    void *user;

    uint64_t fault; /* on failure: the first IOVA that failed; of a message its first */

    /* private */
    struct vfu_dma *next;
    uint64_t sent, finished; /* bytes */
    uint64_t deadline;       /* ms */
    bool active, unmapped;
} vfu_dma;

/*
 * Starts one. 0: it is done, `done` is not called. 1: messages are under way, `done` will be called. Or it failed, at once
 * or as the argument of done: -ENOENT, -EACCES: refused as a whole before a byte moved, or the client has unmapped it
 * meanwhile; -EINVAL: the range wraps; -EFAULT: memory is gone; -EIO: the client refused, or answered wrongly; -ETIMEDOUT:
 * not at all; -ENOTCONN: no client.
 */
VFU_API int vfu_dev_dma(vfu_dev *dev, vfu_dma *dma);

/* Forgets one that is under way; done is not called, and late replies are discarded. */
VFU_API void vfu_dev_dma_cancel(vfu_dev *dev, vfu_dma *dma);

/*
 * ==== client ===============================================================================================================
 *
 * The other end. A command is submitted, its reply comes as a completion; or a call does both and waits in between:
 *
 *      submit --> queued --- flush, poll, wait --> sent --- the reply, or the end --> completed --- poll, wait --> taken
 *
 * Whatever moves messages serves the device's DMA_READ and DMA_WRITE on the way, from the client's own vfu_iommu: a device
 * reaches what is mapped now, and nothing else. Replies are matched by id and command and checked in full: sizes, counts,
 * indexes, addresses, capability chains, areas, descriptors. Surplus descriptors are closed.
 *
 * Nothing is allocated after creation but for a region that is opened or has more areas than any before it, an interrupt index
 * when it is first assigned, and what `reconnects` keeps. What a server can make the client hold is bounded by
 * max_data_xfer_size: requests wait in a queue that refuses more (-EAGAIN), and the device's requests are left in the socket
 * while the server doesn't take the answers to earlier ones. Replies are received all the same, so that two ends that both wait
 * to be read can't hold each other up.
 *
 * All functions return 0 unless they say otherwise; or the error with which the server answered (-EIO if it named none); or:
 *     -EPIPE      the server has closed, or the connection was given up before
 *     -ETIMEDOUT  a reply hasn't come within timeout_ms, or the server hasn't taken a byte for that long
 *     -EPROTO     the server has sent something that no server may
 * These three end the connection: requests under way complete with that error, and everything but the taking of completions says
 * -EPIPE from then on, until vfu_client_reconnect.
 */

typedef struct vfu_client vfu_client;

typedef struct vfu_client_desc {
    uint32_t timeout_ms;         /* for each reply; 0: 5000 */
    uint32_t max_data_xfer_size; /* 0: 1 MiB; at most 16 MiB */
    uint32_t max_dma_maps;       /* 0: 65535 */
    uint32_t max_in_flight;      /* requests submitted and not taken; 0: 64; at most 4096 */
    bool twin_socket;            /* take the device's requests on a socket of their own, if the server can */
    bool reconnects;             /* keep copies of the descriptors of mappings and interrupts, for vfu_client_reconnect */
    vfu_alloc alloc;             /* copied */
    vfu_logger logger;           /* copied */
} vfu_client_desc;

/*
 * Connects and negotiates (specification, "VFIO_USER_VERSION"); waits for both, at most timeout_ms each. attach takes a
 * connected socket, also on failure. desc may be NULL. 0; what connect() says; -ETIMEDOUT; -EPROTO; -EPIPE; -EINVAL: a number in
 * desc is out of range; -ENOMEM.
 */
VFU_API int vfu_client_connect(vfu_client **out, const char *path, const vfu_client_desc *desc);
VFU_API int vfu_client_attach(vfu_client **out, int fd, const vfu_client_desc *desc);

/* Ends it: what is under way is forgotten. NULL is fine. */
VFU_API void vfu_client_destroy(vfu_client *client);

/*
 * Connects again, to a server that was started again or that closed: negotiates, looks whether it is still the same device
 * (number of regions and interrupts, and the regions that were asked for: flags, size, areas), opens the regions that were open,
 * and sends its mappings and interrupts as they are. A connection that still stands is closed. Completions not taken yet stay.
 * reattach takes a connected socket. 0; as vfu_client_connect; -ESTALE: it is another device; -ENOTSUP: desc.reconnects wasn't
 * set. After a failure there is no connection, and it can be tried again.
 */
VFU_API int vfu_client_reconnect(vfu_client *client, const char *path);
VFU_API int vfu_client_reattach(vfu_client *client, int fd);

/* The socket, or -1; and what the server said in VERSION. */
VFU_API int vfu_client_fd(const vfu_client *client);
VFU_API const vfu_caps *vfu_client_caps(const vfu_client *client);

/* ---- requests under way ---- */

/* A command, and where its reply goes. Set what isn't needed to 0. */
typedef struct vfu_client_request {
    vfu_msg msg;    /* the command; its id is set. flags: 0, or VFU_HDR_NO_REPLY: posted, there will be no completion */
    const int *fds; /* borrowed during the call */
    unsigned fd_count;
    void *buf;     /* gets the reply's data; the caller leaves it alone until the completion is taken. May be NULL */
    size_t room;   /* its bytes; for REGION_READ and MIG_DATA_READ at least what is asked for */
    int *received; /* gets the reply's descriptors, which it gives; -1 in the rest. Lives as long as buf */
    unsigned max_received;
    void *user;
} vfu_client_request;

typedef struct vfu_completion {
    uint16_t id;       /* what submit returned */
    void *user;        /* the request's */
    int result;        /* 0 or a negative errno. -EMSGSIZE: the reply has more data than buf has room, and none of it was kept */
    vfu_msg reply;     /* zero if there was none; views point into buf */
    unsigned fd_count; /* descriptors in received */
} vfu_completion;

/*
 * Submits a command of any kind but VERSION, and doesn't block: the data is copied or sent. It leaves with the next flush, poll
 * or wait, together with others in one system call; at once if it carries descriptors or much data. Returns its id, 0 to 65535,
 * unique among those that were not taken. -EAGAIN: max_in_flight are under way, or the server doesn't read: poll, and come
 * again; -EINVAL: the message is impossible, or larger than the two ends have agreed upon; -EPIPE and so on. What such a command
 * maps or assigns isn't noted here.
 */
VFU_API int vfu_client_submit(vfu_client *client, const vfu_client_request *request);

/* The same for REGION_READ and REGION_WRITE of at most max_data_xfer_size bytes, with a reply; and for posted writes: 0. */
VFU_API int vfu_client_submit_read(vfu_client *client, uint32_t region, uint64_t offset, void *buf, uint32_t len, void *user);
VFU_API int vfu_client_submit_write(vfu_client *client, uint32_t region, uint64_t offset, const void *buf, uint32_t len,
                                    void *user);
VFU_API int vfu_client_post_write(vfu_client *client, uint32_t region, uint64_t offset, const void *buf, uint32_t len);

/* Sends what is queued. 0: all of it; -EAGAIN: the server doesn't take more now. */
VFU_API int vfu_client_flush(vfu_client *client);

/*
 * Takes a completion, the oldest first. When there is none it sends what is queued, receives once and serves the device.
 * Never blocks. 1: *out is one; 0: none has come.
 */
VFU_API int vfu_client_poll(vfu_client *client, vfu_completion *out);

/* Waits for the completion with that id, or for any (VFU_CLIENT_ANY), and takes it: 1. -ENOENT: none is under way. */
#define VFU_CLIENT_ANY (-1)
VFU_API int vfu_client_wait(vfu_client *client, int id, vfu_completion *out);

/* Requests that were submitted and not taken. */
VFU_API unsigned vfu_client_in_flight(const vfu_client *client);

/* For a loop of the caller's own: what to wait for with poll(), at most vfu_client_timeout milliseconds (-1: no limit); then
 * call vfu_client_poll until it returns 0. */
#define VFU_CLIENT_FDS 2
VFU_API unsigned vfu_client_fds(vfu_client *client, vfu_pollfd fds[VFU_CLIENT_FDS]);
VFU_API int vfu_client_timeout(vfu_client *client);

/* Serves the device's requests until wake_fd (-1: none) is readable or timeout_ms (-1: no limit) have passed. 1: it is
 * readable; 0: the time has passed. */
VFU_API int vfu_client_serve(vfu_client *client, int wake_fd, int timeout_ms);

/* One request and its reply, whatever it is: the general form of what follows. The id and flags of *request are set; fds are
 * borrowed. Views in *reply, which may be *request, are borrowed until the next call; it is zero if none came. received (may be NULL) gets up to
 * max_received descriptors, which it gives, and -1 in the rest. */
VFU_API int vfu_client_call(vfu_client *client, vfu_msg *request, const int *fds, unsigned fd_count, vfu_msg *reply,
                            int *received, unsigned max_received);

/* ---- what the device is ---- */

VFU_API int vfu_client_info(vfu_client *client, vfu_wire_device_info *out);
VFU_API int vfu_client_irq_info(vfu_client *client, uint32_t index, vfu_wire_irq_info *out);

/* A region, with the descriptor and the areas that may be mapped. */
typedef struct vfu_client_region {
    uint32_t flags; /* VFU_REGION_INFO_* */
    uint64_t size, offset;
    int fd;                            /* given; -1: none */
    uint32_t type, subtype;            /* of the type capability; 0: none */
    uint32_t area_count;               /* 0 with VFU_REGION_INFO_MMAP: the whole region */
    const vfu_wire_sparse_area *areas; /* inside the region; borrowed until the next vfu_client_region_info or _open */
} vfu_client_region;

/* However many areas there are, if their description fits max_data_xfer_size; -EPROTO if it doesn't. */
VFU_API int vfu_client_region_info(vfu_client *client, uint32_t index, vfu_client_region *out);

/* A sub-region whose writes, or accesses, go to a descriptor. Entries of 48 bytes are libvfio-user's, with a shadow. */
typedef struct vfu_client_io_fd {
    uint64_t offset, size; /* size 0: any width */
    uint32_t type;         /* VFU_IO_FD_*, or 2: an ioeventfd that finds the value in shared memory */
    uint32_t flags;        /* KVM's, for the type */
    uint64_t data;         /* datamatch or user_data */
    unsigned fd_index;     /* into fds */
    int shadow_index;      /* likewise: the shared memory; -1: none */
    uint64_t shadow_offset;
} vfu_client_io_fd;

/* Returns how many a region has and puts up to `max` of them to `out`. fds gets the descriptors, which it gives, and -1 in the
 * rest; entries name only those that came. */
VFU_API int vfu_client_io_fds(vfu_client *client, uint32_t region, vfu_client_io_fd *out, uint32_t max, int fds[VFU_FDS_MAX]);

/* ---- regions ---- */

/*
 * Chooses how a region is accessed from now on, where the device allows it. `how`:
 *     BY_MEMORY   its areas are mapped, and accesses inside them are loads and stores, naturally aligned, of 1, 2, 4 or (on
 *                 64-bit machines) 8 bytes: the widest that fit, each word once. An access is behind all that this thread did
 *                 before, and before all that it does afterwards. Areas that aren't made of whole pages stay messages, as do
 *                 those beyond the first 1024. Memory that the server takes away is -EFAULT
 *     BY_EVENTFD  a write that hits an ioeventfd (offset, width, datamatch) signals it, and stores its value in the shared
 *                 memory, if it has some. A server that fills its own eventfd up, and makes it blocking at the right moment,
 *                 holds the writing thread: not for servers that aren't trusted
 * Everything else is a message; and so are accesses while requests or posted writes are under way, which keeps them in order.
 * -ENODEV: what the server gave can't be mapped safely, or is no eventfd (the region is accessed by message); -ENOMEM.
 * Opening it again replaces; `how` 0 closes.
 */
#define VFU_CLIENT_BY_MEMORY  1u
#define VFU_CLIENT_BY_EVENTFD 2u
VFU_API int vfu_client_region_open(vfu_client *client, uint32_t index, uint32_t how);

/* Reads or writes a region: by message, in as many as max_data_xfer_size needs, or as vfu_client_region_open has chosen. */
VFU_API int vfu_client_region_read(vfu_client *client, uint32_t region, uint64_t offset, void *buf, size_t len);
VFU_API int vfu_client_region_write(vfu_client *client, uint32_t region, uint64_t offset, const void *buf, size_t len);

/* Several small writes, in one REGION_WRITE_MULTI if the server takes it, else one by one. Returns how many were done: all, or
 * those before the first that failed, if the server says so. */
VFU_API int vfu_client_write_multi(vfu_client *client, const vfu_wire_write_one *writes, uint32_t count);

/* ---- memory and interrupts ---- */

/*
 * Gives memory to the device: [host, host + size) at iova. prot is VFU_IOMMU_READ, VFU_IOMMU_WRITE or both, as the device
 * sees it. With fd >= 0, which is borrowed, the device may map it: host must be the same memory as fd at offset. Without,
 * or when the server takes no descriptors, the device uses messages. Memory at host is borrowed until unmapped. unmap has the
 * semantics of vfu_iommu_unmap, and the server's answer counts: when it refuses, the mapping stays.
 */
VFU_API int vfu_client_dma_map(vfu_client *client, uint64_t iova, uint64_t size, uint32_t prot, void *host, int fd,
                               uint64_t offset);
VFU_API int vfu_client_dma_unmap(vfu_client *client, uint64_t iova, uint64_t size);

/* The table from which the device's requests are served. Changing it by hand is allowed, but the server is not told. */
VFU_API vfu_iommu *vfu_client_iommu(vfu_client *client);

/* Assigns eventfds (borrowed) to interrupts [start, start + count) of an index; NULL: de-assigns them. In chunks of what the
 * server takes; after an error those of the first chunks are assigned. unmask_by has the device unmask an interrupt when its
 * eventfd is signalled (INTx). irq_action masks, unmasks or triggers (VFU_IRQ_SET_ACTION_*); with count 0 and TRIGGER it disables
 * the whole index. */
VFU_API int vfu_client_irq_assign(vfu_client *client, uint32_t index, uint32_t start, uint32_t count, const int *eventfds);
VFU_API int vfu_client_irq_unmask_by(vfu_client *client, uint32_t index, uint32_t start, uint32_t count, const int *eventfds);
VFU_API int vfu_client_irq_action(vfu_client *client, uint32_t index, uint32_t start, uint32_t count, uint32_t action);

VFU_API int vfu_client_reset(vfu_client *client);

/*
 * ---- migration ----
 *
 * Specification, "VFIO_USER_DEVICE_FEATURE". flags gives VFU_MIG_*. go takes the device to a state by the shortest legal way,
 * arc by arc, and never through a state that saves (PRE_COPY, STOP_COPY) on the way to another; *reached (may be NULL) is where
 * it stands then, also after a failure. -EINVAL: there is no way; out of VFU_MIG_STATE_ERROR only vfu_client_reset leads.
 *
 * read gets up to len bytes of the device's state, in PRE_COPY and STOP_COPY, and returns how many: fewer: there is no more for
 * now. write puts len bytes, in RESUMING.
 */
VFU_API int vfu_client_mig_flags(vfu_client *client, uint64_t *flags);
VFU_API int vfu_client_mig_state(vfu_client *client, vfu_mig_state *state);
VFU_API int vfu_client_mig_go(vfu_client *client, vfu_mig_state target, vfu_mig_state *reached);
VFU_API int64_t vfu_client_mig_read(vfu_client *client, void *buf, size_t len);
VFU_API int vfu_client_mig_write(vfu_client *client, const void *buf, size_t len);

/*
 * The device's dirty log. start: *page_size is what is wanted, and then what was chosen; without ranges every write is logged.
 * report gets and clears the bits of [iova, iova + length): one for each page of page_size bytes, a power of two, the first in
 * bit 0 of bitmap[0]; words is at least what that needs. In as many messages as max_data_xfer_size needs. -E2BIG: the ranges don't
 * fit one message; -EINVAL: page size, range or words are impossible.
 */
VFU_API int vfu_client_log_start(vfu_client *client, uint64_t *page_size, const vfu_wire_feature_log_range *ranges,
                                 uint32_t count);
VFU_API int vfu_client_log_report(vfu_client *client, uint64_t iova, uint64_t length, uint64_t page_size, uint64_t *bitmap,
                                  size_t words);
VFU_API int vfu_client_log_stop(vfu_client *client);

#endif /* VFU_CODEC_ONLY */

#ifdef __cplusplus
}
#endif
#endif /* VFU_H */

/* ========================================================================================================================= */
/* ==== implementation ===================================================================================================== */
/* ========================================================================================================================= */

#if defined(VFU_IMPLEMENTATION) && !defined(VFUX_IMPLEMENTED)
#define VFUX_IMPLEMENTED

#ifndef VFU_CODEC_ONLY
#include <errno.h>
#endif
#include <string.h>

/* The values of Linux, for builds without <errno.h>; they are what an error reply carries, too. */
#if !__STDC_HOSTED__ || defined(VFU_CODEC_ONLY)
#ifndef EAGAIN
#define EAGAIN 11
#endif
#ifndef EINVAL
#define EINVAL 22
#endif
#ifndef ENOSYS
#define ENOSYS 38
#endif
#ifndef EBADMSG
#define EBADMSG 74
#endif
#ifndef EMSGSIZE
#define EMSGSIZE 90
#endif
#endif

/*
 * ==== wire =================================================================================================================
 */

/* Lists of names: each ends with a NUL, and is empty for a number without a name. */
static const char vfux_cmd_names[] =
    "\0VERSION\0DMA_MAP\0DMA_UNMAP\0DEVICE_GET_INFO\0DEVICE_GET_REGION_INFO\0DEVICE_GET_REGION_IO_FDS\0"
    "DEVICE_GET_IRQ_INFO\0DEVICE_SET_IRQS\0REGION_READ\0REGION_WRITE\0DMA_READ\0DMA_WRITE\0"
    "DEVICE_RESET\0\0REGION_WRITE_MULTI\0DEVICE_FEATURE\0MIG_DATA_READ\0MIG_DATA_WRITE";

/* Numbered as Linux does on most machines, whatever this compiler's <errno.h> says: the index is the value on the wire. */
static const char vfux_errno_names[] =
    "\0EPERM\0ENOENT\0ESRCH\0EINTR\0EIO\0ENXIO\0E2BIG\0ENOEXEC\0EBADF\0ECHILD\0EAGAIN\0"
    "ENOMEM\0EACCES\0EFAULT\0ENOTBLK\0EBUSY\0EEXIST\0EXDEV\0ENODEV\0ENOTDIR\0EISDIR\0"
    "EINVAL\0ENFILE\0EMFILE\0ENOTTY\0ETXTBSY\0EFBIG\0ENOSPC\0ESPIPE\0EROFS\0EMLINK\0EPIPE\0"
    "EDOM\0ERANGE\0EDEADLK\0ENAMETOOLONG\0ENOLCK\0ENOSYS\0ENOTEMPTY\0ELOOP\0\0ENOMSG\0"
    "EIDRM\0ECHRNG\0EL2NSYNC\0EL3HLT\0EL3RST\0ELNRNG\0EUNATCH\0ENOCSI\0EL2HLT\0EBADE\0"
    "EBADR\0EXFULL\0ENOANO\0EBADRQC\0EBADSLT\0\0EBFONT\0ENOSTR\0ENODATA\0ETIME\0ENOSR\0"
    "ENONET\0ENOPKG\0EREMOTE\0ENOLINK\0EADV\0ESRMNT\0ECOMM\0EPROTO\0EMULTIHOP\0EDOTDOT\0"
    "EBADMSG\0EOVERFLOW\0ENOTUNIQ\0EBADFD\0EREMCHG\0ELIBACC\0ELIBBAD\0ELIBSCN\0ELIBMAX\0"
    "ELIBEXEC\0EILSEQ\0ERESTART\0ESTRPIPE\0EUSERS\0ENOTSOCK\0EDESTADDRREQ\0EMSGSIZE\0EPROTOTYPE\0"
    "ENOPROTOOPT\0EPROTONOSUPPORT\0ESOCKTNOSUPPORT\0EOPNOTSUPP\0EPFNOSUPPORT\0EAFNOSUPPORT\0EADDRINUSE\0"
    "EADDRNOTAVAIL\0ENETDOWN\0ENETUNREACH\0ENETRESET\0ECONNABORTED\0ECONNRESET\0ENOBUFS\0EISCONN\0"
    "ENOTCONN\0ESHUTDOWN\0ETOOMANYREFS\0ETIMEDOUT\0ECONNREFUSED\0EHOSTDOWN\0EHOSTUNREACH\0EALREADY\0"
    "EINPROGRESS\0ESTALE\0EUCLEAN\0ENOTNAM\0ENAVAIL\0EISNAM\0EREMOTEIO\0EDQUOT\0ENOMEDIUM\0"
    "EMEDIUMTYPE\0ECANCELED";

#define VFUX_COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* Name i of such a list of `size` bytes; NULL: it has none. */
static const char *vfux_name(const char *names, size_t size, uint32_t i)
{
    const char *end = names + size;
    while (i-- > 0 && names < end)
        names += strlen(names) + 1;
    return names < end && *names != '\0' ? names : NULL;
}

VFU_API const char *vfu_cmd_name(uint16_t cmd)
{
    const char *name = vfux_name(vfux_cmd_names, sizeof(vfux_cmd_names), cmd);
    return name != NULL ? name : "?";
}

VFU_API const char *vfu_errno_name(int error)
{
    uint32_t i = error < 0 ? 0u - (uint32_t)error : (uint32_t)error;
    const char *name = vfux_name(vfux_errno_names, sizeof(vfux_errno_names), i);
    return name != NULL ? name : "?";
}

/* Text of limited size, like snprintf: len counts all that was added, out holds what fits. Shared by the next two sections. */
typedef struct vfux_text {
    char *out;
    size_t cap;
    size_t len;
} vfux_text;

static void vfux_text_bytes(vfux_text *t, const char *s, size_t n)
{
    if (t->len < t->cap) {
        size_t room = t->cap - t->len;
        memcpy(t->out + t->len, s, n < room ? n : room);
    }
    t->len += n;
}

static void vfux_text_add(vfux_text *t, const char *s) { vfux_text_bytes(t, s, strlen(s)); }

/* Divides by 10 in pieces of 16 bits and returns the rest: 32-bit compilers would call a routine for it that may not be
 * there. */
static uint32_t vfux_divide_by_10(uint64_t *value)
{
    uint64_t quotient = 0;
    uint32_t rest = 0;

    for (int shift = 48; shift >= 0; shift -= 16) {
        uint32_t piece = rest << 16 | (uint32_t)(*value >> shift & 0xffff);
        quotient = quotient << 16 | piece / 10;
        rest = piece % 10;
    }
    *value = quotient;
    return rest;
}

/* At least width digits */
static void vfux_text_digits(vfux_text *t, uint64_t value, bool hex, size_t width)
{
    char digits[20]; /* 2^64 - 1 in decimal */
    size_t at = sizeof digits;

    do {
        uint32_t digit = hex ? (uint32_t)(value & 15) : vfux_divide_by_10(&value);
        digits[--at] = "0123456789abcdef"[digit];
        value = hex ? value >> 4 : value;
    } while (value != 0 || sizeof digits - at < width);
    vfux_text_bytes(t, digits + at, sizeof digits - at);
}

static void vfux_text_dec(vfux_text *t, const char *label, uint64_t value)
{
    vfux_text_add(t, label);
    vfux_text_digits(t, value, false, 1);
}

static void vfux_text_hex(vfux_text *t, const char *label, uint64_t value)
{
    vfux_text_add(t, label);
    vfux_text_add(t, "0x");
    vfux_text_digits(t, value, true, 1);
}

/*
 * ==== capabilities =========================================================================================================
 */

VFU_API void vfu_caps_defaults(vfu_caps *caps)
{
    memset(caps, 0, sizeof *caps);
    caps->max_msg_fds = 1;
    caps->max_data_xfer_size = 1048576;
    caps->max_dma_maps = 65535;
    caps->twin_fd_index = -1;
    caps->pgsizes = 4096;
    caps->migration_pgsize = 4096;
}

/* Where in the document a value stands. The first ones are objects, whose members have names that we know. */
typedef enum vfux_json_place {
    VFUX_JSON_TOP,
    VFUX_JSON_CAPS,
    VFUX_JSON_TWIN,
    VFUX_JSON_MIGRATION,
    VFUX_JSON_OBJECTS, /* below this: known objects */
    VFUX_JSON_MSG_FDS = VFUX_JSON_OBJECTS,
    VFUX_JSON_XFER,
    VFUX_JSON_DMA_MAPS,
    VFUX_JSON_PGSIZES,
    VFUX_JSON_TWIN_INDEX,
    VFUX_JSON_MIG_PGSIZE,
    VFUX_JSON_NUMBERS, /* below this, from VFUX_JSON_OBJECTS: known numbers */
    VFUX_JSON_WRITE_MULTIPLE = VFUX_JSON_NUMBERS,
    VFUX_JSON_TWIN_SUPPORTED,
    VFUX_JSON_BOOLEANS, /* below this, from VFUX_JSON_NUMBERS: known booleans */
    VFUX_JSON_UNKNOWN = VFUX_JSON_BOOLEANS
} vfux_json_place;

typedef struct vfux_json_name {
    uint8_t parent; /* vfux_json_place */
    uint8_t place;
    const char *name;
} vfux_json_name;

static const vfux_json_name vfux_json_names[] = {
    {VFUX_JSON_TOP, VFUX_JSON_CAPS, "capabilities"},
    {VFUX_JSON_CAPS, VFUX_JSON_MSG_FDS, "max_msg_fds"},
    {VFUX_JSON_CAPS, VFUX_JSON_XFER, "max_data_xfer_size"},
    {VFUX_JSON_CAPS, VFUX_JSON_DMA_MAPS, "max_dma_maps"},
    {VFUX_JSON_CAPS, VFUX_JSON_PGSIZES, "pgsizes"},
    {VFUX_JSON_CAPS, VFUX_JSON_TWIN, "twin_socket"},
    {VFUX_JSON_CAPS, VFUX_JSON_WRITE_MULTIPLE, "write_multiple"},
    {VFUX_JSON_CAPS, VFUX_JSON_MIGRATION, "migration"},
    {VFUX_JSON_TWIN, VFUX_JSON_TWIN_SUPPORTED, "supported"},
    {VFUX_JSON_TWIN, VFUX_JSON_TWIN_INDEX, "fd_index"},
    {VFUX_JSON_MIGRATION, VFUX_JSON_MIG_PGSIZE, "pgsize"},
};

#define VFUX_JSON_NAME_MAX 24u /* room for the longest known name and the mark of a longer one */

typedef struct vfux_json {
    const uint8_t *at;
    const uint8_t *end;
    vfu_caps *caps;
    bool mismatch;                     /* a known name had a value of the wrong kind: -EINVAL, if the rest is well-formed */
    uint8_t depth;                     /* open containers, at most VFU_CAPS_DEPTH_MAX */
    uint8_t stack[VFU_CAPS_DEPTH_MAX]; /* of each: its place, or VFUX_JSON_ARRAY */
    size_t name_len;                   /* of the last string; VFUX_JSON_NAME_MAX if it was longer than any known name */
    uint8_t name[VFUX_JSON_NAME_MAX];
} vfux_json;

#define VFUX_JSON_ARRAY 0xffu

static bool vfux_json_more(vfux_json *j) { return j->at < j->end; }

static void vfux_json_space(vfux_json *j)
{
    while (vfux_json_more(j) && (*j->at == ' ' || *j->at == '\t' || *j->at == '\n' || *j->at == '\r')) {
        j->at++;
    }
}

static bool vfux_json_take(vfux_json *j, uint8_t c)
{
    if (!vfux_json_more(j) || *j->at != c) {
        return false;
    }
    j->at++;
    return true;
}

static bool vfux_json_word(vfux_json *j, const char *word)
{
    size_t n = strlen(word);

    if ((size_t)(j->end - j->at) < n || memcmp(j->at, word, n) != 0) {
        return false;
    }
    j->at += n;
    return true;
}

static bool vfux_json_digit(const vfux_json *j) { return j->at < j->end && *j->at >= '0' && *j->at <= '9'; }

/* Known names are plain ASCII, so a code point above is enough of a difference and is kept as one byte that never matches. */
static void vfux_json_name_add(vfux_json *j, uint32_t code)
{
    if (j->name_len < VFUX_JSON_NAME_MAX) {
        j->name[j->name_len++] = code < 0x80 ? (uint8_t)code : 0xff;
    }
}

/* One code point of two or more bytes: no overlong form, no surrogate, nothing above U+10FFFF (RFC 3629) */
static bool vfux_json_utf8(vfux_json *j)
{
    uint8_t first = *j->at++;
    uint8_t low = 0x80;
    uint8_t high = 0xbf;
    int more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;

    if (first < 0xc2 || first > 0xf4) {
        return false;
    }
    if (first == 0xe0) {
        low = 0xa0;
    } else if (first == 0xed) {
        high = 0x9f;
    } else if (first == 0xf0) {
        low = 0x90;
    } else if (first == 0xf4) {
        high = 0x8f;
    }
    for (; more > 0; more--) {
        if (!vfux_json_more(j) || *j->at < low || *j->at > high) {
            return false;
        }
        j->at++;
        low = 0x80;
        high = 0xbf;
    }
    vfux_json_name_add(j, 0x80);
    return true;
}

/* The four digits of a \u escape */
static bool vfux_json_hex4(vfux_json *j, uint32_t *code)
{
    *code = 0;
    for (int i = 0; i < 4; i++) {
        if (!vfux_json_more(j)) {
            return false;
        }
        uint8_t c = *j->at++;
        uint8_t letter = (uint8_t)(c | 0x20);
        if (c >= '0' && c <= '9') {
            *code = *code << 4 | (uint32_t)(c - '0');
        } else if (letter >= 'a' && letter <= 'f') {
            *code = *code << 4 | (uint32_t)(letter - 'a' + 10);
        } else {
            return false;
        }
    }
    return true;
}

/* What follows a backslash. Surrogates must come as a pair: half of one has no UTF-8. */
static bool vfux_json_escape(vfux_json *j)
{
    static const char plain[] = "\"\\/bfnrt";
    static const char means[] = "\"\\/\b\f\n\r\t";
    uint32_t code;
    uint32_t second;

    if (vfux_json_take(j, 'u')) {
        if (!vfux_json_hex4(j, &code) || (code >= 0xdc00 && code <= 0xdfff)) {
            return false;
        }
        if (code >= 0xd800 && code <= 0xdbff &&
            (!vfux_json_word(j, "\\u") || !vfux_json_hex4(j, &second) || second < 0xdc00 || second > 0xdfff)) {
            return false;
        }
        vfux_json_name_add(j, code);
        return true;
    }
    for (size_t i = 0; plain[i] != '\0'; i++) {
        if (vfux_json_take(j, (uint8_t)plain[i])) {
            vfux_json_name_add(j, (uint8_t)means[i]);
            return true;
        }
    }
    return false;
}

/* A string with its quotes, whose beginning is left in j->name */
static bool vfux_json_string(vfux_json *j)
{
    j->name_len = 0;
    if (!vfux_json_take(j, '"')) {
        return false;
    }
    while (vfux_json_more(j)) {
        uint8_t c = *j->at;
        if (c == '"') {
            j->at++;
            return true;
        }
        if (c < 0x20) {
            return false;
        }
        if (c >= 0x80) {
            if (!vfux_json_utf8(j)) {
                return false;
            }
            continue;
        }
        j->at++;
        if (c != '\\') {
            vfux_json_name_add(j, c);
        } else if (!vfux_json_escape(j)) {
            return false;
        }
    }
    return false;
}

/* A number. *plain says whether it is an integer without sign, fraction or exponent that fits *value. */
static bool vfux_json_number(vfux_json *j, uint64_t *value, bool *plain)
{
    *value = 0;
    *plain = !vfux_json_take(j, '-');
    if (!vfux_json_digit(j)) {
        return false;
    }
    if (!vfux_json_take(j, '0')) {
        while (vfux_json_digit(j)) {
            uint64_t digit = (uint64_t)(*j->at++ - '0');
            if (*value > UINT64_MAX / 10 || (*value == UINT64_MAX / 10 && digit > UINT64_MAX % 10)) {
                *plain = false;
            }
            *value = *value * 10 + digit; /* may wrap, after which plain is false */
        }
    }
    if (vfux_json_take(j, '.')) {
        *plain = false;
        if (!vfux_json_digit(j)) {
            return false;
        }
        while (vfux_json_digit(j)) {
            j->at++;
        }
    }
    if (vfux_json_take(j, 'e') || vfux_json_take(j, 'E')) {
        *plain = false;
        if (!vfux_json_take(j, '+')) {
            (void)vfux_json_take(j, '-');
        }
        if (!vfux_json_digit(j)) {
            return false;
        }
        while (vfux_json_digit(j)) {
            j->at++;
        }
    }
    return true;
}

/* A known object begins. It replaces an earlier one of the same name as a whole. */
static void vfux_caps_enter(vfu_caps *caps, vfux_json_place place)
{
    vfu_caps defaults;

    vfu_caps_defaults(&defaults);
    switch (place) {
    case VFUX_JSON_CAPS: *caps = defaults; break;
    case VFUX_JSON_TWIN:
        caps->present |= VFU_CAPS_TWIN_SOCKET;
        caps->twin_socket = false;
        caps->twin_fd_index = -1;
        break;
    case VFUX_JSON_MIGRATION:
        caps->present |= VFU_CAPS_MIGRATION;
        caps->migration = true;
        caps->migration_pgsize = defaults.migration_pgsize;
        break;
    default: break;
    }
}

/* False if the value is out of the field's range */
static bool vfux_caps_number(vfu_caps *caps, vfux_json_place place, uint64_t value)
{
    switch (place) {
    case VFUX_JSON_MSG_FDS:
        caps->present |= VFU_CAPS_MAX_MSG_FDS;
        caps->max_msg_fds = (uint32_t)value;
        return value <= UINT32_MAX;
    case VFUX_JSON_XFER:
        caps->present |= VFU_CAPS_MAX_DATA_XFER_SIZE;
        caps->max_data_xfer_size = value;
        return true;
    case VFUX_JSON_DMA_MAPS:
        caps->present |= VFU_CAPS_MAX_DMA_MAPS;
        caps->max_dma_maps = (uint32_t)value;
        return value <= UINT32_MAX;
    case VFUX_JSON_PGSIZES:
        caps->present |= VFU_CAPS_PGSIZES;
        caps->pgsizes = value;
        return true;
    case VFUX_JSON_TWIN_INDEX: caps->twin_fd_index = (int32_t)(value & INT32_MAX); return value <= INT32_MAX;
    case VFUX_JSON_MIG_PGSIZE: caps->migration_pgsize = value; return true;
    default: return true;
    }
}

static void vfux_caps_boolean(vfu_caps *caps, vfux_json_place place, bool value)
{
    if (place == VFUX_JSON_WRITE_MULTIPLE) {
        caps->present |= VFU_CAPS_WRITE_MULTIPLE;
        caps->write_multiple = value;
    } else if (place == VFUX_JSON_TWIN_SUPPORTED) {
        caps->twin_socket = value;
    }
}

/* The value of a known name has to be of its kind: from first to below end are the places where this kind belongs. */
static void vfux_json_expect(vfux_json *j, vfux_json_place place, vfux_json_place first, vfux_json_place end)
{
    if (place != VFUX_JSON_UNKNOWN && (place < first || place >= end)) {
        j->mismatch = true;
    }
}

/* A value that is no container */
static bool vfux_json_scalar(vfux_json *j, vfux_json_place place)
{
    uint64_t value;
    bool plain;
    uint8_t c = *j->at;

    if (c == '"') {
        vfux_json_expect(j, place, VFUX_JSON_UNKNOWN, VFUX_JSON_UNKNOWN);
        return vfux_json_string(j);
    }
    if (c == '-' || vfux_json_digit(j)) {
        if (!vfux_json_number(j, &value, &plain)) {
            return false;
        }
        vfux_json_expect(j, place, VFUX_JSON_OBJECTS, VFUX_JSON_NUMBERS);
        if (place != VFUX_JSON_UNKNOWN && (!plain || !vfux_caps_number(j->caps, place, value))) {
            j->mismatch = true;
        }
        return true;
    }
    if (c == 't' || c == 'f') {
        vfux_json_expect(j, place, VFUX_JSON_NUMBERS, VFUX_JSON_BOOLEANS);
        vfux_caps_boolean(j->caps, place, c == 't');
        return vfux_json_word(j, c == 't' ? "true" : "false");
    }
    vfux_json_expect(j, place, VFUX_JSON_UNKNOWN, VFUX_JSON_UNKNOWN);
    return vfux_json_word(j, "null");
}

static vfux_json_place vfux_json_lookup(const vfux_json *j)
{
    for (size_t i = 0; i < VFUX_COUNT(vfux_json_names); i++) {
        const vfux_json_name *known = &vfux_json_names[i];
        if (known->parent == j->stack[j->depth - 1] && strlen(known->name) == j->name_len &&
            memcmp(known->name, j->name, j->name_len) == 0) {
            return (vfux_json_place)known->place;
        }
    }
    return VFUX_JSON_UNKNOWN;
}

/* A member's name and its colon, in the object on top of the stack */
static bool vfux_json_member(vfux_json *j, vfux_json_place *place)
{
    vfux_json_space(j);
    if (!vfux_json_string(j)) {
        return false;
    }
    *place = vfux_json_lookup(j);
    vfux_json_space(j);
    return vfux_json_take(j, ':');
}

static bool vfux_json_open(vfux_json *j, vfux_json_place place, bool array)
{
    if (j->depth == VFU_CAPS_DEPTH_MAX) {
        return false;
    }
    j->at++;
    if (array) {
        vfux_json_expect(j, place, VFUX_JSON_UNKNOWN, VFUX_JSON_UNKNOWN);
        j->stack[j->depth++] = VFUX_JSON_ARRAY;
    } else {
        vfux_json_expect(j, place, VFUX_JSON_TOP, VFUX_JSON_OBJECTS);
        vfux_caps_enter(j->caps, place);
        j->stack[j->depth++] = (uint8_t)place;
    }
    return true;
}

/* After a value: closes what ends here, and steps to the next value, whose place is left in *place. *done is set at the end. */
static bool vfux_json_next(vfux_json *j, vfux_json_place *place, bool *done)
{
    while (j->depth > 0) {
        bool array = j->stack[j->depth - 1] == VFUX_JSON_ARRAY;
        vfux_json_space(j);
        if (vfux_json_take(j, ',')) {
            *place = VFUX_JSON_UNKNOWN;
            return array || vfux_json_member(j, place);
        }
        if (!vfux_json_take(j, array ? ']' : '}')) {
            return false;
        }
        j->depth--;
    }
    vfux_json_space(j);
    *done = true;
    return !vfux_json_more(j);
}

/* The whole text. Each turn takes one value, or opens one container and goes on to its first value. */
static bool vfux_json_document(vfux_json *j)
{
    vfux_json_place place = VFUX_JSON_TOP;
    bool done = false;

    while (!done) {
        vfux_json_space(j);
        if (!vfux_json_more(j)) {
            return false;
        }
        uint8_t c = *j->at;
        if (c == '{' || c == '[') {
            if (!vfux_json_open(j, place, c == '[')) {
                return false;
            }
            vfux_json_space(j);
            if (!vfux_json_more(j)) {
                return false;
            }
            if (*j->at != (c == '[' ? ']' : '}')) {
                place = VFUX_JSON_UNKNOWN;
                if (c == '{' && !vfux_json_member(j, &place)) {
                    return false;
                }
                continue;
            }
        } else if (!vfux_json_scalar(j, place)) {
            return false;
        }
        if (!vfux_json_next(j, &place, &done)) {
            return false;
        }
    }
    return true;
}

VFU_API int vfu_caps_parse(const char *json, size_t len, vfu_caps *out)
{
    vfux_json j;
    vfu_caps caps;
    size_t n = 0;

    vfu_caps_defaults(out);
    while (json != NULL && n < len && json[n] != '\0') {
        if (++n > VFU_CAPS_JSON_MAX) {
            return -EMSGSIZE;
        }
    }
    if (n == 0) {
        return 0;
    }
    vfu_caps_defaults(&caps);
    memset(&j, 0, sizeof j);
    j.at = (const uint8_t *)json;
    j.end = j.at + n;
    j.caps = &caps;
    if (!vfux_json_document(&j)) {
        return -EBADMSG;
    }
    if (j.mismatch) {
        return -EINVAL;
    }
    *out = caps;
    return 0;
}

/* Starts a member: a comma between two, then its quoted name */
static void vfux_caps_name(vfux_text *t, bool *first, const char *name)
{
    vfux_text_add(t, *first ? "\"" : ",\"");
    vfux_text_add(t, name);
    vfux_text_add(t, "\":");
    *first = false;
}

VFU_API int vfu_caps_write(const vfu_caps *caps, char *out, size_t cap)
{
    vfux_text t = {out, cap, 0};
    bool first = true;
    uint32_t present = caps->present;

    if ((present & ~0x7fu) != 0) {
        return -EINVAL;
    }
    vfux_text_add(&t, "{\"capabilities\":{");
    if ((present & VFU_CAPS_MAX_MSG_FDS) != 0) {
        vfux_caps_name(&t, &first, "max_msg_fds");
        vfux_text_dec(&t, "", caps->max_msg_fds);
    }
    if ((present & VFU_CAPS_MAX_DATA_XFER_SIZE) != 0) {
        vfux_caps_name(&t, &first, "max_data_xfer_size");
        vfux_text_dec(&t, "", caps->max_data_xfer_size);
    }
    if ((present & VFU_CAPS_MAX_DMA_MAPS) != 0) {
        vfux_caps_name(&t, &first, "max_dma_maps");
        vfux_text_dec(&t, "", caps->max_dma_maps);
    }
    if ((present & VFU_CAPS_PGSIZES) != 0) {
        vfux_caps_name(&t, &first, "pgsizes");
        vfux_text_dec(&t, "", caps->pgsizes);
    }
    if ((present & VFU_CAPS_TWIN_SOCKET) != 0) {
        vfux_caps_name(&t, &first, "twin_socket");
        vfux_text_add(&t, caps->twin_socket ? "{\"supported\":true" : "{\"supported\":false");
        if (caps->twin_fd_index >= 0) {
            vfux_text_dec(&t, ",\"fd_index\":", (uint64_t)caps->twin_fd_index);
        }
        vfux_text_add(&t, "}");
    }
    if ((present & VFU_CAPS_WRITE_MULTIPLE) != 0) {
        vfux_caps_name(&t, &first, "write_multiple");
        vfux_text_add(&t, caps->write_multiple ? "true" : "false");
    }
    if ((present & VFU_CAPS_MIGRATION) != 0) {
        vfux_caps_name(&t, &first, "migration");
        vfux_text_dec(&t, "{\"pgsize\":", caps->migration_pgsize);
        vfux_text_add(&t, "}");
    }
    vfux_text_bytes(&t, "}}", 3); /* with the NUL */
    return t.len <= cap ? (int)t.len : -EMSGSIZE;
}

/*
 * ==== codec ================================================================================================================
 */

VFU_API void vfu_msg_init(vfu_msg *msg, uint16_t id, uint16_t cmd)
{
    memset(msg, 0, sizeof *msg);
    msg->id = id;
    msg->cmd = cmd;
}

VFU_API void vfu_msg_init_reply(vfu_msg *reply, const vfu_msg *command, int error)
{
    uint16_t id = command->id;
    uint16_t cmd = command->cmd;

    vfu_msg_init(reply, id, cmd);
    reply->flags = VFU_HDR_REPLY;
    if (error != 0) {
        reply->flags |= VFU_HDR_ERROR;
        reply->error = error < 0 ? 0u - (uint32_t)error : (uint32_t)error;
    }
}

VFU_API int vfu_msg_size(const void *bytes, size_t len, uint32_t max, uint32_t *size)
{
    vfu_wire_header h;

    if (len < VFU_HDR_SIZE) {
        return -EAGAIN;
    }
    memcpy(&h, bytes, sizeof h);
    if (h.size < VFU_HDR_SIZE || h.size > max) {
        return -EBADMSG;
    }
    *size = h.size;
    return 0;
}

/* A message of this command, in this direction, whose union is filled */
static bool vfux_msg_is(const vfu_msg *msg, uint16_t cmd, bool reply)
{
    return msg->cmd == cmd && vfu_msg_is_reply(msg) == reply && !vfu_msg_is_error(msg);
}

static bool vfux_one_bit(uint32_t bits) { return bits != 0 && (bits & (bits - 1)) == 0; }

static bool vfux_irq_set_valid(uint32_t flags, uint32_t start, uint32_t count)
{
    return vfux_one_bit(flags & VFU_IRQ_SET_DATA_BITS) && vfux_one_bit(flags & VFU_IRQ_SET_ACTION_BITS) &&
           (flags & ~(VFU_IRQ_SET_DATA_BITS | VFU_IRQ_SET_ACTION_BITS)) == 0 && count <= UINT32_MAX - start;
}

static bool vfux_feature_flags_valid(uint32_t flags)
{
    uint32_t what = flags & ~VFU_FEATURE_INDEX_MASK;

    return what != 0 && (what & ~(VFU_FEATURE_GET | VFU_FEATURE_SET | VFU_FEATURE_PROBE)) == 0 &&
           what != (VFU_FEATURE_GET | VFU_FEATURE_SET); /* both at once only with PROBE */
}

#define VFUX_CAP_END 1u

/*
 * A capability chain in data, which stands at 32 of a region info struct. Reads the capability at offset into *cap, with
 * cap->next the offset of the following one, or VFUX_CAP_END behind the last, which is no valid offset.
 * Offsets must grow, by a header at least, so a walk ends after data_len / 8 steps at most.
 *   0        there is none: the chain ends, or it goes on where data doesn't reach
 *   1        *cap is valid
 *   -EINVAL  the chain is broken: it goes back, or a capability that ends in data is too short for its own contents
 */
static int vfux_cap_read(const uint8_t *data, uint32_t data_len, uint32_t offset, vfu_region_cap *cap)
{
    const uint32_t base = (uint32_t)sizeof(vfu_wire_region_info);
    vfu_wire_cap_header h;
    uint32_t at;
    uint32_t room;

    if (offset < base) {
        return -EINVAL;
    }
    at = offset - base;
    if (at > data_len || data_len - at < sizeof h) {
        return 0;
    }
    memcpy(&h, data + at, sizeof h);
    if (h.next != 0 && (h.next < offset || h.next - offset < sizeof h)) {
        return -EINVAL;
    }
    room = data_len - at;
    if (h.next != 0 && h.next - offset < room) {
        room = h.next - offset;
    }
    cap->id = h.id;
    cap->version = h.version;
    cap->data = data + at + sizeof h;
    cap->data_len = room - (uint32_t)sizeof h;
    cap->next = h.next != 0 ? h.next : VFUX_CAP_END;
    return 1;
}

/* Whether a capability of a kind that we know is as long as it says; others are whatever they are. */
static bool vfux_cap_complete(const vfu_region_cap *cap)
{
    uint32_t areas;
    vfu_wire_cap_type type;

    switch (cap->id) {
    case VFU_REGION_CAP_SPARSE_MMAP: return vfu_region_cap_areas(cap, &areas) == 0;
    case VFU_REGION_CAP_TYPE: return vfu_region_cap_type(cap, &type) == 0;
    default: return true;
    }
}

/* Walks a whole chain. A reply that says that it is cut may end anywhere, a complete one must end properly. */
static int vfux_cap_check(const uint8_t *data, uint32_t data_len, uint32_t cap_offset, bool truncated)
{
    vfu_region_cap cap = {0, 0, NULL, 0, 0};
    uint32_t offset = cap_offset;

    if (offset == 0) {
        return 0;
    }
    do {
        int rc = vfux_cap_read(data, data_len, offset, &cap);
        if (rc < 0) {
            return rc;
        }
        if (rc == 0 || !vfux_cap_complete(&cap)) {
            return truncated ? 0 : -EINVAL;
        }
        offset = cap.next;
    } while (offset != VFUX_CAP_END);
    return 0;
}

/* Whether count entries of equal size, at least 40, make up data_len; none at all is a reply that is cut. */
static bool vfux_sub_regions_valid(uint32_t argsz, uint32_t count, uint32_t data_len)
{
    if (count == 0) {
        return data_len == 0;
    }
    if (data_len == 0) {
        return argsz > sizeof(vfu_wire_region_io_fds);
    }
    return data_len % count == 0 && data_len / count >= sizeof(vfu_wire_sub_region);
}

static bool vfux_writes_valid(const uint8_t *data, uint64_t count)
{
    vfu_wire_write_one one;

    for (uint64_t i = 0; i < count; i++) {
        memcpy(&one, data + (size_t)i * sizeof one, sizeof one);
        if (one.count > sizeof one.data) {
            return false;
        }
    }
    return true;
}

static bool vfux_all_zero(const uint8_t *p, uint32_t n)
{
    while (n > 0 && *p == 0) {
        p++;
        n--;
    }
    return n == 0;
}

/* The bytes behind the header while they are being decoded */
typedef struct vfux_payload {
    const uint8_t *p;
    uint32_t n;
} vfux_payload;

/* Copies the fixed part; false if the payload is shorter than that */
static bool vfux_fixed(const vfux_payload *in, void *fixed, uint32_t size)
{
    if (in->n < size) {
        return false;
    }
    memcpy(fixed, in->p, size);
    return true;
}

static int vfux_decode_version(const vfux_payload *in, vfu_msg *m)
{
    vfu_wire_version w;
    const uint32_t size = (uint32_t)sizeof w;
    uint32_t n = size;

    if (!vfux_fixed(in, &w, size)) {
        return -EINVAL;
    }
    while (n < in->n && in->p[n] != 0) {
        n++;
    }
    if (!vfux_all_zero(in->p + n, in->n - n)) {
        return -EINVAL;
    }
    m->u.version.major = w.major;
    m->u.version.minor = w.minor;
    m->u.version.json = n > size ? (const char *)in->p + size : NULL;
    m->u.version.json_len = n - size;
    return 0;
}

static int vfux_decode_dma_map(const vfux_payload *in, vfu_msg *m)
{
    vfu_wire_dma_map w;

    if (in->n != sizeof w || !vfux_fixed(in, &w, sizeof w)) {
        return -EINVAL;
    }
    m->u.dma_map.argsz = w.argsz;
    m->u.dma_map.flags = w.flags;
    m->u.dma_map.offset = w.offset;
    m->u.dma_map.address = w.address;
    m->u.dma_map.size = w.size;
    return 0;
}

/* Whether rest bytes may follow the fixed part of DMA_UNMAP. A reply without the bitmap that was asked for has none. */
static bool vfux_unmap_rest_valid(uint32_t flags, bool reply, uint32_t rest)
{
    if ((flags & VFU_DMA_UNMAP_GET_DIRTY_BITMAP) == 0) {
        return rest == 0;
    }
    return rest >= 16 || (reply && rest == 0);
}

static int vfux_decode_dma_unmap(const vfux_payload *in, bool reply, vfu_msg *m)
{
    vfu_wire_dma_unmap w;
    const uint32_t size = (uint32_t)sizeof w;

    if (!vfux_fixed(in, &w, size) || !vfux_unmap_rest_valid(w.flags, reply, in->n - size)) {
        return -EINVAL;
    }
    m->u.dma_unmap.argsz = w.argsz;
    m->u.dma_unmap.flags = w.flags;
    m->u.dma_unmap.address = w.address;
    m->u.dma_unmap.size = w.size;
    m->u.dma_unmap.data = in->p + size;
    m->u.dma_unmap.data_len = in->n - size;
    return 0;
}

static int vfux_decode_device_info(const vfux_payload *in, vfu_msg *m)
{
    vfu_wire_device_info w;

    if (!vfux_fixed(in, &w, sizeof w)) {
        return -EINVAL;
    }
    m->u.device_info.argsz = w.argsz;
    m->u.device_info.flags = w.flags;
    m->u.device_info.num_regions = w.num_regions;
    m->u.device_info.num_irqs = w.num_irqs;
    return 0;
}

static int vfux_decode_region_info(const vfux_payload *in, bool reply, vfu_msg *m)
{
    vfu_wire_region_info w;
    const uint32_t size = (uint32_t)sizeof w;
    bool truncated;

    if (!vfux_fixed(in, &w, size)) {
        return -EINVAL;
    }
    truncated = reply && w.argsz > in->n;
    if (reply && (w.flags & VFU_REGION_INFO_CAPS) != 0) {
        if (vfux_cap_check(in->p + size, in->n - size, w.cap_offset, truncated) < 0) {
            return -EINVAL;
        }
        m->u.region_info.data = in->p + size;
        m->u.region_info.data_len = in->n - size;
    }
    m->u.region_info.argsz = w.argsz;
    m->u.region_info.flags = w.flags;
    m->u.region_info.index = w.index;
    m->u.region_info.cap_offset = w.cap_offset;
    m->u.region_info.size = w.size;
    m->u.region_info.offset = w.offset;
    m->u.region_info.truncated = truncated;
    return 0;
}

static int vfux_decode_region_io_fds(const vfux_payload *in, bool reply, vfu_msg *m)
{
    vfu_wire_region_io_fds w;
    const uint32_t size = (uint32_t)sizeof w;
    uint32_t rest;

    if (!vfux_fixed(in, &w, size)) {
        return -EINVAL;
    }
    rest = reply && w.count != 0 ? in->n - size : 0;
    if (reply && !vfux_sub_regions_valid(w.argsz, w.count, rest)) {
        return -EINVAL;
    }
    m->u.region_io_fds.argsz = w.argsz;
    m->u.region_io_fds.flags = w.flags;
    m->u.region_io_fds.index = w.index;
    m->u.region_io_fds.count = w.count;
    m->u.region_io_fds.data = rest != 0 ? in->p + size : NULL;
    m->u.region_io_fds.data_len = rest;
    m->u.region_io_fds.stride = rest != 0 ? rest / w.count : 0;
    m->u.region_io_fds.truncated = reply && w.count != 0 && rest == 0;
    return 0;
}

static int vfux_decode_irq_info(const vfux_payload *in, vfu_msg *m)
{
    vfu_wire_irq_info w;

    if (!vfux_fixed(in, &w, sizeof w)) {
        return -EINVAL;
    }
    m->u.irq_info.argsz = w.argsz;
    m->u.irq_info.flags = w.flags;
    m->u.irq_info.index = w.index;
    m->u.irq_info.count = w.count;
    return 0;
}

static int vfux_decode_irq_set(const vfux_payload *in, vfu_msg *m)
{
    vfu_wire_irq_set w;
    const uint32_t size = (uint32_t)sizeof w;

    if (!vfux_fixed(in, &w, size) || !vfux_irq_set_valid(w.flags, w.start, w.count)) {
        return -EINVAL;
    }
    if ((w.flags & VFU_IRQ_SET_DATA_BOOL) != 0) {
        if (in->n - size < w.count) {
            return -EINVAL;
        }
        m->u.irq_set.data = in->p + size;
        m->u.irq_set.data_len = w.count;
    }
    m->u.irq_set.argsz = w.argsz;
    m->u.irq_set.flags = w.flags;
    m->u.irq_set.index = w.index;
    m->u.irq_set.start = w.start;
    m->u.irq_set.count = w.count;
    return 0;
}

static int vfux_decode_region(const vfux_payload *in, bool with_data, vfu_msg *m)
{
    vfu_wire_region_access w;
    const uint32_t size = (uint32_t)sizeof w;

    if (!vfux_fixed(in, &w, size) || in->n - size != (with_data ? w.count : 0)) {
        return -EINVAL;
    }
    m->u.region.offset = w.offset;
    m->u.region.region = w.region;
    m->u.region.count = w.count;
    m->u.region.data = with_data ? in->p + size : NULL;
    m->u.region.data_len = in->n - size;
    return 0;
}

/* DMA messages without data: the commands of reads, and the replies to writes in their three lengths */
static int vfux_decode_dma_plain(const vfux_payload *in, bool reply, vfu_msg *m)
{
    vfu_wire_dma_access w = {0, 0};
    uint32_t count;

    if (reply) {
        m->u.dma.ack_len = in->n;
        if (in->n == 0) {
            return 0;
        }
        if (in->n == 12) {
            memcpy(&w.address, in->p, 8);
            memcpy(&count, in->p + 8, 4);
            m->u.dma.address = w.address;
            m->u.dma.count = count;
            return 0;
        }
    }
    if (in->n != sizeof w || !vfux_fixed(in, &w, sizeof w)) {
        return -EINVAL;
    }
    m->u.dma.address = w.address;
    m->u.dma.count = w.count;
    return 0;
}

/*
 * DMA messages with data: the commands of writes and the replies to reads.
 *
 *     payload:  0        8        12       16
 *     by the book  address  count (64 bits)  data ...
 *     legacy       address  count   data ...            0 0 0 0
 *
 * Both have the same length. Without its padding the legacy form is taken only where it is expected: a reply by the book that
 * lost its last four bytes looks the same.
 */
static int vfux_decode_dma_data(const vfux_payload *in, vfu_dma_layout layout, bool reply, vfu_msg *m)
{
    vfu_wire_dma_access w;
    const uint32_t size = (uint32_t)sizeof w; /* of the fixed part by the book */
    uint32_t count;
    bool spec;
    bool legacy;

    if (!vfux_fixed(in, &w, size)) {
        return -EINVAL;
    }
    memcpy(&count, in->p + 8, sizeof count);
    spec = w.count == in->n - size && layout != VFU_DMA_LAYOUT_QEMU10;
    legacy = count == in->n - size && layout != VFU_DMA_LAYOUT_SPEC;
    if (layout == VFU_DMA_LAYOUT_AUTO) {
        legacy = legacy && reply && vfux_all_zero(in->p + in->n - 4, 4);
    } else if (layout == VFU_DMA_LAYOUT_QEMU10) {
        legacy = legacy || count == in->n - 12;
    }
    if (!spec && !legacy) {
        return -EINVAL;
    }
    if (spec && legacy && !vfux_all_zero(in->p + size, in->n - size)) {
        return -EINVAL; /* either reading is possible, and they differ */
    }
    m->u.dma.address = w.address;
    m->u.dma.legacy = !spec;
    m->u.dma.proven = reply && layout == VFU_DMA_LAYOUT_AUTO && spec != legacy;
    m->u.dma.count = spec ? w.count : count;
    m->u.dma.data = in->p + (spec ? size : 12);
    m->u.dma.data_len = spec ? in->n - size : count;
    return 0;
}

static int vfux_decode_write_multi(const vfux_payload *in, bool reply, vfu_msg *m)
{
    vfu_wire_write_multi w;
    const uint32_t size = (uint32_t)sizeof w;
    const uint32_t entry = (uint32_t)sizeof(vfu_wire_write_one);
    uint32_t rest;

    if (!vfux_fixed(in, &w, size)) {
        return -EINVAL;
    }
    rest = in->n - size;
    if (reply ? rest != 0 : rest % entry != 0 || w.count != rest / entry) {
        return -EINVAL;
    }
    if (!reply && !vfux_writes_valid(in->p + size, w.count)) {
        return -EINVAL;
    }
    m->u.write_multi.count = w.count;
    m->u.write_multi.data = reply ? NULL : in->p + size;
    m->u.write_multi.data_len = rest;
    return 0;
}

static int vfux_decode_feature(const vfux_payload *in, bool reply, vfu_msg *m)
{
    vfu_wire_feature w;
    const uint32_t size = (uint32_t)sizeof w;

    if (!vfux_fixed(in, &w, size) || (!reply && !vfux_feature_flags_valid(w.flags))) {
        return -EINVAL;
    }
    m->u.feature.argsz = w.argsz;
    m->u.feature.flags = w.flags;
    m->u.feature.data = in->p + size;
    m->u.feature.data_len = in->n - size;
    return 0;
}

static int vfux_decode_mig_data(const vfux_payload *in, bool with_data, vfu_msg *m)
{
    vfu_wire_mig_data w;
    const uint32_t size = (uint32_t)sizeof w;

    if (!vfux_fixed(in, &w, size) || in->n - size != (with_data ? w.size : 0)) {
        return -EINVAL;
    }
    m->u.mig_data.argsz = w.argsz;
    m->u.mig_data.size = w.size;
    m->u.mig_data.data = with_data ? in->p + size : NULL;
    m->u.mig_data.data_len = in->n - size;
    return 0;
}

static int vfux_decode_payload(const vfux_payload *in, vfu_dma_layout layout, vfu_msg *m)
{
    bool reply = vfu_msg_is_reply(m);

    switch (m->cmd) {
    case VFU_CMD_VERSION: return vfux_decode_version(in, m);
    case VFU_CMD_DMA_MAP: return reply ? 0 : vfux_decode_dma_map(in, m);
    case VFU_CMD_DMA_UNMAP: return vfux_decode_dma_unmap(in, reply, m);
    case VFU_CMD_DEVICE_GET_INFO: return vfux_decode_device_info(in, m);
    case VFU_CMD_DEVICE_GET_REGION_INFO: return vfux_decode_region_info(in, reply, m);
    case VFU_CMD_DEVICE_GET_REGION_IO_FDS: return vfux_decode_region_io_fds(in, reply, m);
    case VFU_CMD_DEVICE_GET_IRQ_INFO: return vfux_decode_irq_info(in, m);
    case VFU_CMD_DEVICE_SET_IRQS: return reply ? 0 : vfux_decode_irq_set(in, m);
    case VFU_CMD_REGION_READ: return vfux_decode_region(in, reply, m);
    case VFU_CMD_REGION_WRITE: return vfux_decode_region(in, !reply, m);
    case VFU_CMD_DMA_READ: return reply ? vfux_decode_dma_data(in, layout, true, m) : vfux_decode_dma_plain(in, false, m);
    case VFU_CMD_DMA_WRITE: return reply ? vfux_decode_dma_plain(in, true, m) : vfux_decode_dma_data(in, layout, false, m);
    case VFU_CMD_DEVICE_RESET: return reply || in->n == 0 ? 0 : -EINVAL;
    case VFU_CMD_REGION_WRITE_MULTI: return vfux_decode_write_multi(in, reply, m);
    case VFU_CMD_DEVICE_FEATURE: return vfux_decode_feature(in, reply, m);
    case VFU_CMD_MIG_DATA_READ: return vfux_decode_mig_data(in, reply, m);
    case VFU_CMD_MIG_DATA_WRITE: return reply ? 0 : vfux_decode_mig_data(in, true, m);
    default: return -ENOSYS;
    }
}

static bool vfux_cmd_known(uint16_t cmd) { return cmd >= VFU_CMD_VERSION && cmd <= VFU_CMD_MIG_DATA_WRITE && cmd != 14; }

VFU_API int vfu_msg_decode_dma(const void *bytes, size_t len, vfu_dma_layout layout, vfu_msg *out)
{
    vfu_wire_header h;
    vfux_payload in;
    int rc;

    memset(out, 0, sizeof *out);
    if (len < sizeof h) {
        return -EBADMSG;
    }
    memcpy(&h, bytes, sizeof h);
    out->id = h.id;
    out->cmd = h.cmd;
    out->flags = h.flags;
    out->error = h.error;
    if (h.size != len || (h.flags & VFU_HDR_TYPE_MASK) > VFU_HDR_REPLY) {
        return -EBADMSG;
    }
    if (!vfux_cmd_known(h.cmd)) {
        return -ENOSYS;
    }
    if (vfu_msg_is_error(out)) {
        return 0;
    }
    in.p = (const uint8_t *)bytes + sizeof h;
    in.n = h.size - (uint32_t)sizeof h;
    rc = vfux_decode_payload(&in, layout, out);
    if (rc < 0) {
        memset(&out->u, 0, sizeof out->u);
    }
    return rc;
}

VFU_API int vfu_msg_decode(const void *bytes, size_t len, vfu_msg *out)
{
    return vfu_msg_decode_dma(bytes, len, VFU_DMA_LAYOUT_AUTO, out);
}

/* A message while it is being encoded: the bytes before its data, the data, and zeros behind it */
typedef struct vfux_frame {
    uint8_t head[VFU_MSG_HEAD_MAX];
    uint32_t head_len;
    const void *tail;
    uint32_t tail_len;
    uint32_t pad;
} vfux_frame;

static void vfux_put(vfux_frame *f, const void *bytes, uint32_t n)
{
    memcpy(f->head + f->head_len, bytes, n);
    f->head_len += n;
}

static void vfux_tail(vfux_frame *f, const void *data, uint32_t n)
{
    f->tail = data;
    f->tail_len = n;
}

/* Data is there exactly where it belongs, and as much of it as count says. */
static bool vfux_data_valid(bool with_data, uint64_t count, uint32_t data_len) { return data_len == (with_data ? count : 0); }

static int vfux_encode_version(const vfu_msg *m, vfux_frame *f)
{
    const vfu_wire_version w = {m->u.version.major, m->u.version.minor};
    const char *json = m->u.version.json;

    if (m->u.version.json_len != 0 && json == NULL) {
        return -EINVAL;
    }
    for (uint32_t i = 0; i < m->u.version.json_len; i++) {
        if (json[i] == '\0') {
            return -EINVAL;
        }
    }
    vfux_put(f, &w, sizeof w);
    vfux_tail(f, json, m->u.version.json_len);
    f->pad = m->u.version.json_len != 0 ? 1 : 0;
    return 0;
}

static int vfux_encode_dma_map(const vfu_msg *m, vfux_frame *f)
{
    const vfu_wire_dma_map w = {m->u.dma_map.argsz, m->u.dma_map.flags, m->u.dma_map.offset, m->u.dma_map.address,
                                m->u.dma_map.size};

    vfux_put(f, &w, sizeof w);
    return 0;
}

static int vfux_encode_dma_unmap(const vfu_msg *m, bool reply, vfux_frame *f)
{
    const vfu_wire_dma_unmap w = {m->u.dma_unmap.argsz, m->u.dma_unmap.flags, m->u.dma_unmap.address, m->u.dma_unmap.size};

    if (!vfux_unmap_rest_valid(w.flags, reply, m->u.dma_unmap.data_len)) {
        return -EINVAL;
    }
    vfux_put(f, &w, sizeof w);
    vfux_tail(f, m->u.dma_unmap.data, m->u.dma_unmap.data_len);
    return 0;
}

static int vfux_encode_device_info(const vfu_msg *m, vfux_frame *f)
{
    const vfu_wire_device_info w = {m->u.device_info.argsz, m->u.device_info.flags, m->u.device_info.num_regions,
                                    m->u.device_info.num_irqs};

    vfux_put(f, &w, sizeof w);
    return 0;
}

static int vfux_encode_region_info(const vfu_msg *m, bool reply, vfux_frame *f)
{
    const vfu_wire_region_info w = {m->u.region_info.argsz,      m->u.region_info.flags, m->u.region_info.index,
                                    m->u.region_info.cap_offset, m->u.region_info.size,  m->u.region_info.offset};
    const uint32_t data_len = m->u.region_info.data_len;
    const bool caps = reply && (w.flags & VFU_REGION_INFO_CAPS) != 0;

    if (data_len != 0 && !caps) {
        return -EINVAL;
    }
    vfux_put(f, &w, sizeof w);
    vfux_tail(f, m->u.region_info.data, data_len);
    return 0;
}

static int vfux_encode_region_io_fds(const vfu_msg *m, bool reply, vfux_frame *f)
{
    const vfu_wire_region_io_fds w = {m->u.region_io_fds.argsz, m->u.region_io_fds.flags, m->u.region_io_fds.index,
                                      m->u.region_io_fds.count};
    const uint32_t data_len = m->u.region_io_fds.data_len;

    if (reply ? !vfux_sub_regions_valid(w.argsz, w.count, data_len) : data_len != 0) {
        return -EINVAL;
    }
    vfux_put(f, &w, sizeof w);
    vfux_tail(f, m->u.region_io_fds.data, data_len);
    return 0;
}

static int vfux_encode_irq_info(const vfu_msg *m, vfux_frame *f)
{
    const vfu_wire_irq_info w = {m->u.irq_info.argsz, m->u.irq_info.flags, m->u.irq_info.index, m->u.irq_info.count};

    vfux_put(f, &w, sizeof w);
    return 0;
}

static int vfux_encode_irq_set(const vfu_msg *m, vfux_frame *f)
{
    const vfu_wire_irq_set w = {m->u.irq_set.argsz, m->u.irq_set.flags, m->u.irq_set.index, m->u.irq_set.start,
                                m->u.irq_set.count};

    if (!vfux_irq_set_valid(w.flags, w.start, w.count) ||
        !vfux_data_valid((w.flags & VFU_IRQ_SET_DATA_BOOL) != 0, w.count, m->u.irq_set.data_len)) {
        return -EINVAL;
    }
    vfux_put(f, &w, sizeof w);
    vfux_tail(f, m->u.irq_set.data, m->u.irq_set.data_len);
    return 0;
}

static int vfux_encode_region(const vfu_msg *m, bool with_data, vfux_frame *f)
{
    const vfu_wire_region_access w = {m->u.region.offset, m->u.region.region, m->u.region.count};

    if (!vfux_data_valid(with_data, w.count, m->u.region.data_len)) {
        return -EINVAL;
    }
    vfux_put(f, &w, sizeof w);
    vfux_tail(f, m->u.region.data, m->u.region.data_len);
    return 0;
}

/* The counterpart of vfux_decode_dma_plain */
static int vfux_encode_dma_plain(const vfu_msg *m, bool reply, vfux_frame *f)
{
    const vfu_wire_dma_access w = {m->u.dma.address, m->u.dma.count};
    const uint32_t count = (uint32_t)m->u.dma.count;

    if (m->u.dma.data_len != 0 || m->u.dma.legacy) {
        return -EINVAL;
    }
    if (!reply || m->u.dma.ack_len == sizeof w) {
        vfux_put(f, &w, sizeof w);
        return 0;
    }
    if (m->u.dma.ack_len == 12 && m->u.dma.count <= UINT32_MAX) {
        vfux_put(f, &w.address, sizeof w.address);
        vfux_put(f, &count, sizeof count);
        return 0;
    }
    return m->u.dma.ack_len == 0 ? 0 : -EINVAL;
}

/* The counterpart of vfux_decode_dma_data. Without its padding the legacy form must still be as long as the fixed part. */
static int vfux_encode_dma_data(const vfu_msg *m, bool whole, vfux_frame *f)
{
    const vfu_wire_dma_access w = {m->u.dma.address, m->u.dma.count};
    const uint32_t count = (uint32_t)m->u.dma.count;

    if (!vfux_data_valid(true, w.count, m->u.dma.data_len)) {
        return -EINVAL;
    }
    if (!m->u.dma.legacy) {
        vfux_put(f, &w, sizeof w);
    } else if (whole || count >= 4) {
        vfux_put(f, &w.address, sizeof w.address);
        vfux_put(f, &count, sizeof count);
        f->pad = whole ? 4 : 0;
    } else {
        return -EINVAL;
    }
    vfux_tail(f, m->u.dma.data, m->u.dma.data_len);
    return 0;
}

static int vfux_encode_write_multi(const vfu_msg *m, bool reply, vfux_frame *f)
{
    const vfu_wire_write_multi w = {m->u.write_multi.count};
    const uint32_t entry = (uint32_t)sizeof(vfu_wire_write_one);
    const uint32_t data_len = m->u.write_multi.data_len;

    if (reply ? data_len != 0 : data_len % entry != 0 || w.count != data_len / entry) {
        return -EINVAL;
    }
    vfux_put(f, &w, sizeof w);
    vfux_tail(f, m->u.write_multi.data, data_len);
    return 0;
}

static int vfux_encode_feature(const vfu_msg *m, bool reply, vfux_frame *f)
{
    const vfu_wire_feature w = {m->u.feature.argsz, m->u.feature.flags};

    if (!reply && !vfux_feature_flags_valid(w.flags)) {
        return -EINVAL;
    }
    vfux_put(f, &w, sizeof w);
    vfux_tail(f, m->u.feature.data, m->u.feature.data_len);
    return 0;
}

static int vfux_encode_mig_data(const vfu_msg *m, bool with_data, vfux_frame *f)
{
    const vfu_wire_mig_data w = {m->u.mig_data.argsz, m->u.mig_data.size};

    if (!vfux_data_valid(with_data, w.size, m->u.mig_data.data_len)) {
        return -EINVAL;
    }
    vfux_put(f, &w, sizeof w);
    vfux_tail(f, m->u.mig_data.data, m->u.mig_data.data_len);
    return 0;
}

/* Everything but the header. whole says that the data, and padding, will follow in the same buffer. */
static int vfux_encode_payload(const vfu_msg *m, bool whole, vfux_frame *f)
{
    bool reply = vfu_msg_is_reply(m);

    switch (m->cmd) {
    case VFU_CMD_VERSION: return vfux_encode_version(m, f);
    case VFU_CMD_DMA_MAP: return reply ? 0 : vfux_encode_dma_map(m, f);
    case VFU_CMD_DMA_UNMAP: return vfux_encode_dma_unmap(m, reply, f);
    case VFU_CMD_DEVICE_GET_INFO: return vfux_encode_device_info(m, f);
    case VFU_CMD_DEVICE_GET_REGION_INFO: return vfux_encode_region_info(m, reply, f);
    case VFU_CMD_DEVICE_GET_REGION_IO_FDS: return vfux_encode_region_io_fds(m, reply, f);
    case VFU_CMD_DEVICE_GET_IRQ_INFO: return vfux_encode_irq_info(m, f);
    case VFU_CMD_DEVICE_SET_IRQS: return reply ? 0 : vfux_encode_irq_set(m, f);
    case VFU_CMD_REGION_READ: return vfux_encode_region(m, reply, f);
    case VFU_CMD_REGION_WRITE: return vfux_encode_region(m, !reply, f);
    case VFU_CMD_DMA_READ: return reply ? vfux_encode_dma_data(m, whole, f) : vfux_encode_dma_plain(m, false, f);
    case VFU_CMD_DMA_WRITE: return reply ? vfux_encode_dma_plain(m, true, f) : vfux_encode_dma_data(m, whole, f);
    case VFU_CMD_DEVICE_RESET: return 0;
    case VFU_CMD_REGION_WRITE_MULTI: return vfux_encode_write_multi(m, reply, f);
    case VFU_CMD_DEVICE_FEATURE: return vfux_encode_feature(m, reply, f);
    case VFU_CMD_MIG_DATA_READ: return vfux_encode_mig_data(m, reply, f);
    case VFU_CMD_MIG_DATA_WRITE: return reply ? 0 : vfux_encode_mig_data(m, true, f);
    default: return -EINVAL;
    }
}

/* Fills the frame, header included, with the size of the whole message in *size */
static int vfux_encode(const vfu_msg *m, bool whole, vfux_frame *f, uint64_t *size)
{
    vfu_wire_header h = {m->id, m->cmd, 0, m->flags, m->error};

    f->head_len = (uint32_t)sizeof h;
    f->tail = NULL;
    f->tail_len = 0;
    f->pad = 0;
    if ((m->flags & VFU_HDR_TYPE_MASK) > VFU_HDR_REPLY || (!vfux_cmd_known(m->cmd) && !vfu_msg_is_error(m))) {
        return -EINVAL; /* an error reply says that a command is not known */
    }
    if (!vfu_msg_is_error(m)) {
        int rc = vfux_encode_payload(m, whole, f);
        if (rc < 0) {
            return rc;
        }
    }
    *size = (uint64_t)f->head_len + f->tail_len + f->pad;
    if (*size > UINT32_MAX) {
        return -EMSGSIZE;
    }
    h.size = (uint32_t)*size;
    memcpy(f->head, &h, sizeof h);
    return 0;
}

/* Data that has a structure of its own must be as the decoder wants it. */
static bool vfux_contents_valid(const vfu_msg *m)
{
    if (vfux_msg_is(m, VFU_CMD_DEVICE_GET_REGION_INFO, true) && (m->u.region_info.flags & VFU_REGION_INFO_CAPS) != 0) {
        uint64_t payload = (uint64_t)sizeof(vfu_wire_region_info) + m->u.region_info.data_len;
        return vfux_cap_check(m->u.region_info.data, m->u.region_info.data_len, m->u.region_info.cap_offset,
                              m->u.region_info.argsz > payload) == 0;
    }
    if (vfux_msg_is(m, VFU_CMD_REGION_WRITE_MULTI, false)) {
        return vfux_writes_valid(m->u.write_multi.data, m->u.write_multi.count);
    }
    return true;
}

VFU_API int vfu_msg_encode(const vfu_msg *msg, void *out, size_t cap)
{
    vfux_frame f;
    uint64_t size;
    uint8_t *to = (uint8_t *)out;
    int rc = vfux_encode(msg, true, &f, &size);

    if (rc < 0) {
        return rc;
    }
    if ((f.tail_len != 0 && f.tail == NULL) || !vfux_contents_valid(msg)) {
        return -EINVAL;
    }
    if (size > cap || size > INT_MAX) {
        return -EMSGSIZE;
    }
    memcpy(to, f.head, f.head_len);
    to += f.head_len;
    if (f.tail_len != 0) {
        memcpy(to, f.tail, f.tail_len);
        to += f.tail_len;
    }
    memset(to, 0, f.pad);
    return (int)size;
}

VFU_API int vfu_msg_encode_head(const vfu_msg *msg, void *out, size_t cap)
{
    vfux_frame f;
    uint64_t size;
    int rc;

    if (msg->cmd == VFU_CMD_VERSION) {
        return vfu_msg_encode(msg, out, cap);
    }
    rc = vfux_encode(msg, false, &f, &size);
    if (rc < 0) {
        return rc;
    }
    if (f.head_len > cap) {
        return -EMSGSIZE;
    }
    memcpy(out, f.head, f.head_len);
    return (int)f.head_len;
}

VFU_API int vfu_msg_write_one(const vfu_msg *msg, uint64_t i, vfu_wire_write_one *out)
{
    vfu_wire_write_one one;

    if (!vfux_msg_is(msg, VFU_CMD_REGION_WRITE_MULTI, false) || msg->u.write_multi.data == NULL ||
        i >= msg->u.write_multi.count || i >= msg->u.write_multi.data_len / sizeof one) {
        return -EINVAL;
    }
    memcpy(&one, msg->u.write_multi.data + (size_t)i * sizeof one, sizeof one);
    if (one.count > sizeof one.data) {
        return -EINVAL;
    }
    *out = one;
    return 0;
}

VFU_API int vfu_msg_sub_region(const vfu_msg *msg, uint32_t i, vfu_wire_sub_region *out)
{
    uint32_t stride;

    if (!vfux_msg_is(msg, VFU_CMD_DEVICE_GET_REGION_IO_FDS, true) || msg->u.region_io_fds.data == NULL ||
        i >= msg->u.region_io_fds.count) {
        return -EINVAL;
    }
    stride = msg->u.region_io_fds.data_len / msg->u.region_io_fds.count;
    if (stride < sizeof *out) {
        return -EINVAL;
    }
    memcpy(out, msg->u.region_io_fds.data + (size_t)i * stride, sizeof *out);
    return 0;
}

VFU_API bool vfu_msg_next_cap(const vfu_msg *msg, vfu_region_cap *cap)
{
    uint32_t offset = cap->next;

    if (!vfux_msg_is(msg, VFU_CMD_DEVICE_GET_REGION_INFO, true) || msg->u.region_info.data == NULL ||
        (msg->u.region_info.flags & VFU_REGION_INFO_CAPS) == 0) {
        return false;
    }
    if (offset == 0) {
        offset = msg->u.region_info.cap_offset;
    }
    if (vfux_cap_read(msg->u.region_info.data, msg->u.region_info.data_len, offset, cap) == 1 && vfux_cap_complete(cap)) {
        return true;
    }
    cap->next = VFUX_CAP_END;
    return false;
}

/* What follows the header of a sparse mmap capability, and of a type capability, begins with two 32-bit words. */
static void vfux_cap_words(const vfu_region_cap *cap, uint32_t words[2]) { memcpy(words, cap->data, 2 * sizeof words[0]); }

VFU_API int vfu_region_cap_areas(const vfu_region_cap *cap, uint32_t *count)
{
    uint32_t words[2];

    if (cap->id != VFU_REGION_CAP_SPARSE_MMAP || cap->data_len < sizeof words) {
        return -EINVAL;
    }
    vfux_cap_words(cap, words);
    if (words[0] > (cap->data_len - sizeof words) / sizeof(vfu_wire_sparse_area)) {
        return -EINVAL;
    }
    *count = words[0];
    return 0;
}

VFU_API int vfu_region_cap_area(const vfu_region_cap *cap, uint32_t i, vfu_wire_sparse_area *out)
{
    uint32_t count;

    if (vfu_region_cap_areas(cap, &count) < 0 || i >= count) {
        return -EINVAL;
    }
    memcpy(out, cap->data + 8 + (size_t)i * sizeof *out, sizeof *out);
    return 0;
}

VFU_API int vfu_region_cap_type(const vfu_region_cap *cap, vfu_wire_cap_type *out)
{
    uint32_t words[2];

    if (cap->id != VFU_REGION_CAP_TYPE || cap->data_len < sizeof words) {
        return -EINVAL;
    }
    vfux_cap_words(cap, words);
    out->header.id = cap->id;
    out->header.version = cap->version;
    out->header.next = 0;
    out->type = words[0];
    out->subtype = words[1];
    return 0;
}

VFU_API int vfu_msg_set_region_caps(vfu_msg *reply, uint32_t argsz, const vfu_wire_cap_type *type,
                                    const vfu_wire_sparse_area *areas, uint32_t count, void *buf, size_t cap)
{
    const uint32_t base = (uint32_t)sizeof(vfu_wire_region_info);
    vfu_wire_cap_type t = {{VFU_REGION_CAP_TYPE, 1, 0}, 0, 0};
    vfu_wire_cap_sparse_mmap s = {{VFU_REGION_CAP_SPARSE_MMAP, 1, 0}, count, 0};
    uint32_t first = type != NULL ? (uint32_t)sizeof t : 0;
    uint64_t need = first + (count != 0 ? sizeof s + (uint64_t)count * sizeof *areas : 0);
    uint8_t *to = (uint8_t *)buf;

    if (!vfux_msg_is(reply, VFU_CMD_DEVICE_GET_REGION_INFO, true) || argsz < base) {
        return -EINVAL;
    }
    if (need > cap || need > UINT32_MAX - base) {
        return -EMSGSIZE;
    }
    reply->u.region_info.argsz = base + (uint32_t)need;
    reply->u.region_info.truncated = argsz < reply->u.region_info.argsz;
    if (need == 0 || reply->u.region_info.truncated) {
        reply->u.region_info.flags &= ~VFU_REGION_INFO_CAPS;
        reply->u.region_info.cap_offset = 0;
        reply->u.region_info.data = NULL;
        reply->u.region_info.data_len = 0;
        return 0;
    }
    if (type != NULL) {
        t.header.next = count != 0 ? base + first : 0;
        t.type = type->type;
        t.subtype = type->subtype;
        memcpy(to, &t, sizeof t);
    }
    if (count != 0) {
        memcpy(to + first, &s, sizeof s);
        memcpy(to + first + sizeof s, areas, (size_t)count * sizeof *areas);
    }
    reply->u.region_info.flags |= VFU_REGION_INFO_CAPS;
    reply->u.region_info.cap_offset = base;
    reply->u.region_info.data = to;
    reply->u.region_info.data_len = (uint32_t)need;
    return 0;
}

/* A FEATURE message of this feature, in either direction */
static bool vfux_feature_is(const vfu_msg *msg, uint32_t index)
{
    return msg->cmd == VFU_CMD_DEVICE_FEATURE && !vfu_msg_is_error(msg) &&
           (msg->u.feature.flags & VFU_FEATURE_INDEX_MASK) == index;
}

/* Copies the fixed part of a feature's payload */
static int vfux_feature_get(const vfu_msg *msg, uint32_t index, void *out, uint32_t size)
{
    if (!vfux_feature_is(msg, index) || msg->u.feature.data == NULL || msg->u.feature.data_len < size) {
        return -EINVAL;
    }
    memcpy(out, msg->u.feature.data, size);
    return 0;
}

VFU_API int vfu_feature_migration(const vfu_msg *msg, vfu_wire_feature_migration *out)
{
    return vfux_feature_get(msg, VFU_FEATURE_MIGRATION, out, sizeof *out);
}

VFU_API int vfu_feature_mig_state(const vfu_msg *msg, vfu_wire_feature_mig_state *out)
{
    return vfux_feature_get(msg, VFU_FEATURE_MIG_STATE, out, sizeof *out);
}

VFU_API int vfu_feature_log_control(const vfu_msg *msg, vfu_wire_feature_log_control *out)
{
    vfu_wire_feature_log_control w;
    int rc = vfux_feature_get(msg, VFU_FEATURE_LOGGING_START, &w, sizeof w);

    if (rc < 0) {
        return rc;
    }
    if (w.num_ranges > (msg->u.feature.data_len - sizeof w) / sizeof(vfu_wire_feature_log_range)) {
        return -EINVAL;
    }
    *out = w;
    return 0;
}

VFU_API int vfu_feature_log_range(const vfu_msg *msg, uint32_t i, vfu_wire_feature_log_range *out)
{
    vfu_wire_feature_log_control w;
    int rc = vfu_feature_log_control(msg, &w);

    if (rc < 0) {
        return rc;
    }
    if (i >= w.num_ranges) {
        return -EINVAL;
    }
    memcpy(out, msg->u.feature.data + sizeof w + (size_t)i * sizeof *out, sizeof *out);
    return 0;
}

VFU_API int vfu_feature_log_report(const vfu_msg *msg, vfu_wire_feature_log_report *out, const uint8_t **bitmap,
                                   uint32_t *bitmap_len)
{
    int rc = vfux_feature_get(msg, VFU_FEATURE_LOGGING_REPORT, out, sizeof *out);

    if (rc < 0) {
        return rc;
    }
    *bitmap = msg->u.feature.data + sizeof *out;
    *bitmap_len = msg->u.feature.data_len - (uint32_t)sizeof *out;
    return 0;
}

/* Makes buf the payload: size bytes of fixed part, then rest_len of rest, which may be in its place already. */
static int vfux_feature_set(vfu_msg *msg, uint32_t index, const void *fixed, uint32_t size, const void *rest, uint64_t rest_len,
                            void *buf, size_t cap)
{
    if (!vfux_feature_is(msg, index)) {
        return -EINVAL;
    }
    if (cap < size || rest_len > cap - size || rest_len > UINT32_MAX - sizeof(vfu_wire_feature) - size) {
        return -EMSGSIZE;
    }
    if (rest_len != 0) {
        memmove((uint8_t *)buf + size, rest, (size_t)rest_len);
    }
    memcpy(buf, fixed, size);
    msg->u.feature.data = (const uint8_t *)buf;
    msg->u.feature.data_len = size + (uint32_t)rest_len;
    msg->u.feature.argsz = (uint32_t)sizeof(vfu_wire_feature) + msg->u.feature.data_len;
    return 0;
}

VFU_API int vfu_feature_set_migration(vfu_msg *msg, const vfu_wire_feature_migration *in, void *buf, size_t cap)
{
    return vfux_feature_set(msg, VFU_FEATURE_MIGRATION, in, sizeof *in, NULL, 0, buf, cap);
}

VFU_API int vfu_feature_set_mig_state(vfu_msg *msg, const vfu_wire_feature_mig_state *in, void *buf, size_t cap)
{
    return vfux_feature_set(msg, VFU_FEATURE_MIG_STATE, in, sizeof *in, NULL, 0, buf, cap);
}

VFU_API int vfu_feature_set_log_control(vfu_msg *msg, const vfu_wire_feature_log_control *in,
                                        const vfu_wire_feature_log_range *ranges, void *buf, size_t cap)
{
    uint64_t ranges_len = (uint64_t)in->num_ranges * sizeof *ranges;

    return vfux_feature_set(msg, VFU_FEATURE_LOGGING_START, in, sizeof *in, ranges, ranges_len, buf, cap);
}

VFU_API int vfu_feature_set_log_report(vfu_msg *msg, const vfu_wire_feature_log_report *in, const void *bitmap,
                                       uint32_t bitmap_len, void *buf, size_t cap)
{
    return vfux_feature_set(msg, VFU_FEATURE_LOGGING_REPORT, in, sizeof *in, bitmap, bitmap_len, buf, cap);
}

#define VFUX_RENDER_BYTES 16u  /* of data */
#define VFUX_RENDER_ITEMS 4u   /* of an array */
#define VFUX_RENDER_TEXT  256u /* of version data */

/* The names of the bits that are set, with a bar between, and what remains as a number; "-" for none. The list begins with
 * bit 0 and has no gap. */
static void vfux_render_bits(vfux_text *t, uint64_t bits, const char *names, size_t size)
{
    const char *bar = " ";
    unsigned count = 0;

    for (const char *name = names; name < names + size; name += strlen(name) + 1, count++) {
        if ((bits >> count & 1u) != 0) {
            vfux_text_add(t, bar);
            vfux_text_add(t, name);
            bar = "|";
        }
    }
    bits = bits >> count << count;
    if (bits != 0) {
        vfux_text_add(t, bar);
        vfux_text_hex(t, "", bits);
    } else if (*bar == ' ') {
        vfux_text_add(t, " -");
    }
}

/* A name from a list, or the number */
static void vfux_render_name(vfux_text *t, const char *names, size_t size, const char *label, uint32_t i)
{
    const char *name = vfux_name(names, size, i);

    if (name != NULL) {
        vfux_text_add(t, " ");
        vfux_text_add(t, name);
    } else {
        vfux_text_dec(t, label, i);
    }
}

static void vfux_render_region(vfux_text *t, uint32_t i)
{
    static const char names[] = "BAR0\0BAR1\0BAR2\0BAR3\0BAR4\0BAR5\0ROM\0CONFIG\0VGA";

    vfux_render_name(t, names, sizeof(names), " region ", i);
}

static void vfux_render_irq(vfux_text *t, uint32_t i)
{
    static const char names[] = "INTX\0MSI\0MSIX\0ERR\0REQ";

    vfux_render_name(t, names, sizeof(names), " irq ", i);
}

/* Data as one number if it has the width of one, else its first bytes */
static void vfux_render_data(vfux_text *t, const uint8_t *data, uint32_t n)
{
    uint8_t one;
    uint16_t two;
    uint32_t four;
    uint64_t eight;

    switch (data != NULL ? n : 0) {
    case 0: return;
    case 1:
        memcpy(&one, data, n);
        vfux_text_hex(t, " = ", one);
        return;
    case 2:
        memcpy(&two, data, n);
        vfux_text_hex(t, " = ", two);
        return;
    case 4:
        memcpy(&four, data, n);
        vfux_text_hex(t, " = ", four);
        return;
    case 8:
        memcpy(&eight, data, n);
        vfux_text_hex(t, " = ", eight);
        return;
    default: break;
    }
    vfux_text_add(t, " =");
    for (uint32_t i = 0; i < n && i < VFUX_RENDER_BYTES; i++) {
        vfux_text_add(t, " ");
        vfux_text_digits(t, data[i], true, 2);
    }
    if (n > VFUX_RENDER_BYTES) {
        vfux_text_add(t, " ...");
    }
}

/* Text of a peer: a terminal gets nothing but printable ASCII */
static void vfux_render_json(vfux_text *t, const char *json, uint32_t n)
{
    vfux_text_add(t, " ");
    for (uint32_t i = 0; i < n && i < VFUX_RENDER_TEXT; i++) {
        char c = json[i] >= ' ' && json[i] <= '~' ? json[i] : '?';
        vfux_text_bytes(t, &c, 1);
    }
    if (n > VFUX_RENDER_TEXT) {
        vfux_text_add(t, " ...");
    }
}

static void vfux_render_region_info(vfux_text *t, const vfu_msg *m)
{
    static const char flags[] = "read\0write\0mmap\0caps";
    vfu_region_cap cap = {0, 0, NULL, 0, 0};
    vfu_wire_sparse_area area;
    vfu_wire_cap_type type;
    uint32_t count;

    vfux_render_region(t, m->u.region_info.index);
    if (vfu_msg_is_reply(m)) {
        vfux_text_hex(t, " size ", m->u.region_info.size);
        vfux_render_bits(t, m->u.region_info.flags, flags, sizeof(flags));
        vfux_text_hex(t, " offset ", m->u.region_info.offset);
    }
    vfux_text_dec(t, " argsz ", m->u.region_info.argsz);
    while (vfu_msg_next_cap(m, &cap)) {
        if (vfu_region_cap_areas(&cap, &count) == 0) {
            vfux_text_dec(t, " sparse ", count);
            for (uint32_t i = 0; i < VFUX_RENDER_ITEMS && vfu_region_cap_area(&cap, i, &area) == 0; i++) {
                vfux_text_hex(t, " [", area.offset);
                vfux_text_hex(t, " + ", area.size);
                vfux_text_add(t, "]");
            }
            vfux_text_add(t, count > VFUX_RENDER_ITEMS ? " ..." : "");
        } else if (vfu_region_cap_type(&cap, &type) == 0) {
            vfux_text_hex(t, " type ", type.type);
            vfux_text_hex(t, " subtype ", type.subtype);
        } else {
            vfux_text_dec(t, " cap ", cap.id);
        }
    }
}

static void vfux_render_io_fds(vfux_text *t, const vfu_msg *m)
{
    vfu_wire_sub_region sub;

    vfux_render_region(t, m->u.region_io_fds.index);
    vfux_text_dec(t, " count ", m->u.region_io_fds.count);
    vfux_text_dec(t, " argsz ", m->u.region_io_fds.argsz);
    for (uint32_t i = 0; i < VFUX_RENDER_ITEMS && vfu_msg_sub_region(m, i, &sub) == 0; i++) {
        vfux_text_hex(t, " [", sub.offset);
        vfux_text_hex(t, " + ", sub.size);
        vfux_text_dec(t, " fd ", sub.fd_index);
        vfux_text_dec(t, " type ", sub.type);
        vfux_text_add(t, "]");
    }
    vfux_text_add(t, m->u.region_io_fds.data_len != 0 && m->u.region_io_fds.count > VFUX_RENDER_ITEMS ? " ..." : "");
}

static void vfux_render_irq_set(vfux_text *t, const vfu_msg *m)
{
    static const char flags[] = "none\0bool\0eventfd\0mask\0unmask\0trigger";

    vfux_render_irq(t, m->u.irq_set.index);
    vfux_text_dec(t, " start ", m->u.irq_set.start);
    vfux_text_dec(t, " count ", m->u.irq_set.count);
    vfux_render_bits(t, m->u.irq_set.flags, flags, sizeof(flags));
    vfux_render_data(t, m->u.irq_set.data, m->u.irq_set.data_len);
}

static void vfux_render_write_multi(vfux_text *t, const vfu_msg *m)
{
    vfu_wire_write_one one;

    vfux_text_dec(t, " count ", m->u.write_multi.count);
    for (uint32_t i = 0; i < VFUX_RENDER_ITEMS && vfu_msg_write_one(m, i, &one) == 0; i++) {
        vfux_text_add(t, " [");
        vfux_render_region(t, one.region);
        vfux_text_hex(t, " + ", one.offset);
        vfux_text_dec(t, " count ", one.count);
        vfux_render_data(t, one.data, one.count);
        vfux_text_add(t, " ]");
    }
    vfux_text_add(t, !vfu_msg_is_reply(m) && m->u.write_multi.count > VFUX_RENDER_ITEMS ? " ..." : "");
}

static void vfux_render_feature(vfux_text *t, const vfu_msg *m)
{
    static const char names[] = "\0MIGRATION\0MIG_STATE\0\0\0\0LOGGING_START\0LOGGING_STOP\0LOGGING_REPORT";
    static const char what[] = "get\0set\0probe";
    static const char migration[] = "stop-copy\0p2p\0pre-copy";
    static const char states[] = "ERROR\0STOP\0RUNNING\0STOP_COPY\0RESUMING\0RUNNING_P2P\0PRE_COPY\0PRE_COPY_P2P";
    vfu_wire_feature_migration mig;
    vfu_wire_feature_mig_state state;
    vfu_wire_feature_log_control control;
    vfu_wire_feature_log_range range;
    vfu_wire_feature_log_report report;
    const uint8_t *bitmap;
    uint32_t n;

    vfux_render_name(t, names, sizeof(names), " feature ", m->u.feature.flags & VFU_FEATURE_INDEX_MASK);
    vfux_render_bits(t, m->u.feature.flags >> 16, what, sizeof(what));
    vfux_text_dec(t, " argsz ", m->u.feature.argsz);
    if (vfu_feature_migration(m, &mig) == 0) {
        vfux_render_bits(t, mig.flags, migration, sizeof(migration));
    } else if (vfu_feature_mig_state(m, &state) == 0) {
        vfux_render_name(t, states, sizeof(states), " state ", state.state);
    } else if (vfu_feature_log_control(m, &control) == 0) {
        vfux_text_hex(t, " page ", control.page_size);
        vfux_text_dec(t, " ranges ", control.num_ranges);
        for (uint32_t i = 0; i < VFUX_RENDER_ITEMS && vfu_feature_log_range(m, i, &range) == 0; i++) {
            vfux_text_hex(t, " [", range.iova);
            vfux_text_hex(t, " + ", range.length);
            vfux_text_add(t, "]");
        }
        vfux_text_add(t, control.num_ranges > VFUX_RENDER_ITEMS ? " ..." : "");
    } else if (vfu_feature_log_report(m, &report, &bitmap, &n) == 0) {
        vfux_text_hex(t, " iova ", report.iova);
        vfux_text_hex(t, " length ", report.length);
        vfux_text_hex(t, " page ", report.page_size);
        vfux_render_data(t, bitmap, n);
    } else {
        vfux_render_data(t, m->u.feature.data, m->u.feature.data_len);
    }
}

static void vfux_render_payload(vfux_text *t, const vfu_msg *m)
{
    static const char unmap_flags[] = "dirty-bitmap\0all";
    static const char device_flags[] = "reset\0pci";
    static const char irq_flags[] = "eventfd\0maskable\0automasked\0noresize";
    static const char access[][6] = {" none", " r", " w", " rw"};
    bool reply = vfu_msg_is_reply(m);

    switch (m->cmd) {
    case VFU_CMD_VERSION:
        vfux_text_dec(t, " ", m->u.version.major);
        vfux_text_dec(t, ".", m->u.version.minor);
        if (m->u.version.json != NULL) {
            vfux_render_json(t, m->u.version.json, m->u.version.json_len);
        }
        break;
    case VFU_CMD_DMA_MAP:
        if (!reply) {
            vfux_text_hex(t, " iova ", m->u.dma_map.address);
            vfux_text_hex(t, " size ", m->u.dma_map.size);
            vfux_text_add(t, access[m->u.dma_map.flags & 3u]);
            vfux_text_hex(t, " offset ", m->u.dma_map.offset);
            if (m->u.dma_map.flags > 3u) {
                vfux_text_hex(t, " flags ", m->u.dma_map.flags);
            }
        }
        break;
    case VFU_CMD_DMA_UNMAP:
        vfux_text_hex(t, " iova ", m->u.dma_unmap.address);
        vfux_text_hex(t, " size ", m->u.dma_unmap.size);
        if (m->u.dma_unmap.flags != 0) {
            vfux_render_bits(t, m->u.dma_unmap.flags, unmap_flags, sizeof(unmap_flags));
        }
        break;
    case VFU_CMD_DEVICE_GET_INFO:
        if (reply) {
            vfux_render_bits(t, m->u.device_info.flags, device_flags, sizeof(device_flags));
            vfux_text_dec(t, " regions ", m->u.device_info.num_regions);
            vfux_text_dec(t, " irqs ", m->u.device_info.num_irqs);
        }
        vfux_text_dec(t, " argsz ", m->u.device_info.argsz);
        break;
    case VFU_CMD_DEVICE_GET_REGION_INFO: vfux_render_region_info(t, m); break;
    case VFU_CMD_DEVICE_GET_REGION_IO_FDS: vfux_render_io_fds(t, m); break;
    case VFU_CMD_DEVICE_GET_IRQ_INFO:
        vfux_render_irq(t, m->u.irq_info.index);
        if (reply) {
            vfux_text_dec(t, " count ", m->u.irq_info.count);
            vfux_render_bits(t, m->u.irq_info.flags, irq_flags, sizeof(irq_flags));
        }
        vfux_text_dec(t, " argsz ", m->u.irq_info.argsz);
        break;
    case VFU_CMD_DEVICE_SET_IRQS:
        if (!reply) {
            vfux_render_irq_set(t, m);
        }
        break;
    case VFU_CMD_REGION_READ:
    case VFU_CMD_REGION_WRITE:
        vfux_render_region(t, m->u.region.region);
        vfux_text_hex(t, " + ", m->u.region.offset);
        vfux_text_dec(t, " count ", m->u.region.count);
        vfux_render_data(t, m->u.region.data, m->u.region.data_len);
        break;
    case VFU_CMD_DMA_READ:
    case VFU_CMD_DMA_WRITE:
        if (reply && m->cmd == VFU_CMD_DMA_WRITE && m->u.dma.ack_len == 0) {
            break;
        }
        vfux_text_hex(t, " iova ", m->u.dma.address);
        vfux_text_dec(t, " count ", m->u.dma.count);
        vfux_text_add(t, m->u.dma.legacy ? " legacy" : "");
        vfux_render_data(t, m->u.dma.data, m->u.dma.data_len);
        break;
    case VFU_CMD_REGION_WRITE_MULTI: vfux_render_write_multi(t, m); break;
    case VFU_CMD_DEVICE_FEATURE: vfux_render_feature(t, m); break;
    case VFU_CMD_MIG_DATA_READ:
    case VFU_CMD_MIG_DATA_WRITE:
        if (!reply || m->cmd == VFU_CMD_MIG_DATA_READ) {
            vfux_text_dec(t, " size ", m->u.mig_data.size);
            vfux_text_dec(t, " argsz ", m->u.mig_data.argsz);
            vfux_render_data(t, m->u.mig_data.data, m->u.mig_data.data_len);
        }
        break;
    default: break;
    }
}

VFU_API int vfu_msg_render(const vfu_msg *msg, char *out, size_t cap)
{
    vfux_text t = {out, cap != 0 ? cap - 1 : 0, 0};

    vfux_text_add(&t, vfu_msg_is_reply(msg) ? "<- 0x" : "-> 0x");
    vfux_text_digits(&t, msg->id, true, 4);
    vfux_render_name(&t, vfux_cmd_names, sizeof(vfux_cmd_names), " command ", msg->cmd);
    if (vfu_msg_is_error(msg)) {
        vfux_text_add(&t, " error");
        vfux_render_name(&t, vfux_errno_names, sizeof(vfux_errno_names), " ", msg->error);
    } else {
        vfux_render_payload(&t, msg);
    }
    if ((msg->flags & (VFU_HDR_TYPE_MASK | VFU_HDR_NO_REPLY)) == VFU_HDR_NO_REPLY) {
        vfux_text_add(&t, " no-reply");
    }
    if (cap != 0) {
        out[t.len < cap - 1 ? t.len : cap - 1] = '\0';
    }
    return (int)t.len;
}

#ifndef VFU_CODEC_ONLY

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* ==== transport ========================================================================================================== */

enum {
    VFUX_RX_EXTRA = 65536, /* room behind the largest message, so that pipelined ones come with it */
    VFUX_BATCHES = 64,     /* messages whose descriptors wait; QEMU pipelines up to 44 */
    VFUX_LINE_MAX = 512    /* bytes of a log line */
};

static void vfux_say(const vfu_logger *logger, vfu_level level, const char *format, ...) __attribute__((format(printf, 3, 4)));

static bool vfux_says(const vfu_logger *logger, vfu_level level)
{
    return level <= (logger->level ? logger->level : VFU_LEVEL_WARNING);
}

static void vfux_say(const vfu_logger *logger, vfu_level level, const char *format, ...)
{
    char line[VFUX_LINE_MAX];
    va_list arguments;
    if (!vfux_says(logger, level))
        return;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    if (logger->write)
        logger->write(logger->ctx, level, line);
    else
        fprintf(stderr, "vfu: %s\n", line);
}

static uint64_t vfux_now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static void *vfux_allocate(const vfu_alloc *alloc, size_t size)
{
    return alloc->alloc ? alloc->alloc(alloc->ctx, size) : malloc(size);
}

static void *vfux_allocate_zero(const vfu_alloc *alloc, size_t size)
{
    if (!alloc->alloc)
        return calloc(1, size);
    void *memory = alloc->alloc(alloc->ctx, size);
    return memory ? memset(memory, 0, size) : NULL;
}

static void vfux_free(const vfu_alloc *alloc, void *memory, size_t size)
{
    if (!alloc->release)
        free(memory);
    else if (memory)
        alloc->release(alloc->ctx, memory, size);
}

static void vfux_close(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void vfux_close_all(int *fds, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        vfux_close(&fds[i]);
}

/* Descriptors that belong to one message: of a received one, or one that waits to be sent. */
typedef struct vfux_batch {
    uint64_t at; /* where in the stream that message starts, in bytes since the connection began */
    size_t len;  /* bytes of a message that waits to be sent: the descriptors go with these and with no more */
    unsigned count, refused;
    int fds[VFU_FDS_MAX];
} vfux_batch;

/*
 * Positions count from the beginning of the connection. The buffers hold [start, end) of their stream:
 *
 *     rx: | ... taken ... | start: next message | ... | scanned: last message that has begun | end |  free  |
 */
struct vfu_conn {
    vfu_io io;
    uint8_t *rx, *tx;
    size_t rx_start, rx_end, rx_scanned;
    uint64_t rx_at;                 /* stream position of rx[0] */
    size_t capacity, tx_capacity;   /* bytes */
    size_t rx_hole_at, rx_hole_len; /* a message that was taken from behind others; closed by the next call */
    uint32_t max_msg, max_fds;
    unsigned rx_batch_count, tx_batch_count;
    size_t tx_start, tx_end;
    uint64_t tx_at; /* stream position of tx[0] */
    int fd;
    bool rx_broken; /* no message can begin at rx_scanned */
    bool may_wait;  /* vfux_conn_receive_soon works */
    vfu_alloc alloc;
    vfux_batch rx_batches[VFUX_BATCHES], tx_batches[VFUX_BATCHES];
};

/* recvmsg() with these flags. An interrupted one that may wait says -EINTR, any other is made again. */
static int64_t vfux_socket_recvmsg(int fd, int flags, void *buf, size_t len, int *fds, unsigned *fd_count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * VFU_FDS_RECEIVABLE)];
    } control;
    struct iovec iov = {.iov_base = buf, .iov_len = len};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    ssize_t n;
    *fd_count = 0;
    do
        n = recvmsg(fd, &msg, flags | MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR && flags & MSG_DONTWAIT);
    if (n < 0)
        return errno == EWOULDBLOCK ? -EAGAIN : -errno;
    /* By hand: musl's CMSG_NXTHDR does not compile without a warning. */
    for (size_t at = 0; at + sizeof(struct cmsghdr) <= (size_t)msg.msg_controllen;) {
        struct cmsghdr c;
        memcpy(&c, control.bytes + at, sizeof(c));
        if (c.cmsg_len < CMSG_LEN(0) || c.cmsg_len > (size_t)msg.msg_controllen - at)
            break;
        size_t count = c.cmsg_level == SOL_SOCKET && c.cmsg_type == SCM_RIGHTS ? (c.cmsg_len - CMSG_LEN(0)) / sizeof(int) : 0;
        for (size_t i = 0; i < count && *fd_count < VFU_FDS_RECEIVABLE; i++)
            memcpy(&fds[(*fd_count)++], control.bytes + at + CMSG_LEN(0) + i * sizeof(int), sizeof(int));
        at += CMSG_SPACE(c.cmsg_len - CMSG_LEN(0));
    }
    return msg.msg_flags & MSG_CTRUNC ? -EBADMSG : n;
}

static int64_t vfux_socket_receive(void *ctx, void *buf, size_t len, int *fds, unsigned *fd_count)
{
    return vfux_socket_recvmsg((int)(intptr_t)ctx, MSG_DONTWAIT, buf, len, fds, fd_count);
}

static int64_t vfux_socket_send(void *ctx, const vfu_slice *slices, unsigned count, const int *fds, unsigned fd_count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * VFU_FDS_MAX)];
    } control;
    struct iovec iov[2];
    struct msghdr msg = {.msg_iov = iov};
    for (unsigned i = 0; i < count && i < 2; i++) {
        memcpy(&iov[i].iov_base, &slices[i].data, sizeof(void *)); /* sendmsg() doesn't write, but its type says otherwise */
        iov[i].iov_len = slices[i].len;
        msg.msg_iovlen++;
    }
    if (fd_count) {
        memset(&control, 0, sizeof(control));
        msg.msg_control = control.bytes;
        msg.msg_controllen = (socklen_t)CMSG_SPACE(sizeof(int) * fd_count);
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = (socklen_t)CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(c), fds, sizeof(int) * fd_count);
    }
    ssize_t n;
    do
        n = sendmsg((int)(intptr_t)ctx, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    if (n < 0)
        return errno == EWOULDBLOCK ? -EAGAIN : -errno;
    return n;
}

/* Close-on-exec and non-blocking. */
static int vfux_set_flags(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    return flags < 0 || fcntl(fd, F_SETFD, FD_CLOEXEC) < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? -errno : 0;
}

VFU_API int vfu_conn_create(vfu_conn **out, const vfu_conn_desc *desc)
{
    int fd = desc->io ? -1 : desc->fd;
    uint32_t max_msg = desc->max_msg ? desc->max_msg : VFU_MSG_MAX_DEFAULT;
    uint32_t max_fds = desc->max_fds ? desc->max_fds : VFU_FDS_MAX;
    int err = max_msg < VFU_HDR_SIZE || max_msg > INT_MAX - VFUX_RX_EXTRA || max_fds > VFU_FDS_MAX ? -EINVAL : 0;
    vfu_conn *conn = NULL;
    *out = NULL;
    if (!err && !desc->io)
        err = vfux_set_flags(fd);
    if (!err && !(conn = vfux_allocate_zero(&desc->alloc, sizeof(*conn))))
        err = -ENOMEM;
    if (!err) {
        conn->capacity = (size_t)max_msg + VFUX_RX_EXTRA;
        conn->alloc = desc->alloc;
        conn->max_msg = max_msg;
        conn->max_fds = max_fds;
        conn->fd = fd;
        conn->io = desc->io ? *desc->io : (vfu_io){(void *)(intptr_t)fd, vfux_socket_receive, vfux_socket_send};
        conn->tx_capacity = (size_t)max_msg * 2;
        conn->rx = vfux_allocate(&conn->alloc, conn->capacity);
        conn->tx = vfux_allocate(&conn->alloc, conn->tx_capacity);
        err = conn->rx && conn->tx ? 0 : -ENOMEM;
    }
    if (err) {
        if (conn)
            vfu_conn_destroy(conn);
        else
            vfux_close(&fd);
        return err;
    }
    *out = conn;
    return 0;
}

VFU_API void vfu_conn_destroy(vfu_conn *conn)
{
    if (!conn)
        return;
    for (unsigned i = 0; i < conn->rx_batch_count; i++)
        vfux_close_all(conn->rx_batches[i].fds, conn->rx_batches[i].count);
    for (unsigned i = 0; i < conn->tx_batch_count; i++)
        vfux_close_all(conn->tx_batches[i].fds, conn->tx_batches[i].count);
    vfux_close(&conn->fd);
    vfu_alloc alloc = conn->alloc;
    vfux_free(&alloc, conn->rx, conn->capacity);
    vfux_free(&alloc, conn->tx, conn->tx_capacity);
    vfux_free(&alloc, conn, sizeof(*conn));
}

VFU_API int vfu_conn_fd(const vfu_conn *conn) { return conn->fd; }

/* Moves rx_scanned to the start of the message that has the last byte received, or to the end if none was received of it yet.
 * Returns the start of the message that has the last byte. */
static size_t vfux_conn_scan(vfu_conn *conn)
{
    size_t last = conn->rx_scanned;
    while (!conn->rx_broken && conn->rx_scanned < conn->rx_end) {
        uint32_t size;
        int err = vfu_msg_size(conn->rx + conn->rx_scanned, conn->rx_end - conn->rx_scanned, conn->max_msg, &size);
        last = conn->rx_scanned;
        if (err || size > conn->rx_end - conn->rx_scanned) {
            conn->rx_broken = err == -EBADMSG;
            break;
        }
        conn->rx_scanned += size;
    }
    return last;
}

/* Notes descriptors for the message that starts at stream position `at`; closes those that are too many. */
static void vfux_conn_keep(vfu_conn *conn, uint64_t at, int *fds, unsigned count)
{
    vfux_batch *batch = conn->rx_batch_count ? &conn->rx_batches[conn->rx_batch_count - 1] : NULL;
    unsigned kept = 0;
    if (!batch || batch->at != at) {
        batch = &conn->rx_batches[conn->rx_batch_count++]; /* there was room before it was received */
        *batch = (vfux_batch){.at = at};
    }
    while (kept < count && batch->count < conn->max_fds)
        batch->fds[batch->count++] = fds[kept++];
    batch->refused += count - kept;
    vfux_close_all(fds + kept, count - kept);
}

/* Moves the messages in front of one that was taken out of turn to where that one was. */
static void vfux_conn_close_hole(vfu_conn *conn)
{
    size_t before = conn->rx_hole_at - conn->rx_start;
    if (!conn->rx_hole_len)
        return;
    for (unsigned i = 0; i < conn->rx_batch_count; i++)
        if (conn->rx_batches[i].at < conn->rx_at + conn->rx_hole_at)
            conn->rx_batches[i].at += conn->rx_hole_len;
    memmove(conn->rx + conn->rx_start + conn->rx_hole_len, conn->rx + conn->rx_start, before);
    conn->rx_start += conn->rx_hole_len;
    conn->rx_hole_len = 0;
}

/* Is there room to receive, for bytes and for descriptors? Makes some by moving what is left of the last message to the
 * front. If there is none, a whole message waits to be taken. */
static bool vfux_conn_has_room(vfu_conn *conn)
{
    vfux_conn_close_hole(conn);
    if (conn->rx_start && conn->capacity - conn->rx_end < VFUX_RX_EXTRA) {
        memmove(conn->rx, conn->rx + conn->rx_start, conn->rx_end - conn->rx_start);
        conn->rx_at += conn->rx_start;
        conn->rx_end -= conn->rx_start;
        conn->rx_scanned -= conn->rx_start;
        conn->rx_start = 0;
    }
    return conn->rx_end < conn->capacity && conn->rx_batch_count < VFUX_BATCHES;
}

static int vfux_conn_receive(vfu_conn *conn, bool wait)
{
    int fds[VFU_FDS_RECEIVABLE];
    unsigned fd_count = 0;
    if (!vfux_conn_has_room(conn))
        return -ENOBUFS;
    uint8_t *to = conn->rx + conn->rx_end;
    size_t room = conn->capacity - conn->rx_end;
    int64_t n = wait ? vfux_socket_recvmsg(conn->fd, 0, to, room, fds, &fd_count)
                     : conn->io.receive(conn->io.ctx, to, room, fds, &fd_count);
    if (n <= 0) {
        vfux_close_all(fds, fd_count);
        return n ? (int)n : -EPIPE;
    }
    conn->rx_end += (size_t)n;
    size_t last = vfux_conn_scan(conn);
    if (fd_count)
        vfux_conn_keep(conn, conn->rx_at + last, fds, fd_count);
    return (int)n;
}

VFU_API int vfu_conn_receive(vfu_conn *conn) { return vfux_conn_receive(conn, false); }

/* Lets vfux_conn_receive_soon wait for so long. Everything else still waits for nothing, whatever the socket's flags are. */
static void vfux_conn_let_wait(vfu_conn *conn, unsigned ms)
{
    struct timeval limit = {.tv_usec = (suseconds_t)ms * 1000};
    int flags = fcntl(conn->fd, F_GETFL);
    conn->may_wait = flags >= 0 && setsockopt(conn->fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) == 0 &&
                     fcntl(conn->fd, F_SETFL, flags & ~O_NONBLOCK) == 0;
}

/* Like vfu_conn_receive, but waits a moment if nothing is there yet; -EAGAIN and -EINTR: nothing has come. */
static int vfux_conn_receive_soon(vfu_conn *conn) { return conn->may_wait ? vfux_conn_receive(conn, true) : -EAGAIN; }

/* Is a whole message in the buffer? */
static bool vfux_conn_has_next(const vfu_conn *conn) { return conn->rx_start < conn->rx_scanned; }

/* The message at offset `at` of the buffer, with its descriptors. 1; 0: it is not complete; -EBADMSG. */
static int vfux_conn_take(vfu_conn *conn, vfu_frame *frame, size_t at)
{
    uint32_t size;
    int err = vfu_msg_size(conn->rx + at, conn->rx_end - at, conn->max_msg, &size);
    if (err)
        return err == -EAGAIN ? 0 : err;
    if (size > conn->rx_end - at)
        return 0;
    frame->bytes = conn->rx + at;
    frame->len = size;
    for (unsigned i = 0; i < conn->rx_batch_count; i++) {
        vfux_batch *batch = &conn->rx_batches[i];
        if (batch->at != conn->rx_at + at)
            continue;
        memcpy(frame->fds, batch->fds, sizeof(batch->fds));
        frame->fd_count = batch->count;
        frame->fds_refused = batch->refused;
        memmove(batch, batch + 1, (--conn->rx_batch_count - i) * sizeof(*batch));
    }
    return 1;
}

static void vfux_frame_release(vfu_frame *frame)
{
    vfux_close_all(frame->fds, frame->fd_count);
    frame->fd_count = frame->fds_refused = 0;
}

VFU_API int vfu_conn_next(vfu_conn *conn, vfu_frame *frame)
{
    vfux_conn_close_hole(conn);
    vfux_frame_release(frame);
    int got = vfux_conn_take(conn, frame, conn->rx_start);
    if (got != 1)
        return got;
    conn->rx_start += frame->len;
    if (conn->rx_start == conn->rx_end) { /* empty: start again at the front; the frame's bytes stay until the next receive */
        conn->rx_at += conn->rx_end;
        conn->rx_start = conn->rx_end = conn->rx_scanned = 0;
    }
    return 1;
}

/* The same for the first reply, wherever it is: the commands before it stay. */
static int vfux_conn_next_reply(vfu_conn *conn, vfu_frame *frame)
{
    uint32_t size = 0;
    vfux_conn_close_hole(conn);
    vfux_frame_release(frame);
    for (size_t at = conn->rx_start;; at += size) {
        vfu_wire_header header;
        int err = vfu_msg_size(conn->rx + at, conn->rx_end - at, conn->max_msg, &size);
        if (err)
            return err == -EAGAIN ? 0 : err;
        if (size > conn->rx_end - at)
            return 0;
        memcpy(&header, conn->rx + at, sizeof(header));
        if ((header.flags & VFU_HDR_TYPE_MASK) == VFU_HDR_COMMAND)
            continue;
        conn->rx_hole_at = at;
        conn->rx_hole_len = size;
        return vfux_conn_take(conn, frame, at);
    }
}

VFU_API bool vfu_conn_is_waiting(const vfu_conn *conn) { return conn->tx_start < conn->tx_end; }

/* Appends a message, less what the socket took of it, to what waits. It fits. */
static int vfux_conn_queue(vfu_conn *conn, const vfu_slice *slices, size_t sent, const int *fds, unsigned fd_count)
{
    if (fd_count) {
        vfux_batch *batch = &conn->tx_batches[conn->tx_batch_count];
        *batch = (vfux_batch){.at = conn->tx_at + conn->tx_end, .len = slices[0].len + slices[1].len};
        for (unsigned i = 0; i < fd_count; i++) {
            int copy = fcntl(fds[i], F_DUPFD_CLOEXEC, 0);
            if (copy < 0) {
                int err = -errno;
                vfux_close_all(batch->fds, batch->count);
                return err;
            }
            batch->fds[batch->count++] = copy;
        }
        conn->tx_batch_count++;
    }
    for (unsigned i = 0; i < 2; i++) {
        size_t skip = sent < slices[i].len ? sent : slices[i].len;
        if (slices[i].len > skip)
            memcpy(conn->tx + conn->tx_end, (const uint8_t *)slices[i].data + skip, slices[i].len - skip);
        conn->tx_end += slices[i].len - skip;
        sent -= skip;
    }
    return 0;
}

/* Bytes that wait to be sent. */
static size_t vfux_conn_waiting(const vfu_conn *conn) { return conn->tx_end - conn->tx_start; }

/* Has `len` bytes fit behind what waits, by moving that to the front. False: they don't. */
static bool vfux_conn_make_room(vfu_conn *conn, size_t len)
{
    if (conn->tx_start && conn->tx_capacity - conn->tx_end < len) {
        memmove(conn->tx, conn->tx + conn->tx_start, vfux_conn_waiting(conn));
        conn->tx_at += conn->tx_start;
        conn->tx_end -= conn->tx_start;
        conn->tx_start = 0;
    }
    return conn->tx_capacity - conn->tx_end >= len;
}

/* Queues one message with at most VFU_FDS_MAX descriptors without a system call, for a flush to send it with others. 0;
 * -EAGAIN: it doesn't fit; or what fcntl() says. */
static int vfux_conn_put(vfu_conn *conn, const void *head, size_t head_len, const void *data, size_t data_len, const int *fds,
                         unsigned fd_count)
{
    vfu_slice slices[2] = {{head, head_len}, {data, data_len}};
    if (!vfux_conn_make_room(conn, head_len + data_len) || (fd_count && conn->tx_batch_count == VFUX_BATCHES))
        return -EAGAIN;
    return vfux_conn_queue(conn, slices, 0, fds, fd_count);
}

VFU_API int vfu_conn_send(vfu_conn *conn, const void *head, size_t head_len, const void *data, size_t data_len, const int *fds,
                          unsigned fd_count)
{
    vfu_slice slices[2] = {{head, head_len}, {data, data_len}};
    size_t total = head_len + data_len, sent = 0;
    if (total > conn->tx_capacity || fd_count > VFU_FDS_MAX)
        return -EMSGSIZE;
    if (!vfu_conn_is_waiting(conn)) {
        int64_t n = conn->io.send(conn->io.ctx, slices, data_len ? 2 : 1, fds, fd_count);
        if (n < 0 && n != -EAGAIN)
            return (int)n;
        sent = n > 0 ? (size_t)n : 0;
        if (sent == total)
            return 0;
    }
    unsigned fds_left = sent ? 0 : fd_count;
    if (!vfux_conn_make_room(conn, total - sent) || (fds_left && conn->tx_batch_count == VFUX_BATCHES))
        return -EAGAIN; /* only if something waited before: an empty queue has room */
    return vfux_conn_queue(conn, slices, sent, fds, fds_left);
}

VFU_API int vfu_conn_flush(vfu_conn *conn)
{
    while (vfu_conn_is_waiting(conn)) {
        vfux_batch *batch = conn->tx_batch_count ? conn->tx_batches : NULL;
        bool with_fds = batch && batch->at == conn->tx_at + conn->tx_start;
        size_t len = conn->tx_end - conn->tx_start;
        if (batch)
            len = with_fds ? batch->len : (size_t)(batch->at - conn->tx_at) - conn->tx_start;
        vfu_slice slice = {conn->tx + conn->tx_start, len};
        int64_t n = conn->io.send(conn->io.ctx, &slice, 1, with_fds ? batch->fds : NULL, with_fds ? batch->count : 0);
        if (n < 0)
            return (int)n;
        if (with_fds) {
            vfux_close_all(batch->fds, batch->count);
            memmove(batch, batch + 1, --conn->tx_batch_count * sizeof(*batch));
        }
        conn->tx_start += (size_t)n;
    }
    conn->tx_at += conn->tx_end;
    conn->tx_start = conn->tx_end = 0;
    return 0;
}

/* The data of a message, which travels behind header and fixed part. */
static const void *vfux_msg_tail(const vfu_msg *msg, size_t *len)
{
    const uint8_t *data = NULL;
    *len = 0;
    if (vfu_msg_is_error(msg))
        return NULL;
    switch (msg->cmd) {
    case VFU_CMD_DMA_UNMAP: data = msg->u.dma_unmap.data, *len = msg->u.dma_unmap.data_len; break;
    case VFU_CMD_DEVICE_GET_REGION_INFO: data = msg->u.region_info.data, *len = msg->u.region_info.data_len; break;
    case VFU_CMD_DEVICE_GET_REGION_IO_FDS: data = msg->u.region_io_fds.data, *len = msg->u.region_io_fds.data_len; break;
    case VFU_CMD_DEVICE_SET_IRQS: data = msg->u.irq_set.data, *len = msg->u.irq_set.data_len; break;
    case VFU_CMD_REGION_READ:
    case VFU_CMD_REGION_WRITE: data = msg->u.region.data, *len = msg->u.region.data_len; break;
    case VFU_CMD_DMA_READ:
    case VFU_CMD_DMA_WRITE: data = msg->u.dma.data, *len = msg->u.dma.data_len; break;
    case VFU_CMD_REGION_WRITE_MULTI: data = msg->u.write_multi.data, *len = msg->u.write_multi.data_len; break;
    case VFU_CMD_DEVICE_FEATURE: data = msg->u.feature.data, *len = msg->u.feature.data_len; break;
    case VFU_CMD_MIG_DATA_READ:
    case VFU_CMD_MIG_DATA_WRITE: data = msg->u.mig_data.data, *len = msg->u.mig_data.data_len; break;
    default: break;
    }
    return data;
}

/* Sends msg with its data; -EAGAIN and other errors as vfu_conn_send. */
static int vfux_conn_send_msg(vfu_conn *conn, const vfu_msg *msg, const int *fds, unsigned fd_count)
{
    size_t data_len;
    const void *data = vfux_msg_tail(msg, &data_len);
    uint8_t head[VFU_HDR_SIZE + 8 + VFU_CAPS_WRITE_MAX];
    int len = vfu_msg_encode_head(msg, head, sizeof(head));
    if (len < 0)
        return len;
    return vfu_conn_send(conn, head, (size_t)len, data, data_len, fds, fd_count);
}

static int vfux_sock_address(struct sockaddr_un *address, const char *path)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    if (!*path)
        return -ENOENT;
    if (strlen(path) >= sizeof(address->sun_path))
        return -ENAMETOOLONG;
    memcpy(address->sun_path, path, strlen(path));
    return 0;
}

static int vfux_sock_connect(const char *path, int flags)
{
    struct sockaddr_un address;
    int err = vfux_sock_address(&address, path);
    if (err)
        return err;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | flags, 0);
    if (fd < 0)
        return -errno;
    while (connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        if (errno == EINTR)
            continue;
        err = -errno;
        close(fd);
        return err;
    }
    return fd;
}

VFU_API int vfu_sock_connect(const char *path) { return vfux_sock_connect(path, 0); }

/* Is `path` a socket file that nobody listens on? */
static bool vfux_sock_is_stale(const char *path)
{
    struct stat st;
    if (lstat(path, &st) < 0 || !S_ISSOCK(st.st_mode))
        return false;
    int fd = vfux_sock_connect(path, SOCK_NONBLOCK); /* somebody may listen and be busy */
    if (fd >= 0)
        close(fd);
    return fd == -ECONNREFUSED;
}

/* Keeps others that use this library from listening in the same directory meanwhile: between bind() and listen() a live socket
 * looks like a stale one. Gives a descriptor to close, or -1: it is done without, as it is when somebody holds that lock for
 * long. */
static int vfux_sock_lock(const char *path)
{
    char directory[sizeof(((struct sockaddr_un *)0)->sun_path) + 2];
    const char *slash = strrchr(path, '/');
    snprintf(directory, sizeof(directory), "%.*s", slash ? (int)(slash - path) + 1 : 1, slash ? path : ".");
    int fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    for (unsigned tries = 0; fd >= 0 && tries < 200 && flock(fd, LOCK_EX | LOCK_NB) < 0; tries++)
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    return fd;
}

VFU_API int vfu_sock_listen(const char *path)
{
    struct sockaddr_un address;
    int err = vfux_sock_address(&address, path);
    if (err)
        return err;
    int lock = vfux_sock_lock(path), fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    err = fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 ? -errno : 0;
    if (fd >= 0 && err == -EADDRINUSE && vfux_sock_is_stale(path)) {
        unlink(path);
        err = bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 ? -errno : 0;
    }
    if (!err && listen(fd, 16) < 0) {
        err = -errno;
        unlink(path);
    }
    if (err)
        vfux_close(&fd);
    vfux_close(&lock);
    return err ? err : fd;
}

VFU_API int vfu_sock_accept(int listener)
{
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0)
            return fd;
        if (errno != EINTR && errno != ECONNABORTED)
            return errno == EWOULDBLOCK ? -EAGAIN : -errno;
    }
}

/* ==== PCI ================================================================================================================ */

/* Offsets and values of the PCI Local Bus 3.0, PCI Power Management 1.2 and PCI Express 2.0 specifications. */
enum {
    VFUX_PCI_VENDOR = 0x00,
    VFUX_PCI_DEVICE = 0x02,
    VFUX_PCI_COMMAND = 0x04,
    VFUX_PCI_STATUS = 0x06,
    VFUX_PCI_REVISION = 0x08,
    VFUX_PCI_CLASS = 0x09,
    VFUX_PCI_CACHE_LINE = 0x0c,
    VFUX_PCI_BAR = 0x10,
    VFUX_PCI_SUBSYSTEM_VENDOR = 0x2c,
    VFUX_PCI_SUBSYSTEM = 0x2e,
    VFUX_PCI_ROM = 0x30,
    VFUX_PCI_CAPABILITIES = 0x34,
    VFUX_PCI_INTERRUPT_LINE = 0x3c,
    VFUX_PCI_INTERRUPT_PIN = 0x3d,
    VFUX_PCI_FIRST_CAP = 0x40,

    VFUX_PCI_CAP_PM = 0x01,
    VFUX_PCI_CAP_MSI = 0x05,
    VFUX_PCI_CAP_VENDOR = 0x09,
    VFUX_PCI_CAP_EXPRESS = 0x10,
    VFUX_PCI_CAP_MSIX = 0x11,

    VFUX_PM_LEN = 8,
    VFUX_PM_CONTROL = 4,
    VFUX_MSIX_LEN = 12,
    VFUX_MSIX_CONTROL = 2,
    VFUX_EXPRESS_LEN = 60,
    VFUX_EXPRESS_DEVICE_CONTROL = 8,
    VFUX_MSI_LEN = 14,
    VFUX_MSI_MASK_LEN = 24,
    VFUX_MSI_CONTROL = 2,

    VFUX_PCI_FIRST_EXTENDED = 0x100,
    VFUX_PCI_EXT_AER = 0x0001,
    VFUX_PCI_EXT_SERIAL = 0x0003,
    VFUX_PCI_EXT_VENDOR = 0x000b,
    VFUX_AER_LEN = 72,
    VFUX_SERIAL_LEN = 12
};

static void vfux_put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
}

static void vfux_put32(uint8_t *at, uint32_t value)
{
    vfux_put16(at, value);
    vfux_put16(at + 2, value >> 16);
}

static uint16_t vfux_get16(const uint8_t *at) { return (uint16_t)(at[0] | at[1] << 8); }
static uint32_t vfux_get32(const uint8_t *at) { return vfux_get16(at) | (uint32_t)vfux_get16(at + 2) << 16; }

/* Adds an empty capability of len bytes to the end of the list. Returns its offset, 0: no room. *end is where the next may
 * start. */
static uint16_t vfux_pci_add(vfu_pci *pci, uint16_t *end, uint8_t **link, uint8_t id, uint32_t len)
{
    uint16_t at = *end;
    if (at + len > 256)
        return 0;
    **link = (uint8_t)at;
    *link = &pci->config[at + 1];
    pci->config[at] = id;
    *end = (uint16_t)((at + len + 3) & ~3u);
    vfux_put16(pci->config + VFUX_PCI_STATUS, vfux_get16(pci->config + VFUX_PCI_STATUS) | 0x10u);
    return at;
}

/* A 64-bit BAR takes two registers; I/O and memory BARs keep their type in the low bits, and size themselves by read-only
 * zeros. */
static bool vfux_pci_build_bars(vfu_pci *pci, const vfu_pci_desc *desc)
{
    uint32_t command = VFU_PCI_COMMAND_MASTER | VFU_PCI_COMMAND_INTX_DISABLE | 0x0140u; /* parity and SERR are storage */
    for (unsigned i = 0; i < 6; i++) {
        const vfu_bar_desc *bar = &desc->bar[i];
        uint8_t *config = pci->config + VFUX_PCI_BAR + 4 * i, *writable = pci->writable + VFUX_PCI_BAR + 4 * i;
        bool io = bar->kind == VFU_BAR_IO, wide = bar->kind == VFU_BAR_MEM64;
        if (!bar->size)
            continue;
        if (bar->size & (bar->size - 1) || bar->size < (io ? 4u : 16u) || (!wide && bar->size > UINT32_C(1) << 31) ||
            (wide && (i == 5 || desc->bar[i + 1].size)) || (io && bar->prefetchable))
            return false;
        uint64_t mask = ~(bar->size - 1);
        vfux_put32(config, io ? 1u : (wide ? 4u : 0u) | (bar->prefetchable ? 8u : 0u));
        vfux_put32(writable, (uint32_t)mask);
        if (wide)
            vfux_put32(writable + 4, (uint32_t)(mask >> 32));
        command |= io ? VFU_PCI_COMMAND_IO : VFU_PCI_COMMAND_MEMORY;
    }
    if (desc->rom_size) {
        if (desc->rom_size & (desc->rom_size - 1) || desc->rom_size < 2048)
            return false;
        vfux_put32(pci->writable + VFUX_PCI_ROM, ~(desc->rom_size - 1) | 1u);
        command |= VFU_PCI_COMMAND_MEMORY;
    }
    vfux_put16(pci->writable + VFUX_PCI_COMMAND, command);
    return true;
}

static bool vfux_pci_build_msix(vfu_pci *pci, const vfu_pci_desc *desc, uint16_t *end, uint8_t **link)
{
    uint64_t vectors = desc->msix.vectors, table_end = desc->msix.table_offset + vectors * 16;
    uint64_t pba_end = desc->msix.pba_offset + (vectors + 63) / 64 * 8;
    if (vectors > 2048 || desc->msix.table_bar > 5 || desc->msix.pba_bar > 5 ||
        (desc->msix.table_offset | desc->msix.pba_offset) & 7 || table_end > desc->bar[desc->msix.table_bar].size ||
        pba_end > desc->bar[desc->msix.pba_bar].size)
        return false;
    pci->msix_at = vfux_pci_add(pci, end, link, VFUX_PCI_CAP_MSIX, VFUX_MSIX_LEN);
    uint8_t *cap = pci->config + pci->msix_at;
    vfux_put16(cap + VFUX_MSIX_CONTROL, desc->msix.vectors - 1u);
    vfux_put32(cap + 4, desc->msix.table_offset | desc->msix.table_bar);
    vfux_put32(cap + 8, desc->msix.pba_offset | desc->msix.pba_bar);
    vfux_put16(pci->writable + pci->msix_at + VFUX_MSIX_CONTROL, 0xc000u); /* enable, function mask */
    return true;
}

static void vfux_pci_build_express(vfu_pci *pci, const vfu_pci_desc *desc, uint16_t *end, uint8_t **link)
{
    pci->express_at = vfux_pci_add(pci, end, link, VFUX_PCI_CAP_EXPRESS, VFUX_EXPRESS_LEN);
    uint8_t *cap = pci->config + pci->express_at, *writable = pci->writable + pci->express_at;
    pci->flr = desc->flr;
    vfux_put16(cap + 2, 0x0002);                                            /* version 2, endpoint */
    vfux_put32(cap + 4, 0x00008000u | (desc->flr ? UINT32_C(1) << 28 : 0)); /* role-based errors, function-level reset */
    vfux_put16(cap + 8, 0x2810);                                            /* relaxed ordering, no snoop, 512-byte reads */
    vfux_put16(writable + 8, 0x7fff);
    vfux_put16(pci->clearable + pci->express_at + 10, 0x000f); /* device status: errors */
    vfux_put32(cap + 12, 0x00000011);                          /* link: 2.5 GT/s, x1 */
    vfux_put16(writable + 16, 0x01cb); /* link control: ASPM, RCB, common clock, extended sync, clock PM */
    vfux_put16(cap + 18, 0x0011);      /* link status: 2.5 GT/s, x1 */
    vfux_put32(cap + 36, 0x00000010);  /* completion timeout can be disabled */
    vfux_put16(writable + 40, 0x0010);
    vfux_put32(cap + 44, 0x00000002); /* supported speeds: 2.5 GT/s */
    vfux_put16(cap + 48, 0x0001);     /* target speed: 2.5 GT/s */
    vfux_put16(writable + 48, 0x000f);
}

static bool vfux_pci_build_msi(vfu_pci *pci, const vfu_pci_desc *desc, uint16_t *end, uint8_t **link)
{
    unsigned log2 = 0;
    while (1u << log2 < desc->msi.vectors)
        log2++;
    if (1u << log2 != desc->msi.vectors || log2 > 5)
        return false;
    pci->msi_at = vfux_pci_add(pci, end, link, VFUX_PCI_CAP_MSI, desc->msi.mask ? VFUX_MSI_MASK_LEN : VFUX_MSI_LEN);
    uint8_t *cap = pci->config + pci->msi_at, *writable = pci->writable + pci->msi_at;
    pci->msi_mask = desc->msi.mask;
    vfux_put16(cap + VFUX_MSI_CONTROL, 0x0080u | log2 << 1 | (desc->msi.mask ? 0x0100u : 0)); /* 64-bit */
    vfux_put16(writable + VFUX_MSI_CONTROL, 0x0071);                                          /* enable, vectors in use */
    vfux_put32(writable + 4, 0xfffffffc);
    vfux_put32(writable + 8, 0xffffffff);
    vfux_put16(writable + 12, 0xffff);
    if (desc->msi.mask)
        vfux_put32(writable + 16, (uint32_t)((UINT64_C(1) << desc->msi.vectors) - 1));
    return true;
}

/* Adds an extended capability of len bytes. Returns its offset, 0: no room. */
static uint16_t vfux_pci_add_extended(vfu_pci *pci, uint16_t *end, uint16_t *previous, uint16_t id, uint8_t version, uint32_t len)
{
    uint16_t at = *end;
    if (at + len > pci->size)
        return 0;
    if (*previous)
        vfux_put16(pci->config + *previous + 2, vfux_get16(pci->config + *previous + 2) | (uint32_t)at << 4);
    vfux_put16(pci->config + at, id);
    vfux_put16(pci->config + at + 2, version);
    *previous = at;
    *end = (uint16_t)((at + len + 3) & ~3u);
    return at;
}

static bool vfux_pci_build_extended(vfu_pci *pci, const vfu_pci_desc *desc)
{
    uint16_t end = VFUX_PCI_FIRST_EXTENDED, previous = 0, at;
    if (!desc->express)
        return !desc->aer && !desc->serial_number && !desc->extended_vendor_cap_count;
    if (desc->aer) { /* first, as most drivers expect it */
        at = vfux_pci_add_extended(pci, &end, &previous, VFUX_PCI_EXT_AER, 2, VFUX_AER_LEN);
        vfux_put32(pci->clearable + at + 4, 0x007ff030); /* uncorrectable errors: status, */
        vfux_put32(pci->writable + at + 8, 0x007ff030);  /* mask */
        vfux_put32(pci->writable + at + 12, 0x007ff030); /* and severity */
        vfux_put32(pci->config + at + 12, 0x00462030);
        vfux_put32(pci->clearable + at + 16, 0x0000f1c1); /* correctable errors: status and mask */
        vfux_put32(pci->writable + at + 20, 0x0000f1c1);
        vfux_put32(pci->config + at + 20, 0x00002000);
    }
    if (desc->serial_number) {
        at = vfux_pci_add_extended(pci, &end, &previous, VFUX_PCI_EXT_SERIAL, 1, VFUX_SERIAL_LEN);
        vfux_put32(pci->config + at + 4, (uint32_t)desc->serial_number);
        vfux_put32(pci->config + at + 8, (uint32_t)(desc->serial_number >> 32));
    }
    for (unsigned i = 0; i < desc->extended_vendor_cap_count; i++) {
        const vfu_pci_vendor_cap *vendor = &desc->extended_vendor_caps[i];
        at = vfux_pci_add_extended(pci, &end, &previous, VFUX_PCI_EXT_VENDOR, 1, 8u + vendor->len);
        if (!at || vendor->version > 15)
            return false;
        vfux_put16(pci->config + at + 4, vendor->id);
        vfux_put16(pci->config + at + 6, vendor->version | (8u + vendor->len) << 4);
        if (vendor->len)
            memcpy(pci->config + at + 8, vendor->data, vendor->len);
    }
    return true;
}

/* The four capabilities before those of the vendor always have room. */
static bool vfux_pci_build_caps(vfu_pci *pci, const vfu_pci_desc *desc)
{
    uint16_t end = VFUX_PCI_FIRST_CAP;
    uint8_t *link = &pci->config[VFUX_PCI_CAPABILITIES];
    if (desc->pm) {
        pci->pm_at = vfux_pci_add(pci, &end, &link, VFUX_PCI_CAP_PM, VFUX_PM_LEN);
        vfux_put16(pci->config + pci->pm_at + 2, 0x0003);               /* version 1.2: D0 and D3hot */
        vfux_put16(pci->config + pci->pm_at + VFUX_PM_CONTROL, 0x0008); /* no reset between D3hot and D0 */
        vfux_put16(pci->writable + pci->pm_at + VFUX_PM_CONTROL, 0x0003);
    }
    if (desc->msi.vectors && !vfux_pci_build_msi(pci, desc, &end, &link))
        return false;
    if (desc->msix.vectors && !vfux_pci_build_msix(pci, desc, &end, &link))
        return false;
    if (desc->express)
        vfux_pci_build_express(pci, desc, &end, &link);
    for (unsigned i = 0; i < desc->vendor_cap_count; i++) {
        const vfu_pci_vendor_cap *vendor = &desc->vendor_caps[i];
        uint16_t at = vfux_pci_add(pci, &end, &link, VFUX_PCI_CAP_VENDOR, 3u + vendor->len);
        if (!at)
            return false;
        pci->config[at + 2] = (uint8_t)(3 + vendor->len);
        if (vendor->len)
            memcpy(pci->config + at + 3, vendor->data, vendor->len);
    }
    return true;
}

VFU_API int vfu_pci_build(vfu_pci *pci, const vfu_pci_desc *desc)
{
    memset(pci, 0, sizeof(*pci));
    pci->size = desc->express ? 4096 : 256;
    vfux_put16(pci->config + VFUX_PCI_VENDOR, desc->vendor);
    vfux_put16(pci->config + VFUX_PCI_DEVICE, desc->device);
    pci->config[VFUX_PCI_REVISION] = desc->revision;
    pci->config[VFUX_PCI_CLASS] = (uint8_t)desc->class_code;
    vfux_put16(pci->config + VFUX_PCI_CLASS + 1, desc->class_code >> 8);
    vfux_put16(pci->config + VFUX_PCI_SUBSYSTEM_VENDOR, desc->subsystem_vendor);
    vfux_put16(pci->config + VFUX_PCI_SUBSYSTEM, desc->subsystem);
    pci->config[VFUX_PCI_INTERRUPT_PIN] = desc->interrupt_pin;
    pci->writable[VFUX_PCI_INTERRUPT_LINE] = 0xff;
    pci->writable[VFUX_PCI_CACHE_LINE] = 0xff;
    vfux_put16(pci->clearable + VFUX_PCI_STATUS, 0xf900); /* errors */
    if (desc->class_code > 0xffffff || desc->interrupt_pin > 4 || (desc->flr && !desc->express) ||
        !vfux_pci_build_bars(pci, desc) || !vfux_pci_build_caps(pci, desc) || !vfux_pci_build_extended(pci, desc))
        return -EINVAL;
    memcpy(pci->initial, pci->config, sizeof(pci->config));
    return 0;
}

VFU_API void vfu_pci_read(const vfu_pci *pci, uint32_t offset, void *buf, uint32_t len)
{
    VFU_ASSERT(offset <= pci->size && len <= pci->size - offset);
    memcpy(buf, pci->config + offset, len);
}

static unsigned vfux_pci_changed(const vfu_pci *pci, uint32_t at)
{
    if (at == VFUX_PCI_COMMAND || at == VFUX_PCI_COMMAND + 1)
        return VFU_PCI_CHANGED_COMMAND;
    if ((at >= VFUX_PCI_BAR && at < VFUX_PCI_BAR + 24) || (at >= VFUX_PCI_ROM && at < VFUX_PCI_ROM + 4))
        return VFU_PCI_CHANGED_BAR;
    if (pci->msix_at && at == pci->msix_at + VFUX_MSIX_CONTROL + 1u)
        return VFU_PCI_CHANGED_MSIX;
    if (pci->pm_at && at == pci->pm_at + (uint32_t)VFUX_PM_CONTROL)
        return VFU_PCI_CHANGED_POWER;
    if (pci->msi_at && at > pci->msi_at && at < pci->msi_at + (uint32_t)VFUX_MSI_MASK_LEN)
        return VFU_PCI_CHANGED_MSI;
    return 0;
}

VFU_API unsigned vfu_pci_write(vfu_pci *pci, uint32_t offset, const void *buf, uint32_t len)
{
    const uint8_t *bytes = buf;
    unsigned changed = 0;
    VFU_ASSERT(offset <= pci->size && len <= pci->size - offset);
    for (uint32_t at = offset; at < offset + len; at++) {
        uint8_t value = bytes[at - offset], old = pci->config[at];
        uint8_t now = (uint8_t)((old & ~pci->writable[at]) | (value & pci->writable[at]));
        if (pci->pm_at && at == pci->pm_at + (uint32_t)VFUX_PM_CONTROL && (now & 3) % 3)
            now = (uint8_t)((now & ~3) | (old & 3)); /* D1 and D2 are not there: such a write is discarded */
        pci->config[at] = (uint8_t)(now & ~(value & pci->clearable[at]));
        if (pci->config[at] != old)
            changed |= vfux_pci_changed(pci, at);
        if (pci->flr && at == pci->express_at + VFUX_EXPRESS_DEVICE_CONTROL + 1u && value & 0x80)
            changed |= VFU_PCI_ASKED_FLR; /* the bit itself always reads as zero */
    }
    return changed;
}

VFU_API void vfu_pci_reset(vfu_pci *pci) { memcpy(pci->config, pci->initial, sizeof(pci->config)); }

VFU_API void vfu_pci_disconnect(vfu_pci *pci)
{
    vfux_put16(pci->config + VFUX_PCI_COMMAND, 0);
    vfu_pci_set_intx_status(pci, false);
    if (pci->msix_at)
        pci->config[pci->msix_at + VFUX_MSIX_CONTROL + 1] &= 0x3f;
    if (pci->msi_at)
        pci->config[pci->msi_at + VFUX_MSI_CONTROL] &= 0xfe;
}

VFU_API uint16_t vfu_pci_command(const vfu_pci *pci) { return vfux_get16(pci->config + VFUX_PCI_COMMAND); }

VFU_API bool vfu_pci_msix_enabled(const vfu_pci *pci)
{
    return pci->msix_at && pci->config[pci->msix_at + VFUX_MSIX_CONTROL + 1] & 0x80;
}

VFU_API bool vfu_pci_msix_masked(const vfu_pci *pci)
{
    return pci->msix_at && pci->config[pci->msix_at + VFUX_MSIX_CONTROL + 1] & 0x40;
}

VFU_API bool vfu_pci_msi_enabled(const vfu_pci *pci) { return pci->msi_at && pci->config[pci->msi_at + VFUX_MSI_CONTROL] & 1; }

VFU_API unsigned vfu_pci_power(const vfu_pci *pci) { return pci->pm_at ? pci->config[pci->pm_at + VFUX_PM_CONTROL] & 3 : 0; }

VFU_API void vfu_pci_set_intx_status(vfu_pci *pci, bool level)
{
    uint8_t *status = &pci->config[VFUX_PCI_STATUS];
    *status = (uint8_t)((*status & ~VFU_PCI_STATUS_INTX) | (level ? VFU_PCI_STATUS_INTX : 0));
}

VFU_API uint8_t vfu_pci_capability(const vfu_pci *pci, uint8_t id)
{
    uint8_t at = pci->config[VFUX_PCI_CAPABILITIES];
    while (at && pci->config[at] != id)
        at = pci->config[at + 1];
    return at;
}

VFU_API uint16_t vfu_pci_extended_capability(const vfu_pci *pci, uint16_t id)
{
    uint16_t at =
        pci->size > VFUX_PCI_FIRST_EXTENDED && vfux_get32(pci->config + VFUX_PCI_FIRST_EXTENDED) ? VFUX_PCI_FIRST_EXTENDED : 0;
    while (at && vfux_get16(pci->config + at) != id)
        at = vfux_get16(pci->config + at + 2) >> 4;
    return at;
}

/* ==== device ============================================================================================================= */

enum {
    VFUX_XFER_DEFAULT = 1 << 20, /* bytes: max_data_xfer_size where nothing is said */
    VFUX_XFER_MAX = 16 << 20,
    VFUX_DMA_CHUNK = 128 << 10,      /* bytes of one DMA message; QEMU breaks the stream of larger ones */
    VFUX_DMA_READ_AHEAD = 128 << 10, /* bytes asked for and not answered: QEMU cuts replies that its socket does not take */
    VFUX_WINDOW_LISTS = 256,
    VFUX_WINDOWS_MAX = 32768, /* half of the mappings that Linux allows a process */
    VFUX_DMA_SLOTS = 32,      /* DMA messages under way */
    VFUX_DMA_TEST = 31,       /* the slot of the test for the layout */
    VFUX_BUDGET = 64,         /* messages handled by one poll */
    VFUX_WARNINGS = 100,      /* lines of log that one client can cause */
    VFUX_AREAS = 64,          /* areas of a region */
    VFUX_EXTRA_REGIONS = 64,
    VFUX_MIG_STATES = 8,
    VFUX_GREETING_MS = 10000,
    VFUX_SOON_MS = 2,    /* how long an end waits in recvmsg() for the other, before poll() does */
    VFUX_REPLIES = 4096, /* bytes of replies that are held back */
    VFUX_ACCEPT_MS = 100,
    VFUX_PAGE = 4096 /* granule of mappings: the pgsizes that VERSION says */
};

#define VFUX_HUGETLBFS 0x958458f6 /* HUGETLBFS_MAGIC of linux/magic.h */

/* A part of a client's file, mapped here. One for all mappings that lie in it. */
typedef struct vfux_window {
    struct vfux_window *next;
    dev_t dev;
    ino_t ino;
    uint64_t offset; /* of its first byte in the file */
    size_t len;      /* bytes */
    char *base;
    bool writable;
    bool sealed; /* the file can't shrink and has all its pages: accesses can't fault */
    bool exact;  /* for one mapping only */
    uint32_t refs;
} vfux_window;

/* A DMA message that waits for its reply; or, held, for the layout of DMA messages to be known (see vfux_slot_hold). */
typedef struct vfux_slot {
    vfu_dma *dma; /* NULL: free */
    uint64_t iova;
    size_t at; /* of its bytes in the transfer */
    uint32_t count;
    uint16_t id, cmd;
    vfu_dma_layout layout; /* that it was sent in */
    bool held;
    uint32_t test_at; /* held: bytes from iova to where test_len bytes tell the layouts apart */
    uint8_t test_len;
    bool test_shifted; /* they are not zero in QEMU10's layout; otherwise they are test_bytes in the specification's */
    uint8_t test_bytes[4];
} vfux_slot;

/* The INTx line. */
typedef struct vfux_intx {
    bool level, masked;
    int unmask_fd; /* signalled by the client at the end of an interrupt; -1: none */
} vfux_intx;

/* A region as GET_REGION_INFO describes it. */
typedef struct vfux_region {
    uint64_t size;
    bool read_only, shared, typed;
    uint32_t type, subtype;
    int fd;
    uint64_t offset;
    vfu_wire_sparse_area *areas;
    uint32_t area_count;
} vfux_region;

/* An answer in the making: the message, whose views point to data of the device, and the descriptors that go with it. */
typedef struct vfux_answer {
    vfu_msg msg;
    int fds[VFU_FDS_MAX]; /* borrowed */
    unsigned fd_count;
} vfux_answer;

/* The request that a callback answers later. Under the lock, from the moment its ticket was taken. */
typedef struct vfux_pending {
    uint64_t ticket; /* 0: there is none */
    bool completed;
    int result;
    size_t wanted;   /* bytes that a read gives */
    vfu_msg request; /* its header; the views are dead */
    vfux_answer answer;
} vfux_pending;

/* A thread that waits for memory that only messages reach. Under the lock until the thread that polls has taken it. */
typedef struct vfux_wait {
    vfu_dma dma;
    vfu_dev *dev;
    struct vfux_wait *next;
    bool done;
    int result;
} vfux_wait;

struct vfu_dev {
    /* What every request touches comes first and close together: where a thread has a thousand devices, the lines that are not in
     * the processor's cache are most of what a message costs. */
    vfu_conn *conn;           /* NULL: no client */
    vfu_conn *twin;           /* for DMA messages; NULL: they go over conn */
    _Atomic uintptr_t poller; /* the thread that polls: address of its vfux_this_thread */
    atomic_bool stopped, woken;
    bool greeted;
    bool handling; /* there is a request at hand */
    bool hold;     /* the next request has come already: small replies wait for its own */
    bool asked;    /* another thread has waited for memory of this client that only messages reach */
    bool traces;   /* the logger wants every message */
    bool work_wanted, more;
    uint8_t msix_bars; /* a bit for each BAR with the MSI-X table or the PBA */
    int received;      /* what vfu_conn_receive has said of conn before poll is called; 0: it was not called */
    vfu_dma_layout layout;
    vfux_intx intx;
    const char *why;  /* what was wrong with the request at hand; for the log */
    size_t reading;   /* bytes that the request at hand reads */
    size_t reply_len; /* bytes of replies that are held back */
    vfu_dma *dmas;    /* under way, the oldest first */
    uint8_t *data;    /* payload of the reply in the making */
    size_t data_size; /* of the largest message, so that the payload of every request fits */
    vfux_region *regions;
    uint32_t region_count;
    vfu_frame frame;
    vfux_pending pending; /* under the lock */
    vfu_dev_desc desc;    /* with the defaults filled in; pointers in it to anything but functions are not kept */

    vfu_io_fd *io_fds;
    uint32_t io_fd_count;

    int listener;
    char *path; /* of a socket file that is ours to remove */
    dev_t path_dev;
    ino_t path_ino;
    int wake_fd; /* eventfd that ends a wait */

    pthread_mutex_t lock;   /* of what other threads reach: pending, waits, revoked */
    pthread_cond_t changed; /* a wait is done */
    uint64_t last_ticket;
    vfux_wait *waits;                     /* not yet taken by the thread that polls */
    uint64_t revoked_first, revoked_last; /* being unmapped: nobody may wait for it any more; nothing if first > last */

    uint64_t greeting_until;
    uint64_t accept_from; /* ms; 0: at once */
    vfu_caps peer;
    uint32_t peer_xfer; /* bytes of data that both ends take in one message */
    unsigned warnings;

    vfu_iommu *iommu;
    vfu_iommu_reader *reader;
    uint32_t window_count;

    uint8_t *msix_table;
    size_t msix_size;               /* bytes */
    _Atomic uint32_t *msix_pending; /* the PBA */
    _Atomic uint8_t *msix_masked;   /* for each vector, with the policy msix_masks */
    size_t pba_size;                /* bytes */
    uint32_t irq_counts[VFU_PCI_NUM_IRQS], irq_first[VFU_PCI_NUM_IRQS], irq_total;
    _Atomic int *irqs; /* for each interrupt: -1, or its eventfd * 2 + 1 if a write to it could block */
    _Atomic unsigned raise_epoch,
        raisers[2]; /* threads that may be about to write to an eventfd, by epoch (see vfux_irqs_replace) */

    uint16_t dma_sequence;
    uint64_t dma_reading; /* bytes asked for and not answered */
    unsigned dma_held;    /* slots that are held */

    vfu_mig_state mig_state, mig_wanted;
    uint64_t multi_done, multi_count; /* REGION_WRITE_MULTI: its entries are in `data` */

    uint8_t replies[VFUX_REPLIES]; /* held back, and the head of the one that is sent with them */
    vfux_slot slots[VFUX_DMA_SLOTS];
    vfux_window *windows[VFUX_WINDOW_LISTS]; /* by inode */
    vfu_pci pci;
};

static _Thread_local char vfux_this_thread;

static void vfux_warn(vfu_dev *dev, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void vfux_warn(vfu_dev *dev, const char *format, ...)
{
    char line[VFUX_LINE_MAX];
    va_list arguments;
    if (dev->warnings > VFUX_WARNINGS || !vfux_says(&dev->desc.logger, VFU_LEVEL_WARNING))
        return;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    vfux_say(&dev->desc.logger, VFU_LEVEL_WARNING, "%s%s", line,
             dev->warnings++ == VFUX_WARNINGS ? " (and this client's further warnings are left away)" : "");
}

/* ---- the guard: accesses to memory that its owner can take away --------------------------------------------------------- */

static _Thread_local sigjmp_buf *vfux_guard_env;
static _Thread_local const void *vfux_guard_bad;
static struct sigaction vfux_guard_previous;
static pthread_once_t vfux_guard_once = PTHREAD_ONCE_INIT;

static void vfux_guard_signal(int number, siginfo_t *info, void *context)
{
    if (vfux_guard_env) {
        vfux_guard_bad = info->si_addr;
        /* Whoever passes the signal on to us, as ThreadSanitizer does, may have blocked all others meanwhile. */
        pthread_sigmask(SIG_SETMASK, &((ucontext_t *)context)->uc_sigmask, NULL);
        siglongjmp(*vfux_guard_env, 1);
    }
    if (vfux_guard_previous.sa_flags & SA_SIGINFO)
        vfux_guard_previous.sa_sigaction(number, info, context);
    else if (vfux_guard_previous.sa_handler != SIG_DFL && vfux_guard_previous.sa_handler != SIG_IGN)
        vfux_guard_previous.sa_handler(number);
    else
        sigaction(number, &vfux_guard_previous, NULL); /* the access faults again, and that ends the process as it would have */
}

static void vfux_guard_install(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof(action));
    action.sa_sigaction = vfux_guard_signal;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &vfux_guard_previous);
}

/* The guard of vfu_iommu_desc: a SIGBUS in body comes back here. */
static int vfux_guard(void *ctx, void (*body)(void *arg), void *arg, const void **bad)
{
    sigjmp_buf env;
    (void)ctx;
    if (sigsetjmp(env, 0)) {
        vfux_guard_env = NULL;
        *bad = vfux_guard_bad;
        return -EFAULT;
    }
    vfux_guard_env = &env;
    atomic_signal_fence(memory_order_seq_cst); /* the body's accesses stay between the two assignments */
    body(arg);
    atomic_signal_fence(memory_order_seq_cst);
    vfux_guard_env = NULL;
    return 0;
}

/* ---- the client's memory ------------------------------------------------------------------------------------------------ */

/* Adds to an eventfd. Did it take that? */
static bool vfux_event_write(int fd, uint64_t count)
{
    ssize_t n;
    do
        n = write(fd, &count, sizeof(count));
    while (n < 0 && errno == EINTR);
    return n == sizeof(count);
}

/* Takes what a client's eventfd has counted. Was there something? The client has it, too, and may have taken it itself by now, so
 * the descriptor's own flags don't decide whether this waits; it may on a Linux before 5.8, whose eventfds don't know how not to. */
static bool vfux_event_take(int fd)
{
    uint64_t count;
    ssize_t n = -1;
    errno = EOPNOTSUPP;
#ifdef SYS_preadv2
    struct iovec iov = {.iov_base = &count, .iov_len = sizeof(count)};
    n = syscall(SYS_preadv2, fd, &iov, 1L, -1L, -1L, 8 /* RWF_NOWAIT */);
#endif
    if (n < 0 && (errno == EOPNOTSUPP || errno == ENOSYS))
        n = read(fd, &count, sizeof(count));
    return n > 0;
}

static void vfux_wake(vfu_dev *dev)
{
    if (!atomic_exchange(&dev->woken, true))
        vfux_event_write(dev->wake_fd, 1);
}

static void vfux_wait_done(vfu_dma *dma, int result)
{
    vfux_wait *wait = dma->user;
    vfu_dev *dev = wait->dev;
    pthread_mutex_lock(&dev->lock);
    wait->result = result;
    wait->done = true;
    pthread_cond_broadcast(&dev->changed);
    pthread_mutex_unlock(&dev->lock);
}

/* Memory that only messages reach: the thread that polls does it for the others. It can't wait for itself. */
static int vfux_message_access(vfu_dev *dev, uint64_t iova, void *buf, size_t len, bool to_client)
{
    if (atomic_load(&dev->poller) == (uintptr_t)&vfux_this_thread)
        return -EDEADLK;
    vfux_wait wait = {.dev = dev, .dma = {.iova = iova, .buf = buf, .len = len, .to_client = to_client, .done = vfux_wait_done}};
    wait.dma.user = &wait;
    pthread_mutex_lock(&dev->lock);
    bool revoked = iova <= dev->revoked_last && iova + (len - 1) >= dev->revoked_first;
    if (!revoked) {
        wait.next = dev->waits;
        dev->waits = &wait;
        vfux_wake(dev);
        while (!wait.done)
            pthread_cond_wait(&dev->changed, &dev->lock);
    }
    pthread_mutex_unlock(&dev->lock);
    return revoked ? -ENOENT : wait.result;
}

static int vfux_message_read(void *ctx, uint64_t iova, void *dst, size_t len)
{
    return vfux_message_access(ctx, iova, dst, len, false);
}

static int vfux_message_write(void *ctx, uint64_t iova, const void *src, size_t len)
{
    void *buf;
    memcpy(&buf, &src, sizeof(buf)); /* a vfu_dma to the client only reads it */
    return vfux_message_access(ctx, iova, buf, len, true);
}

/* Takes the threads that wait out of the list, those on [first, last] only, and gives them to `each`. */
static void vfux_waits_take(vfu_dev *dev, uint64_t first, uint64_t last, void (*each)(vfu_dev *dev, vfux_wait *wait))
{
    vfux_wait *taken = NULL;
    pthread_mutex_lock(&dev->lock);
    for (vfux_wait **link = &dev->waits; *link;) {
        vfux_wait *wait = *link;
        if (wait->dma.iova > last || wait->dma.iova + (wait->dma.len - 1) < first) {
            link = &wait->next;
        } else {
            *link = wait->next;
            wait->next = taken;
            taken = wait;
        }
    }
    pthread_mutex_unlock(&dev->lock);
    for (vfux_wait *next; taken; taken = next) {
        next = taken->next;
        each(dev, taken);
    }
}

static void vfux_wait_refuse(vfu_dev *dev, vfux_wait *wait)
{
    (void)dev;
    vfux_wait_done(&wait->dma, -ENOENT);
}

static void vfux_wait_cancel(vfu_dev *dev, vfux_wait *wait)
{
    (void)dev;
    vfux_wait_done(&wait->dma, -ECANCELED);
}

static void vfux_dma_finish(vfu_dev *dev, vfu_dma *dma, int result);

/* An unmap, which the thread that polls does, waits for those that wait for that thread: they give up. */
static void vfux_message_let_go(void *ctx, uint64_t iova, uint64_t size)
{
    vfu_dev *dev = ctx;
    uint64_t last = iova + (size - 1);
    pthread_mutex_lock(&dev->lock);
    dev->revoked_first = iova;
    dev->revoked_last = last;
    pthread_mutex_unlock(&dev->lock);
    vfux_waits_take(dev, iova, last, vfux_wait_refuse);
    for (vfu_dma *dma = dev->dmas, *next; dma; dma = next) {
        next = dma->next;
        if (dma->done == vfux_wait_done && dma->iova <= last && dma->iova + (dma->len - 1) >= iova) {
            vfux_dma_finish(dev, dma, -ENOENT);
            next = dev->dmas;
        }
    }
}

/* No thread may wait for memory that only messages reach: a callback can then wait for the device's threads. */
static void vfux_revoke_all(vfu_dev *dev)
{
    pthread_mutex_lock(&dev->lock);
    dev->revoked_first = 0;
    dev->revoked_last = UINT64_MAX;
    pthread_mutex_unlock(&dev->lock);
}

/* Threads may wait for any memory again. */
static void vfux_revoke_end(vfu_dev *dev)
{
    pthread_mutex_lock(&dev->lock);
    dev->revoked_first = 1;
    dev->revoked_last = 0;
    pthread_mutex_unlock(&dev->lock);
}

static const vfu_iommu_io vfux_message_io = {vfux_message_read, vfux_message_write, vfux_message_let_go};

static vfux_window **vfux_window_list(vfu_dev *dev, ino_t ino) { return &dev->windows[ino % VFUX_WINDOW_LISTS]; }

static void vfux_window_unref(vfu_dev *dev, vfux_window *window)
{
    if (--window->refs)
        return;
    dev->window_count--;
    vfux_window **link = vfux_window_list(dev, window->ino);
    while (*link != window)
        link = &(*link)->next;
    *link = window->next;
    munmap(window->base, window->len);
    vfux_free(&dev->desc.alloc, window, sizeof(*window));
}

/* Maps a file: all of it if the address space has room, else the pages of [offset, offset + size). */
static int vfux_window_map(vfux_window *window, int fd, uint64_t offset, uint64_t size, uint64_t file_size)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), whole_max = sizeof(void *) > 4 ? UINT64_C(1) << 40 : UINT64_C(1) << 28;
    bool whole = file_size <= whole_max && !window->exact;
    uint64_t first = whole ? 0 : offset & ~(page - 1), end = whole ? file_size : offset + size;
    if (end - first > SIZE_MAX / 2)
        return -ENOMEM;
    int prot = PROT_READ | (window->writable ? PROT_WRITE : 0);
    void *base = mmap(NULL, (size_t)(end - first), prot, MAP_SHARED | MAP_NORESERVE, fd, (off_t)first);
    if (base == MAP_FAILED)
        return -errno;
    window->offset = first;
    window->len = (size_t)(end - first);
    window->base = base;
    return 0;
}

static int vfux_window_make(vfu_dev *dev, vfux_window **out, int fd, const struct stat *st, uint64_t offset, uint64_t size,
                            bool write)
{
    int flags = fcntl(fd, F_GETFL), access = flags & O_ACCMODE;
    if (flags < 0)
        return -errno;
    if (access == O_WRONLY || (write && access != O_RDWR)) {
        dev->why = "the descriptor doesn't allow that access";
        return -EACCES;
    }
    vfux_window *window = dev->window_count < VFUX_WINDOWS_MAX ? vfux_allocate_zero(&dev->desc.alloc, sizeof(*window)) : NULL;
    if (!window)
        return -ENOMEM;
    window->dev = st->st_dev;
    window->ino = st->st_ino;
    window->exact = dev->desc.policy.map_exactly;
    window->writable = access == O_RDWR && (write || !window->exact);
    int seals = fcntl(fd, F_GET_SEALS);
    struct statfs fs;
    /* Huge pages can be missing in a file that can't shrink: no page is reserved for this mapping. */
    window->sealed = seals >= 0 && seals & F_SEAL_SHRINK && fstatfs(fd, &fs) == 0 && (uint32_t)fs.f_type != VFUX_HUGETLBFS;
    int err = vfux_window_map(window, fd, offset, size, (uint64_t)st->st_size);
    if (err && window->writable && !write) { /* sealed against writing, perhaps */
        window->writable = false;
        err = vfux_window_map(window, fd, offset, size, (uint64_t)st->st_size);
    }
    if (err) {
        dev->why = "mmap failed";
        vfux_free(&dev->desc.alloc, window, sizeof(*window));
        return err;
    }
    if (!window->sealed)
        pthread_once(&vfux_guard_once, vfux_guard_install);
    vfux_window **list = vfux_window_list(dev, window->ino);
    dev->window_count++;
    window->next = *list;
    *list = window;
    *out = window;
    return 0;
}

/* Gives the window that has [offset, offset + size) of the file, with a reference. One that is there was made with a descriptor
 * of the same client that allows the access, so this one isn't asked what it allows: each map would pay for that system call. */
static int vfux_window_get(vfu_dev *dev, vfux_window **out, int fd, uint64_t offset, uint64_t size, bool write)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    if (!S_ISREG(st.st_mode)) {
        dev->why = "the descriptor is no file";
        return -ENODEV;
    }
    if (size > (uint64_t)st.st_size || offset > (uint64_t)st.st_size - size) {
        dev->why = "the file is shorter than the mapping";
        return -EINVAL;
    }
    vfux_window *window = dev->desc.policy.map_exactly ? NULL : *vfux_window_list(dev, st.st_ino);
    while (window &&
           !(window->dev == st.st_dev && window->ino == st.st_ino && (window->writable || !write) && offset >= window->offset &&
             offset - window->offset <= window->len && size <= window->len - (offset - window->offset)))
        window = window->next;
    int err = window ? 0 : vfux_window_make(dev, &window, fd, &st, offset, size, write);
    if (!err) {
        window->refs++;
        *out = window;
    }
    return err;
}

static void vfux_dma_unmapped(vfu_dev *dev, const vfu_iommu_mapping *mapping);

/* The IOMMU's `removed`. */
static void vfux_mapping_removed(void *ctx, const vfu_iommu_mapping *mapping)
{
    vfu_dev *dev = ctx;
    vfux_dma_unmapped(dev, mapping);
    if (dev->desc.callbacks.dma_unmapped)
        dev->desc.callbacks.dma_unmapped(dev->desc.ctx, mapping);
    if (mapping->user)
        vfux_window_unref(dev, mapping->user);
}

/* ---- interrupts --------------------------------------------------------------------------------------------------------- */

/* Counts the thread among the raisers of this epoch, and returns which one it is. */
static unsigned vfux_raise_enter(vfu_dev *dev)
{
    for (;;) {
        unsigned epoch = atomic_load(&dev->raise_epoch) & 1;
        atomic_fetch_add(&dev->raisers[epoch], 1);
        if ((atomic_load(&dev->raise_epoch) & 1) == epoch)
            return epoch;
        atomic_fetch_sub(&dev->raisers[epoch], 1);
    }
}

/* Signals an interrupt that is assigned. From the moment the thread counts itself until it stops, the eventfd stays open. */
static int vfux_irq_signal(vfu_dev *dev, uint32_t i)
{
    int err = -ENOENT;
    unsigned epoch = vfux_raise_enter(dev);
    int irq = atomic_load(&dev->irqs[i]);
    if (irq >= 0) {
        /* An eventfd blocks when its counter is at its end, which only the client can have done: then it is signalled
         * already. */
        struct pollfd ready = {.fd = irq >> 1, .events = POLLOUT};
        if (!(irq & 1) || poll(&ready, 1, 0) > 0)
            vfux_event_write(irq >> 1, 1);
        err = 0;
    }
    atomic_fetch_sub(&dev->raisers[epoch], 1);
    return err;
}

/* Takes descriptors (fds NULL: none) for interrupts [first, first + count), and closes those that they had when no thread uses
 * them any more: threads that may still do so are in the epoch that ends here, which nobody enters any more. Only the thread
 * that polls assigns. */
static void vfux_irqs_replace(vfu_dev *dev, uint32_t first, uint32_t count, const int *fds)
{
    int old[64];
    for (uint32_t done = 0, part; done < count; done += part) {
        part = (uint32_t)vfux_min(count - done, sizeof(old) / sizeof(old[0]));
        for (uint32_t i = 0; i < part; i++) {
            int fd = fds ? fds[done + i] : -1, flags = fd < 0 ? 0 : fcntl(fd, F_GETFL);
            int blocking = flags < 0 || !(flags & O_NONBLOCK);
            old[i] = atomic_exchange(&dev->irqs[first + done + i], fd < 0 ? -1 : fd * 2 + blocking);
        }
        unsigned epoch = atomic_fetch_add(&dev->raise_epoch, 1) & 1;
        while (atomic_load(&dev->raisers[epoch]))
            sched_yield();
        for (uint32_t i = 0; i < part; i++)
            if (old[i] >= 0)
                close(old[i] >> 1);
    }
}

/* Is it an eventfd? They have no file type and take a write of zero, which changes nothing. */
static bool vfux_is_eventfd(int fd)
{
    struct stat st;
    return fstat(fd, &st) == 0 && !(st.st_mode & S_IFMT) && vfux_event_write(fd, 0);
}

/* Signals INTx if its level is up and nothing holds it back; that masks it until the client has dealt with it. */
static void vfux_intx_update(vfu_dev *dev)
{
    vfu_pci_set_intx_status(&dev->pci, dev->intx.level);
    if (!dev->intx.level || dev->intx.masked || vfu_pci_command(&dev->pci) & VFU_PCI_COMMAND_INTX_DISABLE ||
        !dev->irq_counts[VFU_PCI_IRQ_INTX])
        return;
    if (vfux_irq_signal(dev, dev->irq_first[VFU_PCI_IRQ_INTX]) == 0)
        dev->intx.masked = true;
}

static void vfux_intx_unmask(vfu_dev *dev)
{
    dev->intx.masked = false;
    vfux_intx_update(dev);
}

/* The client's end-of-interrupt eventfd. */
static void vfux_intx_check_unmask(vfu_dev *dev)
{
    struct pollfd ready = {.fd = dev->intx.unmask_fd, .events = POLLIN};
    if (dev->intx.unmask_fd >= 0 && dev->intx.masked && poll(&ready, 1, 0) > 0 && vfux_event_take(dev->intx.unmask_fd))
        vfux_intx_unmask(dev);
}

static void vfux_irqs_release(vfu_dev *dev)
{
    vfux_irqs_replace(dev, 0, dev->irq_total, NULL);
    vfux_close(&dev->intx.unmask_fd);
    dev->intx.masked = false;
}

/* ---- DMA by message ----------------------------------------------------------------------------------------------------- */

static vfu_conn *vfux_dma_conn(vfu_dev *dev) { return dev->twin ? dev->twin : dev->conn; }

static void vfux_slot_free(vfu_dev *dev, vfux_slot *slot)
{
    if (slot->held)
        dev->dma_held--;
    else if (slot->cmd == VFU_CMD_DMA_READ)
        dev->dma_reading -= slot->count;
    slot->dma = NULL;
}

/* Takes a transfer out of the list; replies to its messages will find no slot. */
static void vfux_dma_unlink(vfu_dev *dev, vfu_dma *dma)
{
    for (unsigned i = 0; i < VFUX_DMA_SLOTS; i++)
        if (dev->slots[i].dma == dma)
            vfux_slot_free(dev, &dev->slots[i]);
    for (vfu_dma **link = &dev->dmas; *link; link = &(*link)->next)
        if (*link == dma) {
            *link = dma->next;
            break;
        }
    dma->active = false;
}

static void vfux_dma_finish(vfu_dev *dev, vfu_dma *dma, int result)
{
    vfux_dma_unlink(dev, dma);
    dma->done(dma, result);
}

static vfux_slot *vfux_slot_find_free(vfu_dev *dev)
{
    for (unsigned i = 0; i < VFUX_DMA_TEST; i++)
        if (!dev->slots[i].dma)
            return &dev->slots[i];
    return NULL;
}

static int vfux_replies_flush(vfu_dev *dev);

/* Sends the message that slot describes. 0, or what vfu_conn_send says. */
static int vfux_slot_send(vfu_dev *dev, vfux_slot *slot)
{
    uint8_t bytes[VFU_MSG_HEAD_MAX];
    vfu_msg msg;
    int err = vfux_replies_flush(dev); /* in the order in which the device did it */
    if (err && err != -EAGAIN)
        return err;
    /* The slot's number, and a sequence that tells a late reply from the one that is expected. */
    slot->id = (uint16_t)((unsigned)(slot - dev->slots) | (unsigned)(dev->dma_sequence++ * VFUX_DMA_SLOTS));
    slot->layout = dev->layout;
    slot->dma->deadline = dev->desc.dma_timeout_ms ? vfux_now_ms() + dev->desc.dma_timeout_ms : UINT64_MAX;
    dev->dma_held -= slot->held;
    slot->held = false;
    vfu_msg_init(&msg, slot->id, slot->cmd);
    msg.u.dma.address = slot->iova;
    msg.u.dma.count = slot->count;
    if (slot->cmd == VFU_CMD_DMA_READ) {
        dev->dma_reading += slot->count;
    } else {
        msg.u.dma.data = (const uint8_t *)slot->dma->buf + slot->at;
        msg.u.dma.data_len = slot->count;
        msg.u.dma.legacy = slot->layout == VFU_DMA_LAYOUT_QEMU10;
    }
    if (!msg.u.dma.legacy || slot->count >= 4)
        return vfux_conn_send_msg(vfux_dma_conn(dev), &msg, NULL, 0);
    int len = vfu_msg_encode(&msg, bytes, sizeof(bytes)); /* such a message has padding behind its data */
    return len < 0 ? len : vfu_conn_send(vfux_dma_conn(dev), bytes, (size_t)len, NULL, 0, NULL, 0);
}

/* Sends one message for [iova, iova + count). 1: it has to wait; 0; or the error. */
static int vfux_dma_send(vfu_dev *dev, vfu_dma *dma, uint64_t iova, uint32_t count)
{
    vfux_slot *slot = vfux_slot_find_free(dev);
    if (!slot || dev->dma_held || vfu_conn_is_waiting(vfux_dma_conn(dev)) ||
        (!dma->to_client && dev->dma_reading && dev->dma_reading + count > VFUX_DMA_READ_AHEAD))
        return 1;
    *slot = (vfux_slot){.dma = dma, .iova = iova, .at = (size_t)dma->sent, .count = count};
    slot->cmd = dma->to_client ? VFU_CMD_DMA_WRITE : VFU_CMD_DMA_READ;
    int err = vfux_slot_send(dev, slot);
    if (err)
        vfux_slot_free(dev, slot);
    return err == -EAGAIN ? 1 : err ? -EIO : 0;
}

/* Does as much of a transfer as can be done now. 0: all is done; 1: more to come; or the error, with dma->fault set. */
static int vfux_dma_advance(vfu_dev *dev, vfu_dma *dma)
{
    while (dma->sent < dma->len) {
        vfu_iommu_mapping mapping;
        uint64_t iova = dma->iova + dma->sent, left = dma->len - dma->sent;
        dma->fault = iova;
        if (!vfu_iommu_next(dev->iommu, iova, &mapping) || mapping.iova > iova)
            return -ENOENT;
        uint64_t part = vfux_min(left - 1, mapping.size - 1 - (iova - mapping.iova)) + 1;
        char *buf = (char *)dma->buf + dma->sent;
        int err;
        if (mapping.io) {
            part = vfux_min(part, vfux_min(VFUX_DMA_CHUNK, dev->peer_xfer));
            err = vfux_dma_send(dev, dma, iova, (uint32_t)part);
            if (err > 0)
                return err;
        } else {
            err = dma->to_client ? vfu_iommu_write(dev->reader, iova, buf, (size_t)part)
                                 : vfu_iommu_read(dev->reader, iova, buf, (size_t)part);
            if (err)
                dma->fault = vfu_iommu_last_fault(dev->reader)->iova;
            else
                dma->finished += part;
        }
        if (err)
            return err;
        dma->sent += part;
    }
    return dma->finished < dma->len;
}

/*
 * QEMU 10.1 and 10.2 lay out DMA messages in another way (vfu_dma_layout). Most replies to DMA_READ tell which way it is. Until
 * one has, what can't be told is held: a read whose reply makes sense in both ways, and a write that was answered but may
 * have been taken for shifted data. For the first of them a few bytes are read that differ between the two ways:
 *
 *     by the book:     D0 D1 .. Dk .. Dn     is what a reply says, or what was written; Dk is the first word that isn't zero
 *     by QEMU 10:      0  D0 .. Dk-1 Dk ..   is then in the client's memory
 *
 * so a read of the word behind Dk finds Dk in QEMU 10's layout, where the book has the upper half of the count: zero. Where
 * no word is behind Dk, Dk itself is read again: by the book it comes back.
 */
static void vfux_slot_hold(vfu_dev *dev, vfux_slot *slot, const uint8_t *data)
{
    uint32_t word = 0;
    while (word < slot->count && data[word] == 0)
        word++;
    if (slot->cmd == VFU_CMD_DMA_READ)
        dev->dma_reading -= slot->count;
    word &= ~UINT32_C(3);
    slot->held = true;
    dev->dma_held++;
    slot->test_shifted = slot->count >= 8 && word <= slot->count - 8;
    slot->test_at = slot->test_shifted ? word + 4 : word;
    slot->test_len = (uint8_t)vfux_min(4, slot->count - slot->test_at);
    if (!slot->test_shifted)
        memcpy(slot->test_bytes, data + word, slot->test_len);
}

/* Does a write have to be held? Only if it wrote something that isn't zero, where it can be read. */
static bool vfux_write_is_doubtful(vfu_dev *dev, const vfux_slot *slot)
{
    const uint8_t *data = (const uint8_t *)slot->dma->buf + slot->at;
    vfu_iommu_mapping mapping;
    uint32_t zeros = 0;
    if (slot->layout != VFU_DMA_LAYOUT_AUTO || dev->layout != VFU_DMA_LAYOUT_AUTO)
        return false;
    while (zeros < slot->count && data[zeros] == 0)
        zeros++;
    return zeros < slot->count && vfu_iommu_next(dev->iommu, slot->iova, &mapping) && mapping.prot & VFU_IOMMU_READ;
}

/* Sends the test for the first message that is held, unless one is under way. */
static void vfux_layout_test(vfu_dev *dev)
{
    vfux_slot *test = &dev->slots[VFUX_DMA_TEST], *held = dev->slots;
    if (!dev->dma_held || test->dma)
        return;
    while (!held->dma || !held->held)
        held++;
    *test = *held;
    test->iova += held->test_at;
    test->count = held->test_len;
    test->cmd = VFU_CMD_DMA_READ;
    test->held = false;
    if (vfux_slot_send(dev, test))
        vfux_slot_free(dev, test);
}

/* The layout is known: a read that was held is sent again, and so is a write that was sent in the wrong one, as the socket
 * takes them. */
static void vfux_layout_settle(vfu_dev *dev)
{
    for (unsigned i = 0; i < VFUX_DMA_SLOTS && dev->dma_held; i++) {
        vfux_slot *slot = &dev->slots[i];
        vfu_dma *dma = slot->dma;
        if (!dma || !slot->held)
            continue;
        if (slot->cmd == VFU_CMD_DMA_READ || dev->layout == VFU_DMA_LAYOUT_QEMU10) {
            if (vfu_conn_is_waiting(vfux_dma_conn(dev)))
                return;
            if (vfux_slot_send(dev, slot)) {
                dma->fault = slot->iova;
                vfux_dma_finish(dev, dma, -EIO);
            }
            continue;
        }
        dma->finished += slot->count;
        vfux_slot_free(dev, slot);
        if (dma->finished == dma->len)
            vfux_dma_finish(dev, dma, 0);
    }
}

/* Goes on with everything that has waited for a slot, for earlier replies, for the socket, or for the layout. */
static void vfux_dma_pump(vfu_dev *dev)
{
    if (!dev->dmas)
        return;
    if (dev->layout == VFU_DMA_LAYOUT_AUTO)
        vfux_layout_test(dev);
    else
        vfux_layout_settle(dev);
    for (vfu_dma *dma = dev->dmas, *next; dma; dma = next) {
        int result = vfux_dma_advance(dev, dma);
        next = dma->next;
        if (result <= 0) {
            vfux_dma_finish(dev, dma, result);
            next = dev->dmas; /* done() may have started or cancelled others */
        }
    }
}

/* A mapping is gone: transfers that have a part in it end. They are only marked: `done` may not be called in the midst of an
 * unmap. */
static void vfux_dma_unmapped(vfu_dev *dev, const vfu_iommu_mapping *mapping)
{
    for (vfu_dma *dma = dev->dmas; dma; dma = dma->next) {
        uint64_t last = mapping->iova + (mapping->size - 1), dma_last = dma->iova + (dma->len - 1);
        if (dma->iova > last || dma_last < mapping->iova)
            continue;
        uint64_t fault = vfux_max(dma->iova, mapping->iova);
        dma->fault = dma->unmapped ? vfux_min(dma->fault, fault) : fault;
        dma->unmapped = true;
    }
}

static void vfux_dma_end_unmapped(vfu_dev *dev)
{
    for (vfu_dma *dma = dev->dmas; dma;) {
        if (!dma->unmapped) {
            dma = dma->next;
        } else {
            vfux_dma_finish(dev, dma, -ENOENT);
            dma = dev->dmas;
        }
    }
}

/* The device's transfers are forgotten; threads that wait are told. */
static void vfux_dma_forget_all(vfu_dev *dev, int result)
{
    for (vfu_dma *dma; (dma = dev->dmas) != NULL;) {
        vfux_dma_unlink(dev, dma);
        if (dma->done == vfux_wait_done)
            dma->done(dma, result);
    }
}

/* Ends what was not answered in time. */
static void vfux_dma_expire(vfu_dev *dev)
{
    uint64_t now = vfux_now_ms();
    for (vfu_dma *dma = dev->dmas, *next; dma; dma = next) {
        next = dma->next;
        if (dma->deadline <= now) {
            vfux_warn(dev, "a transfer of %zu bytes at 0x%llx was not answered in time", dma->len, (unsigned long long)dma->iova);
            vfux_dma_finish(dev, dma, -ETIMEDOUT);
            next = dev->dmas;
        }
    }
}

/* What the reply says about the message in slot: 0, or -EIO. */
static int vfux_dma_check(const vfux_slot *slot, const vfu_msg *reply, const char **why)
{
    *why = "the client refused it";
    if (vfu_msg_is_error(reply))
        return -EIO;
    *why = "it has another address or count";
    bool silent = slot->cmd == VFU_CMD_DMA_WRITE && reply->u.dma.ack_len == 0; /* QEMU's has no payload */
    if (!silent && (reply->u.dma.address != slot->iova || reply->u.dma.count != slot->count))
        return -EIO;
    return 0;
}

/* The reply to a test: which layout is it? */
static void vfux_layout_tested(vfu_dev *dev, vfux_slot *slot, const vfu_msg *reply, int decoded)
{
    bool good = !decoded && !vfu_msg_is_error(reply) && reply->u.dma.address == slot->iova && reply->u.dma.count == slot->count;
    bool moved = good && !slot->test_shifted && memcmp(reply->u.dma.data, slot->test_bytes, slot->count) != 0;
    dev->layout = moved ? VFU_DMA_LAYOUT_QEMU10 : VFU_DMA_LAYOUT_SPEC; /* a test that would prove QEMU10's was decoded as such */
    vfux_slot_free(dev, slot);
}

static void vfux_dma_replied(vfu_dev *dev, const vfu_msg *reply, int decoded)
{
    vfux_slot *slot = &dev->slots[reply->id % VFUX_DMA_SLOTS];
    vfu_dma *dma = slot->dma;
    const char *why = "it is malformed";
    if (!dma || slot->held || slot->id != reply->id) {
        vfux_say(&dev->desc.logger, VFU_LEVEL_INFO, "a reply to nothing that is under way is discarded: id 0x%04x %s", reply->id,
                 vfu_cmd_name(reply->cmd));
        return;
    }
    if (slot->cmd != reply->cmd) {
        decoded = -EINVAL;
        why = "it is to another command";
    }
    if (!decoded && !vfu_msg_is_error(reply) && reply->cmd == VFU_CMD_DMA_READ && reply->u.dma.proven)
        dev->layout = reply->u.dma.legacy ? VFU_DMA_LAYOUT_QEMU10 : VFU_DMA_LAYOUT_SPEC;
    if (slot == &dev->slots[VFUX_DMA_TEST]) {
        if (dev->layout == VFU_DMA_LAYOUT_AUTO)
            vfux_layout_tested(dev, slot, reply, decoded);
        else
            vfux_slot_free(dev, slot);
        return;
    }
    int err = decoded ? -EIO : vfux_dma_check(slot, reply, &why);
    uint64_t iova = slot->iova;
    size_t at = slot->at;
    uint32_t count = slot->count;
    if (!err && reply->cmd == VFU_CMD_DMA_WRITE) {
        vfu_iommu_dirty_mark(dev->iommu, iova, count);
        if (vfux_write_is_doubtful(dev, slot) || (slot->layout == VFU_DMA_LAYOUT_AUTO && dev->layout == VFU_DMA_LAYOUT_QEMU10)) {
            vfux_slot_hold(dev, slot, (const uint8_t *)dma->buf + at);
            return;
        }
    }
    vfux_slot_free(dev, slot);
    if (err) {
        dma->fault = iova;
        vfux_warn(dev, "%s of %u bytes at 0x%llx failed: the reply is not good: %s (%s)", vfu_cmd_name(reply->cmd), count,
                  (unsigned long long)iova, why,
                  vfu_msg_is_error(reply) ? vfu_errno_name((int)(reply->error & 0xffff)) : "no error given");
        vfux_dma_finish(dev, dma, err);
        return;
    }
    if (reply->cmd == VFU_CMD_DMA_READ)
        memcpy((char *)dma->buf + at, reply->u.dma.data, count);
    dma->finished += count;
    if (dma->finished == dma->len)
        vfux_dma_finish(dev, dma, 0);
}

/* A DMA_READ reply that makes sense in both layouts. */
static void vfux_dma_replied_ambiguous(vfu_dev *dev, const vfu_msg *by_the_book)
{
    vfux_slot *slot = &dev->slots[by_the_book->id % VFUX_DMA_SLOTS];
    const char *why;
    if (slot != &dev->slots[VFUX_DMA_TEST] && slot->dma && !slot->held && slot->id == by_the_book->id &&
        slot->cmd == by_the_book->cmd && vfux_dma_check(slot, by_the_book, &why) == 0)
        vfux_slot_hold(dev, slot, by_the_book->u.dma.data);
    else
        vfux_dma_replied(dev, by_the_book, 0);
}

VFU_API int vfu_dev_dma(vfu_dev *dev, vfu_dma *dma)
{
    dma->sent = dma->finished = 0;
    dma->deadline = UINT64_MAX;
    dma->active = dma->unmapped = false;
    dma->fault = dma->iova;
    if (!dev->conn || !dev->greeted)
        return -ENOTCONN;
    int err = vfu_iommu_probe(dev->reader, dma->iova, dma->len, dma->to_client ? VFU_IOMMU_WRITE : VFU_IOMMU_READ);
    if (err) {
        dma->fault = vfu_iommu_last_fault(dev->reader)->iova;
        return err;
    }
    int result = vfux_dma_advance(dev, dma);
    if (result < 0)
        vfux_dma_unlink(dev, dma); /* it isn't in the list, but may have slots */
    if (result <= 0)
        return result;
    vfu_dma **link = &dev->dmas;
    while (*link)
        link = &(*link)->next;
    dma->next = NULL;
    dma->active = true;
    *link = dma;
    return 1;
}

static void vfux_wait_start(vfu_dev *dev, vfux_wait *wait)
{
    dev->asked = true;
    int result = vfu_dev_dma(dev, &wait->dma);
    if (result <= 0)
        vfux_wait_done(&wait->dma, result);
}

VFU_API void vfu_dev_dma_cancel(vfu_dev *dev, vfu_dma *dma)
{
    if (dma->active)
        vfux_dma_unlink(dev, dma);
}

/* ---- replies ------------------------------------------------------------------------------------------------------------ */

/* What a request is handled with. Returns 0, VFU_PENDING, or the negative errno of the error reply. */
typedef int vfux_handler(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer);

/* Sends the replies that were held back. 0, or what vfu_conn_send says. */
static int vfux_replies_flush(vfu_dev *dev)
{
    size_t len = dev->reply_len;
    dev->reply_len = 0;
    return len ? vfu_conn_send(dev->conn, dev->replies, len, NULL, 0, NULL, 0) : 0;
}

/* Sends a reply, with those that were held back. While dev->hold is set, a small one is held back itself: requests that came
 * together are answered together, which saves most of the system calls. 0, or what vfu_conn_send says. */
static int vfux_reply_send(vfu_dev *dev, const vfu_msg *msg, const int *fds, unsigned fd_count)
{
    enum { HEAD_MAX = VFU_HDR_SIZE + sizeof(vfu_wire_version) + VFU_CAPS_WRITE_MAX };
    size_t data_len, room = sizeof(dev->replies) - dev->reply_len;
    const void *data = vfux_msg_tail(msg, &data_len);
    if (fd_count || room < HEAD_MAX) { /* descriptors go with the first byte that is sent: it has to be this reply's */
        int err = vfux_replies_flush(dev);
        if (err)
            return err;
        room = sizeof(dev->replies);
    }
    int head_len = vfu_msg_encode_head(msg, dev->replies + dev->reply_len, room);
    if (head_len < 0)
        return head_len;
    size_t len = dev->reply_len + (size_t)head_len;
    if (data_len && data_len <= sizeof(dev->replies) - len) {
        memcpy(dev->replies + len, data, data_len);
        len += data_len;
        data_len = 0;
    }
    bool held = dev->hold && !fd_count && !data_len;
    dev->reply_len = held ? len : 0;
    if (held)
        return 0;
    return vfu_conn_send(dev->conn, dev->replies, len, data, data_len, fds, fd_count);
}

/* ---- VERSION ------------------------------------------------------------------------------------------------------------ */

/* Makes the second socket: our end is dev->twin, the client's end travels with the reply. */
static int vfux_twin_create(vfu_dev *dev, int *theirs)
{
    int fds[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0)
        return -errno;
    vfu_conn_desc desc = {.fd = fds[0], .max_msg = dev->desc.max_data_xfer_size + VFUX_PAGE, .alloc = dev->desc.alloc};
    int err = vfu_conn_create(&dev->twin, &desc);
    if (err)
        close(fds[1]);
    else
        *theirs = fds[1]; /* closed when the reply is on its way */
    return err;
}

/* Specification, "VFIO_USER_VERSION". The reply stays below 200 bytes: QEMU's request has no more, and it takes no larger
 * reply. */
static int vfux_on_version(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    vfu_caps own;
    if (dev->greeted) {
        dev->why = "VERSION was negotiated before";
        return -EINVAL;
    }
    if (request->u.version.major != 0) {
        dev->why = "no such major version";
        return -EINVAL;
    }
    int err = vfu_caps_parse(request->u.version.json, request->u.version.json_len, &dev->peer);
    if (err) {
        dev->why = "the capabilities can't be read";
        return err == -EMSGSIZE ? err : -EINVAL;
    }
    if (!dev->peer.max_data_xfer_size) {
        dev->why = "max_data_xfer_size is 0";
        return -EINVAL;
    }
    vfu_caps_defaults(&own);
    own.present = VFU_CAPS_MAX_MSG_FDS | VFU_CAPS_MAX_DATA_XFER_SIZE | VFU_CAPS_MAX_DMA_MAPS | VFU_CAPS_PGSIZES;
    own.max_msg_fds = VFU_FDS_MAX;
    own.max_data_xfer_size = dev->desc.max_data_xfer_size;
    own.max_dma_maps = dev->desc.max_dma_maps;
    own.pgsizes = VFUX_PAGE;
    if (dev->peer.write_multiple) {
        own.present |= VFU_CAPS_WRITE_MULTIPLE;
        own.write_multiple = true;
    }
    if (dev->desc.twin_socket && dev->peer.twin_socket && dev->peer.max_msg_fds) {
        err = vfux_twin_create(dev, &answer->fds[0]);
        if (err) {
            dev->why = "no second socket can be made";
            return err;
        }
        answer->fd_count = 1;
        own.present |= VFU_CAPS_TWIN_SOCKET;
        own.twin_socket = true;
        own.twin_fd_index = 0;
    }
    int len = vfu_caps_write(&own, (char *)dev->data, VFU_CAPS_WRITE_MAX);
    VFU_ASSERT(len > 0);
    answer->msg.u.version.json = (const char *)dev->data;
    answer->msg.u.version.json_len = (uint32_t)len - 1;
    dev->peer_xfer = (uint32_t)vfux_min(dev->peer.max_data_xfer_size, dev->desc.max_data_xfer_size);
    dev->greeted = true;
    if (dev->desc.callbacks.connected)
        dev->desc.callbacks.connected(dev->desc.ctx);
    return 0;
}

/* ---- DMA_MAP, DMA_UNMAP ------------------------------------------------------------------------------------------------- */

static int vfux_on_dma_map(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    vfu_iommu_mapping mapping = {
        .iova = request->u.dma_map.address,
        .size = request->u.dma_map.size,
        .prot = (request->u.dma_map.flags & VFU_DMA_READABLE ? VFU_IOMMU_READ : 0) |
                (request->u.dma_map.flags & VFU_DMA_WRITEABLE ? VFU_IOMMU_WRITE : 0),
    };
    uint64_t offset = request->u.dma_map.offset;
    (void)answer;
    if (dev->frame.fd_count > 1) {
        dev->why = "more than one descriptor";
        return -EINVAL;
    }
    if (!mapping.size || mapping.size - 1 > UINT64_MAX - offset) {
        dev->why = "the range is empty or wraps";
        return -EINVAL;
    }
    vfux_window *window = NULL;
    int err = 0;
    if (dev->frame.fd_count && !dev->desc.policy.no_mmap)
        err = vfux_window_get(dev, &window, dev->frame.fds[0], offset, mapping.size, mapping.prot & VFU_IOMMU_WRITE);
    if (err && err != -ENOMEM)
        return err;
    if (window) {
        mapping.host = window->base + (size_t)(offset - window->offset);
        mapping.flags = window->sealed ? 0 : VFU_IOMMU_GUARDED;
        mapping.user = window;
    } else { /* no descriptor, or too many of them to map: by message */
        mapping.io = &vfux_message_io;
        mapping.io_ctx = dev;
    }
    err = vfu_iommu_map(dev->iommu, &mapping);
    if (err) {
        dev->why = err == -EEXIST ? "a part of it is mapped already" : "the table refused it";
        if (mapping.user)
            vfux_window_unref(dev, mapping.user);
    } else if (dev->desc.callbacks.dma_mapped) {
        dev->desc.callbacks.dma_mapped(dev->desc.ctx, &mapping);
    }
    return err;
}

/* The semantics of VFIO's type1v2, which clients rely on, and not the exact match of the specification's text. */
static int vfux_on_dma_unmap(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    uint64_t iova = request->u.dma_unmap.address, size = request->u.dma_unmap.size;
    uint32_t flags = request->u.dma_unmap.flags;
    int count;
    if (flags & ~VFU_DMA_UNMAP_ALL) {
        dev->why = "a flag that isn't supported";
        return -EINVAL;
    }
    if (flags & VFU_DMA_UNMAP_ALL && (iova || size)) {
        dev->why = "address and size must be 0 to unmap all";
        return -EINVAL;
    }
    if (dev->desc.policy.exact_unmap && !(flags & VFU_DMA_UNMAP_ALL)) {
        vfu_iommu_mapping mapping;
        dev->why = "no mapping has just this range";
        if (!vfu_iommu_next(dev->iommu, iova, &mapping) || mapping.iova != iova || mapping.size != size)
            return -ENOENT;
    }
    count = flags & VFU_DMA_UNMAP_ALL ? vfu_iommu_unmap_all(dev->iommu) : vfu_iommu_unmap(dev->iommu, iova, size);
    vfux_revoke_end(dev);
    if (count < 0) {
        dev->why = count == -EINVAL ? "the range is empty, wraps, is unaligned or splits a mapping" : "the range is held";
        return count;
    }
    vfux_dma_end_unmapped(dev);
    answer->msg.u.dma_unmap.argsz = sizeof(vfu_wire_dma_unmap);
    answer->msg.u.dma_unmap.flags = flags;
    answer->msg.u.dma_unmap.address = iova;
    answer->msg.u.dma_unmap.size = size;
    return 0;
}

/* ---- GET_INFO, GET_REGION_INFO, GET_IRQ_INFO ---------------------------------------------------------------------------- */

static int vfux_on_device_info(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    if (request->u.device_info.argsz < sizeof(vfu_wire_device_info)) {
        dev->why = "argsz is too small";
        return -EINVAL;
    }
    answer->msg.u.device_info.argsz = sizeof(vfu_wire_device_info);
    answer->msg.u.device_info.flags = VFU_DEVICE_INFO_PCI | VFU_DEVICE_INFO_RESET;
    answer->msg.u.device_info.num_regions = dev->region_count;
    answer->msg.u.device_info.num_irqs = VFU_PCI_NUM_IRQS;
    return 0;
}

static int vfux_on_region_info(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    uint32_t index = request->u.region_info.index, argsz = request->u.region_info.argsz;
    if (argsz < sizeof(vfu_wire_region_info) || index >= dev->region_count) {
        dev->why = index >= dev->region_count ? "no such region" : "argsz is too small";
        return -EINVAL;
    }
    const vfux_region *region = &dev->regions[index];
    answer->msg.u.region_info.argsz = sizeof(vfu_wire_region_info);
    answer->msg.u.region_info.index = index;
    answer->msg.u.region_info.size = region->size;
    if (!region->size)
        return 0;
    answer->msg.u.region_info.flags = VFU_REGION_INFO_READ | (region->read_only ? 0 : VFU_REGION_INFO_WRITE);
    if (region->shared && dev->peer.max_msg_fds) {
        answer->msg.u.region_info.flags |= VFU_REGION_INFO_MMAP;
        answer->msg.u.region_info.offset = region->offset;
        answer->fds[answer->fd_count++] = region->fd;
    }
    uint32_t areas = answer->fd_count ? region->area_count : 0;
    if (!areas && !region->typed)
        return 0;
    vfu_wire_cap_type type = {.type = region->type, .subtype = region->subtype};
    int err = vfu_msg_set_region_caps(&answer->msg, argsz, region->typed ? &type : NULL, region->areas, areas, dev->data,
                                      dev->data_size);
    if (answer->msg.u.region_info.truncated)
        answer->fd_count = 0; /* the client asks again */
    return err;
}

/* Each sub-region has an entry of its own; descriptors that several name travel once. The specification's formula for the
 * distance of the entries counts the header twice: they follow each other directly, as other servers send them. */
static int vfux_on_region_io_fds(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    uint32_t index = request->u.region_io_fds.index, argsz = request->u.region_io_fds.argsz, count = 0;
    if (argsz < sizeof(vfu_wire_region_io_fds) || index >= dev->region_count || request->u.region_io_fds.flags ||
        request->u.region_io_fds.count) {
        dev->why = index >= dev->region_count ? "no such region" : "argsz is too small, or flags or count are not 0";
        return -EINVAL;
    }
    for (uint32_t i = 0; i < dev->io_fd_count; i++) {
        const vfu_io_fd *io = &dev->io_fds[i];
        unsigned at = 0;
        if (io->region != index)
            continue;
        while (at < answer->fd_count && answer->fds[at] != io->fd)
            at++;
        if (at == answer->fd_count && at == dev->peer.max_msg_fds) {
            dev->why = "the client takes fewer descriptors than these need";
            return -E2BIG;
        }
        if (at == answer->fd_count)
            answer->fds[answer->fd_count++] = io->fd; /* no region has more than fit: checked at creation */
        vfu_wire_sub_region entry = {
            .offset = io->offset, .size = io->size, .fd_index = at, .type = io->type, .flags = io->flags, .data = io->data};
        memcpy(dev->data + count++ * sizeof(entry), &entry, sizeof(entry));
    }
    uint32_t len = count * (uint32_t)sizeof(vfu_wire_sub_region);
    answer->msg.u.region_io_fds.argsz = (uint32_t)sizeof(vfu_wire_region_io_fds) + len;
    answer->msg.u.region_io_fds.index = index;
    answer->msg.u.region_io_fds.count = count;
    if (argsz < answer->msg.u.region_io_fds.argsz) {
        answer->fd_count = 0; /* the client asks again */
    } else {
        answer->msg.u.region_io_fds.data = dev->data;
        answer->msg.u.region_io_fds.data_len = len;
    }
    return 0;
}

static int vfux_on_irq_info(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    uint32_t index = request->u.irq_info.index;
    if (request->u.irq_info.argsz < sizeof(vfu_wire_irq_info) || index >= VFU_PCI_NUM_IRQS) {
        dev->why = index >= VFU_PCI_NUM_IRQS ? "no such IRQ index" : "argsz is too small";
        return -EINVAL;
    }
    answer->msg.u.irq_info.argsz = sizeof(vfu_wire_irq_info);
    answer->msg.u.irq_info.index = index;
    answer->msg.u.irq_info.count = dev->irq_counts[index];
    answer->msg.u.irq_info.flags =
        VFU_IRQ_INFO_EVENTFD | (index == VFU_PCI_IRQ_INTX ? VFU_IRQ_INFO_MASKABLE | VFU_IRQ_INFO_AUTOMASKED : 0);
    return 0;
}

/* ---- SET_IRQS ----------------------------------------------------------------------------------------------------------- */

/* Descriptors for [start, start + count): as many as interrupts, or none, which de-assigns exactly these. */
static int vfux_irqs_assign(vfu_dev *dev, uint32_t index, uint32_t start, uint32_t count)
{
    if (dev->frame.fd_count && dev->frame.fd_count != count) {
        dev->why = "neither a descriptor for each interrupt nor none";
        return -EINVAL;
    }
    for (unsigned i = 0; i < dev->frame.fd_count; i++) {
        if (!vfux_is_eventfd(dev->frame.fds[i])) {
            dev->why = "a descriptor is no eventfd";
            return -EINVAL;
        }
    }
    vfux_irqs_replace(dev, dev->irq_first[index] + start, count, dev->frame.fd_count ? dev->frame.fds : NULL);
    dev->frame.fd_count = 0; /* taken */
    if (index == VFU_PCI_IRQ_INTX && count)
        vfux_intx_unmask(dev);
    return 0;
}

/* Mask, unmask and their descriptors: INTx is the only maskable index, and has one interrupt. */
static int vfux_intx_action(vfu_dev *dev, const vfu_msg *request)
{
    uint32_t flags = request->u.irq_set.flags;
    bool chosen = request->u.irq_set.count && (!(flags & VFU_IRQ_SET_DATA_BOOL) || request->u.irq_set.data[0]);
    if (request->u.irq_set.index != VFU_PCI_IRQ_INTX) {
        dev->why = "this IRQ index can't be masked";
        return -ENOTTY;
    }
    if (flags & VFU_IRQ_SET_DATA_EVENTFD) {
        bool is_unmask = flags & VFU_IRQ_SET_ACTION_UNMASK;
        if (!is_unmask || dev->frame.fd_count > 1 || (dev->frame.fd_count && !vfux_is_eventfd(dev->frame.fds[0]))) {
            dev->why = is_unmask ? "not one eventfd" : "no eventfd tells of masking";
            return is_unmask ? -EINVAL : -ENOTTY;
        }
        vfux_close(&dev->intx.unmask_fd);
        if (dev->frame.fd_count) {
            dev->intx.unmask_fd = dev->frame.fds[0];
            dev->frame.fds[0] = -1; /* taken */
        }
    } else if (chosen && flags & VFU_IRQ_SET_ACTION_MASK) {
        dev->intx.masked = true;
    } else if (chosen) {
        vfux_intx_unmask(dev);
    }
    return 0;
}

static int vfux_on_set_irqs(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    uint32_t flags = request->u.irq_set.flags, index = request->u.irq_set.index, start = request->u.irq_set.start;
    uint32_t count = request->u.irq_set.count;
    (void)answer;
    if (index >= VFU_PCI_NUM_IRQS || start > dev->irq_counts[index] || count > dev->irq_counts[index] - start) {
        dev->why = "no such interrupt";
        return -EINVAL;
    }
    if (!(flags & VFU_IRQ_SET_DATA_EVENTFD) && dev->frame.fd_count) {
        dev->why = "descriptors where none belong";
        return -EINVAL;
    }
    bool disables_all = flags & VFU_IRQ_SET_DATA_NONE && flags & VFU_IRQ_SET_ACTION_TRIGGER && !count && !start;
    if (!count && !disables_all) {
        dev->why = "no interrupts are named";
        return -EINVAL;
    }
    if (!(flags & VFU_IRQ_SET_ACTION_TRIGGER))
        return vfux_intx_action(dev, request);
    if (disables_all)
        return vfux_irqs_assign(dev, index, 0, dev->irq_counts[index]);
    if (flags & VFU_IRQ_SET_DATA_EVENTFD)
        return vfux_irqs_assign(dev, index, start, count);
    for (uint32_t i = 0; i < count; i++) /* the client tries its own interrupts */
        if (!(flags & VFU_IRQ_SET_DATA_BOOL) || request->u.irq_set.data[i])
            vfux_irq_signal(dev, dev->irq_first[index] + start + i);
    return 0;
}

/* ---- REGION_READ, REGION_WRITE, REGION_WRITE_MULTI, DEVICE_RESET -------------------------------------------------------- */

static void vfux_msix_reset(vfu_dev *dev);

static void vfux_reset(vfu_dev *dev, vfu_reset_kind kind)
{
    vfux_revoke_all(dev);
    vfux_waits_take(dev, 0, UINT64_MAX, vfux_wait_cancel);
    vfux_dma_forget_all(dev, -ECANCELED);
    vfu_pci_reset(&dev->pci);
    vfux_msix_reset(dev);
    dev->intx.level = false;
    vfux_intx_update(dev);
    dev->work_wanted = false;
    dev->mig_state = VFU_MIG_STATE_RUNNING;
    if (dev->desc.callbacks.reset)
        dev->desc.callbacks.reset(dev->desc.ctx, kind);
    vfux_revoke_end(dev);
}

static int vfux_on_reset(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    (void)request, (void)answer;
    vfux_reset(dev, VFU_RESET_BY_CLIENT);
    return 0;
}

/* ---- the MSI-X table ---------------------------------------------------------------------------------------------------- */

/* With the policy msix_masks: a vector that is masked when it is raised sets its pending bit, and whoever unmasks it signals
 * it. Both sides write before they look at what the other has written, so one of them sees both. */
static int vfux_msix_raise(vfu_dev *dev, uint32_t vector)
{
    uint32_t bit = UINT32_C(1) << vector % 32;
    if (atomic_load(&dev->msix_masked[vector])) {
        atomic_fetch_or(&dev->msix_pending[vector / 32], bit);
        if (atomic_load(&dev->msix_masked[vector]) || !(atomic_fetch_and(&dev->msix_pending[vector / 32], ~bit) & bit))
            return 0;
    }
    return vfux_irq_signal(dev, dev->irq_first[VFU_PCI_IRQ_MSIX] + vector);
}

/* The table or the function mask has changed. */
static void vfux_msix_update(vfu_dev *dev)
{
    bool all = vfu_pci_msix_masked(&dev->pci) || !vfu_pci_msix_enabled(&dev->pci);
    for (uint32_t v = 0; dev->desc.policy.msix_masks && v < dev->irq_counts[VFU_PCI_IRQ_MSIX]; v++) {
        uint32_t bit = UINT32_C(1) << v % 32;
        bool masked = all || dev->msix_table[v * 16 + 12] & 1;
        atomic_store(&dev->msix_masked[v], masked);
        if (!masked && atomic_fetch_and(&dev->msix_pending[v / 32], ~bit) & bit)
            vfux_irq_signal(dev, dev->irq_first[VFU_PCI_IRQ_MSIX] + v);
    }
}

/* Zero, as a client that virtualises the table expects of storage; masked, as the PCI specification has it, where the masks
 * count. */
static void vfux_msix_reset(vfu_dev *dev)
{
    if (!dev->msix_size)
        return;
    memset(dev->msix_table, 0, dev->msix_size);
    for (size_t v = 0; dev->desc.policy.msix_masks && v < dev->msix_size / 16; v++)
        dev->msix_table[v * 16 + 12] = 1;
    for (size_t i = 0; i < dev->pba_size / 4; i++)
        atomic_store(&dev->msix_pending[i], 0);
    vfux_msix_update(dev);
}

static int vfux_config_write(vfu_dev *dev, uint32_t offset, const uint8_t *data, uint32_t count)
{
    int err = dev->desc.callbacks.config_writing ? dev->desc.callbacks.config_writing(dev->desc.ctx, offset, data, count) : 0;
    if (err)
        return err;
    unsigned changed = vfu_pci_write(&dev->pci, offset, data, count);
    if (changed & VFU_PCI_ASKED_FLR) {
        vfux_reset(dev, VFU_RESET_BY_FUNCTION);
        return 0;
    }
    if (changed & VFU_PCI_CHANGED_COMMAND)
        vfux_intx_update(dev);
    if (changed & VFU_PCI_CHANGED_MSIX)
        vfux_msix_update(dev);
    if (changed && dev->desc.callbacks.config_written)
        dev->desc.callbacks.config_written(dev->desc.ctx, changed);
    return 0;
}

/* The part of [offset, offset + len) that lies in the table or PBA at [at, at + size): where it starts in the access, and
 * its length. */
static uint32_t vfux_overlap(uint64_t offset, uint32_t len, uint64_t at, uint64_t size, uint32_t *skip)
{
    uint64_t first = vfux_max(offset, at), end = vfux_min(offset + len, at + size);
    *skip = first < end ? (uint32_t)(first - offset) : 0;
    return first < end ? (uint32_t)(end - first) : 0;
}

/* Does an access touch the MSI-X table or the PBA, and is so done? The PBA is read-only. */
static bool vfux_msix_access(vfu_dev *dev, uint32_t region, uint64_t offset, uint8_t *in, const uint8_t *out, uint32_t len)
{
    const vfu_pci_desc *pci = &dev->desc.pci;
    uint32_t table_skip = 0, pba_skip = 0, table = 0, pba = 0;
    if (region >= 6 || !(dev->msix_bars >> region & 1))
        return false;
    if (region == pci->msix.pba_bar)
        pba = vfux_overlap(offset, len, pci->msix.pba_offset, dev->pba_size, &pba_skip);
    if (region == pci->msix.table_bar)
        table = vfux_overlap(offset, len, pci->msix.table_offset, dev->msix_size, &table_skip);
    if (in && (table || pba))
        memset(in, 0, len);
    for (uint32_t i = 0; in && i < pba; i++) {
        uint64_t at = offset + pba_skip + i - pci->msix.pba_offset;
        in[pba_skip + i] = (uint8_t)(atomic_load(&dev->msix_pending[at / 4]) >> at % 4 * 8);
    }
    if (in && table)
        memcpy(in + table_skip, dev->msix_table + (offset + table_skip - pci->msix.table_offset), table);
    if (out && table) {
        memcpy(dev->msix_table + (offset + table_skip - pci->msix.table_offset), out + table_skip, table);
        vfux_msix_update(dev);
    }
    return table || pba;
}

static int vfux_check_access(vfu_dev *dev, uint32_t region, uint64_t offset, uint32_t count, bool write)
{
    uint64_t size = region < dev->region_count ? dev->regions[region].size : 0;
    dev->why = !size ? "no such region" : "outside of the region";
    if (!size || count > size || offset > size - count)
        return -EINVAL;
    dev->why = "the region is read-only";
    return write && dev->regions[region].read_only ? -EINVAL : 0;
}

/* The policy complete_accesses: an access that fails has no effect and reads as ones. */
static int vfux_complete_access(vfu_dev *dev, int err, void *in, uint32_t count)
{
    if (err >= 0 || !dev->desc.policy.complete_accesses)
        return err;
    if (in)
        memset(in, 0xff, count);
    return 0;
}

static int vfux_region_write(vfu_dev *dev, uint32_t region, uint64_t offset, const uint8_t *data, uint32_t count)
{
    int err = vfux_check_access(dev, region, offset, count, true);
    if (!err && count) {
        dev->why = "the device refused it";
        if (region == VFU_PCI_REGION_CONFIG)
            err = vfux_config_write(dev, (uint32_t)offset, data, count);
        else if (!vfux_msix_access(dev, region, offset, NULL, data, count) && dev->desc.callbacks.region_write)
            err = dev->desc.callbacks.region_write(dev->desc.ctx, region, offset, data, count);
    }
    return vfux_complete_access(dev, err, NULL, 0);
}

static int vfux_on_region_write(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    dev->why = "more than max_data_xfer_size";
    if (request->u.region.count > dev->desc.max_data_xfer_size)
        return -EINVAL;
    answer->msg.u.region.offset = request->u.region.offset;
    answer->msg.u.region.region = request->u.region.region;
    answer->msg.u.region.count = request->u.region.count;
    return vfux_region_write(dev, request->u.region.region, request->u.region.offset, request->u.region.data,
                             request->u.region.count);
}

static int vfux_on_region_read(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    uint32_t region = request->u.region.region, count = request->u.region.count;
    uint64_t offset = request->u.region.offset;
    dev->why = "more than max_data_xfer_size";
    if (count > dev->desc.max_data_xfer_size)
        return -EINVAL;
    answer->msg.u.region.offset = offset;
    answer->msg.u.region.region = region;
    answer->msg.u.region.count = answer->msg.u.region.data_len = count;
    answer->msg.u.region.data = dev->data;
    int err = vfux_check_access(dev, region, offset, count, false);
    dev->reading = count;
    if (!err && count) {
        dev->why = "the device refused it";
        if (region == VFU_PCI_REGION_CONFIG)
            vfu_pci_read(&dev->pci, (uint32_t)offset, dev->data, count);
        else if (vfux_msix_access(dev, region, offset, dev->data, NULL, count))
            err = 0;
        else if (dev->desc.callbacks.region_read)
            err = dev->desc.callbacks.region_read(dev->desc.ctx, region, offset, dev->data, count);
        else
            memset(dev->data, 0, count);
    }
    return vfux_complete_access(dev, err, dev->data, count);
}

/* Does the writes from multi_done on, whose entries are in dev->data. */
static int vfux_write_multi(vfu_dev *dev, vfux_answer *answer)
{
    int err = 0;
    while (!err && dev->multi_done < dev->multi_count) {
        vfu_wire_write_one one;
        memcpy(&one, dev->data + dev->multi_done * sizeof(one), sizeof(one));
        err = vfux_region_write(dev, one.region, one.offset, one.data, one.count);
        dev->multi_done += err >= 0; /* one that is pending counts when it is completed without an error */
    }
    answer->msg.u.write_multi.count = dev->multi_done;
    return err;
}

static int vfux_on_write_multi(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    if (request->u.write_multi.data_len)
        memcpy(dev->data, request->u.write_multi.data, request->u.write_multi.data_len); /* the frame is gone if one is pending */
    dev->multi_done = 0;
    dev->multi_count = request->u.write_multi.count;
    return vfux_write_multi(dev, answer);
}

/* ---- DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE ---------------------------------------------------------------------- */

/* The next state on the shortest way from one state to another that has no saving state (PRE_COPY, STOP_COPY) in between; 0:
 * none. */
static vfu_mig_state vfux_mig_next(bool pre_copy, vfu_mig_state from, vfu_mig_state to)
{
    enum { ERR = VFU_MIG_STATE_ERROR, STOP = VFU_MIG_STATE_STOP, RUN = VFU_MIG_STATE_RUNNING, COPY = VFU_MIG_STATE_STOP_COPY };
    enum { LOAD = VFU_MIG_STATE_RESUMING, PRE = VFU_MIG_STATE_PRE_COPY };
    static const uint8_t next[VFUX_MIG_STATES][VFUX_MIG_STATES] = {
        /* to:    ERROR STOP  RUNNING STOP_COPY RESUMING -  PRE_COPY - */
        [STOP] = {ERR, STOP, RUN, COPY, LOAD, ERR, RUN, ERR},  [RUN] = {ERR, STOP, RUN, STOP, STOP, ERR, PRE, ERR},
        [COPY] = {ERR, STOP, STOP, COPY, STOP, ERR, ERR, ERR}, [LOAD] = {ERR, STOP, STOP, STOP, LOAD, ERR, STOP, ERR},
        [PRE] = {ERR, RUN, RUN, COPY, RUN, ERR, PRE, ERR},
    };
    if ((unsigned)to >= VFUX_MIG_STATES || (to == VFU_MIG_STATE_PRE_COPY && !pre_copy))
        return VFU_MIG_STATE_ERROR;
    return (vfu_mig_state)next[from][to];
}

/* Goes on towards the state that is wanted. */
static int vfux_mig_advance(vfu_dev *dev)
{
    int err = 0;
    while (!err && dev->mig_state != dev->mig_wanted) {
        vfu_mig_state next = vfux_mig_next(dev->desc.migration.pre_copy, dev->mig_state, dev->mig_wanted);
        err = dev->desc.migration.change(dev->desc.ctx, dev->mig_state, next);
        if (err == -ENOTRECOVERABLE)
            dev->mig_state = VFU_MIG_STATE_ERROR;
        else if (!err)
            dev->mig_state = next;
    }
    dev->why = "the device can't change its state";
    return err;
}

static int vfux_mig_set(vfu_dev *dev, const vfu_msg *request)
{
    vfu_wire_feature_mig_state wire;
    if (vfu_feature_mig_state(request, &wire)) {
        dev->why = "no state is given";
        return -EINVAL;
    }
    vfu_mig_state wanted = (vfu_mig_state)wire.state;
    if (wire.state >= VFUX_MIG_STATES || !vfux_mig_next(dev->desc.migration.pre_copy, dev->mig_state, wanted)) {
        dev->why = "there is no way to that migration state";
        return -EINVAL;
    }
    dev->mig_wanted = wanted;
    return vfux_mig_advance(dev);
}

/* The log takes the page size that is wanted, or the next larger one whose bitmaps fit its limit. */
static int vfux_logging_start(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    vfu_wire_feature_log_control control;
    if (vfu_feature_log_control(request, &control)) {
        dev->why = "the ranges are not all there";
        return -EINVAL;
    }
    vfu_iommu_range *ranges = control.num_ranges ? vfux_allocate(&dev->desc.alloc, control.num_ranges * sizeof(*ranges)) : NULL;
    if (control.num_ranges && !ranges)
        return -ENOMEM;
    for (uint32_t i = 0; i < control.num_ranges; i++) {
        vfu_wire_feature_log_range range = {0};
        vfu_feature_log_range(request, i, &range);
        ranges[i] = (vfu_iommu_range){range.iova, range.length};
    }
    int err = vfu_iommu_dirty_start(dev->iommu, control.page_size, ranges, control.num_ranges);
    while (err == -ENOSPC && control.page_size < UINT64_C(1) << 62)
        err = vfu_iommu_dirty_start(dev->iommu, control.page_size *= 2, ranges, control.num_ranges);
    vfux_free(&dev->desc.alloc, ranges, control.num_ranges * sizeof(*ranges));
    dev->why = err == -EBUSY ? "the dirty log runs already" : "page size or ranges are impossible";
    if (!err) /* the payload of the request, with the page size that was chosen */
        memcpy(dev->data, &control, sizeof(control));
    (void)answer;
    return err;
}

static int vfux_logging_report(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    vfu_wire_feature_log_report report;
    const uint8_t *ignored;
    uint32_t ignored_len;
    dev->why = "the range or the page size is impossible, or no dirty log runs";
    if (vfu_feature_log_report(request, &report, &ignored, &ignored_len) || !vfux_is_range(report.iova, report.length) ||
        !vfux_is_power_of_two(report.page_size))
        return -EINVAL;
    uint64_t words = (report.length - 1) / report.page_size / 64 + 1;
    if (words > (dev->desc.max_data_xfer_size - sizeof(report)) / 8) {
        dev->why = "the bitmap is larger than max_data_xfer_size";
        return -E2BIG;
    }
    uint32_t len = (uint32_t)(sizeof(report) + words * 8);
    answer->msg.u.feature.argsz = (uint32_t)sizeof(vfu_wire_feature) + len;
    memcpy(dev->data, &report, sizeof(report));
    answer->msg.u.feature.data_len = (uint32_t)sizeof(report);
    if (request->u.feature.argsz < answer->msg.u.feature.argsz)
        return 0; /* argsz says what is needed; nothing was fetched, and so nothing is lost */
    uint64_t *bitmap = (uint64_t *)(void *)(dev->data + sizeof(report));
    answer->msg.u.feature.data_len = len;
    return vfu_iommu_dirty_report(dev->iommu, report.iova, report.length, report.page_size, bitmap, (size_t)words);
}

/* What can be done with a feature: VFU_FEATURE_GET and VFU_FEATURE_SET; 0: it isn't there. */
static uint32_t vfux_feature_methods(const vfu_dev *dev, uint32_t index)
{
    switch (index) {
    case VFU_FEATURE_MIGRATION: return dev->desc.migration.change ? VFU_FEATURE_GET : 0;
    case VFU_FEATURE_MIG_STATE: return dev->desc.migration.change ? VFU_FEATURE_GET | VFU_FEATURE_SET : 0;
    case VFU_FEATURE_LOGGING_START:
    case VFU_FEATURE_LOGGING_STOP: return VFU_FEATURE_SET;
    case VFU_FEATURE_LOGGING_REPORT: return VFU_FEATURE_GET;
    default: return 0;
    }
}

static int vfux_feature_fetch(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer, uint32_t index)
{
    vfu_wire_feature_migration migration = {.flags = VFU_MIG_STOP_COPY | (dev->desc.migration.pre_copy ? VFU_MIG_PRE_COPY : 0)};
    vfu_wire_feature_mig_state state = {.state = dev->mig_state};
    if (index == VFU_FEATURE_LOGGING_REPORT)
        return vfux_logging_report(dev, request, answer);
    uint32_t len = index == VFU_FEATURE_MIGRATION ? sizeof(migration) : sizeof(state);
    memcpy(dev->data, index == VFU_FEATURE_MIGRATION ? (void *)&migration : (void *)&state, len);
    answer->msg.u.feature.argsz = (uint32_t)sizeof(vfu_wire_feature) + len;
    answer->msg.u.feature.data_len = len;
    dev->why = "argsz is too small";
    return request->u.feature.argsz < answer->msg.u.feature.argsz ? -EINVAL : 0;
}

static int vfux_on_feature(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    uint32_t flags = request->u.feature.flags, index = flags & VFU_FEATURE_INDEX_MASK,
             asked = flags & (VFU_FEATURE_GET | VFU_FEATURE_SET);
    uint32_t methods = vfux_feature_methods(dev, index);
    dev->why = "no such feature";
    if (!methods)
        return -ENOTTY;
    dev->why = "the feature can't be used that way";
    if (flags & ~(VFU_FEATURE_INDEX_MASK | VFU_FEATURE_GET | VFU_FEATURE_SET | VFU_FEATURE_PROBE) || asked & ~methods)
        return -EINVAL;
    /* The reply repeats the request; a feature that is fetched replaces the data. */
    if (request->u.feature.data_len)
        memcpy(dev->data, request->u.feature.data, request->u.feature.data_len);
    answer->msg.u.feature.argsz = request->u.feature.argsz;
    answer->msg.u.feature.flags = flags;
    answer->msg.u.feature.data = dev->data;
    answer->msg.u.feature.data_len = request->u.feature.data_len;
    if (flags & VFU_FEATURE_PROBE)
        return 0;
    if (asked == VFU_FEATURE_GET)
        return vfux_feature_fetch(dev, request, answer, index);
    if (index == VFU_FEATURE_MIG_STATE)
        return vfux_mig_set(dev, request);
    if (index == VFU_FEATURE_LOGGING_START)
        return vfux_logging_start(dev, request, answer);
    dev->why = "no dirty log runs";
    return vfu_iommu_dirty_stop(dev->iommu);
}

static int vfux_on_mig_read(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    uint32_t size = request->u.mig_data.size;
    bool saving = dev->mig_state == VFU_MIG_STATE_PRE_COPY || dev->mig_state == VFU_MIG_STATE_STOP_COPY;
    dev->why = !saving ? "no state is being saved" : "size is more than argsz or max_data_xfer_size";
    if (!saving || !dev->desc.migration.read || size > dev->desc.max_data_xfer_size ||
        request->u.mig_data.argsz < sizeof(vfu_wire_mig_data) || size > request->u.mig_data.argsz - sizeof(vfu_wire_mig_data))
        return -EINVAL;
    int64_t got = size ? dev->desc.migration.read(dev->desc.ctx, dev->data, size) : 0;
    dev->why = "the device refused it";
    VFU_ASSERT(got <= (int64_t)size);
    if (got < 0)
        return (int)got;
    answer->msg.u.mig_data.argsz = (uint32_t)sizeof(vfu_wire_mig_data) + (uint32_t)got;
    answer->msg.u.mig_data.size = answer->msg.u.mig_data.data_len = (uint32_t)got;
    answer->msg.u.mig_data.data = dev->data;
    return 0;
}

static int vfux_on_mig_write(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer)
{
    (void)answer;
    dev->why = dev->mig_state != VFU_MIG_STATE_RESUMING ? "no state is being restored" : "more than max_data_xfer_size";
    if (dev->mig_state != VFU_MIG_STATE_RESUMING || !dev->desc.migration.write ||
        request->u.mig_data.size > dev->desc.max_data_xfer_size)
        return -EINVAL;
    dev->why = "the device refused it";
    return request->u.mig_data.size ? dev->desc.migration.write(dev->desc.ctx, request->u.mig_data.data, request->u.mig_data.size)
                                    : 0;
}

static bool vfux_is_running(const vfu_dev *dev)
{
    return dev->mig_state == VFU_MIG_STATE_RUNNING || dev->mig_state == VFU_MIG_STATE_PRE_COPY;
}

/* ---- answers that come later -------------------------------------------------------------------------------------------- */

VFU_API uint64_t vfu_dev_ticket(vfu_dev *dev)
{
    pthread_mutex_lock(&dev->lock);
    if (dev->handling && !dev->pending.ticket) {
        dev->pending.ticket = ++dev->last_ticket;
        dev->pending.completed = false;
        dev->pending.wanted = dev->reading;
    }
    uint64_t ticket = dev->handling ? dev->pending.ticket : 0;
    pthread_mutex_unlock(&dev->lock);
    return ticket;
}

VFU_API int vfu_dev_complete(vfu_dev *dev, uint64_t ticket, int result, const void *data, size_t len)
{
    int err = 0;
    VFU_ASSERT(result <= 0);
    pthread_mutex_lock(&dev->lock);
    vfux_pending *pending = &dev->pending;
    if (!ticket || pending->ticket != ticket || pending->completed)
        err = -ECANCELED;
    else if (!result && len != pending->wanted)
        err = -EINVAL;
    if (!err) {
        if (!result && len)
            memcpy(dev->data, data, len);
        pending->completed = true;
        pending->result = result;
        vfux_wake(dev);
    }
    pthread_mutex_unlock(&dev->lock);
    return err;
}

static bool vfux_is_pending(vfu_dev *dev) { return dev->pending.ticket != 0; /* only the thread that polls sets and clears it */ }

/* After a request was handled: keeps it if its answer comes later, else its ticket, if it took one, is void. */
static bool vfux_pending_keep(vfu_dev *dev, const vfu_msg *request, const vfux_answer *answer, int err)
{
    vfux_pending *pending = &dev->pending;
    if (err != VFU_PENDING && !vfux_is_pending(dev))
        return false;
    pthread_mutex_lock(&dev->lock);
    bool keep = err == VFU_PENDING && pending->ticket;
    VFU_ASSERT(err != VFU_PENDING || keep); /* a callback that returns VFU_PENDING has taken a ticket */
    if (keep) {
        pending->request = *request;
        pending->answer = *answer;
    } else {
        pending->ticket = 0;
    }
    pthread_mutex_unlock(&dev->lock);
    return keep;
}

static void vfux_pending_drop(vfu_dev *dev)
{
    pthread_mutex_lock(&dev->lock);
    dev->pending.ticket = 0;
    pthread_mutex_unlock(&dev->lock);
}

static int vfux_dev_answer(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer, int err);

/* Answers the request that was completed, or goes on with the rest of what it asks for. Negative: the connection is over. */
static int vfux_pending_finish(vfu_dev *dev)
{
    if (!vfux_is_pending(dev))
        return 0;
    pthread_mutex_lock(&dev->lock);
    bool completed = dev->pending.completed;
    pthread_mutex_unlock(&dev->lock);
    int flushed = completed ? vfu_conn_flush(dev->conn) : -EAGAIN;
    if (flushed) /* the answer is sent when there is room for it */
        return flushed == -EAGAIN ? 0 : flushed;
    vfu_msg request = dev->pending.request;
    vfux_answer answer = dev->pending.answer;
    int err = dev->pending.result;
    vfux_pending_drop(dev);
    dev->handling = true; /* the rest of it may become pending again */
    dev->why = "the device refused it";
    if (request.cmd == VFU_CMD_REGION_WRITE_MULTI) {
        err = vfux_complete_access(dev, err, NULL, 0);
        if (err)
            dev->multi_done--; /* counted when it became pending */
        else
            err = vfux_write_multi(dev, &answer);
    } else if (request.cmd == VFU_CMD_DEVICE_FEATURE) {
        if (err == -ENOTRECOVERABLE)
            dev->mig_state = VFU_MIG_STATE_ERROR;
        if (!err) {
            dev->mig_state = vfux_mig_next(dev->desc.migration.pre_copy, dev->mig_state, dev->mig_wanted);
            err = vfux_mig_advance(dev);
        }
    } else {
        err = vfux_complete_access(dev, err, request.cmd == VFU_CMD_REGION_READ ? dev->data : NULL, answer.msg.u.region.data_len);
    }
    dev->handling = false;
    if (vfux_pending_keep(dev, &request, &answer, err))
        return 0;
    return vfux_dev_answer(dev, &request, &answer, err);
}

/* Is a change of the migration state completed, whose answer waits for room? */
static bool vfux_is_stopping(vfu_dev *dev)
{
    if (!vfux_is_pending(dev) || dev->pending.request.cmd != VFU_CMD_DEVICE_FEATURE)
        return false;
    pthread_mutex_lock(&dev->lock);
    bool stopping = dev->pending.completed;
    pthread_mutex_unlock(&dev->lock);
    return stopping;
}

/* ---- dispatch ----------------------------------------------------------------------------------------------------------- */

static vfux_handler *vfux_handler_of(uint16_t cmd)
{
    switch (cmd) {
    case VFU_CMD_VERSION: return vfux_on_version;
    case VFU_CMD_DMA_MAP: return vfux_on_dma_map;
    case VFU_CMD_DMA_UNMAP: return vfux_on_dma_unmap;
    case VFU_CMD_DEVICE_GET_INFO: return vfux_on_device_info;
    case VFU_CMD_DEVICE_GET_REGION_INFO: return vfux_on_region_info;
    case VFU_CMD_DEVICE_GET_REGION_IO_FDS: return vfux_on_region_io_fds;
    case VFU_CMD_DEVICE_GET_IRQ_INFO: return vfux_on_irq_info;
    case VFU_CMD_DEVICE_SET_IRQS: return vfux_on_set_irqs;
    case VFU_CMD_REGION_READ: return vfux_on_region_read;
    case VFU_CMD_REGION_WRITE: return vfux_on_region_write;
    case VFU_CMD_REGION_WRITE_MULTI: return vfux_on_write_multi;
    case VFU_CMD_DEVICE_RESET: return vfux_on_reset;
    case VFU_CMD_DEVICE_FEATURE: return vfux_on_feature;
    case VFU_CMD_MIG_DATA_READ: return vfux_on_mig_read;
    case VFU_CMD_MIG_DATA_WRITE: return vfux_on_mig_write;
    default: return NULL;
    }
}

static void vfux_trace(vfu_dev *dev, vfu_level level, const vfu_msg *msg, int err)
{
    char line[VFUX_LINE_MAX];
    if (!vfux_says(&dev->desc.logger, level))
        return;
    vfu_msg_render(msg, line, sizeof(line));
    if (!err)
        vfux_say(&dev->desc.logger, level, "%s", line);
    else
        vfux_warn(dev, "%s: %s: %s", line, vfu_errno_name(err), dev->why ? dev->why : "refused");
}

/* The reply to a GET_INFO of 20 bytes or more, which is Linux's newer struct with a cap_offset: Cloud Hypervisor's client
 * waits for as many. */
static int vfux_send_long_info(vfu_dev *dev, const vfu_msg *reply)
{
    uint8_t bytes[VFU_HDR_SIZE + sizeof(vfu_wire_device_info) + 4] = {0};
    vfu_wire_header header;
    vfu_wire_device_info info;
    int err = vfux_replies_flush(dev);
    if (err)
        return err;
    if (vfu_msg_encode(reply, bytes, sizeof(bytes)) < 0)
        return -EINVAL;
    memcpy(&header, bytes, sizeof(header));
    memcpy(&info, bytes + sizeof(header), sizeof(info));
    header.size = sizeof(bytes);
    info.argsz = sizeof(bytes) - VFU_HDR_SIZE;
    memcpy(bytes, &header, sizeof(header));
    memcpy(bytes + sizeof(header), &info, sizeof(info));
    return vfu_conn_send(dev->conn, bytes, sizeof(bytes), NULL, 0, NULL, 0);
}

/* Answers a request that was handled with result err. Negative: the connection is over. */
static int vfux_dev_answer(vfu_dev *dev, const vfu_msg *request, vfux_answer *answer, int err)
{
    int sent = 0, twin_fd = request->cmd == VFU_CMD_VERSION && answer->fd_count ? answer->fds[0] : -1;
    if (err) {
        vfux_trace(dev, VFU_LEVEL_WARNING, request, err);
        vfu_msg_init_reply(&answer->msg, request, err);
        answer->fd_count = 0;
    }
    bool long_info =
        !err && request->cmd == VFU_CMD_DEVICE_GET_INFO && dev->frame.len >= VFU_HDR_SIZE + sizeof(vfu_wire_device_info) + 4;
    if (vfu_msg_wants_reply(request))
        sent = long_info ? vfux_send_long_info(dev, &answer->msg)
                         : vfux_reply_send(dev, &answer->msg, answer->fds, answer->fd_count);
    vfux_close(&twin_fd);
    return sent;
}

/* Handles one command and answers it, unless that comes later. Negative: the connection is over. */
static int vfux_dev_command(vfu_dev *dev, const vfu_msg *request, int decoded)
{
    vfux_answer answer = {.fd_count = 0};
    bool first = !dev->greeted;
    dev->reading = 0;
    vfu_msg_init_reply(&answer.msg, request, 0);
    dev->why = decoded == -ENOSYS ? "no such command"
               : decoded          ? "its payload is too short, too long or contradicts itself"
                                  : NULL;
    int err = decoded;
    if (!err && first && request->cmd != VFU_CMD_VERSION) {
        dev->why = "VERSION has to come first";
        err = -EINVAL;
    }
    if (!err && dev->frame.fds_refused) {
        dev->why = "more descriptors than negotiated";
        err = -EINVAL;
    }
    if (!err) {
        vfux_handler *handler = vfux_handler_of(request->cmd);
        dev->why = "the command isn't supported";
        if (dev->traces)
            vfux_trace(dev, VFU_LEVEL_TRACE, request, 0);
        dev->handling = true;
        err = handler ? handler(dev, request, &answer) : -EOPNOTSUPP;
        dev->handling = false;
    }
    if (vfux_pending_keep(dev, request, &answer, err))
        return 0;
    VFU_ASSERT(err <= 0);
    int sent = vfux_dev_answer(dev, request, &answer, err);
    return sent ? sent : first && err ? -EPROTO : 0;
}

/* Handles one message. Negative: the connection is over. */
static int vfux_dev_message(vfu_dev *dev, const vfu_conn *conn)
{
    vfu_msg msg;
    int decoded = vfu_msg_decode_dma(dev->frame.bytes, dev->frame.len, dev->layout, &msg);
    if (decoded == -EBADMSG)
        return decoded;
    bool is_reply = vfu_msg_is_reply(&msg);
    if (!is_reply && conn == dev->conn)
        return vfux_dev_command(dev, &msg, decoded);
    if (!is_reply || !dev->greeted)
        return -EBADMSG; /* no commands on the second socket, no replies before there is anything to reply to */
    if (decoded == -EINVAL && msg.cmd == VFU_CMD_DMA_READ && dev->layout == VFU_DMA_LAYOUT_AUTO &&
        vfu_msg_decode_dma(dev->frame.bytes, dev->frame.len, VFU_DMA_LAYOUT_SPEC, &msg) == 0)
        vfux_dma_replied_ambiguous(dev, &msg);
    else
        vfux_dma_replied(dev, &msg, decoded);
    return 0;
}

/* ---- life cycle --------------------------------------------------------------------------------------------------------- */

static void vfux_wait_disconnect(vfu_dev *dev, vfux_wait *wait)
{
    (void)dev;
    vfux_wait_done(&wait->dma, -ENOTCONN);
}

static void vfux_dev_drop_client(vfu_dev *dev)
{
    if (!dev->conn)
        return;
    vfux_pending_drop(dev);
    vfux_revoke_all(dev);
    vfux_waits_take(dev, 0, UINT64_MAX, vfux_wait_disconnect);
    vfux_dma_forget_all(dev, -ENOTCONN);
    if (dev->greeted && dev->desc.callbacks.disconnected)
        dev->desc.callbacks.disconnected(dev->desc.ctx);
    vfux_irqs_release(dev);
    dev->intx.level = false;
    vfu_pci_disconnect(&dev->pci);
    for (size_t i = 0; i < dev->pba_size / 4; i++)
        atomic_store(&dev->msix_pending[i], 0);
    vfux_msix_update(dev);
    while (vfu_iommu_unmap_all(dev->iommu) < 0)
        vfux_say(&dev->desc.logger, VFU_LEVEL_ERROR, "the device still holds memory of a client that has left");
    vfux_waits_take(dev, 0, UINT64_MAX, vfux_wait_disconnect);
    vfux_revoke_end(dev);
    vfu_iommu_dirty_stop(dev->iommu);
    vfux_frame_release(&dev->frame);
    vfu_conn_destroy(dev->conn);
    vfu_conn_destroy(dev->twin);
    dev->conn = dev->twin = NULL;
    dev->received = 0;
    dev->reply_len = 0;
    dev->greeted = dev->work_wanted = dev->more = dev->asked = false;
    dev->mig_state = VFU_MIG_STATE_RUNNING;
}

/* Takes a connected socket for the client. */
static int vfux_dev_take_client(vfu_dev *dev, int fd)
{
    vfu_conn_desc desc = {.fd = fd, .max_msg = dev->desc.max_data_xfer_size + VFUX_PAGE, .alloc = dev->desc.alloc};
    int err = vfu_conn_create(&dev->conn, &desc);
    if (!err)
        vfux_conn_let_wait(dev->conn, VFUX_SOON_MS);
    dev->greeting_until = vfux_now_ms() + dev->desc.greeting_ms;
    dev->layout = dev->desc.dma_layout;
    dev->warnings = 0;
    return err;
}

/* Takes the next client, if one waits. When that fails for want of descriptors or memory, it is tried again a little later. */
static void vfux_dev_accept(vfu_dev *dev)
{
    if (dev->accept_from && vfux_now_ms() < dev->accept_from)
        return;
    dev->accept_from = 0;
    int fd = vfu_sock_accept(dev->listener);
    if (fd == -EAGAIN)
        return;
    int err = fd < 0 ? fd : vfux_dev_take_client(dev, fd);
    if (!err)
        return;
    vfux_say(&dev->desc.logger, VFU_LEVEL_ERROR, "a client can't be accepted: %s", vfu_errno_name(err));
    dev->accept_from = vfux_now_ms() + VFUX_ACCEPT_MS;
}

/* Handles what has come over one of the sockets. Negative: the connection is over. */
static int vfux_dev_receive(vfu_dev *dev, vfu_conn *conn)
{
    int err = vfu_conn_flush(conn);
    if (err && err != -EAGAIN)
        return err;
    int received = conn == dev->conn ? dev->received : 0;
    if (received)
        dev->received = 0;
    else
        received = vfu_conn_receive(conn);
    bool more = false;
    err = 0;
    for (unsigned handled = 0; !err && !vfu_conn_is_waiting(conn); handled++) {
        if (handled == VFUX_BUDGET) {
            more = true;
            break;
        }
        int got = vfux_is_pending(dev) ? vfux_conn_next_reply(conn, &dev->frame) : vfu_conn_next(conn, &dev->frame);
        if (got == 0)
            break;
        dev->hold = conn == dev->conn && vfux_conn_has_next(conn);
        err = got < 0 ? got : vfux_dev_message(dev, conn);
    }
    dev->hold = false;
    int flushed = vfux_replies_flush(dev); /* also those before a message that breaks the protocol */
    if (err || flushed)
        return err ? err : flushed;
    dev->more = dev->more || more;
    return received < 0 && received != -EAGAIN && received != -ENOBUFS && !more ? received : 0;
}

/* Does what the client and the other threads want. Negative: the connection is over. */
static int vfux_dev_serve(vfu_dev *dev, bool woken)
{
    dev->more = false;
    int err = vfux_pending_finish(dev);
    if (!err)
        err = vfux_dev_receive(dev, dev->conn);
    if (!err && dev->twin)
        err = vfux_dev_receive(dev, dev->twin);
    if (!err && !dev->greeted && vfux_now_ms() >= dev->greeting_until)
        err = -ETIMEDOUT;
    if (err || !dev->greeted)
        return err;
    vfux_intx_check_unmask(dev);
    err = vfux_pending_finish(dev); /* what has just come may have stopped the device: then there is no work for it */
    if (err)
        return err;
    if (dev->work_wanted && vfux_is_running(dev) && !vfux_is_stopping(dev)) {
        dev->work_wanted = false;
        if (dev->desc.callbacks.work && dev->desc.callbacks.work(dev->desc.ctx))
            dev->work_wanted = true;
    }
    if (woken)
        vfux_waits_take(dev, 0, UINT64_MAX, vfux_wait_start);
    vfux_dma_pump(dev);
    if (dev->dmas && dev->desc.dma_timeout_ms)
        vfux_dma_expire(dev);
    return 0;
}

VFU_API int vfu_dev_poll(vfu_dev *dev)
{
    uint64_t count;
    atomic_store_explicit(&dev->poller, (uintptr_t)&vfux_this_thread, memory_order_relaxed);
    /* Whoever has set woken writes next; if that has not come yet, it ends the next wait. */
    bool woken = atomic_load(&dev->woken) && read(dev->wake_fd, &count, sizeof(count)) > 0;
    if (woken)
        atomic_store(&dev->woken, false);
    if (!dev->conn && dev->listener >= 0)
        vfux_dev_accept(dev);
    if (dev->conn) {
        int err = vfux_dev_serve(dev, woken);
        if (err) {
            if (err != -EPIPE && err != -ECONNRESET)
                vfux_warn(dev, "the client is dropped: %s", vfu_errno_name(err));
            vfux_dev_drop_client(dev);
            if (dev->listener >= 0)
                vfux_dev_accept(dev);
        }
    } else {
        vfux_waits_take(dev, 0, UINT64_MAX, vfux_wait_disconnect);
    }
    return dev->conn || dev->listener >= 0 ? 0 : -ENOTCONN;
}

VFU_API unsigned vfu_dev_fds(vfu_dev *dev, vfu_pollfd fds[VFU_DEV_FDS])
{
    unsigned count = 0;
    fds[count++] = (vfu_pollfd){dev->wake_fd, POLLIN};
    if (dev->conn) {
        short events = vfu_conn_is_waiting(dev->conn) ? POLLOUT : 0;
        fds[count++] = (vfu_pollfd){vfu_conn_fd(dev->conn), (short)(events | (vfux_conn_has_room(dev->conn) ? POLLIN : 0))};
        if (dev->intx.unmask_fd >= 0 && dev->intx.masked)
            fds[count++] = (vfu_pollfd){dev->intx.unmask_fd, POLLIN};
        if (dev->twin)
            fds[count++] = (vfu_pollfd){vfu_conn_fd(dev->twin), (short)(POLLIN | (vfu_conn_is_waiting(dev->twin) ? POLLOUT : 0))};
    } else if (dev->listener >= 0 && !dev->accept_from) {
        fds[count++] = (vfu_pollfd){dev->listener, POLLIN};
    }
    return count;
}

VFU_API int vfu_dev_timeout(vfu_dev *dev)
{
    uint64_t until = dev->greeted ? UINT64_MAX : dev->greeting_until;
    if (!dev->conn)
        until = dev->accept_from ? dev->accept_from : UINT64_MAX;
    if (dev->more || (dev->work_wanted && vfux_is_running(dev)))
        return 0;
    for (vfu_dma *dma = dev->dmas; dma; dma = dma->next)
        until = vfux_min(until, dma->deadline);
    if (until == UINT64_MAX)
        return -1;
    uint64_t now = vfux_now_ms();
    return now >= until ? 0 : (int)vfux_min(until - now, INT_MAX);
}

static uint64_t vfux_now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* Receives for the vfu_dev_poll that follows. Has anything come, or is the connection over? */
static bool vfux_dev_receive_next(vfu_dev *dev, int (*receive)(vfu_conn *conn))
{
    int n = receive(dev->conn);
    dev->received = n == -EAGAIN || n == -EINTR ? 0 : n;
    return dev->received != 0;
}

/*
 * Waits for something to do: looks for busy_us again and again, then sleeps. Negative: poll() failed.
 *
 * Mostly it is the next request that ends the wait, so recvmsg() itself waits for it: two system calls for each request, this and
 * sendmsg(), instead of three. But no other thread can end a recvmsg(). So it waits only where such a thread has nothing to say
 * but vfu_dev_stop, and only for a moment, after which poll() takes over: a busy client never lets it come to that, and without one
 * the device sleeps as long as nothing happens.
 */
static int vfux_dev_sleep(vfu_dev *dev)
{
    vfu_pollfd wanted[VFU_DEV_FDS];
    struct pollfd fds[VFU_DEV_FDS];
    unsigned count = vfu_dev_fds(dev, wanted);
    int timeout = vfu_dev_timeout(dev), ready = 0;
    for (unsigned i = 0; i < count; i++)
        fds[i] = (struct pollfd){.fd = wanted[i].fd, .events = wanted[i].events};
    bool for_request = dev->conn && count == 2 && fds[1].events == POLLIN && timeout < 0 && !vfux_is_pending(dev) && !dev->asked;
    uint64_t busy_us = timeout < 0 ? dev->desc.busy_us : vfux_min(dev->desc.busy_us, (uint64_t)timeout * 1000);
    uint64_t began = busy_us ? vfux_now_us() : 0, spent = 0;
    while (spent < busy_us && !ready) {
        if (for_request)
            ready = vfux_dev_receive_next(dev, vfu_conn_receive) || atomic_load(&dev->woken);
        else
            ready = poll(fds, count, 0);
        spent = vfux_now_us() - began;
    }
    if (!ready && for_request && !atomic_load(&dev->woken))
        ready = vfux_dev_receive_next(dev, vfux_conn_receive_soon);
    if (!ready)
        ready = poll(fds, count, timeout < 0 ? -1 : timeout - (int)vfux_min(spent / 1000, (uint64_t)timeout));
    return ready < 0 && errno != EINTR ? -errno : 0;
}

VFU_API int vfu_dev_run(vfu_dev *dev)
{
    int err = dev->conn || dev->listener >= 0 ? 0 : -ENOTCONN;
    while (!atomic_load(&dev->stopped) && !err) {
        err = vfux_dev_sleep(dev);
        if (!err)
            err = vfu_dev_poll(dev);
    }
    atomic_store(&dev->stopped, false);
    return err;
}

VFU_API void vfu_dev_stop(vfu_dev *dev)
{
    int saved = errno;
    atomic_store(&dev->stopped, true);
    vfux_wake(dev);
    errno = saved;
}

VFU_API vfu_mig_state vfu_dev_migration_state(const vfu_dev *dev) { return dev->mig_state; }

/* Copies what of a region can be mapped. */
static int vfux_region_share(vfu_dev *dev, vfux_region *region, const vfu_region_share *share)
{
    if (!share)
        return 0;
    if (!region->size || share->area_count > VFUX_AREAS || (share->area_count && !share->areas))
        return -EINVAL;
    region->shared = true;
    region->fd = share->fd;
    region->offset = share->offset;
    if (!share->area_count)
        return 0;
    size_t size = share->area_count * sizeof(*share->areas);
    if (!(region->areas = vfux_allocate(&dev->desc.alloc, size)))
        return -ENOMEM;
    region->area_count = share->area_count;
    memcpy(region->areas, share->areas, size);
    return 0;
}

static int vfux_dev_create_regions(vfu_dev *dev)
{
    const vfu_dev_desc *desc = &dev->desc;
    int err = 0;
    if (desc->extra_region_count > VFUX_EXTRA_REGIONS)
        return -EINVAL;
    dev->regions = vfux_allocate_zero(&desc->alloc, (VFU_PCI_NUM_REGIONS + desc->extra_region_count) * sizeof(*dev->regions));
    if (!dev->regions)
        return -ENOMEM;
    dev->region_count = VFU_PCI_NUM_REGIONS + desc->extra_region_count;
    for (unsigned i = 0; i < 6 && !err; i++) {
        dev->regions[i].size = desc->pci.bar[i].size;
        err = vfux_region_share(dev, &dev->regions[i], desc->share[i]);
    }
    dev->regions[VFU_PCI_REGION_ROM].size = desc->pci.rom_size;
    dev->regions[VFU_PCI_REGION_ROM].read_only = true;
    dev->regions[VFU_PCI_REGION_CONFIG].size = dev->pci.size;
    for (uint32_t i = 0; i < desc->extra_region_count && !err; i++) {
        const vfu_extra_region *extra = &desc->extra_regions[i];
        vfux_region *region = &dev->regions[VFU_PCI_NUM_REGIONS + i];
        region->size = extra->size;
        region->read_only = extra->read_only;
        region->typed = true;
        region->type = extra->type;
        region->subtype = extra->subtype;
        err = vfux_region_share(dev, region, extra->share);
    }
    return err;
}

static int vfux_dev_create_io_fds(vfu_dev *dev)
{
    const vfu_io_fd *given = dev->desc.io_fds;
    uint32_t count = dev->desc.io_fd_count;
    if (!count)
        return 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t same = 0;
        for (uint32_t j = 0; j < count; j++)
            same += given[j].region == given[i].region;
        uint64_t size = given[i].region < dev->region_count ? dev->regions[given[i].region].size : 0;
        if (same > VFU_FDS_MAX || given[i].offset >= size || given[i].size > size - given[i].offset)
            return -EINVAL;
    }
    if (!(dev->io_fds = vfux_allocate(&dev->desc.alloc, count * sizeof(*given))))
        return -ENOMEM;
    memcpy(dev->io_fds, given, count * sizeof(*given));
    dev->io_fd_count = count;
    return 0;
}

static int vfux_dev_create_irqs(vfu_dev *dev)
{
    const vfu_pci_desc *pci = &dev->desc.pci;
    dev->irq_counts[VFU_PCI_IRQ_INTX] = pci->interrupt_pin ? 1 : 0;
    dev->irq_counts[VFU_PCI_IRQ_MSI] = pci->msi.vectors;
    dev->irq_counts[VFU_PCI_IRQ_MSIX] = pci->msix.vectors;
    dev->irq_counts[VFU_PCI_IRQ_ERR] = dev->irq_counts[VFU_PCI_IRQ_REQ] = 1;
    for (unsigned i = 0; i < VFU_PCI_NUM_IRQS; i++) {
        dev->irq_first[i] = dev->irq_total;
        dev->irq_total += dev->irq_counts[i];
    }
    dev->msix_size = pci->msix.vectors * (size_t)16;
    dev->irqs = vfux_allocate(&dev->desc.alloc, dev->irq_total * sizeof(*dev->irqs));
    if (!dev->irqs)
        return -ENOMEM;
    for (uint32_t i = 0; i < dev->irq_total; i++)
        atomic_init(&dev->irqs[i], -1);
    if (!dev->msix_size)
        return 0;
    dev->pba_size = (pci->msix.vectors + 63u) / 64 * 8;
    dev->msix_bars = (uint8_t)(1u << pci->msix.table_bar | 1u << pci->msix.pba_bar);
    dev->msix_table = vfux_allocate_zero(&dev->desc.alloc, dev->msix_size);
    dev->msix_pending = vfux_allocate_zero(&dev->desc.alloc, dev->pba_size);
    dev->msix_masked = vfux_allocate_zero(&dev->desc.alloc, pci->msix.vectors);
    if (!dev->msix_table || !dev->msix_pending || !dev->msix_masked)
        return -ENOMEM;
    vfux_msix_reset(dev);
    return 0;
}

static int vfux_dev_create_iommu(vfu_dev *dev)
{
    vfu_iommu_desc desc = {
        .max_mappings = dev->desc.max_dma_maps,
        .max_readers = dev->desc.max_readers + 1,
        .granule = VFUX_PAGE,
        .alloc = dev->desc.alloc,
        .ctx = dev,
        .removed = vfux_mapping_removed,
        .guard = vfux_guard,
    };
    int err = vfu_iommu_create(&dev->iommu, &desc);
    return err ? err : vfu_iommu_reader_open_local(dev->iommu, &dev->reader); /* all unmaps are this thread's */
}

VFU_API int vfu_dev_create(vfu_dev **out, const vfu_dev_desc *desc)
{
    *out = NULL;
    vfu_dev *dev = vfux_allocate_zero(&desc->alloc, sizeof(*dev));
    if (!dev)
        return -ENOMEM;
    dev->desc = *desc;
    dev->listener = dev->wake_fd = dev->intx.unmask_fd = -1;
    dev->revoked_first = 1;
    dev->mig_state = VFU_MIG_STATE_RUNNING;
    dev->traces = vfux_says(&desc->logger, VFU_LEVEL_TRACE);
    pthread_mutex_init(&dev->lock, NULL); /* can't fail for plain ones on Linux */
    pthread_cond_init(&dev->changed, NULL);
    if (!dev->desc.max_data_xfer_size)
        dev->desc.max_data_xfer_size = VFUX_XFER_DEFAULT;
    if (!dev->desc.max_dma_maps)
        dev->desc.max_dma_maps = 65535;
    if (!dev->desc.max_readers)
        dev->desc.max_readers = 15;
    if (!dev->desc.greeting_ms)
        dev->desc.greeting_ms = VFUX_GREETING_MS;
    int err = dev->desc.max_data_xfer_size < VFUX_PAGE || dev->desc.max_data_xfer_size > VFUX_XFER_MAX ? -EINVAL : 0;
    if (!err)
        err = vfu_pci_build(&dev->pci, &dev->desc.pci);
    if (!err)
        err = vfux_dev_create_regions(dev);
    if (!err)
        err = vfux_dev_create_io_fds(dev);
    if (!err)
        err = vfux_dev_create_irqs(dev);
    if (!err)
        err = vfux_dev_create_iommu(dev);
    dev->data_size = dev->desc.max_data_xfer_size + (size_t)VFUX_PAGE;
    if (!err && !(dev->data = vfux_allocate(&dev->desc.alloc, dev->data_size)))
        err = -ENOMEM;
    if (!err && (dev->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) < 0)
        err = -errno;
    if (err) {
        vfu_dev_destroy(dev);
        return err;
    }
    *out = dev;
    return 0;
}

VFU_API void vfu_dev_disconnect(vfu_dev *dev) { vfux_dev_drop_client(dev); }

VFU_API void vfu_dev_destroy(vfu_dev *dev)
{
    if (!dev)
        return;
    vfux_dev_drop_client(dev);
    vfux_close(&dev->listener);
    vfux_close(&dev->wake_fd);
    vfu_alloc alloc = dev->desc.alloc;
    if (dev->path) {
        struct stat st;
        if (lstat(dev->path, &st) == 0 && st.st_dev == dev->path_dev && st.st_ino == dev->path_ino)
            unlink(dev->path);
        vfux_free(&alloc, dev->path, strlen(dev->path) + 1);
    }
    vfu_iommu_reader_close(dev->reader);
    vfu_iommu_destroy(dev->iommu);
    for (uint32_t i = 0; i < dev->region_count; i++)
        vfux_free(&alloc, dev->regions[i].areas, dev->regions[i].area_count * sizeof(*dev->regions[i].areas));
    vfux_free(&alloc, dev->regions, dev->region_count * sizeof(*dev->regions));
    vfux_free(&alloc, dev->io_fds, dev->io_fd_count * sizeof(*dev->io_fds));
    vfux_free(&alloc, (void *)dev->irqs, dev->irq_total * sizeof(*dev->irqs));
    vfux_free(&alloc, dev->msix_table, dev->msix_size);
    vfux_free(&alloc, (void *)dev->msix_pending, dev->pba_size);
    vfux_free(&alloc, (void *)dev->msix_masked, dev->irq_counts[VFU_PCI_IRQ_MSIX]);
    vfux_free(&alloc, dev->data, dev->data_size);
    pthread_mutex_destroy(&dev->lock);
    pthread_cond_destroy(&dev->changed);
    vfux_free(&alloc, dev, sizeof(*dev));
}

VFU_API int vfu_dev_listen(vfu_dev *dev, const char *path)
{
    struct stat st;
    if (dev->listener >= 0 || dev->conn)
        return -EBUSY;
    char *copy = vfux_allocate(&dev->desc.alloc, strlen(path) + 1);
    if (!copy)
        return -ENOMEM;
    memcpy(copy, path, strlen(path) + 1);
    int fd = vfu_sock_listen(path), err = fd < 0 ? fd : lstat(path, &st) < 0 ? -errno : 0;
    if (err) {
        if (fd >= 0)
            unlink(path);
        vfux_close(&fd);
        vfux_free(&dev->desc.alloc, copy, strlen(path) + 1);
        return err;
    }
    dev->listener = fd;
    dev->path = copy;
    dev->path_dev = st.st_dev;
    dev->path_ino = st.st_ino;
    return 0;
}

VFU_API int vfu_dev_attach(vfu_dev *dev, int fd)
{
    int listening = 0;
    socklen_t len = sizeof(listening);
    int err = dev->listener >= 0 || dev->conn ? -EBUSY : 0;
    if (!err && getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &len) < 0)
        err = -errno;
    if (!err && listening)
        err = vfux_set_flags(fd);
    if (err)
        close(fd);
    else if (listening)
        dev->listener = fd;
    else
        err = vfux_dev_take_client(dev, fd);
    return err;
}

VFU_API void vfu_dev_want_work(vfu_dev *dev) { dev->work_wanted = true; }
VFU_API const vfu_pci *vfu_dev_pci(vfu_dev *dev) { return &dev->pci; }
VFU_API vfu_iommu *vfu_dev_iommu(vfu_dev *dev) { return dev->iommu; }
VFU_API vfu_iommu_reader *vfu_dev_reader(vfu_dev *dev) { return dev->reader; }

VFU_API int vfu_dev_raise(vfu_dev *dev, uint32_t index, uint32_t vector)
{
    if (index == VFU_PCI_IRQ_INTX || index >= VFU_PCI_NUM_IRQS || vector >= dev->irq_counts[index])
        return -EINVAL;
    if (index == VFU_PCI_IRQ_MSIX && dev->desc.policy.msix_masks)
        return vfux_msix_raise(dev, vector);
    return vfux_irq_signal(dev, dev->irq_first[index] + vector);
}

VFU_API void vfu_dev_set_intx(vfu_dev *dev, bool level)
{
    dev->intx.level = level;
    vfux_intx_update(dev);
}

/* ==== client ============================================================================================================= */

enum {
    VFUX_IN_FLIGHT_DEFAULT = 64,
    VFUX_IN_FLIGHT_MAX = 4096,
    VFUX_QUEUED_MAX = 16 << 10, /* bytes of a message that is copied to leave with others; larger ones are sent at once */
    VFUX_FLUSH_AT = 64 << 10,   /* bytes that wait for flush, poll or wait */
    VFUX_CLIENT_BUDGET = 1024,  /* messages handled by one poll */
    VFUX_CLIENT_WINDOWS = 1024, /* areas of a region that are mapped */
    VFUX_CLIENT_IO_FDS = 1024,  /* of a region that are used */
    VFUX_IO_FD_SHADOW = 2,      /* libvfio-user's ioeventfd with a shadow, in entries of 48 bytes */
    VFUX_CONNECT_PAUSE_MS = 5   /* between attempts to connect to a server whose backlog is full */
};

#define VFUX_FUSE 0x65735546u /* FUSE_SUPER_MAGIC of linux/magic.h */

typedef enum vfux_call_state { VFUX_CALL_FREE, VFUX_CALL_FLIGHT, VFUX_CALL_DONE } vfux_call_state;

/* A request from its submission until its completion is taken. */
typedef struct vfux_call {
    vfux_call_state state;
    uint32_t next, prev; /* in the list of its state, as index + 1; 0: the end */
    vfu_msg request;     /* its views are dead */
    uint64_t deadline;   /* ms */
    uint32_t order;      /* counts submissions */
    void *buf;
    size_t room;
    int *received;
    unsigned max_received;
    bool in_place; /* vfu_client_call's: the reply's views stay in the frame, and nothing behind it is handled yet */
    vfu_completion done;
} vfux_call;

typedef struct vfux_call_list {
    uint32_t first, last; /* index + 1 */
} vfux_call_list;

/* One end of a socket to the server: the main one or the twin. */
typedef struct vfux_line {
    vfu_conn *conn; /* NULL: there is none */
    vfu_frame frame;
    uint64_t taken; /* bytes that the server had taken when it was last looked, while others wait */
    uint64_t until; /* ms; it must take some by then. 0: nothing waits */
    bool held;      /* the device's requests are left in the buffer until there is room for an answer */
} vfux_line;

/* A file that mappings share, for reconnecting. */
typedef struct vfux_told_file {
    struct vfux_told_file *next;
    dev_t dev;
    ino_t ino;
    int access, fd;
    uint32_t refs;
} vfux_told_file;

/* A mapping as the server was told. */
typedef struct vfux_told {
    vfux_told_file *file; /* NULL: without a descriptor */
    uint64_t offset;
} vfux_told;

/* Interrupts of an index as the server was told. */
typedef struct vfux_told_irq {
    struct vfux_told_irq *next;
    uint32_t index, count;
    uint32_t action; /* VFU_IRQ_SET_ACTION_* */
    int *fds;        /* count; -1: none */
} vfux_told_irq;

typedef struct vfux_direct_window {
    uint64_t offset, size; /* in the region */
    uint8_t *base;
} vfux_direct_window;

typedef struct vfux_direct_io {
    vfu_client_io_fd io;
    int fd;
    uint8_t *shadow;  /* where the value goes; NULL: nowhere */
    void *shadow_map; /* what to unmap */
    size_t shadow_len;
} vfux_direct_io;

/* A region that was asked for: what the server said, and how it is accessed. */
typedef struct vfux_known {
    struct vfux_known *next;
    uint32_t index, how;
    vfu_client_region said; /* fd is -1; areas are ours */
    vfux_direct_window *windows;
    uint32_t window_count, window_room;
    vfux_direct_io *ios;
    uint32_t io_count, io_room;
} vfux_known;

struct vfu_client {
    vfu_client_desc desc; /* with the defaults filled in */
    vfux_line main, twin; /* main.conn NULL: of no more use */
    vfu_caps server;
    uint32_t server_xfer; /* bytes of data that the server takes in one message */
    vfu_iommu *iommu;
    vfu_iommu_reader *reader;
    uint8_t *data; /* max_data_xfer_size bytes, for DMA_READ, and for payloads that are put together */

    vfux_call *calls; /* max_in_flight, and one for vfu_client_call */
    uint32_t call_count;
    vfux_call_list free, flight, done;
    unsigned in_flight; /* submitted and not taken, without vfu_client_call's */
    uint16_t next_id;
    uint16_t *ids; /* by the low bits of an id: index + 1 of its call; 0: none. No two ids in use share those bits */
    uint32_t id_mask;
    uint32_t submitted, posted; /* submissions so far, and the number of the last one that was posted */
    bool posted_waits;          /* no reply to a later one has come */
    bool more;                  /* something in the buffers is not handled yet */

    vfu_wire_sparse_area *areas; /* of the region that was asked for last */
    uint32_t area_room;
    vfu_wire_device_info info; /* as it was asked for last */
    bool info_known;
    vfux_known *known;
    vfu_iommu *told; /* mappings as the server was told, without those made by hand; NULL: !reconnects */
    vfux_told_file *told_files;
    vfux_told_irq *told_irqs;
};

/* ---- requests under way ------------------------------------------------------------------------------------------------- */

static vfux_call *vfux_call_at(vfu_client *client, uint32_t link) { return link ? &client->calls[link - 1] : NULL; }

static void vfux_calls_append(vfu_client *client, vfux_call_list *list, vfux_call *call)
{
    uint32_t link = (uint32_t)(call - client->calls) + 1;
    call->next = 0;
    call->prev = list->last;
    if (list->last)
        client->calls[list->last - 1].next = link;
    else
        list->first = link;
    list->last = link;
}

static void vfux_calls_remove(vfu_client *client, vfux_call_list *list, vfux_call *call)
{
    if (call->prev)
        client->calls[call->prev - 1].next = call->next;
    else
        list->first = call->next;
    if (call->next)
        client->calls[call->next - 1].prev = call->prev;
    else
        list->last = call->prev;
}

/* The call with that id, or NULL. */
static vfux_call *vfux_call_find(vfu_client *client, uint16_t id)
{
    vfux_call *call = vfux_call_at(client, client->ids[id & client->id_mask]);
    return call && call->done.id == id ? call : NULL;
}

static void vfux_call_complete(vfu_client *client, vfux_call *call, int result)
{
    vfux_calls_remove(client, &client->flight, call);
    call->state = VFUX_CALL_DONE;
    call->done.result = result;
    vfux_calls_append(client, &client->done, call);
}

static void vfux_call_release(vfu_client *client, vfux_call *call)
{
    client->ids[call->done.id & client->id_mask] = 0;
    vfux_calls_remove(client, call->state == VFUX_CALL_DONE ? &client->done : &client->flight, call);
    call->state = VFUX_CALL_FREE;
    vfux_calls_append(client, &client->free, call);
}

static void vfux_line_close(vfux_line *line)
{
    vfux_frame_release(&line->frame);
    vfu_conn_destroy(line->conn);
    line->conn = NULL;
    line->until = 0;
    line->held = false;
}

/* The connection is of no more use. */
static int vfux_client_break(vfu_client *client, int err, const char *why)
{
    if (err == -ECONNRESET)
        err = -EPIPE;
    if (err == -EPROTO || err == -ETIMEDOUT)
        vfux_say(&client->desc.logger, VFU_LEVEL_WARNING, "the server is given up: %s", why);
    vfux_line_close(&client->main);
    vfux_line_close(&client->twin);
    client->more = client->posted_waits = false;
    while (client->flight.first)
        vfux_call_complete(client, vfux_call_at(client, client->flight.first), err);
    return err;
}

/* ---- what the server says ----------------------------------------------------------------------------------------------- */

/* Are the areas of a region info reply inside the region, and the file offsets below 2^63? */
static bool vfux_client_areas_fit(const vfu_msg *reply)
{
    vfu_region_cap cap = {0};
    vfu_wire_sparse_area area;
    uint64_t size = reply->u.region_info.size;
    uint32_t count;
    while (vfu_msg_next_cap(reply, &cap)) {
        if (cap.id != VFU_REGION_CAP_SPARSE_MMAP || vfu_region_cap_areas(&cap, &count))
            continue;
        for (uint32_t i = 0; i < count; i++)
            if (vfu_region_cap_area(&cap, i, &area) || area.size > size || area.offset > size - area.size)
                return false;
    }
    return !(reply->u.region_info.flags & VFU_REGION_INFO_MMAP) ||
           (reply->u.region_info.offset <= INT64_MAX && size <= INT64_MAX - reply->u.region_info.offset);
}

static const char *vfux_client_check_region_info(const vfu_msg *request, const vfu_msg *reply, unsigned fd_count)
{
    if (reply->u.region_info.index != request->u.region_info.index)
        return "a reply is about another region";
    if (!vfux_client_areas_fit(reply))
        return "a region's areas are impossible";
    if (reply->u.region_info.flags & VFU_REGION_INFO_MMAP && !reply->u.region_info.truncated && !fd_count)
        return "a region that can be mapped comes without its descriptor";
    return NULL;
}

/* Copies entry i, of the specification's 40 bytes or libvfio-user's 48. */
static int vfux_client_io_fd(const vfu_msg *reply, uint32_t i, vfu_client_io_fd *out)
{
    vfu_wire_sub_region entry;
    int err = vfu_msg_sub_region(reply, i, &entry);
    if (err)
        return err;
    *out = (vfu_client_io_fd){.offset = entry.offset,
                              .size = entry.size,
                              .type = entry.type,
                              .flags = entry.flags,
                              .data = entry.data,
                              .fd_index = entry.fd_index,
                              .shadow_index = -1};
    if (reply->u.region_io_fds.stride < sizeof(entry) + 8 || entry.type == VFU_IO_FD_IOREGIONFD)
        return 0;
    memcpy(&out->data, reply->u.region_io_fds.data + (size_t)i * reply->u.region_io_fds.stride + sizeof(entry), 8);
    if (entry.type == VFUX_IO_FD_SHADOW) {
        out->shadow_index = entry.padding <= INT_MAX ? (int)entry.padding : INT_MAX;
        out->shadow_offset = entry.data;
    }
    return 0;
}

static const char *vfux_client_check_io_fds(const vfu_msg *request, const vfu_msg *reply, unsigned fd_count)
{
    vfu_client_io_fd io;
    if (reply->u.region_io_fds.index != request->u.region_io_fds.index)
        return "a reply is about another region";
    for (uint32_t i = 0; vfux_client_io_fd(reply, i, &io) == 0; i++) {
        if (io.fd_index >= fd_count || (io.shadow_index >= 0 && (unsigned)io.shadow_index >= fd_count))
            return "a sub-region names a descriptor that didn't come";
        if (io.size > UINT64_MAX - io.offset)
            return "a sub-region wraps";
    }
    return NULL;
}

/* Bytes of the bitmap that a LOGGING_REPORT asks for; 0: impossible. */
static uint64_t vfux_client_bitmap_len(const vfu_wire_feature_log_report *report)
{
    if (!vfux_is_range(report->iova, report->length) || !vfux_is_power_of_two(report->page_size))
        return 0;
    return ((report->length - 1) / report->page_size / 64 + 1) * 8;
}

static const char *vfux_client_check_feature(const vfu_msg *request, const vfu_msg *reply)
{
    vfu_wire_feature_migration migration;
    vfu_wire_feature_mig_state state;
    vfu_wire_feature_log_report report;
    const uint8_t *bitmap;
    uint32_t len;
    bool short_of = false;
    if (reply->u.feature.flags != request->u.feature.flags)
        return "a reply is about another feature";
    if (!(reply->u.feature.flags & VFU_FEATURE_GET) || reply->u.feature.flags & VFU_FEATURE_PROBE)
        return NULL;
    switch (reply->u.feature.flags & VFU_FEATURE_INDEX_MASK) {
    case VFU_FEATURE_MIGRATION: short_of = vfu_feature_migration(reply, &migration) != 0; break;
    case VFU_FEATURE_MIG_STATE: short_of = vfu_feature_mig_state(reply, &state) != 0; break;
    case VFU_FEATURE_LOGGING_REPORT:
        short_of = vfu_feature_log_report(reply, &report, &bitmap, &len) != 0 ||
                   (reply->u.feature.argsz <= request->u.feature.argsz && len != vfux_client_bitmap_len(&report));
        break;
    default: break;
    }
    return short_of ? "a feature's payload is too short" : NULL;
}

/* What is wrong with a reply that was decoded; NULL: nothing. */
static const char *vfux_client_check(const vfu_msg *request, const vfu_msg *reply, unsigned fd_count)
{
    if (reply->cmd != request->cmd)
        return "a reply is to another command";
    if (vfu_msg_is_error(reply))
        return NULL;
    switch (reply->cmd) {
    case VFU_CMD_DMA_UNMAP:
        return reply->u.dma_unmap.address != request->u.dma_unmap.address ? "a reply is about other memory" : NULL;
    case VFU_CMD_DEVICE_GET_REGION_INFO: return vfux_client_check_region_info(request, reply, fd_count);
    case VFU_CMD_DEVICE_GET_REGION_IO_FDS: return vfux_client_check_io_fds(request, reply, fd_count);
    case VFU_CMD_DEVICE_GET_IRQ_INFO:
        return reply->u.irq_info.index != request->u.irq_info.index ? "a reply is about another IRQ index" : NULL;
    case VFU_CMD_REGION_READ:
    case VFU_CMD_REGION_WRITE:
        return reply->u.region.region != request->u.region.region || reply->u.region.offset != request->u.region.offset ||
                       reply->u.region.count != request->u.region.count
                   ? "a reply is about another access"
                   : NULL;
    case VFU_CMD_REGION_WRITE_MULTI:
        return reply->u.write_multi.count > request->u.write_multi.count ? "more writes were done than asked for" : NULL;
    case VFU_CMD_DEVICE_FEATURE: return vfux_client_check_feature(request, reply);
    case VFU_CMD_MIG_DATA_READ:
        return reply->u.mig_data.size > request->u.mig_data.size ? "more migration data than asked for" : NULL;
    default: return NULL;
    }
}

/* Points a reply's data, which vfux_msg_tail gives, somewhere else. */
static void vfux_msg_set_tail(vfu_msg *msg, const uint8_t *data, uint32_t len)
{
    switch (msg->cmd) {
    case VFU_CMD_DMA_UNMAP: msg->u.dma_unmap.data = data, msg->u.dma_unmap.data_len = len; break;
    case VFU_CMD_DEVICE_GET_REGION_INFO: msg->u.region_info.data = data, msg->u.region_info.data_len = len; break;
    case VFU_CMD_DEVICE_GET_REGION_IO_FDS: msg->u.region_io_fds.data = data, msg->u.region_io_fds.data_len = len; break;
    case VFU_CMD_DEVICE_SET_IRQS: msg->u.irq_set.data = data, msg->u.irq_set.data_len = len; break;
    case VFU_CMD_REGION_READ:
    case VFU_CMD_REGION_WRITE: msg->u.region.data = data, msg->u.region.data_len = len; break;
    case VFU_CMD_REGION_WRITE_MULTI: msg->u.write_multi.data = data, msg->u.write_multi.data_len = len; break;
    case VFU_CMD_DEVICE_FEATURE: msg->u.feature.data = data, msg->u.feature.data_len = len; break;
    case VFU_CMD_MIG_DATA_READ:
    case VFU_CMD_MIG_DATA_WRITE: msg->u.mig_data.data = data, msg->u.mig_data.data_len = len; break;
    default: break;
    }
}

/* Moves the reply's data to the request's buffer. */
static int vfux_call_keep(vfux_call *call)
{
    size_t len;
    const void *data = vfux_msg_tail(&call->done.reply, &len);
    int err = len > call->room ? -EMSGSIZE : 0;
    if (!err && len)
        memcpy(call->buf, data, len);
    vfux_msg_set_tail(&call->done.reply, !err && len ? call->buf : NULL, err ? 0 : (uint32_t)len);
    return err;
}

/* Completes the request that a message from the server answers. */
static int vfux_client_reply(vfu_client *client, const vfu_msg *reply, int decoded)
{
    vfux_call *call = vfux_call_find(client, reply->id);
    vfu_frame *frame = &client->main.frame;
    if (!call || call->state != VFUX_CALL_FLIGHT) /* late: its request has timed out, or there was none */
        return vfux_client_break(client, -EPROTO, "a reply to nothing that was asked");
    const char *why = decoded ? "a reply is malformed" : vfux_client_check(&call->request, reply, frame->fd_count);
    if (why)
        return vfux_client_break(client, -EPROTO, why);
    call->done.reply = *reply;
    for (; !vfu_msg_is_error(reply) && call->done.fd_count < call->max_received && call->done.fd_count < frame->fd_count;
         call->done.fd_count++) {
        call->received[call->done.fd_count] = frame->fds[call->done.fd_count];
        frame->fds[call->done.fd_count] = -1;
    }
    int result = call->in_place ? 0 : vfux_call_keep(call);
    if (vfu_msg_is_error(reply))
        result = reply->error > 0 && reply->error < 4096 ? -(int)reply->error : -EIO;
    if (client->posted_waits && (int32_t)(call->order - client->posted) > 0)
        client->posted_waits = false;
    vfux_call_complete(client, call, result);
    return 0;
}

/* ---- what the device asks ----------------------------------------------------------------------------------------------- */

/* Serves DMA_READ or DMA_WRITE from the client's own table: 0, or the negative errno of the error reply. */
static int vfux_client_access(vfu_client *client, const vfu_msg *command, vfu_msg *reply)
{
    uint64_t iova = command->u.dma.address, count = command->u.dma.count;
    int err;
    if (command->cmd != VFU_CMD_DMA_READ && command->cmd != VFU_CMD_DMA_WRITE)
        return -ENOSYS;
    if (count > client->desc.max_data_xfer_size)
        return -E2BIG;
    reply->u.dma.address = iova;
    reply->u.dma.count = count;
    if (command->cmd == VFU_CMD_DMA_WRITE) {
        reply->u.dma.ack_len = sizeof(vfu_wire_dma_access);
        err = vfu_iommu_write(client->reader, iova, command->u.dma.data, (size_t)count);
    } else {
        err = vfu_iommu_read(client->reader, iova, client->data, (size_t)count);
        reply->u.dma.data = client->data;
        reply->u.dma.data_len = (uint32_t)count;
    }
    return err;
}

/* Sends a message, or puts it to those that wait to leave together. -EAGAIN: more than `limit` bytes would wait. */
static int vfux_client_put(vfu_conn *conn, const vfu_msg *msg, const int *fds, unsigned fd_count, size_t limit)
{
    size_t data_len;
    const void *data = vfux_msg_tail(msg, &data_len);
    uint8_t head[VFU_HDR_SIZE + 8 + VFU_CAPS_WRITE_MAX];
    int len = vfu_msg_encode_head(msg, head, sizeof(head)), err = 0;
    if (len < 0)
        return -EINVAL;
    size_t total = (size_t)len + data_len;
    if (total > conn->max_msg)
        return -EINVAL;
    bool alone = fd_count || total > VFUX_QUEUED_MAX;
    if (alone || vfux_conn_waiting(conn) + total > vfux_min(limit, VFUX_FLUSH_AT))
        err = vfu_conn_flush(conn);
    if (err && err != -EAGAIN)
        return err;
    if (alone && !vfu_conn_is_waiting(conn))
        return vfu_conn_send(conn, head, (size_t)len, data, data_len, fds, fd_count);
    return vfux_conn_waiting(conn) + total > limit ? -EAGAIN
                                                   : vfux_conn_put(conn, head, (size_t)len, data, data_len, fds, fd_count);
}

/* Is there room for the largest answer to a request of the device? Requests of ours leave it, since they stop at max_msg. */
static bool vfux_client_can_answer(const vfu_conn *conn) { return conn->tx_capacity - vfux_conn_waiting(conn) >= conn->max_msg; }

/* Answers a command of the server; there is room for the answer. */
static int vfux_client_command(vfu_client *client, vfu_conn *conn, const vfu_msg *command, int decoded)
{
    vfu_msg reply;
    vfu_msg_init_reply(&reply, command, 0);
    int err = decoded ? decoded : vfux_client_access(client, command, &reply);
    if (err) {
        vfux_say(&client->desc.logger, VFU_LEVEL_INFO, "%s of the device is refused: %s", vfu_cmd_name(command->cmd),
                 vfu_errno_name(err));
        vfu_msg_init_reply(&reply, command, err);
    }
    if (!vfu_msg_wants_reply(command))
        return 0;
    err = vfux_client_put(conn, &reply, NULL, 0, conn->tx_capacity);
    return err ? vfux_client_break(client, err, "") : 0;
}

/* ---- moving messages ---------------------------------------------------------------------------------------------------- */

/* Handles what is in the buffer of a line, until `stop` is completed (NULL: all of it, up to the budget). Negative: broken. */
static int vfux_client_handle(vfu_client *client, vfux_line *line, const vfux_call *stop)
{
    vfu_msg msg;
    for (unsigned handled = 0;; handled++) {
        if (handled == VFUX_CLIENT_BUDGET || (stop && stop->state == VFUX_CALL_DONE)) {
            client->more = client->more || line->conn->rx_start < line->conn->rx_end;
            return 0;
        }
        if (!vfux_client_can_answer(line->conn))
            vfu_conn_flush(line->conn); /* an error will be seen by the next flush */
        line->held = !vfux_client_can_answer(line->conn);
        int got = line->held ? vfux_conn_next_reply(line->conn, &line->frame) : vfu_conn_next(line->conn, &line->frame);
        if (got < 0)
            return vfux_client_break(client, -EPROTO, "a message has an impossible size");
        if (!got)
            return 0;
        int decoded = vfu_msg_decode_dma(line->frame.bytes, line->frame.len, VFU_DMA_LAYOUT_SPEC, &msg);
        if (decoded == -EBADMSG)
            return vfux_client_break(client, -EPROTO, "a message is neither command nor reply");
        if (vfu_msg_is_reply(&msg) && line == &client->twin)
            return vfux_client_break(client, -EPROTO, "a reply comes over the twin socket");
        int err = vfu_msg_is_reply(&msg) ? vfux_client_reply(client, &msg, decoded)
                                         : vfux_client_command(client, line->conn, &msg, decoded);
        if (err)
            return err;
    }
}

/* Is there something in the buffers that can be handled now? */
static bool vfux_client_has_more(const vfu_client *client)
{
    return client->more || (client->main.held && vfux_client_can_answer(client->main.conn)) ||
           (client->twin.held && vfux_client_can_answer(client->twin.conn));
}

static int vfux_client_handle_all(vfu_client *client, const vfux_call *stop)
{
    client->more = false;
    int err = vfux_client_handle(client, &client->main, stop);
    if (!err && client->twin.conn)
        err = vfux_client_handle(client, &client->twin, NULL);
    return err;
}

/* Sends what waits, and notes until when the server has to take some of it. 0, -EAGAIN, or another errno. */
static int vfux_line_flush(vfu_client *client, vfux_line *line)
{
    if (!line->conn || !vfu_conn_is_waiting(line->conn)) {
        line->until = 0;
        return 0;
    }
    int err = vfu_conn_flush(line->conn);
    uint64_t taken = line->conn->tx_at + line->conn->tx_start;
    if (!err)
        line->until = 0;
    else if (!line->until || taken != line->taken)
        line->until = vfux_now_ms() + client->desc.timeout_ms;
    line->taken = taken;
    return err;
}

/* Handles what a call of vfu_conn_receive has said. Negative: broken. */
static int vfux_client_received(vfu_client *client, vfux_line *line, const vfux_call *stop, int got)
{
    if (got < 0 && got != -EAGAIN && got != -ENOBUFS)
        return vfux_client_break(client, got == -EBADMSG ? -EPROTO : got, "descriptors were lost");
    return got > 0 ? vfux_client_handle(client, line, stop) : 0;
}

/* Receives once and handles it. Negative: broken. */
static int vfux_client_receive(vfu_client *client, vfux_line *line, const vfux_call *stop)
{
    return vfux_client_received(client, line, stop, line->conn ? vfu_conn_receive(line->conn) : -EAGAIN);
}

/* The server takes no more. What it has answered before still counts, and first of all the reply to `stop`: while that one is in
 * the frame, the connection stays. 0, or negative: broken. */
static int vfux_client_lost(vfu_client *client, int err, const vfux_call *stop)
{
    while (client->main.conn && !(stop && stop->state == VFUX_CALL_DONE)) {
        if (vfu_conn_receive(client->main.conn) <= 0)
            return vfux_client_break(client, err, "");
        vfux_client_handle(client, &client->main, stop);
    }
    return client->main.conn ? 0 : -EPIPE;
}

/* Flushes both lines; what they don't take stays. Negative: broken. */
static int vfux_client_flush_all(vfu_client *client, const vfux_call *stop)
{
    int err = vfux_line_flush(client, &client->main), twin = vfux_line_flush(client, &client->twin);
    if (!err || err == -EAGAIN)
        err = twin;
    return !err || err == -EAGAIN ? 0 : vfux_client_lost(client, err, stop);
}

/* Until when the server has to do something, in ms; UINT64_MAX: it need not. */
static uint64_t vfux_client_deadline(vfu_client *client)
{
    uint64_t until = UINT64_MAX;
    if (client->flight.first)
        until = vfux_call_at(client, client->flight.first)->deadline; /* they are in order */
    if (client->main.until)
        until = vfux_min(until, client->main.until);
    if (client->twin.until)
        until = vfux_min(until, client->twin.until);
    return until;
}

static int vfux_client_expire(vfu_client *client)
{
    uint64_t until = vfux_client_deadline(client);
    return until != UINT64_MAX && vfux_now_ms() >= until ? vfux_client_break(client, -ETIMEDOUT, "it is silent, or takes nothing")
                                                         : 0;
}

static int vfux_client_left_ms(uint64_t until)
{
    uint64_t now = vfux_now_ms();
    return until == UINT64_MAX ? -1 : now >= until ? 0 : (int)vfux_min(until - now, INT_MAX);
}

/* Waits until something can be done, wake_fd is readable or `until` has passed, and does it. 1: wake_fd is readable; 0: not
 * yet; negative: broken. */
static int vfux_client_step(vfu_client *client, int wake_fd, uint64_t until, const vfux_call *stop)
{
    vfu_pollfd wanted[VFU_CLIENT_FDS];
    struct pollfd fds[VFU_CLIENT_FDS + 1];
    int err = vfux_client_flush_all(client, stop);
    if (!err && vfux_client_has_more(client))
        err = vfux_client_handle_all(client, stop);
    if (err || (stop && stop->state == VFUX_CALL_DONE))
        return err ? err : vfux_client_flush_all(client, stop); /* answers to the device */
    unsigned count = vfu_client_fds(client, wanted);
    for (unsigned i = 0; i < count; i++)
        fds[i] = (struct pollfd){.fd = wanted[i].fd, .events = wanted[i].events};
    fds[count] = (struct pollfd){.fd = wake_fd, .events = POLLIN};
    int timeout = vfux_client_has_more(client) ? 0 : vfux_client_left_ms(vfux_min(until, vfux_client_deadline(client)));
    /* Where only the server can end the wait, recvmsg() waits for it, and poll() when that takes long (see vfux_dev_sleep). */
    bool for_server = wake_fd < 0 && count == 1 && fds[0].events == POLLIN && (timeout < 0 || timeout > VFUX_SOON_MS);
    int got = for_server ? vfux_conn_receive_soon(client->main.conn) : -EAGAIN, ready = 0;
    if (got != -EAGAIN && got != -EINTR)
        err = vfux_client_received(client, &client->main, stop, got);
    else
        ready = poll(fds, count + (wake_fd >= 0), timeout);
    if (ready < 0 && errno != EINTR)
        return vfux_client_break(client, -errno, "");
    if (ready > 0 && fds[0].revents & ~POLLOUT)
        err = vfux_client_receive(client, &client->main, stop);
    if (!err && ready > 0 && count > 1 && fds[1].revents & ~POLLOUT)
        err = vfux_client_receive(client, &client->twin, NULL);
    if (!err)
        err = vfux_client_flush_all(client, stop); /* answers to the device */
    if (!err && !(stop && stop->state == VFUX_CALL_DONE))
        err = vfux_client_expire(client);
    return err ? err : ready > 0 && wake_fd >= 0 && fds[count].revents;
}

VFU_API unsigned vfu_client_fds(vfu_client *client, vfu_pollfd fds[VFU_CLIENT_FDS])
{
    vfux_line *lines[VFU_CLIENT_FDS] = {&client->main, &client->twin};
    unsigned count = 0;
    for (unsigned i = 0; i < VFU_CLIENT_FDS; i++) {
        vfu_conn *conn = lines[i]->conn;
        if (conn)
            fds[count++] = (vfu_pollfd){vfu_conn_fd(conn), (short)((vfux_conn_has_room(conn) ? POLLIN : 0) |
                                                                   (vfu_conn_is_waiting(conn) ? POLLOUT : 0))};
    }
    return count;
}

VFU_API int vfu_client_timeout(vfu_client *client)
{
    return vfux_client_has_more(client) || client->done.first ? 0 : vfux_client_left_ms(vfux_client_deadline(client));
}

VFU_API int vfu_client_flush(vfu_client *client)
{
    int err = client->main.conn ? vfux_client_flush_all(client, NULL) : -EPIPE;
    if (err)
        return err;
    return client->main.until || client->twin.until ? -EAGAIN : 0;
}

/* ---- submitting and taking ---------------------------------------------------------------------------------------------- */

/* Sends a command, or has it wait to be sent. Returns its id, which is free; -EAGAIN, -EINVAL, or negative: broken. */
static int vfux_client_start(vfu_client *client, vfu_msg *msg, const int *fds, unsigned fd_count)
{
    while (client->ids[client->next_id & client->id_mask]) /* fewer are in use than there are */
        client->next_id++;
    msg->id = client->next_id++;
    if (!client->main.conn)
        return -EPIPE;
    int err = fd_count > vfux_min(client->server.max_msg_fds, VFU_FDS_MAX)
                  ? -EINVAL
                  : vfux_client_put(client->main.conn, msg, fds, fd_count, client->main.conn->max_msg);
    if (err && err != -EAGAIN && err != -EINVAL)
        err = vfux_client_lost(client, err, NULL);
    if (!err)
        client->submitted++;
    return err ? err : msg->id;
}

/* Notes a command that was started, for its reply. */
static vfux_call *vfux_call_start(vfu_client *client, const vfu_msg *msg)
{
    vfux_call *call = vfux_call_at(client, client->free.first);
    vfux_calls_remove(client, &client->free, call);
    *call = (vfux_call){
        .state = VFUX_CALL_FLIGHT,
        .request = *msg,
        .deadline = vfux_now_ms() + client->desc.timeout_ms,
        .order = client->submitted,
        .done = {.id = msg->id},
    };
    client->ids[msg->id & client->id_mask] = (uint16_t)(call - client->calls + 1);
    vfux_calls_append(client, &client->flight, call);
    return call;
}

VFU_API int vfu_client_submit(vfu_client *client, const vfu_client_request *request)
{
    vfu_msg msg = request->msg;
    bool posted = msg.flags == VFU_HDR_NO_REPLY;
    for (unsigned i = 0; i < request->max_received; i++)
        request->received[i] = -1;
    if ((msg.flags && !posted) || msg.cmd == VFU_CMD_VERSION)
        return -EINVAL;
    if ((msg.cmd == VFU_CMD_REGION_READ && request->room < msg.u.region.count) ||
        (msg.cmd == VFU_CMD_MIG_DATA_READ && request->room < msg.u.mig_data.size))
        return -EINVAL;
    if (!client->main.conn)
        return -EPIPE;
    if (!posted && client->in_flight == client->desc.max_in_flight)
        return -EAGAIN;
    int id = vfux_client_start(client, &msg, request->fds, request->fd_count);
    if (id < 0)
        return id;
    if (posted) {
        client->posted = client->submitted;
        client->posted_waits = true;
        return id;
    }
    vfux_call *call = vfux_call_start(client, &msg);
    call->buf = request->buf;
    call->room = request->room;
    call->received = request->received;
    call->max_received = request->max_received;
    call->done.user = request->user;
    client->in_flight++;
    return id;
}

static vfu_msg vfux_region_msg(uint16_t cmd, uint32_t region, uint64_t offset, const void *data, uint32_t count)
{
    vfu_msg msg;
    vfu_msg_init(&msg, 0, cmd);
    msg.u.region.region = region;
    msg.u.region.offset = offset;
    msg.u.region.count = count;
    msg.u.region.data = data;
    msg.u.region.data_len = data ? count : 0;
    return msg;
}

VFU_API int vfu_client_submit_read(vfu_client *client, uint32_t region, uint64_t offset, void *buf, uint32_t len, void *user)
{
    if (len > client->server_xfer)
        return -EINVAL;
    vfu_client_request request = {.msg = vfux_region_msg(VFU_CMD_REGION_READ, region, offset, NULL, len),
                                  .buf = buf,
                                  .room = len,
                                  .user = user};
    return vfu_client_submit(client, &request);
}

static int vfux_client_submit_write(vfu_client *client, uint32_t flags, uint32_t region, uint64_t offset, const void *buf,
                                    uint32_t len, void *user)
{
    if (len > client->server_xfer)
        return -EINVAL;
    vfu_client_request request = {.msg = vfux_region_msg(VFU_CMD_REGION_WRITE, region, offset, buf, len), .user = user};
    request.msg.flags = flags;
    return vfu_client_submit(client, &request);
}

VFU_API int vfu_client_submit_write(vfu_client *client, uint32_t region, uint64_t offset, const void *buf, uint32_t len,
                                    void *user)
{
    return vfux_client_submit_write(client, 0, region, offset, buf, len, user);
}

VFU_API int vfu_client_post_write(vfu_client *client, uint32_t region, uint64_t offset, const void *buf, uint32_t len)
{
    int id = vfux_client_submit_write(client, VFU_HDR_NO_REPLY, region, offset, buf, len, NULL);
    return id < 0 ? id : 0;
}

VFU_API unsigned vfu_client_in_flight(const vfu_client *client) { return client->in_flight; }

static int vfux_client_take(vfu_client *client, vfux_call *call, vfu_completion *out)
{
    *out = call->done;
    client->in_flight--;
    vfux_call_release(client, call);
    return 1;
}

VFU_API int vfu_client_poll(vfu_client *client, vfu_completion *out)
{
    int err = 0;
    if (!client->done.first && vfux_client_has_more(client))
        err = vfux_client_handle_all(client, NULL);
    if (!err && !client->done.first && client->main.conn) {
        err = vfux_client_flush_all(client, NULL);
        if (!err)
            err = vfux_client_receive(client, &client->main, NULL);
        if (!err && client->twin.conn)
            err = vfux_client_receive(client, &client->twin, NULL);
        if (!err)
            err = vfux_client_flush_all(client, NULL); /* answers to the device */
        if (!err)
            err = vfux_client_expire(client);
    }
    if (client->done.first)
        return vfux_client_take(client, vfux_call_at(client, client->done.first), out);
    return err ? err : client->main.conn ? 0 : -EPIPE;
}

VFU_API int vfu_client_wait(vfu_client *client, int id, vfu_completion *out)
{
    for (;;) {
        uint32_t first = client->done.first ? client->done.first : client->flight.first;
        vfux_call *call = id == VFU_CLIENT_ANY          ? vfux_call_at(client, first)
                          : id >= 0 && id <= UINT16_MAX ? vfux_call_find(client, (uint16_t)id)
                                                        : NULL;
        if (!call)
            return client->main.conn || id != VFU_CLIENT_ANY ? -ENOENT : -EPIPE;
        if (call->state == VFUX_CALL_DONE)
            return vfux_client_take(client, call, out);
        vfux_client_step(client, -1, UINT64_MAX, NULL); /* if it breaks, all are completed */
    }
}

VFU_API int vfu_client_call(vfu_client *client, vfu_msg *request, const int *fds, unsigned fd_count, vfu_msg *reply,
                            int *received, unsigned max_received)
{
    uint64_t until = vfux_now_ms() + client->desc.timeout_ms;
    int id, err = 0;
    for (unsigned i = 0; i < max_received; i++)
        received[i] = -1;
    request->flags = VFU_HDR_COMMAND;
    while (err >= 0 && (id = vfux_client_start(client, request, fds, fd_count)) == -EAGAIN) /* the queue is full */
        err = vfux_now_ms() < until ? vfux_client_step(client, -1, until, NULL)
                                    : vfux_client_break(client, -ETIMEDOUT, "it takes no more requests");
    if (err < 0 || id < 0) {
        *reply = (vfu_msg){0};
        return err < 0 ? err : id;
    }
    vfux_call *call = vfux_call_start(client, request);
    call->in_place = true;
    call->received = received;
    call->max_received = max_received;
    int step = 0;
    while (step >= 0 && call->state != VFUX_CALL_DONE)
        step = vfux_client_step(client, -1, UINT64_MAX, call);
    *reply = call->done.reply; /* of a broken connection: zero */
    err = call->done.result;
    vfux_call_release(client, call);
    if (!err && !client->main.conn) { /* it broke in the step in which the reply came: the views are dead */
        memset(reply, 0, sizeof(*reply));
        vfux_close_all(received, max_received);
        err = step;
    }
    return err;
}

/* One without descriptors; its reply takes its place. */
static int vfux_client_ask(vfu_client *client, vfu_msg *msg) { return vfu_client_call(client, msg, NULL, 0, msg, NULL, 0); }

VFU_API int vfu_client_serve(vfu_client *client, int wake_fd, int timeout_ms)
{
    uint64_t until = timeout_ms < 0 ? UINT64_MAX : vfux_now_ms() + (unsigned)timeout_ms;
    if (!client->main.conn)
        return -EPIPE;
    /* What is there is served at least once, also when no time is left. */
    int woken = 0;
    do
        woken = vfux_client_step(client, wake_fd, until, NULL);
    while (!woken && vfux_now_ms() < until);
    return woken;
}

/* ---- connecting --------------------------------------------------------------------------------------------------------- */

/* The twin socket that the server's VERSION reply names, if it was asked for one. It is in fds, and is taken. */
static int vfux_client_take_twin(vfu_client *client, int fds[VFU_FDS_MAX])
{
    int32_t at = client->server.twin_fd_index;
    int type = 0, fd;
    socklen_t len = sizeof(type);
    if (!client->desc.twin_socket || !client->server.twin_socket)
        return 0;
    if (at < 0 || at >= VFU_FDS_MAX || fds[at] < 0 || getsockopt(fds[at], SOL_SOCKET, SO_TYPE, &type, &len) < 0 ||
        type != SOCK_STREAM)
        return vfux_client_break(client, -EPROTO, "its twin socket isn't there, or is none");
    fd = fds[at];
    fds[at] = -1;
    vfu_conn_desc desc = {.fd = fd, .max_msg = client->desc.max_data_xfer_size + VFUX_PAGE, .alloc = client->desc.alloc};
    int err = vfu_conn_create(&client->twin.conn, &desc);
    return err ? vfux_client_break(client, err, "") : 0;
}

static int vfux_client_greet(vfu_client *client)
{
    char json[VFU_CAPS_WRITE_MAX];
    int fds[VFU_FDS_MAX];
    vfu_caps own;
    vfu_msg request, reply;
    vfu_caps_defaults(&own);
    own.present =
        VFU_CAPS_MAX_MSG_FDS | VFU_CAPS_MAX_DATA_XFER_SIZE | VFU_CAPS_MAX_DMA_MAPS | VFU_CAPS_PGSIZES | VFU_CAPS_WRITE_MULTIPLE;
    own.max_msg_fds = VFU_FDS_MAX;
    own.max_data_xfer_size = client->desc.max_data_xfer_size;
    own.max_dma_maps = client->desc.max_dma_maps;
    own.write_multiple = true;
    if (client->desc.twin_socket) {
        own.present |= VFU_CAPS_TWIN_SOCKET;
        own.twin_socket = true;
    }
    int len = vfu_caps_write(&own, json, sizeof(json));
    vfu_caps_defaults(&client->server);
    vfu_msg_init(&request, 0, VFU_CMD_VERSION);
    request.u.version.json = json;
    request.u.version.json_len = (uint32_t)len - 1;
    int err = vfu_client_call(client, &request, NULL, 0, &reply, fds, VFU_FDS_MAX);
    if (err)
        return err;
    if (reply.u.version.major != 0 || reply.u.version.minor != 0 ||
        vfu_caps_parse(reply.u.version.json, reply.u.version.json_len, &client->server) != 0 ||
        !client->server.max_data_xfer_size)
        err = vfux_client_break(client, -EPROTO, "its VERSION reply is of no use");
    else
        err = vfux_client_take_twin(client, fds);
    vfux_close_all(fds, VFU_FDS_MAX);
    client->server_xfer = (uint32_t)vfux_min(client->server.max_data_xfer_size, client->desc.max_data_xfer_size);
    return err;
}

/* Takes fd and negotiates over it. */
static int vfux_client_begin(vfu_client *client, int fd)
{
    vfu_conn_desc desc = {.fd = fd, .max_msg = client->desc.max_data_xfer_size + VFUX_PAGE, .alloc = client->desc.alloc};
    int err = vfu_conn_create(&client->main.conn, &desc);
    if (err)
        return err;
    vfux_conn_let_wait(client->main.conn, VFUX_SOON_MS);
    err = vfux_client_greet(client);
    if (err && client->main.conn)
        vfux_client_break(client, err, "");
    return err;
}

/* A server that is busy has a backlog that can be full, for which connect() would wait for ever. */
static int vfux_client_dial(const char *path, uint32_t timeout_ms)
{
    uint64_t until = vfux_now_ms() + timeout_ms;
    for (;;) {
        int fd = vfux_sock_connect(path, SOCK_NONBLOCK);
        if (fd != -EAGAIN)
            return fd;
        if (vfux_now_ms() >= until)
            return -ETIMEDOUT;
        nanosleep(&(struct timespec){.tv_nsec = VFUX_CONNECT_PAUSE_MS * 1000000}, NULL);
    }
}

static void vfux_told_removed(void *ctx, const vfu_iommu_mapping *mapping);

static int vfux_client_create_tables(vfu_client *client)
{
    const vfu_client_desc *desc = &client->desc;
    vfu_iommu_desc iommu = {.max_mappings = desc->max_dma_maps, .max_readers = 1, .granule = VFUX_PAGE, .alloc = desc->alloc};
    int err = vfu_iommu_create(&client->iommu, &iommu);
    if (!err)
        err = vfu_iommu_reader_open_local(client->iommu, &client->reader);
    iommu.removed = vfux_told_removed;
    iommu.ctx = client;
    iommu.cache_entries = 1;
    if (!err && desc->reconnects)
        err = vfu_iommu_create(&client->told, &iommu);
    if (err)
        return err;
    client->call_count = desc->max_in_flight + 1;
    client->id_mask = 1;
    while (client->id_mask < 2 * client->call_count)
        client->id_mask = client->id_mask << 1 | 1;
    client->data = vfux_allocate(&desc->alloc, desc->max_data_xfer_size);
    client->calls = vfux_allocate_zero(&desc->alloc, client->call_count * sizeof(*client->calls));
    client->ids = vfux_allocate_zero(&desc->alloc, (client->id_mask + 1) * sizeof(*client->ids));
    if (!client->data || !client->calls || !client->ids)
        return -ENOMEM;
    for (uint32_t i = 0; i < client->call_count; i++)
        vfux_calls_append(client, &client->free, &client->calls[i]);
    return 0;
}

VFU_API int vfu_client_attach(vfu_client **out, int fd, const vfu_client_desc *given)
{
    vfu_client_desc desc = given ? *given : (vfu_client_desc){0};
    vfu_client *client = NULL;
    *out = NULL;
    if (!desc.timeout_ms)
        desc.timeout_ms = 5000;
    if (!desc.max_data_xfer_size)
        desc.max_data_xfer_size = VFUX_XFER_DEFAULT;
    if (!desc.max_dma_maps)
        desc.max_dma_maps = 65535;
    if (!desc.max_in_flight)
        desc.max_in_flight = VFUX_IN_FLIGHT_DEFAULT;
    int err =
        desc.max_data_xfer_size < VFUX_PAGE || desc.max_data_xfer_size > VFUX_XFER_MAX || desc.max_in_flight > VFUX_IN_FLIGHT_MAX
            ? -EINVAL
            : 0;
    if (!err && !(client = vfux_allocate_zero(&desc.alloc, sizeof(*client))))
        err = -ENOMEM;
    if (client) {
        client->desc = desc;
        err = vfux_client_create_tables(client);
    }
    if (err)
        vfux_close(&fd);
    else
        err = vfux_client_begin(client, fd);
    if (err)
        vfu_client_destroy(client);
    else
        *out = client;
    return err;
}

VFU_API int vfu_client_connect(vfu_client **out, const char *path, const vfu_client_desc *desc)
{
    int fd = vfux_client_dial(path, desc && desc->timeout_ms ? desc->timeout_ms : 5000);
    *out = NULL;
    return fd < 0 ? fd : vfu_client_attach(out, fd, desc);
}

static void vfux_known_close(vfu_client *client, vfux_known *known);

VFU_API void vfu_client_destroy(vfu_client *client)
{
    if (!client)
        return;
    vfu_alloc alloc = client->desc.alloc;
    vfux_line_close(&client->main);
    vfux_line_close(&client->twin);
    for (vfux_known *known = client->known, *next; known; known = next) {
        next = known->next;
        vfux_known_close(client, known);
        vfux_free(&alloc, (void *)(uintptr_t)known->said.areas, known->said.area_count * sizeof(*known->said.areas));
        vfux_free(&alloc, known, sizeof(*known));
    }
    for (vfux_told_irq *told = client->told_irqs, *next; told; told = next) {
        next = told->next;
        vfux_close_all(told->fds, told->count);
        vfux_free(&alloc, told->fds, told->count * sizeof(*told->fds));
        vfux_free(&alloc, told, sizeof(*told));
    }
    vfu_iommu_destroy(client->told);
    vfu_iommu_reader_close(client->reader);
    vfu_iommu_destroy(client->iommu);
    vfux_free(&alloc, client->areas, client->area_room * sizeof(*client->areas));
    vfux_free(&alloc, client->ids, (client->id_mask + 1) * sizeof(*client->ids));
    vfux_free(&alloc, client->calls, client->call_count * sizeof(*client->calls));
    vfux_free(&alloc, client->data, client->desc.max_data_xfer_size);
    vfux_free(&alloc, client, sizeof(*client));
}

VFU_API int vfu_client_fd(const vfu_client *client) { return client->main.conn ? vfu_conn_fd(client->main.conn) : -1; }
VFU_API const vfu_caps *vfu_client_caps(const vfu_client *client) { return &client->server; }
VFU_API vfu_iommu *vfu_client_iommu(vfu_client *client) { return client->iommu; }

/* ---- what the device is ------------------------------------------------------------------------------------------------- */

VFU_API int vfu_client_info(vfu_client *client, vfu_wire_device_info *out)
{
    vfu_msg msg;
    vfu_msg_init(&msg, 0, VFU_CMD_DEVICE_GET_INFO);
    msg.u.device_info.argsz = sizeof(vfu_wire_device_info);
    int err = vfux_client_ask(client, &msg);
    if (err < 0)
        return err;
    *out = (vfu_wire_device_info){
        .argsz = msg.u.device_info.argsz,
        .flags = msg.u.device_info.flags,
        .num_regions = msg.u.device_info.num_regions,
        .num_irqs = msg.u.device_info.num_irqs,
    };
    client->info = *out;
    client->info_known = true;
    return 0;
}

VFU_API int vfu_client_irq_info(vfu_client *client, uint32_t index, vfu_wire_irq_info *out)
{
    vfu_msg msg;
    vfu_msg_init(&msg, 0, VFU_CMD_DEVICE_GET_IRQ_INFO);
    msg.u.irq_info.argsz = sizeof(vfu_wire_irq_info);
    msg.u.irq_info.index = index;
    *out = (vfu_wire_irq_info){0};
    int err = vfux_client_ask(client, &msg);
    if (err < 0)
        return err;
    *out = (vfu_wire_irq_info){
        .argsz = msg.u.irq_info.argsz,
        .flags = msg.u.irq_info.flags,
        .index = index,
        .count = msg.u.irq_info.count,
    };
    return 0;
}

/* Room for `count` areas, which came in one message. */
static int vfux_client_grow_areas(vfu_client *client, uint32_t count)
{
    if (count <= client->area_room)
        return 0;
    vfu_wire_sparse_area *areas = vfux_allocate(&client->desc.alloc, count * sizeof(*areas));
    if (!areas)
        return -ENOMEM;
    vfux_free(&client->desc.alloc, client->areas, client->area_room * sizeof(*areas));
    client->areas = areas;
    client->area_room = count;
    return 0;
}

/* Copies the capabilities of a region info reply, which were checked when it came. */
static int vfux_client_copy_caps(vfu_client *client, const vfu_msg *reply, vfu_client_region *out)
{
    vfu_region_cap cap = {0};
    vfu_wire_cap_type type;
    uint32_t count;
    while (vfu_msg_next_cap(reply, &cap)) {
        if (vfu_region_cap_type(&cap, &type) == 0) {
            out->type = type.type;
            out->subtype = type.subtype;
        }
        if (cap.id != VFU_REGION_CAP_SPARSE_MMAP || vfu_region_cap_areas(&cap, &count))
            continue;
        int err = vfux_client_grow_areas(client, count);
        if (err)
            return err;
        for (uint32_t i = 0; i < count; i++)
            vfu_region_cap_area(&cap, i, &client->areas[i]);
        out->area_count = count;
    }
    out->areas = client->areas;
    return 0;
}

static bool vfux_regions_equal(const vfu_client_region *a, const vfu_client_region *b)
{
    return a->flags == b->flags && a->size == b->size && a->type == b->type && a->subtype == b->subtype &&
           a->area_count == b->area_count && (!a->area_count || !memcmp(a->areas, b->areas, a->area_count * sizeof(*a->areas)));
}

/* Notes what the server said about a region, for reconnecting. */
static int vfux_client_note_region(vfu_client *client, uint32_t index, const vfu_client_region *said)
{
    const vfu_alloc *alloc = &client->desc.alloc;
    size_t len = said->area_count * sizeof(*said->areas);
    vfux_known *known = client->known;
    while (known && known->index != index)
        known = known->next;
    if (known && vfux_regions_equal(&known->said, said)) {
        known->said.offset = said->offset;
        return 0;
    }
    vfu_wire_sparse_area *areas = said->area_count ? vfux_allocate(alloc, len) : NULL;
    vfux_known *made = known ? known : vfux_allocate_zero(alloc, sizeof(*made));
    if (!made || (said->area_count && !areas)) {
        vfux_free(alloc, areas, len);
        if (!known)
            vfux_free(alloc, made, sizeof(*made));
        return -ENOMEM;
    }
    if (known) {
        vfux_free(alloc, (void *)(uintptr_t)known->said.areas, known->said.area_count * sizeof(*areas));
    } else {
        made->index = index;
        made->next = client->known;
        client->known = made;
    }
    if (areas)
        memcpy(areas, said->areas, len);
    made->said = *said;
    made->said.fd = -1;
    made->said.areas = areas;
    return 0;
}

/* What vfu_client_region_info does, without noting it. */
static int vfux_client_ask_region(vfu_client *client, uint32_t index, vfu_client_region *out)
{
    vfu_msg request, reply;
    int err = 0;
    *out = (vfu_client_region){.fd = -1};
    vfu_msg_init(&request, 0, VFU_CMD_DEVICE_GET_REGION_INFO);
    request.u.region_info.index = index;
    request.u.region_info.argsz = sizeof(vfu_wire_region_info);
    for (unsigned tries = 0; tries < 2 && !err; tries++) { /* the second time with the size that the first reply announced */
        vfux_close(&out->fd);
        err = vfu_client_call(client, &request, NULL, 0, &reply, &out->fd, 1);
        if (err || reply.u.region_info.argsz <= request.u.region_info.argsz)
            break;
        request.u.region_info.argsz = (uint32_t)vfux_min(reply.u.region_info.argsz, client->desc.max_data_xfer_size);
    }
    if (!err && reply.u.region_info.truncated)
        err = vfux_client_break(client, -EPROTO, "a region's description is cut however much of it is asked for");
    if (!err) {
        out->flags = reply.u.region_info.flags;
        out->size = reply.u.region_info.size;
        out->offset = reply.u.region_info.offset;
        err = vfux_client_copy_caps(client, &reply, out);
    }
    if (!err && !(out->flags & VFU_REGION_INFO_MMAP))
        vfux_close(&out->fd); /* of no use */
    if (err)
        vfux_close(&out->fd);
    return err;
}

VFU_API int vfu_client_region_info(vfu_client *client, uint32_t index, vfu_client_region *out)
{
    int err = vfux_client_ask_region(client, index, out);
    if (!err && client->desc.reconnects)
        err = vfux_client_note_region(client, index, out);
    if (err)
        vfux_close(&out->fd);
    return err;
}

VFU_API int vfu_client_io_fds(vfu_client *client, uint32_t region, vfu_client_io_fd *out, uint32_t max, int fds[VFU_FDS_MAX])
{
    vfu_msg request, reply;
    vfu_msg_init(&request, 0, VFU_CMD_DEVICE_GET_REGION_IO_FDS);
    request.u.region_io_fds.index = region;
    request.u.region_io_fds.argsz = VFUX_PAGE;
    for (unsigned tries = 0;; tries++) { /* the second time with the size that the first reply announced */
        int err = vfu_client_call(client, &request, NULL, 0, &reply, fds, VFU_FDS_MAX);
        if (err)
            return err;
        if (tries || !reply.u.region_io_fds.truncated)
            break;
        vfux_close_all(fds, VFU_FDS_MAX);
        request.u.region_io_fds.argsz = (uint32_t)vfux_min(reply.u.region_io_fds.argsz, client->desc.max_data_xfer_size);
    }
    if (reply.u.region_io_fds.truncated) {
        vfux_close_all(fds, VFU_FDS_MAX);
        return vfux_client_break(client, -EPROTO, "a region's descriptors are cut however much of them is asked for");
    }
    for (uint32_t i = 0; i < max && i < reply.u.region_io_fds.count; i++)
        vfux_client_io_fd(&reply, i, &out[i]);
    return (int)vfux_min(reply.u.region_io_fds.count, INT_MAX);
}

/* ---- accesses without a message ----------------------------------------------------------------------------------------- */

/* Loads or stores of [host, host + len), naturally aligned and as wide as they can be. */
typedef struct vfux_direct {
    uint8_t *host;
    uint8_t *in;        /* NULL: store */
    const uint8_t *out; /* NULL: load */
    size_t len;
} vfux_direct;

/* A word of one type, in one access. */
#define VFUX_DIRECT_WORD(type, d) \
    do { \
        type word_; \
        if ((d)->in) { \
            word_ = *(volatile type *)(void *)(d)->host; \
            memcpy((d)->in, &word_, sizeof(word_)); \
        } else { \
            memcpy(&word_, (d)->out, sizeof(word_)); \
            *(volatile type *)(void *)(d)->host = word_; \
        } \
    } while (0)

static void vfux_direct_body(void *arg)
{
    vfux_direct d = *(vfux_direct *)arg;
    while (d.len) {
        size_t width = sizeof(uintptr_t); /* the widest that every machine accesses at once */
        while (width > d.len || (uintptr_t)d.host & (width - 1))
            width /= 2;
        switch (width) {
        case 1: VFUX_DIRECT_WORD(uint8_t, &d); break;
        case 2: VFUX_DIRECT_WORD(uint16_t, &d); break;
        case 4: VFUX_DIRECT_WORD(uint32_t, &d); break;
        default: VFUX_DIRECT_WORD(uint64_t, &d); break;
        }
        d.host += width;
        d.len -= width;
        if (d.in)
            d.in += width;
        else
            d.out += width;
    }
}
#undef VFUX_DIRECT_WORD

static int vfux_direct_access(uint8_t *host, void *in, const void *out, size_t len)
{
    vfux_direct direct = {.host = host, .in = in, .out = out, .len = len};
    const void *bad = NULL;
    __sync_synchronize(); /* a doorbell is behind what it rings for, a status in front of what it tells of */
    int err = vfux_guard(NULL, vfux_direct_body, &direct, &bad);
    __sync_synchronize();
    return err;
}

/* The page size of a file that can be mapped without giving the server a hold on us, 0 for anything else: a file system of its
 * own could let a page fault wait for ever. */
static uint64_t vfux_client_page_of(int fd)
{
    struct stat st;
    struct statfs fs;
    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || fstatfs(fd, &fs) < 0 || (uint32_t)fs.f_type == VFUX_FUSE)
        return 0;
    return (uint64_t)((uint32_t)fs.f_type == VFUX_HUGETLBFS ? (long)fs.f_bsize : sysconf(_SC_PAGESIZE));
}

/* Maps [offset, offset + size) of a file, which must be whole pages. NULL: it can't be. */
static uint8_t *vfux_client_mmap(int fd, uint64_t offset, uint64_t size, uint32_t flags)
{
    uint64_t page = vfux_client_page_of(fd);
    int prot = (flags & VFU_REGION_INFO_READ ? PROT_READ : 0) | (flags & VFU_REGION_INFO_WRITE ? PROT_WRITE : 0);
    if (!page || !size || (offset | size) & (page - 1) || size > SIZE_MAX / 2)
        return NULL;
    void *base = mmap(NULL, (size_t)size, prot, MAP_SHARED | MAP_NORESERVE, fd, (off_t)offset);
    return base == MAP_FAILED ? NULL : base;
}

static void vfux_known_close(vfu_client *client, vfux_known *known)
{
    for (uint32_t i = 0; i < known->window_count; i++)
        munmap(known->windows[i].base, (size_t)known->windows[i].size);
    for (uint32_t i = 0; i < known->io_count; i++) {
        if (known->ios[i].shadow)
            munmap(known->ios[i].shadow_map, known->ios[i].shadow_len);
        vfux_close(&known->ios[i].fd);
    }
    vfux_free(&client->desc.alloc, known->windows, known->window_room * sizeof(*known->windows));
    vfux_free(&client->desc.alloc, known->ios, known->io_room * sizeof(*known->ios));
    known->windows = NULL;
    known->ios = NULL;
    known->how = known->window_count = known->window_room = known->io_count = known->io_room = 0;
}

static int vfux_window_order(const void *a, const void *b)
{
    uint64_t x = ((const vfux_direct_window *)a)->offset, y = ((const vfux_direct_window *)b)->offset;
    return (x > y) - (x < y);
}

/* Maps the areas of a region. fd is borrowed. */
static int vfux_known_map(vfu_client *client, vfux_known *known, const vfu_client_region *said)
{
    vfu_wire_sparse_area whole = {0, said->size};
    const vfu_wire_sparse_area *areas = said->area_count ? said->areas : &whole;
    uint32_t count = said->area_count ? (uint32_t)vfux_min(said->area_count, VFUX_CLIENT_WINDOWS) : 1;
    if (!(said->flags & VFU_REGION_INFO_MMAP))
        return 0;
    if (!vfux_client_page_of(said->fd))
        return -ENODEV;
    known->windows = vfux_allocate(&client->desc.alloc, count * sizeof(*known->windows));
    if (!known->windows)
        return -ENOMEM;
    known->window_room = count;
    pthread_once(&vfux_guard_once, vfux_guard_install);
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *base = vfux_client_mmap(said->fd, said->offset + areas[i].offset, areas[i].size, said->flags);
        if (base)
            known->windows[known->window_count++] = (vfux_direct_window){areas[i].offset, areas[i].size, base};
    }
    qsort(known->windows, known->window_count, sizeof(*known->windows), vfux_window_order);
    return 0;
}

/* Maps the word that an ioeventfd's value goes to. */
static int vfux_known_add_shadow(vfux_direct_io *out, int fd, uint64_t offset)
{
    uint64_t page = vfux_client_page_of(fd), skip = offset & (page - 1);
    if (!page || offset > INT64_MAX - page || skip > page - 8)
        return -ENODEV;
    out->shadow_map = vfux_client_mmap(fd, offset - skip, page, VFU_REGION_INFO_READ | VFU_REGION_INFO_WRITE);
    if (!out->shadow_map)
        return -ENODEV;
    pthread_once(&vfux_guard_once, vfux_guard_install);
    out->shadow_len = (size_t)page;
    out->shadow = (uint8_t *)out->shadow_map + (size_t)skip;
    return 0;
}

/* Takes one ioeventfd into use. fds are borrowed. */
static int vfux_known_add_io(vfux_known *known, const vfu_client_io_fd *io, const int *fds)
{
    vfux_direct_io *out = &known->ios[known->io_count++];
    *out = (vfux_direct_io){.io = *io, .fd = -1};
    if (!vfux_is_eventfd(fds[io->fd_index]))
        return -ENODEV;
    out->fd = fcntl(fds[io->fd_index], F_DUPFD_CLOEXEC, 0);
    int err = out->fd < 0 ? -errno : vfux_set_flags(out->fd);
    if (err)
        return err;
    return io->shadow_index < 0 ? 0 : vfux_known_add_shadow(out, fds[io->shadow_index], io->shadow_offset);
}

static int vfux_known_take_ios(vfu_client *client, vfux_known *known)
{
    const vfu_alloc *alloc = &client->desc.alloc;
    int fds[VFU_FDS_MAX], err = 0;
    vfu_client_io_fd *list = vfux_allocate(alloc, VFUX_CLIENT_IO_FDS * sizeof(*list));
    if (!list)
        return -ENOMEM;
    int count = vfu_client_io_fds(client, known->index, list, VFUX_CLIENT_IO_FDS, fds);
    if (count < 0 && !client->main.conn)
        err = count; /* else the server doesn't know the command: there are none */
    if (count > 0) {
        known->io_room = (uint32_t)vfux_min((uint32_t)count, VFUX_CLIENT_IO_FDS);
        known->ios = vfux_allocate(alloc, known->io_room * sizeof(*known->ios));
        err = known->ios ? 0 : -ENOMEM;
        for (uint32_t i = 0; !err && i < known->io_room; i++)
            if (list[i].type == VFU_IO_FD_IOEVENTFD || list[i].type == VFUX_IO_FD_SHADOW)
                err = vfux_known_add_io(known, &list[i], fds);
    }
    vfux_close_all(fds, VFU_FDS_MAX);
    vfux_free(alloc, list, VFUX_CLIENT_IO_FDS * sizeof(*list));
    return err;
}

static vfux_known *vfux_known_find(const vfu_client *client, uint32_t index)
{
    vfux_known *known = client->known;
    while (known && known->index != index)
        known = known->next;
    return known;
}

VFU_API int vfu_client_region_open(vfu_client *client, uint32_t index, uint32_t how)
{
    vfu_client_region said;
    vfux_known *known = vfux_known_find(client, index);
    if (how & ~(VFU_CLIENT_BY_MEMORY | VFU_CLIENT_BY_EVENTFD))
        return -EINVAL;
    if (known)
        vfux_known_close(client, known);
    if (!how)
        return 0;
    int err = vfux_client_ask_region(client, index, &said);
    if (!err)
        err = vfux_client_note_region(client, index, &said);
    known = vfux_known_find(client, index);
    if (!err && how & VFU_CLIENT_BY_MEMORY)
        err = vfux_known_map(client, known, &said);
    vfux_close(&said.fd);
    if (!err && how & VFU_CLIENT_BY_EVENTFD)
        err = vfux_known_take_ios(client, known);
    if (err && known)
        vfux_known_close(client, known);
    else if (!err)
        known->how = how;
    return err;
}

/* ---- regions ------------------------------------------------------------------------------------------------------------ */

/* The part of [offset, offset + len) that can be accessed at once: in a window, which *host is in then, or up to the next. */
static size_t vfux_known_part(const vfux_known *known, uint64_t offset, size_t len, uint8_t **host)
{
    uint32_t low = 0, high = known->window_count;
    *host = NULL;
    while (low < high) { /* the first window behind offset */
        uint32_t middle = low + (high - low) / 2;
        if (known->windows[middle].offset <= offset)
            low = middle + 1;
        else
            high = middle;
    }
    if (low && offset - known->windows[low - 1].offset < known->windows[low - 1].size) {
        uint64_t skip = offset - known->windows[low - 1].offset;
        *host = known->windows[low - 1].base + (size_t)skip;
        return (size_t)vfux_min(len, known->windows[low - 1].size - skip);
    }
    return low < known->window_count ? (size_t)vfux_min(len, known->windows[low].offset - offset) : len;
}

/* May accesses to a region go past the requests that are under way? There are none that they could overtake. */
static const vfux_known *vfux_client_direct(const vfu_client *client, uint32_t region, uint32_t flag)
{
    const vfux_known *known = client->known ? vfux_known_find(client, region) : NULL;
    bool allowed = known && known->how && known->said.flags & flag && client->main.conn;
    return allowed && !client->flight.first && !client->posted_waits ? known : NULL;
}

/* A number of 1, 2, 4 or 8 bytes. */
static uint64_t vfux_number(const void *bytes, size_t width)
{
    uint16_t u16;
    uint32_t u32;
    uint64_t u64;
    switch (width) {
    case 1: return *(const uint8_t *)bytes;
    case 2: memcpy(&u16, bytes, 2); return u16;
    case 4: memcpy(&u32, bytes, 4); return u32;
    default: memcpy(&u64, bytes, 8); return u64;
    }
}

/* Signals the ioeventfd that a write hits. 1: one was; 0: none is hit. */
static int vfux_known_signal(const vfux_known *known, uint64_t offset, const void *buf, size_t len)
{
    enum { DATAMATCH = 1 }; /* KVM_IOEVENTFD_FLAG_DATAMATCH */
    for (uint32_t i = 0; i < known->io_count; i++) {
        const vfux_direct_io *io = &known->ios[i];
        if (io->io.offset != offset || len > 8 || len & (len - 1) || (io->io.size && io->io.size != len))
            continue;
        if (io->io.flags & DATAMATCH && vfux_number(buf, len) != io->io.data)
            continue;
        int err = io->shadow ? vfux_direct_access(io->shadow, NULL, buf, len) : 0;
        struct pollfd ready = {.fd = io->fd, .events = POLLOUT}; /* full: it is signalled already */
        if (!err && poll(&ready, 1, 0) > 0)
            vfux_event_write(io->fd, 1);
        return err ? err : 1;
    }
    return 0;
}

/* One REGION_READ or REGION_WRITE. */
static int vfux_client_access_region(vfu_client *client, uint16_t cmd, uint32_t region, uint64_t offset, uint8_t *in,
                                     const uint8_t *out, uint32_t count)
{
    vfu_msg msg = vfux_region_msg(cmd, region, offset, out, count);
    int err = vfux_client_ask(client, &msg);
    if (!err && in)
        memcpy(in, msg.u.region.data, count);
    return err;
}

/* Reads (in) or writes (out), in parts, each by memory or by message. */
static int vfux_client_access_parts(vfu_client *client, uint32_t region, uint64_t offset, uint8_t *in, const uint8_t *out,
                                    size_t len)
{
    const vfux_known *known = vfux_client_direct(client, region, in ? VFU_REGION_INFO_READ : VFU_REGION_INFO_WRITE);
    int err = 0;
    if (out && known && known->io_count && len && (err = vfux_known_signal(known, offset, out, len)) != 0)
        return err < 0 ? err : 0;
    for (size_t done = 0, part; done < len && !err; done += part) {
        uint8_t *host = NULL;
        part = known && known->window_count ? vfux_known_part(known, offset + done, len - done, &host) : len - done;
        if (host) {
            err = vfux_direct_access(host, in ? in + done : NULL, out ? out + done : NULL, part);
            continue;
        }
        part = (size_t)vfux_min(part, client->server_xfer);
        err = vfux_client_access_region(client, in ? VFU_CMD_REGION_READ : VFU_CMD_REGION_WRITE, region, offset + done,
                                        in ? in + done : NULL, out ? out + done : NULL, (uint32_t)part);
    }
    return err;
}

VFU_API int vfu_client_region_read(vfu_client *client, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    return vfux_client_access_parts(client, region, offset, buf, NULL, len);
}

VFU_API int vfu_client_region_write(vfu_client *client, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    return vfux_client_access_parts(client, region, offset, NULL, buf, len);
}

VFU_API int vfu_client_write_multi(vfu_client *client, const vfu_wire_write_one *writes, uint32_t count)
{
    uint32_t room = client->server_xfer / (uint32_t)sizeof(*writes), done = 0;
    for (uint32_t i = 0; i < count; i++)
        if (writes[i].count > sizeof(writes[i].data))
            return -EINVAL;
    while (done < count) {
        uint32_t part = (uint32_t)vfux_min(count - done, vfux_min(room, INT_MAX - done));
        vfu_msg msg;
        int err;
        if (!client->server.write_multiple || !part) {
            err = vfux_client_access_region(client, VFU_CMD_REGION_WRITE, writes[done].region, writes[done].offset, NULL,
                                            writes[done].data, writes[done].count);
            part = 1;
        } else {
            vfu_msg_init(&msg, 0, VFU_CMD_REGION_WRITE_MULTI);
            msg.u.write_multi.count = part;
            msg.u.write_multi.data = (const uint8_t *)&writes[done];
            msg.u.write_multi.data_len = part * (uint32_t)sizeof(*writes);
            err = vfux_client_ask(client, &msg);
            if (!err && msg.u.write_multi.count < part)
                return (int)(done + (uint32_t)msg.u.write_multi.count);
        }
        if (err)
            return done && client->main.conn ? (int)done : err;
        done += part;
    }
    return (int)done;
}

/* ---- memory ------------------------------------------------------------------------------------------------------------- */

static void vfux_told_file_unref(vfu_client *client, vfux_told_file *file)
{
    vfux_told_file **link = &client->told_files;
    if (!file || --file->refs)
        return;
    while (*link != file)
        link = &(*link)->next;
    *link = file->next;
    vfux_close(&file->fd);
    vfux_free(&client->desc.alloc, file, sizeof(*file));
}

static void vfux_told_removed(void *ctx, const vfu_iommu_mapping *mapping)
{
    vfux_told *told = mapping->user;
    vfux_told_file_unref(ctx, told->file);
    vfux_free(&((vfu_client *)ctx)->desc.alloc, told, sizeof(*told));
}

/* One copy of a descriptor for all mappings of the same file, with a reference. */
static int vfux_told_file_get(vfu_client *client, int fd, vfux_told_file **out)
{
    struct stat st;
    int access = fcntl(fd, F_GETFL);
    vfux_told_file *file = client->told_files;
    *out = NULL;
    if (access < 0 || fstat(fd, &st) < 0)
        return -errno;
    while (file && (file->dev != st.st_dev || file->ino != st.st_ino || file->access != (access & O_ACCMODE)))
        file = file->next;
    if (!file) {
        file = vfux_allocate(&client->desc.alloc, sizeof(*file));
        int copy = file ? fcntl(fd, F_DUPFD_CLOEXEC, 0) : -1, err = file ? -errno : -ENOMEM;
        if (copy < 0) {
            vfux_free(&client->desc.alloc, file, sizeof(*file));
            return err;
        }
        *file = (vfux_told_file){client->told_files, st.st_dev, st.st_ino, access & O_ACCMODE, copy, 0};
        client->told_files = file;
    }
    file->refs++;
    *out = file;
    return 0;
}

/* Notes a mapping for reconnecting. */
static int vfux_client_note_mapping(vfu_client *client, const vfu_iommu_mapping *mapping, int fd, uint64_t offset)
{
    vfux_told *told = vfux_allocate(&client->desc.alloc, sizeof(*told));
    vfux_told_file *file = NULL;
    int err = !told ? -ENOMEM : fd >= 0 ? vfux_told_file_get(client, fd, &file) : 0;
    if (!err) {
        vfu_iommu_mapping note = *mapping;
        *told = (vfux_told){file, offset};
        note.user = told;
        err = vfu_iommu_map(client->told, &note);
    }
    if (err) {
        vfux_told_file_unref(client, file);
        vfux_free(&client->desc.alloc, told, sizeof(*told));
    }
    return err;
}

/* Tells the server of a mapping. */
static int vfux_client_send_map(vfu_client *client, const vfu_iommu_mapping *mapping, int fd, uint64_t offset)
{
    vfu_msg request, reply;
    bool with_fd = fd >= 0 && client->server.max_msg_fds;
    vfu_msg_init(&request, 0, VFU_CMD_DMA_MAP);
    request.u.dma_map.argsz = sizeof(vfu_wire_dma_map);
    request.u.dma_map.flags =
        (mapping->prot & VFU_IOMMU_READ ? VFU_DMA_READABLE : 0) | (mapping->prot & VFU_IOMMU_WRITE ? VFU_DMA_WRITEABLE : 0);
    request.u.dma_map.offset = with_fd ? offset : 0;
    request.u.dma_map.address = mapping->iova;
    request.u.dma_map.size = mapping->size;
    return vfu_client_call(client, &request, &fd, with_fd, &reply, NULL, 0);
}

VFU_API int vfu_client_dma_map(vfu_client *client, uint64_t iova, uint64_t size, uint32_t prot, void *host, int fd,
                               uint64_t offset)
{
    vfu_iommu_mapping mapping = {.iova = iova, .size = size, .prot = prot, .host = host};
    int err = vfu_iommu_map(client->iommu, &mapping);
    if (err)
        return err;
    if (client->told)
        err = vfux_client_note_mapping(client, &mapping, fd, offset);
    bool noted = client->told && !err;
    if (!err)
        err = vfux_client_send_map(client, &mapping, fd, offset);
    if (err) {
        vfu_iommu_unmap(client->iommu, iova, size);
        if (noted)
            vfu_iommu_unmap(client->told, iova, size);
    }
    return err;
}

VFU_API int vfu_client_dma_unmap(vfu_client *client, uint64_t iova, uint64_t size)
{
    vfu_msg msg;
    vfu_msg_init(&msg, 0, VFU_CMD_DMA_UNMAP);
    msg.u.dma_unmap.argsz = sizeof(vfu_wire_dma_unmap);
    msg.u.dma_unmap.address = iova;
    msg.u.dma_unmap.size = size;
    int err = vfux_client_ask(client, &msg);
    if (err)
        return err;
    if (client->told)
        vfu_iommu_unmap(client->told, iova, size);
    return vfu_iommu_unmap(client->iommu, iova, size);
}

/* ---- interrupts --------------------------------------------------------------------------------------------------------- */

static vfu_msg vfux_irq_msg(uint32_t flags, uint32_t index, uint32_t start, uint32_t count)
{
    vfu_msg msg;
    vfu_msg_init(&msg, 0, VFU_CMD_DEVICE_SET_IRQS);
    msg.u.irq_set.argsz = sizeof(vfu_wire_irq_set);
    msg.u.irq_set.flags = flags;
    msg.u.irq_set.index = index;
    msg.u.irq_set.start = start;
    msg.u.irq_set.count = count;
    return msg;
}

/* Makes room to note interrupts [0, count) of an index. */
static int vfux_told_irq_get(vfu_client *client, uint32_t index, uint32_t action, uint32_t count, vfux_told_irq **out)
{
    const vfu_alloc *alloc = &client->desc.alloc;
    vfux_told_irq *told = client->told_irqs;
    while (told && (told->index != index || told->action != action))
        told = told->next;
    if (!told) {
        told = vfux_allocate_zero(alloc, sizeof(*told));
        if (!told)
            return -ENOMEM;
        *told = (vfux_told_irq){.next = client->told_irqs, .index = index, .action = action};
        client->told_irqs = told;
    }
    if (count > told->count) {
        int *fds = vfux_allocate(alloc, count * sizeof(*fds));
        if (!fds)
            return -ENOMEM;
        for (uint32_t i = 0; i < count; i++)
            fds[i] = i < told->count ? told->fds[i] : -1;
        vfux_free(alloc, told->fds, told->count * sizeof(*fds));
        told->fds = fds;
        told->count = count;
    }
    *out = told;
    return 0;
}

/* Notes what was assigned, for reconnecting. There is room. Without a copy of a descriptor that interrupt will be lost then. */
static void vfux_told_irq_set(vfux_told_irq *told, uint32_t start, uint32_t count, const int *fds)
{
    for (uint32_t i = 0; i < count && start + i < told->count; i++) {
        vfux_close(&told->fds[start + i]);
        if (fds)
            told->fds[start + i] = fcntl(fds[i], F_DUPFD_CLOEXEC, 0);
    }
}

/* In chunks of what the server takes; *done: how many were. */
static int vfux_client_send_irqs(vfu_client *client, uint32_t action, uint32_t index, uint32_t start, uint32_t count,
                                 const int *fds, uint32_t *done)
{
    uint32_t chunk = (uint32_t)vfux_min(client->server.max_msg_fds, VFU_FDS_MAX);
    int err = chunk || !fds ? 0 : -EINVAL;
    *done = 0;
    while (*done < count && !err) {
        uint32_t part = count - *done < chunk || !fds ? count - *done : chunk;
        vfu_msg reply, request = vfux_irq_msg(VFU_IRQ_SET_DATA_EVENTFD | action, index, start + *done, part);
        err = vfu_client_call(client, &request, fds ? fds + *done : NULL, fds ? part : 0, &reply, NULL, 0);
        *done += err ? 0 : part;
    }
    return err;
}

static int vfux_client_assign(vfu_client *client, uint32_t action, uint32_t index, uint32_t start, uint32_t count, const int *fds)
{
    enum { NOTED_MAX = 65536 }; /* interrupts of an index */
    vfux_told_irq *told = NULL;
    uint32_t done;
    if (client->told && fds) {
        int err = start > NOTED_MAX || count > NOTED_MAX - start ? -EINVAL
                                                                 : vfux_told_irq_get(client, index, action, start + count, &told);
        if (err)
            return err;
    } else if (client->told) {
        vfux_told_irq_get(client, index, action, 0, &told);
    }
    int err = vfux_client_send_irqs(client, action, index, start, count, fds, &done);
    if (told)
        vfux_told_irq_set(told, start, done, fds);
    return err;
}

VFU_API int vfu_client_irq_assign(vfu_client *client, uint32_t index, uint32_t start, uint32_t count, const int *eventfds)
{
    return vfux_client_assign(client, VFU_IRQ_SET_ACTION_TRIGGER, index, start, count, eventfds);
}

VFU_API int vfu_client_irq_unmask_by(vfu_client *client, uint32_t index, uint32_t start, uint32_t count, const int *eventfds)
{
    return vfux_client_assign(client, VFU_IRQ_SET_ACTION_UNMASK, index, start, count, eventfds);
}

VFU_API int vfu_client_irq_action(vfu_client *client, uint32_t index, uint32_t start, uint32_t count, uint32_t action)
{
    vfu_msg msg = vfux_irq_msg(VFU_IRQ_SET_DATA_NONE | (action & VFU_IRQ_SET_ACTION_BITS), index, start, count);
    int err = vfux_client_ask(client, &msg);
    for (vfux_told_irq *told = client->told_irqs; told; told = told->next)
        if (!err && !count && action == VFU_IRQ_SET_ACTION_TRIGGER && told->index == index)
            vfux_told_irq_set(told, 0, told->count, NULL);
    return err;
}

VFU_API int vfu_client_reset(vfu_client *client)
{
    vfu_msg msg;
    vfu_msg_init(&msg, 0, VFU_CMD_DEVICE_RESET);
    return vfux_client_ask(client, &msg);
}

/* ---- connecting again --------------------------------------------------------------------------------------------------- */

/* Is it the device that it was? Regions that were open are opened again. */
static int vfux_client_verify(vfu_client *client)
{
    vfu_wire_device_info before = client->info, now;
    bool compare = client->info_known;
    int err = vfu_client_info(client, &now);
    if (!err && compare &&
        (before.flags != now.flags || before.num_regions != now.num_regions || before.num_irqs != now.num_irqs))
        err = -ESTALE;
    client->info = compare ? before : now;
    for (vfux_known *known = client->known; known && !err; known = known->next) {
        vfu_client_region said;
        uint32_t how = known->how;
        err = vfux_client_ask_region(client, known->index, &said);
        vfux_close(&said.fd);
        if (!err && !vfux_regions_equal(&known->said, &said))
            err = -ESTALE;
        if (!err && how)
            err = vfu_client_region_open(client, known->index, how);
        known->how = how;
    }
    return err;
}

static int vfux_client_tell_mappings(vfu_client *client)
{
    vfu_iommu_mapping mapping;
    uint64_t at = 0;
    int err = 0;
    while (!err && vfu_iommu_next(client->told, at, &mapping)) {
        const vfux_told *told = mapping.user;
        err = vfux_client_send_map(client, &mapping, told->file ? told->file->fd : -1, told->offset);
        at = mapping.iova + mapping.size;
        if (!at)
            break;
    }
    return err;
}

static int vfux_client_tell_irqs(vfu_client *client)
{
    int err = 0;
    for (vfux_told_irq *told = client->told_irqs; told; told = told->next) {
        uint32_t end, done;
        for (uint32_t i = 0; i < told->count && !err; i = end) {
            end = i + 1;
            if (told->fds[i] < 0)
                continue;
            while (end < told->count && told->fds[end] >= 0)
                end++;
            err = vfux_client_send_irqs(client, told->action, told->index, i, end - i, told->fds + i, &done);
        }
    }
    return err;
}

VFU_API int vfu_client_reattach(vfu_client *client, int fd)
{
    if (!client->desc.reconnects) {
        vfux_close(&fd);
        return -ENOTSUP;
    }
    if (client->main.conn)
        vfux_client_break(client, -EPIPE, "");
    int err = vfux_client_begin(client, fd);
    if (err)
        return err;
    err = vfux_client_verify(client);
    if (!err)
        err = vfux_client_tell_mappings(client);
    if (!err)
        err = vfux_client_tell_irqs(client);
    if (err && client->main.conn)
        vfux_client_break(client, err, "");
    return err;
}

VFU_API int vfu_client_reconnect(vfu_client *client, const char *path)
{
    if (!client->desc.reconnects)
        return -ENOTSUP;
    int fd = vfux_client_dial(path, client->desc.timeout_ms);
    return fd < 0 ? fd : vfu_client_reattach(client, fd);
}

/* ---- migration ---------------------------------------------------------------------------------------------------------- */

/* Asks for a feature, or sets it. reply_len: bytes that the payload may have in the reply. */
static int vfux_client_feature(vfu_client *client, uint32_t flags, const void *payload, uint32_t len, uint64_t reply_len,
                               vfu_msg *reply)
{
    vfu_msg request;
    vfu_msg_init(&request, 0, VFU_CMD_DEVICE_FEATURE);
    request.u.feature.argsz = (uint32_t)(sizeof(vfu_wire_feature) + vfux_max(len, reply_len));
    request.u.feature.flags = flags;
    request.u.feature.data = payload;
    request.u.feature.data_len = len;
    return vfu_client_call(client, &request, NULL, 0, reply, NULL, 0);
}

VFU_API int vfu_client_mig_flags(vfu_client *client, uint64_t *flags)
{
    vfu_wire_feature_migration wire = {0};
    vfu_msg reply;
    int err = vfux_client_feature(client, VFU_FEATURE_GET | VFU_FEATURE_MIGRATION, NULL, 0, sizeof(wire), &reply);
    if (!err)
        vfu_feature_migration(&reply, &wire); /* it was checked */
    *flags = wire.flags;
    return err;
}

VFU_API int vfu_client_mig_state(vfu_client *client, vfu_mig_state *state)
{
    vfu_wire_feature_mig_state wire = {0};
    vfu_msg reply;
    int err = vfux_client_feature(client, VFU_FEATURE_GET | VFU_FEATURE_MIG_STATE, NULL, 0, sizeof(wire), &reply);
    if (!err)
        vfu_feature_mig_state(&reply, &wire);
    if (!err && wire.state >= VFUX_MIG_STATES)
        err = vfux_client_break(client, -EPROTO, "there is no such migration state");
    *state = err ? VFU_MIG_STATE_ERROR : (vfu_mig_state)wire.state;
    return err;
}

VFU_API int vfu_client_mig_go(vfu_client *client, vfu_mig_state target, vfu_mig_state *reached)
{
    vfu_mig_state state = VFU_MIG_STATE_ERROR;
    uint64_t flags;
    int err = vfu_client_mig_flags(client, &flags);
    if (!err)
        err = vfu_client_mig_state(client, &state);
    for (unsigned arcs = 0; !err && state != target; arcs++) {
        vfu_mig_state next = vfux_mig_next(flags & VFU_MIG_PRE_COPY, state, target), now;
        vfu_wire_feature_mig_state wire = {.state = next, .data_fd = -1};
        vfu_msg reply;
        if (next == VFU_MIG_STATE_ERROR || arcs == VFUX_MIG_STATES) {
            err = -EINVAL;
            break;
        }
        err = vfux_client_feature(client, VFU_FEATURE_SET | VFU_FEATURE_MIG_STATE, &wire, sizeof(wire), sizeof(wire), &reply);
        if (err && !client->main.conn)
            break;
        int asked = vfu_client_mig_state(client, &now); /* whatever it said, it may stand elsewhere */
        state = asked ? VFU_MIG_STATE_ERROR : now;
        err = asked ? asked : !err && state != next ? -EIO : err;
    }
    if (reached)
        *reached = client->main.conn ? state : VFU_MIG_STATE_ERROR;
    return err;
}

VFU_API int64_t vfu_client_mig_read(vfu_client *client, void *buf, size_t len)
{
    size_t done = 0;
    while (done < len) {
        vfu_msg msg;
        uint32_t part = (uint32_t)vfux_min(len - done, client->server_xfer);
        vfu_msg_init(&msg, 0, VFU_CMD_MIG_DATA_READ);
        msg.u.mig_data.argsz = (uint32_t)sizeof(vfu_wire_mig_data) + part;
        msg.u.mig_data.size = part;
        int err = vfux_client_ask(client, &msg);
        if (err)
            return err;
        if (msg.u.mig_data.size)
            memcpy((uint8_t *)buf + done, msg.u.mig_data.data, msg.u.mig_data.size);
        done += msg.u.mig_data.size;
        if (msg.u.mig_data.size < part)
            break;
    }
    return (int64_t)done;
}

VFU_API int vfu_client_mig_write(vfu_client *client, const void *buf, size_t len)
{
    int err = 0;
    for (size_t done = 0, part; done < len && !err; done += part) {
        vfu_msg msg;
        part = (size_t)vfux_min(len - done, client->server_xfer);
        vfu_msg_init(&msg, 0, VFU_CMD_MIG_DATA_WRITE);
        msg.u.mig_data.argsz = (uint32_t)(sizeof(vfu_wire_mig_data) + part);
        msg.u.mig_data.size = msg.u.mig_data.data_len = (uint32_t)part;
        msg.u.mig_data.data = (const uint8_t *)buf + done;
        err = vfux_client_ask(client, &msg);
    }
    return err;
}

VFU_API int vfu_client_log_start(vfu_client *client, uint64_t *page_size, const vfu_wire_feature_log_range *ranges,
                                 uint32_t count)
{
    vfu_wire_feature_log_control control = {.page_size = *page_size, .num_ranges = count};
    uint64_t len = sizeof(control) + (uint64_t)count * sizeof(*ranges);
    vfu_msg reply;
    if (len > client->server_xfer)
        return -E2BIG;
    uint8_t *payload = vfux_allocate(&client->desc.alloc, (size_t)len);
    if (!payload)
        return -ENOMEM;
    memcpy(payload, &control, sizeof(control));
    if (count)
        memcpy(payload + sizeof(control), ranges, count * sizeof(*ranges));
    int err = vfux_client_feature(client, VFU_FEATURE_SET | VFU_FEATURE_LOGGING_START, payload, (uint32_t)len, len, &reply);
    vfux_free(&client->desc.alloc, payload, (size_t)len);
    if (!err && vfu_feature_log_control(&reply, &control) == 0) {
        if (!vfux_is_power_of_two(control.page_size))
            return vfux_client_break(client, -EPROTO, "its dirty log has no possible page size");
        *page_size = control.page_size;
    }
    return err;
}

/* A part of a report whose bitmap fits one message. */
static int vfux_client_log_part(vfu_client *client, const vfu_wire_feature_log_report *report, uint8_t *bitmap)
{
    uint64_t len = vfux_client_bitmap_len(report);
    vfu_wire_feature_log_report got;
    const uint8_t *bits;
    uint32_t bits_len;
    vfu_msg reply;
    int err = vfux_client_feature(client, VFU_FEATURE_GET | VFU_FEATURE_LOGGING_REPORT, report, sizeof(*report),
                                  sizeof(*report) + len, &reply);
    if (err)
        return err;
    if (vfu_feature_log_report(&reply, &got, &bits, &bits_len) || memcmp(&got, report, sizeof(got)) != 0 || bits_len != len)
        return vfux_client_break(client, -EPROTO, "a reply is about another part of the dirty log");
    memcpy(bitmap, bits, (size_t)len);
    return 0;
}

VFU_API int vfu_client_log_report(vfu_client *client, uint64_t iova, uint64_t length, uint64_t page_size, uint64_t *bitmap,
                                  size_t words)
{
    vfu_wire_feature_log_report report = {iova, length, page_size};
    uint64_t len = vfux_client_bitmap_len(&report), room = (client->server_xfer - (uint64_t)sizeof(report)) / 8;
    int err = 0;
    if (!len || len / 8 > words)
        return -EINVAL;
    if (client->server_xfer < sizeof(report) + 8)
        return -E2BIG;
    for (uint64_t done = 0, part; done < len / 8 && !err; done += part) {
        part = vfux_min(len / 8 - done, room);
        report.iova = iova + done * 64 * page_size;
        report.length = part == len / 8 - done ? length - (report.iova - iova) : part * 64 * page_size;
        err = vfux_client_log_part(client, &report, (uint8_t *)(bitmap + done));
    }
    return err;
}

VFU_API int vfu_client_log_stop(vfu_client *client)
{
    vfu_msg reply;
    return vfux_client_feature(client, VFU_FEATURE_SET | VFU_FEATURE_LOGGING_STOP, NULL, 0, 0, &reply);
}

#endif /* VFU_CODEC_ONLY */

#endif /* VFU_IMPLEMENTATION */

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
