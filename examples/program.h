/* SPDX-License-Identifier: MIT */
/*
 * program.h - what the example devices have in common as programs: options, signals, a socket, a sandbox
 *
 * Include vfu.h first. main() says what options a device has beside those of all, where their values go, and what the help says:
 *
 *     const program_option own[] = {{"size", "N", "bytes; K, M, G and T are understood", .number = &size, .max = 1 << 30}, {0}};
 *     program p = {.usage = "[--size=N]"};
 *     if (!program_options(&p, own, argc, argv))
 *         return program_usage(&p);
 *     ...
 *     err = program_open(&p, dev, 0);
 *     while (!err && !program_ends)
 *         err = vfu_dev_run(dev);
 *     return program_end(&p, err);
 */
#ifndef VFU_EXAMPLES_PROGRAM_H
#define VFU_EXAMPLES_PROGRAM_H

#include "sandbox.h"

#include <ctype.h>
#include <getopt.h>

typedef struct program_option {
    const char *name, *value, *help; /* value: what it stands for; NULL: there is none */
    const char **text;               /* one of these says where it goes */
    uint64_t *number, min, max;
    bool *flag; /* of an option without a value, or with one of two that are "one|another": is it the other? */
} program_option;

enum { PROGRAM_OPTIONS = 24 };

typedef struct program {
    const char *usage; /* the device's own options, in short */
    uint64_t min_fd;

    program_option options[PROGRAM_OPTIONS + 1]; /* the last has no name */
    const char *name, *path;                     /* path: to listen on; NULL: fd is a socket */
    uint64_t fd;
    bool verbose, sandbox, help;
} program;

/* A number from min to max, perhaps with K, M, G or T behind it. */
static inline bool program_number(const char *text, uint64_t min, uint64_t max, uint64_t *out)
{
    static const char units[] = "KMGT";
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 0);
    const char *unit = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
    unsigned shift = unit ? 10 * (unsigned)(unit - units + 1) : 0;
    *out = (uint64_t)value << shift;
    return !errno && isdigit((unsigned char)*text) && !(unit ? end[1] : *end) && value <= max >> shift && *out >= min;
}

static inline bool program_value(const program_option *o, const char *value)
{
    if (o->number)
        return program_number(value, o->min, o->max, o->number);
    if (o->text)
        *o->text = value;
    else
        *o->flag = !value || !strcmp(value, strchr(o->value, '|') + 1);
    return o->text || *o->flag || (!strncmp(value, o->value, strlen(value)) && o->value[strlen(value)] == '|');
}

/* Takes the arguments apart. False: program_usage() shall end the program. */
static inline bool program_options(program *p, const program_option *own, int argc, char **argv)
{
    const program_option first[] = {
        {"socket-path", "PATH", "listen on a UNIX socket", .text = &p->path},
        {"fd", "N", "serve a socket that listens or is connected already", .number = &p->fd, .min = p->min_fd, .max = INT_MAX},
        {0},
    };
    const program_option last[] = {
        {"verbose", NULL, "print a line for each request", .flag = &p->verbose},
        {"sandbox", NULL, "give up all system calls but those that serving needs", .flag = &p->sandbox},
        {"help", NULL, "print this", .flag = &p->help},
        {0},
    };
    struct option names[PROGRAM_OPTIONS + 1] = {{0}};
    int count = 0;
    bool good = true;
    const program_option *const parts[] = {first, own, last};
    for (int part = 0; part < 3; part++)
        for (const program_option *o = parts[part]; o->name && count < PROGRAM_OPTIONS; o++)
            p->options[count++] = *o;
    for (int i = 0; i < count; i++)
        names[i] = (struct option){p->options[i].name, p->options[i].value ? required_argument : no_argument, NULL, i};
    p->name = argv[0];
    p->fd = UINT64_MAX;
    for (int i; good && (i = getopt_long(argc, argv, "", names, NULL)) != -1;)
        good = i < count && program_value(&p->options[i], optarg);
    good = good && optind == argc;
    p->help = p->help && good;
    return good && !p->help && !p->path != (p->fd > INT_MAX);
}

/* Prints it, because somebody asked for help or is in need of it. Returns an exit status. */
static inline int program_usage(const program *p)
{
    FILE *out = p->help ? stdout : stderr;
    fprintf(out, "usage: %s (--socket-path=PATH | --fd=N) %s\n", p->name, p->usage);
    for (const program_option *o = p->options; o->name; o++)
        fprintf(out, "  --%s%s%-*s  %s\n", o->name, o->value ? "=" : " ", (int)(24 - strlen(o->name)), o->value ? o->value : "",
                o->help);
    return p->help ? 0 : 2;
}

static vfu_dev *program_device;
static atomic_bool program_ends, program_asked;

static inline void program_signal(int number)
{
    atomic_store(number == SIGTERM || number == SIGINT ? &program_ends : &program_asked, true);
    vfu_dev_stop(program_device);
}

/* Listens, or takes the socket. Before anybody can see it, signals are caught: SIGTERM and SIGINT set program_ends, the signal
 * `other` (0: there is none) sets program_asked, and each makes vfu_dev_run() return. */
static inline int program_open(const program *p, vfu_dev *dev, int other)
{
    struct sigaction action = {.sa_handler = program_signal, .sa_flags = SA_RESTART};
    program_device = dev;
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    if (other)
        sigaction(other, &action, NULL);
    signal(SIGPIPE, SIG_IGN); /* whoever read what --verbose prints may stop doing so */
    return p->path ? vfu_dev_listen(dev, p->path) : vfu_dev_attach(dev, (int)p->fd);
}

/* Says what ended the device, if it is no signal and not that its only client has gone. Returns an exit status. */
static inline int program_end(const program *p, int err)
{
    if (!err || err == -ENOTCONN)
        return 0;
    fprintf(stderr, "%s: %s: %s\n", p->name, p->path ? p->path : "--fd", strerror(-err));
    return 1;
}

#endif /* VFU_EXAMPLES_PROGRAM_H */
