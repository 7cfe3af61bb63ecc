/* SPDX-License-Identifier: MIT */
/* From reset to main, and back to the outside by semihosting: the breakpoint 0xab, which QEMU or a debugger serves. */
#include "firmware.h"

#include "string.h"

int main(void);
void board_reset(void);

extern char stack_bottom[], stack_top[], data_start[], data_end[], bss_start[], bss_end[]; /* board.ld */
extern const char data_image[];

enum { SYS_WRITE0 = 0x04, SYS_EXIT_EXTENDED = 0x20, APPLICATION_EXIT = 0x20026 };
#define UNUSED_STACK UINT32_C(0xdeadbeef)

static void semihost(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}

static void leave(uint32_t status)
{
    const uint32_t reason[2] = {APPLICATION_EXIT, status};
    semihost(SYS_EXIT_EXTENDED, reason);
    for (;;) {
    }
}

void board_print(const char *text) { semihost(SYS_WRITE0, text); }

size_t board_stack_used(void)
{
    const uint32_t *at = (const uint32_t *)(void *)stack_bottom;
    while (*at == UNUSED_STACK)
        at++;
    return (size_t)(stack_top - (const char *)at);
}

void board_reset(void)
{
    uint32_t *here = __builtin_frame_address(0);
    for (uint32_t *at = (uint32_t *)(void *)stack_bottom; at < here - 16; at++) /* what is above is in use */
        *at = UNUSED_STACK;
    memcpy(data_start, data_image, (size_t)(data_end - data_start));
    memset(bss_start, 0, (size_t)(bss_end - bss_start));
    leave((uint32_t)main());
}

static void unexpected(void)
{
    board_print("an exception or interrupt that nobody expects\n");
    leave(2);
}

/* The processor loads its stack pointer from the first word and starts at the second. */
struct vectors {
    char *stack;
    void (*reset)(void);
    void (*exceptions[14])(void);
};
extern const struct vectors vectors;
const struct vectors vectors __attribute__((section(".vectors"), used)) = {
    stack_top,
    board_reset,
    {unexpected, unexpected, unexpected, unexpected, unexpected, unexpected, unexpected, unexpected, unexpected, unexpected,
     unexpected, unexpected, unexpected, unexpected},
};
