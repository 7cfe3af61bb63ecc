/* SPDX-License-Identifier: MIT */
/*
 * serial - a 16550A serial port on a PCI card; the other end of its line is standard input and output
 *
 *     cc -std=c11 -O2 -I. examples/serial.c -o serial -pthread
 *     ./serial --socket-path=/tmp/serial.sock
 *
 * It shows a device that lives in an event loop of its own: `turn` waits with one ppoll() for the client, for both directions of
 * the line, and for the time. Linux has a driver for it, 8250_pci, which knows it by its class: a guest gets one more /dev/ttyS.
 *
 * A byte from standard input travels through this file from top to bottom: receiver, interrupts, registers, PCI. A byte of the
 * guest goes the other way, up to the transmitter. Neither is lost to a slow peer: input is taken while RTS says that the guest
 * wants it and the receiver has room, and while nobody takes the output, the transmitter stays full and THRE and TEMT stay off.
 *
 * A byte takes as long as the divisor and LCR say: a driver that found the next one there at once would not leave its interrupt
 * handler while there is input. While the divisor is 0, as after a reset, it takes no time. Parity and breaks have no effect. CTS
 * and DSR are always on, and DCD until standard output fails.
 */
#define VFU_IMPLEMENTATION
#include "vfu.h"

#include "program.h"

#include <termios.h>

enum { FIFO_SIZE = 16, BAR_REGISTERS = 0, BAR_SIZE = 8, ESCAPE = 0x1d /* Ctrl-] */ };

/* Registers, and their bits. Those with two names are another register when they are written. */
enum { RBR = 0, THR = 0, IER = 1, IIR = 2, FCR = 2, LCR = 3, MCR = 4, LSR = 5, MSR = 6, SCR = 7 };
enum { IER_RECEIVED = 0x01, IER_EMPTY = 0x02, IER_LINE = 0x04, IER_MODEM = 0x08 };
enum { IIR_MODEM = 0x00, IIR_NONE = 0x01, IIR_EMPTY = 0x02, IIR_RECEIVED = 0x04, IIR_LINE = 0x06, IIR_TIMEOUT = 0x0c };
enum { IIR_FIFOS = 0xc0 };
enum { FCR_ENABLE = 0x01, FCR_CLEAR_RX = 0x02, FCR_CLEAR_TX = 0x04, FCR_KEPT = 0xc9, FCR_TRIGGER_SHIFT = 6 };
enum { LCR_WORD = 0x03, LCR_STOP = 0x04, LCR_PARITY = 0x08, LCR_DLAB = 0x80 };
enum { MCR_DTR = 0x01, MCR_RTS = 0x02, MCR_OUT1 = 0x04, MCR_OUT2 = 0x08, MCR_LOOP = 0x10, MCR_KEPT = 0x1f };
enum { LSR_READY = 0x01, LSR_OVERRUN = 0x02, LSR_THRE = 0x20, LSR_TEMT = 0x40 };
enum { MSR_DELTAS = 0x0f, MSR_RI_ENDED = 0x04, MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40, MSR_DCD = 0x80, MSR_LINES = 0xf0 };

typedef struct fifo {
    uint8_t bytes[FIFO_SIZE];
    unsigned first, count;
} fifo;

typedef struct serial {
    vfu_dev *dev;
    bool at_end;  /* of standard input */
    bool hung_up; /* nobody reads standard output any more */

    fifo rx, tx;      /* without FCR_ENABLE only one byte of each is used: RBR and THR */
    uint8_t shifter;  /* the byte that the line is sending */
    bool shifting;    /* there is one */
    bool overrun;     /* a byte came that found no room, since LSR was last read */
    bool thr_emptied; /* and the driver was not told yet */
    bool timed_out;   /* bytes wait in the receiver, and for the time of four neither came another nor was one read */
    uint8_t divisor[2], ier, fcr, lcr, mcr, msr, scr;

    uint64_t sent_at;  /* ns: when the line is through with the shifter */
    uint64_t heard_at; /* when it can have a next byte for the receiver */
    uint64_t quiet_at; /* when timed_out is due */
} serial;

static void push(fifo *f, uint8_t byte) { f->bytes[(f->first + f->count++) % FIFO_SIZE] = byte; }

static uint8_t pop(fifo *f)
{
    uint8_t byte = f->bytes[f->first];
    f->first = (f->first + 1) % FIFO_SIZE;
    f->count--;
    return byte;
}

static unsigned depth(const serial *s) { return s->fcr & FCR_ENABLE ? FIFO_SIZE : 1; }

/* A word of 5 to 8 bits. */
static uint8_t word(const serial *s, uint8_t byte) { return byte & (uint8_t)(0xff >> (LCR_WORD - (s->lcr & LCR_WORD))); }

/* ---- time ------------------------------------------------------------------------------------------------------------------ */

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

/* What a byte takes on the line: start, word, parity and stop bits, of 16 cycles of 1.8432 MHz for each unit of the divisor. */
static uint64_t byte_ns(const serial *s)
{
    uint64_t divisor = s->divisor[0] | (uint64_t)s->divisor[1] << 8;
    return divisor * 8681 * (7u + (s->lcr & LCR_WORD) + !!(s->lcr & LCR_PARITY) + !!(s->lcr & LCR_STOP));
}

/* ---- receiver -------------------------------------------------------------------------------------------------------------- */

static void receiver_touched(serial *s)
{
    s->timed_out = false;
    s->quiet_at = now_ns() + 4 * byte_ns(s);
}

static void receive(serial *s, uint8_t byte)
{
    receiver_touched(s);
    if (s->rx.count < depth(s)) {
        push(&s->rx, word(s, byte));
        return;
    }
    s->overrun = true;
    if (!(s->fcr & FCR_ENABLE)) /* RBR is overwritten; the FIFO keeps what it has */
        s->rx.bytes[s->rx.first] = word(s, byte);
}

static bool wants_input(const serial *s)
{
    return !s->at_end && (s->mcr & (MCR_RTS | MCR_LOOP)) == MCR_RTS && s->rx.count < depth(s);
}

/* Standard input is readable. */
static void take_input(serial *s)
{
    uint8_t byte;
    ssize_t count = read(STDIN_FILENO, &byte, 1);
    if (count > 0) {
        s->heard_at += byte_ns(s);
        receive(s, byte);
    } else if (count == 0 || (errno != EAGAIN && errno != EINTR)) {
        s->at_end = true;
    }
}

/* ---- transmitter ----------------------------------------------------------------------------------------------------------- */

/* Gives a byte to standard output; false: not now. Where poll() sees room, one byte doesn't block. O_NONBLOCK isn't ours to set:
 * others may have the same terminal or pipe open. */
static bool give_output(serial *s, uint8_t byte)
{
    struct pollfd room = {.fd = STDOUT_FILENO, .events = POLLOUT};
    if (s->hung_up)
        return true;
    if (poll(&room, 1, 0) <= 0)
        return false;
    if (write(STDOUT_FILENO, &byte, 1) < 0) {
        if (errno == EAGAIN || errno == EINTR)
            return false;
        s->hung_up = true;
    }
    return true;
}

/* Sends what there is time for. */
static void transmit(serial *s)
{
    uint64_t now = now_ns();
    if (!s->shifting)
        s->sent_at = now; /* the line was idle */
    while (s->shifting || s->tx.count) {
        if (!s->shifting) {
            s->shifter = pop(&s->tx);
            s->shifting = true;
            s->thr_emptied = !s->tx.count;
            s->sent_at += byte_ns(s);
        }
        if (s->sent_at > now)
            return;
        if (s->mcr & MCR_LOOP)
            receive(s, s->shifter);
        else if (!give_output(s, word(s, s->shifter)))
            return;
        s->shifting = false;
    }
}

/* ---- modem lines and interrupts -------------------------------------------------------------------------------------------- */

/* What comes in on the modem lines. In loopback these are our own outputs. */
static uint8_t modem_lines(const serial *s)
{
    if (!(s->mcr & MCR_LOOP))
        return s->hung_up ? MSR_CTS | MSR_DSR : MSR_CTS | MSR_DSR | MSR_DCD;
    return (uint8_t)((s->mcr & MCR_RTS ? MSR_CTS : 0) | (s->mcr & MCR_DTR ? MSR_DSR : 0) | (s->mcr & MCR_OUT1 ? MSR_RI : 0) |
                     (s->mcr & MCR_OUT2 ? MSR_DCD : 0));
}

/* MSR follows the lines, and notes which have changed; of RI only its end counts. */
static void follow_modem_lines(serial *s)
{
    uint8_t lines = modem_lines(s), deltas = (uint8_t)((s->msr ^ lines) >> 4);
    if (lines & MSR_RI)
        deltas &= (uint8_t)~MSR_RI_ENDED;
    s->msr = (uint8_t)(lines | deltas | (s->msr & MSR_DELTAS));
}

/* The interrupt of the highest priority, as IIR has it. */
static uint8_t interrupt(const serial *s)
{
    static const uint8_t triggers[] = {1, 4, 8, 14};
    if (s->ier & IER_LINE && s->overrun)
        return IIR_LINE;
    if (s->ier & IER_RECEIVED && s->rx.count >= triggers[s->fcr >> FCR_TRIGGER_SHIFT])
        return IIR_RECEIVED;
    if (s->ier & IER_RECEIVED && s->rx.count && s->timed_out)
        return IIR_TIMEOUT;
    if (s->ier & IER_EMPTY && s->thr_emptied)
        return IIR_EMPTY;
    if (s->ier & IER_MODEM && s->msr & MSR_DELTAS)
        return IIR_MODEM;
    return IIR_NONE;
}

/* After anything that may have changed something. */
static void settle(serial *s)
{
    transmit(s);
    follow_modem_lines(s);
    vfu_dev_set_intx(s->dev, interrupt(s) != IIR_NONE);
}

/* ---- registers ------------------------------------------------------------------------------------------------------------- */

static uint8_t read_rbr(serial *s)
{
    receiver_touched(s);
    return s->rx.count ? pop(&s->rx) : 0;
}

static uint8_t read_iir(serial *s)
{
    uint8_t source = interrupt(s);
    if (source == IIR_EMPTY)
        s->thr_emptied = false;
    return s->fcr & FCR_ENABLE ? source | IIR_FIFOS : source;
}

static uint8_t read_lsr(serial *s)
{
    uint8_t value = (uint8_t)((s->rx.count ? LSR_READY : 0) | (s->overrun ? LSR_OVERRUN : 0) | (s->tx.count ? 0 : LSR_THRE) |
                              (s->tx.count || s->shifting ? 0 : LSR_TEMT));
    s->overrun = false;
    return value;
}

static uint8_t read_msr(serial *s)
{
    uint8_t value = s->msr;
    s->msr &= MSR_LINES;
    return value;
}

static uint8_t read_register(serial *s, uint64_t offset)
{
    if (s->lcr & LCR_DLAB && offset < 2)
        return s->divisor[offset];
    switch (offset) {
    case RBR: return read_rbr(s);
    case IER: return s->ier;
    case IIR: return read_iir(s);
    case LCR: return s->lcr;
    case MCR: return s->mcr;
    case LSR: return read_lsr(s);
    case MSR: return read_msr(s);
    default: return s->scr;
    }
}

static void write_thr(serial *s, uint8_t value)
{
    s->thr_emptied = false;
    if (s->tx.count < depth(s))
        push(&s->tx, value);
    else if (!(s->fcr & FCR_ENABLE)) /* THR is overwritten; the FIFO keeps what it has */
        s->tx.bytes[s->tx.first] = value;
}

/* Enabling the interrupt of an empty THR raises it, as often as one likes. */
static void write_ier(serial *s, uint8_t value)
{
    if (value & ~s->ier & IER_EMPTY && !s->tx.count)
        s->thr_emptied = true;
    s->ier = value & (IER_RECEIVED | IER_EMPTY | IER_LINE | IER_MODEM);
}

static void write_fcr(serial *s, uint8_t value)
{
    if (!(value & FCR_ENABLE)) /* then its other bits aren't programmed */
        value = 0;
    if ((value ^ s->fcr) & FCR_ENABLE)
        value |= FCR_CLEAR_RX | FCR_CLEAR_TX;
    if (value & FCR_CLEAR_RX)
        s->rx.count = 0;
    if (value & FCR_CLEAR_TX && s->tx.count) { /* the shift register keeps its byte */
        s->tx.count = 0;
        s->thr_emptied = true;
    }
    s->fcr = value & FCR_KEPT;
}

/* LSR and MSR are read-only. */
static void write_register(serial *s, uint64_t offset, uint8_t value)
{
    if (s->lcr & LCR_DLAB && offset < 2) {
        s->divisor[offset] = value;
        return;
    }
    switch (offset) {
    case THR: write_thr(s, value); break;
    case IER: write_ier(s, value); break;
    case FCR: write_fcr(s, value); break;
    case LCR: s->lcr = value; break;
    case MCR: s->mcr = value & MCR_KEPT; break;
    case SCR: s->scr = value; break;
    default: break;
    }
}

/* ---- PCI ------------------------------------------------------------------------------------------------------------------- */

/* A wider access is that many accesses of a byte, as an 8-bit bus makes of it. */
static int region_read(void *ctx, uint32_t region, uint64_t offset, void *buf, size_t len)
{
    (void)region;
    for (size_t i = 0; i < len; i++) {
        ((uint8_t *)buf)[i] = read_register(ctx, offset + i);
        settle(ctx);
    }
    return 0;
}

static int region_write(void *ctx, uint32_t region, uint64_t offset, const void *buf, size_t len)
{
    (void)region;
    for (size_t i = 0; i < len; i++) {
        write_register(ctx, offset + i, ((const uint8_t *)buf)[i]);
        settle(ctx);
    }
    return 0;
}

static void reset(void *ctx, vfu_reset_kind kind)
{
    serial *s = ctx;
    (void)kind;
    *s = (serial){.dev = s->dev, .at_end = s->at_end, .hung_up = s->hung_up};
    s->msr = modem_lines(s);
}

/* The plug is pulled: input waits for the next client, output that waits is still written. */
static void disconnected(void *ctx)
{
    serial *s = ctx;
    s->mcr = 0;
    settle(s);
}

/* ---- the program ----------------------------------------------------------------------------------------------------------- */

static uint64_t earlier(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* One turn of the loop. 0; -ENOTCONN: there is no client and none can come. */
static int turn(serial *s)
{
    enum { IN = VFU_DEV_FDS, OUT, ALL };
    vfu_pollfd wanted[VFU_DEV_FDS];
    struct pollfd fds[ALL];
    unsigned count = vfu_dev_fds(s->dev, wanted);
    uint64_t now = now_ns(), until = UINT64_MAX;
    int ms = vfu_dev_timeout(s->dev);
    if (ms >= 0)
        until = now + (uint64_t)ms * 1000000;
    for (unsigned i = 0; i < VFU_DEV_FDS; i++)
        fds[i] = i < count ? (struct pollfd){.fd = wanted[i].fd, .events = wanted[i].events} : (struct pollfd){.fd = -1};

    /* Each direction of the line waits for its time first, then for its descriptor. */
    bool wants = wants_input(s), hears = wants && s->heard_at <= now, gives = s->shifting && s->sent_at <= now;
    fds[IN] = (struct pollfd){.fd = hears ? STDIN_FILENO : -1, .events = POLLIN};
    fds[OUT] = (struct pollfd){.fd = gives ? STDOUT_FILENO : -1, .events = POLLOUT};
    if (wants && !hears)
        until = earlier(until, s->heard_at);
    if (s->shifting && !gives)
        until = earlier(until, s->sent_at);
    if (s->rx.count && !s->timed_out)
        until = earlier(until, s->quiet_at);

    uint64_t left = until > now ? until - now : 0;
    struct timespec limit = {.tv_sec = (time_t)(left / 1000000000), .tv_nsec = (long)(left % 1000000000)};
    if (ppoll(fds, ALL, until == UINT64_MAX ? NULL : &limit, NULL) < 0)
        return errno == EINTR ? 0 : -errno;
    uint64_t woken = now_ns();
    if (fds[IN].revents) {
        s->heard_at += woken - now; /* the line was idle that long */
        take_input(s);
    } else {
        s->timed_out = now >= s->quiet_at;
        if (hears || !wants) /* it still is; a byte that the guest has made wait starts when it may */
            s->heard_at = wants ? woken : woken + byte_ns(s);
    }
    settle(s);
    return vfu_dev_poll(s->dev);
}

/* Until a signal comes, or the only client has gone and its last words are written. */
static int serve(serial *s)
{
    int err = 0;
    while (!program_ends && (!err || (err == -ENOTCONN && s->shifting)))
        err = turn(s);
    return err == -ENOTCONN ? 0 : err;
}

/* Bytes pass a terminal as they are. False: there is nothing to restore from *before. */
static bool make_raw(serial *s, struct termios *before)
{
    pid_t foreground = tcgetpgrp(STDIN_FILENO);
    if (tcgetattr(STDIN_FILENO, before) < 0)
        return false;
    if (foreground >= 0 && foreground != getpgrp()) { /* the terminal is somebody else's: to touch it would stop us */
        s->at_end = true;
        return false;
    }
    struct termios raw = *before;
    cfmakeraw(&raw);
    raw.c_lflag |= ISIG; /* but for the key that sends SIGINT */
    raw.c_cc[VINTR] = ESCAPE;
    raw.c_cc[VQUIT] = raw.c_cc[VSUSP] = _POSIX_VDISABLE;
    fprintf(stderr, "Ctrl-] ends the program\n");
    return tcsetattr(STDIN_FILENO, TCSANOW, &raw) == 0;
}

int main(int argc, char **argv)
{
    static const program_option none[] = {{0}};
    program p = {.usage = "[--verbose] [--sandbox]", .min_fd = STDERR_FILENO + 1}; /* those below are the line's */
    if (!program_options(&p, none, argc, argv))
        return program_usage(&p);

    static serial s;
    vfu_dev_desc desc = {
        .pci =
            {
                .vendor = 0x1234,
                .device = 0x1655,
                .subsystem_vendor = 0x1234,
                .subsystem = 0x0001,
                .class_code = 0x070002, /* serial controller, compatible with the 16550 */
                .revision = 1,
                .interrupt_pin = 1,
                .bar = {[BAR_REGISTERS] = {.size = BAR_SIZE, .kind = VFU_BAR_IO}},
            },
        .ctx = &s,
        .callbacks = {.region_read = region_read, .region_write = region_write, .reset = reset, .disconnected = disconnected},
        .logger = {.level = p.verbose ? VFU_LEVEL_TRACE : VFU_LEVEL_WARNING},
    };
    int err = vfu_dev_create(&s.dev, &desc);
    if (!err) {
        reset(&s, VFU_RESET_BY_FUNCTION);
        err = program_open(&p, s.dev, 0);
    }
    if (!err) {
        struct termios before;
        bool is_raw = make_raw(&s, &before);
        err = p.sandbox ? sandbox_enter() : 0;
        if (!err)
            err = serve(&s);
        if (is_raw)
            tcsetattr(STDIN_FILENO, TCSANOW, &before);
    }
    vfu_dev_destroy(s.dev);
    return program_end(&p, err);
}
