/* SPDX-License-Identifier: MIT */
/*
 * ==== wire ====
 *
 * What the specification takes from the kernel is compared with the kernel's own header: numbers, flags, sizes, offsets. What it
 * defines itself is asserted by vfu.h when it compiles; here only the numbers of the commands are repeated, from the text.
 */
#include "vfu.h"

#include <check.h>
#include <errno.h>
#include <linux/vfio.h>
#include <stdlib.h>
#include <string.h>

/* Compared as wide numbers: the kernel's constants are plain int, ours are unsigned or enumerators. */
#define SAME(ours, kernels) ck_assert_msg((unsigned long)(ours) == (unsigned long)(kernels), "%s is not %s", #ours, #kernels)

#define SAME_FIELD(ours, our_field, kernels, kernel_field)                                                                       \
    do {                                                                                                                         \
        SAME(offsetof(ours, our_field), offsetof(struct kernels, kernel_field));                                                 \
        SAME(sizeof(((ours *)0)->our_field), sizeof(((struct kernels *)0)->kernel_field));                                       \
    } while (0)

START_TEST(test_wire_commands)
{
    static const struct {
        unsigned value;
        unsigned number;
        const char *name;
    } spec[] = {
        {VFU_CMD_VERSION, 1, "VERSION"},
        {VFU_CMD_DMA_MAP, 2, "DMA_MAP"},
        {VFU_CMD_DMA_UNMAP, 3, "DMA_UNMAP"},
        {VFU_CMD_DEVICE_GET_INFO, 4, "DEVICE_GET_INFO"},
        {VFU_CMD_DEVICE_GET_REGION_INFO, 5, "DEVICE_GET_REGION_INFO"},
        {VFU_CMD_DEVICE_GET_REGION_IO_FDS, 6, "DEVICE_GET_REGION_IO_FDS"},
        {VFU_CMD_DEVICE_GET_IRQ_INFO, 7, "DEVICE_GET_IRQ_INFO"},
        {VFU_CMD_DEVICE_SET_IRQS, 8, "DEVICE_SET_IRQS"},
        {VFU_CMD_REGION_READ, 9, "REGION_READ"},
        {VFU_CMD_REGION_WRITE, 10, "REGION_WRITE"},
        {VFU_CMD_DMA_READ, 11, "DMA_READ"},
        {VFU_CMD_DMA_WRITE, 12, "DMA_WRITE"},
        {VFU_CMD_DEVICE_RESET, 13, "DEVICE_RESET"},
        {14, 14, "?"},
        {VFU_CMD_REGION_WRITE_MULTI, 15, "REGION_WRITE_MULTI"},
        {VFU_CMD_DEVICE_FEATURE, 16, "DEVICE_FEATURE"},
        {VFU_CMD_MIG_DATA_READ, 17, "MIG_DATA_READ"},
        {VFU_CMD_MIG_DATA_WRITE, 18, "MIG_DATA_WRITE"},
        {0, 0, "?"},
        {19, 19, "?"},
        {UINT16_MAX, UINT16_MAX, "?"},
    };

    for (size_t i = 0; i < sizeof spec / sizeof spec[0]; i++) {
        ck_assert_uint_eq(spec[i].value, spec[i].number);
        ck_assert_str_eq(vfu_cmd_name((uint16_t)spec[i].number), spec[i].name);
    }
}
END_TEST

START_TEST(test_wire_kernel_numbers)
{
    SAME(VFU_DMA_READABLE, VFIO_DMA_MAP_FLAG_READ);
    SAME(VFU_DMA_WRITEABLE, VFIO_DMA_MAP_FLAG_WRITE);
    SAME(VFU_DMA_UNMAP_GET_DIRTY_BITMAP, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP);
    SAME(VFU_DMA_UNMAP_ALL, VFIO_DMA_UNMAP_FLAG_ALL);

    SAME(VFU_DEVICE_INFO_RESET, VFIO_DEVICE_FLAGS_RESET);
    SAME(VFU_DEVICE_INFO_PCI, VFIO_DEVICE_FLAGS_PCI);

    SAME(VFU_REGION_INFO_READ, VFIO_REGION_INFO_FLAG_READ);
    SAME(VFU_REGION_INFO_WRITE, VFIO_REGION_INFO_FLAG_WRITE);
    SAME(VFU_REGION_INFO_MMAP, VFIO_REGION_INFO_FLAG_MMAP);
    SAME(VFU_REGION_INFO_CAPS, VFIO_REGION_INFO_FLAG_CAPS);
    SAME(VFU_REGION_CAP_SPARSE_MMAP, VFIO_REGION_INFO_CAP_SPARSE_MMAP);
    SAME(VFU_REGION_CAP_TYPE, VFIO_REGION_INFO_CAP_TYPE);

    SAME(VFU_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_EVENTFD);
    SAME(VFU_IRQ_INFO_MASKABLE, VFIO_IRQ_INFO_MASKABLE);
    SAME(VFU_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_AUTOMASKED);
    SAME(VFU_IRQ_INFO_NORESIZE, VFIO_IRQ_INFO_NORESIZE);

    SAME(VFU_IRQ_SET_DATA_NONE, VFIO_IRQ_SET_DATA_NONE);
    SAME(VFU_IRQ_SET_DATA_BOOL, VFIO_IRQ_SET_DATA_BOOL);
    SAME(VFU_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_EVENTFD);
    SAME(VFU_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_MASK);
    SAME(VFU_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_ACTION_UNMASK);
    SAME(VFU_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_TRIGGER);
    SAME(VFU_IRQ_SET_DATA_BITS, VFIO_IRQ_SET_DATA_TYPE_MASK);
    SAME(VFU_IRQ_SET_ACTION_BITS, VFIO_IRQ_SET_ACTION_TYPE_MASK);

    SAME(VFU_FEATURE_INDEX_MASK, VFIO_DEVICE_FEATURE_MASK);
    SAME(VFU_FEATURE_GET, VFIO_DEVICE_FEATURE_GET);
    SAME(VFU_FEATURE_SET, VFIO_DEVICE_FEATURE_SET);
    SAME(VFU_FEATURE_PROBE, VFIO_DEVICE_FEATURE_PROBE);
    SAME(VFU_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_MIGRATION);
    SAME(VFU_FEATURE_MIG_STATE, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE);
    SAME(VFU_FEATURE_LOGGING_START, VFIO_DEVICE_FEATURE_DMA_LOGGING_START);
    SAME(VFU_FEATURE_LOGGING_STOP, VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP);
    SAME(VFU_FEATURE_LOGGING_REPORT, VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT);

    SAME(VFU_MIG_STOP_COPY, VFIO_MIGRATION_STOP_COPY);
    SAME(VFU_MIG_P2P, VFIO_MIGRATION_P2P);
#ifdef VFIO_MIGRATION_PRE_COPY /* in the kernel's header since 6.2 */
    SAME(VFU_MIG_PRE_COPY, VFIO_MIGRATION_PRE_COPY);
#endif
    SAME(VFU_MIG_STATE_ERROR, VFIO_DEVICE_STATE_ERROR);
    SAME(VFU_MIG_STATE_STOP, VFIO_DEVICE_STATE_STOP);
    SAME(VFU_MIG_STATE_RUNNING, VFIO_DEVICE_STATE_RUNNING);
    SAME(VFU_MIG_STATE_STOP_COPY, VFIO_DEVICE_STATE_STOP_COPY);
    SAME(VFU_MIG_STATE_RESUMING, VFIO_DEVICE_STATE_RESUMING);
    SAME(VFU_MIG_STATE_RUNNING_P2P, VFIO_DEVICE_STATE_RUNNING_P2P);
    SAME(VFU_MIG_STATE_PRE_COPY, 6); /* likewise */
    SAME(VFU_MIG_STATE_PRE_COPY_P2P, 7);

    SAME(VFU_PCI_REGION_BAR0, VFIO_PCI_BAR0_REGION_INDEX);
    SAME(VFU_PCI_REGION_BAR1, VFIO_PCI_BAR1_REGION_INDEX);
    SAME(VFU_PCI_REGION_BAR2, VFIO_PCI_BAR2_REGION_INDEX);
    SAME(VFU_PCI_REGION_BAR3, VFIO_PCI_BAR3_REGION_INDEX);
    SAME(VFU_PCI_REGION_BAR4, VFIO_PCI_BAR4_REGION_INDEX);
    SAME(VFU_PCI_REGION_BAR5, VFIO_PCI_BAR5_REGION_INDEX);
    SAME(VFU_PCI_REGION_ROM, VFIO_PCI_ROM_REGION_INDEX);
    SAME(VFU_PCI_REGION_CONFIG, VFIO_PCI_CONFIG_REGION_INDEX);
    SAME(VFU_PCI_REGION_VGA, VFIO_PCI_VGA_REGION_INDEX);
    SAME(VFU_PCI_NUM_REGIONS, VFIO_PCI_NUM_REGIONS);

    SAME(VFU_PCI_IRQ_INTX, VFIO_PCI_INTX_IRQ_INDEX);
    SAME(VFU_PCI_IRQ_MSI, VFIO_PCI_MSI_IRQ_INDEX);
    SAME(VFU_PCI_IRQ_MSIX, VFIO_PCI_MSIX_IRQ_INDEX);
    SAME(VFU_PCI_IRQ_ERR, VFIO_PCI_ERR_IRQ_INDEX);
    SAME(VFU_PCI_IRQ_REQ, VFIO_PCI_REQ_IRQ_INDEX);
    SAME(VFU_PCI_NUM_IRQS, VFIO_PCI_NUM_IRQS);
}
END_TEST

START_TEST(test_wire_kernel_layouts)
{
    /* DMA_MAP isn't here: the protocol's struct has a file offset where the kernel's has a virtual address, in another order. */
    SAME(sizeof(vfu_wire_dma_unmap), offsetof(struct vfio_iommu_type1_dma_unmap, data));
    SAME_FIELD(vfu_wire_dma_unmap, argsz, vfio_iommu_type1_dma_unmap, argsz);
    SAME_FIELD(vfu_wire_dma_unmap, flags, vfio_iommu_type1_dma_unmap, flags);
    SAME_FIELD(vfu_wire_dma_unmap, address, vfio_iommu_type1_dma_unmap, iova);
    SAME_FIELD(vfu_wire_dma_unmap, size, vfio_iommu_type1_dma_unmap, size);

    SAME_FIELD(vfu_wire_device_info, argsz, vfio_device_info, argsz);
    SAME_FIELD(vfu_wire_device_info, flags, vfio_device_info, flags);
    SAME_FIELD(vfu_wire_device_info, num_regions, vfio_device_info, num_regions);
    SAME_FIELD(vfu_wire_device_info, num_irqs, vfio_device_info, num_irqs);

    SAME(sizeof(vfu_wire_region_info), sizeof(struct vfio_region_info));
    SAME_FIELD(vfu_wire_region_info, argsz, vfio_region_info, argsz);
    SAME_FIELD(vfu_wire_region_info, flags, vfio_region_info, flags);
    SAME_FIELD(vfu_wire_region_info, index, vfio_region_info, index);
    SAME_FIELD(vfu_wire_region_info, cap_offset, vfio_region_info, cap_offset);
    SAME_FIELD(vfu_wire_region_info, size, vfio_region_info, size);
    SAME_FIELD(vfu_wire_region_info, offset, vfio_region_info, offset);

    SAME(sizeof(vfu_wire_cap_header), sizeof(struct vfio_info_cap_header));
    SAME_FIELD(vfu_wire_cap_header, id, vfio_info_cap_header, id);
    SAME_FIELD(vfu_wire_cap_header, version, vfio_info_cap_header, version);
    SAME_FIELD(vfu_wire_cap_header, next, vfio_info_cap_header, next);

    SAME(sizeof(vfu_wire_cap_sparse_mmap), offsetof(struct vfio_region_info_cap_sparse_mmap, areas));
    SAME_FIELD(vfu_wire_cap_sparse_mmap, header, vfio_region_info_cap_sparse_mmap, header);
    SAME_FIELD(vfu_wire_cap_sparse_mmap, nr_areas, vfio_region_info_cap_sparse_mmap, nr_areas);
    SAME(sizeof(vfu_wire_sparse_area), sizeof(struct vfio_region_sparse_mmap_area));
    SAME_FIELD(vfu_wire_sparse_area, offset, vfio_region_sparse_mmap_area, offset);
    SAME_FIELD(vfu_wire_sparse_area, size, vfio_region_sparse_mmap_area, size);

    SAME(sizeof(vfu_wire_cap_type), sizeof(struct vfio_region_info_cap_type));
    SAME_FIELD(vfu_wire_cap_type, type, vfio_region_info_cap_type, type);
    SAME_FIELD(vfu_wire_cap_type, subtype, vfio_region_info_cap_type, subtype);

    SAME(sizeof(vfu_wire_irq_info), sizeof(struct vfio_irq_info));
    SAME_FIELD(vfu_wire_irq_info, argsz, vfio_irq_info, argsz);
    SAME_FIELD(vfu_wire_irq_info, flags, vfio_irq_info, flags);
    SAME_FIELD(vfu_wire_irq_info, index, vfio_irq_info, index);
    SAME_FIELD(vfu_wire_irq_info, count, vfio_irq_info, count);

    SAME(sizeof(vfu_wire_irq_set), offsetof(struct vfio_irq_set, data));
    SAME_FIELD(vfu_wire_irq_set, argsz, vfio_irq_set, argsz);
    SAME_FIELD(vfu_wire_irq_set, flags, vfio_irq_set, flags);
    SAME_FIELD(vfu_wire_irq_set, index, vfio_irq_set, index);
    SAME_FIELD(vfu_wire_irq_set, start, vfio_irq_set, start);
    SAME_FIELD(vfu_wire_irq_set, count, vfio_irq_set, count);

    SAME(sizeof(vfu_wire_feature), offsetof(struct vfio_device_feature, data));
    SAME_FIELD(vfu_wire_feature, argsz, vfio_device_feature, argsz);
    SAME_FIELD(vfu_wire_feature, flags, vfio_device_feature, flags);

    SAME(sizeof(vfu_wire_feature_migration), sizeof(struct vfio_device_feature_migration));
    SAME_FIELD(vfu_wire_feature_migration, flags, vfio_device_feature_migration, flags);
    SAME(sizeof(vfu_wire_feature_mig_state), sizeof(struct vfio_device_feature_mig_state));
    SAME_FIELD(vfu_wire_feature_mig_state, state, vfio_device_feature_mig_state, device_state);
    SAME_FIELD(vfu_wire_feature_mig_state, data_fd, vfio_device_feature_mig_state, data_fd);

    /* The kernel has pointers where the wire has the array and the bitmap. */
    SAME(sizeof(vfu_wire_feature_log_control), offsetof(struct vfio_device_feature_dma_logging_control, ranges));
    SAME_FIELD(vfu_wire_feature_log_control, page_size, vfio_device_feature_dma_logging_control, page_size);
    SAME_FIELD(vfu_wire_feature_log_control, num_ranges, vfio_device_feature_dma_logging_control, num_ranges);
    SAME(sizeof(vfu_wire_feature_log_range), sizeof(struct vfio_device_feature_dma_logging_range));
    SAME_FIELD(vfu_wire_feature_log_range, iova, vfio_device_feature_dma_logging_range, iova);
    SAME_FIELD(vfu_wire_feature_log_range, length, vfio_device_feature_dma_logging_range, length);
    SAME(sizeof(vfu_wire_feature_log_report), offsetof(struct vfio_device_feature_dma_logging_report, bitmap));
    SAME_FIELD(vfu_wire_feature_log_report, iova, vfio_device_feature_dma_logging_report, iova);
    SAME_FIELD(vfu_wire_feature_log_report, length, vfio_device_feature_dma_logging_report, length);
    SAME_FIELD(vfu_wire_feature_log_report, page_size, vfio_device_feature_dma_logging_report, page_size);
}
END_TEST

/* Every value that this system's <errno.h> knows has the name that it has there, with either sign. */
START_TEST(test_wire_errno_names)
{
#define E(name) {name, #name}
    static const struct {
        int value;
        const char *name;
    } known[] = {
        E(EPERM), E(ENOENT), E(ESRCH), E(EINTR), E(EIO), E(ENXIO), E(E2BIG), E(ENOEXEC), E(EBADF), E(ECHILD), E(EAGAIN),
        E(ENOMEM), E(EACCES), E(EFAULT), E(ENOTBLK), E(EBUSY), E(EEXIST), E(EXDEV), E(ENODEV), E(ENOTDIR), E(EISDIR), E(EINVAL),
        E(ENFILE), E(EMFILE), E(ENOTTY), E(ETXTBSY), E(EFBIG), E(ENOSPC), E(ESPIPE), E(EROFS), E(EMLINK), E(EPIPE), E(EDOM),
        E(ERANGE), E(EDEADLK), E(ENAMETOOLONG), E(ENOLCK), E(ENOSYS), E(ENOTEMPTY), E(ELOOP), E(ENOMSG), E(EIDRM), E(ECHRNG),
        E(EL2NSYNC), E(EL3HLT), E(EL3RST), E(ELNRNG), E(EUNATCH), E(ENOCSI), E(EL2HLT), E(EBADE), E(EBADR), E(EXFULL), E(ENOANO),
        E(EBADRQC), E(EBADSLT), E(EBFONT), E(ENOSTR), E(ENODATA), E(ETIME), E(ENOSR), E(ENONET), E(ENOPKG), E(EREMOTE),
        E(ENOLINK), E(EADV), E(ESRMNT), E(ECOMM), E(EPROTO), E(EMULTIHOP), E(EDOTDOT), E(EBADMSG), E(EOVERFLOW), E(ENOTUNIQ),
        E(EBADFD), E(EREMCHG), E(ELIBACC), E(ELIBBAD), E(ELIBSCN), E(ELIBMAX), E(ELIBEXEC), E(EILSEQ), E(ERESTART), E(ESTRPIPE),
        E(EUSERS), E(ENOTSOCK), E(EDESTADDRREQ), E(EMSGSIZE), E(EPROTOTYPE), E(ENOPROTOOPT), E(EPROTONOSUPPORT),
        E(ESOCKTNOSUPPORT), E(EOPNOTSUPP), E(EPFNOSUPPORT), E(EAFNOSUPPORT), E(EADDRINUSE), E(EADDRNOTAVAIL), E(ENETDOWN),
        E(ENETUNREACH), E(ENETRESET), E(ECONNABORTED), E(ECONNRESET), E(ENOBUFS), E(EISCONN), E(ENOTCONN), E(ESHUTDOWN),
        E(ETOOMANYREFS), E(ETIMEDOUT), E(ECONNREFUSED), E(EHOSTDOWN), E(EHOSTUNREACH), E(EALREADY), E(EINPROGRESS), E(ESTALE),
        E(EUCLEAN), E(ENOTNAM), E(ENAVAIL), E(EISNAM), E(EREMOTEIO), E(EDQUOT), E(ENOMEDIUM), E(EMEDIUMTYPE), E(ECANCELED),
    };
#undef E

    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        ck_assert_str_eq(vfu_errno_name(known[i].value), known[i].name);
        ck_assert_str_eq(vfu_errno_name(-known[i].value), known[i].name);
    }
    ck_assert_str_eq(vfu_errno_name(0), "?");
    ck_assert_str_eq(vfu_errno_name(41), "?");
    ck_assert_str_eq(vfu_errno_name(4096), "?");
    ck_assert_str_eq(vfu_errno_name(INT_MAX), "?");
    ck_assert_str_eq(vfu_errno_name(INT_MIN), "?");
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("wire");
    TCase *tc = tcase_create("wire");
    SRunner *runner;
    int failed;

    tcase_add_test(tc, test_wire_commands);
    tcase_add_test(tc, test_wire_kernel_numbers);
    tcase_add_test(tc, test_wire_kernel_layouts);
    tcase_add_test(tc, test_wire_errno_names);
    suite_add_tcase(suite, tc);
    runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
