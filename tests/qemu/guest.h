/* SPDX-License-Identifier: MIT */
/* What the guest programs share: reporting, talking with the host, and the kernel's files of attributes. */
#ifndef VFU_TESTS_QEMU_GUEST_H
#define VFU_TESTS_QEMU_GUEST_H

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* ---- Reporting ------------------------------------------------------------------------------------------------------------ */

static unsigned passed;
static unsigned failed;

__attribute__((format(printf, 2, 3)))
static inline bool check(bool held, const char *format, ...) {
    va_list arguments;

    fputs(held ? "ok " : "FAIL ", stdout);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
    if (held)
        passed++;
    else
        failed++;
    return held;
}

__attribute__((format(printf, 1, 2)))
static inline void say(const char *format, ...) {
    va_list arguments;

    fputs("# ", stdout);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
}

static inline _Noreturn void finish(void) {
    if (failed == 0 && passed > 0)
        printf("GUEST PASS %u\n", passed);
    else
        printf("GUEST FAIL\n");
    fflush(stdout);
    tcdrain(STDOUT_FILENO);
    exit(failed == 0 && passed > 0 ? 0 : 1);
}

/* For what the rest of the run can't do without. */
static inline void need(bool held, const char *what) {
    if (held)
        return;
    check(false, "%s: %s", what, strerror(errno));
    finish();
}

static inline uint64_t milliseconds(void) {
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

static inline void pause_ms(unsigned ms) {
    struct timespec time = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};

    nanosleep(&time, NULL);
}

/* ---- Talking with the host ------------------------------------------------------------------------------------------------ */

static inline void serial_setup(void) {
    struct termios tty;

    if (tcgetattr(STDIN_FILENO, &tty) != 0)
        return;
    cfmakeraw(&tty);
    tcsetattr(STDIN_FILENO, TCSANOW, &tty);
}

/* The host's answer to a line; of a long one the beginning. */
static inline const char *ask(const char *question) {
    static char answer[32];
    size_t length = 0;
    char c;

    puts(question);
    fflush(stdout);
    for (;;) {
        need(read(STDIN_FILENO, &c, 1) == 1, "an answer from the host");
        if (c == '\n')
            break;
        if (length < sizeof answer - 1)
            answer[length++] = c;
    }
    answer[length] = '\0';
    return answer;
}

/* The processor is reset at once: no driver is told, no mapping goes. */
static inline _Noreturn void restart(void) {
    int fd = open("/proc/sysrq-trigger", O_WRONLY | O_CLOEXEC);

    need(fd >= 0 && write(fd, "b", 1) == 1, "/proc/sysrq-trigger");
    for (;;)
        pause();
}

/* ---- Attributes of the kernel --------------------------------------------------------------------------------------------- */

static inline bool sysfs_read(const char *directory, const char *file, char *text, size_t size) {
    char path[256];
    ssize_t got;
    int fd;

    snprintf(path, sizeof path, "%s/%s", directory, file);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    got = read(fd, text, size - 1);
    close(fd);
    if (got < 0)
        return false;
    text[got] = '\0';
    text[strcspn(text, "\n")] = '\0';
    return true;
}

static inline unsigned long sysfs_number(const char *directory, const char *file) {
    char text[64];

    return sysfs_read(directory, file, text, sizeof text) ? strtoul(text, NULL, 0) : ~0ul;
}

static inline bool sysfs_write(const char *directory, const char *file, const char *text) {
    char path[256];
    ssize_t put;
    int fd;

    snprintf(path, sizeof path, "%s/%s", directory, file);
    fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    put = write(fd, text, strlen(text));
    close(fd);
    return put == (ssize_t)strlen(text);
}

#endif
