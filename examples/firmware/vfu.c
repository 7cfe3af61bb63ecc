/* SPDX-License-Identifier: MIT */
/* The one file that has the implementation of both headers. */
#define VFU_CODEC_ONLY
#define VFU_IMPLEMENTATION
#include "vfu.h"
#include "vfu_iommu.h"
