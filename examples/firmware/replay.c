/* SPDX-License-Identifier: MIT */
/*
 * Replays the recorded session: frames, decodes and prints each message, answers DMA_MAP and DMA_UNMAP as a device does, and
 * DMA_READ and DMA_WRITE as a client does, from the table of mappings; and compares each answer with the recorded one when that
 * comes by.
 */
#include "firmware.h"

#include "session.h"
#include "string.h"

enum { DATA_MAX = 8192, ROOM = DATA_MAX + 64, FAULTS = sizeof(session_faults) / sizeof(session_faults[0]) };
enum { NOT_OURS = 1 };

/* The answers to the last command of the client, and to the last of the device, until they have come by. */
static struct answer {
    int len; /* 0: none */
    uint8_t bytes[ROOM];
} answers[2];

static unsigned maps, unmaps, served, refused;

static bool is_dma(const vfu_msg *m) { return m->cmd == VFU_CMD_DMA_READ || m->cmd == VFU_CMD_DMA_WRITE; }

/* ---- serving ----------------------------------------------------------------------------------------------------------- */

/* The offset into the client's file is the place in our memory, if it is one. */
static int map(const vfu_msg *m)
{
    vfu_iommu_mapping mapping = {0};
    mapping.iova = m->u.dma_map.address;
    mapping.size = m->u.dma_map.size;
    mapping.prot = m->u.dma_map.flags; /* the same bits */
    if (m->u.dma_map.offset > MEMORY_SIZE || mapping.size > MEMORY_SIZE - m->u.dma_map.offset)
        return -EINVAL;
    mapping.host = memory + m->u.dma_map.offset;
    return vfu_iommu_map(iommu, &mapping);
}

static int unmap(const vfu_msg *m, vfu_msg *reply)
{
    bool all = m->u.dma_unmap.flags & VFU_DMA_UNMAP_ALL;
    int removed = all ? vfu_iommu_unmap_all(iommu) : vfu_iommu_unmap(iommu, m->u.dma_unmap.address, m->u.dma_unmap.size);
    reply->u.dma_unmap = m->u.dma_unmap;
    return removed < 0 ? removed : 0;
}

static int dma(const vfu_msg *m, vfu_msg *reply)
{
    static uint8_t data[DATA_MAX];
    uint64_t iova = m->u.dma.address, count = m->u.dma.count;
    if (count > DATA_MAX)
        return -E2BIG;
    reply->u.dma.address = iova;
    reply->u.dma.count = count;
    if (m->cmd == VFU_CMD_DMA_WRITE) {
        reply->u.dma.ack_len = sizeof(vfu_wire_dma_access);
        return vfu_iommu_write(reader, iova, m->u.dma.data, (size_t)count);
    }
    reply->u.dma.data = data;
    reply->u.dma.data_len = (uint32_t)count;
    return vfu_iommu_read(reader, iova, data, (size_t)count);
}

/* Does what a command says and completes its reply. 0, the negative errno that answers it, or NOT_OURS. */
static int serve(const vfu_msg *m, vfu_msg *reply)
{
    switch (m->cmd) {
    case VFU_CMD_DMA_MAP: maps++; return map(m);
    case VFU_CMD_DMA_UNMAP: unmaps++; return unmap(m, reply);
    case VFU_CMD_DMA_READ:
    case VFU_CMD_DMA_WRITE: return dma(m, reply);
    default: return NOT_OURS;
    }
}

/* ---- checking ---------------------------------------------------------------------------------------------------------- */

static void check_fault(int err)
{
    const vfu_iommu_fault *fault = vfu_iommu_last_fault(reader);
    print_refused();
    check(refused < FAULTS && fault->iova == session_faults[refused] && fault->error == err, "another fault than recorded");
    refused++;
}

static void command(const vfu_msg *m)
{
    struct answer *answer = &answers[is_dma(m)];
    vfu_msg reply, again;
    vfu_msg_init_reply(&reply, m, 0);
    answer->len = 0;
    int err = serve(m, &reply);
    if (err == NOT_OURS)
        return;
    if (err)
        vfu_msg_init_reply(&reply, m, err);
    if (is_dma(m) && err)
        check_fault(err);
    else if (is_dma(m))
        served++;
    answer->len = vfu_msg_encode(&reply, answer->bytes, ROOM);
    check(answer->len > 0 && vfu_msg_decode_dma(answer->bytes, (size_t)answer->len, VFU_DMA_LAYOUT_SPEC, &again) == 0 &&
              vfu_msg_is_reply(&again) && again.id == m->id && again.cmd == m->cmd && again.error == (uint32_t)-err,
          "an answer that doesn't decode to what it was made of");
}

static void compare(const vfu_msg *m, const uint8_t *bytes, size_t len)
{
    struct answer *answer = &answers[is_dma(m)];
    if (answer->len)
        check((size_t)answer->len == len && memcmp(answer->bytes, bytes, len) == 0, "another answer than recorded");
    answer->len = 0;
}

/* Both sides say in VERSION what they can. */
static void check_version(const vfu_msg *m)
{
    vfu_caps caps;
    check(vfu_caps_parse(m->u.version.json, m->u.version.json_len, &caps) == 0 && caps.pgsizes == 4096, "capabilities");
}

void replay(void)
{
    static uint8_t encoded[ROOM];
    char line[160];
    unsigned messages = 0;
    uint32_t size;
    vfu_msg m;
    for (size_t at = 0; at < sizeof(session); at += size, messages++) {
        const uint8_t *bytes = session + at;
        size_t left = sizeof(session) - at;
        if (!check(vfu_msg_size(bytes, left, ROOM, &size) == 0 && size <= left, "the stream has lost its place") ||
            !check(vfu_msg_decode_dma(bytes, size, VFU_DMA_LAYOUT_SPEC, &m) == 0, "a message doesn't decode"))
            return;
        vfu_msg_render(&m, line, sizeof(line));
        board_print(line);
        board_print("\n");
        check(vfu_msg_encode(&m, encoded, ROOM) == (int)size && memcmp(encoded, bytes, size) == 0, "a message encodes otherwise");
        if (m.cmd == VFU_CMD_VERSION)
            check_version(&m);
        if (vfu_msg_is_reply(&m))
            compare(&m, bytes, size);
        else
            command(&m);
    }
    check(refused == FAULTS && served && !answers[0].len && !answers[1].len, "not all of the session came by");
    print_decimal("session: ", messages);
    print_decimal(" messages, ", maps);
    print_decimal(" DMA_MAP, ", unmaps);
    print_decimal(" DMA_UNMAP, ", served);
    print_decimal(" DMA served, ", refused);
    board_print(" refused\n");
}
