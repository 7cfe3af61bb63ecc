/* SPDX-License-Identifier: MIT */
/*
 * The names with the prefixes vfu_ and VFU_ that libvfio-user.h takes, so that a program may include it beside our headers: each
 * is declared as the kind of thing that it is there (macro, enumerator, tag, type, function), with no regard to its value.
 */
#ifndef LIBVFIO_USER_NAMES_H
#define LIBVFIO_USER_NAMES_H

#ifdef __cplusplus
extern "C" {
#endif

#define VFU_CAP_FLAG_CALLBACK 1
#define VFU_CAP_FLAG_EXTENDED 1
#define VFU_CAP_FLAG_READONLY 1
#define VFU_DMA_REGIONS 1
#define VFU_MIGR_CALLBACKS_VERS 1
#define VFU_REGION_FLAG_ALWAYS_CB 1
#define VFU_REGION_FLAG_MASK 1
#define VFU_REGION_FLAG_MEM 1
#define VFU_REGION_FLAG_READ 1
#define VFU_REGION_FLAG_RW 1
#define VFU_REGION_FLAG_WRITE 1

enum {
    VFU_DEV_TYPE_PCI,
    VFU_GENERIC_DEV_MIGR_REGION_IDX,
    VFU_GENERIC_DEV_NUM_REGIONS,
    VFU_MIGR_STATE_PRE_COPY,
    VFU_MIGR_STATE_RESUME,
    VFU_MIGR_STATE_RUNNING,
    VFU_MIGR_STATE_STOP,
    VFU_MIGR_STATE_STOP_AND_COPY,
    VFU_PCI_DEV_BAR0_REGION_IDX,
    VFU_PCI_DEV_BAR1_REGION_IDX,
    VFU_PCI_DEV_BAR2_REGION_IDX,
    VFU_PCI_DEV_BAR3_REGION_IDX,
    VFU_PCI_DEV_BAR4_REGION_IDX,
    VFU_PCI_DEV_BAR5_REGION_IDX,
    VFU_PCI_DEV_CFG_REGION_IDX,
    VFU_PCI_DEV_MIGR_REGION_IDX,
    VFU_PCI_DEV_NUM_REGIONS,
    VFU_PCI_DEV_ROM_REGION_IDX,
    VFU_PCI_DEV_VGA_REGION_IDX,
    VFU_PCI_TYPE_CONVENTIONAL,
    VFU_PCI_TYPE_EXPRESS,
    VFU_PCI_TYPE_PCI_X_1,
    VFU_PCI_TYPE_PCI_X_2,
    VFU_RESET_DEVICE,
    VFU_RESET_LOST_CONN,
    VFU_RESET_PCI_FLR,
    VFU_TRANS_MAX,
    VFU_TRANS_PIPE,
    VFU_TRANS_SOCK
};
enum vfu_dev_irq_type {
    VFU_DEV_ERR_IRQ,
    VFU_DEV_INTX_IRQ,
    VFU_DEV_MSIX_IRQ,
    VFU_DEV_MSI_IRQ,
    VFU_DEV_NUM_IRQS,
    VFU_DEV_REQ_IRQ
};

typedef struct vfu_ctx vfu_ctx_t;
typedef struct vfu_dma_info {
    int here;
} vfu_dma_info_t;
typedef enum vfu_reset_type { LIBVFIO_USER_RESET } vfu_reset_type_t;
typedef int vfu_bar_t;
typedef int vfu_dev_type_t;
typedef int vfu_migr_state_t;
typedef int vfu_migration_callbacks_t;
typedef int vfu_pci_config_space_t;
typedef int vfu_pci_hdr_bist_t;
typedef int vfu_pci_hdr_cc_t;
typedef int vfu_pci_hdr_cmd_t;
typedef int vfu_pci_hdr_htype_t;
typedef int vfu_pci_hdr_id_t;
typedef int vfu_pci_hdr_intr_t;
typedef int vfu_pci_hdr_ss_t;
typedef int vfu_pci_hdr_sts_t;
typedef int vfu_pci_hdr_t;
typedef int vfu_pci_type_t;
typedef int vfu_trans_t;
typedef void *vfu_dma_addr_t;
typedef void(vfu_dev_irq_state_cb_t)(void);
typedef void(vfu_device_quiesce_cb_t)(void);
typedef void(vfu_dma_register_cb_t)(void);
typedef void(vfu_dma_unregister_cb_t)(void);
typedef void(vfu_log_fn_t)(void);
typedef void(vfu_migration_callback_t)(void);
typedef void(vfu_region_access_cb_t)(void);
typedef void(vfu_reset_cb_t)(void);

void vfu_addr_to_sg(void);
void vfu_addr_to_sgl(void);
void vfu_attach_ctx(void);
void vfu_create_ctx(void);
void vfu_create_ioeventfd(void);
void vfu_destroy_ctx(void);
void vfu_device_quiesced(void);
void vfu_dma_read(void);
void vfu_dma_write(void);
void vfu_get_migr_register_area_size(void);
void vfu_get_poll_fd(void);
void vfu_get_private(void);
void vfu_irq_trigger(void);
void vfu_log(void);
void vfu_map_sg(void);
void vfu_pci_add_capability(void);
void vfu_pci_find_capability(void);
void vfu_pci_find_next_capability(void);
void vfu_pci_get_config_space(void);
void vfu_pci_init(void);
void vfu_pci_set_class(void);
void vfu_pci_set_id(void);
void vfu_realize_ctx(void);
void vfu_region_to_offset(void);
void vfu_run_ctx(void);
void vfu_setup_device_dma(void);
void vfu_setup_device_migration_callbacks(void);
void vfu_setup_device_nr_irqs(void);
void vfu_setup_device_quiesce_cb(void);
void vfu_setup_device_reset_cb(void);
void vfu_setup_irq_state_callback(void);
void vfu_setup_log(void);
void vfu_setup_region(void);
void vfu_sg_is_mappable(void);
void vfu_sgl_get(void);
void vfu_sgl_mark_dirty(void);
void vfu_sgl_put(void);
void vfu_sgl_read(void);
void vfu_sgl_write(void);
void vfu_unmap_sg(void);

#ifdef __cplusplus
}
#endif
#endif
