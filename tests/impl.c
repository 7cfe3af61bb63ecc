/* SPDX-License-Identifier: MIT */
/* The one implementation that the test programs link with. */
#define VFU_IMPLEMENTATION
#include "vfu.h"
