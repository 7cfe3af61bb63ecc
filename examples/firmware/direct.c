/* SPDX-License-Identifier: MIT */
/* Accesses of a device that lives in the image itself, without messages: each kind of access, good ones and refused ones. */
#include "firmware.h"

#include "string.h"

enum { PAGE = 4096, RW = VFU_IOMMU_READ | VFU_IOMMU_WRITE };

#define RW_AT UINT64_C(0x10000)
#define RO_AT (RW_AT + PAGE)                /* right behind it, to be read only */
#define TOP_AT (UINT64_MAX - (PAGE - 1))    /* up to the last address */

static bool map(uint64_t iova, uint32_t prot, uint8_t *host)
{
    return vfu_iommu_map(iommu, &(vfu_iommu_mapping){.iova = iova, .size = PAGE, .prot = prot, .host = host}) == 0;
}

static void good(void)
{
    uint64_t value = 0;
    bool same = true;
    check(vfu_iommu_fill(reader, RW_AT, PAGE, "\1\2\3\4", 4) == 0, "fill");
    for (int i = 0; i < PAGE; i++)
        same = same && memory[i] == 1 + i % 4;
    check(same, "the bytes of fill");

    for (int i = 0; i < 2 * PAGE; i++)
        memory[i] = (uint8_t)(i ^ i >> 8);
    check(vfu_iommu_copy(reader, RW_AT + 3, RW_AT + 1, 100) == 0, "copy over itself");
    for (int i = 0; i < PAGE; i++) {
        int from = i >= 3 && i < 103 ? i - 2 : i;
        same = same && memory[i] == (uint8_t)(from ^ from >> 8);
    }
    check(same, "the bytes of copy");

    check(vfu_iommu_store(reader, RW_AT + 8, 4, VFU_IOMMU_RELEASE, 0x12345678) == 0, "store");
    check(memory[8] == 0x78 && memory[9] == 0x56 && memory[10] == 0x34 && memory[11] == 0x12, "the bytes of store");
    check(vfu_iommu_load(reader, RW_AT + 8, 4, VFU_IOMMU_ACQUIRE, &value) == 0 && value == 0x12345678, "load");
    check(vfu_iommu_probe(reader, RW_AT, 2 * PAGE, VFU_IOMMU_READ) == 0, "probe");
}

/* A refused access: its errno, its first address that failed, and no byte changed. */
static void refused(int got, int err, uint64_t fault, const char *what)
{
    bool same = true;
    print_refused();
    for (int i = 0; i < MEMORY_SIZE; i++)
        same = same && memory[i] == 0x5a;
    check(got == err && vfu_iommu_last_fault(reader)->error == err && vfu_iommu_last_fault(reader)->iova == fault && same, what);
}

static void bad(void)
{
    static uint8_t data[PAGE];
    uint64_t value;
    memset(memory, 0x5a, MEMORY_SIZE);
    refused(vfu_iommu_write(reader, RW_AT - 1, data, 2), -ENOENT, RW_AT - 1, "the byte before a mapping");
    refused(vfu_iommu_read(reader, RO_AT + PAGE - 1, data, 2), -ENOENT, RO_AT + PAGE, "the byte behind a mapping");
    refused(vfu_iommu_write(reader, RO_AT - 1, data, 2), -EACCES, RO_AT, "a write that runs into read-only memory");
    refused(vfu_iommu_fill(reader, TOP_AT + PAGE - 1, 2, "\0", 1), -EINVAL, TOP_AT + PAGE - 1, "a range that wraps past 2^64");
    refused(vfu_iommu_copy(reader, RO_AT, RW_AT, 8), -EACCES, RO_AT, "a copy to read-only memory");
    refused(vfu_iommu_store(reader, RW_AT + 2, 4, VFU_IOMMU_RELAXED, 0), -EINVAL, RW_AT + 2, "a store that isn't aligned");
    refused(vfu_iommu_load(reader, RW_AT, 8, VFU_IOMMU_RELAXED, &value), -ENOTSUP, RW_AT, "8 bytes at once on a Cortex-M3");
}

/* An unmap can't wait here, where there is one thread: it fails while a pin is held. */
static void pins(void)
{
    vfu_iommu_pin pin = {0};
    vfu_iommu_segment part[2];
    check(vfu_iommu_pin_take(reader, &pin, RO_AT - 16, 48, VFU_IOMMU_READ, part, 2) == 2, "a pin over two mappings");
    check(part[0].host == memory + PAGE - 16 && part[0].len == 16, "its first segment");
    check(part[1].host == memory + PAGE && part[1].len == 32, "its second segment");
    check(vfu_iommu_unmap(iommu, RO_AT, PAGE) == -EBUSY, "an unmap of what is pinned");
    vfu_iommu_pin_drop(iommu, &pin);
    check(vfu_iommu_unmap(iommu, RO_AT, PAGE) == 1, "an unmap when the pin is dropped");
    refused(vfu_iommu_pin_take(reader, &pin, RO_AT - 16, 48, VFU_IOMMU_READ, part, 2), -ENOENT, RO_AT, "a pin on it");
}

void direct(void)
{
    board_print("Without messages:\n");
    check(map(RW_AT, RW, memory) && map(RO_AT, VFU_IOMMU_READ, memory + PAGE) && map(TOP_AT, RW, memory + 2 * PAGE), "mapping");
    good();
    bad();
    pins();
    check(vfu_iommu_dirty_start(iommu, PAGE, NULL, 0) == -ENOMEM, "a dirty log, which wants an allocator");
    check(vfu_iommu_unmap_all(iommu) == 2, "an unmap of everything");
    refused(vfu_iommu_read(reader, RW_AT, &(uint8_t){0}, 1), -ENOENT, RW_AT, "revoked memory");
}
