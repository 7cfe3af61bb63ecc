/* SPDX-License-Identifier: MIT */
/* The JSON of VERSION: any text is read or refused, and what was read is written and read again as the same. */
#define VFU_IMPLEMENTATION
#include "vfu.h"

#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = malloc(size ? size : 1), written[VFU_CAPS_WRITE_MAX]; /* a copy, so that a byte too many is seen */
    vfu_caps caps, again;
    if (size)
        memcpy(text, data, size);
    int err = vfu_caps_parse(text, (uint32_t)size, &caps);
    if (err > 0 || err < -4095)
        abort();
    if (err == 0) {
        int len = vfu_caps_write(&caps, written, sizeof(written));
        if (len >= 0) {
            if (len == 0 || written[len - 1] || vfu_caps_parse(written, (uint32_t)len - 1, &again))
                abort();
            if (again.max_msg_fds != caps.max_msg_fds || again.max_data_xfer_size != caps.max_data_xfer_size ||
                again.max_dma_maps != caps.max_dma_maps || again.pgsizes != caps.pgsizes ||
                again.write_multiple != caps.write_multiple || again.twin_socket != caps.twin_socket)
                abort();
        }
    }
    free(text);
    return 0;
}
