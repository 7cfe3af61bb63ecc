/* SPDX-License-Identifier: MIT */
/*
 * vfu_trace - sits between a vfio-user client and its device and prints what they say, as strace does for system calls
 *
 *     cc -std=c11 -O2 -I. examples/vfu_trace.c -o vfu_trace -pthread
 *     ./vfu_trace --socket-path=/tmp/traced.sock --to=/tmp/engine.sock
 *
 * Bytes and descriptors are passed on as they came, never encoded anew; what is printed is only looked at. Each message leaves
 * in a sendmsg() of its own, header and descriptors together, because some clients depend on it. A twin socket is taken out of
 * the VERSION reply and replaced by one of ours, so that what goes over it is seen, too. What can't be understood is passed on
 * all the same.
 */
#define VFU_IMPLEMENTATION
#include "vfu.h"

#include <ctype.h>
#include <getopt.h>
#include <sys/resource.h>

enum {
    ROOM = 256 << 10,                 /* bytes that one recvmsg() takes at least */
    LOOKED_AT_MAX = 1100 << 10,       /* bytes of a message that is decoded; of larger ones only the header is printed */
    MESSAGE_MAX = (64 << 20) + 65536, /* bytes; a larger size field is no vfio-user: QEMU's limit for data is 64 MiB */
    GREETING_MAX = 8192,              /* bytes of a VERSION reply that is looked at for a twin socket */
    COMMANDS = 20,                    /* the last one stands for all that have no name */
    WAITING_MAX = 1024,               /* commands of one side that wait for their replies */
    BUCKETS = 64 * 16,                /* of latencies: 16 for each power of two nanoseconds */
    FLUSH_MS = 20,                    /* how long a line may stay in the buffer when nothing happens */
    SLOW_MS = 1000,                   /* a reply that takes longer is worth a line */
    MAPS_SHOWN = 32,
    DATA_SHOWN = 64 /* bytes of data in a JSON line */
};

typedef enum side { CLIENT = 0, DEVICE = 1 } side;
static const char *const side_names[] = {"client", "device"};

/* Descriptors that arrived and wait to leave with the byte at `at` of the buffer. */
typedef struct batch {
    size_t at;
    unsigned count;
    int fds[VFU_FDS_RECEIVABLE];
} batch;

/*
 * One direction. A message is sent as it arrives, but its header never in pieces:
 *
 *     buf: | ... | start: the message under way | ... | sent | ... | end |  free  |
 */
typedef struct stream {
    int from, to; /* borrowed from the channel */
    side sender;
    bool twin;
    bool raw;      /* the bytes are no messages any more */
    bool ended;    /* the sender says no more */
    bool closed;   /* and the receiver was told so */
    bool deaf;     /* the receiver takes no more */
    bool greeted;  /* the first message has gone */
    bool giant;    /* the message under way is too large to be looked at, and only counted */
    bool stuck;    /* the receiver is slow: wait for it */
    uint64_t when; /* ns, of the last bytes */
    uint8_t *buf;
    size_t start, sent, end;
    size_t edge;       /* where the message under way ends, may be behind `end`; equal to `sent` between messages */
    unsigned fds_sent; /* with the message under way */
    batch batches[2];  /* at most one waits with a message that is held, and one is new */
    unsigned batch_count;
} stream;

/* A pair of sockets. */
typedef struct channel {
    bool open;
    int fds[2];        /* by side */
    stream streams[2]; /* by sender */
} channel;

/* A command whose reply hasn't come. */
typedef struct waiting {
    uint64_t since; /* ns */
    uint16_t id, cmd;
    bool twin, told, with_fd;
    uint32_t flags; /* of DMA_MAP and DMA_UNMAP, as are the next */
    uint64_t iova, size;
} waiting;

typedef struct count {
    uint64_t commands, replies, errors, bytes, slowest; /* slowest: ns */
    uint32_t latencies[BUCKETS];
} count;

static struct {
    bool json, colours, quiet;
    uint32_t only; /* bits of commands that are printed */
    const char *to;

    uint64_t began; /* ns, of this session */
    uint64_t sessions;
    channel channels[2];           /* main and twin */
    waiting waits[2][WAITING_MAX]; /* by who sent the command, oldest first */
    unsigned wait_count[2];
    count counts[2][COMMANDS];
    uint64_t messages, bytes, fds, lost; /* lost: replies to nothing that was asked */
    vfu_iommu *maps; /* what the device may reach now, as far as replies said so; `user` holds the flags and MAP_WITH_FD */
    bool dirty;      /* lines wait in stdout's buffer */
} t;

#define MAP_WITH_FD 0x10u /* beside VFU_DMA_* */

static volatile sig_atomic_t asked_to_end;

static void on_signal(int number)
{
    (void)number;
    asked_to_end = 1;
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static double seconds(uint64_t ns) { return (double)(ns - t.began) / 1e9; }

/* ---- latencies ---------------------------------------------------------------------------------------------------------- */

/* Buckets grow with the value: each is right to one part in 16. */
static unsigned bucket_of(uint64_t ns)
{
    unsigned shift = 0;
    while (ns >> shift >= 32)
        shift++;
    return ns < 16 ? (unsigned)ns : 16 * (shift + 1) + (unsigned)(ns >> shift) - 16;
}

static double bucket_us(unsigned bucket)
{
    return bucket < 16 ? bucket / 1e3 : ((double)(bucket % 16) + 16.5) * (double)(UINT64_C(1) << (bucket / 16 - 1)) / 1e3;
}

static double percentile(const count *c, double part)
{
    uint64_t seen = 0;
    for (unsigned i = 0; i < BUCKETS; i++) {
        seen += c->latencies[i];
        if (seen && (double)seen >= part * (double)c->replies)
            return bucket_us(i) < (double)c->slowest / 1e3 ? bucket_us(i) : (double)c->slowest / 1e3;
    }
    return 0;
}

/* ---- JSON --------------------------------------------------------------------------------------------------------------- */

static void json_number(const char *name, uint64_t value) { printf(",\"%s\":%llu", name, (unsigned long long)value); }

/* Addresses and sizes have 64 bits, which is more than a JSON reader need keep in a number. */
static void json_address(const char *name, uint64_t value) { printf(",\"%s\":\"0x%llx\"", name, (unsigned long long)value); }

static void json_text(const char *name, const char *text, size_t len)
{
    printf(",\"%s\":\"", name);
    for (size_t i = 0; i < len; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c < ' ' || c > '~' || c == '"' || c == '\\')
            printf("\\u%04x", c);
        else
            putchar(c);
    }
    putchar('"');
}

static void json_data(const uint8_t *data, uint32_t len)
{
    if (!data || !len)
        return;
    printf(",\"data\":\"");
    for (uint32_t i = 0; i < len && i < DATA_SHOWN; i++)
        printf("%02x", data[i]);
    printf("\"");
    json_number("data_len", len);
}

static void json_region_caps(const vfu_msg *m)
{
    vfu_region_cap cap = {0};
    vfu_wire_sparse_area area;
    vfu_wire_cap_type type;
    uint32_t areas;
    while (vfu_msg_next_cap(m, &cap)) {
        if (vfu_region_cap_type(&cap, &type) == 0) {
            json_number("type", type.type);
            json_number("subtype", type.subtype);
        } else if (vfu_region_cap_areas(&cap, &areas) == 0) {
            printf(",\"areas\":[");
            for (uint32_t i = 0; vfu_region_cap_area(&cap, i, &area) == 0; i++)
                printf("%s[\"0x%llx\",\"0x%llx\"]", i ? "," : "", (unsigned long long)area.offset, (unsigned long long)area.size);
            printf("]");
        }
    }
}

/* The fields of a message, named as in the specification. */
static void json_fields(const vfu_msg *m)
{
    bool reply = vfu_msg_is_reply(m);
    if (vfu_msg_is_error(m))
        return;
    switch (m->cmd) {
    case VFU_CMD_VERSION:
        json_number("major", m->u.version.major);
        json_number("minor", m->u.version.minor);
        if (m->u.version.json)
            json_text("version_data", m->u.version.json, m->u.version.json_len);
        break;
    case VFU_CMD_DMA_MAP:
        if (reply)
            break;
        json_number("flags", m->u.dma_map.flags);
        json_address("offset", m->u.dma_map.offset);
        json_address("address", m->u.dma_map.address);
        json_address("size", m->u.dma_map.size);
        break;
    case VFU_CMD_DMA_UNMAP:
        json_number("flags", m->u.dma_unmap.flags);
        json_address("address", m->u.dma_unmap.address);
        json_address("size", m->u.dma_unmap.size);
        break;
    case VFU_CMD_DEVICE_GET_INFO:
        json_number("argsz", m->u.device_info.argsz);
        json_number("flags", m->u.device_info.flags);
        json_number("num_regions", m->u.device_info.num_regions);
        json_number("num_irqs", m->u.device_info.num_irqs);
        break;
    case VFU_CMD_DEVICE_GET_REGION_INFO:
        json_number("argsz", m->u.region_info.argsz);
        json_number("flags", m->u.region_info.flags);
        json_number("index", m->u.region_info.index);
        json_address("size", m->u.region_info.size);
        json_address("offset", m->u.region_info.offset);
        json_region_caps(m);
        break;
    case VFU_CMD_DEVICE_GET_REGION_IO_FDS:
        json_number("argsz", m->u.region_io_fds.argsz);
        json_number("index", m->u.region_io_fds.index);
        json_number("count", m->u.region_io_fds.count);
        break;
    case VFU_CMD_DEVICE_GET_IRQ_INFO:
        json_number("argsz", m->u.irq_info.argsz);
        json_number("flags", m->u.irq_info.flags);
        json_number("index", m->u.irq_info.index);
        json_number("count", m->u.irq_info.count);
        break;
    case VFU_CMD_DEVICE_SET_IRQS:
        if (reply)
            break;
        json_number("flags", m->u.irq_set.flags);
        json_number("index", m->u.irq_set.index);
        json_number("start", m->u.irq_set.start);
        json_number("count", m->u.irq_set.count);
        json_data(m->u.irq_set.data, m->u.irq_set.data_len);
        break;
    case VFU_CMD_REGION_READ:
    case VFU_CMD_REGION_WRITE:
        json_number("region", m->u.region.region);
        json_address("offset", m->u.region.offset);
        json_number("count", m->u.region.count);
        json_data(m->u.region.data, m->u.region.data_len);
        break;
    case VFU_CMD_DMA_READ:
    case VFU_CMD_DMA_WRITE:
        json_address("address", m->u.dma.address);
        json_number("count", m->u.dma.count);
        json_data(m->u.dma.data, m->u.dma.data_len);
        break;
    case VFU_CMD_REGION_WRITE_MULTI: json_number("count", m->u.write_multi.count); break;
    case VFU_CMD_DEVICE_FEATURE:
        json_number("argsz", m->u.feature.argsz);
        json_number("flags", m->u.feature.flags);
        json_data(m->u.feature.data, m->u.feature.data_len);
        break;
    case VFU_CMD_MIG_DATA_READ:
    case VFU_CMD_MIG_DATA_WRITE:
        if (reply && m->cmd == VFU_CMD_MIG_DATA_WRITE)
            break;
        json_number("size", m->u.mig_data.size);
        json_data(m->u.mig_data.data, m->u.mig_data.data_len);
        break;
    default: break;
    }
}

/* ---- lines -------------------------------------------------------------------------------------------------------------- */

#define RED    "\033[31m"
#define GREEN  "\033[32m"
#define YELLOW "\033[33m"
#define GREY   "\033[90m"
#define PLAIN  "\033[0m"

static const char *colour(const char *code) { return t.colours ? code : ""; }

/* Something that is no message. */
static void note(uint64_t when, const char *event, const char *format, ...) __attribute__((format(printf, 3, 4)));

static void note(uint64_t when, const char *event, const char *format, ...)
{
    char text[300];
    va_list arguments;
    if (t.quiet)
        return;
    va_start(arguments, format);
    vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    if (t.json) {
        printf("{\"time\":%.6f,\"event\":\"%s\"", seconds(when), event);
        json_text("text", text, strlen(text));
        printf("}\n");
    } else {
        printf("%12.6f %s-- %s%s\n", seconds(when), colour(YELLOW), text, colour(PLAIN));
    }
    t.dirty = true;
}

static unsigned slot(uint16_t cmd) { return cmd < COMMANDS - 1 && strcmp(vfu_cmd_name(cmd), "?") != 0 ? cmd : COMMANDS - 1; }

static const char *slot_name(unsigned i) { return i < COMMANDS - 1 ? vfu_cmd_name((uint16_t)i) : "unknown"; }

/* What is printed of one message besides itself. */
typedef struct line {
    const stream *s;
    uint32_t size;          /* bytes */
    int decoded;            /* what the decoder said */
    const waiting *answers; /* the command, if this is its reply; NULL: none was found */
} line;

static void print_json(const vfu_msg *m, const line *l)
{
    bool reply = vfu_msg_is_reply(m);
    printf("{\"time\":%.6f,\"from\":\"%s\",\"kind\":\"%s\",\"id\":%u", seconds(l->s->when), side_names[l->s->sender],
           reply ? "reply" : "command", m->id);
    json_text("cmd", vfu_cmd_name(m->cmd), strlen(vfu_cmd_name(m->cmd)));
    if (!strcmp(vfu_cmd_name(m->cmd), "?"))
        json_number("cmd_number", m->cmd);
    json_number("bytes", l->size);
    json_number("fds", l->s->fds_sent);
    if (l->s->twin)
        printf(",\"twin\":true");
    if (!reply && !vfu_msg_wants_reply(m))
        printf(",\"no_reply\":true");
    if (vfu_msg_is_error(m)) {
        json_text("error", vfu_errno_name((int)m->error), strlen(vfu_errno_name((int)m->error)));
        json_number("errno", m->error);
    }
    if (l->answers)
        printf(",\"us\":%.1f", (double)(l->s->when - l->answers->since) / 1e3);
    if (l->decoded)
        json_text("malformed", vfu_errno_name(l->decoded), strlen(vfu_errno_name(l->decoded)));
    else if (!l->s->giant)
        json_fields(m);
    printf("}\n");
}

static void print_text(const vfu_msg *m, const line *l)
{
    char text[1024];
    bool reply = vfu_msg_is_reply(m);
    const char *shade = reply ? GREEN : l->s->sender == DEVICE ? YELLOW : "";
    if (l->decoded || vfu_msg_is_error(m))
        shade = RED;
    vfu_msg_render(m, text, sizeof(text));
    if (l->decoded || l->s->giant) /* nothing but the header is known */
        snprintf(text, sizeof(text), "%s 0x%04x %s", reply ? "<-" : "->", m->id, vfu_cmd_name(m->cmd));
    printf("%s%12.6f%s %s%s %s%s", colour(GREY), seconds(l->s->when), colour(PLAIN), colour(shade), side_names[l->s->sender],
           text, colour(PLAIN));
    if (l->decoded == -ENOSYS)
        printf(" no such command: %u, %u bytes", m->cmd, l->size);
    else if (l->decoded)
        printf(" malformed: %s, flags 0x%x, %u bytes", vfu_errno_name(l->decoded), m->flags, l->size);
    else if (l->s->giant)
        printf(" %u bytes, not looked at", l->size);
    if (l->s->fds_sent)
        printf(" fds %u", l->s->fds_sent);
    if (l->s->twin)
        printf(" twin");
    if (reply && l->answers)
        printf(" %s(%.0f us)%s", colour(GREY), (double)(l->s->when - l->answers->since) / 1e3, colour(PLAIN));
    else if (reply)
        printf(" (nobody asked)");
    for (side who = CLIENT; !reply && who <= DEVICE; who++) {
        const waiting *w = &t.waits[who][0];
        unsigned others = t.wait_count[who] - (who == l->s->sender && vfu_msg_wants_reply(m));
        if (others)
            printf(" %s[%s waits: 0x%04x %s%s]%s", colour(GREY), side_names[who], w->id, vfu_cmd_name(w->cmd),
                   others > 1 ? " ..." : "", colour(PLAIN));
    }
    printf("\n");
}

static void print_message(const vfu_msg *m, const line *l)
{
    if (t.quiet || !(t.only >> slot(m->cmd) & 1))
        return;
    if (t.json)
        print_json(m, l);
    else
        print_text(m, l);
    t.dirty = true;
}

/* ---- who waits for what, and what is mapped ----------------------------------------------------------------------------- */

/* What an accepted DMA_MAP or DMA_UNMAP changes. */
static void follow_maps(const waiting *w)
{
    static uint8_t somewhere; /* the table wants an address; it is never used */
    vfu_iommu_mapping mapping = {.iova = w->iova, .size = w->size, .prot = VFU_IOMMU_READ, .host = &somewhere};
    mapping.user = (void *)(uintptr_t)((w->flags & (VFU_DMA_READABLE | VFU_DMA_WRITEABLE)) | (w->with_fd ? MAP_WITH_FD : 0));
    if (w->cmd == VFU_CMD_DMA_MAP)
        vfu_iommu_map(t.maps, &mapping);
    else if (w->cmd == VFU_CMD_DMA_UNMAP && w->flags & VFU_DMA_UNMAP_ALL)
        vfu_iommu_unmap_all(t.maps);
    else if (w->cmd == VFU_CMD_DMA_UNMAP)
        vfu_iommu_unmap(t.maps, w->iova, w->size);
}

static void ask(const vfu_msg *m, const stream *s, int decoded)
{
    waiting w = {.since = s->when, .id = m->id, .cmd = m->cmd, .twin = s->twin, .with_fd = s->fds_sent > 0};
    if (!decoded && m->cmd == VFU_CMD_DMA_MAP) {
        w.flags = m->u.dma_map.flags;
        w.iova = m->u.dma_map.address;
        w.size = m->u.dma_map.size;
    } else if (!decoded && m->cmd == VFU_CMD_DMA_UNMAP) {
        w.flags = m->u.dma_unmap.flags;
        w.iova = m->u.dma_unmap.address;
        w.size = m->u.dma_unmap.size;
    }
    if (!vfu_msg_wants_reply(m)) {
        if (!decoded)
            follow_maps(&w);
        return;
    }
    unsigned *n = &t.wait_count[s->sender];
    if (*n == WAITING_MAX) /* whoever has that many was forgotten by the other */
        memmove(t.waits[s->sender], t.waits[s->sender] + 1, --*n * sizeof(w));
    t.waits[s->sender][(*n)++] = w;
}

/* Takes the oldest command that a reply answers; ids need not be unique. False: there is none. */
static bool answer(const vfu_msg *m, const stream *s, waiting *out)
{
    side asker = s->sender == CLIENT ? DEVICE : CLIENT;
    waiting *list = t.waits[asker];
    for (unsigned i = 0; i < t.wait_count[asker]; i++) {
        if (list[i].id != m->id || list[i].cmd != m->cmd || list[i].twin != s->twin)
            continue;
        *out = list[i];
        memmove(&list[i], &list[i + 1], (--t.wait_count[asker] - i) * sizeof(*list));
        return true;
    }
    return false;
}

static void tell_slow(uint64_t now)
{
    for (side who = CLIENT; who <= DEVICE; who++) {
        for (unsigned i = 0; i < t.wait_count[who]; i++) {
            waiting *w = &t.waits[who][i];
            if (w->told || now - w->since < SLOW_MS * UINT64_C(1000000))
                continue;
            w->told = true;
            note(now, "waiting", "%s waits for the reply to 0x%04x %s for %.1f s", side_names[who], w->id, vfu_cmd_name(w->cmd),
                 (double)(now - w->since) / 1e9);
        }
    }
}

/* ---- a message ---------------------------------------------------------------------------------------------------------- */

/* Counts and prints a message that was passed on; of a giant one, only the header is given. */
static void look(const stream *s, const uint8_t *bytes, uint32_t size)
{
    vfu_msg m;
    waiting w;
    int decoded = 0;
    if (s->giant) {
        vfu_wire_header header;
        memcpy(&header, bytes, sizeof(header));
        m = (vfu_msg){.id = header.id, .cmd = header.cmd, .flags = header.flags, .error = header.error};
    } else {
        decoded = vfu_msg_decode(bytes, size, &m);
    }
    bool reply = vfu_msg_is_reply(&m), answers = reply && answer(&m, s, &w);
    side asker = reply ? (s->sender == CLIENT ? DEVICE : CLIENT) : s->sender;
    count *c = &t.counts[asker][slot(m.cmd)];
    t.messages++;
    t.bytes += size;
    t.fds += s->fds_sent;
    c->bytes += size;
    if (!reply) {
        c->commands++;
        ask(&m, s, decoded);
    } else if (answers) {
        uint64_t ns = s->when - w.since;
        c->replies++;
        c->errors += vfu_msg_is_error(&m);
        c->latencies[bucket_of(ns)]++;
        c->slowest = ns > c->slowest ? ns : c->slowest;
        if (!vfu_msg_is_error(&m))
            follow_maps(&w);
    } else {
        t.lost++;
    }
    print_message(&m, &(line){.s = s, .size = size, .decoded = decoded, .answers = answers ? &w : NULL});
}

/* ---- passing on --------------------------------------------------------------------------------------------------------- */

static void close_fds(int *fds, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        close(fds[i]);
}

static void open_channel(channel *c, int client, int device, bool twin)
{
    *c = (channel){.open = true, .fds = {client, device}, .streams = {c->streams[0], c->streams[1]}};
    for (side sender = CLIENT; sender <= DEVICE; sender++) {
        stream *s = &c->streams[sender];
        uint8_t *buf = s->buf; /* kept from session to session */
        *s = (stream){.from = c->fds[sender], .to = c->fds[!sender], .sender = sender, .twin = twin, .buf = buf};
    }
}

static void close_channel(channel *c)
{
    if (!c->open)
        return;
    c->open = false;
    for (side i = CLIENT; i <= DEVICE; i++) {
        close(c->fds[i]);
        for (unsigned k = 0; k < c->streams[i].batch_count; k++)
            close_fds(c->streams[i].batches[k].fds, c->streams[i].batches[k].count);
    }
}

/* From here on the bytes of this stream mean nothing to us. */
static void give_up(stream *s, const char *why, uint32_t number)
{
    s->raw = true;
    note(s->when, "unparsed", "what the %s sends is not vfio-user (%s 0x%x): passed on, but not looked at any more",
         side_names[s->sender], why, number);
}

/* The VERSION reply is complete: puts one end of a socket pair of ours in place of the twin socket in it. */
static void splice_twin(const uint8_t *bytes, size_t size, batch *b)
{
    vfu_msg m;
    vfu_caps caps;
    int pair[2], domain = 0;
    socklen_t len = sizeof(domain);
    if (vfu_msg_decode(bytes, size, &m) || vfu_msg_is_error(&m) || !m.u.version.json ||
        vfu_caps_parse(m.u.version.json, m.u.version.json_len, &caps) || !caps.twin_socket || caps.twin_fd_index < 0 ||
        (unsigned)caps.twin_fd_index >= b->count)
        return;
    int *fd = &b->fds[caps.twin_fd_index];
    if (getsockopt(*fd, SOL_SOCKET, SO_DOMAIN, &domain, &len) < 0 || domain != AF_UNIX ||
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
        return; /* passed on untouched */
    open_channel(&t.channels[1], pair[0], *fd, true);
    *fd = pair[1];
}

/* At the start of a message: finds where it ends. False: more of it has to come before any of it is sent. */
static bool begin(stream *s)
{
    size_t there = s->end - s->sent;
    vfu_wire_header header;
    s->start = s->sent;
    s->giant = false;
    s->fds_sent = 0;
    if (!s->raw && there >= sizeof(header)) {
        memcpy(&header, s->buf + s->sent, sizeof(header));
        if (header.size < sizeof(header) || header.size > MESSAGE_MAX)
            give_up(s, "size", header.size);
        else if ((header.flags & VFU_HDR_TYPE_MASK) > VFU_HDR_REPLY)
            give_up(s, "flags", header.flags);
    } else if (!s->raw && !s->ended) {
        return false;
    } else if (!s->raw) {
        give_up(s, "bytes before the end", (uint32_t)there);
    }
    if (s->raw) {
        s->edge = s->end;
        return true;
    }
    bool greeting = !s->greeted && s->sender == DEVICE && !s->twin && header.cmd == VFU_CMD_VERSION &&
                    header.size <= GREETING_MAX && header.flags & VFU_HDR_REPLY;
    if (greeting && there < header.size && !s->ended)
        return false;
    if (greeting && there >= header.size && s->batch_count && s->batches[0].at == s->sent)
        splice_twin(s->buf + s->sent, header.size, &s->batches[0]);
    s->greeted = true;
    s->edge = s->sent + header.size;
    s->giant = header.size > LOOKED_AT_MAX;
    return true;
}

/* Sends once: of one message, with the descriptors that belong there. Like sendmsg, but with a negative errno. */
static int64_t send_part(stream *s)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * VFU_FDS_RECEIVABLE)];
    } control;
    size_t upto = s->edge < s->end ? s->edge : s->end;
    batch *b = s->batch_count ? &s->batches[0] : NULL;
    bool with_fds = b && b->at <= s->sent;
    if (b && !with_fds && b->at < upto)
        upto = b->at;
    struct iovec iov = {.iov_base = s->buf + s->sent, .iov_len = upto - s->sent};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (with_fds) {
        msg.msg_control = control.bytes;
        msg.msg_controllen = (socklen_t)CMSG_SPACE(sizeof(int) * b->count);
        memset(&control, 0, msg.msg_controllen);
        struct cmsghdr *head = CMSG_FIRSTHDR(&msg);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = (socklen_t)CMSG_LEN(sizeof(int) * b->count);
        memcpy(CMSG_DATA(head), b->fds, sizeof(int) * b->count);
    }
    ssize_t n = sendmsg(s->to, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0)
        return errno == ETOOMANYREFS || errno == EINTR ? -EAGAIN : -errno;
    if (with_fds) {
        close_fds(b->fds, b->count);
        s->fds_sent += b->count;
        memmove(b, b + 1, --s->batch_count * sizeof(*b));
    }
    return n;
}

/* The header of a giant message goes past before its end does. */
static void after_part(stream *s)
{
    if (s->giant && s->start < s->sent) {
        vfu_wire_header header;
        memcpy(&header, s->buf + s->start, sizeof(header));
        look(s, s->buf + s->start, header.size);
        s->start = SIZE_MAX; /* once */
    }
    if (s->sent == s->edge && !s->raw && !s->giant)
        look(s, s->buf + s->start, (uint32_t)(s->edge - s->start));
}

/* Passes on what is there. */
static void pass_on(stream *s)
{
    s->stuck = false;
    while (s->sent < s->end && !s->deaf) {
        if (s->sent == s->edge && !begin(s))
            return;
        int64_t n = send_part(s);
        if (n == -EAGAIN) {
            s->stuck = true;
            return;
        }
        if (n < 0) {
            s->deaf = true;
            note(s->when, "deaf", "the %s takes no more: %s", side_names[!s->sender], vfu_errno_name((int)n));
            return;
        }
        s->sent += (size_t)n;
        after_part(s);
    }
}

/* Makes room behind what is still needed: the message under way, or what of it isn't sent. */
static void make_room(stream *s)
{
    size_t keep = s->sent == s->edge || s->raw || s->giant ? s->sent : s->start;
    if (keep == s->end) { /* nothing */
    } else if (LOOKED_AT_MAX + ROOM - s->end >= ROOM) {
        return;
    } else {
        memmove(s->buf, s->buf + keep, s->end - keep);
    }
    for (unsigned i = 0; i < s->batch_count; i++)
        s->batches[i].at -= keep;
    s->start = s->start == SIZE_MAX ? SIZE_MAX : s->start - keep;
    s->sent -= keep;
    s->end -= keep;
    s->edge -= keep;
}

/* Where the message starts that has the last byte received: descriptors that came along are its own. */
static size_t last_message(const stream *s, size_t before)
{
    size_t at = s->sent == s->edge ? s->sent : s->edge;
    if (s->raw || at >= s->end)
        return before;
    for (;;) {
        vfu_wire_header header;
        if (s->end - at < sizeof(header))
            return at;
        memcpy(&header, s->buf + at, sizeof(header));
        if (header.size < sizeof(header) || header.size >= s->end - at)
            return at;
        at += header.size;
    }
}

static void keep_fds(stream *s, size_t at, const int *fds, unsigned n)
{
    batch *b = s->batch_count ? &s->batches[s->batch_count - 1] : NULL;
    if (!b || b->at != at) {
        b = &s->batches[s->batch_count++]; /* there is room: all but those of a message that is held were sent */
        b->at = at;
        b->count = 0;
    }
    for (unsigned i = 0; i < n; i++) {
        if (b->count < VFU_FDS_RECEIVABLE)
            b->fds[b->count++] = fds[i];
        else
            close(fds[i]);
    }
}

static void receive(stream *s)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(sizeof(int) * VFU_FDS_RECEIVABLE)];
    } control;
    int fds[VFU_FDS_RECEIVABLE];
    unsigned n = 0;
    make_room(s);
    size_t before = s->end;
    struct iovec iov = {.iov_base = s->buf + s->end, .iov_len = LOOKED_AT_MAX + ROOM - s->end};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes)};
    ssize_t got = recvmsg(s->from, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    s->when = now_ns();
    if (got <= 0) { /* a connection that was reset has ended, too */
        s->ended = true;
        pass_on(s);
        return;
    }
    struct cmsghdr *c = CMSG_FIRSTHDR(&msg); /* one at most: Linux gives all descriptors in one */
    if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS)
        for (size_t i = 0; i < (c->cmsg_len - CMSG_LEN(0)) / sizeof(int) && n < VFU_FDS_RECEIVABLE; i++)
            memcpy(&fds[n++], CMSG_DATA(c) + i * sizeof(int), sizeof(int));
    if (msg.msg_flags & MSG_CTRUNC)
        note(s->when, "lost", "descriptors of the %s were lost: this program may open no more", side_names[s->sender]);
    s->end += (size_t)got;
    if (n)
        keep_fds(s, last_message(s, before), fds, n);
    pass_on(s);
}

/* ---- a session ---------------------------------------------------------------------------------------------------------- */

/* Tells the receiver when the sender is done. */
static void settle(stream *s)
{
    if (s->ended && !s->closed && (s->sent == s->end || s->deaf)) {
        s->closed = true;
        shutdown(s->to, SHUT_WR);
    }
}

static void serve_channel(channel *c, const struct pollfd *polled)
{
    for (side i = CLIENT; i <= DEVICE; i++) {
        stream *s = &c->streams[i];
        if (s->stuck)
            pass_on(s);
        else if (!s->ended && !s->deaf && polled[i].revents & (POLLIN | POLLHUP | POLLERR))
            receive(s);
        settle(s);
    }
    bool over = c->streams[0].closed && c->streams[1].closed;
    for (side i = CLIENT; i <= DEVICE; i++) { /* somebody has left altogether, and all that they said was passed on */
        stream *s = &c->streams[i];
        over = over || (s->closed && polled[i].revents & (POLLHUP | POLLERR)) || (s->deaf && (c->streams[!i].ended || s->ended));
    }
    if (over)
        close_channel(c);
}

/* What to wait for on one of its sockets. That the peer has gone is always told, so one that has said all, and isn't settled,
 * isn't asked. */
static struct pollfd wanted(const channel *c, side fd)
{
    const stream *in = &c->streams[fd], *out = &c->streams[!fd];
    short events = (short)((!in->stuck && !in->ended && !in->deaf ? POLLIN : 0) | (out->stuck ? POLLOUT : 0));
    return (struct pollfd){.fd = events || in->closed ? c->fds[fd] : -1, .events = events};
}

/* Waits until something can be done, and says what was worth saying meanwhile. */
static int wait_for(struct pollfd *fds, unsigned n, const sigset_t *during)
{
    struct timespec limit = {.tv_sec = SLOW_MS / 1000};
    if (t.dirty)
        limit = (struct timespec){.tv_nsec = FLUSH_MS * 1000000};
    int ready = ppoll(fds, n, t.dirty || t.wait_count[0] || t.wait_count[1] ? &limit : NULL, during);
    if (ready)
        return ready;
    tell_slow(now_ns());
    fflush(stdout);
    t.dirty = false;
    return 0;
}

static void run_session(const sigset_t *during)
{
    while (t.channels[0].open && !asked_to_end) {
        struct pollfd fds[4];
        unsigned n = t.channels[1].open ? 4 : 2;
        for (unsigned i = 0; i < n; i++)
            fds[i] = wanted(&t.channels[i / 2], (side)(i % 2));
        if (wait_for(fds, n, during) <= 0)
            continue;
        serve_channel(&t.channels[0], fds);
        if (n == 4 && t.channels[1].open)
            serve_channel(&t.channels[1], fds + 2);
    }
    close_channel(&t.channels[0]);
    close_channel(&t.channels[1]);
}

/* ---- the summary -------------------------------------------------------------------------------------------------------- */

static void print_count(side who, unsigned i)
{
    const count *c = &t.counts[who][i];
    if (!c->commands)
        return;
    double p50 = percentile(c, 0.50), p90 = percentile(c, 0.90), p99 = percentile(c, 0.99), slowest = (double)c->slowest / 1e3;
    if (t.json)
        printf("{\"event\":\"command\",\"from\":\"%s\",\"cmd\":\"%s\",\"commands\":%llu,\"replies\":%llu,\"errors\":%llu,"
               "\"bytes\":%llu,\"p50_us\":%.1f,\"p90_us\":%.1f,\"p99_us\":%.1f,\"max_us\":%.1f}\n",
               side_names[who], slot_name(i), (unsigned long long)c->commands, (unsigned long long)c->replies,
               (unsigned long long)c->errors, (unsigned long long)c->bytes, p50, p90, p99, slowest);
    else
        printf("%-6s %-24s %9llu %7llu %12llu %9.1f %9.1f %9.1f %9.1f\n", side_names[who], slot_name(i),
               (unsigned long long)c->commands, (unsigned long long)c->errors, (unsigned long long)c->bytes, p50, p90, p99,
               slowest);
}

static void print_maps(void)
{
    vfu_iommu_mapping m;
    vfu_iommu_stats stats;
    uint64_t at = 0;
    vfu_iommu_get_stats(t.maps, &stats);
    if (!t.json)
        printf("mappings alive at the end: %llu, %llu bytes; mapped %llu times, unmapped %llu\n",
               (unsigned long long)(stats.maps - stats.unmaps), (unsigned long long)stats.bytes, (unsigned long long)stats.maps,
               (unsigned long long)stats.unmaps);
    for (unsigned n = 0; vfu_iommu_next(t.maps, at, &m); n++) {
        uintptr_t flags = (uintptr_t)m.user;
        if (t.json)
            printf("{\"event\":\"mapping\",\"address\":\"0x%llx\",\"size\":\"0x%llx\",\"flags\":%u,\"fd\":%s}\n",
                   (unsigned long long)m.iova, (unsigned long long)m.size, (unsigned)flags & 3u,
                   flags & MAP_WITH_FD ? "true" : "false");
        else if (n < MAPS_SHOWN)
            printf("  0x%llx size 0x%llx %s%s%s\n", (unsigned long long)m.iova, (unsigned long long)m.size,
                   flags & VFU_DMA_READABLE ? "r" : "", flags & VFU_DMA_WRITEABLE ? "w" : "",
                   flags & MAP_WITH_FD ? "" : ", by message");
        else if (n == MAPS_SHOWN)
            printf("  ...\n");
        at = m.iova + m.size;
        if (!at)
            break;
    }
}

static void print_summary(void)
{
    uint64_t now = now_ns();
    bool header = true;
    for (side who = CLIENT; who <= DEVICE; who++)
        for (unsigned i = 0; i < t.wait_count[who]; i++)
            note(now, "unanswered", "0x%04x %s of the %s was never answered", t.waits[who][i].id,
                 vfu_cmd_name(t.waits[who][i].cmd), side_names[who]);
    if (t.json)
        printf("{\"time\":%.6f,\"event\":\"summary\",\"session\":%llu,\"messages\":%llu,\"bytes\":%llu,\"fds\":%llu,"
               "\"unasked\":%llu,\"unanswered\":%u}\n",
               seconds(now), (unsigned long long)t.sessions, (unsigned long long)t.messages, (unsigned long long)t.bytes,
               (unsigned long long)t.fds, (unsigned long long)t.lost, t.wait_count[0] + t.wait_count[1]);
    else
        printf("\nsession %llu: %.3f s, %llu messages, %llu bytes, %llu descriptors\n", (unsigned long long)t.sessions,
               seconds(now), (unsigned long long)t.messages, (unsigned long long)t.bytes, (unsigned long long)t.fds);
    for (side who = CLIENT; who <= DEVICE; who++) {
        for (unsigned i = 0; i < COMMANDS; i++) {
            if (header && !t.json && t.counts[who][i].commands) {
                printf("%-6s %-24s %9s %7s %12s %9s %9s %9s %9s\n", "from", "command", "calls", "errors", "bytes", "p50 us",
                       "p90 us", "p99 us", "max us");
                header = false;
            }
            print_count(who, i);
        }
    }
    print_maps();
    fflush(stdout);
    t.dirty = false;
}

/* ---- sessions ----------------------------------------------------------------------------------------------------------- */

static void begin_session(int client, int device)
{
    open_channel(&t.channels[0], client, device, false);
    memset(t.counts, 0, sizeof(t.counts));
    memset(t.wait_count, 0, sizeof(t.wait_count));
    t.messages = t.bytes = t.fds = t.lost = 0;
    t.began = now_ns();
    t.sessions++;
    note(t.began, "session", "session %llu: a client has come", (unsigned long long)t.sessions);
}

/* Clients, one after the other: another one waits until we accept it, as it would wait for the device. */
static int run(int listener, const sigset_t *during)
{
    while (!asked_to_end) {
        struct pollfd waiting_for = {.fd = listener, .events = POLLIN};
        if (ppoll(&waiting_for, 1, NULL, during) <= 0)
            continue;
        int client = vfu_sock_accept(listener);
        if (client == -EAGAIN)
            continue;
        if (client < 0)
            return client;
        int device = vfu_sock_connect(t.to);
        if (device < 0) {
            fprintf(stderr, "vfu_trace: %s: %s (%s)\n", t.to, vfu_errno_name(device), strerror(-device));
            close(client);
            continue;
        }
        int err = vfu_iommu_create(&t.maps, &(vfu_iommu_desc){.max_mappings = 1 << 20, .max_readers = 1});
        if (err) {
            close(client);
            close(device);
            return err;
        }
        begin_session(client, device);
        run_session(during);
        print_summary();
        vfu_iommu_destroy(t.maps);
        t.maps = NULL;
    }
    return 0;
}

/* Bits of the commands in a list like "dma_map,region_write"; 0: one has no such name. DEVICE_ may be left away. */
static uint32_t parse_filter(char *list)
{
    uint32_t bits = 0;
    for (char *rest = list, *name; (name = strtok_r(rest, ",", &rest));) {
        unsigned found = COMMANDS;
        for (char *c = name; *c; c++)
            *c = (char)toupper((unsigned char)*c);
        for (unsigned i = 1; i < COMMANDS - 1; i++) {
            const char *known = vfu_cmd_name((uint16_t)i);
            if (!strcmp(known, name) || (!strncmp(known, "DEVICE_", 7) && !strcmp(known + 7, name)))
                found = i;
        }
        if (found == COMMANDS)
            return 0;
        bits |= 1u << found;
    }
    return bits;
}

static int usage(const char *path, FILE *out)
{
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    fprintf(out,
            "usage: %s --socket-path=LISTEN --to=PATH [OPTION...]\n"
            "Sits between a vfio-user client and its device and prints what they say.\n"
            "  --socket-path=LISTEN  where the client connects, instead of to the device\n"
            "  --to=PATH             where the device listens\n"
            "  --filter=CMD,...      print these commands alone: dma_map, region_read...\n"
            "  --json                one JSON object per line\n"
            "  --summary             print no messages, only the counts at the end\n"
            "  --help                print this\n"
            "-> is a command, <- its reply with the time it took; [...] is who waits for what\n"
            "meanwhile. Clients are served one after the other, with a summary after each;\n"
            "SIGINT and SIGTERM end it. NO_COLOR in the environment: no colours.\n"
            "Status: 0, 1 on an error, 2 for wrong arguments.\n"
            "example: dma_engine --socket-path=/tmp/engine.sock &\n"
            "         %s --socket-path=/tmp/traced.sock --to=/tmp/engine.sock &\n"
            "         dma_client --socket-path=/tmp/traced.sock\n",
            name, name);
    return out == stdout ? 0 : 2;
}

/* Signals come while we wait, and at no other time; *during is the mask for that. */
static void catch_signals(sigset_t *during)
{
    struct sigaction action;
    sigset_t ours;
    memset(&action, 0, sizeof(action));
    action.sa_handler = on_signal;
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN); /* nobody reads the lines any more: client and device go on */
    sigemptyset(&ours);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGINT);
    sigprocmask(SIG_BLOCK, &ours, during);
    sigdelset(during, SIGTERM);
    sigdelset(during, SIGINT);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"socket-path", required_argument, NULL, 's'},
        {"to", required_argument, NULL, 't'},
        {"filter", required_argument, NULL, 'f'},
        {"json", no_argument, NULL, 'j'},
        {"summary", no_argument, NULL, 'q'},
        {"help", no_argument, NULL, 'h'},
        {0},
    };
    static char lines[1 << 16];
    const char *path = NULL;
    int option;
    t.only = UINT32_MAX;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 's': path = optarg; break;
        case 't': t.to = optarg; break;
        case 'j': t.json = true; break;
        case 'q': t.quiet = true; break;
        case 'h': return usage(argv[0], stdout);
        case 'f':
            t.only = parse_filter(optarg);
            if (t.only)
                break;
            return usage(argv[0], stderr);
        default: return usage(argv[0], stderr);
        }
    }
    if (optind != argc || !path || !t.to)
        return usage(argv[0], stderr);
    t.colours = !t.json && isatty(STDOUT_FILENO) && !getenv("NO_COLOR");
    setvbuf(stdout, lines, _IOFBF, sizeof(lines));

    sigset_t during;
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
        files.rlim_cur = files.rlim_max; /* whatever both sides pass around goes through us */
        setrlimit(RLIMIT_NOFILE, &files);
    }
    for (unsigned i = 0; i < 4; i++) {
        t.channels[i / 2].streams[i % 2].buf = malloc(LOOKED_AT_MAX + ROOM);
        if (!t.channels[i / 2].streams[i % 2].buf)
            return 1;
    }
    catch_signals(&during);
    int listener = vfu_sock_listen(path), err = listener < 0 ? listener : run(listener, &during);
    if (err < 0)
        fprintf(stderr, "vfu_trace: %s: %s (%s)\n", path, vfu_errno_name(err), strerror(-err));
    if (listener >= 0) {
        close(listener);
        unlink(path);
    }
    for (unsigned i = 0; i < 4; i++)
        free(t.channels[i / 2].streams[i % 2].buf);
    return err < 0 ? 1 : 0;
}
