/* SPDX-License-Identifier: MIT */
/*
 * ==== the serial port ====
 *
 * examples/serial as its guest and its line see it: the program is started with pipes, files or a terminal for standard input and
 * output, and its registers are accessed through the client endpoint. "UART" stands for the data sheet of the 16550A.
 *
 * The program: $VFU_SERIAL, else serial in $VFU_EXAMPLES, else build/examples/serial.
 */
#define _GNU_SOURCE
#include "vfu.h"

#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
#define must(expr)   ck_assert_int_ge((expr), 0)

enum { PATIENCE_MS = 20000 /* what has to happen at all may take as long: a loaded machine is slow */ };
enum { RBR = 0, THR = 0, DLL = 0, IER = 1, DLM = 1, IIR = 2, FCR = 2, LCR = 3, MCR = 4, LSR = 5, MSR = 6, SCR = 7 };
enum { RTS = 0x02, OUT2 = 0x08, LOOP = 0x10, DLAB = 0x80, WORD8 = 0x03 };
enum { DR = 0x01, OE = 0x02, THRE = 0x20, TEMT = 0x40 };
enum { ON = 0x01, CLEAR_RX = 0x02, CLEAR_TX = 0x04, TRIGGER_4 = 0x40, TRIGGER_14 = 0xc0 }; /* FCR */
enum { LINES = 0xb0 };                                                                     /* MSR: DCD, DSR and CTS */

/* ---- the program ----------------------------------------------------------------------------------------------------------- */

static char scratch[40]; /* all files are in here */

/* One program and its client. */
static struct {
    pid_t pid;
    char path[80], err[80]; /* its socket, its standard error */
    int in, out;            /* our ends of its line */
    int in_theirs, out_theirs;
    vfu_client *client;
    int intx; /* an eventfd */
} port;

static int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000) + t.tv_nsec / 1000;
}

static void nap(void) { nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL); }

/* Waits until the condition holds; the test fails when it doesn't in time. */
#define EVENTUALLY(condition) \
    do { \
        int64_t end_ = now_us() + PATIENCE_MS * INT64_C(1000); \
        while (!(condition)) { \
            ck_assert_msg(now_us() < end_, "in %d ms not so: %s", (int)PATIENCE_MS, #condition); \
            nap(); \
        } \
    } while (0)

static const char *program(void)
{
    static char file[4096];
    const char *path = getenv("VFU_SERIAL"), *examples = getenv("VFU_EXAMPLES");
    if (path && *path)
        return path;
    snprintf(file, sizeof(file), "%s/serial", examples && *examples ? examples : "build/examples");
    return file;
}

/* The ends of a line that isn't used yet. */
static void make_line(void)
{
    int in[2], out[2];
    must(pipe2(in, O_CLOEXEC));
    must(pipe2(out, O_CLOEXEC));
    port.in_theirs = in[0];
    port.in = in[1];
    port.out = out[0];
    port.out_theirs = out[1];
    must(fcntl(port.out, F_SETFL, O_NONBLOCK));
}

static void name_files(void)
{
    static unsigned number;
    snprintf(port.path, sizeof(port.path), "%s/%d-%u.sock", scratch, (int)getpid(), ++number);
    snprintf(port.err, sizeof(port.err), "%s/%d-%u.err", scratch, (int)getpid(), number);
}

/* Starts it on `in_theirs` and `out_theirs`, with `inherited` open (-1: nothing). It dies with us. terminal: its standard input
 * is to be the terminal of a session that it leads. */
static void spawn(const char *const *arguments, int inherited, bool terminal)
{
    char *argv[8] = {(char *)(uintptr_t) "serial"};
    for (unsigned i = 0; arguments[i]; i++)
        argv[i + 1] = (char *)(uintptr_t)arguments[i];
    port.pid = fork();
    must(port.pid);
    if (port.pid)
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    int err = open(port.err, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (terminal && (setsid() < 0 || ioctl(port.in_theirs, TIOCSCTTY, 0) < 0))
        _exit(125);
    if (dup2(port.in_theirs, 0) < 0 || dup2(port.out_theirs, 1) < 0 || dup2(err, 2) < 0)
        _exit(126);
    if (inherited >= 0)
        fcntl(inherited, F_SETFD, 0);
    execv(program(), argv);
    _exit(127);
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static bool is_there(const char *path)
{
    struct stat st;
    return lstat(path, &st) == 0;
}

/* Starts it on a socket of its own. */
static void start_on_line(bool terminal)
{
    char where[100];
    name_files();
    snprintf(where, sizeof(where), "--socket-path=%s", port.path);
    spawn((const char *const[]){where, NULL}, -1, terminal);
    if (!terminal) {
        close_fd(&port.in_theirs);
        close_fd(&port.out_theirs);
    }
    EVENTUALLY(is_there(port.path));
}

/* Its exit status, or 1000 + the signal that ended it. */
static int wait_end(void)
{
    int status = 0;
    pid_t pid = port.pid;
    EVENTUALLY(waitpid(pid, &status, WNOHANG) == pid);
    port.pid = 0;
    return WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : WEXITSTATUS(status);
}

static const char *errors(void)
{
    static char text[4000];
    int fd = open(port.err, O_RDONLY | O_CLOEXEC);
    ssize_t len = fd < 0 ? 0 : read(fd, text, sizeof(text) - 1);
    text[len > 0 ? len : 0] = 0;
    close_fd(&fd);
    return text;
}

/* ---- its client ------------------------------------------------------------------------------------------------------------ */

static void join(void)
{
    EVENTUALLY(vfu_client_connect(&port.client, port.path, NULL) == 0);
    port.intx = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    must(port.intx);
    ck_assert_int_eq(vfu_client_irq_assign(port.client, VFU_PCI_IRQ_INTX, 0, 1, &port.intx), 0);
}

static void leave(void)
{
    vfu_client_destroy(port.client);
    port.client = NULL;
    close_fd(&port.intx);
}

static void begin(void)
{
    make_line();
    start_on_line(false);
    join();
}

/* Ends what begin began: the program has not crashed. */
static void end_of_mistakes(void)
{
    leave();
    must(kill(port.pid, SIGTERM));
    ck_assert_int_eq(wait_end(), 0);
    ck_assert(!is_there(port.path));
    close_fd(&port.in);
    close_fd(&port.out);
}

/* Nor has it complained. */
static void end(void)
{
    end_of_mistakes();
    ck_assert_str_eq(errors(), "");
}

static uint8_t rd(uint64_t reg)
{
    uint8_t value;
    ck_assert_int_eq(vfu_client_region_read(port.client, VFU_PCI_REGION_BAR0, reg, &value, 1), 0);
    return value;
}

static void wr(uint64_t reg, unsigned value)
{
    uint8_t byte = (uint8_t)value;
    ck_assert_int_eq(vfu_client_region_write(port.client, VFU_PCI_REGION_BAR0, reg, &byte, 1), 0);
}

static void wr_all(uint64_t reg, const char *bytes)
{
    for (; *bytes; bytes++)
        wr(reg, (uint8_t)*bytes);
}

static void set_divisor(unsigned divisor)
{
    uint8_t lcr = rd(LCR);
    wr(LCR, lcr | DLAB);
    wr(DLL, divisor & 0xff);
    wr(DLM, divisor >> 8);
    wr(LCR, lcr);
}

static uint32_t config(uint32_t offset, uint32_t width)
{
    uint8_t bytes[4] = {0};
    ck_assert_int_eq(vfu_client_region_read(port.client, VFU_PCI_REGION_CONFIG, offset, bytes, width), 0);
    return bytes[0] | (uint32_t)bytes[1] << 8 | (uint32_t)bytes[2] << 16 | (uint32_t)bytes[3] << 24;
}

static void set_config(uint32_t offset, uint32_t value, uint32_t width)
{
    uint8_t bytes[4] = {(uint8_t)value, (uint8_t)(value >> 8), (uint8_t)(value >> 16), (uint8_t)(value >> 24)};
    ck_assert_int_eq(vfu_client_region_write(port.client, VFU_PCI_REGION_CONFIG, offset, bytes, width), 0);
}

/* How often INTx was signalled since the last time. A reply comes behind the signals of what it answers: no need to wait. */
static uint64_t signals(void)
{
    uint64_t count = 0;
    if (read(port.intx, &count, sizeof(count)) != sizeof(count))
        return 0;
    return count >> 56 ? count >> 56 : count; /* an emulator swaps the bytes of an eventfd's count, but for some descriptors */
}

/* Waits for a signal. */
static void await_intx(void)
{
    struct pollfd fd = {.fd = port.intx, .events = POLLIN};
    ck_assert_int_eq(poll(&fd, 1, PATIENCE_MS), 1);
    ck_assert_uint_eq(signals(), 1);
}

static void unmask(void)
{
    ck_assert_int_eq(vfu_client_irq_action(port.client, VFU_PCI_IRQ_INTX, 0, 1, VFU_IRQ_SET_ACTION_UNMASK), 0);
}

/* ---- the line -------------------------------------------------------------------------------------------------------------- */

static void say_bytes(const void *bytes, size_t len) { ck_assert_int_eq(write(port.in, bytes, len), (ssize_t)len); }
static void say(const char *text) { say_bytes(text, strlen(text)); }

/* Waits for `len` bytes of its output, and makes sure that there is no more. */
static void hear_bytes(void *bytes, size_t len)
{
    char more;
    for (size_t done = 0; done < len;) {
        struct pollfd fd = {.fd = port.out, .events = POLLIN};
        ck_assert_int_eq(poll(&fd, 1, PATIENCE_MS), 1);
        ssize_t count = read(port.out, (char *)bytes + done, len - done);
        ck_assert_int_gt(count, 0);
        done += (size_t)count;
    }
    ck_assert_int_lt(read(port.out, &more, 1), 0);
}

static void hear(const char *text)
{
    char bytes[100];
    hear_bytes(bytes, strlen(text));
    ck_assert_mem_eq(bytes, text, strlen(text));
}

/* Fills the pipe to its standard output to the brim: how many bytes that takes. */
static size_t fill_output(void)
{
    char zeros[4096] = {0};
    size_t total = 0;
    must(fcntl(port.out_theirs, F_SETPIPE_SZ, 8192)); /* two pages: poll() sees room while there is an empty one */
    must(fcntl(port.out_theirs, F_SETFL, O_NONBLOCK));
    for (ssize_t count; (count = write(port.out_theirs, zeros, sizeof(zeros))) > 0;)
        total += (size_t)count;
    must(fcntl(port.out_theirs, F_SETFL, 0));
    return total;
}

static void drain_output(size_t len)
{
    static char bytes[65536];
    ck_assert_uint_le(len, sizeof(bytes));
    for (size_t done = 0; done < len;) {
        ssize_t count = read(port.out, bytes, len - done);
        ck_assert_int_gt(count, 0);
        done += (size_t)count;
    }
}

/* As begin, but nobody takes its output: how many bytes are in the pipe. */
static size_t begin_blocked(void)
{
    make_line();
    size_t filled = fill_output();
    start_on_line(false);
    join();
    return filled;
}

/* ---- PCI ------------------------------------------------------------------------------------------------------------------- */

/* A 16550-compatible port with one I/O BAR of eight bytes and an interrupt pin: what 8250_pci looks for. */
START_TEST(serial_is_a_pci_serial_port)
{
    vfu_wire_device_info info;
    vfu_wire_irq_info irq;
    vfu_client_region region;
    begin();
    ck_assert_int_eq(vfu_client_info(port.client, &info), 0);
    ck_assert_uint_eq(info.flags, VFU_DEVICE_INFO_RESET | VFU_DEVICE_INFO_PCI);
    ck_assert_uint_eq(config(0x00, 4), 0x16551234);
    ck_assert_uint_eq(config(0x08, 4), 0x07000201);
    ck_assert_uint_eq(config(0x2c, 4), 0x00011234);
    ck_assert_uint_eq(config(0x3d, 1), 1);
    set_config(0x10, 0xffffffff, 4);
    ck_assert_uint_eq(config(0x10, 4), 0xfffffff9);
    for (uint32_t bar = 1; bar < 6; bar++) {
        set_config(0x10 + 4 * bar, 0xffffffff, 4);
        ck_assert_uint_eq(config(0x10 + 4 * bar, 4), 0);
    }
    for (uint32_t i = 0; i <= VFU_PCI_REGION_ROM; i++) {
        ck_assert_int_eq(vfu_client_region_info(port.client, i, &region), 0);
        ck_assert_uint_eq(region.size, i ? 0 : 8);
        ck_assert_int_eq(region.fd, -1);
        if (!i)
            ck_assert_uint_eq(region.flags, VFU_REGION_INFO_READ | VFU_REGION_INFO_WRITE);
    }
    for (uint32_t i = VFU_PCI_IRQ_INTX; i <= VFU_PCI_IRQ_MSIX; i++) {
        ck_assert_int_eq(vfu_client_irq_info(port.client, i, &irq), 0);
        ck_assert_uint_eq(irq.count, i == VFU_PCI_IRQ_INTX);
    }
    end();
}
END_TEST

/* A wide access is that many accesses of a byte, in ascending order; beyond the BAR there is nothing. */
START_TEST(serial_takes_wide_accesses)
{
    uint8_t bytes[8], seen[8];
    begin();
    memcpy(bytes, (uint8_t[8]){'x', 0x05, 0x07, 0x1b, 0x02, 0xff, 0xff, 0xa5}, 8);
    ck_assert_int_eq(vfu_client_region_write(port.client, VFU_PCI_REGION_BAR0, 0, bytes, 8), 0);
    hear("\x18"); /* 'x' while LCR still said 5 bits */
    memcpy(bytes, (uint8_t[8]){0, 0x05, 0xc1, 0x1b, 0x02, THRE | TEMT, LINES, 0xa5}, 8);
    for (unsigned width = 1; width <= 8; width *= 2) {
        for (unsigned at = 0; at < 8; at += width)
            ck_assert_int_eq(vfu_client_region_read(port.client, VFU_PCI_REGION_BAR0, at, seen + at, width), 0);
        ck_assert_mem_eq(seen, bytes, 8);
    }
    ck_assert_int_eq(vfu_client_region_read(port.client, VFU_PCI_REGION_BAR0, 7, seen, 2), -EINVAL);
    ck_assert_int_eq(vfu_client_region_write(port.client, VFU_PCI_REGION_BAR0, 8, seen, 1), -EINVAL);
    end_of_mistakes();
}
END_TEST

/* ---- registers ------------------------------------------------------------------------------------------------------------- */

static void check_initial(void)
{
    static const uint8_t initial[8] = {[IIR] = 0x01, [LSR] = THRE | TEMT, [MSR] = LINES};
    for (unsigned reg = 0; reg < 8; reg++)
        ck_assert_msg(rd(reg) == initial[reg], "register %u", reg);
    wr(LCR, DLAB);
    ck_assert_uint_eq(rd(DLL), 0);
    ck_assert_uint_eq(rd(DLM), 0);
    wr(LCR, 0);
}

START_TEST(serial_has_initial_values)
{
    begin();
    check_initial();
    end();
}
END_TEST

/* Each register keeps the bits that it has, and no other register is changed. */
START_TEST(serial_keeps_what_is_written)
{
    static const struct {
        unsigned reg;
        uint8_t kept;
    } cases[] = {{IER, 0x0f}, {LCR, 0x7f}, {MCR, 0x0f}, {SCR, 0xff}, {LSR, 0}, {MSR, 0}};
    begin();
    for (unsigned i = 0; i < COUNT(cases); i++) {
        uint8_t before[8];
        unsigned reg = cases[i].reg;
        for (unsigned other = 1; other < 8; other++)
            before[other] = rd(other);
        for (unsigned value = 0; value < 256; value++) {
            if ((reg == LCR && value & DLAB) || (reg == MCR && value & LOOP))
                continue;
            wr(reg, value);
            if (cases[i].kept)
                ck_assert_uint_eq(rd(reg), value & cases[i].kept);
            rd(IIR); /* enabling the interrupt of an empty THR has raised it */
            for (unsigned other = 1; other < 8; other++)
                if (other != reg || !cases[i].kept)
                    ck_assert_uint_eq(rd(other), before[other]);
        }
        wr(reg, 0);
    }
    end();
}
END_TEST

/* "UART: the divisor latch access bit must be set high to access the divisor latches", and shields RBR, THR and IER. */
START_TEST(serial_has_a_divisor)
{
    begin();
    wr(IER, 0x01);
    wr(LCR, DLAB | WORD8);
    for (unsigned value = 0; value < 256; value++) {
        wr(DLL, value);
        wr(DLM, 255 - value);
        ck_assert_uint_eq(rd(DLL), value);
        ck_assert_uint_eq(rd(DLM), 255 - value);
        ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    }
    wr(SCR, 0x55);
    ck_assert_uint_eq(rd(SCR), 0x55);
    ck_assert_uint_eq(rd(LCR), DLAB | WORD8);
    wr(LCR, WORD8);
    ck_assert_uint_eq(rd(IER), 0x01);
    set_divisor(0);
    wr(THR, 'a');
    hear("a");
    end();
}
END_TEST

/* FCR is write-only; IIR tells whether the FIFOs are on. */
START_TEST(serial_switches_fifos)
{
    begin();
    for (unsigned value = 0; value < 256; value++) {
        wr(FCR, value);
        ck_assert_uint_eq(rd(IIR), value & ON ? 0xc1 : 0x01);
    }
    end();
}
END_TEST

/* ---- transmitter ----------------------------------------------------------------------------------------------------------- */

START_TEST(serial_sends_every_byte)
{
    uint8_t bytes[256];
    begin();
    wr(LCR, WORD8);
    for (unsigned fifo = 0; fifo < 2; fifo++) {
        wr(FCR, fifo);
        for (unsigned value = 0; value < 256; value++) {
            wr(THR, value);
            ck_assert_uint_eq(rd(LSR), THRE | TEMT);
        }
        hear_bytes(bytes, sizeof(bytes));
        for (unsigned value = 0; value < 256; value++)
            ck_assert_uint_eq(bytes[value], value);
    }
    end();
}
END_TEST

/* Words of 5 to 8 bits, in both directions. */
START_TEST(serial_has_short_words)
{
    begin();
    wr(MCR, RTS);
    for (unsigned bits = 5; bits <= 8; bits++) {
        uint8_t sent[1], mask = (uint8_t)(0xff >> (8 - bits));
        wr(LCR, bits - 5);
        wr(THR, 0xf6);
        hear_bytes(sent, 1);
        ck_assert_uint_eq(sent[0], 0xf6 & mask);
        say("\xe9");
        EVENTUALLY(rd(LSR) & DR);
        ck_assert_uint_eq(rd(RBR), 0xe9 & mask);
    }
    end();
}
END_TEST

/* While nobody takes the output the program serves its client; the transmitter fills up, and says so. */
START_TEST(serial_waits_for_its_reader)
{
    static const char fifo_keeps[] = "0123456789abcdefg"; /* one in the shift register, 16 in the FIFO */
    size_t filled = begin_blocked();
    wr(LCR, WORD8);
    wr(FCR, ON);
    ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    wr(THR, '0');
    ck_assert_uint_eq(rd(LSR), THRE); /* UART: THRE is about the FIFO, TEMT about the shift register too */
    wr_all(THR, fifo_keeps + 1);
    ck_assert_uint_eq(rd(LSR), 0);
    wr_all(THR, "lost");
    ck_assert_uint_eq(rd(LSR), 0);
    ck_assert_uint_eq(rd(IIR), 0xc1);
    wr(IER, 0x02);
    ck_assert_uint_eq(rd(IIR), 0xc1); /* it is not empty */
    ck_assert_uint_eq(signals(), 0);
    drain_output(filled);
    await_intx();
    ck_assert_uint_eq(rd(IIR), 0xc2);
    ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    hear(fifo_keeps);
    end();
}
END_TEST

/* Without FIFOs there are two places, and the second is overwritten. */
START_TEST(serial_waits_for_its_reader_without_fifo)
{
    size_t filled = begin_blocked();
    wr(LCR, WORD8);
    wr(THR, '0');
    ck_assert_uint_eq(rd(LSR), THRE);
    wr(THR, '1');
    ck_assert_uint_eq(rd(LSR), 0);
    wr(THR, '2');
    ck_assert_uint_eq(rd(LSR), 0);
    drain_output(filled);
    EVENTUALLY(rd(LSR) == (THRE | TEMT));
    hear("02");
    end();
}
END_TEST

/* UART: "XMIT FIFO reset [...] The shift register is not cleared." */
START_TEST(serial_clears_its_transmitter)
{
    static const uint8_t clears[] = {ON | CLEAR_TX, 0};
    size_t filled = begin_blocked();
    wr(LCR, WORD8);
    for (unsigned i = 0; i < COUNT(clears); i++) {
        wr(IER, 0);
        wr(FCR, ON);
        wr_all(THR, i ? "eep" : "keep"); /* the shift register takes the first one and keeps it */
        ck_assert_uint_eq(rd(LSR), 0);
        wr(IER, 0x02);
        wr(FCR, ON | CLEAR_RX);
        ck_assert_uint_eq(rd(LSR), 0);
        ck_assert_uint_eq(signals(), 0);
        wr(FCR, clears[i]);
        ck_assert_uint_eq(rd(LSR), THRE);
        ck_assert_uint_eq(signals(), 1);
        ck_assert_uint_eq(rd(IIR) & 0x0f, 0x02);
        unmask();
    }
    drain_output(filled);
    EVENTUALLY(rd(LSR) == (THRE | TEMT));
    hear("k");
    end();
}
END_TEST

/* ---- receiver -------------------------------------------------------------------------------------------------------------- */

START_TEST(serial_receives_every_byte)
{
    uint8_t bytes[256];
    begin();
    wr(LCR, WORD8);
    wr(MCR, RTS);
    for (unsigned value = 0; value < 256; value++)
        bytes[value] = (uint8_t)value;
    for (unsigned fifo = 0; fifo < 2; fifo++) {
        wr(FCR, fifo);
        say_bytes(bytes, sizeof(bytes));
        for (unsigned value = 0; value < 256; value++) {
            EVENTUALLY(rd(LSR) & DR);
            ck_assert_uint_eq(rd(RBR), value);
        }
        ck_assert_uint_eq(rd(LSR), THRE | TEMT);
        ck_assert_uint_eq(rd(RBR), 0);
    }
    end();
}
END_TEST

/* How many bytes of its input it has not taken. */
static int left(void)
{
    int count;
    must(ioctl(port.in, FIONREAD, &count));
    return count;
}

/* Input is taken while RTS is on, and no more of it than there is room for: nothing is lost to a guest that doesn't read. */
START_TEST(serial_leaves_input_that_has_no_room)
{
    static const char text[] = "0123456789abcdefghijklmnopqrstuvwxyz";
    begin();
    wr(LCR, WORD8);
    say(text);
    for (unsigned i = 0; i < 20; i++) {
        ck_assert_uint_eq(rd(LSR), THRE | TEMT);
        nap();
    }
    ck_assert_int_eq(left(), 36);
    wr(MCR, RTS);
    EVENTUALLY(left() == 35);
    wr(FCR, ON); /* which drops what RBR has */
    EVENTUALLY(left() == 19);
    for (unsigned i = 0; i < 20; i++) {
        ck_assert_uint_eq(rd(LSR), DR | THRE | TEMT); /* no overrun */
        nap();
    }
    ck_assert_int_eq(left(), 19);
    wr(MCR, 0);
    for (unsigned i = 1; i < 17; i++)
        ck_assert_uint_eq(rd(RBR), (uint8_t)text[i]);
    ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    ck_assert_int_eq(left(), 19);
    wr(MCR, RTS);
    for (unsigned i = 17; i < 36; i++) {
        EVENTUALLY(rd(LSR) & DR);
        ck_assert_uint_eq(rd(RBR), (uint8_t)text[i]);
    }
    end();
}
END_TEST

/* UART: an overrun loses the byte that comes when the FIFO is full; without FIFO the one that was there. LSR tells once. */
START_TEST(serial_overruns)
{
    begin();
    wr(LCR, WORD8);
    wr(MCR, LOOP);
    wr(FCR, ON);
    wr_all(THR, "0123456789abcdef");
    ck_assert_uint_eq(rd(LSR), DR | THRE | TEMT);
    wr(THR, 'x');
    ck_assert_uint_eq(rd(LSR), DR | OE | THRE | TEMT);
    ck_assert_uint_eq(rd(LSR), DR | THRE | TEMT);
    for (const char *c = "0123456789abcdef"; *c; c++)
        ck_assert_uint_eq(rd(RBR), (uint8_t)*c);
    ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    wr(FCR, 0);
    wr_all(THR, "xy");
    ck_assert_uint_eq(rd(LSR), DR | OE | THRE | TEMT);
    ck_assert_uint_eq(rd(RBR), 'y');
    ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    end();
}
END_TEST

/* UART: FCR clears the receiver; both FIFOs are cleared when they are switched; bits without FCR0 "will not be programmed". */
START_TEST(serial_clears_its_receiver)
{
    begin();
    wr(LCR, WORD8);
    wr(MCR, LOOP);
    wr(THR, 'a');
    wr(FCR, CLEAR_RX);
    ck_assert_uint_eq(rd(LSR), DR | THRE | TEMT);
    wr(FCR, ON);
    ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    wr_all(THR, "abc");
    wr(FCR, ON | CLEAR_TX);
    ck_assert_uint_eq(rd(LSR), DR | THRE | TEMT);
    wr(FCR, ON | CLEAR_RX);
    ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    wr_all(THR, "d");
    ck_assert_uint_eq(rd(RBR), 'd');
    wr_all(THR, "ef");
    wr(FCR, 0);
    ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    end();
}
END_TEST

/* ---- modem and loopback ---------------------------------------------------------------------------------------------------- */

/* UART: in loopback the modem control outputs are the modem status inputs; deltas tell of changes, of RI only of its end. */
START_TEST(serial_loops_its_modem_lines)
{
    begin();
    wr(MCR, LOOP);
    ck_assert_uint_eq(rd(MSR), 0x0b); /* CTS, DSR and DCD went off */
    unsigned before = 0;
    for (unsigned i = 0; i < 256; i++) {
        unsigned outputs = (i * 7) & 0x0f; /* DTR, RTS, OUT1, OUT2 */
        unsigned lines = (outputs & 1) << 5 | (outputs & 2) << 3 | (outputs & 4) << 4 | (outputs & 8) << 4;
        unsigned deltas = ((lines ^ before) >> 4) & ~((lines >> 4) & 4);
        wr(MCR, LOOP | outputs);
        ck_assert_uint_eq(rd(MSR), lines | deltas);
        ck_assert_uint_eq(rd(MSR), lines);
        before = lines;
    }
    wr(MCR, LOOP);
    rd(MSR);
    wr(MCR, LOOP | RTS);
    wr(MCR, LOOP);
    ck_assert_uint_eq(rd(MSR), 0x01); /* it was on for a while */
    wr(MCR, 0);
    ck_assert_uint_eq(rd(MSR), LINES | 0x0b);
    ck_assert_uint_eq(rd(MSR), LINES);
    end();
}
END_TEST

/* In loopback nothing leaves and nothing comes in. */
START_TEST(serial_loops_its_data)
{
    char none;
    begin();
    wr(LCR, WORD8);
    wr(FCR, ON);
    say("in");
    wr(MCR, LOOP | RTS);
    wr_all(THR, "loop");
    for (const char *c = "loop"; *c; c++)
        ck_assert_uint_eq(rd(RBR), (uint8_t)*c);
    ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    ck_assert_int_eq(left(), 2);
    ck_assert_int_lt(read(port.out, &none, 1), 0);
    wr(LCR, 0);
    wr(THR, 0xff);
    ck_assert_uint_eq(rd(RBR), 0x1f);
    wr(LCR, WORD8);
    wr(MCR, RTS);
    wr_all(THR, "out");
    hear("out");
    EVENTUALLY(rd(LSR) & DR);
    ck_assert_uint_eq(rd(RBR), 'i');
    end();
}
END_TEST

/* When the reader of its output goes, the carrier does; what is written then is sent into the void. */
static void check_hung_up(void)
{
    wr(IER, 0x08);
    wr_all(THR, "gone");
    ck_assert_uint_eq(rd(IIR), 0x00);
    ck_assert_uint_eq(signals(), 1);
    ck_assert_uint_eq(rd(MSR), 0x38);
    ck_assert_uint_eq(rd(IIR), 0x01);
    ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    wr(MCR, RTS);
    say("x");
    EVENTUALLY(rd(LSR) & DR);
    ck_assert_uint_eq(rd(RBR), 'x' & 0x1f);
}

START_TEST(serial_hangs_up)
{
    begin();
    close_fd(&port.out);
    check_hung_up();
    end();
}
END_TEST

/* And so it stays: who comes later doesn't get half of it. */
START_TEST(serial_stays_hung_up)
{
    char path[100], none;
    snprintf(path, sizeof(path), "%s/%d.fifo", scratch, (int)getpid());
    must(mkfifo(path, 0600));
    make_line();
    close_fd(&port.out);
    close_fd(&port.out_theirs);
    must(port.out = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC));
    must(port.out_theirs = open(path, O_WRONLY | O_CLOEXEC));
    start_on_line(false);
    join();
    close_fd(&port.out);
    check_hung_up();
    must(port.out = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC));
    wr_all(THR, "half");
    ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    ck_assert_uint_eq(rd(MSR), 0x30);
    ck_assert_int_lt(read(port.out, &none, 1), 0);
    end();
}
END_TEST

START_TEST(serial_hangs_up_on_a_full_disk)
{
    make_line();
    close_fd(&port.out_theirs);
    must(port.out_theirs = open("/dev/full", O_WRONLY | O_CLOEXEC));
    start_on_line(false);
    join();
    check_hung_up();
    end();
}
END_TEST

/* ---- interrupts ------------------------------------------------------------------------------------------------------------ */

/* The receiver's interrupt comes at the trigger level, and goes below it. */
START_TEST(serial_has_trigger_levels)
{
    static const unsigned levels[] = {1, 4, 8, 14};
    begin();
    wr(LCR, WORD8);
    wr(MCR, LOOP);
    wr(IER, 0x01);
    for (unsigned i = 0; i < 4; i++) {
        wr(FCR, ON | CLEAR_RX | i << 6);
        for (unsigned n = 1; n <= 16; n++) {
            wr(THR, n);
            unsigned source = rd(IIR);
            if (n >= levels[i])
                ck_assert_uint_eq(source, 0xc4);
            else
                ck_assert_msg(source == 0xc1 || source == 0xcc, "%u bytes, level %u: 0x%x", n, levels[i], source);
        }
        set_divisor(0xffff); /* the time of four bytes is 22 seconds: no timeout comes */
        for (unsigned n = 15; n < 16; n--) {
            ck_assert_uint_eq(rd(RBR), 16 - n);
            ck_assert_uint_eq(rd(IIR), n >= levels[i] ? 0xc4 : 0xc1);
        }
        set_divisor(0);
    }
    wr(FCR, 0);
    wr(THR, 'a');
    ck_assert_uint_eq(rd(IIR), 0x04);
    rd(RBR);
    ck_assert_uint_eq(rd(IIR), 0x01);
    end();
}
END_TEST

/* UART: the time-out comes when nothing was received or read for the time of four bytes; a read clears it. */
START_TEST(serial_has_a_character_timeout)
{
    begin();
    wr(LCR, WORD8);
    wr(MCR, RTS);
    wr(FCR, ON | TRIGGER_14);
    wr(IER, 0x01);
    set_divisor(24); /* 4800 baud, 2084 us for a byte */
    int64_t start = now_us();
    say("abc");
    await_intx();
    ck_assert_int_ge(now_us() - start, 6 * 2083); /* three bytes, the first without delay, and four more */
    ck_assert_uint_eq(rd(IIR), 0xcc);
    ck_assert_uint_eq(rd(IIR), 0xcc);
    start = now_us();
    ck_assert_uint_eq(rd(RBR), 'a');
    unmask();
    await_intx();
    ck_assert_int_ge(now_us() - start, 4 * 2083);
    ck_assert_uint_eq(rd(IIR), 0xcc);
    wr(FCR, ON | TRIGGER_14 | CLEAR_RX);
    ck_assert_uint_eq(rd(IIR), 0xc1);
    set_divisor(0);
    wr(FCR, 0); /* without FIFOs a byte is above the trigger level */
    say("d");
    unmask();
    await_intx();
    ck_assert_uint_eq(rd(IIR), 0x04);
    end();
}
END_TEST

/* UART: the interrupt of an empty THR is raised by becoming empty and by being enabled, and cleared by reading IIR, if that names
 * it, or writing THR. Linux tries this out and keeps a timer where it isn't so. */
START_TEST(serial_tells_when_it_is_empty)
{
    size_t filled = begin_blocked();
    wr(LCR, WORD8);
    for (unsigned i = 0; i < 3; i++) {
        wr(IER, 0x02);
        ck_assert_uint_eq(rd(IIR), 0x02);
        ck_assert_uint_eq(rd(IIR), 0x01);
        wr(IER, 0x02); /* it is enabled already */
        ck_assert_uint_eq(rd(IIR), 0x01);
        wr(IER, 0x00);
        ck_assert_uint_eq(rd(IIR), 0x01);
    }
    wr(IER, 0x02);
    wr(IER, 0x00);
    ck_assert_uint_eq(rd(IIR), 0x01); /* not enabled, so not cleared */
    wr(IER, 0x02);
    ck_assert_uint_eq(rd(IIR), 0x02);
    wr(THR, 'a'); /* which goes to the shift register at once */
    ck_assert_uint_eq(rd(IIR), 0x02);
    wr(IER, 0x00);
    wr(IER, 0x02);
    wr(THR, 'b'); /* which doesn't */
    ck_assert_uint_eq(rd(IIR), 0x01);
    ck_assert_uint_gt(signals(), 0);
    unmask();
    ck_assert_uint_eq(signals(), 0);
    drain_output(filled);
    await_intx();
    ck_assert_uint_eq(rd(IIR), 0x02);
    ck_assert_uint_eq(rd(IIR), 0x01);
    hear("ab");
    end();
}
END_TEST

/* Bytes come in their own time, whether the client looks or not. */
START_TEST(serial_receives_byte_by_byte)
{
    begin();
    wr(LCR, WORD8);
    wr(FCR, ON | TRIGGER_4);
    wr(IER, 0x01);
    set_divisor(2400); /* 208 ms for a byte */
    say("1234");
    int64_t start = now_us();
    wr(MCR, RTS);
    await_intx();
    int64_t took = now_us() - start;
    ck_assert_uint_eq(rd(IIR), 0xc4);
    ck_assert_msg(took >= 3 * 208300 && took < 9 * 208300, "%d us", (int)took);
    end();
}
END_TEST

/* The FIFO is empty when the shift register takes its last byte, and not before. */
START_TEST(serial_empties_its_fifo_byte_by_byte)
{
    begin();
    wr(LCR, WORD8);
    wr(FCR, ON);
    set_divisor(600); /* 192 baud, 52 ms for a byte */
    wr_all(THR, "1234");
    wr(IER, 0x02);
    await_intx();
    ck_assert_uint_eq(rd(IIR), 0xc2);
    ck_assert_uint_eq(rd(LSR) & THRE, THRE);
    ck_assert_int_ge(read(port.out, (char[9]){0}, 9), 3);
    ck_assert_uint_eq(signals(), 0);
    EVENTUALLY(rd(LSR) & TEMT);
    unmask();
    ck_assert_uint_eq(signals(), 0);
    end();
}
END_TEST

/* All sources at once: IIR names the most important one that is enabled; each is cleared in its own way, and only so. */
START_TEST(serial_has_priorities)
{
    begin();
    wr(LCR, WORD8);
    for (unsigned enabled = 0; enabled < 16; enabled++) {
        wr(IER, 0);
        wr(MCR, LOOP);
        rd(MSR);
        wr_all(THR, "xy");    /* an overrun, a byte, and an empty THR */
        wr(MCR, LOOP | OUT2); /* and a change of DCD */
        wr(IER, enabled);
        if (enabled & 4) {
            ck_assert_uint_eq(rd(IIR), 0x06);
            ck_assert_uint_eq(rd(IIR), 0x06);
        }
        ck_assert_uint_eq(rd(LSR), DR | OE | THRE | TEMT);
        if (enabled & 1) {
            ck_assert_uint_eq(rd(IIR), 0x04);
            ck_assert_uint_eq(rd(IIR), 0x04);
        }
        ck_assert_uint_eq(rd(RBR), 'y');
        if (enabled & 2)
            ck_assert_uint_eq(rd(IIR), 0x02);
        if (enabled & 8) {
            ck_assert_uint_eq(rd(IIR), 0x00);
            ck_assert_uint_eq(rd(IIR), 0x00);
        }
        ck_assert_uint_eq(rd(MSR), 0x88);
        ck_assert_uint_eq(rd(IIR), 0x01);
    }
    end();
}
END_TEST

/* INTx is a level: signalled once until the client unmasks it, and again then if it is still up. */
START_TEST(serial_raises_intx)
{
    begin();
    wr(LCR, WORD8);
    wr(MCR, LOOP);
    ck_assert_uint_eq(config(6, 2) & VFU_PCI_STATUS_INTX, 0);
    wr(IER, 0x01);
    wr(THR, 'a');
    ck_assert_uint_eq(signals(), 1);
    ck_assert_uint_eq(config(6, 2) & VFU_PCI_STATUS_INTX, VFU_PCI_STATUS_INTX);
    wr(THR, 'b');
    rd(IIR);
    ck_assert_uint_eq(signals(), 0);
    unmask();
    ck_assert_uint_eq(signals(), 1);
    rd(RBR);
    ck_assert_uint_eq(config(6, 2) & VFU_PCI_STATUS_INTX, 0);
    unmask();
    ck_assert_uint_eq(signals(), 0);

    ck_assert_int_eq(vfu_client_irq_action(port.client, VFU_PCI_IRQ_INTX, 0, 1, VFU_IRQ_SET_ACTION_MASK), 0);
    wr(THR, 'c');
    ck_assert_uint_eq(signals(), 0);
    ck_assert_uint_eq(config(6, 2) & VFU_PCI_STATUS_INTX, VFU_PCI_STATUS_INTX);
    unmask();
    ck_assert_uint_eq(signals(), 1);
    rd(RBR);
    unmask();

    set_config(4, VFU_PCI_COMMAND_IO | VFU_PCI_COMMAND_INTX_DISABLE, 2);
    wr(THR, 'd');
    ck_assert_uint_eq(signals(), 0);
    set_config(4, VFU_PCI_COMMAND_IO, 2);
    ck_assert_uint_eq(signals(), 1);
    wr(IER, 0x00);
    unmask();
    ck_assert_uint_eq(signals(), 0);

    /* the client's own descriptor for the end of an interrupt */
    int ended = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    vfu_msg m;
    must(ended);
    vfu_msg_init(&m, 0, VFU_CMD_DEVICE_SET_IRQS);
    m.u.irq_set.argsz = 20;
    m.u.irq_set.flags = VFU_IRQ_SET_DATA_EVENTFD | VFU_IRQ_SET_ACTION_UNMASK;
    m.u.irq_set.count = 1;
    vfu_msg reply;
    ck_assert_int_eq(vfu_client_call(port.client, &m, &ended, 1, &reply, NULL, 0), 0);
    wr(IER, 0x01);
    ck_assert_uint_eq(signals(), 1);
    for (unsigned i = 0; i < 3; i++) {
        ck_assert_int_eq(write(ended, &(uint64_t){1}, 8), 8);
        await_intx();
    }
    close(ended);
    end();
}
END_TEST

/* ---- time ------------------------------------------------------------------------------------------------------------------ */

/* Without a pause, so that the line has none either. */
static void await_lsr(uint8_t bit, int64_t start)
{
    while (!(rd(LSR) & bit))
        ck_assert_int_lt(now_us(), start + PATIENCE_MS * INT64_C(1000));
}

/* A byte takes its bits' time: start, 5 to 8, parity, one or two stop bits. Never less; how much more depends on the machine. */
START_TEST(serial_takes_its_time)
{
    static const struct {
        uint8_t lcr;
        unsigned divisor;
        int64_t us; /* 200 bytes */
    } cases[] = {
        {0x00, 1, 12150}, {0x03, 1, 17360}, {0x07, 1, 19090}, {0x0b, 1, 19090}, {0x1f, 1, 20830}, {0x03, 12, 208300},
    };
    char bytes[200];
    memset(bytes, 'u', sizeof(bytes));
    begin();
    wr(FCR, ON);
    wr(MCR, RTS);
    for (unsigned i = 0; i < COUNT(cases); i++) {
        wr(LCR, cases[i].lcr);
        set_divisor(cases[i].divisor);
        int64_t start = now_us();
        for (unsigned sent = 0; sent < 200;) {
            await_lsr(THRE, start);
            for (unsigned room = 16; room && sent < 200; room--, sent++)
                wr(THR, 'u');
        }
        await_lsr(TEMT, start);
        int64_t took = now_us() - start;
        ck_assert_msg(took >= cases[i].us && took < 100 * cases[i].us, "case %u: %d us out", i, (int)took);
        hear_bytes(bytes, sizeof(bytes));

        memset(bytes, 'i', sizeof(bytes));
        nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL); /* a rest gives no credit */
        start = now_us();
        say_bytes(bytes, sizeof(bytes));
        for (unsigned seen = 0; seen < 200; seen++) {
            await_lsr(DR, start);
            rd(RBR);
        }
        took = now_us() - start;
        ck_assert_msg(took >= cases[i].us * 199 / 200 && took < 100 * cases[i].us, "case %u: %d us in", i, (int)took);
    }
    end();
}
END_TEST

/* Milliseconds of a processor that it has used. */
static unsigned long used_ms(void)
{
    char file[40], line[400];
    unsigned long user = 0, kernel = 0;
    snprintf(file, sizeof(file), "/proc/%d/stat", (int)port.pid);
    int fd = open(file, O_RDONLY | O_CLOEXEC);
    must(fd);
    ssize_t len = read(fd, line, sizeof(line) - 1);
    ck_assert_int_gt(len, 0);
    line[len] = 0;
    ck_assert_int_eq(sscanf(strrchr(line, ')'), ") %*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &kernel), 2);
    close(fd);
    return (user + kernel) * 1000 / (unsigned long)sysconf(_SC_CLK_TCK);
}

/* While there is nothing to do it sleeps: with input that has no room, output that nobody takes, or no input any more. */
START_TEST(serial_sleeps)
{
    begin_blocked();
    wr(LCR, WORD8);
    wr(MCR, RTS);
    say("more than fits");
    EVENTUALLY(rd(LSR) & DR);
    wr_all(THR, "stuck");
    if (_i) { /* it has read its end of file */
        close_fd(&port.in);
        for (unsigned i = 0; i < 14; i++) {
            EVENTUALLY(rd(LSR) & DR);
            rd(RBR);
        }
    }
    unsigned long before = used_ms();
    nanosleep(&(struct timespec){.tv_nsec = 700000000}, NULL);
    ck_assert_uint_le(used_ms() - before, 50);
    end();
}
END_TEST

/* ---- bulk ------------------------------------------------------------------------------------------------------------------ */

/* Moves what is there now; negative: nothing. */
static size_t move(ssize_t count)
{
    ck_assert(count >= 0 || errno == EAGAIN);
    return count > 0 ? (size_t)count : 0;
}

/* 100 KB in both directions at once, by a driver that lives on interrupts alone, as Linux's does. */
START_TEST(serial_moves_bulk)
{
    enum { SIZE = 100000 };
    static uint8_t there[SIZE], back[SIZE], heard[SIZE], received[SIZE];
    size_t said = 0, sent = 0, hear_count = 0, got = 0;
    uint32_t seed = 1;
    for (unsigned i = 0; i < SIZE; i++) {
        seed = seed * 1664525 + 1013904223;
        there[i] = (uint8_t)(seed >> 24);
        back[i] = (uint8_t)(seed >> 16);
    }
    begin();
    must(fcntl(port.in, F_SETFL, O_NONBLOCK));
    wr(LCR, WORD8);
    wr(FCR, ON | TRIGGER_14);
    wr(MCR, RTS);
    wr(IER, 0x03);
    int64_t last = now_us() + PATIENCE_MS * INT64_C(1000);
    while (hear_count < SIZE || got < SIZE) {
        ck_assert_msg(now_us() < last, "stuck: %zu of %u bytes out, %zu in", hear_count, (unsigned)SIZE, got);
        size_t before = hear_count + got;
        if (said < SIZE)
            said += move(write(port.in, there + said, SIZE - said));
        hear_count += hear_count < SIZE ? move(read(port.out, heard + hear_count, SIZE - hear_count)) : 0;
        struct pollfd fd = {.fd = port.intx, .events = POLLIN};
        ck_assert_int_ge(poll(&fd, 1, 10), 0);
        if (signals()) {
            for (uint8_t source; ((source = rd(IIR)) & 1) == 0;) {
                if (source == 0xc2) {
                    for (unsigned i = 0; i < 16 && sent < SIZE; i++)
                        wr(THR, back[sent++]);
                    continue;
                }
                ck_assert(source == 0xc4 || source == 0xcc);
                for (unsigned i = 0; source == 0xc4 ? i < 14 : rd(LSR) & DR; i++) {
                    ck_assert_uint_lt(got, SIZE);
                    received[got++] = rd(RBR);
                }
            }
            unmask();
        }
        if (hear_count + got > before)
            last = now_us() + PATIENCE_MS * INT64_C(1000);
    }
    ck_assert_mem_eq(received, there, SIZE);
    ck_assert_mem_eq(heard, back, SIZE);
    ck_assert_uint_eq(rd(LSR), THRE | TEMT);
    end();
}
END_TEST

/* ---- reset, clients -------------------------------------------------------------------------------------------------------- */

START_TEST(serial_resets)
{
    char none;
    size_t filled = begin_blocked();
    set_divisor(12);
    wr(LCR, WORD8);
    wr(MCR, LOOP | OUT2);
    wr(SCR, 0x5a);
    wr(FCR, ON | TRIGGER_14);
    set_divisor(0);
    wr_all(THR, "0123456789abcdefgh");
    wr(MCR, OUT2);
    wr_all(THR, "never seen");
    wr(IER, 0x0f);
    ck_assert_uint_eq(rd(IIR), 0xc6);
    ck_assert_uint_eq(signals(), 1);
    ck_assert_int_eq(vfu_client_reset(port.client), 0);
    check_initial();
    unmask();
    ck_assert_uint_eq(signals(), 0);
    ck_assert_uint_eq(config(6, 2) & VFU_PCI_STATUS_INTX, 0);
    drain_output(filled);
    wr(LCR, WORD8);
    wr(THR, '!');
    hear("!");
    ck_assert_int_lt(read(port.out, &none, 1), 0);
    end();
}
END_TEST

/* A client that goes leaves the registers as they are, but for MCR; input waits for the next one, output is still written. */
START_TEST(serial_serves_the_next_client)
{
    size_t filled = begin_blocked();
    wr(LCR, WORD8);
    wr(FCR, ON);
    wr(MCR, RTS);
    wr(SCR, 0x77);
    wr_all(THR, "last words");
    say("a");
    EVENTUALLY(rd(LSR) & DR);
    leave();
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL); /* it learns that in its own time */
    say("bc");
    drain_output(filled);
    hear("last words");
    join();
    ck_assert_uint_eq(rd(SCR), 0x77);
    ck_assert_uint_eq(rd(LCR), WORD8);
    ck_assert_uint_eq(rd(MCR), 0);
    ck_assert_uint_eq(rd(LSR), DR | THRE | TEMT);
    ck_assert_int_eq(left(), 2);
    wr(IER, 0x01);
    ck_assert_uint_eq(signals(), 1);
    wr(MCR, RTS);
    for (const char *c = "abc"; *c; c++) {
        EVENTUALLY(rd(LSR) & DR);
        ck_assert_uint_eq(rd(RBR), (uint8_t)*c);
    }
    wr_all(THR, "hello");
    hear("hello");
    end();
}
END_TEST

/* ---- standard input and output --------------------------------------------------------------------------------------------- */

START_TEST(serial_survives_the_end_of_its_input)
{
    begin();
    wr(LCR, WORD8);
    wr(FCR, ON);
    wr(MCR, RTS);
    say("end");
    close_fd(&port.in);
    for (const char *c = "end"; *c; c++) {
        EVENTUALLY(rd(LSR) & DR);
        ck_assert_uint_eq(rd(RBR), (uint8_t)*c);
    }
    wr_all(THR, "goes on");
    hear("goes on");
    ck_assert_uint_eq(rd(MSR), LINES);
    leave();
    join();
    wr_all(THR, "and on");
    hear("and on");
    end();
}
END_TEST

/* Its descriptors are as it got them, afterwards and meanwhile; it takes those that don't block, too. */
START_TEST(serial_leaves_descriptors_alone)
{
    int flags[2] = {0, O_NONBLOCK};
    make_line();
    size_t filled = _i ? fill_output() : 0;
    int in = fcntl(port.in_theirs, F_DUPFD_CLOEXEC, 0), out = fcntl(port.out_theirs, F_DUPFD_CLOEXEC, 0);
    must(fcntl(in, F_SETFL, flags[_i]));
    must(fcntl(out, F_SETFL, flags[_i]));
    start_on_line(false);
    join();
    wr(LCR, WORD8);
    wr(MCR, RTS);
    wr_all(THR, "xy");
    drain_output(filled);
    hear("xy");
    say("z");
    EVENTUALLY(rd(LSR) & DR);
    ck_assert_int_eq(fcntl(in, F_GETFL) & O_NONBLOCK, flags[_i]);
    ck_assert_int_eq(fcntl(out, F_GETFL) & O_NONBLOCK, flags[_i]);
    end();
    ck_assert_int_eq(fcntl(in, F_GETFL) & O_NONBLOCK, flags[_i]);
    ck_assert_int_eq(fcntl(out, F_GETFL) & O_NONBLOCK, flags[_i]);
    close(in);
    close(out);
}
END_TEST

/* Ordinary files. */
START_TEST(serial_takes_files)
{
    char in[100], out[100], seen[10];
    snprintf(in, sizeof(in), "%s/%d.in", scratch, (int)getpid());
    snprintf(out, sizeof(out), "%s/%d.out", scratch, (int)getpid());
    make_line();
    close_fd(&port.in_theirs);
    close_fd(&port.out_theirs);
    must(port.in_theirs = open(in, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    must(port.out_theirs = open(out, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
    ck_assert_int_eq(pwrite(port.in_theirs, "file", 4, 0), 4);
    int file = fcntl(port.out_theirs, F_DUPFD_CLOEXEC, 0);
    start_on_line(false);
    join();
    wr(LCR, WORD8);
    wr(MCR, RTS);
    for (const char *c = "file"; *c; c++) {
        EVENTUALLY(rd(LSR) & DR);
        ck_assert_uint_eq(rd(RBR), (uint8_t)*c);
    }
    wr_all(THR, "written");
    ck_assert_int_eq(pread(file, seen, sizeof(seen), 0), 7);
    ck_assert_mem_eq(seen, "written", 7);
    ck_assert_uint_eq(rd(MSR), LINES);
    end();
    close(file);
}
END_TEST

/* A terminal for its line: port.in and port.out are the user's end, `theirs` its own. */
static void make_terminal(void)
{
    int user = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    must(user);
    must(grantpt(user));
    must(unlockpt(user));
    port.in = user;
    must(port.out = fcntl(user, F_DUPFD_CLOEXEC, 0));
    must(port.in_theirs = open(ptsname(user), O_RDWR | O_NOCTTY | O_CLOEXEC));
    must(port.out_theirs = fcntl(port.in_theirs, F_DUPFD_CLOEXEC, 0));
    must(fcntl(user, F_SETFL, O_NONBLOCK));
}

static void check_same_terminal(const struct termios *before)
{
    struct termios now;
    must(tcgetattr(port.in_theirs, &now));
    ck_assert_uint_eq(now.c_iflag, before->c_iflag);
    ck_assert_uint_eq(now.c_oflag, before->c_oflag);
    ck_assert_uint_eq(now.c_cflag, before->c_cflag);
    ck_assert_uint_eq(now.c_lflag, before->c_lflag);
    ck_assert_mem_eq(now.c_cc, before->c_cc, sizeof(now.c_cc));
}

/* Every byte passes a terminal but the one that ends the program, and the terminal is then as it was. */
START_TEST(serial_uses_a_terminal)
{
    struct termios before, now;
    uint8_t all[255], seen[255];
    make_terminal();
    must(tcgetattr(port.in_theirs, &before));
    ck_assert(before.c_lflag & ICANON && before.c_oflag & OPOST);
    start_on_line(true);
    EVENTUALLY(tcgetattr(port.in_theirs, &now) == 0 && !(now.c_lflag & ICANON));
    join();
    wr(LCR, WORD8);
    wr(MCR, RTS);
    wr(FCR, ON);
    for (unsigned i = 0, n = 0; i < 256; i++)
        if (i != 0x1d)
            all[n++] = (uint8_t)i;
    say_bytes(all, sizeof(all));
    for (unsigned i = 0; i < sizeof(all); i++) {
        EVENTUALLY(rd(LSR) & DR);
        ck_assert_uint_eq(rd(RBR), all[i]);
    }
    for (unsigned i = 0; i < sizeof(all); i++)
        wr(THR, all[i]);
    hear_bytes(seen, sizeof(all)); /* and no echo of what was typed */
    ck_assert_mem_eq(seen, all, sizeof(all));
    leave();
    if (_i)
        must(kill(port.pid, SIGTERM));
    else
        say("\x1d");
    ck_assert_int_eq(wait_end(), 0);
    ck_assert(!is_there(port.path));
    ck_assert_str_eq(errors(), "Ctrl-] ends the program\n");
    check_same_terminal(&before);
}
END_TEST

/* In the background it leaves the terminal to whoever has it, and serves on. */
START_TEST(serial_stays_in_the_background)
{
    struct termios before;
    int status;
    make_terminal();
    must(tcgetattr(port.in_theirs, &before));
    pid_t shell = fork();
    must(shell);
    if (shell == 0) {
        char where[100];
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (setsid() < 0 || ioctl(port.in_theirs, TIOCSCTTY, 0) < 0)
            _exit(1);
        name_files();
        snprintf(where, sizeof(where), "--socket-path=%s", port.path);
        pid_t child = fork();
        if (child == 0) {
            setpgid(0, 0);
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            int err = open(port.err, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
            if (dup2(port.in_theirs, 0) < 0 || dup2(port.out_theirs, 1) < 0 || dup2(err, 2) < 0)
                _exit(126);
            execl(program(), "serial", where, (char *)NULL);
            _exit(127);
        }
        EVENTUALLY(is_there(port.path));
        join();
        wr(LCR, WORD8);
        wr(MCR, RTS);
        say("for the shell\n");
        for (unsigned i = 0; i < 20; i++) {
            ck_assert_uint_eq(rd(LSR), THRE | TEMT);
            nap();
        }
        check_same_terminal(&before);
        kill(child, SIGTERM);
        waitpid(child, &status, 0);
        _exit(WIFEXITED(status) && WEXITSTATUS(status) == 0 && *errors() == 0 ? 0 : 1);
    }
    EVENTUALLY(waitpid(shell, &status, WNOHANG) == shell);
    ck_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    check_same_terminal(&before);
}
END_TEST

/* ---- command line ---------------------------------------------------------------------------------------------------------- */

START_TEST(serial_refuses_wrong_arguments)
{
    static const char *const cases[][3] = {
        {NULL},
        {"--verbose"},
        {"--socket-path"},
        {"--fd"},
        {"--fd="},
        {"--fd=x"},
        {"--fd=3x"},
        {"--fd=-1"},
        {"--fd=0"},
        {"--fd=1"},
        {"--fd=2"},
        {"--fd=99999999999999999999"},
        {"--fd=4294967299"},
        {"--socket-path=/nonexistent/a", "--fd=3"},
        {"--socket-path=/nonexistent/a", "--bogus"},
        {"--socket-path=/nonexistent/a", "operand"},
        {"--socket-path=/nonexistent/a", "--verbose=1"},
        {"--help=1"},
    };
    for (unsigned i = 0; i < COUNT(cases); i++) {
        char none;
        make_line();
        name_files();
        spawn(cases[i], -1, false);
        ck_assert_int_eq(wait_end(), 2);
        ck_assert_ptr_nonnull(strstr(errors(), "usage: "));
        ck_assert_int_lt(read(port.out, &none, 1), 0);
    }
}
END_TEST

START_TEST(serial_helps)
{
    char text[1000] = {0};
    make_line();
    name_files();
    spawn((const char *const[]){"--help", NULL}, -1, false);
    ck_assert_int_eq(wait_end(), 0);
    ck_assert_int_gt(read(port.out, text, sizeof(text) - 1), 0);
    ck_assert_ptr_nonnull(strstr(text, "--socket-path=PATH"));
    ck_assert_ptr_nonnull(strstr(text, "--fd=N"));
    ck_assert_str_eq(errors(), "");
}
END_TEST

START_TEST(serial_refuses_unusable_arguments)
{
    static const char *const cases[][2] = {{"--socket-path=/nonexistent/a"}, {"--fd=777"}};
    for (unsigned i = 0; i < COUNT(cases); i++) {
        make_line();
        name_files();
        spawn(cases[i], -1, false);
        ck_assert_int_eq(wait_end(), 1);
        ck_assert_str_ne(errors(), "");
    }
}
END_TEST

START_TEST(serial_traces)
{
    char where[100];
    make_line();
    name_files();
    snprintf(where, sizeof(where), "--socket-path=%s", port.path);
    spawn((const char *const[]){where, "--verbose", NULL}, -1, false);
    EVENTUALLY(is_there(port.path));
    join();
    wr(SCR, 1);
    leave();
    must(kill(port.pid, SIGTERM));
    ck_assert_int_eq(wait_end(), 0);
    ck_assert_ptr_nonnull(strstr(errors(), "REGION_WRITE"));
}
END_TEST

START_TEST(serial_ends_on_signals)
{
    static const int numbers[] = {SIGTERM, SIGINT};
    for (unsigned i = 0; i < 4; i++) {
        make_line();
        start_on_line(false);
        if (i >= 2)
            join();
        must(kill(port.pid, numbers[i % 2]));
        ck_assert_int_eq(wait_end(), 0);
        ck_assert(!is_there(port.path));
        ck_assert_str_eq(errors(), "");
        leave();
    }
}
END_TEST

/* --fd with a socket that listens: clients come one after the other; the file isn't its own, so it stays. */
START_TEST(serial_takes_a_listening_descriptor)
{
    char option[20];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    make_line();
    name_files();
    memcpy(address.sun_path, port.path, strlen(port.path) + 1);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    must(bind(fd, (struct sockaddr *)&address, sizeof(address)));
    must(listen(fd, 1));
    snprintf(option, sizeof(option), "--fd=%d", fd);
    spawn((const char *const[]){option, NULL}, fd, false);
    close(fd);
    for (unsigned i = 0; i < 2; i++) {
        join();
        wr(SCR, i);
        ck_assert_uint_eq(rd(SCR), i);
        leave();
    }
    must(kill(port.pid, SIGTERM));
    ck_assert_int_eq(wait_end(), 0);
    ck_assert(is_there(port.path));
}
END_TEST

/* --fd with a socket that is connected: it ends when the client goes, and when everything that was sent is written. */
START_TEST(serial_takes_a_connected_descriptor)
{
    int pair[2];
    char option[20];
    siginfo_t ended = {0};
    make_line();
    name_files();
    size_t filled = fill_output();
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    snprintf(option, sizeof(option), "--fd=%d", pair[1]);
    spawn((const char *const[]){option, NULL}, pair[1], false);
    close(pair[1]);
    close_fd(&port.out_theirs);
    ck_assert_int_eq(vfu_client_attach(&port.client, pair[0], NULL), 0);
    wr(LCR, WORD8);
    wr(FCR, ON);
    wr_all(THR, "last words");
    vfu_client_destroy(port.client);
    nanosleep(&(struct timespec){.tv_nsec = 50000000}, NULL);
    ck_assert_int_eq(waitid(P_PID, (id_t)port.pid, &ended, WEXITED | WNOHANG | WNOWAIT), 0);
    ck_assert_int_eq(ended.si_pid, 0);
    drain_output(filled);
    ck_assert_int_eq(wait_end(), 0);
    ck_assert_str_eq(errors(), "");
    char words[20];
    ck_assert_int_eq(read(port.out, words, sizeof(words)), 10);
    ck_assert_mem_eq(words, "last words", 10);
}
END_TEST

/* ---------------------------------------------------------------------------------------------------------------------------- */

static void make_scratch(void)
{
    strcpy(scratch, "/tmp/vfu_serial.XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(scratch));
    port.in = port.out = port.in_theirs = port.out_theirs = port.intx = -1;
}

static void remove_scratch(void)
{
    pid_t pid = fork();
    if (pid == 0) {
        execlp("rm", "rm", "-rf", scratch, (char *)NULL);
        _exit(127);
    }
    waitpid(pid, NULL, 0);
}

int main(void)
{
    Suite *suite = suite_create("serial");
    TCase *tc = tcase_create("serial");
    tcase_add_unchecked_fixture(tc, make_scratch, remove_scratch);
    tcase_add_test(tc, serial_is_a_pci_serial_port);
    tcase_add_test(tc, serial_takes_wide_accesses);
    tcase_add_test(tc, serial_has_initial_values);
    tcase_add_test(tc, serial_keeps_what_is_written);
    tcase_add_test(tc, serial_has_a_divisor);
    tcase_add_test(tc, serial_switches_fifos);
    tcase_add_test(tc, serial_sends_every_byte);
    tcase_add_test(tc, serial_has_short_words);
    tcase_add_test(tc, serial_waits_for_its_reader);
    tcase_add_test(tc, serial_waits_for_its_reader_without_fifo);
    tcase_add_test(tc, serial_clears_its_transmitter);
    tcase_add_test(tc, serial_receives_every_byte);
    tcase_add_test(tc, serial_leaves_input_that_has_no_room);
    tcase_add_test(tc, serial_overruns);
    tcase_add_test(tc, serial_clears_its_receiver);
    tcase_add_test(tc, serial_loops_its_modem_lines);
    tcase_add_test(tc, serial_loops_its_data);
    tcase_add_test(tc, serial_hangs_up);
    tcase_add_test(tc, serial_stays_hung_up);
    tcase_add_test(tc, serial_hangs_up_on_a_full_disk);
    tcase_add_test(tc, serial_has_trigger_levels);
    tcase_add_test(tc, serial_has_a_character_timeout);
    tcase_add_test(tc, serial_tells_when_it_is_empty);
    tcase_add_test(tc, serial_receives_byte_by_byte);
    tcase_add_test(tc, serial_empties_its_fifo_byte_by_byte);
    tcase_add_test(tc, serial_has_priorities);
    tcase_add_test(tc, serial_raises_intx);
    tcase_add_test(tc, serial_takes_its_time);
    tcase_add_loop_test(tc, serial_sleeps, 0, 2);
    tcase_add_test(tc, serial_moves_bulk);
    tcase_add_test(tc, serial_resets);
    tcase_add_test(tc, serial_serves_the_next_client);
    tcase_add_test(tc, serial_survives_the_end_of_its_input);
    tcase_add_loop_test(tc, serial_leaves_descriptors_alone, 0, 2);
    tcase_add_test(tc, serial_takes_files);
    tcase_add_loop_test(tc, serial_uses_a_terminal, 0, 2);
    tcase_add_test(tc, serial_stays_in_the_background);
    tcase_add_test(tc, serial_refuses_wrong_arguments);
    tcase_add_test(tc, serial_helps);
    tcase_add_test(tc, serial_refuses_unusable_arguments);
    tcase_add_test(tc, serial_traces);
    tcase_add_test(tc, serial_ends_on_signals);
    tcase_add_test(tc, serial_takes_a_listening_descriptor);
    tcase_add_test(tc, serial_takes_a_connected_descriptor);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
