/* SPDX-License-Identifier: MIT */
/*
 * Proofs of the PCI configuration space: BARs have the size that was asked for, capabilities are found where they are, and whatever a
 * client writes, what it may not write stays as it is.
 */
#include "proof.h"

#define VFU_IMPLEMENTATION
#define VFU_STATIC
#include "vfu.h"

enum {
    SIZE = 256, /* bytes of the space: a device without PCI Express */
    LISTED = 4  /* most capabilities in a list */
};

static vfu_pci space;

/* Any BARs and ROM: they are refused, or of a BAR its address can be written, no more. */
void bars(void)
{
    vfu_pci_desc desc;
    for (unsigned i = 0; i < 6; i++)
        desc.bar[i].prefetchable = nondet_bool();
    if (!vfux_pci_build_bars(&space, &desc))
        return;
    EACH(i, 5)
        if (desc.bar[i].size != 0) {
            const uint32_t writable = vfux_get32(space.writable + VFUX_PCI_BAR + 4 * i);
            PROVE(~writable == (uint32_t)(desc.bar[i].size - 1) && (writable & 3) == 0);
            PROVE(writable != 0 || desc.bar[i].kind == VFU_BAR_MEM64);
            PROVE((vfux_get32(space.config + VFUX_PCI_BAR + 4 * i) & writable) == 0);
        }
}

/* In any ascending list the first capability with that identity is found; with none of it the answer is 0. */
void walk(void)
{
    vfu_pci any;
    uint8_t at[LISTED], link = VFUX_PCI_CAPABILITIES, id = nondet_u8(), found = 0;
    const size_t count = up_to(LISTED);
    space = any;
    for (size_t i = 0; i < LISTED; i++)
        if (i < count) {
            ASSUME(at[i] >= VFUX_PCI_FIRST_CAP && at[i] % 4 == 0 && (i == 0 || at[i] > at[i - 1]));
            ASSUME(space.config[link] == at[i]);
            link = (uint8_t)(at[i] + 1);
            if (found == 0 && space.config[at[i]] == id)
                found = at[i];
        }
    ASSUME(space.config[link] == 0);
    PROVE(vfu_pci_capability(&space, id) == found);
}

/* Any space whose capabilities lie where building can put them, with any contents. */
static void any_space(void)
{
    vfu_pci any;
    space = any;
    space.size = SIZE;
    space.msi_mask = nondet_bool();
    ASSUME(space.pm_at == 0 || (space.pm_at >= VFUX_PCI_FIRST_CAP && space.pm_at + VFUX_PM_LEN <= 256));
    ASSUME(space.msi_at == 0 || (space.msi_at >= VFUX_PCI_FIRST_CAP && space.msi_at + VFUX_MSI_LEN <= 256));
    ASSUME(space.msix_at == 0 || (space.msix_at >= VFUX_PCI_FIRST_CAP && space.msix_at + VFUX_MSIX_LEN <= 256));
    ASSUME(space.express_at == 0 && !space.flr);
}

/* Any byte written at `at`: it changes what may be written, clears what may be cleared, and says so. */
static void store_at(uint32_t at)
{
    const uint8_t before = space.config[at], writable = space.writable[at], clearable = space.clearable[at], byte = nondet_u8();
    unsigned changed = vfu_pci_write(&space, at, &byte, 1);
    const uint8_t now = space.config[at];
    PROVE((changed & ~0x3fu) == 0 && (space.flr || (changed & VFU_PCI_ASKED_FLR) == 0));
    PROVE(((now ^ before) & ~(writable | clearable)) == 0);
    PROVE((now & clearable & ~writable & ~before) == 0);
    if (now != before && (at == VFUX_PCI_COMMAND || at == VFUX_PCI_COMMAND + 1))
        PROVE((changed & VFU_PCI_CHANGED_COMMAND) != 0);
    if (now != before && at >= VFUX_PCI_BAR && at < VFUX_PCI_BAR + 24)
        PROVE((changed & VFU_PCI_CHANGED_BAR) != 0);
}

void store(void)
{
    any_space();
    EACH(at, 255)
        store_at((uint32_t)at);
}
