/* SPDX-License-Identifier: MIT */
/*
 * firmware - the codec and the IOMMU on a microcontroller: no operating system, no C library, no allocator, one thread
 *
 *     cc -std=c11 -I. examples/firmware/record.c -o /tmp/record -pthread && /tmp/record >/tmp/session.h
 *     arm-none-eabi-gcc -std=c11 -Os -mcpu=cortex-m3 -mthumb -ffreestanding -nostdlib -ffunction-sections -fdata-sections \
 *         -Iexamples/firmware -I. -I/tmp examples/firmware/{main,replay,direct,vfu,string,board}.c \
 *         -T examples/firmware/board.ld -Wl,--gc-sections -lgcc -o /tmp/firmware.elf
 *     qemu-system-arm -M mps2-an385 -nographic -semihosting -kernel /tmp/firmware.elf
 *
 * The image keeps a guest's memory as a broker between a client and its device would: it maps and unmaps what the client says,
 * and answers the device's DMA. What they say is a recorded session (record.c), and each answer has to be the recorded one, byte
 * by byte. Status 0 only if all of it went as it should.
 */
#include "firmware.h"

enum { MAPPINGS = 8, BUFFER_SIZE = 2560 };

uint8_t memory[MEMORY_SIZE];
vfu_iommu *iommu;
vfu_iommu_reader *reader;

static uint8_t buffer[BUFFER_SIZE]; /* all that the table ever takes */
static uint32_t checks, failures;

bool check(bool good, const char *what)
{
    checks++;
    failures += !good;
    if (!good) {
        board_print("FAIL: ");
        board_print(what);
        board_print("\n");
    }
    return good;
}

static void print_number(const char *before, uint64_t value, unsigned base)
{
    char digits[24], *at = digits + sizeof(digits);
    *--at = '\0';
    do
        *--at = "0123456789abcdef"[value % base];
    while (value /= base);
    board_print(before);
    board_print(at);
}

void print_hex(const char *before, uint64_t value) { print_number(before, value, 16); }
void print_decimal(const char *before, uint32_t value) { print_number(before, value, 10); }

void print_refused(void)
{
    const vfu_iommu_fault *fault = vfu_iommu_last_fault(reader);
    board_print("   refused: ");
    board_print(vfu_errno_name(fault->error));
    print_hex(" at 0x", fault->iova);
    board_print("\n");
}

extern const char text_start[], text_end[], data_start[], data_end[], bss_start[], bss_end[]; /* board.ld */

static void print_sizes(const vfu_iommu_desc *desc)
{
    vfu_iommu_desc more = *desc;
    size_t footprint = vfu_iommu_footprint(desc);
    more.max_mappings++;
    print_decimal("size: text ", (uint32_t)(text_end - text_start));
    print_decimal(", data ", (uint32_t)(data_end - data_start));
    print_decimal(", bss ", (uint32_t)(bss_end - bss_start));
    print_decimal(" (of which guest memory ", MEMORY_SIZE);
    print_decimal("), stack ", (uint32_t)board_stack_used());
    print_decimal("\nsize: the IOMMU's buffer ", (uint32_t)footprint);
    print_decimal(" for ", MAPPINGS);
    print_decimal(" mappings and 1 reader, ", (uint32_t)(vfu_iommu_footprint(&more) - footprint));
    board_print(" for each further mapping\n");
}

int main(void)
{
    const vfu_iommu_desc desc = {
        .max_mappings = MAPPINGS,
        .max_readers = 1,
        .cache_entries = 16,
        .buffer = buffer,
        .buffer_size = sizeof(buffer),
    };
    if (check(vfu_iommu_create(&iommu, &desc) == 0 && vfu_iommu_reader_open(iommu, &reader) == 0, "no table")) {
        replay();
        direct();
        check(vfu_iommu_check(iommu) == 0, "the table is damaged");
        vfu_iommu_reader_close(reader);
        vfu_iommu_destroy(iommu);
    }
    print_sizes(&desc);
    print_decimal("", checks);
    print_decimal(" checks, ", failures);
    board_print(" failed\n");
    return failures ? 1 : 0;
}
