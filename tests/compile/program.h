/* SPDX-License-Identifier: MIT */
/*
 * The body of a program for the compile tests, in the common part of C11 and C++17: it maps a page, moves bytes and takes the
 * page away again, so that what was compiled and linked is also seen to work. The file that includes it has included the headers.
 */
#include <stdio.h>
#include <string.h>

static int program(void)
{
    static unsigned char page[4096];
    const char text[] = "through the vIOMMU";
    char back[sizeof(text)] = "";
    vfu_iommu *iommu = NULL;
    vfu_iommu_reader *reader = NULL;
    vfu_iommu_mapping mapping;

    memset(&mapping, 0, sizeof(mapping));
    mapping.iova = 0x100000;
    mapping.size = sizeof(page);
    mapping.prot = VFU_IOMMU_READ | VFU_IOMMU_WRITE;
    mapping.host = page;

    int works = vfu_iommu_create(&iommu, NULL) == 0 && vfu_iommu_reader_open(iommu, &reader) == 0 &&
                vfu_iommu_map(iommu, &mapping) == 0 && vfu_iommu_write(reader, 0x100010, text, sizeof(text)) == 0 &&
                vfu_iommu_read(reader, 0x100010, back, sizeof(back)) == 0 && memcmp(text, back, sizeof(text)) == 0 &&
                memcmp(text, page + 16, sizeof(text)) == 0 && vfu_iommu_unmap(iommu, 0x100000, sizeof(page)) == 1 &&
                vfu_iommu_read(reader, 0x100010, back, sizeof(back)) < 0;
    vfu_iommu_reader_close(reader);
    vfu_iommu_destroy(iommu);
    puts(works ? "the table works" : "the table does not work");
    return works ? 0 : 1;
}
