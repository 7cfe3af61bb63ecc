/* SPDX-License-Identifier: MIT */
/*
 * Proofs of the PCI configuration space: what is built is in order, and no write of a client leaves it in another order.
 */
#include "proof.h"

#define VFU_IMPLEMENTATION
#define VFU_STATIC
#include "vfu.h"

#ifndef EXPRESS
#define EXPRESS false
#endif

#ifndef LENGTH
#define LENGTH 8 /* most bytes of an access */
#endif

enum {
    SIZE = EXPRESS ? 4096 : 256, /* bytes of the space */
    CAPS = 7,                    /* power management, MSI, MSI-X, Express, up to 2 of a vendor, and one turn to see the end */
    EXTENDED_CAPS = 5
};

static vfu_pci space;

/* Any description, with up to 2 vendor capabilities of each kind with up to 255 bytes. */
static void any_description(vfu_pci_desc *desc)
{
    static vfu_pci_vendor_cap vendor[2], extended[2];
    uint8_t *data = any_memory(UINT8_MAX);
    vfu_pci_desc any;
    *desc = any;
    for (unsigned i = 0; i < 2; i++) {
        vendor[i] = (vfu_pci_vendor_cap){data, nondet_u8(), nondet_u16(), nondet_u8()};
        extended[i] = (vfu_pci_vendor_cap){data, nondet_u8(), nondet_u16(), nondet_u8()};
    }
    desc->express = EXPRESS;
    desc->pm = nondet_bool();
    desc->flr = nondet_bool();
    desc->aer = nondet_bool();
    desc->msi.mask = nondet_bool();
    for (unsigned i = 0; i < 6; i++)
        desc->bar[i].prefetchable = nondet_bool();
    desc->vendor_caps = vendor;
    desc->vendor_cap_count = (unsigned)up_to(2);
    desc->extended_vendor_caps = extended;
    desc->extended_vendor_cap_count = (unsigned)up_to(2);
}

/* A description is refused, or gives a space whose capabilities are found where they are, and whose identity nobody can write. */
void build(void)
{
    vfu_pci_desc desc;
    any_description(&desc);
    int rc = vfu_pci_build(&space, &desc);
    PROVE(rc == 0 || rc == -EINVAL);
    if (rc < 0)
        return;
    PROVE(space.size == SIZE);
    PROVE(vfu_pci_capability(&space, VFUX_PCI_CAP_PM) == space.pm_at && (space.pm_at != 0) == desc.pm);
    PROVE(vfu_pci_capability(&space, VFUX_PCI_CAP_MSI) == space.msi_at && (space.msi_at != 0) == (desc.msi.vectors != 0));
    PROVE(vfu_pci_capability(&space, VFUX_PCI_CAP_MSIX) == space.msix_at && (space.msix_at != 0) == (desc.msix.vectors != 0));
    PROVE(vfu_pci_capability(&space, VFUX_PCI_CAP_EXPRESS) == space.express_at && (space.express_at != 0) == desc.express);
    PROVE((vfu_pci_capability(&space, VFUX_PCI_CAP_VENDOR) != 0) == (desc.vendor_cap_count != 0));
    PROVE((vfu_pci_extended_capability(&space, VFUX_PCI_EXT_AER) != 0) == desc.aer);
    PROVE((vfu_pci_extended_capability(&space, VFUX_PCI_EXT_SERIAL) != 0) == (desc.serial_number != 0));
    PROVE((vfu_pci_extended_capability(&space, VFUX_PCI_EXT_VENDOR) != 0) == (desc.extended_vendor_cap_count != 0));
    PROVE(vfux_get32(space.writable + VFUX_PCI_VENDOR) == 0 && vfux_get32(space.writable + VFUX_PCI_REVISION) == 0);
}

/* Any space whose capabilities lie where building can put them, with any contents. */
static void any_space(void)
{
    vfu_pci any;
    space = any;
    space.size = SIZE;
    space.flr = nondet_bool();
    space.msi_mask = nondet_bool();
    ASSUME(space.pm_at == 0 || (space.pm_at >= VFUX_PCI_FIRST_CAP && space.pm_at + VFUX_PM_LEN <= 256));
    ASSUME(space.msi_at == 0 || (space.msi_at >= VFUX_PCI_FIRST_CAP && space.msi_at + VFUX_MSI_LEN <= 256));
    ASSUME(space.msix_at == 0 || (space.msix_at >= VFUX_PCI_FIRST_CAP && space.msix_at + VFUX_MSIX_LEN <= 256));
    ASSUME(EXPRESS ? space.express_at >= VFUX_PCI_FIRST_CAP && space.express_at + VFUX_EXPRESS_LEN <= 256 : space.express_at == 0);
    ASSUME(EXPRESS || !space.flr);
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

/* What a device asks of any space, and what the end of a connection leaves. */
void ask(void)
{
    any_space();
    const uint32_t len = (uint32_t)up_to(LENGTH), offset = (uint32_t)up_to(SIZE - len);
    uint8_t bytes[LENGTH];
    const bool level = nondet_bool();
    vfu_pci_read(&space, offset, bytes, len);
    if (len != 0) {
        const uint32_t any = (uint32_t)up_to(len - 1);
        PROVE(bytes[any] == space.config[offset + any]);
    }
    PROVE(vfu_pci_power(&space) <= 3);
    PROVE(space.msix_at != 0 || (!vfu_pci_msix_enabled(&space) && !vfu_pci_msix_masked(&space)));
    vfu_pci_set_intx_status(&space, level);
    PROVE(((space.config[VFUX_PCI_STATUS] & VFU_PCI_STATUS_INTX) != 0) == level);
    vfu_pci_disconnect(&space);
    PROVE(!vfu_pci_msix_enabled(&space) && !vfu_pci_msix_masked(&space));
    PROVE((space.config[VFUX_PCI_STATUS] & VFU_PCI_STATUS_INTX) == 0);
}
