/* SPDX-License-Identifier: MIT */
/* Where gcc has been built for a system with a C library, its own <limits.h> includes the library's after itself: nothing more. */
