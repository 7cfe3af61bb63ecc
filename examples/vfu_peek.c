/* SPDX-License-Identifier: MIT */
/*
 * vfu_peek - reads and writes a vfio-user device from the command line
 *
 *     cc -std=c11 -O2 -I. examples/vfu_peek.c -o vfu_peek -pthread
 *     ./vfu_peek --socket-path=/tmp/engine.sock read bar0 0 4, read config 0 64
 *
 * Commands stand in the arguments, with commas between them, or in standard input, one per line. They share one connection, so
 * that memory and interrupts stay: a whole DMA can be tried by hand. What is read goes to standard output and nothing else does.
 * Status 0: all went well; 1: a command failed, and those behind it were not done; 2: wrong arguments, or no such command.
 */
#define VFU_IMPLEMENTATION
#include "vfu.h"

#include <ctype.h>
#include <getopt.h>
#include <sys/syscall.h>

enum {
    NUMBERS_MAX = 5,
    READ_MAX = 64 << 20, /* bytes of one read */
    VECTORS_MAX = 2048   /* interrupts of one `irq`, what MSI-X has */
};

/* Memory that the device was given. */
typedef struct window {
    struct window *next;
    uint64_t iova, size; /* bytes */
    uint8_t *at;
    int fd;
    bool writable; /* by us */
} window;

/* An interrupt that was assigned. */
typedef struct vector {
    struct vector *next;
    uint32_t index, number;
    int fd;
} vector;

typedef struct session {
    vfu_client *client;
    window *windows;
    vector *vectors;
} session;

typedef struct command {
    const struct verb *verb;
    uint64_t n[NUMBERS_MAX]; /* what stands behind the verb, names as their numbers */
    unsigned count;          /* how many there are */
    uint32_t prot;           /* map */
    bool by_message;         /* map */
    const char *file;        /* map; borrowed; NULL: anonymous memory */
} command;

typedef struct verb {
    const char *name;
    /* One letter each. r: region; i: kind of interrupt; w: width; n: number; v: value of the width before it; m: options of
     * map, any number; ?: what follows may be left away. */
    const char *operands;
    int (*run)(session *s, const command *c);
    const char *form, *help; /* NULL: told with the verb before */
} verb;

/* ---- printing ----------------------------------------------------------------------------------------------------------- */

static bool is_width(uint64_t len) { return len == 1 || len == 2 || len == 4 || len == 8; }

static uint64_t from_bytes(const uint8_t *bytes, size_t width)
{
    uint64_t value = 0;
    for (size_t i = width; i--;)
        value = value << 8 | bytes[i];
    return value;
}

static void to_bytes(uint8_t *bytes, uint64_t value)
{
    for (unsigned i = 0; i < 8; i++)
        bytes[i] = (uint8_t)(value >> 8 * i);
}

/* What has the width of a register is a number, everything else a hex dump with addresses from `at` on. */
static void print_bytes(const uint8_t *bytes, uint64_t at, size_t len)
{
    if (is_width(len)) {
        printf("0x%0*llx\n", (int)len * 2, (unsigned long long)from_bytes(bytes, len));
        return;
    }
    for (size_t line = 0; line < len; line += 16) {
        printf("%08llx ", (unsigned long long)(at + line));
        for (size_t i = line; i < line + 16; i++)
            if (i < len)
                printf(" %02x", bytes[i]);
            else
                printf("   ");
        printf("  |");
        for (size_t i = line; i < line + 16 && i < len; i++)
            putchar(bytes[i] >= ' ' && bytes[i] <= '~' ? bytes[i] : '.');
        printf("|\n");
    }
}

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ---- regions ------------------------------------------------------------------------------------------------------------ */

static int run_read(session *s, const command *c)
{
    if (!c->n[2] || c->n[2] > READ_MAX)
        return -EINVAL;
    uint8_t *bytes = malloc((size_t)c->n[2]);
    if (!bytes)
        return -ENOMEM;
    int err = vfu_client_region_read(s->client, (uint32_t)c->n[0], c->n[1], bytes, (size_t)c->n[2]);
    if (!err)
        print_bytes(bytes, c->n[1], (size_t)c->n[2]);
    free(bytes);
    return err;
}

static int run_write(session *s, const command *c)
{
    uint8_t bytes[8];
    to_bytes(bytes, c->n[3]);
    return vfu_client_region_write(s->client, (uint32_t)c->n[0], c->n[1], bytes, (size_t)c->n[2]);
}

static int run_expect(session *s, const command *c)
{
    uint64_t until = now_ms() + (c->count > 4 ? c->n[4] : 0);
    for (unsigned tries = 0;; tries++) {
        uint8_t bytes[8];
        bool late = now_ms() >= until; /* before the read: the last one comes after the time has passed */
        int err = vfu_client_region_read(s->client, (uint32_t)c->n[0], c->n[1], bytes, (size_t)c->n[2]);
        if (err)
            return err;
        uint64_t value = from_bytes(bytes, (size_t)c->n[2]);
        if (value == c->n[3])
            return 0;
        if (late) {
            fprintf(stderr, "vfu_peek: it is 0x%llx, not 0x%llx\n", (unsigned long long)value, (unsigned long long)c->n[3]);
            return c->count > 4 ? -ETIMEDOUT : -ERANGE;
        }
        err = tries > 100 ? vfu_client_serve(s->client, -1, 1) : 0; /* leave the machine some time */
        if (err < 0)
            return err;
    }
}

static int run_direct(session *s, const command *c)
{
    return vfu_client_region_open(s->client, (uint32_t)c->n[0], VFU_CLIENT_BY_MEMORY | VFU_CLIENT_BY_EVENTFD);
}

static int run_reset(session *s, const command *c)
{
    (void)c;
    return vfu_client_reset(s->client);
}

/* ---- memory ------------------------------------------------------------------------------------------------------------- */

static void free_window(window *w)
{
    if (w->at)
        munmap(w->at, (size_t)w->size);
    if (w->fd >= 0)
        close(w->fd);
    free(w);
}

/* The window that holds all of [iova, iova + len), or NULL. */
static window *find_window(session *s, uint64_t iova, uint64_t len)
{
    window *w = s->windows;
    while (w && !(iova >= w->iova && iova - w->iova < w->size && len <= w->size - (iova - w->iova)))
        w = w->next;
    return w;
}

/* Makes the file behind a window: anonymous memory that can't shrink, or the caller's, which must be large enough. */
static int open_memory(window *w, const char *file)
{
    struct stat st;
    if (file) {
        w->fd = open(file, (w->writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
        if (w->fd < 0 || fstat(w->fd, &st) < 0)
            return -errno;
        return (uint64_t)st.st_size < w->size ? -ENXIO : 0;
    }
    w->fd = (int)syscall(SYS_memfd_create, "vfu_peek", 3u); /* MFD_CLOEXEC | MFD_ALLOW_SEALING */
    if (w->fd < 0 || ftruncate(w->fd, (off_t)w->size) < 0 || fcntl(w->fd, F_ADD_SEALS, F_SEAL_SHRINK) < 0)
        return -errno;
    return 0;
}

static int run_map(session *s, const command *c)
{
    if (!c->n[1] || c->n[1] > (uint64_t)INT64_MAX || c->n[1] > SIZE_MAX)
        return -EINVAL;
    window *w = calloc(1, sizeof(*w));
    if (!w)
        return -ENOMEM;
    *w = (window){.iova = c->n[0], .size = c->n[1], .writable = !c->file || c->prot != VFU_IOMMU_READ};
    int err = open_memory(w, c->file);
    if (!err) {
        void *at = mmap(NULL, (size_t)w->size, PROT_READ | (w->writable ? PROT_WRITE : 0), MAP_SHARED, w->fd, 0);
        err = at == MAP_FAILED ? -errno : 0;
        w->at = at == MAP_FAILED ? NULL : at;
    }
    if (!err)
        err = vfu_client_dma_map(s->client, w->iova, w->size, c->prot, w->at, c->by_message ? -1 : w->fd, 0);
    if (err) {
        free_window(w);
        return err;
    }
    w->next = s->windows;
    s->windows = w;
    return 0;
}

static int run_unmap(session *s, const command *c)
{
    int count = vfu_client_dma_unmap(s->client, c->n[0], c->n[1]);
    if (count < 0)
        return count;
    for (window **at = &s->windows; *at;) {
        window *w = *at;
        if (w->iova >= c->n[0] && w->iova - c->n[0] < c->n[1]) {
            *at = w->next;
            free_window(w);
        } else {
            at = &w->next;
        }
    }
    return 0;
}

static int run_mem(session *s, const command *c)
{
    window *w = find_window(s, c->n[0], c->n[1]);
    if (!w || !c->n[1] || c->n[1] > READ_MAX)
        return w ? -EINVAL : -ENOENT;
    print_bytes(w->at + (c->n[0] - w->iova), c->n[0], (size_t)c->n[1]);
    return 0;
}

static int run_fill(session *s, const command *c)
{
    window *w = find_window(s, c->n[0], c->n[1]);
    if (!w || c->n[2] > 255)
        return w ? -EINVAL : -ENOENT;
    if (!w->writable)
        return -EACCES;
    memset(w->at + (c->n[0] - w->iova), (int)c->n[2], (size_t)c->n[1]);
    return 0;
}

static int run_poke(session *s, const command *c)
{
    uint8_t bytes[8];
    window *w = find_window(s, c->n[0], c->n[1]);
    if (!w)
        return -ENOENT;
    if (!w->writable)
        return -EACCES;
    to_bytes(bytes, c->n[2]);
    memcpy(w->at + (c->n[0] - w->iova), bytes, (size_t)c->n[1]);
    return 0;
}

/* ---- interrupts and time ------------------------------------------------------------------------------------------------ */

static vector *find_vector(session *s, uint64_t index, uint64_t number)
{
    vector *v = s->vectors;
    while (v && (v->index != index || v->number != number))
        v = v->next;
    return v;
}

/* The eventfd of an interrupt, made when it is first asked for; or a negative errno. */
static int eventfd_of(session *s, uint32_t index, uint32_t number)
{
    vector *v = find_vector(s, index, number);
    if (v)
        return v->fd;
    v = malloc(sizeof(*v));
    if (!v)
        return -ENOMEM;
    *v = (vector){.next = s->vectors, .index = index, .number = number, .fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    if (v->fd < 0) {
        int err = -errno;
        free(v);
        return err;
    }
    s->vectors = v;
    return v->fd;
}

static int run_irq(session *s, const command *c)
{
    static int fds[VECTORS_MAX];
    uint32_t index = (uint32_t)c->n[0], start = (uint32_t)c->n[1], count = (uint32_t)c->n[2];
    if (!count)
        return vfu_client_irq_action(s->client, index, start, 0, VFU_IRQ_SET_ACTION_TRIGGER);
    if (count > VECTORS_MAX)
        return -EINVAL;
    for (uint32_t i = 0; i < count; i++) {
        fds[i] = eventfd_of(s, index, start + i);
        if (fds[i] < 0)
            return fds[i];
    }
    return vfu_client_irq_assign(s->client, index, start, count, fds);
}

static int run_mask(session *s, const command *c)
{
    return vfu_client_irq_action(s->client, (uint32_t)c->n[0], (uint32_t)c->n[1], (uint32_t)c->n[2], VFU_IRQ_SET_ACTION_MASK);
}

static int run_unmask(session *s, const command *c)
{
    return vfu_client_irq_action(s->client, (uint32_t)c->n[0], (uint32_t)c->n[1], (uint32_t)c->n[2], VFU_IRQ_SET_ACTION_UNMASK);
}

static int milliseconds(uint64_t ms) { return ms < INT_MAX ? (int)ms : INT_MAX; }

/* Serves the device meanwhile, and prints how often it was signalled. */
static int run_wait(session *s, const command *c)
{
    uint64_t times;
    vector *v = find_vector(s, c->n[0], c->n[1]);
    if (!v)
        return -ENOENT;
    int got = vfu_client_serve(s->client, v->fd, milliseconds(c->n[2]));
    if (got <= 0)
        return got ? got : -ETIMEDOUT;
    if (read(v->fd, &times, sizeof(times)) != sizeof(times))
        return -ETIMEDOUT;
    printf("%llu\n", (unsigned long long)times);
    return 0;
}

static int run_sleep(session *s, const command *c) { return vfu_client_serve(s->client, -1, milliseconds(c->n[0])); }

/* ---- the language ------------------------------------------------------------------------------------------------------- */

static const verb verbs[] = {
    {"read", "rnn", run_read, "REGION OFFSET LEN", "1, 2, 4, 8 bytes: a number, else a dump"},
    {"write", "rnwv", run_write, "REGION OFFSET WIDTH VALUE", ""},
    {"expect", "rnwv?n", run_expect, "REGION OFFSET WIDTH VALUE [MS]", "fails unless it reads VALUE (within MS)"},
    {"direct", "r", run_direct, "REGION", "use its memory and ioeventfds from now"},
    {"map", "nnm", run_map, "IOVA SIZE [ro|wo] [nofd] [file=PATH]", "give memory; nofd: by message"},
    {"unmap", "nn", run_unmap, "IOVA SIZE", ""},
    {"mem", "nn", run_mem, "IOVA LEN", "print that memory, as read does"},
    {"fill", "nnn", run_fill, "IOVA LEN BYTE", ""},
    {"poke", "nwv", run_poke, "IOVA WIDTH VALUE", "write a number to it"},
    {"irq", "inn", run_irq, "KIND START COUNT", "have interrupts signalled; 0 0: no more"},
    {"wait", "inn", run_wait, "KIND NUMBER MS", "wait for one; prints how often it came"},
    {"mask", "inn", run_mask, "KIND START COUNT", "and unmask"},
    {"unmask", "inn", run_unmask, NULL, NULL},
    {"reset", "", run_reset, "", ""},
    {"sleep", "n", run_sleep, "MS", "answer DMA messages meanwhile"},
};

static int usage(const char *path, FILE *out)
{
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    fprintf(out, "usage: %s --socket-path=PATH [COMMAND, COMMAND...]\n", name);
    fprintf(out, "Does commands with a vfio-user device, or those in standard input, a line each.\n");
    for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++)
        if (verbs[i].form)
            fprintf(out, *verbs[i].help ? "  %-6s %-31s %s\n" : "  %-6s %s\n", verbs[i].name, verbs[i].form, verbs[i].help);
    fprintf(out,
            "REGION: bar0 to bar5, rom, config, vga, a number. KIND: intx, msi, msix, err,\n"
            "req, a number. Numbers: 10, 0x10, 4k, 1m, 1g.\n"
            "Status: 0, 1 when a command failed, 2 for wrong arguments.\n"
            "example: have the engine fill 16 bytes of a page\n"
            "  %s --socket-path=/tmp/engine.sock map 0x100000 4k, \\\n"
            "    write bar0 0x10 8 0x100000, write bar0 0x18 8 16, write bar0 0x20 8 0x42, \\\n"
            "    write bar0 0x30 4 2, expect bar0 0x34 4 2 1000, mem 0x100000 16\n",
            name);
    return out == stdout ? 0 : 2;
}

/* A place in a list of names, or -1. */
static int name_in(const char *const *names, int count, const char *word)
{
    while (count-- > 0 && strcmp(names[count], word) != 0) {
    }
    return count;
}

static bool parse_number(const char *word, uint64_t *out)
{
    char *end;
    uint64_t unit = 1;
    errno = 0;
    unsigned long long value = strtoull(word, &end, 0);
    if (errno || end == word || !isdigit((unsigned char)*word))
        return false;
    switch (*end) {
    case 'k': unit = UINT64_C(1) << 10, end++; break;
    case 'm': unit = UINT64_C(1) << 20, end++; break;
    case 'g': unit = UINT64_C(1) << 30, end++; break;
    default: break;
    }
    *out = value * unit;
    return !*end && *out / unit == value;
}

static bool parse_map_option(command *c, const char *word)
{
    if (!strcmp(word, "ro"))
        c->prot = VFU_IOMMU_READ;
    else if (!strcmp(word, "wo"))
        c->prot = VFU_IOMMU_WRITE;
    else if (!strcmp(word, "nofd"))
        c->by_message = true;
    else if (!strncmp(word, "file=", 5) && word[5])
        c->file = word + 5;
    else
        return false;
    return true;
}

/* One operand of the kind that the verb says. */
static bool parse_operand(command *c, char kind, const char *word)
{
    static const char *const regions[] = {"bar0", "bar1", "bar2", "bar3", "bar4", "bar5", "rom", "config", "vga"};
    static const char *const irqs[] = {"intx", "msi", "msix", "err", "req"};
    uint64_t *n = &c->n[c->count];
    int named = kind == 'r' ? name_in(regions, 9, word) : kind == 'i' ? name_in(irqs, 5, word) : -1;
    if (kind == 'm')
        return parse_map_option(c, word);
    if (named >= 0)
        *n = (uint64_t)named;
    else if (!parse_number(word, n))
        return false;
    c->count++;
    switch (kind) {
    case 'n': return true;
    case 'w': return is_width(*n);
    case 'v': return n[-1] == 8 || *n >> 8 * n[-1] == 0;
    default: return *n <= UINT32_MAX;
    }
}

/* Takes the next command from *text, whose words are cut and borrowed. 1; 0: there is none; -1: it is wrong, which was said. */
static int parse(char **text, command *c)
{
    const char *word, *kind = NULL;
    bool last = false;
    *c = (command){.prot = VFU_IOMMU_READ | VFU_IOMMU_WRITE};
    while (!last && (word = strtok_r(*text, " \t\n", text))) {
        size_t len = strlen(word);
        last = word[len - 1] == ',';
        if (last)
            ((char *)(uintptr_t)word)[len - 1] = 0;
        if (!*word) {
            last = kind != NULL; /* a comma by itself */
            continue;
        }
        if (!kind) {
            for (size_t i = 0; i < sizeof(verbs) / sizeof(verbs[0]); i++)
                if (!strcmp(verbs[i].name, word))
                    c->verb = &verbs[i];
            if (!c->verb) {
                fprintf(stderr, "vfu_peek: no such command: %s\n", word);
                return -1;
            }
            kind = c->verb->operands;
            continue;
        }
        kind += *kind == '?';
        if (!*kind || !parse_operand(c, *kind, word)) {
            fprintf(stderr, "vfu_peek: %s: %s: %s\n", c->verb->name, *kind ? "not understood" : "too much", word);
            return -1;
        }
        kind += *kind != 'm';
    }
    if (kind && *kind && *kind != '?' && *kind != 'm') {
        fprintf(stderr, "vfu_peek: %s: too little; it is %s %s\n", c->verb->name, c->verb->name, c->verb->form);
        return -1;
    }
    return kind ? 1 : 0;
}

/* Does the commands of a line, and stops at the first that fails. Status of the program. With dry only looks at them. */
static int run_line(session *s, const char *line, bool dry)
{
    char *copy = strdup(line), *rest = copy;
    command c;
    int got, err = copy ? 0 : -ENOMEM;
    while (!err && (got = parse(&rest, &c)) != 0) {
        if (got < 0) {
            free(copy);
            return 2;
        }
        err = dry ? 0 : c.verb->run(s, &c);
        if (err)
            fprintf(stderr, "vfu_peek: %s: %s (%s)\n", c.verb->name, vfu_errno_name(err), strerror(-err));
    }
    free(copy);
    return err ? 1 : 0;
}

/* On a terminal a command that fails is no reason to leave. */
static int run_input(session *s)
{
    char *line = NULL;
    size_t room = 0;
    int status = 0;
    bool terminal = isatty(STDIN_FILENO);
    while (terminal || !status) {
        if (terminal)
            fprintf(stderr, "> ");
        if (getline(&line, &room, stdin) < 0)
            break;
        line[strcspn(line, "#")] = 0;
        int failed = run_line(s, line, false);
        status = status ? status : failed;
        fflush(stdout);
    }
    free(line);
    return status;
}

/* The arguments as one line; NULL without memory. */
static char *join(char **words, int count)
{
    size_t len = 1;
    for (int i = 0; i < count; i++)
        len += strlen(words[i]) + 1;
    char *line = calloc(1, len);
    for (int i = 0; line && i < count; i++) {
        strcat(line, words[i]);
        strcat(line, " ");
    }
    return line;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"socket-path", required_argument, NULL, 's'},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    static session s;
    const char *path = NULL;
    int option;
    while ((option = getopt_long(argc, argv, "+", options, NULL)) != -1) {
        switch (option) {
        case 's': path = optarg; break;
        case 'h': return usage(argv[0], stdout);
        default: return usage(argv[0], stderr);
        }
    }
    if (!path)
        return usage(argv[0], stderr);
    char *line = join(argv + optind, argc - optind);
    int status = line ? run_line(NULL, line, true) : 1; /* nothing is done before all of it is understood */
    int err = status ? 0 : vfu_client_connect(&s.client, path, NULL);
    if (err) {
        fprintf(stderr, "vfu_peek: %s: %s (%s)\n", path, vfu_errno_name(err), strerror(-err));
        status = 1;
    } else if (!status) {
        status = optind < argc ? run_line(&s, line, false) : run_input(&s);
    }
    vfu_client_destroy(s.client);
    for (window *w = s.windows, *next; w; w = next) {
        next = w->next;
        free_window(w);
    }
    for (vector *v = s.vectors, *next; v; v = next) {
        next = v->next;
        close(v->fd);
        free(v);
    }
    free(line);
    return fflush(stdout) && !status ? 1 : status;
}
