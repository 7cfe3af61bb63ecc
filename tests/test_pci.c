/* SPDX-License-Identifier: MIT */
/*
 * ==== PCI ====
 *
 * The space that descriptors give, against dumps written from the specifications; what writes change; and that an access has the effect
 * of its bytes, however it is cut.
 */
#include "util.h"

static uint32_t get(const vfu_pci *pci, uint32_t offset, uint32_t width)
{
    uint8_t bytes[4] = {0};
    vfu_pci_read(pci, offset, bytes, width);
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static unsigned set(vfu_pci *pci, uint32_t offset, uint32_t value, uint32_t width)
{
    uint8_t bytes[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16), (uint8_t)(value >> 24)};
    return vfu_pci_write(pci, offset, bytes, width);
}

typedef struct word {
    uint32_t offset, value;
} word;

/* All of the space is as the words say, and zero elsewhere. */
static void check_words(const vfu_pci *pci, uint32_t size, const word *words, unsigned count)
{
    for (uint32_t at = 0, i = 0; at < size; at += 4) {
        uint32_t expected = i < count && words[i].offset == at ? words[i++].value : 0;
        ck_assert_msg(get(pci, at, 4) == expected, "0x%03x: 0x%08x, not 0x%08x", at, get(pci, at, 4), expected);
    }
}

/* DMA_ENGINE.md's identity */
static const vfu_pci_vendor_cap engine_vendor = {.data = "vfu dma", .len = 7};
static const vfu_pci_desc engine = {
    .vendor = 0x1234,
    .device = 0xd3a1,
    .subsystem_vendor = 0x1234,
    .subsystem = 0x0001,
    .class_code = 0x088000,
    .revision = 1,
    .interrupt_pin = 1,
    .bar = {{.size = 4096}, {0}, {.size = 65536, .kind = VFU_BAR_MEM64}, {0}, {.size = 4096}},
    .pm = true,
    .express = true,
    .flr = true,
    .msix = {.vectors = 4, .table_bar = 4, .pba_bar = 4, .table_offset = 0, .pba_offset = 0x800},
    .vendor_caps = &engine_vendor,
    .vendor_cap_count = 1,
};

/* Something of everything */
static const vfu_pci_vendor_cap full_caps[] = {{.data = "abcde", .len = 5}, {.data = "", .len = 0}};
static const vfu_pci_vendor_cap full_extended[] = {{.data = "0123456", .len = 7, .id = 0xbeef, .version = 3}, {.data = "", .len = 0, .id = 1}};
static const vfu_pci_desc full = {
    .vendor = 0xfffe,
    .device = 0x8001,
    .class_code = 0xffffff,
    .interrupt_pin = 4,
    .bar = {{.size = 16},
            {.size = 256, .kind = VFU_BAR_IO},
            {.size = UINT64_C(1) << 40, .kind = VFU_BAR_MEM64, .prefetchable = true},
            {0},
            {.size = UINT32_C(1) << 31, .prefetchable = true},
            {.size = 4, .kind = VFU_BAR_IO}},
    .rom_size = 2048,
    .pm = true,
    .express = true,
    .flr = true,
    .msi = {.vectors = 8, .mask = true},
    .msix = {.vectors = 2048, .table_bar = 4, .pba_bar = 2, .table_offset = 0x1000, .pba_offset = 0x10000},
    .vendor_caps = full_caps,
    .vendor_cap_count = 2,
    .serial_number = UINT64_C(0x0123456789abcdef),
    .aer = true,
    .extended_vendor_caps = full_extended,
    .extended_vendor_cap_count = 2,
};

static vfu_pci built(const vfu_pci_desc *desc)
{
    static vfu_pci pci;
    ck_assert_int_eq(vfu_pci_build(&pci, desc), 0);
    return pci;
}

START_TEST(engine_dump)
{
    static const word words[] = {
        {0x00, 0xd3a11234}, {0x04, 0x00100000} /* has capabilities */, {0x08, 0x08800001}, {0x18, 0x00000004} /* 64 bits */,
        {0x2c, 0x00011234}, {0x34, 0x00000040}, {0x3c, 0x00000100},
        {0x40, 0x00034801}, {0x44, 0x00000008},                     /* power management 1.2; no soft reset */
        {0x48, 0x00035411}, {0x4c, 0x00000004}, {0x50, 0x00000804}, /* MSI-X: 4 vectors, BAR 4 */
        {0x54, 0x00029010}, {0x58, 0x10008000}, {0x5c, 0x00002810}, /* PCI Express: endpoint, version 2, FLR */
        {0x60, 0x00000011}, {0x64, 0x00110000}, {0x78, 0x00000010}, {0x80, 0x00000002}, {0x84, 0x00000001},
        {0x90, 0x760a0009}, {0x94, 0x64207566}, {0x98, 0x0000616d}, /* "vfu dma" */
    };
    vfu_pci pci = built(&engine);
    check_words(&pci, 4096, words, COUNT(words));
}
END_TEST

START_TEST(full_dump)
{
    static const word words[] = {
        {0x00, 0x8001fffe}, {0x04, 0x00100000}, {0x08, 0xffffff00}, {0x14, 0x00000001}, {0x18, 0x0000000c}, {0x20, 0x00000008},
        {0x24, 0x00000001}, {0x34, 0x00000040}, {0x3c, 0x00000400},
        {0x40, 0x00034801}, {0x44, 0x00000008},
        {0x48, 0x01866005},                                         /* MSI: 8 vectors, 64 bits, masks */
        {0x60, 0x07ff6c11}, {0x64, 0x00001004}, {0x68, 0x00010002}, /* MSI-X: 2048 vectors, BARs 4 and 2 */
        {0x6c, 0x0002a810}, {0x70, 0x10008000}, {0x74, 0x00002810}, {0x78, 0x00000011}, {0x7c, 0x00110000}, {0x90, 0x00000010},
        {0x98, 0x00000002}, {0x9c, 0x00000001},
        {0xa8, 0x6108b009}, {0xac, 0x65646362}, {0xb0, 0x00030009}, /* vendor: 8 and 3 bytes */
        {0x100, 0x14820001}, {0x10c, 0x00462030}, {0x114, 0x00002000}, /* AER: severity, non-fatal errors masked */
        {0x148, 0x15410003}, {0x14c, 0x89abcdef}, {0x150, 0x01234567},
        {0x154, 0x1641000b}, {0x158, 0x00f3beef}, {0x15c, 0x33323130}, {0x160, 0x00363534},
        {0x164, 0x0001000b}, {0x168, 0x00800001},
    };
    vfu_pci pci = built(&full);
    check_words(&pci, 4096, words, COUNT(words));
}
END_TEST

START_TEST(conventional_dump)
{
    static const word words[] = {{0x00, 0x00020001}, {0x08, 0x01000000}};
    vfu_pci pci = built(&(vfu_pci_desc){.vendor = 1, .device = 2, .class_code = 0x010000});
    check_words(&pci, 256, words, COUNT(words));
    ck_assert_uint_eq(vfu_pci_capability(&pci, 1), 0);
    ck_assert_uint_eq(vfu_pci_extended_capability(&pci, 1), 0);
    ck_assert(!vfu_pci_msix_enabled(&pci) && !vfu_pci_msix_masked(&pci) && !vfu_pci_msi_enabled(&pci));
    ck_assert_uint_eq(vfu_pci_power(&pci), 0);
    vfu_pci_disconnect(&pci);
    vfu_pci_reset(&pci);
    check_words(&pci, 256, words, COUNT(words));
}
END_TEST

/* Which bits a client can set, found by writing all ones everywhere; what is left when it writes zeros. */
START_TEST(write_masks)
{
    static const word engine_masks[] = {
        {0x04, 0x00000546}, {0x0c, 0x000000ff}, {0x10, 0xfffff000}, {0x18, 0xffff0000}, {0x1c, 0xffffffff}, {0x20, 0xfffff000},
        {0x3c, 0x000000ff}, {0x44, 0x00000003}, {0x48, 0xc0000000}, {0x5c, 0x00007fff}, {0x64, 0x000001cb}, {0x7c, 0x00000010}, {0x84, 0x0000000f},
    };
    static const word full_masks[] = {
        {0x04, 0x00000547}, {0x0c, 0x000000ff}, {0x10, 0xfffffff0}, {0x14, 0xffffff00}, {0x1c, 0xffffff00}, {0x20, 0x80000000},
        {0x24, 0xfffffffc}, {0x30, 0xfffff801}, {0x3c, 0x000000ff}, {0x44, 0x00000003}, {0x48, 0x00710000}, {0x4c, 0xfffffffc},
        {0x50, 0xffffffff}, {0x54, 0x0000ffff}, {0x58, 0x000000ff}, {0x60, 0xc0000000}, {0x74, 0x00007fff}, {0x7c, 0x000001cb},
        {0x94, 0x00000010}, {0x9c, 0x0000000f}, {0x108, 0x007ff030}, {0x10c, 0x007ff030}, {0x114, 0x0000f1c1},
    };
    const word *masks = _i ? full_masks : engine_masks;
    unsigned count = _i ? COUNT(full_masks) : COUNT(engine_masks), i = 0;
    vfu_pci pci = built(_i ? &full : &engine), fresh = pci;
    for (uint32_t at = 0; at < 4096; at += 4) {
        uint32_t mask = i < count && masks[i].offset == at ? masks[i++].value : 0, initial = get(&fresh, at, 4);
        set(&pci, at, UINT32_MAX, 4);
        ck_assert_msg(get(&pci, at, 4) == (initial | mask), "0x%03x: 0x%08x", at, get(&pci, at, 4));
        set(&pci, at, 0, 4);
        ck_assert_msg(get(&pci, at, 4) == (initial & ~mask), "0x%03x: 0x%08x", at, get(&pci, at, 4));
    }
    vfu_pci_reset(&pci);
    ck_assert_mem_eq(pci.config, fresh.config, sizeof(fresh.config));
}
END_TEST

/* BARs size themselves by the bits that stay zero, and keep an address. */
START_TEST(bar_sizing)
{
    static const struct {
        vfu_bar_desc bar;
        uint32_t low, high; /* after all ones were written */
    } cases[] = {
        {{.size = 16}, 0xfffffff0, 0},
        {{.size = 4096}, 0xfffff000, 0},
        {{.size = UINT64_C(1) << 31}, 0x80000000, 0},
        {{.size = 4096, .prefetchable = true}, 0xfffff008, 0},
        {{.size = 4, .kind = VFU_BAR_IO}, 0xfffffffd, 0},
        {{.size = 256, .kind = VFU_BAR_IO}, 0xffffff01, 0},
        {{.size = 16, .kind = VFU_BAR_MEM64}, 0xfffffff4, 0xffffffff},
        {{.size = UINT64_C(1) << 31, .kind = VFU_BAR_MEM64}, 0x80000004, 0xffffffff},
        {{.size = UINT64_C(1) << 32, .kind = VFU_BAR_MEM64, .prefetchable = true}, 0x0000000c, 0xffffffff},
        {{.size = UINT64_C(1) << 36, .kind = VFU_BAR_MEM64}, 0x00000004, 0xfffffff0},
        {{.size = UINT64_C(1) << 63, .kind = VFU_BAR_MEM64}, 0x00000004, 0x80000000},
    };
    for (unsigned i = 0; i < COUNT(cases); i++)
        for (unsigned at = 0; at < 5; at++) {
            vfu_pci_desc desc = {.vendor = 1};
            desc.bar[at] = cases[i].bar;
            vfu_pci pci = built(&desc);
            ck_assert_uint_eq(set(&pci, 0x10 + 4 * at, UINT32_MAX, 4), cases[i].low & ~UINT32_C(15) ? VFU_PCI_CHANGED_BAR : 0);
            ck_assert_uint_eq(set(&pci, 0x14 + 4 * at, UINT32_MAX, 4), cases[i].high ? VFU_PCI_CHANGED_BAR : 0);
            ck_assert_uint_eq(get(&pci, 0x10 + 4 * at, 4), cases[i].low);
            ck_assert_uint_eq(get(&pci, 0x14 + 4 * at, 4), cases[i].high);
            set(&pci, 0x10 + 4 * at, 0xabcdef12, 4);
            uint32_t type = cases[i].low & (cases[i].bar.kind == VFU_BAR_IO ? 3 : 15);
            ck_assert_uint_eq(get(&pci, 0x10 + 4 * at, 4), (0xabcdef12 & cases[i].low & ~type) | type);
            bool io = cases[i].bar.kind == VFU_BAR_IO; /* the command register has what the BARs need */
            set(&pci, 4, 3, 2);
            ck_assert_uint_eq(vfu_pci_command(&pci), io ? 1 : 2);
        }
}
END_TEST

/* An access has the effect of its bytes: any cut gives the same space, the same data and the same changes. */
START_TEST(splits)
{
    chance c = seeded(4711);
    vfu_pci whole = built(&full), cut;
    for (unsigned round = 0; round < 20000; round++) {
        uint8_t data[64], read_whole[64], read_cut[64];
        uint32_t len = below(&c, sizeof(data)) + 1, offset = below(&c, round % 4 ? 0x180 : 4096 - len + 1);
        unsigned changed = 0;
        for (uint32_t i = 0; i < len; i++)
            data[i] = (uint8_t)draw(&c);
        for (unsigned i = 0; i < 8; i++) /* errors to clear */
            whole.config[7] = (uint8_t)draw(&c), whole.config[0x104 + i % 4] = (uint8_t)draw(&c);
        cut = whole;
        unsigned expected = vfu_pci_write(&whole, offset, data, len);
        for (uint32_t at = 0, part; at < len; at += part) {
            part = below(&c, len - at) + 1;
            changed |= vfu_pci_write(&cut, offset + at, data + at, part);
        }
        ck_assert_uint_eq(changed, expected);
        ck_assert_int_eq(memcmp(whole.config, cut.config, sizeof(cut.config)), 0);
        vfu_pci_read(&whole, offset, read_whole, len);
        for (uint32_t at = 0; at < len; at++)
            vfu_pci_read(&cut, offset + at, read_cut + at, 1);
        ck_assert_int_eq(memcmp(read_whole, read_cut, len), 0);
    }
    /* to the last byte, and nothing */
    ck_assert_uint_eq(vfu_pci_write(&whole, 4096, NULL, 0), 0);
    ck_assert_uint_eq(set(&whole, 4095, 0xff, 1), 0);
}
END_TEST

/* What a write is said to have changed. */
START_TEST(changes)
{
    vfu_pci pci = built(&full);
    uint32_t msi = vfu_pci_capability(&pci, 5), msix = vfu_pci_capability(&pci, 0x11), pm = vfu_pci_capability(&pci, 1);
    uint32_t express = vfu_pci_capability(&pci, 0x10);
    const struct {
        uint32_t offset, width, value;
        unsigned changed;
    } cases[] = {
        {0x04, 2, 0x0006, VFU_PCI_CHANGED_COMMAND}, {0x04, 2, 0x0006, 0}, {0x05, 1, 0x04, VFU_PCI_CHANGED_COMMAND},
        {0x06, 2, 0xffff, 0}, {0x04, 4, 0xffff0406, 0}, {0x10, 4, UINT32_MAX, VFU_PCI_CHANGED_BAR}, {0x13, 1, 0, VFU_PCI_CHANGED_BAR},
        {0x27, 1, 1, VFU_PCI_CHANGED_BAR}, {0x28, 4, 1, 0}, {0x30, 4, 1, VFU_PCI_CHANGED_BAR}, {0x3c, 4, 10, 0}, {0x00, 4, 0, 0},
        {pm + 4, 2, 3, VFU_PCI_CHANGED_POWER}, {pm + 4, 1, 3, 0}, {pm + 4, 1, 0, VFU_PCI_CHANGED_POWER}, {pm + 5, 1, 0xff, 0},
        {msix + 2, 2, 0x8000, VFU_PCI_CHANGED_MSIX}, {msix + 3, 1, 0xc0, VFU_PCI_CHANGED_MSIX}, {msix + 3, 1, 0xff, 0}, {msix + 4, 4, 0, 0},
        {msi + 2, 2, 0x0031, VFU_PCI_CHANGED_MSI}, {msi + 4, 4, 0xfee00000, VFU_PCI_CHANGED_MSI}, {msi + 12, 2, 0x4041, VFU_PCI_CHANGED_MSI},
        {msi + 16, 4, 0xff, VFU_PCI_CHANGED_MSI}, {msi + 20, 4, 0xff, 0},
        {express + 8, 2, 0x2810, 0}, {express + 8, 2, 0xa810, VFU_PCI_ASKED_FLR}, {express + 9, 1, 0xa8, VFU_PCI_ASKED_FLR}, {express + 9, 1, 0x28, 0},
        {express + 8, 1, 0x90, 0},
    };
    for (unsigned i = 0; i < COUNT(cases); i++) {
        unsigned changed = set(&pci, cases[i].offset, cases[i].value, cases[i].width);
        ck_assert_msg(changed == cases[i].changed, "case %u: 0x%x", i, changed);
    }
    ck_assert_uint_eq(get(&pci, express + 8, 2), 0x2890); /* the bit that asks for the reset reads as zero */
    ck_assert_uint_eq(vfu_pci_command(&pci), 0x0406);
    ck_assert(vfu_pci_msix_enabled(&pci) && vfu_pci_msix_masked(&pci) && vfu_pci_msi_enabled(&pci));
    /* one write over everything */
    static uint8_t ones[256];
    vfu_pci_reset(&pci);
    ck_assert(!vfu_pci_msix_enabled(&pci) && !vfu_pci_msix_masked(&pci) && !vfu_pci_msi_enabled(&pci));
    memset(ones, 0xff, sizeof(ones));
    ck_assert_uint_eq(vfu_pci_write(&pci, 0, ones, 256),
                      VFU_PCI_CHANGED_COMMAND | VFU_PCI_CHANGED_BAR | VFU_PCI_CHANGED_MSIX | VFU_PCI_CHANGED_POWER | VFU_PCI_ASKED_FLR | VFU_PCI_CHANGED_MSI);
    /* without FLR the bit is nothing */
    vfu_pci_desc desc = engine;
    desc.flr = false;
    pci = built(&desc);
    ck_assert_uint_eq(set(&pci, vfu_pci_capability(&pci, 0x10) + 8, 0x8000, 2), 0);
    ck_assert_uint_eq(get(&pci, vfu_pci_capability(&pci, 0x10) + 4, 4), 0x00008000);
}
END_TEST

/* Bits that a write of one clears, and a write of zero leaves. */
START_TEST(write_one_to_clear)
{
    vfu_pci pci = built(&full);
    uint32_t express = vfu_pci_capability(&pci, 0x10);
    const word cases[] = {{0x04, 0xf9000000}, {express + 8, 0x000f0000}, {0x104, 0x007ff030}, {0x110, 0x0000f1c1}};
    for (unsigned i = 0; i < COUNT(cases); i++) {
        uint32_t before = get(&pci, cases[i].offset, 4), all = before | cases[i].value, bit = cases[i].value & -cases[i].value;
        for (unsigned k = 0; k < 4; k++)
            pci.config[cases[i].offset + k] = (uint8_t)(all >> 8 * k);
        set(&pci, cases[i].offset, before, 4);
        ck_assert_uint_eq(get(&pci, cases[i].offset, 4), all);
        set(&pci, cases[i].offset, before | bit, 4);
        ck_assert_uint_eq(get(&pci, cases[i].offset, 4), all & ~bit);
        set(&pci, cases[i].offset, before | cases[i].value, 4);
        ck_assert_uint_eq(get(&pci, cases[i].offset, 4), before);
    }
}
END_TEST

START_TEST(space_state)
{
    vfu_pci pci = built(&full), fresh = pci;
    uint32_t pm = vfu_pci_capability(&pci, 1), msi = vfu_pci_capability(&pci, 5), msix = vfu_pci_capability(&pci, 0x11);
    vfu_pci_set_intx_status(&pci, true);
    ck_assert_uint_eq(get(&pci, 6, 2), 0x0018);
    set(&pci, 6, 0xffff, 2);
    ck_assert_uint_eq(get(&pci, 6, 2), 0x0018); /* not the client's to clear */
    vfu_pci_set_intx_status(&pci, false);
    ck_assert_uint_eq(get(&pci, 6, 2), 0x0010);
    static const uint8_t states[][2] = {{3, 3}, {1, 3}, {0, 0}, {2, 0}, {1, 0}, {3, 3}}; /* D1 and D2 don't exist: discarded */
    for (unsigned i = 0; i < COUNT(states); i++) {
        set(&pci, pm + 4, states[i][0], 2);
        ck_assert_uint_eq(vfu_pci_power(&pci), states[i][1]);
    }
    /* the client goes: what would act for it is off, the rest stays */
    vfu_pci_set_intx_status(&pci, true);
    set(&pci, 0x04, 0x0407, 2);
    set(&pci, 0x10, 0xfe000000, 4);
    set(&pci, 0x3c, 5, 1);
    set(&pci, msi + 2, 1, 2);
    set(&pci, msi + 4, 0xfee00000, 4);
    set(&pci, msix + 2, 0x8000, 2);
    vfu_pci_disconnect(&pci);
    ck_assert_uint_eq(vfu_pci_command(&pci), 0);
    ck_assert_uint_eq(get(&pci, 6, 2), 0x0010);
    ck_assert(!vfu_pci_msix_enabled(&pci) && !vfu_pci_msi_enabled(&pci));
    ck_assert_uint_eq(get(&pci, 0x10, 4), 0xfe000000);
    ck_assert_uint_eq(get(&pci, 0x3c, 1), 5);
    ck_assert_uint_eq(get(&pci, msi + 4, 4), 0xfee00000);
    ck_assert_uint_eq(vfu_pci_power(&pci), 3);
    vfu_pci_reset(&pci);
    ck_assert_mem_eq(pci.config, fresh.config, sizeof(pci.config));
}
END_TEST

/* The lists lead to each capability, in ascending order, and end. */
START_TEST(walks)
{
    static const struct {
        uint16_t id;
        uint16_t at;
        bool extended;
    } cases[] = {{1, 0x40, false},  {5, 0x48, false},    {0x11, 0x60, false}, {0x10, 0x6c, false}, {9, 0xa8, false},     {2, 0, false},
                 {0xff, 0, false},  {0x01, 0x100, true}, {0x03, 0x148, true}, {0x0b, 0x154, true}, {0x0002, 0, true}, {0xffff, 0, true}};
    vfu_pci pci = built(&full);
    for (unsigned i = 0; i < COUNT(cases); i++)
        ck_assert_uint_eq(cases[i].extended ? vfu_pci_extended_capability(&pci, cases[i].id) : vfu_pci_capability(&pci, (uint8_t)cases[i].id),
                          cases[i].at);
    unsigned count = 0;
    for (uint32_t at = get(&pci, 0x34, 1), last = 0; at; last = at, at = get(&pci, at + 1, 1), count++) {
        ck_assert_uint_gt(at, last);
        ck_assert_uint_eq(at % 4, 0);
    }
    ck_assert_uint_eq(count, 6);
    count = 0;
    for (uint32_t at = 0x100, last = 0; at; last = at, at = get(&pci, at + 2, 2) >> 4, count++) {
        ck_assert_uint_gt(at, last);
        ck_assert_uint_eq(at % 4, 0);
    }
    ck_assert_uint_eq(count, 4);
    pci = built(&engine); /* no extended ones */
    ck_assert_uint_eq(vfu_pci_extended_capability(&pci, 1), 0);
    ck_assert_uint_eq(vfu_pci_extended_capability(&pci, 0), 0);
    /* an extended one that isn't the first kind */
    pci = built(&(vfu_pci_desc){.express = true, .serial_number = 1});
    ck_assert_uint_eq(vfu_pci_extended_capability(&pci, 3), 0x100);
    ck_assert_uint_eq(get(&pci, 0x100, 4), 0x00010003);
}
END_TEST

START_TEST(msi_sizes)
{
    for (unsigned log2 = 0; log2 <= 5; log2++)
        for (unsigned mask = 0; mask < 2; mask++) {
            vfu_pci pci = built(&(vfu_pci_desc){.msi = {.vectors = (uint8_t)(1 << log2), .mask = mask}});
            ck_assert_uint_eq(get(&pci, 0x42, 2), 0x80 | log2 << 1 | mask << 8);
            set(&pci, 0x50, UINT32_MAX, 4);
            ck_assert_uint_eq(get(&pci, 0x50, 4), mask ? (uint32_t)((UINT64_C(1) << (1 << log2)) - 1) : 0);
        }
}
END_TEST

/* Each change makes a descriptor that nobody can build. */
START_TEST(impossible_descriptors)
{
    static const char data[255];
    static vfu_pci_vendor_cap caps[20];
    for (unsigned i = 0; i < COUNT(caps); i++)
        caps[i] = (vfu_pci_vendor_cap){.data = data, .len = 255};
    for (unsigned i = 0; i < 40; i++) {
        vfu_pci_desc d = engine;
        vfu_pci pci;
        bool possible = false;
        switch (i) {
        case 0: d.class_code = 0x1000000; break;
        case 1: d.interrupt_pin = 5; break;
        case 2: d.bar[0].size = 4097; break;
        case 3: d.bar[0].size = 8; break;
        case 4: d.bar[0].size = UINT64_C(1) << 32; break;
        case 5: d.bar[0] = (vfu_bar_desc){.size = 2, .kind = VFU_BAR_IO}; break;
        case 6: d.bar[0] = (vfu_bar_desc){.size = 256, .kind = VFU_BAR_IO, .prefetchable = true}; break;
        case 7: d.bar[3].size = 4096; break; /* the upper half of BAR 2 */
        case 8: d.bar[5] = (vfu_bar_desc){.size = 4096, .kind = VFU_BAR_MEM64}; break;
        case 9: d.bar[0].size = UINT64_MAX; break;
        case 10: d.rom_size = 1024; break;
        case 11: d.rom_size = 3000; break;
        case 12: d.express = false; break; /* but FLR */
        case 13: d.msix.vectors = 2049; break;
        case 14: d.msix.table_bar = 6; break;
        case 15: d.msix.pba_bar = 255; break;
        case 16: d.msix.table_bar = 3; break; /* no BAR */
        case 17: d.msix.pba_bar = 1; break;
        case 18: d.msix.table_offset = 4; break;
        case 19: d.msix.pba_offset = 0x801; break;
        case 20: d.msix.table_offset = 4096 - 56; break;
        case 21: d.msix.pba_offset = 4096; break;
        case 22: d.msix.table_offset = UINT32_MAX - 7; break;
        case 23: d.msi.vectors = 3; break;
        case 24: d.msi.vectors = 64; break;
        case 25: d.msi.vectors = 255; break;
        case 26: d.vendor_caps = caps; break; /* no room */
        case 27: d.express = d.flr = false, d.aer = true; break;
        case 28: d.express = d.flr = false, d.serial_number = 1; break;
        case 29: d.express = d.flr = false, d.extended_vendor_caps = caps, d.extended_vendor_cap_count = 1; break;
        case 30: d.extended_vendor_caps = caps, d.extended_vendor_cap_count = 15; break; /* no room */
        case 31: caps[0].version = 16, d.extended_vendor_caps = caps, d.extended_vendor_cap_count = 1; break;
        case 32: d.interrupt_pin = 0, possible = true; break;
        case 33: d.msix.table_offset = 4096 - 64, possible = true; break;
        case 34: d.msix.pba_offset = 4096 - 8, possible = true; break;
        case 35: caps[0].version = 15, d.extended_vendor_caps = caps, d.extended_vendor_cap_count = 14, possible = true; break;
        case 36: caps[0].len = 0x100 - 0x90 - 3, d.vendor_caps = caps, possible = true; break; /* to the last byte */
        case 37: caps[0].len = 0x100 - 0x90 - 2, d.vendor_caps = caps; break;
        case 38: caps[0] = (vfu_pci_vendor_cap){.len = 0}, d.vendor_caps = caps, possible = true; break; /* nothing, at NULL */
        default: d.extended_vendor_caps = caps, d.extended_vendor_cap_count = 1, possible = true; break;
        }
        ck_assert_msg(vfu_pci_build(&pci, &d) == (possible ? 0 : -EINVAL), "case %u", i);
    }
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("PCI");
    TCase *tc = tcase_create("PCI");
    tcase_add_test(tc, engine_dump);
    tcase_add_test(tc, full_dump);
    tcase_add_test(tc, conventional_dump);
    tcase_add_loop_test(tc, write_masks, 0, 2);
    tcase_add_test(tc, bar_sizing);
    tcase_add_test(tc, splits);
    tcase_add_test(tc, changes);
    tcase_add_test(tc, write_one_to_clear);
    tcase_add_test(tc, space_state);
    tcase_add_test(tc, walks);
    tcase_add_test(tc, msi_sizes);
    tcase_add_test(tc, impossible_descriptors);
    suite_add_tcase(suite, tc);
    return run_suite(suite);
}
